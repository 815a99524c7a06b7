/**
 * Interrupting a program at every step that its fiber takes, instead of at random moments: all or nothing is in the
 * table, and the only connection of the pool can be borrowed afterwards.
 */
import { describe } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, FiberId, type Scheduler, Stream } from "effect"
import { atomic, DbConnection, DbEngine, DbQuery, DbSession, DbTransaction, withTransaction } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { outside } from "./support/outside.js"
import { committed, insert, outcome, programsOn, proxiedOn, type Services, used } from "./support/programs.js"
import { latch, open } from "./support/until.js"
import { defaultScheduler } from "effect/Scheduler"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

/** Counts the steps of one fiber, and interrupts it at one of them. */
class Stepper implements Scheduler.Scheduler {
  steps = 0
  target: Fiber.RuntimeFiber<unknown, unknown> | undefined = undefined

  constructor(readonly at: number) {}

  scheduleTask(task: Scheduler.Task, priority: number, fiber?: Fiber.RuntimeFiber<unknown, unknown>): void {
    defaultScheduler.scheduleTask(task, priority, fiber)
  }

  shouldYield(fiber: Fiber.RuntimeFiber<unknown, unknown>): number | false {
    if (fiber !== this.target || this.steps >= this.at) return false
    if (++this.steps < this.at) return false
    fiber.unsafeInterruptAsFork(FiberId.none)
    // It looks at its messages when it yields.
    return 0
  }
}

type Program = Effect.Effect<unknown, unknown, Services>

/** Runs the program once, interrupted at the given step. */
const interruptedAt = (program: Program, at: number) =>
  Effect.gen(function* () {
    const stepper = new Stepper(at)
    const started = yield* Deferred.make<void>()
    const fiber = yield* Effect.fork(Effect.withScheduler(Effect.zipRight(Deferred.await(started), program), stepper))
    stepper.target = fiber
    yield* Deferred.succeed(started, undefined)
    return { exit: yield* Fiber.await(fiber), steps: stepper.steps }
  })

/** Each step in turn, until the program is over before it gets there. */
const sweep = (
  program: Program,
  whole: ReadonlyArray<number>,
  before: Effect.Effect<void, never, DbEngine> = Effect.void
) =>
  Effect.gen(function* () {
    const ask = yield* outside(database.url)
    const seenOutcomes = new Set<string>()
    for (let at = 1; ; at++) {
      yield* ask("DELETE FROM t")
      yield* before
      const { exit, steps } = yield* interruptedAt(program, at)
      const found = (yield* ask<{ id: number }>("SELECT id FROM t ORDER BY id")).map(({ id }) => id)
      const context = `interrupted at step ${at}: ${outcome(exit)}`
      expect([[], whole], context).toContainEqual(found)
      if (Exit.isSuccess(exit)) expect(found, context).toEqual(whole)
      seenOutcomes.add(`${outcome(exit)} ${found.length > 0}`)
      // The pool is whole: its only connection can be borrowed, and is in no transaction.
      const status = yield* Effect.scoped(
        Effect.flatMap(DbConnection.acquire({ timeout: "2 seconds" }), (_) => _.status)
      ).pipe(Effect.mapError((error) => new Error(`${context}: ${error.message}`)))
      expect([status, yield* used], context).toEqual(["idle", 0])
      if (steps < at) break
    }
    // It has been interrupted before anything had happened, and it has come to its end.
    expect(seenOutcomes).toContain("interrupted false")
    expect(seenOutcomes).toContain("success true")
  }).pipe(Effect.scoped)

const two = Effect.zipRight(insert(1), insert(2))

const copy = Effect.flatMap(DbSession, ({ sql }) =>
  DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("1\n", "2\n").pipe(Stream.rechunk(1)))
)

