/**
 * What happens to a connection between two borrowers: how what was left behind is swept away, and how a connection is
 * asked whether it is still there.
 */
import type { DbError } from "../DbError.js"
import { deadline } from "./deadline.js"
import { Command } from "./pipeline.js"
import type { Wire } from "./wire.js"

/**
 * Everything of a session but its named statements, which the client goes on using (`DISCARD ALL` would drop
 * them). One message, about as long as a commit.
 * @internal
 */
export const resetText =
  "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;" +
  "SELECT pg_advisory_unlock_all();DISCARD TEMP;DISCARD SEQUENCES"

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
