/**
 * As much of PostgreSQL's protocol 3 as a proxy needs to tell messages apart and name what they carry.
 */

/** One whole message as it travels. `type` is the protocol's letter; start-up messages have words instead. */
export interface Frame {
  readonly type: string
  readonly bytes: Buffer
}

/** What a message says: the statement or portal that it names, and its text (SQL, command tag, error). */
export interface Said {
  readonly name: string
  readonly text: string
}

const nothing: Said = { name: "", text: "" }

const startupWords = new Map([
  [80877102, "cancel"],
  [80877103, "ssl"],
  [80877104, "gss"]
])

/** Cuts a byte stream into messages, however the network has cut it. */
export class Framer {
  private chunks: Array<Buffer> = []
  private size = 0
  private wanted = 0

  /** `typed` is false while start-up messages, which have no letter, are expected. */
  constructor(public typed: boolean) {}

  *push(chunk: Buffer): Generator<Frame> {
    this.chunks.push(chunk)
    this.size += chunk.length
    if (this.size < this.wanted) return
    let rest = this.chunks.length === 1 ? chunk : Buffer.concat(this.chunks)
    for (;;) {
      const head = this.typed ? 1 : 0
      this.wanted = rest.length < head + 4 ? head + 4 : head + rest.readInt32BE(head)
      if (rest.length < this.wanted) break
      const bytes = rest.subarray(0, this.wanted)
      rest = rest.subarray(this.wanted)
      yield { type: this.typed ? String.fromCharCode(bytes[0]!) : startupWord(bytes), bytes }
    }
    this.chunks = [rest]
    this.size = rest.length
  }
}

const startupWord = (bytes: Buffer): string => startupWords.get(bytes.readInt32BE(4)) ?? "startup"

const strings = (bytes: Buffer, from: number, count: number): Array<string> => {
  const found: Array<string> = []
  for (let at = from; found.length < count && at < bytes.length;) {
    const end = bytes.indexOf(0, at)
    if (end < 0) break
    found.push(bytes.toString("utf8", at, end))
    at = end + 1
  }
  return found
}

/**
 * Reads frontend messages of one connection. It remembers which name stands for which SQL, so that a Bind and an
 * Execute tell the statement that they run.
 */
export class FrontendReader {
  private readonly statements = new Map<string, string>()
  private readonly portals = new Map<string, string>()

  read({ bytes, type }: Frame): Said {
    switch (type) {
      case "Q": {
        return { name: "", text: strings(bytes, 5, 1)[0] ?? "" }
      }
      case "P": {
        const [name = "", text = ""] = strings(bytes, 5, 2)
        this.statements.set(name, text)
        return { name, text }
      }
      case "B": {
        const [portal = "", name = ""] = strings(bytes, 5, 2)
        const text = this.statements.get(name) ?? ""
        this.portals.set(portal, text)
        return { name, text }
      }
      case "E": {
        const [name = ""] = strings(bytes, 5, 1)
        return { name, text: this.portals.get(name) ?? "" }
      }
      case "D":
      case "C": {
        const [name = ""] = strings(bytes, 6, 1)
        return { name, text: (bytes[5] === 0x53 ? this.statements : this.portals).get(name) ?? "" }
      }
      case "startup": {
        return { name: "", text: strings(bytes, 8, Infinity).join(" ").trim() }
      }
      case "cancel": {
        return { name: String(bytes.readInt32BE(8)), text: "" }
      }
      default: {
        return nothing
      }
    }
  }
}

/** Reads a backend message: command tag, error code and message, parameter, transaction status, backend pid. */
export const readBackend = ({ bytes, type }: Frame): Said => {
  switch (type) {
    case "C": {
      return { name: "", text: strings(bytes, 5, 1)[0] ?? "" }
    }
    case "E":
    case "N": {
      const fields = new Map(strings(bytes, 5, Infinity).map((field) => [field[0], field.slice(1)]))
      return { name: fields.get("C") ?? "", text: fields.get("M") ?? "" }
    }
    case "S": {
      const [name = "", text = ""] = strings(bytes, 5, 2)
      return { name, text }
    }
    case "Z": {
      return { name: "", text: String.fromCharCode(bytes[5]!) }
    }
    case "K": {
      return { name: String(bytes.readInt32BE(5)), text: "" }
    }
    case "A": {
      const [name = "", text = ""] = strings(bytes, 9, 2)
      return { name, text }
    }
    default: {
      return nothing
    }
  }
}
