/**
 * Transactions as blocks around an effect: where they stand (propagation), and how often they run.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Schedule from "effect/Schedule"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import { bare, Block, endAs, exitOf, limited, runBody } from "./body.js"
import type { Body } from "./body.js"
import * as endings from "./ending.js"
import type { EngineCore } from "./engine.js"
import { conflict, joinable, refuse } from "./conflict.js"
import { goneFrom, unitOf } from "./execute.js"
import { aroundOf, atTurn, framesAbove } from "./frame.js"
import type { Frame, FrameKind } from "./frame.js"
import { attemptsOf, blockSpan } from "./observe.js"
import type { Attempts } from "./observe.js"
import { makeMarker, prepareOutcome } from "./outcome.js"
import {
  afterBefore,
  beforeEnd,
  busy,
  endNow,
  inSlot,
  newSlot,
  runBefore,
  settleOpen,
  shareableRoot,
  undoOpen
} from "./session.js"
import type { Slot } from "./slot.js"
import { validate } from "./transactionSql.js"
import type { TransactionOptions } from "./transactionSql.js"
import type { Unit } from "./unit.js"

/** @internal */
export interface BlockOptions extends TransactionOptions {
  readonly propagation?:
    "nested" | "required" | "requiresNew" | "mandatory" | "supports" | "notSupported" | "never" | undefined
  readonly retry?: boolean | Schedule.Schedule<unknown, SqlError> | undefined
  readonly verifyOutcome?: boolean | undefined
}

type Restore = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>

/**
 * Opens an inner block when it is its turn, for a caller that can't be interrupted otherwise. What is open then decides
 * what it is, and which options it can have.
 * @internal
 */
export const openFrame = (
  parent: Frame,
  kind: () => FrameKind,
  options: BlockOptions & { manual?: boolean },
  restore: Restore,
  holds?: Frame["holds"]
): Effect.Effect<Frame, DbError> =>
  Effect.suspend(() => {
    let opened: Frame | undefined = undefined
    const wait = atTurn<Frame>(parent, () => {
      const what = kind()
      const refused = what === "savepoint" ? conflict(parent.unit, parent.top, options, false) : undefined
      if (refused !== undefined) return refused
      opened = parent.open(what, options, what === "savepoint" ? undefined : holds)
      return Effect.succeed(opened)
    })
    // Interrupted in the hand-over, which is not over before `restore` is: nobody else will end it.
    return Effect.onError(restore(wait), () => Effect.sync(() => opened?.close()))
  })

const savepoint = (): FrameKind => "savepoint"

/** A savepoint around an effect. */
const nested = (
  slot: Slot,
  unit: Unit,
  parent: Frame,
  body: Body,
  options: BlockOptions,
  attempts: Attempts | undefined
) =>
  Effect.uninterruptibleMask((restore) =>
    Effect.flatMap(openFrame(parent, savepoint, options, restore), (frame) =>
      inSavepoint(slot, unit, frame, body, options, attempts, restore)
    )
  )

/** The body and the end of a savepoint that is open. */
const inSavepoint = (
  slot: Slot,
  unit: Unit,
  frame: Frame,
  body: Body,
  options: BlockOptions,
  attempts: Attempts | undefined,
  restore: Restore
): Effect.Effect<any, any, any> => {
  const block = new Block(slot, unit, frame)
  const whole = Ambient.during(
    restore(runBody(block, body, options)),
    unit.engine,
    inSlot(slot, frame),
    (raw): Effect.Effect<any, any, any> => {
      const { commits, exit } = exitOf(block, raw)
      return endAs(frame, exit, commits, endings.endBlock(unit, frame, commits))
    }
  )
  if (attempts === undefined) return whole
  return blockSpan("savepoint", unit.engine, { ...options, retry: false }, attempts, () => frame.outcome, whole)
}

