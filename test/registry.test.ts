import { HttpRouter, HttpServer, HttpServerResponse } from "@effect/platform"
import * as SqlClient from "@effect/sql/SqlClient"
import { describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Layer, Option } from "effect"
import {
  Database,
  DbConnection,
  DbEngine,
  DbHttp,
  type DbOptions,
  DbRegistry,
  DbSchema,
  DbSession,
  DbTransaction,
  withTransaction
} from "effect-db"
import { DbTest } from "effect-db/testing"
import { expect } from "vitest"
import { untilActivity } from "./support/database.js"
import { insert, outcome, place, quietly, reason, refused, seen, type Services, used } from "./support/programs.js"
import { proxy } from "./support/proxy.js"
import { Analytics, intoOther, twoDatabases, type Both } from "./support/twoDatabases.js"
import { listening } from "./support/served.js"

const { database, other, othersRows, registry, rows, test } = twoDatabases()

const which = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(sql<{ name: string }>`SELECT current_database() AS name`, ([row]) => row!.name)
)
const whichOther = Effect.flatMap(Analytics.DbSession, ({ sql }) =>
  Effect.map(sql<{ name: string }>`SELECT current_database() AS name`, ([row]) => row!.name)
)
const usedOther = Effect.map(Analytics.DbEngine.stats, (_) => _.used)

describe("54 all or none", () => {
  const starting = (databases: Record<string, DbOptions>, options?: DbRegistry.RegistryOptions) =>
    Effect.scoped(Layer.build(quietly(DbRegistry.layer(databases, options))))

  it.scopedLive("each has started when the layer is there", () =>
    Effect.gen(function* () {
      const build = Layer.build(registry())
      const context = yield* build
      expect((yield* Effect.provide(DbEngine.stats, context)).total).toBe(1)
      expect((yield* Effect.provide(Analytics.DbEngine.stats, context)).total).toBe(1)
    })
  )

  it.scopedLive("they start at the same time", () =>
    Effect.gen(function* () {
      const [one, two] = yield* Effect.all([proxy(database.url), proxy(other.url)])
      one.pause()
      two.pause()
      const starts = [one, two].map((_) => _.seen(({ type }) => type === "startup"))
      const fiber = yield* Effect.fork(starting({ default: { url: one.url }, analytics: { url: two.url } }))
      // Neither is answered, and both have been asked.
      yield* Effect.promise(() => Promise.all(starts))
      one.resume()
      two.resume()
      yield* Fiber.join(fiber)
    })
  )

  for (const [name, order] of [
    ["the second", (good: DbOptions, bad: DbOptions) => ({ default: good, analytics: bad })],
    ["the first", (good: DbOptions, bad: DbOptions) => ({ default: bad, analytics: good })]
  ] as const) {
    it.scopedLive(`${name} fails: the other is shut down, and the start error is reported`, () =>
      Effect.gen(function* () {
        const via = yield* proxy(database.url)
        const bad = new URL(other.url)
        bad.pathname = "/no_such_database"
        // The good one is up before the bad one may answer.
        const slow = yield* proxy(bad.href)
        slow.pause()
        const up = via.seen(({ text, type }) => type === "Z" && text === "I")
        const fiber = yield* Effect.fork(reason(starting(order({ url: via.url }, { url: slow.url }))))
        yield* Effect.promise(() => up)
        slow.resume()
        expect(yield* Fiber.join(fiber)).toBe("AuthorizationError")
        yield* untilActivity(database.url, ({ total }) => total === 0)
        expect(via.connections.length).toBe(0)
      })
    )
  }

  it.scopedLive("both fail: one error, and nothing is left", () =>
    Effect.gen(function* () {
      const bad = new URL(other.url)
      bad.pathname = "/no_such_database"
      expect(yield* reason(starting({ default: { url: bad.href }, analytics: { url: bad.href } }))).toBe(
        "AuthorizationError"
      )
    })
  )

  it.scopedLive("wrong options of one are refused before anything is connected", () =>
    Effect.gen(function* () {
      const tag = yield* reason(starting({ default: { url: database.url }, analytics: { url: "nonsense" } }))
      expect(tag).toBe("InvalidInput")
      yield* untilActivity(database.url, ({ total }) => total === 0)
    })
  )

  it.scopedLive("a lazy one does not hinder the start, and fails where it is used", () =>
    Effect.gen(function* () {
      const bad = new URL(other.url)
      bad.pathname = "/no_such_database"
      yield* Effect.gen(function* () {
        expect(yield* which).toBe(database.database)
        expect(yield* reason(whichOther)).toBe("AuthorizationError")
      }).pipe(Effect.provide(registry({ analytics: { url: bad.href, connect: "lazy" } })))
    })
  )

  it.scopedLive("one whose options say connect: undefined is checked as well", () =>
    Effect.gen(function* () {
      const bad = new URL(other.url)
      bad.pathname = "/no_such_database"
      const wrong = Effect.provide(Effect.void, registry({ analytics: { url: bad.href, connect: undefined } }))
      expect(yield* reason(wrong)).toBe("AuthorizationError")
    })
  )

  it.scopedLive("a replica of a name that is not there is refused", () =>
    Effect.gen(function* () {
      const of = (replicas: Record<string, string>) =>
        reason(starting({ default: { url: database.url } }, { replicas }))
      expect(yield* of({ default: "nowhere" })).toBe("InvalidInput")
      expect(yield* of({ nowhere: "default" })).toBe("InvalidInput")
    })
  )

  test("names are what was given, and an unknown one is a typed error that tells them", () =>
    Effect.gen(function* () {
      const registry = yield* DbRegistry.DbRegistry
      expect(registry.names).toEqual(["default", "analytics"])
      expect((yield* registry.get("analytics")).name).toBe("analytics")
      const error = yield* Effect.flip(registry.get("toString"))
      expect(yield* reason(registry.get("toString"))).toBe("InvalidInput")
      expect(String((error as { message: string }).message)).toContain('"toString"')
      expect(yield* reason(DbRegistry.using(which, "nowhere"))).toBe("InvalidInput")
    }))
})

