/** List-append transactions on a few keys, as the food of `history.ts`. */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type { SqlError } from "@effect/sql/SqlError"
import { DbEngine, DbSession, withTransaction } from "effect-db"
import type { IsolationLevel } from "effect-db"
import { analyse } from "./history.js"
import type { Analysis, Op, Transaction } from "./history.js"
import type { Random } from "./random.js"

const setUp = (keys: number): Effect.Effect<void, SqlError, DbEngine> =>
  Effect.flatMap(DbEngine, ({ sql }) =>
    Effect.gen(function* () {
      yield* sql.unsafe("DROP TABLE IF EXISTS lists")
      yield* sql.unsafe("CREATE TABLE lists (key int PRIMARY KEY, items int[] NOT NULL DEFAULT '{}')")
      yield* sql`INSERT INTO lists SELECT n FROM generate_series(1, ${keys}::int) n`
    })
  )

const finalLists: Effect.Effect<ReadonlyMap<number, ReadonlyArray<number>>, SqlError, DbEngine> = Effect.flatMap(
  DbEngine,
  ({ sql }) =>
    Effect.map(
      sql<{ key: number; items: Array<number> }>`SELECT key, items FROM lists`,
      (rows) => new Map(rows.map((row) => [row.key, row.items]))
    )
)

const read = (key: number, ops: Array<Op>): Effect.Effect<void, SqlError, DbSession> =>
  Effect.flatMap(DbSession, ({ sql }) =>
    Effect.map(sql<{ items: Array<number> }>`SELECT items FROM lists WHERE key = ${key}`, ([row]) => {
      ops.push({ key, read: row!.items })
    })
  )

const append = (key: number, value: number, ops: Array<Op>): Effect.Effect<void, SqlError, DbSession> =>
  Effect.flatMap(DbSession, ({ sql }) =>
    Effect.map(sql`UPDATE lists SET items = items || ${value}::int WHERE key = ${key}`, () => {
      ops.push({ key, value })
    })
  )

export interface Lists {
  readonly isolation: IsolationLevel
  readonly transactions: number
  readonly fibers?: number | undefined
  readonly keys?: number | undefined
}

/** Random transactions of a few reads and appends each, and what follows from what they saw. */
export const lists = (
  random: Random,
  { fibers = 8, isolation, keys = 4, transactions }: Lists
): Effect.Effect<Analysis, SqlError, DbSession | DbEngine> =>
  Effect.gen(function* () {
    yield* setUp(keys)
    const committed: Array<Transaction> = []
    const failed = new Set<number>()
    let values = 0
    const one = (id: number): Effect.Effect<void, never, DbSession | DbEngine> => {
      const plan = Array.from({ length: random.between(2, 4) }, () => ({
        key: random.between(1, keys),
        value: random.chance(0.5) ? undefined : ++values
      }))
      const body = Effect.gen(function* () {
        const ops: Array<Op> = []
        for (const { key, value } of plan) {
          yield* value === undefined ? read(key, ops) : append(key, value, ops)
          // Others come in between.
          yield* Effect.yieldNow()
        }
        return ops
      })
      return Effect.map(Effect.exit(withTransaction(body, { isolation, retry: true })), (exit) => {
        if (Exit.isSuccess(exit)) committed.push({ id, ops: exit.value })
        else for (const { value } of plan) if (value !== undefined) failed.add(value)
      })
    }
    yield* Effect.forEach(
      Array.from({ length: transactions }, (_, id) => id),
      one,
      {
        concurrency: fibers,
        discard: true
      }
    )
    return analyse(committed, yield* finalLists, failed)
  })

/** Two transactions, each of which reads what the other then appends to: both have read before either writes. */
export const writeSkew = (isolation: IsolationLevel): Effect.Effect<Analysis, SqlError, DbSession | DbEngine> =>
  Effect.gen(function* () {
    yield* setUp(2)
    const reads = [yield* Deferred.make<void>(), yield* Deferred.make<void>()] as const
    const committed: Array<Transaction> = []
    const one = (id: 0 | 1): Effect.Effect<void, SqlError, DbSession | DbEngine> =>
      withTransaction(
        Effect.gen(function* () {
          const ops: Array<Op> = []
          yield* read(id + 1, ops)
          yield* Deferred.succeed(reads[id], undefined)
          yield* Deferred.await(reads[id === 0 ? 1 : 0])
          yield* append(2 - id, id + 1, ops)
          return ops
        }),
        { isolation, retry: true }
      ).pipe(Effect.map((ops) => void committed.push({ id, ops })))
    yield* Effect.all([one(0), one(1)], { concurrency: 2, discard: true })
    return analyse(committed, yield* finalLists)
  })
