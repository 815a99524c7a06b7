/** Promises that a careless change would break without another test noticing: programs on a database. */
import type { SqlError } from "@effect/sql/SqlError"
import { Deferred, Effect, Fiber, FiberStatus, Option, Stream } from "effect"
import { atomic, DbConnection, DbEngine, DbSchema, DbSession, withTransaction } from "effect-db"
import { describe, expect, it } from "vitest"
import { later } from "../src/internal/commitToken.js"
import { testDatabase, untilActivity } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import type { PgProxy } from "./support/proxy.js"
import {
  committed,
  conflict,
  insert,
  no,
  note,
  outcome,
  pid,
  programsOn,
  proxiedOn,
  reason,
  refused,
  seen,
  sleep
} from "./support/programs.js"
import { pending, until, untilStats } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

const schema = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(sql<{ name: string }>`SELECT current_schema() AS name`, ([row]) => row!.name)
)
const { withSchema } = DbSchema

describe("what ends with its block or its session", () => {
  test("after a savepoint that was rolled back its path is not taken for the transaction's", () =>
    Effect.gen(function* () {
      yield* database.query("CREATE SCHEMA IF NOT EXISTS s1; CREATE SCHEMA IF NOT EXISTS s2")
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* withSchema(schema, "s1")).toBe("s1")
          yield* Effect.ignore(withTransaction(Effect.zipRight(withSchema(schema, "s2"), no)))
          // The server is back at s1.
          expect(yield* withSchema(schema, "s2")).toBe("s2")
        })
      )
    }))

  test("a hook of a block that was released goes with the whole", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      yield* Effect.ignore(
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* note(log, "1")
            yield* insert(1)
            yield* withTransaction(Effect.zipRight(note(log, "2"), insert(2)))
            yield* no
          })
        )
      )
      expect(log).toEqual(["1 rolled back", "2 rolled back"])
    }))

  test(
    "a statement that still runs is cancelled by the rollback, which does not cost the connection",
    () =>
      Effect.gen(function* () {
        const before = yield* pid
        yield* Effect.ignore(
          DbSession.autocommit(
            Effect.gen(function* () {
              yield* insert(1)
              yield* Effect.forkDaemon(sleep)
              yield* untilActivity(database.url, ({ active }) => active === 1)
              yield* no
            })
          )
        )
        expect(yield* pid).toBe(before)
      }),
    { maxConnections: 1, settleTimeout: 3000 }
  )

  test(
    "a statement that waits to be sent when its block ends never happens",
    () =>
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 1)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            const { sql } = yield* DbSession
            const [running, late] = yield* withTransaction(
              Effect.gen(function* () {
                const running = yield* Effect.fork(sql`SELECT pg_advisory_xact_lock(1)`)
                yield* lock.waitedFor
                const late = yield* Effect.fork(reason(insert(5)))
                yield* until("it waits", Effect.map(late.status, FiberStatus.isSuspended))
                return [running, late] as const
              })
            )
            yield* lock.release
            yield* Fiber.join(running)
            expect(yield* Fiber.join(late)).toBe("TransactionClosed")
          })
        )
        expect(yield* rows).toEqual([])
      }),
    { pipelining: false }
  )

  test(
    "nor one that waits for a connection, when that comes",
    () =>
      Effect.gen(function* () {
        const held = yield* Deferred.make<void>()
        const holder = yield* Effect.fork(DbConnection.withConnection(Deferred.await(held)))
        yield* untilStats("all are lent", ({ max, used }) => used === max)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            const late = yield* withTransaction(Effect.zipLeft(Effect.fork(reason(insert(5))), pending(1)))
            expect(yield* Fiber.join(late)).toBe("TransactionClosed")
            yield* Deferred.succeed(held, undefined)
            yield* insert(6)
          })
        )
        yield* Fiber.join(holder)
        expect(yield* rows).toEqual([6])
      }),
    { maxConnections: 1 }
  )

  test("atomic that a fiber still runs when its session ends is not kept", () =>
    Effect.gen(function* () {
      const fiber = yield* DbSession.autocommit(
        Effect.gen(function* () {
          const inserted = yield* Deferred.make<void>()
          const fiber = yield* Effect.forkDaemon(
            atomic(Effect.all([insert(1), Deferred.succeed(inserted, undefined), Effect.never]))
          )
          yield* Deferred.await(inserted)
          return fiber
        })
      )
      expect(yield* rows).toEqual([])
      yield* Fiber.interrupt(fiber)
      expect(yield* rows).toEqual([])
    }))

  for (const [what, propagation] of [
    ["was joined by", "required"],
    ["is around", "nested"]
  ] as const) {
    test(`a block that ${what} one that has ended early is rolled back when it is interrupted later`, () =>
      Effect.gen(function* () {
        const ended = yield* Deferred.make<void>()
        const fiber = yield* Effect.fork(
          withTransaction(
            Effect.gen(function* () {
              yield* insert(1)
              yield* withTransaction((tx) => Effect.zipRight(insert(2), tx.end("commit")), { propagation })
              yield* Deferred.succeed(ended, undefined)
              yield* Effect.never
            })
          )
        )
        yield* Deferred.await(ended)
        yield* Fiber.interrupt(fiber)
        expect(yield* rows).toEqual([])
      }))
  }

  test("a session whose ambient connection was released for good takes one of its own", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* DbConnection.acquire()
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* DbSession.commit
            yield* DbSession.close
            yield* root.release()
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual([1, 2])
      })
    ))

  test("a consumer that fails undoes what the query of a stream with its own transaction did", () =>
    Effect.gen(function* () {
      yield* database.query(
        "CREATE OR REPLACE FUNCTION put(int) RETURNS int LANGUAGE sql AS 'INSERT INTO t (id) VALUES ($1) RETURNING id'"
      )
      const { sql } = yield* DbEngine
      const failing = Stream.runForEach(sql`SELECT put(id) FROM generate_series(1, 3) AS id`.stream, () => no)
      expect(yield* Effect.flip(failing)).toBe("no")
      expect(yield* rows).toEqual([])
    }))
})

