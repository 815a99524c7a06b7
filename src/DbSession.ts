/**
 * The session: a unit of work with a lazy connection and a lazy transaction.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import type * as Statement from "@effect/sql/Statement"
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import { DbError } from "./DbError.js"
import { coreHere, coreOf, onceFor, viewOf } from "./DbEngine.js"
import type { DbEngine, DbSql, EngineService } from "./DbEngine.js"
import type { HookServices } from "./DbOptions.js"
import { beginManual } from "./DbTransaction.js"
import type { ManualTransaction } from "./DbTransaction.js"
import type { DbSession } from "./Default.js"
import * as Ambient from "./internal/ambient.js"
import { autocommit, isolated } from "./internal/autocommit.js"
import { runBatch } from "./internal/batch.js"
import type { BatchResult } from "./internal/batch.js"
import { combinator } from "./internal/combinator.js"
import type { Combinator } from "./internal/combinator.js"
import { tokenOf, waitFor, withCommitToken } from "./internal/commitToken.js"
import type { EngineCore } from "./internal/engine.js"
import * as every from "./internal/everySession.js"
import { unitOf } from "./internal/execute.js"
import type { Frame } from "./internal/frame.js"
import { engineFor, withEngine } from "./internal/instead.js"
import * as sessions from "./internal/session.js"
import type { Slot } from "./internal/slot.js"
import type { TransactionOptions } from "./internal/transactionSql.js"
import type { Hook, Unit, UnitState } from "./internal/unit.js"

export type { DbSession } from "./Default.js"
export type { UnitState as SessionState } from "./internal/unit.js"

export type {
  /**
   * @since 0.1.0
   * @category models
   */
  BatchResult
} from "./internal/batch.js"

/**
 * @since 0.1.0
 * @category models
 */
export interface SessionOptions<Name extends string = "default"> extends TransactionOptions {
  /** Run before each COMMIT of the session, still inside. Its failure prevents the commit. */
  readonly beforeCommit?: Effect.Effect<unknown, SqlError, HookServices<Name>> | undefined
}

/**
 * @since 0.1.0
 * @category models
 */
export interface MakeOptions<Name extends string = "default"> extends SessionOptions<Name> {
  /** Commit at the end of the scope when it succeeds. Default: false, everything uncommitted is rolled back. */
  readonly autocommit?: boolean | undefined
}

/**
 * Where in the log of the server a commit is: `0/3000148`. It is a string that can be kept, sent and given to `waitFor`
 * by another process.
 *
 * @since 0.1.0
 * @category models
 */
export type CommitToken = string

/**
 * @since 0.1.0
 * @category models
 */
export interface WaitOptions {
  /** Default: 1 s. */
  readonly timeout?: Duration.DurationInput | undefined
}

/**
 * A session: the members of the facade and of every handle.
 *
 * @since 0.1.0
 * @category models
 */
