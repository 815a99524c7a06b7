/**
 * An engine whose connections are virtual ones, all on one real connection.
 */
import * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import { EngineCore } from "../internal/engine.js"
import type { Holder } from "../internal/loans.js"
import type { Pool, PoolStats } from "../internal/pool.js"
import { Probe } from "../internal/probe.js"
import type { Listening } from "../internal/probe.js"
import type { Wire } from "../internal/wire.js"
import { Sandbox } from "./turns.js"
import { VirtualWire } from "./virtual.js"

const ended = (): DbError =>
  DbError.make("PoolClosed", {
    message: "The sandbox has ended.",
    hint: "Work outlived the test: join it, or interrupt it, before the test ends."
  })

/** Lends as many virtual connections as are asked for. */
class VirtualPool {
  private readonly lent = new Set<VirtualWire>()
  constructor(
    private readonly sandbox: Sandbox,
    private readonly probe: Probe
  ) {}

  readonly connectError = undefined

  get stats(): PoolStats {
    const used = this.lent.size
    return { total: used, idle: 0, used, connecting: 0, closing: 0, pending: 0, max: used + 1 }
  }

  take(
    holder: Holder,
    _millis: number,
    done: (error: DbError | undefined, wire: Wire | undefined) => void
  ): () => boolean {
    const { dead } = this.sandbox
    if (dead !== undefined) {
      done(dead, undefined)
      return () => false
    }
    const wire = new VirtualWire(this.sandbox, holder.name)
    this.lent.add(wire)
    this.probe.listener?.lent(false)
    done(undefined, wire as unknown as Wire)
    return () => false
  }

  give(wire: Wire): void {
    const virtual = wire as unknown as VirtualWire
    if (this.lent.delete(virtual)) virtual.forsake()
  }

  evictAll(): void {}
  suspend(): void {}
  resume(): void {}

  close(done: () => void): void {
    this.sandbox.close(ended())
    done()
  }

  destroyAll(): void {}
}

/** An engine whose connections are virtual ones of one real connection. */
export class SandboxEngine extends EngineCore {
  private readonly virtual: VirtualPool
  private readonly sandbox: Sandbox
  /** Of the engine whose connection it is: that is what the connection tells what it sends. */
  private readonly wires: Probe

  constructor(of: EngineCore, real: Wire) {
    // Its own pool is never used, and opens nothing.
    super(of.name, { ...of.config, min: 0, probe: new Probe() }, of.runtime)
    this.wires = of instanceof SandboxEngine ? of.wires : of.config.probe
    this.sandbox = new Sandbox(real, this.config.blockMillis)
    this.virtual = new VirtualPool(this.sandbox, this.config.probe)
  }

  /** What the program in the sandbox sends, as it would without. */
  readonly listen = (listening: Listening): (() => void) => {
    const { connection } = this.sandbox
    const stopSent = this.wires.listen({
      sent: (from, text, as, heard) => {
        if (from === connection && as !== "") listening.sent(from, as ?? text, undefined, heard)
      },
      lent: () => {}
    })
    const stopLent = this.config.probe.listen({ sent: () => {}, lent: listening.lent })
    return () => {
      stopSent()
      stopLent()
    }
  }

  override pool(): Pool {
    return this.virtual as unknown as Pool
  }

  override get stats(): PoolStats {
    return this.virtual.stats
  }

  override giveBack(wire: Wire): void {
    this.virtual.give(wire)
  }

  override changeHost(): boolean {
    return false
  }

  override readonly close: Effect.Effect<void> = Effect.sync(() => {
    this.closed = true
    this.virtual.close(() => {})
  })
}
