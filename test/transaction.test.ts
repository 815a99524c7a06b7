import { describe } from "@effect/vitest"
import { Deferred, Effect, Fiber, identity, Logger, LogLevel, Option, Schedule } from "effect"
import {
  atomic,
  DbEngine,
  DbError,
  DbLayer,
  DbSession,
  DbTransaction,
  type ManualTransaction,
  withTransaction,
  type WithTransactionOptions
} from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import {
  type Around,
  committed,
  conflict,
  insert,
  no,
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
  used
} from "./support/programs.js"
import { collected } from "./support/observed.js"
import { barrier, until } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

/** The two forms of a block around an effect. */
const blockForms: ReadonlyArray<readonly [string, Around]> = [
  ["withTransaction", (effect) => withTransaction(effect)],
  ["DbTransaction.scoped", (effect) => Effect.scoped(Effect.zipRight(DbTransaction.scoped(), effect)) as never]
]

/** Every way to be inside. */
const insideForms: ReadonlyArray<readonly [string, Around]> = [
  ...sessionForms,
  ["withTransaction", (effect) => withTransaction(effect)]
]

/** The ways to be inside that have an effect to return to. */
const typedForms: ReadonlyArray<readonly [string, Around]> = [
  ["withTransaction", (effect) => withTransaction(effect)],
  ["autocommit", (effect) => DbSession.autocommit(effect)],
  ["isolated", (effect) => DbSession.isolated(effect)]
]

describe("outside a session", () => {
  for (const [name, block] of blockForms) {
    test(`${name} opens, commits and closes`, () =>
      Effect.gen(function* () {
        yield* block(
          Effect.zipRight(
            insert(1),
            Effect.map(used, (_) => expect(_).toBe(1))
          )
        )
        expect(yield* used).toBe(0)
        expect(yield* rows).toEqual([1])
      }))

    test(`${name} rolls back on failure, defect and interruption, each unchanged`, () =>
      Effect.gen(function* () {
        expect(yield* reason(block(Effect.zipRight(insert(1), no)))).toBe("no")
        expect(outcome(yield* Effect.exit(block(Effect.zipRight(insert(2), Effect.die("mine")))))).toBe("defect: mine")
        const inserted = yield* Deferred.make<void>()
        const fiber = yield* Effect.fork(
          block(Effect.all([insert(3), Deferred.succeed(inserted, undefined), Effect.never]))
        )
        yield* Deferred.await(inserted)
        expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
        expect(yield* rows).toEqual([])
      }))

    test(`${name} without a statement borrows nothing`, () =>
      Effect.gen(function* () {
        yield* block(block(Effect.void))
        expect((yield* DbEngine.stats).total).toBe(0)
      }))
  }

  test("sql.withTransaction is withTransaction", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* Effect.ignore(sql.withTransaction(Effect.zipRight(insert(1), no)))
      yield* sql.withTransaction(
        Effect.gen(function* () {
          yield* insert(2)
          yield* Effect.ignore(sql.withTransaction(Effect.zipRight(insert(3), no)))
          expect(Option.isSome(yield* DbTransaction.current)).toBe(true)
        })
      )
      expect(yield* rows).toEqual([2])
    }))
})

describe("16 savepoints", () => {
  for (const [name, block] of blockForms) {
    for (const [session, around] of insideForms) {
      test(`${name} in ${session}: the inner fails and is caught, twice in a row; the outer commits without its rows`, () =>
        Effect.gen(function* () {
          yield* around(
            Effect.gen(function* () {
              yield* insert(1)
              expect(yield* reason(block(Effect.zipRight(insert(2), no)))).toBe("no")
              expect(yield* reason(block(Effect.zipRight(insert(3), refused)))).toBe("UnknownError")
              yield* block(insert(4))
              yield* insert(5)
            })
          )
          expect(yield* rows).toEqual([1, 4, 5])
        }))
    }
  }

  test("a block inside a session decides nothing about the commit", () =>
    Effect.gen(function* () {
      yield* Effect.ignore(DbSession.autocommit(Effect.all([withTransaction(insert(1)), no])))
      expect(yield* rows).toEqual([])
    }))

  test("a block before any statement of the session is inside all the same", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* Effect.ignore(withTransaction(Effect.zipRight(insert(1), no)))
          expect(yield* DbSession.state).toBe("active")
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  proxied("10 000 in sequence are released one by one, and cost no round trip of their own", (proxy) =>
    Effect.gen(function* () {
      const times = 10_000
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(0)
          proxy.reset()
          yield* Effect.forEach(Array.from({ length: times }), (_, i) => withTransaction(insert(i + 1)), {
            discard: true
          })
        })
      )
      const open = proxy.statements().reduce(
        ({ depth, deepest }, text) => {
          const now = depth + (text.startsWith("SAVEPOINT") ? 1 : text.startsWith("RELEASE") ? -1 : 0)
          return { depth: now, deepest: Math.max(now, deepest) }
        },
        { depth: 0, deepest: 0 }
      )
      expect(open.deepest).toBe(1)
      expect(proxy.flights()).toBe(times + 1)
      expect((yield* rows).length).toBe(times + 1)
    })
  )

  test("10 000 in sequence on the server", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.forEach(Array.from({ length: 10_000 }), (_, i) => withTransaction(insert(i)), { discard: true })
      )
      const [found] = yield* database.query<{ n: number }>("SELECT count(*)::int AS n FROM t")
      expect(found?.n).toBe(10_000)
    }))

  test("nested twenty deep, the tenth fails: nine are kept", () =>
    Effect.gen(function* () {
      const deep = (depth: number): Effect.Effect<void, unknown, any> =>
        withTransaction(
          Effect.zipRight(
            insert(depth),
            depth === 20
              ? Effect.void
              : depth === 9
                ? Effect.ignore(deep(10))
                : Effect.zipRight(deep(depth + 1), depth === 10 ? no : Effect.void)
          )
        )
      yield* deep(1) as Effect.Effect<void, unknown, DbEngine>
      expect(yield* rows).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9])
    }))
})

