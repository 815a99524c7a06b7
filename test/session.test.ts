import { describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, type Layer, ManagedRuntime, Option } from "effect"
import {
  Database,
  DbConnection,
  DbEngine,
  DbError,
  DbLayer,
  DbSession,
  type SessionOptions,
  withTransaction
} from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import {
  committed,
  expectAtRest,
  insert,
  killAmbient,
  onDatabase,
  outcome,
  pid,
  place,
  programsOn,
  proxiedOn,
  quietly,
  reason,
  refused,
  seen,
  sessionForms,
  type Services,
  used
} from "./support/programs.js"
import { until } from "./support/until.js"

const database = testDatabase()
const other = testDatabase()
const test = programsOn(database)
const rows = committed(database)

describe("1 no session", () => {
  test("commit and rollback fail with NoSession", () =>
    Effect.gen(function* () {
      expect(yield* reason(DbSession.commit)).toBe("NoSession")
      expect(yield* reason(DbSession.rollback)).toBe("NoSession")
      const db = yield* DbSession
      expect(yield* reason(db.commit)).toBe("NoSession")
    }))

  test("close does nothing, and opens nothing", () =>
    Effect.gen(function* () {
      yield* DbSession.close
      yield* (yield* DbSession).close
      expect((yield* DbEngine.stats).total).toBe(0)
      expect(yield* DbSession.state).toBe("closed")
      yield* insert(1)
      expect(yield* rows).toEqual([1])
    }))

  test("a statement is executed implicitly, and gives its connection back", () =>
    Effect.gen(function* () {
      yield* insert(1)
      expect(yield* used).toBe(0)
      expect(yield* rows).toEqual([1])
    }))

  test(
    "a statement fails with NoSession when implicit execution is forbidden",
    () =>
      Effect.gen(function* () {
        expect(yield* reason(insert(1))).toBe("NoSession")
        yield* DbSession.autocommit(insert(2))
        expect(yield* rows).toEqual([2])
      }),
    { implicitExecution: "forbid" }
  )

  test("there is no current session, connection or hook", () =>
    Effect.gen(function* () {
      expect(Option.isNone(yield* DbSession.current)).toBe(true)
      expect(Option.isNone(yield* DbConnection.current)).toBe(true)
      expect(yield* reason(DbSession.afterCommit(Effect.void))).toBe("NoSession")
      expect(yield* DbSession.state).toBe("closed")
    }))
})

