/**
 * `DbSession.batch`: whose statements it takes, and what its transaction begins with.
 */
import { Statement } from "@effect/sql"
import { PgClient } from "@effect/sql-pg"
import { describe, expect } from "@effect/vitest"
import { Deferred, Effect, Fiber, Option } from "effect"
import { DbConnection, DbEngine, DbError, DbSchema, DbSession, type DbSql, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { coreOf } from "../src/DbEngine.js"
import * as Ambient from "../src/internal/ambient.js"
import { pid, proxiedOn, reason, seen } from "./support/programs.js"
import { Analytics, twoDatabases } from "./support/twoDatabases.js"
import { latch, open } from "./support/until.js"

const { database, othersRows, rows, test } = twoDatabases()
const proxied = proxiedOn(database)

const client = Effect.map(DbSession, (_) => _.sql)
const clientOfOther = Effect.map(Analytics.DbSession, (_) => _.sql)

/** Refused with the place of the entry in its message, and nothing is written anywhere. */
const refusesEntry =
  (at: number) =>
  <A, E, R>(batch: Effect.Effect<A, E, R>) =>
    Effect.gen(function* () {
      const error = DbError.reason(yield* Effect.flip(batch))
      expect(error?._tag).toBe("InvalidInput")
      expect(error?.message).toContain(`Entry ${at} of the batch`)
      expect([yield* rows, yield* othersRows]).toEqual([[], []])
    })

test("a batch that is no array is InvalidInput", () =>
  Effect.gen(function* () {
    for (const wrong of [{}, undefined, (yield* client)`SELECT 1`]) {
      expect(yield* reason(DbSession.batch(wrong as never))).toBe("InvalidInput")
    }
  }))

/** How many statements of the ambient session are on their way, or wait for their turn. */
const underWay = Effect.flatMap(DbEngine, (engine) =>
  Effect.withFiberRuntime<number>((fiber) =>
    Effect.succeed(Ambient.entry(fiber, coreOf(engine)).slot!.get().runs.length)
  )
)

describe("a batch that has waited for its turn for too long", () => {
  proxied(
    "is not run in part, when the turn comes while its statements give up one after the other",
    () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const inside = yield* latch
          let told = false
          // It ends when the first of them has given up.
          const body = Effect.gen(function* () {
            yield* open(inside)
            for (let most = 0, left = 0; left >= most && !told; left = yield* underWay) {
              most = left
              yield* Effect.promise(() => new Promise(setImmediate))
            }
          })
          const block = yield* Effect.fork(withTransaction(body))
          yield* Deferred.await(inside)
          const batch = DbSession.batch(Array.from({ length: 8000 }, (_, i) => sql`INSERT INTO t (id) VALUES (${i})`))
          const waiting = yield* Effect.fork(
            Effect.ensuring(
              reason(batch),
              Effect.sync(() => void (told = true))
            )
          )
          expect(yield* Fiber.join(waiting)).toBe("SessionBusy")
          yield* Fiber.join(block)
          expect(yield* seen).toEqual([])
        })
      ),
    { blockTimeout: 300 }
  )
})

describe("a statement that would end or open its transaction is refused, and none of the batch is sent", () => {
  for (const text of [
    "COMMIT",
    "-- all of it\nCOMMIT",
    "/* */ rollback",
    "; END",
    " ;-- ;\nCOMMIT",
    "START TRANSACTION"
  ]) {
    test(JSON.stringify(text), () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const batch = DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql.unsafe(text), sql`SELECT 1`])
        expect(yield* reason(batch)).toBe("InvalidInput")
        expect(yield* rows).toEqual([])
      })
    )
  }
})

