/**
 * Sessions that meet in a sandbox, and those that outlive it: each is to see what it would see on a connection of its
 * own, as far as one connection can play it.
 */
import { describe, expect } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Stream from "effect/Stream"
import { DbConnection, DbEngine, DbSchema, DbSession, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { testDatabase } from "./support/database.js"
import { latch, open } from "./support/until.js"
import {
  committed,
  insert,
  no,
  outcome,
  path,
  programsOn,
  reason,
  refused,
  seen,
  sleep,
  sleepingOn
} from "./support/programs.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

const session = DbSession.autocommit
const { isolated } = DbSession

/** A session of another fiber that has written its row and then goes on with the rest. */
const aside = <E, R>(id: number, rest: Effect.Effect<unknown, E, R>) =>
  Effect.gen(function* () {
    const inside = yield* latch
    const fiber = yield* Effect.forkDaemon(isolated(Effect.all([insert(id), open(inside), rest])))
    yield* Deferred.await(inside)
    return fiber
  })

describe("a session that outlives its sandbox", () => {
  test("writes nothing into the database, and is told", () =>
    Effect.gen(function* () {
      const go = yield* latch
      const late = yield* DbTest.sandbox(aside(1, Effect.zipRight(Deferred.await(go), insert(2))))
      yield* open(go)
      expect(outcome(yield* Fiber.await(late))).toBe("PoolClosed")
      expect(yield* rows).toEqual([])
    }))

  test(
    "writes nothing into the transaction of whoever has the connection next",
    () =>
      Effect.gen(function* () {
        const go = yield* latch
        const late = yield* DbTest.sandbox(aside(1, Effect.zipRight(Deferred.await(go), insert(2))))
        yield* withTransaction(Effect.all([insert(3), open(go), Fiber.await(late)]))
        expect(outcome(yield* Fiber.await(late))).toBe("PoolClosed")
        expect(yield* rows).toEqual([3])
      }),
    { maxConnections: 1 }
  )

  test("has no connection any more, nor gets another", () =>
    Effect.gen(function* () {
      const go = yield* latch
      const inside = yield* latch
      const work = Effect.all([insert(1), open(inside), Deferred.await(go), Effect.exit(insert(2)), insert(3)])
      const late = yield* DbTest.sandbox(
        Effect.zipLeft(Effect.forkDaemon(DbConnection.withConnection(work)), Deferred.await(inside))
      )
      yield* open(go)
      expect(outcome(yield* Fiber.await(late))).toBe("PoolClosed")
      expect(yield* rows).toEqual([])
    }))

  test("can't commit what was rolled back", () =>
    Effect.gen(function* () {
      const go = yield* latch
      const late = yield* DbTest.sandbox(aside(1, Deferred.await(go)))
      yield* open(go)
      expect(outcome(yield* Fiber.await(late))).toBe("PoolClosed")
    }))

  test("is told where it waits for its turn", () =>
    Effect.gen(function* () {
      const [inner, outer] = yield* DbTest.sandbox(
        Effect.gen(function* () {
          const both = yield* Deferred.make<Fiber.Fiber<unknown, unknown>>()
          const waits = Effect.flatMap(aside(2, Effect.never), (_) =>
            Effect.zipRight(Deferred.succeed(both, _), insert(3))
          )
          const outer = yield* aside(1, waits)
          return [yield* Deferred.await(both), outer] as const
        })
      )
      expect(outcome(yield* Fiber.await(outer))).toBe("PoolClosed")
      yield* Fiber.interrupt(inner)
      expect(yield* rows).toEqual([])
    }))

  test("does not hold up the end of the sandbox with what it runs", () =>
    Effect.gen(function* () {
      const late = yield* DbTest.sandbox(Effect.zipLeft(aside(1, sleep), sleepingOn(database)))
      expect(outcome(yield* Fiber.await(late))).toBe("PoolClosed")
      expect(yield* rows).toEqual([])
    }))

  test("of a sandbox in a sandbox leaves the outer one alone", () =>
    DbTest.sandbox(
      Effect.gen(function* () {
        const go = yield* latch
        const late = yield* DbTest.sandbox(aside(1, Effect.zipRight(Deferred.await(go), insert(2))))
        yield* session(Effect.all([insert(3), open(go), Fiber.await(late)]))
        expect(outcome(yield* Fiber.await(late))).toBe("PoolClosed")
        expect(yield* seen).toEqual([3])
      })
    ))
})

/** On one connection by hand. */
const by = (...texts: ReadonlyArray<string>) =>
  Effect.flatMap(DbEngine, ({ sql }) => Effect.forEach(texts, (text) => Effect.exit(sql.unsafe(text))))

for (const [where, within] of [
  ["in a sandbox", DbTest.sandbox],
  ["in a sandbox of a sandbox", <A, E, R>(effect: Effect.Effect<A, E, R>) => DbTest.sandbox(DbTest.sandbox(effect))],
  [
    "in a sandbox in a session of a sandbox",
    <A, E, R>(effect: Effect.Effect<A, E, R>) => DbTest.sandbox(session(DbTest.sandbox(effect)))
  ]
] as const) {
  describe(`a failed statement of one session, ${where}`, () => {
    test("is nothing to the session that starts meanwhile", () =>
      within(
        Effect.gen(function* () {
          const [failed, other] = yield* Effect.all(
            [Effect.exit(isolated(refused)), Effect.exit(isolated(insert(1)))],
            {
              concurrency: 2
            }
          )
          expect(outcome(failed)).toBe("UnknownError")
          expect(outcome(other)).toBe("success")
          expect(yield* seen).toEqual([1])
        })
      ))

    test("is nothing to the statements beside it on its connection, which are in no session", () =>
      within(
        Effect.gen(function* () {
          const beside = [insert(1), refused, insert(2)].map(Effect.exit)
          const exits = yield* DbConnection.withConnection(Effect.all(beside, { concurrency: 3 }))
          expect(exits.map(outcome)).toEqual(["success", "UnknownError", "success"])
          expect(yield* seen).toEqual([1, 2])
        })
      ))

    test("is not there when it is interrupted before it was sent, and those behind it are", () =>
      within(
        Effect.gen(function* () {
          yield* DbConnection.withConnection(
            Effect.gen(function* () {
              const first = yield* Effect.fork(insert(1))
              const second = yield* Effect.fork(insert(2))
              yield* Effect.yieldNow()
              yield* Fiber.interrupt(first)
              yield* Fiber.join(second)
              yield* isolated(insert(3))
            })
          )
          expect(yield* seen).toEqual([2, 3])
        })
      ))

    test("can be written down by a session of its own, which stays", () =>
      within(
        Effect.gen(function* () {
          const audited = Effect.tapError(refused, () => isolated(insert(2)))
          expect(outcome(yield* Effect.exit(session(Effect.zipRight(insert(1), audited))))).toBe("UnknownError")
          expect(yield* seen).toEqual([2])
        })
      ))

    test("can be written down by a statement without a session", () =>
      within(
        Effect.gen(function* () {
          const audited = Effect.tapError(refused, () => DbSession.detach(insert(2)))
          expect(outcome(yield* Effect.exit(session(Effect.zipRight(insert(1), audited))))).toBe("UnknownError")
          expect(yield* seen).toEqual([2])
        })
      ))

    test("fails its session until that rolls back, whatever others did meanwhile", () =>
      within(
        Effect.gen(function* () {
          yield* session(
            Effect.gen(function* () {
              yield* insert(1)
              yield* Effect.ignore(refused)
              expect(yield* DbSession.state).toBe("failed")
              yield* isolated(insert(2))
              expect(yield* DbSession.state).toBe("failed")
              expect(yield* reason(insert(3))).toBe("TransactionAborted")
              yield* DbSession.rollback
              yield* insert(4)
            })
          )
          expect(yield* seen).toEqual([2, 4])
        })
      ))

    test("makes its commit fail, whatever others did meanwhile", () =>
      within(
        Effect.gen(function* () {
          const swallowed = session(Effect.all([insert(1), Effect.ignore(refused), isolated(insert(2))]))
          expect(yield* reason(swallowed)).toBe("TransactionAborted")
          expect(yield* seen).toEqual([2])
        })
      ))

    test("takes only its block along", () =>
      within(
        Effect.gen(function* () {
          yield* session(
            Effect.gen(function* () {
              yield* insert(1)
              const block = withTransaction(
                Effect.all([insert(2), Effect.ignore(refused), isolated(seen), Effect.exit(insert(3))])
              )
              expect(yield* reason(block)).toBe("TransactionAborted")
              yield* insert(4)
            })
          )
          expect(yield* seen).toEqual([1, 4])
        })
      ))

    test("of a connection is undone by hand, whatever others did meanwhile", () =>
      within(
        Effect.gen(function* () {
          const outcomes = yield* DbConnection.withConnection(
            Effect.gen(function* () {
              const first = yield* by(
                "begin",
                'SAVEPOINT "S 1"',
                "insert into t values (1)",
                "savepoint s; select 1",
                "x"
              )
              yield* isolated(seen)
              const then = yield* by("select 1", "begin", "rollback to S", "insert into t values (2)", "y")
              yield* isolated(seen)
              return [
                ...first,
                ...then,
                ...(yield* by('ROLLBACK TO SAVEPOINT "S 1"', "insert into t values (3)", "commit"))
              ]
            })
          )
          expect(outcomes.map((_) => Exit.isSuccess(_))).toEqual(
            [1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1].map((_) => _ === 1)
          )
          expect(yield* seen).toEqual([3])
        })
      ))

    test("of a connection is not committed, whatever others did meanwhile", () =>
      within(
        Effect.gen(function* () {
          for (const savepoint of ["select 1", "savepoint s"]) {
            yield* DbConnection.withConnection(
              Effect.all([
                by("begin", "insert into t values (1)", savepoint, "x"),
                isolated(seen),
                by("commit", "insert into t values (2)", "delete from t where id = 2")
              ])
            )
          }
          expect(yield* seen).toEqual([])
        })
      ))
  })
}

describe("the trace of a sandbox", () => {
  test("shows a transaction that failed as it would be sent without", () =>
    Effect.gen(function* () {
      const failing = session(Effect.tapError(refused, () => isolated(insert(1))))
      const [, outside] = yield* DbTest.trace(Effect.exit(failing))
      expect(yield* rows).toEqual([1])
      yield* Effect.flatMap(DbEngine, ({ sql }) => sql`DELETE FROM t`)
      const [, inside] = yield* DbTest.sandbox(DbTest.trace(Effect.exit(failing)))
      expect(inside.statements).toEqual(outside.statements)
    }))
})

/** A setting as it is where the effect stands. */
const setting = (name: string) =>
  Effect.flatMap(DbSession, ({ sql }) =>
    Effect.map(sql<{ value: string | null }>`SELECT current_setting(${name}, true) AS value`, (_) => _[0]?.value ?? "")
  )

const settingsOf = Effect.all([setting("app.tenant"), setting("statement_timeout"), setting("lock_timeout")])

const acme = { settings: { "app.tenant": "acme" }, statementTimeout: "5 seconds", lockTimeout: "4 seconds" } as const

for (const [name, apart] of [
  ["an isolated session", isolated],
  ["a block with requiresNew", withTransaction({ propagation: "requiresNew" })],
  ["a statement without a session", DbSession.detach],
  ["a sandbox in the sandbox", DbTest.sandbox]
] as ReadonlyArray<
  readonly [string, <A, E>(_: Effect.Effect<A, E, DbSession>) => Effect.Effect<A, any, DbSession | DbEngine>]
>) {
  describe(`${name}, inside of a session of a sandbox`, () => {
    test("has none of its settings, and leaves them alone", () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          yield* session(
            Effect.gen(function* () {
              expect(yield* settingsOf).toEqual(["acme", "5s", "4s"])
              expect(yield* apart(settingsOf)).toEqual(["", "0", "0"])
              expect(yield* settingsOf).toEqual(["acme", "5s", "4s"])
              yield* Effect.ignore(apart(refused))
              expect(yield* settingsOf).toEqual(["acme", "5s", "4s"])
            }),
            acme
          )
          expect(yield* settingsOf).toEqual(["", "0", "0"])
        })
      ))

    test("has none of the settings of a block", () =>
      DbTest.sandbox(
        session(
          Effect.gen(function* () {
            const inside = Effect.all([settingsOf, apart(settingsOf), settingsOf])
            expect(yield* withTransaction(inside, { settings: { "app.tenant": "eve" } })).toEqual([
              ["eve", "5s", "4s"],
              ["", "0", "0"],
              ["eve", "5s", "4s"]
            ])
            expect(yield* settingsOf).toEqual(["acme", "5s", "4s"])
          }),
          acme
        )
      ))

    test("has none of what statements of the session have set for their transaction", () =>
      DbTest.sandbox(
        session(
          Effect.gen(function* () {
            const { sql } = yield* DbSession
            yield* sql`SELECT set_config('app.tenant', ${"acme"}, true)`
            yield* sql.unsafe("SET LOCAL lock_timeout = 4000")
            yield* sql.unsafe("SET LOCAL ROLE pg_monitor")
            const all = Effect.all([settingsOf, setting("role")])
            expect(yield* apart(all)).toEqual([["", "0", "0"], "none"])
            expect(yield* all).toEqual([["acme", "0", "4s"], "pg_monitor"])
          })
        )
      ))

    test("does not look where a tenant was that has been left", () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          const before = yield* path
          yield* session(
            Effect.gen(function* () {
              expect(yield* DbSchema.withTenant(path, "acme")).toContain("acme")
              expect(yield* apart(path)).toBe(before)
              expect(yield* DbSchema.withTenant(apart(path), "eve")).toContain("eve")
              expect(yield* apart(path)).toBe(before)
              expect(yield* DbSchema.withTenant(path, "acme")).toContain("acme")
              expect(yield* path).toBe(before)
            })
          )
          expect(yield* path).toBe(before)
        })
      ))
  })
}

