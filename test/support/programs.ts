/**
 * Programs against a real server: each runs on an engine of its own, finds an empty table, and leaves the pool at
 * rest.
 */
import type * as PgClient from "@effect/sql-pg/PgClient"
import type * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import { it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import type * as Scope from "effect/Scope"
import { DbConnection, DbEngine, DbError, DbLayer, DbSession, type DbOptions } from "effect-db"
import { expect } from "vitest"
import { type TestDatabase, untilActivity } from "./database.js"
import { type PgProxy, proxy } from "./proxy.js"
import { latch, open, until, untilStats } from "./until.js"

export type Services = DbEngine | DbConnection | DbSession | SqlClient.SqlClient | PgClient.PgClient

/** 0 borrowed, 0 waiting, no transaction left open on the server. */
export const expectAtRest = (database: { readonly url: string }): Effect.Effect<void, never, DbEngine> =>
  Effect.gen(function* () {
    const { stats } = yield* DbEngine
    // A connection that comes back is reset first, which counts as used.
    yield* until(
      "the pool at rest",
      Effect.map(stats, ({ pending, used }) => used === 0 && pending === 0)
    )
    const { closing, connecting, idle, max, pending, total, used } = yield* stats
    expect({ pending, used, within: total <= max && used + idle + connecting + closing === total }).toEqual({
      pending: 0,
      used: 0,
      within: true
    })
    yield* untilActivity(
      database.url,
      ({ active, idleInTransaction, idleInTransactionAborted }) =>
        active + idleInTransaction + idleInTransactionAborted === 0
    )
  })

/** An empty table `t`. */
export const table = `DROP TABLE IF EXISTS t CASCADE; CREATE TABLE t (id int PRIMARY KEY, note text)`

// One engine after the other for the same database is what the library warns of, and what a test wants.
export const quietly = <A, E, R>(layer: Layer.Layer<A, E, R>): Layer.Layer<A, E, R> =>
  Layer.provide(layer, Logger.minimumLogLevel(LogLevel.Error))

/** Runs a program on an engine of its own, on an empty table `t`, and looks whether it has left everything at rest. */
export const onDatabase =
  (database: TestDatabase, options: DbOptions = {}) =>
  <A, E>(program: Effect.Effect<A, E, Services | Scope.Scope>): Effect.Effect<A, E | SqlError, Scope.Scope> =>
    Effect.zipRight(
      database.query(table),
      Effect.zipLeft(program, expectAtRest(database)).pipe(
        Effect.provide(quietly(DbLayer({ url: database.url, ...options })))
      )
    )

/** Tests on the file's database: `test("what is promised", program, options)`. */
export const programsOn =
  (database: TestDatabase) =>
  <A, E>(
    name: string,
    program: () => Effect.Effect<A, E, Services | Scope.Scope>,
    options: DbOptions = {},
    millis?: number
  ): void => {
    it.scopedLive(name, () => onDatabase(database, options)(Effect.suspend(program)), millis)
  }

/** As `programsOn`, through a proxy that the program is given. */
export const proxiedOn =
  (database: TestDatabase) =>
  <A, E>(
    name: string,
    program: (proxy: PgProxy) => Effect.Effect<A, E, Services | Scope.Scope>,
    options: DbOptions = {}
  ): void => {
    it.scopedLive(name, () =>
      Effect.flatMap(proxy(database.url), (via) =>
        onDatabase(database, { ...options, url: via.url })(Effect.suspend(() => program(via)))
      )
    )
  }

export const insert = (id: number): Effect.Effect<void, SqlError, DbSession> =>
  Effect.flatMap(DbSession, ({ sql }) => Effect.asVoid(sql`INSERT INTO t (id) VALUES (${id})`))

/** What a program fails with that has changed its mind. */
export const no = Effect.fail("no" as const)

/** A statement whose transaction could not be serialized. */
export const conflict: Effect.Effect<unknown, SqlError, DbSession> = Effect.flatMap(
  DbSession,
  ({ sql }) => sql`DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$`
)

/** Where unqualified names are looked for. */
export const path: Effect.Effect<string, SqlError, DbSession> = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(sql<{ path: string }>`SELECT current_setting('search_path') AS path`, (rows) => rows[0]!.path)
)

/** Writes down how it ended for what is open. */
export const note = (log: Array<string>, name: string): Effect.Effect<void, SqlError, DbEngine> =>
  Effect.zipRight(
    DbSession.afterCommit(Effect.sync(() => log.push(`${name} committed`))),
    DbSession.afterRollback(Effect.sync(() => log.push(`${name} rolled back`)))
  )

