/**
 * How the transactions and blocks of a session end: COMMIT, ROLLBACK, RELEASE and ROLLBACK TO, each awaited for no
 * longer than `settleTimeout`, and what becomes of a COMMIT whose answer is lost.
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import { DbError } from "../DbError.js"
import { stuckOn } from "./blocking.js"
import { Command } from "./command.js"
import type { Control, Owner, Watch } from "./command.js"
import { plain, setConfig } from "./controls.js"
import { deadline } from "./deadline.js"
import { framesIn } from "./frame.js"
import type { Frame } from "./frame.js"
import { observeOwn } from "./observe.js"
import type { Result } from "./rows.js"
import * as Sql from "./transactionSql.js"
import type { OutcomeMarker, Unit } from "./unit.js"
import type { Wire } from "./wire.js"

interface Last {
  readonly text: string
  /** For those who watch, when the text says too much. */
  readonly summary?: string
  readonly params?: ReadonlyArray<null | string | Buffer>
  /** In a Sync group of its own. */
  readonly solo?: boolean
  readonly owner?: Owner
  /** Whether it reached the socket, told before it is answered for. */
  readonly onSent?: (sent: boolean) => void
}

/** With nothing in front of it. */
class Bare implements Owner {
  constructor(private readonly unit: Unit) {}

  takePrefix(): ReadonlyArray<Control> {
    return none
  }

  vet(wire: Wire): DbError | undefined {
    return this.unit.vet(wire)
  }
}

const none: ReadonlyArray<never> = []

/**
 * A statement of ours at the end of something. Nothing interrupts it, and a network that swallows it would hold the
 * fiber for ever: a server that does not answer in time loses the connection.
 */
const send = (unit: Unit, last: Last): Effect.Effect<Result, DbError> =>
  observeOwn(unit.engine, { text: last.text, summary: last.summary }, (watch) => sendWith(unit, last, watch))

const sendWith = (
  unit: Unit,
  { onSent, owner, params = [], solo = false, text }: Last,
  watch: Watch | undefined
): Effect.Effect<Result, DbError> =>
  Effect.async<Result, DbError>((resume) => {
    const wire = unit.lease.wire
    if (wire === undefined) return resume(Effect.fail(unit.lost ?? unit.lease.releasedError()))
    const stuck = stuckOn(wire)
    if (stuck !== undefined) return resume(Effect.fail(stuck))
    const limit = unit.engine.config.settleMillis
    const stop = deadline(limit, () => {
      wire.destroy(new Error(`the server did not answer ${text} within ${limit} ms`))
    })
    const whose = owner ?? new Bare(unit)
    const command = new Command(text, params, "array", solo, true, false, whose, (error, result) => {
      stop()
      onSent?.(command.sent)
      resume(error === undefined ? Effect.succeed(result!) : Effect.fail(error))
    })
    command.watch = watch
    wire.submit(command)
  })

/** A statement in the transaction, when no other is let in any more. @internal */
export const sendLast = (
  unit: Unit,
  text: string,
  params: ReadonlyArray<null | string | Buffer>
): Effect.Effect<void, DbError> =>
  Effect.suspend(() => Effect.asVoid(send(unit, { text, params, owner: unit.ownerWithPath(unit.frame, undefined) })))

/**
 * Waits until what the fibers of the session have sent is answered, for no longer than `blockTimeout`. Interruptible
 * where the caller is.
 * @internal
 */
export const whenQuiet = (unit: Unit): Effect.Effect<void, DbError> =>
  Effect.suspend(() => (unit.issued === 0 ? Effect.void : waitQuiet(unit)))

/** As `whenQuiet`, at the end of a block or of the session: what has not been sent never happens. @internal */
export const whenDone = (unit: Unit, block: Frame): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    if (unit.issued > 0) unit.abandonIn(block, block.closedError())
    return whenQuiet(unit)
  })

const waitQuiet = (unit: Unit): Effect.Effect<void, DbError> =>
  Effect.async<void, DbError>((resume) => {
    const limit = unit.engine.config.blockMillis
    const leave = unit.whenQuiet(() => {
      stop()
      resume(Effect.void)
    })
    const stop = deadline(limit, () => {
      leave()
      resume(
        Effect.fail(
          DbError.make("SessionBusy", {
            message: `Waited ${limit} ms for statements that other fibers of the session "${unit.name}" still run.`,
            hint: "Join the fibers before the session commits, or run them with DbSession.detach. blockTimeout is the limit.",
            block: unit.name
          })
        )
      )
    })
    return Effect.sync(() => {
      stop()
      leave()
    })
  })

