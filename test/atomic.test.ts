import { describe } from "@effect/vitest"
import { Deferred, Effect, Fiber, Option } from "effect"
import { atomic, DbEngine, DbSession, DbTransaction, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import {
  committed,
  insert,
  outcome,
  place,
  programsOn,
  proxiedOn,
  reason,
  refused,
  seen,
  sessionForms,
  used
} from "./support/programs.js"
import { latch, open } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

const modes = ["commit", "rollback", "append", "raise"] as const

describe("9 atomic", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: atomic insert, close, insert: 2 rows`, () =>
      Effect.gen(function* () {
        yield* around(Effect.all([atomic(insert(1)), DbSession.close, insert(2)]))
        expect(yield* rows).toEqual([1, 2])
      }))
  }

  test("without a session it opens, commits and closes", () =>
    Effect.gen(function* () {
      yield* atomic(insert(1))
      expect(yield* used).toBe(0)
      expect(yield* rows).toEqual([1])
      expect(yield* reason(atomic(Effect.zipRight(insert(2), Effect.fail("no"))))).toBe("no")
      expect(yield* rows).toEqual([1])
    }))

  for (const mode of modes) {
    test(`${mode}: in a session without a transaction it commits by itself, and the session stays open`, () =>
      Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* atomic(insert(1), { currentTransaction: mode })
            expect(yield* rows).toEqual([1])
            expect(yield* DbSession.state).toBe("idle")
            expect(yield* used).toBe(1)
            yield* DbSession.rollback
          })
        )
        expect(yield* rows).toEqual([1])
      }))
  }
})

describe("atomic in a session", () => {
  test("has the session's settings besides its own", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const both = sql`SELECT current_setting('app.one', true) AS one, current_setting('app.two', true) AS two`
      const settings = { "app.one": "1" }
      const found = yield* DbSession.autocommit(atomic(both, { settings: { "app.two": "2" } }), { settings })
      expect(found).toEqual([{ one: "1", two: "2" }])
    }))

  test("that raises over a block by hand leaves nothing open", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const tx = yield* DbSession.savepoint()
          expect(yield* reason(atomic(insert(1), { currentTransaction: "raise" }))).toBe("PropagationError")
          yield* insert(2)
          yield* tx.commit
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("and its hooks after it leave the block alone that has had its turn meanwhile", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const [hooked, inside, go] = yield* Effect.all([latch, latch, latch])
        const first = yield* Effect.fork(
          atomic(Effect.zipRight(DbSession.afterCommit(Deferred.await(hooked)), insert(1)))
        )
        yield* Effect.yieldNow()
        const second = yield* Effect.fork(
          atomic(Effect.all([insert(2), open(inside), Deferred.await(go)], { discard: true }))
        )
        yield* Deferred.await(inside)
        yield* open(hooked)
        yield* Fiber.join(first)
        expect(yield* reason(DbSession.commit)).toBe("SessionBusy")
        yield* open(go)
        yield* Fiber.join(second)
        expect(yield* rows).toEqual([1, 2])
      })
    ))
})

describe("12 an open transaction and atomic", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}, commit: the earlier work is committed first`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            yield* atomic(
              Effect.zipRight(
                Effect.map(rows, (ids) => expect(ids).toEqual([1])),
                insert(2)
              )
            )
            expect(yield* rows).toEqual([1, 2])
            yield* insert(3)
            yield* DbSession.rollback
          })
        )
        expect(yield* rows).toEqual([1, 2])
      }))

    test(`${name}, commit: the earlier work stays whatever comes`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(atomic(Effect.zipRight(insert(2), Effect.fail("no"))))).toBe("no")
            expect(yield* DbSession.state).toBe("idle")
          })
        )
        expect(yield* rows).toEqual([1])
      }))

    test(`${name}, rollback: the earlier work is dropped`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            yield* atomic(insert(2), { currentTransaction: "rollback" })
            expect(yield* rows).toEqual([2])
          })
        )
        expect(yield* rows).toEqual([2])
      }))

    test(`${name}, append: both are committed together`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            const before = yield* place
            yield* atomic(
              Effect.gen(function* () {
                yield* insert(2)
                expect(yield* place).toEqual(before)
                expect(yield* rows).toEqual([])
              }),
              { currentTransaction: "append" }
            )
            expect(yield* rows).toEqual([1, 2])
            expect(yield* DbSession.state).toBe("idle")
          })
        )
      }))

    test(`${name}, raise: fails, and the earlier work is still pending`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(atomic(insert(2), { currentTransaction: "raise" }))).toBe("PropagationError")
            expect(yield* DbSession.state).toBe("active")
            expect(yield* rows).toEqual([])
            expect(yield* seen).toEqual([1])
          })
        )
        expect(yield* rows).toEqual([1])
      }))
  }

  test("commit: earlier work that can't be committed is the failure, and the block does not run", () =>
    Effect.gen(function* () {
      let ran = false
      const body = Effect.sync(() => void (ran = true))
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Effect.ignore(refused)
          expect(yield* reason(atomic(body))).toBe("TransactionAborted")
          expect(ran).toBe(false)
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("rollback: earlier work that has failed is dropped, and the block runs", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.all([insert(1), Effect.ignore(refused), atomic(insert(2), { currentTransaction: "rollback" })])
      )
      expect(yield* rows).toEqual([2])
    }))
})

