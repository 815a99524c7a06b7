import { DbConnection, DbEngine, DbError, DbSession, withTransaction } from "effect-db"
import { it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import { randomBytes } from "node:crypto"
import { createServer } from "node:net"
import type { AddressInfo } from "node:net"
import { describe, expect, inject } from "vitest"
import type { DbOptions } from "../src/DbOptions.js"
import { query, testDatabase, untilActivity } from "./support/database.js"
import { proxy } from "./support/proxy.js"
import {
  answered,
  errorOf,
  executes,
  forkUntil,
  freshTable,
  one,
  reasonOf,
  run,
  startups,
  wire,
  wired
} from "./support/wired.js"
import { soon, timed, took, untilStats } from "./support/until.js"
import { committed } from "./support/programs.js"

// FAULTS.md: connecting, and connections that die. Numbers are those of that list.
const database = testDatabase()

freshTable(database)

const ids = committed(database)
const terminate = database.query(
  "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
)

describe("connecting", () => {
  const nowhere: ReadonlyArray<readonly [string, DbOptions]> = [
    ["FAULTS 1: a name that does not resolve", { host: "no-such-host.invalid" }],
    ["FAULTS 2: a port that refuses", { host: "127.0.0.1", port: 1 }],
    ["FAULTS 3: an address that drops packets", { host: "192.0.2.1", port: 5432 }]
  ]
  for (const [what, target] of nowhere) {
    it.scopedLive(`${what} is a ConnectionError of phase connect within connectTimeout, and the slot is free`, () =>
      Effect.gen(function* () {
        const engine = yield* DbEngine.make({ ...target, username: what, connectTimeout: 300, maxConnections: 1 })
        for (let i = 0; i < 2; i++) {
          const [elapsed, reason] = yield* timed(reasonOf(engine.ping))
          expect(reason).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
          expect(elapsed).toBeLessThan(soon)
        }
        expect((yield* engine.stats).total).toBe(0)
      })
    )
  }

  it.scopedLive("a server that asks for a login that pg does not know is a ConnectionError, and the slot is free", () =>
    Effect.gen(function* () {
      const gssapi = Buffer.from([0x52, 0, 0, 0, 8, 0, 0, 0, 7])
      const server = createServer((socket) => {
        socket.on("error", () => {}).once("data", () => socket.write(gssapi))
      })
      yield* Effect.addFinalizer(() => Effect.sync(() => server.close()))
      yield* Effect.promise(() => new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve)))
      const { port } = server.address() as AddressInfo
      const engine = yield* DbEngine.make({ host: "127.0.0.1", port, maxConnections: 1 })
      const [elapsed, reason] = yield* timed(reasonOf(engine.ping))
      expect(reason).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
      expect(elapsed).toBeLessThan(soon)
      expect((yield* engine.stats).total).toBe(0)
    })
  )

  const limits: DbOptions = { connectTimeout: 200, maxConnections: 1 }
  const silences = [
    ["FAULTS 4: a server that accepts and says nothing", "silent", limits],
    ["FAULTS 5: one that answers the TLS request and then says nothing", "silentAfterTls", { ...limits, ssl: true }]
  ] as const
  for (const [what, mode, options] of silences) {
    wired(database, `${what} is a ConnectionError of phase connect within connectTimeout`, options, (at) =>
      Effect.gen(function* () {
        at.proxy.accept(mode)
        const [elapsed, reason] = yield* timed(reasonOf(run("SELECT 1")))
        expect(reason).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
        expect(elapsed).toBeGreaterThan(190)
        expect(elapsed).toBeLessThan(soon)
        expect((yield* DbEngine.stats).total).toBe(0)
        at.proxy.cutAll()
      })
    )
  }

  it.scopedLive("FAULTS 4: after a silent, a refusing and an unknown host the next one is tried", () =>
    Effect.gen(function* () {
      const [silent, refusing, good] = yield* Effect.all([
        proxy(database.url),
        proxy(database.url),
        proxy(database.url)
      ])
      silent.accept("silent")
      refusing.accept("refuse")
      const hosts = [silent, refusing, { host: "no-such-host.invalid", port: 5432 }, good].map(({ host, port }) => ({
        host,
        port
      }))
      const engine = yield* DbEngine.make({ url: database.url, hosts, connectTimeout: 150 })
      yield* engine.ping
      expect([silent.accepted, refusing.accepted, good.accepted]).toEqual([1, 1, 1])
    })
  )

  it.scopedLive(
    "FAULTS 6: an unknown role is an AuthenticationError, not tried on other hosts, without the secret",
    () =>
      Effect.gen(function* () {
        const [first, second] = yield* Effect.all([proxy(database.url), proxy(database.url)])
        const hosts = [first, second].map(({ host, port }) => ({ host, port }))
        const url = new URL(database.url)
        url.username = `nobody_${randomBytes(4).toString("hex")}`
        url.password = "s3cret"
        const engine = yield* DbEngine.make({ url: url.href, hosts })
        const error = yield* errorOf(engine.ping)
        expect(error.reason).toMatchObject({ _tag: "AuthenticationError", isRetryable: false })
        expect(JSON.stringify(error) + String(error)).not.toContain("s3cret")
        expect([first.accepted, second.accepted]).toEqual([1, 0])
      })
  )

  it.scopedLive("FAULTS 6: an unknown database is an AuthorizationError", () =>
    Effect.gen(function* () {
      const { engine } = yield* wire(database, { database: "no_such_database" })
      expect(yield* reasonOf(engine.ping)).toMatchObject({ _tag: "AuthorizationError", isRetryable: false })
    })
  )

  wired(database, "FAULTS 8: TLS that can't be had is never a connection without it", { ...one, ssl: true }, (at) =>
    Effect.gen(function* () {
      expect(yield* reasonOf(run("SELECT 1"))).toMatchObject({
        _tag: "ConnectionError",
        phase: "connect",
        isRetryable: false
      })
      expect(at.proxy.log.filter((_) => _.type === "startup")).toEqual([])
    })
  )
})

