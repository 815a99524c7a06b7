/**
 * Result rows: from the bytes of RowDescription and DataRow to the JavaScript values that `pg` gives for them.
 */
import type * as Pg from "pg"
import { cstringEnd, ProtocolViolation } from "./protocol.js"

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
export const noShape: Shape = { fields: [], object: () => undefined, array: () => undefined }

// text, varchar, bpchar, name, uuid, unknown, char: `pg` returns them as they are unless told otherwise.
const verbatim = new Set([25, 1043, 1042, 19, 2950, 705, 18])

const parserOf = (types: TypeParsers, field: Field, isDefault: boolean): Parser | undefined =>
  isDefault && verbatim.has(field.dataTypeID)
    ? undefined
    : (types.getTypeParser(field.dataTypeID, field.format) as Parser)

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
  return fields
}

const int32 = (buffer: Buffer, at: number): number =>
  (buffer[at]! << 24) | (buffer[at + 1]! << 16) | (buffer[at + 2]! << 8) | buffer[at + 3]!

type Sliceable = Buffer & {
  latin1Slice(start: number, end: number): string
  utf8Slice(start: number, end: number): string
}

/** Short ASCII values, most of all, are decoded without the call into C++ that every `toString` makes. */
const text = (buffer: Buffer, start: number, end: number): string => {
  const length = end - start
  if (length < 16) {
    let out = ""
    for (let i = start; i < end; i++) {
      const byte = buffer[i]!
      if (byte > 127) return (buffer as Sliceable).utf8Slice(start, end)
      out += String.fromCharCode(byte)
    }
    return out
  }
  return (buffer as Sliceable).utf8Slice(start, end)
}

/** Walks the columns of one DataRow and gives each decoded value to `set`. */
const eachColumn = (
  parsers: ReadonlyArray<Parser | undefined>,
  buffer: Buffer,
  start: number,
  end: number,
  set: (index: number, value: unknown) => void
): void => {
  if (start + 2 > end) throw new ProtocolViolation("DataRow is cut short")
  const count = (buffer[start]! << 8) | buffer[start + 1]!
  if (count !== parsers.length) throw new ProtocolViolation("DataRow and RowDescription disagree")
  let offset = start + 2
  for (let i = 0; i < count; i++) {
    if (offset + 4 > end) throw new ProtocolViolation("DataRow is cut short")
    const length = int32(buffer, offset)
    offset += 4
    if (length < 0) {
      set(i, null)
      continue
    }
    const stop = offset + length
    if (stop > end) throw new ProtocolViolation("DataRow is cut short")
    const value = text(buffer, offset, stop)
    const parser = parsers[i]
    set(i, parser === undefined ? value : parser(value))
    offset = stop
  }
}

/** @internal */
export const makeShape = (fields: ReadonlyArray<Field>, types: TypeParsers, isDefault: boolean): Shape => {
  const parsers = fields.map((field) => parserOf(types, field, isDefault))
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
      eachColumn(parsers, buffer, start, end, plain ? setProperty : defineProperty)
      return row
    },
    array: (buffer, start, end) => {
      values = new Array(parsers.length)
      eachColumn(parsers, buffer, start, end, setValue)
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

const tagPattern = /^([A-Za-z]+)(?: (\d+))?(?: (\d+))?/

/** @internal */
export const makeResult = (tag: string, rows: Array<any>, fields: ReadonlyArray<Field>): Result => {
  const match = tagPattern.exec(tag)
  const second = match?.[2]
  const third = match?.[3]
  return {
    command: match?.[1] ?? "",
    rowCount: third !== undefined ? Number(third) : second !== undefined ? Number(second) : null,
    oid: third !== undefined ? Number(second) : 0,
    rows,
    fields
  }
}

/** @internal */
export type CustomTypes = Pg.CustomTypesConfig
