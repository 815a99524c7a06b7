/**
 * What a server or a socket said, told in words that can be shown: the text of a server quotes values, so nothing of it
 * is passed on unless it can only name things that the program itself wrote.
 */
import * as Predicate from "effect/Predicate"
import type { ConnectionPhase, ReasonTag, ServerFields } from "./reasons.js"
import { withoutLiterals } from "./sqlText.js"
import {
  conditionName,
  hintsByState,
  miscountedHint,
  misplacedHint,
  reasonDefaults,
  sentencesByState,
  settingSentence,
  socketSentences,
  startupSentences,
  tlsSentences,
  valueSentence
} from "./reasonText.js"

/** The fields of an ErrorResponse, as `pg` names them. */
export interface ServerError {
  readonly code?: string | undefined
  readonly severity?: string | undefined
  readonly message?: string | undefined
  readonly detail?: string | undefined
  readonly hint?: string | undefined
  readonly position?: string | number | undefined
  readonly internalQuery?: string | undefined
  readonly where?: string | undefined
  readonly schema?: string | undefined
  readonly table?: string | undefined
  readonly column?: string | undefined
  readonly dataType?: string | undefined
  readonly constraint?: string | undefined
  readonly routine?: string | undefined
}

/** What the caller knows about the moment in which an error came. */
export interface ErrorContext {
  readonly phase?: ConnectionPhase | undefined
  /** The text that was sent, without values: it proves which words of the server's text are the program's own. */
  readonly statement?: string | undefined
  /** What the program gave it besides, where all of it may be shown that the server speaks of: names of settings. */
  readonly names?: ReadonlyArray<string> | undefined
  /** A cancel of ours was under way: 57014 is told apart by text only, and that text may be translated. */
  readonly canceledByUs?: boolean | undefined
  /** The engine wants a writable host, so 25006 says that this host no longer is one. */
  readonly targetReadWrite?: boolean | undefined
  /** For lost connections: whether nothing can have been done. Default: only while connecting. */
  readonly retryable?: boolean | undefined
  /** How many characters were sent before `statement`: the server counts its position from the first of them. */
  readonly offset?: number | undefined
  /** `host:port` or the path of the socket. */
  readonly where?: string | undefined
}

/** A reason before it has a class. */
export interface Described {
  readonly tag: ReasonTag
  readonly fields: ServerFields & {
    readonly message: string
    readonly hint?: string | undefined
    readonly isRetryable?: boolean | undefined
    readonly phase?: ConnectionPhase | undefined
    readonly code?: string | undefined
    readonly address?: string | undefined
  }
}

/** Whether something is an ErrorResponse. Node's codes have letters too ("EPIPE"), but no severity. */
export const isServerError = (u: unknown): u is ServerError =>
  Predicate.hasProperty(u, "code") &&
  typeof u.code === "string" &&
  /^[0-9A-Z]{5}$/.test(u.code) &&
  Predicate.hasProperty(u, "severity") &&
  u.severity !== undefined

/** A named statement whose result has changed since it was planned. The routine is never translated, the text is. */
export const isStalePlan = (e: ServerError): boolean =>
  e.code === "0A000" &&
  (e.routine === "RevalidateCachedQuery" || e.message === "cached plan must not change result type")

/** Another number of values than the statement has parameters: a violation of the protocol that leaves the connection whole. */
const isMiscounted = (e: ServerError): boolean =>
  e.code === "08P01" && e.severity === "ERROR" && e.routine === "exec_bind_message"

const miscounted = (e: ServerError): string => {
  const [, given, wanted] = /supplies (\d+) parameters?, .* requires (\d+)$/.exec(e.message ?? "") ?? []
  const counts = given === undefined ? "" : `: ${given} for ${wanted}`
  return `The statement was given another number of values than it has parameters${counts}`
}

/**
 * Whether the raw connection has to be destroyed after this error. An answer without an SQLSTATE is not one of
 * PostgreSQL's; everything not listed leaves a connection that a ROLLBACK makes usable again.
 */
