import { PgClient, PgMigrator } from "@effect/sql-pg"
import { NodeContext } from "@effect/platform-node"
import { Reactivity } from "@effect/experimental"
import { Migrator, Model, SqlClient, SqlResolver, SqlSchema, Statement } from "@effect/sql"
import { describe } from "@effect/vitest"
import { Cause, Chunk, Deferred, Effect, Exit, Fiber, Option, Redacted, Schema, Stream } from "effect"
import { DbConnection, DbEngine, DbError, DbLayer, DbSession, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import {
  committed,
  insert,
  pid,
  programsOn,
  proxiedOn,
  quietly,
  reason,
  seen,
  used,
  whileFull
} from "./support/programs.js"
import { until } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

/** What the ecosystem's modules find: our client, under their tag. */
const client = SqlClient.SqlClient

/** In a session that is rolled back: whatever the effect wrote on another connection would survive. */
const rolledBack = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.gen(function* () {
    const result = yield* DbSession.autocommit(Effect.zipLeft(effect, DbSession.rollback))
    expect(yield* committed(database)).toEqual([])
    return result
  })

const Row = Schema.Struct({ id: Schema.Number, note: Schema.NullOr(Schema.String) })

describe("SqlClient", () => {
  test("is the client of session, engine and PgClient as well", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect((yield* DbEngine).sql).toBe(sql)
      expect((yield* DbSession).sql).toBe(sql)
      expect(yield* PgClient.PgClient).toBe(sql)
      expect(sql[SqlClient.TypeId]).toBe(SqlClient.TypeId)
    }))

  test("withTransaction opens, commits and closes outside of a session", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect(yield* sql.withTransaction(Effect.zipRight(insert(1), pid))).toBeGreaterThan(0)
      expect(yield* committed(database)).toEqual([1])
      expect(yield* used).toBe(0)
      expect(yield* Effect.flip(sql.withTransaction(Effect.zipRight(insert(2), Effect.fail("no"))))).toBe("no")
      expect(yield* committed(database)).toEqual([1])
    }))

  test("withTransaction in a session is a savepoint of it", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* rolledBack(
        Effect.gen(function* () {
          yield* insert(1)
          yield* sql.withTransaction(insert(2))
          yield* Effect.ignore(sql.withTransaction(Effect.zipRight(insert(3), Effect.fail("no"))))
          expect(yield* seen).toEqual([1, 2])
        })
      )
    }))

  test("has the helpers of its dialect", () =>
    rolledBack(
      Effect.gen(function* () {
        const sql = yield* client
        yield* sql`INSERT INTO t ${sql.insert([
          { id: 1, note: "a" },
          { id: 2, note: "b" }
        ])}`
        yield* sql`UPDATE t SET ${sql.update({ id: 1, note: "c" }, ["id"])} WHERE id = ${1}`
        const rows = yield* sql`SELECT * FROM ${sql("t")} WHERE ${sql.and([sql.in("id", [1, 2]), sql`note = ${"c"}`])}`
        expect(rows).toEqual([{ id: 1, note: "c" }])
        const pg = yield* PgClient.PgClient
        expect(yield* pg`SELECT ${pg.json({ a: [1] })}::jsonb AS v`).toEqual([{ v: { a: [1] } }])
        expect(sql.onDialectOrElse({ pg: () => "pg", orElse: () => "other" })).toBe("pg")
      })
    ))

  test(
    "withoutTransforms gives rows as the server names them",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        expect(yield* sql`SELECT 1 AS a_b`).toEqual([{ aB: 1 }])
        expect(yield* sql.withoutTransforms()`SELECT 1 AS a_b`).toEqual([{ a_b: 1 }])
        expect(yield* sql`SELECT 1 AS a_b`.withoutTransform).toEqual([{ a_b: 1 }])
      }),
    { transformResultNames: (name) => name.replace(/_(.)/g, (_, c: string) => c.toUpperCase()) }
  )

  test("reserve borrows a connection of its own, which is in no session and which nobody reuses", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* insert(1)
        const sql = yield* client
        yield* Effect.scoped(
          Effect.gen(function* () {
            const reserved = yield* sql.reserve
            const [[own]] = (yield* reserved.executeValues("SELECT pg_backend_pid()", [])) as [[number]]
            expect(own).not.toBe(yield* pid)
            expect(yield* reserved.execute("SELECT id FROM t", [], undefined)).toEqual([])
            expect(yield* reserved.executeUnprepared("SELECT 1 AS n", [], undefined)).toEqual([{ n: 1 }])
            expect(yield* DbConnection.withConnection(pid)).toBe(yield* pid)
            expect(yield* used).toBe(2)
          })
        )
        expect(yield* used).toBe(1)
      })
    ))

  test("a reserved connection that outlives its scope is ConnectionReleased", () =>
    Effect.gen(function* () {
      const reserved = yield* Effect.scoped(Effect.flatMap(client, (sql) => sql.reserve))
      expect(yield* reason(reserved.execute("SELECT 1", [], undefined))).toBe("ConnectionReleased")
    }))

  test("reactive runs again when its keys are invalidated, in the session of whoever reads", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const reactivity = yield* Reactivity.make
      yield* rolledBack(
        Effect.gen(function* () {
          const first = yield* Deferred.make<void>()
          const reading = yield* Effect.fork(
            sql.reactive(["t"], seen).pipe(
              Stream.tap(() => Deferred.succeed(first, undefined)),
              Stream.take(2),
              Stream.runCollect
            )
          )
          yield* Deferred.await(first)
          yield* reactivity.mutation(["t"], insert(1))
          expect(Chunk.toReadonlyArray(yield* Fiber.join(reading))).toEqual([[], [1]])
        })
      ).pipe(Effect.provideService(Reactivity.Reactivity, reactivity))
    }))

  proxied("withTransformer changes what is sent", (proxy) =>
    rolledBack(
      Effect.gen(function* () {
        const sql = yield* client
        const commented = Statement.withTransformer((self, sql) => Effect.succeed(sql`/* from here */ ${self}`))
        expect(yield* commented(sql`SELECT ${1}::int AS n`)).toEqual([{ n: 1 }])
        expect(proxy.statements().filter((text) => text.includes("/* from here */")).length).toBe(1)
      })
    )
  )
})