/** The whole transaction around an effect, in a session of its own. */
const outermost = (
  engine: EngineCore,
  entry: Entry,
  body: Body,
  options: BlockOptions,
  isolated: boolean,
  attempts: Attempts | undefined
) =>
  Effect.uninterruptibleMask((restore) => {
    const outer = isolated ? undefined : shareableRoot(entry)
    if (outer instanceof DbError) return Effect.fail(outer)
    const slot = newSlot(engine, entry, options, outer)
    const run = (): Effect.Effect<any, any, any> => {
      const unit = slot.get()
      if (options.verifyOutcome === true) unit.wantsMarker = makeMarker
      const frame = unit.frame.open("transaction", options, "own")
      const block = new Block(slot, unit, frame)
      return Ambient.during(restore(runBody(block, body, options)), engine, inSlot(slot, frame), (raw) =>
        afterBefore(slot, frame, raw, restore, (raw) => {
          const { commits, exit } = exitOf(block, raw)
          const early = commits && !Exit.isSuccess(raw)
          const end: Effect.Effect<void, any> = early
            ? beforeEnd(runBefore(slot, unit, frame), (went) => endNow(slot, frame, went))
            : endNow(slot, frame, commits)
          return endAs(frame, exit, commits, end)
        })
      )
    }
    const prepared = slot.needsGate ? Effect.flatMap(restore(slot.prepare), run) : undefined
    const whole = () =>
      options.verifyOutcome === true
        ? Effect.flatMap(
            restore(prepareOutcome(engine, engine.transactionOptions(options), outer)),
            () => prepared ?? run()
          )
        : (prepared ?? run())
    if (attempts === undefined) return whole()
    const outcome = () => slot.unit?.outcome ?? "none"
    return blockSpan("transaction", engine, options, attempts, outcome, Effect.suspend(whole))
  })

const retryable = (error: unknown): boolean => {
  const reason = DbError.reason(error)
  return (
    reason !== undefined &&
    (reason._tag === "SerializationError" ||
      reason._tag === "DeadlockError" ||
      // Lost in the transaction: not that of a statement outside of it, which may have been done.
      (reason._tag === "ConnectionError" && reason.phase !== "connect" && reason.isRetryable) ||
      (reason._tag === "TransactionAborted" && reason.firstError !== undefined && retryable(reason.firstError)))
  )
}

const defaultRetry = Schedule.intersect(Schedule.jittered(Schedule.exponential("10 millis")), Schedule.recurs(8))

const withRetry = (
  effect: Effect.Effect<any, any, any>,
  options: BlockOptions,
  mayRetry: () => boolean = () => true
): Effect.Effect<any, any, any> =>
  options.retry === undefined || options.retry === false
    ? effect
    : Effect.retry(effect, {
        while: (error) => retryable(error) && mayRetry(),
        schedule: options.retry === true ? defaultRetry : (options.retry as Schedule.Schedule<unknown, unknown>)
      })

/** Joins what is open: no block of its own on the server. */
const join = (slot: Slot, unit: Unit, around: Frame, body: Body, options: BlockOptions) =>
  Effect.flatMap(joinable(unit, around, options), (frame) => {
    const block = new Block(slot, unit, frame)
    return Effect.uninterruptibleMask((restore) =>
      Effect.flatMap(Effect.exit(restore(runBody(block, body, options))), (raw) => {
        const { commits, exit } = exitOf(block, raw)
        if (block.ending !== undefined && frame.ending === block.ending) frame.ending = undefined
        if (!commits) markUnkept(frame, `a block that joined "${frame.name}" failed`)
        return exit
      })
    )
  })

/** @internal */
export const markRollbackOnly = (frame: Frame, why: string): void => {
  if (!frame.ended) frame.rollbackOnly ??= why
}

/** As `markRollbackOnly`, of a block whose work may have gone over to the one around it meanwhile. @internal */
export const markUnkept = (frame: Frame, why: string): void => {
  const open = framesAbove(frame).find((_) => !_.ended)
  if (open !== undefined) markRollbackOnly(open, why)
}

