import { PgClient } from "@effect/sql-pg"
import { SqlClient, type SqlError, Statement } from "@effect/sql"
import { describe } from "@effect/vitest"
import { Deferred, Effect, Fiber, FiberId, Redacted, Stream } from "effect"
import { DbConnection, DbEngine, DbQuery, DbSession, type DbSql, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { committed, insert, outcome, programsOn, proxiedOn, reason, sleepingOn } from "./support/programs.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const client = Effect.map(DbEngine, ({ sql }) => sql)
const sleep = (seconds: number) => Effect.flatMap(client, (sql) => sql`SELECT pg_sleep(${seconds})`)
const locking = Effect.flatMap(client, (sql) => sql`SELECT pg_advisory_xact_lock(1)`)
const flags = Effect.withFiberRuntime<number>((_, status) => Effect.succeed(status.runtimeFlags))

describe("a statement that is interrupted while it runs", () => {
  const places: ReadonlyArray<readonly [string, (_: Effect.Effect<void, any, any>) => Effect.Effect<void, any, any>]> =
    [
      ["on its own", (effect) => effect],
      ["in a session", (effect) => DbSession.autocommit(effect)],
      ["in a transaction", (effect) => withTransaction(effect)],
      ["on a connection", (effect) => DbConnection.withConnection(effect)]
    ]
  const regions: ReadonlyArray<
    readonly [string, <A, E, R>(_: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>, string]
  > = [
    ["as it is", (effect) => effect, "interrupted"],
    ["uninterruptible", Effect.uninterruptible, "success"],
    ["interruptible in it", (effect) => Effect.uninterruptible(Effect.interruptible(effect)), "interrupted"],
    ["restored in it", (effect) => Effect.uninterruptible(Effect.uninterruptibleMask((_) => _(effect))), "success"]
  ]
  for (const [place, around] of places) {
    for (const [region, into, ends] of regions) {
      test(`${place}, ${region}: ${ends}`, () =>
        Effect.gen(function* () {
          const lock = yield* lockedOutside(database, 1)
          let ended = ""
          const body = Effect.onExit(locking, (exit) => Effect.sync(() => void (ended = outcome(exit))))
          const fiber = yield* Effect.fork(around(into(body) as Effect.Effect<any, any, any>))
          yield* lock.waitedFor
          yield* Fiber.interruptAsFork(fiber, FiberId.none)
          yield* lock.release
          yield* Fiber.await(fiber)
          expect(ended).toBe(ends)
        }))
    }
  }

  test("leaves the fiber's flags as they were", () =>
    Effect.gen(function* () {
      let seen: ReadonlyArray<number> = []
      const body = Effect.uninterruptible(
        Effect.gen(function* () {
          const before = yield* flags
          yield* Effect.exit(Effect.interruptible(sleep(5)))
          seen = [before, yield* flags]
        })
      )
      const fiber = yield* Effect.fork(body)
      yield* sleepingOn(database)
      yield* Fiber.interrupt(fiber)
      expect(seen).toHaveLength(2)
      expect(seen[1]).toBe(seen[0])
    }))

  test("in a finalizer runs to its end, and the interruption waits for it", () =>
    Effect.gen(function* () {
      const running = yield* Deferred.make<void>()
      const body = Effect.zipRight(Deferred.succeed(running, undefined), Effect.never)
      const fiber = yield* Effect.fork(
        Effect.onInterrupt(body, () => Effect.orDie(Effect.zipRight(sleep(0.1), insert(5))))
      )
      yield* Deferred.await(running)
      yield* Fiber.interrupt(fiber)
      expect(yield* committed(database)).toEqual([5])
    }))
})

describe("a tagged template", () => {
  test("means the same as with the ecosystem's client, whatever kind of value it is given each time", () =>
    Effect.gen(function* () {
      const ours: SqlClient.SqlClient = yield* client
      const theirs = yield* Effect.provide(SqlClient.SqlClient, PgClient.layer({ url: Redacted.make(database.url) }))
      const kinds: ReadonlyArray<(sql: SqlClient.SqlClient) => any> = [
        () => "text",
        (sql) => sql`1 + ${1}`,
        () => 5,
        (sql) => sql.literal("'l'"),
        () => new Date(0),
        (sql) => sql("b"),
        () => Buffer.from("x"),
        (sql) => sql.unsafe("$1::int", [7]),
        () => null,
        (sql) => sql.in([1, 2]),
        () => [1],
        (sql) => sql.and([sql`a = ${1}`, "TRUE"]),
        () => undefined,
        (sql) => sql.insert({ id: 1 }),
        () => 3n
      ]
      const ask = (sql: SqlClient.SqlClient, kind: (sql: SqlClient.SqlClient) => any) => sql`SELECT ${kind(sql)} AS a`
      for (const kind of [...kinds, ...[...kinds].reverse()]) {
        expect(ask(ours, kind).compile()).toEqual(ask(theirs, kind).compile())
      }
    }))

  proxied("is changed by a transformer, however it is run", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* client
      const ways: Record<string, (_: Statement.Statement<any>) => Effect.Effect<unknown, any>> = {
        rows: (_) => _,
        raw: (_) => _.raw,
        values: (_) => _.values,
        unprepared: (_) => _.unprepared,
        withoutTransform: (_) => _.withoutTransform,
        stream: (_) => Stream.runDrain(_.stream)
      }
      for (const [name, run] of Object.entries(ways)) {
        for (const statement of [sql`SELECT ${1}::int AS a`, sql.unsafe("SELECT $1::int AS a", [1])]) {
          proxy.reset()
          yield* Statement.withTransformer(run(statement), (_, sql) => Effect.succeed(sql`${_} LIMIT 7`))
          expect([name, proxy.statements().filter((text) => text.includes("LIMIT 7")).length]).toEqual([name, 1])
        }
      }
    })
  )
})