describe("SqlSchema", () => {
  test("findAll, findOne, single and void run in the session", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const add = SqlSchema.void({ Request: Row, execute: (row) => sql`INSERT INTO t ${sql.insert(row)}` })
      const all = SqlSchema.findAll({
        Request: Schema.Void,
        Result: Row,
        execute: () => sql`SELECT * FROM t ORDER BY id`
      })
      const byId = {
        Request: Schema.Number,
        Result: Row,
        execute: (id: number) => sql`SELECT * FROM t WHERE id = ${id}`
      }
      yield* rolledBack(
        Effect.gen(function* () {
          yield* add({ id: 1, note: "a" })
          yield* add({ id: 2, note: null })
          expect(yield* all()).toEqual([
            { id: 1, note: "a" },
            { id: 2, note: null }
          ])
          expect(yield* SqlSchema.findOne(byId)(1)).toEqual(Option.some({ id: 1, note: "a" }))
          expect(yield* SqlSchema.findOne(byId)(3)).toEqual(Option.none())
          expect(yield* SqlSchema.single(byId)(2)).toEqual({ id: 2, note: null })
        })
      )
    }))
})

describe("SqlResolver", () => {
  const findById = Effect.flatMap(client, (sql) =>
    SqlResolver.findById("FindT", {
      Id: Schema.Number,
      Result: Row,
      ResultId: (row) => row.id,
      execute: (ids) => sql`SELECT * FROM t WHERE ${sql.in("id", ids)}`
    })
  )
  const batched = { batching: true, concurrency: "unbounded" } as const

  proxied("batches what is asked at once into one query, in the session", (proxy) =>
    Effect.gen(function* () {
      const resolver = yield* findById
      yield* rolledBack(
        Effect.gen(function* () {
          yield* insert(1)
          yield* insert(2)
          proxy.reset()
          const found = yield* Effect.forEach([1, 2, 3], (id) => resolver.execute(id), batched)
          expect(found.map(Option.map((_) => _.id))).toEqual([Option.some(1), Option.some(2), Option.none()])
          expect(proxy.statements().filter((text) => text.startsWith("SELECT * FROM t")).length).toBe(1)
          expect(yield* used).toBe(1)
        })
      )
    })
  )

  test("of two sessions side by side each sees its own rows", () =>
    Effect.gen(function* () {
      const resolver = yield* findById
      const meet = () => {
        const both = Effect.runSync(Deferred.make<void>())
        let missing = 2
        return Effect.suspend(() => (--missing === 0 ? Deferred.succeed(both, undefined) : Deferred.await(both)))
      }
      const inserted = meet()
      const loaded = meet()
      const session = (own: number, other: number) =>
        DbSession.isolated(
          Effect.gen(function* () {
            yield* insert(own)
            yield* inserted
            const [mine, theirs] = yield* Effect.all([resolver.execute(own), resolver.execute(other)], batched)
            expect(Option.map(mine, (_) => _.id)).toEqual(Option.some(own))
            expect(theirs).toEqual(Option.none())
            yield* loaded
          })
        )
      yield* Effect.all([session(1, 2), session(2, 1)], batched)
      expect(yield* committed(database)).toEqual([1, 2])
    }))

  test("in a nested block runs in that block", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const add = yield* SqlResolver.void("AddT", {
        Request: Schema.Number,
        execute: (ids) => sql`INSERT INTO t ${sql.insert(ids.map((id) => ({ id })))}`
      })
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const block = Effect.zipRight(
            Effect.forEach([2, 3], (id) => add.execute(id), batched),
            Effect.fail("undo")
          )
          yield* Effect.ignore(withTransaction(block))
          yield* Effect.forEach([4, 5], (id) => add.execute(id), batched)
        })
      )
      expect(yield* committed(database)).toEqual([1, 4, 5])
    }))

  test("ordered and grouped run in the session", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const add = yield* SqlResolver.ordered("AddT", {
        Request: Row,
        Result: Row,
        execute: (rows) => sql`INSERT INTO t ${sql.insert(rows).returning("*")}`
      })
      const byNote = yield* SqlResolver.grouped("ByNote", {
        Request: Schema.String,
        RequestGroupKey: (note) => note,
        Result: Row,
        ResultGroupKey: (row) => row.note!,
        execute: (notes) => sql`SELECT * FROM t WHERE ${sql.in("note", notes)} ORDER BY id`
      })
      yield* rolledBack(
        Effect.gen(function* () {
          yield* Effect.forEach(
            [
              { id: 1, note: "a" },
              { id: 2, note: "b" },
              { id: 3, note: "a" }
            ],
            (row) => add.execute(row),
            batched
          )
          const groups = yield* Effect.forEach(["a", "b", "c"], (note) => byNote.execute(note), batched)
          expect(groups.map((rows) => rows.map((_) => _.id))).toEqual([[1, 3], [2], []])
        })
      )
    }))

  test(
    "of a Scope form's session finds it without being told",
    () =>
      Effect.gen(function* () {
        const resolver = yield* findById
        yield* Effect.scoped(
          Effect.gen(function* () {
            yield* DbSession.scoped()
            yield* insert(1)
            const [found] = yield* Effect.all([resolver.execute(1), resolver.execute(2)], batched)
            expect(Option.isSome(found)).toBe(true)
            yield* DbSession.rollback
          })
        )
        expect(yield* committed(database)).toEqual([])
      }),
    { implicitExecution: "forbid" }
  )
})

