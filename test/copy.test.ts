import { describe, expect, it } from "@effect/vitest"
import { Chunk, Deferred, Effect, Fiber, Option, Stream } from "effect"
import { DbConnection, DbEngine, DbError, DbLayer, DbQuery, DbSession } from "effect-db"
import { PassThrough, type Duplex } from "node:stream"
import Pg from "pg"
import { Command, type Pipeline } from "../src/internal/pipeline.js"
import { testDatabase, untilActivity } from "./support/database.js"
import { pipelineOn } from "./support/pipelines.js"
import { expectAtRest, quietly } from "./support/programs.js"

const database = testDatabase()

const lines = (from: number, to: number) =>
  Stream.range(from, to).pipe(
    Stream.map((n) => `${n},row ${n}\n`),
    Stream.rechunk(500)
  )

const count = Effect.flatMap(DbEngine, ({ sql }) => DbQuery.scalar<string>(sql`SELECT count(*) FROM entries`)).pipe(
  Effect.map((n) => Number(Option.getOrThrow(n)))
)

/** A fresh table; afterwards everything is at rest. */
const run = <A, E>(effect: Effect.Effect<A, E, DbEngine | DbSession>) =>
  Effect.gen(function* () {
    const { sql } = yield* DbEngine
    yield* sql`DROP TABLE IF EXISTS entries`
    yield* sql`CREATE TABLE entries (id int PRIMARY KEY, name text)`
    const result = yield* effect
    yield* expectAtRest(database)
    return result
  }).pipe(Effect.provide(quietly(DbLayer({ url: database.url, maxConnections: 1 }))))

