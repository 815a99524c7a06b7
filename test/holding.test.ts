/**
 * Connections that are held across something else: a change of hosts, the end of a session, a hook before one.
 */
import { describe, expect } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import { DbConnection, DbEngine, DbSession, DbTransaction, withTransaction } from "effect-db"
import { testDatabase } from "./support/database.js"
import { committed, insert, outcome, programsOn, proxiedOn, until, used } from "./support/programs.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const pending = (n: number) =>
  until(
    `${n} wait`,
    Effect.map(DbEngine.stats, (_) => _.pending === n)
  )

describe("whoever waits for a connection while the engine goes to another host", () => {
  const waiters: ReadonlyArray<readonly [string, Effect.Effect<unknown, unknown, any>]> = [
    ["a session", DbSession.autocommit(insert(1))],
    ["an isolated session", DbSession.isolated(insert(1))],
    ["a block", withTransaction(insert(1))],
    ["a block for a scope", Effect.scoped(Effect.zipRight(DbTransaction.scoped(), insert(1)))],
    ["a connection", DbConnection.withConnection(insert(1))],
    ["a connection of a scope", Effect.scoped(DbConnection.acquire())],
    ["a reserved one", Effect.scoped(Effect.flatMap(DbEngine, (_) => _.sql.reserve))]
  ]
  for (const [name, waiter] of waiters) {
    proxied(
      `${name}: gets one there, and gives it back there`,
      (via) =>
        Effect.gen(function* () {
          const go = yield* Deferred.make<void>()
          const holder = yield* Effect.fork(DbConnection.withConnection(Deferred.await(go)))
          yield* until(
            "it is held",
            Effect.map(used, (_) => _ === 1)
          )
          const waiting = yield* Effect.fork(waiter as Effect.Effect<unknown, unknown, DbEngine>)
          yield* pending(1)
          const { hostname, port } = new URL(database.url)
          expect(Number(port)).not.toBe(via.port)
          yield* DbEngine.changeHost({ host: hostname, port: Number(port) })
          yield* Fiber.join(waiting)
          yield* Deferred.succeed(go, undefined)
          yield* Fiber.join(holder)
          yield* until(
            "nothing is lent any more, and the old host is left",
            Effect.map(DbEngine.stats, ({ total, used }) => used === 0 && total === 1)
          )
          // With a maximum of one: whoever comes next would wait for ever.
          yield* DbSession.autocommit(insert(2))
        }),
      { maxConnections: 1 }
    )
  }
})

describe("a fiber that outlives its session and asks for a connection", () => {
  for (const [name, use] of [
    ["withConnection", DbConnection.withConnection(Effect.void)],
    ["acquire", Effect.scoped(DbConnection.acquire({ reuse: true }))],
    ["acquire, lazily", Effect.scoped(DbConnection.acquire({ reuse: true, lazy: true }))],
    ["pid", DbConnection.pid],
    ["raw", DbConnection.raw]
  ] as const) {
    test(`${name}: SessionClosed, and nothing is borrowed`, () =>
      Effect.gen(function* () {
        const over = yield* Deferred.make<void>()
        const fiber = yield* DbSession.autocommit(
          Effect.forkDaemon(
            Effect.zipRight(Deferred.await(over), Effect.exit(use as Effect.Effect<unknown, unknown, any>))
          )
        )
        yield* Deferred.succeed(over, undefined)
        expect(outcome(yield* Fiber.join(fiber))).toBe("SessionClosed")
        expect(yield* used).toBe(0)
      }))
  }
})

describe("beforeSession", () => {
  let runs = 0
  const counting = { beforeSession: Effect.sync(() => void runs++) }
  for (const [name, work] of [
    ["a connection that reuses the session's", DbConnection.withConnection(insert(1))],
    ["a lazy one", DbConnection.withConnection(insert(1), { lazy: true })],
    ["the session's connection", Effect.zipRight(DbConnection.pid, insert(1))]
  ] as const) {
    test(
      `runs before ${name}`,
      () =>
        Effect.gen(function* () {
          runs = 0
          yield* DbSession.autocommit(work as Effect.Effect<void, any, DbSession>)
          expect(runs).toBe(1)
          expect(yield* committed(database)).toEqual([1])
        }),
      counting
    )
  }

  test(
    "that interrupts itself: no session is created",
    () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(DbSession.autocommit(insert(1)))
        expect(Exit.isInterrupted(exit)).toBe(true)
        expect(yield* committed(database)).toEqual([])
      }),
    { beforeSession: Effect.interrupt }
  )
})
