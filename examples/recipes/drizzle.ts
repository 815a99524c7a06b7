/**
 * Drizzle in promise code: its queries run in the ambient session of a `DbRuntime`, outside of one as statements of
 * their own. To be copied.
 *
 * Its own `transaction()` is refused by Drizzle: use the runtime's, whose block the queries inside run in.
 */
import { drizzle } from "drizzle-orm/pg-proxy"
import type { PgRemoteDatabase } from "drizzle-orm/pg-proxy"
import { Effect } from "effect"
import { DbEngine } from "effect-db"
import type { DbRuntime } from "effect-db"

type Run = DbRuntime.DbRuntime<DbEngine, unknown>["run"]

export const drizzleOn = <Tables extends Record<string, unknown> = Record<string, never>>(
  { run }: { readonly run: Run },
  schema?: Tables
): PgRemoteDatabase<Tables> =>
  drizzle(
    (text, params, method) =>
      run(
        Effect.flatMap(DbEngine, ({ sql }): Effect.Effect<{ rows: Array<unknown> }, unknown> => {
          const statement = sql.unsafe(text, params)
          // "all" wants the columns by position, to give them the names of the query.
          return method === "all"
            ? Effect.map(statement.values, (rows) => ({ rows: [...rows] }))
            : Effect.map(statement.raw, (raw) => ({ rows: (raw as { readonly rows: Array<unknown> }).rows }))
        })
      ),
    schema === undefined ? {} : { schema }
  )
