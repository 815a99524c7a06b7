/**
 * A statement's text as it may be shown to those who watch: its literals masked, and a summary of few words. The rules
 * are OpenTelemetry's, those of the comment sqlcommenter's.
 */
import { maskSql, withoutNumbers } from "./sqlState.js"
import { withoutLiterals } from "./sqlText.js"

/** What is told of a text. @internal */
export interface Described {
  /** What it does to what: `INSERT orders SELECT carts`. Empty, when it can't be told. */
  readonly summary: string
  /** The text without literals and comments. */
  readonly text: string
}

/** What the server reads as commands and names: the text with its literals emptied, and a space for each comment. @internal */
export const codeOf = (text: string): string => withoutLiterals(text, "''", " ")

/** Which way the data of a COPY go between the server and its client: from it or to it. @internal */
export type Copies = "in" | "out" | undefined

const copyTokens = /[\p{L}_][\p{L}\p{N}_$]*|\S/gu

/** What each statement of a text copies. @internal */
export const copiesOf = (text: string): ReadonlyArray<Copies> => {
  const found: Array<Copies> = []
  if (!/\bcopy\b/i.test(text)) return found
  // In parentheses are columns, options, and a query with a FROM of its own.
  let depth = 0
  let copying = false
  let way = ""
  let before = ";"
  for (const [token] of withoutLiterals(text, "'", " ", '"').matchAll(copyTokens)) {
    const word = token.toLowerCase()
    if (depth === 0 && before === ";" && word !== ";") {
      found.push(undefined)
      copying = word === "copy"
      way = ""
    } else if (depth === 0 && copying && way !== "") {
      // The server takes either for the other.
      if (word === "stdin" || word === "stdout") found[found.length - 1] = way === "from" ? "in" : "out"
      copying = false
    } else if (depth === 0 && copying && before !== "." && (word === "from" || word === "to")) {
      way = word
    }
    if (word === "(") depth++
    else if (word === ")") depth = Math.max(0, depth - 1)
    before = word
  }
  return found
}

const known = new Map<string, Described>()
const knownTexts = 1024

/** Remembered, since texts repeat. @internal */
export const describeSql = (text: string): Described => {
  let described = known.get(text)
  if (described === undefined) {
    const masked = maskSql(text).replaceAll("'...'", "?")
    described = {
      summary: summaryOf(masked),
      // A text with parameters keeps its constants; one without may have had values put into it.
      text: /\$\d/.test(masked) ? masked.trim() : withoutNumbers(masked).trim()
    }
    if (text.length < 16384) {
      if (known.size >= knownTexts) known.clear()
      known.set(text, described)
    }
  }
  return described
}

const word = String.raw`(?:"[^"]*"|[\p{L}_][\p{L}\p{N}_$]*)`
const tokens = new RegExp(String.raw`${word}(?:\s*\.\s*${word})*|[(),;]`, "gu")

/** Words between a command and what it is done to. */
const fillers = new Set(
  "OR REPLACE GLOBAL LOCAL TEMP TEMPORARY UNLOGGED UNIQUE RECURSIVE MATERIALIZED IF NOT EXISTS CONCURRENTLY ONLY LATERAL".split(
    " "
  )
)

const kinds = new Set(
  "TABLE VIEW INDEX SCHEMA SEQUENCE TYPE FUNCTION PROCEDURE TRIGGER DATABASE EXTENSION ROLE USER DOMAIN".split(" ")
)

/** Commands with a kind of thing and its name behind them, and those with the name alone. */
const onKinds = new Set(["CREATE", "ALTER", "DROP", "REFRESH", "TRUNCATE", "LOCK"])
const onNames = new Set(["TRUNCATE", "LOCK", "COPY", "CALL", "VACUUM", "ANALYZE"])

/** After these the word is a clause of another operation: `FOR UPDATE`, `ON DELETE CASCADE`, `DO UPDATE`, `THEN INSERT`. */
const notOperation = new Set(["FOR", "KEY", "ON", "DO", "THEN", "OR", "BEFORE", "AFTER", "OF"])