describe("settings of sessions in a sandbox", () => {
  test("three sessions deep each has its own", () =>
    DbTest.sandbox(
      session(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const inner = Effect.all([settingsOf, isolated(settingsOf), settingsOf])
          const bob = isolated(inner, { settings: { "app.tenant": "bob" } })
          expect(yield* Effect.zipRight(settingsOf, bob)).toEqual([
            ["bob", "0", "0"],
            ["", "0", "0"],
            ["bob", "0", "0"]
          ])
          expect(yield* settingsOf).toEqual(["acme", "5s", "4s"])
          yield* sql.withTransaction(bob)
          expect(yield* settingsOf).toEqual(["acme", "5s", "4s"])
        }),
        acme
      )
    ))
})

describe("words that only look like a setting", () => {
  test("change nothing", () =>
    DbTest.sandbox(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const text = "INSERT INTO t VALUES (1, 'set local nothing = 1; set_config(''no'', ''x'', true)')"
        yield* session(Effect.all([sql.unsafe(text), isolated(seen)]))
        const nothing = session(Effect.ignore(sql.unsafe("SET LOCAL nothing = 1")))
        expect(yield* reason(nothing)).toBe("TransactionAborted")
        yield* session(Effect.all([sql.unsafe("SELECT set_config('transaction_read_only', 'on', true)"), seen]))
        yield* session(insert(2))
        expect(yield* seen).toEqual([1, 2])
      })
    ))
})