describe("propagation", () => {
  test("a word that there is not is InvalidInput, and nothing runs", () =>
    Effect.gen(function* () {
      for (const options of [{ propagation: "bogus" }, { retry: "yes" }]) {
        expect(yield* reason(withTransaction(insert(1), options as never))).toBe("InvalidInput")
      }
      expect(yield* committed(database)).toEqual([])
    }))

  const { never, mandatory } = { never: { propagation: "never" }, mandatory: { propagation: "mandatory" } } as const

  for (const [name, around] of insideForms) {
    test(`17 never in ${name} fails with PropagationError, and the caller goes on`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(withTransaction(insert(2), never))).toBe("PropagationError")
            yield* insert(3)
          })
        )
        expect(yield* rows).toEqual([1, 3])
      }))

    test(`mandatory, required and supports join in ${name}`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            const outer = yield* place
            for (const propagation of ["mandatory", "required", "supports"] as const) {
              expect(yield* withTransaction(place, { propagation })).toEqual(outer)
            }
          })
        )
      }))

    test(`requiresNew in ${name} commits by itself, on its own connection`, () =>
      Effect.gen(function* () {
        yield* Effect.ignore(
          around(
            Effect.gen(function* () {
              const outer = yield* place
              yield* insert(1)
              const inner = yield* withTransaction(Effect.zipRight(insert(2), place), { propagation: "requiresNew" })
              expect(inner.pid).not.toBe(outer.pid)
              expect(yield* place).toEqual(outer)
              return yield* no
            })
          )
        )
        expect(yield* rows).toEqual([2])
      }))

    test(`notSupported in ${name} runs without, and the transaction is as before afterwards`, () =>
      Effect.gen(function* () {
        yield* Effect.ignore(
          around(
            Effect.gen(function* () {
              const outer = yield* place
              yield* insert(1)
              yield* withTransaction(
                Effect.gen(function* () {
                  expect(Option.isNone(yield* DbTransaction.current)).toBe(true)
                  yield* insert(2)
                  expect(yield* rows).toEqual([2])
                }),
                { propagation: "notSupported" }
              )
              expect(yield* place).toEqual(outer)
              return yield* no
            })
          )
        )
        expect(yield* rows).toEqual([2])
      }))

    for (const propagation of ["required", "mandatory", "supports"] as const) {
      test(`26 ${propagation} in ${name} fails and is caught: the outer's commit is TransactionAborted`, () =>
        Effect.gen(function* () {
          const body = Effect.all([
            insert(1),
            Effect.ignore(withTransaction(Effect.zipRight(insert(2), no), { propagation })),
            insert(3)
          ])
          expect(outcome(yield* Effect.exit(around(body)))).toMatch(/TransactionAborted$/)
          expect(yield* rows).toEqual([])
        }))
    }
  }

  test("26 the nearest real block is marked, and no further", () =>
    Effect.gen(function* () {
      const required = withTransaction(Effect.zipRight(insert(3), no), { propagation: "required" })
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          const inner = withTransaction(Effect.zipRight(insert(2), Effect.ignore(required)))
          expect(yield* reason(inner)).toBe("TransactionAborted")
          yield* insert(4)
        })
      )
      expect(yield* rows).toEqual([1, 4])
    }))

  test("17 mandatory outside fails with PropagationError, and the caller goes on", () =>
    Effect.gen(function* () {
      expect(yield* reason(withTransaction(insert(1), mandatory))).toBe("PropagationError")
      yield* insert(2)
      expect(yield* rows).toEqual([2])
    }))

  for (const propagation of ["supports", "notSupported", "never"] as const) {
    test(`${propagation} outside runs without`, () =>
      Effect.gen(function* () {
        yield* Effect.ignore(withTransaction(Effect.zipRight(insert(1), no), { propagation }))
        expect(yield* rows).toEqual([1])
      }))
  }

  for (const propagation of ["nested", "required", "requiresNew"] as const) {
    test(`${propagation} outside opens`, () =>
      Effect.gen(function* () {
        yield* Effect.ignore(withTransaction(Effect.zipRight(insert(1), no), { propagation }))
        yield* withTransaction(insert(2), { propagation })
        expect(yield* rows).toEqual([2])
      }))
  }

  test("joining with options that the open transaction can't honour is a PropagationError", () =>
    withTransaction(
      Effect.gen(function* () {
        yield* insert(1)
        for (const propagation of ["nested", "required"] as const) {
          const wrong = withTransaction(insert(2), { propagation, isolation: "serializable" })
          expect(yield* reason(wrong)).toBe("PropagationError")
        }
        const quicker = withTransaction(insert(2), { propagation: "required", statementTimeout: 10 })
        expect(yield* reason(quicker)).toBe("PropagationError")
        yield* withTransaction(insert(3), { propagation: "required", isolation: "read committed" })
      })
    ))
})

describe("18 a swallowed statement error", () => {
  test("in the outermost block is a TransactionAborted that names the statement", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(withTransaction(Effect.zipRight(insert(1), Effect.ignore(refused))))
      const why = DbError.reason(error)
      expect(why?._tag).toBe("TransactionAborted")
      expect(why?._tag === "TransactionAborted" && why.statement).toContain("INSERT INTO t")
      expect(why?._tag === "TransactionAborted" && DbError.reason(why.firstError)?.sqlState).toBe("22P02")
      expect(yield* rows).toEqual([])
    }))

  test("in an inner block undoes only that one, which says so", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          const inner = withTransaction(Effect.zipRight(insert(2), Effect.ignore(refused)))
          expect(yield* reason(inner)).toBe("TransactionAborted")
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([1, 3])
    }))

  test("what follows it in the block is told the first cause", () =>
    Effect.gen(function* () {
      const body = Effect.zipRight(Effect.ignore(refused), insert(1))
      const error = yield* Effect.flip(withTransaction(body))
      const why = DbError.reason(error)
      expect(why?._tag).toBe("TransactionAborted")
      expect(why?._tag === "TransactionAborted" && DbError.reason(why.firstError)?.sqlState).toBe("22P02")
    }))

  test("DbTransaction.current tells that the transaction has failed", () =>
    Effect.gen(function* () {
      const status = Effect.map(DbTransaction.current, (_) => Option.getOrThrow(_).status)
      const states: Array<string> = []
      const note = Effect.map(status, (_) => void states.push(_))
      yield* Effect.ignore(withTransaction(Effect.all([note, insert(1), note, Effect.ignore(refused), note])))
      expect(states).toEqual(["idle", "active", "failed"])
    }))
})

