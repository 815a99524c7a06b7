/**
 * The pool of one target. Callbacks and counters, no fibers: a borrow that finds an idle connection costs no
 * more than taking it from a list. Effect's own `Pool` was weighed and left: it gives no order of service, no
 * maximum that counts connections still closing on the server, and 22 µs a cycle.
 *
 * Promises: first come first served; `used + idle + connecting + closing` never exceeds the maximum; a waiter
 * that gives up does not stop the dial that was started for it; every wait is bounded.
 */
import type { DbError } from "../DbError.js"
import type { Resolved } from "../DbOptions.js"
import { Backoff } from "./backoff.js"
import { Between } from "./between.js"
import { deadline, never } from "./deadline.js"
import { Line } from "./line.js"
import type { Place } from "./line.js"
import { Loans } from "./loans.js"
import type { Holder } from "./loans.js"
import { neutral } from "./neutral.js"
import { acquireTimeout, isFinal, isTemporary, poolClosed } from "./poolErrors.js"
import { bounded, ping, reset } from "./recycler.js"
import { inRounds } from "./rounds.js"
import type { PoolMetrics } from "./telemetry.js"
import type { Wire } from "./wire.js"

class Waiter {
  readonly since = Date.now()
  /** Its time limit. */
  stop: () => void = () => {}
  place: Place<Waiter> | undefined = undefined

  constructor(
    /** Where it waits, which `changeHost` changes. */
    public pool: Pool,
    readonly holder: Holder,
    readonly timeoutMillis: number,
    /** All were in use when it came. */
    readonly full: boolean,
    readonly done: (error: DbError | undefined, wire: Wire | undefined) => void
  ) {}
}

/** What the pool needs from the engine: how a connection is made and made ready. @internal */
export interface PoolOptions {
  readonly config: Resolved
  /** Dials, checks the role, runs `afterConnect`. The returned function gives up. */
  readonly connect: (
    onDeath: (wire: Wire) => void,
    done: (error: DbError | undefined, wire: Wire | undefined) => void
  ) => () => void
  /** Whether the server's role still fits the target; asked at every hand-out, from parameter status alone. */
  readonly fits: (wire: Wire) => boolean
  /** Runs `afterConnect` again, whose settings a reset has swept away as well. */
  readonly afterReset?: ((wire: Wire, done: (ok: boolean) => void) => void) | undefined
  readonly onLeak: (holder: Holder, millis: number) => void
  readonly metrics: PoolMetrics
}

/** @internal */
export interface PoolStats {
  readonly total: number
  readonly idle: number
  readonly used: number
  readonly connecting: number
  readonly closing: number
  readonly pending: number
  readonly max: number
}

/** @internal */
export class Pool {
  private idle: Array<Wire> = []
  private readonly loans: Loans
  private readonly between = new Between(() => this.serve())
  private readonly dials = new Set<() => void>()
  private readonly waiters = new Line<Waiter>()
  private closing = 0
  private readonly left = new WeakSet<Wire>()
  private generation = 0
  suspended = false
  private closed = false
  private lastError: DbError | undefined = undefined
  private readonly retry = new Backoff()
  private reaper: NodeJS.Timeout | undefined = undefined
  private drained: Array<() => void> = []
  /** Somebody has asked for a connection: before that no socket is opened, not for the minimum either. */
  private wanted = false
  /** Fewer may be left than the minimum. */
  private short = false

  constructor(readonly options: PoolOptions) {
    this.loans = new Loans(options.config.leakMillis, options.onLeak)
  }

  get stats(): PoolStats {
    const used = this.loans.size + this.between.size
    const connecting = this.dials.size
    return {
      total: used + this.idle.length + connecting + this.closing,
      idle: this.idle.length,
      used,
      connecting,
      closing: this.closing,
      pending: this.waiters.length,
      max: this.options.config.max
    }
  }

  /** The last reason why no connection could be made, until one could. */
  get connectError(): DbError | undefined {
    return this.lastError
  }

