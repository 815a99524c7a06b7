import * as Reactivity from "@effect/experimental/Reactivity"
import * as PgClient from "@effect/sql-pg/PgClient"
import * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import { describe, expect, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Option, Redacted, Runtime, type Scope, Stream } from "effect"
import {
  atomic,
  DbConnection,
  DbEngine,
  DbError,
  DbLayer,
  DbQuery,
  DbSchema,
  DbSession,
  DbTransaction,
  withTransaction
} from "effect-db"
import { DbTest } from "effect-db/testing"
import { query, testDatabase } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { expectAtRest } from "./support/programs.js"
import { barrier, untilStats } from "./support/until.js"

const database = testDatabase()

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users (name) VALUES (${name})`)

const names = Effect.flatMap(DbEngine, ({ sql }) => sql<{ name: string }>`SELECT name FROM users ORDER BY name`).pipe(
  Effect.map((rows) => rows.map((_) => _.name).join(" "))
)

/** In a sandbox over a fresh table; afterwards the table is as empty as before, and nothing is borrowed. */
const sandboxed = <A, E>(effect: Effect.Effect<A, E, DbEngine | DbSession | Scope.Scope>) =>
  Effect.gen(function* () {
    const { sql } = yield* DbEngine
    yield* sql`DROP TABLE IF EXISTS users`
    yield* sql`CREATE TABLE users (name text PRIMARY KEY, boss text REFERENCES users DEFERRABLE INITIALLY DEFERRED)`
    const result = yield* DbTest.sandbox(effect)
    expect(yield* names).toBe("")
    yield* expectAtRest(database)
    return result
  }).pipe(Effect.provide(DbLayer({ url: database.url })), Effect.scoped)

describe("DbTest.sandbox", () => {
  it.live("keeps commits inside", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* DbSession.autocommit(insert("ada"))
        expect(yield* names).toBe("ada")
      })
    )
  )

  it.live("rolls back inside what the program rolls back", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* DbSession.autocommit(insert("ada"))
        yield* DbSession.autocommit(Effect.zipRight(insert("bob"), Effect.fail("no"))).pipe(Effect.ignore)
        expect(yield* names).toBe("ada")
      })
    )
  )

  it.live("plays commit, rollback, close and a new session of one program", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            const db = yield* DbSession
            yield* insert("kept")
            yield* db.commit
            yield* insert("rolled back")
            yield* db.rollback
            yield* insert("closed")
            yield* db.close
            yield* insert("new session")
          })
        )
        expect(yield* names).toBe("kept new session")
      })
    )
  )

  it.live("keeps isolated sessions inside, in parallel too", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* DbSession.autocommit(Effect.zipRight(insert("outer"), DbSession.isolated(insert("inner"))))
        yield* Effect.all(
          ["p", "q", "r", "s"].map((name) => DbSession.isolated(insert(name))),
          { concurrency: "unbounded" }
        )
        expect(yield* names).toBe("inner outer p q r s")
      })
    )
  )

  it.live("plays nested blocks", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* withTransaction(
          Effect.gen(function* () {
            yield* insert("outer")
            yield* withTransaction(Effect.zipRight(insert("inner"), Effect.fail("no"))).pipe(Effect.ignore)
          })
        )
        expect(yield* names).toBe("outer")
      })
    )
  )

  it.live("a failed implicit statement does not spoil the sandbox", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* insert("ada")
        const error = yield* Effect.flip(insert("ada"))
        expect(DbError.reason(error)?._tag).toBe("UniqueViolation")
        expect(yield* DbQuery.scalar(sql`SELECT count(*)::int FROM users`)).toEqual(Option.some(1))
      })
    )
  )

  it.live("checks deferred constraints when the program commits", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const error = yield* DbSession.autocommit(sql`INSERT INTO users VALUES ('ada', 'nobody')`).pipe(Effect.flip)
        expect(DbError.reason(error)?._tag).toBe("ForeignKeyViolation")
        yield* DbSession.autocommit(
          Effect.zipRight(sql`INSERT INTO users VALUES ('ada', 'bob')`, sql`INSERT INTO users VALUES ('bob', NULL)`)
        )
        expect(yield* names).toBe("ada bob")
      })
    )
  )

  it.live("checks deferred constraints at the end of a statement that has no session", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const refused = [
          yield* Effect.flip(sql`INSERT INTO users VALUES ('ada', 'nobody')`),
          yield* Effect.flip(DbSession.batch([sql`INSERT INTO users VALUES ('ada', 'nobody')`, sql`SELECT 1`]))
        ]
        expect(refused.map((_) => DbError.reason(_)?._tag)).toEqual(["ForeignKeyViolation", "ForeignKeyViolation"])
        yield* DbSession.batch([
          sql`INSERT INTO users VALUES ('ada', 'bob')`,
          sql`INSERT INTO users VALUES ('bob', NULL)`
        ])
        expect(yield* names).toBe("ada bob")
      })
    )
  )

  it.live("a swallowed error is TransactionAborted, as without a sandbox", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* insert("ada")
        const error = yield* DbSession.autocommit(Effect.zipRight(insert("bob"), Effect.ignore(insert("ada")))).pipe(
          Effect.flip
        )
        expect(DbError.reason(error)?._tag).toBe("TransactionAborted")
        expect(yield* names).toBe("ada")
      })
    )
  )

  it.live("settings end with the program's transaction", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* DbSession.autocommit(insert("ada"), { settings: { "app.tenant": "acme" } })
        const rows = yield* sql<{ tenant: string }>`SELECT current_setting('app.tenant', true) AS tenant`
        expect(rows[0]?.tenant ?? "").toBe("")
      })
    )
  )

  it.live("a batch outside of a session is a transaction of its own: what follows goes on", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const add = (name: string) => sql`INSERT INTO users (name) VALUES (${name})`
        yield* DbSession.batch([add("ada"), add("bob"), add("eve")])
        expect(yield* names).toBe("ada bob eve")
        yield* DbSession.batch([add("gus")])
        yield* DbConnection.withConnection(DbSession.batch([add("hal"), add("ida")]))
        yield* DbSession.isolated(DbSession.batch([add("joe"), add("kim")]))
        expect(yield* names).toBe("ada bob eve gus hal ida joe kim")
      })
    )
  )

  it.live("a batch that fails is undone as a whole, and its error is the first", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const add = (name: string) => sql`INSERT INTO users (name) VALUES (${name})`
        yield* add("ada")
        for (const batch of [
          [add("bob"), add("ada"), add("eve")],
          [add("ada"), add("bob")],
          [add("bob"), add("eve"), add("ada")]
        ]) {
          const error = yield* Effect.flip(DbSession.batch(batch))
          expect(DbError.reason(error)?._tag).toBe("UniqueViolation")
          expect(yield* names).toBe("ada")
        }
      })
    )
  )

  it.live("batches of several fibers, and of a sandbox in the sandbox", () =>
    sandboxed(
      Effect.gen(function* () {
        const add = (name: string) =>
          Effect.flatMap(DbEngine, ({ sql }) =>
            DbSession.batch([`${name}1`, `${name}2`].map((_) => sql`INSERT INTO users (name) VALUES (${_})`))
          )
        yield* Effect.forEach(["a", "b", "c"], add, { concurrency: "unbounded" })
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            yield* add("d")
            yield* Effect.ignore(add("a"))
            expect(yield* names).toBe("a1 a2 b1 b2 c1 c2 d1 d2")
          })
        )
        expect(yield* names).toBe("a1 a2 b1 b2 c1 c2")
      })
    )
  )

  it.live("what is interrupted before it is sent does not hold up the rest", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const early = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
          Effect.flatMap(Effect.fork(effect), (fiber) => Effect.zipRight(Effect.yieldNow(), Fiber.interrupt(fiber)))
        yield* early(insert("ada"))
        yield* early(DbSession.batch([sql`INSERT INTO users (name) VALUES ('bob')`, sql`SELECT 1`]))
        yield* DbSession.autocommit(Effect.zipRight(early(insert("eve")), insert("gus")))
        yield* DbSession.autocommit(early(insert("hal")))
        // The second waits in the line of the sandbox, for the transaction of the first.
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert("ida")
            const lock = yield* lockedOutside(database, 1)
            const slow = yield* Effect.fork(sql`SELECT pg_advisory_xact_lock(1)`)
            yield* lock.waitedFor
            yield* early(DbSession.isolated(Effect.zipRight(insert("joe"), insert("kim"))))
            yield* early(DbConnection.withConnection(DbSession.detach(insert("joe"))))
            yield* lock.release
            yield* Fiber.join(slow)
          })
        )
        expect(yield* names).toBe("gus ida")
      }).pipe(Effect.timeout("10 seconds"))
    )
  )

  for (const text of [
    "INSERT INTO users VALUES ('ada'); COMMIT; INSERT INTO users VALUES ('bob')",
    "INSERT INTO users VALUES ('ada'); rollback; INSERT INTO users VALUES ('bob')",
    "begin; INSERT INTO users VALUES ('ada'); end",
    "/* ; */ START TRANSACTION; INSERT INTO users VALUES ('ada'); COMMIT AND CHAIN",
    "-- one\nabort; INSERT INTO users VALUES ('bob')",
    "INSERT INTO users VALUES ('ada; '); COMMIT",
    "PREPARE TRANSACTION 'ada'",
    "COMMIT PREPARED 'ada'",
    "COMMIT AND CHAIN",
    "BEGIN READ ONLY"
  ]) {
    it.live(`a text that ends transactions is refused before it ends the sandbox's: ${text.replace(/\s+/g, " ")}`, () =>
      sandboxed(
        Effect.gen(function* () {
          const { sql } = yield* DbEngine
          const run = sql.unsafe(text)
          for (const way of [run, DbConnection.withConnection(run), DbSession.autocommit(run), DbTest.sandbox(run)]) {
            const error = yield* Effect.flip(way)
            expect(DbError.reason(error)?._tag).toBe("InvalidInput")
            expect(error.message).toContain("DbTest.database")
          }
          yield* insert("after")
          expect(yield* names).toBe("after")
        })
      )
    )
  }

  it.live("a statement of a batch that ends transactions is refused, with all of the batch", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const batch = [sql`INSERT INTO users VALUES ('ada')`, sql`COMMIT`, sql`INSERT INTO users VALUES ('bob')`]
        expect(DbError.reason(yield* Effect.flip(DbSession.batch(batch)))?._tag).toBe("InvalidInput")
        expect(yield* names).toBe("")
      })
    )
  )

  it.live("a COMMIT or ROLLBACK in a session is refused, and the session goes on", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        for (const text of ["COMMIT", "commit work", "END;", "ROLLBACK", "abort"]) {
          yield* DbSession.autocommit(
            Effect.gen(function* () {
              yield* insert(text)
              expect(DbError.reason(yield* Effect.flip(sql.unsafe(text)))?._tag).toBe("InvalidInput")
            })
          )
          yield* Effect.ignore(
            DbSession.autocommit(Effect.all([insert("no"), Effect.ignore(sql.unsafe(text)), Effect.fail("no")]))
          )
        }
        expect(yield* names).toBe("COMMIT END; ROLLBACK abort commit work")
      })
    )
  )

  it.live("plays BEGIN, COMMIT and ROLLBACK on a connection, however they are written", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const on = (...texts: ReadonlyArray<string>) =>
          DbConnection.withConnection(Effect.forEach(texts, (text) => sql.unsafe(text)))
        const add = (name: string) => `INSERT INTO users VALUES ('${name}')`
        yield* on("begin", add("a"), "commit")
        yield* on("START TRANSACTION;", add("b"), "END")
        yield* on("BEGIN WORK", add("c"), "ROLLBACK WORK")
        yield* on("begin transaction", add("d"), "abort -- all of it")
        yield* on("begin", add("e"), "begin", add("f"), "rollback")
        yield* on("begin", add("g"))
        yield* on("commit", "rollback", add("h"))
        yield* on("begin", add("i"), "savepoint s", add("j"), "rollback to s", "release s", "commit")
        expect(yield* names).toBe("a b h i")
      })
    )
  )

  it.live("words that only look like the end of a transaction are not refused", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* sql.unsafe("INSERT INTO users VALUES ('; commit'); INSERT INTO users VALUES ('; rollback;')")
        yield* sql.unsafe('SELECT 1 AS commit; /* commit; */ SELECT 2 AS "; end"; -- ; abort')
        yield* sql.unsafe("DO $$ BEGIN PERFORM 1; END; $$; SELECT CASE WHEN true THEN 1 END")
        yield* sql.unsafe(
          "CREATE FUNCTION two() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; SELECT 2; END; SELECT two()"
        )
        expect(yield* names).toBe("; commit ; rollback;")
        // What a procedure commits is refused by the server.
        yield* sql.unsafe("CREATE PROCEDURE ends() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$")
        expect(DbError.reason(yield* Effect.flip(sql`CALL ends()`))?.sqlState).toBe("2D000")
      })
    )
  )

  it.live("sandboxes nest", () =>
    sandboxed(
      Effect.gen(function* () {
        yield* DbSession.autocommit(insert("ada"))
        yield* DbTest.sandbox(Effect.zipRight(DbSession.autocommit(insert("bob")), insert("eve")))
        expect(yield* names).toBe("ada")
      })
    )
  )

  it.live("rolls back when the body fails", () =>
    sandboxed(Effect.void).pipe(
      Effect.zipRight(
        DbTest.sandbox(Effect.zipRight(insert("ada"), Effect.fail("no"))).pipe(
          Effect.flip,
          Effect.provide(DbLayer({ url: database.url }))
        )
      ),
      Effect.tap((error) => Effect.sync(() => expect(error).toBe("no"))),
      Effect.zipRight(query<{ n: number }>(database.url, "SELECT count(*)::int AS n FROM users")),
      Effect.tap((rows) => Effect.sync(() => expect(rows[0]?.n).toBe(0)))
    )
  )
})