describe("Model", () => {
  class Note extends Model.Class<Note>("Note")({
    id: Model.GeneratedByApp(Schema.Number),
    note: Schema.NullOr(Schema.String)
  }) {}

  test("makeRepository inserts, updates, finds and deletes in the session", () =>
    Effect.gen(function* () {
      const repository = yield* Model.makeRepository(Note, { tableName: "t", spanPrefix: "Note", idColumn: "id" })
      yield* rolledBack(
        Effect.gen(function* () {
          const one = yield* repository.insert(Note.insert.make({ id: 1, note: "a" }))
          expect(one).toEqual(new Note({ id: 1, note: "a" }))
          yield* repository.insertVoid(Note.insert.make({ id: 2, note: null }))
          yield* repository.update(Note.update.make({ id: 2, note: "b" }))
          expect(Option.map(yield* repository.findById(2), (_) => _.note)).toEqual(Option.some("b"))
          yield* repository.delete(1)
          expect(yield* seen).toEqual([2])
        })
      )
    }))
})

describe("Migrator", () => {
  const loader = Migrator.fromRecord({
    "0001_one": Effect.flatMap(client, (sql) => sql`CREATE TABLE migrated (id int)`),
    "0002_two": Effect.flatMap(client, (sql) => sql`ALTER TABLE migrated ADD COLUMN note text`)
  })
  const migrate = Migrator.make({})
  const clean = database.query("DROP TABLE IF EXISTS migrated, effect_sql_migrations")
  const tables = Effect.map(
    database.query<{ n: number }>("SELECT count(*)::int AS n FROM pg_tables WHERE tablename = 'migrated'"),
    (rows) => rows[0]!.n
  )

  test("runs each migration once", () =>
    Effect.gen(function* () {
      yield* clean
      expect(yield* migrate({ loader })).toEqual([
        [1, "one"],
        [2, "two"]
      ])
      expect(yield* migrate({ loader })).toEqual([])
      expect(yield* tables).toBe(1)
    }))

  test("in a session is part of it", () =>
    Effect.gen(function* () {
      yield* clean
      yield* migrate({ loader: Effect.succeed([]) })
      yield* DbSession.autocommit(Effect.zipRight(migrate({ loader }), DbSession.rollback))
      expect(yield* tables).toBe(0)
    }))

  test("one that fails leaves nothing of any", () =>
    Effect.gen(function* () {
      yield* clean
      const failing = Migrator.fromRecord({
        "0001_one": Effect.flatMap(client, (sql) => sql`CREATE TABLE migrated (id int)`),
        "0002_two": Effect.flatMap(client, (sql) => sql`ALTER TABLE nowhere ADD COLUMN note text`)
      })
      const exit = yield* Effect.exit(migrate({ loader: failing }))
      expect(Exit.isFailure(exit) && Cause.pretty(exit.cause)).toContain('Migration "2_two" failed')
      expect(yield* tables).toBe(0)
      expect((yield* migrate({ loader })).length).toBe(2)
    }))

  test("two at once: each migration runs once", () =>
    Effect.gen(function* () {
      yield* clean
      yield* migrate({ loader: Effect.succeed([]) })
      const done = yield* Effect.all([migrate({ loader }), migrate({ loader })], { concurrency: 2 })
      expect(done.map((_) => _.length).sort()).toEqual([0, 2])
    }))

  test("PgMigrator.run is given its client by us", () =>
    Effect.gen(function* () {
      yield* clean
      expect((yield* Effect.provide(PgMigrator.run({ loader }), NodeContext.layer)).length).toBe(2)
    }))
})