describe("19 a deferred constraint at COMMIT", () => {
  const deferred = "CREATE TABLE twin (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
  const collide = Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO twin VALUES (1), (1)`)
  const fresh = database.query(`DROP TABLE IF EXISTS twin; ${deferred}`)

  for (const [name, around] of typedForms) {
    proxied(`${name}: is its typed reason, no ROLLBACK follows, the connection is used again`, (proxy) =>
      Effect.gen(function* () {
        yield* fresh
        const before = yield* pid
        const error = yield* Effect.flip(around(collide))
        expect(DbError.reason(error)?._tag).toBe("UniqueViolation")
        expect(DbError.reason(error)?.constraint).toBe("twin_id_key")
        expect(proxy.statements().slice(-1)).toEqual(["COMMIT"])
        expect(yield* pid).toBe(before)
      })
    )
  }

  test("an explicit commit fails typed, and the session goes on", () =>
    Effect.gen(function* () {
      yield* fresh
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* collide
          expect(yield* reason(DbSession.commit)).toBe("UniqueViolation")
          expect(yield* DbSession.state).toBe("idle")
          yield* insert(1)
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  for (const [name, around] of [...sessionForms.slice(1), blockForms[1]!]) {
    test(`${name}: dies with it`, () =>
      Effect.gen(function* () {
        yield* fresh
        expect(outcome(yield* Effect.exit(around(collide)))).toBe("defect: UniqueViolation")
      }))
  }
})

describe("20 BEGIN and ROLLBACK fail", () => {
  proxied(
    "BEGIN fails: that error, the statement has not run, and no ROLLBACK is sent",
    (proxy) =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        yield* withTransaction(seen)
        // The named BEGIN goes behind the client's back.
        yield* sql`DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$`
        proxy.reset()
        const error = yield* Effect.flip(withTransaction(insert(1)))
        expect(DbError.reason(error)?.sqlState).toBe("26000")
        expect(proxy.statements().filter((_) => /ROLLBACK|COMMIT/.test(_))).toEqual([])
        expect(yield* rows).toEqual([])
        yield* withTransaction(insert(2))
        expect(yield* rows).toEqual([2])
      }),
    { maxConnections: 1, resetOnRelease: "never" }
  )

  test("a setting that the server refuses is that error, and the statement has not run", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(withTransaction(insert(1), { settings: { work_mem: "nonsense" } }))
      expect(DbError.reason(error)?.sqlState).toBe("22023")
      expect(yield* rows).toEqual([])
    }))

  proxied("the connection is lost before BEGIN is answered: ConnectionError, and nothing else is sent", (proxy) =>
    Effect.gen(function* () {
      yield* pid
      const cut = proxy.cutAfter(({ text, type }) => type === "E" && text.startsWith("BEGIN"), { forward: false })
      expect(yield* reason(withTransaction(insert(1)))).toBe("ConnectionError")
      yield* Effect.promise(() => cut)
      expect(proxy.statements().filter((_) => _.startsWith("ROLLBACK"))).toEqual([])
      yield* withTransaction(insert(2))
      expect(yield* rows).toEqual([2])
    })
  )

  for (const [name, around] of [...typedForms, ...sessionForms.slice(1)]) {
    proxied(`${name}: ROLLBACK fails: the original cause, and the connection is destroyed`, (proxy) =>
      Effect.gen(function* () {
        const before = yield* pid
        const cut = proxy.cutAfter(({ text }) => text === "ROLLBACK", { forward: false })
        expect(yield* Effect.flip(around(Effect.zipRight(insert(1), no)))).toBe("no")
        yield* Effect.promise(() => cut)
        expect(yield* rows).toEqual([])
        expect(yield* pid).not.toBe(before)
      })
    )
  }

  proxied("a backend killed in the block: ConnectionError, not a defect, and the next one works", () =>
    Effect.gen(function* () {
      const killed = withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          const backend = yield* pid
          yield* database.query("SELECT pg_terminate_backend($1)", [backend])
          yield* insert(2)
        })
      )
      expect(yield* reason(killed)).toBe("ConnectionError")
      yield* withTransaction(insert(3))
      expect(yield* rows).toEqual([3])
    })
  )

  proxied("the connection is lost during COMMIT: CommitUnknown", (proxy) =>
    Effect.gen(function* () {
      for (const [id, forward] of [
        [1, true],
        [2, false]
      ] as const) {
        void proxy.cutAfter(({ text }) => text === "COMMIT", { forward })
        expect(yield* reason(withTransaction(insert(id)))).toBe("CommitUnknown")
      }
      yield* insert(3)
      expect(yield* rows).toEqual([1, 3])
    })
  )

  const verify = { verifyOutcome: true }
  for (const [name, verified] of [
    ["withTransaction", (id: number) => withTransaction(insert(id), verify)],
    ["atomic in a session", (id: number) => DbSession.autocommit(atomic(insert(id), verify))]
  ] as const) {
    proxied(`${name}, verifyOutcome: the truth is found each time`, (proxy) =>
      Effect.gen(function* () {
        void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
        yield* verified(1)
        void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: false })
        const error = yield* Effect.flip(verified(2))
        expect(DbError.reason(error)?._tag).toBe("ConnectionError")
        expect(DbError.isRetryable(error)).toBe(true)
        expect(yield* rows).toEqual([1])
      })
    )
  }
})

describe("verifyOutcome where the marker can't be written as it is", () => {
  proxied("a read-only transaction writes none, and one that was lost is retryable", (proxy) =>
    Effect.gen(function* () {
      yield* database.query("DROP TABLE IF EXISTS effect_db_outcome")
      yield* insert(1)
      const read = withTransaction(seen, { readOnly: true, verifyOutcome: true })
      expect(yield* read).toEqual([1])
      void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: false })
      const error = yield* Effect.flip(read)
      expect(DbError.reason(error)).toMatchObject({ _tag: "ConnectionError", phase: "commit", isRetryable: true })
      void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
      expect(yield* withTransaction(seen, { readOnly: true, verifyOutcome: true, retry: true })).toEqual([1])
      const tables = yield* database.query("SELECT to_regclass('effect_db_outcome')::text AS found")
      expect(tables).toEqual([{ found: null }])
    })
  )

  test("engines that create the table of outcomes at the same time don't fail each other", () =>
    Effect.gen(function* () {
      for (let round = 0; round < 5; round++) {
        yield* database.query("DROP TABLE IF EXISTS effect_db_outcome")
        yield* Effect.forEach(
          [1, 2, 3, 4, 5, 6, 7, 8],
          (id) =>
            withTransaction(insert(10 * round + id), { verifyOutcome: true }).pipe(
              Effect.provide(quietly(DbLayer({ url: database.url })))
            ),
          { concurrency: "unbounded", discard: true }
        )
      }
      expect((yield* rows).length).toBe(40)
    }))

  test("a table of outcomes that was dropped fails one transaction, and is there for the next", () =>
    Effect.gen(function* () {
      const verified = (id: number) => withTransaction(insert(id), { verifyOutcome: true })
      yield* verified(1)
      yield* database.query("DROP TABLE effect_db_outcome")
      yield* Effect.flip(verified(2))
      yield* verified(3)
      expect(yield* rows).toEqual([1, 3])
    }))

  proxied("a transaction that has changed its search path finds the table all the same", (proxy) =>
    Effect.gen(function* () {
      const elsewhere = Effect.flatMap(DbSession, ({ sql }) => sql`SET LOCAL search_path = pg_catalog`)
      const hidden = (id: number) => withTransaction(Effect.zipRight(insert(id), elsewhere), { verifyOutcome: true })
      yield* hidden(1)
      void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
      yield* hidden(2)
      expect(yield* rows).toEqual([1, 2])
      yield* database.query("DROP TABLE effect_db_outcome")
    })
  )
})

describe("21 ending a block early", () => {
  const three = (
    how: "commit" | "rollback",
    between: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, any, R>,
    log: Array<string>
  ) =>
    withTransaction(() =>
      Effect.gen(function* () {
        yield* insert(1)
        const value = yield* withTransaction((two) =>
          Effect.gen(function* () {
            yield* insert(2)
            yield* between(
              withTransaction(
                Effect.gen(function* () {
                  yield* insert(3)
                  yield* two.end(how, "value of 2")
                  log.push("after end in 3")
                })
              )
            )
            log.push("after 3 in 2")
            return "end of 2"
          })
        )
        yield* insert(4)
        return value
      })
    )

  const handlers: ReadonlyArray<
    readonly [string, (log: Array<string>) => <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, any, R>]
  > = [
    ["nothing", () => (effect) => effect],
    ["catchAll", (log) => (effect) => Effect.catchAll(effect, () => Effect.sync(() => log.push("trapped") as never))],
    [
      "catchAllCause",
      (log) => (effect) => Effect.catchAllCause(effect, () => Effect.sync(() => log.push("trapped") as never))
    ],
    [
      "retry",
      (log) => (effect) =>
        Effect.retry(
          Effect.tapError(effect, () => Effect.sync(() => log.push("trapped"))),
          { times: 3 }
        )
    ],
    ["exit", (log) => (effect) => Effect.flatMap(Effect.exit(effect), (exit) => (log.push("trapped"), exit))],
    ["orElse", (log) => (effect) => Effect.orElse(effect, () => Effect.sync(() => log.push("trapped") as never))],
    ["timeout", () => (effect) => Effect.timeout(effect, "10 seconds")],
    ["a fork and join", () => (effect) => Effect.flatMap(Effect.fork(effect), Fiber.join)],
    ["Effect.all", () => (effect) => Effect.map(Effect.all([effect, Effect.never], { concurrency: 2 }), ([a]) => a)],
    ["scoped", () => (effect) => Effect.scoped(effect) as typeof effect]
  ]

  for (const [name, handler] of handlers) {
    test(`${name} in between: end block 2 with rollback from block 3: 3 and 2 are undone, 1 goes on and commits`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        expect(yield* three("rollback", handler(log), log)).toBe("value of 2")
        expect(log).toEqual([])
        expect(yield* rows).toEqual([1, 4])
      }))

    test(`${name} in between: with commit: 2 and 3 are kept`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        expect(yield* three("commit", handler(log), log)).toBe("value of 2")
        expect(log).toEqual([])
        expect(yield* rows).toEqual([1, 2, 3, 4])
      }))
  }

  for (const how of ["commit", "rollback"] as const) {
    test(`where the whole can't be interrupted, as in a finalizer, no handler traps a ${how} either`, () =>
      Effect.gen(function* () {
        const log: Array<string> = []
        const handler = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
          Effect.catchAllCause(effect, () => Effect.sync(() => log.push("trapped") as never))
        yield* Effect.void.pipe(
          Effect.ensuring(Effect.map(Effect.orDie(three(how, handler, log)), (value) => log.push(value)))
        )
        expect(log).toEqual(["value of 2"])
        expect(yield* rows).toEqual(how === "commit" ? [1, 2, 3, 4] : [1, 4])
      }))
  }

  test("ensuring in between runs, once, and does not trap it", () =>
    Effect.gen(function* () {
      let ran = 0
      const log: Array<string> = []
      yield* three(
        "rollback",
        (effect) =>
          Effect.ensuring(
            effect,
            Effect.sync(() => ran++)
          ),
        log
      )
      expect([ran, log]).toEqual([1, []])
      expect(yield* rows).toEqual([1, 4])
    }))

  test("the outermost block itself, from two blocks below, in a session and outside", () =>
    Effect.gen(function* () {
      const from = (id: number, how: "commit" | "rollback") =>
        withTransaction((tx) =>
          Effect.zipRight(
            insert(id),
            withTransaction(withTransaction(Effect.zipRight(insert(id + 1), tx.end(how, id))))
          )
        )
      expect(yield* from(10, "commit")).toBe(10)
      expect(yield* from(20, "rollback")).toBe(20)
      yield* DbSession.autocommit(Effect.all([from(30, "commit"), from(40, "rollback")]))
      expect(yield* rows).toEqual([10, 11, 30, 31])
    }))

  test("a block that joined is ended too: commit keeps what is inside, rollback marks what it joined", () =>
    Effect.gen(function* () {
      const joined = (id: number, how: "commit" | "rollback") =>
        withTransaction(
          (tx) => Effect.zipRight(insert(id), withTransaction(Effect.zipRight(insert(id + 1), tx.end(how, id)))),
          { propagation: "required" }
        )
      expect(yield* withTransaction(joined(10, "commit"))).toBe(10)
      expect(yield* reason(withTransaction(joined(20, "rollback")))).toBe("TransactionAborted")
      expect(yield* rows).toEqual([10, 11])
    }))

  test("after its block has ended it is a TransactionClosed, as is a second time", () =>
    Effect.gen(function* () {
      let kept: Effect.Effect<never, unknown> = Effect.never
      yield* withTransaction((tx) => {
        kept = tx.end("commit")
        return insert(1)
      })
      expect(yield* reason(kept)).toBe("TransactionClosed")
    }))

  test("an outside interruption of a block that is being ended is still an interruption", () =>
    Effect.gen(function* () {
      const started = yield* Deferred.make<void>()
      const fiber = yield* Effect.fork(
        withTransaction(() => Effect.all([insert(1), Deferred.succeed(started, undefined), Effect.never]))
      )
      yield* Deferred.await(started)
      expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
      expect(yield* rows).toEqual([])
    }))

  test("setRollbackOnly: a success then fails with TransactionAborted", () =>
    Effect.gen(function* () {
      const marked = withTransaction(Effect.zipRight(insert(1), DbTransaction.setRollbackOnly))
      expect(yield* reason(marked)).toBe("TransactionAborted")
      expect(yield* reason(withTransaction((tx) => Effect.zipRight(insert(2), tx.setRollbackOnly)))).toBe(
        "TransactionAborted"
      )
      yield* withTransaction(Effect.zipRight(insert(3), Effect.ignore(marked)))
      expect(yield* reason(DbTransaction.setRollbackOnly)).toBe("NoSession")
      expect(yield* rows).toEqual([3])
    }))

  test("setRollbackOnly of a block that has ended is TransactionClosed, and marks nothing", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.gen(function* () {
          const inner = yield* withTransaction((tx) => Effect.as(insert(1), tx))
          const byHand = yield* DbSession.begin()
          yield* byHand.commit
          expect(yield* reason(inner.setRollbackOnly)).toBe("TransactionClosed")
          expect(yield* reason(byHand.setRollbackOnly)).toBe("TransactionClosed")
        })
      )
      const outer = yield* withTransaction((tx) => Effect.as(insert(2), tx))
      expect(yield* reason(outer.setRollbackOnly)).toBe("TransactionClosed")
      expect(yield* rows).toEqual([1, 2])
    }))
})