const short = { blockTimeout: "300 millis", settleTimeout: "600 millis" } as const

/** A session that waits for the end of the one that it was opened in. */
const waitsForOuter = (end: Effect.Effect<unknown, unknown, DbSession | DbEngine>) =>
  Effect.gen(function* () {
    const over = yield* latch
    const inner = yield* Deferred.make<Fiber.Fiber<unknown, unknown>>()
    const outer = yield* Effect.exit(
      session(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Deferred.succeed(inner, yield* aside(2, Deferred.await(over)))
          yield* end
        })
      )
    )
    yield* open(over)
    return { outer, inner: yield* Fiber.await(yield* Deferred.await(inner)) }
  })

describe("a wait for another session of the sandbox", () => {
  for (const [name, end] of [
    ["COMMIT", Effect.void],
    ["a commit by hand", DbSession.commit],
    ["a statement", insert(3)]
  ] as const) {
    test(
      `is bounded: ${name}`,
      () =>
        DbTest.sandbox(
          Effect.gen(function* () {
            const { inner, outer } = yield* waitsForOuter(end)
            expect(outcome(outer)).toBe("SessionBusy")
            expect(outcome(inner)).toBe("success")
            const error = yield* Effect.flip(outer)
            expect(String((error as Error).message)).toContain("DbTest.database")
            // What was open is undone, and with it what was in it; others go on.
            yield* session(insert(4))
            expect(yield* seen).toEqual([4])
          })
        ),
      short
    )
  }

  test(
    "is bounded: COMMIT, when the time for it is the shorter one",
    () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          const { inner, outer } = yield* waitsForOuter(Effect.void)
          expect([outcome(outer), outcome(inner)]).toEqual(["SessionBusy", "success"])
          yield* session(insert(4))
          expect(yield* seen).toEqual([4])
        })
      ),
    { blockTimeout: "20 seconds", settleTimeout: "300 millis" }
  )

  test(
    "is bounded: ROLLBACK, and the failure is the one of the program",
    () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          const { inner, outer } = yield* waitsForOuter(no)
          expect([outcome(outer), outcome(inner)]).toEqual(["no", "success"])
          yield* session(insert(4))
          expect(yield* seen).toEqual([4])
        })
      ),
    short
  )

  test(
    "is bounded: the first statement, while one of another session runs",
    () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          const long = yield* Effect.fork(isolated(sleep))
          yield* sleepingOn(database)
          expect(yield* reason(isolated(insert(1)))).toBe("SessionBusy")
          expect(yield* reason(insert(1))).toBe("SessionBusy")
          yield* Fiber.interrupt(long)
          yield* isolated(insert(2))
          expect(yield* seen).toEqual([2])
        })
      ),
    short
  )

  test(
    "is bounded: the end of a sandbox in the sandbox",
    () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          const go = yield* latch
          const inside = yield* latch
          const over = yield* latch
          const other = yield* Effect.fork(
            Effect.zipRight(Deferred.await(go), isolated(Effect.all([insert(2), open(inside), Deferred.await(over)])))
          )
          yield* DbTest.sandbox(Effect.all([insert(1), open(go), Deferred.await(inside)]))
          yield* open(over)
          yield* Fiber.join(other)
          yield* session(insert(4))
          expect(yield* seen).toEqual([4])
        })
      ),
    short
  )

  test("ends where its fiber is interrupted", () =>
    DbTest.sandbox(
      Effect.gen(function* () {
        const over = yield* latch
        yield* session(
          Effect.gen(function* () {
            yield* insert(1)
            const inner = yield* aside(2, Deferred.await(over))
            expect(yield* reason(Effect.timeout(insert(3), "50 millis"))).toContain("TimeoutException")
            yield* open(over)
            yield* Fiber.join(inner)
          })
        )
        expect(yield* seen).toEqual([1, 2])
      })
    ))
})

