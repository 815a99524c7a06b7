/**
 * `effect-db` and `@effect/sql-pg`: the same programs over `SqlClient`, with each one's own client and transaction.
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as Reactivity from "@effect/experimental/Reactivity"
import * as SqlClient from "@effect/sql/SqlClient"
import * as Effect from "effect/Effect"
import * as FiberRef from "effect/FiberRef"
import * as Layer from "effect/Layer"
import * as LogLevel from "effect/LogLevel"
import * as ManagedRuntime from "effect/ManagedRuntime"
import * as Redacted from "effect/Redacted"
import * as Stream from "effect/Stream"
import { coreOf } from "../../src/DbEngine.js"
import { DbEngine, DbLayer, DbSession } from "../../src/index.js"
import type { DbError, DbOptions } from "../../src/index.js"
import { Command } from "../../src/internal/pipeline.js"
import type { Control, Owner } from "../../src/internal/pipeline.js"
import type { Result } from "../../src/internal/rows.js"
import type { Wire } from "../../src/internal/wire.js"
import { connections, fibers, someProduct, someTransfer, text } from "../contender.js"
import type { Connect, Contender } from "../contender.js"

/** `n` times one after the other, with next to no cost of its own. */
export const repeat = <E, R>(n: number, unit: (i: number) => Effect.Effect<unknown, E, R>): Effect.Effect<void, E, R> =>
  Effect.suspend(() => {
    let i = 0
    return Effect.whileLoop({ while: () => i < n, body: () => unit(i++), step: () => {} })
  })

export const together = <E, R>(n: number, unit: (i: number) => Effect.Effect<unknown, E, R>) =>
  Effect.all(
    Array.from({ length: n }, (_, i) => unit(i)),
    { concurrency: "unbounded", discard: true }
  )

const contender = async <E>(layer: Layer.Layer<SqlClient.SqlClient, E>): Promise<Contender> => {
  const runtime = ManagedRuntime.make(layer)
  const sql = await runtime.runPromise(SqlClient.SqlClient)
  const insert = (i: number) => sql`INSERT INTO bench_items (id, name) VALUES (${i}, ${`name ${i}`})`
  const select = () => sql`SELECT id, name, price, made FROM bench_products WHERE id = ${someProduct()}`
  const one = (i: number) => sql.withTransaction(insert(i))
  const transfer = Effect.suspend(() => {
    const { account, branch, delta, teller } = someTransfer()
    return Effect.gen(function* () {
      yield* sql`UPDATE bench_accounts SET balance = balance + ${delta} WHERE id = ${account}`
      yield* sql`SELECT balance FROM bench_accounts WHERE id = ${account}`
      yield* sql`UPDATE bench_tellers SET balance = balance + ${delta} WHERE id = ${teller}`
      yield* sql`UPDATE bench_branches SET balance = balance + ${delta} WHERE id = ${branch}`
      yield* sql`
        INSERT INTO bench_history (teller, branch, account, delta, made)
        VALUES (${teller}, ${branch}, ${account}, ${delta}, current_timestamp)`
    })
  })
  const run = (effect: Effect.Effect<unknown, unknown>): Promise<void> => runtime.runPromise(Effect.asVoid(effect))
  const spread = (n: number, unit: (i: number) => Effect.Effect<unknown, unknown>) =>
    run(together(fibers, () => repeat(Math.ceil(n / fibers), unit)))
  return {
    work: {
      insert: (n) => run(repeat(n, one)),
      five: (n) => run(repeat(n, () => sql.withTransaction(repeat(5, insert)))),
      twenty: (n) => run(repeat(n, () => sql.withTransaction(together(20, insert)))),
      select: (n) => run(repeat(n, select)),
      fibersInsert: (n) => spread(n, one),
      fibersSelect: (n) => spread(n, select),
      tpcb: (n) => run(repeat(n, () => sql.withTransaction(transfer))),
      stream: (n) => run(repeat(n, () => Stream.runForEachChunk(sql.unsafe(text.stream).stream, () => Effect.void)))
    },
    close: () => runtime.dispose()
  }
}

/** Parts of the benchmark that share a process build an engine each, about which the library warns. */
export const dbLayer = (options: DbOptions) =>
  Layer.locally(DbLayer(options), FiberRef.currentMinimumLogLevel, LogLevel.Error)

export const effectDb: Connect = (url) => contender(DbLayer({ url, maxConnections: connections }))

/** The twenty inserts as what they are together: one batch, without a fiber for each. */
export const effectDbBatch: Connect = async (url) => {
  const runtime = ManagedRuntime.make(DbLayer({ url, maxConnections: connections }))
  const sql = await runtime.runPromise(SqlClient.SqlClient)
  const insert = (i: number) => sql`INSERT INTO bench_items (id, name) VALUES (${i}, ${`name ${i}`})`
  const batch = () => DbSession.batch(Array.from({ length: 20 }, (_, i) => insert(i)))
  return {
    work: { twenty: (n) => runtime.runPromise(repeat(n, batch)) },
    close: () => runtime.dispose()
  }
}

/** What of the twenty is Effect's own: a fiber each, started and joined, and nothing for it to do. */
export const fibersAlone: Connect = async () => ({
  work: { twenty: (n) => Effect.runPromise(repeat(n, () => together(20, () => Effect.void))) },
  close: async () => {}
})

/**
 * The least that fibers with a statement each can take here: the same messages, handed straight to the pipeline and
 * waited for, and a COMMIT. No session, no statement of the ecosystem, no check.
 */
export const fibersAndWire: Connect = async (url) => {
  const runtime = ManagedRuntime.make(DbLayer({ url, maxConnections: connections }))
  const engine = coreOf(await runtime.runPromise(DbEngine))
  const wire = await new Promise<Wire>((resolve, reject) =>
    engine.pool().take({ name: "bench" }, 5000, (error, wire) => (wire === undefined ? reject(error!) : resolve(wire)))
  )
  const begin: Control = { text: "BEGIN", params: [], opens: true, named: true }
  const send = (text: string, params: ReadonlyArray<string>, owner: Owner | undefined) =>
    Effect.async<Result, DbError>((resume) =>
      wire.submit(
        new Command(text, params, "object", owner === undefined, true, false, owner, (error, result) =>
          resume(error === undefined ? Effect.succeed(result!) : Effect.fail(error))
        )
      )
    )
  const transaction = () => {
    let prefix = [begin]
    const owner: Owner = {
      takePrefix: () => {
        const taken = prefix
        prefix = []
        return taken
      }
    }
    const inserts = together(20, (i) => send(text.insert, [String(i), `name ${i}`], owner))
    return Effect.zipRight(inserts, send("COMMIT", [], undefined))
  }
  return {
    work: { twenty: (n) => runtime.runPromise(repeat(n, transaction)) },
    close: async () => {
      engine.giveBack(wire)
      await runtime.dispose()
    }
  }
}

export const sqlPgLayer = (url: string): Layer.Layer<SqlClient.SqlClient, unknown> =>
  Layer.provide(PgClient.layer({ url: Redacted.make(url), maxConnections: connections }), Reactivity.layer)

export const sqlPg: Connect = (url) => contender(sqlPgLayer(url))
