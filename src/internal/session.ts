/**
 * The life of a session around its unit of work: hooks, explicit ends, and the end of its scope.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Cause from "effect/Cause"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import { never, timer } from "./deadline.js"
import * as endings from "./ending.js"
import type { EngineCore } from "./engine.js"
import { aroundOf, atTurn } from "./frame.js"
import type { Frame } from "./frame.js"
import { releasedStack, StackNode, topOf } from "./lease.js"
import type { Root } from "./lease.js"
import { Slot } from "./slot.js"
import type { SlotOptions } from "./slot.js"
import { validateOwn } from "./transactionSql.js"
import { undisturbed } from "./undisturbed.js"
import type { Hook, Unit } from "./unit.js"

/**
 * The ambient connection that a new session runs on: not one that another session runs on already. One that the fiber
 * has outlived is an error, and none of its own takes its place.
 * @internal
 */
export const shareableRoot = (entry: Entry): Root | DbError | undefined => {
  const top = topOf(entry.stack)
  if (top === undefined || top instanceof Slot) return undefined
  const root = top.root()
  if (root === undefined) return releasedStack()
  return root === entry.slot?.unit?.lease ? undefined : root
}

/** @internal */
export const makeSlot = (
  engine: EngineCore,
  entry: Entry,
  options: SlotOptions,
  isolated: boolean
): Effect.Effect<Slot, DbError> => {
  const outer = validateOwn(options) ?? (isolated ? undefined : shareableRoot(entry))
  return outer instanceof DbError ? Effect.fail(outer) : Effect.succeed(newSlot(engine, entry, options, outer))
}

/** With options that have been validated. @internal */
export const newSlot = (engine: EngineCore, entry: Entry, options: SlotOptions, outer: Root | undefined): Slot =>
  new Slot(engine, options, outer, entry.writes ?? entry.slot?.writes)

/** What is ambient inside a session: an orphan around it is not its connection. @internal */
export const inSlot =
  (slot: Slot, frame?: Frame) =>
  (entry: Entry): Entry => ({
    ...entry,
    slot,
    frame,
    around: entry.slot === slot ? entry.around : aroundOf(entry),
    orphan: entry.slot === slot ? entry.orphan : undefined,
    stack: entry.slot === slot ? entry.stack : new StackNode(slot, entry.stack)
  })

/** What was ambient before, where it is ambient still. @internal */
export const outOf =
  (slot: Slot, before: Entry) =>
  (entry: Entry): Entry =>
    entry.slot === slot ? { ...entry, ...placeIn(before) } : entry

/** Where in the database a fiber is. @internal */
export const placeIn = ({
  around,
  frame,
  orphan,
  slot,
  stack
}: Entry): Pick<Entry, "around" | "frame" | "orphan" | "slot" | "stack"> => ({
  around,
  frame,
  orphan,
  slot,
  stack
})

/** Runs an effect in the session of a handle, as long as that is open. @internal */
export const within = <A, E, R>(slot: Slot, unit: Unit, effect: Effect.Effect<A, E, R>) =>
  Effect.suspend((): Effect.Effect<A, E | SqlError, R> =>
    unit.ended || slot.ended
      ? Effect.fail(unit.closedError())
      : Ambient.locally(effect, slot.engine, (entry) => (entry.slot === slot ? entry : inSlot(slot)(entry)))
  )

/** After the end of a transaction, in order; what goes wrong is reported and undoes nothing. */
const runAfter = (hooks: ReadonlyArray<Hook>): Effect.Effect<void> =>
  hooks.length === 0
    ? Effect.void
    : Effect.forEach(
        hooks,
        (hook) =>
          // By nobody but itself, such as its own time limit.
          Effect.catchAllCause(undisturbed(Effect.interruptible(hook)), (cause) =>
            Effect.logError(
              "effect-db: a hook after the end of a transaction failed; the transaction is not affected",
              cause
            )
          ),
        { discard: true }
      )