export interface Session {
  readonly name: string
  /** Runs in this session. The first statement borrows a connection; BEGIN rides with it. */
  readonly sql: DbSql
  readonly state: Effect.Effect<UnitState>
  /**
   * Commits what is open and keeps the connection; the next statement opens a new transaction on it. Without a
   * transaction: nothing. Inside a block, and while hooks before a commit run: `SessionBusy`. Can't be interrupted
   * once COMMIT is on its way, which takes at most `settleTimeout`. Fails with `TransactionAborted` when a failed
   * statement was swallowed, with the reason of a constraint that is checked at COMMIT, with `CommitUnknown` when the
   * connection is lost meanwhile.
   */
  readonly commit: Effect.Effect<void, SqlError>
  /** Rolls back what is open and keeps the connection. Inside a block: `SessionBusy`. */
  readonly rollback: Effect.Effect<void, SqlError>
  /** Rolls back what is open and gives the connection back: the next use is a new session. Twice: nothing. */
  readonly close: Effect.Effect<void, SqlError>
  /** Opens a block by hand: the transaction itself when none is open, else a savepoint. */
  readonly begin: (options?: TransactionOptions) => Effect.Effect<ManualTransaction, SqlError>
  /** Opens a savepoint by hand. */
  readonly savepoint: (options?: TransactionOptions) => Effect.Effect<ManualTransaction, SqlError>
  /** Runs an effect with this session as the ambient one. A closed one: `SessionClosed`. */
  readonly use: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E | SqlError, R>
  /** Sends all statements at once, in the session's transaction: one round trip. One of another session is refused. */
  readonly batch: <const Statements extends ReadonlyArray<Statement.Statement<any>>>(
    statements: Statements
  ) => Effect.Effect<BatchResult<Statements>, SqlError>
  /**
   * Once per COMMIT, just before it, still inside; its failure prevents the commit. It is of the block that it is
   * registered in: of a session it runs before each COMMIT, of a block that is rolled back it is dropped. One that is
   * registered by another one runs before the same COMMIT.
   */
  readonly beforeCommit: <A, R>(effect: Effect.Effect<A, SqlError, R>) => Effect.Effect<void, SqlError, R>
  /**
   * A token for all that the session, and those opened in it, have committed; none when nothing was written, by the
   * tags and texts of the statements. Asking costs a round trip, once for the same commits.
   */
  readonly commitToken: Effect.Effect<Option.Option<CommitToken>, SqlError>
  /**
   * Waits until the server shows what a token stands for; a primary does. In a session it is the session's connection
   * that waits, before its transaction. `ReplicaBehind` when the time is over, `InvalidInput` for what is no token, and
   * in a transaction whose snapshot is older.
   */
  readonly waitFor: (token: CommitToken, options?: WaitOptions) => Effect.Effect<void, SqlError>
  /**
   * Once, after the next commit: at the end of a session after the connection is given back, after an explicit
   * `commit` at once. Detached from the session, with the schemas and tenants of where it was registered. Its statements
   * borrow a connection: after an explicit `commit`, and after `atomic` in a session, one beside the session's own, which
   * a pool of one does not have. A failure is logged and undoes nothing.
   */
  readonly afterCommit: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<void, SqlError, R>
  /** As `afterCommit`, after a rollback of the whole transaction. */
  readonly afterRollback: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<void, SqlError, R>
}

interface At {
  readonly slot: Slot
  readonly unit: Unit
  readonly frame: Frame
}

const noSession = (what: string): DbError =>
  DbError.make("NoSession", {
    message: `There is no session to ${what}.`,
    hint: "Put DbSession.autocommit around it, or DbSession.scoped before it."
  })

/** The members over something that finds the session: ambient at each use, or one session for good. */
const makeSession = (
  name: string,
  find: (what: string) => Effect.Effect<At, DbError>,
  whenNone: Effect.Effect<boolean>,
  sql: () => DbSql,
  at: <A, E>(f: (core: EngineCore) => Effect.Effect<A, E>) => Effect.Effect<A, E>,
  use: Session["use"]
): Session => {
  let view: DbSql | undefined = undefined
  /** A hook has the services, the schemas and the tenants of where it was registered, whoever ends the transaction. */
  const hook =
    (add: (at: At, hook: Hook) => void, detached: boolean) =>
    <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<void, SqlError, R> =>
      Effect.contextWithEffect((context: Context.Context<R>) =>
        Effect.withFiberRuntime((fiber) => {
          const there = Ambient.withNames(effect, Ambient.current(fiber))
          const hook = Effect.provide(detached ? Ambient.detach(there) : there, context)
          return Effect.map(find("register a hook with"), (at) => add(at, hook))
        })
      )
  return {
    name,
    get sql() {
      return (view ??= sql())
    },
    state: Effect.flatMap(whenNone, (none) =>
      none
        ? Effect.succeed<UnitState>("closed")
        : Effect.match(find("look at"), { onFailure: () => "closed" as const, onSuccess: (at) => at.unit.state })
    ),
    commit: Effect.flatMap(find("commit"), (at) => sessions.commit(at.slot, at.unit)),
    rollback: Effect.flatMap(find("roll back"), (at) => sessions.rollback(at.unit)),
    close: Effect.flatMap(whenNone, (none) =>
      none
        ? Effect.void
        : Effect.matchEffect(find("close"), {
            onFailure: (error) => (error.reason._tag === "SessionClosed" ? Effect.void : Effect.fail(error)),
            onSuccess: (at) => sessions.close(at.slot, at.unit)
          })
    ),
    begin: (options) =>
      Effect.flatMap(find("begin a transaction in"), (at) =>
        beginManual(at.slot, at.unit, at.frame, options ?? {}, false)
      ),
    savepoint: (options) =>
      Effect.flatMap(find("open a savepoint in"), (at) => beginManual(at.slot, at.unit, at.frame, options ?? {}, true)),
    use,
    batch: (statements) => use(at((core) => runBatch(core, statements))),
    commitToken: Effect.flatMap(find("ask for the commits of"), ({ slot, unit }) =>
      tokenOf(slot.engine, slot.writes, unit)
    ),
    waitFor: (token, options) =>
      Effect.flatMap(whenNone, (none) =>
        none
          ? at((core) => waitFor(core, token, options?.timeout))
          : Effect.flatMap(find("wait in"), (at) => waitFor(at.slot.engine, token, options?.timeout, at))
      ),
    beforeCommit: hook((at, hook) => at.frame.top.addBeforeCommit(hook), false),
    afterCommit: hook((at, hook) => at.frame.top.addAfter("afterCommit", hook), true),
    afterRollback: hook((at, hook) => at.frame.top.addAfter("afterRollback", hook), true)
  }
}

