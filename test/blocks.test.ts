/**
 * Blocks that meet: those of several fibers of one session, manual ones, and blocks that are ended early or left behind.
 */
import { describe, expect } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { atomic, type DbEngine, DbError, DbSession, DbTransaction, withTransaction } from "effect-db"
import { testDatabase } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { latch, open, soon, took, until } from "./support/until.js"
import {
  blockAside,
  committed,
  insert,
  no,
  outcome,
  programsOn,
  reason,
  refused,
  sleep,
  sleepingOn,
  whileFull
} from "./support/programs.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

const session = DbSession.autocommit

test("the block around one that is over is told which of its statements has failed since", () =>
  Effect.gen(function* () {
    const lock = yield* lockedOutside(database, 20)
    const error = yield* Effect.flip(
      withTransaction(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const failing = sql`DO $$ BEGIN PERFORM pg_advisory_xact_lock(20); RAISE unique_violation; END $$`
          const daemon = yield* withTransaction(Effect.zipLeft(Effect.forkDaemon(Effect.exit(failing)), lock.waitedFor))
          yield* lock.release
          yield* Fiber.join(daemon)
        })
      )
    )
    const told = DbError.reason(error)
    expect(told).toMatchObject({ _tag: "TransactionAborted", statement: "DO '...'" })
    expect(told?._tag === "TransactionAborted" && told.firstError?.reason._tag).toBe("UniqueViolation")
  }))

test("a block that can't be rolled back, as its savepoint is gone, spoils the one around it, which is told why", () =>
  Effect.gen(function* () {
    const error = yield* Effect.flip(
      withTransaction(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* sql`SAVEPOINT mine`
          yield* Effect.flip(withTransaction(Effect.all([insert(1), sql`ROLLBACK TO SAVEPOINT mine`, no])))
          expect(yield* DbSession.state).toBe("failed")
        })
      )
    )
    const told = DbError.reason(error)
    expect(told?._tag === "TransactionAborted" && told.firstError?.reason.sqlState).toBe("3B001")
    expect(yield* rows).toEqual([])
  }))

test("what has joined a block that is over, and fails, is not kept by the one around it", () =>
  Effect.gen(function* () {
    const [inserted, go] = yield* Effect.all([latch, latch])
    const joined = withTransaction(Effect.all([insert(1), open(inserted), Deferred.await(go), no], { discard: true }), {
      propagation: "required"
    })
    const work = Effect.gen(function* () {
      const daemon = yield* withTransaction(
        Effect.zipLeft(Effect.forkDaemon(Effect.exit(joined)), Deferred.await(inserted))
      )
      yield* open(go)
      yield* Fiber.join(daemon)
    })
    expect(yield* reason(withTransaction(work))).toBe("TransactionAborted")
    expect(yield* rows).toEqual([])
  }))

test("a block in a read-only one by hand can't have readOnly: false", () =>
  session(
    Effect.gen(function* () {
      yield* insert(1)
      const tx = yield* DbSession.savepoint({ readOnly: true })
      expect(yield* reason(withTransaction(insert(2), { readOnly: false }))).toBe("PropagationError")
      yield* tx.rollback
    })
  ))

test("a statement of a session has its turn when the block in one by hand is over", () =>
  Effect.gen(function* () {
    yield* session(
      Effect.gen(function* () {
        const tx = yield* DbSession.savepoint()
        const aside = yield* blockAside((body) => withTransaction(body))
        const waiting = yield* Effect.fork(insert(1))
        yield* Effect.yieldNow()
        yield* aside.end
        yield* Fiber.join(waiting)
        yield* tx.commit
      })
    )
    expect(yield* rows).toEqual([1])
  }))

