import { HttpServerResponse } from "@effect/platform"
import { describe } from "@effect/vitest"
import { Deferred, Effect, Fiber, Option } from "effect"
import { atomic, DbConnection, DbHttp, DbSession, DbTransaction, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { committed, insert, outcome, place, programsOn, type Services } from "./support/programs.js"
import { latch, open } from "./support/until.js"
import { Analytics, intoOther, twoDatabases } from "./support/twoDatabases.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

/** How an effect ends in a fiber that was started inside of `around`, which is over by then. */
const afterEnd = <A, E, R, E2, R2>(
  around: (inside: Effect.Effect<Fiber.Fiber<string>, never, R>) => Effect.Effect<Fiber.Fiber<string>, E2, R2>,
  effect: Effect.Effect<A, E, R>
): Effect.Effect<string, E2, R2> =>
  Effect.gen(function* () {
    const over = yield* latch
    const late = yield* around(
      Effect.forkDaemon(Effect.zipRight(Deferred.await(over), Effect.map(Effect.exit(effect), outcome)))
    )
    yield* open(over)
    return yield* Fiber.join(late)
  })

type Use = readonly [name: string, use: Effect.Effect<unknown, unknown, Services>]

const modes = ["nested", "required", "requiresNew", "mandatory", "supports", "notSupported", "never"] as const

const blocks: ReadonlyArray<Use> = [
  ...modes.map((propagation): Use => [propagation, withTransaction(insert(2), { propagation })]),
  ["atomic", atomic(insert(2))],
  ["autocommit", DbSession.autocommit(insert(2))],
  ["begin", DbSession.begin()],
  ["DbTransaction.scoped", Effect.scoped(DbTransaction.scoped())],
  ["sql.withTransaction", Effect.flatMap(DbSession, ({ sql }) => sql.withTransaction(insert(2)))]
]

describe("a fiber whose session has ended", () => {
  const ended = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    afterEnd((inside) => DbSession.autocommit(Effect.zipRight(insert(1), inside)), effect)

  for (const [name, use] of [
    ...blocks,
    ["commit", DbSession.commit],
    ["rollback", DbSession.rollback],
    ["commitAll", DbSession.commitAll],
    ["rollbackAll", DbSession.rollbackAll]
  ] as ReadonlyArray<Use>) {
    test(`gets SessionClosed from ${name}, which does nothing`, () =>
      Effect.gen(function* () {
        expect(yield* ended(use)).toBe("SessionClosed")
        expect(yield* rows).toEqual([1])
      }))
  }

  test("gets SessionClosed from DbHttp.middleware, also where the handler uses no database", () =>
    Effect.gen(function* () {
      const handled = yield* latch
      const request = DbHttp.middleware()(Effect.as(open(handled), HttpServerResponse.empty()))
      expect(yield* ended(Effect.scoped(request as Use[1]))).toBe("SessionClosed")
      expect(yield* Deferred.isDone(handled)).toBe(false)
    }))

  for (const [name, use] of [
    ["close", DbSession.close],
    ["closeAll", DbSession.closeAll]
  ] as ReadonlyArray<Use>) {
    test(`has nothing left to ${name}`, () => Effect.map(ended(use), (_) => expect(_).toBe("success")))
  }

  test("can have one of its own by isolated, and by detach", () =>
    Effect.gen(function* () {
      expect(yield* ended(DbSession.isolated(insert(2)))).toBe("success")
      expect(yield* afterEnd(DbSession.autocommit, DbSession.detach(withTransaction(insert(3))))).toBe("success")
      expect(yield* rows).toEqual([1, 2, 3])
    }))
})

for (const [what, work] of [
  ["has run a statement", insert(1)],
  ["has run none", Effect.void]
] as const) {
  test(`a fiber has the connection around its session by a handle after that, also when it was told, where it ${what}`, () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = Option.getOrThrow(yield* DbConnection.current)
        const byHandle = Effect.map(Effect.exit(sql`SELECT 1`), outcome)
        const told = Effect.map(Effect.exit(insert(2)), outcome)
        const over = yield* latch
        const uses = Effect.zipRight(Deferred.await(over), Effect.all([byHandle, told, byHandle]))
        const late = yield* DbSession.autocommit(Effect.zipRight(work, Effect.forkDaemon(uses)))
        yield* open(over)
        expect(yield* Fiber.join(late)).toEqual(["success", "SessionClosed", "success"])
      })
    ))
}

