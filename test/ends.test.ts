/**
 * Ends that meet: of one transaction by several fibers, of blocks in blocks, early ones, and of what joins.
 */
import { describe, expect } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import {
  atomic,
  DbConnection,
  DbError,
  DbQuery,
  DbSession,
  type DbSql,
  DbTransaction,
  withTransaction
} from "effect-db"
import { vi } from "vitest"
import { Unit } from "../src/internal/unit.js"
import { testDatabase } from "./support/database.js"
import { latch, open, until } from "./support/until.js"
import {
  type Around,
  blockAside,
  committed,
  insert,
  no,
  outcome,
  programsOn,
  reason,
  refused,
  sleep
} from "./support/programs.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

const session = DbSession.autocommit

test("a block that waits for its turn when the session ends is SessionClosed, and does not begin", () =>
  Effect.gen(function* () {
    let begun = false
    const body = Effect.zipRight(
      Effect.sync(() => void (begun = true)),
      insert(2)
    )
    const waiting = yield* session(
      Effect.gen(function* () {
        yield* insert(1)
        yield* blockAside((body) => withTransaction(body))
        const waiting = yield* Effect.forkDaemon(reason(withTransaction(body)))
        yield* Effect.yieldNow()
        return waiting
      })
    )
    expect(yield* Fiber.join(waiting)).toBe("SessionClosed")
    expect(begun).toBe(false)
    expect(yield* rows).toEqual([1])
  }))

