/**
 * Which statements leave something behind in the session of the server, and how it is swept away.
 */

/**
 * Everything of a session but its named statements, which the client goes on using (`DISCARD ALL` would drop
 * them). One message, about as long as a commit.
 * @internal
 */
export const resetText =
  "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;" +
  "SELECT pg_advisory_unlock_all();DISCARD TEMP;DISCARD SEQUENCES"

const leavingTags = /^(?:SET|LISTEN|DO|CALL|LOAD|PREPARE|DISCARD|DECLARE CURSOR|CREATE FUNCTION)/

/** SET LOCAL and its like end with the transaction; WITH HOLD does not. */
const localSet = /^\s*set\s+(?:local|transaction|constraints)\b/i

const leavingText =
  /advisory_lock|pg_temp|\bsetseed\b|dblink_connect|\bset_config\b|\b(?:create|into)\s+(?:(?:local|global)\s+)?temp(?:orary)?\b|\bwith\s+hold\b/i

const sessionSetConfig = /set_config\s*\((?![^()]*,\s*true\s*\))/i
const onlySetConfig = /advisory_lock|pg_temp|\bsetseed\b|dblink_connect|temp|\bhold\b/i

const cache = new Map<string, boolean>()

/** By the text alone; the answer is remembered, since texts repeat. */
const byText = (text: string): boolean => {
  let known = cache.get(text)
  if (known === undefined) {
    known = leavingText.test(text) && (onlySetConfig.test(text) || sessionSetConfig.test(text))
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
    if (tag === "SET" && localSet.test(text) && !text.includes(";")) return byText(text)
    if (tag === "DECLARE CURSOR") return byText(text)
    return true
  }
  return byText(text)
}