describe("the connection dies", () => {
  wired(database, "FAULTS 13: borrowed, between two statements of a transaction", one, (at) =>
    Effect.gen(function* () {
      const work = withTransaction(
        Effect.gen(function* () {
          yield* run("INSERT INTO t VALUES (1)")
          yield* terminate
          yield* untilActivity(database.url, (_) => _.total === 0)
          yield* run("INSERT INTO t VALUES (2)")
        })
      )
      expect(yield* reasonOf(work)).toMatchObject({ _tag: "ConnectionError", sqlState: "57P01" })
      yield* run("INSERT INTO t VALUES (3)")
      expect(yield* ids).toEqual([3])
      expect(startups(at)).toBe(2)
    })
  )

  wired(database, "FAULTS 13: in the middle of a query: phase read", one, (at) =>
    Effect.gen(function* () {
      const fiber = yield* forkUntil(at, executes(/pg_sleep/), reasonOf(run("SELECT pg_sleep(60)")))
      yield* untilActivity(database.url, (_) => _.active === 1)
      yield* terminate
      expect(yield* Fiber.join(fiber)).toMatchObject({ _tag: "ConnectionError", phase: "read", isRetryable: false })
      yield* run("SELECT 1")
    })
  )

  wired(
    database,
    "FAULTS 13: siblings of a session all fail typed, and the session's end does not hide it",
    one,
    (at) =>
      Effect.gen(function* () {
        const sleeps = Effect.all(
          [1, 2, 3].map((i) => Effect.either(run(`SELECT pg_sleep(60), ${i}`))),
          { concurrency: 3 }
        )
        const session = DbSession.autocommit(Effect.zipRight(run("INSERT INTO t VALUES (1)"), sleeps))
        const fiber = yield* forkUntil(at, executes(/, 3/), reasonOf(session))
        yield* untilActivity(database.url, (_) => _.active === 1)
        yield* terminate
        expect((yield* Fiber.join(fiber))._tag).toBe("ConnectionError")
        yield* run("SELECT 1")
        expect(yield* ids).toEqual([])
      })
  )

  for (const forward of [true, false]) {
    wired(
      database,
      `FAULTS 38: a lost implicit write is never retryable (${forward ? "it was" : "it was not"} done)`,
      one,
      (at) =>
        Effect.gen(function* () {
          const cut = at.proxy.cutAfter(executes(/^INSERT/), { forward })
          const error = yield* errorOf(run("INSERT INTO t VALUES (1)"))
          yield* Effect.promise(() => cut)
          expect(error.reason).toMatchObject({ _tag: "ConnectionError", phase: "read" })
          expect([error.isRetryable, DbError.isRetryable(error)]).toEqual([false, false])
          yield* untilActivity(database.url, (_) => _.total === 0)
          yield* run("SELECT 1")
          expect(yield* ids).toEqual(forward ? [1] : [])
        })
    )
  }

  wired(
    database,
    "what had not been sent when the connection died may be done again",
    { ...one, pipelining: false },
    (at) =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          const first = yield* forkUntil(at, executes(/pg_sleep/), reasonOf(run("SELECT pg_sleep(60)")))
          const second = yield* Effect.forkScoped(reasonOf(run("INSERT INTO t VALUES (1)")))
          yield* untilActivity(database.url, (_) => _.active === 1)
          yield* terminate
          expect([(yield* Fiber.join(first)).isRetryable, (yield* Fiber.join(second)).isRetryable]).toEqual([
            false,
            true
          ])
          expect(yield* ids).toEqual([])
        })
      )
  )

  for (const how of ["rst", "fin", "halfClose"] as const) {
    wired(database, `FAULTS 17: ${how} in the middle of a row: some rows are never a success`, one, (at) =>
      Effect.gen(function* () {
        yield* DbEngine.ping
        void at.proxy.cutInTheMiddleOfRow({ how, row: 5 })
        expect(yield* reasonOf(run("SELECT generate_series(1, 10) AS i"))).toMatchObject({
          _tag: "ConnectionError",
          phase: "read"
        })
        expect((yield* run("SELECT generate_series(1, 10) AS i")).length).toBe(10)
      })
    )
  }

  wired(
    database,
    "FAULTS 17: a blackhole in mid-query ends with the interrupt, within settleTimeout",
    { ...one, settleTimeout: 200 },
    (at) =>
      Effect.gen(function* () {
        const fiber = yield* forkUntil(at, executes(/pg_sleep/), run("SELECT pg_sleep(1)"))
        at.proxy.cutAll("blackhole")
        at.proxy.accept("silent")
        expect(yield* took(Fiber.interrupt(fiber))).toBeLessThan(soon)
        at.proxy.accept("relay")
        yield* run("SELECT 1")
      })
  )

  wired(
    database,
    "FAULTS 17: a COMMIT into a blackhole is CommitUnknown within settleTimeout",
    { ...one, settleTimeout: 200 },
    (at) =>
      Effect.gen(function* () {
        void at.proxy.holdAt(executes(/^COMMIT/), { forward: false })
        const [elapsed, reason] = yield* timed(reasonOf(withTransaction(run("INSERT INTO t VALUES (1)"))))
        expect(reason._tag).toBe("CommitUnknown")
        expect(elapsed).toBeLessThan(soon)
      })
  )

  wired(database, "FAULTS 20: DROP DATABASE ... (FORCE): typed, and then the database is unknown", {}, () =>
    Effect.gen(function* () {
      const name = `effect_db_dropped_${randomBytes(4).toString("hex")}`
      yield* database.query(`CREATE DATABASE ${name} TEMPLATE template0`)
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { context, engine } = yield* wire(database, { database: name })
          const session = DbSession.autocommit(
            Effect.gen(function* () {
              yield* run("SELECT 1")
              yield* database.query(`DROP DATABASE ${name} WITH (FORCE)`)
              yield* run("SELECT 2")
            })
          )
          expect(yield* reasonOf(Effect.provide(session, context))).toMatchObject({
            _tag: "ConnectionError",
            sqlState: "57P01"
          })
          expect((yield* reasonOf(engine.ping))._tag).toBe("AuthorizationError")
        })
      )
    })
  )

  wired(
    database,
    "FAULTS 20: idle in transaction for too long: the original cause",
    { ...one, idleInTransactionTimeout: 60 },
    (at) =>
      Effect.gen(function* () {
        const work = withTransaction(
          Effect.gen(function* () {
            yield* run("INSERT INTO t VALUES (1)")
            yield* untilActivity(database.url, (_) => _.total === 0)
            yield* run("INSERT INTO t VALUES (2)")
          })
        )
        expect(yield* reasonOf(work)).toMatchObject({ _tag: "TransactionTimeout", sqlState: "25P03" })
        yield* run("SELECT 1")
        expect([yield* ids, startups(at)]).toEqual([[], 2])
      })
  )

  wired(
    database,
    "FAULTS 20: the same, noticed at COMMIT: nothing was committed, and that is known",
    { ...one, idleInTransactionTimeout: 60 },
    () =>
      Effect.gen(function* () {
        const work = withTransaction(
          Effect.zipRight(
            run("INSERT INTO t VALUES (1)"),
            untilActivity(database.url, (_) => _.total === 0)
          )
        )
        expect((yield* reasonOf(work))._tag).toBe("TransactionTimeout")
        expect(yield* ids).toEqual([])
      })
  )

  wired(
    database,
    "FAULTS 20: the same, heard of only when COMMIT was sent: nothing was committed, and that is known",
    { ...one, idleInTransactionTimeout: 60 },
    (at) =>
      Effect.gen(function* () {
        const work = withTransaction(
          Effect.gen(function* () {
            yield* run("INSERT INTO t VALUES (1)")
            at.proxy.pause("backend")
            yield* untilActivity(database.url, (_) => _.total === 0)
          })
        )
        const sent = at.proxy.seen(({ text }) => text === "COMMIT")
        const reason = yield* Effect.fork(reasonOf(work))
        yield* Effect.promise(() => sent)
        at.proxy.resume()
        expect((yield* Fiber.join(reason))._tag).toBe("TransactionTimeout")
        expect(yield* ids).toEqual([])
      })
  )

  wired(
    database,
    "FAULTS 20: an idle session that the server ends is replaced unnoticed",
    { ...one, resetOnRelease: "never" },
    (at) =>
      Effect.gen(function* () {
        yield* run("SET idle_session_timeout = 40")
        yield* untilStats("it is gone", (_) => _.total === 0)
        yield* run("SELECT 1")
        expect(startups(at)).toBe(2)
      })
  )
})

