/**
 * Blocks: the transaction of a session and the savepoints in it. They form a tree by who opened them, of which one
 * path is open at a time: siblings take turns, and statements of an outer block wait while an inner one is open, so
 * that a rollback never takes another block's work along.
 */
import * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import { deadline, timer } from "./deadline.js"
import { Line } from "./line.js"
import type { Outcome } from "./observe.js"
import type { Control, Owner } from "./pipeline.js"
import { given } from "./transactionSql.js"
import type { TransactionOptions } from "./transactionSql.js"
import type { Hook, Unit } from "./unit.js"
import type { Wire } from "./wire.js"

interface Waiter {
  readonly done: (error: DbError | undefined) => void
  /** Its time limit. */
  stop: () => void
}

let savepoints = 0

/**
 * What a block is on the server.
 * - `session`: the transaction of the session, opened by its first statement.
 * - `transaction`: as that, but this block decides about the commit (`atomic`, an outermost `withTransaction`).
 * - `savepoint`
 * @internal
 */
export type FrameKind = "session" | "transaction" | "savepoint"

/** How a block was told to end by `tx.end`, with the value that it ends with. @internal */
export interface Ending {
  readonly commits: boolean
  readonly value: unknown
  /** Why a block on the way could not be kept. */
  failure: DbError | undefined
}

/** @internal */
export interface FrameOptions extends TransactionOptions {
  readonly manual?: boolean | undefined
}

const none: ReadonlyArray<never> = []

/** @internal */
export class Frame implements Owner {
  /** The inner block that is open now. */
  child: Frame | undefined = undefined
  ended = false
  /** SAVEPOINT was sent. */
  begun = false
  /** Rolled back to, or within a block that was: its work and its cursors are gone. */
  undone = false
  /** Who waits while that is under way. */
  undoing: Array<() => void> | undefined = undefined
  /** Of a block that decides about the commit: the transaction is its own, or also that of the session around it. */
  holds: "nothing" | "own" | "shared" = "nothing"
  /** The first statement of this block that the server refused. */
  failure: DbError | undefined = undefined
  failedStatement: string | undefined = undefined
  rollbackOnly: string | undefined = undefined
  /** Its time is over: what is issued in it fails, and so does its success. */
  late: DbError | undefined = undefined
  private stopTimer: (() => void) | undefined = undefined
  /** What became of a savepoint, for those who watch. */
  outcome: Outcome = "none"
  /** How `tx.end` told this block to end, or one around it, through this one. */
  ending: Ending | undefined = undefined
  readonly savepoint: number
  /** Settings of the block as they were before, to be put back when it is released. */
  before: ReadonlyArray<readonly [name: string, value: string]> = none
  /** Run before each COMMIT while the block lasts: a session's sees several. Most have none. */
  beforeCommit: Set<Hook> | undefined = undefined
  afterCommit: Array<Hook> | undefined = undefined
  afterRollback: Array<Hook> | undefined = undefined
  private readonly waiters = new Line<Waiter>()

  constructor(
    readonly unit: Unit,
    readonly parent: Frame | undefined,
    readonly kind: FrameKind,
    readonly options: FrameOptions
  ) {
    this.savepoint = kind === "savepoint" ? ++savepoints : 0
  }

  get name(): string {
    return this.options.name ?? (this.kind === "session" ? this.unit.name : `block ${this.depth}`)
  }

  get manual(): boolean {
    return this.options.manual === true
  }

  /** How many blocks there are from the outermost to this one. */
  get depth(): number {
    let depth = 0
    for (let frame: Frame | undefined = this; frame !== undefined; frame = frame.parent) {
      if (frame.kind !== "session") depth++
    }
    return depth
  }

  /** What BEGIN is sent with when this block opens the transaction. */
  opening(defaults: TransactionOptions): TransactionOptions | undefined {
    if (this.holds !== "own") return undefined
    if (this.options === defaults) return defaults
    const settings = { ...defaults.settings, ...this.options.settings }
    return { ...defaults, ...given(this.options), settings }
  }

  /** For a block without an effect that could be interrupted: its own time limit, until it ends. */
  limit(millis: number, error: () => DbError): void {
    this.stopTimer = timer(millis, () => {
      this.late = error()
      this.unit.cancelIn(this, this.late)
    })
  }

  /** The block that is too late, of this one and those around it. */
  get overdue(): DbError | undefined {
    for (let frame: Frame | undefined = this; frame !== undefined; frame = frame.parent) {
      if (frame.late !== undefined) return frame.late
    }
    return undefined
  }

  addBeforeCommit(hook: Hook): void {
    ;(this.beforeCommit ??= new Set()).add(hook)
  }

  addAfter(which: "afterCommit" | "afterRollback", hook: Hook): void {
    ;(this[which] ??= []).push(hook)
  }

  isWithin(outer: Frame): boolean {
    for (let frame: Frame | undefined = this; frame !== undefined; frame = frame.parent) {
      if (frame === outer) return true
    }
    return false
  }

  /** Manual blocks belong to no fiber: a statement of their parent runs in the innermost of them. */
  get top(): Frame {
    let frame: Frame = this
    while (frame.child !== undefined && frame.child.manual) frame = frame.child
    return frame
  }

