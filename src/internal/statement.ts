/**
 * What a statement is sent as, decided from its text and remembered with it.
 */
import { DbError } from "../DbError.js"
import { checkText, copyRefused, encodeParams } from "./input.js"
import { copiesOf } from "./queryText.js"
import type { Command, CopyHandler, Watch } from "./command.js"

/** A statement, checked and encoded. @internal */
export interface Spec {
  readonly text: string
  readonly params: ReadonlyArray<null | string | Buffer>
  readonly rowMode: "object" | "array"
  /** Worth a named statement. */
  readonly prepare: boolean
  /** Several statements in one text: only the simple protocol takes them. */
  readonly simple: boolean
  readonly copy: CopyHandler | undefined
  /** What it reads from, which ends with its transaction, or with the block that it was declared in. */
  readonly cursor: { readonly isGone: boolean } | undefined
  /** Told how many bytes its rows were on the wire. */
  readonly weigh: ((bytes: number) => void) | undefined
  /** The search path that it runs with; nothing: the connection's own. */
  readonly path: string | undefined
  readonly watch: Watch | undefined
  /** What has been submitted of its batch, which is sent together or not at all. */
  readonly batch: Array<Command> | undefined
  /** It is not the last of its batch. */
  readonly more: boolean | undefined
}

interface Known {
  readonly refused: DbError | undefined
  /** Why it can't be run as a statement, but by COPY's own functions. */
  readonly copies: DbError | undefined
  readonly several: boolean
  readonly prepare: boolean
}

const known = new Map<string, Known>()
const knownTexts = 4096
const longestKept = 16384

// Others run once, or can't be planned: a name would only fill the cache.
const planned = /^\s*(?:select|insert|update|delete|with|values|merge|table)\b/i

const look = (text: string): Known => {
  const refused = checkText(text)
  if (refused !== undefined) return { refused, copies: undefined, several: false, prepare: false }
  const semicolon = text.indexOf(";")
  const copies = copiesOf(text)
  // The server would wait for data, and take for data what is sent behind it; or it would send some, to nobody.
  const way = copies.find((_) => _ === "in") ?? copies.find((_) => _ === "out")
  const fact: Known = {
    refused: undefined,
    copies: way === undefined ? undefined : copyRefused(way),
    // A semicolon in a literal makes it simple as well: slower, not wrong.
    several: semicolon !== -1 && text.slice(semicolon + 1).trim() !== "",
    prepare: text.length < longestKept && planned.test(text)
  }
  if (text.length < longestKept) {
    if (known.size >= knownTexts) known.clear()
    known.set(text, fact)
  }
  return fact
}

/** The text and the values of a statement of our clients, or why it has none: a name in it that is refused. @internal */
export const compileOf = <Compiled>(
  statement: { readonly compile: (withoutTransform?: boolean) => Compiled },
  withoutTransform = false
): Compiled | DbError => {
  try {
    return statement.compile(withoutTransform)
  } catch (error) {
    if (DbError.is(error)) return error
    throw error
  }
}

/** Every spec is one, or a copy of one: a copy that adds a field would be of a shape of its own, each time. */
class Checked implements Spec {
  readonly cursor = undefined
  readonly weigh = undefined
  readonly watch = undefined
  readonly batch = undefined
  readonly more = undefined

  constructor(
    readonly text: string,
    readonly params: ReadonlyArray<null | string | Buffer>,
    readonly rowMode: "object" | "array",
    readonly prepare: boolean,
    readonly simple: boolean,
    readonly copy: CopyHandler | undefined,
    readonly path: string | undefined
  ) {}
}

const noParams: ReadonlyArray<null | string | Buffer> = []

/** @internal */
export const isRefused = (made: unknown): made is DbError => made instanceof Error

/** Refuses what must not reach the wire. @internal */
export const makeSpec = (
  text: string,
  params: ReadonlyArray<unknown>,
  rowMode: "object" | "array",
  options: {
    readonly several: boolean
    readonly prepare: boolean
    readonly copy?: CopyHandler | undefined
    readonly path?: string | undefined
  }
): Spec | DbError => {
  const fact = known.get(text) ?? look(text)
  if (fact.refused !== undefined) return fact.refused
  if (fact.copies !== undefined && options.copy === undefined) return fact.copies
  const encoded = params.length === 0 ? noParams : encodeParams(params)
  if (!Array.isArray(encoded)) return encoded as DbError
  return new Checked(
    text,
    encoded,
    rowMode,
    options.prepare && fact.prepare,
    options.copy !== undefined || (encoded.length === 0 && fact.several && options.several),
    options.copy,
    options.path
  )
}
