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

/** For the transaction; with `before`, what they were is written down there. @internal */
export const setConfig = (
  settings: ReadonlyArray<readonly [string, string]>,
  before?: Array<readonly [name: string, value: string]>
): Control => ({
  text: before === undefined ? Sql.setConfigText(settings.length) : swapConfigText(settings.length),
  params: settings.flat(),
  opens: false,
  named: true,
  ...(before === undefined
    ? {}
    : {
        done: (ok: boolean, row: ReadonlyArray<unknown> | undefined) => {
          if (!ok || row === undefined) return
          settings.forEach(([name], i) => before.push([name, (row[i * 2] as string | null) ?? ""]))
        }
      })
})
