/**
 * PostgreSQL frontend/backend protocol 3.0, as far as an established connection needs it: one writer that
 * collects messages until they are flushed in one piece, and one reader that cuts the byte stream into
 * messages without copying them. Start-up and authentication belong to `pg`.
 */

/** Message types of the backend, by their byte. @internal */
export const enum Backend {
  Authentication = 0x52,
  BackendKeyData = 0x4b,
  BindComplete = 0x32,
  CloseComplete = 0x33,
  CommandComplete = 0x43,
  CopyBothResponse = 0x57,
  CopyData = 0x64,
  CopyDone = 0x63,
  CopyInResponse = 0x47,
  CopyOutResponse = 0x48,
  DataRow = 0x44,
  EmptyQuery = 0x49,
  Error = 0x45,
  NegotiateProtocol = 0x76,
  NoData = 0x6e,
  Notice = 0x4e,
  Notification = 0x41,
  ParameterDescription = 0x74,
  ParameterStatus = 0x53,
  ParseComplete = 0x31,
  PortalSuspended = 0x73,
  ReadyForQuery = 0x5a,
  RowDescription = 0x54
}

/** The largest message that either side sends: PostgreSQL's own limit of one allocation. @internal */
export const maxMessage = 0x3fffffff

const initialSize = 4096
/** A buffer that one large message inflated is not kept. */
const keptSize = 1 << 20

/** Up to here a character at a time is faster than the call into C++ that reads or writes a string. */
const short = 24

/** Collects frontend messages; `take` hands them over in one piece. @internal */
export class Writer {
  private buffer = Buffer.allocUnsafe(initialSize)
  private offset = 0
  private start = 0

  get size(): number {
    return this.offset
  }

  private reserve(bytes: number): void {
    if (this.buffer.length - this.offset < bytes) {
      const larger = Buffer.allocUnsafe(Math.max(this.buffer.length * 2, this.offset + bytes))
      this.buffer.copy(larger, 0, 0, this.offset)
      this.buffer = larger
    }
  }

  private begin(type: number): void {
    this.reserve(5)
    this.buffer[this.offset] = type
    this.start = this.offset + 1
    this.offset += 5
  }

  private end(): void {
    this.buffer.writeUInt32BE(this.offset - this.start, this.start)
  }

  private int16(value: number): void {
    this.reserve(2)
    this.buffer[this.offset++] = value >>> 8
    this.buffer[this.offset++] = value
  }

  private int32(value: number): void {
    this.reserve(4)
    const buffer = this.buffer
    buffer[this.offset++] = value >>> 24
    buffer[this.offset++] = value >>> 16
    buffer[this.offset++] = value >>> 8
    buffer[this.offset++] = value
  }

  /** UTF-8 without a length: short strings are written straight into the worst-case space. */
  private utf8(text: string): number {
    const { length } = text
    const worst = length * 3
    this.reserve(worst < 65536 ? worst : Buffer.byteLength(text))
    if (length <= short && this.ascii(text)) return length
    const written = this.buffer.write(text, this.offset, "utf8")
    this.offset += written
    return written
  }

  /** `false`: it is not, and what was written of it does not count. */
  private ascii(text: string): boolean {
    const { buffer, offset } = this
    for (let i = 0; i < text.length; i++) {
      const code = text.charCodeAt(i)
      if (code > 127) return false
      buffer[offset + i] = code
    }
    this.offset += text.length
    return true
  }

  private cstring(text: string): void {
    if (text.length > 0) this.utf8(text)
    this.reserve(1)
    this.buffer[this.offset++] = 0
  }

  parse(name: string, text: string): this {
    this.begin(0x50)
    this.cstring(name)
    this.cstring(text)
    this.int16(0)
    this.end()
    return this
  }

  /** Binds the unnamed portal; every result column in text format. */
  bind(name: string, params: ReadonlyArray<null | string | Buffer>): this {
    this.begin(0x42)
    this.cstring("")
    this.cstring(name)
    const count = params.length
    let binary = false
    for (let i = 0; i < count; i++) {
      if (typeof params[i] === "object" && params[i] !== null) {
        binary = true
        break
      }
    }
    if (binary) {
      this.int16(count)
      for (let i = 0; i < count; i++) this.int16(typeof params[i] === "object" && params[i] !== null ? 1 : 0)
    } else {
      this.int16(0)
    }
    this.int16(count)
    for (let i = 0; i < count; i++) {
      const value = params[i]
      if (value === null || value === undefined) {
        this.int32(-1)
      } else if (typeof value === "string") {
        this.reserve(4)
        const at = this.offset
        this.offset += 4
        const written = this.utf8(value)
        this.buffer.writeInt32BE(written, at)
      } else {
        this.int32(value.length)
        this.reserve(value.length)
        value.copy(this.buffer, this.offset)
        this.offset += value.length
      }
    }
    this.int16(0)
    this.end()
    return this
  }