describe("an inner block that fails while a daemon of it runs a statement", () => {
  type Fails = (body: Effect.Effect<void, never, DbSession>) => Effect.Effect<unknown, unknown, DbEngine | DbSession>
  const blocks: ReadonlyArray<readonly [name: string, fails: Fails]> = [
    ["around an effect", (body) => Effect.flip(withTransaction(Effect.zipRight(body, no)))],
    ["by hand", (body) => Effect.flatMap(DbSession.savepoint(), (tx) => Effect.zipRight(body, tx.rollback))],
    [
      "with a block in it",
      (body) => Effect.flip(withTransaction(Effect.zipRight(insert(2), withTransaction(Effect.zipRight(body, no)))))
    ]
  ]
  for (const [name, fails] of blocks) {
    test(`${name}: cancels it, and the work around it is kept`, () =>
      Effect.gen(function* () {
        const daemon = yield* session(
          Effect.gen(function* () {
            yield* insert(1)
            let daemon: Fiber.Fiber<Exit.Exit<unknown, unknown>> | undefined = undefined
            const body = Effect.gen(function* () {
              daemon = yield* Effect.forkDaemon(Effect.exit(sleep))
              yield* sleepingOn(database)
            })
            expect(yield* took(fails(body))).toBeLessThan(soon)
            yield* insert(3)
            return daemon!
          })
        )
        expect(outcome(yield* Fiber.join(daemon))).toBe("QueryCanceled")
        expect(yield* rows).toEqual([1, 3])
      }))
  }
})

describe("a session's statement that still waits for its connection", () => {
  test("is not taken along by a sibling's atomic that fails", () =>
    Effect.gen(function* () {
      yield* session(Effect.all([insert(1), Effect.ignore(atomic(Effect.zipRight(insert(2), no)))], { concurrency: 2 }))
      expect(yield* rows).toEqual([1])
    }))

  test("is not committed by a sibling's atomic: it is the earlier work, which the mode decides about", () =>
    Effect.gen(function* () {
      const work = atomic(insert(2), { currentTransaction: "raise" })
      const [, raised] = yield* session(Effect.all([insert(1), Effect.exit(work)], { concurrency: 2 }))
      expect(outcome(raised)).toBe("PropagationError")
      expect(yield* rows).toEqual([1])
    }))

  test("is in the transaction that a sibling's commit ends", () =>
    Effect.gen(function* () {
      yield* Effect.ignore(session(Effect.zipRight(Effect.all([insert(1), DbSession.commit], { concurrency: 2 }), no)))
      expect(yield* rows).toEqual([1])
    }))

  test("never happens when a sibling rolls back", () =>
    Effect.gen(function* () {
      const [first] = yield* session(Effect.all([Effect.exit(insert(1)), DbSession.rollback], { concurrency: 2 }))
      expect(outcome(first)).toBe("QueryCanceled")
      expect(yield* rows).toEqual([])
    }))
})

test("a statement that waits for its connection is not taken along by a block by hand that a sibling begins", () =>
  Effect.gen(function* () {
    yield* session(
      Effect.gen(function* () {
        const done = yield* latch
        const first = Effect.zipRight(insert(1), open(done))
        const block = Effect.flatMap(DbSession.begin(), (tx) => Effect.zipRight(Deferred.await(done), tx.rollback))
        yield* Effect.all([first, block], { concurrency: 2 })
      })
    )
    expect(yield* rows).toEqual([1])
  }))

test("a session by hand that is too late stays so, and so do those that come after it", () =>
  Effect.scoped(
    Effect.gen(function* () {
      const late = yield* DbSession.make({ timeout: 50 })
      yield* Effect.exit(late.use(insert(1)))
      yield* until(
        "it is too late",
        Effect.map(late.state, (_) => _ === "failed")
      )
      yield* late.rollback
      expect(yield* reason(late.use(insert(2)))).toBe("TransactionTimeout")
      yield* late.use(DbSession.close)
      expect(yield* rows).toEqual([])
    })
  ))

