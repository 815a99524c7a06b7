/** How `DbTest` reaches the server on which it makes databases: as an engine does, with its checks and its limits. */
import { describe, expect, it } from "@effect/vitest"
import type { Redacted } from "effect"
import { Effect } from "effect"
import { type DbOptions, DbError } from "effect-db"
import { DbTest } from "effect-db/testing"
import { createServer, Socket } from "node:net"
import type { AddressInfo } from "node:net"
import { testDatabase } from "./support/database.js"

const database = testDatabase()

/** A port that takes connections and says nothing. */
const silent = Effect.map(
  Effect.acquireRelease(
    Effect.async<{ readonly port: number; readonly close: () => void }>((resume) => {
      const sockets = new Set<Socket>()
      const server = createServer((socket) => void sockets.add(socket.on("error", () => {})))
      server.listen(0, "127.0.0.1", () =>
        resume(
          Effect.succeed({
            port: (server.address() as AddressInfo).port,
            close: () => {
              for (const socket of sockets) socket.destroy()
              server.close()
            }
          })
        )
      )
    }),
    ({ close }) => Effect.sync(close)
  ),
  ({ port }) => ({ host: "127.0.0.1", port })
)

const there = { host: database.host, port: database.port }
let versions = process.pid * 1000
const login = { username: database.user, password: database.password, database: database.database }

for (const [name, make] of [
  ["DbTest.database", (options: DbOptions) => Effect.asVoid(DbTest.database(options))],
  [
    "DbTest.template",
    (options: DbOptions) =>
      Effect.asVoid(DbTest.template({ ...options, prefix: "admin", version: ++versions }, Effect.void))
  ]
] as const) {
  describe(name, () => {
    it.scopedLive("refuses what an engine refuses, before it connects", () =>
      Effect.forEach(
        [{ username: `x\0user\0${database.user}` }, { database: "x\0y" }, { connectTimeout: -1 }],
        (wrong) =>
          Effect.map(Effect.flip(make({ ...there, ...login, ...wrong })), (error) =>
            expect(DbError.reason(error)).toMatchObject({ _tag: "InvalidInput" })
          ),
        { discard: true }
      )
    )

    it.scopedLive("waits for a port that says nothing no longer than connectTimeout", () =>
      Effect.gen(function* () {
        const host = yield* silent
        const error = yield* Effect.flip(make({ ...host, ...login, connectTimeout: 200 }))
        expect(DbError.reason(error)).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
        expect(error.message).toContain("within 200 ms")
      })
    )

    it.scopedLive("goes on to the next host, each with a connectTimeout of its own", () =>
      Effect.gen(function* () {
        const quiet = yield* silent
        yield* make({ hosts: [{ host: "127.0.0.1", port: 1 }, quiet, there], ...login, connectTimeout: 300 })
        yield* make({ hosts: [quiet, quiet, there], ...login, connectTimeout: 300, acquireTimeout: 400 })
      })
    )

    it.scopedLive("connects by the stream of the options", () =>
      Effect.gen(function* () {
        let streams = 0
        const stream = () => {
          streams++
          return new Socket()
        }
        yield* make({ ...there, ...login, stream } as DbOptions)
        expect(streams).toBeGreaterThan(0)
      })
    )

    it.scopedLive("has the engine's errors: a wrong password, a refused connection", () =>
      Effect.gen(function* () {
        const denied = yield* Effect.flip(make({ ...there, ...login, username: "nobody_of_this_name" }))
        expect(DbError.reason(denied)?._tag).toMatch(/^Auth/)
        const refused = yield* Effect.flip(make({ host: "127.0.0.1", port: 1, ...login }))
        expect(DbError.reason(refused)).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
        const never = yield* Effect.flip(
          make({ ...there, ...login, connectTimeout: 100, password: Effect.never as Effect.Effect<Redacted.Redacted> })
        )
        expect(never.message).toContain("password")
      })
    )

    it.scopedLive("is not held to what the options say of the program's statements", () =>
      make({
        ...there,
        ...login,
        statementTimeout: 1,
        afterConnect: Effect.die("only for the program's connections")
      })
    )
  })
}
