import { it } from "@effect/vitest"
import { DbConnection, DbEngine, DbLayer, DbRuntime, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Net from "node:net"
import { describe, expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { proxy, type Logged } from "./support/proxy.js"
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
  wired
} from "./support/wired.js"
import { pending, soon, stillRuns, took, until, untilStats } from "./support/until.js"
import { committed, quietly } from "./support/programs.js"

const database = testDatabase()

freshTable(database)

const sleep = "SELECT pg_sleep(60)"
const isCancel = (_: Logged): boolean => _.type === "cancel"
const ids = committed(database)

/** The query is on the server and runs. */
const running = (n = 1) => untilActivity(database.url, (_) => _.active === n)
const noneActive = untilActivity(database.url, (_) => _.active === 0)

describe("interrupting a statement that was not sent", () => {
  wired(database, "one that waits for the pool never happens", one, (at) =>
    Effect.gen(function* () {
      const holder = yield* forkUntil(at, executes(/pg_sleep/), run(sleep))
      const waiting = yield* Effect.forkScoped(run("INSERT INTO t VALUES (1)"))
      yield* pending(1)
      yield* Fiber.interrupt(waiting)
      expect(yield* stillRuns(holder)).toBe(true)
      yield* Fiber.interrupt(holder)
      yield* run("SELECT 1")
      expect(at.proxy.statements()).toEqual([sleep, "SELECT 1"])
    })
  )

  wired(database, "one that waits for the answer before it never happens", { ...one, pipelining: false }, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const first = yield* forkUntil(at, executes(/pg_sleep/), run(sleep))
        const { sql } = yield* DbEngine
        const second = yield* Effect.forkScoped(run("INSERT INTO t VALUES (1)"))
        const batch = yield* Effect.forkScoped(
          DbSession.batch([sql`INSERT INTO t VALUES (2)`, sql`INSERT INTO t VALUES (3)`])
        )
        yield* Effect.yieldNow()
        yield* Fiber.interruptAll([second, batch])
        expect(yield* stillRuns(first)).toBe(true)
        yield* Fiber.interrupt(first)
        yield* run("INSERT INTO t VALUES (4)")
        expect(yield* ids).toEqual([4])
      })
    )
  )

  wired(database, "a session whose only statement was never sent commits nothing and opens nothing", one, (at) =>
    Effect.gen(function* () {
      const holder = yield* forkUntil(at, executes(/pg_sleep/), run(sleep))
      const waiting = yield* Effect.forkScoped(DbSession.autocommit(run("INSERT INTO t VALUES (1)")))
      yield* pending(1)
      yield* Fiber.interrupt(waiting)
      yield* Fiber.interrupt(holder)
      expect(at.proxy.statements()).toEqual([sleep])
    })
  )
})