/** @internal */
export const withTransaction = (engine: EngineCore, body: Body, options: BlockOptions): Effect.Effect<any, any, any> =>
  Effect.withFiberRuntime((fiber) => {
    const refused = validate(options)
    if (refused !== undefined) return Effect.fail(refused)
    const entry = Ambient.entry(fiber, engine)
    const mode = options.propagation ?? "nested"
    const attempts = attemptsOf(fiber)
    const open = () => withRetry(outermost(engine, entry, body, options, mode === "requiresNew", attempts), options)
    const without = () => limited(bare(body), options.name ?? mode, options.timeout, false)
    const { slot } = entry
    if (slot === undefined) {
      switch (mode) {
        case "mandatory":
          return refuse(
            'There is no transaction, and propagation is "mandatory".',
            "Call it inside withTransaction or a session, or use another propagation."
          )
        case "supports":
        case "notSupported":
        case "never":
          return without()
        default:
          return open()
      }
    }
    // Also where what is around it would be left alone: who has outlived it is told so.
    const gone = goneFrom(slot, entry.frame)
    if (gone !== undefined) return Effect.fail(gone)
    switch (mode) {
      case "never":
        return refuse(
          'There is a transaction, and propagation is "never".',
          "Call it outside, or under DbSession.detach."
        )
      case "requiresNew":
        return open()
      case "notSupported":
        return Ambient.locally(without(), engine, (_) => ({ ..._, ...Ambient.nowhere, around: aroundOf(_) }))
      default: {
        const inside = Effect.suspend(() => {
          const at = unitOf(slot, entry.frame)
          if (at instanceof Error) return Effect.fail(at)
          return mode === "nested"
            ? nested(slot, at.unit, at.frame, body, options, attempts)
            : join(slot, at.unit, at.frame, body, options)
        })
        return slot.needsGate ? Effect.zipRight(slot.prepare, inside) : inside
      }
    }
  })

/** @internal */
export interface AtomicOptions extends BlockOptions {
  readonly currentTransaction?: "commit" | "rollback" | "append" | "raise" | undefined
}

/** A block that commits by itself inside a session, which stays open. @internal */
export const atomic = (engine: EngineCore, body: Body, options: AtomicOptions): Effect.Effect<any, any, any> =>
  Effect.withFiberRuntime((fiber) => {
    const refused = validate(options)
    if (refused !== undefined) return Effect.fail(refused)
    const entry = Ambient.entry(fiber, engine)
    const { slot } = entry
    const attempts = attemptsOf(fiber)
    if (slot === undefined) return withRetry(outermost(engine, entry, body, options, false, attempts), options)
    const inside = Effect.suspend((): Effect.Effect<any, any, any> => {
      const at = unitOf(slot, entry.frame)
      if (at instanceof Error) return Effect.fail(at)
      const { unit } = at
      if (at.frame.kind !== "session") {
        return options.currentTransaction === "raise"
          ? raise(unit)
          : nested(slot, unit, at.frame, body, options, attempts)
      }
      // Its COMMIT would be that of the hooks.
      if (unit.preparing > 0) return Effect.fail(busy(unit, "commit an atomic block")!)
      return inSession(slot, unit, body, options, attempts)
    })
    return slot.needsGate ? Effect.zipRight(slot.prepare, inside) : inside
  })

/**
 * A transaction of its own in the session's place. The block is opened before what the session has open is ended, so
 * that nobody comes in between; a retry finds what siblings have done meanwhile and ends that as well. Where a block
 * has been opened by hand it is a savepoint.
 */
