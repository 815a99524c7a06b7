/**
 * What a text does to the transaction that it runs in: its savepoints.
 */
import { withoutLiterals } from "../internal/sqlState.js"

const name = `("(?:[^"]|"")+"|[^\\s";]+)`
const step = new RegExp(
  `^(?:(savepoint)|(release)(?:\\s+savepoint)?|rollback(?:\\s+(?:work|transaction))?\\s+to(?:\\s+savepoint)?)(?:\\s+|(?="))${name}$`,
  "i"
)

const plainName = (written: string): string =>
  written.startsWith('"') ? written.slice(1, -1).replaceAll('""', '"') : written.toLowerCase()

const stepsOf = (text: string): ReadonlyArray<RegExpExecArray | null> =>
  withoutLiterals(text)
    .split(/;(?=(?:[^"]*"[^"]*")*[^"]*$)/)
    .map((_) => _.trim())
    .filter((_) => _ !== "")
    .map((_) => step.exec(_))

const words = /\b(?:savepoint|release|rollback)\b/i

/** Brings the names of the savepoints that are open up to date, the innermost last, after a text that has succeeded. */
export const follow = (savepoints: Array<string>, text: string): void => {
  if (!words.test(text)) return
  for (const found of stepsOf(text)) {
    if (found === null) continue
    const [, opens, releases, written] = found
    const which = plainName(written!)
    const at = savepoints.lastIndexOf(which)
    if (opens !== undefined) savepoints.push(which)
    else if (at !== -1) savepoints.length = releases === undefined ? at + 1 : at
  }
}

/** It begins with what the server still takes in a transaction that has failed. */
export const rollsBackTo = (text: string): boolean => {
  const [first] = words.test(text) ? stepsOf(text) : []
  return first !== undefined && first !== null && first[1] === undefined && first[2] === undefined
}