describe("ends of a transaction that meet", () => {
  test("a commit takes no half of a block that a sibling opens while its hooks run", () =>
    Effect.gen(function* () {
      yield* Effect.ignore(
        session(
          Effect.gen(function* () {
            const inside = yield* latch
            const go = yield* latch
            yield* insert(1)
            yield* DbSession.beforeCommit(Effect.zipRight(open(inside), Deferred.await(go)))
            const commit = yield* Effect.fork(DbSession.commit)
            yield* Deferred.await(inside)
            // Nothing is on its way while it is open.
            const idle = Effect.zipRight(open(go), Effect.timeoutOption(Fiber.await(commit), 200))
            const block = Effect.zipRight(insert(2), Effect.zipRight(idle, no))
            yield* Effect.ignore(withTransaction(block))
            yield* Fiber.join(commit)
            yield* insert(3)
            yield* no
          })
        )
      )
      expect(yield* rows).toEqual([1])
    }))

  test("nor does that of a block by hand: SessionBusy, and it can be committed afterwards", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const inside = yield* latch
          const go = yield* latch
          const tx = yield* DbSession.begin()
          yield* insert(1)
          yield* DbSession.beforeCommit(Effect.zipRight(open(inside), Deferred.await(go)))
          const commit = yield* Effect.fork(reason(tx.commit))
          yield* Deferred.await(inside)
          yield* Effect.ignore(
            withTransaction(
              Effect.gen(function* () {
                yield* insert(2)
                yield* open(go)
                expect(yield* Fiber.join(commit)).toBe("SessionBusy")
                yield* no
              })
            )
          )
          yield* tx.commit
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("the session's end does not report success for what another fiber's commit has lost", () =>
    Effect.gen(function* () {
      yield* database.query(
        "DROP TABLE IF EXISTS twin; CREATE TABLE twin (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
      )
      const exit = yield* Effect.exit(
        session(
          Effect.gen(function* () {
            const { sql } = yield* DbSession
            yield* sql`INSERT INTO twin VALUES (1), (1)`
            yield* Effect.forkDaemon(DbSession.commit)
            yield* Effect.yieldNow()
          })
        )
      )
      expect(outcome(exit)).toBe("UniqueViolation")
    }))

  test("a second commit is told what the first has lost", () =>
    Effect.gen(function* () {
      yield* database.query(
        "DROP TABLE IF EXISTS twin; CREATE TABLE twin (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
      )
      yield* session(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* sql`INSERT INTO twin VALUES (1), (1)`
          const commit = Effect.exit(DbSession.commit)
          const exits = yield* Effect.all([commit, commit, commit], { concurrency: 3 })
          expect(exits.map(outcome)).toEqual(["UniqueViolation", "UniqueViolation", "UniqueViolation"])
        })
      )
    }))

  test("a commit is not held up by a sibling that never pauses", () =>
    session(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        yield* insert(1)
        const running = yield* latch
        const more = Effect.forever(Effect.zipRight(sql`SELECT 1`, open(running)))
        const sibling = yield* Effect.fork(more)
        yield* Deferred.await(running)
        const done = yield* Effect.timeoutOption(DbSession.commit, 5000)
        yield* Fiber.interrupt(sibling)
        expect(Option.isSome(done)).toBe(true)
        yield* Effect.ignore(DbSession.rollback)
      })
    ))

  test("what waits behind a commit and a rollback is in the transaction after both", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Effect.all([DbSession.commit, DbSession.rollback, insert(2)], { concurrency: 3 })
        })
      )
      expect(yield* rows).toEqual([1, 2])
    }))

  for (const [name, last] of [
    ["succeeds", Effect.void],
    ["fails", no]
  ] as const) {
    test(`a block that ${name} while one in it is being rolled back harms nothing that follows`, () =>
      Effect.gen(function* () {
        yield* session(
          Effect.gen(function* () {
            const go = yield* latch
            yield* insert(9)
            const inner = withTransaction(Effect.zipRight(insert(1), Effect.zipRight(open(go), no)))
            yield* Effect.ignore(
              withTransaction(
                Effect.gen(function* () {
                  yield* insert(3)
                  yield* Effect.forkDaemon(Effect.ignore(inner))
                  yield* Deferred.await(go)
                  yield* last
                })
              )
            )
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual(name === "fails" ? [2, 9] : [2, 3, 9])
      }))
  }

  test("a block that the one around it undoes while it ends is told so", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const inside = yield* latch
          const go = yield* latch
          const over = yield* latch
          yield* insert(9)
          const inner = withTransaction(Effect.zipRight(insert(1), Effect.zipRight(open(inside), Deferred.await(over))))
          // When it ends, the rollback to the savepoint of the inner one is on its way.
          const middle = withTransaction(
            Effect.gen(function* () {
              yield* insert(5)
              yield* Effect.forkDaemon(Effect.ignore(inner))
              yield* Deferred.await(inside)
              yield* open(go)
            })
          )
          const fiber = yield* withTransaction(
            Effect.gen(function* () {
              yield* insert(3)
              const fiber = yield* Effect.forkDaemon(Effect.exit(middle))
              yield* Deferred.await(go)
              return fiber
            })
          )
          expect(outcome(yield* Fiber.join(fiber))).toBe("TransactionClosed")
          yield* open(over)
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2, 3, 9])
    }))

  test("what waits for the end of a block by hand that is too late is not late itself", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const tx = yield* DbSession.begin({ timeout: 50 })
          // Not many short ones: one that is cancelled as it ends costs the connection.
          expect(yield* reason(Effect.zipRight(insert(1), sleep))).toBe("TransactionTimeout")
          yield* Effect.all([tx.rollback, insert(2)], { concurrency: 2 })
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("nor in the mode of that block, when its hooks go on", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const done = yield* latch
          const tx = yield* DbSession.begin({ readOnly: true })
          yield* sql`SELECT 1`
          yield* DbSession.afterCommit(Deferred.await(done))
          yield* Effect.all([tx.commit, Effect.zipRight(insert(2), open(done))], { concurrency: 2 })
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("a session by hand that was too late and was rolled back ends in peace, and its connection is kept", () =>
    Effect.gen(function* () {
      const before = yield* DbConnection.withConnection(DbConnection.pid)
      yield* Effect.scoped(
        Effect.gen(function* () {
          const late = yield* DbSession.make({ autocommit: true, timeout: 1000 })
          // What it cut off on its way would cost the connection.
          yield* late.use(Effect.zipRight(insert(1), late.rollback))
          yield* until(
            "it is too late",
            Effect.map(late.state, (state) => state === "failed")
          )
          yield* late.rollback
          yield* late.rollback
        })
      )
      expect(yield* DbConnection.withConnection(DbConnection.pid)).toBe(before)
      expect(yield* rows).toEqual([])
    }))

  test("a hook that ends its own block by hand is SessionBusy", () =>
    session(
      Effect.gen(function* () {
        const tx = yield* DbSession.begin()
        yield* insert(1)
        yield* DbSession.beforeCommit(tx.commit)
        expect(yield* reason(tx.commit)).toBe("SessionBusy")
      })
    ))

  test("the hooks before a commit by hand can be interrupted, and it is rolled back", () =>
    session(
      Effect.gen(function* () {
        const inside = yield* latch
        const tx = yield* DbSession.begin()
        yield* insert(1)
        yield* DbSession.beforeCommit(Effect.zipRight(open(inside), Effect.never))
        const commit = yield* Effect.fork(tx.commit)
        yield* Deferred.await(inside)
        yield* Fiber.interrupt(commit)
        expect(yield* rows).toEqual([])
      })
    ))

  test("a commit behind a rollback has nothing to commit", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Effect.all([DbSession.rollback, DbSession.commit], { concurrency: 2 })
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("close in a block that stands in one by hand is SessionBusy", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const tx = yield* DbSession.begin()
          yield* withTransaction(
            Effect.gen(function* () {
              yield* insert(1)
              expect(yield* reason(DbSession.close)).toBe("SessionBusy")
            })
          )
          yield* tx.commit
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe('tx.end("commit") through what is no block of withTransaction', () => {
  test("a block for a scope is kept", () =>
    Effect.gen(function* () {
      const kept = yield* withTransaction((tx) =>
        Effect.zipRight(
          insert(1),
          Effect.scoped(Effect.zipRight(DbTransaction.scoped(), Effect.zipRight(insert(2), tx.end("commit", "x"))))
        )
      )
      expect(kept).toBe("x")
      expect(yield* rows).toEqual([1, 2])
    }))

  test("a block for a scope that can't be kept fails the block that ends", () =>
    Effect.gen(function* () {
      const work = withTransaction((tx) =>
        Effect.zipRight(
          insert(1),
          Effect.scoped(
            Effect.zipRight(DbTransaction.scoped(), Effect.zipRight(Effect.ignore(refused), tx.end("commit", "x")))
          )
        )
      )
      expect(yield* reason(work)).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))

  const elsewhere: Readonly<Record<string, Around>> = {
    isolated: (effect) => DbSession.isolated(effect),
    requiresNew: (effect) => withTransaction(effect, { propagation: "requiresNew" }),
    notSupported: (effect) => withTransaction(effect, { propagation: "notSupported" }),
    "a session for a scope": (effect) => Effect.scoped(Effect.zipRight(DbSession.scoped(), effect)) as never,
    "a session by hand": (effect) => Effect.scoped(Effect.flatMap(DbSession.make(), (_) => _.use(effect))) as never,
    "isolated, and notSupported in it": (effect) =>
      DbSession.isolated(withTransaction(withTransaction(effect, { propagation: "notSupported" })))
  }
  for (const [name, around] of Object.entries(elsewhere)) {
    test(`a block is from inside of ${name} as well`, () =>
      Effect.gen(function* () {
        const kept = yield* withTransaction((tx) =>
          Effect.zipRight(insert(1), withTransaction(Effect.zipRight(insert(2), around(tx.end("commit", "x")))))
        )
        expect(kept).toBe("x")
        expect(yield* rows).toEqual([1, 2])
      }))
  }

  test("a joining autocommit is", () =>
    Effect.gen(function* () {
      expect(yield* withTransaction((tx) => session(Effect.zipRight(insert(3), tx.end("commit", "x"))))).toBe("x")
      expect(yield* rows).toEqual([3])
    }))
})

describe("many statements at once in a block that ends", () => {
  const many = (sql: DbSql) =>
    DbSession.batch(Array.from({ length: 10 }, (_, i) => sql`INSERT INTO t (id) VALUES (${10 + i})`))

  test("a batch is there in full or not at all", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* insert(1)
          yield* Effect.forkDaemon(Effect.ignore(many(sql)))
          yield* Effect.yieldNow()
        })
      )
      expect([1, 11]).toContain((yield* rows).length)
    }))

  test("a batch whose first statement fails leaves nothing, and the block around it fails", () =>
    Effect.gen(function* () {
      const work = Effect.flatMap(DbSession, ({ sql }) => Effect.zipRight(insert(10), many(sql)))
      expect(yield* reason(session(work))).toBe("UniqueViolation")
      expect(yield* rows).toEqual([])
    }))

  test("a rollback to its savepoint is not passed over with what failed before it", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Effect.ignore(
            withTransaction(
              Effect.gen(function* () {
                for (let i = 0; i < 7; i++) yield* Effect.fork(Effect.ignore(insert(10 + i)))
                yield* Effect.fork(Effect.ignore(refused))
                yield* Effect.yieldNow()
                yield* no
              })
            )
          )
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([1, 2])
    }))
})