/** Cancels what is on its way, which will be undone anyway, and waits for the server's word. */
const cancelAll = (unit: Unit): Effect.Effect<void> =>
  Effect.suspend(() => {
    for (const { value: run } of unit.runs.places) run.cancel()
    if (unit.issued === 0) return Effect.void
    return Effect.async<void>((resume) => {
      const limit = unit.engine.config.settleMillis
      const stop = deadline(limit, () => {
        unit.lease.wire?.destroy(new Error(`what was running did not end within ${limit} ms after it was cancelled`))
      })
      unit.whenQuiet(() => {
        stop()
        resume(Effect.void)
      })
    })
  })

/** One at a time. Waits for the end that is under way, and yields what that one has lost. @internal */
export const hold = (unit: Unit): Effect.Effect<DbError | undefined> =>
  Effect.suspend(() => {
    if (unit.settling) return nextToHold(unit)
    unit.settling = true
    return Effect.succeed(undefined)
  })

const nextToHold = (unit: Unit): Effect.Effect<DbError | undefined> =>
  Effect.async<DbError | undefined>((resume) => {
    ;(unit.settled ??= []).push((lost) => resume(Effect.succeed(lost)))
  })

/** To who waits to end it as well, with the word of what was lost; then to those whose statements wait. @internal */
export const letGo = (unit: Unit, lost?: DbError): void => {
  const next = unit.settled?.shift()
  if (next !== undefined) return next(lost)
  unit.settling = false
  unit.serve()
}

/** Nothing else is let in meanwhile: what is issued from now on belongs to the next transaction, and waits. */
const held = (unit: Unit, end: Effect.Effect<void, DbError>): Effect.Effect<void, DbError> =>
  // Nothing interrupts the end of a transaction: this is `ensuring` in fewer steps.
  Effect.matchCauseEffect(end, {
    onFailure: (cause) => {
      letGo(unit, Option.getOrUndefined(Cause.failureOption(cause)))
      return Effect.failCause(cause)
    },
    onSuccess: () => {
      letGo(unit)
      return Effect.void
    }
  })

const alone = (
  unit: Unit,
  end: () => Effect.Effect<void, DbError>,
  afterLoss: (lost: DbError) => Effect.Effect<void, DbError>
): Effect.Effect<void, DbError> => {
  if (!unit.settling) {
    unit.settling = true
    return held(unit, end())
  }
  return Effect.flatMap(nextToHold(unit), (lost) => held(unit, lost === undefined ? end() : afterLoss(lost)))
}

/** Its session, or a block around it, has ended with it inside, and took its work along. @internal */
export const goneError = (unit: Unit, frame: Frame): DbError => (unit.ended ? unit.closedError() : frame.closedError())

/**
 * Ends a savepoint block. A block that succeeds over a failed statement is rolled back and says so.
 * @internal
 */
export const endBlock = (unit: Unit, frame: Frame, success: boolean): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    if (frame.ended) {
      frame.close()
      return success && frame.begun ? Effect.fail(goneError(unit, frame)) : Effect.void
    }
    frame.seal()
    return endSealed(unit, frame, success)
  })

/** Of a block that was begun by hand and has done something, when what is around it succeeds without it. @internal */
export const warnOfLeft = (unit: Unit, left: Frame): Effect.Effect<void> =>
  left.manual && (left.kind === "savepoint" ? left.begun : unit.begun)
    ? Effect.logWarning(
        `effect-db: the block "${left.name}" was never ended: it was rolled back. Call tx.commit or tx.rollback.`
      )
    : Effect.void

/** Its settings as they were before come with the answer to its first statement, which may be another fiber's. */
const waitsForSettings = (unit: Unit, frame: Frame): boolean =>
  unit.issued > 0 && frame.begun && frame.before.length === 0 && Sql.settings(frame.options).length > 0

const endSealed = (unit: Unit, frame: Frame, success: boolean): Effect.Effect<void, DbError> =>
  Effect.suspend(() => {
    if (frame.undone) {
      // By the block around it, meanwhile.
      const gone = success && frame.begun ? Effect.fail(goneError(unit, frame)) : Effect.void
      return frame.undoing === undefined ? gone : Effect.zipRight(whenUndone(frame.undoing), gone)
    }
    const { failure, late, rollbackOnly } = frame
    const spoiled = failure !== undefined || late !== undefined || rollbackOnly !== undefined || unit.aborted
    if (success && !spoiled && unit.lost === undefined) {
      // A block in it that a fiber still runs is not finished: its part is not kept.
      const left = frame.child
      if (left !== undefined) {
        return warnOfLeft(unit, left).pipe(
          Effect.zipRight(undo(unit, left)),
          Effect.zipRight(Effect.suspend(() => endSealed(unit, frame, success)))
        )
      }
      if (waitsForSettings(unit, frame)) {
        return Effect.matchEffect(whenQuiet(unit), {
          onFailure: (busy) => Effect.zipRight(undo(unit, frame), Effect.fail(busy)),
          onSuccess: () => endSealed(unit, frame, success)
        })
      }
      if (frame.begun) {
        frame.outcome = "released"
        unit.pending.push(plain(Sql.release(frame.savepoint)))
        if (frame.before.length > 0) unit.pending.push(setConfig(frame.before))
      }
      const parent = frame.parent!
      // One by one: there may be more than a call takes arguments.
      for (const hook of frame.beforeCommit ?? []) parent.addBeforeCommit(hook)
      for (const hook of frame.afterCommit ?? []) parent.addAfter("afterCommit", hook)
      for (const hook of frame.afterRollback ?? []) parent.addAfter("afterRollback", hook)
      frame.close()
      return Effect.void
    }
    const error = success ? (unit.lost ?? late ?? unit.abortedError(frame)) : undefined
    const undone = undo(unit, frame)
    return error === undefined ? undone : Effect.zipRight(undone, Effect.fail(error))
  })