/** The hooks of these frames, taken so that they run once; none, when nobody knows whether it was committed. */
const takeHooks = (frames: ReadonlyArray<Frame>, committed: boolean, unknown = false): ReadonlyArray<Hook> => {
  const hooks: Array<Hook> = []
  for (const frame of frames) {
    const due = unknown ? undefined : committed ? frame.afterCommit : frame.afterRollback
    // One by one: there may be more than a call takes arguments.
    if (due !== undefined) for (const hook of due) hooks.push(hook)
    frame.afterCommit = frame.afterRollback = undefined
  }
  return hooks
}

const isUnknown = (error: DbError): boolean => error.reason._tag === "CommitUnknown"

/** Whose hooks run before the COMMIT of this block, or of the session. */
const committing = (unit: Unit, frame: Frame | undefined): ReadonlyArray<Frame> =>
  frame === undefined ? [unit.frame] : [unit.frame, frame]

const hasBefore = (slot: Slot, unit: Unit, frame: Frame | undefined): boolean =>
  slot.options.beforeCommit !== undefined ||
  (unit.frame.beforeCommit?.size ?? 0) > 0 ||
  (frame?.beforeCommit?.size ?? 0) > 0

/** Runs what has to run inside, before COMMIT: not where nothing is open, or what is can only be rolled back. @internal */
export const runBefore = (slot: Slot, unit: Unit, frame: Frame | undefined): Effect.Effect<void, SqlError> =>
  Effect.suspend(() => {
    if (!hasBefore(slot, unit, frame) || !unit.open) return Effect.void
    if (unit.refusal(frame ?? unit.frame) !== undefined) return Effect.void
    const option = slot.options.beforeCommit
    const first = option === undefined ? Effect.void : slot.engine.provide(option)
    const all = Effect.zipRight(first as Effect.Effect<unknown, SqlError>, runHooks(committing(unit, frame)))
    return Effect.acquireUseRelease(
      Effect.sync(() => void unit.preparing++),
      () => Ambient.locally(all, unit.engine, inSlot(slot, frame)),
      () => Effect.sync(() => void unit.preparing--)
    )
  })

/** Those that they register meanwhile as well. */
const runHooks = (frames: ReadonlyArray<Frame>): Effect.Effect<void, SqlError> =>
  Effect.forEach(
    frames,
    ({ beforeCommit }) =>
      Effect.suspend(() => {
        if (beforeCommit === undefined) return Effect.void
        const hooks = beforeCommit.values()
        let next = hooks.next()
        return Effect.whileLoop({
          while: () => next.done !== true,
          body: () => next.value as Effect.Effect<unknown, SqlError>,
          step: () => {
            next = hooks.next()
          }
        })
      }),
    { discard: true }
  )

/** Why the transaction of the session can't be ended by hand now. @internal */
export const busy = (unit: Unit, what: string): DbError | undefined => {
  if (unit.preparing > 0) {
    return DbError.make("SessionBusy", {
      message: `The session "${unit.name}" can't ${what} while the hooks before a commit run.`,
      hint: "A beforeCommit hook is inside the transaction: its failure prevents the commit, afterCommit comes after it.",
      block: unit.name
    })
  }
  const child = unit.frame.child
  return child === undefined
    ? unit.stuck
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
    const ready = runBefore(slot, unit, undefined)
    const end: Effect.Effect<void, SqlError> = Effect.suspend(() => {
      if (!unit.hasToEnd) return Effect.void
      return Effect.flatMap(endings.hold(unit), (lost): Effect.Effect<void, SqlError> => {
        const { child } = unit.frame
        if (lost === undefined && child === undefined) {
          const quiet = Effect.onError(restore(endings.whenQuiet(unit)), () => Effect.sync(() => endings.letGo(unit)))
          return Effect.zipRight(quiet, settleOpen(unit, [unit.frame], unit.frame, true))
        }
        endings.letGo(unit, lost)
        // The work of both: who asks second has lost it as well.
        if (lost !== undefined) return Effect.fail(lost)
        // Another fiber's, opened while the hooks ran.
        return child?.manual === true
          ? Effect.fail(busy(unit, "commit")!)
          : Effect.zipRight(restore(atTurn(unit.frame, () => Effect.void)), end)
      })
    })
    return Effect.zipRight(restore(ready), end)
  })

