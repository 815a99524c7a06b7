/**
 * The life of a session around its unit of work: hooks, explicit ends, and the end of its scope.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import type { EngineCore } from "./engine.js"
import type { Frame } from "./frame.js"
import { topOf } from "./lease.js"
import type { Root } from "./lease.js"
import { Slot } from "./slot.js"
import type { SlotOptions } from "./slot.js"
import { validate } from "./transactionSql.js"
import type { Hook, Unit } from "./unit.js"

/** The ambient connection that a new session runs on: not one that another session runs on already. @internal */
export const shareableRoot = (entry: Entry): Root | undefined => {
  const top = topOf(entry.stack)
  if (top === undefined || top instanceof Slot) return undefined
  const root = top.root()
  return root === undefined || root === entry.slot?.unit?.lease ? undefined : root
}

/** @internal */
export const makeSlot = (
  engine: EngineCore,
  entry: Entry,
  options: SlotOptions,
  isolated: boolean
): Effect.Effect<Slot, DbError> => {
  const refused = validate(options)
  return refused === undefined
    ? Effect.succeed(new Slot(engine, options, isolated ? undefined : shareableRoot(entry)))
    : Effect.fail(refused)
}

/** What is ambient inside a session. @internal */
export const inSlot =
  (slot: Slot, frame?: Frame) =>
  (entry: Entry): Entry => ({
    ...entry,
    slot,
    frame,
    stack: entry.slot === slot ? entry.stack : { of: slot, next: entry.stack }
  })

/** After the end of a transaction: in order, with nothing ambient; what goes wrong is reported and undoes nothing. */
const runAfter = (hooks: ReadonlyArray<Hook>): Effect.Effect<void> =>
  hooks.length === 0
    ? Effect.void
    : Effect.forEach(
        hooks,
        (hook) =>
          Effect.catchAllCause(Ambient.detach(hook), (cause) =>
            Effect.logError(
              "effect-db: a hook after the end of a transaction failed; the transaction is not affected",
              cause
            )
          ),
        { discard: true }
      )

/** The hooks of these frames, taken so that they run once. */
const takeHooks = (frames: ReadonlyArray<Frame>, committed: boolean): ReadonlyArray<Hook> =>
  frames.flatMap((frame) => {
    const hooks = committed ? frame.afterCommit : frame.afterRollback
    frame.afterCommit = []
    frame.afterRollback = []
    return hooks
  })

/** Runs what has to run inside, before COMMIT. Nothing is committed when there is nothing open. @internal */
export const runBefore = (slot: Slot, unit: Unit, frame: Frame | undefined): Effect.Effect<void, SqlError> =>
  Effect.suspend(() => {
    const hooks = [
      ...(slot.options.beforeCommit === undefined ? [] : [slot.options.beforeCommit]),
      ...unit.beforeCommit
    ]
    if (hooks.length === 0 || !unit.open || unit.aborted) return Effect.void
    return Ambient.locally(
      Effect.forEach(hooks, (hook) => hook as Effect.Effect<unknown, SqlError>, { discard: true }),
      unit.engine,
      inSlot(slot, frame)
    )
  })

const busy = (unit: Unit, what: string): DbError | undefined => {
  const child = unit.frame.child
  return child === undefined
    ? undefined
    : DbError.make("SessionBusy", {
        message: `The session "${unit.name}" can't ${what} while the block "${child.name}" is open in it.`,
        hint: "Let the block end: it decides about its own work. From inside, tx.end(...) or setRollbackOnly end it.",
        block: child.name
      })
}

/** Commits what is open and keeps the connection. @internal */
export const commit = (slot: Slot, unit: Unit): Effect.Effect<void, SqlError> =>
  Effect.uninterruptibleMask((restore) => {
    const refused = busy(unit, "commit")
    if (refused !== undefined) return Effect.fail(refused)
    return Effect.zipRight(restore(runBefore(slot, unit, undefined)), settleOpen(unit, [unit.frame], unit.frame))
  })

