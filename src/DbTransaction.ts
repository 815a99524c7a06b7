/**
 * The transaction: an atomic block.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import type * as Context from "effect/Context"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import type * as Schedule from "effect/Schedule"
import * as Scope from "effect/Scope"
import { DbError } from "./DbError.js"
import { coreHere, coreOf } from "./DbEngine.js"
import type { DbEngine, EngineService } from "./DbEngine.js"
import * as Ambient from "./internal/ambient.js"
import * as blocks from "./internal/block.js"
import { keeps, lateError } from "./internal/body.js"
import { combinator } from "./internal/combinator.js"
import type { Combined, CombinatorRest, Known } from "./internal/combinator.js"
import * as endings from "./internal/ending.js"
import type { EngineCore } from "./internal/engine.js"
import { engineFor } from "./internal/instead.js"
import { unitOf } from "./internal/execute.js"
import type { Frame } from "./internal/frame.js"
import {
  beforeEnd,
  busy as endsInHook,
  endSlot,
  inSlot,
  makeSlot,
  placeIn,
  runBefore,
  settleOpen,
  undoOpen
} from "./internal/session.js"
import type { Slot } from "./internal/slot.js"
import { validateOwn } from "./internal/transactionSql.js"
import type { IsolationLevel, TransactionOptions } from "./internal/transactionSql.js"
import type { Unit, UnitState } from "./internal/unit.js"

export type {
  /**
   * @since 0.1.0
   * @category models
   */
  IsolationLevel,
  /**
   * @since 0.1.0
   * @category models
   */
  TransactionOptions
} from "./internal/transactionSql.js"

/**
 * Where a block stands to the transaction around it.
 *
 * | | inside | outside |
 * |---|---|---|
 * | `"nested"` (default) | a savepoint | opens |
 * | `"required"` | joins; its failure marks the nearest real block rollback-only | opens |
 * | `"requiresNew"` | its own session and connection | opens |
 * | `"mandatory"` | joins | `PropagationError` |
 * | `"supports"` | joins | runs without |
 * | `"notSupported"` | runs without, the transaction is suspended | runs without |
 * | `"never"` | `PropagationError` | runs without |
 *
 * @since 0.1.0
 * @category models
 */
export type Propagation = "nested" | "required" | "requiresNew" | "mandatory" | "supports" | "notSupported" | "never"

/**
 * @since 0.1.0
 * @category models
 */
export interface WithTransactionOptions extends TransactionOptions {
  /** Default: `"nested"`. */
  readonly propagation?: Propagation | undefined
  /**
   * Run the whole effect again, in a fresh transaction, after a serialization failure, a deadlock or a connection
   * that was lost before COMMIT was sent. Only the outermost block retries. `true`: up to 8 times, with jittered
   * exponential pauses from 10 ms on. Default: not at all.
   */
  readonly retry?: boolean | Schedule.Schedule<unknown, SqlError> | undefined
  /**
   * Write a marker row in the same transaction, so that a COMMIT whose answer was lost can be settled: committed is
   * a success, not committed a retryable `ConnectionError`. Needs the right to create and write the table
   * `effect_db_outcome`. Default: false.
   */
  readonly verifyOutcome?: boolean | undefined
}

/**
 * @since 0.1.0
 * @category models
 */
export interface AtomicOptions extends Omit<WithTransactionOptions, "propagation"> {
  /**
   * What becomes of a transaction that the session has already open: `"commit"` commits it first, `"rollback"` rolls
   * it back first, `"append"` joins it and commits everything at the end, `"raise"` fails with a
   * `PropagationError`. Default: `"commit"`.
   */
  readonly currentTransaction?: "commit" | "rollback" | "append" | "raise" | undefined
}

/**
 * A block that is open. `A` is what `end` ends it with: a body that says `(tx: Transaction<string>) => ...` is held to
 * it, and the block's type is that of the body or a string.
 *
 * @since 0.1.0
 * @category models
 */
export interface Transaction<A = any> {
  readonly name: string
  /** How many blocks deep it is; the outermost is 1. */
  readonly depth: number
  /** The isolation level that was asked for; nothing: the server's default. */
  readonly isolation: IsolationLevel | undefined
  readonly readOnly: boolean
  /** `"failed"`: the server refuses everything until a rollback. */
  readonly status: UnitState
  /**
   * The block can't commit any more: a success fails with `TransactionAborted`. `TransactionClosed`, as of `end`, when
   * the block has ended, and where it runs without a transaction (`propagation`).
   */
  readonly setRollbackOnly: Effect.Effect<void, SqlError>
  /**
   * Ends this block from inside, through the blocks in it, with a value: the code after is skipped, finalizers run,
   * and error handlers in between don't trap it. Only for the block that was handed to
   * `withTransaction((tx) => ...)` or `atomic((tx) => ...)`, inside it, once; else `TransactionClosed`.
   */
  readonly end: (how: "commit" | "rollback", ...value: EndValue<A>) => Effect.Effect<never, SqlError>
}