describe("13 append", () => {
  test("its body fails: earlier and inner work are gone, the error is unchanged, the session goes on", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const failed = atomic(Effect.zipRight(insert(2), Effect.fail("mine")), { currentTransaction: "append" })
          expect(yield* Effect.flip(failed)).toBe("mine")
          expect(yield* DbSession.state).toBe("idle")
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([3])
    }))

  test("with options that the open transaction can't honour it is a PropagationError, and the work is pending", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const wrong = atomic(insert(2), { currentTransaction: "append", isolation: "serializable" })
          expect(yield* reason(wrong)).toBe("PropagationError")
          expect(yield* DbSession.state).toBe("active")
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe("14 interrupted in mid-statement", () => {
  for (const mode of modes) {
    for (const [name, around] of sessionForms) {
      proxied(`${mode} in ${name}: rolled back, the session is usable, nothing leaked`, (proxy) =>
        Effect.gen(function* () {
          const expected = mode === "commit" ? [1, 4] : [4]
          yield* around(
            Effect.gen(function* () {
              const db = yield* DbSession
              if (mode !== "raise") yield* insert(1)
              const sleeping = proxy.seen(({ text, type }) => type === "E" && text.includes("pg_sleep"))
              const block = atomic(Effect.zipRight(insert(2), db.sql`SELECT pg_sleep(${60})`), {
                currentTransaction: mode
              })
              const fiber = yield* Effect.fork(block)
              yield* Effect.promise(() => sleeping)
              expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
              expect(yield* DbSession.state).toBe("idle")
              yield* insert(4)
            })
          )
          expect(yield* rows).toEqual(expected)
        })
      )
    }
  }

  proxied("outside a session as well", (proxy) =>
    Effect.gen(function* () {
      const db = yield* DbSession
      const sleeping = proxy.seen(({ text, type }) => type === "E" && text.includes("pg_sleep"))
      const fiber = yield* Effect.fork(atomic(Effect.zipRight(insert(2), db.sql`SELECT pg_sleep(${60})`)))
      yield* Effect.promise(() => sleeping)
      expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
      expect(yield* rows).toEqual([])
    })
  )
})

describe("15 atomic inside atomic", () => {
  for (const outer of modes) {
    for (const inner of modes) {
      const options = { currentTransaction: inner }
      if (inner === "raise") {
        test(`raise in ${outer} fails, and the outer can go on`, () =>
          Effect.gen(function* () {
            yield* DbSession.autocommit(
              atomic(
                Effect.zipRight(
                  insert(1),
                  Effect.map(reason(atomic(insert(2), options)), (tag) => expect(tag).toBe("PropagationError"))
                ),
                {
                  currentTransaction: outer
                }
              )
            )
            expect(yield* rows).toEqual([1])
          }))
        continue
      }
      test(`${inner} in ${outer} is a savepoint: nothing is committed before the outer ends`, () =>
        Effect.gen(function* () {
          yield* DbSession.autocommit(
            atomic(
              Effect.gen(function* () {
                yield* insert(1)
                yield* atomic(insert(2), options)
                expect(yield* rows).toEqual([])
                yield* insert(3)
              }),
              { currentTransaction: outer }
            )
          )
          expect(yield* rows).toEqual([1, 2, 3])
        }))

      test(`${inner} in ${outer}: the inner's failure, caught, undoes the inner only`, () =>
        Effect.gen(function* () {
          yield* DbSession.autocommit(
            atomic(
              Effect.gen(function* () {
                yield* insert(1)
                yield* Effect.ignore(atomic(Effect.zipRight(insert(2), refused), options))
                yield* insert(3)
              }),
              { currentTransaction: outer }
            )
          )
          expect(yield* rows).toEqual([1, 3])
        }))

      test(`${inner} in ${outer}: the outer's failure undoes both`, () =>
        Effect.gen(function* () {
          yield* DbSession.autocommit(
            Effect.ignore(
              atomic(Effect.all([insert(1), atomic(insert(2), options), Effect.fail("no")]), {
                currentTransaction: outer
              })
            )
          )
          expect(yield* rows).toEqual([])
        }))
    }
  }

  test("atomic inside withTransaction is a savepoint", () =>
    Effect.gen(function* () {
      const body = Effect.all([insert(1), atomic(insert(2)), Effect.fail("no")])
      expect(yield* reason(withTransaction(body))).toBe("no")
      expect(yield* rows).toEqual([])
    }))

  test("withTransaction inside atomic is a savepoint", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        atomic(Effect.all([insert(1), Effect.ignore(withTransaction(Effect.zipRight(insert(2), Effect.fail("no"))))]))
      )
      expect(yield* rows).toEqual([1])
    }))

  test("atomic inside a withTransaction of the session commits nothing that its caller has not finished", () =>
    Effect.gen(function* () {
      const body = withTransaction(Effect.all([insert(1), atomic(insert(2)), Effect.fail("no")]))
      yield* DbSession.autocommit(Effect.zipRight(insert(0), Effect.ignore(body)))
      expect(yield* rows).toEqual([0])
    }))
})