/** What comes before COMMIT, then the end: a rollback, when that has gone wrong. @internal */
export const beforeEnd = <E>(
  before: Effect.Effect<void, SqlError>,
  end: (success: boolean) => Effect.Effect<void, E>
): Effect.Effect<void, E | SqlError> =>
  Effect.matchCauseEffect(before, {
    onSuccess: () => end(true),
    onFailure: (cause) => Effect.zipRight(end(false), Effect.failCause(cause))
  })

/** COMMIT and the hooks that follow it. @internal */
export const settleOpen = (
  unit: Unit,
  frames: ReadonlyArray<Frame>,
  frame: Frame,
  held = false
): Effect.Effect<void, DbError> =>
  Effect.matchEffect(endings.commit(unit, frame, held), {
    onSuccess: () => runAfter(takeHooks(frames, true)),
    onFailure: (error) => Effect.zipRight(runAfter(takeHooks(frames, false, isUnknown(error))), Effect.fail(error))
  })

/** ROLLBACK and the hooks that follow it. @internal */
export const undoOpen = (unit: Unit, frames: ReadonlyArray<Frame>): Effect.Effect<void> =>
  Effect.suspend(() =>
    Effect.zipRight(
      endings.rollback(unit),
      Effect.suspend(() => runAfter(takeHooks(frames, false)))
    )
  )

/** As `undoOpen`, for a connection that is given back for good under its session. @internal */
export const undoReleased = (unit: Unit, why: DbError, giveBack: Effect.Effect<void>): Effect.Effect<void> =>
  endings
    .forsake(unit, why)
    .pipe(Effect.zipRight(giveBack), Effect.zipRight(Effect.suspend(() => runAfter(takeHooks([unit.frame], false)))))

/** @internal */
export const rollback = (unit: Unit): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    const refused = busy(unit, "roll back")
    if (refused !== undefined) return Effect.fail(refused)
    return unit.hasToEnd ? Effect.uninterruptible(undoOpen(unit, [unit.frame])) : Effect.void
  })

/** Rolls back, gives the connection back and empties the slot: the next use is a new session. @internal */
export const close = (slot: Slot, unit: Unit): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    // What was opened by hand is left open.
    const open = unit.preparing > 0 || unit.frame.top.child !== undefined
    const refused = open ? busy(unit, "close") : unit.stuck
    if (refused !== undefined) return Effect.fail(refused)
    if (slot.unit === unit) slot.empty()
    return Effect.uninterruptible(Effect.suspend(() => endUnit(unit, undefined, false)))
  })

const leftOpen = (unit: Unit, block: Frame): DbError =>
  DbError.make("TransactionAborted", {
    message: `The session "${unit.name}" ended while the block "${block.name}" of another fiber was open in its transaction, and was rolled back`,
    hint: "Join the fiber before the session ends, or give its work a session of its own with DbSession.isolated."
  })

/**
 * The end of a session: by success it commits, else it rolls back; then it gives its connection back and runs the
 * hooks. Manual blocks that were left open are rolled back, as are those of fibers that outlive the session.
 */
const endUnit = (unit: Unit, block: Frame | undefined, success: boolean): Effect.Effect<void, DbError> => {
  if (unit.ended) return Effect.void
  const frame = block ?? unit.frame
  const left = frame.child
  // Late and rolled back by hand: nothing is left to be lost.
  const over = !unit.open && unit.lost !== undefined && !unit.hasLost
  const commits = success && !over && (left === undefined || left.holds === "nothing")
  const frames = block === undefined ? [unit.frame] : [unit.frame, block]
  const end = () => {
    unit.shut()
    if (commits) {
      return left === undefined
        ? endings.commitNow(unit, frame)
        : Effect.zipRight(endings.undo(unit, left), endings.commit(unit, frame))
    }
    const undone = endings.rollback(unit)
    return success && left?.holds === "shared" ? Effect.zipRight(undone, Effect.fail(leftOpen(unit, left))) : undone
  }
  const after = (exit: Exit.Exit<void, DbError>): Effect.Effect<void, DbError> => {
    unit.release()
    const unknown = Exit.isFailure(exit) && Option.exists(Cause.failureOption(exit.cause), isUnknown)
    const hooks = takeHooks(frames, commits && Exit.isSuccess(exit), unknown)
    return hooks.length === 0 ? exit : Effect.zipRight(runAfter(hooks), exit)
  }
  const warned = success && left !== undefined ? Effect.flatMap(endings.warnOfLeft(unit, left), end) : end()
  return Effect.matchCauseEffect(warned, {
    onFailure: (cause) => after(Exit.failCause(cause)),
    onSuccess: () => after(Exit.void)
  })
}

