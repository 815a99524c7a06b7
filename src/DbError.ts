/**
 * What can go wrong, as one error with a tagged reason.
 *
 * Every failure of this library is a `SqlError` of `@effect/sql`, so that programs written for the ecosystem handle it;
 * `DbError` adds the reason. Nothing that is printed by default (`message`, JSON, inspection, `Cause.pretty`) holds a
 * parameter's value, a row or a password.
 *
 * @since 0.1.0
 */
import * as SqlError from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import { dual } from "effect/Function"
import { NodeInspectSymbol } from "effect/Inspectable"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import type {
  ConnectionPhase,
  Reason,
  Reason as Reason_,
  ReasonOf,
  ReasonOf as ReasonOf_,
  ReasonTag,
  ReasonTag as ReasonTag_
} from "./internal/reasons.js"
import { reasonClasses } from "./internal/reasons.js"
import { reasonDefaults } from "./internal/reasonText.js"
import type { Described, ErrorContext, ServerError } from "./internal/sqlState.js"
import { describeServer, describeSocket, isServerError, redactedCause } from "./internal/sqlState.js"

export type { Reason, ReasonOf, ReasonTag } from "./internal/reasons.js"

/**
 * @since 0.1.0
 * @category type ids
 */
export const TypeId: unique symbol = Symbol.for("effect-db/DbError")

/**
 * @since 0.1.0
 * @category type ids
 */
export type TypeId = typeof TypeId

/**
 * The fields of a reason as they are given: what is left out gets the reason's own words.
 *
 * @since 0.1.0
 * @category models
 */
export type MakeFields<Tag extends ReasonTag> = Omit<ReasonOf<Tag>, "_tag" | "message" | "hint" | "isRetryable"> & {
  readonly message?: string | undefined
  readonly hint?: string | undefined
  readonly isRetryable?: boolean | undefined
  /** Kept for `error.serverError`; `error.cause` is a copy without the text, unless it is a `DbError`. */
  readonly cause?: unknown
}

/**
 * Handlers by reason, for `DbError.catchReasons`.
 *
 * @since 0.1.0
 * @category models
 */
export type ReasonHandlers = {
  readonly [Tag in ReasonTag]?: (reason: ReasonOf<Tag>, error: DbError) => Effect.Effect<unknown, unknown, unknown>
}

type Handled<Cases> = {
  [Tag in keyof Cases]: Cases[Tag] extends (...args: never) => Effect.Effect<infer A, infer E, infer R>
    ? Effect.Effect<A, E, R>
    : never
}[keyof Cases]

/** Refuses a handler for what is no reason, a misspelt one for example. */
type OnlyReasons<Cases> = { readonly [Tag in Exclude<keyof Cases, ReasonTag>]: never }

class View extends Error {
  static {
    Object.defineProperty(this, "name", { value: "DbError" })
    Object.defineProperty(this.prototype, "name", { value: "DbError" })
  }
}

/**
 * The error of this library: a `SqlError` with a tagged `reason`.
 *
 * `message` is the reason's message and hint. `cause` is another `DbError`, or a copy of what `pg` or Node raised without
 * its text; it is not enumerable. The server's own words, which may quote values, are in `serverError` only, which
 * nothing prints.
 *
 * @since 0.1.0
 * @category errors
 */
export class DbError extends SqlError.SqlError {
  readonly reason: Reason
  readonly #serverError: unknown

  constructor(options: { readonly reason: Reason; readonly cause?: unknown }) {
    const { cause, reason } = options
    super({ message: `${reason.message.replace(/\.$/, "")}. ${reason.hint}` })
    this.reason = reason
    this.#serverError = DbError.is(cause) ? cause.serverError : cause
    if (cause !== undefined) {
      Object.defineProperty(this, "cause", { value: DbError.is(cause) ? cause : redactedCause(cause) })
    }
  }

  get [TypeId](): TypeId {
    return TypeId
  }

  /** What the server, `pg` or the socket said, as it came. It may quote values: do not log it where they must not be. */
  get serverError(): unknown {
    return this.#serverError
  }

  /** Whether the same work, done again from the start of its transaction, can succeed and can do no harm. */
  get isRetryable(): boolean {
    return this.reason.isRetryable
  }

  /** What is printed: the reason, without the text of the server, which may quote values. */
  override toJSON(): unknown {
    const { _tag, cause, isRetryable, message, reason } = this
    return { _tag, message, isRetryable, reason, ...(DbError.is(cause) ? { cause } : undefined) }
  }

  /** What Node prints. A copy: with the right options, inspection would call the getters of the original. */
  override [NodeInspectSymbol](): unknown {
    const { cause, reason, stack } = this
    return Object.assign(new View(this.message, cause === undefined ? undefined : { cause }), { stack, reason })
  }

  static {
    // on the prototype, so that the stack starts with it
    Object.defineProperty(this.prototype, "name", { value: "DbError", configurable: true, writable: true })
  }

  /** Whether something is a `DbError`. */
  static readonly is = (u: unknown): u is DbError => Predicate.hasProperty(u, TypeId)

  /** The reason of a `DbError`; `undefined` for everything else. */
  static readonly reason = (error: unknown): Reason | undefined => (DbError.is(error) ? error.reason : undefined)

  /**
   * Whether the same work can be done again; false for what is not a `DbError`.
   *
   * ```ts
   * work.pipe(Effect.retry({ while: DbError.isRetryable, times: 3 }))
   * ```
   */
  static readonly isRetryable = (error: unknown): boolean => DbError.is(error) && error.isRetryable

