/** Schemas, sandboxes, promise code and requests of a database that is not the default one. */
import { HttpServerRequest, HttpServerResponse } from "@effect/platform"
import { expect, it } from "@effect/vitest"
import { Effect, Layer, Option, Schema } from "effect"
import {
  Database,
  DbEngine,
  DbHttp,
  DbRegistry,
  DbResolver,
  DbRuntime,
  DbSchema,
  DbSession,
  type EngineService
} from "effect-db"
import { DbTest } from "effect-db/testing"
import { afterAll, beforeAll, describe } from "vitest"
import { expectAtRest, insert, quietly, reason, seen } from "./support/programs.js"
import { Analytics, intoOther, seenInOther, twoDatabases, type Both } from "./support/twoDatabases.js"

const { database, other, othersRows, registry, rows, test } = twoDatabases()

describe("DbSchema of another database", () => {
  const path = (sql: EngineService["sql"]) =>
    Effect.map(sql<{ path: string }>`SELECT current_setting('search_path') AS path`, ([row]) => row!.path)
  const here = Effect.flatMap(DbSession, ({ sql }) => path(sql))
  const there = Effect.flatMap(Analytics.DbSession, ({ sql }) => path(sql))

  for (const [name, around] of [
    ["implicit statements", (effect: Effect.Effect<void, unknown, Both>) => effect],
    [
      "sessions of both",
      (effect: Effect.Effect<void, unknown, Both>) => effect.pipe(DbSession.autocommit, Analytics.DbSession.autocommit)
    ]
  ] as const) {
    test(`${name}: each has its own path, and neither takes the other's`, () =>
      around(
        Effect.gen(function* () {
          expect(yield* Effect.all([here, there])).toEqual(['"acme"', '"globex"'])
          expect(yield* DbSchema.current).toEqual(Option.some('"acme"'))
          expect(yield* Analytics.DbSchema.current).toEqual(Option.some('"globex"'))
        })
      ).pipe(DbSchema.withTenant("acme"), Analytics.DbSchema.withTenant("globex")))
  }

  test("using > tenant > schema, of its own only", () =>
    Effect.gen(function* () {
      expect(yield* there).toBe('"chosen"')
      expect(yield* here).not.toBe('"chosen"')
    }).pipe(
      Analytics.DbSchema.using("chosen"),
      Analytics.DbSchema.withTenant("tenant"),
      Analytics.DbSchema.withSchema("schema")
    ))

  test("requireTenant asks for a tenant of its own database", () =>
    Effect.gen(function* () {
      const asked = DbSchema.withTenant(Analytics.DbSchema.requireTenant(there), "acme")
      expect(yield* reason(asked)).toBe("InvalidInput")
      expect(String(yield* Effect.flip(asked))).toContain("There is no tenant")
      expect(yield* Analytics.DbSchema.withTenant(Analytics.DbSchema.requireTenant(there), "globex")).toBe('"globex"')
    }))

  test("create and drop act on it, in its transaction", () =>
    Effect.gen(function* () {
      const named = "SELECT 1 FROM pg_namespace WHERE nspname = 'acme'"
      yield* Effect.exit(
        Analytics.withTransaction(Effect.zipRight(Analytics.DbSchema.create("acme"), Effect.fail("no")))
      )
      expect(yield* other.query(named)).toEqual([])
      yield* Analytics.DbSchema.create("acme")
      expect(yield* other.query(named)).toHaveLength(1)
      expect(yield* database.query(named)).toEqual([])
      yield* Analytics.DbSchema.drop("acme")
      expect(yield* other.query(named)).toEqual([])
      expect(yield* reason(Analytics.DbSchema.create(""))).toBe("InvalidInput")
    }))
})

