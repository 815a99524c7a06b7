/**
 * Result rows: from the bytes of RowDescription and DataRow to the JavaScript values that `pg` gives for them.
 */
import type * as Pg from "pg"
import { cstringEnd, endsAt, ProtocolViolation, textOf } from "./protocol.js"

/** A column of a result, with the names that `pg` gives. @internal */
export interface Field {
  readonly name: string
  readonly tableID: number
  readonly columnID: number
  readonly dataTypeID: number
  readonly dataTypeSize: number
  readonly dataTypeModifier: number
  readonly format: "text" | "binary"
}

type Parser = (text: string) => unknown

/** How a value is read: by a parser, as it is, or as a number straight from the bytes. */
type Decoder = Parser | "text" | "integer"

/** Where the parser of a type comes from: `pg.types` or the `types` option. @internal */
export interface TypeParsers {
  readonly getTypeParser: (oid: number, format?: "text" | "binary") => unknown
}

/** How the rows of a result are shaped. @internal */
export interface Shape {
  readonly fields: ReadonlyArray<Field>
  readonly object: (buffer: Buffer, start: number, end: number) => unknown
  readonly array: (buffer: Buffer, start: number, end: number) => unknown
}

/** Of what returns no rows. @internal */
export const noShape: Shape = { fields: [], object: () => unasked(), array: () => unasked() }

const unasked = (): never => {
  throw new ProtocolViolation("a row of what returns none")
}

// text, varchar, bpchar, name, uuid, unknown, char: `pg` returns them as they are unless told otherwise.
const verbatim = new Set([25, 1043, 1042, 19, 2950, 705, 18])

// int2, int4, oid
const integers = new Set([21, 23, 26])

const decoderOf = (types: TypeParsers, field: Field, isDefault: boolean): Decoder => {
  const parser = types.getTypeParser(field.dataTypeID, field.format) as Parser
  if (!isDefault) return parser
  // A parser that the program has set for everybody is not the one of that name.
  if (verbatim.has(field.dataTypeID) && parser.name === "noParse") return "text"
  return integers.has(field.dataTypeID) && parser.name === "parseInteger" ? "integer" : parser
}

/** @internal */
export const readFields = (buffer: Buffer, start: number, end: number): ReadonlyArray<Field> => {
  if (start + 2 > end) throw new ProtocolViolation("RowDescription is cut short")
  const count = buffer.readUInt16BE(start)
  const fields: Array<Field> = new Array(count)
  let offset = start + 2
  for (let i = 0; i < count; i++) {
    const stop = cstringEnd(buffer, offset, end)
    if (stop + 19 > end) throw new ProtocolViolation("RowDescription is cut short")
    const name = buffer.toString("utf8", offset, stop)
    offset = stop + 1
    fields[i] = {
      name,
      tableID: buffer.readUInt32BE(offset),
      columnID: buffer.readUInt16BE(offset + 4),
      dataTypeID: buffer.readUInt32BE(offset + 6),
      dataTypeSize: buffer.readInt16BE(offset + 10),
      dataTypeModifier: buffer.readInt32BE(offset + 12),
      format: buffer.readUInt16BE(offset + 16) === 0 ? "text" : "binary"
    }
    offset += 18
  }
  endsAt(offset, end)
  return fields
}

const int32 = (buffer: Buffer, at: number): number =>
  (buffer[at]! << 24) | (buffer[at + 1]! << 16) | (buffer[at + 2]! << 8) | buffer[at + 3]!

/** What `parseInt` makes of an int2, int4 or oid, without the string. */
const integer = (buffer: Buffer, start: number, end: number): number => {
  const negative = buffer[start] === 0x2d
  let value = 0
  for (let i = negative ? start + 1 : start; i < end; i++) value = value * 10 + buffer[i]! - 0x30
  return negative ? -value : value
}

