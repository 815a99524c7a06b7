/**
 * The place of a session: fibers share it by reference, so that whoever asks first creates the session that all
 * of them see, and an ended one is seen to be ended.
 */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type { DbError } from "../DbError.js"
import type { HookServices } from "../DbOptions.js"
import * as Ambient from "./ambient.js"
import type { EngineCore } from "./engine.js"
import { Root } from "./lease.js"
import type { Stacked } from "./lease.js"
import type { TransactionOptions } from "./transactionSql.js"
import { Unit } from "./unit.js"
import { Writes } from "./writes.js"

let sessions = 0

/** @internal */
export interface SlotOptions extends TransactionOptions {
  readonly beforeCommit?: Effect.Effect<unknown, unknown, HookServices<any>> | undefined
}

/** @internal */
export class Slot implements Stacked {
  unit: Unit | undefined = undefined
  ended = false
  private late: DbError | undefined = undefined
  private counted: Writes | undefined = undefined
  private readonly number: number
  private gate: Deferred.Deferred<void, DbError> | undefined = undefined

  constructor(
    readonly engine: EngineCore,
    readonly options: SlotOptions,
    /** The connection that was ambient when it was opened, for the session to run on. */
    private readonly outer: Root | undefined,
    private readonly outerWrites?: Writes
  ) {
    this.number = ++sessions
  }

  get name(): string {
    return this.options.name ?? `session ${this.number}`
  }

  /** What it has committed: a session that runs nothing has no use for it. */
  get writes(): Writes {
    return (this.counted ??= new Writes(this.outerWrites))
  }

  /** Something has to run before a session can be created. */
  get needsGate(): boolean {
    return this.unit === undefined && !this.ended && this.engine.beforeSession !== undefined
  }

  get ready(): Effect.Effect<void, DbError> {
    if (this.ended) return Effect.fail(this.get().closedError())
    if (!this.needsGate) return Effect.void
    return Effect.zipRight(
      this.prepare,
      // Ended meanwhile.
      Effect.suspend(() => (this.ended ? this.ready : Effect.void))
    )
  }

  /** That of its session, created if there is none. */
  root(): Root | undefined {
    return this.ended ? undefined : this.get().lease
  }

  /** Whether its session is on this connection, or will be when somebody asks for it. */
  runsOn(root: Root): boolean {
    const { unit } = this
    if (unit !== undefined && !unit.ended) return unit.lease === root
    return !this.ended && this.outer === root && !root.released
  }

  /** The session, created if there is none. After the end of the slot it is one that has ended. */
  get(): Unit {
    if (this.unit === undefined || (this.unit.ended && !this.ended)) {
      const own = this.outer === undefined || this.outer.released
      const root = own ? new Root(this.engine, this, this.engine.config.acquireMillis) : this.outer
      this.unit = new Unit(this.engine, root, own, this.name, this.engine.transactionOptions(this.options))
      this.unit.writes = this.writes
      if (this.late !== undefined) this.unit.expire(this.late)
      if (this.ended) this.unit.shut()
    }
    return this.unit
  }

  /** Runs `beforeSession` once for the next session, however many ask; for those opened inside of it, not at all. */
  get prepare(): Effect.Effect<void, DbError> {
    return Effect.uninterruptibleMask((restore) =>
      Effect.withFiberRuntime((fiber) => {
        const before = this.engine.beforeSession
        if (!this.needsGate || before === undefined) return Effect.void
        if (Ambient.entry(fiber, this.engine).preparing === true) return Effect.void
        // Its session may have been closed by another that waited: the next one has its own.
        const opened = (gate: Deferred.Deferred<void, DbError>): Effect.Effect<void, DbError> =>
          restore(
            Effect.zipRight(
              Deferred.await(gate),
              Effect.suspend(() => this.prepare)
            )
          )
        if (this.gate !== undefined) return opened(this.gate)
        const gate = Deferred.unsafeMake<void, DbError>(fiber.id())
        this.gate = gate
        const run = Effect.flatMap(Effect.exit(Effect.interruptible(this.outside(before))), (exit) =>
          Effect.suspend(() => {
            this.gate = undefined
            if (Exit.isSuccess(exit) && !this.ended) this.get()
            return Deferred.done(gate, exit)
          })
        )
        // In a fiber of its own: it is for all who wait, not for the first who asked.
        return Effect.zipRight(Effect.forkDaemon(run), opened(gate))
      })
    )
  }

  /** Not in the session that waits for it: its statements would wait for themselves. */
  private outside<A, E>(before: Effect.Effect<A, E>): Effect.Effect<A, E> {
    return Ambient.detach(Ambient.locally(before, this.engine, (entry) => ({ ...entry, preparing: true })))
  }

  /** Its time is over, for the session that is in it and for those that come. */
  expire(late: DbError): void {
    this.late = late
    this.unit?.expire(late)
  }

  /** The slot is empty again: the next use creates another session. */
  empty(): void {
    this.unit = undefined
  }
}