describe("listen and notify", () => {
  /** Listens to a channel, and is given the payloads one by one. */
  const listening = (proxy: { seen: (matches: (m: { type: string; text: string }) => boolean) => Promise<unknown> }) =>
    Effect.gen(function* () {
      const sql = yield* PgClient.PgClient
      const payloads: Array<string> = []
      const ready = proxy.seen(({ text, type }) => type === "C" && text === "LISTEN")
      const fiber = yield* Effect.fork(
        Stream.runForEach(sql.listen("news"), (payload) => Effect.sync(() => void payloads.push(payload)))
      )
      yield* Effect.promise(() => ready)
      return { payloads, fiber, sql }
    })

  proxied("what is notified in a session is heard when it commits, and not before", (proxy) =>
    Effect.gen(function* () {
      const { fiber, payloads, sql } = yield* listening(proxy)
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* sql.notify("news", "it's in")
          yield* Effect.flatMap(DbEngine, (engine) => engine.ping)
          expect(payloads).toEqual([])
        })
      )
      yield* until(
        "heard",
        Effect.sync(() => payloads.length === 1)
      )
      expect(payloads).toEqual(["it's in"])
      yield* Fiber.interrupt(fiber)
    })
  )

  proxied("what is notified in a session that rolls back is never heard", (proxy) =>
    Effect.gen(function* () {
      const { fiber, payloads, sql } = yield* listening(proxy)
      yield* DbSession.autocommit(Effect.zipRight(sql.notify("news", "undone"), DbSession.rollback))
      yield* sql.notify("news", "after")
      yield* until(
        "heard",
        Effect.sync(() => payloads.length > 0)
      )
      expect(payloads).toEqual(["after"])
      yield* Fiber.interrupt(fiber)
    })
  )

  proxied("what PostgreSQL would not take as a notification is InvalidInput before the wire", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* PgClient.PgClient
      yield* sql`SELECT 1`
      proxy.reset()
      const bad = [
        ["", "x"],
        ["c".repeat(64), "x"],
        ["news", "x".repeat(8000)],
        ["news", "ü".repeat(4000)],
        ["news", "\0"],
        ["news", undefined as never]
      ] as const
      for (const [channel, payload] of bad) expect(yield* reason(sql.notify(channel, payload))).toBe("InvalidInput")
      expect(proxy.flights()).toBe(0)
      yield* sql.notify("c".repeat(63), "x".repeat(7999))
    })
  )

  proxied("all listeners share one connection, which is given back with the last", (proxy) =>
    Effect.gen(function* () {
      const { fiber, sql } = yield* listening(proxy)
      const more = proxy.seen(({ text, type }) => type === "C" && text === "LISTEN")
      const other = yield* Effect.fork(Stream.runDrain(sql.listen("other")))
      yield* Effect.promise(() => more)
      expect(yield* used).toBe(1)
      yield* Fiber.interrupt(fiber)
      expect(yield* used).toBe(1)
      yield* Fiber.interrupt(other)
      yield* until(
        "given back",
        Effect.map(used, (_) => _ === 0)
      )
    })
  )

  proxied("a channel that nobody listens to any more is left, while others are listened to", (proxy) =>
    Effect.gen(function* () {
      const { fiber, sql } = yield* listening(proxy)
      const more = proxy.seen(({ text, type }) => type === "C" && text === "LISTEN")
      const other = yield* Effect.fork(Stream.runDrain(sql.listen("other")))
      yield* Effect.promise(() => more)
      const left = proxy.seen(({ text, type }) => type === "C" && text === "UNLISTEN")
      yield* Fiber.interrupt(other)
      yield* Effect.promise(() => left)
      expect(proxy.statements().filter((_) => _.startsWith("UNLISTEN"))).toEqual(['UNLISTEN "other"'])
      yield* Fiber.interrupt(fiber)
    })
  )

  proxied(
    "the connection of a listener that is gone listens no more",
    (proxy) =>
      Effect.gen(function* () {
        const { fiber, sql } = yield* listening(proxy)
        yield* Fiber.interrupt(fiber)
        yield* until(
          "given back",
          Effect.map(used, (_) => _ === 0)
        )
        expect(yield* sql`SELECT pg_listening_channels() AS channel`).toEqual([])
      }),
    { maxConnections: 1 }
  )

  proxied(
    "all who listen while there is no connection are told in the same acquireTimeout",
    () =>
      whileFull(
        Effect.gen(function* () {
          const sql = yield* PgClient.PgClient
          const listen = (_: unknown, at: number) => reason(Stream.runDrain(sql.listen(`channel ${at}`)))
          const told = yield* Effect.all(Array.from({ length: 100 }, listen), { concurrency: "unbounded" })
          expect(new Set(told)).toEqual(new Set(["AcquireTimeout"]))
        })
      ),
    { maxConnections: 1, acquireTimeout: "500 millis" }
  )
})

