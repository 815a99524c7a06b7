/**
 * Query builders on our client: `@effect/sql-kysely` and `@effect/sql-drizzle` as effects, what their promises do, and
 * Kysely and Drizzle themselves in promise code, by the recipes of `examples/recipes`.
 */
import type { SqlError } from "@effect/sql"
import * as PgDrizzle from "@effect/sql-drizzle/Pg"
import * as PgKysely from "@effect/sql-kysely/Pg"
import { describe, expect, it } from "@effect/vitest"
import { asc, eq } from "drizzle-orm"
import { integer, pgTable, text } from "drizzle-orm/pg-core"
import type { PgRemoteDatabase } from "drizzle-orm/pg-proxy"
import { Cause, Effect, Exit } from "effect"
import type { DbRuntime } from "effect-db"
import { DbEngine, DbError, DbSession, withTransaction } from "effect-db"
import { drizzleOn } from "../examples/recipes/drizzle.js"
import { kyselyOn } from "../examples/recipes/kysely.js"
import { testDatabase } from "./support/database.js"
import { committed, insert, pid, programsOn, reason, seen } from "./support/programs.js"
import { onRuntime } from "./support/promises.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

interface Tables {
  readonly t: { readonly id: number; readonly note: string | null }
}

const t = pgTable("t", { id: integer().primaryKey(), note: text() })

// sql-drizzle's declarations mean the CommonJS ones of Drizzle, which are other types under "nodenext".
const effectOf = <A>(query: PromiseLike<A>) => query as unknown as Effect.Effect<A, SqlError.SqlError>
const makeDrizzle = Effect.map(PgDrizzle.make(), (db) => db as unknown as PgRemoteDatabase)
const makeKysely = PgKysely.make<Tables>()

/** The backend and the transaction of a statement of the builder's own, and what is in the table. */
const builders = [
  [
    "sql-kysely",
    Effect.map(makeKysely, (db) => ({
      insert: (id: number): Effect.Effect<unknown, unknown> => db.insertInto("t").values({ id }),
      ids: Effect.map(db.selectFrom("t").select("id").orderBy("id"), (rows) => rows.map(({ id }) => id)),
      update: (id: number): Effect.Effect<unknown, unknown> =>
        db.updateTable("t").set({ note: "new" }).where("id", "=", id)
    }))
  ],
  [
    "sql-drizzle",
    Effect.map(makeDrizzle, (db) => ({
      insert: (id: number): Effect.Effect<unknown, unknown> => effectOf(db.insert(t).values({ id })),
      ids: Effect.map(effectOf(db.select({ id: t.id }).from(t).orderBy(asc(t.id))), (rows) => rows.map(({ id }) => id)),
      update: (id: number): Effect.Effect<unknown, unknown> =>
        effectOf(db.update(t).set({ note: "new" }).where(eq(t.id, id)))
    }))
  ]
] as const

for (const [name, make] of builders) {
  describe(`${name}, yielded`, () => {
    test("runs in the session, with its other statements, and is committed with it", () =>
      Effect.gen(function* () {
        const db = yield* make
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* db.insert(1)
            yield* insert(2)
            expect(yield* db.ids).toEqual([1, 2])
            expect(yield* rows).toEqual([])
            expect((yield* DbEngine.stats).used).toBe(1)
          })
        )
        expect(yield* rows).toEqual([1, 2])
      }))

    test("is undone with the session", () =>
      Effect.gen(function* () {
        const db = yield* make
        yield* insert(1)
        const tried = Effect.all([db.insert(2), db.update(1), Effect.fail("no")])
        expect(yield* Effect.flip(DbSession.autocommit(tried))).toBe("no")
        expect(yield* database.query("SELECT id, note FROM t")).toEqual([{ id: 1, note: null }])
      }))

    test("is undone with the block that it is in, and no more than that", () =>
      Effect.gen(function* () {
        const db = yield* make
        yield* Effect.gen(function* () {
          yield* db.insert(1)
          yield* Effect.ignore(withTransaction(Effect.zipRight(db.insert(2), Effect.fail("no"))))
          yield* withTransaction(db.insert(3))
        }).pipe(withTransaction)
        expect(yield* rows).toEqual([1, 3])
      }))

    test("an isolated session has its own", () =>
      Effect.gen(function* () {
        const db = yield* make
        yield* Effect.all([db.insert(1), DbSession.isolated(db.insert(2)), Effect.fail("no")]).pipe(
          DbSession.autocommit,
          Effect.ignore
        )
        expect(yield* rows).toEqual([2])
      }))

    test("made inside a session it is not tied to that one", () =>
      Effect.gen(function* () {
        const db = yield* DbSession.autocommit(make)
        yield* db.insert(1)
        yield* Effect.ignore(DbSession.autocommit(Effect.zipRight(db.insert(2), Effect.fail("no"))))
        expect(yield* rows).toEqual([1])
      }))

    test(
      "without a session it is an implicit statement, and refused where these are",
      () =>
        Effect.gen(function* () {
          const db = yield* make
          const refused = yield* Effect.exit(db.insert(1))
          expect(Exit.isFailure(refused) && Cause.pretty(refused.cause)).toMatch(
            /neither a session nor a connection|Failed to execute QueryPromise/
          )
          yield* DbSession.autocommit(db.insert(2))
          expect(yield* rows).toEqual([2])
        }),
      { implicitExecution: "forbid" }
    )

    test("a refused statement fails the block that swallows it", () =>
      Effect.gen(function* () {
        const db = yield* make
        yield* insert(1)
        const swallowed = Effect.zipRight(db.insert(2), Effect.ignore(db.insert(1)))
        expect(yield* reason(DbSession.autocommit(swallowed))).toBe("TransactionAborted")
        expect(yield* rows).toEqual([1])
      }))
  })
}

