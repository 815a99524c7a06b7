/**
 * Every database's session of a fiber, ended together.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Ambient from "./ambient.js"
import { EngineCore } from "./engine.js"
import * as sessions from "./session.js"
import type { Slot } from "./slot.js"
import type { Unit } from "./unit.js"

const isCore = (key: object): key is EngineCore => key instanceof EngineCore

/** Every database's session of the fiber, in the order in which they were opened. */
const allOpen: Effect.Effect<ReadonlyArray<{ readonly core: EngineCore; readonly slot: Slot; readonly unit: Unit }>> =
  Effect.map(Ambient.entries, (entries) =>
    entries.flatMap(([core, { sandbox, slot }]) =>
      // In a sandbox the session of its engine is out of reach.
      isCore(core) &&
      sandbox === undefined &&
      slot !== undefined &&
      !slot.ended &&
      slot.unit !== undefined &&
      !slot.unit.ended
        ? [{ core, slot, unit: slot.unit }]
        : []
    )
  )

const inAll = (f: (slot: Slot, unit: Unit) => Effect.Effect<void, SqlError>): Effect.Effect<void, SqlError> =>
  Effect.flatMap(allOpen, (open) =>
    Effect.flatMap(
      Effect.forEach(open, ({ slot, unit }) => Effect.exit(f(slot, unit))),
      (exits) => exits.find(Exit.isFailure) ?? Effect.void
    )
  )

/**
 * No two-phase commit: after the first failure what was committed stays, the rest is rolled back, all are released.
 * @internal
 */
export const commitAll: Effect.Effect<void, SqlError> = Effect.flatMap(allOpen, (open) => {
  const next = (at: number): Effect.Effect<void, SqlError> => {
    const one = open[at]
    if (one === undefined) return Effect.void
    return Effect.matchCauseEffect(sessions.commit(one.slot, one.unit), {
      onSuccess: () => next(at + 1),
      onFailure: (cause) =>
        Effect.zipRight(
          Effect.forEach(open, ({ slot, unit }) => Effect.ignore(sessions.close(slot, unit)), {
            discard: true
          }),
          Effect.failCause(cause)
        )
    })
  }
  // Nothing has been committed yet: who can't commit now is told before anybody else has.
  const refused = open.map(({ unit }) => sessions.busy(unit, "commit")).find((_) => _ !== undefined)
  return refused === undefined ? next(0) : Effect.fail(refused)
})

/** @internal */
export const rollbackAll: Effect.Effect<void, SqlError> = inAll((_, unit) => sessions.rollback(unit))

/** @internal */
export const closeAll: Effect.Effect<void, SqlError> = inAll(sessions.close)
