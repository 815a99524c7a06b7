/**
 * Every database's session of a fiber, ended together.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import { EngineCore } from "./engine.js"
import { goneFrom } from "./execute.js"
import * as sessions from "./session.js"
import type { Slot } from "./slot.js"
import type { Unit } from "./unit.js"

const isCore = (key: object): key is EngineCore => key instanceof EngineCore

interface Open {
  readonly slot: Slot
  readonly unit: Unit
}

/**
 * Every database's session of the fiber, in the order in which they were opened. Fails, before any of them is ended,
 * when the fiber has outlived one or a block of it: what is open there is not the fiber's to end.
 */
const allOpen = (isFine: (gone: DbError) => boolean): Effect.Effect<ReadonlyArray<Open>, DbError> =>
  Effect.flatMap(Ambient.entries, (entries) => {
    const open: Array<Open> = []
    for (const [core, { frame, sandbox, slot }] of entries) {
      // In a sandbox the session of its engine is out of reach.
      if (!isCore(core) || sandbox !== undefined || slot === undefined) continue
      const gone = goneFrom(slot, frame)
      if (gone !== undefined && !isFine(gone)) return Effect.fail(gone)
      const { unit } = slot
      if (gone === undefined && unit !== undefined && !unit.ended) open.push({ slot, unit })
    }
    return Effect.succeed(open)
  })

const inAll = (
  open: Effect.Effect<ReadonlyArray<Open>, DbError>,
  f: (slot: Slot, unit: Unit) => Effect.Effect<void, SqlError>
): Effect.Effect<void, SqlError> =>
  Effect.flatMap(open, (open) =>
    Effect.flatMap(
      Effect.forEach(open, ({ slot, unit }) => Effect.exit(f(slot, unit))),
      (exits) => exits.find(Exit.isFailure) ?? Effect.void
    )
  )

const ours = allOpen(() => false)

/**
 * No two-phase commit: after the first failure what was committed stays, the rest is rolled back, all are released.
 * @internal
 */
export const commitAll: Effect.Effect<void, SqlError> = Effect.flatMap(ours, (open) => {
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
export const rollbackAll: Effect.Effect<void, SqlError> = inAll(ours, (_, unit) => sessions.rollback(unit))

/** What has ended already is closed. @internal */
export const closeAll: Effect.Effect<void, SqlError> = inAll(
  allOpen((gone) => gone.reason._tag === "SessionClosed"),
  sessions.close
)
