/** What is read to be looked at: on the reporting database, which may be a moment behind. */
import { DbRegistry, DbSession } from "effect-db"
import { Effect } from "effect"

export interface Day {
  readonly day: string
  readonly transfers: number
  readonly amount: string
}

/** How much was moved on each day, the latest first. The function itself knows nothing of a second database. */
const days = (limit: number) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    return yield* sql<Day>`
      SELECT (created_at AT TIME ZONE 'UTC')::date::text AS day, count(*)::integer AS transfers, sum(amount)::text AS amount
      FROM transfers GROUP BY 1 ORDER BY 1 DESC LIMIT ${limit}`
  })

export const daily = (limit: number) => DbRegistry.readOnly(DbSession.autocommit(days(limit), { name: "report" }))
