/**
 * Whether what was committed has changed anything that a standby will show, by the tags and the texts of its
 * statements.
 */

/** Tags of statements that never change data. */
const neverWrites = new Set(
  (
    "SHOW SET RESET BEGIN START COMMIT ROLLBACK SAVEPOINT RELEASE LISTEN UNLISTEN NOTIFY LOCK DECLARE CLOSE MOVE " +
    "DISCARD DEALLOCATE"
  ).split(" ")
)

/** Tags that are as good as their text: a query may have a part that writes. */
const byText = new Set(["SELECT", "FETCH", "EXPLAIN", "PREPARE", ""])

const writingText = /\b(?:insert|update|delete|merge|truncate|into|create|alter|drop|refresh|nextval|setval|lo_\w+)\b/i

const known = new Map<string, boolean>()

/**
 * A SELECT that calls a function is taken for one that reads: what the function does can't be seen.
 * @internal
 */
export const mayWrite = (tag: string, text: string): boolean => {
  if (!byText.has(tag)) return !neverWrites.has(tag)
  let writes = known.get(text)
  if (writes === undefined) {
    writes = writingText.test(text)
    if (text.length < 4096) {
      if (known.size >= 4096) known.clear()
      known.set(text, writes)
    }
  }
  return writes
}

/** What a session has committed, and with it those that were opened in it. @internal */
export class Writes {
  /** Commits, or implicit statements, that have written something, as far as can be seen. */
  made = 0
  /** Those that were allowed to. */
  allowed = 0
  /** Where in the log all of it is, for this many of `allowed`. */
  token: { readonly at: number; readonly text: string } | undefined = undefined

  constructor(private readonly outer: Writes | undefined = undefined) {}

  committed(wrote: boolean): void {
    this.allowed++
    if (wrote) this.made++
    this.outer?.committed(wrote)
  }
}
