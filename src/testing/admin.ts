/**
 * A connection that databases are made with: plain `pg`, apart from every pool.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import * as Pg from "pg"
import { DbError } from "../DbError.js"
import type { DbOptions } from "../DbOptions.js"
import { resolveTarget } from "../DbOptions.js"

/** @internal */
export type Ask = (text: string) => Effect.Effect<Pg.QueryResult, SqlError>

/** A connection to the database that the options name, for the scope. @internal */
export const connect = (options: DbOptions<any>): Effect.Effect<Ask, SqlError, Scope.Scope> =>
  Effect.gen(function* () {
    const target = yield* resolveTarget(options)
    const password = yield* Effect.mapError(target.password, (cause) =>
      DbError.make("AuthenticationError", { message: "The effect that yields the password failed.", cause })
    )
    const host = target.hosts[0]!
    const client = yield* Effect.acquireRelease(
      Effect.tryPromise({
        try: async () => {
          const client = new Pg.Client({
            host: host.host,
            port: host.port,
            database: target.database ?? "postgres",
            ...(target.username === undefined ? {} : { user: target.username }),
            ...(password === undefined ? {} : { password: Redacted.value(password) }),
            ...(target.ssl === undefined ? {} : { ssl: target.ssl })
          })
          client.on("error", () => {})
          await client.connect()
          return client
        },
        catch: (cause) => DbError.fromSocket(cause, "connect", `${host.host}:${host.port}`)
      }),
      (client) => Effect.promise(() => client.end())
    )
    return (text) =>
      Effect.tryPromise({
        try: () => client.query(text),
        catch: (cause) => DbError.fromSocket(cause, "read")
      })
  })

/** One statement on a connection of its own. @internal */
export const admin = (options: DbOptions<any>, text: string): Effect.Effect<Pg.QueryResult, SqlError> =>
  Effect.scoped(Effect.flatMap(connect(options), (ask) => ask(text)))