describe("interrupting a statement that runs", () => {
  wired(database, "FAULTS 26: it is cancelled at once, with a pool of one, and the connection goes on", one, (at) =>
    Effect.gen(function* () {
      const fiber = yield* forkUntil(at, executes(/pg_sleep/), run(sleep))
      yield* running()
      expect(yield* took(Fiber.interrupt(fiber))).toBeLessThan(soon)
      yield* noneActive
      expect(at.proxy.cancels.length).toBe(1)
      expect(at.proxy.log.filter((_) => _.dir === "backend" && _.type === "E").map((_) => _.name)).toEqual(["57014"])
      expect(yield* run("SELECT 2 AS two")).toEqual([{ two: 2 }])
      expect(startups(at)).toBe(1)
    })
  )

  wired(database, "a timeout over it ends on time", one, () =>
    Effect.gen(function* () {
      const elapsed = yield* took(Effect.timeoutOption(run(sleep), "100 millis"))
      expect(elapsed).toBeGreaterThan(95)
      expect(elapsed).toBeLessThan(soon)
      yield* noneActive
    })
  )

  wired(database, "in a session: everything is rolled back, and the connection goes on", one, (at) =>
    Effect.gen(function* () {
      const work = DbSession.autocommit(Effect.zipRight(run("INSERT INTO t VALUES (1)"), run(sleep)))
      const fiber = yield* forkUntil(at, executes(/pg_sleep/), work)
      yield* running()
      const exit = yield* Fiber.interrupt(fiber)
      expect(Exit.isInterrupted(exit)).toBe(true)
      expect(yield* ids).toEqual([])
      expect(at.proxy.statements().at(-1)).toBe("ROLLBACK")
      yield* run("SELECT 1")
      expect(startups(at)).toBe(1)
    })
  )

  wired(database, "a nested block's statement: the block fails, the session goes on", one, (at) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* run("INSERT INTO t VALUES (1)")
        const inner = withTransaction(Effect.zipRight(run("INSERT INTO t VALUES (2)"), run(sleep)))
        const fiber = yield* forkUntil(at, executes(/pg_sleep/), inner)
        yield* running()
        yield* Fiber.interrupt(fiber)
        yield* run("INSERT INTO t VALUES (3)")
      })
    ).pipe(Effect.zipRight(Effect.tap(ids, (found) => Effect.sync(() => expect(found).toEqual([1, 3])))))
  )

  wired(database, "a BEGIN and statement that wait for a lock are cancelled together", one, (at) =>
    Effect.gen(function* () {
      const lock = yield* lockedOutside(database, 1)
      const fiber = yield* forkUntil(at, executes(/advisory/), withTransaction(run("SELECT pg_advisory_xact_lock(1)")))
      yield* running()
      expect(yield* took(Fiber.interrupt(fiber))).toBeLessThan(soon)
      yield* lock.release
    })
  )

  wired(database, "a batch is cancelled as one, and nothing of it is done", one, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const batch = DbSession.batch([sql`INSERT INTO t VALUES (1)`, sql.unsafe(sleep), sql`INSERT INTO t VALUES (2)`])
      const fiber = yield* forkUntil(at, executes(/VALUES \(2\)/), batch)
      yield* running()
      expect(yield* took(Fiber.interrupt(fiber))).toBeLessThan(soon)
      expect(yield* ids).toEqual([])
      yield* run("SELECT 1")
      expect(startups(at)).toBe(1)
    })
  )

  wired(database, "a cancel that is refused is asked for again", one, (at) =>
    Effect.gen(function* () {
      const fiber = yield* forkUntil(at, executes(/pg_sleep/), run(sleep))
      yield* running()
      at.proxy.accept("refuse")
      const before = at.proxy.accepted
      const interrupting = yield* Effect.forkScoped(Fiber.interrupt(fiber))
      yield* until("refused once", () => at.proxy.accepted > before)
      at.proxy.accept("relay")
      yield* Fiber.join(interrupting)
      expect(yield* run("SELECT 1 AS one")).toEqual([{ one: 1 }])
      expect(startups(at)).toBe(1)
    })
  )
})

