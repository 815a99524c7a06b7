/**
 * `postgres` (postgres.js), which pipelines and prepares by itself.
 */
import Postgres from "postgres"
import { connections, someProduct, someTransfer, spread, times } from "../contender.js"
import type { Connect } from "../contender.js"
import { text } from "../contender.js"

export const postgres: Connect = async (url) => {
  const sql = Postgres(url, { max: connections, onnotice: () => {} })
  const insert = (i: number) =>
    sql.begin(async (sql) => {
      await sql`INSERT INTO bench_items (id, name) VALUES (${i}, ${`name ${i}`})`
    })
  const select = () => sql`SELECT id, name, price, made FROM bench_products WHERE id = ${someProduct()}`
  return {
    work: {
      insert: (n) => times(n, insert),
      five: (n) =>
        times(n, (i) =>
          sql.begin((sql) => times(5, (j) => sql`INSERT INTO bench_items (id, name) VALUES (${i}, ${`name ${j}`})`))
        ),
      twenty: (n) =>
        times(n, (i) =>
          sql.begin((sql) =>
            Promise.all(
              Array.from(
                { length: 20 },
                (_, j) => sql`INSERT INTO bench_items (id, name) VALUES (${i}, ${`name ${j}`})`
              )
            )
          )
        ),
      select: (n) => times(n, select),
      fibersInsert: (n) => spread(n, insert).then(() => {}),
      fibersSelect: (n) => spread(n, select).then(() => {}),
      tpcb: (n) =>
        times(n, () =>
          sql.begin(async (sql) => {
            const { account, branch, delta, teller } = someTransfer()
            await sql`UPDATE bench_accounts SET balance = balance + ${delta} WHERE id = ${account}`
            await sql`SELECT balance FROM bench_accounts WHERE id = ${account}`
            await sql`UPDATE bench_tellers SET balance = balance + ${delta} WHERE id = ${teller}`
            await sql`UPDATE bench_branches SET balance = balance + ${delta} WHERE id = ${branch}`
            await sql`
              INSERT INTO bench_history (teller, branch, account, delta, made)
              VALUES (${teller}, ${branch}, ${account}, ${delta}, current_timestamp)`
          })
        ),
      stream: (n) =>
        times(n, async () => {
          let seen = 0
          for await (const rows of sql.unsafe(text.stream).cursor(500)) seen += rows.length
          return seen
        })
    },
    close: () => sql.end()
  }
}
