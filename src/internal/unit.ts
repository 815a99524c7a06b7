/**
 * A session's unit of work: at most one transaction at a time on at most one connection, both from the first
 * statement on. States: idle → active → idle ... → closed; `failed` is active with a transaction that the server
 * has aborted.
 */
import type * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import { stuckOn } from "./blocking.js"
import type { EngineCore } from "./engine.js"
import { Frame } from "./frame.js"
import type { Root } from "./lease.js"
import type { Outcome } from "./observe.js"
import type { Command } from "./pipeline.js"
import type { Control, Done, Owner } from "./pipeline.js"
import type { Result } from "./rows.js"
import { plain, setConfig } from "./controls.js"
import { leavesBy } from "./leaving.js"
import { Line } from "./line.js"
import { Run } from "./run.js"
import { withPath } from "./searchPath.js"
import type { PathState } from "./searchPath.js"
import type { Spec } from "./statement.js"
import * as Sql from "./transactionSql.js"
import type { TransactionOptions } from "./transactionSql.js"
import type { Wire } from "./wire.js"
import { mayWrite } from "./writes.js"
import type { Writes } from "./writes.js"

/**
 * `"idle"`: no transaction. `"active"`: a transaction is open. `"failed"`: one that the server has aborted.
 *
 * @since 0.1.0
 * @category models
 */
export type UnitState = "idle" | "active" | "failed" | "closed"

/** An effect to run before or after the end of a transaction, with everything it needs provided. @internal */
export type Hook = Effect.Effect<unknown, unknown>

/** How the end of a transaction is proved when the answer to COMMIT is lost. @internal */
export interface OutcomeMarker {
  readonly write: Effect.Effect<void, DbError>
  readonly settle: Effect.Effect<"committed" | "aborted", DbError>
}

/** @internal */
export class Unit implements PathState {
  readonly frame: Frame
  /** What its fibers have asked for and not been told of yet. */
  readonly runs = new Line<Run>()
  /** How many of them have had their turn: they are on their way, or wait for the connection. */
  issued = 0
  /** How many of them have been handed to the pipeline. */
  submitted = 0
  /** BEGIN was sent. */
  begun = false
  /** The server answers 25P02 until a rollback. */
  aborted = false
  /** How many transactions have ended: what belongs to one of them can tell that it is over. */
  transactions = 0
  /** How many COPYs run: until it has ended the server takes nothing else. */
  copying = 0
  /** Somebody is ending the transaction: what is issued from now on belongs to the next one, and waits. */
  settling = false
  /** Who is to be told when that is over, and why when it could not be committed. */
  settled: Array<(lost: DbError | undefined) => void> | undefined = undefined
  /** How many run the hooks before a commit. */
  preparing = 0
  /** Its time is over. */
  private late: DbError | undefined = undefined
  /** Why there is no transaction any more, though nobody ended it. */
  lost: DbError | undefined = undefined
  ended = false
  private begunWith: TransactionOptions | undefined = undefined
  /** Something in the transaction may have changed data. */
  wrote = false
  /** Where its commits are counted. */
  writes: Writes | undefined = undefined
  /** For a transaction whose outcome is to be proved. */
  wantsMarker: ((unit: Unit) => OutcomeMarker) | undefined = undefined
  /** What became of the last transaction, for those who watch. */
  outcome: Outcome = "none"
  path: string | undefined | null = undefined
  private hasPaths = false
  /** What rides with the next statement: the end of blocks that succeeded. */
  pending: Array<Control> = []
  private quiet: Array<() => void> | undefined = undefined

  constructor(
    readonly engine: EngineCore,
    readonly lease: Root,
    /** The connection is this session's own. */
    readonly ownsLease: boolean,
    readonly name: string,
    readonly defaults: TransactionOptions
  ) {
    this.frame = new Frame(this, undefined, "session", {})
  }

  /** What BEGIN is sent with, or was: a block that opens the transaction may say more than the session. */
  get options(): TransactionOptions {
    return this.begunWith ?? this.frame.child?.opening(this.defaults) ?? this.defaults
  }

  get state(): UnitState {
    return this.ended
      ? "closed"
      : this.aborted || this.lost !== undefined
        ? "failed"
        : this.begun || this.submitted > 0
          ? "active"
          : "idle"
  }

  /** There is something to be ended: a transaction, or the word that there must not be one. */
  get hasToEnd(): boolean {
    return this.open || this.lost !== undefined || this.frame.rollbackOnly !== undefined
  }

  /** Not only late, with nothing open: there is no transaction where there should be one. */
  get hasLost(): boolean {
    return this.lost !== undefined && (this.begun || this.lost !== this.late)
  }

  /** Why its transaction can't be ended now. */
  get stuck(): DbError | undefined {
    const { wire } = this.lease
    return this.open && wire !== undefined ? stuckOn(wire) : undefined
  }