describe("a statement that runs somewhere else is refused, and none of the batch is sent", () => {
  test("one of another database", () =>
    Effect.gen(function* () {
      const [here, there] = [yield* client, yield* clientOfOther]
      const batch = DbSession.batch([here`INSERT INTO t (id) VALUES (1)`, there`INSERT INTO t (id) VALUES (2)`])
      yield* refusesEntry(2)(batch)
      yield* refusesEntry(2)(DbSession.autocommit(batch))
      yield* refusesEntry(2)(DbConnection.withConnection(batch))
      yield* refusesEntry(1)(DbSession.batch([there`INSERT INTO t (id) VALUES (3)`]))
      yield* refusesEntry(1)(Analytics.DbSession.batch([here`INSERT INTO t (id) VALUES (4)`]))
      const handle = yield* DbSession.make({ autocommit: true })
      yield* refusesEntry(1)(handle.batch([there`INSERT INTO t (id) VALUES (5)`]))
    }).pipe(Effect.scoped))

  test("one of a handle, in another session and outside of any", () =>
    Effect.gen(function* () {
      const handle = yield* DbSession.make({ autocommit: true })
      const other = yield* DbSession.make({ autocommit: true })
      const batch = DbSession.batch([(yield* client)`SELECT 1`, handle.sql`INSERT INTO t (id) VALUES (1)`])
      yield* refusesEntry(2)(batch)
      yield* refusesEntry(2)(DbSession.autocommit(batch))
      yield* refusesEntry(1)(other.batch([handle.sql`INSERT INTO t (id) VALUES (2)`]))
    }).pipe(Effect.scoped))

  test("one of a connection that the batch does not run on", () =>
    Effect.gen(function* () {
      const connection = yield* DbConnection.acquire({ reusable: false, lazy: true })
      const batch = DbSession.batch([connection.sql`INSERT INTO t (id) VALUES (1)`])
      yield* refusesEntry(1)(DbSession.detach(batch))
      yield* refusesEntry(1)(DbSession.isolated(batch))
      const handle = yield* DbSession.make({ autocommit: true })
      yield* refusesEntry(1)(handle.batch([connection.sql`INSERT INTO t (id) VALUES (2)`]))
    }).pipe(Effect.scoped))

  test("one of a client that is not ours", () =>
    Effect.gen(function* () {
      const ours = yield* client
      const foreign = Statement.make(Effect.die("asked for a connection"), PgClient.makeCompiler(), [], undefined)
      yield* refusesEntry(2)(DbSession.batch([ours`SELECT 1`, foreign`INSERT INTO t (id) VALUES (1)`]))
    }))

  test("one of a session from outside of the sandbox that the batch is in", () =>
    Effect.gen(function* () {
      const handle = yield* DbSession.make({ autocommit: true })
      yield* DbTest.sandbox(refusesEntry(1)(DbSession.batch([handle.sql`INSERT INTO t (id) VALUES (1)`])))
    }).pipe(Effect.scoped))

  test("of a session that is closed it is SessionClosed, of a released connection ConnectionReleased", () =>
    Effect.gen(function* () {
      const handle = yield* DbSession.make()
      yield* handle.close
      expect(yield* reason(DbSession.batch([handle.sql`SELECT 1`]))).toBe("SessionClosed")
      const connection = yield* DbConnection.acquire()
      yield* connection.release()
      expect(yield* reason(DbSession.batch([connection.sql`SELECT 1`]))).toBe("ConnectionReleased")
    }).pipe(Effect.scoped))
})

describe("a statement that runs where the batch does is taken", () => {
  test("one of the handle whose session it is, of the engine, of a client without transforms", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const handle = yield* DbSession.make({ autocommit: true })
      const batch = [handle.sql`SELECT 1 AS n`, sql`SELECT 2 AS n`, sql.withoutTransforms()`SELECT 3 AS n`] as const
      const three = [[{ n: 1 }], [{ n: 2 }], [{ n: 3 }]]
      expect(yield* handle.batch(batch)).toEqual(three)
      expect(yield* handle.use(DbSession.batch(batch))).toEqual(three)
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const own = Option.getOrThrow(yield* DbSession.current)
          expect(yield* withTransaction(DbSession.batch([own.sql`SELECT 1 AS n`]))).toEqual([[{ n: 1 }]])
        })
      )
    }).pipe(Effect.scoped))

  test("one of a connection, where it is ambient and in a session on it", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const handle = Option.getOrThrow(yield* DbConnection.current)
        const own = yield* handle.pid
        const batch = DbSession.batch([handle.sql<{ pid: number }>`SELECT pg_backend_pid() AS pid`])
        expect(yield* batch).toEqual([[{ pid: own }]])
        expect(yield* DbSession.autocommit(batch)).toEqual([[{ pid: own }]])
        expect(yield* DbSession.autocommit(Effect.zipRight(pid, batch))).toEqual([[{ pid: own }]])
      })
    ))

  test("one with a fragment of another client", () =>
    Effect.gen(function* () {
      const [sql, other] = [yield* client, yield* clientOfOther]
      const batch = DbSession.batch([sql`SELECT id FROM t WHERE ${other.and([other`id > 0`, other.in("id", [1])])}`])
      expect(yield* batch).toEqual([[]])
    }))
})

describe("a transformer of statements", () => {
  test("is asked for each of a batch, in a session and outside of any", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const batch = DbSession.batch([sql`SELECT 1 AS n`, sql.unsafe("SELECT 2 AS n")])
      const doubled = Statement.withTransformer(batch, (statement, sql) => {
        const [text, params] = statement.compile()
        return Effect.succeed(sql.unsafe(`SELECT n * 2 AS n FROM (${text}) AS one`, params))
      })
      expect(yield* doubled).toEqual([[{ n: 2 }], [{ n: 4 }]])
      expect(yield* DbSession.autocommit(doubled)).toEqual([[{ n: 2 }], [{ n: 4 }]])
    }))
})