describe("COPY", () => {
  it.live("copyFrom sends a stream of 100 000 lines and says how many rows arrived", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const done = yield* DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, lines(1, 100_000))
        expect(done).toEqual({ command: "COPY", rowCount: 100_000 })
        expect(yield* count).toBe(100_000)
      })
    )
  )

  it.live("a statement on the connection of a copyFrom waits until that has sent its data", () =>
    run(
      DbConnection.withConnection(
        Effect.gen(function* () {
          const { sql } = yield* DbEngine
          const [taken, more] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
          const source = Stream.concat(
            Stream.fromEffect(Effect.as(Deferred.succeed(taken, undefined), "1,one\n")),
            Stream.fromEffect(Effect.as(Deferred.await(more), "2,two\n"))
          )
          const copying = yield* Effect.fork(DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, source))
          yield* Deferred.await(taken)
          const behind = yield* Effect.fork(count)
          // By now it would have gone out.
          yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          yield* Deferred.succeed(more, undefined)
          expect(yield* Fiber.join(copying)).toEqual({ command: "COPY", rowCount: 2 })
          expect(yield* Fiber.join(behind)).toBe(2)
        })
      )
    )
  )

  it.live("copyFrom runs in the ambient session and is undone with it", () =>
    run(
      Effect.gen(function* () {
        const error = yield* Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, lines(1, 10))
          expect(yield* count).toBe(10)
          return yield* Effect.fail("undo")
        }).pipe(DbSession.autocommit, Effect.flip)
        expect(error).toBe("undo")
        expect(yield* count).toBe(0)
      })
    )
  )

  it.live("a statement of a sibling fiber waits for the copy and gets its own answer", () =>
    run(
      DbSession.autocommit(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const [copied, rows] = yield* Effect.all(
            [
              DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, lines(1, 1000)),
              sql<{ n: string }>`SELECT count(*) AS n FROM entries`
            ],
            { concurrency: "unbounded" }
          )
          expect(copied.rowCount).toBe(1000)
          expect(rows[0]?.n).toBe("1000")
        })
      )
    )
  )

  it.live("a source that fails undoes the whole copy, and its error is the result", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const source = Stream.concat(lines(1, 5000), Stream.fail("no more"))
        const error = yield* Effect.flip(DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, source))
        expect(error).toBe("no more")
        expect(yield* count).toBe(0)
      })
    )
  )

  it.live("an interrupted copy leaves nothing, and the connection serves the next borrower", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const reached = yield* Deferred.make<void>()
        const source = Stream.concat(
          lines(1, 1000),
          Stream.fromEffect(Effect.zipRight(Deferred.succeed(reached, undefined), Effect.never))
        )
        const fiber = yield* Effect.fork(DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, source))
        yield* Deferred.await(reached)
        yield* Fiber.interrupt(fiber)
        expect(yield* count).toBe(0)
      })
    )
  )

  it.live("a row that the server refuses is a typed error, and nothing is kept", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const error = yield* Effect.flip(
          DbQuery.copyFrom(sql`COPY entries FROM STDIN WITH (FORMAT csv)`, Stream.make("1,a\n", "1,b\n"))
        )
        expect(DbError.reason(error)?._tag).toBe("UniqueViolation")
        expect(yield* count).toBe(0)
      })
    )
  )

  it.live("copyFrom refuses a statement that is not COPY FROM STDIN before anything is sent", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const error = yield* Effect.flip(DbQuery.copyFrom(sql`SELECT 1`, Stream.empty))
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
      })
    )
  )

  it.live("COPY FROM STDIN without a source is a typed error, and the connection is usable", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const error = yield* Effect.flip(sql`COPY entries FROM STDIN`)
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
        expect(yield* count).toBe(0)
      })
    )
  )

  for (const [what, text] of [
    ["behind a comment", "/* all; of */ COPY -- them\n entries FROM STDIN"],
    ["behind comments in comments", "/* a /* b */ ; */ COPY entries FROM STDIN"],
    ["by the other name that the server takes for it", "COPY entries FROM STDOUT"],
    ["into a table with a semicolon in its name", 'COPY "a;b" FROM STDIN']
  ] as const) {
    it.live(`COPY FROM STDIN ${what} without a source is the same error, and can't be tried again`, () =>
      run(
        Effect.gen(function* () {
          const { sql } = yield* DbEngine
          yield* sql`CREATE TABLE IF NOT EXISTS "a;b" (id int)`
          const reason = DbError.reason(yield* Effect.flip(sql.unsafe(text)))
          expect(reason).toMatchObject({ _tag: "InvalidInput", isRetryable: false })
          expect(reason?.message).toContain("no data to give")
          expect(yield* count).toBe(0)
        })
      )
    )
  }

  for (const text of [
    "/* data */ COPY entries FROM STDIN",
    "/* a /* b */ ; */ COPY entries FROM STDIN",
    'COPY "a;b" FROM STDIN',
    'COPY "a;(b" ("x;)y") FROM STDIN WITH (DELIMITER \';\')',
    "COPY public.from FROM STDIN",
    "COPY entries FROM STDOUT",
    "COPY entries TO STDOUT"
  ]) {
    it.live(`${text} as a statement is refused, and leaves its siblings what they do`, () =>
      run(
        Effect.gen(function* () {
          const { sql } = yield* DbEngine
          const insert = (id: number) => sql`INSERT INTO entries VALUES (${id})`
          const copy = Effect.flip(sql.unsafe(text))
          const [, error] = yield* DbSession.autocommit(Effect.all([insert(1), copy, insert(2)], { concurrency: 3 }))
          expect(DbError.reason(error)).toMatchObject({ _tag: "InvalidInput" })
          expect(DbError.reason(error)?.hint).toContain(text.includes(" TO ") ? "DbQuery.copyTo" : "DbQuery.copyFrom")
          expect(yield* count).toBe(2)
        })
      )
    )
  }

  it.live("what only looks like a COPY is run", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        for (const said of [
          "'; COPY entries FROM STDIN'",
          "E'\\'; COPY entries FROM STDIN'",
          "$a$'; COPY entries FROM STDIN$a$",
          '1 AS "\'; COPY entries FROM STDIN"'
        ]) {
          expect(yield* sql.unsafe(`SELECT ${said}`)).toHaveLength(1)
        }
        yield* sql`CREATE TABLE IF NOT EXISTS stdin (id int)`
        yield* sql`COPY (SELECT id FROM stdin) TO '/dev/null'`
        const rows = DbQuery.copyTo(sql`COPY (SELECT id FROM stdin) TO STDOUT`)
        expect(Chunk.toReadonlyArray(yield* Stream.runCollect(rows))).toEqual([])
      })
    )
  )

  it.live("copyFrom takes a COPY with comments", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const copy = sql.unsafe("/* loads */ COPY entries FROM /* the */ STDIN WITH (FORMAT csv)")
        expect((yield* DbQuery.copyFrom(copy, lines(1, 10))).rowCount).toBe(10)
      })
    )
  )

  it.live("copyTo streams what the server sends", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const text = yield* DbQuery.copyTo(
          sql`COPY (SELECT n, 'x' FROM generate_series(1, 3) n) TO STDOUT WITH (FORMAT csv)`
        ).pipe(Stream.decodeText(), Stream.mkString)
        expect(text).toBe("1,x\n2,x\n3,x\n")
      })
    )
  )

  it.live("copyTo whose session is rolled back meanwhile fails, though the server has sent all of it", () =>
    run(
      DbSession.autocommit(
        Effect.gen(function* () {
          const { rollback, sql } = yield* DbSession
          const [begun, go] = [yield* Deferred.make<void>(), yield* Deferred.make<void>()]
          const held = Effect.zipRight(Deferred.succeed(begun, undefined), Deferred.await(go))
          // More than is kept for a slow consumer; the rest waits in the socket.
          const text = sql`COPY (SELECT repeat('x', 999) FROM generate_series(1, 1500)) TO STDOUT`
          const reader = yield* Effect.forkDaemon(Stream.runForEachChunk(DbQuery.copyTo(text), () => held))
          yield* Deferred.await(begun)
          yield* untilActivity(database.url, (_) => _.idleInTransaction === 1)
          yield* rollback
          yield* Deferred.succeed(go, undefined)
          const error = yield* Effect.flip(Fiber.join(reader))
          expect(DbError.reason(error)?._tag).toBe("QueryCanceled")
        })
      )
    )
  )

  it.live("leaving copyTo half-way ends the statement on the server", () =>
    run(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const some = yield* DbQuery.copyTo(sql`COPY (SELECT generate_series(1, 1000000000)) TO STDOUT`).pipe(
          Stream.take(3),
          Stream.runCollect
        )
        expect(Chunk.size(some)).toBe(3)
        yield* untilActivity(database.url, (activity) => activity.active === 0)
        expect(yield* count).toBe(0)
      })
    )
  )
})

