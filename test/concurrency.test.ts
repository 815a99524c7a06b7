import { describe } from "@effect/vitest"
import { Deferred, Effect, Fiber } from "effect"
import type { DbEngine } from "effect-db"
import { atomic, DbConnection, DbError, DbSession, DbTransaction, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"

import {
  committed,
  insert,
  no,
  outcome,
  pid,
  place,
  programsOn,
  proxiedOn,
  reason,
  refused,
  seen,
  sessionForms,
  sleep,
  sleepingOn,
  used
} from "./support/programs.js"
import { barrier, pending, soon, stillRuns, timed, until } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

const sleeping = sleepingOn(database)
const awake = until(
  "no statement is left on the server",
  Effect.map(database.activity, (_) => _.active === 0)
)

describe("22 sibling blocks of one session", () => {
  const blocks: ReadonlyArray<
    readonly [string, <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, any, R | DbEngine>]
  > = [
    ["withTransaction", (effect) => withTransaction(effect)],
    ["DbTransaction.scoped", (effect) => Effect.scoped(Effect.zipRight(DbTransaction.scoped(), effect)) as never]
  ]
  for (const [name, block] of blocks) {
    for (const [session, around] of [
      ...sessionForms,
      [
        "withTransaction",
        (effect: Effect.Effect<any, any, any>) => withTransaction(effect)
      ] as (typeof sessionForms)[number]
    ]) {
      test(`${name} in ${session}: one fails, the other's rows are there`, () =>
        Effect.gen(function* () {
          const [first, second] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
          yield* around(
            Effect.all(
              [
                Effect.exit(
                  block(Effect.all([insert(1), Deferred.succeed(first, undefined), Deferred.await(second), no]))
                ),
                Effect.zipRight(
                  Deferred.await(first),
                  Effect.all([Deferred.succeed(second, undefined), block(insert(2))])
                )
              ],
              { concurrency: "unbounded" }
            )
          )
          expect(yield* rows).toEqual([2])
        }))

      test(`${name} in ${session}: ten siblings, half failing, with statements of the outer in between`, () =>
        Effect.gen(function* () {
          const sibling = (id: number) =>
            Effect.exit(
              block(
                Effect.gen(function* () {
                  yield* insert(id)
                  for (let i = 0; i < id; i++) yield* Effect.yieldNow()
                  yield* insert(id + 100)
                  if (id % 2 === 0) yield* id % 4 === 0 ? refused : no
                })
              )
            )
          yield* around(
            Effect.all(
              Array.from({ length: 10 }, (_, id) => [sibling(id), insert(id + 200)]).flat() as Array<
                Effect.Effect<unknown, any, DbEngine | DbSession>
              >,
              { concurrency: "unbounded" }
            )
          )
          const odd = [1, 3, 5, 7, 9]
          expect(yield* rows).toEqual([
            ...odd,
            ...odd.map((_) => _ + 100),
            ...Array.from({ length: 10 }, (_, i) => i + 200)
          ])
        }))
    }
  }

  test("a statement of the outer block waits while an inner one is open, and is not undone with it", () =>
    Effect.gen(function* () {
      const [inside, waiting] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
      const order: Array<string> = []
      yield* DbSession.autocommit(
        Effect.all(
          [
            Effect.exit(
              withTransaction(
                Effect.all([
                  insert(1),
                  Deferred.succeed(inside, undefined),
                  Deferred.await(waiting),
                  Effect.yieldNow(),
                  Effect.sync(() => order.push("inner")),
                  no
                ])
              )
            ),
            Effect.all([
              Deferred.await(inside),
              Deferred.succeed(waiting, undefined),
              insert(2),
              Effect.sync(() => order.push("outer"))
            ])
          ],
          { concurrency: "unbounded" }
        )
      )
      expect(order).toEqual(["inner", "outer"])
      expect(yield* rows).toEqual([2])
    }))

  test("a child of the inner block works in it, and is undone with it", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.zipRight(
          insert(1),
          Effect.ignore(withTransaction(Effect.zipRight(Effect.flatMap(Effect.fork(insert(2)), Fiber.join), no)))
        )
      )
      expect(yield* rows).toEqual([1])
    }))

  test(
    "a statement that waits for a block is not refused because this process stood still",
    () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          const [open, end] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
          const block = yield* Effect.fork(
            withTransaction(Effect.zipRight(Deferred.succeed(open, undefined), Deferred.await(end)))
          )
          yield* Deferred.await(open)
          const waiting = yield* Effect.fork(insert(7))
          yield* Effect.yieldNow()
          // Five times the limit, in which nobody could have ended the block.
          for (let i = 0; i < 5; i++) {
            for (const until = performance.now() + 100; performance.now() < until;);
            yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          }
          yield* Deferred.succeed(end, undefined)
          yield* Fiber.join(block)
          yield* Fiber.join(waiting)
        })
      ).pipe(Effect.tap(() => Effect.map(rows, (_) => expect(_).toEqual([7])))),
    { blockTimeout: 100 }
  )

  test(
    "a block that joins a fiber of the outer one waits for itself: SessionBusy, which names it, after blockTimeout",
    () =>
      Effect.gen(function* () {
        const error = yield* DbSession.autocommit(
          Effect.gen(function* () {
            const inside = yield* Deferred.make<void>()
            const outer = yield* Effect.fork(Effect.flip(Effect.zipRight(Deferred.await(inside), insert(1))))
            return yield* withTransaction(
              Effect.all([insert(2), Deferred.succeed(inside, undefined), Fiber.join(outer)]),
              { name: "the inner one" }
            )
          })
        )
        const why = DbError.reason(error[2])
        expect(why?._tag).toBe("SessionBusy")
        expect(why?._tag === "SessionBusy" && why.block).toBe("the inner one")
        expect(yield* rows).toEqual([2])
      }),
    { blockTimeout: 100 }
  )

  test("a wait for another's block can be interrupted at once", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const [inside, done] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
          const block = yield* Effect.fork(
            withTransaction(Effect.all([insert(1), Deferred.succeed(inside, undefined), Deferred.await(done)]))
          )
          yield* Deferred.await(inside)
          const statement = yield* Effect.fork(insert(2))
          const sibling = yield* Effect.fork(withTransaction(insert(3)))
          const transaction = yield* Effect.fork(atomic(insert(4)))
          yield* Effect.yieldNow()
          yield* Fiber.interruptAll([statement, sibling, transaction])
          yield* Deferred.succeed(done, undefined)
          yield* Fiber.join(block)
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe("a commit while another fiber's statement still runs", () => {
  const left = (end: Effect.Effect<unknown, unknown, DbSession | DbEngine>) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* insert(1)
        const fiber = yield* Effect.forkDaemon(sleep)
        yield* sleeping
        return [fiber, yield* Effect.exit(end)] as const
      })
    )

  test(
    "at the end of a session waits for no longer than blockTimeout: SessionBusy, and it is rolled back",
    () =>
      Effect.gen(function* () {
        expect(yield* reason(left(Effect.void))).toBe("SessionBusy")
        yield* awake
        expect(yield* rows).toEqual([])
      }),
    { blockTimeout: 100 }
  )

  test(
    "at the end of a scope is a defect, since nobody can be told",
    () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(
          Effect.scoped(
            Effect.gen(function* () {
              yield* DbSession.scoped()
              yield* insert(1)
              yield* Effect.forkDaemon(sleep)
              yield* sleeping
            })
          )
        )
        expect(outcome(exit)).toBe("defect: SessionBusy")
        yield* awake
        expect(yield* rows).toEqual([])
      }),
    { blockTimeout: 100 }
  )

  test(
    "by hand is SessionBusy, and undoes nothing",
    () =>
      Effect.gen(function* () {
        const told: Array<string> = []
        const commit = Effect.gen(function* () {
          told.push(yield* reason(DbSession.commit), yield* DbSession.state)
        })
        expect(yield* reason(left(commit))).toBe("SessionBusy")
        expect(told).toEqual(["SessionBusy", "active"])
        yield* awake
      }),
    { blockTimeout: 100 }
  )

  test("can be interrupted at once, and is rolled back", () =>
    Effect.gen(function* () {
      const body = yield* Deferred.make<void>()
      const fiber = yield* Effect.fork(left(Deferred.succeed(body, undefined)))
      yield* Deferred.await(body)
      expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
      yield* awake
      expect(yield* rows).toEqual([])
    }))

  test("waits, and keeps what the statement did", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* Effect.forkDaemon(sql`INSERT INTO t SELECT 1 FROM pg_sleep(0.05)`)
          yield* until(
            "the statement is on its way",
            Effect.map(DbSession.state, (_) => _ === "active")
          )
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe("fibers that outlive their block", () => {
  for (const [name, block] of [
    ["withTransaction", (effect: Effect.Effect<void, any, DbEngine | DbSession>) => withTransaction(effect)],
    ["atomic", (effect: Effect.Effect<void, any, DbEngine | DbSession>) => atomic(effect)]
  ] as const) {
    for (const fails of [true, false]) {
      const end = fails ? no : Effect.void
      test(`${name} that ${fails ? "fails" : "succeeds"}: what was issued but not sent never happens, and is typed`, () =>
        Effect.gen(function* () {
          yield* DbSession.autocommit(
            Effect.gen(function* () {
              let issued: Fiber.Fiber<string, unknown> | undefined = undefined
              yield* Effect.ignore(
                block(
                  Effect.gen(function* () {
                    issued = yield* Effect.forkDaemon(reason(insert(1)))
                    // It has been issued; what is issued goes out after the microtasks.
                    yield* Effect.yieldNow()
                    yield* end
                  })
                )
              )
              yield* insert(2)
              expect(yield* Fiber.join(issued!)).toBe("TransactionClosed")
            })
          )
          expect(yield* rows).toEqual([2])
        }))

      test(
        `${name} that ${fails ? "fails" : "succeeds"}: what waits for a connection never happens, and is typed`,
        () =>
          Effect.gen(function* () {
            const [held, free] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
            const holder = yield* Effect.fork(
              DbConnection.withConnection(Effect.zipRight(Deferred.succeed(held, undefined), Deferred.await(free)))
            )
            yield* Deferred.await(held)
            yield* DbSession.autocommit(
              Effect.gen(function* () {
                let issued: Fiber.Fiber<string, unknown> | undefined = undefined
                yield* Effect.ignore(
                  block(
                    Effect.gen(function* () {
                      issued = yield* Effect.forkDaemon(reason(insert(1)))
                      yield* pending(1)
                      yield* end
                    })
                  )
                )
                expect(yield* Fiber.join(issued!)).toBe("TransactionClosed")
                yield* Deferred.succeed(free, undefined)
                yield* insert(2)
              })
            )
            yield* Fiber.join(holder)
            expect(yield* rows).toEqual([2])
          }),
        { maxConnections: 1 }
      )
    }
  }

  for (const [name, around] of sessionForms) {
    test(`${name}: a statement that was issued but not sent when the session ends never happens`, () =>
      Effect.gen(function* () {
        const issued = yield* around(Effect.zipLeft(Effect.forkDaemon(reason(insert(1))), Effect.yieldNow()))
        expect(yield* Fiber.join(issued)).toBe("SessionClosed")
        expect(yield* rows).toEqual([])
      }))
  }
})

describe("43 - 44 several sessions at once", () => {
  test("43 ambient, isolated, isolated by hand, make with autocommit, make by hand, one that fails: 5 rows and the failure", () =>
    Effect.gen(function* () {
      const exits = yield* DbSession.autocommit(
        Effect.all(
          [
            insert(1),
            DbSession.isolated(insert(2)),
            DbSession.isolated(Effect.all([insert(3), DbSession.commit, DbSession.close])),
            Effect.scoped(Effect.flatMap(DbSession.make({ autocommit: true }), (_) => _.use(insert(4)))),
            Effect.scoped(Effect.flatMap(DbSession.make(), (_) => Effect.all([_.use(insert(5)), _.commit, _.close]))),
            DbSession.isolated(Effect.zipRight(insert(6), no))
          ].map((_) => Effect.exit(_ as Effect.Effect<unknown, unknown, DbEngine | DbSession>)),
          { concurrency: "unbounded" }
        )
      )
      expect(exits.map(outcome)).toEqual(["success", "success", "success", "success", "success", "no"])
      expect(yield* rows).toEqual([1, 2, 3, 4, 5])
    }))

  for (const [name, around] of sessionForms) {
    test(`44 isolated in ${name}: commits while the outer is open, survives its rollback, and returns its value`, () =>
      Effect.gen(function* () {
        const failed = around(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* DbSession.isolated(Effect.as(insert(2), "value"))).toBe("value")
            expect(yield* rows).toEqual([2])
            return yield* no
          })
        )
        expect(yield* reason(failed)).toBe("no")
        expect(yield* rows).toEqual([2])
      }))
  }

  test("44 isolated without an outer", () =>
    Effect.gen(function* () {
      expect(yield* DbSession.isolated(Effect.as(insert(1), "value"))).toBe("value")
      expect(yield* rows).toEqual([1])
    }))

  test("isolated sessions run in parallel, each on its own connection", () =>
    Effect.gen(function* () {
      const all = yield* barrier(5)
      // Each holds its transaction until all have one.
      const one = Effect.gen(function* () {
        const at = yield* place
        yield* all
        return at.pid
      })
      const pids = yield* Effect.all(Array.from({ length: 5 }, () => one).map(DbSession.isolated), { concurrency: 5 })
      expect(new Set(pids).size).toBe(5)
    }))

  test(
    "more isolated sessions than connections take turns",
    () =>
      Effect.gen(function* () {
        yield* Effect.all(Array.from({ length: 20 }, (_, id) => insert(id)).map(DbSession.isolated), {
          concurrency: "unbounded"
        })
        expect((yield* rows).length).toBe(20)
      }),
    { maxConnections: 2 }
  )
})

