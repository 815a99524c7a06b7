import { describe, expect, it } from "@effect/vitest"
import { Database, DbEngine, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect, Fiber } from "effect"
import { testDatabase } from "./support/database.js"
import { insert, programsOn, proxiedOn, quietly, whileFull } from "./support/programs.js"
import { pending, until } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

describe("DbEngine.health", () => {
  test("is up by a connection of the pool, which it gives back", () =>
    Effect.gen(function* () {
      const health = yield* DbEngine.health
      expect(health).toMatchObject({ status: "up", asked: "pool", suspended: false, lastError: undefined })
      expect(health.host).toEqual({ host: database.host, port: database.port })
      expect(health.stats).toMatchObject({ used: 0, total: 1, max: 10 })
      const again = yield* DbEngine.health
      expect(again.since).toEqual(health.since)
    }))

  proxied("says how long the answer took", (via) =>
    Effect.gen(function* () {
      via.delay(30)
      expect((yield* DbEngine.health).tookMillis).toBeGreaterThanOrEqual(30)
    })
  )

  proxied(
    "is up while all connections are lent and others wait: the server is asked, and no slot is needed",
    (via) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* whileFull(
          Effect.gen(function* () {
            const waiting = yield* Effect.fork(sql`SELECT 1`)
            yield* pending(1)
            const before = via.accepted
            expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "server", stats: { used: 1, max: 1 } })
            expect(via.accepted).toBe(before + 1)
            yield* Fiber.interrupt(waiting)
          })
        )
        yield* until(
          "its socket is closed",
          Effect.sync(() => via.connections.length === 1)
        )
      }),
    { maxConnections: 1 }
  )

  proxied(
    "is down when nothing listens, says why and since when, and is up again by itself",
    (via) =>
      Effect.gen(function* () {
        expect((yield* DbEngine.health).status).toBe("up")
        via.accept("refuse")
        via.cutAll()
        const down = yield* DbEngine.health
        expect(down.status).toBe("down")
        expect(down.lastError?.error.reason._tag).toBe("ConnectionError")
        const later = yield* DbEngine.health
        expect(later.since).toEqual(down.since)
        via.accept("relay")
        yield* until(
          "up again",
          Effect.map(DbEngine.health, (_) => _.status === "up")
        )
        const up = yield* DbEngine.health
        expect(up.since.getTime()).toBeGreaterThanOrEqual(down.since.getTime())
        expect(up.lastError?.error.reason._tag).toBe("ConnectionError")
      }),
    { healthTimeout: "300 millis" }
  )

  proxied(
    "is down within healthTimeout when the server is silent, with a full pool as well",
    (via) =>
      whileFull(
        Effect.gen(function* () {
          via.accept("silent")
          const health = yield* DbEngine.health
          expect(health).toMatchObject({ status: "down", asked: "server" })
          expect(String(health.lastError?.error)).toContain("The database did not answer within 200 ms.")
        })
      ),
    { healthTimeout: "200 millis", maxConnections: 1 }
  )

  proxied(
    "does not wait for a connection of the pool that says nothing any more",
    (via) =>
      Effect.gen(function* () {
        expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "pool" })
        via.pause()
        expect(yield* DbEngine.health).toMatchObject({ status: "down", asked: "pool" })
        via.resume()
      }),
    { healthTimeout: "100 millis", settleTimeout: "1 minute" }
  )

  test("says that the engine is suspended, and asks the server", () =>
    Effect.gen(function* () {
      const { health, resume, suspend } = yield* DbEngine
      yield* suspend
      expect(yield* health).toMatchObject({ status: "up", asked: "server", suspended: true })
      yield* resume
      expect(yield* health).toMatchObject({ status: "up", asked: "pool", suspended: false })
    }))

  it.live("is down after the engine is closed", () =>
    Effect.gen(function* () {
      const { health } = yield* Effect.scoped(DbEngine.make({ url: database.url }))
      const found = yield* health
      expect(found.status).toBe("down")
      expect(found.lastError?.error.reason._tag).toBe("PoolClosed")
    })
  )

  it.live("needs one of several hosts, the first of which is silent", () =>
    Effect.gen(function* () {
      const Two = Database.make("health-two")
      const hosts = [
        { host: "127.0.0.1", port: 1 },
        { host: database.host, port: database.port }
      ]
      const found = yield* Two.DbEngine.health.pipe(Effect.provide(quietly(Two.DbLayer({ url: database.url, hosts }))))
      expect(found.status).toBe("up")
    })
  )

  test("is up in a sandbox, beside an open transaction", () =>
    Effect.gen(function* () {
      const inside = yield* DbTest.sandbox(withTransaction(Effect.zipRight(insert(1), DbEngine.health)))
      expect(inside.status).toBe("up")
    }))
})
