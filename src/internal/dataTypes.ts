/**
 * Effect's data types as parameters: those that PostgreSQL has one type for are sent as a value of it. Of the others
 * JSON would make an object that says what they are, `{"_id":"Chunk",...}`.
 */
import * as BigDecimal from "effect/BigDecimal"
import * as DateTime from "effect/DateTime"
import { NodeInspectSymbol } from "effect/Inspectable"
import * as Redacted from "effect/Redacted"

/** Why a value is no parameter, and what to give instead. @internal */
export class Unfit {
  constructor(
    readonly what: string,
    readonly hint: string
  ) {}
}

/** @internal */
export const noType = "Convert it to a value that PostgreSQL has a type for."

/** @internal */
export const items = "Use [...it]."
/** @internal */
export const entries = "Use Object.fromEntries(it) or [...it]."
const redacted = "Pass Redacted.value(it) if the database shall have it."

const refused: ReadonlyArray<readonly [key: string, what: string, hint: string]> = [
  ["effect/Redacted", "Redacted", redacted],
  ["effect/Option", "an Option", "Use Option.getOrNull(it)."],
  ["effect/Either", "an Either", "Use Either.getOrThrow(it), or yield* it first."],
  ["effect/Chunk", "a Chunk", "Use Chunk.toReadonlyArray(it)."],
  ["effect/List", "a List", "Use List.toArray(it)."],
  ["effect/HashSet", "a HashSet", items],
  ["effect/HashMap", "a HashMap", entries],
  ["effect/SortedSet", "a SortedSet", items],
  ["effect/SortedMap", "a SortedMap", entries],
  ["effect/RedBlackTree", "a RedBlackTree", entries],
  ["effect/Trie", "a Trie", entries],
  ["effect/MutableHashSet", "a MutableHashSet", items],
  ["effect/MutableHashMap", "a MutableHashMap", entries],
  ["effect/MutableList", "a MutableList", items],
  ["effect/MutableQueue", "a MutableQueue", items],
  ["effect/MutableRef", "a MutableRef", "Use MutableRef.get(it)."],
  ["effect/Duration", "a Duration", "Use Duration.toMillis(it); an interval is `${Duration.toSeconds(it)} seconds`."],
  ["effect/Cause", "a Cause", "Use Cause.pretty(it)."],
  ["effect/DateTime/TimeZone", "a TimeZone", "Use DateTime.zoneToString(it)."],
  ["effect/Cron", "a Cron", noType],
  ["effect/FiberId", "a FiberId", "Use FiberId.threadName(it)."]
]

const known = refused.map(([key, what, hint]) => [Symbol.for(key), new Unfit(what, hint)] as const)

/** What is sent for the value: itself, where it is none of these. @internal */
export const sentAs = (value: object): unknown => {
  // All of them have it, and hardly anything else: others cost one look.
  if (!(NodeInspectSymbol in value)) return value
  if (BigDecimal.isBigDecimal(value)) return decimal(value)
  if (DateTime.isDateTime(value)) return timestamp(value)
  return known.find(([typeId]) => typeId in value)?.[1] ?? value
}

/** Integers without an exponent, as far as PostgreSQL's own go: they take none. */
const decimal = (it: BigDecimal.BigDecimal): string => {
  const { scale, value } = BigDecimal.normalize(it)
  return scale <= 0 && scale >= -18 ? `${value}${"0".repeat(-scale)}` : BigDecimal.format(it)
}

const minute = 60_000

/** ISO, in the time zone that it has; but for years of other than four digits, which PostgreSQL reads otherwise. */
const timestamp = (it: DateTime.DateTime): string => {
  // an offset of old times has seconds, which would be rounded
  const whole = DateTime.isUtc(it) || DateTime.zonedOffset(it) % minute === 0
  const iso = whole ? DateTime.formatIsoOffset(it) : DateTime.formatIso(it)
  const far = /^([+-]\d{6}|0000)(.*)$/.exec(iso)
  if (far === null) return iso
  const year = Number(far[1])
  return year > 0 ? `${year}${far[2]}` : `${String(1 - year).padStart(4, "0")}${far[2]} BC`
}

/** What JSON says for it. */
const hidden = "<redacted>"

/** Whether the JSON text has "<redacted>" where the value has a `Redacted`: the secret would be lost. @internal */
export const hidesRedacted = (text: string, value: unknown): boolean => {
  if (!text.includes(hidden)) return false
  let hides = false
  JSON.stringify(value, function (this: Record<string, unknown>, key, shown: unknown) {
    if (shown === hidden && Redacted.isRedacted(this[key])) hides = true
    return typeof shown === "bigint" ? null : shown
  })
  return hides
}

/** @internal */
export const redactedInside = new Unfit("an object with a Redacted in it", redacted)
