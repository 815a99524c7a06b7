import { SqlClient } from "@effect/sql"
import { describe } from "@effect/vitest"
import { Deferred, Effect, Fiber, Option, Stream } from "effect"
import { type Connection, DbConnection, DbSession, DbTransaction, type Session, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { committed, insert, no, pid, programsOn, reason, seen } from "./support/programs.js"
import { latch, open } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

type Client = SqlClient.SqlClient
type AnyEffect = Effect.Effect<any, any, any>

const write = (sql: Client, id: number) => Effect.asVoid(sql`INSERT INTO t (id) VALUES (${id})`)
const backend = (sql: Client) => Effect.map(sql<{ pid: number }>`SELECT pg_backend_pid() AS pid`, ([row]) => row!.pid)

describe("sql.withTransaction of a handle", () => {
  const connections: ReadonlyArray<readonly [name: string, around: (use: (_: Connection) => AnyEffect) => AnyEffect]> =
    [
      ["a connection on top of the stack", (use) => Effect.flatMap(DbConnection.acquire(), use)],
      [
        "a connection below another",
        (use) => Effect.flatMap(Effect.zipLeft(DbConnection.acquire(), DbConnection.acquire()), use)
      ],
      ["a lazy connection", (use) => Effect.flatMap(DbConnection.acquire({ lazy: true }), use)],
      ["an orphan", (use) => Effect.flatMap(DbConnection.acquire({ reusable: false }), use)],
      [
        "a connection, in a session of another",
        (use) => Effect.flatMap(DbConnection.acquire(), (_) => DbSession.isolated(Effect.zipRight(pid, use(_))))
      ],
      ["the facade, in withConnection", (use) => DbConnection.withConnection(Effect.flatMap(DbConnection, use))],
      [
        "the facade, in a session and a connection in it",
        (use) =>
          DbSession.autocommit(
            Effect.zipRight(pid, DbConnection.withConnection(Effect.flatMap(DbConnection, use), { reuse: false }))
          )
      ]
    ]
  for (const [name, around] of connections) {
    test(`${name}: keeps nothing of a block that fails`, () =>
      Effect.gen(function* () {
        yield* Effect.scoped(
          around(({ sql }) =>
            Effect.gen(function* () {
              expect(yield* Effect.flip(sql.withTransaction(Effect.zipRight(write(sql, 1), no)))).toBe("no")
              expect(yield* rows).toEqual([])
            })
          )
        )
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: runs the block there, with what asks for the ambient session, and commits it`, () =>
      Effect.gen(function* () {
        yield* Effect.scoped(
          around((connection) =>
            Effect.gen(function* () {
              const { sql } = connection
              const there = yield* connection.pid
              yield* sql.withTransaction(
                Effect.gen(function* () {
                  yield* write(sql, 1)
                  yield* insert(2)
                  yield* sql.withTransaction(insert(3))
                  yield* Effect.ignore(sql.withTransaction(Effect.zipRight(write(sql, 4), no)))
                  expect(yield* pid).toBe(there)
                  expect(yield* backend(sql)).toBe(there)
                  expect(yield* rows).toEqual([])
                })
              )
              expect(yield* rows).toEqual([1, 2, 3])
            })
          )
        )
      }))
  }

  const sessions: ReadonlyArray<readonly [name: string, around: (use: (_: Session) => AnyEffect) => AnyEffect]> = [
    ["a session of make", (use) => Effect.flatMap(DbSession.make({ autocommit: true }), use)],
    [
      "a session of make, in another session",
      (use) =>
        Effect.flatMap(DbSession.make({ autocommit: true }), (_) => DbSession.isolated(Effect.zipRight(pid, use(_))))
    ],
    [
      "the current session",
      (use) => DbSession.autocommit(Effect.flatMap(Effect.map(DbSession.current, Option.getOrThrow), use))
    ],
    [
      "the current session, in a block of it",
      (use) => withTransaction(Effect.flatMap(Effect.map(DbSession.current, Option.getOrThrow), use))
    ]
  ]
  for (const [name, around] of sessions) {
    test(`${name}: is a block of it`, () =>
      Effect.gen(function* () {
        yield* Effect.scoped(
          around(({ sql }) =>
            Effect.gen(function* () {
              yield* write(sql, 1)
              expect(yield* Effect.flip(sql.withTransaction(Effect.zipRight(write(sql, 2), no)))).toBe("no")
              yield* sql.withTransaction(Effect.zipRight(write(sql, 3), insert(4)))
              expect(yield* rows).toEqual([])
            })
          )
        )
        expect(yield* rows).toEqual([1, 3, 4])
      }))
  }

  test("provided as the ecosystem's client it is atomic", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const program = Effect.flatMap(SqlClient.SqlClient, (sql) =>
          sql.withTransaction(Effect.zipRight(write(sql, 1), no))
        )
        const connection = yield* DbConnection.acquire({ reusable: false })
        const session = yield* DbSession.make({ autocommit: true })
        for (const { sql } of [connection, session]) {
          expect(yield* Effect.flip(Effect.provideService(program, SqlClient.SqlClient, sql))).toBe("no")
        }
        yield* session.commit
        expect(yield* rows).toEqual([])
      })
    ))

  test("leaves what was ambient as it was, and what the block is is ambient in it", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection.acquire({ reusable: false })
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            const outer = yield* pid
            yield* sql.withTransaction(
              Effect.map(DbTransaction.current, (_) =>
                expect(Option.map(_, ({ depth }) => depth)).toEqual(Option.some(1))
              )
            )
            expect(yield* DbTransaction.current).toEqual(Option.none())
            expect(yield* pid).toBe(outer)
          })
        )
      })
    ))

  test("after its end it is the error of its end, and the block does not run", () =>
    Effect.gen(function* () {
      const connection = yield* Effect.scoped(DbConnection.acquire())
      const session = yield* Effect.scoped(DbSession.make())
      expect(yield* reason(connection.sql.withTransaction(insert(1)))).toBe("ConnectionReleased")
      expect(yield* reason(session.sql.withTransaction(insert(2)))).toBe("SessionClosed")
      expect(yield* rows).toEqual([])
    }))

  test("of a connection waits for the transaction that is open on it", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* DbConnection.acquire()
        const open = yield* Deferred.make<void>()
        const end = yield* Deferred.make<void>()
        const session = yield* Effect.fork(
          DbSession.autocommit(
            Effect.all([insert(1), Deferred.succeed(open, undefined), Deferred.await(end)]).pipe(Effect.zipRight(no))
          )
        )
        yield* Deferred.await(open)
        const block = yield* Effect.fork(connection.sql.withTransaction(Effect.zipRight(insert(2), seen)))
        yield* Effect.yieldNow()
        yield* Deferred.succeed(end, undefined)
        yield* Fiber.await(session)
        expect(yield* Fiber.join(block)).toEqual([2])
        expect(yield* rows).toEqual([2])
      })
    ))

  test("of a connection counts for the commit token of the session around it", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection.acquire({ reusable: false })
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* sql.withTransaction(insert(1))
            expect(Option.isSome(yield* DbSession.commitToken)).toBe(true)
          })
        )
      })
    ))
})

describe("the facade of the connection", () => {
  const agree = Effect.gen(function* () {
    const { pid: ofFacade, sql } = yield* DbConnection
    expect(yield* backend(sql)).toBe(yield* ofFacade)
    const [chunk] = yield* Stream.runCollect(sql<{ pid: number }>`SELECT pg_backend_pid() AS pid`.stream)
    expect(chunk!.pid).toBe(yield* ofFacade)
    return yield* ofFacade
  })

  test("runs its statements on the connection that its pid is of, wherever it is used", () =>
    Effect.gen(function* () {
      const own = { reuse: false }
      const orphan = { reuse: false, reusable: false }
      yield* DbConnection.withConnection(agree)
      yield* DbConnection.withConnection(agree, orphan)
      yield* DbConnection.withConnection(DbSession.autocommit(agree))
      yield* DbConnection.withConnection(DbSession.isolated(agree))
      yield* DbConnection.withConnection(DbSession.autocommit(agree), orphan)
      yield* DbSession.autocommit(DbConnection.withConnection(agree, own))
      yield* DbSession.autocommit(DbConnection.withConnection(agree, orphan))
      yield* DbSession.autocommit(DbConnection.withConnection(DbSession.autocommit(agree), own))
      yield* DbSession.autocommit(Effect.provide(agree, DbConnection.layer()))
      yield* DbSession.autocommit(Effect.scoped(Effect.zipRight(DbConnection.acquire(), agree)))
    }))

  test("in a connection inside a session runs outside of the session", () =>
    Effect.gen(function* () {
      yield* Effect.ignore(
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* DbConnection.withConnection(
              Effect.flatMap(DbConnection, ({ sql }) => write(sql, 2)),
              { reuse: false }
            )
            expect(yield* rows).toEqual([2])
            return yield* no
          })
        )
      )
      expect(yield* rows).toEqual([2])
    }))

  test("in a session runs in the session, whatever connection was around it", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbConnection
      const undone = (id: number) => Effect.ignore(DbSession.autocommit(Effect.zipRight(write(sql, id), no)))
      yield* undone(1)
      yield* DbConnection.withConnection(undone(2))
      yield* DbConnection.withConnection(undone(3), { reuse: false, reusable: false })
      expect(yield* rows).toEqual([])
    }))

  test("without a connection it is the engine's client", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbConnection
      yield* write(sql, 1)
      yield* Effect.ignore(sql.withTransaction(Effect.zipRight(write(sql, 2), no)))
      expect(yield* rows).toEqual([1])
    }))

  test("used by a fiber that has outlived the connection is ConnectionReleased", () =>
    Effect.gen(function* () {
      const over = yield* latch
      const { sql } = yield* DbConnection
      const late = yield* DbConnection.withConnection(
        Effect.forkDaemon(Effect.zipRight(Deferred.await(over), reason(write(sql, 1))))
      )
      yield* open(over)
      expect(yield* Fiber.join(late)).toBe("ConnectionReleased")
      expect(yield* rows).toEqual([])
    }))
})
