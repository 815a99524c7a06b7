/**
 * One database, whatever its name: the whole vocabulary with an identity of its own.
 *
 * @since 0.1.0
 * @module
 */
import * as PgClient from "@effect/sql-pg/PgClient"
import * as SqlClient from "@effect/sql/SqlClient"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import { globalValue } from "effect/GlobalValue"
import * as Layer from "effect/Layer"
import * as connections from "./DbConnection.js"
import type { ConnectionModule } from "./DbConnection.js"
import * as engines from "./DbEngine.js"
import type { DbEngine, EngineModule, EngineService } from "./DbEngine.js"
import * as layers from "./DbLayer.js"
import type { LayerModule, Provided } from "./DbLayer.js"
import type { HookServices } from "./DbOptions.js"
import * as schemas from "./DbSchema.js"
import type { SchemaModule } from "./DbSchema.js"
import * as sessions from "./DbSession.js"
import type { SessionModule } from "./DbSession.js"
import * as transactions from "./DbTransaction.js"
import type {
  AtomicOptions,
  TransactionCombinator,
  TransactionModule,
  WithTransactionOptions
} from "./DbTransaction.js"

/**
 * The vocabulary of one database.
 *
 * @since 0.1.0
 * @category models
 */
export interface Database<Name extends string> {
  readonly name: Name
  readonly DbEngine: EngineModule<Name>
  readonly DbConnection: ConnectionModule<Name>
  readonly DbSession: SessionModule<Name>
  readonly DbTransaction: TransactionModule<Name>
  readonly DbSchema: SchemaModule<Name>
  readonly DbLayer: LayerModule<Name>
  /** Runs an effect as an atomic block: a savepoint inside a session, else a transaction of its own. */
  readonly withTransaction: TransactionCombinator<WithTransactionOptions, Name>
  /** Runs an effect as a transaction that commits by itself, also inside a session, which stays open. */
  readonly atomic: TransactionCombinator<AtomicOptions, Name>
  /** The ecosystem's `SqlClient` and `PgClient` for this database, where it is the one that they should mean. */
  readonly sqlClientLayer: Layer.Layer<SqlClient.SqlClient | PgClient.PgClient, never, DbEngine<Name>>
}

const known = globalValue("effect-db/Database", () => new Map<string, Database<any>>())

/**
 * The vocabulary of the database of this name. The same name gives the same vocabulary; two names can't be confused
 * at compile time.
 *
 * ```ts
 * const Analytics = Database.make("analytics")
 * const events = Effect.flatMap(Analytics.DbSession, ({ sql }) => sql`SELECT what FROM events`)
 * const report = Analytics.DbSession.autocommit(events) // R: DbSession<"analytics"> | DbEngine<"analytics">
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = <const Name extends string>(name: Name): Database<Name> => {
  const before = known.get(name)
  if (before !== undefined) return before as Database<Name>
  const DbEngine = engines.make(name, hookServices)
  const DbConnection = connections.make(name, DbEngine)
  const DbSession = sessions.make(name, DbEngine)
  const database: Database<Name> = {
    name,
    DbEngine,
    DbConnection,
    DbSession,
    DbTransaction: transactions.make(DbEngine),
    DbSchema: schemas.make(name, DbEngine),
    DbLayer: layers.make(name, DbEngine, DbConnection, DbSession),
    withTransaction: transactions.makeWithTransaction(DbEngine),
    atomic: transactions.makeAtomic(DbEngine),
    sqlClientLayer: Layer.effectContext(
      Effect.map(DbEngine, (service) =>
        Context.make(SqlClient.SqlClient, service.sql as SqlClient.SqlClient).pipe(
          Context.add(PgClient.PgClient, service.sql)
        )
      )
    )
  }
  known.set(name, database)
  return database
}

/** What the layer of a database provides, with this engine. @internal */
export const contextOf = <Name extends string>(
  { DbConnection, DbEngine, DbSession, name }: Database<Name>,
  service: EngineService
): Context.Context<Provided<Name>> =>
  layers.contextOf(name, { engine: DbEngine, connection: DbConnection, session: DbSession }, service)

/** Effects in the options of an engine know it by its name, and as the default database. @internal */
export const hookServices = (service: EngineService): Context.Context<HookServices<any>> =>
  Context.merge(contextOf(make("default"), service), contextOf(make(service.name), service))