const resolved = (slot: Slot, frame: Frame | undefined): Effect.Effect<At, DbError> =>
  Effect.zipRight(
    slot.prepare,
    Effect.suspend(() => {
      const at = unitOf(slot, frame)
      return at instanceof Error ? Effect.fail(at) : Effect.succeed({ slot, ...at })
    })
  )

/** A handle of the session that is in the slot now; after its close it stays closed. */
const handleOf = (core: EngineCore, slot: Slot, unit: Unit): Session =>
  makeSession(
    unit.name,
    () =>
      Effect.withFiberRuntime((fiber) => {
        if (unit.ended || slot.ended) return Effect.fail(unit.closedError())
        const entry = Ambient.entry(fiber, core)
        return resolved(slot, entry.slot === slot ? entry.frame : undefined)
      }),
    Effect.sync(() => unit.ended),
    () => viewOf(core, { _tag: "Slot", slot, unit }),
    (f) => f(core),
    (effect) => sessions.within(slot, unit, effect)
  )

/** @internal */
export const facadeOf = onceFor((service: EngineService): Session => {
  const core = coreOf(service)
  return makeSession(
    core.name,
    (what) =>
      Effect.withFiberRuntime((fiber) => {
        const entry = Ambient.entry(fiber, engineFor(fiber, core))
        return entry.slot === undefined ? Effect.fail(noSession(what)) : resolved(entry.slot, entry.frame)
      }),
    Effect.withFiberRuntime((fiber) => {
      const { slot } = Ambient.entry(fiber, engineFor(fiber, core))
      return Effect.succeed(slot === undefined || slot.ended)
    }),
    () => service.sql,
    (f) => withEngine(core, f),
    (effect) => effect
  )
})

/** Opens a slot whose end is that of the current scope. A commit that fails where nobody can be told is a defect. */
const openScoped = (
  core: EngineCore,
  options: MakeOptions<any>,
  commits: boolean,
  after: () => Effect.Effect<void>
): Effect.Effect<Slot, SqlError, Scope.Scope> =>
  Effect.uninterruptible(
    Effect.withFiberRuntime<Slot, SqlError, Scope.Scope>((fiber) => {
      const entry = Ambient.entry(fiber, core)
      return Effect.flatMap(sessions.makeSlot(core, entry, options, false), (slot) => {
        const stopTimer = sessions.startTimer(slot, options.timeout)
        return Effect.flatMap(Effect.scope, (scope) =>
          Effect.as(
            Scope.addFinalizerExit(scope, (exit) => {
              stopTimer()
              const success = commits && Exit.isSuccess(exit)
              const { unit } = slot
              const before = success && unit !== undefined ? sessions.runBefore(slot, unit, undefined) : Effect.void
              return sessions
                .beforeEnd(before, (went) => sessions.endSlot(slot, undefined, success && went))
                .pipe(Effect.orDie, Effect.ensuring(Effect.suspend(after)))
            }),
            slot
          )
        )
      })
    })
  )

const handleOfSlot = (core: EngineCore, slot: Slot): Effect.Effect<Session, SqlError> =>
  Effect.zipRight(
    slot.prepare,
    Effect.sync(() => handleOf(core, slot, slot.get()))
  )

/**
 * The session of one database, as a tag with its constructors and effects. The service is a facade: it resolves to
 * the ambient session at each use, so that it can be captured and never goes stale.
 *
 * @since 0.1.0
 * @category models
 */