/**
 * The value that a block is ended with; where it may be undefined it can be left out.
 *
 * @since 0.1.0
 * @category models
 */
export type EndValue<A> = undefined extends A ? readonly [value?: A] : readonly [value: A]

/**
 * What a body yields, or what its block was ended with. A parameter without a type takes any value and says nothing of
 * it: TypeScript has to know the parameter before it has looked at the body.
 *
 * @since 0.1.0
 * @category models
 */
export type Ended<Result, Tx> =
  Tx extends Transaction<infer Value>
    ? 0 extends 1 & Value
      ? Result
      : Result extends Effect.Effect<infer A, infer E, infer R>
        ? Effect.Effect<A | Value, E, R>
        : Result
    : Result

/**
 * A block that was opened by hand, and has to be ended by hand: what is left open is rolled back with its session.
 * Ending it twice is a `TransactionClosed`; ending it while a block inside it is open, a `SessionBusy`.
 *
 * @since 0.1.0
 * @category models
 */
export interface ManualTransaction extends Omit<Transaction, "end"> {
  readonly commit: Effect.Effect<void, SqlError>
  readonly rollback: Effect.Effect<void, SqlError>
}

// An effect, without saying of what: `Effect<any, any, any>` would make `any` of the body's own E and R where they
// are inferred from what is returned.
interface AnyBody {
  readonly [Effect.EffectTypeId]: unknown
}

/**
 * A combinator that also takes a function of the block that it opens.
 *
 * @since 0.1.0
 * @category models
 */
export interface TransactionCombinator<Options, Name extends string> {
  <Arg extends Effect.Effect<any, any, any> | ((tx: Transaction) => AnyBody) | Options>(
    effectOrOptions: Arg & Known<Arg, Options>,
    ...rest: CombinatorRest<Options>
  ): Arg extends (tx: infer Tx) => infer Result
    ? Combined<Ended<Result, Tx>, SqlError, DbEngine<Name>>
    : Combined<Arg, SqlError, DbEngine<Name>>
}

/**
 * @since 0.1.0
 * @category models
 */
export interface TransactionModule<Name extends string> {
  /** The innermost block around the fiber; none in a session without blocks. */
  readonly current: Effect.Effect<Option.Option<Transaction>, never, DbEngine<Name>>
  /** The innermost block, or the session's transaction, can't commit any more. Without either: `NoSession`. */
  readonly setRollbackOnly: Effect.Effect<void, SqlError, DbEngine<Name>>
  /**
   * A block for the current scope: success commits it, everything else rolls it back. A commit that fails where
   * nobody can be told dies with the `DbError`.
   */
  readonly scoped: (options?: TransactionOptions) => Effect.Effect<Transaction, SqlError, DbEngine<Name> | Scope.Scope>
}

const isReadOnly = (unit: Unit, frame: Frame): boolean => {
  for (let at: Frame | undefined = frame; at !== undefined; at = at.parent)
    if (at.options.readOnly === true) return true
  return unit.options.readOnly === true
}

const statusOf = (unit: Unit, frame: Frame): UnitState => (frame.ended ? "closed" : unit.state)

const noEnd = (): Effect.Effect<never, SqlError> =>
  Effect.fail(
    DbError.make("PropagationError", {
      message: "This block has no body that could be ended early.",
      hint: "tx.end belongs to the tx of withTransaction((tx) => ...) and atomic((tx) => ...)."
    })
  )

const handleOf = (unit: Unit, frame: Frame, end: Transaction["end"]): Transaction => ({
  name: frame.name,
  depth: frame.depth,
  isolation: frame.options.isolation ?? unit.options.isolation,
  get readOnly() {
    return isReadOnly(unit, frame)
  },
  get status() {
    return statusOf(unit, frame)
  },
  setRollbackOnly: Effect.suspend(() => {
    if (frame.ended) return Effect.fail(frame.closedError())
    blocks.markRollbackOnly(frame, "setRollbackOnly was called")
    return Effect.void
  }),
  end
})

type AnyEffect = Effect.Effect<any, any, any>

const withoutOne = Effect.suspend(() =>
  Effect.fail(
    DbError.make("TransactionClosed", {
      message: "The block has no transaction: its propagation does without one.",
      hint: 'What it has done is done. Use propagation: "required" or "nested" where it has to be undone.'
    })
  )
)

