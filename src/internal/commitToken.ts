/**
 * Where in the log of the server a commit is, and waiting until a standby shows it.
 */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { EngineCore } from "./engine.js"
import { ambientBound, execute, executeApart } from "./execute.js"
import { Command } from "./pipeline.js"
import type { Result } from "./rows.js"
import type { Slot } from "./slot.js"
import type { Unit } from "./unit.js"
import type { Wire } from "./wire.js"
import { Writes } from "./writes.js"

/**
 * What has been flushed, not what has been inserted: that may be a neighbour's, who has not committed, and reaches no
 * standby before he does. A commit that is not waited for may not have been flushed.
 */
const position =
  "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() " +
  "WHEN current_setting('synchronous_commit') = 'off' THEN pg_current_wal_insert_lsn() " +
  "ELSE pg_current_wal_flush_lsn() END::text"

const shown = "SELECT (NOT pg_is_in_recovery() OR coalesce(pg_last_wal_replay_lsn() >= $1::pg_lsn, false))::text"

const form = /^[0-9A-F]{1,8}\/[0-9A-F]{1,8}$/i

/** @internal */
export const isToken = (text: string): boolean => form.test(text)

/** The later of two, of which any may be missing; one that is no token comes first, to be refused. @internal */
export const later = (one: string | undefined, other: string | undefined): string | undefined => {
  if (one === undefined || other === undefined) return one ?? other
  if (!isToken(one) || !isToken(other)) return isToken(one) ? other : one
  const number = (text: string) => {
    const [high, low] = text.split("/")
    return (BigInt(`0x${high!}`) << 32n) + BigInt(`0x${low!}`)
  }
  return number(one) >= number(other) ? one : other
}

/** On a connection as it is, without a transaction of the session's. */
const bare = (wire: Wire, text: string, params: ReadonlyArray<string>): Effect.Effect<Result, DbError> =>
  Effect.async<Result, DbError>((resume) => {
    const command = new Command(text, params, "array", true, true, false, undefined, (error, result) =>
      resume(
        error === undefined
          ? Effect.succeed(result!)
          : command.undone && !wire.dead
            ? bare(wire, text, params)
            : Effect.fail(error)
      )
    )
    wire.submit(command)
    return Effect.sync(() => {
      if (!command.settled) wire.interrupt(command)
    })
  })

/** Borrows the connection that a session will go on with. */
const ownWire = (unit: Unit): Effect.Effect<Wire, DbError> =>
  Effect.async<Wire, DbError>((resume) => {
    let stop: () => void = () => {}
    const leave = unit.lease.claim(undefined, (error) => {
      if (error !== undefined) return resume(Effect.fail(error))
      stop = unit.lease.borrow((error, wire) => resume(wire === undefined ? Effect.fail(error!) : Effect.succeed(wire)))
    })
    return Effect.sync(() => {
      leave()
      stop()
    })
  })

/**
 * A position in the log that is behind all that has been committed: none when nothing was written. It is asked once
 * for the same commits, on the session's connection where that is there and free.
 * @internal
 */
export const tokenOf = (
  engine: EngineCore,
  writes: Writes,
  unit?: Unit,
  always = false
): Effect.Effect<Option.Option<string>, DbError> =>
  Effect.suspend(() => {
    if ((always ? writes.allowed : writes.made) === 0) return Effect.succeed(Option.none())
    const at = writes.allowed
    if (writes.token?.at === at) return Effect.succeed(Option.some(writes.token.text))
    const wire = unit === undefined || unit.ended || unit.lease.unit !== undefined ? undefined : unit.lease.wire
    return Effect.map(
      wire === undefined || wire.dead ? executeApart(engine, position, []) : bare(wire, position, []),
      ({ rows }) => {
        const text = String((rows[0] as ReadonlyArray<string>)[0])
        writes.token = { at, text }
        return Option.some(text)
      }
    )
  })

const behind = (engine: EngineCore, token: string, millis: number): DbError =>
  DbError.make("ReplicaBehind", {
    message: `The server of "${engine.name}" has not come to ${token} within ${millis} ms.`,
    hint: "Read from the primary, or wait longer. pg_stat_replication on the primary tells how far behind it is."
  })

const malformed = (): DbError =>
  DbError.make("InvalidInput", {
    message: "The commit token is none.",
    hint: "Give waitFor what DbSession.commitToken yields: a position in the log, such as 0/3000148."
  })

const tooLate = (unit: Unit): DbError =>
  DbError.make("InvalidInput", {
    message: `The transaction of the session "${unit.name}" sees what was there when it began, however long it waits.`,
    hint: "Call waitFor before its first statement, or use the isolation level read committed."
  })

/**
 * Waits until the server of this engine shows what a token stands for; a primary does. In a session it is its
 * connection that waits, before the transaction if none is open.
 * @internal
 */
export const waitFor = (
  engine: EngineCore,
  token: string,
  timeout: Duration.DurationInput = "1 second",
  at?: { readonly slot: Slot; readonly unit: Unit }
): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    if (!isToken(token)) return Effect.fail(malformed())
    const millis = Math.max(1, Duration.toMillis(timeout))
    const answer = ({ rows }: Result) => (rows[0] as ReadonlyArray<string>)[0] === "true"
    const look = Effect.withFiberRuntime<boolean, DbError>((fiber) => {
      if (at === undefined) return Effect.map(outside(fiber, engine, token), answer)
      const { slot, unit } = at
      if (!unit.open) return Effect.flatMap(ownWire(unit), (wire) => Effect.map(bare(wire, shown, [token]), answer))
      const { isolation } = unit.options
      return isolation === "repeatable read" || isolation === "serializable"
        ? Effect.fail(tooLate(unit))
        : execute(fiber, engine, { _tag: "Slot", slot, unit }, shown, [token], "array", true, answer)
    })
    const loop = (pause: number): Effect.Effect<void, DbError> =>
      Effect.flatMap(look, (there) =>
        there ? Effect.void : Effect.zipRight(Effect.sleep(pause), loop(Math.min(pause * 2, 50)))
      )
    // Outside of a session nobody needs the question any more that a silent server is asked: not waited for.
    const whole = at === undefined ? Effect.disconnect(loop(1)) : loop(1)
    return Effect.timeoutFail(whole, { duration: millis, onTimeout: () => behind(engine, token, millis) })
  })

/** On the ambient connection, else on one of the pool. */
const outside = (
  fiber: Fiber.RuntimeFiber<any, any>,
  engine: EngineCore,
  token: string
): Effect.Effect<Result, DbError> => {
  const { orphan, stack } = Ambient.entry(fiber, engine)
  return orphan === undefined && stack === undefined
    ? executeApart(engine, shown, [token])
    : execute(fiber, engine, ambientBound, shown, [token], "array", true, (result) => result)
}

/** Counts what is committed in an effect, and asks for its position when that has succeeded. @internal */
export const withCommitToken = <A, E, R>(
  engine: EngineCore,
  effect: Effect.Effect<A, E, R>
): Effect.Effect<readonly [A, Option.Option<string>], E | DbError, R> =>
  Effect.withFiberRuntime((fiber) => {
    const { slot, writes: outer } = Ambient.entry(fiber, engine)
    const writes = new Writes(outer ?? slot?.writes)
    // The session around it may commit in between.
    const before = slot?.writes.made ?? 0
    return Effect.flatMap(
      Ambient.locally(effect, engine, (entry) => ({ ...entry, writes })),
      (value) => {
        const all = slot !== undefined && slot.writes.made > before ? slot.writes : writes
        return Effect.map(tokenOf(engine, all), (token) => [value, token] as const)
      }
    )
  })
