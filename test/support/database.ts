/**
 * A database of its own for each test file, and what the server says about it. All of it goes by plain `pg` on
 * connections of its own, so that it judges the library from outside.
 */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Redacted from "effect/Redacted"
import { randomBytes } from "node:crypto"
import Pg from "pg"
import { afterAll, beforeAll, inject } from "vitest"

export interface TestDatabase {
  readonly url: string
  readonly host: string
  readonly port: number
  readonly user: string
  readonly password: Redacted.Redacted<string>
  readonly database: string
  /** Runs one text on a connection of its own and yields the rows. */
  readonly query: <A extends object = Record<string, unknown>>(
    text: string,
    values?: ReadonlyArray<unknown>
  ) => Effect.Effect<Array<A>>
  /** `serverActivity(url)`. */
  readonly activity: Effect.Effect<Activity>
}

/** Client backends of one database, by `pg_stat_activity.state`. */
export interface Activity {
  readonly total: number
  readonly active: number
  readonly idle: number
  readonly idleInTransaction: number
  readonly idleInTransactionAborted: number
}

const withDatabase = (url: string, database: string): string => {
  const other = new URL(url)
  other.pathname = `/${encodeURIComponent(database)}`
  return other.href
}

const databaseOf = (url: string): string => decodeURIComponent(new URL(url).pathname.slice(1)) || "postgres"

const run = async <A extends object>(url: string, text: string, values?: ReadonlyArray<unknown>): Promise<Array<A>> => {
  const client = new Pg.Client({ connectionString: url, application_name: "effect-db test support" })
  client.on("error", () => {})
  await client.connect()
  try {
    const { rows } = await client.query<A>(text, values === undefined ? undefined : [...values])
    return rows
  } finally {
    await client.end()
  }
}

/** Runs one text on a connection of its own and yields the rows. A failure is a defect. */
export const query = <A extends object = Record<string, unknown>>(
  url: string,
  text: string,
  values?: ReadonlyArray<unknown>
): Effect.Effect<Array<A>> => Effect.promise(() => run<A>(url, text, values))

/**
 * Creates an empty database before the tests of the file and drops it, with whoever is still connected, after them.
 * Call it at the top of a file or of a `describe`. The record is complete at once, the database from `beforeAll` on.
 */
export const testDatabase = (): TestDatabase => {
  const server = inject("databaseUrl")
  const database = `effect_db_${process.pid}_${randomBytes(5).toString("hex")}`
  const url = withDatabase(server, database)
  const { hostname, password, port, username } = new URL(url)
  beforeAll(async () => {
    await run(server, `CREATE DATABASE ${database} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'`)
  })
  afterAll(async () => {
    await run(server, `DROP DATABASE IF EXISTS ${database} WITH (FORCE)`)
  })
  return {
    url,
    host: hostname,
    port: Number(port || 5432),
    user: decodeURIComponent(username),
    password: Redacted.make(decodeURIComponent(password)),
    database,
    query: (text, values) => query(url, text, values),
    activity: serverActivity(url)
  }
}

/** What the client backends of the URL's database are doing, those of the tests' own support left out. */
export const serverActivity = (url: string): Effect.Effect<Activity> =>
  Effect.promise(async () => {
    const [row] = await run<Activity>(
      url,
      `SELECT count(*)::int AS "total",
              count(*) FILTER (WHERE state = 'active')::int AS "active",
              count(*) FILTER (WHERE state = 'idle')::int AS "idle",
              count(*) FILTER (WHERE state = 'idle in transaction')::int AS "idleInTransaction",
              count(*) FILTER (WHERE state = 'idle in transaction (aborted)')::int AS "idleInTransactionAborted"
         FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
          AND application_name <> 'effect-db test support'`
    )
    return row!
  })

/**
 * Waits until the activity of the URL's database satisfies the predicate: a backend notices a closed socket a moment
 * after the client has closed it. Dies with the last activity when `within` (15 s) is over.
 */
export const untilActivity = (
  url: string,
  predicate: (activity: Activity) => boolean,
  within: Duration.DurationInput = "15 seconds"
): Effect.Effect<Activity> =>
  Effect.suspend(() => {
    const deadline = performance.now() + Duration.toMillis(within)
    const look: Effect.Effect<Activity> = Effect.flatMap(serverActivity(url), (activity) => {
      if (predicate(activity)) return Effect.succeed(activity)
      if (performance.now() > deadline) {
        return Effect.dieMessage(`activity of ${databaseOf(url)}: ${JSON.stringify(activity)}`)
      }
      return Effect.zipRight(
        Effect.promise(() => new Promise((resolve) => setTimeout(resolve, 20))),
        look
      )
    })
    return look
  })
