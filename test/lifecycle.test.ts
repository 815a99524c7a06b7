import { it } from "@effect/vitest"
import { DbConnection, DbEngine, DbLayer, DbQuery, DbRuntime, DbSession, withTransaction } from "effect-db"
import type { Connection } from "../src/DbConnection.js"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as Net from "node:net"
import { beforeEach, describe, expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { Framer, FrontendReader, readBackend } from "./support/framing.js"
import { quietly } from "./support/programs.js"
import type { Logged } from "./support/proxy.js"
import type { Wired } from "./support/wired.js"
import { errorOf, executes, forkUntil, reasonOf, wire, wired } from "./support/wired.js"
import { soon, took, until } from "./support/until.js"

// Between two borrowers, and where a connection begins and ends.
const database = testDatabase()

beforeEach(async () => {
  await Effect.runPromise(database.query("DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY)"))
})

const one = { maxConnections: 1 }
const run = (text: string) => Effect.flatMap(DbEngine, ({ sql }) => sql.unsafe<Record<string, unknown>>(text))
const pause = (millis: number) => Effect.promise(() => new Promise((resolve) => setTimeout(resolve, millis)))
const pid = Effect.map(run("SELECT pg_backend_pid() AS pid"), ([row]) => row!["pid"] as number)
const ids = Effect.map(database.query<{ id: number }>("SELECT id FROM t ORDER BY id"), (rows) => rows.map((_) => _.id))
const startups = (at: Wired): number => at.proxy.log.filter((_) => _.type === "startup").length
const used = (n: number) =>
  until(
    `${n} are used`,
    Effect.map(DbEngine.stats, (_) => _.used === n)
  )
const pending = (n: number) =>
  until(
    `${n} wait`,
    Effect.map(DbEngine.stats, (_) => _.pending === n)
  )

/** A server of this test's, closed with the scope. */
const served = (onClient: (socket: Net.Socket) => void): Effect.Effect<number, never, Scope.Scope> =>
  Effect.map(
    Effect.acquireRelease(
      Effect.async<{ server: Net.Server; sockets: Set<Net.Socket> }>((resume) => {
        const sockets = new Set<Net.Socket>()
        const server = Net.createServer((socket) => {
          sockets.add(socket)
          socket.on("error", () => {})
          onClient(socket)
        }).listen(0, "127.0.0.1", () => resume(Effect.succeed({ server, sockets })))
      }),
      ({ server, sockets }) =>
        Effect.async<void>((resume) => {
          for (const socket of sockets) socket.destroy()
          server.close(() => resume(Effect.void))
        })
    ),
    ({ server }) => (server.address() as Net.AddressInfo).port
  )

const urlAt = (port: number): string => {
  const url = new URL(database.url)
  url.hostname = "127.0.0.1"
  url.port = String(port)
  return url.href
}

describe("COPY", () => {
  const wide =
    "COPY (SELECT repeat('x', CASE n WHEN 1 THEN 9000 ELSE 2000000 END) FROM generate_series(1, 2) n) TO STDOUT"
  const copyFrom = <E, R>(source: Stream.Stream<string, E, R>) =>
    Effect.flatMap(DbEngine, ({ sql }) => DbQuery.copyFrom(sql`COPY t FROM STDIN`, source))
  const isCopyIn = (_: Logged): boolean => _.dir === "backend" && _.type === "G"

  wired(database, "whose end has come before its consumer gives back a connection that is read", one, () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      let size = 0
      const copy = DbQuery.copyTo(sql.unsafe(wide)).pipe(
        Stream.runForEach((chunk) =>
          Effect.gen(function* () {
            size += chunk.length
            yield* used(0)
            expect(yield* Effect.timeout(run("SELECT 1 AS one"), "1 second")).toEqual([{ one: 1 }])
          })
        )
      )
      yield* copy
      expect(size).toBe(2_009_002)
    })
  )

  it.scopedLive("larger than what is kept for its consumer is read in runSync as well", () =>
    Effect.gen(function* () {
      const runtime = yield* Effect.acquireRelease(
        Effect.sync(() => DbRuntime.make(quietly(DbLayer({ url: database.url })))),
        (runtime) => Effect.promise(runtime.close)
      )
      const size = Effect.flatMap(DbEngine, ({ sql }) =>
        Stream.runFold(DbQuery.copyTo(sql.unsafe(wide)), 0, (sum, chunk) => sum + chunk.length)
      )
      expect(runtime.runSync(size)).toBe(2_009_002)
    })
  )

  wired(database, "of a slow consumer is cancelled with the transaction of another fiber", one, (at) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const before = yield* pid
        const first = yield* Deferred.make<void>()
        const goOn = yield* Deferred.make<void>()
        const copy = DbQuery.copyTo(sql`COPY (SELECT repeat('x', 1000) FROM generate_series(1, 100000)) TO STDOUT`)
        const slow = yield* Effect.fork(
          reasonOf(
            Stream.runForEach(copy, () => Effect.zipRight(Deferred.succeed(first, undefined), Deferred.await(goOn)))
          )
        )
        yield* Deferred.await(first)
        yield* pause(100)
        expect(yield* took(DbSession.rollback)).toBeLessThan(soon)
        yield* Deferred.succeed(goOn, undefined)
        expect(yield* Fiber.join(slow)).toMatchObject({ _tag: "QueryCanceled" })
        expect(yield* pid).toBe(before)
        expect(startups(at)).toBe(1)
      })
    )
  )

  wired(database, "that is interrupted before the server has asked for data is over at once", one, (at) =>
    Effect.gen(function* () {
      const before = yield* pid
      at.proxy.delay(100)
      const copying = yield* forkUntil(at, executes(/COPY/), copyFrom(Stream.never))
      expect(yield* took(Fiber.interrupt(copying))).toBeLessThan(soon)
      at.proxy.delay(0)
      expect(yield* pid).toBe(before)
      expect(startups(at)).toBe(1)
    })
  )

  wired(database, "whose source is idle ends with the transaction of another fiber", one, (at) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const before = yield* pid
        const source = Stream.concat(Stream.make("1\n"), Stream.never)
        const copying = yield* forkUntil(at, isCopyIn, reasonOf(copyFrom(source)))
        yield* pause(20)
        expect(yield* took(DbSession.rollback)).toBeLessThan(soon)
        expect(yield* Fiber.join(copying)).toMatchObject({ _tag: "QueryCanceled" })
        expect(yield* pid).toBe(before)
        expect(startups(at)).toBe(1)
      })
    )
  )

  wired(database, "whose row waits for a lock is cancelled", { maxConnections: 2 }, () =>
    Effect.gen(function* () {
      const holds = yield* Deferred.make<void>()
      const goOn = yield* Deferred.make<void>()
      const holder = yield* Effect.fork(
        withTransaction(
          Effect.zipRight(
            run("INSERT INTO t VALUES (1)"),
            Effect.zipRight(Deferred.succeed(holds, undefined), Deferred.await(goOn))
          )
        )
      )
      yield* Deferred.await(holds)
      // More than is kept back before it is sent.
      const rows = Stream.concat(Stream.make("1\n", "0".repeat(70_000) + "2\n"), Stream.never)
      const copying = yield* Effect.fork(copyFrom(rows))
      yield* untilActivity(database.url, (_) => _.active === 1)
      yield* pause(100)
      expect(yield* took(Fiber.interrupt(copying))).toBeLessThan(soon)
      yield* Deferred.succeed(goOn, undefined)
      yield* Fiber.join(holder)
      expect(yield* ids).toEqual([1])
    })
  )
})