const inSession = (
  slot: Slot,
  unit: Unit,
  body: Body,
  options: AtomicOptions,
  attempts: Attempts | undefined
): Effect.Effect<any, any, any> => {
  const mode = options.currentTransaction ?? "commit"
  let appends = false
  const kind = (): FrameKind => (unit.frame.top.kind === "session" ? "transaction" : "savepoint")
  const attempt = Effect.uninterruptibleMask((restore) =>
    Effect.flatMap(openFrame(unit.frame, kind, options, restore), (frame) => {
      if (frame.kind === "savepoint") {
        if (mode !== "raise") return Effect.exit(inSavepoint(slot, unit, frame, body, options, attempts, restore))
        frame.close()
        return Effect.exit(raise(unit))
      }
      const spanned = (effect: Effect.Effect<any, any, any>) =>
        attempts === undefined
          ? effect
          : blockSpan("transaction", unit.engine, options, attempts, () => unit.outcome, effect)
      const clear: Effect.Effect<void, SqlError> = Effect.suspend(() => {
        if (!unit.hasToEnd) return Effect.void
        const { stuck } = unit
        if (stuck !== undefined) return Effect.fail(stuck)
        switch (mode) {
          case "commit":
            return Effect.zipRight(
              restore(Effect.zipRight(runBefore(slot, unit, frame), endings.whenQuiet(unit))),
              settleOpen(unit, [unit.frame], unit.frame)
            )
          case "rollback":
            return undoOpen(unit, [unit.frame])
          case "append":
            appends = true
            return conflict(unit, unit.frame, options, true) ?? Effect.void
          default:
            return raise(unit)
        }
      })
      const ready = Effect.suspend(() => {
        if (frame.ended) return Effect.fail(endings.goneError(unit, frame))
        frame.holds = appends ? "shared" : "own"
        return options.verifyOutcome === true
          ? restore(prepareOutcome(unit.engine, unit.options, unit.begun ? undefined : unit.lease))
          : Effect.void
      })
      const run = Effect.suspend(() => {
        if (!unit.begun) unit.outcome = "none"
        unit.wantsMarker = options.verifyOutcome === true ? makeMarker : undefined
        const block = new Block(slot, unit, frame)
        const whole = Effect.tap(runBody(block, body, options), () =>
          Effect.zipRight(runBefore(slot, unit, frame), endings.whenDone(unit, frame))
        )
        return restore(Ambient.locally(whole, unit.engine, inSlot(slot, frame))).pipe(
          Effect.exit,
          Effect.flatMap((raw) => {
            const { commits, exit } = exitOf(block, raw)
            const end = (went: boolean) => endOwn(unit, frame, went)
            const early = commits && !Exit.isSuccess(raw)
            const ended = early ? beforeEnd(runBefore(slot, unit, frame), end) : end(commits)
            return endAs(frame, exit, commits, ended)
          })
        )
      })
      // What was open before is not this block's: that it can't be ended is no reason to run the block again.
      return Effect.flatMap(Effect.exit(clear), (cleared): Effect.Effect<Exit.Exit<any, any>, any, any> =>
        Exit.isFailure(cleared)
          ? Effect.succeed(cleared)
          : Effect.map(Effect.zipRight(ready, spanned(run)), Exit.succeed)
      ).pipe(
        Effect.ensuring(
          Effect.sync(() => {
            unit.wantsMarker = undefined
            frame.close()
          })
        )
      )
    })
  )
  return Effect.flatten(withRetry(attempt, options, () => !appends))
}

/** The end of a transaction that a block has for itself in a session. */
const endOwn = (unit: Unit, frame: Frame, success: boolean): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    if (frame.ended) return success ? Effect.fail(endings.goneError(unit, frame)) : Effect.void
    // The session's own hooks wait for the end of the session's own work.
    const frames = frame.holds === "shared" ? [unit.frame, frame] : [frame]
    const left = frame.child
    frame.seal()
    const end = success ? settleOpen(unit, frames, frame) : undoOpen(unit, frames)
    return left === undefined || !success
      ? end
      : endings.warnOfLeft(unit, left).pipe(Effect.zipRight(endings.undo(unit, left)), Effect.zipRight(end))
  })

const raise = (unit: Unit): Effect.Effect<never, DbError> =>
  refuse(
    `The session "${unit.name}" has an open transaction, and currentTransaction is "raise".`,
    'Commit or roll back first, or choose "commit", "rollback" or "append".'
  )