const programs: ReadonlyArray<readonly [string, Program, ReadonlyArray<number>]> = [
  ["an implicit statement", insert(1), [1]],
  ["copyFrom", copy, [1, 2]],
  ["copyFrom in a session", DbSession.autocommit(copy), [1, 2]],
  ["autocommit", DbSession.autocommit(two), [1, 2]],
  ["isolated", DbSession.isolated(two), [1, 2]],
  ["scoped", Effect.scoped(Effect.zipRight(DbSession.scoped(), two)), [1, 2]],
  ["make", Effect.scoped(Effect.flatMap(DbSession.make({ autocommit: true }), (_) => _.use(two))), [1, 2]],
  ["withTransaction", withTransaction(two), [1, 2]],
  ["withTransaction((tx) => ...)", withTransaction(() => two), [1, 2]],
  ["DbTransaction.scoped", Effect.scoped(Effect.zipRight(DbTransaction.scoped(), two)), [1, 2]],
  ["nested blocks", withTransaction(Effect.zipRight(withTransaction(insert(1)), withTransaction(insert(2)))), [1, 2]],
  ["atomic in a session", DbSession.autocommit(atomic(two)), [1, 2]],
  [
    "a session on a connection of its own",
    DbConnection.withConnection(DbSession.autocommit(two), { reuse: false }),
    [1, 2]
  ],
  ["an ambient connection", DbConnection.withConnection(DbSession.autocommit(two), { lazy: true }), [1, 2]],
  [
    "statements at once",
    DbSession.autocommit(
      Effect.flatMap(Effect.fork(insert(1)), (fiber) => Effect.zipRight(insert(2), Fiber.join(fiber)))
    ),
    [1, 2]
  ]
]

describe("interrupted at every step", () => {
  for (const [name, program, whole] of programs) {
    test(`${name}: all or nothing, and the pool is whole`, () => sweep(program, whole), { maxConnections: 1 })
  }

  test("a session that has to connect first", () => sweep(DbSession.autocommit(two), [1, 2], DbEngine.evictAll), {
    maxConnections: 1
  })

  for (const [name, block] of [
    ["withTransaction", withTransaction(insert(1))],
    ["DbTransaction.scoped", Effect.scoped(Effect.zipRight(DbTransaction.scoped(), insert(1)))],
    ["atomic", atomic(insert(1))]
  ] as const) {
    test(
      `a child's ${name}, in a session that goes on: its work is there or not, and the session is free`,
      () =>
        Effect.gen(function* () {
          for (let at = 1, over = false; !over; at++) {
            yield* database.query("TRUNCATE t")
            const exit = yield* DbSession.autocommit(
              Effect.gen(function* () {
                const { exit, steps } = yield* interruptedAt(block, at)
                over = steps < at
                yield* withTransaction(insert(2))
                return exit
              })
            ).pipe(Effect.mapError((error) => new Error(`interrupted at step ${at}: ${error.message}`)))
            const found = yield* rows
            expect([[2], [1, 2]], `interrupted at step ${at}`).toContainEqual(found)
            if (Exit.isSuccess(exit)) expect(found).toEqual([1, 2])
          }
        }),
      { maxConnections: 1, blockTimeout: 500 }
    )
  }

  test(
    "a child's autocommit that joins: its beforeCommit goes with its work, and is no one else's",
    () =>
      Effect.gen(function* () {
        const joining = DbSession.autocommit(insert(1), { beforeCommit: insert(2) })
        const ends = new Set<string>()
        for (let at = 1, over = false; !over; at++) {
          yield* database.query("TRUNCATE t")
          yield* Effect.gen(function* () {
            yield* insert(3)
            const { exit, steps } = yield* interruptedAt(joining, at)
            over = steps < at
            return yield* DbSession.afterCommit(Effect.sync(() => ends.add(outcome(exit))))
          }).pipe(DbSession.autocommit, Effect.exit)
          expect([[], [3], [1, 2, 3]], `interrupted at step ${at}`).toContainEqual(yield* rows)
        }
        expect(ends).toEqual(new Set(["interrupted", "success"]))
      }),
    { maxConnections: 1 }
  )

  test(
    "withTransaction((tx) => ...): its body does not begin when it is over",
    () =>
      Effect.gen(function* () {
        let over = false
        let late = 0
        const body = Effect.suspend(() => {
          if (over) late++
          return two
        })
        const ended = Effect.sync(() => {
          over = true
        })
        const begun = Effect.sync(() => {
          over = false
        })
        yield* sweep(
          Effect.zipRight(
            begun,
            Effect.ensuring(
              withTransaction(() => body),
              ended
            )
          ),
          [1, 2]
        )
        expect(late).toBe(0)
      }),
    { maxConnections: 1 }
  )

  test(
    "withTransaction((tx) => ...) where nothing interrupts: its body is not interrupted either",
    () =>
      Effect.gen(function* () {
        const inside = yield* latch
        const go = yield* latch
        const body = Effect.all([insert(1), open(inside), Deferred.await(go), insert(2)])
        const fiber = yield* Effect.fork(Effect.uninterruptible(withTransaction(() => body)))
        yield* Deferred.await(inside)
        const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
        yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
        yield* open(go)
        yield* Fiber.join(interrupting)
        expect(yield* rows).toEqual([1, 2])
      }),
    { maxConnections: 1 }
  )

  test(
    "sql.reserve",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        for (let at = 1, over = false; !over; at++) {
          const { steps } = yield* interruptedAt(Effect.scoped(sql.reserve), at)
          over = steps < at
          expect(yield* used, `interrupted at step ${at}`).toBe(0)
        }
      }),
    { maxConnections: 1 }
  )

  test(
    "negative control: a program that commits by halves is found",
    () =>
      Effect.gen(function* () {
        const halves = yield* Effect.exit(sweep(two, [1, 2]))
        expect(outcome(halves)).toContain("interrupted at step")
      }),
    { maxConnections: 1 }
  )
})

