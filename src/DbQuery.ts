/**
 * What a query is expected to return, said once.
 *
 * @since 0.1.0
 * @module
 */
import type { SqlError } from "@effect/sql/SqlError"
import type { Statement } from "@effect/sql/Statement"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import type * as Stream from "effect/Stream"
import { DbError } from "./DbError.js"
import { copyIn, copyOut } from "./internal/copy.js"

/**
 * What a statement did: the tag of the server's answer.
 *
 * @since 0.1.0
 * @category models
 */
export interface CommandStatus {
  /** `"INSERT"`, `"UPDATE"`, `"CREATE"`, ... */
  readonly command: string
  /** Rows inserted, updated, deleted or returned; nothing for a statement that has no count. */
  readonly rowCount: number | null
}

const none = (): DbError =>
  DbError.make("NoResultFound", {
    message: "The query returned no row, and exactly one was expected.",
    hint: "Use DbQuery.oneOrNone when there may be none."
  })

const many = (count: number): DbError =>
  DbError.make("MultipleResultsFound", {
    message: `The query returned ${count} rows, and at most one was expected.`,
    hint: "Narrow it, or use DbQuery.first when any one will do."
  })

/**
 * The only row. No row: `NoResultFound`; more than one: `MultipleResultsFound`.
 *
 * @since 0.1.0
 * @category queries
 */
export const one = <Row>(statement: Statement<Row>): Effect.Effect<Row, SqlError> =>
  Effect.flatMap(statement, (rows) =>
    rows.length === 1 ? Effect.succeed(rows[0] as Row) : Effect.fail(rows.length === 0 ? none() : many(rows.length))
  )

/**
 * The only row, if there is one. More than one: `MultipleResultsFound`.
 *
 * @since 0.1.0
 * @category queries
 */
export const oneOrNone = <Row>(statement: Statement<Row>): Effect.Effect<Option.Option<Row>, SqlError> =>
  Effect.flatMap(statement, (rows) =>
    rows.length > 1 ? Effect.fail(many(rows.length)) : Effect.succeed(Option.fromNullable(rows[0]))
  )

/**
 * The first row, if there is one.
 *
 * @since 0.1.0
 * @category queries
 */
export const first = <Row>(statement: Statement<Row>): Effect.Effect<Option.Option<Row>, SqlError> =>
  Effect.map(statement, (rows) => Option.fromNullable(rows[0]))

/**
 * The first column of the first row: none without a row, and none for NULL.
 *
 * @since 0.1.0
 * @category queries
 */
export const scalar = <A = unknown>(statement: Statement<any>): Effect.Effect<Option.Option<A>, SqlError> =>
  Effect.map(statement.values, (rows) => Option.fromNullable(rows[0]?.[0] as A | null | undefined))

/**
 * What the statement did, instead of its rows.
 *
 * @since 0.1.0
 * @category queries
 */
export const status = (statement: Statement<any>): Effect.Effect<CommandStatus, SqlError> =>
  Effect.map(statement.raw, (raw) => {
    const last = (Array.isArray(raw) ? raw[raw.length - 1] : raw) as CommandStatus
    return { command: last.command, rowCount: last.rowCount }
  })

/**
 * `COPY ... FROM STDIN`: sends a stream of text or bytes to the server, in the ambient session as any statement, no
 * faster than the server takes it. When the source fails or the fiber is interrupted, the server undoes the whole copy,
 * and inside a session its transaction has failed. Other statements on the same connection wait meanwhile.
 *
 * ```ts
 * const lines = Stream.make("1,100\n", "2,250\n")
 * DbQuery.copyFrom(sql`COPY entries (account, amount) FROM STDIN WITH (FORMAT csv)`, lines)
 * ```
 *
 * @since 0.1.0
 * @category copy
 */
export const copyFrom = <E, R>(
  statement: Statement<any>,
  source: Stream.Stream<string | Uint8Array, E, R>
): Effect.Effect<CommandStatus, E | SqlError, R> =>
  Effect.map(copyIn(statement, source), ({ command, rowCount }) => ({ command, rowCount }))

/**
 * `COPY ... TO STDOUT`: the server's output as it arrives, in bounded memory. Leaving the stream half-way cancels the
 * statement; inside a session its transaction has then failed.
 *
 * ```ts
 * DbQuery.copyTo(sql`COPY (SELECT * FROM entries) TO STDOUT WITH (FORMAT csv, HEADER)`)
 * ```
 *
 * @since 0.1.0
 * @category copy
 */
export const copyTo = (statement: Statement<any>): Stream.Stream<Uint8Array, SqlError> => copyOut(statement)