describe("2 sessions in sessions", () => {
  test("autocommit in autocommit joins", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const outer = yield* place
        expect(yield* DbSession.autocommit(place)).toEqual(outer)
        yield* DbSession.autocommit(insert(1))
        expect(yield* rows).toEqual([])
      })
    ).pipe(Effect.zipRight(Effect.map(rows, (ids) => expect(ids).toEqual([1])))))

  test("a joining autocommit that fails and is caught makes the outer commit fail", () =>
    Effect.gen(function* () {
      const failed = Effect.ignore(DbSession.autocommit(Effect.zipRight(insert(2), Effect.fail("no"))))
      expect(yield* reason(DbSession.autocommit(Effect.zipRight(insert(1), failed)))).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))

  const conflicting: ReadonlyArray<SessionOptions> = [
    { settings: { "app.tenant": "b" } },
    { settings: { "app.tenant": "a", "app.user": "b" } },
    { readOnly: true },
    { isolation: "serializable" },
    { statementTimeout: 1000 },
    { lockTimeout: 1000 }
  ]
  for (const [when, before] of [
    ["idle", Effect.void],
    ["active", Effect.asVoid(place)]
  ] as const) {
    test(`a joining autocommit with options that an ${when} session was not opened with is a PropagationError`, () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          yield* before
          for (const options of conflicting) {
            expect(yield* reason(DbSession.autocommit(insert(1), options))).toBe("PropagationError")
            const inside = withTransaction(DbSession.autocommit(insert(1), options))
            expect(yield* reason(inside)).toBe("PropagationError")
          }
          expect(yield* reason(DbSession.autocommit(insert(1), { isolation: "none" as never }))).toBe("InvalidInput")
          yield* insert(2)
        }),
        { settings: { "app.tenant": "a" } }
      ).pipe(Effect.zipRight(Effect.map(rows, (ids) => expect(ids).toEqual([2])))))

    test(`a joining autocommit with options that agree with those of an ${when} session joins`, () => {
      const options = {
        isolation: "repeatable read",
        settings: { "app.tenant": "a" },
        lockTimeout: "1 second"
      } as const
      return DbSession.autocommit(
        Effect.gen(function* () {
          yield* before
          const outer = yield* place
          expect(yield* DbSession.autocommit(place, { ...options, name: "inner", readOnly: false })).toEqual(outer)
          expect(yield* reason(DbSession.autocommit(place, { settings: { "app.tenant": "b" } }))).toBe(
            "PropagationError"
          )
          yield* withTransaction(
            DbSession.autocommit(insert(1), { settings: { "app.tenant": "b" }, lockTimeout: 1000 }),
            { settings: { "app.tenant": "b" } }
          )
        }),
        options
      )
    })
  }

  test("a joining autocommit has its timeout, and rolls back when it is over", () =>
    Effect.gen(function* () {
      const late = Effect.flip(DbSession.autocommit(Effect.zipRight(insert(2), Effect.never), { timeout: 50 }))
      const caught = Effect.map(late, (error) => expect(DbError.reason(error)?._tag).toBe("TransactionTimeout"))
      expect(yield* reason(DbSession.autocommit(Effect.zipRight(insert(1), caught)))).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))

  test("the beforeCommit of a joining autocommit runs once, before the session's COMMIT", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      const options = { beforeCommit: Effect.sync(() => log.push("hook")) }
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* DbSession.autocommit(insert(1), options)
          yield* Effect.ignore(
            withTransaction(Effect.zipRight(DbSession.autocommit(insert(2), options), Effect.fail(0)))
          )
          log.push("body")
          yield* DbSession.commit
          yield* insert(3)
        })
      )
      expect(log).toEqual(["body", "hook"])
      expect(yield* rows).toEqual([1, 3])
    }))

  for (const [name, around] of sessionForms) {
    test(`isolated in ${name} sees no session of the outer, which is as before afterwards`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            const outer = yield* place
            const inner = yield* DbSession.isolated(
              Effect.gen(function* () {
                expect(yield* DbSession.state).toBe("idle")
                expect(yield* seen).toEqual([])
                yield* insert(2)
                return yield* place
              })
            )
            expect(inner.pid).not.toBe(outer.pid)
            expect(yield* rows).toEqual([2])
            expect(yield* place).toEqual(outer)
            expect(yield* DbSession.state).toBe("active")
          })
        )
        expect(yield* rows).toEqual([1, 2])
      }))
  }
})