describe("a client that is not ours", () => {
  const foreign = PgClient.layer({ url: Redacted.make(database.url), maxConnections: 2 })
  const own = Effect.provide(
    Effect.flatMap(client, (sql) => sql<{ pid: number }>`SELECT pg_backend_pid() AS pid`),
    foreign
  )
  const refused: ReadonlyArray<readonly [string, Effect.Effect<unknown, unknown, SqlClient.SqlClient>]> = [
    ["a statement", Effect.flatMap(client, (sql) => sql`SELECT 1`)],
    ["a statement's values", Effect.flatMap(client, (sql) => sql`SELECT 1`.values)],
    ["a stream", Effect.flatMap(client, (sql) => Stream.runDrain(sql`SELECT 1`.stream))],
    ["a transaction", Effect.flatMap(client, (sql) => sql.withTransaction(Effect.void))]
  ]
  for (const [name, use] of refused) {
    for (const [place, around] of [
      ["a session", <A, E, R>(effect: Effect.Effect<A, E, R>) => DbSession.autocommit(effect)],
      ["a transaction", <A, E, R>(effect: Effect.Effect<A, E, R>) => withTransaction(effect)]
    ] as const) {
      test(`${name} of it inside ${place} of ours is a PropagationError that names DbSession.detach`, () =>
        Effect.gen(function* () {
          const exit = yield* Effect.exit(around(Effect.zipRight(insert(1), Effect.provide(use, foreign))))
          const error = Exit.isFailure(exit) ? Option.getOrUndefined(Cause.failureOption(exit.cause)) : undefined
          expect(DbError.reason(error)?._tag).toBe("PropagationError")
          expect(String((error as Error).message)).toContain("DbSession.detach")
          expect(yield* committed(database)).toEqual([])
        }))
    }
  }

  test("works under DbSession.detach, on a connection of its own", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const mine = yield* pid
        const [row] = yield* DbSession.detach(own)
        expect(row?.pid).not.toBe(mine)
        expect(yield* pid).toBe(mine)
      })
    ))

  test("works outside of our sessions, and ours works inside its transactions", () =>
    Effect.gen(function* () {
      expect((yield* own).length).toBe(1)
      const ours = yield* client
      yield* Effect.provide(
        Effect.gen(function* () {
          const theirs = yield* client
          yield* theirs
            .withTransaction(
              Effect.gen(function* () {
                const [[inside]] = (yield* theirs`SELECT pg_backend_pid()`.values) as unknown as [[number]]
                const [row] = yield* ours<{ pid: number }>`SELECT pg_backend_pid() AS pid`
                expect(row?.pid).not.toBe(inside)
                yield* ours`INSERT INTO t (id) VALUES (1)`
                return yield* Effect.fail("undo")
              })
            )
            .pipe(Effect.ignore)
        }),
        foreign
      )
      expect(yield* committed(database)).toEqual([1])
    }))

  test("another engine of ours inside a session runs on its own database", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const mine = yield* pid
        const theirs = yield* Effect.provide(pid, quietly(DbLayer({ url: database.url })))
        expect(theirs).not.toBe(mine)
      })
    ))
})