/** Ends the session of a slot for good. @internal */
export const endSlot = (slot: Slot, block: Frame | undefined, success: boolean): Effect.Effect<void, DbError> =>
  Effect.uninterruptible(Effect.suspend(() => endNow(slot, block, success)))

/** As `endSlot`, begun by the call: only where nothing interrupts. @internal */
export const endNow = (slot: Slot, block: Frame | undefined, success: boolean): Effect.Effect<void, DbError> => {
  slot.ended = true
  return slot.unit === undefined ? Effect.void : endUnit(slot.unit, block, success)
}

/**
 * Runs an effect in a session of its own: success commits, everything else rolls back. A failed commit is a typed
 * error; the effect's own failure is never replaced.
 * @internal
 */
export const around = <A, E, R>(slot: Slot, effect: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R> =>
  Effect.uninterruptibleMask((restore) =>
    Ambient.during(restore(effect), slot.engine, inSlot(slot), (exit) =>
      afterBefore(slot, undefined, exit, restore, (exit) => settle(exit, (success) => endNow(slot, undefined, success)))
    )
  )

const expired = (slot: Slot): DbError =>
  DbError.make("TransactionTimeout", {
    message: `The session "${slot.name}" did not end in time.`,
    hint: "It was rolled back. Do less in one session, or raise its timeout."
  })

/** As `around`, with a time limit for the effect. @internal */
export const timed = <A, E, R>(
  slot: Slot,
  effect: Effect.Effect<A, E, R>,
  timeout: Duration.DurationInput | undefined
): Effect.Effect<A, E | SqlError, R> =>
  timeout === undefined
    ? around(slot, effect)
    : around(slot, Effect.timeoutFail(effect, { duration: timeout, onTimeout: () => expired(slot) }))

/** Where there is no effect to interrupt, the session itself fails from then on. @internal */
export const startTimer = (slot: Slot, timeout: Duration.DurationInput | undefined): (() => void) =>
  timer(timeout === undefined ? never : Duration.toMillis(timeout), () => slot.expire(expired(slot)))

type Restore = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>

/**
 * Goes on with the exit of the body, which what comes before COMMIT may still turn into a failure: the hooks, and the
 * wait for statements of other fibers.
 * @internal
 */
export const afterBefore = <A, E, B, E2>(
  slot: Slot,
  frame: Frame | undefined,
  exit: Exit.Exit<A, E>,
  restore: Restore,
  next: (exit: Exit.Exit<A, E | SqlError>) => Effect.Effect<B, E2>
): Effect.Effect<B, E2> => {
  const { unit } = slot
  if (Exit.isFailure(exit) || unit === undefined || !(hasBefore(slot, unit, frame) || unit.issued > 0))
    return next(exit)
  const before = Effect.zipRight(runBefore(slot, unit, frame), endings.whenDone(unit, frame ?? unit.frame))
  return Effect.flatMap(Effect.exit(Effect.zipRight(restore(before), exit)), next)
}

/** The exit of the body and the end of the session as one. @internal */
export const settle = <A, E>(
  exit: Exit.Exit<A, E>,
  end: (success: boolean) => Effect.Effect<void, DbError>
): Effect.Effect<A, E | DbError> =>
  Exit.isSuccess(exit)
    ? Effect.zipRight(end(true), exit)
    : Effect.matchCauseEffect(end(false), {
        onSuccess: () => exit,
        onFailure: (cause) =>
          Cause.isInterruptedOnly(cause) ? exit : Effect.failCause(Cause.sequential(exit.cause, cause))
      })