/** As most programs have them: what a service needs is captured when its layer is built. */
class Users extends Effect.Service<Users>()("test/Users", {
  effect: Effect.gen(function* () {
    const db = yield* DbSession
    const engine = yield* DbEngine
    const connection = yield* DbConnection
    const client = yield* SqlClient.SqlClient
    const context = yield* Effect.context<DbEngine | DbSession>()
    const one = (sql: SqlClient.SqlClient, name: string) => sql`INSERT INTO users (name) VALUES (${name})`
    const captured = <A, E>(effect: Effect.Effect<A, E, DbEngine | DbSession>) => Effect.provide(effect, context)
    const inserts = {
      implicit: (name: string) => one(db.sql, name),
      autocommit: (name: string) => captured(DbSession.autocommit(one(db.sql, name))),
      isolated: (name: string) => captured(DbSession.isolated(one(engine.sql, name))),
      transaction: (name: string) => client.withTransaction(one(client, name)),
      withTransaction: (name: string) => captured(withTransaction(one(client, name))),
      atomic: (name: string) => captured(atomic(one(client, name))),
      committed: (name: string) => captured(DbSession.autocommit(Effect.zipRight(one(db.sql, name), db.commit))),
      batch: (name: string) => db.batch([one(db.sql, name), db.sql`SELECT 1`]),
      raw: (name: string) => Effect.asVoid(one(client, name).raw),
      values: (name: string) => Effect.asVoid(one(client, name).values),
      stream: (name: string) =>
        Stream.runDrain(client`INSERT INTO users (name) VALUES (${name}) RETURNING name`.stream),
      reserved: (name: string) =>
        Effect.scoped(
          Effect.flatMap(client.reserve, (_) => _.executeRaw("INSERT INTO users (name) VALUES ($1)", [name]))
        ),
      connection: (name: string) =>
        captured(DbConnection.withConnection(Effect.zipRight(connection.pid, one(client, name)))),
      scoped: (name: string) => captured(Effect.scoped(Effect.zipRight(DbSession.scoped(), one(client, name)))),
      made: (name: string) =>
        captured(Effect.scoped(Effect.flatMap(DbSession.make({ autocommit: true }), (_) => one(_.sql, name)))),
      block: (name: string) => captured(Effect.scoped(Effect.zipRight(DbTransaction.scoped(), one(client, name)))),
      layered: (name: string) => captured(Effect.provide(one(client, name), DbSession.layer())),
      detached: (name: string) => DbSession.autocommit(DbSession.detach(one(client, name))),
      daemon: (name: string) => Effect.flatMap(Effect.forkDaemon(one(client, name)), Fiber.join),
      copied: (name: string) => DbQuery.copyFrom(client`COPY users (name) FROM STDIN`, Stream.make(`${name}\n`)),
      prepared: (name: string) => one(client, name).unprepared
    } satisfies Record<string, (name: string) => Effect.Effect<unknown, SqlError, DbEngine>>
    return { db, engine, client, captured, inserts }
  })
}) {}

