/**
 * Transactions that lose against each other: the loser is told by a typed error, or simply runs again.
 */
import type { SqlError } from "@effect/sql"
import { DbEngine, DbError, withTransaction } from "effect-db"
import { Deferred, Effect } from "effect"
import { run, say, show } from "./support.js"

const program = Effect.gen(function* () {
  const { sql } = yield* DbEngine
  yield* sql`CREATE TABLE counter AS SELECT 0 AS value`
  const value = Effect.map(sql<{ readonly value: number }>`SELECT value FROM counter`, (rows) => rows[0]!.value)

  /** Reads, meets the other one, and writes: only one of the two can be right. */
  const race = <E, R>(both: (increment: Effect.Effect<void, SqlError.SqlError>) => Effect.Effect<unknown, E, R>) =>
    Effect.gen(function* () {
      const first = yield* Deferred.make<void>()
      const second = yield* Deferred.make<void>()
      const increment = (mine: Deferred.Deferred<void>, other: Deferred.Deferred<void>) =>
        Effect.gen(function* () {
          const before = yield* value
          yield* Deferred.succeed(mine, undefined)
          yield* Deferred.await(other)
          yield* sql`UPDATE counter SET value = ${before + 1}`
        })
      return yield* Effect.all([both(increment(first, second)), both(increment(second, first))], {
        concurrency: "unbounded"
      })
    })

  yield* say("without retry: one of them fails, and says why")
  const answers = yield* race((increment) =>
    increment.pipe(
      withTransaction({ isolation: "serializable" }),
      Effect.as("committed"),
      DbError.catchReason("SerializationError", (reason) => Effect.succeed(reason._tag))
    )
  )
  yield* show("answers", Effect.succeed([...answers].sort()), ["SerializationError", "committed"])
  yield* show("value", value, 1)

  yield* say("with retry: the loser runs again, whole, in a fresh transaction")
  yield* race(withTransaction({ isolation: "serializable", retry: true }))
  yield* show("value", value, 3)
})

run(program)
