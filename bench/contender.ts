/**
 * What is compared: the same workloads, each written the way a user of that library writes them.
 */

/** Runs so many units of work. A number is the microseconds of each, by a clock of its own. */
export type Work = (n: number) => Promise<void | number>

export interface Contender {
  readonly work: { readonly [Name in WorkloadName]?: Work }
  readonly close: () => Promise<void>
}

export type Connect = (url: string) => Promise<Contender | undefined>

export type WorkloadName = "insert" | "five" | "twenty" | "select" | "fibersInsert" | "fibersSelect" | "tpcb" | "stream"

/** Connections of every pool, and what uses them at once. */
export const connections = 10
export const fibers = 64

export const rowsOfStream = 1_000_000

export const text = {
  insert: "INSERT INTO bench_items (id, name) VALUES ($1, $2)",
  select: "SELECT id, name, price, made FROM bench_products WHERE id = $1",
  stream: `SELECT id, 'name ' || id AS name, id % 7 AS kind FROM (SELECT generate_series(1, ${rowsOfStream}) AS id) _`,
  accounts: "UPDATE bench_accounts SET balance = balance + $1 WHERE id = $2",
  balance: "SELECT balance FROM bench_accounts WHERE id = $1",
  tellers: "UPDATE bench_tellers SET balance = balance + $1 WHERE id = $2",
  branches: "UPDATE bench_branches SET balance = balance + $1 WHERE id = $2",
  history: "INSERT INTO bench_history (teller, branch, account, delta, made) VALUES ($1, $2, $3, $4, current_timestamp)"
}

const sizes = { accounts: 10_000, tellers: 100, branches: 10, products: 1000 }

export const schema = `
  CREATE TABLE bench_items (id int, name text) WITH (autovacuum_enabled = off);
  CREATE TABLE bench_products (id int PRIMARY KEY, name text, price numeric, made timestamptz);
  INSERT INTO bench_products SELECT g, 'product ' || g, g * 1.5, now() FROM generate_series(1, ${sizes.products}) g;
  CREATE TABLE bench_accounts (id int PRIMARY KEY, balance int NOT NULL) WITH (fillfactor = 50);
  INSERT INTO bench_accounts SELECT g, 0 FROM generate_series(1, ${sizes.accounts}) g;
  CREATE TABLE bench_tellers (id int PRIMARY KEY, balance int NOT NULL) WITH (fillfactor = 10);
  INSERT INTO bench_tellers SELECT g, 0 FROM generate_series(1, ${sizes.tellers}) g;
  CREATE TABLE bench_branches (id int PRIMARY KEY, balance int NOT NULL) WITH (fillfactor = 10);
  INSERT INTO bench_branches SELECT g, 0 FROM generate_series(1, ${sizes.branches}) g;
  CREATE TABLE bench_history (teller int, branch int, account int, delta int, made timestamptz);
  ANALYZE`

let turn = 0

/** The same products in the same order for everybody, spread over the table. */
export const someProduct = (): number => ((turn = (turn + 7) % sizes.products) % sizes.products) + 1

/** One transfer of TPC-B. */
export const someTransfer = () => {
  turn = (turn + 7919) % sizes.accounts
  return {
    account: turn + 1,
    teller: (turn % sizes.tellers) + 1,
    branch: (turn % sizes.branches) + 1,
    delta: (turn % 100) - 50
  }
}

/** `n` units, one after the other. */
export const times = async (n: number, unit: (i: number) => Promise<unknown>): Promise<void> => {
  for (let i = 0; i < n; i++) await unit(i)
}

/** `n` units by as many loops at once as there are fibers. */
export const spread = (n: number, unit: (i: number) => Promise<unknown>): Promise<unknown> =>
  Promise.all(Array.from({ length: fibers }, () => times(Math.ceil(n / fibers), unit)))