const ways = [
  "implicit",
  "autocommit",
  "isolated",
  "transaction",
  "withTransaction",
  "atomic",
  "committed",
  "batch",
  "raw",
  "values",
  "stream",
  "reserved",
  "connection",
  "scoped",
  "made",
  "block",
  "layered",
  "detached",
  "daemon",
  "copied",
  "prepared"
] as const

/** As `sandboxed`, with a service that was built before the sandbox and knows nothing of it. */
const withUsers = <A, E>(
  effect: Effect.Effect<A, E, DbEngine | DbSession | DbConnection | Users | SqlClient.SqlClient>
) =>
  Effect.gen(function* () {
    const { sql } = yield* DbEngine
    yield* sql`DROP TABLE IF EXISTS users`
    yield* sql`CREATE TABLE users (name text PRIMARY KEY)`
    yield* effect
    expect(yield* query(database.url, "SELECT name FROM users")).toEqual([])
    yield* untilStats("nothing is lent, or on its way back", (_) => _.used === 0)
    // And outside again it is what it was.
    const users = yield* Users
    yield* users.inserts.implicit("outside")
    yield* users.inserts.autocommit("outside too")
    expect(yield* query(database.url, "SELECT name FROM users")).toHaveLength(2)
  }).pipe(Effect.provide(Layer.provideMerge(Users.Default, DbLayer({ url: database.url }))))