test(
  "atomic prepares its proof though a statement of a sibling was withdrawn before it had a connection",
  () =>
    Effect.gen(function* () {
      yield* database.query("DROP TABLE IF EXISTS effect_db_outcome")
      yield* session(
        Effect.gen(function* () {
          const first = yield* Effect.fork(insert(1))
          const work = yield* Effect.fork(atomic(insert(2), { verifyOutcome: true }))
          const other = yield* Effect.fork(insert(3))
          yield* Effect.yieldNow()
          yield* Fiber.interrupt(first)
          yield* Fiber.join(work)
          yield* Fiber.join(other)
        })
      )
      expect(yield* rows).toEqual([2, 3])
    }),
  { maxConnections: 1 }
)

describe("begin, when it has its turn", () => {
  test("is a savepoint in a transaction that a sibling has opened meanwhile", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const inside = yield* latch
          const go = yield* latch
          const block = yield* Effect.fork(withTransaction(Effect.all([open(inside), Deferred.await(go), insert(1)])))
          yield* Deferred.await(inside)
          const begun = yield* Effect.fork(DbSession.begin())
          yield* Effect.yieldNow()
          yield* open(go)
          yield* Fiber.join(block)
          const tx = yield* Fiber.join(begun)
          yield* insert(2)
          yield* tx.rollback
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("is the transaction when a sibling's atomic has ended meanwhile", () =>
    Effect.gen(function* () {
      yield* Effect.ignore(
        session(
          Effect.gen(function* () {
            const inside = yield* latch
            const go = yield* latch
            const block = yield* Effect.fork(atomic(Effect.all([insert(1), open(inside), Deferred.await(go)])))
            yield* Deferred.await(inside)
            const begun = yield* Effect.fork(DbSession.begin())
            yield* Effect.yieldNow()
            yield* open(go)
            yield* Fiber.join(block)
            const tx = yield* Fiber.join(begun)
            yield* insert(2)
            yield* tx.commit
            yield* no
          })
        )
      )
      expect(yield* rows).toEqual([1, 2])
    }))
})

describe("a block of its own that runs no statement", () => {
  for (const [name, block] of [
    ["atomic", atomic(Effect.void, { readOnly: true })],
    ["begin", Effect.flatMap(DbSession.begin({ readOnly: true }), (tx) => tx.commit)],
    ["begin, rolled back", Effect.flatMap(DbSession.begin({ readOnly: true }), (tx) => tx.rollback)]
  ] as const) {
    test(`${name}: leaves no option of its own behind`, () =>
      Effect.gen(function* () {
        yield* session(Effect.zipRight(block as Effect.Effect<void, any, any>, insert(1)))
        expect(yield* rows).toEqual([1])
      }))
  }

  test("runs no hook of the session, which has not committed", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      const sent = DbSession.afterCommit(Effect.sync(() => log.push("sent")))
      yield* Effect.ignore(session(Effect.all([sent, atomic(Effect.void), insert(1), no])))
      expect(log).toEqual([])
    }))

  test("drops no hook of the session when it fails", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      const sent = DbSession.afterCommit(Effect.sync(() => log.push("sent")))
      yield* session(Effect.all([sent, Effect.ignore(atomic(no)), insert(1)]))
      expect(log).toEqual(["sent"])
    }))

  test("an atomic that is tried again keeps the hooks that the session had before", () =>
    Effect.gen(function* () {
      const log: Array<string> = []
      let tries = 0
      const conflict = Effect.flatMap(DbSession, ({ sql }) =>
        sql.unsafe("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
      )
      const work = atomic(
        Effect.suspend(() => (++tries === 1 ? conflict : insert(1))),
        { retry: true }
      )
      yield* session(Effect.all([DbSession.afterCommit(Effect.sync(() => log.push("sent"))), work]))
      expect([tries, log]).toEqual([2, ["sent"]])
    }))
})