describe("3 lazy", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: asked twice, once deep in calls, it is one session, and nothing is borrowed before a statement`, () =>
      Effect.gen(function* () {
        const deep = Effect.suspend(() => Effect.map(DbSession.current, (_) => Option.getOrThrow(_).name))
        const names = yield* around(
          Effect.gen(function* () {
            const here = yield* DbSession.current
            const below = yield* Effect.yieldNow().pipe(Effect.zipRight(deep))
            expect(yield* used).toBe(0)
            expect(yield* DbSession.state).toBe("idle")
            yield* insert(1)
            expect(yield* used).toBe(1)
            expect(yield* DbSession.state).toBe("active")
            return [Option.getOrThrow(here).name, below, yield* deep]
          })
        )
        expect(new Set(names).size).toBe(1)
        expect(yield* rows).toEqual([1])
      }))

    test(`${name}: a session without statements borrows nothing, ever`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* DbSession.commit
            yield* DbSession.rollback
            yield* Effect.ignore(Effect.scoped(DbSession.begin()))
          })
        )
        yield* around(withTransaction(withTransaction(Effect.void)))
        expect((yield* DbEngine.stats).total).toBe(0)
      }))
  }
})

describe("4 children", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: a child asks first, the parent gets that session, the end commits the child's work`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            const child = yield* Effect.fork(Effect.zipRight(insert(1), place))
            const childs = yield* Fiber.join(child)
            expect(yield* place).toEqual(childs)
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual([1, 2])
      }))
  }

  test("a child's own session does not leak to the parent by a join", () =>
    Effect.gen(function* () {
      const child = yield* Effect.fork(
        Effect.scoped(
          Effect.gen(function* () {
            yield* DbSession.scoped()
            yield* insert(1)
          })
        )
      )
      yield* Fiber.join(child)
      expect(Option.isNone(yield* DbSession.current)).toBe(true)
      const open = yield* Effect.fork(Effect.flatMap(Effect.scope, () => DbSession.scoped()))
      yield* Fiber.join(open)
      expect(Option.isNone(yield* DbSession.current)).toBe(true)
    }))

  for (const [name, around] of sessionForms) {
    test(`${name}: a fiber that outlives its session gets SessionClosed, not somebody else's connection`, () =>
      Effect.gen(function* () {
        const gate = yield* Deferred.make<void>()
        const late = yield* around(
          Effect.zipRight(
            insert(1),
            Effect.forkDaemon(
              Effect.zipRight(Deferred.await(gate), Effect.all([reason(insert(2)), reason(DbSession.commit)]))
            )
          )
        )
        yield* Deferred.succeed(gate, undefined)
        expect(yield* Fiber.join(late)).toEqual(["SessionClosed", "SessionClosed"])
        expect(yield* rows).toEqual([1])
      }))

    test(`${name}: a detached daemon of the session runs by itself`, () =>
      Effect.gen(function* () {
        const gate = yield* Deferred.make<void>()
        const late = yield* around(
          Effect.zipRight(
            insert(1),
            Effect.forkDaemon(DbSession.detach(Effect.zipRight(Deferred.await(gate), insert(2))))
          )
        )
        yield* Deferred.succeed(gate, undefined)
        yield* Fiber.join(late)
        expect(yield* rows).toEqual([1, 2])
      }))
  }
})

describe("5 one session for many", () => {
  it.scopedLive("fifty children ask at once while beforeSession is slow: one session", () =>
    Effect.gen(function* () {
      const gate = yield* Deferred.make<void>()
      let runs = 0
      const beforeSession = Effect.zipRight(
        Effect.sync(() => void runs++),
        Deferred.await(gate)
      )
      yield* Effect.gen(function* () {
        let asked = 0
        const ask = (id: number) =>
          Effect.zipRight(
            Effect.sync(() => void asked++),
            Effect.zip(DbSession.current, Effect.zipRight(insert(id), place))
          )
        const answers = yield* DbSession.autocommit(
          Effect.gen(function* () {
            const all = yield* Effect.fork(
              Effect.all(
                Array.from({ length: 50 }, (_, id) => ask(id)),
                { concurrency: "unbounded" }
              )
            )
            yield* until(
              "all have asked",
              Effect.sync(() => asked === 50)
            )
            yield* Deferred.succeed(gate, undefined)
            return yield* Fiber.join(all)
          })
        )
        expect(runs).toBe(1)
        expect(new Set(answers.map(([session]) => Option.getOrThrow(session).name)).size).toBe(1)
        expect(new Set(answers.map(([, { xid }]) => xid)).size).toBe(1)
        expect((yield* rows).length).toBe(50)
      }).pipe(onDatabase(database, { beforeSession }))
    })
  )

  it.scopedLive("beforeSession runs before every creation of a session, and its failure is the session's", () =>
    Effect.gen(function* () {
      let runs = 0
      const beforeSession = Effect.suspend(() => (++runs === 3 ? Effect.die("not today") : Effect.void))
      yield* Effect.gen(function* () {
        yield* DbSession.autocommit(Effect.zipRight(insert(1), insert(2)))
        expect(runs).toBe(1)
        yield* withTransaction(insert(3))
        expect(runs).toBe(2)
        expect(outcome(yield* Effect.exit(DbSession.isolated(insert(4))))).toBe("defect: not today")
        yield* insert(5)
        expect(runs).toBe(3)
        expect(yield* rows).toEqual([1, 2, 3, 5])
      }).pipe(onDatabase(database, { beforeSession }))
    })
  )
})