describe("what the words call the limits of a sandbox", () => {
  test("a session that is opened inside of a read-only one is read-only", () =>
    DbTest.sandbox(
      Effect.gen(function* () {
        const inside = session(Effect.zipRight(seen, reason(isolated(insert(1)))), { readOnly: true })
        expect(yield* inside).toBe("ReadOnlyError")
        yield* session(Effect.all([insert(2), isolated(seen, { readOnly: true }), insert(3)]))
        expect(yield* seen).toEqual([2, 3])
      })
    ))

  test("a session does not survive the rollback of the one that it was opened in", () =>
    DbTest.sandbox(
      Effect.gen(function* () {
        yield* Effect.ignore(session(Effect.all([insert(1), isolated(insert(2)), no])))
        expect(yield* seen).toEqual([])
      })
    ))
})

describe("a savepoint of the sandbox", () => {
  test("that the program takes away ends the sandbox, and all are told", () =>
    Effect.gen(function* () {
      yield* DbTest.sandbox(
        Effect.gen(function* () {
          const [, committed] = yield* DbConnection.withConnection(
            Effect.gen(function* () {
              yield* by("begin")
              const [last] = yield* database.query<{ query: string }>(
                "SELECT query FROM pg_stat_activity WHERE query LIKE 'SAVEPOINT effect_db_sandbox%'"
              )
              return yield* by(last!.query.replace("SAVEPOINT", "RELEASE"), "commit")
            })
          )
          expect(Exit.isFailure(committed!)).toBe(true)
          expect(yield* reason(isolated(insert(1)))).toBe("TransactionAborted")
          expect(yield* reason(insert(1))).toBe("TransactionAborted")
        })
      )
      yield* insert(2)
      expect(yield* rows).toEqual([2])
    }))
})

