/**
 * Kysely on `pg`'s pool, as its documentation sets it up.
 */
import { Kysely, PostgresDialect, sql } from "kysely"
import type { Transaction } from "kysely"
import Pg from "pg"
import { connections, someProduct, someTransfer, spread, times } from "../contender.js"
import type { Connect } from "../contender.js"

interface Balance {
  readonly id: number
  readonly balance: number
}

interface Tables {
  readonly bench_items: { readonly id: number; readonly name: string }
  readonly bench_products: { readonly id: number; readonly name: string; readonly price: string; readonly made: Date }
  readonly bench_accounts: Balance
  readonly bench_tellers: Balance
  readonly bench_branches: Balance
  readonly bench_history: {
    readonly teller: number
    readonly branch: number
    readonly account: number
    readonly delta: number
    readonly made: Date
  }
}

export const kysely: Connect = async (url) => {
  const db = new Kysely<Tables>({
    dialect: new PostgresDialect({ pool: new Pg.Pool({ connectionString: url, max: connections }) })
  })
  const transaction = (body: (trx: Transaction<Tables>) => Promise<unknown>) => db.transaction().execute(body)
  const add = (trx: Transaction<Tables>, id: number, j: number) =>
    trx
      .insertInto("bench_items")
      .values({ id, name: `name ${j}` })
      .execute()
  const insert = (i: number) => transaction((trx) => add(trx, i, i))
  const select = () =>
    db
      .selectFrom("bench_products")
      .select(["id", "name", "price", "made"])
      .where("id", "=", someProduct())
      .executeTakeFirst()
  const move = (
    trx: Transaction<Tables>,
    table: "bench_accounts" | "bench_branches" | "bench_tellers",
    id: number,
    delta: number
  ) =>
    trx
      .updateTable(table)
      .set((eb) => ({ balance: eb("balance", "+", delta) }))
      .where("id", "=", id)
      .execute()
  return {
    work: {
      insert: (n) => times(n, insert),
      five: (n) => times(n, (i) => transaction((trx) => times(5, (j) => add(trx, i, j)))),
      twenty: (n) =>
        times(n, (i) => transaction((trx) => Promise.all(Array.from({ length: 20 }, (_, j) => add(trx, i, j))))),
      select: (n) => times(n, select),
      fibersInsert: (n) => spread(n, insert).then(() => {}),
      fibersSelect: (n) => spread(n, select).then(() => {}),
      tpcb: (n) =>
        times(n, () =>
          transaction(async (trx) => {
            const { account, branch, delta, teller } = someTransfer()
            await move(trx, "bench_accounts", account, delta)
            await trx.selectFrom("bench_accounts").select("balance").where("id", "=", account).executeTakeFirst()
            await move(trx, "bench_tellers", teller, delta)
            await move(trx, "bench_branches", branch, delta)
            await trx
              .insertInto("bench_history")
              .values({ teller, branch, account, delta, made: sql`current_timestamp` })
              .execute()
          })
        )
    },
    close: () => db.destroy()
  }
}
