/** Layer forms that are merged, Scope forms that end in any order, and what is left ambient afterwards. */
import { describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Layer, Scope } from "effect"
import { Database, DbConnection, DbLayer, DbSession, DbTransaction, withTransaction } from "effect-db"
import { expect } from "vitest"
import * as Ambient from "../src/internal/ambient.js"
import { testDatabase } from "./support/database.js"
import { committed, insert, outcome, programsOn, quietly, reason, refused, type Services } from "./support/programs.js"

const database = testDatabase()
const other = testDatabase()
const test = programsOn(database)
const rows = committed(database)

const Analytics = Database.make("analytics")
const analytics = quietly(Analytics.DbLayer({ url: other.url }))

const failing = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.exit(Effect.zipRight(effect, Effect.fail("no")))

describe("layers that are merged", () => {
  test("a session of each of two databases: both are ambient, and both roll back", () =>
    Effect.gen(function* () {
      yield* other.query("DROP TABLE IF EXISTS t; CREATE TABLE t (id int)")
      const both = Effect.gen(function* () {
        yield* insert(1)
        const { sql } = yield* Analytics.DbSession
        yield* sql`INSERT INTO t (id) VALUES (2)`
        expect([yield* DbSession.state, yield* Analytics.DbSession.state]).toEqual(["active", "active"])
      })
      for (const layers of [
        Layer.merge(DbSession.layer(), Analytics.DbSession.layer()),
        Layer.merge(Analytics.DbSession.layer(), DbSession.layer())
      ]) {
        yield* failing(Effect.provide(failing(both).pipe(Effect.flatten), layers))
        expect([yield* rows, yield* committed(other)]).toEqual([[], []])
        yield* Effect.provide(both, layers)
        expect([yield* rows, yield* committed(other)]).toEqual([[1], [2]])
        yield* Effect.all([database.query("DELETE FROM t"), other.query("DELETE FROM t")])
      }
    }).pipe(Effect.provide(analytics)))

  test("a session and a connection of one database: the session is ambient, and rolls back", () =>
    Effect.gen(function* () {
      for (const layers of [
        Layer.merge(DbSession.layer(), DbConnection.layer()),
        Layer.merge(DbConnection.layer(), DbSession.layer())
      ]) {
        yield* Effect.exit(Effect.provide(failing(insert(1)).pipe(Effect.flatten), layers))
        expect(yield* rows).toEqual([])
      }
    }))

  test("a session's layer inside another database's session leaves that one alone", () =>
    Effect.gen(function* () {
      const session = yield* Layer.build(Analytics.DbSession.layer())
      yield* failing(DbSession.autocommit(Effect.provide(insert(1), session).pipe(Effect.zipRight(Effect.fail("no")))))
      expect(yield* rows).toEqual([])
    }).pipe(Effect.provide(analytics)))
})

describe("inside a layer's session", () => {
  const inner: Record<string, Effect.Effect<unknown, unknown, any>> = {
    withConnection: DbConnection.withConnection(insert(1)),
    "DbConnection.acquire": Effect.scoped(Effect.zipRight(DbConnection.acquire(), insert(1))),
    "DbSession.scoped": Effect.scoped(Effect.zipRight(DbSession.scoped(), insert(1))),
    "DbTransaction.scoped": Effect.scoped(Effect.zipRight(DbTransaction.scoped(), insert(1))),
    withTransaction: withTransaction(insert(1)),
    "another database's connection": Effect.scoped(
      Effect.provide(Analytics.DbConnection.withConnection(insert(1)), analytics)
    )
  }
  for (const [name, effect] of Object.entries(inner)) {
    test(`${name} leaves nothing of the session to who provided it`, () =>
      Effect.scoped(
        Effect.gen(function* () {
          const session = yield* Layer.build(DbSession.layer())
          yield* Effect.provide(effect as Effect.Effect<unknown, unknown>, session)
          expect(yield* Ambient.entries).toEqual([])
          yield* insert(2)
          expect(yield* rows).toContain(2)
        })
      ).pipe(Effect.tap(() => Effect.map(rows, (_) => expect(_).toEqual([1, 2])))))
  }
})

