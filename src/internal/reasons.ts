/**
 * The reasons of a `DbError`, one class each.
 *
 * @since 0.1.0
 */
import * as Data from "effect/Data"
import type { DbError } from "../DbError.js"
import { redactSql } from "./sqlState.js"

/**
 * What the server said of an error, without the text that may quote values.
 *
 * @since 0.1.0
 * @category models
 */
export interface ServerFields {
  readonly sqlState?: string | undefined
  /** PostgreSQL's name of the SQLSTATE, such as `unique_violation`. */
  readonly condition?: string | undefined
  readonly severity?: string | undefined
  readonly constraint?: string | undefined
  readonly table?: string | undefined
  readonly column?: string | undefined
  readonly schema?: string | undefined
  readonly dataType?: string | undefined
  readonly routine?: string | undefined
  /** The character of the statement that the error is about, counted from 1. */
  readonly position?: number | undefined
  /** The statement that has failed, its literals and numbers masked. */
  readonly statement?: string | undefined
}

/**
 * What each reason has.
 *
 * @since 0.1.0
 * @category models
 */
export interface ReasonFields extends ServerFields {
  /** What happened, and why. */
  readonly message: string
  /** What to do about it. */
  readonly hint: string
  /** Whether the same work, done again from the start of its transaction, can succeed and can do no harm. */
  readonly isRetryable: boolean
}

/**
 * When a connection was lost: while it was opened, before the statement was sent, while its answer was awaited, or while
 * COMMIT's was.
 *
 * @since 0.1.0
 * @category models
 */
export type ConnectionPhase = "connect" | "send" | "read" | "commit"

/**
 * Who has a connection of the pool, and for how long.
 *
 * @since 0.1.0
 * @category models
 */
export interface Holder {
  readonly name: string
  readonly millis: number
}

/**
 * The server cannot be reached, or the connection was lost.
 *
 * @since 0.1.0
 * @category reasons
 */
export class ConnectionError extends Data.TaggedClass("ConnectionError")<
  ReasonFields & {
    readonly phase: ConnectionPhase
    /** `host:port` or the path of the socket, where it is known. */
    readonly address?: string | undefined
    /** Node's code, such as `ECONNREFUSED`. */
    readonly code?: string | undefined
  }
> {}

/**
 * The server refused the role or its password.
 *
 * @since 0.1.0
 * @category reasons
 */
export class AuthenticationError extends Data.TaggedClass("AuthenticationError")<ReasonFields> {}

/**
 * The role may not do this, or the database does not exist.
 *
 * @since 0.1.0
 * @category reasons
 */
export class AuthorizationError extends Data.TaggedClass("AuthorizationError")<ReasonFields> {}

/**
 * The statement is not valid, or names what does not exist (class 42).
 *
 * @since 0.1.0
 * @category reasons
 */
export class SqlSyntaxError extends Data.TaggedClass("SqlSyntaxError")<ReasonFields> {}

/**
 * A row with the same key exists already.
 *
 * @since 0.1.0
 * @category reasons
 */
export class UniqueViolation extends Data.TaggedClass("UniqueViolation")<ReasonFields> {}

/**
 * A row refers to one that does not exist, or is still referred to.
 *
 * @since 0.1.0
 * @category reasons
 */
export class ForeignKeyViolation extends Data.TaggedClass("ForeignKeyViolation")<ReasonFields> {}

/**
 * A value is missing.
 *
 * @since 0.1.0
 * @category reasons
 */
export class NotNullViolation extends Data.TaggedClass("NotNullViolation")<ReasonFields> {}

/**
 * A row does not satisfy a check constraint or a view's check option.
 *
 * @since 0.1.0
 * @category reasons
 */
export class CheckViolation extends Data.TaggedClass("CheckViolation")<ReasonFields> {}

/**
 * A row conflicts with an existing one by an exclusion constraint.
 *
 * @since 0.1.0
 * @category reasons
 */
export class ExclusionViolation extends Data.TaggedClass("ExclusionViolation")<ReasonFields> {}

/**
 * The transaction conflicts with a concurrent one; do it again.
 *
 * @since 0.1.0
 * @category reasons
 */
export class SerializationError extends Data.TaggedClass("SerializationError")<ReasonFields> {}

/**
 * The server chose this transaction to resolve a deadlock; do it again.
 *
 * @since 0.1.0
 * @category reasons
 */
export class DeadlockError extends Data.TaggedClass("DeadlockError")<ReasonFields> {}

/**
 * A lock was not free in time, or at once for NOWAIT.
 *
 * @since 0.1.0
 * @category reasons
 */
export class LockTimeoutError extends Data.TaggedClass("LockTimeoutError")<ReasonFields> {}

/**
 * The statement was over its `statementTimeout`.
 *
 * @since 0.1.0
 * @category reasons
 */
export class StatementTimeoutError extends Data.TaggedClass("StatementTimeoutError")<ReasonFields> {}

/**
 * A write in a read-only transaction or on a standby.
 *
 * @since 0.1.0
 * @category reasons
 */
export class ReadOnlyError extends Data.TaggedClass("ReadOnlyError")<ReasonFields> {}