export const connectionIsLost = (
  e: ServerError,
  options?: { readonly readWriteTarget?: boolean | undefined }
): boolean => {
  const { code, severity } = e
  if (code === undefined || severity === "FATAL" || severity === "PANIC") return true
  if (isMiscounted(e)) return false
  if (code.startsWith("08") || code.startsWith("57P")) return true
  switch (code) {
    case "25P03":
    case "25P04":
    case "26000":
      return true
    case "25006":
      return options?.readWriteTarget === true
    default:
      return isStalePlan(e)
  }
}

// -----------------------------------------------------------------------------
// text that may be shown
// -----------------------------------------------------------------------------

const maxStatement = 1000

/** A statement's text for those who watch: literals masked (`PASSWORD '...'` is one), comments dropped, length bounded. */
export const maskSql = (text: string): string =>
  text.length > maxStatement ? `${withoutLiterals(text.slice(0, maxStatement))}...` : withoutLiterals(text)

/** For an error: numbers are masked as well, since a card's may have been put into the text. */
export const redactSql = (text: string): string => withoutNumbers(maskSql(text))

const numbers = /"[^"]*(?:"|$)|(?<![\p{L}\p{N}_$])(?:0[xob][\da-f_]+|(?:\d[\d_]*)?\.?\d[\d_]*(?:e[+-]?\d+)?)/giu

/** Parameters ($1) and names with digits stay. */
export const withoutNumbers = (text: string): string =>
  text.replace(numbers, (part) => (part.startsWith('"') ? part : "?"))

/** The UTF-16 offset of the server's position, which counts characters from one. */
const offsetOf = (statement: string, position: number): number => {
  let offset = 0
  for (let i = 1; i < position && offset < statement.length; i++) {
    offset += statement.codePointAt(offset)! > 0xffff ? 2 : 1
  }
  return offset
}

const token = /[\p{L}_][\p{L}\p{N}_$]*|\$\d+|[^\s\p{L}\p{N}'"$]/uy
const literal = /'|\$(?!\d)|[ebxn]'|u&'|[\d.]/iy

const matchAt = (pattern: RegExp, text: string, offset: number): string | undefined => {
  pattern.lastIndex = offset
  return pattern.exec(text)?.[0]
}

/** Words of PostgreSQL's own sentences. Whatever else a sentence says is a name or a value. */
const vocabulary = new Set(
  (
    "a access aggregate already argument arguments be cannot cast column constraint cursor database denied does " +
    "execute exist exists extension for foreign function in index is key language materialized must named no not " +
    "of on only operator or owner parameter permission policy prepared procedure publication read referenced " +
    "relation role row schema security sequence server statement subscription table tablespace the to transaction " +
    "trigger type types user view"
  ).split(" ")
)

const maxSearched = 20_000

const wordsOf = (text: string): ReadonlyArray<string> => text.toLowerCase().match(/[\p{L}\p{N}_$]+/gu) ?? []

/**
 * The server's sentence, if it can hold no value: either it was said of a place in our text (errors about parameters and
 * rows have no such place), or each of its words is PostgreSQL's or stands in our text. `$1::regclass` with a value in
 * `$1` is why the code alone proves nothing.
 */
const ownText = (e: ServerError, context: ErrorContext): string | undefined => {
  const { message } = e
  const { statement } = context
  if (!message) return undefined
  if (isStalePlan(e)) return "cached plan must not change result type"
  const position = positionOf(e, context)
  if (position !== undefined && e.code?.startsWith("42")) {
    // the scanner quotes whatever stands there
    if (e.routine === "scanner_yyerror" || (e.code === "42601" && /at or near|at end of input|'/.test(message))) {
      return undefined
    }
    return statement !== undefined && matchAt(literal, statement, offsetOf(statement, position)) !== undefined
      ? undefined
      : message
  }
  if (statement === undefined) return undefined
  const words = codeWords(statement)
  return wordsOf(message).every((word) => vocabulary.has(word) || words.has(word)) ? message : undefined
}

const codeWords = (statement: string): ReadonlySet<string> =>
  new Set(wordsOf(withoutNumbers(withoutLiterals(statement.slice(0, maxSearched)))))

/** `at or near` of a syntax error, read from our own text: the server's may quote a literal, or be translated. */
const syntaxPlace = (e: ServerError, context: ErrorContext): string => {
  const { statement } = context
  const position = positionOf(e, context)
  if (position === undefined) return ""
  if (statement === undefined) {
    const near = /at or near "([\p{L}_][\p{L}\p{N}_$]*|\$\d+|[^\s\p{L}\p{N}'"$])"$/u.exec(e.message ?? "")
    return place(near?.[1], position)
  }
  const offset = offsetOf(statement, position)
  if (offset >= statement.length) return " at end of input"
  const near = matchAt(literal, statement, offset) === undefined ? matchAt(token, statement, offset) : undefined
  return place(near, position)
}

const place = (near: string | undefined, position: number): string =>
  near === undefined ? ` at position ${position}` : ` at or near "${near}", position ${position}`

/** Where in the statement. With a context the position is one in another text: in `$1::regtype`, in the value of `$1`. */
const positionOf = (e: ServerError, context: ErrorContext): number | undefined => {
  if (e.where !== undefined || e.internalQuery !== undefined) return undefined
  const position = Number(e.position) - (context.offset ?? 0)
  return Number.isInteger(position) && position > 0 ? position : undefined
}

/** A setting that does not exist: its name may have come as a value. */
const unknownSetting = (e: ServerError, { names, statement }: ErrorContext): [string, string] | undefined => {
  const [, name] = /^unrecognized configuration parameter "(.+)"$/.exec(e.message ?? "") ?? []
  if (e.code !== "42704" || name === undefined) return undefined
  const words = codeWords(statement ?? "")
  return settingSentence(name, names?.includes(name) === true || wordsOf(name).every((word) => words.has(word)))
}

// -----------------------------------------------------------------------------
// what the server said
// -----------------------------------------------------------------------------

/** Codes outside class 42 whose sentence may be the program's own words. */
const naming = new Set(["25006", "0A000", "3D000", "3F000"])

/** Codes of a refused login: there the server speaks of the host, role and database that it was asked for. */
const refusals = new Set(["42501", "3D000", "53300", "57P03"])

/** 57014 of a time limit. A translated text does not tell it from that of a cancel. */
export const isStatementTimeout = (e: ServerError): boolean => /statement[ _]timeout/i.test(e.message ?? "")

const statementTimedOut = (e: ServerError, context: ErrorContext): boolean =>
  isStatementTimeout(e) ||
  // translated, and no cancel of ours: the statement's own limit is by far the likeliest
  (context.canceledByUs === false && !e.message?.startsWith("canceling"))

const tagOf = (code: string, e: ServerError, context: ErrorContext): ReasonTag => {
  switch (code) {
    case "23505":
      return "UniqueViolation"
    case "23503":
    case "23001": // RESTRICT, since PostgreSQL 18
      return "ForeignKeyViolation"
    case "23502":
      return "NotNullViolation"
    case "23514":
    case "44000":
      return "CheckViolation"
    case "23P01":
      return "ExclusionViolation"
    case "40001":
      return "SerializationError"
    case "40P01":
      return "DeadlockError"
    case "40003":
      return "CommitUnknown"
    case "55P03":
      return "LockTimeoutError"
    case "57014":
      return statementTimedOut(e, context) ? "StatementTimeoutError" : "QueryCanceled"
    case "25P02":
      return "TransactionAborted"
    case "25P03":
    case "25P04":
      return "TransactionTimeout"
    case "25006":
      return "ReadOnlyError"
    case "42501":
      return "AuthorizationError"
    case "3D000":
      return context.phase === undefined || context.phase === "connect" ? "AuthorizationError" : "SqlSyntaxError"
    case "3F000":
      return "SqlSyntaxError"
    case "53300":
      return "ConnectionError"
  }
  if (isMiscounted(e)) return "SqlSyntaxError"
  if (code.startsWith("28")) return "AuthenticationError"
  if (code.startsWith("08") || code.startsWith("57P")) return "ConnectionError"
  if (context.phase === "connect") return "ConnectionError"
  return code.startsWith("42") ? "SqlSyntaxError" : "UnknownError"
}

const thing = (e: ServerError): string => {
  const parts: Array<string> = []
  if (e.constraint) parts.push(`constraint "${e.constraint}"`)
  if (e.column) parts.push(`column "${e.column}"`)
  if (e.table) parts.push(`table "${e.schema ? `${e.schema}.` : ""}${e.table}"`)
  if (e.dataType) parts.push(`type "${e.dataType}"`)
  return parts.length === 0 ? "" : `: ${parts.join(" of ")}`
}

/** Maps an ErrorResponse to a reason. */
export const describeServer = (e: ServerError, context: ErrorContext = {}): Described => {
  const { code } = e
  if (code === undefined) {
    return lost(context.phase ?? "read", context, "the answer is not one of PostgreSQL's")
  }
  const tag = tagOf(code, e, context)
  const condition = conditionName(code)
  const startup =
    code === "08P01" || code === "28000" ? startupSentences.find(([says]) => says.test(e.message ?? "")) : undefined
  const text =
    context.phase === "connect" && (tag === "AuthenticationError" || refusals.has(code))
      ? e.message
      : code.startsWith("42") || naming.has(code)
        ? ownText(e, context)
        : undefined
  const setting = unknownSetting(e, context)
  const own = setting?.[0] ?? startup?.[1] ?? valueSentence(code, e.message, e.where) ?? sentencesByState[code]
  const untold = tag === "UnknownError" && own === undefined
  const sentence = untold
    ? `The server reported ${condition ?? "an error"}`
    : isMiscounted(e)
      ? miscounted(e)
      : (own ?? reasonDefaults[tag].message)
  const near = tag === "SqlSyntaxError" && text === undefined ? syntaxPlace(e, context) : undefined
  const what = `${sentence}${near ?? thing(e)}${text === undefined ? "" : `: ${text}`}`
  const message = `${what} (${condition === undefined || untold ? "" : `${condition}, `}SQLSTATE ${code})`
  const fields = {
    message,
    hint:
      (text !== undefined && positionOf(e, context) !== undefined ? e.hint : undefined) ??
      setting?.[1] ??
      startup?.[2] ??
      (isMiscounted(e)
        ? miscountedHint
        : code === "42601" && / near "\$\d/.test(near ?? "")
          ? misplacedHint
          : hintsByState[code]),
    sqlState: code,
    condition,
    severity: e.severity,
    constraint: e.constraint,
    table: e.table,
    column: e.column,
    schema: e.schema,
    dataType: e.dataType,
    routine: e.routine,
    position: positionOf(e, context),
    statement:
      context.statement === undefined || context.phase === "connect" ? undefined : redactSql(context.statement).trim()
  }
  if (tag === "ConnectionError") {
    const phase = context.phase ?? (/^(?:53300|57P03|0800[14])$/.test(code) ? "connect" : "read")
    const passing = /^(?:08|53|57|58|XX)/.test(code) && code !== "08007"
    const isRetryable = startup?.[3] ?? context.retryable ?? (phase === "connect" && passing)
    return { tag, fields: { ...fields, phase, isRetryable, address: context.where } }
  }
  if (tag === "ReadOnlyError" && context.targetReadWrite === true) {
    const hint =
      "The host no longer takes writes: it has become a standby. The next connection looks for the new primary."
    return { tag, fields: { ...fields, hint, isRetryable: true } }
  }
  return { tag, fields }
}

// -----------------------------------------------------------------------------
// what the socket said
// -----------------------------------------------------------------------------

const isTlsCode = (code: string): boolean =>
  code in tlsSentences || code === "EPROTO" || /^(?:ERR_(?:TLS|SSL|OSSL)_|CERT_)/.test(code)

const tlsHint = "Give ssl the right certificate authority (ssl: { ca }); the connection is never continued without TLS."

const phases: Record<ConnectionPhase, string> = {
  connect: "Cannot connect",
  send: "The connection was lost before the statement was sent",
  read: "The connection was lost while an answer was awaited",
  commit: "The connection was lost while COMMIT was awaited"
}

const stringIn = (u: unknown, key: string): string | undefined =>
  Predicate.hasProperty(u, key) && typeof u[key] === "string" ? u[key] : undefined

// shown only if it has the form of a code
const codeOf = (u: unknown): string | undefined => {
  const code = stringIn(u, "code")
  return code !== undefined && /^[A-Z][A-Z0-9_]{1,63}$/.test(code) ? code : undefined
}

/** The words of the sentences that `pg` and this library give to errors of a connection. */
const connectionWords = new Set(
  (
    "a an and answer before between borrowers by cancel cancellation client closed confirm connection connections did " +
    "does engine error establishing expired has encountered in is it its not of offer or query queryable read request " +
    "server socket ssl support taken terminated the there time timeout tls two unexpectedly was were while"
  ).split(" ")
)

const lost = (
  phase: ConnectionPhase,
  context: ErrorContext,
  what: string,
  more?: { readonly hint?: string; readonly code?: string | undefined; readonly isRetryable?: false }
): Described => ({
  tag: "ConnectionError",
  fields: {
    message: `${phases[phase]}${context.where === undefined ? "" : ` (${context.where})`}: ${what}`,
    phase,
    address: context.where,
    ...more,
    isRetryable: more?.isRetryable ?? context.retryable ?? phase === "connect"
  }
})

const noPassword = {
  message: "The server asked for a password and none was given",
  hint: "Set password (or PGPASSWORD)."
}

/** Maps what a socket, TLS or `pg` itself reported to a reason. */
export const describeSocket = (cause: unknown, phase: ConnectionPhase, context: ErrorContext): Described => {
  const code = codeOf(cause)
  const text = stringIn(cause, "message") ?? ""
  if (code !== undefined) {
    const known = socketSentences[code]
    if (known !== undefined) return lost(phase, context, `${known[0]} (${code})`, { code, hint: known[1] })
    if (isTlsCode(code)) {
      const what = `TLS failed: ${tlsSentences[code] ?? "the two sides did not agree"} (${code})`
      return lost(phase, context, what, { code, hint: tlsHint, isRetryable: false })
    }
    return lost(phase, context, `the socket reported ${code}`, { code })
  }
  if (/password must be a/i.test(text)) return { tag: "AuthenticationError", fields: noPassword }
  if (text.startsWith("SASL")) {
    return {
      tag: "AuthenticationError",
      fields: {
        message: "The login by SCRAM failed: server and client do not agree",
        hint: "Check the password, and that nothing stands between client and server."
      }
    }
  }
  if (/does not support SSL/.test(text)) {
    return lost(phase, context, "the server does not offer TLS", {
      hint: "Turn TLS on at the server, or set ssl to false if the network is safe.",
      isRetryable: false
    })
  }
  if (stringIn(cause, "name") === "ProtocolViolation") {
    return lost(phase, context, `the server broke the protocol: ${text}`, {
      hint: "Check that PostgreSQL, and not some other service, listens there."
    })
  }
  const plain = text !== "" && wordsOf(text).every((word) => connectionWords.has(word))
  return lost(phase, context, plain ? text : "the socket failed for a reason that error.serverError tells")
}

/** Stands for the `DatabaseError` of `pg`: its fields, but for the text. */
class PostgresError extends Error {
  override readonly name: string = "PostgresError"
}

const causeFields = ["severity", "schema", "table", "column", "dataType", "constraint", "routine", "syscall"]

/**
 * What stands as `cause`: Effect and Node print causes, so the original cannot. `pg`'s fields stay where programs look for
 * them (`cause.code`), out of sight.
 */
export const redactedCause = (cause: unknown): Error => {
  const fromServer = isServerError(cause)
  const code = fromServer ? cause.code : codeOf(cause)
  const condition = fromServer && code !== undefined ? conditionName(code) : undefined
  const name = stringIn(cause, "name")
  const text = [code, condition].filter((word) => word !== undefined).join(" ")
  const redacted = fromServer ? new PostgresError(text) : new Error(text)
  const fields: Array<readonly [key: string, value: string | undefined]> = [
    ["name", fromServer ? redacted.name : name !== undefined && /^[\w$]{1,64}$/.test(name) ? name : "Error"],
    ["code", code],
    ...causeFields.map((key) => [key, stringIn(cause, key)] as const)
  ]
  for (const [key, value] of fields)
    if (value !== undefined) Object.defineProperty(redacted, key, { value, enumerable: false })
  // where it was copied tells nobody anything
  redacted.stack = String(redacted)
  return redacted
}