describe("23 manual transactions", () => {
  for (const [name, around] of sessionForms) {
    test(`${name}: begin opens the transaction, then savepoints; each ends by hand`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            const one = yield* DbSession.begin()
            yield* insert(1)
            const two = yield* DbSession.begin()
            expect([one.depth, two.depth]).toEqual([1, 2])
            yield* insert(2)
            yield* two.rollback
            expect(yield* seen).toEqual([1])
            const three = yield* DbSession.savepoint()
            yield* insert(3)
            yield* three.commit
            yield* one.commit
            expect(yield* rows).toEqual([1, 3])
            expect(yield* DbSession.state).toBe("idle")
          })
        )
        expect(yield* rows).toEqual([1, 3])
      }))

    test(`${name}: left open with work in it, a success that loses that work logs a warning`, () =>
      Effect.gen(function* () {
        const [lines, logger] = collected()
        const told = (effect: Effect.Effect<unknown, unknown, DbEngine | DbSession>) =>
          Effect.gen(function* () {
            const before = lines.length
            yield* Effect.exit(around(effect)).pipe(
              Logger.withMinimumLogLevel(LogLevel.Warning),
              Effect.provide(logger)
            )
            return lines.slice(before).map((_) => _.message)
          })
        const message =
          'effect-db: the block "block 1" was never ended: it was rolled back. Call tx.commit or tx.rollback.'
        expect(yield* told(Effect.all([DbSession.begin(), insert(1)]))).toEqual([message])
        expect(yield* told(Effect.all([insert(1), DbSession.savepoint(), insert(2)]))).toEqual([message])
        const named = DbSession.begin({ name: "import" })
        expect(yield* told(withTransaction(Effect.all([named, insert(3)])))).toEqual([
          message.replace("block 1", "import")
        ])
        expect(yield* told(atomic(Effect.all([named, insert(4)])))).toEqual([message.replace("block 1", "import")])
        expect(yield* committed(database)).toEqual([1])
        // Nothing is lost, or nobody thinks that it is kept.
        expect(yield* told(DbSession.begin())).toEqual([])
        expect(yield* told(Effect.all([insert(5), DbSession.savepoint()]))).toEqual([])
        expect(yield* told(Effect.zipRight(Effect.all([DbSession.begin(), insert(6)]), no))).toEqual([])
        expect(yield* told(Effect.all([DbSession.begin(), insert(7), DbSession.close]))).toEqual([])
        expect(yield* told(Effect.flatMap(DbSession.begin(), (tx) => Effect.zipRight(insert(8), tx.commit)))).toEqual(
          []
        )
      }))

    test(`${name}: left open, it is rolled back at the end`, () =>
      Effect.gen(function* () {
        yield* around(Effect.all([DbSession.begin(), insert(1)]))
        expect(yield* rows).toEqual([])
        yield* around(Effect.all([insert(2), DbSession.savepoint(), insert(3)]))
        expect(yield* rows).toEqual([2])
      }))

    test(`${name}: left open, it is rolled back by close`, () =>
      Effect.gen(function* () {
        yield* around(Effect.all([DbSession.begin(), insert(1), DbSession.close, insert(2)]))
        expect(yield* rows).toEqual([2])
      }))

    test(`${name}: ended twice is a TransactionClosed, the outer before the inner a SessionBusy`, () =>
      Effect.gen(function* () {
        yield* around(
          Effect.gen(function* () {
            const one = yield* DbSession.begin()
            yield* insert(1)
            const two = yield* DbSession.begin()
            yield* insert(2)
            expect(yield* reason(one.commit)).toBe("SessionBusy")
            expect(yield* reason(one.rollback)).toBe("SessionBusy")
            yield* two.commit
            expect(yield* reason(two.commit)).toBe("TransactionClosed")
            expect(yield* reason(two.rollback)).toBe("TransactionClosed")
            yield* one.commit
            expect(yield* reason(one.commit)).toBe("TransactionClosed")
          })
        )
        expect(yield* rows).toEqual([1, 2])
      }))
  }

  test("session.commit with a manual transaction open is SessionBusy", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const one = yield* DbSession.begin()
          yield* insert(1)
          expect(yield* reason(DbSession.commit)).toBe("SessionBusy")
          yield* one.commit
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("a manual transaction kept after its session is a TransactionClosed", () =>
    Effect.gen(function* () {
      const kept: ManualTransaction = yield* DbSession.autocommit(Effect.zipLeft(DbSession.begin(), insert(1)))
      expect(yield* reason(kept.commit)).toBe("TransactionClosed")
      expect(yield* rows).toEqual([])
    }))

  test("a manual commit over a swallowed error is TransactionAborted", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const one = yield* DbSession.begin()
        yield* insert(1)
        yield* Effect.ignore(refused)
        expect(yield* reason(one.commit)).toBe("TransactionAborted")
        expect(yield* DbSession.state).toBe("idle")
      })
    ).pipe(Effect.zipRight(Effect.map(rows, (ids) => expect(ids).toEqual([])))))

  test("DbTransaction.current and setRollbackOnly mean the innermost that is open", () =>
    Effect.gen(function* () {
      const depth = Effect.map(
        DbTransaction.current,
        Option.map((_) => _.depth)
      )
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* depth).toEqual(Option.none())
          const one = yield* DbSession.begin()
          yield* insert(1)
          const two = yield* DbSession.begin()
          yield* insert(2)
          expect(yield* depth).toEqual(Option.some(2))
          yield* DbTransaction.setRollbackOnly
          expect(yield* reason(two.commit)).toBe("TransactionAborted")
          expect(yield* depth).toEqual(Option.some(1))
          yield* one.commit
          expect(yield* depth).toEqual(Option.none())
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("a handle of make has them too", () =>
    Effect.gen(function* () {
      yield* Effect.scoped(
        Effect.gen(function* () {
          const session = yield* DbSession.make()
          const one = yield* session.begin()
          yield* session.sql`INSERT INTO t (id) VALUES (1)`
          const two = yield* session.savepoint()
          yield* session.sql`INSERT INTO t (id) VALUES (2)`
          yield* two.rollback
          yield* one.commit
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe("24 options", () => {
  interface Settings {
    readonly isolation: string
    readonly readOnly: string
    readonly deferrable: string
    readonly statement: string
    readonly lock: string
    readonly tenant: string | null
  }
  const settings = Effect.flatMap(DbSession, ({ sql }) =>
    Effect.map(
      sql<Settings>`SELECT current_setting('transaction_isolation') AS isolation,
        current_setting('transaction_read_only') AS "readOnly", current_setting('transaction_deferrable') AS deferrable,
        current_setting('statement_timeout') AS statement, current_setting('lock_timeout') AS lock,
        nullif(current_setting('app.tenant', true), '') AS tenant`,
      (_) => _[0]!
    )
  )
  const options = {
    isolation: "serializable",
    readOnly: true,
    deferrable: true,
    statementTimeout: "3 seconds",
    lockTimeout: 2000,
    settings: { "app.tenant": "acme" }
  } as const
  const all: Settings = {
    isolation: "serializable",
    readOnly: "on",
    deferrable: "on",
    statement: "3s",
    lock: "2s",
    tenant: "acme"
  }
  const plain: Settings = {
    isolation: "read committed",
    readOnly: "off",
    deferrable: "off",
    statement: "0",
    lock: "0",
    tenant: null
  }
  const around: ReadonlyArray<
    readonly [string, (effect: typeof settings) => Effect.Effect<Settings, unknown, DbEngine | DbSession>]
  > = [
    ["autocommit", (effect) => DbSession.autocommit(effect, options)],
    ["isolated", (effect) => effect.pipe(DbSession.isolated(options))],
    ["scoped", (effect) => Effect.scoped(Effect.zipRight(DbSession.scoped(options), effect))],
    ["layer", (effect) => Effect.provide(effect, DbSession.layer(options))],
    ["make", (effect) => Effect.scoped(Effect.flatMap(DbSession.make(options), (_) => _.use(effect)))],
    ["withTransaction", (effect) => effect.pipe(withTransaction(options))],
    ["DbTransaction.scoped", (effect) => Effect.scoped(Effect.zipRight(DbTransaction.scoped(options), effect))],
    ["begin", (effect) => DbSession.autocommit(Effect.zipRight(DbSession.begin(options), effect))]
  ]
  for (const [name, run] of around) {
    test(
      `${name}: they apply, and the next borrower of the connection has none of them`,
      () =>
        Effect.gen(function* () {
          const before = yield* pid
          expect(yield* run(settings)).toEqual(all)
          expect(yield* settings).toEqual(plain)
          expect(yield* withTransaction(settings)).toEqual(plain)
          expect(yield* pid).toBe(before)
        }),
      { maxConnections: 1 }
    )
  }

  test("the settings of an inner block are restored when it is released, and when it is rolled back", () =>
    withTransaction(
      Effect.gen(function* () {
        const inner = { settings: { "app.tenant": "other" }, statementTimeout: 5000 }
        expect(yield* withTransaction(settings, inner)).toMatchObject({ tenant: "other", statement: "5s" })
        expect(yield* settings).toMatchObject({ tenant: "acme", statement: "0" })
        yield* Effect.ignore(withTransaction(Effect.zipRight(settings, no), inner))
        expect(yield* settings).toMatchObject({ tenant: "acme", statement: "0" })
      }),
      { settings: { "app.tenant": "acme" } }
    ))

  test("a read-only block inside refuses to write, and the outer can go on writing", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          expect(yield* reason(withTransaction(insert(2), { readOnly: true }))).toBe("ReadOnlyError")
          yield* withTransaction(seen, { readOnly: true })
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([1, 3])
    }))

  test(
    "the engine's defaults apply to sessions that don't say",
    () =>
      Effect.gen(function* () {
        expect(yield* DbSession.autocommit(settings)).toMatchObject({ isolation: "repeatable read", readOnly: "on" })
        expect(yield* withTransaction(settings, { readOnly: false })).toMatchObject({
          isolation: "repeatable read",
          readOnly: "off"
        })
      }),
    { isolation: "repeatable read", readOnly: true }
  )

  test("a statement timeout is typed, and so is the timeout of a block", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const slow = sql`SELECT pg_sleep(${60})`
      expect(yield* reason(withTransaction(slow, { statementTimeout: 20 }))).toBe("StatementTimeoutError")
      expect(yield* reason(withTransaction(slow, { timeout: 20 }))).toBe("TransactionTimeout")
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          expect(yield* reason(withTransaction(Effect.zipRight(insert(2), slow), { timeout: 20 }))).toBe(
            "TransactionTimeout"
          )
          expect(yield* reason(withTransaction(slow, { statementTimeout: 20 }))).toBe("StatementTimeoutError")
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([1, 3])
    }))

  const without: ReadonlyArray<
    readonly [name: string, around: Around, propagation: "supports" | "never" | "notSupported"]
  > = [
    ["supports outside", identity, "supports"],
    ["never outside", identity, "never"],
    ["notSupported outside", identity, "notSupported"],
    ["notSupported inside", (effect) => withTransaction(effect), "notSupported"]
  ]
  for (const [name, around, propagation] of without) {
    test(`the timeout of ${name} is typed, and does not say that anything was rolled back`, () =>
      Effect.gen(function* () {
        const late = withTransaction(Effect.never, { propagation, timeout: 20, name: "report" })
        expect(DbError.reason(yield* Effect.flip(around(late)))).toMatchObject({
          _tag: "TransactionTimeout",
          hint: expect.stringContaining("what it had done by then stays"),
          message: expect.stringContaining('"report"')
        })
      }))
  }

  test("a lock timeout is typed", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          const locked = withTransaction(sql`LOCK TABLE t`, { lockTimeout: 20, propagation: "requiresNew" })
          expect(yield* reason(locked)).toBe("LockTimeoutError")
        })
      )
    }))

  test("options that make no sense are refused before anything is borrowed", () =>
    Effect.gen(function* () {
      const wrong = { isolation: "chaos" } as never
      expect(yield* reason(withTransaction(insert(1), wrong))).toBe("InvalidInput")
      expect(yield* reason(DbSession.autocommit(insert(1), wrong))).toBe("InvalidInput")
      expect(yield* reason(Effect.scoped(DbTransaction.scoped(wrong)))).toBe("InvalidInput")
      expect((yield* DbEngine.stats).total).toBe(0)
    }))

  for (const [name, option] of Object.entries({
    propagation: "never",
    currentTransaction: "raise",
    retry: true,
    verifyOutcome: false
  })) {
    test(`${name}, which only a block around an effect has, is InvalidInput for a session and a block by hand`, () =>
      Effect.gen(function* () {
        const wrong = { [name]: option } as never
        const opened = [
          DbSession.autocommit(insert(1), wrong),
          DbSession.autocommit(DbSession.autocommit(insert(1), wrong)),
          DbSession.isolated(insert(1), wrong),
          DbSession.scoped(wrong),
          DbSession.make(wrong),
          DbTransaction.scoped(wrong),
          DbSession.autocommit(DbSession.begin(wrong))
        ]
        for (const one of opened) {
          expect(yield* reason(Effect.scoped(one as Effect.Effect<unknown, DbError, DbEngine>))).toBe("InvalidInput")
        }
        expect((yield* DbEngine.stats).total).toBe(0)
      }))
  }

  test("current tells depth, isolation, readOnly and name", () =>
    withTransaction(
      Effect.gen(function* () {
        const { depth, isolation, name, readOnly } = Option.getOrThrow(yield* DbTransaction.current)
        expect({ depth, isolation, name, readOnly }).toEqual({
          depth: 1,
          isolation: "repeatable read",
          name: "outer",
          readOnly: false
        })
        const inner = yield* withTransaction(Effect.map(DbTransaction.current, Option.getOrThrow), {
          name: "inner",
          readOnly: true
        })
        expect({ ...inner, status: inner.status, readOnly: inner.readOnly }).toMatchObject({
          depth: 2,
          isolation: "repeatable read",
          name: "inner",
          status: "closed",
          readOnly: true
        })
      }),
      { isolation: "repeatable read", name: "outer" }
    ))
})

