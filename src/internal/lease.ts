/**
 * A borrowed connection, or the promise of one: the root of a chain of wrappers that share at most one raw
 * connection. Who needs it first makes it borrow; whoever holds the root gives it back.
 */
import type * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import { deadline } from "./deadline.js"
import type { EngineCore } from "./engine.js"
import { Line } from "./line.js"
import type { Holder } from "./loans.js"
import type { Unit } from "./unit.js"
import type { Wire } from "./wire.js"

/** The stack of connections around a fiber. A session stands in it for the connection that it runs on. @internal */
export class StackNode {
  constructor(
    readonly of: Stacked,
    readonly next: StackNode | undefined
  ) {}
}

/** @internal */
export interface Stacked {
  /** What has to be done before its root is asked for; fails when whoever asks has outlived it. */
  readonly ready: Effect.Effect<void, DbError>
  /** The root to share, or nothing if it is no longer there to be shared. */
  readonly root: () => Root | undefined
}

/** @internal */
export const topOf = (stack: StackNode | undefined): Stacked | undefined => stack?.of

/** The stack without this one, wherever it stands; the same when it is not in it. @internal */
export const without = (stack: StackNode | undefined, of: Stacked): StackNode | undefined => {
  if (stack === undefined) return undefined
  if (stack.of === of) return stack.next
  const next = without(stack.next, of)
  return next === stack.next ? stack : new StackNode(stack.of, next)
}

/** What a fiber is told that outlives the connection on top of its stack. @internal */
export const releasedStack = (): DbError =>
  DbError.make("ConnectionReleased", {
    message: "The ambient connection was released.",
    hint: "A fiber outlived the connection that it was started with. Join it first, or acquire one of its own."
  })

type Borrowed = (error: DbError | undefined, wire: Wire | undefined) => void

interface Claim {
  readonly unit: Unit | undefined
  readonly done: (error: DbError | undefined) => void
  /** Its time limit. */
  readonly stop: () => void
}

/** @internal */
export class Root {
  wire: Wire | undefined = undefined
  /** For good: root and reusers fail from now on. */
  released = false
  /** The session whose transaction is open here. */
  unit: Unit | undefined = undefined
  /** Its connection is the engine's, and goes back there. */
  private lent = false
  private readonly waiting = new Line<Borrowed>()
  private giveUp: (() => boolean) | undefined = undefined
  private readonly claims = new Line<Claim>()
  private serving = false

  constructor(
    readonly engine: EngineCore,
    readonly holder: Holder,
    readonly acquireMillis: number
  ) {}

  /** A root around a connection that is already there: `afterConnect`, the sandbox. */
  static around(engine: EngineCore, holder: Holder, wire: Wire): Root {
    const root = new Root(engine, holder, 0)
    root.wire = wire
    return root
  }

  /** Its connection has died with no transaction open, neither a session's nor one of the user's own. */
  get stale(): boolean {
    const { lent, unit, wire } = this
    return wire !== undefined && wire.dead && lent && unit?.begun !== true && wire.status === "I"
  }

  /**
   * Calls back with the connection, borrowing it first if there is none or if it has died. The returned function gives
   * up.
   */
  borrow(done: Borrowed): () => void {
    if (this.released) {
      done(this.releasedError(), undefined)
      return () => {}
    }
    if (this.stale) this.release(false)
    if (this.wire !== undefined) {
      done(undefined, this.wire)
      return () => {}
    }
    const place = this.waiting.join(done)
    if (this.waiting.length === 1) {
      let called = false
      const giveUp = this.engine.pool().take(this.holder, this.acquireMillis, (error, wire) => {
        called = true
        this.giveUp = undefined
        if (wire !== undefined) {
          this.wire = wire
          this.lent = true
        }
        for (const waiter of this.waiting.empty()) waiter(error, wire)
      })
      if (!called) this.giveUp = giveUp
    }
    return () => {
      if (!this.waiting.leave(place)) return
      if (this.waiting.length === 0 && this.giveUp !== undefined) {
        this.giveUp()
        this.giveUp = undefined
      }
    }
  }

  /**
   * Waits until no other session's transaction is open here; with a unit, takes the place. Statements without a
   * session wait as well: they must not run inside somebody's transaction.
   */
  claim(unit: Unit | undefined, done: (error: DbError | undefined) => void): () => void {
    if (this.unit === unit || (this.unit === undefined && this.claims.length === 0)) {
      if (unit !== undefined) this.unit = unit
      done(undefined)
      return () => {}
    }
    const limit = this.engine.config.blockMillis
    const place = this.claims.join({
      unit,
      done,
      stop: deadline(limit, () => {
        const holder = this.unit?.name ?? "another session"
        if (!this.claims.leave(place)) return
        done(
          DbError.make("SessionBusy", {
            message: `Waited ${limit} ms for the session "${holder}", whose transaction is open on this connection.`,
            hint: "Sessions that share a connection take turns. DbSession.isolated gives each its own.",
            block: holder
          })
        )
      })
    })
    return () => {
      if (this.claims.leave(place)) place.value.stop()
    }
  }

  unclaim(unit: Unit): void {
    if (this.unit !== unit) return
    this.unit = undefined
    this.serve()
  }

  private serve(): void {
    // Who is served may give its place up at once, and the next: the loop goes on, not a stack.
    if (this.serving) return
    this.serving = true
    try {
      while (this.claims.length > 0 && this.unit === undefined) this.serveNext()
    } finally {
      this.serving = false
    }
  }

  private serveNext(): void {
    const claim = this.claims.next()!
    claim.stop()
    this.unit = claim.unit
    claim.done(undefined)
    if (claim.unit === undefined || this.unit !== claim.unit) return
    // The same session may have several statements in the line.
    for (const place of this.claims.places) {
      if (this.unit !== claim.unit) return
      if (place.value.unit !== claim.unit || !this.claims.leave(place)) continue
      place.value.stop()
      place.value.done(undefined)
    }
  }

  /** Gives the raw connection back; the next use borrows again, unless it is for good. */
  release(permanent: boolean): void {
    if (permanent) this.released = true
    const { lent, wire } = this
    this.wire = undefined
    this.lent = false
    if (this.giveUp !== undefined && permanent) {
      this.giveUp()
      this.giveUp = undefined
    }
    if (permanent && this.waiting.length + this.claims.length > 0) {
      const error = this.releasedError()
      for (const waiter of this.waiting.empty()) waiter(error, undefined)
      for (const claim of this.claims.empty()) {
        claim.stop()
        claim.done(error)
      }
    }
    // Not to the pool that was asked: a wait may have moved to another host's.
    if (wire !== undefined && lent) this.engine.giveBack(wire)
  }

  /** The transaction that its connection has died with is over: the next use borrows another. */
  dropDead(): void {
    if (this.lent && this.wire?.dead === true) this.release(false)
  }

  releasedError(): DbError {
    return DbError.make("ConnectionReleased", {
      message: `The connection "${this.holder.name}" was released for good.`,
      hint: "A fiber or a captured handle outlived it. Acquire a connection of its own, or release with { permanent: false }."
    })
  }
}