/** Rolls a block back that is sealed, with what is in it. @internal */
export const undo = (unit: Unit, frame: Frame): Effect.Effect<void> =>
  Effect.suspend(() => {
    frame.undone = true
    // Another fiber is about to: what becomes of a savepoint is told by its answer.
    const busy = framesIn(frame).find((_) => _.undoing !== undefined)
    if (busy?.undoing !== undefined) {
      return Effect.zipRight(whenUndone(busy.undoing), busy === frame ? Effect.void : undo(unit, frame))
    }
    const { wire } = unit.lease
    if (frame.begun) frame.outcome = "rolled back"
    if (!frame.begun || unit.lost !== undefined || wire === undefined || wire.dead) {
      return Effect.sync(() => frame.close())
    }
    const waiters = (frame.undoing = [])
    // Behind a statement that runs on, it would be answered too late, and take the connection along.
    unit.cancelIn(frame)
    return Effect.map(rollbackTo(unit, frame), () => {
      frame.undoing = undefined
      frame.close()
      for (const waiter of waiters as Array<() => void>) waiter()
    })
  })

const whenUndone = (waiters: Array<() => void>): Effect.Effect<void> =>
  Effect.async<void>((resume) => void waiters.push(() => resume(Effect.void)))

const rollbackTo = (unit: Unit, frame: Frame): Effect.Effect<void> => {
  unit.pending = []
  // In a Sync group of its own: behind a statement that fails in an open one it would be passed over.
  return send(unit, { text: Sql.rollbackTo(frame.savepoint), summary: "ROLLBACK TO SAVEPOINT", solo: true }).pipe(
    Effect.match({
      onSuccess: () => {
        unit.path = null
        unit.aborted = outerFailure(frame)
        unit.pending.push(plain(Sql.release(frame.savepoint)))
      },
      onFailure: (error) => {
        // The outer block can't go on from here.
        if (frame.parent !== undefined) frame.parent.failure ??= error
        unit.aborted = true
        if (unit.lease.wire?.dead !== false) unit.lost ??= error
      }
    })
  )
}

const outerFailure = (frame: Frame): boolean => {
  for (let at = frame.parent; at !== undefined; at = at.parent) if (at.failure !== undefined) return true
  return false
}

/** Commits and reports how it went. The caller has seen to it that no block is open, and may hold it. @internal */
export const commit = (unit: Unit, frame: Frame, holds = false): Effect.Effect<void, DbError> =>
  Effect.suspend(() => (holds ? held(unit, commitOpen(unit, frame)) : commitNow(unit, frame)))

/** As `commit`, begun by the call. @internal */
export const commitNow = (unit: Unit, frame: Frame): Effect.Effect<void, DbError> =>
  // The work of both: who asks second has lost it as well.
  alone(unit, () => commitOpen(unit, frame), Effect.fail)

const commitOpen = (unit: Unit, frame: Frame): Effect.Effect<void, DbError> => {
  if (unit.open && unit.issued === 0) return commitQuiet(unit, frame)
  if (unit.open) {
    return Effect.matchEffect(whenQuiet(unit), {
      onFailure: (busy) => failCommit(unit, busy),
      onSuccess: () => commitQuiet(unit, frame)
    })
  }
  const refused = unit.refusal(frame)
  return refused === undefined ? Effect.void : failCommit(unit, refused)
}

const failCommit = (unit: Unit, error: DbError): Effect.Effect<never, DbError> =>
  Effect.zipRight(undoAll(unit), Effect.fail(error))

const commitQuiet = (unit: Unit, frame: Frame): Effect.Effect<void, DbError> => {
  const refused = unit.refusal(frame)
  if (refused !== undefined) return failCommit(unit, refused)
  if (!unit.begun) return Effect.void
  const marker = unit.wantsMarker?.(unit)
  if (marker === undefined) return sendCommit(unit, undefined)
  return Effect.matchEffect(marker.write, {
    onSuccess: () => sendCommit(unit, marker),
    onFailure: (error) => failCommit(unit, error)
  })
}

