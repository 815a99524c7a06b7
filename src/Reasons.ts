/**
 * The reasons by name, as types: for whoever writes down the type of what handles one of them. They are made by the
 * library alone.
 *
 * @since 0.1.0
 * @module
 */
export type { MakeFields, ReasonHandlers } from "./DbError.js"
export type {
  ReasonFields,
  ServerFields,
  ConnectionPhase,
  Holder,
  ConnectionError,
  AuthenticationError,
  AuthorizationError,
  SqlSyntaxError,
  UniqueViolation,
  ForeignKeyViolation,
  NotNullViolation,
  CheckViolation,
  ExclusionViolation,
  SerializationError,
  DeadlockError,
  LockTimeoutError,
  StatementTimeoutError,
  ReadOnlyError,
  QueryCanceled,
  ReplicaBehind,
  TransactionTimeout,
  AcquireTimeout,
  PoolClosed,
  SessionClosed,
  SessionBusy,
  ConnectionReleased,
  TransactionClosed,
  NoSession,
  PropagationError,
  TransactionAborted,
  CommitUnknown,
  InvalidInput,
  NoResultFound,
  MultipleResultsFound,
  UnknownError
} from "./internal/reasons.js"