describe("interrupted while the server has it", () => {
  const stations = [
    ["BEGIN", ({ text, type }: { text: string; type: string }) => type === "E" && text.startsWith("BEGIN")],
    ["the first INSERT", ({ text, type }: { text: string; type: string }) => type === "E" && text.startsWith("INSERT")]
  ] as const
  for (const [station, matches] of stations) {
    for (const forward of [true, false]) {
      proxied(
        `${station} is ${forward ? "under way" : "held back"}: nothing is in the table`,
        (proxy) =>
          Effect.gen(function* () {
            yield* DbEngine.ping
            const held = proxy.holdAt(matches, { forward })
            const cancel = proxy.seen(({ type }) => type === "cancel")
            const fiber = yield* Effect.fork(DbSession.autocommit(two))
            yield* Effect.promise(() => held)
            const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
            yield* Effect.promise(() => cancel)
            proxy.resume()
            expect(outcome(yield* Fiber.join(interrupting))).toBe("interrupted")
            expect(yield* rows).toEqual([])
            yield* DbSession.autocommit(insert(3))
            expect(yield* rows).toEqual([3])
          }),
        { maxConnections: 1 }
      )
    }
  }

  for (const forward of [true, false]) {
    proxied(
      `COMMIT is ${forward ? "under way" : "held back"}: it is waited for, and everything is in the table`,
      (proxy) =>
        Effect.gen(function* () {
          const held = proxy.holdAt(({ text }) => text === "COMMIT", { forward })
          const fiber = yield* Effect.fork(DbSession.autocommit(two))
          yield* Effect.promise(() => held)
          const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
          yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          expect(interrupting.unsafePoll()).toBe(null)
          proxy.resume()
          yield* Fiber.join(interrupting)
          expect(yield* rows).toEqual([1, 2])
          expect(proxy.cancels).toEqual([])
        }),
      { maxConnections: 1 }
    )
  }

  proxied(
    "ROLLBACK is under way: it is waited for",
    (proxy) =>
      Effect.gen(function* () {
        const held = proxy.holdAt(({ text }) => text === "ROLLBACK", { forward: true })
        const fiber = yield* Effect.fork(DbSession.autocommit(Effect.zipRight(two, Effect.fail("no"))))
        yield* Effect.promise(() => held)
        const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
        yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
        expect(interrupting.unsafePoll()).toBe(null)
        proxy.resume()
        yield* Fiber.join(interrupting)
        expect(yield* rows).toEqual([])
      }),
    { maxConnections: 1 }
  )
})