const sendCommit = (unit: Unit, marker: OutcomeMarker | undefined): Effect.Effect<void, DbError> => {
  let sent = false
  return send(unit, {
    text: "COMMIT",
    solo: true,
    onSent: (_) => {
      sent = _
    }
  }).pipe(
    Effect.matchEffect({
      onSuccess: (result) => {
        const error = result.command === "COMMIT" ? undefined : unit.abortedError(unit.frame)
        if (error === undefined && unit.options.readOnly !== true) unit.writes?.committed(unit.wrote)
        unit.outcome = error === undefined ? "committed" : "rolled back"
        unit.over()
        return error === undefined ? Effect.void : Effect.fail(error)
      },
      onFailure: (error) => {
        const wire = unit.lease.wire
        const lost = wire === undefined || wire.dead
        // Refused before it began, as by a cancel from outside: the transaction is still open.
        if (!lost && (wire.status !== "I" || unit.lost !== undefined)) return failCommit(unit, error)
        // Idle in the transaction for too long, says a server that has not come to the COMMIT.
        const open = lost && sent && error.reason.sqlState !== "25P03"
        // It may have been committed: who asks gets a position that is late enough.
        if (open) unit.writes?.committed(unit.wrote)
        unit.outcome = open ? "unknown" : "rolled back"
        // First: a session that waits for its turn on the connection is to have another.
        if (lost) unit.dropWire()
        unit.over()
        if (!lost) return Effect.fail(error)
        // The connection was gone before: what ended it is the error, and nothing was committed.
        return open ? settleOutcome(unit, error, marker) : Effect.fail(error)
      }
    })
  )
}

const settleOutcome = (unit: Unit, error: DbError, marker: OutcomeMarker | undefined): Effect.Effect<void, DbError> => {
  const unknown = DbError.make("CommitUnknown", {
    message: "The connection was lost while COMMIT was on its way: it may have been committed, or not.",
    hint: "Look for its effects before doing it again, or use verifyOutcome: true, which finds out.",
    cause: error
  })
  if (marker === undefined) return Effect.fail(unknown)
  return Effect.matchEffect(marker.settle, {
    onSuccess: (outcome) => {
      unit.outcome = outcome === "committed" ? "committed" : "rolled back"
      return outcome === "committed"
        ? Effect.void
        : Effect.fail(
            DbError.make("ConnectionError", {
              phase: "commit",
              message: "The connection was lost before COMMIT reached the server: nothing was committed.",
              hint: "It is safe to do it again; retry: true does.",
              isRetryable: true,
              cause: error
            })
          )
    },
    onFailure: () => Effect.fail(unknown)
  })
}

/** Rolls back what is open. Never fails: a connection that can't be rolled back is destroyed. @internal */
export const rollback = (unit: Unit): Effect.Effect<void> =>
  Effect.suspend(() => {
    const end = () => undoAll(unit)
    return alone(unit, end, end) as Effect.Effect<void>
  })

const undoAll = (unit: Unit): Effect.Effect<void> => Effect.zipRight(cancelAll(unit), rollbackQuiet(unit))

/**
 * Rolls back what is open because its connection goes: the session can't go on, nor end as if it had been kept.
 * @internal
 */
export const forsake = (unit: Unit, why: DbError): Effect.Effect<void> =>
  Effect.suspend(() => {
    const lost = unit.lost ?? why
    const { transactions } = unit
    const mark = () => {
      // A COMMIT that was on its way has come first: nothing is lost.
      if (unit.transactions === transactions + 1) unit.lost = lost
    }
    const end = () => Effect.map(undoAll(unit), mark)
    return alone(unit, end, end) as Effect.Effect<void>
  })

const rollbackQuiet = (unit: Unit): Effect.Effect<void> =>
  Effect.suspend(() => {
    const wire = unit.lease.wire
    if (unit.begun) unit.outcome = "rolled back"
    // A session whose time is over is lost for its fibers, but its transaction is open on the server.
    if (wire === undefined || wire.dead || !unit.begun || (unit.lost !== undefined && wire.status === "I")) {
      if (wire?.dead === true || unit.hasLost) unit.dropWire()
      unit.over()
      return Effect.void
    }
    return send(unit, { text: "ROLLBACK", solo: true }).pipe(
      Effect.matchEffect({
        onSuccess: () => Effect.sync(() => unit.over()),
        onFailure: (error) =>
          Effect.sync(() => {
            unit.lease.wire?.destroy(error)
            unit.dropWire()
            unit.over()
          })
      })
    )
  })