describe("services that were built outside of the sandbox", () => {
  for (const way of ways) {
    it.live(`stay inside, whatever they do: ${way}`, () =>
      withUsers(
        Effect.gen(function* () {
          const users = yield* Users
          yield* DbTest.sandbox(
            Effect.gen(function* () {
              yield* users.inserts[way]("ada")
              expect(yield* names).toBe("ada")
              const rows = yield* users.client`SELECT name FROM users`
              expect(rows).toEqual([{ name: "ada" }])
            })
          )
          yield* Effect.ignore(DbTest.sandbox(Effect.zipRight(users.inserts[way]("ada"), Effect.fail("no"))))
        })
      )
    )
  }

  it.live("are in the session of the test, and what they roll back is rolled back", () =>
    withUsers(
      Effect.gen(function* () {
        const users = yield* Users
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            yield* DbSession.autocommit(
              Effect.gen(function* () {
                yield* users.inserts.implicit("ada")
                expect(yield* users.db.state).toBe("active")
                yield* users.db.rollback
                yield* users.inserts.implicit("bob")
              })
            )
            yield* Effect.ignore(
              DbSession.autocommit(Effect.zipRight(users.inserts.autocommit("eve"), Effect.fail("no")))
            )
            yield* Effect.ignore(users.captured(withTransaction(Effect.zipRight(insert("gus"), Effect.fail("no")))))
            expect(yield* names).toBe("bob")
            expect((yield* users.engine.stats).used).toBe(0)
          })
        )
      })
    )
  )

  it.live("stay inside of the innermost sandbox", () =>
    withUsers(
      Effect.gen(function* () {
        const users = yield* Users
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            const between = yield* Effect.provide(Users, Users.Default)
            yield* users.inserts.autocommit("ada")
            yield* DbTest.sandbox(
              Effect.gen(function* () {
                yield* users.inserts.autocommit("bob")
                yield* between.inserts.autocommit("eve")
                yield* DbSession.detach(users.inserts.implicit("gus"))
                expect(yield* names).toBe("ada bob eve gus")
                yield* users.captured(DbTest.sandbox(users.inserts.implicit("hal")))
                expect(yield* names).toBe("ada bob eve gus")
              })
            )
            yield* between.inserts.autocommit("ida")
            expect(yield* names).toBe("ada ida")
          })
        )
      })
    )
  )

  it.live("stay inside with the fibers, the timeouts and the races of the test", () =>
    withUsers(
      Effect.gen(function* () {
        const users = yield* Users
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            yield* Effect.forEach(["a", "b", "c"], users.inserts.autocommit, { concurrency: "unbounded" })
            yield* Effect.timeout(users.inserts.autocommit("d"), "5 seconds")
            yield* Effect.race(users.inserts.autocommit("e"), Effect.never)
            const runtime = yield* Effect.runtime()
            yield* Effect.promise(() => Runtime.runPromise(runtime)(users.inserts.autocommit("f")))
            yield* Stream.runDrain(
              Stream.mapEffect(Stream.make("g", "h"), users.inserts.autocommit, { concurrency: 2 })
            )
            expect(yield* names).toBe("a b c d e f g h")
          })
        )
      })
    )
  )

  it.live("three tests at the same time each see their own", () =>
    withUsers(
      Effect.gen(function* () {
        const users = yield* Users
        const all = yield* barrier(3)
        const one = (name: string) =>
          DbTest.sandbox(
            Effect.gen(function* () {
              yield* users.inserts.autocommit(name)
              yield* all
              expect(yield* names).toBe(name)
            })
          )
        yield* Effect.forEach(["ada", "bob", "eve"], one, { concurrency: "unbounded" })
      })
    )
  )

  it.live("a session around the sandbox is not touched, and not committed by commitAll", () =>
    withUsers(
      Effect.gen(function* () {
        const users = yield* Users
        yield* Effect.ignore(
          DbSession.autocommit(
            Effect.gen(function* () {
              yield* users.inserts.implicit("outer")
              yield* DbTest.sandbox(
                Effect.gen(function* () {
                  expect(yield* users.db.state).toBe("closed")
                  yield* users.inserts.autocommit("ada")
                  yield* DbSession.commitAll
                  expect(yield* names).toBe("ada")
                })
              )
              expect(yield* users.db.state).toBe("active")
              return yield* Effect.fail("no")
            })
          )
        )
      })
    )
  )

  it.live("what a client of somebody else's does in a sandbox is its own business", () =>
    withUsers(
      Effect.gen(function* () {
        const foreign = yield* PgClient.make({ url: Redacted.make(database.url) })
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            expect(yield* foreign`SELECT 1 AS n`).toEqual([{ n: 1 }])
            expect(yield* foreign.withTransaction(foreign`SELECT 1 AS n`)).toEqual([{ n: 1 }])
          })
        )
      }).pipe(Effect.scoped, Effect.provide(Reactivity.layer))
    )
  )

  it.live("the trace of a sandbox hears them, and names of tenants go along", () =>
    withUsers(
      Effect.gen(function* () {
        const users = yield* Users
        const { sql } = yield* DbEngine
        yield* sql`CREATE SCHEMA IF NOT EXISTS acme`
        yield* sql`DROP TABLE IF EXISTS acme.users`
        yield* sql`CREATE TABLE acme.users (name text)`
        yield* DbTest.sandbox(
          Effect.gen(function* () {
            const [, trace] = yield* DbTest.trace(users.inserts.autocommit("ada"))
            expect(trace.statements).toEqual(["BEGIN", "INSERT INTO users (name) VALUES ($1)", "COMMIT"])
            yield* DbSchema.withTenant(users.inserts.autocommit("bob"), "acme")
            expect(yield* sql`SELECT name FROM acme.users`).toEqual([{ name: "bob" }])
          })
        )
        yield* DbSchema.withTenant(
          DbTest.sandbox(
            Effect.gen(function* () {
              yield* users.inserts.autocommit("eve")
              expect(yield* DbSession.detach(sql`SELECT name FROM acme.users`)).toEqual([{ name: "eve" }])
            })
          ),
          "acme"
        )
      })
    )
  )
})

