/**
 * For programs that are not written with Effect: promises that share the ambient session.
 *
 * @since 0.1.0
 * @module
 */
import { SqlError } from "@effect/sql/SqlError"
import * as Statement from "@effect/sql/Statement"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import type * as Layer from "effect/Layer"
import * as ManagedRuntime from "effect/ManagedRuntime"
import * as Option from "effect/Option"
import * as Runtime from "effect/Runtime"
import { DbError } from "./DbError.js"
import * as Database from "./Database.js"
import type { DbConnection } from "./DbConnection.js"
import type { DbEngine } from "./DbEngine.js"
import type { DbSession, SessionOptions } from "./DbSession.js"
import type { AtomicOptions, Transaction, WithTransactionOptions } from "./DbTransaction.js"
import { runBlocking } from "./internal/blocking.js"
import { neutral } from "./internal/neutral.js"
import { Promised } from "./internal/promised.js"

type Services<Name extends string> = DbEngine<Name> | DbConnection<Name> | DbSession<Name>

/** The names of the databases that a layer provides. */
type Names<R> = R extends DbEngine<infer Name> ? Name : never

/** Those whose words hooks may use. */
type Spoken<R> = R extends DbSession<infer Name> ? Name : never

/**
 * Promise code in sessions and transactions of one database. What is ambient travels with `AsyncLocalStorage`: each
 * database has its own place in it, so calls for several databases nest. Stores of your own are in the callback what they
 * are where it is handed over, in repeated attempts as well.
 *
 * @since 0.1.0
 * @category models
 */
export interface PromiseSessions<Name extends string = "default"> {
  /**
   * Runs promise code in a session, which commits when the promise is fulfilled and rolls back when it is rejected, with
   * that error. Inside a session it joins that one. Concurrent calls have sessions of their own. A callback that gives an
   * effect which it has not run is rejected with `InvalidInput`, here and below: give `run(effect)`.
   */
  readonly session: <A>(f: () => A | PromiseLike<A>, options?: SessionOptions<Name>) => Promise<A>
  /** As `session`, always with a session and a connection of its own. */
  readonly isolated: <A>(f: () => A | PromiseLike<A>, options?: SessionOptions<Name>) => Promise<A>
  /**
   * Runs promise code as an atomic block: a savepoint inside a session, else a transaction of its own. With `retry` the
   * code runs again when it is rejected with a `DbError` that passes.
   */
  readonly transaction: <A>(f: (tx: Transaction) => A | PromiseLike<A>, options?: WithTransactionOptions) => Promise<A>
  /**
   * Runs promise code as a transaction that commits by itself, also inside a session, which stays open; with `retry` as
   * `transaction`.
   */
  readonly atomic: <A>(f: (tx: Transaction) => A | PromiseLike<A>, options?: AtomicOptions) => Promise<A>
}

/**
 * @since 0.1.0
 * @category models
 */
export interface DbRuntime<R, E> extends PromiseSessions<Spoken<R> | "default"> {
  /**
   * Runs an effect. Inside the callback of `session`, `isolated`, `transaction` or `atomic` it runs in that session, and
   * in promise code that another effect of this runtime awaits in the session of that one's fiber. Its fibers have the
   * caller's async context: `AsyncLocalStorage` of your own is there, also after a statement.
   * Rejects with the effect's own error; `signal` interrupts it, and then it rejects with the signal's reason.
   */
  readonly run: <A, E2>(effect: Effect.Effect<A, E2, R>, options?: { readonly signal?: AbortSignal }) => Promise<A>
  /**
   * Runs an effect to its end before it returns, for synchronous code; throws the effect's own error. The calling thread
   * stands still meanwhile: statements go over connections that another thread holds, a pool of their own of up to
   * `maxConnections`, which `DbEngine.stats` counts as well. It can't share the session around it: there it throws
   * `PropagationError`. The effect may run statements, sessions, blocks, sleeps and pure code; what only the event loop
   * can bring is refused with `InvalidInput`, and so is a connection that was opened outside, before anything is sent. A
   * lock that this thread itself holds elsewhere is waited for in vain: set `lockTimeout`.
   */
  readonly runSync: <A, E2>(effect: Effect.Effect<A, E2, R>) => A
  /**
   * `session`, `isolated`, `transaction` and `atomic` of another database that the layer provides. Nested, each has its
   * own session; the inner one ends first.
   */
  readonly of: <Name extends Names<R>>(database: Database.Database<Name>) => PromiseSessions<Name | "default">
  /**
   * Drains and closes: sessions in hand may finish, up to `drainTimeout`; what comes later is rejected with
   * `PoolClosed`. Twice: nothing.
   */
  readonly close: () => Promise<void>
  /** The runtime of Effect underneath, for what is not here. */
  readonly managed: ManagedRuntime.ManagedRuntime<R, E>
}

/** A rejected promise, with the value that it was rejected with. */
class Rejected {
  readonly _tag = "Rejected"
  constructor(readonly reason: unknown) {}
}

const squash = (cause: Cause.Cause<unknown>): unknown => {
  const failure = Cause.failureOption(cause)
  if (failure._tag === "Some") return failure.value instanceof Rejected ? failure.value.reason : failure.value
  return Cause.squash(cause)
}

const closedError = (): DbError =>
  DbError.make("PoolClosed", {
    message: "The runtime is closed.",
    hint: "close() was called before. Make another runtime, or close it later."
  })