const longest = 255

/** By rule of thumb: a text that it misreads gets a poor summary, no wrong one. */
const summaryOf = (text: string): string => {
  const found = text.match(tokens) ?? []
  const parts: Array<string> = []
  /** The operation of each depth of parentheses that still waits for its FROM, INTO or USING. */
  let open: Array<string> = [""]
  /** A target may come now; `"list"`: and others, behind commas. */
  let wants: "" | "one" | "list" = ""
  /** At which depth a comma brings the next target. */
  let listing = -1
  let begins = true
  for (let i = 0; i < found.length; i++) {
    const token = found[i]!
    const upper = token.toUpperCase()
    const before = i === 0 ? "" : found[i - 1]!.toUpperCase()
    const depth = open.length - 1
    if (token === "(") {
      open.push("")
      wants = ""
    } else if (token === ")") {
      if (depth > 0) open.pop()
      if (listing >= open.length) listing = -1
    } else if (token === ",") {
      if (listing === depth) wants = "list"
    } else if (token === ";") {
      open = [""]
      wants = ""
      listing = -1
      begins = true
      continue
    } else if (/^(?:SELECT|INSERT|UPDATE|DELETE|MERGE)$/.test(upper) && !notOperation.has(before)) {
      parts.push(token)
      open[depth] = upper
      wants = upper === "UPDATE" ? "one" : ""
      listing = -1
    } else if (begins && upper !== "WITH") {
      parts.push(token)
      if (onKinds.has(upper) || onNames.has(upper)) {
        let at = i + 1
        while (at < found.length && fillers.has(found[at]!.toUpperCase())) at++
        const kind = found[at]?.toUpperCase() ?? ""
        if (onKinds.has(upper) && kinds.has(kind)) {
          parts.push(found[at]!)
          at++
          while (at < found.length && fillers.has(found[at]!.toUpperCase())) at++
        } else if (!onNames.has(upper)) at = found.length
        const name = found[at]
        if (name !== undefined && /^[^(),;]/.test(name)) parts.push(name)
        i = Math.min(at, found.length - 1)
      }
    } else if (wants !== "" && !fillers.has(upper)) {
      // A function is nothing that rows are kept in.
      if (found[i + 1] !== "(" || open[depth] === "INSERT") parts.push(token)
      listing = wants === "list" ? depth : -1
      wants = ""
    } else if (upper === "FROM" && before !== "DISTINCT" && /SELECT|DELETE|UPDATE/.test(open[depth]!)) {
      wants = "list"
      open[depth] = "FROM"
    } else if (upper === "JOIN" || (upper === "USING" && open[depth] === "MERGE")) {
      wants = "one"
    } else if (upper === "INTO" && /INSERT|MERGE/.test(open[depth]!)) {
      wants = "one"
    } else if (/^(?:WHERE|SET|GROUP|ORDER|HAVING|LIMIT|OFFSET|WINDOW|RETURNING|UNION|VALUES|ON)$/.test(upper)) {
      listing = -1
      wants = ""
    }
    begins = false
  }
  let summary = ""
  for (const part of parts) {
    const longer = summary === "" ? part : `${summary} ${part}`
    if (longer.length > longest) break
    summary = longer
  }
  return summary
}

/** Pairs of a sqlcommenter comment, already in its form. */
const pair = (key: string, value: string): string => `${encoded(key)}='${encoded(value)}'`

const encoded = (text: string): string => encodeURIComponent(text).replace(/'/g, "\\'")

/**
 * The text with the pairs in a comment at its end, by the rules of sqlcommenter: keys in order, everything encoded, and
 * a text that has a comment already is left alone.
 * @internal
 */
export const withComment = (text: string, pairs: Readonly<Record<string, string>>): string => {
  const keys = Object.keys(pairs)
  if (keys.length === 0 || text.includes("/*") || text.includes("--")) return text
  const comment = keys
    .map((key) => pair(key, pairs[key]!))
    .sort()
    .join(",")
  return `${text} /*${comment}*/`
}