describe("a block that another fiber still runs when the block around it ends", () => {
  for (const [name, around] of [
    ["a savepoint", (body: Effect.Effect<any, any, any>) => session(Effect.zipRight(insert(9), withTransaction(body)))],
    ["an atomic", (body: Effect.Effect<any, any, any>) => session(atomic(body))],
    [
      "a savepoint that fails",
      (body: Effect.Effect<any, any, any>) =>
        session(Effect.zipRight(insert(9), Effect.catchAll(withTransaction(Effect.flip(body)), Effect.succeed)))
    ]
  ] as const) {
    test(`${name}: it is undone, and its success fails`, () =>
      Effect.gen(function* () {
        const end = yield* around(Effect.map(blockAside(withTransaction, insert(1)), (_) => _.end)) as Effect.Effect<
          Effect.Effect<Exit.Exit<void, unknown>>
        >
        expect(["TransactionClosed", "SessionClosed"]).toContain(outcome(yield* end))
        expect(yield* rows).not.toContain(1)
      }))
  }

  test("in a session that goes on, that is TransactionClosed, and harms nothing", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const aside = yield* withTransaction(blockAside(withTransaction, insert(1)))
          expect(outcome(yield* aside.end)).toBe("TransactionClosed")
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))

  test("after the outer one was rolled back too", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const aside = yield* Effect.flip(withTransaction(Effect.flip(blockAside(withTransaction, insert(1)))))
          expect(outcome(yield* (aside as { end: Effect.Effect<Exit.Exit<void, unknown>> }).end)).toBe(
            "TransactionClosed"
          )
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))
})

describe("a session that ends while a fiber's atomic is open in it", () => {
  test("fails when its own work is in that transaction: nothing is lost without an error", () =>
    Effect.gen(function* () {
      const work = Effect.gen(function* () {
        yield* insert(1)
        return yield* blockAside((body) => atomic(body, { currentTransaction: "append" }), insert(2))
      })
      expect(yield* reason(session(work))).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))

  test("commits its own work when the atomic has not begun", () =>
    Effect.gen(function* () {
      const inside = yield* latch
      const go = yield* latch
      const fiber = yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          // The atomic commits what is open, and that waits for the hook.
          yield* DbSession.beforeCommit(Effect.zipRight(open(inside), Deferred.await(go)))
          const fiber = yield* Effect.forkDaemon(atomic(insert(2)))
          yield* Deferred.await(inside)
          yield* Effect.forkDaemon(Effect.zipRight(Effect.yieldNow(), open(go)))
          return fiber
        })
      )
      const exit = yield* Fiber.await(fiber)
      const kept = yield* rows
      expect(kept).toEqual(Exit.isSuccess(exit) ? [1, 2] : [1])
    }))

  test("has nothing of its own in it: succeeds, and the atomic does not", () =>
    Effect.gen(function* () {
      const aside = yield* session(
        Effect.zipRight(
          Effect.zipRight(insert(1), DbSession.commit),
          blockAside((body) => atomic(body), insert(2))
        )
      )
      expect(outcome(yield* aside.end)).toMatch(/^(SessionClosed|TransactionClosed)$/)
      expect(yield* rows).toEqual([1])
    }))
})