/** What a function is given in a block that runs without: its `propagation` may be decided far away. */
const noTransaction: Transaction = {
  name: "no transaction",
  depth: 0,
  isolation: undefined,
  readOnly: false,
  status: "closed",
  setRollbackOnly: withoutOne,
  end: () => withoutOne
}

const bodyOf = (arg: unknown): Parameters<typeof blocks.withTransaction>[1] =>
  Effect.isEffect(arg)
    ? (arg as AnyEffect)
    : (block) =>
        (arg as (tx: Transaction) => AnyEffect)(
          block === undefined ? noTransaction : handleOf(block.unit, block.frame, block.end)
        )

const transactional = <Options extends object>(
  run: (core: EngineCore, body: Parameters<typeof blocks.withTransaction>[1], options: Options) => AnyEffect,
  engine: Context.Tag<any, EngineService>
): ((...args: ReadonlyArray<any>) => any) => {
  const go = (arg: unknown, options: Options): AnyEffect =>
    Effect.flatMap(engine, (service) => coreHere(service, (core) => run(core, bodyOf(arg), options)))
  const ofEffect = combinator<Options, never, never>(go) as (...args: ReadonlyArray<any>) => any
  return (arg, ...rest) =>
    typeof arg === "function" && !Effect.isEffect(arg)
      ? go(arg, (typeof rest[0] === "object" && rest[0] !== null ? rest[0] : {}) as Options)
      : ofEffect(arg, ...rest)
}

/** @internal */
export const makeWithTransaction = <Name extends string>(
  engine: Context.Tag<DbEngine<Name>, EngineService>
): TransactionCombinator<WithTransactionOptions, Name> =>
  transactional<WithTransactionOptions>(blocks.withTransaction, engine) as TransactionCombinator<
    WithTransactionOptions,
    Name
  >

/** @internal */
export const makeAtomic = <Name extends string>(
  engine: Context.Tag<DbEngine<Name>, EngineService>
): TransactionCombinator<AtomicOptions, Name> =>
  transactional<AtomicOptions>(blocks.atomic, engine) as TransactionCombinator<AtomicOptions, Name>

/** Opens a block by hand in a session: the transaction itself when none is open, else a savepoint. @internal */
export const beginManual = (
  slot: Slot,
  unit: Unit,
  at: Frame,
  options: TransactionOptions,
  savepoint: boolean
): Effect.Effect<ManualTransaction, SqlError> =>
  Effect.suspend(() => {
    const refused = validateOwn(options)
    if (refused !== undefined) return Effect.fail(refused)
    return Effect.uninterruptibleMask((restore) => {
      const kind = () => (savepoint || unit.open || at.top.kind !== "session" ? "savepoint" : "transaction")
      return Effect.map(blocks.openFrame(at, kind, { ...options, manual: true }, restore, "own"), (frame) => {
        limit(frame, options)
        const end = (commits: boolean): Effect.Effect<void, SqlError> =>
          Effect.uninterruptibleMask((restore) => endManual(slot, unit, frame, commits, restore))
        const { end: _, ...handle } = handleOf(unit, frame, noEnd)
        return { ...handle, commit: end(true), rollback: end(false) }
      })
    })
  })

/** Nobody is there to be interrupted when the time is over: the block itself fails from then on. */
const limit = (frame: Frame, { timeout }: TransactionOptions): void => {
  if (timeout !== undefined) frame.limit(Duration.toMillis(timeout), () => lateError(frame.name, timeout))
}

const endManual = (
  slot: Slot,
  unit: Unit,
  frame: Frame,
  commits: boolean,
  restore: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
): Effect.Effect<void, SqlError> => {
  if (frame.ended) {
    return Effect.fail(
      DbError.make("TransactionClosed", {
        message: `The block "${frame.name}" has ended.`,
        hint: "It was committed, rolled back, or its session is closed. Ending it twice is a bug."
      })
    )
  }
  const hooks = unit.preparing > 0 ? endsInHook(unit, commits ? "commit" : "roll back") : undefined
  // RELEASE is not sent before the next statement.
  const stuck = frame.kind === "savepoint" && commits ? undefined : unit.stuck
  const busy = hooks ?? busyIn(frame) ?? stuck
  if (busy !== undefined) return Effect.fail(busy)
  if (frame.kind === "savepoint") return endings.endBlock(unit, frame, commits)
  const before: Effect.Effect<void, SqlError> = commits ? restore(runBefore(slot, unit, frame)) : Effect.void
  return beforeEnd(before, (went) => {
    // Another fiber's, opened while the hooks ran.
    const busy = went ? busyIn(frame) : undefined
    if (busy !== undefined) return Effect.fail(busy)
    frame.seal()
    // What the session waits for with hooks of its own has ended when there was something to end.
    const frames = unit.hasToEnd ? [unit.frame, frame] : [frame]
    return Effect.ensuring(
      commits && went ? settleOpen(unit, frames, frame) : undoOpen(unit, frames),
      Effect.sync(() => frame.close())
    )
  })
}