describe("the connection of a sandbox is lost", () => {
  test("who waits is told, and the sandbox ends", () =>
    Effect.gen(function* () {
      const outcomes = yield* DbTest.sandbox(
        Effect.gen(function* () {
          const waiting = yield* latch
          const outer = yield* Effect.fork(
            session(
              Effect.gen(function* () {
                yield* insert(1)
                yield* aside(2, Effect.never)
                yield* open(waiting)
                yield* insert(3)
              })
            )
          )
          yield* Deferred.await(waiting)
          const pid = yield* DbConnection.withConnection(DbConnection.pid)
          yield* database.query("SELECT pg_terminate_backend($1)", [pid])
          return outcome(yield* Fiber.await(outer))
        })
      )
      expect(outcomes).toBe("ConnectionError")
      expect(yield* rows).toEqual([])
    }))
})

describe("a batch that waits for its turn in a sandbox", () => {
  test("and whose session ends meanwhile never happens, and holds up nobody", () =>
    DbTest.sandbox(
      withTransaction(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* insert(9)
          // While it runs nobody else has a turn.
          const slow = yield* Effect.fork(sql`SELECT pg_sleep(0.3)`)
          yield* sleepingOn(database)
          yield* isolated(
            Effect.gen(function* () {
              const batch = DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql`INSERT INTO t (id) VALUES (2)`])
              yield* Effect.forkDaemon(Effect.ignore(batch))
              yield* Effect.yieldNow()
            })
          )
          yield* Fiber.join(slow)
          expect(yield* seen).toEqual([9])
        })
      )
    ))
})

