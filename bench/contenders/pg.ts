/**
 * `pg` by hand: a pool, BEGIN, statements, COMMIT. Once as most programs have it, once with named statements.
 */
import Pg from "pg"
import { connections, someProduct, someTransfer, spread, text, times } from "../contender.js"
import type { Connect } from "../contender.js"

const connect =
  (named: boolean): Connect =>
  async (url) => {
    const pool = new Pg.Pool({ connectionString: url, max: connections })
    let names = 0
    const known = new Map<string, string>()
    const nameOf = (text: string): string => {
      let name = known.get(text)
      if (name === undefined) known.set(text, (name = `bench_${++names}`))
      return name
    }
    const query = (on: Pg.Pool | Pg.PoolClient, text: string, values: Array<unknown>) =>
      named ? on.query({ name: nameOf(text), text, values }) : on.query(text, values)
    const transaction = async (body: (client: Pg.PoolClient) => Promise<unknown>): Promise<void> => {
      const client = await pool.connect()
      try {
        await client.query("BEGIN")
        await body(client)
        await client.query("COMMIT")
      } catch (error) {
        await client.query("ROLLBACK")
        throw error
      } finally {
        client.release()
      }
    }
    const insert = (i: number) => transaction((client) => query(client, text.insert, [i, `name ${i}`]))
    const inserts = (count: number) => (i: number) =>
      transaction((client) => times(count, (j) => query(client, text.insert, [i, `name ${j}`])))
    const select = () => query(pool, text.select, [someProduct()])
    return {
      work: {
        insert: (n) => times(n, insert),
        five: (n) => times(n, inserts(5)),
        twenty: (n) => times(n, inserts(20)),
        select: (n) => times(n, select),
        fibersInsert: (n) => spread(n, insert).then(() => {}),
        fibersSelect: (n) => spread(n, select).then(() => {}),
        tpcb: (n) =>
          times(n, () =>
            transaction(async (client) => {
              const { account, branch, delta, teller } = someTransfer()
              await query(client, text.accounts, [delta, account])
              await query(client, text.balance, [account])
              await query(client, text.tellers, [delta, teller])
              await query(client, text.branches, [delta, branch])
              await query(client, text.history, [teller, branch, account, delta])
            })
          ),
        stream: (n) =>
          times(n, () =>
            transaction(async (client) => {
              await client.query(`DECLARE bench_rows NO SCROLL CURSOR FOR ${text.stream}`)
              for (;;) {
                const { rows } = await client.query("FETCH FORWARD 500 FROM bench_rows")
                if (rows.length === 0) return
              }
            })
          )
      },
      close: () => pool.end()
    }
  }

export const pg = connect(false)
export const pgNamed = connect(true)
