/**
 * What is refused before the wire. Checks never throw, and their errors name the place, never the value.
 */
import * as Effect from "effect/Effect"
import { types } from "node:util"
// @ts-expect-error: neither pg nor its types describe this file
import { prepareValue as untypedPrepareValue } from "pg/lib/utils.js"
import { DbError } from "../DbError.js"
import { entries, hidesRedacted, items, noType, redactedInside, sentAs, Unfit } from "./dataTypes.js"

const prepareValue = untypedPrepareValue as (value: unknown) => string | Buffer | null

/** What the server takes in one message. */
const maxBytes = 2 ** 30 - 2 ** 10

const maxParameters = 65_535

/** PostgreSQL cuts longer names without an error. */
const maxIdentifierBytes = 63

const refuse = (message: string, hint: string, parameter?: number): DbError =>
  DbError.make("InvalidInput", { message, hint, parameter })

/** Text as PostgreSQL can have it; the answer tells why not. */
const badText = (text: string): string | undefined =>
  text.includes("\0")
    ? "has a NUL character, which PostgreSQL's text cannot hold"
    : text.isWellFormed()
      ? undefined
      : "has a lone surrogate, which UTF-8 cannot express"

const textHint = "Remove the character, or pass a Buffer to a bytea column."

// a UTF-16 unit is at most three bytes, so the exact count is rarely needed
const isTooLong = (text: string): boolean => text.length * 3 > maxBytes && Buffer.byteLength(text) > maxBytes

/** The text of a statement. */
export const checkText = (sql: unknown): DbError | undefined => {
  if (typeof sql !== "string") {
    return refuse(`The statement is not a string but ${kind(sql)}`, "Pass the text of the statement.")
  }
  const bad = badText(sql)
  if (bad !== undefined) return refuse(`The statement's text ${bad}`, "Pass values as parameters, and check the text.")
  if (isTooLong(sql)) {
    return refuse("The statement's text is over 1 GiB", "Send the data in parts, or by COPY.")
  }
  return undefined
}

/**
 * The values of a statement as they are sent, converted as `pg` does: `null`, text, or bytes. What is refused would fail
 * on the server or, worse, be stored as something else.
 */
export const encodeParams = (params: ReadonlyArray<unknown>): Array<null | string | Buffer> | DbError => {
  if (!Array.isArray(params)) {
    return refuse(`The parameters are not an array but ${kind(params)}`, "Pass the values of $1, $2, ... as an array.")
  }
  const n = params.length
  if (n > maxParameters) {
    return refuse(
      `The statement has ${n} parameters; the protocol counts to ${maxParameters} and would wrap around`,
      "Insert in parts, or pass arrays and unnest() them."
    )
  }
  const encoded = new Array<null | string | Buffer>(n)
  let most = 0
  for (let i = 0; i < n; i++) {
    const value = params[i]
    let out: null | string | Buffer
    switch (typeof value) {
      case "string":
        out = value
        break
      case "bigint":
        out = String(value)
        break
      case "number":
      case "boolean":
        encoded[i] = String(value)
        most += 32
        continue
      case "undefined":
        encoded[i] = null
        most += 4
        continue
      default: {
        if (value === null) {
          encoded[i] = null
          most += 4
          continue
        }
        const converted = convert(value, i)
        if (DbError.is(converted)) return converted
        out = converted
      }
    }
    if (typeof out === "string") {
      const bad = badText(out)
      if (bad !== undefined) return refuse(`Parameter $${i + 1} ${bad}`, textHint, i + 1)
      most += out.length * 3 + 8
    } else if (out !== null) {
      most += out.length + 8
    }
    encoded[i] = out
  }
  return most > maxBytes && bytesOf(encoded) > maxBytes
    ? refuse("The statement's parameters are over 1 GiB together", "Send the data in parts, or by COPY.")
    : encoded
}

const bytesOf = (values: ReadonlyArray<null | string | Buffer>): number =>
  values.reduce<number>(
    (sum, value) =>
      sum + 8 + (value === null ? 0 : typeof value === "string" ? Buffer.byteLength(value) : value.length),
    0
  )

const convert = (value: unknown, i: number): null | string | Buffer | DbError => {
  let bad: Unfit
  try {
    const fitted = fit(unwrap(value))
    if (!(fitted instanceof Unfit)) {
      // pg sends what JSON has no text for (an object whose toJSON gives undefined) as null
      const out = prepareValue(fitted) ?? null
      if (typeof out !== "string" || !hidesRedacted(out, fitted)) return out
      bad = redactedInside
    } else {
      bad = fitted
    }
  } catch (cause) {
    return DbError.make("InvalidInput", {
      message: `Parameter $${i + 1} cannot be converted: its conversion throws`,
      hint: "Pass a value that JSON can express, or convert it first; error.serverError has what was thrown.",
      parameter: i + 1,
      cause
    })
  }
  return refuse(`Parameter $${i + 1} is ${bad.what}`, bad.hint, i + 1)
}

/** What `sql.json` was given, as the text that is sent: a bare array would become one of PostgreSQL's. */
export const encodeJson = (value: unknown, named: (value: unknown) => unknown): string | null | DbError => {
  if (value === null || value === undefined) return null
  let bad: Unfit
  try {
    const fitted = fit(value)
    if (!(fitted instanceof Unfit)) {
      // the value as it is: what is in it is what JSON makes of it
      const text = JSON.stringify(named(value)) ?? null
      if (text === null || !hidesRedacted(text, value)) return text
      bad = redactedInside
    } else {
      bad = fitted
    }
  } catch (cause) {
    return DbError.make("InvalidInput", {
      message: "The value of sql.json cannot be converted: its conversion throws",
      hint: "Pass a value that JSON can express; error.serverError has what was thrown.",
      cause
    })
  }
  return refuse(`The value of sql.json is ${bad.what}`, bad.hint)
}