describe("6 - 8 commit, rollback, close", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: after a commit the next statement opens a new transaction on the same backend`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            const first = yield* place
            yield* DbSession.commit
            expect(yield* rows).toEqual([1])
            expect(yield* DbSession.state).toBe("idle")
            expect(yield* used).toBe(1)
            const second = yield* place
            expect(second.pid).toBe(first.pid)
            expect(second.xid).not.toBe(first.xid)
          })
        )
      }))

    test(`${name}: after a rollback too, and what was rolled back is gone`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            const first = yield* place
            yield* DbSession.rollback
            expect(yield* seen).toEqual([])
            const second = yield* place
            expect(second.pid).toBe(first.pid)
            expect(second.xid).not.toBe(first.xid)
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual([2])
      }))

    test(`${name}: close without commit undoes, gives back, and the next statement is another session's`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            const before = Option.getOrThrow(yield* DbSession.current)
            yield* DbSession.close
            expect(yield* used).toBe(0)
            expect(yield* seen).toEqual([])
            const after = Option.getOrThrow(yield* DbSession.current)
            expect(yield* before.state).toBe("closed")
            expect(yield* after.state).toBe("active")
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual([2])
      }))

    test(`${name}: a handle kept after close fails with SessionClosed`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            const handle = Option.getOrThrow(yield* DbSession.current)
            yield* handle.sql`INSERT INTO t (id) VALUES (1)`
            yield* handle.close
            expect(yield* reason(handle.sql`SELECT 1`)).toBe("SessionClosed")
            expect(yield* reason(handle.commit)).toBe("SessionClosed")
            expect(yield* reason(handle.rollback)).toBe("SessionClosed")
            expect(yield* reason(handle.begin())).toBe("SessionClosed")
            expect(yield* reason(handle.savepoint())).toBe("SessionClosed")
            expect(yield* reason(handle.afterCommit(Effect.void))).toBe("SessionClosed")
            yield* handle.close
            expect(yield* handle.state).toBe("closed")
            expect(yield* used).toBe(0)
            // The slot has another session by now: the handle does not become it.
            yield* insert(2)
            expect(yield* reason(handle.sql`SELECT 1`)).toBe("SessionClosed")
          })
        )
        expect(yield* rows).toEqual([2])
      }))

    test(`${name}: a handle kept after the end of the session fails with SessionClosed`, () =>
      Effect.gen(function* () {
        const handle = yield* around(Effect.zipRight(insert(1), Effect.map(DbSession.current, Option.getOrThrow)))
        expect(yield* reason(handle.sql`SELECT 1`)).toBe("SessionClosed")
        expect(yield* reason(handle.commit)).toBe("SessionClosed")
      }))
  }
})