describe("afterConnect", () => {
  it.scopedLive("has the connection for as long as it runs: what it leaves behind is ConnectionReleased", () =>
    Effect.gen(function* () {
      const goOn = yield* Deferred.make<void>()
      const late: Array<Fiber.RuntimeFiber<unknown, never>> = []
      let captured: Option.Option<Connection> = Option.none()
      const afterConnect = Effect.gen(function* () {
        captured = yield* DbConnection.current
        late.push(yield* Effect.forkDaemon(Effect.zipRight(Deferred.await(goOn), reasonOf(run("SELECT 'late'")))))
      })
      const { context, proxy } = yield* wire(database, { ...one, afterConnect })
      yield* withTransaction(
        Effect.gen(function* () {
          yield* run("INSERT INTO t VALUES (1)")
          yield* Deferred.succeed(goOn, undefined)
          expect(yield* Fiber.join(late[0]!)).toMatchObject({ _tag: "ConnectionReleased" })
          const { pid, raw, sql } = Option.getOrThrow(captured)
          for (const use of [Effect.asVoid(pid), Effect.asVoid(raw), Effect.asVoid(sql`SELECT 'late'`)]) {
            expect(yield* reasonOf(use)).toMatchObject({ _tag: "ConnectionReleased" })
          }
        })
      ).pipe(Effect.provide(context))
      expect(yield* ids).toEqual([1])
      expect(proxy.statements().filter((_) => _.includes("late"))).toEqual([])
    })
  )

  it.scopedLive("that leaves a statement running is waited for, and nobody is lent its connection meanwhile", () =>
    Effect.gen(function* () {
      const afterConnect = Effect.gen(function* () {
        yield* Effect.forkDaemon(Effect.exit(run("SELECT pg_sleep(0.3)")))
        yield* Effect.yieldNow()
      })
      const { context } = yield* wire(database, { ...one, afterConnect })
      const work = Effect.gen(function* () {
        const asking = yield* Effect.fork(took(run("SELECT 1")))
        yield* untilActivity(database.url, (_) => _.active === 1)
        expect(yield* DbEngine.stats).toMatchObject({ connecting: 1, used: 0 })
        yield* Fiber.join(asking)
      })
      yield* Effect.provide(work, context)
    })
  )
})