describe("what errors look like", () => {
  test("sql-kysely fails with the DbError itself", () =>
    Effect.gen(function* () {
      const db = yield* makeKysely
      yield* insert(1)
      const caught = db
        .insertInto("t")
        .values({ id: 1 })
        .pipe(DbError.catchReason("UniqueViolation", ({ constraint }) => Effect.succeed(constraint)))
      expect(yield* caught).toBe("t_pkey")
    }))

  test("sql-drizzle wraps what the server said in a SqlError of its own", () =>
    Effect.gen(function* () {
      const db = yield* makeDrizzle
      yield* insert(1)
      const error = yield* Effect.flip(effectOf(db.insert(t).values({ id: 1 })))
      expect(error._tag).toBe("SqlError")
      expect(DbError.is(error)).toBe(false)
      expect(error.message).toBe("Failed to execute QueryPromise")
      const query = error.cause as Error
      expect((query.cause as { readonly code: string }).code).toBe("23505")
    }))

  test("withTransaction of the Kysely instance is ours", () =>
    Effect.gen(function* () {
      const db = yield* makeKysely
      const tried = db.withTransaction(Effect.zipRight(db.insertInto("t").values({ id: 1 }), Effect.fail("no")))
      yield* DbSession.autocommit(Effect.zipRight(insert(2), Effect.ignore(tried)))
      expect(yield* rows).toEqual([2])
    }))
})

describe("awaited instead of yielded", () => {
  test("a promise of sql-drizzle leaves the session: it runs where the instance was made", () =>
    Effect.gen(function* () {
      const db = yield* makeDrizzle
      yield* Effect.all([
        insert(1),
        Effect.promise(() => db.insert(t).values({ id: 2 }).execute()),
        Effect.fail("no")
      ]).pipe(DbSession.autocommit, Effect.ignore)
      expect(yield* rows).toEqual([2])
    }))

  test(
    "which implicitExecution: forbid makes an error",
    () =>
      Effect.gen(function* () {
        const db = yield* makeDrizzle
        const tried = Effect.tryPromise(() => db.insert(t).values({ id: 2 }).execute())
        expect(Exit.isFailure(yield* Effect.exit(DbSession.autocommit(tried)))).toBe(true)
        expect(yield* rows).toEqual([])
      }),
    { implicitExecution: "forbid" }
  )

  test("of an instance that was made in the session it stays inside", () =>
    Effect.gen(function* () {
      yield* Effect.gen(function* () {
        const db = yield* makeDrizzle
        yield* Effect.promise(() => db.insert(t).values({ id: 1 }).execute())
        expect(yield* seen).toEqual([1])
        return yield* Effect.fail("no")
      }).pipe(DbSession.autocommit, Effect.ignore)
      expect(yield* rows).toEqual([])
    }))

  test("execute() of sql-kysely has no driver and does nothing", () =>
    Effect.gen(function* () {
      const db = yield* makeKysely
      const [result] = yield* Effect.promise(() => Promise.resolve(db.insertInto("t").values({ id: 1 }).execute()))
      expect(result!.numInsertedOrUpdatedRows).toBe(0n)
      expect(yield* rows).toEqual([])
    }))
})