/** A statement that the server refuses. */
export const refused: Effect.Effect<unknown, SqlError, DbSession> = Effect.flatMap(
  DbSession,
  ({ sql }) => sql`INSERT INTO t (id) VALUES ('no number')`
)

/** A statement that runs until it is cancelled, or for a minute. */
export const sleep: Effect.Effect<unknown, SqlError, DbSession> = Effect.flatMap(
  DbSession,
  ({ sql }) => sql`SELECT pg_sleep(${60})`
)

/** Waits until the server runs a `pg_sleep`. */
export const sleepingOn = (database: TestDatabase): Effect.Effect<void> =>
  until(
    "the server sleeps",
    Effect.map(
      database.query("SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"),
      (_) => _.length > 0
    )
  )

/** The ids that a program sees from where it stands. */
export const seen: Effect.Effect<ReadonlyArray<number>, SqlError, DbSession> = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(sql<{ id: number }>`SELECT id FROM t ORDER BY id`, (rows) => rows.map(({ id }) => id))
)

/** The ids that are committed, seen from outside. */
export const committed = (database: TestDatabase): Effect.Effect<ReadonlyArray<number>> =>
  Effect.map(database.query<{ id: number }>("SELECT id FROM t ORDER BY id"), (rows) => rows.map(({ id }) => id))

export interface Place {
  readonly pid: number
  /** Of the transaction; an implicit statement has one of its own. */
  readonly xid: string
}

/** Which backend and which transaction a statement runs in. */
export const place: Effect.Effect<Place, SqlError, DbSession> = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(sql<Place>`SELECT pg_backend_pid() AS pid, pg_current_xact_id()::text AS xid`, (rows) => rows[0]!)
)

export const pid: Effect.Effect<number, SqlError, DbSession> = Effect.map(place, (_) => _.pid)

/** Ends a backend from outside, and waits until the ambient connection has noticed. */
export const killAmbient = (database: TestDatabase, pid: number): Effect.Effect<void, never, DbEngine> =>
  Effect.zipRight(
    database.query("SELECT pg_terminate_backend($1)", [pid]),
    until(
      "its death is known",
      Effect.map(DbConnection.status, (status) => status !== "idle" && status !== "active")
    )
  )

export const used: Effect.Effect<number, never, DbEngine> = Effect.map(DbEngine.stats, (_) => _.used)

/** The reason that an effect fails with; something else than a `DbError` as text. */
export const reason = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<string, A, R> =>
  Effect.map(Effect.flip(effect), (error) => DbError.reason(error)?._tag ?? String(error))

/** The reason of a failure or of a defect, or "success", or "interrupted". */
export const outcome = <A, E>(exit: Exit.Exit<A, E>): string => {
  if (Exit.isSuccess(exit)) return "success"
  const failure = Cause.failureOption(exit.cause)
  if (failure._tag === "Some") return DbError.reason(failure.value)?._tag ?? String(failure.value)
  const defect = Cause.dieOption(exit.cause)
  if (defect._tag === "Some") return `defect: ${DbError.reason(defect.value)?._tag ?? String(defect.value)}`
  return "interrupted"
}

/** Runs an effect while all connections are lent. */
export const whileFull = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R | DbEngine> =>
  Effect.gen(function* () {
    const held = yield* Deferred.make<void>()
    const holder = yield* Effect.fork(DbConnection.withConnection(Deferred.await(held)))
    yield* untilStats("all are lent", (stats) => stats.used === stats.max)
    const result = yield* effect
    yield* Deferred.succeed(held, undefined)
    yield* Fiber.join(holder)
    return result
  })

export type Around = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E | SqlError, R | DbEngine>

/** Every way to have an ambient session around an effect: the combinator, the Scope form, the Layer. */
export const sessionForms: ReadonlyArray<readonly [name: string, around: Around]> = [
  ["autocommit", (effect) => DbSession.autocommit(effect)],
  ["scoped", (effect) => Effect.scoped(Effect.zipRight(DbSession.scoped(), effect)) as never],
  ["layer", (effect) => Effect.provide(effect, DbSession.layer()) as never]
]

/** A block of another fiber, open until `go`; what came of it. */
export const blockAside = <A, E, R>(
  around: (body: Effect.Effect<void, any, DbSession>) => Effect.Effect<A, E, R>,
  body: Effect.Effect<unknown, unknown, DbSession> = Effect.void
) =>
  Effect.gen(function* () {
    const inside = yield* latch
    const go = yield* latch
    const whole = Effect.zipRight(body, Effect.zipRight(open(inside), Deferred.await(go)))
    const fiber = yield* Effect.forkDaemon(around(whole as Effect.Effect<void, any, DbSession>))
    yield* Deferred.await(inside)
    return { end: Effect.zipRight(open(go), Fiber.await(fiber)) }
  })