describe("a session whose time is over", () => {
  const timeout = "500 millis"
  const over = until(
    "the session's time is over",
    Effect.map(DbSession.state, (state) => state === "failed")
  )

  test("its statement is cancelled, what comes after it fails, and all of it is rolled back", () =>
    Effect.gen(function* () {
      yield* pid
      const session = Effect.scoped(
        Effect.gen(function* () {
          yield* DbSession.scoped({ timeout })
          yield* insert(1)
          expect(yield* reason(sleep)).toBe("QueryCanceled")
          expect(yield* reason(insert(2))).toBe("TransactionTimeout")
        })
      )
      expect(outcome(yield* Effect.exit(session))).toBe("defect: TransactionTimeout")
      expect(yield* rows).toEqual([])
    }))

  proxied("a statement after the time of its session is not sent", (proxy) =>
    Effect.gen(function* () {
      yield* pid
      const session = Effect.scoped(
        Effect.gen(function* () {
          yield* DbSession.scoped({ timeout })
          yield* insert(1)
          yield* over
          proxy.reset()
          expect(yield* reason(insert(2))).toBe("TransactionTimeout")
        })
      )
      expect(outcome(yield* Effect.exit(session))).toBe("defect: TransactionTimeout")
      expect(proxy.statements().filter((text) => text.includes("INSERT"))).toEqual([])
      expect(yield* rows).toEqual([])
    })
  )

  test("what comes in its place after a close is late as well", () =>
    Effect.scoped(
      Effect.gen(function* () {
        yield* DbSession.scoped({ timeout })
        yield* insert(1)
        yield* over
        yield* DbSession.close
        expect(yield* reason(insert(2))).toBe("TransactionTimeout")
        yield* DbSession.close
        expect(yield* rows).toEqual([])
      })
    ))

  test("one on a shared connection leaves no transaction open there", () =>
    Effect.gen(function* () {
      yield* DbConnection.withConnection(
        Effect.gen(function* () {
          const before = yield* pid
          const session = Effect.scoped(
            Effect.gen(function* () {
              yield* DbSession.scoped({ timeout })
              yield* insert(1)
              yield* over
            })
          )
          expect(outcome(yield* Effect.exit(session))).toBe("defect: TransactionTimeout")
          yield* insert(3)
          expect(yield* rows).toEqual([3])
          expect(yield* pid).toBe(before)
        })
      )
      expect(yield* rows).toEqual([3])
    }))
})

