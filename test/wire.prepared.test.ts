import { DbConnection, DbEngine, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import { PassThrough } from "node:stream"
import { describe, expect, it } from "vitest"
import { Command } from "../src/internal/pipeline.js"
import { testDatabase } from "./support/database.js"
import { messagesOf, pipelineOn } from "./support/pipelines.js"
import type { Wired } from "./support/wired.js"
import { executes, freshTable, one, reasonOf, run, wired } from "./support/wired.js"

const database = testDatabase()

freshTable(database, 1)

/** The statements that were parsed: the name and the text of each. */
const parses = (at: Wired, pattern: RegExp): Array<string> =>
  at.proxy.log
    .filter((_) => _.dir === "frontend" && _.type === "P" && pattern.test(_.text))
    .map((_) => (_.name === "" ? "unnamed" : "named"))

const closes = (at: Wired): Array<string> =>
  at.proxy.log.filter((_) => _.dir === "frontend" && _.type === "C").map((_) => _.text)

// A comment in front: not worth a name, so that asking changes nothing.
const namesOnServer = run("/* unnamed */ SELECT count(*)::int AS n FROM pg_prepared_statements").pipe(
  Effect.map((rows) => rows[0]?.["n"])
)

describe("named statements", () => {
  wired(database, "one Parse serves many executions, in and out of transactions", one, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const find = (id: number) => sql`SELECT id FROM t WHERE id = ${id}`
      for (const id of [1, 2, 3]) expect(yield* find(id)).toEqual(id === 1 ? [{ id }] : [])
      yield* DbSession.autocommit(Effect.all([find(1), find(1)], { concurrency: 2 }))
      expect(parses(at, /^SELECT id/)).toEqual(["named"])
      expect(at.proxy.log.filter(executes(/^SELECT id/)).length).toBe(5)
    })
  )

  wired(database, "a known statement is not described again", one, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT id FROM t")
      yield* run("SELECT id FROM t")
      expect(at.proxy.log.filter((_) => _.dir === "frontend" && _.type === "D").length).toBe(1)
    })
  )

  wired(database, "the one used least recently makes room", { ...one, preparedStatements: 2 }, (at) =>
    Effect.gen(function* () {
      for (const letter of ["a", "b", "a", "c"]) yield* run(`SELECT '${letter}' AS x`)
      expect(closes(at)).toEqual(["SELECT 'b' AS x"])
      at.proxy.reset()
      for (const letter of ["a", "c", "b"]) expect(yield* run(`SELECT '${letter}' AS x`)).toEqual([{ x: letter }])
      expect(parses(at, /'[ac]'/)).toEqual([])
      expect(parses(at, /'b'/)).toEqual(["named"])
      expect(yield* namesOnServer).toBe(2)
    })
  )

  wired(
    database,
    "the server never keeps more names than the limit, however many fail",
    { ...one, preparedStatements: 2 },
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        for (let i = 0; i < 5; i++) {
          // What follows the failure, the Close for the second's name too, is not run.
          yield* Effect.ignore(
            DbSession.batch([sql.unsafe(`SELECT ${i}/0`), sql.unsafe(`SELECT 'x${i}'`), sql.unsafe(`SELECT 'y${i}'`)])
          )
          yield* run(`SELECT 'z${i}'`)
        }
        yield* run("SELECT 'end'")
        expect(yield* namesOnServer).toBe(2)
      })
  )

  wired(
    database,
    "preparedStatements: false sends every statement unnamed",
    { ...one, preparedStatements: false },
    (at) =>
      Effect.gen(function* () {
        yield* run("SELECT id FROM t")
        yield* run("SELECT id FROM t")
        yield* withTransaction(run("SELECT id FROM t"))
        expect(parses(at, /./).filter((_) => _ !== "unnamed")).toEqual([])
        expect(parses(at, /^SELECT id/).length).toBe(3)
        expect(yield* namesOnServer).toBe(0)
      })
  )

  wired(database, "while its Parse is in flight a statement is used unnamed, and named afterwards", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const rows = yield* Effect.all([run("SELECT id FROM t"), run("SELECT id FROM t")], { concurrency: 2 })
        expect(rows).toEqual([[{ id: 1 }], [{ id: 1 }]])
        yield* run("SELECT id FROM t")
        expect(parses(at, /^SELECT id/)).toEqual(["named", "unnamed"])
      })
    )
  )

  wired(database, "a Parse that fails does not poison its siblings", one, () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const missing = Effect.map(reasonOf(run("SELECT id FROM missing")), (_) => _.sqlState)
        const states = yield* Effect.all([missing, missing, missing], { concurrency: 3 })
        expect(states).toEqual(["42P01", "42P01", "42P01"])
        yield* database.query("CREATE TABLE missing (id int)")
        expect(yield* run("SELECT id FROM missing")).toEqual([])
        yield* database.query("DROP TABLE missing")
      })
    )
  )
})

