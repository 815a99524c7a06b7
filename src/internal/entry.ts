/**
 * What is ambient for one engine, and the list of those that have something ambient.
 */
import type { EngineCore } from "./engine.js"
import type { Around, Frame } from "./frame.js"
import type { StackNode, Stacked } from "./lease.js"
import type { Slot } from "./slot.js"
import type { Writes } from "./writes.js"

/** What is ambient for one engine. @internal */
export interface Entry {
  readonly slot: Slot | undefined
  /** The innermost block around the fiber, of the slot's session. */
  readonly frame: Frame | undefined
  /** The blocks around that one's session, or around where there is none. */
  readonly around: Around | undefined
  readonly stack: StackNode | undefined
  /** A connection for the statements of its own effect, which nobody shares. */
  readonly orphan: Stacked | undefined
  readonly schema: string | undefined
  readonly tenant: string | undefined
  readonly using: string | undefined
  /** Where commits are counted, for who wants to read his own writes on a standby. */
  readonly writes: Writes | undefined
  /** What a standby has to show before it is read from. */
  readonly after: string | undefined
  /** Inside of `beforeSession`, which a session that is opened there does not run again. */
  readonly preparing: true | undefined
  /** What stands in its place. */
  readonly instead: EngineCore | undefined
  /** The sandbox around the fiber: also where something else stands in its place. */
  readonly sandbox: EngineCore | undefined
}

/** In no session and on no connection. @internal */
export const nowhere = { slot: undefined, frame: undefined, stack: undefined, orphan: undefined } as const

/** Every entry is a copy of it: one that adds a field would be of a shape of its own, each time. @internal */
export const emptyEntry: Entry = {
  ...nowhere,
  around: undefined,
  schema: undefined,
  tenant: undefined,
  using: undefined,
  writes: undefined,
  after: undefined,
  preparing: undefined,
  instead: undefined,
  sandbox: undefined
}

/** Where unqualified names are looked up; nothing: as the engine's connections do. @internal */
export const searchPath = (entry: Entry): string | undefined => entry.using ?? entry.tenant ?? entry.schema

/**
 * What a combinator has made ambient for each engine, in the order in which they got it. There are few engines and many
 * sessions: a list is looked through sooner than a map is copied, and takes a quarter of the memory.
 * @internal
 */
export interface Entries {
  readonly key: object
  readonly entry: Entry
  /** When it was made: of two for the same engine the later one counts. */
  readonly sequence: number
  readonly next: Entries | undefined
}

/** @internal */
export const find = (entries: Entries | undefined, key: object): Entries | undefined => {
  for (let at = entries; at !== undefined; at = at.next) if (at.key === key) return at
  return undefined
}

/** In place of the one for that key, or at the end. @internal */
export const replace = (entries: Entries | undefined, key: object, entry: Entry, sequence: number): Entries =>
  entries === undefined
    ? { key, entry, sequence, next: undefined }
    : entries.key === key
      ? { key, entry, sequence, next: entries.next }
      : { ...entries, next: replace(entries.next, key, entry, sequence) }
