/**
 * The repository of accounts. Each function asks for the ambient session at the moment it is called; whoever calls it
 * decides what else belongs to the same transaction.
 */
import { DbError, DbQuery, DbSession } from "effect-db"
import { Effect, Option } from "effect"
import { NameTaken, NotFound } from "./errors.js"

export interface Account {
  readonly id: number
  readonly name: string
  /** In cents. PostgreSQL's `bigint` arrives as a string of digits. */
  readonly balance: string
}

export interface Entry {
  readonly transfer: string
  readonly at: Date
  /** The other account; none for a deposit. */
  readonly counterparty: string | null
  readonly amount: string
  readonly balance: string
  readonly note: string | null
}

export const open = (name: string) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    return yield* DbQuery.one(sql<Account>`INSERT INTO accounts ${sql.insert({ name })} RETURNING id, name, balance`)
  }).pipe(
    DbError.catchReason("UniqueViolation", () =>
      Effect.fail(new NameTaken({ message: `There is an account named "${name}" already.` }))
    )
  )

export const find = (id: number) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    const account = yield* DbQuery.oneOrNone(sql<Account>`SELECT id, name, balance FROM accounts WHERE id = ${id}`)
    return yield* Option.match(account, { onNone: () => Effect.fail(missing(id)), onSome: Effect.succeed })
  })

export const list = (limit: number) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    return yield* sql<Account>`SELECT id, name, balance FROM accounts ORDER BY id LIMIT ${limit}`
  })

/** The latest entries first; `before` is the transfer that the page before ended with. */
export const statement = (id: number, page: { readonly before?: string | undefined; readonly limit: number }) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    const before = page.before ?? "9223372036854775807"
    // Each half walks its own index and reads no more than one page.
    const [account, entries] = yield* DbSession.batch([
      sql<Account>`SELECT id, name, balance FROM accounts WHERE id = ${id}`,
      sql<Entry>`
        SELECT id AS "transfer", created_at AS "at", name AS "counterparty", amount, balance, note
        FROM (
          (SELECT t.id, t.created_at, o.name, -t.amount AS amount, t.from_balance AS balance, t.note
           FROM transfers t JOIN accounts o ON o.id = t.to_account
           WHERE t.from_account = ${id} AND t.id < ${before} ORDER BY t.id DESC LIMIT ${page.limit})
          UNION ALL
          (SELECT t.id, t.created_at, o.name, t.amount, t.to_balance, t.note
           FROM transfers t LEFT JOIN accounts o ON o.id = t.from_account
           WHERE t.to_account = ${id} AND t.id < ${before} ORDER BY t.id DESC LIMIT ${page.limit})
        ) AS entry
        ORDER BY id DESC LIMIT ${page.limit}`
    ])
    if (account[0] === undefined) return yield* missing(id)
    return { account: account[0], entries, next: entries.length < page.limit ? null : entries.at(-1)!.transfer }
  })

export const missing = (id: number) => new NotFound({ message: `There is no account ${id}.` })