describe("atomic in a block that was opened by hand", () => {
  test("is a savepoint in it", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const tx = yield* DbSession.begin()
          yield* insert(1)
          yield* atomic(insert(2))
          yield* tx.rollback
        })
      )
      expect(yield* rows).toEqual([])
    }))

  test("raises when it may not be in one", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const tx = yield* DbSession.begin()
          expect(yield* reason(atomic(insert(2), { currentTransaction: "raise" }))).toBe("PropagationError")
          yield* insert(1)
          yield* tx.commit
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("and in one that a sibling opens while it waits", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const aside = yield* blockAside(withTransaction, insert(1))
          const begun = yield* Effect.fork(DbSession.begin())
          yield* Effect.yieldNow()
          const work = yield* Effect.fork(atomic(insert(2)))
          yield* Effect.yieldNow()
          yield* aside.end
          const tx = yield* Fiber.join(begun)
          yield* Fiber.join(work)
          yield* tx.rollback
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe("options of a block that the open transaction can't honour", () => {
  const forms = [
    ["DbTransaction.scoped", Effect.scoped(DbTransaction.scoped({ isolation: "serializable" }))],
    ["begin", DbSession.begin({ isolation: "serializable" })],
    ["savepoint", DbSession.savepoint({ isolation: "serializable" })]
  ] as const
  for (const [name, form] of forms) {
    test(`${name}: PropagationError, and the session goes on`, () =>
      Effect.gen(function* () {
        yield* session(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(form as Effect.Effect<unknown, unknown, any>)).toBe("PropagationError")
            yield* insert(2)
          })
        )
        expect(yield* rows).toEqual([1, 2])
      }))
  }

  test("begin with an option that is undefined hides none of the session", () =>
    Effect.gen(function* () {
      const work = Effect.zipRight(DbSession.begin({ readOnly: undefined }), insert(1))
      expect(yield* reason(session(work, { readOnly: true }))).toBe("ReadOnlyError")
    }))

  test("a block inside an atomic that has not begun is held to what that one will be", () =>
    Effect.gen(function* () {
      const work = atomic(withTransaction(insert(1), { isolation: "serializable" }), { isolation: "repeatable read" })
      expect(yield* reason(session(work))).toBe("PropagationError")
    }))
})

