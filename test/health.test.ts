import { describe, expect, it } from "@effect/vitest"
import { Database, DbEngine, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect, Fiber } from "effect"
import * as Net from "node:net"
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

  proxied(
    "is up by the server where a connection of the pool says nothing any more and others wait for it",
    (via) =>
      Effect.gen(function* () {
        yield* DbEngine.ping
        const held = via.holdAt(({ type }) => type === "E" || type === "Q", { forward: false })
        const asking = yield* Effect.fork(DbEngine.health)
        yield* Effect.promise(() => held)
        const waiting = yield* Effect.fork(DbEngine.ping)
        yield* pending(1)
        expect(yield* Fiber.join(asking)).toMatchObject({ status: "up", asked: "server" })
        via.resume()
        yield* Fiber.join(waiting)
      }),
    { maxConnections: 1, healthTimeout: "500 millis", validateAfter: "1 minute" }
  )

  proxied("asks the server while others wait for a connection that is being opened", (via) =>
    Effect.gen(function* () {
      via.accept("silent")
      const waiting = yield* Effect.fork(insert(1))
      yield* pending(1)
      via.accept("relay")
      expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "server" })
      yield* Fiber.interrupt(waiting)
    })
  )

  const says = (code: string) => {
    const fields = Buffer.from(`SFATAL\0VFATAL\0C${code}\0Mno\0\0`)
    const head = Buffer.alloc(5, "E")
    head.writeInt32BE(4 + fields.length, 1)
    return Buffer.concat([head, fields])
  }
  for (const [what, answer, status] of [
    ["that it has too many clients", says("53300"), "up"],
    ["that it is starting", says("57P03"), "down"],
    ["what no server says", Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n"), "down"]
  ] as const) {
    it.scopedLive(`is ${status} when the server says ${what}`, () =>
      Effect.gen(function* () {
        const port = yield* Effect.acquireRelease(
          Effect.async<Net.Server>((resume) => {
            const server = Net.createServer((socket) =>
              socket.on("error", () => {}).once("data", () => socket.end(answer))
            )
            server.listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
          }),
          (server) => Effect.sync(() => void server.close())
        ).pipe(Effect.map((server) => (server.address() as Net.AddressInfo).port))
        const Says = Database.make("health-says")
        const found = yield* Effect.zipRight(Says.DbEngine.suspend, Says.DbEngine.health).pipe(
          Effect.provide(quietly(Says.DbLayer({ host: "127.0.0.1", port, username: "nobody", ssl: false })))
        )
        expect(found).toMatchObject({ status, asked: "server" })
      })
    )
  }

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