describe("DbTest.of", () => {
  const kit = DbTest.of(Analytics)

  test("its sandbox keeps what is committed in it, and leaves the other database alone", () =>
    Effect.gen(function* () {
      yield* kit.sandbox(
        Effect.gen(function* () {
          yield* Analytics.DbSession.autocommit(intoOther(1))
          yield* Analytics.DbSession.isolated(intoOther(2))
          yield* DbSession.autocommit(insert(3))
          expect(yield* seenInOther).toEqual([1, 2])
          expect(
            yield* Effect.exit(Analytics.withTransaction(Effect.zipRight(intoOther(4), Effect.fail("no"))))
          ).toMatchObject({ _tag: "Failure" })
          expect(yield* seenInOther).toEqual([1, 2])
        })
      )
      expect(yield* othersRows).toEqual([])
      expect(yield* rows).toEqual([3])
    }))

  test("sandboxes of both databases compose", () =>
    Effect.gen(function* () {
      yield* Effect.all([DbSession.autocommit(insert(1)), Analytics.DbSession.autocommit(intoOther(2))]).pipe(
        Effect.zipRight(Effect.all([seen, seenInOther])),
        Effect.tap((both) => Effect.sync(() => expect(both).toEqual([[1], [2]]))),
        kit.sandbox,
        DbTest.sandbox
      )
      expect(yield* rows).toEqual([])
      expect(yield* othersRows).toEqual([])
    }))

  test("an effect that is sent to it by name stays in its sandbox", () =>
    Effect.gen(function* () {
      yield* kit.sandbox(DbRegistry.using(DbSession.autocommit(insert(1)), "analytics"))
      expect(yield* othersRows).toEqual([])
      expect(yield* reason(kit.sandbox(DbRegistry.using(insert(1), "nowhere")))).toBe("InvalidInput")
    }))

  test(
    "what only reads stays in the sandbox, which alone has what the test has written",
    () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          yield* DbSession.autocommit(insert(1))
          expect(yield* DbRegistry.readOnly(seen)).toEqual([1])
        })
      ),
    { registry: { replicas: { default: "analytics" } } }
  )

  test(
    "inside of using, what only reads goes to the replica of that database, not to the default's",
    () =>
      Effect.gen(function* () {
        yield* insert(1)
        yield* intoOther(2)
        expect(yield* DbRegistry.readOnly(seen)).toEqual([2])
        expect(yield* DbRegistry.using(DbRegistry.readOnly(seen), "analytics")).toEqual([1])
      }),
    { registry: { replicas: { default: "analytics", analytics: "default" } } }
  )

  test("its sandboxLayer is over the engine that is there", () =>
    Effect.gen(function* () {
      yield* Effect.provide(Analytics.DbSession.autocommit(intoOther(1)), kit.sandboxLayer)
      expect(yield* othersRows).toEqual([])
    }))

  it.live("its layer provides it, and nothing of the default database", () =>
    Effect.gen(function* () {
      yield* Effect.provide(
        Effect.gen(function* () {
          yield* Analytics.DbSession.autocommit(intoOther(1))
          expect(yield* Effect.serviceOption(DbEngine)).toEqual(Option.none())
        }),
        quietly(kit.layer({ url: other.url }))
      )
      expect(yield* othersRows).toEqual([])
    })
  )

  it.live("its database comes with its layer", () =>
    Effect.gen(function* () {
      const created = yield* kit.database({ url: other.url, prefix: "named" })
      const [row] = yield* Effect.flatMap(
        Analytics.DbSession,
        ({ sql }) => sql<{ name: string }>`SELECT current_database() AS name`
      ).pipe(Effect.provide(quietly(created.layer)))
      expect(row!.name).toBe(created.name)
    }).pipe(Effect.scoped)
  )
})