describe("25 serialization", () => {
  /** Both read everything before either writes: one of them has to give way. */
  const conflicting = (options: WithTransactionOptions) =>
    Effect.gen(function* () {
      yield* database.query("INSERT INTO t (id) VALUES (0)")
      let attempts = 0
      const both = yield* barrier(2)
      const one = (id: number) =>
        withTransaction(
          Effect.gen(function* () {
            yield* seen
            attempts++
            yield* both
            yield* insert(id)
          }),
          { isolation: "serializable", ...options }
        )
      const exits = yield* Effect.all([Effect.exit(one(1)), Effect.exit(one(2))], { concurrency: 2 })
      return { exits: exits.map(outcome).sort(), attempts }
    })

  test("without retry one of two fails with a typed SerializationError", () =>
    Effect.gen(function* () {
      const { exits } = yield* conflicting({})
      expect(exits).toEqual(["SerializationError", "success"])
      expect((yield* rows).length).toBe(2)
    }))

  test("with retry both are committed, one of them at the second attempt", () =>
    Effect.gen(function* () {
      const { attempts, exits } = yield* conflicting({ retry: true })
      expect(exits).toEqual(["success", "success"])
      expect(attempts).toBe(3)
      expect(yield* rows).toEqual([0, 1, 2])
    }))

  test("retry takes a schedule, and gives up when it does", () =>
    Effect.gen(function* () {
      let attempts = 0
      const body = Effect.zipRight(
        Effect.sync(() => attempts++),
        conflict
      )
      expect(yield* reason(withTransaction(body, { retry: Schedule.recurs(2) }))).toBe("SerializationError")
      expect(attempts).toBe(3)
    }))

  proxied("a SerializationError that comes from COMMIT is typed, and retried", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* database.query(
        `CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN IF NEW.note = 'refuse' THEN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END IF; RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`
      )
      let attempts = 0
      const body = (id: number, times: number) =>
        Effect.suspend(() => sql`INSERT INTO t VALUES (${id}, ${attempts++ < times ? "refuse" : "fine"})`)
      expect(yield* reason(withTransaction(body(1, 1)))).toBe("SerializationError")
      attempts = 0
      yield* withTransaction(body(2, 2), { retry: true })
      expect(attempts).toBe(3)
      attempts = 0
      yield* DbSession.autocommit(Effect.zipRight(insert(3), atomic(body(4, 2), { retry: true })))
      expect(attempts).toBe(3)
      expect(yield* rows).toEqual([2, 3, 4])
    })
  )

  test("an inner block does not retry", () =>
    Effect.gen(function* () {
      let attempts = 0
      const { sql } = yield* DbSession
      const raise = Effect.suspend(() => {
        attempts++
        return sql`DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$`
      })
      yield* Effect.ignore(withTransaction(withTransaction(raise, { retry: true })))
      expect(attempts).toBe(1)
      yield* Effect.ignore(DbSession.autocommit(withTransaction(raise, { retry: true })))
      expect(attempts).toBe(2)
    }))

  proxied("a connection lost before COMMIT is retried, one lost in COMMIT is not", (proxy) =>
    Effect.gen(function* () {
      let attempts = 0
      const body = (id: number) =>
        Effect.zipRight(
          Effect.sync(() => attempts++),
          insert(id)
        )
      void proxy.cutAfter(({ text, type }) => type === "E" && text.startsWith("INSERT"), { forward: true })
      yield* withTransaction(body(1), { retry: true })
      expect(attempts).toBe(2)
      attempts = 0
      void proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
      expect(yield* reason(withTransaction(body(2), { retry: true }))).toBe("CommitUnknown")
      expect(attempts).toBe(1)
      // The server has COMMIT, and may not have come to it.
      yield* until(
        "it is committed",
        Effect.map(rows, (found) => found.length === 2)
      )
      expect(yield* rows).toEqual([1, 2])
    })
  )
})