describe("roles", () => {
  const readWrite: DbOptions = { ...one, targetSessionAttrs: "read-write", resetOnRelease: "never" }

  wired(
    database,
    "FAULTS 21: 25006 on a read-write target is a ReadOnlyError, and the connection is destroyed",
    readWrite,
    (at) =>
      Effect.gen(function* () {
        const work = withTransaction(run("INSERT INTO t VALUES (1)"), { readOnly: true })
        expect(yield* reasonOf(work)).toMatchObject({ _tag: "ReadOnlyError", isRetryable: true })
        yield* run("INSERT INTO t VALUES (2)")
        expect(startups(at)).toBe(2)
      })
  )

  wired(database, "FAULTS 21: on any target it leaves a good connection", one, (at) =>
    Effect.gen(function* () {
      const work = withTransaction(run("INSERT INTO t VALUES (1)"), { readOnly: true })
      expect(yield* reasonOf(work)).toMatchObject({ _tag: "ReadOnlyError", isRetryable: false })
      yield* run("INSERT INTO t VALUES (2)")
      expect(startups(at)).toBe(1)
    })
  )

  wired(database, "FAULTS 23: a connection whose server is no longer writable is not handed out", readWrite, (at) =>
    Effect.gen(function* () {
      yield* run("SET default_transaction_read_only = on")
      yield* run("INSERT INTO t VALUES (1)")
      expect(startups(at)).toBe(2)
    })
  )

  wired(database, "FAULTS 21: no host has the role: typed, retryable, and it works when one has", readWrite, () =>
    Effect.gen(function* () {
      // Asked from another database, where it may be changed back.
      const set = (what: string) => query(inject("databaseUrl"), `ALTER DATABASE ${database.database} ${what}`)
      yield* Effect.acquireRelease(set("SET default_transaction_read_only = on"), () =>
        set("RESET default_transaction_read_only")
      )
      expect(yield* reasonOf(run("SELECT 1"))).toMatchObject({ _tag: "ConnectionError", isRetryable: true })
      yield* set("RESET default_transaction_read_only")
      yield* run("INSERT INTO t VALUES (1)")
    })
  )
})

