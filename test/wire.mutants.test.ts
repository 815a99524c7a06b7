/** Promises that a careless change would break without another test noticing: what goes over the wire. */
import { describe, it } from "@effect/vitest"
import { DbConnection, DbEngine, DbSession } from "effect-db"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Net from "node:net"
import { expect } from "vitest"
import { sendCancel } from "../src/internal/cancel.js"
import { leavesBy } from "../src/internal/leaving.js"
import { makeResult } from "../src/internal/rows.js"
import { testDatabase } from "./support/database.js"
import { outside } from "./support/outside.js"
import {
  answered,
  executes,
  forkUntil,
  freshTable,
  one,
  reasonOf,
  run,
  seen,
  startups,
  wire,
  wired
} from "./support/wired.js"
import { until } from "./support/until.js"
import { committed } from "./support/programs.js"

const database = testDatabase()

freshTable(database, 1)

const ids = committed(database)
const workMem = Effect.map(run("SELECT current_setting('work_mem') AS found"), ([row]) => row!["found"])

describe("what is not done after all, or not twice", () => {
  wired(database, "a statement that was interrupted is not prepared anew and run", one, (at) =>
    Effect.gen(function* () {
      const insert = run("INSERT INTO t VALUES (2) RETURNING *")
      yield* insert
      yield* database.query("ALTER TABLE t ADD COLUMN note text")
      at.proxy.pause("backend")
      const fiber = yield* forkUntil(at, ({ dir, type }) => dir === "frontend" && type === "S", insert)
      const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
      yield* Effect.yieldNow()
      at.proxy.resume()
      yield* Fiber.join(interrupting)
      expect(yield* ids).toEqual([1, 2])
    })
  )

  wired(database, "nothing of a batch that was interrupted before it was sent happens", one, () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* run("SELECT 1")
      const fiber = yield* Effect.fork(DbSession.batch([sql`INSERT INTO t VALUES (2)`, sql`INSERT INTO t VALUES (3)`]))
      yield* Effect.yieldNow()
      yield* Fiber.interrupt(fiber)
      // Behind whatever was sent on the only connection.
      expect(yield* run("SELECT id FROM t")).toEqual([{ id: 1 }])
    })
  )

  wired(database, "a procedure that has committed on its way is not called again", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* database.query(
          "CREATE OR REPLACE PROCEDURE nap() LANGUAGE plpgsql AS " +
            "$$ BEGIN INSERT INTO t VALUES (2); COMMIT; PERFORM pg_sleep(60); END $$"
        )
        const lock = yield* outside(database.url)
        yield* lock("SELECT pg_advisory_lock(3)")
        const first = yield* forkUntil(at, executes(/advisory/), run("SELECT pg_advisory_xact_lock(3)"))
        const innocent = yield* forkUntil(at, executes(/nap/), run("CALL nap()"))
        const held = at.proxy.holdAt(({ type }) => type === "cancel", { forward: false })
        const done = seen(at, answered(/^SELECT/))
        yield* Effect.forkScoped(Fiber.interrupt(first))
        yield* Effect.promise(() => held)
        // The first one is over before its cancel arrives, which hits the procedure.
        yield* lock("SELECT pg_advisory_unlock_all()")
        yield* done
        yield* until(
          "the procedure has committed",
          Effect.map(ids, ({ length }) => length > 1)
        )
        at.proxy.resume()
        expect((yield* reasonOf(Fiber.join(innocent)))._tag).toBe("QueryCanceled")
        expect(yield* ids).toEqual([1, 2])
      })
    )
  )
})

describe("a text that prepares its transaction", () => {
  for (const text of ["PREPARE TRANSACTION 'a'", "PREPARE/**/TRANSACTION 'a'", "prepare -- it\ntransaction 'a'"]) {
    it(`${JSON.stringify(text)} has left it`, () => {
      expect(leavesBy(text, [makeResult("PREPARE TRANSACTION", [], [])])).toBe("PREPARE TRANSACTION")
    })
  }

  it("and one that prepares a statement has not", () => {
    expect(leavesBy("PREPARE transactions AS SELECT 1", [makeResult("PREPARE", [], [])])).toBeUndefined()
  })
})