describe("Scope forms", () => {
  test("closed in another fiber leave the one that opened them as it was", () =>
    Effect.gen(function* () {
      yield* Effect.scoped(Effect.parallelFinalizers(Effect.zipRight(DbSession.scoped(), insert(1))))
      yield* insert(2)
      expect(yield* rows).toEqual([1, 2])
    }))

  test("closed in another order take nothing of each other along", () =>
    Effect.gen(function* () {
      const [first, second] = yield* Effect.all([Scope.make(), Scope.make()])
      yield* Scope.extend(DbConnection.acquire(), first)
      yield* Scope.extend(DbSession.scoped(), second)
      yield* insert(1)
      yield* Scope.close(second, Exit.void)
      yield* insert(2)
      const third = yield* Scope.make()
      yield* Scope.extend(DbSession.scoped(), third)
      yield* Scope.close(first, Exit.void)
      yield* Effect.exit(Scope.close(third, Exit.void))
      yield* insert(3)
      expect(yield* rows).toEqual([1, 2, 3])
      expect(yield* Ambient.entries).toEqual([])
    }))

  test("closed inside of a block that was opened after them: the block fails, and behind it they are gone", () =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      yield* Scope.extend(DbSession.scoped(), scope)
      const block = withTransaction(Effect.zipRight(insert(1), Scope.close(scope, Exit.void)))
      expect(outcome(yield* Effect.exit(block))).toBe("SessionClosed")
      yield* insert(2)
      expect(yield* rows).toEqual([2])
    }))

  const forms: Record<string, Effect.Effect<unknown, unknown, any>> = {
    "DbSession.scoped": DbSession.scoped(),
    "DbTransaction.scoped": DbTransaction.scoped()
  }
  for (const [name, form] of Object.entries(forms)) {
    test(`${name} whose commit fails dies, and behind it it is gone`, () =>
      Effect.gen(function* () {
        const spoiled = Effect.scoped(Effect.zipRight(form, Effect.zipRight(insert(1), Effect.ignore(refused))))
        expect(outcome(yield* Effect.exit(spoiled))).toBe("defect: TransactionAborted")
        yield* insert(2)
        yield* DbSession.autocommit(insert(3))
        expect(yield* rows).toEqual([2, 3])
        expect(yield* Ambient.entries).toEqual([])
      }) as Effect.Effect<void, never, Services>)
  }

  test("a savepoint whose end fails dies, and behind it the session goes on", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const spoiled = Effect.zipRight(DbTransaction.scoped(), Effect.zipRight(insert(2), Effect.ignore(refused)))
          expect(outcome(yield* Effect.exit(Effect.scoped(spoiled)))).toBe("defect: TransactionAborted")
          yield* insert(3)
          yield* withTransaction(insert(4))
        })
      )
      expect(yield* rows).toEqual([1, 3, 4])
    }))

  test("blocks closed from the outside in: the inner one dies, and behind them both are gone", () =>
    Effect.gen(function* () {
      const [outer, inner] = yield* Effect.all([Scope.make(), Scope.make()])
      yield* Scope.extend(DbTransaction.scoped(), outer)
      yield* insert(1)
      yield* Scope.extend(DbTransaction.scoped(), inner)
      yield* insert(2)
      yield* Scope.close(outer, Exit.void)
      expect(outcome(yield* Effect.exit(Scope.close(inner, Exit.void)))).toMatch(/^defect: /)
      yield* insert(3)
      expect(yield* rows).toEqual([1, 3])
      expect(yield* Ambient.entries).toEqual([])
    }))

  test("a child that outlives one is told so, whoever closes it", () =>
    Effect.gen(function* () {
      const go = yield* Deferred.make<void>()
      const child = yield* Effect.scoped(
        Effect.gen(function* () {
          yield* DbSession.scoped()
          yield* insert(1)
          return yield* Effect.forkDaemon(Effect.zipRight(Deferred.await(go), Effect.either(reason(insert(2)))))
        })
      )
      yield* Deferred.succeed(go, undefined)
      expect(yield* Effect.flatten(Fiber.join(child))).toBe("SessionClosed")
      expect(yield* rows).toEqual([1])
    }))
})

describe("a fiber that outlives an inner connection", () => {
  const forms: Record<string, (body: Effect.Effect<any, any, any>) => Effect.Effect<any, any, any>> = {
    withConnection: (body) => DbConnection.withConnection(body, { reuse: false }),
    "DbConnection.acquire": (body) => Effect.scoped(Effect.zipRight(DbConnection.acquire(), body)),
    "DbConnection.layer": (body) => Effect.provide(body, Layer.fresh(DbConnection.layer()))
  }
  for (const [name, around] of Object.entries(forms)) {
    test(`of ${name} is told so, and never gets the outer one`, () =>
      Effect.gen(function* () {
        const go = yield* Deferred.make<void>()
        const fiber: Fiber.Fiber<string> = yield* around(
          around(
            Effect.zipRight(
              insert(1),
              Effect.forkDaemon(Effect.zipRight(Deferred.await(go), Effect.map(Effect.exit(insert(2)), outcome)))
            )
          ).pipe(Effect.tap((fiber) => Effect.zipRight(Deferred.succeed(go, undefined), Fiber.join(fiber))))
        )
        expect(yield* Fiber.join(fiber)).toBe("ConnectionReleased")
        expect(yield* rows).toEqual([1])
      }))
  }
})

describe("a fiber that meets one engine after the other", () => {
  it.live("keeps nothing of those whose sessions have ended", () =>
    Effect.gen(function* () {
      const job = Effect.scoped(DbSession.scoped()).pipe(
        Effect.provide(quietly(DbLayer({ url: database.url, connect: "lazy" })))
      )
      yield* Effect.repeatN(job, 9)
      expect(yield* Ambient.entries).toEqual([])
    })
  )
})
