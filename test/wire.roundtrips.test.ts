import { DbConnection, DbEngine, DbError, DbSchema, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import { beforeAll, describe, expect } from "vitest"
import { testDatabase } from "./support/database.js"
import type { Wired } from "./support/wired.js"
import { errorOf, executes, forkUntil, reasonOf, seen, sent, wired } from "./support/wired.js"
import { until, untilStats } from "./support/until.js"

// DESIGN §8: the table of round trips, counted on the wire.
const database = testDatabase()

beforeAll(async () => {
  await Effect.runPromise(database.query("CREATE TABLE t (id int, note text)"))
})

const numbers = (n: number): ReadonlyArray<number> => Array.from({ length: n }, (_, i) => i)

/** The cost of an effect on a connection that is there already; answers are late enough for one flight to be one. */
const cost = <A, E, R>(at: Wired, effect: Effect.Effect<A, E, R>) =>
  Effect.gen(function* () {
    at.proxy.delay(15)
    at.proxy.reset()
    yield* effect
    return at.proxy.flights()
  })

const insert = (id: number) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO t (id) VALUES (${id})`)
const one = Effect.flatMap(DbSession, ({ sql }) => sql`SELECT 1 AS one`)

describe("round trips of sessions and transactions", () => {
  for (const n of [1, 2, 5]) {
    wired(database, `a session of ${n} statements in a row costs ${n + 1}`, {}, (at) =>
      Effect.gen(function* () {
        const work = Effect.forEach(numbers(n), insert, { discard: true })
        expect(yield* cost(at, DbSession.autocommit(work))).toBe(n + 1)
        expect(yield* cost(at, DbSession.autocommit(work))).toBe(n + 1)
      })
    )

    wired(database, `a transaction of ${n} statements in a row costs ${n + 1}`, {}, (at) =>
      Effect.gen(function* () {
        expect(yield* cost(at, withTransaction(Effect.forEach(numbers(n), insert)))).toBe(n + 1)
      })
    )

    wired(database, `a session of ${n} statements that fails costs ${n + 1}`, {}, (at) =>
      Effect.gen(function* () {
        const work = Effect.zipRight(Effect.forEach(numbers(n), insert), Effect.fail("no"))
        expect(yield* cost(at, Effect.ignore(DbSession.autocommit(work)))).toBe(n + 1)
      })
    )

    wired(database, `a nested block around ${n} statements costs ${n} when it succeeds`, {}, (at) =>
      DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(0)
          expect(yield* cost(at, withTransaction(Effect.forEach(numbers(n), insert)))).toBe(n)
          expect(yield* cost(at, insert(1))).toBe(1)
          expect(
            sent(at)
              .filter((_) => _.startsWith("E"))
              .map((_) => _.replace(/\d+/g, "N"))
          ).toEqual([expect.stringMatching(/^E RELEASE SAVEPOINT/i), expect.stringMatching(/^E INSERT/)])
        })
      )
    )

    wired(database, `a nested block around ${n} statements costs ${n + 1} when it fails`, {}, (at) =>
      DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(0)
          const work = Effect.zipRight(Effect.forEach(numbers(n), insert), Effect.fail("no"))
          expect(yield* cost(at, Effect.ignore(withTransaction(work)))).toBe(n + 1)
        })
      )
    )

    wired(database, `${n} nested blocks that succeed add nothing to the session around them`, {}, (at) =>
      Effect.gen(function* () {
        const work = Effect.forEach(numbers(n), (id) => withTransaction(insert(id)), { discard: true })
        expect(yield* cost(at, DbSession.autocommit(work))).toBe(n + 1)
      })
    )
  }

  wired(database, "a block in a block in a fresh session: BEGIN and both SAVEPOINTs ride together", {}, (at) =>
    Effect.gen(function* () {
      expect(yield* cost(at, DbSession.autocommit(withTransaction(withTransaction(insert(1)))))).toBe(2)
      expect(sent(at).filter((_) => _ === "S").length).toBe(2)
    })
  )

  for (const k of [2, 20, 200]) {
    wired(database, `${k} statements at once in an open session cost 1`, {}, (at) =>
      DbSession.autocommit(
        Effect.gen(function* () {
          yield* one
          expect(yield* cost(at, Effect.forEach(numbers(k), insert, { concurrency: "unbounded" }))).toBe(1)
        })
      )
    )

    wired(database, `${k} statements at once in a fresh session cost 1: BEGIN rides`, {}, (at) =>
      DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* cost(at, Effect.forEach(numbers(k), insert, { concurrency: "unbounded" }))).toBe(1)
          expect(sent(at).filter((_) => _ === "S").length).toBe(1)
        })
      )
    )
  }

  wired(database, "a commit in the middle costs 1, and the next transaction's BEGIN rides again", {}, (at) =>
    Effect.gen(function* () {
      const work = insert(1).pipe(Effect.zipRight(DbSession.commit), Effect.zipRight(insert(2)))
      expect(yield* cost(at, DbSession.autocommit(work))).toBe(4)
    })
  )

  wired(database, "a session without statements costs 0 and borrows nothing", {}, (at) =>
    Effect.gen(function* () {
      const nothing = DbSession.autocommit(withTransaction(DbSession.commit.pipe(Effect.ignore)))
      expect(yield* cost(at, nothing)).toBe(0)
      expect([at.proxy.accepted, (yield* DbEngine.stats).total]).toEqual([0, 0])
    })
  )

  const begun = [
    { isolation: "serializable" },
    { isolation: "repeatable read", readOnly: true },
    { isolation: "serializable", readOnly: true, deferrable: true },
    { statementTimeout: "5 seconds", lockTimeout: "2 seconds" },
    { settings: { "app.user": "42", "app.role": "it's \\ me" } },
    { isolation: "serializable", lockTimeout: "2 seconds", settings: { "app.user": "42" } },
    { timeout: "20 seconds", name: "named" }
  ] as const
  for (const options of begun) {
    wired(database, `${Object.keys(options).join(" and ")} at BEGIN cost nothing more`, {}, (at) =>
      Effect.gen(function* () {
        expect(yield* cost(at, DbSession.autocommit(one, options))).toBe(2)
        expect(yield* cost(at, withTransaction(one, options))).toBe(2)
      })
    )
  }

  for (const n of [1, 3]) {
    wired(database, `a search path costs ${n} statements nothing more, around a session, in it and without`, {}, (at) =>
      Effect.gen(function* () {
        const path = Effect.flatMap(DbSession, ({ sql }) => sql`SELECT current_setting('search_path') AS path`)
        const work = Effect.forEach(numbers(n), () =>
          Effect.map(path, (rows) => expect(rows).toEqual([{ path: expect.stringContaining("elsewhere") }]))
        )
        const elsewhere = DbSchema.withSchema(work, "elsewhere")
        expect(yield* cost(at, DbSession.autocommit(elsewhere))).toBe(n + 1)
        expect(yield* cost(at, DbSchema.withSchema(DbSession.autocommit(work), "elsewhere"))).toBe(n + 1)
        expect(yield* cost(at, elsewhere)).toBe(n)
      })
    )

    wired(database, `settings and time limits of a nested block around ${n} statements cost nothing more`, {}, (at) =>
      DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(0)
          const options = { settings: { "app.user": "43" }, statementTimeout: 5000, lockTimeout: 2000 } as const
          expect(yield* cost(at, withTransaction(Effect.forEach(numbers(n), insert), options))).toBe(n)
          const now = Effect.flatMap(DbSession, ({ sql }) => sql`SELECT current_setting('statement_timeout') AS t`)
          expect(
            yield* cost(
              at,
              Effect.map(now, (rows) => expect(rows).toEqual([{ t: "0" }]))
            )
          ).toBe(1)
        })
      )
    )
  }

  wired(
    database,
    "the engine's own limits and defaults cost nothing",
    { statementTimeout: 5000, lockTimeout: 2000, idleInTransactionTimeout: 9000, isolation: "serializable" },
    (at) =>
      Effect.gen(function* () {
        expect(yield* cost(at, DbSession.autocommit(one))).toBe(2)
        const { sql } = yield* DbEngine
        expect(yield* sql`SELECT current_setting('statement_timeout') AS t`).toEqual([{ t: "5s" }])
      })
  )
})

describe("round trips without a session", () => {
  wired(database, "an implicit statement costs 1", {}, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      expect(yield* cost(at, sql`INSERT INTO t (id) VALUES (1)`)).toBe(1)
      expect(yield* cost(at, sql`INSERT INTO t (id) VALUES (1)`)).toBe(1)
      expect(sent(at)).toEqual(["B INSERT INTO t (id) VALUES (1)", "E INSERT INTO t (id) VALUES (1)", "S"])
    })
  )

  for (const n of [1, 3, 50]) {
    wired(database, `a batch of ${n} statements costs 1, outside of a session and in one`, {}, (at) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const batch = DbSession.batch(numbers(n).map((id) => sql`INSERT INTO t (id) VALUES (${id})`))
        expect(yield* cost(at, batch)).toBe(1)
        expect(sent(at).filter((_) => _ === "S").length).toBe(1)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            // The first brings BEGIN along.
            expect(yield* cost(at, batch)).toBe(1)
            expect(yield* cost(at, batch)).toBe(1)
          })
        )
      })
    )
  }

  wired(database, "giving back a clean connection costs 0", {}, (at) =>
    Effect.gen(function* () {
      expect(yield* cost(at, DbConnection.withConnection(Effect.void))).toBe(0)
      expect(yield* cost(at, DbConnection.withConnection(one))).toBe(1)
      yield* untilStats("given back", (_) => _.idle === 1)
      expect(at.proxy.flights()).toBe(1)
    })
  )

  wired(database, "giving back a connection that was SET costs the next borrower nothing but the wait", {}, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      expect(yield* cost(at, DbConnection.withConnection(sql`SET work_mem = '5MB'`))).toBe(1)
      yield* untilStats("given back", (_) => _.idle === 1)
      expect(at.proxy.flights()).toBe(2)
    })
  )
})

describe("isolated sessions", () => {
  wired(
    database,
    "k isolated sessions cost as one: none waits for another's answer",
    { maxConnections: 8, minConnections: 8 },
    (at) =>
      Effect.gen(function* () {
        const all = Effect.all(
          numbers(8).map((id) => DbSession.isolated(insert(id))),
          { concurrency: "unbounded" }
        )
        yield* all
        yield* untilStats("all are open", (_) => _.idle === 8)
        at.proxy.reset()
        at.proxy.pause("backend")
        const fiber = yield* Effect.fork(all)
        const inserts = () => at.proxy.log.filter(executes(/^INSERT/))
        yield* until("all have sent theirs", () => inserts().length === 8)
        expect(new Set(inserts().map((_) => _.conn)).size).toBe(8)
        at.proxy.resume()
        yield* Fiber.join(fiber)
        expect(at.proxy.connections.map((_) => _.flights)).toEqual(numbers(8).map(() => 2))
      })
  )
})

describe("BEGIN and the statement that it rides with", () => {
  wired(database, "share one Sync", {}, (at) =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(insert(7))
      const messages = sent(at)
        .filter((_) => _ !== "p")
        .map((_) => _.split(" ")[0] + (_.includes("BEGIN") ? " BEGIN" : ""))
      expect(messages.slice(0, messages.indexOf("S") + 1)).toEqual([
        "startup",
        ...["P BEGIN", "B BEGIN", "D BEGIN", "E BEGIN"],
        ...["P", "B", "D", "E", "S"]
      ])
    })
  )

  wired(database, "if BEGIN fails, the statement has not run and no ROLLBACK is sent", {}, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection
        // A transaction by hand that has failed: BEGIN is refused in it.
        yield* sql`BEGIN`
        yield* Effect.ignore(sql`SELECT 1/0`)
        at.proxy.reset()
        const error = yield* errorOf(withTransaction(insert(-1)))
        expect(DbError.reason(error)?.sqlState).toBe("25P02")
        expect(at.proxy.statements().filter((_) => !/^BEGIN|^INSERT/.test(_))).toEqual([])
        yield* sql`ROLLBACK`
        expect(yield* database.query("SELECT FROM t WHERE id = -1")).toEqual([])
      })
    )
  )

  wired(database, "if a setting at BEGIN is refused, the statement has not run", {}, () =>
    Effect.gen(function* () {
      const reason = yield* reasonOf(withTransaction(insert(-2), { settings: { work_mem: "nonsense" } }))
      expect(reason.sqlState).toBe("22023")
      expect(yield* database.query("SELECT FROM t WHERE id = -2")).toEqual([])
    })
  )

  wired(database, "what is issued while BEGIN is unanswered waits for it, and then costs 1 more", {}, (at) =>
    Effect.gen(function* () {
      yield* DbEngine.ping
      at.proxy.pause("backend")
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const first = yield* forkUntil(at, executes(/^INSERT/), insert(1))
          const ready = seen(at, (_) => _.dir === "backend" && _.type === "Z")
          const others = yield* Effect.forkScoped(Effect.all([insert(2), insert(3)], { concurrency: 2 }))
          yield* ready
          yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          expect(at.proxy.statements().filter((_) => _.startsWith("INSERT")).length).toBe(1)
          at.proxy.reset()
          at.proxy.delay(15)
          at.proxy.resume()
          yield* Fiber.join(first)
          yield* Fiber.join(others)
          expect(at.proxy.flights()).toBe(1)
        })
      )
    })
  )
})