  /** Asked at the moment of sending; whatever of the path is not open yet goes along. */
  takePrefix(): ReadonlyArray<Control> {
    return this.unit.prefix(this)
  }

  vet(wire: Wire): DbError | undefined {
    return this.unit.vet(wire)
  }

  /** Something else has to end before a statement of this block can go out. */
  private get taken(): boolean {
    const { copying, settling } = this.unit
    return settling || copying > 0 || this.top.child !== undefined
  }

  /** A statement of this block has its turn at once. */
  get free(): boolean {
    return !this.ended && !this.taken
  }

  /**
   * Calls back when no inner block is open: at once, or in order of asking. The returned function gives up.
   */
  turn(done: (error: DbError | undefined) => void): () => void {
    if (this.ended) {
      done(this.closedError())
      return () => {}
    }
    if (this.free) {
      done(undefined)
      return () => {}
    }
    const waiter: Waiter = { done, stop: () => {} }
    const limit = this.unit.engine.config.blockMillis
    waiter.stop = deadline(limit, () => {
      if (this.waiters.leave(place)) done(this.busyError(limit))
    })
    const place = this.waiters.join(waiter)
    return () => {
      if (this.waiters.leave(place)) waiter.stop()
    }
  }

  private busyError(limit: number): DbError {
    const child = this.top.child?.name
    const { copying, settling } = this.unit
    if (child === undefined && !settling && copying > 0) {
      return DbError.make("SessionBusy", {
        message: `Waited ${limit} ms for a COPY of the session "${this.unit.name}".`,
        hint: "Until it has ended the server takes nothing else: read its source, or use what it yields, in DbSession.isolated.",
        block: "COPY"
      })
    }
    const blocking = child ?? (settling ? "the end of the transaction" : "another block")
    return DbError.make("SessionBusy", {
      message: `Waited ${limit} ms for the block "${blocking}", which is open inside "${this.name}".`,
      hint: "A block that joins a fiber which needs the outer block waits for itself. blockTimeout is the limit.",
      block: blocking
    })
  }

  open(kind: FrameKind, options: FrameOptions, holds: Frame["holds"] = "nothing"): Frame {
    const parent = this.top
    const frame = new Frame(this.unit, parent, kind, options)
    frame.holds = holds
    parent.child = frame
    return frame
  }

  /** No more statements in this block and those in it; the outer block still waits. */
  seal(): void {
    if (this.ended) return
    this.ended = true
    this.stopTimer?.()
    this.child?.seal()
    if (this.waiters.length === 0 && this.unit.runs.length === 0) return
    const error = this.closedError()
    for (const waiter of this.waiters.empty()) {
      waiter.stop()
      waiter.done(error)
    }
    this.unit.abandonIn(this, error)
  }

  /** The block is over: the next in line has its turn. */
  close(): void {
    this.seal()
    const parent = this.parent
    if (parent === undefined || parent.child !== this) return
    parent.child = undefined
    // Statements of a block above manual ones wait there.
    for (let frame: Frame | undefined = parent; frame !== undefined; frame = frame.manual ? frame.parent : undefined) {
      frame.serve()
    }
  }

  /** Whoever waits has its turn, as long as nothing stands in the way. */
  serve(): void {
    while (this.waiters.length > 0 && !this.taken) {
      const waiter = this.waiters.next()!
      waiter.stop()
      waiter.done(undefined)
    }
  }

  closedError(): DbError {
    return this.kind === "session"
      ? this.unit.closedError()
      : DbError.make("TransactionClosed", {
          message: `The block "${this.name}" has ended.`,
          hint: "A fiber outlived the transaction that it was started in. Join it before the block ends, or detach it."
        })
  }
}

/** What `then` makes at the turn of a block, at that very moment. Interrupted, it gives up its place. @internal */
export const atTurn = <A>(frame: Frame, then: () => Effect.Effect<A, DbError>): Effect.Effect<A, DbError> =>
  Effect.async<A, DbError>((resume) => {
    const leave = frame.turn((error) => resume(error === undefined ? then() : Effect.fail(error)))
    return Effect.sync(leave)
  })

/** From a block outwards, itself included. @internal */
export const framesAbove = (frame: Frame): ReadonlyArray<Frame> => {
  const frames: Array<Frame> = []
  for (let at: Frame | undefined = frame; at !== undefined; at = at.parent) frames.push(at)
  return frames
}

/** From a block inwards, itself included. @internal */
export const framesIn = (frame: Frame): ReadonlyArray<Frame> => {
  const frames: Array<Frame> = []
  for (let at: Frame | undefined = frame; at !== undefined; at = at.child) frames.push(at)
  return frames
}

/** Blocks around a fiber that are not of its session. @internal */
export interface Around {
  readonly frame: Frame
  readonly next: Around | undefined
}

/** Those where another session, or none, takes the place of the fiber's. What is over is not kept alive. @internal */
export const aroundOf = (place: {
  readonly frame: Frame | undefined
  readonly around?: Around | undefined
}): Around | undefined => {
  let next = place.around
  while (next?.frame.ended === true) next = next.next
  const { frame } = place
  return frame === undefined || frame.ended ? next : { frame, next }
}
