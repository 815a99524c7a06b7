import { SqlClient } from "@effect/sql"
import { PgClient } from "@effect/sql-pg"
import { describe, it } from "@effect/vitest"
import { Context, Deferred, Effect, Fiber, Layer, Logger, Option, Redacted } from "effect"
import { atomic, Database, DbEngine, DbLayer, DbSchema, DbSession, DbTransaction, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import {
  type Around,
  committed,
  conflict,
  expectAtRest,
  insert,
  no,
  note,
  outcome,
  path,
  pid,
  place,
  programsOn,
  proxiedOn,
  quietly,
  reason,
  refused,
  seen,
  sessionForms,
  used
} from "./support/programs.js"
import { until } from "./support/until.js"
import { collected } from "./support/observed.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

const outerForms: ReadonlyArray<readonly [string, Around]> = [
  ...sessionForms,
  ["isolated", (effect) => DbSession.isolated(effect)],
  ["withTransaction", (effect) => withTransaction(effect)],
  ["atomic", (effect) => atomic(effect)],
  ["DbTransaction.scoped", (effect) => Effect.scoped(Effect.zipRight(DbTransaction.scoped(), effect)) as never],
  [
    "make",
    (effect) => Effect.scoped(Effect.flatMap(DbSession.make({ autocommit: true }), (_) => _.use(effect))) as never
  ]
]

describe("27 afterCommit", () => {
  test("comes to its end when its fiber is interrupted meanwhile, whatever it forks", () =>
    Effect.gen(function* () {
      const [begun, go] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
      const log: Array<string> = []
      const hook = Deferred.succeed(begun, undefined).pipe(
        Effect.zipRight(Deferred.await(go)),
        Effect.zipRight(Effect.sync(() => log.push("ran"))),
        Effect.timeout("10 seconds")
      )
      const fiber = yield* Effect.fork(DbSession.autocommit(Effect.zipRight(DbSession.afterCommit(hook), insert(1))))
      yield* Deferred.await(begun)
      const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
      yield* Effect.yieldNow()
      yield* Deferred.succeed(go, undefined)
      yield* Fiber.join(interrupting)
      expect(log).toEqual(["ran"])
      expect(yield* rows).toEqual([1])
    }))

  test("one that would never end is ended by its own time limit, also when its fiber is interrupted, and the rest run", () =>
    Effect.gen(function* () {
      const begun = yield* Deferred.make<void>()
      const log: Array<string> = []
      const slow = Effect.zipRight(Deferred.succeed(begun, undefined), Effect.never)
      const fiber = yield* Effect.fork(
        DbSession.autocommit(
          Effect.all([
            DbSession.afterCommit(Effect.asVoid(Effect.timeoutOption(slow, "50 millis"))),
            DbSession.afterCommit(Effect.sync(() => log.push("next"))),
            insert(1)
          ])
        )
      )
      yield* Deferred.await(begun)
      expect(yield* rows).toEqual([1])
      expect(yield* used).toBe(0)
      yield* Fiber.interrupt(fiber)
      expect(log).toEqual(["next"])
    }))

  for (const [name, around] of outerForms) {
    test(
      `${name}: once, after the connection is back, and sees the committed row from a new session`,
      () =>
        Effect.gen(function* () {
          const log: Array<unknown> = []
          yield* around(
            Effect.gen(function* () {
              yield* DbSession.afterCommit(
                Effect.gen(function* () {
                  log.push(yield* used, Option.isNone(yield* DbSession.current), yield* seen)
                  // In a pool of one it can borrow, and commit by itself.
                  yield* DbSession.autocommit(insert(2))
                })
              )
              yield* insert(1)
            })
          )
          expect(log).toEqual([0, true, [1]])
          expect(yield* rows).toEqual([1, 2])
        }),
      { maxConnections: 1 }
    )

    test(`${name}: not after a rollback, where afterRollback is run instead`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        expect(yield* reason(around(Effect.all([note(log, "it"), insert(1), no])))).toBe("no")
        expect(log).toEqual(["it rolled back"])
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: not after a commit that failed`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        const exit = yield* Effect.exit(around(Effect.all([note(log, "it"), insert(1), Effect.ignore(refused)])))
        expect(outcome(exit)).toMatch(/TransactionAborted$/)
        expect(log).toEqual(["it rolled back"])
      }))

    test(`${name}: in order, and not for a savepoint that was rolled back`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* around(
          Effect.gen(function* () {
            yield* note(log, "1")
            yield* insert(1)
            yield* withTransaction(Effect.zipRight(note(log, "2"), insert(2)))
            yield* Effect.ignore(withTransaction(Effect.all([note(log, "3"), insert(3), no])))
            yield* withTransaction(
              Effect.all([
                note(log, "4"),
                insert(4),
                Effect.ignore(withTransaction(Effect.all([note(log, "5"), insert(5), no])))
              ])
            )
            yield* note(log, "6")
          })
        )
        expect(log).toEqual(["1 committed", "2 committed", "4 committed", "6 committed"])
        expect(yield* rows).toEqual([1, 2, 4])
      }))

    test(`${name}: one that dies or fails undoes nothing, and the others still run`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* around(
          Effect.all([
            note(log, "1"),
            DbSession.afterCommit(Effect.die("hook")),
            DbSession.afterCommit(Effect.fail("hook")),
            note(log, "2"),
            insert(1)
          ])
        ).pipe(Effect.provide(Logger.remove(Logger.defaultLogger)))
        expect(log).toEqual(["1 committed", "2 committed"])
        expect(yield* rows).toEqual([1])
      }))
  }

  it.scopedLive("one that dies is reported", () =>
    Effect.gen(function* () {
      const [lines, logger] = collected()
      yield* Effect.gen(function* () {
        yield* DbSession.autocommit(Effect.zipRight(DbSession.afterCommit(Effect.die("hook")), pid))
        yield* expectAtRest(database)
      }).pipe(Effect.provide(DbLayer({ url: database.url })), Effect.provide(logger))
      expect(lines.filter((_) => _.level === "ERROR")).toMatchObject([{ message: expect.stringContaining("hook") }])
    })
  )

  for (const [name, around] of sessionForms) {
    test(`${name}: after an explicit commit at once, and only once`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* around(
          Effect.gen(function* () {
            yield* note(log, "1")
            yield* insert(1)
            yield* DbSession.commit
            expect(log).toEqual(["1 committed"])
            yield* note(log, "2")
            yield* insert(2)
            yield* DbSession.rollback
            expect(log).toEqual(["1 committed", "2 rolled back"])
            yield* note(log, "3")
            yield* insert(3)
          })
        )
        expect(log).toEqual(["1 committed", "2 rolled back", "3 committed"])
      }))

    test(`${name}: atomic runs its own at its end`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* around(
          Effect.gen(function* () {
            yield* note(log, "before")
            yield* insert(1)
            yield* atomic(
              Effect.gen(function* () {
                expect(log).toEqual(["before committed"])
                yield* note(log, "in")
                yield* insert(2)
              })
            )
            expect(log).toEqual(["before committed", "in committed"])
            yield* Effect.ignore(atomic(Effect.all([note(log, "failed"), insert(3), no])))
            expect(log.slice(2)).toEqual(["failed rolled back"])
          })
        )
        expect(log.length).toBe(3)
      }))

    test(`${name}: close runs afterRollback`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* around(Effect.all([note(log, "1"), insert(1), DbSession.close]))
        expect(log).toEqual(["1 rolled back"])
      }))
  }

  test("a manual transaction's: at its commit, not after its rollback", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const one = yield* DbSession.begin()
          yield* insert(1)
          const two = yield* DbSession.savepoint()
          yield* note(log, "two")
          yield* insert(2)
          yield* two.rollback
          yield* note(log, "one")
          yield* one.commit
          expect(log).toEqual(["one committed"])
        })
      )
      expect(log).toEqual(["one committed"])
      expect(yield* rows).toEqual([1])
    }))

  test("with retry only that of the attempt that committed", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      let attempt = 0
      yield* withTransaction(
        Effect.suspend(() => {
          const name = `attempt ${++attempt}`
          const hook = DbSession.afterCommit(Effect.sync(() => log.push(name)))
          return Effect.all([hook, insert(attempt), attempt < 3 ? conflict : Effect.void])
        }),
        { retry: true }
      )
      expect(log).toEqual(["attempt 3"])
      expect(yield* rows).toEqual([3])
    }))

  test("after a deferred constraint's failure: afterRollback", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      yield* database.query(
        "DROP TABLE IF EXISTS twin; CREATE TABLE twin (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
      )
      const collide = Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO twin VALUES (1), (1)`)
      expect(yield* reason(withTransaction(Effect.zipRight(note(log, "it"), collide)))).toBe("UniqueViolation")
      expect(log).toEqual(["it rolled back"])
    }))

  for (const [name, around] of [
    ["withTransaction", (effect) => withTransaction(effect)],
    ["autocommit", (effect) => DbSession.autocommit(effect)],
    ["autocommit with an explicit commit", (effect) => DbSession.autocommit(Effect.zipLeft(effect, DbSession.commit))],
    ["atomic in a session", (effect) => DbSession.autocommit(atomic(effect))]
  ] as ReadonlyArray<readonly [string, Around]>) {
    proxied(`${name}: when the outcome of COMMIT is unknown, neither`, (proxy) =>
      Effect.gen(function* () {
        const log: Array<string> = []
        void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
        expect(yield* reason(around(Effect.zipRight(note(log, "it"), insert(1))))).toBe("CommitUnknown")
        expect(log).toEqual([])
        // The server may still be at it when the client has lost the connection.
        yield* until(
          "it has committed",
          Effect.map(rows, (all) => all.length > 0)
        )
        expect(yield* rows).toEqual([1])
      })
    )
  }

  test("an interruption of the session does not stop the hooks of its rollback", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      const inserted = yield* Deferred.make<void>()
      const fiber = yield* Effect.fork(
        DbSession.autocommit(
          Effect.all([note(log, "it"), insert(1), Deferred.succeed(inserted, undefined), Effect.never])
        )
      )
      yield* Deferred.await(inserted)
      yield* Fiber.interrupt(fiber)
      expect(log).toEqual(["it rolled back"])
    }))

  test("it has the services of the place where it was registered", () =>
    Effect.gen(function* () {
      class Mail extends Context.Tag("test/Mail")<Mail, Array<string>>() {}
      const sent: Array<string> = []
      yield* DbSession.autocommit(
        Effect.zipRight(
          DbSession.afterCommit(Effect.map(Mail, (_) => _.push("sent"))).pipe(
            Effect.provide(Layer.succeed(Mail, sent))
          ),
          insert(1)
        )
      )
      expect(sent).toEqual(["sent"])
    }))

  test("an explicit commit or rollback without a transaction does nothing, and leaves them to the next", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* note(log, "it")
          yield* DbSession.commit
          yield* DbSession.rollback
          expect(log).toEqual([])
          yield* insert(1)
          yield* DbSession.commit
          expect(log).toEqual(["it committed"])
        })
      )
      expect(log).toEqual(["it committed"])
    }))

  test("a session without a transaction has nothing to commit: its hooks run all the same at its end", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      yield* DbSession.autocommit(note(log, "it"))
      expect(log).toEqual(["it committed"])
      expect((yield* DbEngine.stats).total).toBe(0)
    }))
})

