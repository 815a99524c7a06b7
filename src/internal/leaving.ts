/**
 * Whether a text of the user's has ended the transaction that it ran in, by its tags.
 */
import type { Result } from "./rows.js"
import { withoutLiterals } from "./sqlText.js"

const rollbackTo = /\brollback\s*(?:(?:work|transaction)\s*)?to\b/gi
const prepareTransaction = /\bprepare\s*transaction\b/i

const tags = new Set(["COMMIT", "ROLLBACK", "PREPARE"])

/**
 * The tag of what has ended the transaction, if there is one. That another one is open afterwards (`AND CHAIN`,
 * `ROLLBACK; BEGIN`) makes no difference: it is not the session's.
 * @internal
 */
export const leavesBy = (text: string, results: ReadonlyArray<Result>): string | undefined => {
  if (!results.some(({ command }) => tags.has(command))) return undefined
  const bare = withoutLiterals(text)
  // ROLLBACK TO SAVEPOINT has the same tag, and stays inside.
  let inside = bare.match(rollbackTo)?.length ?? 0
  for (const { command } of results) {
    if (command === "COMMIT" || (command === "ROLLBACK" && inside-- === 0)) return command
    if (command === "PREPARE" && prepareTransaction.test(bare)) return "PREPARE TRANSACTION"
  }
  return undefined
}
