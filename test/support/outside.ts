/**
 * Connections that the library knows nothing of, by plain `pg`, and locks that they hold.
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import Pg from "pg"
import { until } from "./until.js"

/** Runs a text on one connection and yields the rows; a failure is a defect. */
export type Ask = <A extends object = Record<string, unknown>>(
  text: string,
  values?: ReadonlyArray<unknown>
) => Effect.Effect<Array<A>>

/** One connection for the length of a scope. */
export const outside = (url: string): Effect.Effect<Ask, never, Scope.Scope> =>
  Effect.map(
    Effect.acquireRelease(
      Effect.promise(async () => {
        const client = new Pg.Client({ connectionString: url, application_name: "effect-db test support" })
        client.on("error", () => {})
        await client.connect()
        return client
      }),
      (client) => Effect.promise(() => client.end())
    ),
    (client): Ask =>
      (text, values) =>
        Effect.promise(async () => (await client.query(text, values === undefined ? undefined : [...values])).rows)
  )

export interface Lock {
  /** Lets the lock go; the end of the scope does so too. */
  readonly release: Effect.Effect<void>
  /** Waits until somebody waits for the lock. */
  readonly waitedFor: Effect.Effect<void>
}

/** Holds an advisory lock from outside, so that a statement runs for as long as the test wants. */
export const lockedOutside = (
  { url }: { readonly url: string },
  key: number
): Effect.Effect<Lock, never, Scope.Scope> =>
  Effect.gen(function* () {
    const ask = yield* outside(url)
    yield* ask("SELECT pg_advisory_lock($1)", [key])
    const waiting = ask(
      `SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = $1
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
      [key]
    )
    return {
      release: Effect.asVoid(ask("SELECT pg_advisory_unlock_all()")),
      waitedFor: until(
        "the lock is waited for",
        Effect.map(waiting, (_) => _.length > 0)
      )
    }
  })
