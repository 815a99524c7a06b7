/**
 * The default database: the vocabulary that the package's root exports.
 *
 * @since 0.1.0
 */
import * as Database from "./Database.js"
import type * as connections from "./DbConnection.js"
import type * as engines from "./DbEngine.js"
import type * as schemas from "./DbSchema.js"
import type * as sessions from "./DbSession.js"

const database = Database.make("default")

/**
 * The engine: one database, its pool, its host.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbEngine = database.DbEngine
/**
 * @since 0.1.0
 * @category nouns
 */
export type DbEngine<Name extends string = "default"> = engines.DbEngine<Name>

/**
 * The connection: a wrapper of at most one borrowed raw connection.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbConnection = database.DbConnection
/**
 * @since 0.1.0
 * @category nouns
 */
export type DbConnection<Name extends string = "default"> = connections.DbConnection<Name>

/**
 * The session: a unit of work with a lazy connection and a lazy transaction.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbSession = database.DbSession
/**
 * @since 0.1.0
 * @category nouns
 */
export type DbSession<Name extends string = "default"> = sessions.DbSession<Name>

/**
 * The transaction around the fiber.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbTransaction = database.DbTransaction

/**
 * Schemas and tenants: where the unqualified names of an effect's statements are looked up.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbSchema = database.DbSchema
/**
 * @since 0.1.0
 * @category nouns
 */
export declare namespace DbSchema {
  /**
   * @since 0.1.0
   * @category models
   */
  export type SchemaPath = schemas.SchemaPath
}

/**
 * The layer of the default database.
 *
 * @since 0.1.0
 * @category layers
 */
export const DbLayer = database.DbLayer

/**
 * Runs an effect as an atomic block: a savepoint inside a session, else a transaction of its own.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withTransaction = database.withTransaction

/**
 * Runs an effect as a transaction that commits by itself, also inside a session, which stays open.
 *
 * @since 0.1.0
 * @category combinators
 */
export const atomic = database.atomic

/**
 * The ecosystem's `SqlClient` and `PgClient` of the default database.
 *
 * @since 0.1.0
 * @category layers
 */
export const sqlClientLayer = database.sqlClientLayer