describe("using", () => {
  const forms: ReadonlyArray<
    readonly [name: string, onOther: <A, E>(effect: Effect.Effect<A, E, Services>) => Effect.Effect<A, unknown, Both>]
  > = [
    ["by value", (effect) => DbRegistry.using(effect, Analytics)],
    ["by value, in a pipe", (effect) => effect.pipe(DbRegistry.using(Analytics))],
    ["by name", (effect) => DbRegistry.using(effect, "analytics")],
    ["by name, in a pipe", (effect) => effect.pipe(DbRegistry.using("analytics"))]
  ]

  for (const [name, onOther] of forms) {
    test(`${name}: the effect runs on the other database, whatever it takes to get there`, () =>
      Effect.gen(function* () {
        const viaClient = Effect.flatMap(SqlClient.SqlClient, (sql) => sql`SELECT current_database() AS name`)
        const viaConnection = DbConnection.withConnection(which)
        expect(yield* onOther(which)).toBe(other.database)
        expect(yield* onOther(viaClient)).toEqual([{ name: other.database }])
        expect(yield* onOther(viaConnection)).toBe(other.database)
        expect(yield* onOther(Effect.map(DbEngine, (_) => _.name))).toBe("analytics")
        expect(yield* which).toBe(database.database)
      }))

    test(`${name}: sessions and blocks in it are the other's`, () =>
      Effect.gen(function* () {
        yield* onOther(DbSession.autocommit(insert(1)))
        yield* onOther(withTransaction(insert(2)))
        yield* Effect.ignore(onOther(withTransaction(Effect.zipRight(insert(3), Effect.fail("no")))))
        expect(yield* othersRows).toEqual([1, 2])
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: inside a session of the default database that one is not touched`, () =>
      Effect.gen(function* () {
        const tried = DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            const before = yield* place
            yield* onOther(insert(2))
            yield* onOther(DbSession.autocommit(insert(3)))
            // Neither in a session nor in a block there.
            expect(yield* onOther(reason(DbSession.commit))).toBe("NoSession")
            expect((yield* onOther(DbTransaction.current))._tag).toBe("None")
            expect(yield* othersRows).toEqual([2, 3])
            expect(yield* place).toEqual(before)
            return yield* Effect.fail("no")
          })
        )
        expect(yield* reason(tried)).toBe("no")
        expect(yield* rows).toEqual([])
        expect(yield* othersRows).toEqual([2, 3])
      }))

    test(`${name}: inside a session of the other database it joins that one`, () =>
      Effect.gen(function* () {
        const tried = Analytics.DbSession.autocommit(
          Effect.gen(function* () {
            yield* intoOther(1)
            yield* onOther(insert(2))
            yield* onOther(DbSession.autocommit(insert(3)))
            expect(yield* onOther(seen)).toEqual([1, 2, 3])
            expect(yield* usedOther).toBe(1)
            return yield* Effect.fail("no")
          })
        )
        expect(yield* reason(tried)).toBe("no")
        expect(yield* othersRows).toEqual([])
      }))

    test(`${name}: a failed statement there leaves the session here as it was`, () =>
      Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(onOther(refused))).toBe("UnknownError")
            expect(yield* DbSession.state).toBe("active")
          })
        )
        expect(yield* rows).toEqual([1])
      }))
  }

  const name = (sql: SqlClient.SqlClient) =>
    Effect.map(sql<{ name: string }>`SELECT current_database() AS name`, ([row]) => row!.name)

  for (const [form, onOther] of forms) {
    test(`${form}: services that were built before run on the other database as well`, () =>
      Effect.gen(function* () {
        const db = yield* DbSession
        const engine = yield* DbEngine
        const client = yield* SqlClient.SqlClient
        const context = yield* Effect.context<DbEngine>()
        const all = Effect.all([
          name(db.sql),
          name(engine.sql),
          name(client),
          DbSession.autocommit(name(db.sql)),
          DbSession.detach(name(db.sql)),
          Effect.provide(DbSession.autocommit(name(client)), context),
          client.withTransaction(name(client)),
          Effect.fork(name(client)).pipe(Effect.flatMap(Fiber.join)),
          Effect.map(db.batch([db.sql<{ name: string }>`SELECT current_database() AS name`]), ([[row]]) => row!.name)
        ])
        expect([...new Set(yield* onOther(all))]).toEqual([other.database])
        expect([...new Set(yield* all)]).toEqual([database.database])
        yield* onOther(DbSession.autocommit(Effect.zipRight(db.sql`INSERT INTO t (id) VALUES (1)`, db.commit)))
        yield* Effect.ignore(onOther(Effect.fail("no")))
        expect([yield* rows, yield* othersRows]).toEqual([[], [1]])
        expect(yield* name(client)).toBe(database.database)
      }))
  }

  test("services that were built before: the default one by its name is theirs again", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const analytics = yield* Analytics.DbEngine
      const both = Effect.all([name(sql), which, name(analytics.sql), whichOther])
      const there = [other.database, other.database, other.database, other.database]
      const home = [database.database, database.database, other.database, other.database]
      const nested = Effect.all([both, DbRegistry.using(both, "default"), both])
      expect(yield* DbRegistry.using(nested, "analytics")).toEqual([there, home, there])
      const twice = DbRegistry.using(DbRegistry.using(both, "default"), "analytics")
      expect(yield* DbRegistry.using(twice, "analytics")).toEqual(home)
      expect(yield* both).toEqual(home)
    }))

  test("services that were built before: a session here is not touched, and comes back", () =>
    Effect.gen(function* () {
      const db = yield* DbSession
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const handle = Option.getOrThrow(yield* DbSession.current)
          yield* DbRegistry.using(
            Effect.gen(function* () {
              expect(yield* db.state).toBe("closed")
              yield* db.sql`INSERT INTO t (id) VALUES (2)`
              // A handle is that session's for good.
              yield* handle.sql`INSERT INTO t (id) VALUES (3)`
              yield* handle.batch([handle.sql`INSERT INTO t (id) VALUES (4)`])
            }),
            "analytics"
          )
          yield* db.sql`INSERT INTO t (id) VALUES (5)`
          expect(yield* othersRows).toEqual([2])
        })
      )
      expect(yield* rows).toEqual([1, 3, 4, 5])
    }))

  test("what is opened there in an outer scope stays open", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* DbRegistry.using(DbSession.scoped(), "analytics")
        yield* DbRegistry.using(sql`INSERT INTO t (id) VALUES (1)`, "analytics")
        expect(yield* Analytics.DbSession.state).toBe("active")
        expect(yield* othersRows).toEqual([])
      })
    ).pipe(
      Effect.zipRight(othersRows),
      Effect.map((ids) => expect(ids).toEqual([1]))
    ))

  test("in sandboxes services that were built before stay in that of the database that they run on", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const add = (id: number) => DbSession.autocommit(sql`INSERT INTO t (id) VALUES (${id})`)
      const ids = Effect.map(sql<{ id: number }>`SELECT id FROM t ORDER BY id`, (found) => found.map((_) => _.id))
      const inBoth = Effect.gen(function* () {
        yield* add(1)
        yield* DbRegistry.using(add(2), "analytics")
        yield* DbRegistry.using(Effect.zipRight(add(3), DbRegistry.using(add(4), "default")), "analytics")
        yield* Analytics.DbSession.autocommit(intoOther(5))
        expect([yield* ids, yield* DbRegistry.using(ids, "analytics")]).toEqual([
          [1, 4],
          [2, 3, 5]
        ])
        expect(yield* DbRegistry.readOnly(ids)).toEqual([1, 4])
      })
      yield* inBoth.pipe(DbTest.of(Analytics).sandbox, DbTest.sandbox)
      yield* inBoth.pipe(DbTest.sandbox, DbTest.of(Analytics).sandbox)
      // A sandbox of what the default database is there.
      yield* DbRegistry.using(DbTest.sandbox(Effect.all([add(6), intoOther(7)])), "analytics")
      expect([yield* rows, yield* othersRows]).toEqual([[], []])
      yield* Effect.all([add(8), DbRegistry.using(add(9), "analytics")])
      expect([yield* rows, yield* othersRows]).toEqual([[8], [9]])
    }))

  test("the default one by its name, inside of another", () =>
    Effect.gen(function* () {
      const there = Effect.zip(which, DbRegistry.using(which, "default"))
      expect(yield* DbRegistry.using(there, "analytics")).toEqual([other.database, database.database])
    }))

  test("fibers that use different ones at once stay apart", () =>
    Effect.gen(function* () {
      const names = yield* Effect.forEach(
        Array.from({ length: 40 }, (_, i) => (i % 2 === 0 ? "default" : "analytics")),
        (name) => DbRegistry.using(DbSession.autocommit(Effect.zipRight(Effect.yieldNow(), which)), name),
        { concurrency: "unbounded" }
      )
      expect(names).toEqual(Array.from({ length: 40 }, (_, i) => (i % 2 === 0 ? database.database : other.database)))
    }))
})

describe("readOnly", () => {
  const registry = { replicas: { default: "analytics" } }

  test(
    "goes to the replica outside of a session, and in a session that has not begun",
    () =>
      Effect.gen(function* () {
        expect(yield* DbRegistry.readOnly(which)).toBe(other.database)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            expect(yield* DbRegistry.readOnly(which)).toBe(other.database)
            expect(yield* used).toBe(0)
          })
        )
      }),
    { registry }
  )

  test(
    "stays in a transaction that is open, which alone sees what it has done",
    () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          expect(yield* DbRegistry.readOnly(seen)).toEqual([1])
          expect(yield* withTransaction(DbRegistry.readOnly(which))).toBe(database.database)
          yield* DbSession.commit
          expect(yield* DbRegistry.readOnly(which)).toBe(other.database)
        })
      ),
    { registry }
  )

  test(
    "leaves an open transaction that only reads",
    () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* which).toBe(database.database)
          expect(yield* DbRegistry.readOnly(which)).toBe(other.database)
        }),
        { readOnly: true }
      ),
    { registry }
  )

  test(
    "services that were built before read from the replica as well, and stay where it stays",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const name = Effect.map(sql<{ name: string }>`SELECT current_database() AS name`, ([row]) => row!.name)
        expect(yield* DbRegistry.readOnly(name)).toBe(other.database)
        expect(yield* DbRegistry.readOnly(DbRegistry.readOnly(name))).toBe(other.database)
        expect(yield* DbRegistry.readOnly(DbRegistry.using(name, "default"))).toBe(database.database)
        expect(yield* DbTest.sandbox(DbRegistry.readOnly(name))).toBe(database.database)
        expect(yield* DbSession.autocommit(Effect.zipRight(name, DbRegistry.readOnly(name)))).toBe(database.database)
        const token = yield* DbSession.withCommitToken(DbSession.autocommit(sql`INSERT INTO t (id) VALUES (1)`))
        const after = Option.getOrUndefined(token[1])
        expect(yield* DbRegistry.readOnly(name, { after })).toBe(other.database)
        expect(yield* name).toBe(database.database)
      }),
    { registry }
  )

  test(
    "takes tenant, schema and using along: the replica has the same",
    () =>
      Effect.gen(function* () {
        yield* DbSchema.create("acme")
        yield* DbRegistry.using(DbSchema.create("acme"), "analytics")
        yield* other.query(
          "CREATE TABLE acme.t (id int); INSERT INTO acme.t VALUES (1); INSERT INTO public.t VALUES (2)"
        )
        expect(yield* DbRegistry.readOnly(seen)).toEqual([2])
        for (const around of [DbSchema.withTenant, DbSchema.withSchema, DbSchema.using]) {
          expect(yield* around(DbRegistry.readOnly(seen), "acme")).toEqual([1])
          expect(yield* around(DbSession.autocommit(DbRegistry.readOnly(seen)), "acme")).toEqual([1])
        }
        expect(yield* DbSchema.withTenant(DbRegistry.readOnly(DbSchema.requireTenant(seen)), "acme")).toEqual([1])
        const inner = DbRegistry.readOnly(DbSchema.withTenant(seen, "public"))
        expect(yield* DbSchema.withTenant(inner, "acme")).toEqual([2])
      }),
    { registry }
  )

  test(
    "a tenant of the primary alone is none of the replica's by another way",
    () =>
      Effect.gen(function* () {
        const noTenant = reason(DbRegistry.using(DbSchema.requireTenant(seen), "analytics"))
        expect(yield* DbSchema.withTenant(noTenant, "acme")).toBe("InvalidInput")
        expect(yield* DbSchema.withTenant(Effect.zipRight(DbRegistry.readOnly(Effect.void), noTenant), "acme")).toBe(
          "InvalidInput"
        )
      }),
    { registry }
  )

  test("is the default database where there is no replica", () =>
    Effect.map(DbRegistry.readOnly(which), (name) => expect(name).toBe(database.database)))
})

describe("10 two databases in one program", () => {
  test("two sessions, each with its own connection and transaction", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Analytics.DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* intoOther(2)
            expect([yield* used, yield* usedOther]).toEqual([1, 1])
            expect([yield* rows, yield* othersRows]).toEqual([[], []])
          })
        )
      )
      expect([yield* rows, yield* othersRows]).toEqual([[1], [2]])
    }))

  const forms: ReadonlyArray<
    readonly [name: string, inside: (effect: Effect.Effect<void, unknown, Both>) => Effect.Effect<void, unknown, Both>]
  > = [
    ["withTransaction", (effect) => withTransaction(effect)],
    ["autocommit", (effect) => DbSession.autocommit(effect)]
  ]
  for (const [name, inside] of forms) {
    test(`${name}: a statement for B inside A's transaction runs on B, and is kept when A rolls back`, () =>
      Effect.gen(function* () {
        const body = Effect.gen(function* () {
          yield* insert(1)
          yield* intoOther(2)
          expect(yield* whichOther).toBe(other.database)
          expect(yield* which).toBe(database.database)
          expect(yield* othersRows).toEqual([2])
          return yield* Effect.fail("no")
        })
        expect(yield* reason(inside(body))).toBe("no")
        expect(yield* rows).toEqual([])
        expect(yield* othersRows).toEqual([2])
      }))
  }

  test("a block of B inside a block of A is a transaction of its own, and the other way round", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Effect.ignore(Analytics.withTransaction(Effect.zipRight(intoOther(2), Effect.fail("no"))))
          yield* Analytics.withTransaction(intoOther(3))
          expect(yield* othersRows).toEqual([3])
        })
      )
      yield* Effect.ignore(
        Analytics.withTransaction(Effect.all([intoOther(4), withTransaction(insert(5)), Effect.fail("no")]))
      )
      expect(yield* rows).toEqual([1, 5])
      expect(yield* othersRows).toEqual([3])
    }))

  test("detach leaves both, for the effect", () =>
    Effect.gen(function* () {
      const tried = DbSession.autocommit(
        Analytics.DbSession.autocommit(
          Effect.gen(function* () {
            yield* Effect.all([insert(1), intoOther(1)])
            yield* DbSession.detach(Effect.all([insert(2), intoOther(2)]))
            expect([yield* rows, yield* othersRows]).toEqual([[2], [2]])
            expect(yield* seen).toEqual([1, 2])
            return yield* Effect.fail("no")
          })
        )
      )
      expect(yield* reason(tried)).toBe("no")
      expect([yield* rows, yield* othersRows]).toEqual([[2], [2]])
    }))

  test("a daemon that outlives both gets SessionClosed from both", () =>
    Effect.gen(function* () {
      const gate = yield* Deferred.make<void>()
      const late = yield* DbSession.autocommit(
        Analytics.DbSession.autocommit(
          Effect.zipRight(
            Effect.all([insert(1), intoOther(1)]),
            Effect.forkDaemon(
              Effect.zipRight(Deferred.await(gate), Effect.all([reason(insert(2)), reason(intoOther(2))]))
            )
          )
        )
      )
      yield* Deferred.succeed(gate, undefined)
      expect(yield* Fiber.join(late)).toEqual(["SessionClosed", "SessionClosed"])
      expect([yield* rows, yield* othersRows]).toEqual([[1], [1]])
    }))

  test("SqlClient is the default database's, unless another is asked to be it", () =>
    Effect.gen(function* () {
      const viaClient = Effect.flatMap(SqlClient.SqlClient, (sql) => sql`SELECT current_database() AS name`)
      expect(yield* viaClient).toEqual([{ name: database.database }])
      expect(yield* Analytics.withTransaction(viaClient)).toEqual([{ name: database.database }])
      expect(yield* Effect.provide(viaClient, Analytics.sqlClientLayer)).toEqual([{ name: other.database }])
    }))
})

