/**
 * From options to the text of a transaction. Pure; nothing here is interpolated but names of our own.
 */
import * as Duration from "effect/Duration"
import * as Option from "effect/Option"
import * as Schedule from "effect/Schedule"
import { DbError } from "../DbError.js"

/**
 * PostgreSQL's isolation levels. `"read uncommitted"` behaves as `"read committed"` there.
 *
 * @since 0.1.0
 * @category models
 */
export type IsolationLevel = "read uncommitted" | "read committed" | "repeatable read" | "serializable"

/**
 * What a transaction is begun with. What is left out is the engine's or the server's default.
 *
 * @since 0.1.0
 * @category models
 */
export interface TransactionOptions {
  readonly isolation?: IsolationLevel | undefined
  readonly readOnly?: boolean | undefined
  /** With `isolation: "serializable"` and `readOnly: true`: wait for a snapshot that can never fail. */
  readonly deferrable?: boolean | undefined
  /** The server's limit of each statement in it; 0 lifts the limit. */
  readonly statementTimeout?: Duration.DurationInput | undefined
  /** The server's limit of each wait for a lock in it; 0 lifts the limit. */
  readonly lockTimeout?: Duration.DurationInput | undefined
  /** The limit of the whole block, kept by the client. */
  readonly timeout?: Duration.DurationInput | undefined
  /** Its name in errors and spans. */
  readonly name?: string | undefined
  /** Settings that last as long as the transaction (`set_config(name, value, true)`), for row-level security. */
  readonly settings?: Readonly<Record<string, string>> | undefined
}

/** What the transaction is begun with, without what is there but undefined: that must not hide a default. */
export const given = ({
  deferrable,
  isolation,
  lockTimeout,
  readOnly,
  settings,
  statementTimeout
}: TransactionOptions): TransactionOptions => ({
  ...(isolation === undefined ? undefined : { isolation }),
  ...(readOnly === undefined ? undefined : { readOnly }),
  ...(deferrable === undefined ? undefined : { deferrable }),
  ...(lockTimeout === undefined ? undefined : { lockTimeout }),
  ...(statementTimeout === undefined ? undefined : { statementTimeout }),
  ...(settings === undefined ? undefined : { settings })
})

// a lookup, so that a level that came past the types reaches no text
const levels = new Map<unknown, string>([
  ["read uncommitted", "READ UNCOMMITTED"],
  ["read committed", "READ COMMITTED"],
  ["repeatable read", "REPEATABLE READ"],
  ["serializable", "SERIALIZABLE"]
])

/** `BEGIN` with its modes; the order is the one of the manual. */
export const begin = (options: Pick<TransactionOptions, "isolation" | "readOnly" | "deferrable">): string => {
  const level = levels.get(options.isolation)
  let text = "BEGIN"
  if (level !== undefined) text += ` ISOLATION LEVEL ${level}`
  if (options.readOnly !== undefined) text += options.readOnly ? " READ ONLY" : " READ WRITE"
  if (options.deferrable !== undefined) text += options.deferrable ? " DEFERRABLE" : " NOT DEFERRABLE"
  return text
}

/**
 * The modes of `BEGIN` for the implicit transaction of a Sync group, in front of its first query. It is what SET
 * TRANSACTION does, which would warn that there is no BEGIN; the next transaction begins with the defaults again.
 */
export const modes = (
  options: Pick<TransactionOptions, "isolation" | "readOnly" | "deferrable">
): ReadonlyArray<string> => {
  const all: Array<string> = []
  const level = levels.get(options.isolation)
  if (level !== undefined) all.push(`SET transaction_isolation = '${level.toLowerCase()}'`)
  if (options.readOnly !== undefined) all.push(`SET transaction_read_only = ${options.readOnly ? "on" : "off"}`)
  if (options.deferrable !== undefined) all.push(`SET transaction_deferrable = ${options.deferrable ? "on" : "off"}`)
  return all
}

/** What the transaction sets on the server, in the order of `setConfigText`. The options are valid. */
export const settings = (
  options: Pick<TransactionOptions, "statementTimeout" | "lockTimeout" | "settings">
): ReadonlyArray<readonly [name: string, value: string]> => {
  const all: Array<readonly [string, string]> = []
  if (options.statementTimeout !== undefined) all.push(["statement_timeout", serverMillis(options.statementTimeout)])
  if (options.lockTimeout !== undefined) all.push(["lock_timeout", serverMillis(options.lockTimeout)])
  if (options.settings !== undefined) all.push(...Object.entries(options.settings))
  return all
}

// rounded up: a limit below a millisecond would be 0, which is no limit
const serverMillis = (input: Duration.DurationInput): string => String(Math.ceil(Duration.toMillis(input)))

const setConfigTexts: Array<string> = []

/** Sets `n` settings for the transaction: names and values are parameters. */
export const setConfigText = (n: number): string =>
  (setConfigTexts[n] ??=
    `SELECT ${Array.from({ length: n }, (_, i) => `set_config($${2 * i + 1},$${2 * i + 2},true)`).join(", ")}`)

/** The savepoint of a block. Ids are never used twice in a session, or siblings would end each other's. */
export const savepoint = (id: number): string => `SAVEPOINT effect_db_${id}`

/** Forgets the savepoint and keeps what was done since. */
export const release = (id: number): string => `RELEASE SAVEPOINT effect_db_${id}`

/** Undoes what was done since the savepoint, and keeps it. */
export const rollbackTo = (id: number): string => `ROLLBACK TO SAVEPOINT effect_db_${id}`

const refuse = (message: string, hint: string): DbError => DbError.make("InvalidInput", { message, hint })

const settingName = /^[a-z_][a-z0-9_$]*(\.[a-z_][a-z0-9_$]*)*$/i