// As a server of another make, or with strings of another kind, may take a text.
describe("a COPY that the text does not tell of", () => {
  /** A pipeline on the socket of a logged-in client: nothing looks at its texts. */
  const onServer = (name: string, body: (pipeline: Pipeline, send: Send) => Promise<void>): void =>
    it(name, async () => {
      const client = new Pg.Client({ connectionString: database.url })
      client.on("error", () => {})
      await client.connect()
      await client.query("DROP TABLE IF EXISTS entries; CREATE TABLE entries (id int PRIMARY KEY, name text)")
      const { stream } = (client as unknown as { readonly connection: { readonly stream: Duplex } }).connection
      stream.removeAllListeners("data")
      const pipeline = pipelineOn(stream)
      stream.on("data", pipeline.onData)
      stream.on("close", () => pipeline.die(new Error("closed"), "read"))
      const send: Send = (text, solo) =>
        new Promise((resolve) =>
          pipeline.submit(
            new Command(text, [], "array", solo, false, false, undefined, (error, result) =>
              resolve(error?.reason._tag ?? result!.rows)
            )
          )
        )
      await body(pipeline, send).finally(() => stream.destroy())
    })
  type Send = (text: string, solo: boolean) => Promise<unknown>

  for (const solo of [true, false]) {
    onServer(`FROM STDIN alone ${solo ? "outside" : "inside"} of a transaction`, async (pipeline, send) => {
      expect(await send("COPY entries FROM STDIN", solo)).toBe("InvalidInput")
      expect(await send("SELECT 1", solo)).toEqual([[1]])
      expect(pipeline.dead).toBeUndefined()
    })
  }

  onServer("FROM STDIN among others of its transaction: that has failed, typed", async (_, send) => {
    await send("BEGIN", false)
    const others = [send("SELECT 1", false), send("COPY entries FROM STDIN", false), send("SELECT 2", false)]
    expect(await Promise.all(others)).toEqual([[[1]], "InvalidInput", "InvalidInput"])
    // Older servers go on, newer ones end the connection.
    expect(["ConnectionError", []]).toContainEqual(await send("ROLLBACK", true))
  })

  it("FROM STDIN among others of its transaction: an older server, which goes on at their Sync, is sent no other", async () => {
    const stream = new PassThrough()
    const pipeline = pipelineOn(stream)
    const turn = () => new Promise((resolve) => setImmediate(resolve))
    for (const text of ["COPY entries FROM STDIN", "SELECT 2"]) {
      pipeline.submit(new Command(text, [], "array", false, false, false, undefined, () => {}))
    }
    await turn()
    stream.read()
    const message = (type: string, body = "") => `${type}\0\0\0${String.fromCharCode(4 + body.length)}${body}`
    pipeline.onData(Buffer.from(message("1") + message("2") + message("n") + message("G", "\0\0\0")))
    await turn()
    expect(stream.read()).toBeNull()
    pipeline.die(new Error("the end"), "read")
  })

  onServer(
    "FROM STDIN before what is no part of its transaction ends the connection, typed",
    async (pipeline, send) => {
      const others = [send("SELECT 1", true), send("COPY entries FROM STDIN", true), send("SELECT 2", true)]
      expect(await Promise.all(others)).toEqual([[[1]], "ConnectionError", "ConnectionError"])
      expect(pipeline.dead).toBeDefined()
    }
  )

  onServer("TO STDOUT among others: what comes is dropped, and that is said", async (pipeline, send) => {
    const others = [
      send("INSERT INTO entries VALUES (1)", true),
      send("COPY entries TO STDOUT", true),
      send("SELECT 2", true)
    ]
    expect(await Promise.all(others)).toEqual([[], "InvalidInput", [[2]]])
    expect(pipeline.dead).toBeUndefined()
  })
})