describe("DbTest.layer", () => {
  // The database exists when the tests run, not yet when they are collected.
  it.layer(Layer.unwrapEffect(Effect.sync(() => DbTest.layer({ url: database.url }))))("with it.layer", (it) => {
    it.effect("tests share the sandbox of their group", () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* DbSession.autocommit(sql`CREATE TABLE only_here (n int)`)
        yield* sql`INSERT INTO only_here VALUES (1)`
        const outside = yield* query<{ found: boolean }>(
          database.url,
          "SELECT to_regclass('only_here') IS NOT NULL AS found"
        )
        expect(outside[0]?.found).toBe(false)
      })
    )

    it.effect("and see what those before them did", () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        expect(yield* sql`SELECT n FROM only_here`).toEqual([{ n: 1 }])
      })
    )
  })
})

const exists = (name: string) =>
  Effect.map(
    query<{ found: boolean }>(database.url, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1) AS found", [
      name
    ]),
    (rows) => rows[0]?.found
  )

describe("DbTest.database", () => {
  it.live("creates a database for its scope and drops it at the end, others attached or not", () =>
    Effect.gen(function* () {
      const name = yield* Effect.scoped(
        Effect.gen(function* () {
          const own = yield* DbTest.database({ url: database.url, prefix: "spec" })
          expect(own.name).toMatch(/^spec_/)
          // Still attached when it is dropped.
          const other = yield* Effect.flatMap(
            DbEngine,
            ({ sql }) => sql<{ name: string }>`SELECT current_database() AS name`
          ).pipe(Effect.provide(own.layer))
          expect(other[0]?.name).toBe(own.name)
          expect(yield* exists(own.name)).toBe(true)
          return own.name
        })
      )
      expect(yield* exists(name)).toBe(false)
    })
  )

  it.live("a failing body still drops it", () =>
    Effect.gen(function* () {
      let name = ""
      yield* Effect.scoped(
        Effect.flatMap(DbTest.database({ url: database.url }), (own) => {
          name = own.name
          return Effect.fail("no")
        })
      ).pipe(Effect.ignore)
      expect(yield* exists(name)).toBe(false)
    })
  )

  it.live("copies a template", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const template = yield* DbTest.database({ url: database.url, prefix: "template" })
        yield* query(database.url.replace(database.database, template.name), "CREATE TABLE ready (n int)")
        const copy = yield* DbTest.database({ url: database.url, template: template.name })
        const found = yield* Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT * FROM ready`).pipe(
          Effect.provide(copy.layer)
        )
        expect(found).toEqual([])
      })
    )
  )

  it.live("useExisting keeps the tables that are there, and the database", () =>
    Effect.gen(function* () {
      const outer = yield* DbTest.database({ url: database.url, prefix: "existing" })
      yield* query(database.url.replace(database.database, outer.name), "CREATE TABLE kept (n int)")
      yield* Effect.scoped(
        Effect.gen(function* () {
          const again = yield* DbTest.database({ url: database.url, name: outer.name, useExisting: true })
          const rows = yield* Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT * FROM kept`).pipe(
            Effect.provide(again.layer)
          )
          expect(rows).toEqual([])
        })
      )
      expect(yield* exists(outer.name)).toBe(true)
    }).pipe(Effect.scoped)
  )
})