  /**
   * Borrows. `done` may be called before this returns. The returned function gives up: `true` if the wait was
   * ended, `false` if `done` had been called and the borrower has to give the connection back.
   */
  take(
    holder: Holder,
    timeoutMillis: number,
    done: (error: DbError | undefined, wire: Wire | undefined) => void
  ): () => boolean {
    if (this.closed) {
      done(poolClosed(), undefined)
      return () => false
    }
    this.wanted = true
    if (!this.suspended && this.waiters.length === 0) {
      const wire = this.popFresh()
      if (wire !== undefined) {
        this.lend(wire, holder, false)
        this.options.metrics.waited(0)
        done(undefined, wire)
        return () => false
      }
    }
    const full = this.idle.length === 0 && !this.room
    const waiter = new Waiter(this, holder, timeoutMillis, full, done)
    this.join(waiter, timeoutMillis)
    return () => waiter.pool.forget(waiter)
  }

  private join(waiter: Waiter, millis: number): void {
    waiter.stop = deadline(millis, () => {
      if (this.forget(waiter)) waiter.done(this.timedOut(waiter), undefined)
    })
    waiter.pool = this
    waiter.place = this.waiters.join(waiter)
    this.options.metrics.changed()
    this.serve()
  }

  /** Gives back. What is not provably clean is reset in the background or ended; the slot is free again either way. */
  give(wire: Wire): void {
    const millis = this.loans.end(wire)
    if (millis === undefined) return
    this.options.metrics.usedFor(millis)
    this.options.metrics.changed()
    if (wire.dead) return this.leave(wire)
    if (wire.idle) return this.recycle(wire)
    this.between.add(wire)
    bounded(
      wire,
      this.options.config.settleMillis,
      (done) => wire.whenIdle(done),
      () => this.recycle(wire)
    )
  }

  /** Closes idle connections now, those that are being opened when they are there, lent ones when they come back. */
  evictAll(): void {
    this.generation++
    this.endIdle(() => true)
    this.settled()
  }

  suspend(): void {
    this.suspended = true
  }

  resume(): void {
    this.suspended = false
    this.serve()
  }

  /**
   * Refuses new work and fails what waits; calls back when everything lent has come back and every connection is
   * closed on the server.
   */
  close(done: () => void): void {
    this.drained.push(done)
    if (!this.closed) {
      this.closed = true
      this.generation++
      this.retry.stop()
      if (this.reaper !== undefined) clearTimeout(this.reaper)
      for (const stop of [...this.dials]) stop()
      this.dials.clear()
      for (const waiter of this.waiters.empty()) {
        waiter.stop()
        waiter.done(poolClosed(), undefined)
      }
      this.endIdle(() => true)
    }
    this.settled()
  }

  /** Takes no new work: what waits goes on to another pool, what is lent comes back and is closed. */
  retire(successor: Pool, done: () => void): void {
    const waiters = this.waiters.empty()
    this.close(done)
    for (const waiter of waiters) successor.adopt(waiter)
  }

  private adopt(waiter: Waiter): void {
    waiter.stop()
    this.wanted = true
    this.join(waiter, Math.max(1, waiter.timeoutMillis - (Date.now() - waiter.since)))
  }

  /** Ends what is still lent, cancelling what runs. */
  destroyAll(): void {
    const cause = new Error("the engine was closed")
    for (const wire of this.loans.endAll()) this.between.add(wire)
    for (const wire of this.between.wires) {
      wire.destroy(cause)
      this.leave(wire)
    }
  }

  private timedOut(waiter: Waiter): DbError {
    this.options.metrics.timedOut()
    return acquireTimeout({
      timeoutMillis: waiter.timeoutMillis,
      waited: Date.now() - waiter.since,
      stats: this.stats,
      holders: this.loans.holders,
      suspended: this.suspended,
      lastError: this.lastError
    })
  }

  private get room(): boolean {
    return this.stats.total < this.options.config.max
  }

  /** The one used last: it is the likeliest to be alive, and the others may become old enough to be closed. */
  private pop(): Wire | undefined {
    for (;;) {
      const wire = this.idle.pop()
      if (wire === undefined || this.isUsable(wire)) return wire
      this.end(wire)
    }
  }

