/**
 * PostgreSQL engine, connection, session and transaction for Effect.
 *
 * @since 0.1.0
 * @module effect-db
 */
export * as Database from "./Database.js"
export * as DbHttp from "./DbHttp.js"
export * as DbQuery from "./DbQuery.js"
export * as DbResolver from "./DbResolver.js"
export * as DbRegistry from "./DbRegistry.js"
export * as DbRuntime from "./DbRuntime.js"
export { DbError } from "./DbError.js"
export type { Reason, ReasonOf, ReasonTag } from "./DbError.js"
export type * as Reasons from "./Reasons.js"
export type { Combinator, CombinatorRest, Combined, Known } from "./internal/combinator.js"
export type { DbHost, DbOptions, HookServices, SqlCommenterOptions, TargetSessionAttrs } from "./DbOptions.js"
export type { Connection, ConnectionModule, ConnectionOptions, ConnectionStatus } from "./DbConnection.js"
export type { DbSql, EngineHealth, EngineModule, EngineService, EngineStats } from "./DbEngine.js"
export type { CreateSchemaOptions, DropSchemaOptions, SchemaModule, SchemaPath, WithinSchema } from "./DbSchema.js"
export type { LayerModule, Provided } from "./DbLayer.js"
export type {
  BatchResult,
  CommitToken,
  MakeOptions,
  Session,
  SessionModule,
  SessionOptions,
  SessionState,
  WaitOptions
} from "./DbSession.js"
export type {
  AtomicOptions,
  Ended,
  EndValue,
  IsolationLevel,
  ManualTransaction,
  Propagation,
  Transaction,
  TransactionCombinator,
  TransactionModule,
  TransactionOptions,
  WithTransactionOptions
} from "./DbTransaction.js"
export * from "./Default.js"