describe("atomic and the session around it", () => {
  test("options apply to its transaction and not to the session's next", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const level = Effect.map(
            sql<{ level: string }>`SELECT current_setting('transaction_isolation') AS level`,
            (_) => _[0]?.level
          )
          yield* insert(1)
          expect(yield* atomic(level, { isolation: "serializable" })).toBe("serializable")
          expect(yield* level).toBe("read committed")
        })
      )
    }))

  test("commit, rollback and close inside its block are SessionBusy", () =>
    DbSession.autocommit(
      atomic(
        Effect.gen(function* () {
          yield* insert(1)
          expect(yield* reason(DbSession.commit)).toBe("SessionBusy")
          expect(yield* reason(DbSession.rollback)).toBe("SessionBusy")
          expect(yield* reason(DbSession.close)).toBe("SessionBusy")
        })
      )
    ))

  test("a swallowed error is TransactionAborted, and the session goes on", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* reason(atomic(Effect.zipRight(insert(1), Effect.ignore(refused))))).toBe("TransactionAborted")
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("tx.end ends it early, either way", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const kept = yield* atomic((tx) => Effect.zipRight(insert(1), tx.end("commit", "kept")))
          expect(kept).toBe("kept")
          expect(yield* rows).toEqual([1])
          yield* atomic((tx) => Effect.zipRight(insert(2), tx.end("rollback")))
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("siblings' atomic blocks of one session take turns and commit each its own", () =>
    Effect.gen(function* () {
      const one = (id: number) =>
        Effect.exit(atomic(Effect.zipRight(insert(id), id % 2 === 0 ? Effect.fail("even") : Effect.void)))
      yield* DbSession.autocommit(
        Effect.all(
          Array.from({ length: 10 }, (_, id) => one(id)),
          { concurrency: "unbounded" }
        )
      )
      expect(yield* rows).toEqual([1, 3, 5, 7, 9])
    }))

  test("DbTransaction.current tells it", () =>
    Effect.gen(function* () {
      const at = Effect.map(
        DbTransaction.current,
        Option.map((_) => _.depth)
      )
      expect(yield* DbSession.autocommit(Effect.all([at, atomic(Effect.all([at, atomic(at)]))]))).toEqual([
        Option.none(),
        [Option.some(1), Option.some(2)]
      ])
    }))

  test("a fiber that outlives its block gets TransactionClosed", () =>
    Effect.gen(function* () {
      const gate = yield* Deferred.make<void>()
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const late = yield* atomic(
            Effect.zipRight(insert(1), Effect.forkDaemon(Effect.zipRight(Deferred.await(gate), reason(insert(2)))))
          )
          yield* Deferred.succeed(gate, undefined)
          expect(yield* Fiber.join(late)).toBe("TransactionClosed")
        })
      )
      expect(yield* rows).toEqual([1])
      expect((yield* DbEngine.stats).used).toBe(0)
    }))
})