  /** A transaction is open, or about to be: statements are on their way. */
  get open(): boolean {
    return this.begun || this.issued > 0
  }

  closedError(): DbError {
    return DbError.make("SessionClosed", {
      message: `The session "${this.name}" is closed.`,
      hint: "A fiber, a promise that was not awaited, or a captured handle outlived it. Join or await it first, or run it with DbSession.detach(effect)."
    })
  }

  run(frame: Frame, spec: Spec, done: Done): Run {
    return new Run(this, frame, spec, done)
  }

  /** The connection, when a statement of this block waits for nothing: a lease that was released has none. */
  wireFor(frame: Frame): Wire | undefined {
    const { lease } = this
    return this.lost === undefined && lease.unit === this && frame.free ? lease.wire : undefined
  }

  /** The connection, when no other session's transaction is open on it. */
  place(done: (error: DbError | undefined, wire: Wire | undefined) => void): () => void {
    if (this.lost !== undefined) {
      done(this.lost, undefined)
      return () => {}
    }
    let stopBorrowing: () => void = () => {}
    const stopClaiming = this.lease.claim(this, (error) => {
      if (error !== undefined) return done(error, undefined)
      stopBorrowing = this.lease.borrow(done)
    })
    return () => {
      stopClaiming()
      stopBorrowing()
    }
  }

  /** Transactions that never had a search path of their own pay nothing for it. */
  ownerWithPath(owner: Owner, path: string | undefined): Owner {
    if (path !== undefined) this.hasPaths = true
    return this.hasPaths ? withPath(owner, this, path) : owner
  }

  /** What has to be sent in front of a statement of this block. */
  prefix(frame: Frame): ReadonlyArray<Control> {
    const pending = this.pending
    if (this.begun && pending.length === 0 && (frame.kind !== "savepoint" || frame.begun)) return none
    const controls: Array<Control> = []
    if (!this.begun) {
      const options = this.options
      this.begun = true
      this.begunWith = options
      controls.push({
        text: Sql.begin(options),
        params: [],
        opens: true,
        named: true,
        done: (ok) => {
          if (ok) return
          this.begun = false
          this.begunWith = undefined
          this.path = undefined
        }
      })
      const settings = Sql.settings(options)
      if (settings.length > 0) controls.push(setConfig(settings))
    }
    if (pending.length > 0) {
      controls.push(...pending)
      this.pending = []
    }
    const path: Array<Frame> = []
    for (let at: Frame | undefined = frame; at !== undefined; at = at.parent) {
      if (at.kind === "savepoint" && !at.begun) path.unshift(at)
    }
    for (const block of path) {
      block.begun = true
      controls.push({
        text: Sql.savepoint(block.savepoint),
        params: [],
        opens: false,
        named: false,
        done: (ok) => {
          if (!ok) block.begun = false
        }
      })
      if (block.options.readOnly === true && this.options.readOnly !== true) {
        controls.push(plain("SET TRANSACTION READ ONLY"))
      }
      const settings = Sql.settings(block.options)
      if (settings.length > 0) controls.push(setConfig(settings, (before) => (block.before = before)))
    }
    return controls
  }

  /** Draws the conclusions from an answer; returns the error that the caller gets. */
  answered(
    frame: Frame,
    wire: Wire,
    command: Command,
    error: DbError | undefined,
    result: Result | ReadonlyArray<Result> | undefined
  ): DbError | undefined {
    if (wire.dead) {
      if (this.begun) this.lost ??= error ?? wire.pipeline.dead
      return error
    }
    const results = result === undefined || isMany(result) ? (result ?? none) : [result]
    const by = this.begun ? leavesBy(command.text, results) : undefined
    if (by !== undefined) return this.left(wire, by, command.text)
    if (error === undefined) {
      if (!this.wrote) this.wrote = results.some((_) => mayWrite(_.command, command.text))
      return undefined
    }
    // BEGIN itself failed, or nothing was sent.
    if (!this.begun || !command.sent) return error
    // The tags of what came before the error are not told, but the status after it is: also of a COMMIT that fails.
    if (wire.status === "I" && (command.simple || error.reason.sqlState !== undefined)) {
      return this.left(wire, command.simple ? "one of several" : "one that failed", command.text, error)
    }
    if (error.reason.sqlState === undefined && error.reason._tag !== "TransactionAborted") return error
    this.aborted = true
    const told = (command.canceled ? frame.overdue : undefined) ?? error
    if (this.firstFailed === undefined) {
      // Its block may be over: what has failed then is the one around it.
      let at = frame
      while (at.parent !== undefined && at.parent.child !== at) at = at.parent
      at.failure = error
      at.failedStatement = command.text
      return told
    }
    return error.reason._tag === "TransactionAborted" ? this.abortedError(frame) : told
  }