describe("a waiter", () => {
  const swallowed = (at: Wired) =>
    Effect.gen(function* () {
      const held = at.proxy.holdAt((_) => _.type === "Q" && /RESET ALL/.test(_.text), { forward: true })
      yield* run("SET work_mem = '5MB'")
      yield* Effect.promise(() => held)
    })

  wired(
    database,
    "gets a new connection while the reset of another is swallowed by the network",
    { maxConnections: 2, acquireTimeout: 2000 },
    (at) =>
      Effect.gen(function* () {
        yield* swallowed(at)
        yield* run("SELECT 1")
        expect(startups(at)).toBe(2)
      })
  )

  wired(database, "of a pool that has no room waits for the connection itself", one, (at) =>
    Effect.gen(function* () {
      yield* swallowed(at)
      const waiting = yield* Effect.fork(run("SELECT 1"))
      yield* pause(600)
      expect(startups(at)).toBe(1)
      at.proxy.resume()
      yield* Fiber.join(waiting)
      expect(startups(at)).toBe(1)
    })
  )

  wired(database, "gets the connection of a quick reset, and none is opened", { maxConnections: 2 }, (at) =>
    Effect.gen(function* () {
      at.proxy.delay(30)
      yield* run("SET work_mem = '5MB'")
      yield* Effect.all([run("SELECT 1"), pause(400)], { concurrency: "unbounded" })
      expect(startups(at)).toBe(1)
    })
  )
})

describe("a listener", () => {
  const listen = (channel: string) =>
    Effect.flatMap(DbEngine, ({ sql }) => Stream.runHead((sql as any).listen(channel) as Stream.Stream<string>))
  const notified = (channel: string) => database.query("SELECT pg_notify($1, 'said')", [channel])
  const listens = (at: Wired, channel: string) =>
    forkUntil(at, (_) => _.dir === "backend" && _.type === "C" && _.text === "LISTEN", listen(channel))

  const patient = { ...one, acquireTimeout: "1 minute" } as const
  wired(database, "that waits for the pool, or for another one that does, is interrupted at once", patient, (at) =>
    Effect.gen(function* () {
      yield* DbConnection.withConnection(
        Effect.gen(function* () {
          yield* run("SELECT 1")
          const first = yield* Effect.fork(listen("a"))
          yield* pending(1)
          const second = yield* Effect.fork(listen("b"))
          const third = yield* Effect.fork(listen("a"))
          yield* pause(20)
          yield* Fiber.interruptAll([second, first])
          yield* pending(1)
          yield* Fiber.interrupt(third)
          yield* pending(0)
        })
      )
      const heard = yield* listens(at, "a")
      yield* notified("a")
      expect(yield* Fiber.join(heard)).toEqual(Option.some("said"))
    })
  )

  wired(database, "whose LISTEN is interrupted leaves those of its channel what they hear", {}, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT 1")
      at.proxy.delay(100)
      const first = yield* forkUntil(at, executes(/LISTEN/), listen("a"))
      const heard = yield* Effect.fork(listen("a"))
      yield* pause(20)
      expect(yield* took(Fiber.interrupt(first))).toBeLessThan(soon)
      at.proxy.delay(0)
      yield* until("it is heard", () => heard.unsafePoll() !== null || (Effect.runFork(notified("a")), false))
      expect(yield* Fiber.join(heard)).toEqual(Option.some("said"))
    })
  )
})

