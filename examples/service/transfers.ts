/** The repository of transfers, deposits included: a deposit comes from no account. */
import { DbError, DbQuery, DbSession } from "effect-db"
import { Effect } from "effect"
import * as Accounts from "./accounts.js"
import { KeyReused, Overdrawn } from "./errors.js"
import type * as Schemas from "./schema.js"

export interface Posted {
  readonly id: string
  readonly from: number | null
  readonly to: number
  readonly amount: string
  readonly note: string | null
  readonly at: Date
}

const columns = `id, from_account AS "from", to_account AS "to", amount, note, created_at AS "at"`

/**
 * Moves money. Both accounts are locked in the order of their numbers, whatever the direction, so that transfers never
 * wait for each other in a circle. That nothing is overdrawn is for PostgreSQL to say: a CHECK constraint refuses it.
 *
 * With a key it happens once: the same transfer again is answered with the first one. The key is looked up when the
 * accounts are locked, so of two equal requests at the same time one waits and finds what the other has done.
 */
export const make = (transfer: Schemas.Transfer, key: string | undefined) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    const { amount, from, note, to } = transfer
    const [accounts, earlier] = yield* DbSession.batch([
      sql<Accounts.Account>`
        SELECT id, balance FROM accounts WHERE id IN (${from}, ${to}) ORDER BY id FOR NO KEY UPDATE`,
      sql<Posted>`SELECT ${sql.literal(columns)} FROM transfers WHERE idempotency_key = ${key ?? null}`
    ])
    if (earlier[0] !== undefined) return yield* isSame(earlier[0], transfer) ? Effect.succeed(earlier[0]) : reused(key)
    const balanceOf = (id: number) => {
      const account = accounts.find((account) => account.id === id)
      return account === undefined ? Accounts.missing(id) : Effect.succeed(BigInt(account.balance))
    }
    const fromBalance = (yield* balanceOf(from)) - amount
    const toBalance = (yield* balanceOf(to)) + amount
    const [, posted] = yield* DbSession.batch([
      sql`UPDATE accounts SET balance = CASE id WHEN ${from} THEN ${fromBalance}::bigint ELSE ${toBalance}::bigint END
          WHERE id IN (${from}, ${to})`,
      sql<Posted>`
        INSERT INTO transfers (from_account, from_balance, to_account, to_balance, amount, note, idempotency_key)
        VALUES (${from}, ${fromBalance}, ${to}, ${toBalance}, ${amount}, ${note ?? null}, ${key ?? null})
        RETURNING ${sql.literal(columns)}`
    ])
    return posted[0]!
  }).pipe(
    DbError.catchReasons({
      CheckViolation: () => Effect.fail(new Overdrawn({ message: `Account ${transfer.from} would be overdrawn.` })),
      // another transfer, between other accounts, took the key meanwhile
      UniqueViolation: () => reused(key)
    })
  )

export const deposit = (to: number, amount: bigint, note: string | undefined) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    const [account] = yield* sql<Accounts.Account>`
      UPDATE accounts SET balance = balance + ${amount} WHERE id = ${to} RETURNING balance`
    if (account === undefined) return yield* Accounts.missing(to)
    return yield* DbQuery.one(sql<Posted>`
      INSERT INTO transfers (to_account, to_balance, amount, note)
      VALUES (${to}, ${account.balance}, ${amount}, ${note ?? null})
      RETURNING ${sql.literal(columns)}`)
  })

const isSame = (posted: Posted, transfer: Schemas.Transfer): boolean =>
  posted.from === transfer.from &&
  posted.to === transfer.to &&
  posted.amount === String(transfer.amount) &&
  posted.note === (transfer.note ?? null)

const reused = (key: string | undefined) =>
  new KeyReused({ message: `The idempotency key "${key}" belongs to another transfer.` })
