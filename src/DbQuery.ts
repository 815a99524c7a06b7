/**
 * What a query is expected to return, said once.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import type { Statement } from "@effect/sql/Statement"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import { DbError } from "./DbError.js"

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