  /** There is no transaction on the connection, or somebody else's: nothing more is sent there. */
  private left(wire: Wire, by: string, statement?: string, cause?: DbError): DbError {
    wire.doomed = "a statement of the user ended the transaction"
    return (this.lost = DbError.make("TransactionAborted", {
      message: `A statement (${by}) ended the transaction of the session "${this.name}" behind its back.`,
      hint: "Use the session's commit and rollback, or withTransaction, instead of COMMIT and ROLLBACK in SQL.",
      statement,
      cause
    }))
  }

  /** Whether the transaction is still there, where the user has the `pg` client as well. */
  vet(wire: Wire): DbError | undefined {
    return this.begun && wire.status === "I" ? this.left(wire, "of the pg client") : undefined
  }

  private get firstFailed(): Frame | undefined {
    for (let frame: Frame | undefined = this.frame; frame !== undefined; frame = frame.child) {
      if (frame.failure !== undefined) return frame
    }
    return undefined
  }

  abortedError(frame: Frame): DbError {
    const failed = this.firstFailed
    const first = failed?.failure
    const why = frame.rollbackOnly
    return DbError.make("TransactionAborted", {
      message:
        first === undefined && why !== undefined
          ? `The transaction was rolled back: ${why}.`
          : `The transaction was rolled back: a statement in it had failed${first === undefined ? "" : ` (${first.reason.message.replace(/\.$/, "")})`}.`,
      hint:
        first === undefined && why !== undefined
          ? "The block was marked rollback-only: let what marked it fail the block, or give that part a block of its own."
          : "After an error PostgreSQL refuses everything until a rollback. Let the error fail the block, or put the statement in a withTransaction of its own.",
      statement: failed?.failedStatement,
      firstError: first,
      cause: first
    })
  }

  /** Why the transaction can't be committed. */
  refusal(frame: Frame): DbError | undefined {
    return (
      this.lost ??
      frame.late ??
      (this.aborted || frame.failure !== undefined || frame.rollbackOnly !== undefined
        ? this.abortedError(frame)
        : this.frame.rollbackOnly !== undefined
          ? this.abortedError(this.frame)
          : undefined)
    )
  }

  /** Calls back when what was sent is answered. The returned function gives up. */
  whenQuiet(done: () => void): () => void {
    ;(this.quiet ??= []).push(done)
    return () => {
      this.quiet = this.quiet?.filter((_) => _ !== done)
    }
  }

  /** Whoever waits in one of its blocks has its turn, as far as nothing stands in the way. */
  serve(): void {
    for (let frame: Frame | undefined = this.frame; frame !== undefined; frame = frame.child) frame.serve()
  }

  runSettled(): void {
    if (this.issued === 0 && this.quiet !== undefined) {
      const waiters = this.quiet
      this.quiet = undefined
      for (const waiter of waiters) waiter()
    }
    if (!this.begun && this.issued === 0) this.lease.unclaim(this)
  }

  dropWire(): void {
    if (this.ownsLease) this.lease.release(false)
    else this.lease.dropDead()
  }

  /** The transaction is over, one way or the other. */
  over(): void {
    this.transactions++
    this.begun = false
    this.aborted = false
    this.wrote = false
    this.path = undefined
    this.lost = this.late
    this.begunWith = undefined
    // The savepoints went with the transaction.
    this.pending = []
    this.frame.failure = undefined
    this.frame.failedStatement = undefined
    this.frame.rollbackOnly = undefined
    // A block that had it for itself: whoever waits comes after it.
    if (this.frame.child?.ended === true) this.frame.child.close()
    this.lease.unclaim(this)
  }

  /** A block ends: what was issued in it and has not been sent never happens. */
  abandonIn(block: Frame, error: DbError): void {
    for (const { value: run } of this.runs.places) if (run.block.isWithin(block)) run.abandon(error)
  }

  /** What a block has on its way will be undone, or comes too late. */
  cancelIn(block: Frame, error?: DbError): void {
    for (const { value: run } of this.runs.places) if (run.block.isWithin(block)) run.cancel(error)
  }

  /** Its time is over: it fails from now on, and what is on its way is cancelled. */
  expire(error: DbError): void {
    if (this.ended) return
    this.late = error
    this.lost ??= error
    for (const { value: run } of this.runs.places) run.cancel(error)
  }

  /** No new statements; what has not been sent fails. */
  shut(): void {
    this.ended = true
    this.frame.seal()
    if (this.runs.length === 0) return
    const error = this.closedError()
    for (const { value: run } of this.runs.places) run.abandon(error)
  }

  release(): void {
    this.lease.unclaim(this)
    if (this.ownsLease) this.lease.release(true)
  }
}

const none: ReadonlyArray<never> = []

const isMany = (result: Result | ReadonlyArray<Result>): result is ReadonlyArray<Result> => Array.isArray(result)