export interface SessionModule<Name extends string> extends Context.Tag<DbSession<Name>, Session> {
  /**
   * Runs an effect in a session: success commits, everything else rolls back. Inside a session it joins that one:
   * with options that its transaction can't honour, `PropagationError`.
   */
  readonly autocommit: Combinator<SessionOptions<Name | "default">, SqlError, DbEngine<Name>>
  /** Always a session and a connection of its own, which leaves an outer one untouched. */
  readonly isolated: Combinator<SessionOptions<Name | "default">, SqlError, DbEngine<Name>>
  /** The ambient session until the scope closes, which commits or rolls back by its Exit. */
  readonly scoped: (
    options?: SessionOptions<Name | "default">
  ) => Effect.Effect<Session, SqlError, DbEngine<Name> | Scope.Scope>
  /** A session that is not ambient; `session.use(effect)` makes it so for an effect. */
  readonly make: (
    options?: MakeOptions<Name | "default">
  ) => Effect.Effect<Session, SqlError, DbEngine<Name> | Scope.Scope>
  /** The ambient session for as long as the layer lasts, which ends by the Exit of its scope. */
  readonly layer: (options?: SessionOptions<Name | "default">) => Layer.Layer<DbSession<Name>, SqlError, DbEngine<Name>>
  /** The ambient session, which is created if nobody has asked yet. */
  readonly current: Effect.Effect<Option.Option<Session>, SqlError, DbEngine<Name>>
  /** Runs an effect with no ambient session, connection or transaction of any database: for daemons. */
  readonly detach: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  readonly state: Effect.Effect<UnitState, never, DbEngine<Name>>
  readonly commit: Effect.Effect<void, SqlError, DbEngine<Name>>
  readonly rollback: Effect.Effect<void, SqlError, DbEngine<Name>>
  readonly close: Effect.Effect<void, SqlError, DbEngine<Name>>
  /**
   * Commits every database's session of the fiber. The first failure is reported, and the rest is rolled back. A fiber
   * that has outlived one of them, or a block of it, is told so before any is ended; so it is by `rollbackAll`.
   */
  readonly commitAll: Effect.Effect<void, SqlError>
  readonly rollbackAll: Effect.Effect<void, SqlError>
  /** Closes every database's session of the fiber. One that has ended already is closed. */
  readonly closeAll: Effect.Effect<void, SqlError>
  /** Opens a block by hand in the ambient session: the transaction itself when none is open, else a savepoint. */
  readonly begin: (options?: TransactionOptions) => Effect.Effect<ManualTransaction, SqlError, DbEngine<Name>>
  /** Opens a savepoint by hand in the ambient session. */
  readonly savepoint: (options?: TransactionOptions) => Effect.Effect<ManualTransaction, SqlError, DbEngine<Name>>
  /** `beforeCommit` of the ambient session. Without one: `NoSession`. */
  readonly beforeCommit: <A, R>(
    effect: Effect.Effect<A, SqlError, R>
  ) => Effect.Effect<void, SqlError, R | DbEngine<Name>>
  /** `afterCommit` of the ambient session. Without one: `NoSession`. */
  readonly afterCommit: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<void, SqlError, R | DbEngine<Name>>
  /** `afterRollback` of the ambient session. Without one: `NoSession`. */
  readonly afterRollback: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<void, SqlError, R | DbEngine<Name>>
  readonly commitToken: Effect.Effect<Option.Option<CommitToken>, SqlError, DbEngine<Name>>
  /** Runs an effect and adds a token for all that it has committed in this database: none when nothing was written. */
  readonly withCommitToken: <A, E, R>(
    effect: Effect.Effect<A, E, R>
  ) => Effect.Effect<readonly [A, Option.Option<CommitToken>], E | SqlError, R | DbEngine<Name>>
  /** Waits until the server of the ambient session shows that commit; without a session, on a connection of its own. */
  readonly waitFor: (token: CommitToken, options?: WaitOptions) => Effect.Effect<void, SqlError, DbEngine<Name>>
  /**
   * All statements in one transaction and one round trip: in the ambient session they join its transaction, outside
   * they are one of their own, with the engine's defaults. Several statements in one text are refused, and statements
   * that run somewhere else by themselves: of another database, of a handle that is not ambient.
   */
  readonly batch: <const Statements extends ReadonlyArray<Statement.Statement<any>>>(
    statements: Statements
  ) => Effect.Effect<BatchResult<Statements>, SqlError, DbEngine<Name>>
}