describe("the pg client of a connection that is played", () => {
  for (const [name, raw] of [
    ["of the ambient connection", DbConnection.withConnection(DbConnection.raw)],
    ["of a handle", Effect.scoped(Effect.flatMap(DbConnection.acquire(), (_) => _.raw))]
  ] as const) {
    it.live(`${name} is refused with InvalidInput, which names DbTest.database`, () =>
      sandboxed(
        Effect.gen(function* () {
          const error = yield* Effect.flip(raw)
          expect(DbError.reason(error)).toMatchObject({ _tag: "InvalidInput", isRetryable: false })
          expect(error.message).toContain("DbTest.database")
          // Nothing else has become of the connection.
          yield* DbConnection.withConnection(insert("ada"))
          expect(yield* names).toBe("ada")
        })
      )
    )
  }
})

describe("what the words call the limits of a sandbox", () => {
  it.live("now() is when it began, and clock_timestamp() goes on", () =>
    sandboxed(
      Effect.gen(function* () {
        const times = Effect.flatMap(
          DbSession,
          ({ sql }) => sql<{ now: Date; clock: Date }>`SELECT now() AS now, clock_timestamp() AS clock`
        ).pipe(Effect.map((rows) => rows[0]!))
        const before = yield* DbSession.autocommit(times)
        yield* Effect.sleep("20 millis")
        const after = yield* DbSession.autocommit(times)
        expect(after.now).toEqual(before.now)
        expect(after.clock.getTime()).toBeGreaterThan(before.clock.getTime())
      })
    )
  )

  it.live("what must not run in a transaction is refused by the server, and the sandbox goes on", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const error = yield* Effect.flip(sql`VACUUM`)
        expect(DbError.reason(error)?.sqlState).toBe("25001")
        yield* DbSession.autocommit(insert("ada"))
        expect(yield* names).toBe("ada")
      })
    )
  )

  it.live("a NOTIFY is not heard", () =>
    sandboxed(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const heard = yield* Effect.fork(Stream.runHead(sql.listen("news")))
        yield* Effect.sleep("100 millis")
        yield* DbSession.autocommit(sql.notify("news", "x"))
        yield* Effect.sleep("100 millis")
        expect(Option.isNone(yield* Fiber.poll(heard))).toBe(true)
        yield* Fiber.interrupt(heard)
      })
    )
  )
})