describe("a fiber whose block has ended, in a session that goes on", () => {
  for (const [name, use] of [
    ...blocks,
    ["commit", DbSession.commit],
    ["rollback", DbSession.rollback],
    ["close", DbSession.close],
    ["commitAll", DbSession.commitAll],
    ["rollbackAll", DbSession.rollbackAll],
    ["closeAll", DbSession.closeAll]
  ] as ReadonlyArray<Use>) {
    test(`gets TransactionClosed from ${name}, and the session's transaction is as it was`, () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          const before = yield* place
          expect(yield* afterEnd(withTransaction, use)).toBe("TransactionClosed")
          expect(yield* place).toEqual(before)
          expect(yield* rows).toEqual([])
        })
      ))
  }
})

describe("a fiber whose connection was released", () => {
  const forms: Record<string, (inside: Effect.Effect<any, any, any>) => Effect.Effect<any, any, any>> = {
    withConnection: (inside) => DbConnection.withConnection(inside),
    acquire: (inside) => Effect.scoped(Effect.zipRight(DbConnection.acquire(), inside)),
    layer: (inside) => Effect.provide(inside, DbConnection.layer()),
    "withConnection inside another": (inside) =>
      DbConnection.withConnection(DbConnection.withConnection(inside, { reuse: false }))
  }
  const uses: ReadonlyArray<Use> = [
    ["a statement", insert(2)],
    ["autocommit", DbSession.autocommit(insert(2))],
    ["DbSession.scoped", Effect.scoped(Effect.zipRight(DbSession.scoped(), insert(2)))],
    ["withTransaction", withTransaction(insert(2))],
    ["withTransaction with a marker", withTransaction(insert(2), { verifyOutcome: true })],
    ["DbTransaction.scoped", Effect.scoped(Effect.zipRight(DbTransaction.scoped(), insert(2)))],
    ["atomic", atomic(insert(2))],
    ["withConnection", DbConnection.withConnection(insert(2))],
    ["acquire of who reuses", Effect.scoped(DbConnection.acquire({ reuse: true }))],
    ["the facade's client", Effect.flatMap(DbConnection, ({ sql }) => sql`SELECT 1`)]
  ]
  for (const [form, around] of Object.entries(forms)) {
    for (const [name, use] of uses) {
      test(`${form}: gets ConnectionReleased from ${name}, which does nothing`, () =>
        Effect.gen(function* () {
          expect(yield* afterEnd(around, use)).toBe("ConnectionReleased")
          expect(yield* rows).toEqual([])
        }) as Effect.Effect<void, never, Services>)
    }
  }

  for (const [name, use] of [
    ["isolated", DbSession.isolated(insert(2))],
    ["withConnection that does not reuse", DbConnection.withConnection(insert(2), { reuse: false })],
    ["requiresNew", withTransaction(insert(2), { propagation: "requiresNew" })]
  ] as ReadonlyArray<Use>) {
    test(`has a connection of its own by ${name}`, () =>
      Effect.gen(function* () {
        expect(yield* afterEnd(DbConnection.withConnection, use)).toBe("success")
        expect(yield* rows).toEqual([2])
      }))
  }

  test("whoever released it himself goes on without it", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* DbConnection.release()
        yield* DbSession.autocommit(insert(1))
        expect(yield* rows).toEqual([1])
      })
    ))
})

describe("all sessions of a fiber that has outlived one of them", () => {
  const { othersRows, rows, test } = twoDatabases()

  for (const [name, all] of [
    ["commitAll", DbSession.commitAll],
    ["rollbackAll", DbSession.rollbackAll]
  ] as const) {
    test(`${name} is SessionClosed before anything is ended`, () =>
      Effect.gen(function* () {
        yield* Effect.ignore(
          DbSession.autocommit(
            Effect.gen(function* () {
              yield* insert(1)
              const late = afterEnd(
                (inside) => Analytics.DbSession.autocommit(Effect.zipRight(intoOther(1), inside)),
                all
              )
              expect(yield* late).toBe("SessionClosed")
              expect(yield* DbSession.state).toBe("active")
              return yield* Effect.fail("undo")
            })
          )
        )
        expect(yield* rows).toEqual([])
        expect(yield* othersRows).toEqual([1])
      }))
  }

  test("closeAll closes those that are open", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* insert(1)
        expect(yield* afterEnd(Analytics.DbSession.autocommit, DbSession.closeAll)).toBe("success")
        expect(yield* DbSession.state).toBe("idle")
        expect(yield* rows).toEqual([])
      })
    ))
})