describe("a connection that dies between two transactions", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: the session goes on on another one, without an error when the death was known before`, () =>
      around(
        Effect.gen(function* () {
          const pids: Array<number> = []
          for (const round of [1, 2, 3]) {
            yield* insert(round)
            pids.push(yield* pid)
            yield* DbSession.commit
            if (round === 1) yield* killAmbient(database, pids[0]!)
            expect(yield* DbSession.state).toBe("idle")
          }
          expect(pids[1]).not.toBe(pids[0])
          expect(pids[2]).toBe(pids[1])
          expect(yield* used).toBe(1)
          expect(yield* rows).toEqual([1, 2, 3])
        })
      ))
  }

  proxiedOn(database)("with one error when a statement finds out", (proxy) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* insert(1)
        yield* DbSession.commit
        void proxy.cutAfter(({ text }) => text === "BEGIN", { forward: false })
        expect(yield* reason(insert(2))).toBe("ConnectionError")
        expect(yield* DbSession.state).toBe("idle")
        yield* insert(3)
        yield* DbSession.commit
        expect(yield* rows).toEqual([1, 3])
      })
    )
  )

  test("a transaction that was open is lost, and its statements fail until it has ended", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        yield* insert(1)
        yield* killAmbient(database, yield* pid)
        expect(yield* reason(insert(2))).toBe("ConnectionError")
        expect(yield* reason(insert(3))).toBe("ConnectionError")
        expect(yield* DbSession.state).toBe("failed")
        yield* DbSession.rollback
        yield* insert(4)
        yield* DbSession.commit
        expect(yield* rows).toEqual([4])
      })
    ))
})

describe("9 rows", () => {
  const styles = [
    ["effects", { commit: DbSession.commit, rollback: DbSession.rollback, close: DbSession.close }],
    [
      "the facade",
      {
        commit: Effect.flatMap(DbSession, (_) => _.commit),
        rollback: Effect.flatMap(DbSession, (_) => _.rollback),
        close: Effect.flatMap(DbSession, (_) => _.close)
      }
    ],
    [
      "a handle",
      {
        commit: Effect.flatMap(DbSession.current, (_) => Option.getOrThrow(_).commit),
        rollback: Effect.flatMap(DbSession.current, (_) => Option.getOrThrow(_).rollback),
        close: Effect.flatMap(DbSession.current, (_) => Option.getOrThrow(_).close)
      }
    ]
  ] as const
  for (const [form, around] of sessionForms) {
    for (const [style, { close, commit, rollback }] of styles) {
      test(`${form}, by ${style}: insert + commit, insert + commit + close, two inserts, end: 4 rows`, () =>
        Effect.gen(function* () {
          yield* around(
            Effect.all([insert(1), commit, insert(2), commit, close, insert(3), insert(4)], { discard: true })
          )
          expect(yield* rows).toEqual([1, 2, 3, 4])
        }))

      test(`${form}, by ${style}: rollback leaves nothing`, () =>
        Effect.gen(function* () {
          yield* around(Effect.all([insert(1), rollback, insert(2), close], { discard: true }))
          expect(yield* rows).toEqual([])
        }))
    }
  }
})

describe("the end of a session", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: a failure rolls back and stays itself`, () =>
      Effect.gen(function* () {
        expect(yield* Effect.flip(around(Effect.zipRight(insert(1), Effect.fail("mine"))))).toBe("mine")
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: a defect rolls back and stays itself`, () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(around(Effect.zipRight(insert(1), Effect.die("mine"))))
        expect(outcome(exit)).toBe("defect: mine")
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: an interruption rolls back`, () =>
      Effect.gen(function* () {
        const inserted = yield* Deferred.make<void>()
        const fiber = yield* Effect.fork(
          around(Effect.zipRight(insert(1), Effect.zipRight(Deferred.succeed(inserted, undefined), Effect.never)))
        )
        yield* Deferred.await(inserted)
        expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: rollbacks of explicit commits keep what was committed`, () =>
      Effect.gen(function* () {
        const body = Effect.all([insert(1), DbSession.commit, insert(2), Effect.fail("no")])
        expect(yield* reason(around(body))).toBe("no")
        expect(yield* rows).toEqual([1])
      }))
  }

  for (const [name, around] of [
    ["autocommit", DbSession.autocommit],
    ["isolated", DbSession.isolated]
  ] as const) {
    test(`${name}: a swallowed statement error is a typed TransactionAborted`, () =>
      Effect.gen(function* () {
        expect(yield* reason(around(Effect.zipRight(insert(1), Effect.ignore(refused))))).toBe("TransactionAborted")
        expect(yield* rows).toEqual([])
      }))
  }

  for (const [name, around] of sessionForms.slice(1)) {
    test(`${name}: a commit that fails where nobody can be told dies with the error`, () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(around(Effect.zipRight(insert(1), Effect.ignore(refused))))
        expect(outcome(exit)).toBe("defect: TransactionAborted")
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: who wants it typed commits last`, () =>
      Effect.gen(function* () {
        const body = Effect.all([insert(1), Effect.ignore(refused), DbSession.commit])
        expect(yield* reason(around(body))).toBe("TransactionAborted")
        expect(yield* rows).toEqual([])
      }))
  }

  test("the form opened last wins, and the outer is back when it ends", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const outer = yield* place
        const inner = yield* Effect.scoped(Effect.zipRight(DbSession.scoped(), place))
        expect(inner.xid).not.toBe(outer.xid)
        expect(yield* place).toEqual(outer)
        const third = yield* Effect.provide(place, DbSession.layer())
        expect(third.xid).not.toBe(outer.xid)
        expect(yield* place).toEqual(outer)
      })
    ))

  test("a timeout of the session, or of its one block, is typed and rolls back", () =>
    Effect.gen(function* () {
      const slow = Effect.zipRight(insert(1), Effect.never)
      expect(yield* reason(DbSession.autocommit(slow, { timeout: "50 millis" }))).toBe("TransactionTimeout")
      expect(yield* reason(slow.pipe(DbSession.isolated({ timeout: "50 millis" })))).toBe("TransactionTimeout")
      expect(yield* reason(withTransaction(() => slow, { timeout: "50 millis" }))).toBe("TransactionTimeout")
      expect(yield* rows).toEqual([])
    }))
})

