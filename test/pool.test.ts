import { it } from "@effect/vitest"
import type { SqlError } from "@effect/sql/SqlError"
import { Database, DbConnection, DbEngine, DbError, DbLayer, DbSession, withTransaction } from "effect-db"
import type { DbSql } from "effect-db"
import { DbTest } from "effect-db/testing"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import type * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import * as Redacted from "effect/Redacted"
import * as Ref from "effect/Ref"
import * as Schedule from "effect/Schedule"
import * as Scope from "effect/Scope"
import { Duplex } from "node:stream"
import { inspect } from "node:util"
import { beforeAll, describe, expect, vi } from "vitest"
import { coreOf } from "../src/DbEngine.js"
import type { EngineService } from "../src/DbEngine.js"
import type { DbOptions } from "../src/DbOptions.js"
import type { Wire } from "../src/internal/wire.js"
import { testDatabase, untilActivity } from "./support/database.js"
import { outcome, quietly } from "./support/programs.js"
import { proxy } from "./support/proxy.js"
import {
  answered,
  errorOf,
  executes,
  forkUntil,
  identity,
  reasonOf,
  run,
  sent,
  startups,
  wire,
  wired
} from "./support/wired.js"
import { barrier, idle, pending, soon, timed, took, until, untilStats } from "./support/until.js"
import { collected } from "./support/observed.js"

// What HikariCP promises of a pool, here.
const database = testDatabase()

beforeAll(async () => {
  await Effect.runPromise(
    database.query(
      `CREATE TABLE t (id int);
       CREATE FUNCTION leaves() RETURNS void LANGUAGE plpgsql AS
         $$ BEGIN PERFORM set_config('work_mem', '5MB', false); END $$`
    )
  )
})

const numbers = (n: number): ReadonlyArray<number> => Array.from({ length: n }, (_, i) => i)
const pause = (millis: number) => Effect.promise(() => new Promise((resolve) => setTimeout(resolve, millis)))
const stats = DbEngine.stats

/** Holds a connection until the latch opens. */
const holdUntil = (latch: Deferred.Deferred<void>, name: string) =>
  Effect.gen(function* () {
    const holds = yield* Deferred.make<void>()
    const fiber = yield* Effect.forkScoped(
      DbConnection.withConnection(Effect.zipRight(Deferred.succeed(holds, undefined), Deferred.await(latch)), {
        reuse: false,
        name
      })
    )
    yield* Deferred.await(holds)
    return fiber
  })

describe("the maximum", () => {
  wired(
    database,
    "FAULTS 11: holds on the server under 200 fibers, slow connects and evictions, and so does the identity of stats",
    { maxConnections: 4, acquireTimeout: "20 seconds" },
    (at) =>
      Effect.gen(function* () {
        at.proxy.delay(5)
        let most = 0
        const watch = Effect.forever(
          Effect.gen(function* () {
            most = Math.max(most, (yield* database.activity).total)
            identity(yield* stats)
            yield* pause(2)
          })
        )
        const work = Effect.forEach(
          numbers(200),
          (i) => Effect.zipRight(run("SELECT pg_sleep(0.003)"), i % 10 === 0 ? DbEngine.evictAll : Effect.void),
          { concurrency: "unbounded", discard: true }
        )
        yield* Effect.raceFirst(work, watch)
        expect(most).toBeGreaterThan(1)
        expect(most).toBeLessThanOrEqual(4)
      })
  )

  wired(database, "FAULTS 11: first come, first served", { maxConnections: 1 }, () =>
    Effect.gen(function* () {
      const latch = yield* Deferred.make<void>()
      yield* holdUntil(latch, "holder")
      const order: Array<number> = []
      const fibers = yield* Effect.forEach(numbers(20), (i) =>
        Effect.zipLeft(Effect.forkScoped(DbConnection.withConnection(Effect.sync(() => order.push(i)))), pending(i + 1))
      )
      yield* Deferred.succeed(latch, undefined)
      yield* Fiber.joinAll(fibers)
      expect(order).toEqual(numbers(20))
    })
  )

  wired(
    database,
    "an idle connection serves the first who waits, while another is being checked",
    { maxConnections: 2, validateAfter: 50 },
    (at) =>
      Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        const holder = yield* holdUntil(latch, "holder")
        yield* run("SELECT 'old'")
        yield* pause(80)
        // The old one has to be checked first, and its answer does not come.
        const held = at.proxy.holdAt((_) => _.type === "Q" && _.text === "", { forward: true })
        const order: Array<string> = []
        const first = yield* Effect.forkScoped(DbConnection.withConnection(Effect.sync(() => order.push("first"))))
        yield* Effect.promise(() => held)
        const second = yield* Effect.forkScoped(DbConnection.withConnection(Effect.sync(() => order.push("second"))))
        yield* pending(2)
        yield* Deferred.succeed(latch, undefined)
        yield* Effect.all([Fiber.join(holder), Fiber.join(first), Fiber.join(second)])
        at.proxy.resume()
        expect(order).toEqual(["first", "second"])
      })
  )

  wired(
    database,
    "who comes second does not wait for the check of the first one's connection, while another is idle",
    { maxConnections: 2, validateAfter: 20 },
    (at) =>
      Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        const holders = [yield* holdUntil(latch, "one"), yield* holdUntil(latch, "two")]
        yield* Deferred.succeed(latch, undefined)
        yield* Effect.forEach(holders, Fiber.join)
        yield* idle(2)
        yield* pause(40)
        const held = at.proxy.holdAt((_) => _.type === "Q" && _.text === "", { forward: true })
        const first = yield* Effect.forkScoped(run("SELECT 'first'"))
        yield* Effect.promise(() => held)
        // Nothing else is let through to the first: this is answered on the other connection.
        yield* Effect.either(
          run("SELECT 'second'").pipe(Effect.timeoutFail({ duration: 1000, onTimeout: () => "waits" }))
        ).pipe(Effect.tap((outcome) => Effect.sync(() => expect(outcome._tag).toBe("Right"))))
        at.proxy.resume()
        yield* Fiber.join(first)
        expect(startups(at)).toBe(2)
      })
  )
})