describe("Kysely and Drizzle in promise code", () => {
  const on = (name: string, program: (db: DbRuntime.DbRuntime<DbEngine | DbSession, unknown>) => Promise<void>) =>
    it(name, () => onRuntime(database, program, {}, "id int PRIMARY KEY, note text"))

  const recipes = [
    [
      "Kysely",
      (db: DbRuntime.DbRuntime<DbEngine, unknown>) => {
        const kysely = kyselyOn<Tables>(db)
        return {
          insert: (id: number): Promise<unknown> => kysely.insertInto("t").values({ id }).execute(),
          ids: async () => (await kysely.selectFrom("t").select("id").orderBy("id").execute()).map(({ id }) => id),
          pid: async () => {
            const row = await kysely
              .selectNoFrom((_) => _.fn<number>("pg_backend_pid").as("pid"))
              .executeTakeFirstOrThrow()
            return row.pid
          },
          transaction: (): Promise<unknown> => kysely.transaction().execute(() => Promise.resolve())
        }
      }
    ],
    [
      "Drizzle",
      (db: DbRuntime.DbRuntime<DbEngine, unknown>) => {
        const drizzle = drizzleOn(db)
        return {
          insert: (id: number): Promise<unknown> => drizzle.insert(t).values({ id }).execute(),
          ids: async () => (await drizzle.select().from(t).orderBy(asc(t.id))).map(({ id }) => id),
          pid: async () => {
            const [row] = await drizzle.execute<{ pid: number }>("SELECT pg_backend_pid() AS pid")
            return row!.pid
          },
          transaction: (): Promise<unknown> => drizzle.transaction(() => Promise.resolve())
        }
      }
    ]
  ] as const

  for (const [name, make] of recipes) {
    on(`${name}: its statements run in the session that is awaited around them`, async (db) => {
      const builder = make(db)
      await db.session(async () => {
        await builder.insert(1)
        await db.run(insert(2))
        expect(await builder.ids()).toEqual([1, 2])
        expect(await builder.pid()).toBe(await db.run(pid))
        expect(await Effect.runPromise(rows)).toEqual([])
      })
      expect(await Effect.runPromise(rows)).toEqual([1, 2])
    })

    on(`${name}: a rejected promise undoes them`, async (db) => {
      const builder = make(db)
      const tried = db.session(async () => {
        await builder.insert(1)
        throw new Error("no")
      })
      await expect(tried).rejects.toThrow("no")
      expect(await Effect.runPromise(rows)).toEqual([])
    })

    on(`${name}: the runtime's transaction is a block around them; its own is refused`, async (db) => {
      const builder = make(db)
      await db.session(async () => {
        await builder.insert(1)
        const tried = db.transaction(async () => {
          await builder.insert(2)
          throw new Error("no")
        })
        await expect(tried).rejects.toThrow(/^no$/)
        await expect(builder.transaction()).rejects.toThrow(/runtime's transaction|not supported/)
        expect(await builder.ids()).toEqual([1])
      })
      expect(await Effect.runPromise(rows)).toEqual([1])
    })

    on(`${name}: concurrent sessions stay apart`, async (db) => {
      const builder = make(db)
      await Promise.all(
        Array.from({ length: 20 }, (_, i) =>
          db
            .session(async () => {
              await builder.insert(i)
              expect(await builder.ids()).toContain(i)
              if (i % 2 === 1) throw new Error("no")
            })
            .catch((error: Error) => expect(error.message).toBe("no"))
        )
      )
      expect(await Effect.runPromise(rows)).toEqual([0, 2, 4, 6, 8, 10, 12, 14, 16, 18])
    })
  }

  on("Kysely: counts, streams, and errors that are DbErrors", async (db) => {
    const kysely = kyselyOn<Tables>(db)
    await db.session(async () => {
      const inserted = await kysely
        .insertInto("t")
        .values(Array.from({ length: 250 }, (_, id) => ({ id })))
        .executeTakeFirst()
      expect(inserted.numInsertedOrUpdatedRows).toBe(250n)
      const ids: Array<number> = []
      for await (const { id } of kysely.selectFrom("t").select("id").orderBy("id").stream(100)) {
        ids.push(id)
        if (id === 120) await kysely.updateTable("t").set({ note: "seen" }).where("id", "=", id).execute()
      }
      expect(ids).toEqual(Array.from({ length: 250 }, (_, id) => id))
      expect(await kysely.selectFrom("t").select("id").where("note", "=", "seen").execute()).toEqual([{ id: 120 }])
    })
    const error = await kysely
      .insertInto("t")
      .values({ id: 1 })
      .execute()
      .then(undefined, (error: unknown) => error)
    expect(DbError.reason(error)?._tag).toBe("UniqueViolation")
  })

  on("Drizzle: the cause of its error is the DbError", async (db) => {
    const drizzle = drizzleOn(db)
    await drizzle.insert(t).values({ id: 1 })
    const error = await drizzle
      .insert(t)
      .values({ id: 1 })
      .then(undefined, (error: Error) => error)
    expect(DbError.reason((error as Error).cause)?._tag).toBe("UniqueViolation")
  })
})
