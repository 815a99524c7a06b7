/**
 * What the user's statements leave behind in the session of the server, by their tags and texts.
 */
import { codeOf } from "./queryText.js"

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

/** By the text alone; the answer is remembered, since texts repeat. @internal */
export const leavesByText = (text: string): boolean => {
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
    if ((tag === "SET" || tag === "SET CONSTRAINTS") && localSet.test(text) && !text.includes(";"))
      return leavesByText(text)
    if (tag === "DECLARE CURSOR") return leavesByText(text)
    return true
  }
  return leavesByText(text)
}

const commitsOnItsWay = /(?:^|;)\s*(?:call|do)\b/i

/**
 * Whether a statement that failed half-way, and so has no tag, may have changed the session: by what no rollback undoes
 * or, outside a transaction of ours (`solo`), by what it had committed before.
 * @internal
 */
export const failureLeaves = (text: string, solo: boolean): boolean =>
  leavesByText(text) || (solo && commitsOnItsWay.test(codeOf(text)))