  describePortal(): this {
    this.begin(0x44)
    this.reserve(2)
    this.buffer[this.offset++] = 0x50
    this.buffer[this.offset++] = 0
    this.end()
    return this
  }

  execute(): this {
    this.begin(0x45)
    this.cstring("")
    this.int32(0)
    this.end()
    return this
  }

  closeStatement(name: string): this {
    this.begin(0x43)
    this.reserve(1)
    this.buffer[this.offset++] = 0x53
    this.cstring(name)
    this.end()
    return this
  }

  query(text: string): this {
    this.begin(0x51)
    this.cstring(text)
    this.end()
    return this
  }

  sync(): this {
    this.begin(0x53)
    this.end()
    return this
  }

  flush(): this {
    this.begin(0x48)
    this.end()
    return this
  }

  copyData(chunk: Buffer): this {
    this.begin(0x64)
    this.reserve(chunk.length)
    chunk.copy(this.buffer, this.offset)
    this.offset += chunk.length
    this.end()
    return this
  }

  copyDone(): this {
    this.begin(0x63)
    this.end()
    return this
  }

  copyFail(message: string): this {
    this.begin(0x66)
    this.cstring(message)
    this.end()
    return this
  }

  /** Everything written since the last `take`; the caller owns it. */
  take(): Buffer {
    const length = this.offset
    this.offset = 0
    if (this.buffer.length > keptSize) {
      const out = this.buffer.subarray(0, length)
      this.buffer = Buffer.allocUnsafe(initialSize)
      return out
    }
    const out = Buffer.allocUnsafe(length)
    this.buffer.copy(out, 0, 0, length)
    return out
  }
}

/** Only these may be long, as in libpq; any other long message is garbage. */
const mayBeLong = (type: number): boolean =>
  type === Backend.DataRow ||
  type === Backend.RowDescription ||
  type === Backend.CopyData ||
  type === Backend.Error ||
  type === Backend.Notice ||
  type === Backend.Notification ||
  type === Backend.ParameterDescription

const isKnown = (type: number): boolean => {
  switch (type) {
    case Backend.Authentication:
    case Backend.BackendKeyData:
    case Backend.BindComplete:
    case Backend.CloseComplete:
    case Backend.CommandComplete:
    case Backend.CopyBothResponse:
    case Backend.CopyData:
    case Backend.CopyDone:
    case Backend.CopyInResponse:
    case Backend.CopyOutResponse:
    case Backend.DataRow:
    case Backend.EmptyQuery:
    case Backend.Error:
    case Backend.NegotiateProtocol:
    case Backend.NoData:
    case Backend.Notice:
    case Backend.Notification:
    case Backend.ParameterDescription:
    case Backend.ParameterStatus:
    case Backend.ParseComplete:
    case Backend.PortalSuspended:
    case Backend.ReadyForQuery:
    case Backend.RowDescription:
      return true
    default:
      return false
  }
}

/**
 * Called with each complete message: its type, the buffer, and where its body begins and ends. The buffer is
 * only valid during the call.
 * @internal
 */
export type OnMessage = (type: number, buffer: Buffer, start: number, end: number) => void

/** What the server sent is not the protocol: the stream can't be trusted any further. @internal */
export class ProtocolViolation extends Error {
  override readonly name = "ProtocolViolation"
}

/** Cuts the stream into messages. Throws `ProtocolViolation` for what no server sends. @internal */
export class Reader {
  private rest: Array<Buffer> = []
  private restLength = 0
  private needed = 5

  constructor(private readonly onMessage: OnMessage) {}