/** Follows `toPostgres` as `pg` does, so that what it gives is checked too. */
const unwrap = (value: unknown): unknown => {
  const seen: Array<unknown> = []
  let plain = value
  while (
    typeof plain === "object" &&
    plain !== null &&
    !ArrayBuffer.isView(plain) &&
    !types.isDate(plain) &&
    !Array.isArray(plain) &&
    typeof (plain as { readonly toPostgres?: unknown }).toPostgres === "function"
  ) {
    if (seen.includes(plain)) throw new Error("toPostgres is circular")
    seen.push(plain)
    plain = (plain as { readonly toPostgres: (prepare: typeof prepareValue) => unknown }).toPostgres(prepareValue)
  }
  return plain
}

/** What is given to `pg`; not what it would turn into text all the same: "NaN-NaN-...", a function's source, {}. */
const fit = (value: unknown): unknown => {
  switch (typeof value) {
    case "function":
    case "symbol":
      return new Unfit(`a ${typeof value}`, noType)
    case "object":
      if (value === null) return value
      if (types.isDate(value)) return Number.isNaN(value.getTime()) ? new Unfit("an invalid Date", noType) : value
      if (Array.isArray(value)) return fitItems(value)
      return ArrayBuffer.isView(value) ? value : fitObject(value)
    default:
      return value
  }
}

/** The same array, unless something else is sent for an item. */
const fitItems = (array: ReadonlyArray<unknown>): unknown => {
  let others: Array<unknown> | undefined
  for (let i = 0; i < array.length; i++) {
    const item = array[i]
    if (item === null || typeof item === "string" || typeof item === "number") continue
    const plain = unwrap(item)
    const fitted = fit(plain)
    if (fitted instanceof Unfit) return new Unfit(`an array with ${fitted.what}`, fitted.hint)
    if (fitted !== plain) (others ??= [...array])[i] = fitted
  }
  return others ?? array
}

/** What JSON makes nothing of, or something that nobody has meant. */
const fitObject = (value: object): unknown => {
  if (typeof (value as { readonly then?: unknown }).then === "function") {
    return new Unfit("a Promise", "Await it first.")
  }
  if (Object.getPrototypeOf(value) === Object.prototype) return value
  const sent = sentAs(value)
  if (sent !== value) return sent
  // So is an error, which JSON has the fields of.
  if (Effect.isEffect(value) && !(value instanceof Error)) {
    return new Unfit("an Effect that was not run", "yield* it first.")
  }
  if (types.isMap(value)) return new Unfit("a Map", entries)
  return types.isSet(value) ? new Unfit("a Set", items) : value
}

const kind = (u: unknown): string =>
  u === null
    ? "null"
    : Array.isArray(u)
      ? "an array"
      : typeof u === "undefined"
        ? "undefined"
        : `a value of type ${typeof u}`

/** A name of a schema, role, database, channel or cursor. */
export const checkIdentifier = (name: unknown): DbError | undefined => {
  if (typeof name !== "string") return refuse(`The identifier is not a string but ${kind(name)}`, "Pass a string.")
  if (name === "") return refuse("The identifier is empty", "Pass a name of 1 to 63 bytes.")
  const bad = badText(name)
  if (bad !== undefined) return refuse(`The identifier ${bad}`, "Pass a name without that character.")
  const bytes = Buffer.byteLength(name)
  if (bytes > maxIdentifierBytes) {
    return refuse(
      `The identifier has ${bytes} bytes in UTF-8; PostgreSQL would cut it at ${maxIdentifierBytes}`,
      "Shorten it: two long names could become the same one."
    )
  }
  return undefined
}

/** The server takes shorter ones only. */
const maxPayloadBytes = 8000

/** A notification. */
export const checkNotification = (channel: unknown, payload: unknown): DbError | undefined => {
  const refused = checkIdentifier(channel)
  if (refused !== undefined) return refused
  if (typeof payload !== "string") {
    return refuse(`The payload is not a string but ${kind(payload)}`, "Pass a string, JSON for example.")
  }
  const bytes = Buffer.byteLength(payload)
  return bytes < maxPayloadBytes
    ? undefined
    : refuse(
        `The payload has ${bytes} bytes in UTF-8; PostgreSQL takes less than ${maxPayloadBytes}`,
        "Write the data to a table, and notify its key."
      )
}

/** The name in quotes, whatever it holds; it has passed `checkIdentifier`. */
export const quoteIdentifier = (name: string): string => `"${name.replaceAll('"', '""')}"`

const control = /\p{Cc}/u

/** A start-up value: they are sent as one list separated by NUL, so a NUL in one is the start of another. */
export const checkStartupValue = (name: string, value: unknown): DbError | undefined => {
  if (typeof value !== "string") {
    return refuse(`The start-up value ${name} is not a string but ${kind(value)}`, "Pass a string.")
  }
  if (control.test(value)) {
    return refuse(`The start-up value ${name} has a control character`, "Remove it; check where the value comes from.")
  }
  if (!value.isWellFormed()) {
    return refuse(`The start-up value ${name} has a lone surrogate`, "Remove it; check where the value comes from.")
  }
  return undefined
}

/** A COPY that was run as a statement. @internal */
export const copyRefused = (way: "in" | "out"): DbError =>
  way === "in"
    ? DbError.make("InvalidInput", {
        message: "COPY ... FROM STDIN was run as a statement, which has no data to give.",
        hint: "Use DbQuery.copyFrom(statement, source)."
      })
    : DbError.make("InvalidInput", {
        message: "COPY ... TO STDOUT was run as a statement, which takes no data.",
        hint: "Use DbQuery.copyTo(statement)."
      })