  private popFresh(): Wire | undefined {
    const wire = this.pop()
    if (wire === undefined || this.isFresh(wire)) return wire
    this.idle.push(wire)
    return undefined
  }

  private isUsable(wire: Wire): boolean {
    return (
      !wire.dead &&
      wire.doomed === undefined &&
      wire.generation === this.generation &&
      Date.now() < wire.expiresAt &&
      this.options.fits(wire)
    )
  }

  private isFresh(wire: Wire): boolean {
    return !wire.doubted && Date.now() - wire.lastUsed <= this.options.config.validateMillis
  }

  private lend(wire: Wire, holder: Holder, waited: boolean): void {
    this.loans.begin(wire, holder)
    this.options.config.probe.listener?.lent(waited)
    this.options.metrics.changed()
  }

  private forget(waiter: Waiter): boolean {
    if (!this.waiters.leave(waiter.place!)) return false
    waiter.stop()
    this.options.metrics.changed()
    return true
  }

  private handOver(wire: Wire): void {
    const waiter = this.waiters.next()!
    waiter.stop()
    this.lend(wire, waiter.holder, waiter.full)
    this.options.metrics.waited(Date.now() - waiter.since)
    waiter.done(undefined, wire)
  }

  /** A usable connection that nobody has: to the first waiter, or to the idle list. */
  private put(wire: Wire): void {
    this.between.delete(wire)
    if (this.closed || !this.isUsable(wire)) return this.end(wire)
    wire.lastUsed = Date.now()
    if (this.waiters.length > 0 && !this.suspended) return this.handOver(wire)
    this.idle.push(wire)
    this.scheduleReaper()
  }

  private recycle(wire: Wire): void {
    if (wire.dead) return this.leave(wire)
    const vouched = wire.fromForeign()
    const { reset: when } = this.options.config
    if (!vouched || wire.pipeline.suspect || !this.isUsable(wire)) return this.end(wire)
    if (wire.status === "I" && (when === "never" || (when === "auto" && !wire.dirty))) return this.put(wire)
    this.between.add(wire)
    reset(wire, this.options.config.settleMillis, when !== "never", () => {
      const again = this.options.afterReset
      if (again === undefined || when === "never" || !this.isUsable(wire)) return this.put(wire)
      bounded(
        wire,
        this.options.config.connectMillis,
        (done) =>
          again(wire, (ok) => {
            if (!ok) wire.doomed ??= "afterConnect failed after a reset"
            done()
          }),
        () => this.put(wire)
      )
    })
  }

  private validate(wire: Wire): void {
    const { acquireMillis, connectMillis, settleMillis } = this.options.config
    this.between.add(wire)
    // Whoever waits for it must have time left for another one.
    const limit = Math.min(connectMillis, settleMillis, acquireMillis / 2)
    ping(
      wire,
      limit,
      () => {
        wire.doubted = false
        this.put(wire)
      },
      // The network swallows what is sent: those that have been silent for as long are not worth a wait each.
      () => this.endIdle((other) => !this.isFresh(other))
    )
  }

  private end(wire: Wire): void {
    if (!wire.dead) wire.end()
    this.leave(wire)
  }

  /** Off the list first: each end makes room, and whoever is served then takes from the list. */
  private endIdle(which: (wire: Wire) => boolean): void {
    const ended = new Set(this.idle.filter(which))
    this.idle = this.idle.filter((wire) => !ended.has(wire))
    for (const wire of ended) this.end(wire)
  }

  private readonly onDeath = (wire: Wire): void => {
    const at = this.idle.indexOf(wire)
    if (at !== -1) this.idle.splice(at, 1)
    // What ends one connection from outside has often ended its contemporaries: they are checked before use.
    if (!this.left.has(wire)) for (const other of this.idle) other.doubted = true
    // A lent one counts as used until it is given back.
    if (at !== -1 || this.between.has(wire)) this.leave(wire)
  }