  /** An error of the given reason; a message, a hint and `isRetryable` that are left out are the reason's own. */
  static readonly make = <Tag extends ReasonTag>(tag: Tag, fields: MakeFields<Tag>): DbError => {
    const defaults = reasonDefaults[tag]
    const { cause, ...given }: MakeFields<ReasonTag> & { readonly firstError?: DbError | undefined } = fields
    const { firstError } = given
    const all: Record<string, unknown> = {
      message: firstError === undefined ? defaults.message : `${defaults.message} (${firstError.reason.message})`,
      hint: defaults.hint,
      // nothing of an aborted transaction remains, so it is as retryable as what it failed with
      isRetryable: defaults.isRetryable ?? firstError?.isRetryable ?? false
    }
    for (const [key, value] of Object.entries(given)) if (value !== undefined) all[key] = value
    const Class = reasonClasses[tag] as unknown as new (fields: object) => Reason
    return new DbError({ reason: new Class(all), cause: cause ?? firstError })
  }

  /**
   * What an ErrorResponse means.
   *
   * @internal
   */
  static readonly fromServer = (error: ServerError, context?: ErrorContext): DbError =>
    DbError.described(describeServer(error, context), error)

  /**
   * What an error of a socket, of TLS or of `pg` itself means.
   *
   * @internal
   */
  static readonly fromSocket = (
    cause: unknown,
    phase: ConnectionPhase,
    where?: string | undefined,
    retryable?: boolean | undefined
  ): DbError => {
    if (DbError.is(cause)) return cause
    if (isServerError(cause)) return DbError.fromServer(cause, { phase, where, retryable })
    return DbError.described(describeSocket(cause, phase, { where, retryable }), cause)
  }

  /**
   * For a statement that was not run because an earlier one of its group had failed.
   *
   * @internal
   */
  static readonly skipped = (firstError: DbError): DbError =>
    DbError.make("TransactionAborted", {
      message: "The statement was not run: one that was sent together with it, before it, has failed",
      firstError
    })

  // the tag and the fields fit each other by construction of `Described`
  private static described({ fields, tag }: Described, cause: unknown): DbError {
    return DbError.make(tag, { ...fields, cause } as MakeFields<ReasonTag>)
  }

  /**
   * Handles one reason; every other failure passes unchanged.
   *
   * ```ts
   * register("ada").pipe(DbError.catchReason("UniqueViolation", (reason) => Effect.succeed(reason.constraint)))
   * ```
   */
  static readonly catchReason: {
    <Tag extends ReasonTag, A2, E2, R2>(
      tag: Tag,
      handler: (reason: ReasonOf<Tag>, error: DbError) => Effect.Effect<A2, E2, R2>
    ): <A, E, R>(self: Effect.Effect<A, E, R>) => Effect.Effect<A | A2, E | E2, R | R2>
    <A, E, R, Tag extends ReasonTag, A2, E2, R2>(
      self: Effect.Effect<A, E, R>,
      tag: Tag,
      handler: (reason: ReasonOf<Tag>, error: DbError) => Effect.Effect<A2, E2, R2>
    ): Effect.Effect<A | A2, E | E2, R | R2>
  } = dual(
    3,
    <A, E, R, A2, E2, R2>(
      self: Effect.Effect<A, E, R>,
      tag: ReasonTag,
      handler: (reason: Reason, error: DbError) => Effect.Effect<A2, E2, R2>
    ): Effect.Effect<A | A2, E | E2, R | R2> =>
      Effect.catchSome(self, (error) =>
        DbError.is(error) && error.reason._tag === tag ? Option.some(handler(error.reason, error)) : Option.none()
      )
  )

  /**
   * Handles several reasons; every other failure passes unchanged.
   *
   * ```ts
   * transfer(1, 2, 100).pipe(
   *   DbError.catchReasons({
   *     CheckViolation: () => Effect.fail("overdrawn" as const),
   *     ForeignKeyViolation: () => Effect.fail("no such account" as const)
   *   })
   * )
   * ```
   */
  static readonly catchReasons: {
    <const Cases extends ReasonHandlers>(
      cases: Cases & OnlyReasons<Cases>
    ): <A, E, R>(
      self: Effect.Effect<A, E, R>
    ) => Effect.Effect<
      A | Effect.Effect.Success<Handled<Cases>>,
      E | Effect.Effect.Error<Handled<Cases>>,
      R | Effect.Effect.Context<Handled<Cases>>
    >
    <A, E, R, const Cases extends ReasonHandlers>(
      self: Effect.Effect<A, E, R>,
      cases: Cases & OnlyReasons<Cases>
    ): Effect.Effect<
      A | Effect.Effect.Success<Handled<Cases>>,
      E | Effect.Effect.Error<Handled<Cases>>,
      R | Effect.Effect.Context<Handled<Cases>>
    >
  } = dual(2, <A, E, R>(self: Effect.Effect<A, E, R>, cases: ReasonHandlers) =>
    Effect.catchSome(self, (error) => {
      if (!DbError.is(error)) return Option.none()
      const handler = cases[error.reason._tag] as
        ((reason: Reason, error: DbError) => Effect.Effect<unknown, unknown, unknown>) | undefined
      return handler === undefined ? Option.none() : Option.some(handler(error.reason, error))
    })
  )
}

/**
 * @since 0.1.0
 */
export declare namespace DbError {
  /**
   * Why it failed.
   *
   * @since 0.1.0
   * @category models
   */
  export type Reason = Reason_

  /**
   * @since 0.1.0
   * @category models
   */
  export type ReasonTag = ReasonTag_

  /**
   * @since 0.1.0
   * @category models
   */
  export type ReasonOf<Tag extends ReasonTag_> = ReasonOf_<Tag>
}