describe("connections that come back", () => {
  for (const resetOnRelease of ["auto", "always"] as const) {
    wired(
      database,
      `SET behind a SET LOCAL: "${resetOnRelease}" sweeps it, on the same connection`,
      { ...one, resetOnRelease },
      (at) =>
        Effect.gen(function* () {
          yield* DbConnection.withConnection(run("SET LOCAL work_mem = '3MB'; SET work_mem = '5MB'"))
          expect(yield* workMem).toBe("4MB")
          expect(startups(at)).toBe(1)
        })
    )
  }

  wired(database, "one whose reset the server refuses is not used again", one, (at) =>
    Effect.gen(function* () {
      const lock = yield* outside(database.url)
      yield* DbConnection.withConnection(
        Effect.gen(function* () {
          yield* run("SET work_mem = '5MB'")
          yield* run("CREATE TEMP TABLE mine (id int)")
          const [row] = yield* run("SELECT pg_my_temp_schema()::regnamespace::text AS name")
          yield* lock(`BEGIN; LOCK TABLE ${row!["name"] as string}.mine IN ACCESS SHARE MODE`)
        })
      )
      // DISCARD TEMP waits for the table, and is cancelled.
      const cancel = `SELECT pg_cancel_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '%DISCARD TEMP%' AND wait_event_type = 'Lock'`
      yield* until(
        "the reset is cancelled",
        Effect.map(database.query(cancel), ({ length }) => length > 0)
      )
      yield* lock("ROLLBACK")
      expect(yield* workMem).toBe("4MB")
      expect(startups(at)).toBe(2)
    })
  )

  it.scopedLive("one on which afterConnect fails after its reset is not used again", () =>
    Effect.gen(function* () {
      let runs = 0
      const afterConnect = Effect.suspend(() =>
        ++runs === 2
          ? Effect.fail(new Error("no") as never)
          : Effect.flatMap(DbConnection, ({ sql }) => sql`SET application_name = 'made ready'`)
      )
      const { context } = yield* wire(database, { ...one, afterConnect })
      yield* Effect.gen(function* () {
        yield* run("SET work_mem = '5MB'")
        expect(yield* run("SELECT current_setting('application_name') AS name")).toEqual([{ name: "made ready" }])
        expect(runs).toBe(3)
      }).pipe(Effect.provide(context))
    })
  )

  wired(
    database,
    "one that the network has swallowed leaves its borrower time for another one",
    { maxConnections: 2, validateAfter: 20, connectTimeout: "20 seconds", acquireTimeout: 3000 },
    (at) =>
      Effect.gen(function* () {
        yield* run("SELECT 1")
        at.proxy.cutAll("blackhole")
        // Longer than validateAfter.
        yield* Effect.sleep(40)
        expect(yield* run("SELECT 2 AS n")).toEqual([{ n: 2 }])
      })
  )

  wired(
    database,
    "one that is lost between an error and the end of its group leaves the statement the error",
    one,
    (at) =>
      Effect.gen(function* () {
        yield* run("SELECT 1")
        at.proxy.pause("frontend")
        const fiber = yield* forkUntil(at, executes(/INSERT/), run("INSERT INTO t VALUES (2)"))
        const fields = Buffer.from("SERROR\0VERROR\0C23505\0Mduplicate key\0\0")
        const head = Buffer.from("E\0\0\0\0")
        head.writeUInt32BE(fields.length + 4, 1)
        at.proxy.injectGarbage(Buffer.concat([head, fields]))
        at.proxy.cutAll("fin")
        expect((yield* reasonOf(Fiber.join(fiber)))._tag).toBe("UniqueViolation")
      })
  )
})

describe("a CancelRequest", () => {
  it.scopedLive("to a server that does not offer TLS is not sent in the clear", () =>
    Effect.gen(function* () {
      const heard: Array<Buffer> = []
      const server = yield* Effect.acquireRelease(
        Effect.async<Net.Server>((resume) => {
          const server = Net.createServer((socket) => {
            socket.on("error", () => {})
            socket.on("data", (chunk) => {
              heard.push(chunk)
              if (heard.length === 1) socket.write("N")
              else socket.end()
            })
          })
          server.listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
        }),
        (server) => Effect.async<void>((resume) => void server.close(() => resume(Effect.void)))
      )
      const { port } = server.address() as Net.AddressInfo
      const target = { host: "127.0.0.1", port, ssl: true, pid: 1, secret: 2 }
      const error = yield* Effect.async<Error | undefined>((resume) =>
        sendCancel(target, 5000, (error) => resume(Effect.succeed(error)))
      )
      expect(error?.message).toMatch(/does not offer TLS/)
      // The request for TLS, and nothing behind it.
      expect(Buffer.concat(heard).length).toBe(8)
    })
  )
})
