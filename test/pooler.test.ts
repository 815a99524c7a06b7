import { it } from "@effect/vitest"
import * as PgClient from "@effect/sql-pg/PgClient"
import { DbEngine, DbError, type DbOptions, DbQuery, DbSchema, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { afterAll, beforeAll, describe, expect } from "vitest"
import { contract } from "./support/contract.js"
import { testDatabase } from "./support/database.js"
import { pgbouncer, pgbouncerProgram, type Pooler } from "./support/pgbouncer.js"
import { committed, insert, onDatabase, type Services, used } from "./support/programs.js"
import { reasonOf } from "./support/wired.js"
import { again, until, untilStats } from "./support/until.js"
import { ledger } from "./support/ledger.js"

// Through a real PgBouncer, with the options that docs/engine.md recommends.
type Mode = "session" | "transaction"
const recommended: Readonly<Record<Mode, DbOptions>> = {
  session: {},
  transaction: { preparedStatements: false, resetOnRelease: "never" }
}
const why = pgbouncerProgram === undefined ? ": pgbouncer is not installed" : ""

const run = (text: string, values?: ReadonlyArray<unknown>) =>
  Effect.flatMap(DbEngine, ({ sql }) => sql.unsafe<Record<string, unknown>>(text, values))

/** No client is connected any more, and no server connection is in use. */
const left = (pooler: Pooler) =>
  until(
    "the pooler is at rest",
    Effect.map(
      Effect.all([pooler.console("SHOW CLIENTS"), pooler.console("SHOW SERVERS")]),
      ([clients, servers]) =>
        clients.every((_) => _["database"] === "pgbouncer") && servers.every((_) => _["state"] === "idle")
    )
  )

describe.skipIf(pgbouncerProgram === undefined).each(["session", "transaction"] as const)(
  `PgBouncer in %s mode${why}`,
  (mode) => {
    const database = testDatabase()
    const scope = Effect.runSync(Scope.make())
    let pooler: Pooler
    beforeAll(async () => {
      pooler = await Effect.runPromise(Scope.extend(pgbouncer(database.url, mode), scope))
    })
    afterAll(() => Effect.runPromise(Scope.close(scope, Exit.void)))

    const test = <A, E>(
      name: string,
      program: () => Effect.Effect<A, E, Services | Scope.Scope>,
      options: DbOptions = recommended[mode]
    ) =>
      it.scopedLive(name, () =>
        Effect.suspend(() =>
          Effect.zipLeft(onDatabase(database, { ...options, url: pooler.url })(Effect.suspend(program)), left(pooler))
        )
      )

    contract(database, test, [
      { name: "the core promises", options: recommended[mode], connections: 10, around: (_) => _ }
    ])

    test("an interruption cancels the statement that it is meant for, and no other", () =>
      Effect.gen(function* () {
        const running = (text: string) =>
          until(
            `${text} runs`,
            Effect.map(
              database.query(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' AND query LIKE $1",
                [`%'${text}'%`]
              ),
              (_) => _.length === 1
            )
          )
        const neighbour = yield* Effect.fork(run("SELECT pg_sleep(1), 'neighbour'"))
        yield* running("neighbour")
        const mine = yield* Effect.fork(withTransaction(Effect.zipRight(insert(1), run("SELECT pg_sleep(60), 'mine'"))))
        yield* running("mine")
        yield* Fiber.interrupt(mine)
        expect(yield* Fiber.join(neighbour)).toHaveLength(1)
        expect(yield* committed(database)).toEqual([])
        yield* insert(2)
      }))

    test("limits and settings of a transaction are its own", () =>
      Effect.gen(function* () {
        const limited = withTransaction(run("SELECT pg_sleep(60)"), { statementTimeout: 50 })
        expect(yield* reasonOf(limited)).toMatchObject({ _tag: "StatementTimeoutError" })
        const settings = run(
          "SELECT current_setting('app.tenant', true) AS tenant, current_setting('lock_timeout') AS lock"
        )
        const options = { settings: { "app.tenant": "acme" }, lockTimeout: 1234 }
        expect(yield* withTransaction(settings, options)).toEqual([{ tenant: "acme", lock: "1234ms" }])
        expect((yield* settings)[0]).toMatchObject({ lock: "0" })
      }))

    test("schemas never mix between fibers", () =>
      Effect.gen(function* () {
        const path = Effect.map(run("SHOW search_path"), ([row]) => row!["search_path"])
        const schemas = Array.from({ length: 30 }, (_, i) => `tenant_${i}`)
        const paths = yield* Effect.forEach(schemas, (schema) => DbSchema.withSchema(path, schema), { concurrency: 10 })
        expect(paths.map(String).map((_, i) => _.includes(schemas[i]!))).toEqual(schemas.map(() => true))
        expect(yield* path).not.toContain("tenant")
      }))

    test("COPY, and an outcome that is verified", () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("1\n", "2\n"))
        yield* withTransaction(insert(3), { verifyOutcome: true })
        expect(yield* committed(database)).toEqual([1, 2, 3])
      }))

    test("start-up parameters that the pooler does not know are refused, and the error says what to do", () =>
      Effect.gen(function* () {
        const refused = onDatabase(database, { ...recommended[mode], url: pooler.url, statementTimeout: 5000 })(
          insert(1)
        )
        const reason = yield* reasonOf(refused)
        expect(reason).toMatchObject({ _tag: "ConnectionError", phase: "connect", isRetryable: false })
        expect(reason.message).toContain("The pooler refuses a start-up parameter")
        expect(reason.hint).toContain("ignore_startup_parameters")
      }))

    test("a server connection that dies behind it is a typed error, and the next works", () =>
      Effect.gen(function* () {
        const dies = withTransaction(
          Effect.gen(function* () {
            yield* insert(1)
            yield* database.query(
              "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = $1",
              [database.database]
            )
            yield* insert(2)
          })
        )
        expect(yield* reasonOf(dies)).toMatchObject({ _tag: "ConnectionError" })
        yield* again(insert(3))
        expect(yield* committed(database)).toEqual([3])
      }))

    // FAULTS 24
    test("a pooler that restarts under load: typed errors, recovery, no acknowledged write lost", () =>
      Effect.gen(function* () {
        const { acknowledged, agrees, close, undone, unknown } = yield* ledger(8, (id) => withTransaction(insert(id)), [
          "CommitUnknown",
          "ConnectionError",
          "AcquireTimeout"
        ])
        for (let round = 1; round <= 3; round++) {
          const before = acknowledged.size
          yield* until("the writers write", () => acknowledged.size > before + 30)
          yield* pooler.stop
          yield* pooler.start
        }
        const before = acknowledged.size
        yield* until("the writers go on", () => acknowledged.size > before + 30)
        yield* close
        agrees(yield* committed(database))
        expect(undone.size + unknown.size).toBeGreaterThan(0)
      }))
  }
)