describe("waiting", () => {
  wired(
    database,
    "FAULTS 10: exhaustion is an AcquireTimeout on time that names the holders",
    { maxConnections: 2, acquireTimeout: 150 },
    () =>
      Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        yield* holdUntil(latch, "report")
        yield* holdUntil(latch, "import")
        const [elapsed, reason] = yield* timed(reasonOf(run("SELECT 1")))
        expect(elapsed).toBeGreaterThan(140)
        expect(elapsed).toBeLessThan(soon)
        expect(reason).toMatchObject({ _tag: "AcquireTimeout", isRetryable: true })
        expect((reason as { holders: ReadonlyArray<{ name: string }> }).holders.map((_) => _.name)).toEqual([
          "report",
          "import"
        ])
        expect(reason.message).toContain("all 2 are in use")
        yield* Deferred.succeed(latch, undefined)
      })
  )

  wired(
    database,
    "FAULTS 10: fibers that hold one and wait for another end, and don't wait for ever",
    // Enough for the first connection of each, on a machine that is busy.
    { maxConnections: 2, acquireTimeout: 1000 },
    () =>
      Effect.gen(function* () {
        const both = yield* barrier(2)
        const greedy = DbConnection.withConnection(
          Effect.zipRight(both, DbConnection.withConnection(Effect.void, { reuse: false }))
        )
        const exits = yield* Effect.all([Effect.exit(greedy), Effect.exit(greedy)], { concurrency: 2 })
        const failures = exits.map(outcome).filter((_) => _ !== "success")
        expect(failures.length).toBeGreaterThan(0)
        expect(failures.filter((_) => _ !== "AcquireTimeout")).toEqual([])
      })
  )

  wired(
    database,
    "a database that is down is not called exhaustion",
    { maxConnections: 2, acquireTimeout: 200 },
    (at) =>
      Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        yield* holdUntil(latch, "holder")
        at.proxy.accept("refuse")
        const reason = yield* reasonOf(run("SELECT 1"))
        expect(reason._tag).toBe("AcquireTimeout")
        expect(reason.message).toContain("can't be reached")
        at.proxy.accept("relay")
        yield* Deferred.succeed(latch, undefined)
      })
  )

  wired(
    database,
    "a database that is silent is not called exhaustion",
    { maxConnections: 2, acquireTimeout: 150, connectTimeout: 2000 },
    (at) =>
      Effect.gen(function* () {
        at.proxy.accept("silent")
        const reason = yield* reasonOf(run("SELECT 1"))
        expect(reason._tag).toBe("AcquireTimeout")
        expect(reason.message).not.toContain("in use")
        expect(reason.message).toContain("1 are being opened")
        at.proxy.cutAll()
      })
  )

  wired(database, "who waits for a shorter time is told of that time", { maxConnections: 1 }, () =>
    Effect.gen(function* () {
      const latch = yield* Deferred.make<void>()
      yield* holdUntil(latch, "holder")
      const reason = yield* reasonOf(DbConnection.withConnection(Effect.void, { reuse: false, timeout: 100 }))
      expect(reason.message).toContain("within 100 ms")
      yield* Deferred.succeed(latch, undefined)
    })
  )

  wired(database, "a waiter that gives up does not stop the dial: its connection is there for the next", {}, (at) =>
    Effect.gen(function* () {
      at.proxy.pause("backend")
      const fiber = yield* Effect.forkScoped(run("SELECT 1"))
      yield* untilStats("dialling", (_) => _.connecting === 1)
      yield* Fiber.interrupt(fiber)
      expect((yield* stats).connecting).toBe(1)
      at.proxy.resume()
      yield* idle(1)
      yield* run("SELECT 2")
      expect(startups(at)).toBe(1)
    })
  )
})