describe("11 all of a fiber's sessions", () => {
  const inBoth = <A, E>(effect: Effect.Effect<A, E, Both>) =>
    DbSession.autocommit(Analytics.DbSession.autocommit(effect))

  test("commitAll commits both, and they can go on", () =>
    inBoth(
      Effect.gen(function* () {
        yield* Effect.all([insert(1), intoOther(2)])
        yield* DbSession.commitAll
        expect([yield* rows, yield* othersRows]).toEqual([[1], [2]])
        yield* Effect.all([insert(3), intoOther(4)])
        yield* DbSession.rollbackAll
        expect([yield* rows, yield* othersRows]).toEqual([[1], [2]])
      })
    ))

  test("commitAll whose second commit fails: that error, the first is committed, the second rolled back", () =>
    Effect.gen(function* () {
      yield* inBoth(
        Effect.gen(function* () {
          // Checked at COMMIT.
          yield* Effect.all([insert(1), intoOther(2), intoOther(2)])
          expect(yield* reason(DbSession.commitAll)).toBe("UniqueViolation")
          expect([yield* rows, yield* othersRows]).toEqual([[1], []])
          expect([yield* DbSession.state, yield* Analytics.DbSession.state]).not.toContain("active")
        })
      )
      expect([yield* rows, yield* othersRows]).toEqual([[1], []])
    }))

  test("commitAll whose first commit fails: that error, and the second is rolled back", () =>
    Effect.gen(function* () {
      yield* inBoth(
        Effect.gen(function* () {
          yield* Effect.all([insert(1), insert(1), intoOther(2)])
          expect(yield* reason(DbSession.commitAll)).toBe("UniqueViolation")
        })
      )
      expect([yield* rows, yield* othersRows]).toEqual([[], []])
    }))

  test("commitAll while a block is open in the second is SessionBusy, and the first is not committed", () =>
    DbSession.autocommit(
      Analytics.DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          yield* intoOther(2)
          yield* Analytics.withTransaction(
            Effect.gen(function* () {
              expect(yield* reason(DbSession.commitAll)).toBe("SessionBusy")
              expect(yield* rows).toEqual([])
              expect(yield* DbSession.state).toBe("active")
            })
          )
        })
      )
    ))

  test("after a failed commitAll both connections are given back", () =>
    inBoth(
      Effect.gen(function* () {
        yield* Effect.all([insert(1), intoOther(2), intoOther(2)])
        yield* Effect.exit(DbSession.commitAll)
        expect([yield* used, yield* usedOther]).toEqual([0, 0])
      })
    ))

  test("closeAll gives both connections back and keeps nothing", () =>
    inBoth(
      Effect.gen(function* () {
        yield* Effect.all([insert(1), intoOther(2)])
        yield* DbSession.closeAll
        expect([yield* used, yield* usedOther]).toEqual([0, 0])
        expect([yield* rows, yield* othersRows]).toEqual([[], []])
      })
    ))

  test("commitAll interrupted before it has begun commits nothing", () =>
    Effect.gen(function* () {
      const ready = yield* Deferred.make<void>()
      const fiber = yield* Effect.fork(
        inBoth(
          Effect.all([insert(1), intoOther(2), Deferred.succeed(ready, undefined), Effect.never, DbSession.commitAll])
        )
      )
      yield* Deferred.await(ready)
      expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
      expect([yield* rows, yield* othersRows]).toEqual([[], []])
    }))
})