/** Walks the columns of one DataRow and gives each decoded value to `set`. */
const eachColumn = (
  decoders: ReadonlyArray<Decoder>,
  buffer: Buffer,
  start: number,
  end: number,
  set: (index: number, value: unknown) => void
): void => {
  if (start + 2 > end) throw new ProtocolViolation("DataRow is cut short")
  const count = (buffer[start]! << 8) | buffer[start + 1]!
  if (count !== decoders.length) throw new ProtocolViolation("DataRow and RowDescription disagree")
  let offset = start + 2
  for (let i = 0; i < count; i++) {
    if (offset + 4 > end) throw new ProtocolViolation("DataRow is cut short")
    const length = int32(buffer, offset)
    offset += 4
    if (length < 0) {
      if (length !== -1) throw new ProtocolViolation("DataRow has a value of no length")
      set(i, null)
      continue
    }
    const stop = offset + length
    if (stop > end) throw new ProtocolViolation("DataRow is cut short")
    const decoder = decoders[i]!
    if (decoder === "integer") {
      set(i, integer(buffer, offset, stop))
    } else {
      const value = textOf(buffer, offset, stop)
      set(i, decoder === "text" ? value : decoder(value))
    }
    offset = stop
  }
  endsAt(offset, end)
}

/** @internal */
export const makeShape = (fields: ReadonlyArray<Field>, types: TypeParsers, isDefault: boolean): Shape => {
  const decoders = fields.map((field) => decoderOf(types, field, isDefault))
  const names = fields.map((field) => field.name)
  // An own property even when a column is called __proto__.
  const plain = !names.includes("__proto__")
  const template: Record<string, unknown> = {}
  for (const name of names) {
    if (plain) template[name] = null
    else Object.defineProperty(template, name, { value: null, enumerable: true, writable: true, configurable: true })
  }
  let row: Record<string, unknown>
  const setProperty = (index: number, value: unknown) => {
    row[names[index]!] = value
  }
  const defineProperty = (index: number, value: unknown) => {
    Object.defineProperty(row, names[index]!, { value, enumerable: true, writable: true, configurable: true })
  }
  let values: Array<unknown>
  const setValue = (index: number, value: unknown) => {
    values[index] = value
  }
  return {
    fields,
    object: (buffer, start, end) => {
      row = { ...template }
      eachColumn(decoders, buffer, start, end, plain ? setProperty : defineProperty)
      return row
    },
    array: (buffer, start, end) => {
      values = new Array(decoders.length)
      eachColumn(decoders, buffer, start, end, setValue)
      return values
    }
  }
}

/** What `executeRaw` returns: the fields of `pg`'s `QueryResult`. @internal */
export interface Result {
  readonly command: string
  readonly rowCount: number | null
  readonly oid: number
  readonly rows: Array<any>
  readonly fields: ReadonlyArray<Field>
}

class Answered implements Result {
  constructor(
    readonly command: string,
    readonly rowCount: number | null,
    readonly oid: number,
    readonly rows: Array<any>,
    readonly fields: ReadonlyArray<Field>
  ) {}
}

const tagPattern = /^([A-Za-z]+)(?: (\d+))?(?: (\d+))?/

type Tag = Pick<Result, "command" | "rowCount" | "oid">

const tags = new Map<string, Tag>()
const knownTags = 1024

/** What a tag says; the same ones come again and again. */
const readTag = (tag: string): Tag => {
  let known = tags.get(tag)
  if (known === undefined) {
    const match = tagPattern.exec(tag)
    const second = match?.[2]
    const third = match?.[3]
    known = {
      command: match?.[1] ?? "",
      rowCount: third !== undefined ? Number(third) : second !== undefined ? Number(second) : null,
      oid: third !== undefined ? Number(second) : 0
    }
    if (tags.size >= knownTags) tags.clear()
    tags.set(tag, known)
  }
  return known
}

/** @internal */
export const makeResult = (tag: string, rows: Array<any>, fields: ReadonlyArray<Field>): Result => {
  const { command, oid, rowCount } = readTag(tag)
  return new Answered(command, rowCount, oid, rows, fields)
}

/** @internal */
export type CustomTypes = Pg.CustomTypesConfig
