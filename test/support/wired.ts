/**
 * An engine behind a proxy of its own, for one test, which has to leave both at rest.
 */
import { it } from "@effect/vitest"
import type { SqlClient } from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import type { PgClient } from "@effect/sql-pg/PgClient"
import { DbEngine, DbError, DbLayer } from "effect-db"
import type { DbConnection, DbSession, Reason } from "effect-db"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Fiber from "effect/Fiber"
import type * as Scope from "effect/Scope"
import { beforeEach, expect } from "vitest"
import type { DbOptions } from "../../src/DbOptions.js"
import type { EngineService, EngineStats } from "../../src/DbEngine.js"
import type { TestDatabase } from "./database.js"
import { serverActivity } from "./database.js"
import type { Logged, PgProxy } from "./proxy.js"
import { proxy } from "./proxy.js"
import { until } from "./until.js"

export type Services = DbEngine | DbConnection | DbSession | SqlClient | PgClient

export interface Wired {
  readonly proxy: PgProxy
  readonly engine: EngineService
}

export const identity = (stats: EngineStats): void => {
  expect(stats.used + stats.idle + stats.connecting + stats.closing).toBe(stats.total)
  expect(stats.total).toBeLessThanOrEqual(stats.max)
}

/** Nothing borrowed, nobody waiting, no transaction left open on the server. */
export const atRest = (engine: EngineService, url: string): Effect.Effect<void> =>
  Effect.gen(function* () {
    const settled = Effect.map(engine.stats, (_) => _.used === 0 && _.pending === 0)
    yield* until("the pool is at rest", settled)
    identity(yield* engine.stats)
    const activity = serverActivity(url)
    yield* until(
      "no transaction is open",
      Effect.map(activity, (_) => _.idleInTransaction + _.idleInTransactionAborted === 0)
    )
  })

/** An engine behind a proxy, in the current scope. */
export const wire = (
  database: { readonly url: string },
  options: DbOptions = {}
): Effect.Effect<Wired & { readonly context: Context.Context<Services> }, never, Scope.Scope> =>
  Effect.gen(function* () {
    const through = yield* proxy(database.url)
    const context = yield* Effect.orDie(Layer.build(DbLayer({ url: through.url, ...options })))
    return { proxy: through, engine: Context.get(context, DbEngine), context }
  })

/** One test with an engine behind a proxy; it fails when it does not leave both at rest. */
export const wired = (
  database: TestDatabase,
  name: string,
  options: DbOptions,
  body: (at: Wired) => Effect.Effect<void, unknown, Services | Scope.Scope>
): void =>
  it.scopedLive(name, () =>
    Effect.gen(function* () {
      const { context, ...at } = yield* wire(database, options)
      yield* Effect.provide(body(at), context)
      at.proxy.disarm()
      at.proxy.resume()
      yield* atRest(at.engine, database.url)
    })
  )

/** The reason that an effect fails with; a success or a defect fails the test. */
export const reasonOf = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<Reason, never, R> =>
  Effect.flatMap(
    Effect.flip(Effect.tap(effect, (value) => Effect.dieMessage(`succeeded: ${JSON.stringify(value)}`))),
    (e) => (DbError.is(e) ? Effect.succeed(e.reason) : Effect.die(e))
  ).pipe(Effect.orDie)

export const errorOf = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<DbError, never, R> =>
  Effect.flatMap(
    Effect.flip(Effect.tap(effect, (value) => Effect.dieMessage(`succeeded: ${JSON.stringify(value)}`))),
    (e) => (DbError.is(e) ? Effect.succeed(e) : Effect.die(e))
  ).pipe(Effect.orDie)

/** What the client sent, as letters and texts: `P BEGIN`, `E BEGIN`, `S`. */
export const sent = (at: Wired): Array<string> =>
  at.proxy.log.filter((_) => _.dir === "frontend").map((_) => (_.text === "" ? _.type : `${_.type} ${_.text}`))

export const executes =
  (pattern: RegExp) =>
  (message: Logged): boolean =>
    message.dir === "frontend" && (message.type === "E" || message.type === "Q") && pattern.test(message.text)

export const answered =
  (tag: RegExp) =>
  (message: Logged): boolean =>
    message.dir === "backend" && message.type === "C" && tag.test(message.text)

/** As `proxy.seen`, as an effect that begins to look at once. */
export const seen = (at: Wired, matches: (message: Logged) => boolean): Effect.Effect<Logged> => {
  const promise = at.proxy.seen(matches)
  return Effect.promise(() => promise)
}

/** Forks an effect and waits until a message that it causes has passed the proxy. */
export const forkUntil = <A, E, R>(
  at: Wired,
  matches: (message: Logged) => boolean,
  effect: Effect.Effect<A, E, R>
): Effect.Effect<Fiber.RuntimeFiber<A, E>, never, R | Scope.Scope> =>
  Effect.suspend(() => {
    const promise = at.proxy.seen(matches)
    return Effect.zipLeft(
      Effect.forkScoped(effect),
      Effect.promise(() => promise)
    )
  })

/** Runs a text as one statement. */
export const run = (text: string): Effect.Effect<ReadonlyArray<Record<string, unknown>>, SqlError, DbEngine> =>
  Effect.flatMap(DbEngine, ({ sql }) => sql.unsafe<Record<string, unknown>>(text))

/** A pool of one. */
export const one = { maxConnections: 1 } as const

/** How often a connection was begun. */
export const startups = (at: Wired): number => at.proxy.log.filter((_) => _.type === "startup").length

/** Before each test a new table `t` with one column, `id`, and these ids. */
export const freshTable = (database: TestDatabase, ...ids: ReadonlyArray<number>): void => {
  const fill = ids.length === 0 ? "" : `INSERT INTO t VALUES ${ids.map((id) => `(${id})`).join()}`
  beforeEach(() => Effect.runPromise(database.query(`DROP TABLE IF EXISTS t; CREATE TABLE t (id int); ${fill}`)))
}
