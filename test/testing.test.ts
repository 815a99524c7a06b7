import { describe, expect, it } from "@effect/vitest"
import { Effect, Fiber, Layer, Option } from "effect"
import { DbConnection, DbEngine, DbError, DbLayer, DbQuery, DbSession, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { query, testDatabase } from "./support/database.js"

const database = testDatabase()

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users (name) VALUES (${name})`)

const names = Effect.flatMap(DbEngine, ({ sql }) => sql<{ name: string }>`SELECT name FROM users ORDER BY name`).pipe(
  Effect.map((rows) => rows.map((_) => _.name).join(" "))
)

/** In a sandbox over a fresh table; afterwards the table is as empty as before, and nothing is borrowed. */
const sandboxed = <A, E>(effect: Effect.Effect<A, E, DbEngine | DbSession>) =>
  Effect.gen(function* () {
    const { sql } = yield* DbEngine
    yield* sql`DROP TABLE IF EXISTS users`
    yield* sql`CREATE TABLE users (name text PRIMARY KEY, boss text REFERENCES users DEFERRABLE INITIALLY DEFERRED)`
    const result = yield* DbTest.sandbox(effect)
    expect(yield* names).toBe("")
    const stats = yield* DbEngine.stats
    expect({ used: stats.used, pending: stats.pending }).toEqual({ used: 0, pending: 0 })
    return result
  }).pipe(Effect.provide(DbLayer({ url: database.url })))

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
            const slow = yield* Effect.fork(sql`SELECT pg_sleep(0.1)`)
            yield* early(DbSession.isolated(Effect.zipRight(insert("joe"), insert("kim"))))
            yield* early(DbConnection.withConnection(DbSession.detach(insert("joe"))))
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