describe("commits", () => {
  proxied("a commit without an answer may have written: there is a token", (proxy) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
        yield* insert(1)
        expect(yield* reason(DbSession.commit)).toBe("CommitUnknown")
        expect(Option.isSome(yield* DbSession.commitToken)).toBe(true)
      })
    )
  )

  const batch = Effect.flatMap(DbEngine, ({ sql }) =>
    DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql`SELECT 2`])
  )
  const writes: ReadonlyArray<readonly [string, Effect.Effect<unknown, SqlError, DbEngine | DbSession>]> = [
    ["an implicit statement", insert(1)],
    ["a batch", batch]
  ]
  for (const [name, write] of writes) {
    proxied(`${name} without an answer may have written: there is a token`, (proxy) =>
      Effect.gen(function* () {
        void proxy.cutAfter(({ text }) => text.startsWith("INSERT"), { forward: true })
        const [lost, token] = yield* DbSession.withCommitToken(reason(write))
        expect(lost).toBe("ConnectionError")
        yield* until(
          "it is committed",
          Effect.map(rows, (ids) => ids.length === 1)
        )
        expect(Option.isSome(token)).toBe(true)
      })
    )
  }

  for (const [name, write] of writes) {
    test(
      `${name} that is interrupted before it is sent has written nothing: there is no token`,
      () =>
        DbConnection.withConnection(
          Effect.gen(function* () {
            const lock = yield* lockedOutside(database, 1)
            const { sql } = yield* DbEngine
            const before = yield* Effect.fork(sql`SELECT pg_advisory_xact_lock(1)`)
            yield* lock.waitedFor
            const [, token] = yield* DbSession.withCommitToken(
              Effect.gen(function* () {
                const behind = yield* Effect.fork(write)
                yield* Effect.yieldNow()
                yield* Fiber.interrupt(behind)
                yield* lock.release
                yield* Fiber.join(before)
              })
            )
            expect(Option.isNone(token)).toBe(true)
            expect(yield* rows).toEqual([])
          })
        ),
      { pipelining: false }
    )
  }

  test("a batch of queries has written nothing: there is no token", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const [, token] = yield* DbSession.withCommitToken(DbSession.batch([sql`SELECT id FROM t`, sql`SELECT 2`]))
      expect(Option.isNone(token)).toBe(true)
    }))

  test("atomic that commits what is open first: the session's beforeCommit runs before that commit too", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const log: Array<ReadonlyArray<number>> = []
        yield* DbSession.beforeCommit(Effect.map(seen, (ids) => log.push(ids)))
        yield* insert(1)
        yield* atomic(insert(2))
        expect(log).toEqual([[1], [1, 2]])
      })
    ))

  const both = Effect.zipRight(DbSession.beforeCommit(insert(2)), insert(1))
  for (const [name, block] of [
    ["withTransaction", withTransaction((tx) => Effect.zipRight(both, tx.end("commit")))],
    ["atomic", atomic((tx) => Effect.zipRight(both, tx.end("commit")))]
  ] as const) {
    test(`${name} that is ended early by a commit runs its beforeCommit, inside`, () =>
      Effect.gen(function* () {
        yield* block
        expect(yield* rows).toEqual([1, 2])
      }))
  }
})

it("the later of two commit tokens is the later position, and what is no token comes first", () => {
  expect(later("0/FF", "0/100")).toBe("0/100")
  expect(later("10/0", "9/FFFFFFFF")).toBe("10/0")
  expect(later("a/1", "B/0")).toBe("B/0")
  expect(later(undefined, "0/1")).toBe("0/1")
  expect(later("0/1", undefined)).toBe("0/1")
  expect(later("0/1", "no")).toBe("no")
  expect(later("no", "0/1")).toBe("no")
})

test("a commit token can be had while the next transaction has failed", () =>
  DbSession.autocommit(
    Effect.gen(function* () {
      yield* insert(1)
      yield* DbSession.commit
      yield* Effect.ignore(refused)
      expect(Option.isSome(yield* DbSession.commitToken)).toBe(true)
      yield* DbSession.rollback
    })
  ))

test("what an effect with a commit token has committed counts for those around it too", () =>
  Effect.gen(function* () {
    const [[, inner], outer] = yield* DbSession.withCommitToken(DbSession.withCommitToken(insert(1)))
    expect([Option.isSome(inner), Option.isSome(outer)]).toEqual([true, true])
    yield* DbSession.autocommit(
      Effect.gen(function* () {
        yield* DbSession.withCommitToken(DbSession.isolated(insert(2)))
        expect(Option.isSome(yield* DbSession.commitToken)).toBe(true)
      })
    )
  }))

test("waitFor in an idle session is made again when the server has lost its prepared statement", () =>
  DbSession.autocommit(
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* DbSession.waitFor("0/1")
      yield* sql`DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$`
      yield* DbSession.rollback
      yield* DbSession.waitFor("0/1")
    })
  ))