describe("outside of a session its transaction begins with the engine's defaults", () => {
  const isolation = (sql: DbSql) =>
    sql<{ isolation: string }>`SELECT current_setting('transaction_isolation') AS isolation`
  const modes = (sql: DbSql) =>
    sql`SELECT current_setting('transaction_isolation') AS isolation, current_setting('transaction_read_only') AS "readOnly",
      current_setting('transaction_deferrable') AS deferrable`
  const defaults = { isolation: "serializable", readOnly: true, deferrable: true } as const
  const begun = { isolation: "serializable", readOnly: "on", deferrable: "on" }

  proxied(
    "in the same round trip, as BEGIN says them in a session",
    (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        const batch = DbSession.batch([modes(sql), modes(sql)])
        expect(yield* DbSession.autocommit(batch)).toEqual([[begun], [begun]])
        for (let i = 0; i < 2; i++) {
          proxy.reset()
          expect(yield* batch).toEqual([[begun], [begun]])
          expect(proxy.flights()).toBe(1)
        }
        expect(yield* DbConnection.withConnection(batch)).toEqual([[begun], [begun]])
      }),
    defaults
  )

  proxied(
    "and with the schema that it runs in, also behind a plan that is out of date",
    (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* DbSchema.create("acme")
        const batch = DbSession.batch([isolation(sql), sql`SELECT * FROM t`, sql`SHOW search_path`]).pipe(
          DbSchema.withSchema("public")
        )
        const run = Effect.map(batch, ([[one], , [path]]) => [one!.isolation, path])
        const first = yield* run
        expect(first[0]).toBe("repeatable read")
        yield* database.query("ALTER TABLE t ADD COLUMN more int")
        expect(yield* run).toEqual(first)
        proxy.reset()
        expect(yield* run).toEqual(first)
        expect(proxy.flights()).toBe(1)
      }),
    { isolation: "repeatable read", maxConnections: 1 }
  )

  proxied(
    "and with the tables of its schema, in one round trip also where those of another have other columns",
    (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* DbSchema.create("acme")
        yield* database.query(
          "CREATE TABLE acme.t (name text); INSERT INTO acme.t VALUES ('one'); INSERT INTO t VALUES (1)"
        )
        const batch = DbSession.batch([isolation(sql), sql`SELECT * FROM t`])
        yield* DbEngine.ping
        for (const [schema, row] of [
          ["public", { id: 1, note: null }],
          ["acme", { name: "one" }],
          ["public", { id: 1, note: null }]
        ] as const) {
          proxy.reset()
          expect(yield* DbSchema.withSchema(batch, schema)).toEqual([[{ isolation: "repeatable read" }], [row]])
          expect(proxy.flights()).toBe(1)
        }
      }),
    { isolation: "repeatable read", maxConnections: 1 }
  )

  proxied(
    "so that a write is refused where sessions are read-only, and nothing of it stays on the connection",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* DbConnection.withConnection(
          Effect.gen(function* () {
            expect(yield* reason(DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`]))).toBe("ReadOnlyError")
            expect(yield* DbConnection.status).toBe("idle")
            // Not a session: an implicit statement is as the server has it.
            yield* sql`INSERT INTO t (id) VALUES (2)`
          })
        )
        expect(yield* rows).toEqual([2])
      }),
    { readOnly: true }
  )

  proxied(
    "but not in a transaction that the user has begun on the connection, which has begun already",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* DbConnection.withConnection(
          Effect.gen(function* () {
            yield* sql`BEGIN`
            yield* sql`INSERT INTO t (id) VALUES (1)`
            const [[one]] = yield* DbSession.batch([isolation(sql), sql`INSERT INTO t (id) VALUES (2)`])
            expect(one).toEqual({ isolation: "read committed" })
            yield* sql`ROLLBACK`
          })
        )
        expect(yield* rows).toEqual([])
      }),
    { isolation: "serializable" }
  )

  proxied(
    "in a sandbox, where the level is the sandbox's, as far as a session there has them",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        const batch = DbSession.batch([modes(sql)])
        const write = DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`])
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            expect(yield* batch).toEqual(yield* DbSession.autocommit(batch))
            expect(yield* reason(write)).toBe("ReadOnlyError")
            yield* sql`INSERT INTO t (id) VALUES (2)`
          })
        )
      }),
    defaults
  )
})
