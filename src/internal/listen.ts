/**
 * LISTEN for all channels of an engine on one connection, which is borrowed with the first listener and given back
 * with the last. When it dies every stream fails: what was notified meanwhile is lost, and the listener has to know.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import type { DbError } from "../DbError.js"
import { deadline } from "./deadline.js"
import type { EngineCore } from "./engine.js"
import { executeSpec } from "./execute.js"
import { checkIdentifier, quoteIdentifier } from "./input.js"
import { Root } from "./lease.js"
import { isRefused, makeSpec } from "./statement.js"
import type { Listener } from "./wire.js"

interface Subscriber {
  readonly payload: (payload: string) => void
  readonly failed: (error: DbError) => void
}

class Hub {
  private root: Root | undefined = undefined
  private readonly channels = new Map<string, Set<Subscriber>>()
  private readonly lock = Effect.unsafeMakeSemaphore(1)
  /** Why the last who asked for a connection got none. */
  private refused: DbError | undefined = undefined

  constructor(private readonly engine: EngineCore) {}

  /**
   * Others wait for it, in finalizers as well: a network that swallows it would hold them for ever. A server that does
   * not answer in time loses the connection.
   */
  private run(root: Root, text: string): Effect.Effect<void, DbError> {
    return Effect.withFiberRuntime<void, DbError>((fiber) => {
      const spec = makeSpec(text, [], "array", { several: false, prepare: false })
      if (isRefused(spec)) return Effect.fail(spec)
      const limit = this.engine.config.settleMillis
      const stop = deadline(limit, () => {
        root.wire?.destroy(new Error(`the server did not answer ${text} within ${limit} ms`))
      })
      return Effect.ensuring(
        executeSpec(fiber, this.engine, { _tag: "Root", root, gone: () => undefined }, spec, () => undefined),
        Effect.sync(stop)
      )
    })
  }

  private readonly listener: Listener = {
    notification: (channel, payload) => {
      for (const subscriber of this.channels.get(channel) ?? []) subscriber.payload(payload)
    },
    closed: (error) => {
      const all = [...this.channels.values()].flatMap((_) => [..._])
      this.channels.clear()
      const root = this.root
      this.root = undefined
      root?.release(true)
      for (const subscriber of all) subscriber.failed(error)
    }
  }

  /**
   * It is the hub's from the moment that it is there, whoever has been interrupted meanwhile. The wait behind others,
   * who may have asked in vain, counts.
   */
  private borrow(began: number): Effect.Effect<Root, DbError> {
    if (this.root !== undefined) return Effect.succeed(this.root)
    const left = Math.floor(this.engine.config.acquireMillis - (performance.now() - began))
    if (left <= 0 && this.refused !== undefined) return Effect.fail(this.refused)
    const root = new Root(this.engine, { name: "listen" }, Math.max(1, left))
    return Effect.async<Root, DbError>((resume) => {
      const stop = root.borrow((error, wire) => {
        // The root would go on with another one, which nobody listens to.
        const failed = wire === undefined ? error! : wire.pipeline.dead
        this.refused = failed
        if (failed !== undefined) {
          root.release(true)
          return resume(Effect.fail(failed))
        }
        wire!.listeners.add(this.listener)
        this.root = root
        resume(Effect.succeed(root))
      })
      return Effect.sync(() => {
        stop()
        if (this.root !== root) root.release(true)
      })
    })
  }

  readonly subscribe = (channel: string, subscriber: Subscriber): Effect.Effect<void, DbError> =>
    Effect.suspend(() => {
      const began = performance.now()
      return this.lock.withPermits(1)(
        Effect.flatMap(
          Effect.suspend(() => this.borrow(began)),
          (root) => {
            const known = this.channels.get(channel)
            if (known !== undefined) {
              known.add(subscriber)
              return Effect.void
            }
            this.channels.set(channel, new Set([subscriber]))
            return this.run(root, `LISTEN ${quoteIdentifier(channel)}`)
          }
        ).pipe(
          // Before the next one has its turn, who would take the channel for one that is listened to.
          Effect.onError(() => this.leave(channel, subscriber))
        )
      )
    })

  /** Whoever has not come in need not wait for who is about to. */
  readonly unsubscribe = (channel: string, subscriber: Subscriber): Effect.Effect<void> =>
    Effect.suspend(() =>
      this.channels.get(channel)?.has(subscriber) === true
        ? this.lock.withPermits(1)(Effect.suspend(() => this.leave(channel, subscriber)))
        : Effect.void
    )

  private leave(channel: string, subscriber: Subscriber): Effect.Effect<void> {
    const known = this.channels.get(channel)
    const last = known?.delete(subscriber) === true && known.size === 0
    if (last) this.channels.delete(channel)
    const root = this.root
    if (root === undefined) return Effect.void
    if (this.channels.size > 0) {
      return last ? Effect.ignore(this.run(root, `UNLISTEN ${quoteIdentifier(channel)}`)) : Effect.void
    }
    this.root = undefined
    root.wire?.listeners.delete(this.listener)
    root.release(true)
    return Effect.void
  }
}

const hubs = new WeakMap<EngineCore, Hub>()

/** Every payload sent to a channel from now on. Fails when the connection is lost. @internal */
export const listen = (engine: EngineCore, channel: string): Stream.Stream<string, SqlError> =>
  Stream.asyncPush<string, SqlError>((emit) =>
    Effect.suspend(() => {
      const refused = checkIdentifier(channel)
      if (refused !== undefined) return Effect.fail(refused)
      let hub = hubs.get(engine)
      if (hub === undefined) hubs.set(engine, (hub = new Hub(engine)))
      const subscriber: Subscriber = {
        payload: (payload) => void emit.single(payload),
        failed: (error) => void emit.fail(error)
      }
      const joined = hub
      // Whoever is interrupted while it waits has to be let go at once.
      return Effect.zipRight(
        Effect.addFinalizer(() => joined.unsubscribe(channel, subscriber)),
        joined.subscribe(channel, subscriber)
      )
    })
  )