const busyIn = (frame: Frame): DbError | undefined =>
  frame.child === undefined
    ? undefined
    : DbError.make("SessionBusy", {
        message: `The block "${frame.name}" can't end while "${frame.child.name}" is open inside it.`,
        hint: "End inner blocks before outer ones.",
        block: frame.child.name
      })

/** Nobody can be told of a failure, but the block that ends early through this one. */
const endAs = (
  { ending }: Frame,
  exit: Exit.Exit<unknown, unknown>,
  end: Effect.Effect<void, SqlError>
): Effect.Effect<void> =>
  ending === undefined || Exit.isSuccess(exit)
    ? Effect.orDie(end)
    : Effect.catchAll(end, (error) =>
        Effect.sync(() => {
          ending.failure ??= error as DbError
        })
      )

const scoped = (core: EngineCore, options: TransactionOptions): Effect.Effect<Transaction, SqlError, Scope.Scope> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.withFiberRuntime<Transaction, SqlError, Scope.Scope>((fiber) => {
      const refused = validateOwn(options)
      if (refused !== undefined) return Effect.fail(refused)
      const entry = Ambient.entry(fiber, core)
      return Effect.flatMap(Effect.scope, (scope) => {
        const enter = (
          slot: Slot,
          unit: Unit,
          frame: Frame,
          end: (success: boolean) => Effect.Effect<void, SqlError>
        ): Effect.Effect<Transaction> => {
          limit(frame, options)
          const undo = (now: Ambient.Entry): Ambient.Entry =>
            now.frame === frame ? { ...now, ...placeIn(entry) } : now
          return Effect.flatMap(Ambient.open(core, inSlot(slot, frame), undo), ({ leave }) =>
            Scope.addFinalizerExit(scope, (exit) => Effect.ensuring(endAs(frame, exit, end(keeps(frame, exit))), leave))
          ).pipe(Effect.as(handleOf(unit, frame, noEnd)))
        }
        const { slot } = entry
        if (slot !== undefined) {
          const inside = Effect.suspend(() => {
            const at = unitOf(slot, entry.frame)
            if (at instanceof Error) return Effect.fail(at)
            return Effect.flatMap(
              blocks.openFrame(at.frame, () => "savepoint", options, restore),
              (frame) => enter(slot, at.unit, frame, (success) => endings.endBlock(at.unit, frame, success))
            )
          })
          return slot.needsGate ? Effect.zipRight(restore(slot.prepare), inside) : inside
        }
        return Effect.flatMap(makeSlot(core, entry, options, false), (slot) =>
          Effect.zipRight(
            restore(slot.prepare),
            Effect.suspend(() => {
              const unit = slot.get()
              const frame = unit.frame.open("transaction", options, "own")
              return enter(slot, unit, frame, (success) => {
                const before = success ? runBefore(slot, unit, frame) : Effect.void
                return beforeEnd(before, (went) => endSlot(slot, frame, success && went))
              })
            })
          )
        )
      })
    })
  )

/** @internal */
export const make = <Name extends string>(
  engine: Context.Tag<DbEngine<Name>, EngineService>
): TransactionModule<Name> => ({
  current: Effect.flatMap(engine, (service) =>
    Effect.withFiberRuntime((fiber) => {
      const { frame, slot } = Ambient.entry(fiber, engineFor(fiber, coreOf(service)))
      // A block that was begun by hand belongs to no fiber: it is found through the session.
      const at = (frame ?? slot?.unit?.frame)?.top
      return Effect.succeed(
        at === undefined || at.ended || at.kind === "session"
          ? Option.none()
          : Option.some(handleOf(at.unit, at, noEnd))
      )
    })
  ),
  setRollbackOnly: Effect.flatMap(engine, (service) =>
    Effect.withFiberRuntime<void, SqlError>((fiber) => {
      const { frame, slot } = Ambient.entry(fiber, engineFor(fiber, coreOf(service)))
      if (slot === undefined) {
        return Effect.fail(
          DbError.make("NoSession", {
            message: "There is no transaction to mark as rollback-only.",
            hint: "setRollbackOnly works inside withTransaction, atomic or a session."
          })
        )
      }
      const at = unitOf(slot, frame)
      if (at instanceof Error) return Effect.fail(at)
      blocks.markRollbackOnly(at.frame.top, "setRollbackOnly was called")
      return Effect.void
    })
  ),
  scoped: (options) => Effect.flatMap(engine, (service) => coreHere(service, (core) => scoped(core, options ?? {})))
})