const sharedError = (): DbError =>
  DbError.make("PropagationError", {
    message: "runSync was called in a session, which it can't share.",
    hint: "The session's connection needs the event loop, which stands still in runSync. Await run(effect)."
  })

const unrunError = (what: string): DbError =>
  DbError.make("InvalidInput", {
    message: `The callback of ${what} returned an Effect, which was not run`,
    hint: "Return runtime.run(effect)."
  })

/**
 * An effect or a statement that somebody has forgotten to run. What else is an effect may be meant as a value: an
 * `Option` or an `Exit`, and what has a `commit` of its own, as fibers, refs and errors have.
 */
const isUnrun = (u: unknown): boolean =>
  typeof u === "object" &&
  Effect.isEffect(u) &&
  !Option.isOption(u) &&
  !Either.isEither(u) &&
  !Exit.isExit(u) &&
  (!("commit" in u) || Statement.isFragment(u))

const asyncLayerError = (cause: unknown): unknown =>
  Runtime.isAsyncFiberException(cause)
    ? DbError.make("InvalidInput", {
        message: "The layer of the runtime is not built yet, and building it needs the event loop.",
        hint: "Await run(Effect.void) once, before the first runSync."
      })
    : cause

/**
 * A runtime for promise-style code: Express, Fastify, Hono, scripts. The ambient session travels with
 * `AsyncLocalStorage`, so it reaches everything that is awaited in the callback. The layer is built at the first use.
 *
 * ```ts
 * const db = DbRuntime.make(DbLayer({ url }))
 * await db.session(async () => {
 *   await db.run(register("ada"))
 *   await db.run(register("grace"))
 * })
 * await db.close()
 * ```
 *
 * `session` and its like are the default database's, or those of the database that is named:
 * `DbRuntime.make(Analytics.DbLayer({ url }), Analytics)`. The layer may provide more, other databases included: see `of`.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make: {
  <R, E>(layer: Layer.Layer<R | Services<"default">, E>): DbRuntime<R | Services<"default">, E>
  <R, E, Name extends string>(
    layer: Layer.Layer<R | Services<Name>, E>,
    database: Database.Database<Name>
  ): DbRuntime<R | Services<Name>, E>
} = <R, E>(layer: Layer.Layer<R, E>, database: Database.Database<any> = Database.make("default")): DbRuntime<R, E> => {
  const managed = ManagedRuntime.make(layer)
  const promised = new Promised()

  let runtime: Runtime.Runtime<R> | undefined = undefined
  let closing: Promise<void> | undefined = undefined

  const build = async (): Promise<Runtime.Runtime<R>> => {
    // What it opens is there for everybody.
    const result = await neutral(() => managed.runPromiseExit(Effect.runtime<R>()))
    if (Exit.isFailure(result)) throw squash(result.cause)
    return (runtime = result.value)
  }

  const exit = async <A, E2>(effect: Effect.Effect<A, E2, R>, signal?: AbortSignal): Promise<A> => {
    // A session in hand may go on; its statements are the pool's to refuse.
    if (closing !== undefined && (promised.ambient === undefined || runtime === undefined)) throw closedError()
    signal?.throwIfAborted()
    const result = await promised.run(runtime ?? (await build()), effect, signal)
    if (Exit.isSuccess(result)) return result.value
    if (Cause.isInterruptedOnly(result.cause)) signal?.throwIfAborted()
    throw squash(result.cause)
  }

  const exitSync = <A, E2>(effect: Effect.Effect<A, E2, R>): A => {
    if (closing !== undefined) throw closedError()
    if (promised.ambient !== undefined) throw sharedError()
    if (runtime === undefined) {
      const built = neutral(() => managed.runSyncExit(Effect.runtime<R>()))
      if (Exit.isSuccess(built)) runtime = built.value
      else throw Cause.isDie(built.cause) ? asyncLayerError(squash(built.cause)) : squash(built.cause)
    }
    const result = runBlocking(runtime, effect)
    if (Exit.isSuccess(result)) return result.value
    throw squash(result.cause)
  }

  const body = <A>(what: string, f: () => A | PromiseLike<A>): Effect.Effect<A, Rejected | SqlError> =>
    Effect.flatMap(
      // One of ours is a failure like that of an effect: whoever decides about retries looks at it.
      promised.code(f, (reason) => (reason instanceof SqlError ? reason : new Rejected(reason))),
      (value) => (isUnrun(value) ? Effect.fail(unrunError(what)) : Effect.succeed(value))
    )

  const sessionsOf = ({ atomic, DbSession, withTransaction }: Database.Database<any>): PromiseSessions<any> => {
    // The signature of `make` and of `of` says that the layer provides it.
    const run = <A, E2>(effect: Effect.Effect<A, E2, DbEngine<any>>) => exit(effect as Effect.Effect<A, E2, any>)
    return {
      session: (f, options = {}) => run(DbSession.autocommit(body("session", f), options)),
      isolated: (f, options = {}) => run(DbSession.isolated(body("isolated", f), options)),
      transaction: (f, options = {}) => run(withTransaction((tx) => body("transaction", () => f(tx)), options)),
      atomic: (f, options = {}) => run(atomic((tx) => body("atomic", () => f(tx)), options))
    }
  }

  return {
    ...sessionsOf(database),
    managed,
    run: (effect, options) => exit(effect, options?.signal),
    runSync: exitSync,
    of: sessionsOf,
    close: () => (closing ??= managed.dispose())
  }
}
