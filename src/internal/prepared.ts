/**
 * The named statements of one connection: what the server knows under which name, and which name has to make room.
 */
import { randomBytes } from "node:crypto"
import type { Group } from "./command.js"
import type { Shape } from "./rows.js"

/** @internal */
export interface Prepared {
  /** What it is known by: its text and, when names are looked up elsewhere, where. */
  readonly key: string
  readonly name: string
  /** The group that its Parse travels in, until that is answered. */
  parsing: Group | undefined
  shape: Shape | undefined
  used: number
}

/** How a statement is to be sent. @internal */
export type Naming =
  | { readonly _tag: "Known"; readonly prepared: Prepared }
  | { readonly _tag: "New"; readonly prepared: Prepared; readonly evicted: string | undefined }
  | { readonly _tag: "Unnamed" }

const unnamed: Naming = { _tag: "Unnamed" }

/** @internal */
export class PreparedStatements {
  private readonly byKey = new Map<string, Prepared>()
  /**
   * Behind a pooler in transaction mode connections meet each other's statements. With names of its own one finds
   * nothing there (26000), which is mended or typed; a name in common would run a statement of somebody else's.
   */
  private readonly prefix = `edb_${randomBytes(6).toString("base64url")}_`
  private names = 0
  private clock = 0
  /** Names that the server still knows and the client has given up: closed with the next write. */
  private leftovers: Array<string> = []

  constructor(private readonly most: number) {}

  /** What a statement that is worth a name is sent as, in this group. */
  use(key: string, group: Group): Naming {
    if (this.most === 0) return unnamed
    const known = this.byKey.get(key)
    if (known === undefined) {
      const evicted = this.byKey.size >= this.most ? this.evict() : undefined
      const prepared: Prepared = {
        key,
        name: this.prefix + ++this.names,
        parsing: group,
        shape: undefined,
        used: ++this.clock
      }
      this.byKey.set(key, prepared)
      return { _tag: "New", prepared, evicted }
    }
    // Its Parse is in flight in another group and may fail there: not yet a name to rely on.
    if (known.parsing !== undefined && known.parsing !== group) return unnamed
    known.used = ++this.clock
    return { _tag: "Known", prepared: known }
  }

  private evict(): string | undefined {
    let oldest: Prepared | undefined = undefined
    for (const prepared of this.byKey.values()) {
      if (oldest === undefined || prepared.used < oldest.used) oldest = prepared
    }
    if (oldest === undefined) return undefined
    this.byKey.delete(oldest.key)
    return oldest.name
  }

  /** Its Parse failed or was not run. */
  forget(prepared: Prepared): void {
    if (this.byKey.get(prepared.key) === prepared) this.byKey.delete(prepared.key)
  }

  /** Its plan may not be used any more, but the server keeps the name. */
  drop(prepared: Prepared): void {
    if (this.byKey.get(prepared.key) !== prepared) return
    this.byKey.delete(prepared.key)
    this.leftovers.push(prepared.name)
  }

  /** A Close that was not run, because something before it in its group had failed. */
  closeLater(name: string): void {
    this.leftovers.push(name)
  }

  takeLeftovers(): ReadonlyArray<string> {
    if (this.leftovers.length === 0) return nothing
    const names = this.leftovers
    this.leftovers = []
    return names
  }

  /** The server's statements are gone (DISCARD ALL, another server behind a pooler): parse them again. */
  forgetAll(): void {
    this.byKey.clear()
    this.leftovers = []
  }
}

const nothing: ReadonlyArray<string> = []