describe("a listener in a network that swallows everything", () => {
  const settle = { settleTimeout: 200, connectTimeout: 500 }
  const listen = (channel: string, heard: () => void = () => {}) =>
    Effect.flatMap(DbEngine, ({ sql }) => Stream.runForEach(sql.listen(channel), () => Effect.sync(heard)))
  /** One that has come in: it has heard something. */
  const listener = (channel: string) =>
    Effect.gen(function* () {
      let heard = false
      const fiber = yield* Effect.forkScoped(listen(channel, () => (heard = true)))
      const notified = database.query("SELECT pg_notify($1, 'said')", [channel])
      yield* until(
        "it is heard",
        Effect.map(notified, () => heard)
      )
      return fiber
    })

  wired(database, "that leaves is gone within settleTimeout; those that stay are told", settle, (at) =>
    Effect.gen(function* () {
      const stays = yield* listener("a")
      const leaves = yield* listener("b")
      at.proxy.pause()
      expect(yield* took(Fiber.interrupt(leaves))).toBeLessThan(soon)
      expect((yield* reasonOf(Fiber.join(stays)))._tag).toBe("ConnectionError")
    })
  )

  wired(database, "need not wait for longer for one that comes", settle, (at) =>
    Effect.gen(function* () {
      const leaves = yield* listener("a")
      const held = at.proxy.holdAt(executes(/LISTEN "b"/), { forward: false })
      const comes = yield* Effect.fork(reasonOf(listen("b")))
      yield* Effect.promise(() => held)
      expect(yield* took(Fiber.interrupt(leaves))).toBeLessThan(soon)
      expect((yield* Fiber.join(comes))._tag).toBe("ConnectionError")
    })
  )
})