  /** What has arrived, at the beginning of a buffer that is only valid during the call. */
  push(chunk: Buffer, total = chunk.length): void {
    if (this.restLength > 0) {
      this.keep(chunk, 0, total)
      // A long message arrives in many chunks: join them once, when it is complete.
      if (this.restLength < this.needed) return
      chunk = Buffer.concat(this.rest, this.restLength)
      total = this.restLength
      this.rest = []
      this.restLength = 0
    }
    let offset = 0
    this.needed = 5
    while (total - offset >= 5) {
      const type = chunk[offset]!
      const length =
        chunk[offset + 1]! * 0x1000000 + (chunk[offset + 2]! << 16) + (chunk[offset + 3]! << 8) + chunk[offset + 4]!
      if (!isKnown(type) || length < 4 || length > (mayBeLong(type) ? maxMessage + 4 : 30000)) {
        throw new ProtocolViolation(`message type 0x${type.toString(16)} of length ${length}`)
      }
      const end = offset + 1 + length
      if (end > total) {
        this.needed = 1 + length
        break
      }
      this.onMessage(type, chunk, offset + 5, end)
      offset = end
    }
    if (offset < total) this.keep(chunk, offset, total)
  }

  private keep(chunk: Buffer, start: number, end: number): void {
    this.rest.push(Buffer.from(chunk.subarray(start, end)))
    this.restLength += end - start
  }
}

/** The end of a C string that begins at `start`, within the message. @internal */
export const cstringEnd = (buffer: Buffer, start: number, end: number): number => {
  for (let at = start; at < end && at < start + short; at++) if (buffer[at] === 0) return at
  const at = buffer.indexOf(0, start)
  if (at === -1 || at >= end) throw new ProtocolViolation("unterminated string")
  return at
}

type Sliceable = Buffer & { utf8Slice(start: number, end: number): string }

const { fromCharCode } = String

/** Short ASCII, most of all, is decoded without the call into C++ that every `toString` makes. @internal */
export const textOf = (buffer: Buffer, start: number, end: number): string => {
  const length = end - start
  if (length >= 16) return (buffer as Sliceable).utf8Slice(start, end)
  let bits = 0
  for (let i = start; i < end; i++) bits |= buffer[i]!
  if (bits > 127) return (buffer as Sliceable).utf8Slice(start, end)
  // Four at a time: a string for each character costs three times as much, and leaves more behind.
  let out = ""
  let i = start
  for (; i + 3 < end; i += 4) out += fromCharCode(buffer[i]!, buffer[i + 1]!, buffer[i + 2]!, buffer[i + 3]!)
  switch (end - i) {
    case 3:
      return out + fromCharCode(buffer[i]!, buffer[i + 1]!, buffer[i + 2]!)
    case 2:
      return out + fromCharCode(buffer[i]!, buffer[i + 1]!)
    case 1:
      return out + fromCharCode(buffer[i]!)
    default:
      return out
  }
}

/** A message ends where its content does: one that is longer has swallowed others. @internal */
export const endsAt = (offset: number, end: number): void => {
  if (offset !== end) throw new ProtocolViolation("a message is longer than what it says")
}

/** The C string that ends the message. @internal */
export const lastString = (buffer: Buffer, start: number, end: number): string => {
  const stop = cstringEnd(buffer, start, end)
  endsAt(stop + 1, end)
  return textOf(buffer, start, stop)
}

/** What an ErrorResponse or a NoticeResponse says, with the names that `pg` gives the fields. @internal */
export interface ServerMessage {
  readonly severity?: string
  readonly code?: string
  readonly message?: string
  readonly detail?: string
  readonly hint?: string
  readonly position?: string
  readonly internalPosition?: string
  readonly internalQuery?: string
  readonly where?: string
  readonly schema?: string
  readonly table?: string
  readonly column?: string
  readonly dataType?: string
  readonly constraint?: string
  readonly file?: string
  readonly line?: string
  readonly routine?: string
}

const fieldNames: { readonly [code: string]: keyof ServerMessage } = {
  C: "code",
  M: "message",
  D: "detail",
  H: "hint",
  P: "position",
  p: "internalPosition",
  q: "internalQuery",
  W: "where",
  s: "schema",
  t: "table",
  c: "column",
  d: "dataType",
  n: "constraint",
  F: "file",
  L: "line",
  R: "routine"
}

/** @internal */
export const readServerMessage = (buffer: Buffer, start: number, end: number): ServerMessage => {
  const fields: { -readonly [K in keyof ServerMessage]: ServerMessage[K] } = {}
  let offset = start
  while (offset < end && buffer[offset] !== 0) {
    const code = String.fromCharCode(buffer[offset]!)
    const stop = cstringEnd(buffer, offset + 1, end)
    const text = buffer.toString("utf8", offset + 1, stop)
    // V is the severity that is never translated; S is, and comes first.
    if (code === "V" || (code === "S" && fields.severity === undefined)) fields.severity = text
    const name = fieldNames[code]
    if (name !== undefined) fields[name] = text
    offset = stop + 1
  }
  endsAt(offset + 1, end)
  return fields
}
