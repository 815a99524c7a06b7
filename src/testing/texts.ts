/**
 * What a text does to the transaction that it runs in: its savepoints, and the settings that end with it.
 */
import { withoutLiterals } from "../internal/sqlText.js"

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

const setting = "[a-z_][\\w$]*(?:\\.[a-z_][\\w$]*)*"
const setLocal = new RegExp(`\\bset\\s+local\\s+(time\\s+zone|${setting})`, "gi")
const setConfig = new RegExp(`\\bset_config\\s*\\(\\s*'(${setting})'\\s*,[^,]*,\\s*(?:true\\b|'t(?:rue)?')`, "gi")

/** The names of the settings that a text of the user's changes until the end of the transaction. */
export const localSettings = (text: string): ReadonlyArray<string> =>
  /\bset/i.test(text)
    ? [...withoutLiterals(text).matchAll(setLocal), ...text.matchAll(setConfig)].map(([, name]) =>
        name!.replace(/\s+/, "").toLowerCase()
      )
    : []