describe("thousands who wait for connections that are refused at once", () => {
  const crowd = 2000

  /** Lets them all come while nothing is lent, and tells what each was told. */
  const told = Effect.gen(function* () {
    yield* DbEngine.suspend
    const fiber = yield* Effect.forkScoped(
      Effect.forEach(numbers(crowd), () => Effect.exit(run("SELECT 1")), { concurrency: "unbounded" })
    )
    yield* pending(crowd)
    yield* DbEngine.resume
    return [...new Set((yield* Fiber.join(fiber)).map(outcome))]
  })

  it.scopedLive("are told at once by a password that fails, and no slot is lost", () =>
    Effect.gen(function* () {
      let known = false
      let attempts = 0
      const password = Effect.suspend(() => {
        attempts++
        return known ? Effect.succeed(database.password) : Effect.fail("unknown")
      })
      const { context } = yield* wire(database, { password, maxConnections: 3 })
      yield* Effect.gen(function* () {
        expect(yield* told).toEqual(["AuthenticationError"])
        // All by the same, not each by one of its own: that might lock the account.
        expect(attempts).toBeLessThanOrEqual(3)
        expect(yield* stats).toMatchObject({ total: 0, pending: 0 })
        known = true
        expect(yield* run("SELECT 1 AS one")).toEqual([{ one: 1 }])
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("and nobody asks for a password that fails for the sake of the minimum", () =>
    Effect.gen(function* () {
      let attempts = 0
      const password = Effect.suspend(() => {
        attempts++
        return Effect.fail("unknown")
      })
      const { context } = yield* wire(database, { password, minConnections: 2 })
      expect((yield* reasonOf(Effect.provide(run("SELECT 1"), context)))._tag).toBe("AuthenticationError")
      expect(attempts).toBe(1)
    })
  )

  const streams: ReadonlyArray<readonly [name: string, stream: () => Duplex]> = [
    [
      "a stream that throws",
      () => {
        throw new Error("no socket")
      }
    ],
    ["a stream that is no socket", () => new Duplex()]
  ]
  for (const [name, stream] of streams) {
    for (const minConnections of [0, 2]) {
      it.scopedLive(`are told by ${name}, and no slot is lost, where ${minConnections} are to be kept`, () =>
        Effect.gen(function* () {
          const { context } = yield* wire(database, { stream, minConnections })
          yield* Effect.gen(function* () {
            expect(yield* told).toEqual(["ConnectionError"])
            expect(yield* stats).toMatchObject({ total: 0, pending: 0 })
          }).pipe(Effect.provide(context))
        })
      )
    }
  }
})

describe("idle connections", () => {
  wired(
    database,
    "idleTimeout closes each, however they came to be idle one after the other",
    { idleTimeout: 120 },
    () =>
      Effect.gen(function* () {
        const latches = yield* Effect.all(numbers(3).map(() => Deferred.make<void>()))
        const fibers = yield* Effect.forEach(latches, (latch, i) => holdUntil(latch, `holder ${i}`))
        for (const [i, latch] of latches.entries()) {
          yield* Deferred.succeed(latch, undefined)
          yield* Fiber.join(fibers[i]!)
          yield* pause(70)
        }
        yield* untilStats("all are closed", (_) => _.total === 0, 1000)
        yield* untilActivity(database.url, (_) => _.total === 0)
      })
  )

  wired(
    database,
    "minConnections are opened with the first use, and kept when idle",
    { minConnections: 3, idleTimeout: 40 },
    (at) =>
      Effect.gen(function* () {
        yield* pause(50)
        // "lazy": no socket before the first use.
        expect(at.proxy.accepted).toBe(0)
        yield* Effect.all(
          numbers(6).map(() => run("SELECT pg_sleep(0.02)")),
          { concurrency: 6 }
        )
        yield* idle(3)
        yield* pause(100)
        expect((yield* stats).idle).toBe(3)
      })
  )

  wired(
    database,
    "the minimum that is kept is of those that were there: none is closed to be opened again",
    { minConnections: 2, idleTimeout: 60 },
    (at) =>
      Effect.gen(function* () {
        const all = yield* barrier(4)
        const each = DbConnection.withConnection(Effect.zipRight(run("SELECT 1"), all), { reuse: false })
        yield* Effect.all([each, each, each, each], { concurrency: 4 })
        yield* idle(2)
        yield* pause(200)
        expect(startups(at)).toBe(4)
      })
  )

  for (const [how, options, use] of [
    ["one use", {}, Effect.asVoid(run("SELECT 1"))],
    ['connect: "eager"', { connect: "eager" }, Effect.void]
  ] as const) {
    wired(
      database,
      `minConnections are opened after ${how}, and again after they were closed`,
      { minConnections: 3, maxConnections: 4, ...options },
      (at) =>
        Effect.gen(function* () {
          yield* use
          yield* idle(3)
          yield* DbEngine.evictAll
          yield* idle(3)
          expect((yield* stats).total).toBe(3)
          expect(startups(at)).toBe(6)
        })
    )
  }

  wired(
    database,
    "connectionTTL ends a connection when it is given back, not while it is in use",
    { connectionTTL: 60, maxConnections: 1 },
    (at) =>
      Effect.gen(function* () {
        yield* run("SELECT pg_sleep(0.1)")
        expect(startups(at)).toBe(1)
        yield* run("SELECT 1")
        expect(startups(at)).toBe(2)
      })
  )

  wired(database, "FAULTS 13: a connection that was killed while idle is never handed out", {}, () =>
    Effect.gen(function* () {
      for (let round = 0; round < 5; round++) {
        yield* Effect.all(
          numbers(3).map(() => run("SELECT pg_sleep(0.01)")),
          { concurrency: 3 }
        )
        // One that is still being dialled for the third statement would outlive the first look.
        yield* Effect.repeat(
          database.query(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
          ),
          { until: (killed) => killed.length === 0 }
        )
        yield* untilActivity(database.url, (_) => _.total === 0)
        yield* untilStats("it was noticed", (_) => _.idle === 0)
        yield* run("SELECT 1")
      }
    })
  )

  wired(
    database,
    "FAULTS 17: one that the network swallowed is found out before it is handed out, and the others with it",
    { validateAfter: 20, connectTimeout: 200 },
    (at) =>
      Effect.gen(function* () {
        yield* Effect.all(
          numbers(3).map(() => run("SELECT pg_sleep(0.02)")),
          { concurrency: 3 }
        )
        yield* idle(3)
        at.proxy.cutAll("blackhole")
        yield* pause(40)
        const elapsed = yield* took(run("SELECT 1"))
        expect(elapsed).toBeGreaterThan(190)
        expect(elapsed).toBeLessThan(soon)
        expect(startups(at)).toBe(4)
      })
  )

  wired(database, "one that idled for less than validateAfter is not checked", { validateAfter: "1 minute" }, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT 1")
      yield* pause(30)
      yield* run("SELECT 1")
      expect(at.proxy.statements()).toEqual(["SELECT 1", "SELECT 1"])
    })
  )

  wired(
    database,
    "one that was closed on purpose casts no doubt on the others",
    { validateAfter: "1 minute", maxConnections: 2 },
    (at) =>
      Effect.gen(function* () {
        yield* Effect.all(
          numbers(2).map(() => run("SELECT pg_sleep(0.02)")),
          { concurrency: 2 }
        )
        const raw = DbConnection.withConnection(
          Effect.flatMap(DbConnection.raw, (client) => Effect.promise(() => client.query("SELECT 'raw'")))
        )
        yield* raw
        yield* untilStats("it is closed", (_) => _.total === 1)
        at.proxy.reset()
        yield* run("SELECT 1")
        expect(at.proxy.statements()).toEqual(["SELECT 1"])
      })
  )
})

describe("administration", () => {
  wired(database, "evictAll closes idle connections now and lent ones when they come back", {}, (at) =>
    Effect.gen(function* () {
      const latch = yield* Deferred.make<void>()
      const holder = yield* holdUntil(latch, "holder")
      yield* run("SELECT 1")
      yield* DbEngine.evictAll
      yield* untilStats("the idle one is gone", (_) => _.total === 1)
      yield* Deferred.succeed(latch, undefined)
      yield* Fiber.join(holder)
      yield* untilStats("so is the lent one", (_) => _.total === 0)
      yield* run("SELECT 1")
      expect(startups(at)).toBe(3)
    })
  )

  wired(database, "evictAll closes what is being opened, too: who waits for it gets another", {}, (at) =>
    Effect.gen(function* () {
      at.proxy.pause("backend")
      const waiting = yield* forkUntil(at, ({ type }) => type === "startup", run("SELECT 1"))
      yield* DbEngine.evictAll
      at.proxy.resume()
      yield* Fiber.join(waiting)
      expect(startups(at)).toBe(2)
    })
  )

  wired(database, "suspend lends nothing until resume, then in order", { maxConnections: 2 }, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT 1")
      yield* DbEngine.suspend
      at.proxy.reset()
      const lent: Array<number> = []
      const fibers = yield* Effect.forEach(numbers(3), (i) =>
        Effect.zipLeft(Effect.forkScoped(DbConnection.withConnection(Effect.sync(() => lent.push(i)))), pending(i + 1))
      )
      expect(lent).toEqual([])
      expect(at.proxy.log).toEqual([])
      yield* DbEngine.resume
      yield* Fiber.joinAll(fibers)
      expect(lent).toEqual(numbers(3))
    })
  )

  wired(database, "resume passes over what has become too old, and loses none of the rest", {}, (at) =>
    Effect.gen(function* () {
      const all = yield* barrier(3)
      const each = DbConnection.withConnection(Effect.zipRight(run("SELECT 1"), all), { reuse: false })
      yield* Effect.all([each, each, each], { concurrency: 3 })
      yield* idle(3)
      yield* DbEngine.suspend
      const waiting = yield* Effect.forkScoped(run("SELECT 1"))
      yield* pending(1)
      // The one used last: it is looked at first.
      const { idle: kept } = coreOf(at.engine).pool() as unknown as { readonly idle: ReadonlyArray<Wire> }
      kept[2]!.expiresAt = 0
      yield* DbEngine.resume
      yield* Fiber.join(waiting)
      yield* untilStats("two are left", (_) => _.idle === 2 && _.total === 2)
      yield* untilActivity(database.url, (_) => _.total === 2)
    })
  )

  wired(database, "a wait for a suspended pool ends on time and says so", { acquireTimeout: 100 }, () =>
    Effect.gen(function* () {
      yield* DbEngine.suspend
      const reason = yield* reasonOf(run("SELECT 1"))
      expect([reason._tag, /suspended/.test(reason.message)]).toEqual(["AcquireTimeout", true])
      yield* DbEngine.resume
      yield* run("SELECT 1")
    })
  )

  wired(database, "ping is one round trip, and fails typed when there is nobody", {}, (at) =>
    Effect.gen(function* () {
      yield* DbEngine.ping
      at.proxy.reset()
      yield* DbEngine.ping
      expect(at.proxy.flights()).toBe(1)
      at.proxy.accept("refuse")
      at.proxy.cutAll()
      yield* untilStats("it was noticed", (_) => _.total === 0)
      expect((yield* reasonOf(DbEngine.ping))._tag).toBe("ConnectionError")
    })
  )
})

interface Leftover {
  readonly what: string
  readonly leave: ReadonlyArray<string>
  readonly look: string
  readonly left: string
  readonly clean: string
}

const leftovers: ReadonlyArray<Leftover> = [
  { what: "SET", leave: ["SET work_mem = '5MB'"], look: "current_setting('work_mem')", left: "5MB", clean: "4MB" },
  {
    what: "SET in a text of several",
    leave: ["SELECT 1; SET work_mem = '5MB'; SELECT 2"],
    look: "current_setting('work_mem')",
    left: "5MB",
    clean: "4MB"
  },
  {
    what: "set_config",
    leave: ["SELECT set_config('work_mem', '5MB', false)"],
    look: "current_setting('work_mem')",
    left: "5MB",
    clean: "4MB"
  },
  {
    what: "search_path",
    leave: ["SET search_path TO pg_catalog"],
    look: "current_setting('search_path')",
    left: "pg_catalog",
    clean: '"$user", public'
  },
  {
    what: "role",
    leave: ["SET ROLE pg_read_all_data"],
    look: "(current_user = session_user)::text",
    left: "false",
    clean: "true"
  },
  {
    what: "session authorization",
    leave: ["SET SESSION AUTHORIZATION pg_read_all_data"],
    look: "session_user::text",
    left: "pg_read_all_data",
    clean: database.user
  },
  {
    what: "temp table",
    leave: ["CREATE TEMP TABLE mine (id int)"],
    look: "(to_regclass('pg_temp.mine') IS NOT NULL)::text",
    left: "true",
    clean: "false"
  },
  {
    what: "SELECT INTO TEMP",
    leave: ["SELECT 1 AS id INTO TEMP mine"],
    look: "(to_regclass('pg_temp.mine') IS NOT NULL)::text",
    left: "true",
    clean: "false"
  },
  {
    what: "advisory lock",
    leave: ["SELECT pg_advisory_lock(49)"],
    look: "(SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())",
    left: "1",
    clean: "0"
  },
  {
    what: "LISTEN",
    leave: ["LISTEN mine"],
    look: "(SELECT count(*)::text FROM pg_listening_channels())",
    left: "1",
    clean: "0"
  },
  {
    what: "cursor WITH HOLD",
    leave: ["DECLARE mine CURSOR WITH HOLD FOR SELECT 1"],
    look: "(SELECT count(*)::text FROM pg_cursors WHERE name = 'mine')",
    left: "1",
    clean: "0"
  },
  {
    what: "PREPARE",
    leave: ["PREPARE mine AS SELECT 1"],
    look: "(SELECT count(*)::text FROM pg_prepared_statements WHERE name = 'mine')",
    left: "1",
    clean: "0"
  }
]

const q = "coalesce(current_setting('app.q', true), '')"
const temporary = "(SELECT count(*)::text FROM pg_class WHERE relname = 'mine' AND relpersistence = 't')"

/** Other ways to leave the same, each in one text. */
const disguised: ReadonlyArray<readonly [text: string, look: string, clean: string]> = [
  ["CREATE OR REPLACE TEMP VIEW mine AS SELECT 1 AS x", temporary, "0"],
  ["CREATE /* for now */ TEMPORARY TABLE mine (id int)", temporary, "0"],
  ["SELECT 1 AS id INTO /* for /* just */ now */ TEMP mine", temporary, "0"],
  ["EXPLAIN ANALYZE CREATE TEMP TABLE mine AS SELECT 1", temporary, "0"],
  ["UPDATE pg_settings SET setting = '7777' WHERE name = 'work_mem'", "current_setting('work_mem')", "4MB"],
  ["SELECT set_config('app.q', ', true)', false)", q, ""],
  ["SELECT set_config('app.q', $$, true)$$, false)", q, ""],
  ["SELECT set_config('app.q', 'v', 'f')", q, ""],
  ["SELECT set_config('app.q', 'v', not true)", q, ""],
  ["SELECT set_config('app.q', 'v', false /*, true) */)", q, ""],
  [`SELECT "set_config"('app.q', 'v', false)`, q, ""],
  ["SELECT set_config('app.p', 'v', true), set_config('app.q', 'v', false)", q, ""]
]

describe("FAULTS 49: what a borrower leaves behind", () => {
  const look = (_: Leftover) => Effect.map(run(`SELECT ${_.look} AS found`), (rows) => rows[0]!["found"])
  const leave = (_: Leftover) => DbConnection.withConnection(Effect.forEach(_.leave, run))

  for (const leftover of leftovers) {
    for (const resetOnRelease of ["auto", "always"] as const) {
      wired(
        database,
        `${leftover.what}: "${resetOnRelease}" sweeps it, on the same connection`,
        { maxConnections: 1, resetOnRelease },
        (at) =>
          Effect.gen(function* () {
            yield* leave(leftover)
            expect(yield* look(leftover)).toBe(leftover.clean)
            expect(yield* DbSession.autocommit(look(leftover))).toBe(leftover.clean)
            expect(startups(at)).toBe(1)
          })
      )
    }

    wired(database, `${leftover.what}: "never" keeps it`, { maxConnections: 1, resetOnRelease: "never" }, () =>
      Effect.gen(function* () {
        yield* leave(leftover)
        expect(yield* look(leftover)).toBe(leftover.left)
        // For the reader of the database's end: nothing of it outlives the connection.
        yield* DbEngine.evictAll
      })
    )

    wired(database, `${leftover.what}: an implicit statement leaves nothing either`, { maxConnections: 1 }, () =>
      Effect.gen(function* () {
        yield* Effect.forEach(leftover.leave, run)
        expect(yield* look(leftover)).toBe(leftover.clean)
      })
    )
  }

  for (const [text, look, clean] of disguised) {
    wired(database, `"auto" sweeps what ${text} leaves`, { maxConnections: 1 }, (at) =>
      Effect.gen(function* () {
        yield* run(text)
        expect(yield* run(`SELECT ${look} AS found`)).toEqual([{ found: clean }])
        expect(startups(at)).toBe(1)
      })
    )
  }

  wired(database, '"auto" resets for nothing that ends with the transaction', { maxConnections: 1 }, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* sql`SELECT set_config(${"app.q"}, ${"v"}, true)`
      yield* run("SELECT set_config('app.q', ', false)', TRUE), 'temp' AS t")
      yield* run("SELECT pg_advisory_xact_lock(1)")
      yield* run("INSERT INTO t SELECT temp FROM (VALUES (1)) AS readings (temp)")
      yield* run("SELECT setting FROM pg_settings WHERE name = 'work_mem'")
      yield* DbSession.autocommit(run("SET LOCAL work_mem = '5MB'"))
      yield* DbSession.autocommit(run("SET CONSTRAINTS ALL IMMEDIATE"))
      // A reset would come before it.
      yield* run("SELECT 1")
      expect(at.proxy.statements().filter((_) => _.includes("RESET ALL"))).toEqual([])
    })
  )

  for (const resetOnRelease of ["auto", "always", "never"] as const) {
    wired(
      database,
      `an open BEGIN is rolled back with "${resetOnRelease}"`,
      { maxConnections: 1, resetOnRelease },
      (at) =>
        Effect.gen(function* () {
          yield* DbConnection.withConnection(Effect.zipRight(run("BEGIN"), run("INSERT INTO t VALUES (49)")))
          yield* DbConnection.withConnection(Effect.zipRight(run("BEGIN"), Effect.ignore(run("SELECT 1/0"))))
          expect(yield* run("SELECT id FROM t WHERE id = 49")).toEqual([])
          expect(startups(at)).toBe(1)
        })
    )
  }

  wired(database, '"always" sweeps what a function has hidden', { maxConnections: 1, resetOnRelease: "always" }, () =>
    Effect.gen(function* () {
      yield* run("SELECT leaves()")
      expect(yield* run("SELECT current_setting('work_mem') AS w")).toEqual([{ w: "4MB" }])
    })
  )

  wired(database, "the limits of the engine survive a reset", { maxConnections: 1, statementTimeout: 7000 }, () =>
    Effect.gen(function* () {
      yield* run("SET statement_timeout = 1")
      expect(yield* run("SELECT current_setting('statement_timeout') AS t")).toEqual([{ t: "7s" }])
    })
  )

  wired(database, "named statements survive a reset", { maxConnections: 1 }, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT 'kept'")
      yield* run("SET work_mem = '5MB'")
      yield* idle(1)
      at.proxy.reset()
      yield* run("SELECT 'kept'")
      expect(sent(at)).toEqual(["B SELECT 'kept'", "E SELECT 'kept'", "S"])
    })
  )

  wired(database, "a connection that can't be reset is not used again", { maxConnections: 1 }, (at) =>
    Effect.gen(function* () {
      const cut = at.proxy.cutAfter((_) => /RESET ALL/.test(_.text), { forward: false })
      yield* run("SET work_mem = '5MB'")
      yield* Effect.promise(() => cut)
      expect(yield* run("SELECT current_setting('work_mem') AS w")).toEqual([{ w: "4MB" }])
      expect(startups(at)).toBe(2)
    })
  )

  wired(database, "a reset that hangs is over within settleTimeout", { maxConnections: 1, settleTimeout: 150 }, (at) =>
    Effect.gen(function* () {
      void at.proxy.holdAt((_) => /RESET ALL/.test(_.text), { forward: false })
      yield* run("SET work_mem = '5MB'")
      const elapsed = yield* took(run("SELECT 1"))
      expect(elapsed).toBeGreaterThan(100)
      expect(elapsed).toBeLessThan(soon)
    })
  )
})