/** @internal */
export const make = <Name extends string>(
  name: Name,
  engine: Context.Tag<DbEngine<Name>, EngineService>
): SessionModule<Name> => {
  const tag = Context.GenericTag<DbSession<Name>, Session>(`effect-db/DbSession/${name}`)
  const withCore = <A, E, R>(f: (core: EngineCore) => Effect.Effect<A, E, R>) =>
    Effect.flatMap(engine, (service) => coreHere(service, f))
  const facade = <A, E, R>(f: (session: Session) => Effect.Effect<A, E, R>) =>
    Effect.flatMap(engine, (service) => f(facadeOf(service)))
  return Object.assign(tag, {
    autocommit: combinator<SessionOptions<Name | "default">, SqlError, DbEngine<Name>>((effect, options) =>
      withCore((core) => autocommit(core, effect, options))
    ),
    isolated: combinator<SessionOptions<Name | "default">, SqlError, DbEngine<Name>>((effect, options) =>
      withCore((core) => isolated(core, effect, options))
    ),
    scoped: (options: SessionOptions<Name | "default"> = {}) =>
      withCore((core) =>
        Effect.withFiberRuntime<Session, SqlError, Scope.Scope>((fiber) => {
          const before = Ambient.entry(fiber, core)
          let opened: Ambient.Opened | undefined = undefined
          return Effect.flatMap(
            openScoped(core, options, true, () => opened?.leave ?? Effect.void),
            (slot) =>
              Effect.zipRight(
                Effect.map(Ambient.open(core, sessions.inSlot(slot), sessions.outOf(slot, before)), (_) => {
                  opened = _
                }),
                handleOfSlot(core, slot)
              )
          )
        })
      ),
    make: (options: MakeOptions<Name | "default"> = {}) =>
      withCore((core) =>
        Effect.flatMap(
          openScoped(core, options, options.autocommit === true, () => Effect.void),
          (slot) => handleOfSlot(core, slot)
        )
      ),
    layer: (options: SessionOptions<Name | "default"> = {}) =>
      Layer.scopedContext(
        Effect.flatMap(engine, (service) =>
          coreHere(service, (core) =>
            Effect.flatMap(
              openScoped(core, options, true, () => Effect.void),
              (slot) =>
                Effect.map(Ambient.context(core, "session", sessions.inSlot(slot)), (context) =>
                  Context.merge(Context.make(tag, facadeOf(service)), context)
                )
            )
          )
        )
      ),
    current: withCore((core) =>
      Effect.withFiberRuntime<Option.Option<Session>, SqlError>((fiber) => {
        const { slot } = Ambient.entry(fiber, core)
        return slot === undefined || slot.ended
          ? Effect.succeed(Option.none())
          : Effect.map(handleOfSlot(core, slot), Option.some)
      })
    ),
    detach: Ambient.detach,
    state: facade((_) => _.state),
    commit: facade((_) => _.commit),
    rollback: facade((_) => _.rollback),
    close: facade((_) => _.close),
    commitAll: every.commitAll,
    rollbackAll: every.rollbackAll,
    closeAll: every.closeAll,
    begin: (options?: TransactionOptions) => facade((_) => _.begin(options)),
    savepoint: (options?: TransactionOptions) => facade((_) => _.savepoint(options)),
    beforeCommit: <A, R>(effect: Effect.Effect<A, SqlError, R>) => facade((_) => _.beforeCommit(effect)),
    afterCommit: <A, E, R>(effect: Effect.Effect<A, E, R>) => facade((_) => _.afterCommit(effect)),
    afterRollback: <A, E, R>(effect: Effect.Effect<A, E, R>) => facade((_) => _.afterRollback(effect)),
    commitToken: facade((_) => _.commitToken),
    withCommitToken: <A, E, R>(effect: Effect.Effect<A, E, R>) => withCore((core) => withCommitToken(core, effect)),
    waitFor: (token: CommitToken, options?: WaitOptions) => facade((_) => _.waitFor(token, options)),
    batch: <const Statements extends ReadonlyArray<Statement.Statement<any>>>(statements: Statements) =>
      withCore((core) => runBatch(core, statements))
  })
}
