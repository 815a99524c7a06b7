/**
 * Drizzle on `pg`'s pool (`drizzle-orm/node-postgres`), as its documentation sets it up.
 */
import { eq, sql } from "drizzle-orm"
import { drizzle as connectDrizzle } from "drizzle-orm/node-postgres"
import { integer, numeric, pgTable, text, timestamp } from "drizzle-orm/pg-core"
import Pg from "pg"
import { connections, someProduct, someTransfer, spread, times } from "../contender.js"
import type { Connect } from "../contender.js"

const items = pgTable("bench_items", { id: integer().notNull(), name: text().notNull() })
const products = pgTable("bench_products", {
  id: integer().primaryKey(),
  name: text(),
  price: numeric(),
  made: timestamp({ withTimezone: true })
})
const balances = (name: string) => pgTable(name, { id: integer().primaryKey(), balance: integer().notNull() })
const accounts = balances("bench_accounts")
const tellers = balances("bench_tellers")
const branches = balances("bench_branches")
const history = pgTable("bench_history", {
  teller: integer(),
  branch: integer(),
  account: integer(),
  delta: integer(),
  made: timestamp({ withTimezone: true })
})

export const drizzle: Connect = async (url) => {
  const pool = new Pg.Pool({ connectionString: url, max: connections })
  const db = connectDrizzle({ client: pool })
  type Transaction = Parameters<Parameters<typeof db.transaction>[0]>[0]
  const add = (tx: Transaction, id: number, j: number) => tx.insert(items).values({ id, name: `name ${j}` })
  const insert = (i: number) => db.transaction((tx) => add(tx, i, i))
  const inserts = (count: number) => (i: number) => db.transaction((tx) => times(count, (j) => add(tx, i, j)))
  const select = () => db.select().from(products).where(eq(products.id, someProduct()))
  const move = (tx: Transaction, table: typeof accounts, id: number, delta: number) =>
    tx
      .update(table)
      .set({ balance: sql`${table.balance} + ${delta}` })
      .where(eq(table.id, id))
  return {
    work: {
      insert: (n) => times(n, insert),
      five: (n) => times(n, inserts(5)),
      // One after the other: it would queue them on `pg`'s client, which `pg` deprecates.
      twenty: (n) => times(n, inserts(20)),
      select: (n) => times(n, select),
      fibersInsert: (n) => spread(n, insert).then(() => {}),
      fibersSelect: (n) => spread(n, select).then(() => {}),
      tpcb: (n) =>
        times(n, () =>
          db.transaction(async (tx) => {
            const { account, branch, delta, teller } = someTransfer()
            await move(tx, accounts, account, delta)
            await tx.select({ balance: accounts.balance }).from(accounts).where(eq(accounts.id, account))
            await move(tx, tellers, teller, delta)
            await move(tx, branches, branch, delta)
            await tx.insert(history).values({ teller, branch, account, delta, made: sql`current_timestamp` })
          })
        )
    },
    close: () => pool.end()
  }
}