/**
 * The statement was cancelled.
 *
 * @since 0.1.0
 * @category reasons
 */
export class QueryCanceled extends Data.TaggedClass("QueryCanceled")<ReasonFields> {}

/**
 * The transaction was open, or idle, for too long.
 *
 * @since 0.1.0
 * @category reasons
 */
export class TransactionTimeout extends Data.TaggedClass("TransactionTimeout")<ReasonFields> {}

/**
 * No connection became free within `acquireTimeout`.
 *
 * @since 0.1.0
 * @category reasons
 */
export class AcquireTimeout extends Data.TaggedClass("AcquireTimeout")<
  ReasonFields & {
    /** Milliseconds. */
    readonly waited: number
    readonly holders: ReadonlyArray<Holder>
  }
> {}

/**
 * The engine is closed.
 *
 * @since 0.1.0
 * @category reasons
 */
export class PoolClosed extends Data.TaggedClass("PoolClosed")<ReasonFields> {}

/**
 * The session has ended; a handle or a fiber outlived it.
 *
 * @since 0.1.0
 * @category reasons
 */
export class SessionClosed extends Data.TaggedClass("SessionClosed")<ReasonFields> {}

/**
 * Another block of the session had not ended within `blockTimeout`.
 *
 * @since 0.1.0
 * @category reasons
 */
export class SessionBusy extends Data.TaggedClass("SessionBusy")<
  ReasonFields & {
    /** The name of the block that was waited for. */
    readonly block?: string | undefined
  }
> {}

/**
 * The connection was given back; a handle outlived it.
 *
 * @since 0.1.0
 * @category reasons
 */
export class ConnectionReleased extends Data.TaggedClass("ConnectionReleased")<ReasonFields> {}

/**
 * The transaction has ended; a handle or a fiber outlived it.
 *
 * @since 0.1.0
 * @category reasons
 */
export class TransactionClosed extends Data.TaggedClass("TransactionClosed")<ReasonFields> {}

/**
 * There is no ambient session.
 *
 * @since 0.1.0
 * @category reasons
 */
export class NoSession extends Data.TaggedClass("NoSession")<ReasonFields> {}

/**
 * The transaction that is open, or missing, is not the one that was asked for.
 *
 * @since 0.1.0
 * @category reasons
 */
export class PropagationError extends Data.TaggedClass("PropagationError")<ReasonFields> {}

/**
 * Nothing was committed: an error inside was swallowed, or the block was marked rollback-only. `statement` is the first
 * that failed.
 *
 * @since 0.1.0
 * @category reasons
 */
export class TransactionAborted extends Data.TaggedClass("TransactionAborted")<
  ReasonFields & {
    /** What the first `statement` that failed has failed with. */
    readonly firstError?: DbError | undefined
  }
> {
  constructor({ firstError, ...fields }: Omit<TransactionAborted, "_tag">) {
    super(fields.statement === undefined ? fields : { ...fields, statement: redactSql(fields.statement) })
    // it is printed as the cause already
    if (firstError !== undefined) Object.defineProperty(this, "firstError", { value: firstError })
  }
}

/**
 * The connection was lost while COMMIT, or an implicit write, was under way: it may have been done.
 *
 * @since 0.1.0
 * @category reasons
 */
export class CommitUnknown extends Data.TaggedClass("CommitUnknown")<ReasonFields> {}

/**
 * Refused before it was sent; the connection is unharmed.
 *
 * @since 0.1.0
 * @category reasons
 */
export class InvalidInput extends Data.TaggedClass("InvalidInput")<
  ReasonFields & {
    /** The number of the parameter: 1 is `$1`. */
    readonly parameter?: number | undefined
  }
> {}

/**
 * A row was wanted and there is none.
 *
 * @since 0.1.0
 * @category reasons
 */
export class NoResultFound extends Data.TaggedClass("NoResultFound")<ReasonFields> {}

/**
 * One row was wanted and there are several.
 *
 * @since 0.1.0
 * @category reasons
 */
export class MultipleResultsFound extends Data.TaggedClass("MultipleResultsFound")<ReasonFields> {}

/**
 * A standby did not come to a commit in time.
 *
 * @since 0.1.0
 * @category reasons
 */
export class ReplicaBehind extends Data.TaggedClass("ReplicaBehind")<ReasonFields> {}

/**
 * None of the others; `sqlState` tells more where the server spoke.
 *
 * @since 0.1.0
 * @category reasons
 */
export class UnknownError extends Data.TaggedClass("UnknownError")<ReasonFields> {}

export const reasonClasses = {
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
  ReplicaBehind,
  UnknownError
}

/**
 * Why it failed.
 *
 * @since 0.1.0
 * @category models
 */
export type Reason = InstanceType<(typeof reasonClasses)[keyof typeof reasonClasses]>

/**
 * @since 0.1.0
 * @category models
 */
export type ReasonTag = Reason["_tag"]

/**
 * @since 0.1.0
 * @category models
 */
export type ReasonOf<Tag extends ReasonTag> = Extract<Reason, { readonly _tag: Tag }>
