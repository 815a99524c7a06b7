/**
 * What `sql.insert`, `sql.update` and `sql.updateValues` are given. The ecosystem's compiler takes the columns of the
 * first row for all, and NULL for what is no value: what it would leave out is refused.
 */
import * as Statement from "@effect/sql/Statement"
import { DbError } from "../DbError.js"

type Row = Readonly<Record<string, unknown>>

const nothingToUpdate = "Skip the statement when there is nothing to update."

const refuse = (helper: string, message: string, hint: string): DbError =>
  DbError.make("InvalidInput", { message: `sql.${helper} was given ${message}`, hint })

/** Why these segments of a statement can't be sent as what they say. @internal */
export const checkRecords = (segment: Statement.Segment): DbError | undefined => {
  switch (segment._tag) {
    case "RecordInsertHelper":
      return checkRows(
        "insert",
        segment.value,
        "Skip the statement when there is nothing to insert.",
        "Write DEFAULT VALUES for a row that has nothing but defaults."
      )
    case "RecordUpdateHelper":
      return checkRows("updateValues", segment.value, nothingToUpdate, nothingToUpdate)
    case "RecordUpdateHelperSingle": {
      const columns = Object.keys(segment.value).filter((key) => !segment.omit.includes(key))
      return columns.length === 0
        ? refuse("update", "no columns", nothingToUpdate)
        : checkValues("update", segment.value, columns)
    }
    default:
      return undefined
  }
}

const checkRows = (
  helper: string,
  rows: ReadonlyArray<Row>,
  noRows: string,
  noColumns: string
): DbError | undefined => {
  const first = rows[0]
  if (first === undefined) return refuse(helper, "no rows", noRows)
  const columns = Object.keys(first)
  if (columns.length === 0) return refuse(helper, "no columns", noColumns)
  for (const [at, row] of rows.entries()) {
    for (const key in row) {
      if (key in first || row[key] === undefined) continue
      return refuse(
        helper,
        `a column in row ${at + 1} that the first row does not have`,
        "Give all rows the same columns, with null where there is no value: those of the first are taken."
      )
    }
    const bad = checkValues(helper, row, columns)
    if (bad !== undefined) return bad
  }
  return undefined
}

const checkValues = (helper: string, row: Row, columns: ReadonlyArray<string>): DbError | undefined => {
  for (const column of columns) {
    const value = row[column]
    if (typeof value !== "object" || !Statement.isFragment(value)) continue
    // An empty one has none.
    const _tag = value.segments[0]?._tag
    if (_tag === "Custom" || _tag === "Parameter") continue
    return refuse(
      helper,
      "a piece of SQL as a value",
      "It takes values and sql.json; write the columns and VALUES out where one is an expression."
    )
  }
  return undefined
}