  /** Until its socket is closed a connection counts: its backend may still be there. */
  private leave(wire: Wire): void {
    this.between.delete(wire)
    if (!this.left.has(wire)) {
      this.left.add(wire)
      this.closing++
      wire.onClose(() => {
        this.closing--
        this.settled()
      })
    }
    this.settled()
  }

  private settled(): void {
    if (this.closed) {
      if (this.stats.total === 0) for (const done of this.drained.splice(0)) done()
      return
    }
    this.options.metrics.changed()
    this.short = true
    this.serve()
  }

  private fill(): void {
    this.short = false
    if (!this.wanted || this.closed) return
    // Not until somebody has asked again, and was let in.
    if (this.lastError !== undefined && isFinal(this.lastError)) return
    for (let i = this.stats.total; i < this.options.config.min; i++) this.dial()
  }

  // A dial that is refused at once makes room for another, once for each of the thousands who may wait.
  private readonly serve = inRounds(() => {
    this.serveWaiters()
    if (this.short) this.fill()
  })

  /** Idle connections to those who wait, checked first where they must be, and new ones for the rest. */
  private serveWaiters(): void {
    if (this.closed || this.suspended) return
    while (this.waiters.length > 0) {
      const wire = this.popFresh()
      if (wire === undefined) break
      this.handOver(wire)
    }
    // What is on its way will serve somebody.
    while (this.dials.size < this.waiters.length && this.dials.size + this.between.soon() < this.waiters.length) {
      const wire = this.pop()
      if (wire !== undefined) this.validate(wire)
      else if (this.room && !this.retry.pausing) this.dial()
      else break
    }
  }

  private dial(): void {
    if (this.retry.pausing) return
    let stop: () => void = () => {}
    let over = false
    const began = Date.now()
    const { generation } = this
    const giveUp = () => {
      over = true
      stop()
    }
    this.dials.add(giveUp)
    stop = this.options.connect(this.onDeath, (error, wire) => {
      this.dials.delete(giveUp)
      if (over) {
        if (wire === undefined) return this.settled()
        wire.destroy(new Error("the engine was closed"))
        return this.leave(wire)
      }
      if (wire === undefined) return this.refused(error!)
      this.lastError = undefined
      this.options.metrics.created(Date.now() - began)
      this.retry.reset()
      wire.generation = generation
      const { ttlMillis } = this.options.config
      wire.expiresAt = ttlMillis >= never ? Infinity : Date.now() + ttlMillis * (0.9 + Math.random() * 0.2)
      this.put(wire)
      this.settled()
    })
    if (over) stop()
  }

  private refused(error: DbError): void {
    this.lastError = error
    const waiter = this.waiters.first
    const busy = this.loans.size + this.between.size > 0
    const final = isFinal(error)
    if (waiter !== undefined && (final || (!isTemporary(error) && !busy))) {
      // A login that is tried again for each of those who wait may lock the account.
      for (const { done, stop } of final ? this.waiters.empty() : [this.waiters.next()!]) {
        stop()
        done(error, undefined)
      }
      return this.settled()
    }
    if (waiter === undefined && (final || this.options.config.min === 0)) return
    // Several that were dialled together are refused together: that is one reason to wait, not as many.
    if (this.retry.pausing) return
    // The server may take another connection later, or somebody gives one back: the queue stays as it is.
    this.retry.pause(waiter !== undefined, () => this.settled())
  }

  private scheduleReaper(): void {
    const { idleMillis, ttlMillis } = this.options.config
    if (this.reaper !== undefined) return
    const every = Math.max(10, Math.min(idleMillis, ttlMillis) / 2)
    if (every >= never / 2) return
    this.reaper = neutral(() => setTimeout(this.reap, every)).unref()
  }

  private readonly reap = (): void => {
    const { idleMillis, min } = this.options.config
    this.reaper = undefined
    const now = Date.now()
    let spare = this.stats.total - this.stats.connecting - this.closing - min
    this.endIdle((wire) => {
      const over = now >= wire.expiresAt || (spare > 0 && now - wire.lastUsed >= idleMillis)
      if (over) spare--
      return over
    })
    if (this.idle.length > 0) this.scheduleReaper()
  }
}