describe("a request", () => {
  test("has a session of each database, and its statements run where they belong", () =>
    Effect.gen(function* () {
      const handler = Effect.gen(function* () {
        yield* insert(1)
        yield* intoOther(2)
        yield* DbRegistry.using(insert(3), "analytics")
        const inside = [yield* used, yield* usedOther, yield* rows, yield* othersRows]
        return yield* HttpServerResponse.json(inside)
      })
      const url = yield* listening(
        HttpServer.serve(
          HttpRouter.empty.pipe(HttpRouter.get("/", handler)),
          DbHttp.middleware({ databases: [Database.make("default"), Analytics] })
        )
      )
      const inside = yield* Effect.promise(async () => (await fetch(url)).json())
      expect(inside).toEqual([1, 1, [], []])
      expect([yield* rows, yield* othersRows]).toEqual([[1], [2, 3]])
    }))

  test("a failed exit of the scope leaves nothing in either", () =>
    Effect.gen(function* () {
      const exit = yield* Effect.exit(
        Effect.scoped(
          Effect.gen(function* () {
            yield* DbSession.scoped()
            yield* Analytics.DbSession.scoped()
            yield* Effect.all([insert(1), intoOther(2)])
            return yield* Effect.fail("no")
          })
        )
      )
      expect(Exit.isFailure(exit)).toBe(true)
      expect([yield* rows, yield* othersRows]).toEqual([[], []])
    }))
})