describe("settings of a session", () => {
  const setting = (name: string) =>
    Effect.flatMap(DbSession, ({ sql }) =>
      Effect.map(sql<{ x: string | null }>`SELECT current_setting(${name}, true) AS x`, ([row]) => row!.x ?? "")
    )
  const both = Effect.all([setting("app.tenant"), setting("app.user")])
  const user = { settings: { "app.user": "ada" } }
  for (const [name, block] of [
    ["withTransaction", withTransaction(both, user)],
    ["atomic", atomic(both, user)],
    ["begin", Effect.zipRight(DbSession.begin(user), both)]
  ] as const) {
    test(`${name} with settings of its own has both`, () =>
      Effect.gen(function* () {
        const work = session(block as Effect.Effect<unknown, unknown, any>, { settings: { "app.tenant": "acme" } })
        expect(yield* work).toEqual(["acme", "ada"])
      }))
  }
})

describe("a block that joins", () => {
  const level = Effect.flatMap(DbSession, ({ sql }) => sql`SELECT current_setting('transaction_isolation') AS i`)
  const serializable = { isolation: "serializable" } as const
  for (const [name, join] of [
    ["required", withTransaction(level, { propagation: "required", ...serializable })],
    ["autocommit", session(level, serializable)]
  ] as const) {
    test(`${name}: is held to the transaction that it gets, not to a sibling's that is open meanwhile`, () =>
      Effect.gen(function* () {
        yield* Effect.ignore(
          session(
            Effect.gen(function* () {
              const aside = yield* blockAside((body) => atomic(body, serializable), insert(1))
              const joined = yield* Effect.fork(Effect.exit(join as Effect.Effect<unknown, unknown, DbSession>))
              yield* Effect.yieldNow()
              yield* aside.end
              expect(outcome(yield* Fiber.join(joined))).toBe("PropagationError")
            })
          )
        )
      }))
  }

  test("and fails in a savepoint by hand spoils that one, not the session", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          const tx = yield* DbSession.savepoint()
          yield* Effect.ignore(withTransaction(Effect.zipRight(insert(2), no), { propagation: "required" }))
          expect(yield* reason(tx.commit)).toBe("TransactionAborted")
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([1, 3])
    }))

  test("and fails takes its beforeCommit along", () =>
    Effect.gen(function* () {
      let runs = 0
      yield* session(
        Effect.gen(function* () {
          yield* Effect.ignore(session(no, { beforeCommit: Effect.sync(() => void runs++) }))
          yield* DbSession.rollback
          yield* insert(1)
        })
      )
      expect([runs, yield* rows]).toEqual([0, [1]])
    }))

  test("and is rolled back takes its beforeCommit along", () =>
    Effect.gen(function* () {
      let runs = 0
      yield* session(
        Effect.gen(function* () {
          yield* session(insert(1), { beforeCommit: Effect.sync(() => void runs++) })
          yield* DbSession.rollback
          yield* insert(2)
        })
      )
      expect([runs, yield* rows]).toEqual([0, [2]])
    }))

  const withHook = (id: number) => session(insert(id), { beforeCommit: Effect.void })
  for (const [name, once] of [
    ["is committed", (id: number) => Effect.zipRight(withHook(id), DbSession.commit)],
    ["is committed with a block", (id: number) => Effect.zipRight(withTransaction(withHook(id)), DbSession.commit)],
    ["is rolled back", (id: number) => Effect.zipRight(withHook(id), DbSession.rollback)],
    [
      "fails",
      (id: number) =>
        Effect.zipRight(
          Effect.ignore(session(Effect.zipRight(insert(id), no), { beforeCommit: Effect.void })),
          DbSession.rollback
        )
    ]
  ] as const) {
    test(`and ${name} leaves no hook in a session that goes on`, () =>
      Effect.gen(function* () {
        const over = vi.spyOn(Unit.prototype, "over")
        yield* Effect.addFinalizer(() => Effect.sync(() => over.mockRestore()))
        yield* session(
          Effect.gen(function* () {
            for (let id = 1; id <= 3; id++) yield* once(id)
            const [unit] = over.mock.contexts as Array<Unit>
            expect(unit!.frame.beforeCommit?.size).toBe(0)
          })
        )
      }))
  }

  test("and fails after it has closed the session takes the next one's work back", () =>
    Effect.gen(function* () {
      const failed = Effect.ignore(session(Effect.all([insert(1), DbSession.close, insert(2), no])))
      expect(yield* reason(session(Effect.zipRight(failed, insert(3))))).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))

  test("runs its beforeCommit again for a commit that comes after one that it has prevented", () =>
    Effect.gen(function* () {
      let refuses = true
      const never = Effect.fail(DbError.make("CheckViolation", { message: "no", hint: "no" }))
      const beforeCommit = Effect.zipRight(
        Effect.when(never, () => refuses),
        insert(2)
      )
      yield* session(
        Effect.gen(function* () {
          yield* session(insert(1), { beforeCommit })
          expect(yield* reason(DbSession.commit)).toBe("CheckViolation")
          refuses = false
          yield* DbSession.commit
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([1, 2, 3])
    }))

  test("runs its beforeCommit before those that came later, each once", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      const note = (what: string) => Effect.sync(() => void log.push(what))
      yield* session(
        Effect.gen(function* () {
          yield* session(insert(1), { beforeCommit: note("first") })
          yield* withTransaction(session(insert(2), { beforeCommit: note("second") }))
          yield* DbSession.beforeCommit(note("own"))
          yield* session(insert(3), { beforeCommit: note("third") })
          yield* DbSession.commit
          yield* insert(4)
        })
      )
      expect(log).toEqual(["first", "second", "own", "third", "own"])
    }))
})