describe("interrupting a statement behind others", () => {
  wired(database, "the interrupt returns at once, and the one in front is not harmed", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 2)
        const front = yield* forkUntil(
          at,
          executes(/advisory/),
          run("SELECT pg_advisory_xact_lock(2), 'mine' AS whose")
        )
        const behind = yield* forkUntil(at, executes(/pg_sleep/), run(sleep))
        yield* Fiber.interrupt(behind)
        expect(yield* stillRuns(front)).toBe(true)
        expect(at.proxy.cancels).toEqual([])
        const canceled = seen(at, isCancel)
        yield* lock.release
        expect((yield* Fiber.join(front))[0]).toMatchObject({ whose: "mine" })
        // Its turn has come.
        yield* canceled
        expect(yield* took(run("SELECT 1"))).toBeLessThan(soon)
      })
    )
  )

  wired(database, "two are interrupted while the first cancel is on its way: both end", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const first = yield* forkUntil(at, executes(/'first'/), run("SELECT pg_sleep(60), 'first'"))
        const second = yield* forkUntil(at, executes(/'second'/), run("SELECT pg_sleep(60), 'second'"))
        yield* running()
        // The cancel reaches the server; that it was taken is not seen yet.
        const held = at.proxy.holdAt(isCancel, { forward: true })
        const a = yield* Effect.forkScoped(Fiber.interrupt(first))
        yield* Effect.promise(() => held)
        yield* seen(at, (_) => _.dir === "backend" && _.type === "E")
        yield* Fiber.join(a)
        const b = yield* Effect.forkScoped(Fiber.interrupt(second))
        yield* Effect.yieldNow()
        at.proxy.resume()
        expect(yield* took(Fiber.join(b))).toBeLessThan(soon)
        yield* noneActive
      })
    )
  )

  const stray = (text: string) => (at: Parameters<Parameters<typeof wired>[3]>[0]) =>
    Effect.gen(function* () {
      const lock = yield* lockedOutside(database, 3)
      const first = yield* forkUntil(at, executes(/advisory/), run("SELECT pg_advisory_xact_lock(3)"))
      const innocent = yield* forkUntil(at, executes(/pg_sleep/), run(text))
      const held = at.proxy.holdAt(isCancel, { forward: false })
      const done = seen(at, answered(/^SELECT/))
      yield* Effect.forkScoped(Fiber.interrupt(first))
      yield* Effect.promise(() => held)
      // The first one is over before the cancel arrives, and the other one runs.
      yield* lock.release
      yield* done
      yield* running()
      at.proxy.resume()
      return innocent
    })

  wired(database, "FAULTS 27: a cancel that arrives late does no harm to the next fiber's statement", one, (at) =>
    Effect.gen(function* () {
      yield* DbConnection.withConnection(
        Effect.gen(function* () {
          const innocent = yield* stray("SELECT pg_sleep(0.3), 'mine' AS whose")(at)
          expect((yield* Fiber.join(innocent))[0]).toMatchObject({ whose: "mine" })
          expect(at.proxy.log.filter(executes(/mine/)).length).toBe(2)
        })
      )
      // It was not confirmed by the one that it was meant for.
      yield* run("SELECT 1")
      expect(startups(at)).toBe(2)
    })
  )

  wired(database, "FAULTS 27: one that may have done something is not sent again, but fails typed", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const innocent = yield* stray("DO $$ BEGIN PERFORM pg_sleep(5); END $$")(at)
        expect((yield* reasonOf(Fiber.join(innocent)))._tag).toBe("QueryCanceled")
        expect(at.proxy.log.filter(executes(/^DO/)).length).toBe(1)
      })
    )
  )
})

describe("late cancels", () => {
  wired(database, "FAULTS 27: never hit the next borrower, in 150 rounds", one, (at) =>
    Effect.gen(function* () {
      for (let round = 0; round < 150; round++) {
        const fiber = yield* Effect.fork(run(`/* ${round} */ SELECT pg_sleep(0.002)`))
        for (let i = 0; i < round % 10; i++) yield* Effect.promise(() => new Promise((r) => setImmediate(r)))
        if (round % 3 === 0) yield* Effect.sleep(round % 7)
        yield* Fiber.interruptFork(fiber)
        expect(yield* run("SELECT pg_sleep(0.002), 'mine' AS whose")).toMatchObject([{ whose: "mine" }])
      }
      expect(at.proxy.cancels.length).toBeGreaterThan(0)
    })
  )
})