describe("a statement of a sandbox that has no session", () => {
  let onRow = (): unknown => undefined
  test(
    "and is interrupted when its answer is there already holds up nobody",
    () =>
      DbTest.sandbox(
        Effect.gen(function* () {
          const { sql } = yield* DbEngine
          for (const text of ["SELECT 'x'::text", "SELECT 'x'::text, 1 / (i - 2) FROM generate_series(1, 2) AS i"]) {
            const reader: Fiber.Fiber<unknown, unknown> = yield* Effect.fork(sql.unsafe(text))
            onRow = () => Effect.runFork(Fiber.interrupt(reader))
            yield* Fiber.await(reader)
            onRow = () => undefined
            // Its savepoint may still be on its way to its end.
            yield* Effect.all([insert(1), isolated(insert(2))], { concurrency: 2 })
            expect(yield* seen).toEqual([1, 2])
            yield* sql`DELETE FROM t`
          }
        })
      ),
    { types: { getTypeParser: () => (text: string) => (onRow(), Number(text)) } as never, blockTimeout: "2 seconds" }
  )
})

test("a stream in a sandbox fetches fewer rows when they are wide", () =>
  Effect.gen(function* () {
    const wide = Effect.flatMap(DbEngine, ({ sql }) =>
      Stream.runDrain(sql`SELECT repeat('x', 100000) FROM generate_series(1, 40)`.stream)
    )
    const [, { statements }] = yield* DbTest.sandbox(DbTest.trace(wide))
    expect(statements.filter((_) => _.startsWith("FETCH")).slice(0, 2)).toEqual([
      expect.stringMatching(/^FETCH FORWARD 20 /),
      expect.stringMatching(/^FETCH FORWARD 10 /)
    ])
  }))
