/**
 * A statement on its way through a session's unit of work.
 */
import * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import { stuckOn } from "./blocking.js"
import type { Frame } from "./frame.js"
import { Command } from "./command.js"
import type { Done } from "./command.js"
import type { Place } from "./line.js"
import type { Result } from "./rows.js"
import type { Spec } from "./statement.js"
import type { Unit } from "./unit.js"
import type { Wire } from "./wire.js"

/** A statement on its way through the unit: its turn, the place on the connection, the connection, the wire. @internal */
export class Run {
  private stop: () => void = () => {}
  private command: Command | undefined = undefined
  private wire: Wire | undefined = undefined
  private waiter: (() => void) | undefined = undefined
  private readonly place: Place<Run>
  /** It has had its turn: it belongs to the transaction that is open or comes next. */
  private issued = false
  settled = false
  /** The block that it runs in: of manual ones the innermost. */
  block: Frame

  constructor(
    private readonly unit: Unit,
    private readonly frame: Frame,
    private readonly spec: Spec,
    private readonly done: Done
  ) {
    this.block = frame
    this.place = unit.runs.join(this)
    const wire = unit.wireFor(frame)
    if (wire === undefined) this.queue()
    else {
      this.issue()
      this.submit(wire)
    }
  }

  private issue(): void {
    this.issued = true
    this.block = this.frame.top
    this.unit.issued++
    if (this.spec.copy !== undefined) this.unit.copying++
  }

  private queue(): void {
    let hasTurn = false
    const leaveQueue = this.frame.turn((error) => {
      hasTurn = true
      if (error !== undefined) return this.settle(error, undefined, undefined)
      this.issue()
      let placed = false
      const leavePlace = this.unit.place((error, wire) => {
        placed = true
        if (wire === undefined) return this.settle(error, undefined, undefined)
        this.submit(wire)
      })
      if (!placed) this.stop = leavePlace
    })
    if (!hasTurn) this.stop = leaveQueue
  }

  get sent(): boolean {
    return this.command !== undefined && this.command.sent
  }

  private submit(wire: Wire): void {
    const { block: owner, spec, unit } = this
    if (spec.cursor?.isGone === true) return this.settle(cursorGone(), undefined, undefined)
    const refused = owner.overdue ?? stuckOn(wire)
    if (refused !== undefined) return this.settle(refused, undefined, undefined)
    this.wire = wire
    const command = new Command(
      spec.text,
      spec.params,
      spec.rowMode,
      false,
      spec.prepare,
      spec.simple,
      unit.ownerWithPath(owner, spec.path),
      (error, result, multiple) => {
        const seen = unit.answered(owner, wire, command, error, multiple ?? result)
        this.settle(seen, result, multiple)
      }
    )
    command.copy = spec.copy
    command.weigh = spec.weigh
    command.scope = spec.path ?? ""
    command.watch = spec.watch
    if (spec.batch !== undefined) {
      command.more = spec.more === true
      command.batch = spec.batch
      spec.batch.push(command)
    }
    this.command = command
    unit.submitted++
    wire.submit(command)
  }

  private settle(error: DbError | undefined, result: Result | undefined, multiple: Array<Result> | undefined): void {
    if (this.settled) return
    this.settled = true
    this.unit.runs.leave(this.place)
    if (this.issued) this.unit.issued--
    if (this.command !== undefined) this.unit.submitted--
    this.done(error, result, multiple)
    this.waiter?.()
    this.unit.runSettled()
    if (this.issued && this.spec.copy !== undefined) {
      this.unit.copying--
      this.unit.serve()
    }
  }

  /** Not sent: never happens. Running: cancelled, and this waits for the server's word. Behind others: marked. */
  get interrupt(): Effect.Effect<void> {
    return Effect.suspend(() => {
      if (this.settled) return Effect.void
      const command = this.command
      if (command === undefined || this.wire === undefined) {
        this.stop()
        this.settle(withdrawn(), undefined, undefined)
        return Effect.void
      }
      const wait = this.wire.interrupt(command)
      if (command.settled && !this.settled) {
        this.settle(withdrawn(), undefined, undefined)
        return Effect.void
      }
      if (!wait) return Effect.void
      return Effect.async<void>((resume) => {
        if (this.settled) resume(Effect.void)
        else this.waiter = () => resume(Effect.void)
      })
    })
  }

  /** The session ends: what was not sent fails. */
  abandon(error: DbError): void {
    if (this.settled) return
    if (!this.sent) {
      this.stop()
      if (this.command !== undefined && this.wire !== undefined) this.wire.interrupt(this.command)
      this.settle(error, undefined, undefined)
    }
  }

  /** Its transaction will be undone, or is too late: what is on its way need not finish, and the rest need not begin. */
  cancel(error: DbError = undone()): void {
    if (this.settled || !this.issued) return
    if (this.sent) this.wire!.interrupt(this.command!)
    else this.abandon(error)
  }
}

const undone = (): DbError =>
  DbError.make("QueryCanceled", {
    message: "The transaction of the statement is being rolled back, and it had not been sent.",
    hint: "It has not run. Join the fibers of a session before it is rolled back."
  })

const cursorGone = (): DbError =>
  DbError.make("TransactionClosed", {
    message: "The transaction or the block that a stream reads in has ended, and its cursor with it.",
    hint: "Commit after the stream, or do what is committed on the way in DbSession.isolated."
  })

let withdrawnError: DbError | undefined = undefined

// One for all: whoever has interrupted a statement does not look at it, and a thousand are often interrupted at once.
const withdrawn = (): DbError =>
  (withdrawnError ??= DbError.make("QueryCanceled", {
    message: "The statement was interrupted before it was sent.",
    hint: "It has not run."
  }))