describe("a COPY that waits for its own session", () => {
  const busy = { blockTimeout: 100 }
  const series = Effect.map(DbSession, ({ sql }) => sql<{ i: number }>`SELECT generate_series(1, 3) AS i`.stream)

  test(
    "to read what it fills: SessionBusy, and nothing is kept",
    () =>
      Effect.gen(function* () {
        const work = Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* insert(9)
          const lines = Stream.map(yield* series, ({ i }) => `${i}\n`)
          yield* DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, lines)
        })
        expect(yield* reason(session(work))).toBe("SessionBusy")
        expect(yield* rows).toEqual([])
      }),
    busy
  )

  test(
    "to use what it reads: SessionBusy",
    () =>
      Effect.gen(function* () {
        const work = Effect.flatMap(DbSession, ({ sql }) =>
          DbQuery.copyTo(sql`COPY (SELECT repeat('x', 2000) FROM generate_series(1, 5000)) TO STDOUT`).pipe(
            Stream.runForEach(() => sql`SELECT 1`)
          )
        )
        expect(yield* reason(session(work))).toBe("SessionBusy")
      }),
    busy
  )

  test("and has ended lets the others have their turn", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const copy = DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("1\n"))
          yield* Effect.all([copy, insert(2), withTransaction(insert(3))], { concurrency: 3 })
        })
      )
      expect(yield* rows).toEqual([1, 2, 3])
    }))
})

test("a batch on an orphan that was released is ConnectionReleased, as a statement is", () =>
  DbConnection.withConnection(
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* DbConnection.release()
      expect(yield* reason(sql`SELECT 1`)).toBe("ConnectionReleased")
      expect(yield* reason(DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`]))).toBe("ConnectionReleased")
    }),
    { reuse: false, reusable: false }
  ))

describe("verifyOutcome with one connection", () => {
  const one = { maxConnections: 1, acquireTimeout: 500 }
  const fresh = database.query("DROP TABLE IF EXISTS effect_db_outcome")
  test(
    "atomic in a session that has it",
    () =>
      Effect.gen(function* () {
        yield* fresh
        yield* session(Effect.zipRight(insert(1), atomic(insert(2), { verifyOutcome: true })))
        expect(yield* rows).toEqual([1, 2])
      }),
    one
  )

  test(
    "a block on a connection that has it",
    () =>
      Effect.gen(function* () {
        yield* fresh
        yield* DbConnection.withConnection(withTransaction(insert(1), { verifyOutcome: true }))
        expect(yield* rows).toEqual([1])
      }),
    one
  )
})