describe("health", () => {
  const garbage: ReadonlyArray<readonly [string, Buffer]> = [
    ["an error that is cut short", Buffer.from([0x45, 0, 0, 0, 8, 0x43, 0x78, 0x79, 0x7a])],
    ["an error of absurd length", Buffer.from([0x45, 0xff, 0xff, 0xff, 0xff])],
    ["HTTP", Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n")]
  ]
  for (const [what, answer] of garbage) {
    it.scopedLive(`is down when ${what} answers`, () =>
      Effect.gen(function* () {
        const port = yield* served((socket) => void socket.once("data", () => socket.write(answer)))
        const work = Effect.zipRight(DbEngine.suspend, DbEngine.health)
        const health = yield* Effect.provide(work, quietly(DbLayer({ url: urlAt(port), healthTimeout: "20 seconds" })))
        expect(health).toMatchObject({ status: "down", asked: "server" })
        expect(health.lastError?.error.reason._tag).toBe("ConnectionError")
        expect(health.tookMillis).toBeLessThan(soon)
      })
    )
  }

  it.scopedLive("is down when what answers the wish for TLS is none", () =>
    Effect.gen(function* () {
      const port = yield* served((socket) => void socket.write("SSH-2.0-OpenSSH_9.6\r\n"))
      const work = Effect.zipRight(DbEngine.suspend, DbEngine.health)
      const health = yield* Effect.provide(
        work,
        quietly(DbLayer({ url: urlAt(port), ssl: true, healthTimeout: "20 seconds" }))
      )
      expect(health).toMatchObject({ status: "down", asked: "server" })
      expect(health.tookMillis).toBeLessThan(soon)
    })
  )
})

describe("a raw query", () => {
  wired(database, "that still runs at give-back is cancelled before its slot is free", one, (at) =>
    Effect.gen(function* () {
      const scoped = Effect.gen(function* () {
        const { raw } = yield* DbConnection.acquire()
        const client = yield* raw
        client.query("SELECT pg_sleep(60)").catch(() => {})
        yield* untilActivity(database.url, (_) => _.active === 1)
      })
      yield* Effect.scoped(scoped)
      yield* until(
        "its slot is free",
        Effect.map(DbEngine.stats, (_) => _.total === 0)
      )
      yield* untilActivity(database.url, (_) => _.total === 0)
      expect(at.proxy.cancels.length).toBe(1)
    })
  )
})

describe("a login that is refused", () => {
  const role = `nobody_${process.pid}`
  const allowed = (yes: boolean) => database.query(`ALTER ROLE ${role} ${yes ? "LOGIN" : "NOLOGIN"}`)
  const withRole = Effect.acquireRelease(database.query(`CREATE ROLE ${role} LOGIN SUPERUSER PASSWORD 'secret'`), () =>
    database.query(`DROP ROLE ${role}`)
  )
  const at = (options: object) =>
    Effect.zipRight(withRole, wire(database, { username: role, password: Redacted.make("secret"), ...options }))

  it.scopedLive("is not tried again for the minimum, until somebody asks for a connection", () =>
    Effect.gen(function* () {
      const { context, ...wired } = yield* at({ minConnections: 2, maxConnections: 3 })
      const total = (n: number) =>
        until(
          `${n} in all`,
          Effect.map(DbEngine.stats, (_) => _.total === n && _.idle === n)
        )
      const work = Effect.gen(function* () {
        yield* run("SELECT 1")
        yield* total(2)
        yield* allowed(false)
        wired.proxy.reset()
        wired.proxy.cutAll()
        yield* until("it is refused", () => startups(wired) > 0)
        yield* pause(500)
        expect(startups(wired)).toBeLessThanOrEqual(2)
        const tried = startups(wired)
        expect(yield* reasonOf(run("SELECT 1"))).toMatchObject({ _tag: "AuthenticationError" })
        yield* pause(300)
        expect(startups(wired)).toBe(tried + 1)
        yield* allowed(true)
        yield* run("SELECT 1")
        yield* total(2)
      })
      yield* Effect.provide(work, context)
    })
  )

  it.scopedLive("is told to who waits while others hold connections, and not tried again", () =>
    Effect.gen(function* () {
      const { context, ...wired } = yield* at({ maxConnections: 3 })
      const work = DbConnection.withConnection(
        Effect.gen(function* () {
          yield* run("SELECT 1")
          yield* allowed(false)
          wired.proxy.reset()
          const other = DbConnection.withConnection(run("SELECT 2"), { reuse: false })
          expect((yield* errorOf(other)).reason).toMatchObject({ _tag: "AuthenticationError" })
          yield* pause(300)
          expect(startups(wired)).toBe(1)
        })
      )
      yield* Effect.provide(work, context)
    })
  )
})

describe("the role of a host", () => {
  /** A server that does not report its role, and does not answer the question for it. */
  const reticent = served((client) => {
    const server = Net.connect(database.port, database.host)
    server.on("error", () => {})
    const asked = new FrontendReader()
    const fromClient = new Framer(false)
    const fromServer = new Framer(true)
    let silent = false
    client.on("data", (chunk: Buffer) => {
      for (const frame of fromClient.push(chunk)) {
        fromClient.typed = true
        if (frame.type !== "startup" && asked.read(frame).text.includes("pg_is_in_recovery")) silent = true
      }
      server.write(chunk)
    })
    server.on("data", (chunk: Buffer) => {
      for (const frame of fromServer.push(chunk)) {
        const reported = frame.type === "S" && readBackend(frame).name === "in_hot_standby"
        if (!silent && !reported) client.write(frame.bytes)
      }
    })
    client.on("close", () => server.destroy())
  })

  it.scopedLive("is asked for within connectTimeout, and the next host is tried", () =>
    Effect.gen(function* () {
      const port = yield* reticent
      const options = { url: database.url, targetSessionAttrs: "primary", connectTimeout: 300, ...one } as const
      const hosts = [
        { host: "127.0.0.1", port },
        { host: database.host, port: database.port }
      ]
      const alone = Effect.gen(function* () {
        const error = yield* errorOf(run("SELECT 1"))
        expect(error.reason).toMatchObject({ _tag: "ConnectionError", phase: "connect", isRetryable: true })
        expect(error.message).toContain("300 ms")
        yield* until(
          "its slot is free",
          Effect.map(DbEngine.stats, (_) => _.connecting === 0)
        )
      })
      yield* Effect.provide(alone, quietly(DbLayer({ ...options, hosts: hosts.slice(0, 1) })))
      yield* Effect.provide(run("SELECT 1"), quietly(DbLayer({ ...options, hosts })))
    })
  )
})