describe("DbRuntime with several databases", () => {
  const make = () => DbRuntime.make(registry())
  let db: ReturnType<typeof make>
  let analytics: DbRuntime.PromiseSessions

  beforeAll(() => {
    db = make()
    analytics = db.of(Analytics)
  })
  afterAll(() => db.close())

  const promised = (name: string, program: () => Promise<void>) =>
    it(name, async () => {
      await program()
      await db.run(Effect.zipRight(expectAtRest(database), DbRegistry.using(expectAtRest(other), Analytics)))
    })

  promised("nested sessions have one session and one transaction of each", async () => {
    await db.session(() =>
      analytics.session(async () => {
        await db.run(insert(1))
        await db.run(intoOther(2))
        await db.run(insert(3))
        expect(await Effect.runPromise(Effect.all([rows, othersRows]))).toEqual([[], []])
        expect(await db.run(Effect.all([seen, seenInOther]))).toEqual([[1, 3], [2]])
      })
    )
    expect(await Effect.runPromise(Effect.all([rows, othersRows]))).toEqual([[1, 3], [2]])
  })

  promised("a rejected promise rolls back those that it passes through", async () => {
    await expect(
      db.session(async () => {
        await db.run(insert(1))
        await analytics.session(async () => {
          await db.run(intoOther(2))
          throw new Error("no")
        })
      })
    ).rejects.toThrow("no")
    expect(await Effect.runPromise(Effect.all([rows, othersRows]))).toEqual([[], []])
  })

  promised("a commit that fails inside rolls back outside", async () => {
    const tried = db.session(async () => {
      await db.run(insert(1))
      await analytics.session(() => db.run(Effect.zipRight(intoOther(2), intoOther(2))))
    })
    expect(await Effect.runPromise(reason(Effect.tryPromise({ try: () => tried, catch: (error) => error })))).toBe(
      "UniqueViolation"
    )
    expect(await Effect.runPromise(Effect.all([rows, othersRows]))).toEqual([[], []])
  })

  promised("isolated, transaction and atomic are the other database's too", async () => {
    await analytics.session(async () => {
      await db.run(intoOther(1))
      await analytics.isolated(() => db.run(intoOther(2)))
      expect(await Effect.runPromise(othersRows)).toEqual([2])
      const tried = analytics.transaction(async (tx) => {
        expect(tx.depth).toBe(1)
        await db.run(intoOther(3))
        throw new Error("no")
      })
      await expect(tried).rejects.toThrow(/^no$/)
      await analytics.atomic(() => db.run(intoOther(4)))
      expect(await Effect.runPromise(othersRows)).toEqual([1, 2, 4])
    })
    expect(await Effect.runPromise(rows)).toEqual([])
  })

  it("a runtime of a layer without the default database has the sessions of the one that is named", async () => {
    const alone = DbRuntime.make(quietly(Analytics.DbLayer({ url: other.url })), Analytics)
    await alone.session(() => alone.run(intoOther(1)))
    await expect(alone.transaction(() => Promise.reject(new Error("no")))).rejects.toThrow(/^no$/)
    expect(await Effect.runPromise(othersRows)).toEqual([1])
    expect(alone.runSync(Analytics.DbSession.autocommit(Effect.as(intoOther(2), "done")))).toBe("done")
    const { pending, used } = await alone.run(Analytics.DbEngine.stats)
    expect({ pending, used }).toEqual({ pending: 0, used: 0 })
    await alone.close()
  })
})

describe("DbResolver on another database", () => {
  test("asks in the session of whoever asks, one statement for a batch", () =>
    Effect.gen(function* () {
      yield* Effect.all([insert(1), insert(2)], { concurrency: 2 })
      let statements = 0
      const resolver = yield* DbResolver.findById("T", {
        Id: Schema.Number,
        Result: Schema.Struct({ id: Schema.Number }),
        ResultId: (row) => row.id,
        withContext: true,
        execute: (ids) =>
          Effect.flatMap(Analytics.DbSession, ({ sql }) => {
            statements++
            return sql`SELECT id FROM t WHERE ${sql.in("id", ids)}`
          })
      })
      const find = Effect.forEach([1, 2, 3], resolver.execute, { batching: true, concurrency: "unbounded" })
      const found = yield* Analytics.DbSession.autocommit(
        Effect.zipRight(Effect.all([intoOther(2), intoOther(3)]), find)
      )
      expect(found).toEqual([Option.none(), Option.some({ id: 2 }), Option.some({ id: 3 })])
      expect(statements).toBe(1)
    }))
})