describe("COMMIT", () => {
  const insert = run("INSERT INTO t VALUES (1)")

  wired(database, "FAULTS 38: cut after it was forwarded: CommitUnknown, never retryable", one, (at) =>
    Effect.gen(function* () {
      const cut = at.proxy.cutAfter(executes(/^COMMIT/), { forward: true })
      expect(yield* reasonOf(withTransaction(insert))).toMatchObject({ _tag: "CommitUnknown", isRetryable: false })
      yield* Effect.promise(() => cut)
      yield* untilActivity(database.url, (_) => _.total === 0)
      expect(yield* ids).toEqual([1])
    })
  )

  wired(database, "FAULTS 39: cut before it was forwarded: CommitUnknown too, for who can tell", one, (at) =>
    Effect.gen(function* () {
      void at.proxy.cutAfter(executes(/^COMMIT/), { forward: false })
      expect((yield* reasonOf(withTransaction(insert)))._tag).toBe("CommitUnknown")
      yield* untilActivity(database.url, (_) => _.total === 0)
      expect(yield* ids).toEqual([])
    })
  )

  wired(database, "FAULTS 38: with verifyOutcome a committed one is a success", one, (at) =>
    Effect.gen(function* () {
      void at.proxy.cutAfter(executes(/^COMMIT/), { forward: true })
      yield* withTransaction(insert, { verifyOutcome: true })
      expect(yield* ids).toEqual([1])
    })
  )

  wired(database, "FAULTS 39: with verifyOutcome one that was not is retryable, and retried when asked", one, (at) =>
    Effect.gen(function* () {
      void at.proxy.cutAfter(executes(/^COMMIT/), { forward: false })
      expect(yield* reasonOf(withTransaction(insert, { verifyOutcome: true }))).toMatchObject({
        _tag: "ConnectionError",
        phase: "commit",
        isRetryable: true
      })
      void at.proxy.cutAfter(executes(/^COMMIT/), { forward: false })
      yield* withTransaction(insert, { verifyOutcome: true, retry: true })
      expect(yield* ids).toEqual([1])
    })
  )

  wired(database, "FAULTS 39: a connection lost before COMMIT was sent: retry: true does it again, once", one, (at) =>
    Effect.gen(function* () {
      void at.proxy.cutAfter(executes(/^SELECT 'cut'/), { forward: false })
      yield* withTransaction(Effect.zipRight(insert, run("SELECT 'cut'")), { retry: true })
      expect(yield* ids).toEqual([1])
    })
  )

  wired(database, "FAULTS 43: a ROLLBACK that fails: the cause is kept, the connection destroyed", one, (at) =>
    Effect.gen(function* () {
      void at.proxy.cutAfter(executes(/^ROLLBACK/), { forward: false })
      const failure = yield* Effect.flip(withTransaction(Effect.zipRight(insert, Effect.fail("mine"))))
      expect(failure).toBe("mine")
      yield* run("SELECT 1")
      expect([yield* ids, startups(at)]).toEqual([[], 2])
    })
  )

  wired(
    database,
    "FAULTS 43: so is one that is not answered, within settleTimeout",
    { ...one, settleTimeout: 150 },
    (at) =>
      Effect.gen(function* () {
        void at.proxy.holdAt(executes(/^ROLLBACK/), { forward: false })
        const elapsed = yield* took(Effect.flip(withTransaction(Effect.zipRight(insert, Effect.fail("mine")))))
        expect(elapsed).toBeLessThan(soon)
        yield* run("SELECT 1")
        expect([yield* ids, startups(at)]).toEqual([[], 2])
      })
  )

  wired(database, "FAULTS 46: a ROLLBACK TO that fails: the outer block can't commit", one, (at) =>
    Effect.gen(function* () {
      void at.proxy.cutAfter(executes(/^ROLLBACK TO/), { forward: false })
      const inner = withTransaction(Effect.zipRight(run("INSERT INTO t VALUES (2)"), Effect.fail("inner")))
      const outer = withTransaction(insert.pipe(Effect.zipRight(Effect.ignore(inner))))
      expect((yield* reasonOf(outer))._tag).toBe("ConnectionError")
      yield* run("SELECT 1")
      expect(yield* ids).toEqual([])
    })
  )

  for (const [where, pattern] of [
    ["BEGIN", /^BEGIN/],
    ["the body", /^INSERT/],
    ["COMMIT", /^COMMIT/]
  ] as const) {
    wired(database, `FAULTS 41: an interrupt in ${where}: all or nothing`, one, (at) =>
      Effect.gen(function* () {
        yield* DbEngine.ping
        const held = at.proxy.holdAt(executes(pattern), { forward: true })
        const both = Effect.zipRight(insert, run("INSERT INTO t VALUES (2)"))
        const fiber = yield* Effect.forkScoped(withTransaction(both))
        yield* Effect.promise(() => held)
        const interrupting = yield* Effect.forkScoped(Fiber.interrupt(fiber))
        yield* Effect.yieldNow()
        at.proxy.resume()
        yield* Fiber.join(interrupting)
        yield* run("SELECT 1")
        expect(yield* ids).toEqual(where === "COMMIT" ? [1, 2] : [])
      })
    )
  }

  wired(
    database,
    "FAULTS 40: the answer comes after settleTimeout: unknown, and the late one harms nobody",
    { ...one, settleTimeout: 100 },
    (at) =>
      Effect.gen(function* () {
        const committed = at.proxy.seen(answered(/^COMMIT/))
        void at.proxy.holdAt(executes(/^COMMIT/), { forward: true })
        expect((yield* reasonOf(withTransaction(insert)))._tag).toBe("CommitUnknown")
        yield* Effect.promise(() => committed)
        at.proxy.resume()
        expect(yield* run("SELECT count(*)::int AS n FROM t")).toEqual([{ n: 1 }])
      })
  )
})
