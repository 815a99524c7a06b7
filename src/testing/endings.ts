/**
 * Which texts begin or end transactions by themselves: what a sandbox has to know before the server does.
 */
import { DbError } from "../DbError.js"
import { withoutLiterals } from "../internal/sqlText.js"

/** What a sandbox can play, when it is all of a text. */
export type End = "BEGIN" | "COMMIT" | "ROLLBACK"

const words = /\b(?:begin|start|commit|end|rollback|abort|prepare)\b/i

/** The body of a function in SQL's own style, with its semicolons. */
const body = /\bbegin\s+atomic\b[\s\S]*?;\s*end\b/gi

const begins = /^(?:begin|start\s+transaction)\b/i
const ends = /^(?:commit|end|abort|prepare\s+transaction|rollback(?!(?:\s+(?:work|transaction))?\s+to\b))\b/i
const plain = /^(?:start\s+transaction|(?:begin|commit|end|rollback|abort)(?:\s+(?:work|transaction))?)$/i

/** Nothing: it leaves transactions alone. `"refused"`: it does more than can be played. */
export const endOf = (text: string): End | "refused" | undefined => {
  if (!words.test(text)) return undefined
  const statements = withoutLiterals(text)
    .replace(/"[^"]*(?:"|$)/g, "name")
    .replace(body, "")
    .split(";")
    .map((_) => _.trim())
    .filter((_) => _ !== "")
  if (!statements.some((_) => begins.test(_) || ends.test(_))) return undefined
  const [only] = statements
  if (statements.length > 1 || !plain.test(only!)) return "refused"
  return begins.test(only!) ? "BEGIN" : /^(?:commit|end)\b/i.test(only!) ? "COMMIT" : "ROLLBACK"
}

export const refusal = (): DbError =>
  DbError.make("InvalidInput", {
    message: "A statement was about to begin or end a transaction in SQL, and with it the sandbox of the test.",
    hint:
      "Use withTransaction, or commit and rollback of the session, which a sandbox plays, as it does a plain BEGIN, COMMIT " +
      "or ROLLBACK outside of a session. A text that ends transactions by itself needs a database of its own: DbTest.database."
  })