describe("make", () => {
  test("gives a handle that is not ambient, and use makes it so", () =>
    Effect.gen(function* () {
      yield* Effect.scoped(
        Effect.gen(function* () {
          const session = yield* DbSession.make({ autocommit: true })
          expect(Option.isNone(yield* DbSession.current)).toBe(true)
          const { xid } = yield* session.use(place)
          const rest = yield* session.sql<{ xid: string }>`SELECT pg_current_xact_id()::text AS xid`
          expect(rest[0]?.xid).toBe(xid)
          yield* session.use(insert(1))
          expect((yield* place).xid).not.toBe(xid)
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("without autocommit it rolls back what was not committed", () =>
    Effect.gen(function* () {
      yield* Effect.scoped(
        Effect.gen(function* () {
          const session = yield* DbSession.make()
          yield* session.use(insert(1))
          yield* session.commit
          yield* session.use(insert(2))
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("use after its end is a SessionClosed", () =>
    Effect.gen(function* () {
      const session = yield* Effect.scoped(DbSession.make({ name: "kept" }))
      expect(session.name).toBe("kept")
      expect(outcome(yield* Effect.exit(session.use(insert(1))))).toMatch(/SessionClosed$/)
      expect(yield* rows).toEqual([])
    }))
})

describe("10 - 11 two databases", () => {
  const Analytics = Database.make("analytics")
  const insertThere = (id: number) =>
    Effect.flatMap(Analytics.DbSession, ({ sql }) => Effect.asVoid(sql`INSERT INTO t (id) VALUES (${id})`))
  const there = committed(other)
  type There = Layer.Layer.Success<ReturnType<typeof Analytics.DbLayer>>
  const two = <E>(name: string, program: () => Effect.Effect<void, E, Services | There>): void => {
    const atRestThere = Effect.gen(function* () {
      const { pending, used } = yield* Analytics.DbEngine.stats
      expect({ pending, used }).toEqual({ pending: 0, used: 0 })
      expect((yield* other.activity).idleInTransaction).toBe(0)
    })
    it.scopedLive(name, () =>
      other
        .query(
          "DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY, twin int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
        )
        .pipe(
          Effect.zipRight(Effect.suspend(program)),
          Effect.zipLeft(atRestThere),
          Effect.provide(quietly(Analytics.DbLayer({ url: other.url }))),
          onDatabase(database)
        )
    )
  }

  two("two sessions in one program, each on its own database", () =>
    Effect.gen(function* () {
      yield* Effect.all([insert(1), insertThere(2)]).pipe(DbSession.autocommit, Analytics.DbSession.autocommit)
      expect([yield* rows, yield* there]).toEqual([[1], [2]])
    })
  )

  two("a statement for B inside A's transaction runs on B", () =>
    Effect.gen(function* () {
      const failed = withTransaction(Effect.all([insert(1), insertThere(2), Effect.fail("no")]))
      expect(yield* reason(failed)).toBe("no")
      expect([yield* rows, yield* there]).toEqual([[], [2]])
    })
  )

  two("a transaction of B inside A's is B's", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          yield* Analytics.withTransaction(insertThere(2))
          expect(yield* there).toEqual([2])
          yield* Effect.ignore(Analytics.withTransaction(Effect.zipRight(insertThere(3), Effect.fail("no"))))
        })
      )
      expect([yield* rows, yield* there]).toEqual([[1], [2]])
    })
  )

  two("commitAll: the second fails with its error, the first stays committed, both are given back", () =>
    Effect.gen(function* () {
      const collide = Effect.flatMap(Analytics.DbSession, ({ sql }) => sql`INSERT INTO t VALUES (1, 1), (2, 1)`)
      const body = Effect.gen(function* () {
        yield* insert(1)
        yield* collide
        expect(yield* reason(DbSession.commitAll)).toBe("UniqueViolation")
        expect([yield* used, (yield* Analytics.DbEngine.stats).used]).toEqual([0, 0])
        expect([yield* rows, yield* there]).toEqual([[1], []])
      })
      yield* body.pipe(Analytics.DbSession.autocommit, DbSession.autocommit)
      expect([yield* rows, yield* there]).toEqual([[1], []])
    })
  )

  two("rollbackAll and closeAll act on every session of the fiber", () =>
    Effect.gen(function* () {
      const inserts = Effect.all([insert(1), insertThere(1)])
      yield* Effect.gen(function* () {
        yield* inserts
        yield* DbSession.rollbackAll
        yield* inserts
        yield* DbSession.commitAll
        expect([yield* rows, yield* there]).toEqual([[1], [1]])
        yield* Effect.all([insert(2), insertThere(2)])
        yield* DbSession.closeAll
        expect([yield* used, (yield* Analytics.DbEngine.stats).used]).toEqual([0, 0])
      }).pipe(Analytics.DbSession.autocommit, DbSession.autocommit)
      expect([yield* rows, yield* there]).toEqual([[1], [1]])
    })
  )
})

describe("52 one engine", () => {
  it.live("fifty concurrent first uses build one engine", () =>
    Effect.gen(function* () {
      let connected = 0
      const layer = quietly(
        DbLayer({ url: database.url, maxConnections: 3, afterConnect: Effect.sync(() => void connected++) })
      )
      const runtime = ManagedRuntime.make(layer)
      const engines = yield* Effect.promise(() =>
        Promise.all(Array.from({ length: 50 }, () => runtime.runPromise(Effect.zipLeft(DbEngine, pid))))
      )
      expect(new Set(engines).size).toBe(1)
      expect(connected).toBeLessThanOrEqual(3)
      yield* Effect.promise(() => runtime.runPromise(expectAtRest(database)))
      yield* Effect.promise(() => runtime.dispose())
      yield* until(
        "no connection is left",
        Effect.map(database.activity, (_) => _.total === 0)
      )
    })
  )
})