describe("statements that the server has forgotten or may not use any more", () => {
  wired(
    database,
    "FAULTS 31: outside a transaction a changed result type is healed on the same connection",
    one,
    (at) =>
      Effect.gen(function* () {
        expect(yield* run("SELECT * FROM t")).toEqual([{ id: 1 }])
        yield* database.query("ALTER TABLE t ADD COLUMN note text DEFAULT 'new'")
        expect(yield* run("SELECT * FROM t")).toEqual([{ id: 1, note: "new" }])
        expect(yield* run("SELECT * FROM t")).toEqual([{ id: 1, note: "new" }])
        expect(at.proxy.accepted).toBe(1)
        expect(yield* namesOnServer).toBe(1)
      })
  )

  wired(database, "FAULTS 31: a batch is healed as a whole", one, () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const batch = DbSession.batch([sql`INSERT INTO t VALUES (2)`, sql`SELECT * FROM t ORDER BY id`])
      yield* batch
      yield* database.query("ALTER TABLE t ADD COLUMN note text")
      yield* batch
      expect((yield* database.query("SELECT FROM t")).length).toBe(3)
    })
  )

  wired(
    database,
    "FAULTS 31: inside a transaction it fails, typed, and the connection is destroyed afterwards",
    one,
    (at) =>
      Effect.gen(function* () {
        yield* run("SELECT * FROM t")
        yield* database.query("ALTER TABLE t ADD COLUMN note text")
        const reason = yield* reasonOf(withTransaction(run("SELECT * FROM t")))
        expect(reason.sqlState).toBe("0A000")
        yield* withTransaction(run("SELECT * FROM t"))
        expect(at.proxy.accepted).toBe(2)
      })
  )

  for (const text of ["DISCARD ALL", "DEALLOCATE ALL"]) {
    wired(database, `after ${text} statements are parsed again`, { ...one, resetOnRelease: "never" }, (at) =>
      Effect.gen(function* () {
        yield* run("SELECT id FROM t")
        yield* run(text)
        expect(yield* withTransaction(run("SELECT id FROM t"))).toEqual([{ id: 1 }])
        expect(parses(at, /^SELECT id/)).toEqual(["named", "named"])
        expect(at.proxy.accepted).toBe(1)
      })
    )
  }

  const behindOurBack = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"

  wired(database, "26000 is healed outside a transaction", { ...one, resetOnRelease: "never" }, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT id FROM t")
      yield* run(behindOurBack)
      expect(yield* run("SELECT id FROM t")).toEqual([{ id: 1 }])
      expect(at.proxy.accepted).toBe(1)
    })
  )

  wired(database, "26000 of a BEGIN is that of its statement, and the session goes on", one, () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* withTransaction(run("SELECT id FROM t"))
        yield* run(behindOurBack)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            expect((yield* reasonOf(run("SELECT id FROM t"))).sqlState).toBe("26000")
            expect(yield* run("SELECT id FROM t")).toEqual([{ id: 1 }])
          })
        )
      })
    )
  )

  wired(database, "26000 inside a transaction is typed, and the connection is destroyed afterwards", one, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT id FROM t")
      const work = withTransaction(Effect.zipRight(run(behindOurBack), run("SELECT id FROM t")))
      expect((yield* reasonOf(work)).sqlState).toBe("26000")
      expect(yield* run("SELECT id FROM t")).toEqual([{ id: 1 }])
      expect(at.proxy.accepted).toBe(2)
    })
  )
})

describe("a statement of ours that rides in front", () => {
  it("and was skipped behind one that failed gets its name the next time", async () => {
    const stream = new PassThrough()
    const pipeline = pipelineOn(stream)
    const send = async (...texts: ReadonlyArray<string>): Promise<ReadonlyArray<string>> => {
      const prefix = texts.map((text) => ({ text, params: [], opens: false, named: true }))
      const owner = { takePrefix: () => prefix }
      pipeline.submit(new Command("SELECT 1", [], "array", false, false, false, owner, () => {}))
      await new Promise((resolve) => setImmediate(resolve))
      return messagesOf(stream.read() as Buffer)
        .filter(({ type }) => type === "P")
        .map(({ bytes }) => (bytes[5] === 0 ? "unnamed" : "named"))
    }
    expect(await send("SELECT 'fails'", "SELECT 'skipped'")).toEqual(["named", "named", "unnamed"])
    const fields = Buffer.from("SERROR\0VERROR\0C22012\0Mdivision by zero\0\0")
    const head = Buffer.from("E\0\0\0\0")
    head.writeUInt32BE(fields.length + 4, 1)
    pipeline.onData(Buffer.concat([head, fields, Buffer.from("Z\0\0\0\u0005I")]))
    expect(await send("SELECT 'skipped'")).toEqual(["named", "unnamed"])
  })
})