describe("a cancel that is not confirmed", () => {
  const limits = { maxConnections: 1, settleTimeout: 300, connectTimeout: 2000 }
  const short = "SELECT pg_sleep(2)"

  for (const mode of ["silent", "refuse"] as const) {
    wired(database, `FAULTS 26: (${mode}) the connection is destroyed within settleTimeout`, limits, (at) =>
      Effect.gen(function* () {
        const fiber = yield* forkUntil(at, executes(/pg_sleep/), run(short))
        yield* running()
        at.proxy.accept(mode)
        const elapsed = yield* took(Fiber.interrupt(fiber))
        expect(elapsed).toBeGreaterThan(200)
        expect(elapsed).toBeLessThan(soon)
        yield* untilStats("its socket is closed", (_) => _.total === 0)
        at.proxy.accept("relay")
        expect(yield* run("SELECT 1 AS one")).toEqual([{ one: 1 }])
      })
    )
  }

  wired(database, "in a transaction: it is over within settleTimeout, and nothing is kept", limits, (at) =>
    Effect.gen(function* () {
      const work = withTransaction(Effect.zipRight(run("INSERT INTO t VALUES (1)"), run(short)))
      const fiber = yield* forkUntil(at, executes(/pg_sleep/), work)
      yield* running()
      at.proxy.accept("silent")
      yield* Fiber.interrupt(fiber)
      at.proxy.accept("relay")
      yield* run("SELECT 1")
      expect([yield* ids, startups(at)]).toEqual([[], 2])
    })
  )
})

describe("the option stream", () => {
  it.scopedLive("is how a CancelRequest and health reach the server too", () =>
    Effect.gen(function* () {
      const through = yield* proxy(database.url)
      // Nothing but the tunnel leads there.
      const url = database.url.replace(/@[^/]*/, "@db.invalid:1")
      const stream = () => {
        const socket = new Net.Socket()
        const connect = socket.connect.bind(socket)
        return Object.assign(socket, { connect: () => connect(through.port, through.host) })
      }
      yield* Effect.gen(function* () {
        const pid = Effect.map(run("SELECT pg_backend_pid() AS pid"), ([row]) => row!["pid"])
        const before = yield* pid
        const sleeping = yield* Effect.fork(run(sleep))
        yield* running()
        expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "server" })
        expect(yield* took(Fiber.interrupt(sleeping))).toBeLessThan(soon)
        expect(through.cancels.map((_) => _.name)).toEqual([String(before)])
        expect(yield* pid).toBe(before)
      }).pipe(Effect.provide(DbLayer({ url, stream, ...one })))
    })
  )

  it.scopedLive("that throws is a ConnectionError, and costs no slot", () =>
    Effect.gen(function* () {
      const sockets = [new Net.Socket()]
      const stream = () => {
        const socket = sockets.pop()
        if (socket === undefined) throw new TypeError("no tunnel")
        return socket
      }
      yield* Effect.gen(function* () {
        const before = yield* Effect.fork(run("SELECT pg_sleep(1)"))
        yield* running()
        expect(yield* DbEngine.health).toMatchObject({ status: "down", asked: "server" })
        expect(yield* took(Fiber.interrupt(before))).toBeLessThan(soon)
        for (const _ of [1, 2]) expect(yield* reasonOf(run("SELECT 1"))).toMatchObject({ _tag: "ConnectionError" })
        sockets.push(new Net.Socket())
        yield* run("SELECT 1")
      }).pipe(Effect.provide(quietly(DbLayer({ url: database.url, stream, settleTimeout: 200, ...one }))))
      yield* noneActive
    })
  )

  it.scopedLive("can't be handed to the thread of runSync, which is refused and not gone around", () =>
    Effect.gen(function* () {
      const runtime = yield* Effect.acquireRelease(
        Effect.sync(() => DbRuntime.make(quietly(DbLayer({ url: database.url, stream: () => new Net.Socket() })))),
        (runtime) => Effect.promise(runtime.close)
      )
      const reason = yield* reasonOf(
        Effect.try({ try: () => runtime.runSync(run("SELECT 1")), catch: (error) => error })
      )
      expect(reason).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
      expect(reason.hint).toContain("stream")
    })
  )
})
