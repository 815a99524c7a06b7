/**
 * What a session costs by itself, and how the cost grows with the work.
 */
import * as SqlClient from "@effect/sql/SqlClient"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import type * as Layer from "effect/Layer"
import * as ManagedRuntime from "effect/ManagedRuntime"
import { DbEngine, DbSession } from "../src/index.js"
import { connections } from "./contender.js"
import { dbLayer, repeat, sqlPgLayer, together } from "./contenders/effect.js"
import { median } from "./measure.js"

export interface IdleSessions {
  readonly sessions: number
  /** Of one session, from its begin to its end. */
  readonly micros: number
  /** Of one session while it is open, beyond what its fiber takes. */
  readonly bytes: number
  /** How many the engine has opened for them. */
  readonly connections: number
}

const heap = (): number => {
  globalThis.gc?.()
  globalThis.gc?.()
  return process.memoryUsage().heapUsed
}

const held = <R>(n: number, around: (effect: Effect.Effect<void>) => Effect.Effect<void, unknown, R>) =>
  Effect.gen(function* () {
    const latch = yield* Deferred.make<void>()
    const before = heap()
    const fibers: Array<Fiber.Fiber<void, unknown>> = []
    for (let i = 0; i < n; i++) fibers.push(yield* Effect.fork(around(Deferred.await(latch))))
    yield* Effect.promise(() => new Promise((resolve) => setTimeout(resolve, 50)))
    const bytes = (heap() - before) / n
    yield* Deferred.succeed(latch, undefined)
    yield* Fiber.joinAll(fibers)
    return bytes
  })

export const idleSessions = (url: string, sessions: number): Promise<IdleSessions> =>
  Effect.gen(function* () {
    const engine = yield* DbEngine
    const some = Math.min(sessions, 20_000)
    yield* repeat(some, () => DbSession.autocommit(Effect.void))
    const rounds: Array<number> = []
    for (let round = 0; round < 5; round++) {
      globalThis.gc?.()
      const start = performance.now()
      yield* repeat(sessions / 5, () => DbSession.autocommit(Effect.void))
      rounds.push(((performance.now() - start) * 1000) / (sessions / 5))
    }
    yield* held(some, (effect) => DbSession.autocommit(effect))
    const bare = yield* held(some, (effect) => Effect.uninterruptibleMask((restore) => restore(effect)))
    const open = yield* held(some, (effect) => DbSession.autocommit(effect))
    const { total } = yield* engine.stats
    return { sessions, micros: median(rounds), bytes: open - bare, connections: total }
  }).pipe(Effect.provide(dbLayer({ url })), Effect.runPromise)

export interface Curve {
  readonly title: string
  /** What the microseconds are of. */
  readonly unit: string
  readonly contender: string
  readonly points: ReadonlyArray<{ readonly size: number; readonly micros: number }>
}

interface Growing {
  readonly title: string
  readonly unit: string
  readonly sizes: ReadonlyArray<number>
  /** Work of that size, of as many units. */
  readonly work: (sql: SqlClient.SqlClient, size: number) => Effect.Effect<unknown, unknown>
}

const insert = (sql: SqlClient.SqlClient) => (i: number) =>
  sql`INSERT INTO bench_items (id, name) VALUES (${i}, ${`name ${i}`})`

const growing: ReadonlyArray<Growing> = [
  {
    title: "statements in one transaction",
    unit: "statement",
    sizes: [1, 10, 100, 1000, 10_000],
    work: (sql, size) => sql.withTransaction(repeat(size, insert(sql)))
  },
  {
    title: `fibers at once, ${connections} connections`,
    unit: "transaction",
    sizes: [1, 10, 100, 1000],
    work: (sql, size) => together(size, (i) => sql.withTransaction(insert(sql)(i)))
  },
  {
    title: "nested blocks, a statement in each",
    unit: "block",
    sizes: [1, 10, 100, 1000],
    work: (sql, size) => {
      const nest = (depth: number): Effect.Effect<unknown, unknown> =>
        sql.withTransaction(
          Effect.zipRight(
            insert(sql)(depth),
            Effect.suspend(() => (depth === 1 ? Effect.void : nest(depth - 1)))
          )
        )
      return nest(size)
    }
  }
]

const curvesOf = async <E>(
  contender: string,
  layer: Layer.Layer<SqlClient.SqlClient, E>,
  largest: number
): Promise<ReadonlyArray<Curve>> => {
  const runtime = ManagedRuntime.make(layer)
  const sql = await runtime.runPromise(SqlClient.SqlClient)
  const curves: Array<Curve> = []
  for (const { sizes, title, unit, work } of growing) {
    const points: Array<{ size: number; micros: number }> = []
    for (const size of sizes.filter((_) => _ <= largest)) {
      const rounds: Array<number> = []
      const repetitions = Math.max(1, Math.ceil(200 / size))
      for (let round = 0; round < 4; round++) {
        const start = performance.now()
        await runtime.runPromise(repeat(repetitions, () => work(sql, size)))
        // The first is for warming up.
        if (round > 0) rounds.push(((performance.now() - start) * 1000) / repetitions / size)
      }
      points.push({ size, micros: median(rounds) })
    }
    curves.push({ title, unit, contender, points })
  }
  await runtime.dispose()
  return curves
}

export const growth = async (url: string, largest: number): Promise<ReadonlyArray<Curve>> => [
  ...(await curvesOf(
    "effect-db",
    dbLayer({ url, maxConnections: connections, acquireTimeout: "60 seconds" }),
    largest
  )),
  ...(await curvesOf("@effect/sql-pg", sqlPgLayer(url), largest))
]