const many = 150_000

test(
  "a block with more hooks than a stack holds arguments is released all the same",
  () =>
    Effect.gen(function* () {
      let ran = 0
      const hook = Effect.sync(() => void ran++)
      const all = [DbSession.beforeCommit(hook), DbSession.afterCommit(hook), DbSession.afterRollback(hook)]
      const register = Effect.forEach(all, (one) => Effect.replicateEffect(one, many, { discard: true }))
      yield* DbSession.autocommit(withTransaction(Effect.zipRight(insert(1), register)))
      expect([ran, yield* rows]).toEqual([2 * many, [1]])
    }),
  {},
  120_000
)

describe("beforeCommit", () => {
  for (const [name, around] of outerForms) {
    test(`${name}: runs once, inside, just before COMMIT`, () =>
      Effect.gen(function* () {
        const log: Array<unknown> = []
        yield* around(
          Effect.gen(function* () {
            const at = yield* place
            yield* DbSession.beforeCommit(
              Effect.gen(function* () {
                log.push((yield* place).xid === at.xid, yield* rows)
                yield* insert(2)
              })
            )
            yield* insert(1)
          })
        )
        expect(log).toEqual([true, []])
        expect(yield* rows).toEqual([1, 2])
      }))

    test(`${name}: its failure prevents the commit`, () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(around(Effect.zipRight(DbSession.beforeCommit(refused), insert(1))))
        expect(outcome(exit)).toMatch(/UnknownError$/)
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: does not run before a rollback`, () =>
      Effect.gen(function* () {
        let ran = 0
        const hook = DbSession.beforeCommit(Effect.sync(() => ran++))
        yield* Effect.ignore(around(Effect.all([hook, insert(1), no])))
        expect(ran).toBe(0)
      }))

    test(`${name}: nor where a success can only be rolled back`, () =>
      Effect.gen(function* () {
        let ran = 0
        const hook = DbSession.beforeCommit(Effect.sync(() => ran++))
        for (const mark of [
          DbTransaction.setRollbackOnly,
          Effect.ignore(withTransaction(no, { propagation: "required" })),
          Effect.ignore(DbSession.autocommit(no)),
          Effect.ignore(refused)
        ]) {
          const exit = yield* Effect.exit(around(Effect.all([hook, insert(1), mark])))
          expect(outcome(exit)).toMatch(/TransactionAborted$/)
        }
        expect(ran).toBe(0)
      }))
  }

  const option = { beforeCommit: insert(9) as never }
  const withOption: ReadonlyArray<readonly [string, Around]> = [
    ["autocommit", (effect) => DbSession.autocommit(effect, option)],
    ["isolated", (effect) => DbSession.isolated(effect, option)],
    ["scoped", (effect) => Effect.scoped(Effect.zipRight(DbSession.scoped(option), effect)) as never],
    ["layer", (effect) => Effect.provide(effect, DbSession.layer(option)) as never],
    [
      "make",
      (effect) =>
        Effect.scoped(Effect.flatMap(DbSession.make({ ...option, autocommit: true }), (_) => _.use(effect))) as never
    ]
  ]
  for (const [name, around] of withOption) {
    test(`${name}: the option of that name`, () =>
      Effect.gen(function* () {
        yield* around(insert(1))
        expect(yield* rows).toEqual([1, 9])
      }))
  }

  test("an explicit commit that it prevents leaves the transaction as it is", () =>
    Effect.gen(function* () {
      let allowed = false
      const hook = Effect.suspend(() => (allowed ? Effect.void : withTransaction(refused)))
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* DbSession.beforeCommit(hook)
          yield* insert(1)
          expect(yield* reason(DbSession.commit)).toBe("UnknownError")
          expect(yield* DbSession.state).toBe("active")
          allowed = true
          yield* DbSession.commit
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  for (const [name, around] of outerForms) {
    test(`${name}: that of a block inside runs when the block is kept, and not when it was rolled back`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        const note = (what: string) => DbSession.beforeCommit(Effect.sync(() => log.push(what)))
        yield* around(
          Effect.gen(function* () {
            yield* withTransaction(Effect.zipRight(note("kept"), insert(1)))
            yield* Effect.ignore(withTransaction(Effect.all([note("undone"), insert(2), no])))
            yield* withTransaction(
              Effect.all([
                note("outer"),
                Effect.ignore(withTransaction(Effect.all([note("inner, undone"), insert(3), no]))),
                withTransaction(Effect.zipRight(note("inner"), insert(4)))
              ])
            )
          })
        )
        expect(log).toEqual(["kept", "outer", "inner"])
        expect(yield* rows).toEqual([1, 4])
      }))

    test(`${name}: one that is registered before COMMIT runs before the same COMMIT`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        const last = Effect.zipRight(insert(3), DbSession.beforeCommit(Effect.sync(() => log.push("last"))))
        const second = Effect.zipRight(insert(2), DbSession.beforeCommit(withTransaction(last)))
        yield* around(Effect.zipRight(DbSession.beforeCommit(second), insert(1)))
        expect(log).toEqual(["last"])
        expect(yield* rows).toEqual([1, 2, 3])
      }))
  }

  for (const [name, around] of sessionForms) {
    test(`${name}: it runs at each COMMIT, that of an atomic at its own`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        const note = (what: string) => DbSession.beforeCommit(Effect.sync(() => log.push(what)))
        yield* around(
          Effect.gen(function* () {
            yield* note("first")
            yield* insert(1)
            yield* DbSession.commit
            yield* atomic(Effect.zipRight(note("atomic"), insert(2)))
            yield* note("second")
            yield* insert(3)
            yield* DbSession.rollback
            yield* Effect.ignore(atomic(Effect.all([note("undone, atomic"), insert(3), no])))
            yield* insert(4)
            yield* DbSession.commit
            yield* insert(5)
          })
        )
        expect(log).toEqual(["first", "first", "atomic", "first", "second", "first", "second"])
        let ran = 0
        const twice = Effect.all([insert(6), DbSession.commit, insert(7)])
        yield* DbSession.autocommit(twice, { beforeCommit: Effect.sync(() => ran++) })
        expect(ran).toBe(2)
      }))
  }

  test("an explicit commit that it prevents keeps it for the next, with what came before it", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      let allowed = false
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* DbSession.beforeCommit(Effect.sync(() => log.push("1")))
          yield* DbSession.beforeCommit(Effect.suspend(() => (allowed ? Effect.void : withTransaction(refused))))
          yield* DbSession.beforeCommit(Effect.sync(() => log.push("3")))
          yield* insert(1)
          expect(yield* reason(DbSession.commit)).toBe("UnknownError")
          allowed = true
          yield* DbSession.commit
        })
      )
      expect(log).toEqual(["1", "1", "3"])
    }))

  for (const failing of [Effect.fail, Effect.die]) {
    const bad = failing(new Error("hook")) as Effect.Effect<never, never>
    test(`one that ${failing === Effect.die ? "dies" : "fails"} rolls a manual transaction back, and runs its hooks`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            const tx = yield* DbSession.begin()
            yield* insert(1)
            yield* note(log, "it")
            yield* DbSession.beforeCommit(bad)
            expect(outcome(yield* Effect.exit(tx.commit))).toMatch(/Error: hook$/)
            expect(log).toEqual(["it rolled back"])
            expect(yield* DbSession.state).toBe("idle")
            expect(yield* reason(tx.commit)).toBe("TransactionClosed")
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual([2])
      }))

    for (const [name, around] of outerForms) {
      test(`${name}: one that ${failing === Effect.die ? "dies" : "fails"} leaves nothing behind`, () =>
        Effect.gen(function* () {
          const exit = yield* Effect.exit(around(Effect.zipRight(DbSession.beforeCommit(bad), insert(1))))
          expect(outcome(exit)).toMatch(/Error: hook$/)
          expect(yield* rows).toEqual([])
        }))
    }
  }

  for (const [name, around] of sessionForms) {
    test(`${name}: commit, rollback, close and atomic in one are SessionBusy, and the commit goes on`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        const ends: ReadonlyArray<Effect.Effect<void, unknown, DbEngine | DbSession>> = [
          DbSession.commit,
          DbSession.rollback,
          DbSession.close,
          atomic(insert(9))
        ]
        yield* around(
          Effect.gen(function* () {
            const each = Effect.forEach(ends, (end) => Effect.map(reason(end), (_) => log.push(_)))
            yield* DbSession.beforeCommit(Effect.orDie(each))
            yield* insert(1)
            yield* DbSession.commit
          })
        )
        expect(log).toEqual(["SessionBusy", "SessionBusy", "SessionBusy", "SessionBusy"])
        yield* around(
          Effect.gen(function* () {
            yield* insert(2)
            yield* DbSession.beforeCommit(Effect.zipRight(insert(3), DbSession.commit))
            expect(yield* reason(DbSession.commit)).toBe("SessionBusy")
            yield* DbSession.rollback
          })
        )
        expect(yield* rows).toEqual([1])
      }))
  }

  test("a session without statements has no COMMIT, and does not run it", () =>
    Effect.gen(function* () {
      let ran = 0
      yield* DbSession.autocommit(DbSession.beforeCommit(Effect.sync(() => ran++)))
      expect(ran).toBe(0)
      expect((yield* DbEngine.stats).total).toBe(0)
    }))

  test("its connection is the session's own", () =>
    Effect.gen(function* () {
      const pids: Array<number> = []
      const note = Effect.map(pid, (_) => void pids.push(_))
      yield* DbSession.autocommit(Effect.all([note, DbSession.beforeCommit(note), DbSession.commit]))
      expect(pids).toEqual([pids[0], pids[0]])
    }))
})

describe("the tenant of a hook", () => {
  const Other = Database.make("hooks-other")
  const usual = '"$user", public'
  const acme = '"acme", "public"'
  const inAcme = DbSchema.withTenant(["acme", "public"])
  /** All three hooks, writing down where they run. */
  const register = (log: Array<string>) =>
    Effect.all([
      DbSession.beforeCommit(Effect.map(path, (path) => log.push(`before ${path}`))),
      DbSession.afterCommit(Effect.map(path, (path) => log.push(`committed ${path}`))),
      DbSession.afterRollback(Effect.map(path, (path) => log.push(`rolled back ${path}`)))
    ])

  for (const [name, around] of outerForms) {
    test(`${name}: is that of where it was registered, however it ends`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* around(inAcme(Effect.zipRight(register(log), insert(1))))
        expect(log.splice(0)).toEqual([`before ${acme}`, `committed ${acme}`])
        expect(yield* reason(around(Effect.zipRight(inAcme(Effect.all([register(log), insert(2)])), no)))).toBe("no")
        expect(log).toEqual([`rolled back ${acme}`])
        expect(yield* path).toBe(usual)
      }))
  }

  test("is not that of whoever commits", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const log: Array<string> = []
        yield* register(log)
        yield* insert(1)
        yield* inAcme(DbSession.commit)
        expect(log).toEqual([`before ${usual}`, `committed ${usual}`])
      })
    ))

  test("several hooks of one session have each its own, and each schema and choice of it", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          yield* DbSchema.withSchema(register(log), "s")
          yield* DbSchema.using(DbSchema.withTenant(register(log), "t"), "u")
          yield* register(log)
          yield* insert(2)
        })
      )
      expect(log).toEqual([
        ...['"s"', '"u"', usual].map((_) => `before ${_}`),
        ...['"s"', '"u"', usual].map((_) => `committed ${_}`)
      ])
      expect(yield* rows).toEqual([1, 2])
    }))

  test("is that of each database", () =>
    Effect.gen(function* () {
      const seen: Array<unknown> = []
      const look = Effect.map(Other.DbSchema.current, (_) => seen.push(Option.getOrUndefined(_)))
      yield* Effect.all([
        insert(1),
        Effect.zipRight(DbSession.beforeCommit(look), DbSession.afterCommit(look)).pipe(
          Other.DbSchema.withTenant("theirs")
        )
      ]).pipe(DbSession.autocommit, Other.DbSchema.withTenant("outer"))
      expect(seen).toEqual(['"theirs"', '"theirs"'])
    }).pipe(Effect.provide(quietly(Other.DbLayer({ url: database.url })))))

  test("with it there is nothing else of the session after a commit, also for a client that is not ours", () =>
    Effect.gen(function* () {
      const seen: Array<unknown> = []
      const foreign = PgClient.layer({ url: Redacted.make(database.url), maxConnections: 1 })
      const hook = Effect.gen(function* () {
        const sql = yield* SqlClient.SqlClient
        seen.push(yield* sql`SELECT id FROM t`, yield* DbSession.state)
      })
      yield* inAcme(Effect.zipRight(DbSession.afterCommit(Effect.provide(hook, foreign)), insert(1))).pipe(
        DbSession.autocommit
      )
      expect(seen).toEqual([[{ id: 1 }], "closed"])
    }))
})
