/**
 * Connections that are held across something else: a change of hosts, the end of a session, a hook before one.
 */
import { describe, expect } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as FiberId from "effect/FiberId"
import { atomic, DbConnection, DbEngine, DbError, DbSchema, DbSession, DbTransaction, withTransaction } from "effect-db"
import { testDatabase } from "./support/database.js"
import { committed, insert, no, outcome, programsOn, proxiedOn, reason, used } from "./support/programs.js"
import { latch, open, pending, until } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

const executes = (start: string) => (message: { readonly type: string; readonly text: string }) =>
  message.type === "E" && message.text.startsWith(start)

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

describe("a session in line for the connection of another", () => {
  for (const [what, text] of [
    ["COMMIT", "COMMIT"],
    ["statement", "SELECT 'lost'"]
  ] as const) {
    proxied(`gets a new one when the other's ${what} loses it`, (via) =>
      Effect.gen(function* () {
        const begun = yield* latch
        const go = yield* latch
        const first = DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* open(begun)
            yield* Deferred.await(go)
            const { sql } = yield* DbSession
            if (text !== "COMMIT") yield* sql.unsafe(text)
          })
        )
        void via.cutAfter(executes(text), { forward: false })
        yield* DbConnection.withConnection(
          Effect.gen(function* () {
            const losing = yield* Effect.fork(Effect.exit(first))
            yield* Deferred.await(begun)
            const waiting = yield* Effect.fork(DbSession.autocommit(insert(2)))
            yield* Effect.yieldNow()
            yield* open(go)
            expect(Exit.isFailure(yield* Fiber.join(losing))).toBe(true)
            yield* Fiber.join(waiting)
          })
        )
        expect(yield* committed(database)).toEqual([2])
      })
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
    ["the session's connection", Effect.zipRight(DbConnection.pid, insert(1))],
    ["an autocommit that joins", DbSession.autocommit(insert(1))],
    ["a block", withTransaction(insert(1))],
    ["a block that joins", withTransaction(insert(1), { propagation: "required" })],
    ["an atomic block", atomic(insert(1))],
    ["a block for a scope", Effect.scoped(Effect.zipRight(DbTransaction.scoped(), insert(1)))],
    ["a batch", Effect.flatMap(DbSession, ({ sql }) => DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`]))]
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
    "runs for the session that comes after one that an autocommit which joined has closed before it failed",
    () =>
      Effect.gen(function* () {
        runs = 0
        const failed = DbSession.autocommit(Effect.all([insert(1), DbSession.close, no]))
        yield* DbSession.autocommit(Effect.zipRight(Effect.ignore(failed), insert(2)))
        expect(runs).toBe(2)
        expect(yield* committed(database)).toEqual([2])
      }),
    counting
  )

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

  /** Forks it, and waits until it waits for the hook of the ambient session. */
  const behindHook = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    Effect.tap(Effect.forkDaemon(effect), (fiber) =>
      until(
        "it waits",
        Effect.map(fiber.status, (_) => _._tag === "Suspended")
      )
    )
  const shared = DbConnection.acquire({ reuse: true, lazy: true })

  let gate = Deferred.unsafeMake<void>(FiberId.none)
  const gated = {
    beforeSession: Effect.suspend(() => {
      runs++
      return Deferred.await(gate)
    })
  }

  const open = Effect.suspend(() => Deferred.succeed(gate, undefined))
  /** A session in which two wait for its hook, and what becomes of them. */
  const bothBehindHook = <R1, R2>(
    one: Effect.Effect<unknown, unknown, R1>,
    other: Effect.Effect<unknown, unknown, R2>,
    then: (one: Fiber.Fiber<unknown, unknown>, other: Fiber.Fiber<unknown, unknown>) => Effect.Effect<unknown, unknown>
  ) =>
    Effect.suspend(() => {
      runs = 0
      gate = Deferred.unsafeMake(FiberId.none)
      return DbSession.autocommit(
        Effect.flatMap(behindHook(one), (first) => Effect.flatMap(behindHook(other), (second) => then(first, second)))
      )
    })

  test(
    "runs for the next session of one who waited, when another who waited has closed the first",
    () =>
      Effect.gen(function* () {
        const closing = Effect.scoped(Effect.zipRight(shared, DbSession.close))
        yield* bothBehindHook(closing, insert(1), (first, second) =>
          Effect.all([open, Fiber.join(first), Fiber.join(second)])
        )
        expect(runs).toBe(2)
        expect(yield* committed(database)).toEqual([1])
      }),
    gated
  )

  test(
    "is for all who wait: the first may leave",
    () =>
      Effect.gen(function* () {
        yield* bothBehindHook(insert(1), insert(2), (first, second) =>
          Effect.all([Fiber.interrupt(first), open, Fiber.join(second)])
        )
        expect(runs).toBe(1)
        expect(yield* committed(database)).toEqual([2])
      }),
    gated
  )

  test(
    "runs again for who asks again after it has failed",
    () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          runs = 0
          expect(yield* reason(insert(1))).toBe("CheckViolation")
          yield* insert(1)
          expect(runs).toBe(2)
        })
      ),
    {
      beforeSession: Effect.suspend(() =>
        ++runs === 1 ? DbError.make("CheckViolation", { message: "no", hint: "no" }) : Effect.void
      )
    }
  )

  test("may have a time limit of its own", () => DbSession.autocommit(insert(1)), {
    beforeSession: Effect.ignore(Effect.timeout(Effect.never, 50))
  })

  for (const [name, use] of [
    ["shares its connection", Effect.scoped(Effect.flatMap(shared, (_) => _.pid))],
    ["asks for its connection", DbConnection.pid]
  ] as const) {
    test(
      `over which the session ends: whoever ${name} is told, and has none of its own`,
      () =>
        Effect.gen(function* () {
          gate = Deferred.unsafeMake(FiberId.none)
          const waiting = yield* DbSession.autocommit(behindHook(use))
          yield* Deferred.succeed(gate, undefined)
          expect(outcome(yield* Fiber.await(waiting))).toBe("SessionClosed")
        }),
      gated
    )
  }
})

describe("a statement whose connection is lost", () => {
  const failure = <A, R>(effect: Effect.Effect<A, unknown, R>) =>
    Effect.map(Effect.flip(effect), (error) => [DbError.reason(error)?._tag, DbError.isRetryable(error)] as const)

  proxied("in a transaction that was not being committed: all of it can be done again", (via) =>
    Effect.gen(function* () {
      yield* Effect.sync(() => void via.cutAfter(executes("INSERT INTO t (id) VALUES"), { forward: true }))
      expect(yield* failure(withTransaction(insert(1)))).toEqual(["ConnectionError", true])
      expect(yield* committed(database)).toEqual([])
    })
  )

  proxied("and was a COMMIT in a text of its own: nobody knows", (via) =>
    Effect.gen(function* () {
      const commit = Effect.flatMap(DbSession, ({ sql }) => sql.unsafe("COMMIT"))
      yield* Effect.sync(() => void via.cutAfter(executes("COMMIT"), { forward: true }))
      const [, retryable] = yield* failure(withTransaction(Effect.zipRight(insert(1), commit)))
      expect(retryable).toBe(false)
    })
  )

  proxied("is done again by retry, with its transaction", (via) =>
    Effect.gen(function* () {
      yield* Effect.sync(() => void via.cutAfter(executes("INSERT INTO t (id) VALUES"), { forward: true }))
      yield* withTransaction(insert(1), { retry: true })
      expect(yield* committed(database)).toEqual([1])
    })
  )

  proxied("outside of the transaction that is to be retried: it may have been done, and nothing is done again", (via) =>
    Effect.gen(function* () {
      yield* database.query("DROP TABLE IF EXISTS audit; CREATE TABLE audit (x int)")
      const audit = Effect.flatMap(DbEngine, ({ sql }) => sql`INSERT INTO audit VALUES (1)`)
      let sent = false
      yield* Effect.sync(
        () =>
          void via.cutAfter(
            (message) => {
              if (executes("INSERT INTO audit")(message)) sent = true
              return sent && message.type === "S"
            },
            { forward: true }
          )
      )
      const work = withTransaction(Effect.zipRight(insert(1), DbSession.detach(audit)), { retry: true })
      expect(yield* failure(work)).toEqual(["ConnectionError", false])
      yield* until(
        "the server has done it",
        Effect.map(database.query("SELECT FROM audit"), (rows) => rows.length === 1)
      )
      expect(yield* committed(database)).toEqual([])
      yield* database.query("DROP TABLE audit")
    })
  )
})

describe("a statement on a shared connection that has to be prepared again", () => {
  test("does not get into the transaction of a session that has begun meanwhile", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection
        yield* database.query("DROP TABLE IF EXISTS shape; CREATE TABLE shape (a int); INSERT INTO shape VALUES (1)")
        const look = sql<{ a: number }>`SELECT *, pg_current_xact_id_if_assigned()::text AS xid FROM shape`
        yield* look
        yield* database.query("ALTER TABLE shape ADD COLUMN b int")
        // Both are issued at once: the session's BEGIN is behind the statement that fails.
        const [rows] = yield* Effect.all(
          [look, DbSession.autocommit(Effect.zipRight(insert(1), Effect.zipRight(insert(2), Effect.void)))],
          { concurrency: 2 }
        )
        expect(rows).toEqual([{ a: 1, b: null, xid: null }])
        yield* database.query("DROP TABLE shape")
      })
    ))
})

describe("on a connection whose pg client is in use, outside of a session", () => {
  const raw = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    DbConnection.withConnection(Effect.zipRight(DbConnection.raw, effect))

  test("a batch, which would be no transaction, is refused; with one around it is whole", () =>
    raw(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const batch = (last: string) =>
          DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql.unsafe(last), sql`INSERT INTO t (id) VALUES (3)`])
        expect(yield* reason(batch("SELECT 1/0"))).toBe("InvalidInput")
        expect(yield* committed(database)).toEqual([])
        yield* Effect.flip(withTransaction(batch("SELECT 1/0")))
        expect(yield* committed(database)).toEqual([])
        yield* withTransaction(batch("SELECT 1"))
        expect(yield* committed(database)).toEqual([1, 3])
        expect(yield* sql`SELECT 1 AS one`).toEqual([{ one: 1 }])
      })
    ))

  test("a statement of a tenant is refused, not run where its names mean something else", () =>
    raw(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const path = sql<{ path: string }>`SELECT current_setting('search_path') AS path`
        expect(yield* reason(DbSchema.withTenant(path, "acme"))).toBe("InvalidInput")
        const [row] = yield* withTransaction(DbSchema.withTenant(path, "acme"))
        expect(row!.path).toContain("acme")
      })
    ))
})