describe("tx.end", () => {
  test("in a hook before the commit is TransactionClosed: the body is over", () =>
    Effect.gen(function* () {
      const work = withTransaction((tx) => Effect.zipRight(DbSession.beforeCommit(tx.end("rollback")), insert(1)))
      expect(yield* reason(work)).toBe("TransactionClosed")
      expect(yield* rows).toEqual([])
    }))

  test("of a block that had joined and has ended is TransactionClosed, and ends nobody", () =>
    Effect.gen(function* () {
      let kept: Effect.Effect<never, unknown> = Effect.never
      const guest = withTransaction(
        (tx) => {
          kept = tx.end("commit")
          return insert(1)
        },
        { propagation: "required" }
      )
      const work = Effect.zipRight(guest, Effect.zipRight(Effect.flip(kept), Effect.never))
      expect(yield* reason(withTransaction(work, { timeout: 200 }))).toBe("TransactionTimeout")
      expect(yield* rows).toEqual([])
    }))

  test("works once: what a finalizer asks for after that is TransactionClosed, and changes nothing", () =>
    Effect.gen(function* () {
      const again: Array<string> = []
      const kept = yield* withTransaction((tx) =>
        Effect.ensuring(
          Effect.zipRight(insert(1), tx.end("commit", "x")),
          Effect.map(Effect.orDie(reason(tx.end("rollback"))), (tag) => again.push(tag))
        )
      )
      expect([kept, again]).toEqual(["x", ["TransactionClosed"]])
      expect(yield* rows).toEqual([1])
    }))

  test("in a block that its session has taken back is TransactionClosed", () =>
    Effect.gen(function* () {
      const inside = yield* latch
      const over = yield* latch
      const fiber = yield* session(
        Effect.zipLeft(
          Effect.forkDaemon(
            withTransaction((tx) =>
              Effect.zipRight(Effect.all([insert(1), open(inside), Deferred.await(over)]), tx.end("rollback"))
            )
          ),
          Deferred.await(inside)
        )
      )
      yield* open(over)
      expect(yield* reason(Fiber.join(fiber))).toBe("TransactionClosed")
      expect(yield* rows).toEqual([])
    }))

  test('"commit" of an atomic in a session runs what has to run before', () =>
    Effect.gen(function* () {
      yield* session(atomic((tx) => Effect.all([DbSession.beforeCommit(insert(2)), insert(1), tx.end("commit")])))
      expect(yield* rows).toEqual([1, 2])
    }))

  test('"commit", and a block in a finalizer that fails by itself: that one is not kept', () =>
    Effect.gen(function* () {
      yield* withTransaction((tx) =>
        Effect.ensuring(
          Effect.zipRight(insert(1), tx.end("commit")),
          Effect.ignore(withTransaction(Effect.zipRight(insert(9), no)))
        )
      )
      expect(yield* rows).toEqual([1])
    }))

  test('"commit", and a block that a sibling has not finished: that one is not kept', () =>
    Effect.gen(function* () {
      yield* withTransaction((tx) =>
        Effect.gen(function* () {
          yield* insert(1)
          const inside = yield* latch
          const sibling = withTransaction(Effect.all([insert(9), open(inside), Effect.never]))
          yield* Effect.all([sibling, Effect.zipRight(Deferred.await(inside), tx.end("commit"))], { concurrency: 2 })
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test('"commit" through a block that can\'t be kept fails, and keeps nothing', () =>
    Effect.gen(function* () {
      const work = withTransaction((tx) =>
        Effect.zipRight(
          insert(1),
          withTransaction(Effect.all([insert(2), Effect.ignore(refused), tx.end("commit", "x")]))
        )
      )
      expect(yield* reason(work)).toBe("TransactionAborted")
      expect(yield* rows).toEqual([])
    }))

  test('"commit", and a finalizer that dies: the defect is kept, and nothing else', () =>
    Effect.gen(function* () {
      const exit = yield* Effect.exit(
        withTransaction((tx) => Effect.zipRight(insert(1), Effect.ensuring(tx.end("commit"), Effect.die("boom"))))
      )
      expect(Exit.isFailure(exit) ? [...Cause.defects(exit.cause)] : []).toEqual(["boom"])
      expect(yield* rows).toEqual([])
    }))

  test('"commit" through the blocks of its own fiber keeps them', () =>
    Effect.gen(function* () {
      const kept = yield* withTransaction((tx) =>
        Effect.zipRight(
          insert(1),
          withTransaction(
            Effect.zipRight(insert(2), withTransaction(Effect.zipRight(insert(3), tx.end("commit", "x"))))
          )
        )
      )
      expect(kept).toBe("x")
      expect(yield* rows).toEqual([1, 2, 3])
    }))
})

describe("settings of an inner block", () => {
  test("end with it, also when its only statement is another fiber's and still unanswered", () =>
    Effect.gen(function* () {
      const setting = Effect.flatMap(DbSession, ({ sql }) =>
        Effect.map(sql<{ x: string }>`SELECT current_setting('app.x', true) AS x`, ([row]) => row!.x ?? "")
      )
      const slow = Effect.flatMap(DbSession, ({ sql }) => sql`SELECT pg_sleep(0.2)`)
      const sent = Effect.promise(() => new Promise<void>((resolve) => setImmediate(resolve)))
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          yield* withTransaction(Effect.zipRight(Effect.forkDaemon(slow), sent), { settings: { "app.x": "inner" } })
          expect(yield* setting).toBe("")
        })
      )
      expect(yield* rows).toEqual([1])
    }))
})

describe("a stream that outlives the block that it was opened in", () => {
  const series = Effect.map(DbSession, ({ sql }) => sql<{ i: number }>`SELECT generate_series(1, 10000) AS i`.stream)
  const opened = (scope: Scope.Scope) =>
    Effect.flatMap(Scope.extend(Effect.flatMap(series, Stream.toPull), scope), (pull) => Effect.as(pull, pull))

  test("and was rolled back is closed without harm to the session", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          const scope = yield* Scope.make()
          // The statement behind it has been answered: so have the rows that were asked for in advance.
          yield* Effect.ignore(withTransaction(Effect.all([opened(scope), insert(9), no])))
          yield* Scope.close(scope, Exit.void)
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([1, 2])
    }))

  test("and was rolled back has no more rows to give: TransactionClosed", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          const scope = yield* Scope.make()
          const left = Effect.zipLeft(opened(scope), insert(9))
          const pull = yield* Effect.flip(withTransaction(Effect.flip(left)))
          const error = yield* Effect.flip(Effect.forever(pull as Effect.Effect<unknown, Option.Option<unknown>>))
          expect(Option.map(error, (_) => DbError.reason(_)?._tag)).toEqual(Option.some("TransactionClosed"))
          yield* insert(2)
        })
      )
      expect(yield* rows).toEqual([2])
    }))
})