describe("afterConnect", () => {
  const setUp = Effect.flatMap(DbConnection.current, (current) =>
    current._tag === "Some"
      ? Effect.asVoid(current.value.sql`SET work_mem = '6MB'`)
      : Effect.dieMessage("no connection")
  )
  it.scopedLive("runs once on each new connection, which is ambient for it, and survives a reset", () =>
    Effect.gen(function* () {
      let runs = 0
      const slot: { engine?: EngineService } = {}
      const afterConnect = Effect.suspend(() => {
        runs++
        return Effect.provideService(setUp, DbEngine, slot.engine!)
      })
      const { context, engine } = yield* wire(database, { afterConnect, maxConnections: 1 })
      slot.engine = engine
      const look = Effect.map(run("SELECT current_setting('work_mem') AS w"), (rows) => rows[0]!["w"])
      yield* Effect.gen(function* () {
        expect(yield* look).toBe("6MB")
        expect(yield* look).toBe("6MB")
        expect(runs).toBe(1)
        for (const text of ["SET work_mem = '9MB'", "RESET work_mem", "RESET ALL"]) {
          yield* run(text)
          expect(yield* look).toBe("6MB")
        }
        yield* DbEngine.evictAll
        expect(yield* look).toBe("6MB")
        expect(runs).toBe(5)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("that uses the pg client leaves a connection as any other: pipelined, kept, and set up again", () =>
    Effect.gen(function* () {
      let runs = 0
      const afterConnect = Effect.flatMap(DbConnection, ({ raw, sql }) =>
        Effect.gen(function* () {
          runs++
          yield* sql`SELECT ${1}::int AS n`
          const client = yield* raw
          yield* Effect.promise(() => client.query("SET work_mem = '6MB'"))
          yield* Effect.promise(() => client.query("PREPARE mine AS SELECT 1"))
          yield* Effect.promise(() => client.query({ name: "named", text: "SELECT 2" }))
          yield* sql`SELECT ${1}::int AS n`
        })
      )
      const { context, proxy } = yield* wire(database, { afterConnect, maxConnections: 1 })
      yield* Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const look = sql`SELECT current_setting('work_mem') AS w, pg_backend_pid() AS pid, ${1}::int AS n`
        const first = yield* look
        expect(first).toMatchObject([{ w: "6MB", n: 1 }])
        proxy.reset()
        proxy.delay(20)
        yield* DbSession.autocommit(
          Effect.all(
            numbers(3).map((i) => run(`SELECT ${i}`)),
            { concurrency: 3 }
          )
        )
        // The first statement with BEGIN and the others behind it, and COMMIT.
        expect(proxy.flights()).toBe(2)
        proxy.delay(0)
        expect(yield* look).toEqual(first)
        for (const text of ["SET work_mem = '9MB'", "PREPARE theirs AS SELECT 3", "DISCARD ALL"]) {
          yield* run(text)
          expect(yield* look).toEqual(first)
        }
        expect(proxy.accepted).toBe(1)
        expect(runs).toBe(4)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("that drops our named statements through the pg client: transactions have them again", () =>
    Effect.gen(function* () {
      const find = (sql: DbSql) => sql<{ readonly n: number }>`SELECT ${1}::int AS n`
      const afterConnect = Effect.flatMap(DbConnection, ({ raw, sql }) =>
        Effect.gen(function* () {
          yield* find(sql)
          const client = yield* raw
          yield* Effect.promise(() => client.query("DEALLOCATE ALL"))
        })
      )
      const { context } = yield* wire(database, { afterConnect, maxConnections: 1 })
      const found = withTransaction(Effect.flatMap(DbSession, ({ sql }) => find(sql)))
      expect(yield* Effect.provide(found, context)).toEqual([{ n: 1 }])
    })
  )

  it.scopedLive("that leaves something running on the pg client, or a transaction open, is refused", () =>
    Effect.gen(function* () {
      for (const text of ["SELECT pg_sleep(0.2)", "BEGIN"]) {
        const afterConnect = Effect.flatMap(DbConnection, ({ raw }) =>
          Effect.flatMap(raw, (client) =>
            text === "BEGIN"
              ? Effect.promise(() => client.query(text))
              : Effect.sync(() => void client.query(text).catch(() => {}))
          )
        )
        const { context } = yield* wire(database, { afterConnect })
        expect(yield* reasonOf(run("SELECT 1").pipe(Effect.provide(context)))).toMatchObject({
          _tag: "ConnectionError",
          message: "afterConnect left a transaction open or lost the connection."
        })
      }
    })
  )

  it.scopedLive("FAULTS 9: one that fails or dies is a typed error, and the next waiter is served", () =>
    Effect.gen(function* () {
      let runs = 0
      const afterConnect = Effect.suspend(() => {
        runs++
        return runs === 1 ? Effect.fail("no") : runs === 2 ? Effect.dieMessage("worse") : Effect.void
      })
      const { context, proxy } = yield* wire(database, { afterConnect, maxConnections: 1 })
      yield* Effect.gen(function* () {
        const exits = yield* Effect.all(
          numbers(3).map((i) => Effect.either(run(`SELECT ${i} AS i`))),
          { concurrency: 3 }
        )
        expect(exits.map((_) => (_._tag === "Left" ? DbError.reason(_.left)?._tag : _.right))).toEqual([
          "ConnectionError",
          "ConnectionError",
          [{ i: 2 }]
        ])
        yield* untilStats("the refused ones are closed", (_) => _.total === 1)
        expect(proxy.accepted).toBe(3)
      }).pipe(Effect.provide(context))
      yield* untilActivity(database.url, (_) => _.total === 1)
    })
  )

  it.scopedLive("FAULTS 9: one that hangs is a typed error within connectTimeout", () =>
    Effect.gen(function* () {
      let runs = 0
      const afterConnect = Effect.suspend(() => (++runs === 1 ? Effect.never : Effect.void))
      const { context } = yield* wire(database, { afterConnect, maxConnections: 1, connectTimeout: 500 })
      yield* Effect.gen(function* () {
        const [elapsed, reason] = yield* timed(reasonOf(run("SELECT 1")))
        expect(reason._tag).toBe("ConnectionError")
        expect(elapsed).toBeLessThan(soon)
        yield* run("SELECT 1")
      }).pipe(Effect.provide(context))
    })
  )
})

describe("password", () => {
  it.scopedLive("an effect yields it for each new connection", () =>
    Effect.gen(function* () {
      const asked = yield* Ref.make(0)
      const password = Effect.as(
        Ref.update(asked, (_) => _ + 1),
        database.password
      )
      const { context } = yield* wire(database, { password, maxConnections: 1 })
      yield* Effect.gen(function* () {
        yield* run("SELECT 1")
        yield* run("SELECT 1")
        expect(yield* Ref.get(asked)).toBe(1)
        yield* DbEngine.evictAll
        yield* run("SELECT 1")
        expect(yield* Ref.get(asked)).toBe(2)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("one that hangs is a ConnectionError within connectTimeout, interrupted, and the next is asked", () =>
    Effect.gen(function* () {
      const interrupted = yield* Deferred.make<void>()
      let asked = 0
      const password = Effect.suspend(() =>
        ++asked === 1
          ? Effect.onInterrupt(Effect.never, () => Deferred.succeed(interrupted, undefined))
          : Effect.succeed(database.password)
      )
      const { context } = yield* wire(database, { password, maxConnections: 1, connectTimeout: 300 })
      yield* Effect.gen(function* () {
        expect(yield* reasonOf(run("SELECT 1"))).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
        yield* Deferred.await(interrupted)
        expect(yield* stats).toMatchObject({ connecting: 0, used: 0, total: 0 })
        expect(yield* run("SELECT 1 AS one")).toEqual([{ one: 1 }])
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("one that fails is an AuthenticationError without a word of it", () =>
    Effect.gen(function* () {
      const { context } = yield* wire(database, { password: Effect.fail("vault token s3cret") })
      const error = yield* Effect.flip(run("SELECT 1")).pipe(Effect.provide(context))
      expect(DbError.reason(error)?._tag).toBe("AuthenticationError")
      expect(JSON.stringify(error) + String(error)).not.toContain("s3cret")
    })
  )
})

describe("the error of an effect in the options", () => {
  const causeOf = (options: DbOptions) =>
    Effect.gen(function* () {
      const { context } = yield* wire(database, options)
      const error = yield* errorOf(run("SELECT 1").pipe(Effect.provide(context)))
      expect(inspect(error) + JSON.stringify(error) + String(error)).not.toContain("s3cret")
      return error
    })
  class VaultError extends Error {
    override readonly name = "VaultError"
    readonly code = "EVAULT"
  }

  it.scopedLive("is the cause of afterConnect's: a DbError as it is", () =>
    Effect.gen(function* () {
      const afterConnect = Effect.flatMap(DbConnection, ({ sql }) => sql`SELECT 's3cret' FROM missing`)
      const { cause, reason } = yield* causeOf({ afterConnect })
      expect(reason).toMatchObject({ _tag: "ConnectionError", message: "afterConnect failed." })
      expect(DbError.reason(cause)).toMatchObject({ _tag: "SqlSyntaxError", sqlState: "42P01" })
    })
  )

  it.scopedLive("is the cause of afterConnect's and of the password's: any other without its words", () =>
    Effect.gen(function* () {
      const mine = new VaultError("s3cret")
      for (const options of [
        { afterConnect: Effect.fail(mine) },
        { afterConnect: Effect.die(mine) },
        { password: Effect.fail(mine) }
      ]) {
        const error = yield* causeOf(options)
        expect(error.cause).toMatchObject({ name: "VaultError", code: "EVAULT" })
        expect(error.serverError).toBe(mine)
      }
    })
  )
})

describe("changeHost", () => {
  const two = Effect.gen(function* () {
    const other = yield* proxy(database.url)
    const here = yield* wire(database, { maxConnections: 1 })
    return { ...here, other, there: { host: other.host, port: other.port } }
  })

  it.scopedLive("a live session finishes on the old host, the next one uses the new, and the old pool closes", () =>
    Effect.gen(function* () {
      const { context, other, proxy, there } = yield* two
      yield* Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* run("SELECT 1")
            yield* DbEngine.changeHost(there)
            yield* run("SELECT 2")
            yield* DbSession.isolated(run("SELECT 'new'"))
            yield* run("SELECT 3")
          })
        )
        expect(proxy.statements()).toEqual(["BEGIN", "SELECT 1", "SELECT 2", "SELECT 3", "COMMIT"])
        expect(other.statements()).toEqual(["BEGIN", "SELECT 'new'", "COMMIT"])
        yield* until("the old pool is closed", () => proxy.connections.length === 0)
        expect((yield* DbEngine).host).toEqual(there)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("who waits goes over to the new host", () =>
    Effect.gen(function* () {
      const { context, other, there } = yield* two
      yield* Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        yield* holdUntil(latch, "holder")
        const waiting = yield* Effect.forkScoped(run("SELECT 'moved'"))
        yield* pending(1)
        yield* DbEngine.changeHost(there)
        yield* Fiber.join(waiting)
        expect(other.statements()).toEqual(["SELECT 'moved'"])
        yield* Deferred.succeed(latch, undefined)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("who goes over to the new host waits no longer there than acquireTimeout leaves", () =>
    Effect.gen(function* () {
      const other = yield* proxy(database.url)
      other.accept("silent")
      const { context } = yield* wire(database, { maxConnections: 1, acquireTimeout: "10 minutes" })
      const clock = yield* Effect.acquireRelease(
        Effect.sync(() => vi.useFakeTimers({ toFake: ["Date"] })),
        () => Effect.sync(() => vi.useRealTimers())
      )
      yield* Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        yield* holdUntil(latch, "holder")
        const waiting = yield* Effect.forkScoped(reasonOf(run("SELECT 'moved'")))
        yield* pending(1)
        clock.setSystemTime(Date.now() + 599_800)
        yield* DbEngine.changeHost({ host: other.host, port: other.port })
        expect((yield* Fiber.join(waiting))._tag).toBe("AcquireTimeout")
        expect((yield* stats).pending).toBe(0)
        yield* Deferred.succeed(latch, undefined)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("who goes over to the new host has asked for its minConnections, too", () =>
    Effect.gen(function* () {
      const other = yield* proxy(database.url)
      const { context } = yield* wire(database, { maxConnections: 2, minConnections: 2 })
      yield* Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        yield* holdUntil(latch, "one")
        yield* holdUntil(latch, "another")
        const waiting = yield* Effect.forkScoped(run("SELECT 'moved'"))
        yield* pending(1)
        yield* DbEngine.changeHost({ host: other.host, port: other.port })
        yield* Fiber.join(waiting)
        yield* untilStats("the new host's minimum is there", (_) => _.idle === 2)
        expect(other.accepted).toBe(2)
        yield* Deferred.succeed(latch, undefined)
        yield* idle(2)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("stats count what is lent on the old host until it comes back", () =>
    Effect.gen(function* () {
      const { context, there } = yield* two
      yield* Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        const holder = yield* holdUntil(latch, "holder")
        yield* DbEngine.changeHost(there)
        expect(yield* stats).toMatchObject({ total: 1, used: 1, idle: 0, max: 1 })
        yield* run("SELECT 1")
        expect(yield* stats).toMatchObject({ total: 2, used: 1, idle: 1, max: 1 })
        // The new pool has one to lend.
        expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "pool" })
        yield* Deferred.succeed(latch, undefined)
        yield* Fiber.join(holder)
        yield* untilStats("the old pool is closed", (_) => _.total === 1 && _.used === 0)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("a suspended engine stays so, until resume", () =>
    Effect.gen(function* () {
      const { context, other, there } = yield* two
      yield* Effect.gen(function* () {
        yield* DbEngine.suspend
        yield* DbEngine.changeHost(there)
        expect((yield* DbEngine.health).suspended).toBe(true)
        const waiting = yield* Effect.forkScoped(run("SELECT 'resumed'"))
        yield* pending(1)
        expect(yield* stats).toMatchObject({ connecting: 0, total: 0 })
        yield* DbEngine.resume
        yield* Fiber.join(waiting)
        expect(other.statements()).toEqual(["SELECT 'resumed'"])
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("a closed engine refuses it, and stays closed", () =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      const { engine } = yield* Scope.extend(wire(database), scope)
      const other = yield* proxy(database.url)
      yield* engine.ping
      yield* Scope.close(scope, Exit.void)
      expect((yield* reasonOf(engine.changeHost({ host: other.host, port: other.port })))._tag).toBe("PoolClosed")
      expect((yield* reasonOf(engine.ping))._tag).toBe("PoolClosed")
      expect(other.accepted).toBe(0)
    })
  )

  it.scopedLive("the same target: nothing happens", () =>
    Effect.gen(function* () {
      const { context, proxy } = yield* two
      yield* Effect.gen(function* () {
        yield* run("SELECT 1")
        yield* DbEngine.changeHost({ host: proxy.host, port: proxy.port })
        yield* run("SELECT 1")
        expect(proxy.accepted).toBe(1)
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("the same target without its port: nothing happens", () =>
    Effect.gen(function* () {
      const { context, proxy } = yield* two
      yield* Effect.gen(function* () {
        yield* run("SELECT 1")
        yield* DbEngine.changeHost({ host: proxy.host })
        yield* run("SELECT 1")
        yield* DbEngine.changeHost([{ host: proxy.host }])
        yield* run("SELECT 1")
        expect(proxy.accepted).toBe(1)
        expect((yield* DbEngine).host).toEqual({ host: proxy.host, port: proxy.port })
      }).pipe(Effect.provide(context))
    })
  )

  it.scopedLive("of a host without a port the port stays as it is", () =>
    Effect.gen(function* () {
      const engine = yield* DbEngine.make({ host: "db-1", port: 6001 })
      yield* engine.changeHost({ host: "db-2" })
      expect(engine.host).toEqual({ host: "db-2", port: 6001 })
      yield* engine.changeHost({ host: "db-2", port: 6002 })
      yield* engine.changeHost([{ host: "db-3" }, { host: "db-4", port: 6004 }])
      expect(engine.host).toEqual({ host: "db-3", port: 6002 })
      // Of a host that is a target already, its own.
      yield* engine.changeHost({ host: "db-4" })
      expect(engine.host).toEqual({ host: "db-4", port: 6004 })
    })
  )

  it.scopedLive("a host that can't be one is InvalidInput, and the engine keeps its own", () =>
    Effect.gen(function* () {
      const engine = yield* DbEngine.make({ host: "db-1", port: 6001 })
      for (const target of [
        [],
        { host: "" },
        { host: "db-2\0" },
        { host: "db-2", port: 0 },
        { host: "db-2", port: 1.5 },
        { host: "db-2", port: 65_536 },
        [{ host: "db-2" }, { host: "db\n3" }]
      ]) {
        expect((yield* reasonOf(engine.changeHost(target)))._tag).toBe("InvalidInput")
      }
      expect(engine.host).toEqual({ host: "db-1", port: 6001 })
    })
  )
})

describe("FAULTS 12: closing an engine", () => {
  const closable = (options: Parameters<typeof wire>[1]) =>
    Effect.gen(function* () {
      const scope = yield* Effect.acquireRelease(Scope.make(), (scope) => Scope.close(scope, Exit.void))
      const at = yield* Scope.extend(wire(database, options), scope)
      return { ...at, close: Scope.close(scope, Exit.void) }
    })

  it.scopedLive("waiters get PoolClosed at once, work in hand finishes, new work is refused", () =>
    Effect.gen(function* () {
      const at = yield* closable({ maxConnections: 1 })
      yield* Effect.gen(function* () {
        const work = yield* forkUntil(at, executes(/pg_sleep/), run("SELECT pg_sleep(0.2), 'done' AS d"))
        const waiting = yield* Effect.forkScoped(reasonOf(run("SELECT 1")))
        yield* pending(1)
        const closing = yield* Effect.forkScoped(took(at.close))
        expect((yield* Fiber.join(waiting))._tag).toBe("PoolClosed")
        expect((yield* reasonOf(run("SELECT 1")))._tag).toBe("PoolClosed")
        expect((yield* Fiber.join(work))[0]).toMatchObject({ d: "done" })
        expect(yield* Fiber.join(closing)).toBeLessThan(soon)
        expect((yield* stats).total).toBe(0)
      }).pipe(Effect.provide(at.context))
      yield* untilActivity(database.url, (_) => _.total === 0)
    })
  )

  it.scopedLive("a session in hand may still commit", () =>
    Effect.gen(function* () {
      const at = yield* closable({ maxConnections: 1 })
      yield* Effect.gen(function* () {
        const go = yield* Deferred.make<void>()
        const body = Effect.all([
          run("INSERT INTO t VALUES (12)"),
          Deferred.await(go),
          run("INSERT INTO t VALUES (12)")
        ])
        const work = yield* forkUntil(at, answered(/^INSERT/), DbSession.autocommit(body))
        const closing = yield* Effect.forkScoped(at.close)
        yield* until("closing", Effect.isFailure(DbEngine.ping))
        yield* Deferred.succeed(go, undefined)
        yield* Fiber.join(work)
        yield* Fiber.join(closing)
      }).pipe(Effect.provide(at.context))
      expect((yield* database.query("DELETE FROM t WHERE id = 12 RETURNING id")).length).toBe(2)
    })
  )

  it.scopedLive("what has not finished after drainTimeout is cancelled and cut, and a leaked connection too", () =>
    Effect.gen(function* () {
      const at = yield* closable({ maxConnections: 2, drainTimeout: 150 })
      yield* Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        yield* holdUntil(latch, "leaked")
        const work = yield* forkUntil(at, executes(/pg_sleep/), reasonOf(run("SELECT pg_sleep(60)")))
        yield* untilActivity(database.url, (_) => _.active === 1)
        const elapsed = yield* took(at.close)
        expect(elapsed).toBeGreaterThan(140)
        expect(elapsed).toBeLessThan(soon)
        expect(yield* Fiber.join(work)).toMatchObject({ _tag: "ConnectionError", isRetryable: false })
        yield* Deferred.succeed(latch, undefined)
      }).pipe(Effect.provide(at.context))
      yield* untilActivity(database.url, (_) => _.total === 0)
    })
  )

  it.scopedLive("drainTimeout: Infinity waits for work in hand, however long it takes", () =>
    Effect.gen(function* () {
      const at = yield* closable({ maxConnections: 1, drainTimeout: Infinity })
      yield* Effect.gen(function* () {
        const latch = yield* Deferred.make<void>()
        const work = yield* Effect.forkScoped(
          DbSession.autocommit(
            Effect.zipRight(run("SELECT 1"), Effect.zipRight(Deferred.await(latch), run("SELECT 2")))
          )
        )
        yield* until(
          "it works",
          Effect.map(database.activity, (_) => _.idleInTransaction === 1)
        )
        const closing = yield* Effect.forkScoped(at.close)
        yield* until("closing", Effect.isFailure(DbEngine.ping))
        // Longer than a timer takes that fires at once.
        yield* pause(20)
        yield* Deferred.succeed(latch, undefined)
        yield* Fiber.join(work)
        yield* Fiber.join(closing)
      }).pipe(Effect.provide(at.context))
      yield* untilActivity(database.url, (_) => _.total === 0)
    })
  )

  it.scopedLive("a dial in progress is given up", () =>
    Effect.gen(function* () {
      const at = yield* closable({ connectTimeout: "1 minute" })
      at.proxy.accept("silent")
      yield* Effect.gen(function* () {
        const waiting = yield* Effect.forkScoped(reasonOf(run("SELECT 1")))
        yield* untilStats("dialling", (_) => _.connecting === 1)
        expect(yield* took(at.close)).toBeLessThan(soon)
        expect((yield* Fiber.join(waiting))._tag).toBe("PoolClosed")
      }).pipe(Effect.provide(at.context))
    })
  )
})

describe("building an engine", () => {
  it.scopedLive("twice for the same target within a short time logs a warning that says what to do", () =>
    Effect.gen(function* () {
      const [lines, logger] = collected()
      const through = yield* proxy(database.url)
      yield* DbEngine.make({ url: through.url, username: "built_twice" }).pipe(
        Effect.repeatN(1),
        Effect.provide(logger)
      )
      expect(lines).toMatchObject([
        { level: "WARN", message: expect.stringMatching(/built twice.*Build its layer once/) }
      ])
    })
  )

  describe("is told of each time that it happens", () => {
    const capture = Effect.sync(() => {
      const lines: Array<string> = []
      const logger = Logger.make<unknown, void>(({ message }) => void lines.push(String(message)))
      return { lines, layer: Logger.replace(Logger.defaultLogger, logger) }
    })
    const url = (name: string) => database.url.replace(/\/[^/]*$/, `/${name}`)

    it.live("to another logger as well, in the same process", () =>
      Effect.gen(function* () {
        for (const _ of [1, 2]) {
          const { layer, lines } = yield* capture
          const program = Effect.flatMap(DbEngine, () => Effect.void)
          const handled = Effect.provide(program, DbLayer({ url: url("twice_again") }))
          yield* Effect.provide(Effect.zipRight(handled, handled), layer)
          expect(lines).toHaveLength(1)
        }
      })
    )

    it.live("but not for ever to loggers that are made as often", () =>
      Effect.gen(function* () {
        const build = Effect.scoped(DbEngine.make({ url: url("twice_often") }))
        const all = yield* Effect.forEach(numbers(50), () =>
          Effect.flatMap(capture, ({ layer, lines }) => Effect.as(Effect.provide(build, layer), lines))
        )
        expect(all.flat()).toHaveLength(20)
      })
    )

    it.live("by a logger that hears warnings, though one was built where none are heard", () =>
      Effect.gen(function* () {
        const { layer, lines } = yield* capture
        const build = Effect.scoped(DbEngine.make({ url: url("twice_quietly") }))
        const quiet = Logger.withMinimumLogLevel(LogLevel.Error)
        yield* Effect.provide(Effect.all([quiet(build), quiet(build), build, build]), layer)
        expect(lines).toHaveLength(1)
      })
    )

    it.live("but once for builds that go on following each other, and again after a pause", () =>
      Effect.gen(function* () {
        const { layer, lines } = yield* capture
        const build = Effect.scoped(DbEngine.make({ url: url("twice_later") }))
        const clock = yield* Effect.acquireRelease(
          Effect.sync(() => vi.useFakeTimers({ toFake: ["Date"] })),
          () => Effect.sync(() => vi.useRealTimers())
        )
        const pass = (millis: number) => Effect.sync(() => clock.setSystemTime(Date.now() + millis))
        const each = Effect.zipRight(build, pass(3000))
        yield* Effect.provide(Effect.repeatN(each, 9), layer)
        expect(lines).toHaveLength(1)
        yield* pass(3000)
        yield* Effect.provide(build, layer)
        expect(lines).toHaveLength(1)
        yield* Effect.provide(build, layer)
        expect(lines).toHaveLength(2)
      }).pipe(Effect.scoped)
    )
  })

  describe("inside of a session of the same database", () => {
    const inside = 'another engine "default" for the same database is built inside of a session of the first one'
    const clocked = Effect.acquireRelease(
      Effect.sync(() => vi.useFakeTimers({ toFake: ["Date"] })),
      () => Effect.sync(() => vi.useRealTimers())
    )
    const warned = (
      around: (inner: Effect.Effect<unknown, SqlError>) => Effect.Effect<unknown, SqlError, DbEngine>,
      layer: Layer.Layer<DbEngine, SqlError> = DbLayer({ url: database.url })
    ) =>
      Effect.gen(function* () {
        const clock = yield* clocked
        const [lines, logger] = collected()
        const pause = Effect.sync(() => clock.setSystemTime(Date.now() + 6000))
        const inner = Effect.zipRight(pause, Effect.provide(DbEngine.ping, layer))
        const outer = DbLayer({ url: database.url })
        yield* pause
        yield* Effect.zipRight(around(inner), around(inner)).pipe(Effect.provide(outer), Effect.provide(logger))
        return lines.map((_) => _.message).filter((_) => !_.includes("built twice"))
      })

    for (const [name, around] of [
      ["withTransaction", withTransaction],
      ["autocommit", DbSession.autocommit],
      ["a session of a scope", (inner) => Effect.scoped(Effect.zipRight(DbSession.scoped(), inner))],
      ["withConnection", DbConnection.withConnection]
    ] as ReadonlyArray<readonly [string, Parameters<typeof warned>[0]]>) {
      it.scopedLive(`however late, logs a warning once, in ${name}`, () =>
        Effect.map(warned(around), (lines) => expect(lines).toEqual([expect.stringContaining(inside)]))
      )
    }

    it.scopedLive("but not outside of it, after it, for another name or for another database", () =>
      Effect.gen(function* () {
        const ended = (inner: Effect.Effect<unknown, SqlError>) =>
          Effect.zipRight(DbSession.autocommit(inserted), inner)
        const inserted = Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT 1`)
        expect(yield* warned((inner) => inner)).toEqual([])
        expect(yield* warned(ended)).toEqual([])
        expect(yield* warned((inner) => withTransaction(DbSession.detach(inner)))).toEqual([])
        const other = DbLayer({ url: database.url.replace(/\/[^/]*$/, "/postgres") })
        expect(yield* warned(withTransaction, other)).toEqual([])
        const Second = Database.make("second")
        const [lines, logger] = collected()
        const ping = Effect.provide(Second.DbEngine.ping, Second.DbLayer({ url: database.url }))
        yield* withTransaction(ping).pipe(
          Effect.provide(quietly(DbLayer({ url: database.url }))),
          Effect.provide(logger)
        )
        expect(lines).toEqual([])
      })
    )

    it.scopedLive("but not in a sandbox, in which nothing is kept", () =>
      Effect.map(
        warned((inner) => DbTest.sandbox(withTransaction(inner))),
        (lines) => expect(lines).toEqual([])
      )
    )
  })

  it.scopedLive('"eager" fails typed when there is nobody, and "lazy" opens nothing', () =>
    Effect.gen(function* () {
      const through = yield* proxy(database.url)
      through.accept("refuse")
      yield* DbEngine.make({ url: through.url })
      expect(through.accepted).toBe(0)
      const eager = DbEngine.make({ url: through.url, connect: "eager", applicationName: "other" })
      expect((yield* reasonOf(eager))._tag).toBe("ConnectionError")
    }).pipe(Effect.provide(Logger.remove(Logger.defaultLogger)))
  )

  it.scopedLive('"eager" with startupRetry waits for a server that comes up', () =>
    Effect.gen(function* () {
      const through = yield* proxy(database.url)
      through.accept("refuse")
      const building = yield* Effect.forkScoped(
        DbEngine.make({ url: through.url, connect: "eager", startupRetry: Schedule.spaced("10 millis") })
      )
      yield* until("it was refused", () => through.accepted > 2)
      through.accept("relay")
      const engine = yield* Fiber.join(building)
      expect((yield* engine.stats).idle).toBe(1)
    })
  )

  wired(
    database,
    "a server that goes down and comes up again: typed errors, then answers",
    { acquireTimeout: 500 },
    (at) =>
      Effect.gen(function* () {
        yield* run("SELECT 1")
        at.proxy.accept("refuse")
        at.proxy.cutAll()
        yield* untilStats("it was noticed", (_) => _.total === 0)
        const reasons = yield* Effect.all(
          numbers(20).map(() => reasonOf(run("SELECT 1"))),
          { concurrency: "unbounded" }
        )
        expect(new Set(reasons.map((_) => `${_._tag} ${_.isRetryable}`))).toEqual(new Set(["ConnectionError true"]))
        at.proxy.accept("relay")
        yield* Effect.all(
          numbers(20).map(() => run("SELECT 1")),
          { concurrency: "unbounded" }
        )
      })
  )

  wired(database, "FAULTS 7: refused for too many connections, a waiter stays in the queue and is served", {}, () =>
    Effect.gen(function* () {
      const role = `limited_${process.pid}`
      yield* database.query(`CREATE ROLE ${role} LOGIN PASSWORD 'p' CONNECTION LIMIT 1`)
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { context } = yield* wire(database, { username: role, password: Redacted.make("p"), maxConnections: 3 })
          yield* Effect.gen(function* () {
            const latch = yield* Deferred.make<void>()
            yield* holdUntil(latch, "the one")
            const waiting = yield* Effect.forkScoped(run("SELECT 'served' AS s"))
            const error = yield* Effect.forkScoped(
              reasonOf(DbConnection.withConnection(Effect.void, { reuse: false, timeout: 200 }))
            )
            expect((yield* Fiber.join(error)).message).toContain("can't be reached")
            yield* Deferred.succeed(latch, undefined)
            expect(yield* Fiber.join(waiting)).toEqual([{ s: "served" }])
          }).pipe(Effect.scoped, Effect.provide(context))
        })
      )
      yield* database.query(`DROP ROLE ${role}`)
    })
  )

  wired(database, "a connection that is held for longer than leakTimeout is reported, with its name", {}, () =>
    Effect.gen(function* () {
      const [lines, logger] = collected()
      const reports = () => lines.filter(({ message }) => message.includes('"forgotten"'))
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { context } = yield* wire(database, { leakTimeout: 30 })
          yield* DbConnection.withConnection(
            until("reported", () => reports().length > 0),
            { name: "forgotten" }
          ).pipe(Effect.provide(context))
        })
      ).pipe(Effect.provide(logger))
      expect(reports()).toHaveLength(1)
    })
  )
})
