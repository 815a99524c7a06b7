/**
 * Statements of ours that ride in front of a user's.
 */
import type { Control } from "./command.js"
import * as Sql from "./transactionSql.js"

/** @internal */
export const plain = (text: string): Control => ({ text, params: [], opens: false, named: false })

/** Sets them and says what they were: the block puts them back when it is released. */
const swapConfigText = (n: number): string =>
  `SELECT ${Array.from({ length: n }, (_, i) => `current_setting($${2 * i + 1},true), set_config($${2 * i + 1},$${2 * i + 2},true)`).join(", ")}`

/** For the transaction; with `tell`, what they were is told. @internal */
export const setConfig = (
  settings: ReadonlyArray<readonly [string, string]>,
  tell?: (before: ReadonlyArray<readonly [name: string, value: string]>) => void
): Control => ({
  text: tell === undefined ? Sql.setConfigText(settings.length) : swapConfigText(settings.length),
  params: settings.flat(),
  opens: false,
  named: true,
  done:
    tell === undefined
      ? undefined
      : (ok, row) => {
          if (ok && row !== undefined) tell(settings.map(([name], i) => [name, (row[i * 2] as string | null) ?? ""]))
        }
})
