/**
 * The default database: the vocabulary that the package's root exports.
 *
 * The identities of all databases are declared here, beside the values of the same name. Of an alias a compiler that
 * writes declarations says that it can't name it.
 *
 * @since 0.1.0
 */
import * as Database from "./Database.js"
import type * as schemas from "./DbSchema.js"

const database = Database.make("default")

/**
 * The engine: one database, its pool, its host.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbEngine = database.DbEngine
/**
 * The identity of a database's engine in the types: what a program that needs it has in `R`.
 *
 * @since 0.1.0
 * @category nouns
 */
export interface DbEngine<Name extends string = "default"> {
  readonly "effect-db/DbEngine": Name
}

/**
 * The connection: a wrapper of at most one borrowed raw connection.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbConnection = database.DbConnection
/**
 * The identity of a database's connection in the types.
 *
 * @since 0.1.0
 * @category nouns
 */
export interface DbConnection<Name extends string = "default"> {
  readonly "effect-db/DbConnection": Name
}

/**
 * The session: a unit of work with a lazy connection and a lazy transaction.
 *
 * @since 0.1.0
 * @category nouns
 */
export const DbSession = database.DbSession
/**
 * The identity of a database's session in the types.
 *
 * @since 0.1.0
 * @category nouns
 */
export interface DbSession<Name extends string = "default"> {
  readonly "effect-db/DbSession": Name
}

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