describe.skipIf(pgbouncerProgram === undefined)(`PgBouncer${why}`, () => {
  const database = testDatabase()
  const test = (
    name: string,
    mode: Mode,
    settings: Readonly<Record<string, string | number>>,
    options: DbOptions,
    program: (pooler: Pooler) => Effect.Effect<void, unknown, Services | Scope.Scope>
  ) =>
    it.scopedLive(name, () =>
      Effect.gen(function* () {
        const pooler = yield* pgbouncer(database.url, mode, settings)
        yield* onDatabase(database, { ...options, url: pooler.url })(Effect.suspend(() => program(pooler)))
        yield* left(pooler)
      })
    )

  test(
    "transactions of many connections share a few of the server's",
    "transaction",
    { default_pool_size: 3 },
    { ...recommended.transaction, maxConnections: 20 },
    () =>
      Effect.gen(function* () {
        yield* run("INSERT INTO t SELECT n, '100' FROM generate_series(0, 9) n")
        const transfer = (n: number) =>
          withTransaction(
            Effect.gen(function* () {
              const [from, to] = [n % 10, (n * 7 + 3) % 10].sort()
              const [before] = yield* run("SELECT pg_backend_pid() AS pid")
              yield* run("UPDATE t SET note = (note::int - 1)::text WHERE id = $1", [from])
              yield* run("UPDATE t SET note = (note::int + 1)::text WHERE id = $1", [to])
              expect(yield* run("SELECT pg_backend_pid() AS pid")).toEqual([before])
              return before!["pid"]
            })
          )
        const pids = yield* Effect.forEach(
          Array.from({ length: 200 }, (_, n) => n),
          transfer,
          { concurrency: 20 }
        )
        expect(new Set(pids).size).toBeLessThanOrEqual(3)
        expect(yield* run("SELECT sum(note::int)::int AS sum FROM t")).toEqual([{ sum: 1000 }])
        expect(yield* used).toBe(0)
      })
  )

  test(
    "in session mode a client finds nothing of the one before",
    "session",
    { default_pool_size: 1 },
    { maxConnections: 1, idleTimeout: 20 },
    (pooler) =>
      Effect.gen(function* () {
        const pid = Effect.map(run("SELECT pg_backend_pid() AS pid"), ([row]) => row!["pid"])
        const before = yield* pid
        yield* DbSession.autocommit(
          Effect.all([
            run("SET application_name = 'left'"),
            run("CREATE TEMP TABLE mine (id int)"),
            run("SELECT pg_advisory_lock(1)")
          ])
        )
        // the connection goes back to the pooler, who gives the server's to the next client
        yield* untilStats("our connection is closed", (_) => _.total === 0)
        yield* left(pooler)
        expect(yield* pid).toBe(before)
        expect(
          yield* run(
            `SELECT current_setting('application_name') AS name, to_regclass('pg_temp.mine') AS mine,
                    (SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()) AS locks`
          )
        ).toEqual([{ name: "effect-db", mine: null, locks: 0 }])
      })
  )

  test("in session mode LISTEN delivers", "session", {}, {}, () =>
    Effect.gen(function* () {
      const client = yield* PgClient.PgClient
      const heard = yield* Effect.fork(Stream.runHead(client.listen("news")))
      yield* until(
        "somebody listens",
        Effect.map(
          database.query("SELECT FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'"),
          (_) => _.length > 0
        )
      )
      yield* client.notify("news", "hello")
      expect(yield* Fiber.join(heard)).toEqual(Option.some("hello"))
    })
  )

  test(
    "with start-up parameters that it ignores the engine connects, and the limit is a transaction's to set",
    "transaction",
    { ignore_startup_parameters: "statement_timeout" },
    { ...recommended.transaction, statementTimeout: 50 },
    () =>
      Effect.gen(function* () {
        expect(yield* run("SHOW statement_timeout")).toEqual([{ statement_timeout: "0" }])
        expect(yield* withTransaction(run("SHOW statement_timeout"), { statementTimeout: 70 })).toEqual([
          { statement_timeout: "70ms" }
        ])
      })
  )

  test(
    "a pooler without a free server connection is a typed error that can be retried",
    "transaction",
    { default_pool_size: 1, query_wait_timeout: 1 },
    recommended.transaction,
    () =>
      Effect.gen(function* () {
        const held = withTransaction(Effect.zipRight(insert(1), reasonOf(DbSession.isolated(insert(2)))))
        const reason = yield* held
        expect(reason).toMatchObject({ _tag: "ConnectionError", isRetryable: true })
        expect(reason.message).toContain("query_wait_timeout")
        expect(yield* committed(database)).toEqual([1])
      })
  )

  // What happens to those who forget `preparedStatements: false`.
  test(
    "in transaction mode a named statement whose server connection is another one is prepared again",
    "transaction",
    { default_pool_size: 1 },
    { maxConnections: 1, resetOnRelease: "never" },
    (pooler) =>
      Effect.gen(function* () {
        const both = run("SELECT pg_backend_pid() AS pid, $1::int AS n", [1])
        const before = yield* both
        expect(yield* both).toEqual(before)
        yield* pooler.console("RECONNECT")
        const after = yield* both
        expect(after[0]!["n"]).toBe(1)
        expect(after).not.toEqual(before)
      })
  )

  test(
    "in transaction mode a named statement is never that of another connection",
    "transaction",
    { default_pool_size: 2 },
    { maxConnections: 8, resetOnRelease: "never" },
    () =>
      Effect.gen(function* () {
        const answers = yield* Effect.forEach(
          Array.from({ length: 400 }, (_, n) => n),
          (n) =>
            Effect.match(run(`SELECT $1::int AS n, '${n % 7}' AS text`, [n]), {
              onSuccess: (rows) => rows[0]!["n"] === n && rows[0]!["text"] === String(n % 7),
              // 26000 twice in a row: refused, not answered by somebody else's statement
              onFailure: (error) => DbError.reason(error)?.sqlState === "26000"
            }),
          { concurrency: 16 }
        )
        expect(answers.filter((right) => !right)).toEqual([])
      })
  )
})
