/**
 * What may come in, and how it goes out. What PostgreSQL keeps as `bigint` is a `bigint` here and a string of digits
 * in JSON, so that no cent is lost to a floating-point number.
 */
import { ParseResult, Schema } from "effect"

const maxCents = 1_000_000_000_000n

/** A whole number of cents: a JSON number, or a string of digits. */
export const Cents = Schema.transformOrFail(Schema.Unknown, Schema.BigIntFromSelf, {
  strict: true,
  decode: (input, _, ast) => {
    const cents =
      typeof input === "number" && Number.isSafeInteger(input)
        ? BigInt(input)
        : typeof input === "string" && /^\d{1,13}$/.test(input)
          ? BigInt(input)
          : 0n
    return cents > 0n && cents <= maxCents
      ? ParseResult.succeed(cents)
      : ParseResult.fail(new ParseResult.Type(ast, input, `must be a whole number of cents from 1 to ${maxCents}`))
  },
  encode: (cents) => ParseResult.succeed(String(cents))
})

/** One line of text that PostgreSQL can hold. */
const line = (max: number) =>
  Schema.String.pipe(
    Schema.filter(
      (text) =>
        (text.length <= max && text.trim() === text && text !== "" && text.isWellFormed() && !/\p{Cc}/u.test(text)) ||
        `must be one line of 1 to ${max} characters, with no space around it`
    )
  )

export const Name = line(100)
export const Note = line(500)

export const AccountId = Schema.Number.pipe(
  Schema.filter((id) => (Number.isInteger(id) && id > 0 && id < 2 ** 31) || "must be the number of an account")
)

export const NewAccount = Schema.Struct({ name: Name })

export const Deposit = Schema.Struct({ amount: Cents, note: Schema.optional(Note) })

export const Transfer = Schema.Struct({
  from: AccountId,
  to: AccountId,
  amount: Cents,
  note: Schema.optional(Note)
}).pipe(Schema.filter(({ from, to }) => from !== to || { path: ["to"], message: "must not be the account it is from" }))

export interface Transfer extends Schema.Schema.Type<typeof Transfer> {}

/** A line of an import: accounts by name, and no `from` for money that comes from outside. */
export const ImportLine = Schema.Struct({
  from: Schema.NullOr(Name),
  to: Name,
  amount: Cents,
  note: Schema.NullOr(Note)
}).pipe(Schema.filter(({ from, to }) => from !== to || { path: ["to"], message: "must not be the account it is from" }))

export interface ImportLine extends Schema.Schema.Type<typeof ImportLine> {}

export const AccountPath = Schema.Struct({ id: Schema.compose(Schema.NumberFromString, AccountId) })

export const IdempotencyKey = Schema.String.pipe(
  Schema.filter((key) => /^[\x21-\x7e]{1,200}$/.test(key) || "must be 1 to 200 visible ASCII characters")
)

export const Page = Schema.Struct({
  before: Schema.optional(
    Schema.String.pipe(Schema.filter((id) => /^\d{1,18}$/.test(id) || "must be the number of a transfer"))
  ),
  limit: Schema.optionalWith(
    Schema.NumberFromString.pipe(
      Schema.filter((n) => (Number.isInteger(n) && n >= 1 && n <= 500) || "must be a whole number from 1 to 500")
    ),
    { default: () => 50 }
  )
})

/** What is wrong with an input, in one sentence: the first complaint about each of its parts. */
export const complaint = (error: ParseResult.ParseError): string => {
  const found = new Map<string, string>()
  for (const { message, path } of ParseResult.ArrayFormatter.formatErrorSync(error)) {
    const part = path.join(".")
    if (!found.has(part)) found.set(part, part === "" ? message : `${part}: ${message}`)
  }
  return [...found.values()].join("; ")
}
