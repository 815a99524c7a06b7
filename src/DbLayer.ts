/**
 * The layer of a database: everything that a program needs.
 *
 * @since 0.1.0
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import * as Config from "effect/Config"
import type * as ConfigError from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import * as connections from "./DbConnection.js"
import type { Connection, DbConnection } from "./DbConnection.js"
import type { DbEngine, EngineModule, EngineService } from "./DbEngine.js"
import type { DbOptions } from "./DbOptions.js"
import * as sessions from "./DbSession.js"
import type { DbSession, Session } from "./DbSession.js"

/**
 * What a database's layer provides. Only the default one provides the ecosystem's `SqlClient` and `PgClient`.
 *
 * @since 0.1.0
 * @category models
 */
export type Provided<Name extends string> =
  | DbEngine<Name>
  | DbConnection<Name>
  | DbSession<Name>
  | (Name extends "default" ? SqlClient.SqlClient | PgClient.PgClient : never)

/**
 * @since 0.1.0
 * @category models
 */
export interface LayerModule<Name extends string> {
  /**
   * The engine of one database and everything on top of it. Build it once, at the edge of the program. It opens no
   * socket before the first use unless `connect` is `"eager"`. Closing it drains. Built twice for the same target within
   * a short time it logs a warning, see `DbEngine.make`.
   */
  (options: DbOptions<Name | "default">): Layer.Layer<Provided<Name>, SqlError>
  /** The same from a `Config`. */
  readonly config: (
    config: Config.Config.Wrap<DbOptions<Name | "default">>
  ) => Layer.Layer<Provided<Name>, SqlError | ConfigError.ConfigError>
  /**
   * The same from the environment: `DATABASE_URL`, else libpq's `PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD` and
   * `PGDATABASE`. An empty one counts as none. What the url does not say of application name, connect timeout, TLS and
   * the like is that of libpq's variables of the process, as for every engine.
   */
  readonly env: Layer.Layer<Provided<Name>, SqlError | ConfigError.ConfigError>
}

/** Everything that belongs to an engine, as a context. @internal */
export const contextOf = <Name extends string>(
  name: Name,
  tags: {
    readonly engine: Context.Tag<DbEngine<Name>, EngineService>
    readonly connection: Context.Tag<DbConnection<Name>, Connection>
    readonly session: Context.Tag<DbSession<Name>, Session>
  },
  service: EngineService
): Context.Context<Provided<Name>> => {
  const own = Context.make(tags.engine, service).pipe(
    Context.add(tags.connection, connections.facadeOf(service)),
    Context.add(tags.session, sessions.facadeOf(service))
  )
  return (
    name === "default"
      ? own.pipe(Context.add(SqlClient.SqlClient, service.sql), Context.add(PgClient.PgClient, service.sql))
      : own
  ) as Context.Context<Provided<Name>>
}

/** As for libpq, an empty variable is none. */
const variable = (name: string): Config.Config<Option.Option<string>> => Config.option(Config.nonEmptyString(name))

const secret = (name: string): Config.Config<Option.Option<Redacted.Redacted>> =>
  Config.map(variable(name), Option.map(Redacted.make))

const fromEnv: Config.Config<DbOptions<never>> = Config.all({
  url: secret("DATABASE_URL"),
  host: variable("PGHOST"),
  // The empty text is a number: 0.
  port: Config.zipWith(variable("PGPORT"), Config.option(Config.integer("PGPORT")), (set, port) =>
    Option.zipRight(set, port)
  ),
  username: variable("PGUSER"),
  password: secret("PGPASSWORD"),
  database: variable("PGDATABASE")
}).pipe(
  Config.map(({ url, ...rest }): DbOptions<never> => {
    if (Option.isSome(url)) return { url: url.value }
    return {
      host: Option.getOrUndefined(rest.host),
      port: Option.getOrUndefined(rest.port),
      username: Option.getOrUndefined(rest.username),
      password: Option.getOrUndefined(rest.password),
      database: Option.getOrUndefined(rest.database)
    }
  })
)

/** @internal */
export const make = <Name extends string>(
  name: Name,
  engine: EngineModule<Name>,
  connection: Context.Tag<DbConnection<Name>, Connection>,
  session: Context.Tag<DbSession<Name>, Session>
): LayerModule<Name> => {
  const build = (options: DbOptions<Name | "default">) =>
    Effect.map(engine.make(options), (service) => contextOf(name, { engine, connection, session }, service))
  const config = (config: Config.Config<DbOptions<Name | "default">>) =>
    Layer.scopedContext(Effect.flatMap(config, build))
  return Object.assign((options: DbOptions<Name | "default">) => Layer.scopedContext(build(options)), {
    config: (wrapped: Config.Config.Wrap<DbOptions<Name | "default">>) => config(Config.unwrap(wrapped)),
    env: config(fromEnv)
  })
}