test("the beforeCommit of an autocommit that has joined does not run for what comes after a rollback of its work", () =>
  DbSession.autocommit(
    Effect.gen(function* () {
      let runs = 0
      yield* DbSession.autocommit(insert(1), { beforeCommit: Effect.sync(() => void runs++) })
      yield* DbSession.rollback
      yield* insert(2)
      yield* DbSession.commit
      expect(runs).toBe(0)
    })
  ))

proxied(
  "waitFor is over in its time, also where the server says nothing any more",
  (via) =>
    Effect.gen(function* () {
      yield* DbEngine.ping
      via.pause()
      expect(yield* reason(DbSession.waitFor("0/1", { timeout: "100 millis" }))).toBe("ReplicaBehind")
      via.resume()
    }),
  { settleTimeout: "1 minute" }
)

describe("a BEGIN that was lost, with what rode behind it", () => {
  const losing = <A, E, R>(proxy: PgProxy, effect: Effect.Effect<A, E, R>) =>
    Effect.suspend(() => {
      void proxy.cutAfter(({ text }) => text.startsWith("BEGIN"), { forward: false })
      return Effect.map(reason(effect), (reason) => expect(reason).toBe("ConnectionError"))
    })

  proxied("its search path is set again", (proxy) =>
    Effect.gen(function* () {
      yield* database.query("CREATE SCHEMA IF NOT EXISTS s1")
      yield* DbSession.autocommit(
        withSchema(
          Effect.gen(function* () {
            yield* losing(proxy, schema)
            expect(yield* schema).toBe("s1")
          }),
          "s1"
        )
      )
    })
  )

  proxied("its savepoint is opened again", (proxy) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* Effect.flip(withTransaction(Effect.zipRight(losing(proxy, insert(1)), Effect.zipRight(insert(2), no))))
        yield* insert(3)
        expect(yield* seen).toEqual([3])
      })
    )
  )

  proxied("its options are not those of the block that comes next", (proxy) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* losing(proxy, insert(1))
        const { sql } = yield* DbSession
        const level = sql`SELECT current_setting('transaction_isolation') AS level`
        expect(yield* atomic(level, { isolation: "serializable" })).toEqual([{ level: "serializable" }])
      })
    )
  )
})

describe("options of a block", () => {
  test("a block in a read-only block can't have readOnly: false", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* insert(1)
        const block = withTransaction(withTransaction(insert(2), { readOnly: false }), { readOnly: true })
        expect(yield* reason(block)).toBe("PropagationError")
      })
    ))

  test("append is not tried again: what it was appended to would be lost", () =>
    Effect.gen(function* () {
      let attempts = 0
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const body = Effect.suspend(() => (++attempts === 1 ? conflict : insert(2)))
          expect(yield* reason(atomic(body, { currentTransaction: "append", retry: true }))).toBe("SerializationError")
        })
      )
      expect(attempts).toBe(1)
      expect(yield* rows).toEqual([])
    }))

  test("one that is undefined hides no default of the session", () =>
    Effect.gen(function* () {
      const work = DbSession.autocommit(atomic(insert(1), { readOnly: undefined, isolation: undefined }), {
        readOnly: true
      })
      expect(yield* reason(work)).toBe("ReadOnlyError")
      expect(yield* rows).toEqual([])
    }))

  test("a setting with a backslash rides with several statements too, whatever the server takes strings for", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const odd = String.raw`it's \' -- \\`
      yield* withTransaction(
        Effect.gen(function* () {
          yield* sql`SET LOCAL standard_conforming_strings = off`
          const rows = yield* withTransaction(sql.unsafe("SELECT 1 AS x; SELECT current_setting('app.odd') AS x"), {
            settings: { "app.odd": odd }
          })
          expect(rows).toEqual([[{ x: 1 }], [{ x: odd }]])
        })
      )
    }))
})

test("a statement on a connection that is tried again, its plan being gone, is not in a session that has come in between", () =>
  DbConnection.withConnection(
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const add = (id: number) => sql`INSERT INTO t (id) VALUES (${id}) RETURNING *`
      yield* add(1)
      yield* database.query("ALTER TABLE t ADD COLUMN more int")
      const undone = Effect.flip(DbSession.autocommit(Effect.zipRight(insert(3), no)))
      yield* Effect.all([add(2), undone], { concurrency: "unbounded" })
      expect(yield* rows).toEqual([1, 2])
    })
  ))
