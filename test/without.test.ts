/**
 * Blocks that run without a transaction, given as functions of the block, by effects and by promise code.
 */
import { describe, expect, it } from "@effect/vitest"
import { Effect, Option } from "effect"
import { DbError, DbSession, DbTransaction, type Transaction, withTransaction } from "effect-db"
import { testDatabase } from "./support/database.js"
import { committed, insert, no, outcome, programsOn, reason } from "./support/programs.js"
import { onRuntime, rejection } from "./support/promises.js"

const database = testDatabase()
const test = programsOn(database)
const rows = committed(database)

/** What is expected of the `tx` of a block that has no transaction. */
const hasNone = (tx: Transaction) =>
  Effect.gen(function* () {
    expect([tx.depth, tx.status, tx.readOnly, tx.isolation]).toEqual([0, "closed", false, undefined])
    for (const use of [tx.setRollbackOnly, tx.end("commit"), tx.end("rollback", 1)]) {
      const error = DbError.reason(yield* Effect.flip(use))
      expect(error?._tag).toBe("TransactionClosed")
      expect(error?.message).toMatch(/no transaction/)
    }
  })

describe("withTransaction((tx) => ...) in a mode that runs without", () => {
  for (const propagation of ["supports", "notSupported", "never"] as const) {
    test(`${propagation} outside runs, and its tx says that there is none`, () =>
      Effect.gen(function* () {
        const body = (tx: Transaction) => Effect.zipRight(insert(1), Effect.zipRight(hasNone(tx), no))
        expect(outcome(yield* Effect.exit(withTransaction(body, { propagation })))).toBe("no")
        expect(yield* rows).toEqual([1])
        // Called as often as it is run.
        const again = withTransaction(() => insert(2), { propagation })
        yield* again
        expect(yield* reason(again)).toBe("UniqueViolation")
      }))
  }

  test("notSupported inside suspends the transaction", () =>
    Effect.gen(function* () {
      yield* Effect.ignore(
        withTransaction(
          Effect.gen(function* () {
            yield* insert(1)
            const body = (tx: Transaction) =>
              Effect.gen(function* () {
                yield* hasNone(tx)
                expect(Option.isNone(yield* DbTransaction.current)).toBe(true)
                yield* insert(2)
              })
            yield* withTransaction(body, { propagation: "notSupported" })
            yield* no
          })
        )
      )
      expect(yield* rows).toEqual([2])
    }))

  test("supports inside joins, and its tx is that of the block", () =>
    Effect.gen(function* () {
      const inner = withTransaction((tx) => Effect.as(tx.setRollbackOnly, tx.depth), { propagation: "supports" })
      expect(yield* reason(withTransaction(Effect.zipRight(insert(1), inner)))).toBe("TransactionAborted")
      expect(yield* DbSession.autocommit(withTransaction(inner).pipe(Effect.flip, Effect.map(DbError.is)))).toBe(true)
      expect(yield* rows).toEqual([])
    }))

  test("mandatory outside, and never inside, are refused before the function is called", () =>
    Effect.gen(function* () {
      const body = () => Effect.die("it was called")
      expect(yield* reason(withTransaction(body, { propagation: "mandatory" }))).toBe("PropagationError")
      expect(yield* reason(withTransaction(withTransaction(body, { propagation: "never" })))).toBe("PropagationError")
    }))
})

describe("transaction(f) of a runtime", () => {
  const tagOf = (error: unknown): string => DbError.reason(error)?._tag ?? String(error)
  for (const propagation of ["supports", "notSupported", "never"] as const) {
    it(`${propagation} outside runs the promise code without`, () =>
      onRuntime(database, async (db) => {
        const mine = new Error("no")
        const failed = db.transaction(
          async (tx) => {
            await db.run(Effect.zipRight(insert(1), hasNone(tx)))
            throw mine
          },
          { propagation }
        )
        expect(await rejection(failed)).toBe(mine)
        expect(await Effect.runPromise(rows)).toEqual([1])
      }))
  }

  it("inside notSupported runs without, supports joins, never is refused", () =>
    onRuntime(database, async (db) => {
      const mine = new Error("no")
      const failed = db.session(async () => {
        await db.run(insert(1))
        await db.transaction(() => db.run(insert(2)), { propagation: "notSupported" })
        await db.transaction(() => db.run(insert(3)), { propagation: "supports" })
        expect(tagOf(await rejection(db.transaction(() => 1, { propagation: "never" })))).toBe("PropagationError")
        throw mine
      })
      expect(await rejection(failed)).toBe(mine)
      expect(await Effect.runPromise(rows)).toEqual([2])
    }))
})