const longest = 2 ** 31 - 1

/** `Duration` turns negative numbers and NaN into zero, which would lift the limit. */
export const isBelowZero = (input: unknown): boolean =>
  typeof input === "number"
    ? !(input >= 0)
    : typeof input === "bigint"
      ? input < 0n
      : typeof input === "string"
        ? input.startsWith("-")
        : Array.isArray(input) && !(Number(input[0]) * 1e9 + Number(input[1]) >= 0)

const checkDuration = (name: string, input: unknown): DbError | undefined => {
  if (input === undefined) return undefined
  const millis = isBelowZero(input) ? Option.none() : Option.map(Duration.decodeUnknown(input), Duration.toMillis)
  return Option.isSome(millis) && millis.value <= longest
    ? undefined
    : refuse(
        `The option ${name} is not a duration between 0 and ${longest} ms`,
        'Give milliseconds as a number, or a text such as "5 seconds".'
      )
}

export const checkBoolean = (name: string, input: unknown): DbError | undefined =>
  input === undefined || typeof input === "boolean"
    ? undefined
    : refuse(`The option ${name} is not a boolean`, "Give true or false, or leave it out for the default.")

const checkSettings = (input: unknown): DbError | undefined => {
  if (input === undefined) return undefined
  if (typeof input !== "object" || input === null) {
    return refuse("The option settings is not an object", 'Give names and values, as in { "app.tenant": "acme" }.')
  }
  for (const [name, value] of Object.entries(input)) {
    if (!settingName.test(name)) {
      return refuse(
        "The option settings has a name that PostgreSQL does not take",
        "A name is made of letters, digits, _ and $, in parts joined by dots, and each part begins with a letter or _."
      )
    }
    if (typeof value !== "string" || value.includes("\0") || !value.isWellFormed()) {
      return refuse(
        `The setting ${name} is not a text that PostgreSQL can store`,
        "Give a string without NUL characters and without lone surrogates; turn other values into a string first."
      )
    }
  }
  return undefined
}

/** What a block has besides the options of its transaction. */
interface BlockWords {
  readonly propagation?: unknown
  readonly currentTransaction?: unknown
  readonly retry?: unknown
  readonly verifyOutcome?: unknown
}

const propagations = ["nested", "required", "requiresNew", "mandatory", "supports", "notSupported", "never"]
const currentTransactions = ["commit", "rollback", "append", "raise"]

const checkWord = (name: string, input: unknown, allowed: ReadonlyArray<unknown>): DbError | undefined =>
  input === undefined || allowed.includes(input)
    ? undefined
    : refuse(`The option ${name} is none that there is`, `Give one of: ${allowed.join(", ")}.`)

const checkRetry = (input: unknown): DbError | undefined =>
  input === undefined || typeof input === "boolean" || Schedule.isSchedule(input)
    ? undefined
    : refuse("The option retry is neither a boolean nor a Schedule", "Give true for the default, or a Schedule.")

/** Refuses what would be wrong, or would be read as something else, on the server or by a block. */
export const validate = (options: TransactionOptions & BlockWords): DbError | undefined => {
  if (options.isolation !== undefined && !levels.has(options.isolation)) {
    return refuse("The option isolation is not an isolation level", `Give one of: ${[...levels.keys()].join(", ")}.`)
  }
  if (options.name !== undefined && typeof options.name !== "string") {
    return refuse("The option name is not a string", "Give the block a name for errors and spans, or leave it out.")
  }
  return (
    checkBoolean("readOnly", options.readOnly) ??
    checkBoolean("deferrable", options.deferrable) ??
    checkDuration("statementTimeout", options.statementTimeout) ??
    checkDuration("lockTimeout", options.lockTimeout) ??
    checkDuration("timeout", options.timeout) ??
    checkSettings(options.settings) ??
    checkWord("propagation", options.propagation, propagations) ??
    checkWord("currentTransaction", options.currentTransaction, currentTransactions) ??
    checkRetry(options.retry) ??
    checkBoolean("verifyOutcome", options.verifyOutcome)
  )
}

/** Of blocks around an effect, which can be run again or stand somewhere else: a session and a block by hand can't. */
const ofBlocks = ["propagation", "currentTransaction", "retry", "verifyOutcome"] as const

/** As `validate`, of a session or a block without a body. */
export const validateOwn = (options: TransactionOptions & BlockWords): DbError | undefined => {
  const name = ofBlocks.find((_) => options[_] !== undefined)
  return name === undefined
    ? validate(options)
    : refuse(
        `The option ${name} is not one of a session or of a block by hand`,
        "Give it to withTransaction or atomic."
      )
}

const levelOf = (isolation: IsolationLevel | undefined): IsolationLevel =>
  isolation === undefined || isolation === "read uncommitted" ? "read committed" : isolation

/**
 * The first option that a transaction begun with `current` cannot honour, if there is one. What `current` leaves out
 * counts as PostgreSQL's own default: read committed, read write, not deferrable.
 */
export const conflicts = (
  current: Pick<TransactionOptions, "isolation" | "readOnly" | "deferrable">,
  wanted: Pick<TransactionOptions, "isolation" | "readOnly" | "deferrable">
): "isolation" | "readOnly" | "deferrable" | undefined => {
  if (wanted.isolation !== undefined && levelOf(wanted.isolation) !== levelOf(current.isolation)) return "isolation"
  if (wanted.readOnly !== undefined && wanted.readOnly !== (current.readOnly ?? false)) return "readOnly"
  // not deferrable asks for nothing that a transaction already begun has not done
  if (wanted.deferrable === true && current.deferrable !== true) return "deferrable"
  return undefined
}