describe("45 many statements at once in one session", () => {
  for (const [name, around] of sessionForms) {
    proxied(`${name}: twenty, every answer is its own, one round trip`, (proxy) =>
      Effect.gen(function* () {
        const answer = (n: number) =>
          Effect.flatMap(DbSession, ({ sql }) => Effect.map(sql<{ n: number }>`SELECT ${n}::int AS n`, (_) => _[0]?.n))
        const numbers = Array.from({ length: 20 }, (_, n) => n)
        const answers = yield* around(
          Effect.gen(function* () {
            yield* pid
            yield* answer(0)
            proxy.delay(20)
            proxy.reset()
            const answers = yield* Effect.all(numbers.map(answer), { concurrency: "unbounded" })
            expect(proxy.flights()).toBe(1)
            proxy.delay(0)
            return answers
          })
        )
        expect(answers).toEqual(numbers)
      })
    )
  }

  test("they run in order of issue", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* database.query("CREATE SEQUENCE IF NOT EXISTS turn; ALTER SEQUENCE turn RESTART")
      const turns = yield* DbSession.autocommit(
        Effect.all(
          Array.from({ length: 30 }, () =>
            Effect.map(sql<{ n: string }>`SELECT nextval('turn') AS n`, (_) => Number(_[0]?.n))
          ),
          { concurrency: "unbounded" }
        )
      )
      expect(turns).toEqual(Array.from({ length: 30 }, (_, i) => i + 1))
    }))

  test("one that fails fails by itself; the others behind it are told why", () =>
    Effect.gen(function* () {
      const exits = yield* Effect.flip(
        DbSession.autocommit(
          Effect.flatMap(
            Effect.all([insert(1), refused, insert(2)].map(Effect.exit), { concurrency: "unbounded" }),
            (exits) => Effect.fail(exits.map(outcome))
          )
        )
      )
      expect(exits).toEqual(["success", "UnknownError", "TransactionAborted"])
      expect(yield* rows).toEqual([])
    }))

  test("batch: all in one transaction", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const add = (id: number) => sql`INSERT INTO t (id) VALUES (${id}) RETURNING id`
      expect(yield* DbSession.batch([add(1), sql<{ n: number }>`SELECT count(*)::int AS n FROM t`])).toEqual([
        [{ id: 1 }],
        [{ n: 1 }]
      ])
      expect(yield* reason(DbSession.batch([add(2), add(1)]))).toBe("UniqueViolation")
      yield* Effect.ignore(DbSession.autocommit(Effect.zipRight(DbSession.batch([add(3), add(4)]), no)))
      expect(yield* rows).toEqual([1])
    }))
})

