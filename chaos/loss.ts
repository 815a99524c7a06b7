/**
 * The negative control: a server that is told to forget. With `synchronous_commit = off` a commit is acknowledged
 * before it is written, and with the writer asleep a crash right after loses it. The checker has to see that.
 */
import * as Effect from "effect/Effect"
import type { SqlError } from "@effect/sql/SqlError"
import { DbSession, withTransaction } from "effect-db"
import { audit, schema } from "./bank.js"
import { judge } from "./ledger.js"
import type { Told, Verdict } from "./ledger.js"
import type { Random } from "./random.js"
import { onEngine } from "./world.js"
import type { World } from "./world.js"

/** Whatever else would write the log to disk before the crash is put to sleep as well. */
export const forgetful = {
  synchronous_commit: false,
  fsync: false,
  wal_writer_delay: "10s",
  wal_writer_flush_after: "1GB",
  bgwriter_lru_maxpages: 0,
  autovacuum: false
}

/** So many commits, and the crash at once after the last; then the same judgement as in the bank. */
export const loss = (world: World, random: Random, commits = 200): Effect.Effect<Verdict, Error | SqlError> =>
  Effect.gen(function* () {
    yield* world.ask(schema)
    yield* world.ask("CHECKPOINT")
    const told: Array<Told> = []
    const book = Effect.gen(function* () {
      const id = random.uuid()
      yield* withTransaction(
        Effect.flatMap(
          DbSession,
          ({ sql }) => sql`INSERT INTO ledger (id, source, target, amount) VALUES (${id}, 1, 1, 1)`
        )
      )
      told.push({ id, outcome: "acknowledged" })
    })
    yield* Effect.replicateEffect(book, commits, { concurrency: 4, discard: true }).pipe(
      Effect.zipRight(world.server.crash),
      onEngine(world)
    )
    yield* world.server.start
    return judge(told, (yield* audit(world)).present)
  })