describe("the time limit of a block that has no effect to interrupt", () => {
  type Body = Effect.Effect<unknown, unknown, any>
  type Limit = { readonly timeout: number }
  const late: Limit = { timeout: 50 }
  const manual = (open: typeof DbSession.begin) => (body: Body, limit: Limit) =>
    session(Effect.flatMap(open(limit), (tx) => Effect.zipRight(body, tx.commit)))
  const scoped = (body: Body, limit: Limit) => Effect.scoped(Effect.zipRight(DbTransaction.scoped(limit), body))
  const forms: ReadonlyArray<readonly [string, (body: Body, limit: Limit) => Body]> = [
    ["begin", manual(DbSession.begin)],
    ["savepoint", manual(DbSession.savepoint)],
    ["scoped", scoped],
    ["scoped in a session", (body, limit) => session(scoped(body, limit))]
  ]
  const over = Effect.sleep(100)
  for (const [name, around] of forms) {
    test(`${name}: a statement that runs is cancelled, and fails with TransactionTimeout`, () =>
      Effect.gen(function* () {
        let told = ""
        const body = Effect.onExit(Effect.zipRight(insert(1), sleep), (exit) =>
          Effect.sync(() => void (told = outcome(exit)))
        )
        expect(outcome(yield* Effect.exit(around(body, late) as Effect.Effect<unknown>))).toBe("TransactionTimeout")
        expect(told).toBe("TransactionTimeout")
        expect(yield* rows).toEqual([])
      }))

    test(
      `${name}: so does one that waits for its connection`,
      () =>
        Effect.gen(function* () {
          const waiting = around(insert(1), late) as Effect.Effect<unknown>
          expect(outcome(yield* whileFull(Effect.exit(waiting)))).toBe("TransactionTimeout")
          expect(yield* rows).toEqual([])
        }),
      { maxConnections: 1 }
    )

    test(`${name}: the next statement fails with it`, () =>
      Effect.gen(function* () {
        const body = Effect.zipRight(insert(1), Effect.zipRight(over, insert(2)))
        expect(outcome(yield* Effect.exit(around(body, late) as Effect.Effect<unknown>))).toBe("TransactionTimeout")
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: so does its success`, () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(around(Effect.zipRight(insert(1), over), late) as Effect.Effect<unknown>)
        expect(outcome(exit)).toMatch(/TransactionTimeout$/)
        expect(yield* rows).toEqual([])
      }))

    test(`${name}: in time is nothing`, () =>
      Effect.gen(function* () {
        yield* around(insert(1), { timeout: 20_000 }) as Effect.Effect<unknown>
        expect(yield* rows).toEqual([1])
      }))
  }

  test("is over with the block: what another fiber has on its way there goes on", () =>
    Effect.gen(function* () {
      const lock = yield* lockedOutside(database, 21)
      yield* session(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const tx = yield* DbSession.savepoint({ timeout: 1500 })
          const waiting = yield* Effect.fork(sql`SELECT pg_advisory_xact_lock(21)`)
          yield* lock.waitedFor
          yield* tx.commit
          // Longer than the block had.
          yield* Effect.sleep(1600)
          yield* lock.release
          yield* Fiber.join(waiting)
          yield* insert(1)
        })
      )
      expect(yield* rows).toEqual([1])
    }))

  test("a session goes on after a savepoint that was too late", () =>
    Effect.gen(function* () {
      yield* session(
        Effect.gen(function* () {
          yield* insert(1)
          const tx = yield* DbSession.savepoint(late)
          expect(yield* reason(Effect.zipRight(insert(2), sleep))).toBe("TransactionTimeout")
          yield* tx.rollback
          yield* insert(3)
        })
      )
      expect(yield* rows).toEqual([1, 3])
    }))
})