describe("sql.unsafe", () => {
  for (const [name, params] of [
    ["a number", 5],
    ["0", 0],
    ["a text", "ab"],
    ["an object", { a: 1 }],
    ["a Set", new Set([1])],
    ["a length that is none", { length: -1 }]
  ] as const) {
    proxied(`refuses ${name} in the place of the parameters, and nothing is sent`, (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* insert(1)
        proxy.reset()
        const statement = sql.unsafe("UPDATE t SET note = $1", params as never)
        expect(outcome(yield* Effect.exit(statement))).toBe("InvalidInput")
        expect(proxy.log).toEqual([])
      })
    )
  }

  test("is no tag: used as one it is refused, instead of losing what is behind the first value", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* insert(1)
      yield* insert(2)
      const tag = sql.unsafe as unknown as (
        text: TemplateStringsArray,
        ...values: Array<unknown>
      ) => Effect.Effect<unknown, SqlError.SqlError>
      for (const value of [null, "", [], 1]) {
        expect(outcome(yield* Effect.exit(tag`DELETE FROM t ${value} WHERE id = 1`))).toBe("InvalidInput")
      }
      expect(yield* committed(database)).toEqual([1, 2])
    }))

  test("can be shown, whatever it was given", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const text of [5, null, undefined, {}, ["a"]]) {
        const statement = sql.unsafe(text as never)
        expect(() => JSON.stringify(statement)).not.toThrow()
        expect(yield* reason(statement)).toBe("InvalidInput")
      }
    }))

  test("keeps the parameters that it was first run with, as the ecosystem's", () =>
    Effect.gen(function* () {
      const ask = (sql: SqlClient.SqlClient) =>
        Effect.suspend(() => {
          const params = [1]
          const statement = sql.unsafe("SELECT $1::int AS a", params)
          return Effect.zip(
            statement,
            Effect.suspend(() => ((params[0] = 2), statement))
          )
        })
      const theirs = yield* Effect.provide(
        Effect.flatMap(SqlClient.SqlClient, ask),
        PgClient.layer({ url: Redacted.make(database.url) })
      )
      expect(yield* ask(yield* client)).toEqual(theirs)
    }))
})

describe("a text that is not a string is refused, whoever watches", () => {
  const texts: ReadonlyArray<unknown> = [42, undefined, Symbol("x"), ["SELECT 1"], { toString: () => "SELECT 1" }]
  const runs = (sql: DbSql, text: never): ReadonlyArray<Effect.Effect<unknown, SqlError.SqlError, any>> => {
    const statement = sql.unsafe(text)
    const reserved = <A>(f: (_: Effect.Effect.Success<typeof sql.reserve>) => Effect.Effect<A, SqlError.SqlError>) =>
      Effect.scoped(Effect.flatMap(sql.reserve, f))
    return [
      statement,
      statement.raw,
      statement.values,
      statement.unprepared,
      statement.withoutTransform,
      Stream.runDrain(statement.stream),
      DbSession.batch([statement]),
      DbSession.batch([sql`SELECT 1`, statement]),
      DbQuery.one(statement),
      DbQuery.scalar(statement),
      DbQuery.status(statement),
      DbQuery.copyFrom(statement, Stream.empty),
      Stream.runDrain(DbQuery.copyTo(statement)),
      reserved((_) => _.execute(text, [], undefined)),
      reserved((_) => _.executeRaw(text, [])),
      reserved((_) => Stream.runDrain(_.executeStream(text, [], undefined)))
    ]
  }
  const all = Effect.gen(function* () {
    const sql = yield* client
    for (const text of texts) {
      for (const run of runs(sql, text as never)) {
        expect(outcome(yield* Effect.exit(run as Effect.Effect<unknown, unknown, DbEngine>))).toBe("InvalidInput")
      }
    }
  })
  test("nobody", () => all)
  test("a span", () => Effect.withSpan(all, "around"))
  test("the log of slow statements", () => all, { slowStatement: "1 minute" })
  test("the metrics of operations", () => all, { operationMetrics: true })
  test("the server's log", () => Effect.withSpan(all, "around"), { sqlCommenter: true })
})