describe("46 interrupting statements", () => {
  test("a race of two statements: the loser's interruption never kills the winner", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const quick = Effect.map(sql<{ n: number }>`SELECT 1 AS n`, (_) => _[0]?.n)
      const exit = yield* Effect.exit(
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            // The quick one was issued first: it is answered, then the slow one is cancelled.
            expect(yield* Effect.race(quick, sleep)).toBe(1)
            return yield* insert(2)
          })
        )
      )
      // The cancelled statement has failed the transaction, and that is not silent.
      expect(outcome(exit)).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
      yield* awake
    }))

  test("in a block of its own, the loser takes only that along", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const loser = withTransaction(Effect.zipRight(insert(2), sleep))
          const fiber = yield* Effect.fork(loser)
          yield* sleeping
          yield* Fiber.interrupt(fiber)
          yield* insert(3)
          expect((yield* sql`SELECT 1 AS n`).length).toBe(1)
        })
      )
      expect(yield* rows).toEqual([1, 3])
      yield* awake
    }))

  test("one that is running is cancelled at once", () =>
    Effect.gen(function* () {
      const fiber = yield* Effect.fork(DbSession.autocommit(Effect.zipRight(insert(1), sleep)))
      yield* sleeping
      const [elapsed, exit] = yield* timed(Fiber.interrupt(fiber))
      expect(outcome(exit)).toBe("interrupted")
      expect(elapsed).toBeLessThan(soon)
      expect(yield* rows).toEqual([])
      yield* awake
    }))

  test(
    "one that runs while the pool is full is cancelled at once, and the next borrower gets its own answer",
    () =>
      Effect.gen(function* () {
        const fiber = yield* Effect.fork(DbSession.autocommit(sleep))
        yield* sleeping
        const next = yield* Effect.fork(DbSession.isolated(Effect.zipRight(insert(1), seen)))
        yield* pending(1)
        yield* Fiber.interrupt(fiber)
        expect(yield* Fiber.join(next)).toEqual([1])
      }),
    { maxConnections: 1 }
  )

  test("one that waits behind another fiber's returns at once, and does not harm it", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* Effect.ignore(
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            const lock = yield* lockedOutside(database, 46)
            const first = yield* Effect.fork(sql<{ n: number }>`SELECT 7 AS n FROM pg_advisory_xact_lock(46)`)
            yield* lock.waitedFor
            const behind = yield* Effect.fork(insert(2))
            yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
            yield* Fiber.interrupt(behind)
            // It has returned although the first is still running.
            expect(yield* stillRuns(first)).toBe(true)
            yield* lock.release
            expect(yield* Fiber.join(first)).toEqual([{ n: 7 }])
          })
        )
      )
      // Either it was done in full or its transaction has failed.
      const found = yield* rows
      expect([[], [1, 2]]).toContainEqual(found)
    }))

  proxied("one that was not sent never happens", (proxy) =>
    Effect.gen(function* () {
      yield* pid
      proxy.reset()
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const fiber = yield* Effect.fork(insert(1))
          yield* Effect.yieldNow()
          yield* Fiber.interrupt(fiber)
          yield* insert(2)
        })
      )
      expect(proxy.statements().filter((_) => _.startsWith("INSERT")).length).toBe(1)
      expect(yield* rows).toEqual([2])
    })
  )

  test(
    "fifty sessions interrupted anywhere leave a whole pool",
    () =>
      Effect.gen(function* () {
        for (let i = 0; i < 50; i++) {
          const fiber = yield* Effect.fork(DbSession.isolated(Effect.zipRight(insert(i), seen)))
          for (let k = 0; k < i % 10; k++) yield* Effect.yieldNow()
          if (i % 3 === 0) yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          yield* Fiber.interrupt(fiber)
        }
        const whole = yield* Effect.all(
          Array.from({ length: 3 }, () => Effect.scoped(Effect.flatMap(DbConnection.acquire(), (_) => _.pid))),
          { concurrency: "unbounded" }
        )
        expect(whole.length).toBe(3)
        expect(yield* used).toBe(0)
      }),
    { maxConnections: 3 }
  )

  test("a timeout around a statement is the caller's, and fails its block", () =>
    Effect.gen(function* () {
      const exit = yield* Effect.exit(
        withTransaction(Effect.zipRight(insert(1), Effect.timeoutOption(sleep, "50 millis")))
      )
      expect(outcome(exit)).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))
})
