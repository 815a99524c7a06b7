/**
 * What happens to a connection between two borrowers: which statements leave something behind in the session of the
 * server, how it is swept away, and how a connection is asked whether it is still there.
 */
import type { DbError } from "../DbError.js"
import { deadline } from "./deadline.js"
import { Command } from "./pipeline.js"
import { codeOf } from "./queryText.js"
import type { Wire } from "./wire.js"

/**
 * Everything of a session but its named statements, which the client goes on using (`DISCARD ALL` would drop
 * them). One message, about as long as a commit.
 * @internal
 */
export const resetText =
  "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;" +
  "SELECT pg_advisory_unlock_all();DISCARD TEMP;DISCARD SEQUENCES"

const leavingTags = /^(?:SET|RESET|LISTEN|DO|CALL|LOAD|PREPARE|DISCARD|DECLARE CURSOR|CREATE FUNCTION)/

/** SET LOCAL and its like end with the transaction; WITH HOLD does not. */
const localSet = /^\s*set\s+(?:local|transaction|constraints)\b/i

/** Without one of these words a text leaves nothing. */
const suspicious =
  /advisory_lock|pg_temp|pg_settings|\bsetseed\b|dblink_connect|set_config|\btemp(?:orary)?\b|\bhold\b/i

const leaving =
  /advisory_lock|pg_temp|\bsetseed\b|dblink_connect|\binto\s+(?:(?:local|global)\s+)?temp(?:orary)?\b|\bwith\s+hold\b/i

/** A word in one of these commands; where in it, is not asked. */
const leavingCommands: ReadonlyArray<readonly [command: RegExp, word: RegExp]> = [
  [/\bcreate\b/i, /\btemp(?:orary)?\b/i],
  [/\bupdate\b/i, /pg_settings/i]
]

/** More than `codeOf` takes away. */
const nestedComment = /\/\*(?:(?!\*\/)[^])*\/\*/

const setsConfig = /set_config/gi
const localSetConfig = /\bset_config\s*\([^(),]*,[^(),]*,\s*true\s*\)/gi

const count = (pattern: RegExp, text: string): number => text.match(pattern)?.length ?? 0

/** A literal may be run as well, a comment may hide what is: both readings count, and a doubt costs a round trip. */
const looksLeaving = (text: string): boolean => {
  if (!suspicious.test(text)) return false
  const code = codeOf(text)
  return (
    leaving.test(text) ||
    leaving.test(code) ||
    nestedComment.test(text) ||
    leavingCommands.some(([command, word]) => command.test(text) && word.test(text)) ||
    count(setsConfig, text) > count(localSetConfig, code)
  )
}

const cache = new Map<string, boolean>()

/** By the text alone; the answer is remembered, since texts repeat. */
const byText = (text: string): boolean => {
  let known = cache.get(text)
  if (known === undefined) {
    known = looksLeaving(text)
    if (text.length < 4096) {
      if (cache.size >= 4096) cache.clear()
      cache.set(text, known)
    }
  }
  return known
}

/**
 * Whether a command that completed with this tag may have changed the session. What a function of the user's
 * does inside a SELECT can't be seen: `resetOnRelease: "always"` is for that.
 * @internal
 */
export const leavesState = (tag: string, text: string): boolean => {
  if (leavingTags.test(tag)) {
    if ((tag === "SET" || tag === "SET CONSTRAINTS") && localSet.test(text) && !text.includes(";")) return byText(text)
    if (tag === "DECLARE CURSOR") return byText(text)
    return true
  }
  return byText(text)
}

const send = (wire: Wire, text: string, done: (error: DbError | undefined) => void): void =>
  wire.submit(new Command(text, [], "array", true, false, true, undefined, (error) => done(error)))

/** Work on a connection that nobody has must not hang: within the limit, or the connection is destroyed. @internal */
export const bounded = (
  wire: Wire,
  limitMillis: number,
  work: (done: () => void) => void,
  next: () => void,
  late?: () => void
): void => {
  let finished = false
  const stop = deadline(limitMillis, () => {
    finished = true
    late?.()
    wire.destroy(new Error("the server did not answer between two borrowers"))
    next()
  })
  work(() => {
    if (finished) return
    finished = true
    stop()
    next()
  })
}

/** One empty query: the connection is there, or it is found to be dead. @internal */
export const ping = (wire: Wire, limitMillis: number, next: () => void, late: () => void): void =>
  bounded(wire, limitMillis, (done) => send(wire, "", done), next, late)

/** Ends what is open and, with `sweep`, puts the session back to what it was after start-up. @internal */
export const reset = (wire: Wire, limitMillis: number, sweep: boolean, next: () => void): void => {
  const open = wire.status !== "I"
  const all = wire.prepares ? `${resetText};DEALLOCATE ALL` : resetText
  const text = !sweep ? "ROLLBACK" : open ? `ROLLBACK;${all}` : all
  bounded(
    wire,
    limitMillis,
    (done) =>
      send(wire, text, (error) => {
        if (error !== undefined) wire.doomed ??= "it could not be reset"
        done()
      }),
    () => {
      if (sweep) wire.dirty = wire.prepares = false
      if (wire.status !== "I") wire.doomed ??= "it could not be rolled back"
      next()
    }
  )
}