describe("28 round trips", () => {
  const warm = Effect.zipRight(withTransaction(seen), withTransaction(seen))
  const costs = (
    name: string,
    trips: number,
    program: Effect.Effect<unknown, unknown, any>,
    options: Parameters<typeof proxied>[2] = {}
  ) =>
    proxied(
      `${name}: ${trips}`,
      (proxy) =>
        Effect.gen(function* () {
          yield* warm
          proxy.delay(5)
          proxy.reset()
          yield* program as Effect.Effect<unknown, unknown, DbEngine | DbSession>
          expect(proxy.flights()).toBe(trips)
        }),
      options
    )

  const inserts = Effect.all([insert(1), insert(2), insert(3)], { discard: true })
  costs("three statements in a session", 4, DbSession.autocommit(inserts))
  costs("three statements in a transaction", 4, withTransaction(inserts))
  costs(
    "three statements in a transaction with every option",
    4,
    withTransaction(inserts, {
      isolation: "serializable",
      readOnly: false,
      statementTimeout: 1000,
      lockTimeout: 1000,
      settings: { "app.tenant": "acme" }
    })
  )
  costs(
    "two nested blocks of one statement each",
    3,
    withTransaction(Effect.all([withTransaction(insert(1)), withTransaction(insert(2))]))
  )
  costs(
    "a nested block that fails, and a statement",
    4,
    withTransaction(Effect.zipRight(Effect.ignore(withTransaction(Effect.zipRight(insert(1), no))), insert(2)))
  )
  costs(
    "a nested block with settings of its own, and a statement",
    3,
    withTransaction(Effect.zipRight(withTransaction(insert(1), { settings: { "app.tenant": "x" } }), insert(2)))
  )
  costs("an implicit statement", 1, insert(1))
  costs("a session without statements", 0, DbSession.autocommit(withTransaction(Effect.void)))
  costs(
    "atomic in an open session: its statement, and two commits",
    4,
    DbSession.autocommit(Effect.zipRight(insert(1), atomic(insert(2))))
  )

  proxied("BEGIN, the settings and the first statement share one Sync", (proxy) =>
    Effect.gen(function* () {
      yield* warm
      proxy.reset()
      yield* withTransaction(insert(1), { isolation: "serializable", settings: { "app.tenant": "acme" } })
      const sent = proxy.log.filter(({ dir, type }) => dir === "frontend" && (type === "E" || type === "S"))
      expect(sent.map(({ text, type }) => (type === "S" ? "Sync" : text.replace(/ .*/, "")))).toEqual([
        "BEGIN",
        "SELECT",
        "INSERT",
        "Sync",
        "COMMIT",
        "Sync"
      ])
    })
  )
})

test("in Effect.fn, as a function of the effect or with options: the arguments of the function are no options", () =>
  Effect.gen(function* () {
    const name = Effect.map(DbTransaction.current, (_) => Option.getOrThrow(_).name)
    const job = Effect.fn("job")(
      function* (given: { readonly name: string; readonly timeout: number }) {
        return [given.name, yield* name] as const
      },
      (effect) => withTransaction(effect),
      Effect.zip(name),
      withTransaction({ name: "jobs" })
    )
    const [[argument, inner], outer] = yield* job({ name: "ada", timeout: 0 })
    expect([argument, inner === "ada", outer]).toEqual(["ada", false, "jobs"])
  }))