/** COMMIT and the hooks that follow it. @internal */
export const settleOpen = (unit: Unit, frames: ReadonlyArray<Frame>, frame: Frame): Effect.Effect<void, DbError> =>
  Effect.matchEffect(unit.commit(frame), {
    onSuccess: () => runAfter(takeHooks(frames, true)),
    onFailure: (error) => Effect.zipRight(runAfter(takeHooks(frames, false)), Effect.fail(error))
  })

/** ROLLBACK and the hooks that follow it. @internal */
export const undoOpen = (unit: Unit, frames: ReadonlyArray<Frame>): Effect.Effect<void> =>
  Effect.suspend(() =>
    Effect.zipRight(
      unit.rollback(),
      Effect.suspend(() => runAfter(takeHooks(frames, false)))
    )
  )

/** @internal */
export const rollback = (unit: Unit): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    const refused = busy(unit, "roll back")
    return refused === undefined ? Effect.uninterruptible(undoOpen(unit, [unit.frame])) : Effect.fail(refused)
  })

/** Rolls back, gives the connection back and empties the slot: the next use is a new session. @internal */
export const close = (slot: Slot, unit: Unit): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    const child = unit.frame.child
    const refused = child !== undefined && !child.manual ? busy(unit, "close") : undefined
    if (refused !== undefined) return Effect.fail(refused)
    if (slot.unit === unit) slot.empty()
    return endUnit(unit, undefined, false)
  })

/**
 * The end of a session: by success it commits, else it rolls back; then it gives its connection back and runs the
 * hooks. Manual blocks that were left open are rolled back, as are those of fibers that outlive the session.
 */
const endUnit = (unit: Unit, block: Frame | undefined, success: boolean): Effect.Effect<void, DbError> =>
  Effect.uninterruptible(
    Effect.suspend(() => {
      if (unit.ended) return Effect.void
      const frame = block ?? unit.frame
      const left = frame.child
      const leftWhole = left !== undefined && left.kind === "transaction"
      const commits = success && !leftWhole
      const undo = commits && left !== undefined ? Effect.ignore(unit.endBlock(left, false)) : Effect.void
      const frames = block === undefined ? [unit.frame] : [unit.frame, block]
      return undo.pipe(
        Effect.zipRight(Effect.sync(() => unit.shut())),
        Effect.zipRight(Effect.suspend(() => (commits ? unit.commit(frame) : unit.rollback()))),
        Effect.exit,
        Effect.flatMap((exit) => {
          unit.release()
          const hooks = takeHooks(frames, commits && Exit.isSuccess(exit))
          return Effect.zipRight(runAfter(hooks), exit)
        })
      )
    })
  )

/** Ends the session of a slot for good. @internal */
export const endSlot = (slot: Slot, block: Frame | undefined, success: boolean): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    slot.ended = true
    return slot.unit === undefined ? Effect.void : endUnit(slot.unit, block, success)
  })

/**
 * Runs an effect in a session of its own: success commits, everything else rolls back. A failed commit is a typed
 * error; the effect's own failure is never replaced.
 * @internal
 */
export const around = <A, E, R>(slot: Slot, effect: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R> =>
  Effect.uninterruptibleMask((restore) =>
    restore(
      Ambient.locally(
        Effect.tap(effect, () => (slot.unit === undefined ? Effect.void : runBefore(slot, slot.unit, undefined))),
        slot.engine,
        inSlot(slot)
      )
    ).pipe(
      Effect.exit,
      Effect.flatMap((exit) => settle(exit, (success) => endSlot(slot, undefined, success)))
    )
  )

/** The exit of the body and the end of the session as one. @internal */
export const settle = <A, E>(
  exit: Exit.Exit<A, E>,
  end: (success: boolean) => Effect.Effect<void, DbError>
): Effect.Effect<A, E | DbError> =>
  Exit.isSuccess(exit)
    ? Effect.as(end(true), exit.value)
    : Effect.matchCauseEffect(end(false), {
        onSuccess: () => exit,
        onFailure: (cause) =>
          Cause.isInterruptedOnly(cause) ? exit : Effect.failCause(Cause.sequential(exit.cause, cause))
      })