describe("effects in the options of another database", () => {
  const value = Effect.flatMap(
    Analytics.DbSession,
    ({ sql }) => sql<{ name: string }>`SELECT current_setting('app.name', true) AS name`
  )
  const sets = (name: string) =>
    Effect.flatMap(Analytics.DbConnection, ({ sql }) => sql`SELECT set_config('app.name', ${name}, false)`)

  it.live("afterConnect, beforeSession and beforeCommit may be written in its own words", () => {
    let begun = 0
    return Effect.gen(function* () {
      expect((yield* Analytics.DbSession.autocommit(value))[0]!.name).toBe("own")
      expect(begun).toBe(1)
      yield* Analytics.DbSession.autocommit(intoOther(1), { beforeCommit: intoOther(2) })
      yield* Analytics.DbSession.isolated(intoOther(3), { beforeCommit: Analytics.withTransaction(intoOther(4)) })
      yield* Effect.scoped(Effect.zipRight(Analytics.DbSession.scoped({ beforeCommit: intoOther(5) }), intoOther(6)))
      expect(yield* othersRows).toEqual([1, 2, 3, 4, 5, 6])
    }).pipe(
      Effect.provide(
        quietly(
          Analytics.DbLayer({
            url: other.url,
            afterConnect: sets("own"),
            beforeSession: Effect.zipRight(
              Effect.sync(() => void begun++),
              Analytics.DbEngine.changeHost({ host: other.host, port: other.port })
            )
          })
        )
      )
    )
  })

  it.live("in the registry each entry has the words of its own name, and the default one's for itself", () =>
    Effect.gen(function* () {
      expect((yield* value)[0]!.name).toBe("own")
      expect(
        (yield* DbRegistry.using(
          Effect.flatMap(DbSession, ({ sql }) => sql`SELECT 1 AS n`),
          "analytics"
        ))[0]
      ).toEqual({ n: 1 })
      yield* Analytics.DbSession.autocommit(intoOther(1), { beforeCommit: DbSession.autocommit(insert(2)) })
      expect(yield* othersRows).toEqual([1, 2])
      expect(yield* rows).toEqual([])
    }).pipe(
      Effect.provide(
        quietly(
          DbRegistry.layer({ default: { url: database.url }, analytics: { url: other.url, afterConnect: sets("own") } })
        )
      )
    )
  )

  it.live("in a sandbox they stay in it", () =>
    Effect.gen(function* () {
      yield* Analytics.DbSession.autocommit(intoOther(1), { beforeCommit: intoOther(2) })
      expect(yield* Effect.map(value, (_) => _.length)).toBe(1)
      expect(yield* othersRows).toEqual([])
    }).pipe(
      Effect.provide(quietly(DbTest.of(Analytics).layer({ url: other.url, beforeSession: Analytics.DbEngine.ping })))
    )
  )

  it("of promise code", async () => {
    const alone = DbRuntime.make(quietly(Analytics.DbLayer({ url: other.url })), Analytics)
    await alone.session(() => alone.run(intoOther(1)), { beforeCommit: intoOther(2) })
    await alone.close()
    expect(await Effect.runPromise(othersRows)).toEqual([1, 2])
  })

  it.live("a request's, with sessions of both, may be written in the words of both", () =>
    Effect.gen(function* () {
      let hooks = 0
      const both = DbHttp.middleware({
        databases: [Database.make("default"), Analytics],
        beforeCommit: Effect.flatMap(Analytics.DbSession, (there) =>
          Effect.map(Effect.zip(DbSession.state, there.state), () => void hooks++)
        )
      })
      const put = (sql: EngineService["sql"]) => sql`INSERT INTO t (id) VALUES (1)`
      const app = Effect.as(
        Effect.zip(
          Effect.flatMap(DbEngine, (_) => put(_.sql)),
          Effect.flatMap(Analytics.DbEngine, (_) => put(_.sql))
        ),
        HttpServerResponse.empty()
      )
      const request = HttpServerRequest.fromWeb(new Request("http://localhost/"))
      const response = yield* Effect.scoped(
        Effect.provideService(both(app), HttpServerRequest.HttpServerRequest, request)
      )
      expect(response.status).toBe(204)
      expect(hooks).toBe(2)
      expect(yield* Effect.all([rows, othersRows])).toEqual([[1], [1]])
      // Nothing but the engines.
    }).pipe(
      Effect.provide(
        quietly(Layer.merge(DbEngine.layer({ url: database.url }), Analytics.DbEngine.layer({ url: other.url })))
      )
    )
  )
})
