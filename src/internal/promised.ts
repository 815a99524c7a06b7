/**
 * Between promise code and effects. A fiber runs wherever something resumes it: a socket, a timer, another fiber. Here
 * the fibers of an effect run in the async context of who has called for it, and promise code that they call finds what
 * is ambient for them.
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import type * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as FiberRef from "effect/FiberRef"
import * as FiberRefs from "effect/FiberRefs"
import * as Runtime from "effect/Runtime"
import type * as Scheduler from "effect/Scheduler"
import { AsyncLocalStorage, AsyncResource } from "node:async_hooks"
import * as Ambient from "./ambient.js"

type AnyFiber = Fiber.RuntimeFiber<any, any>

/** Promise code, with what was ambient where it began; or a fiber, which knows what is ambient when it is asked. */
type Place = { readonly ambient: Context.Context<never> | undefined } | { fiber: AnyFiber | undefined }

/** Made by the caller, whose stores it keeps for all fibers of the effect. */
class CallerScheduler extends AsyncResource implements Scheduler.Scheduler {
  constructor(
    private readonly storage: AsyncLocalStorage<Place>,
    private readonly root: { fiber: AnyFiber | undefined },
    private readonly inner: Scheduler.Scheduler
  ) {
    super("effect-db")
  }

  shouldYield(fiber: AnyFiber): number | false {
    return this.inner.shouldYield(fiber)
  }

  scheduleTask(task: Scheduler.Task, priority: number, fiber?: AnyFiber): void {
    const own = fiber === undefined || fiber === this.root.fiber ? task : () => this.storage.run({ fiber }, task)
    this.inner.scheduleTask(() => this.runInAsyncScope(own), priority, fiber)
  }
}

/** What is ambient, for promise code and the effects that it runs. @internal */
export class Promised {
  private readonly storage = new AsyncLocalStorage<Place>()

  /** What is ambient here; `undefined`: nothing. */
  get ambient(): Context.Context<never> | undefined {
    const place = this.storage.getStore()
    if (place === undefined) return undefined
    return "fiber" in place ? place.fiber && Ambient.carriedBy(place.fiber) : place.ambient
  }

  /** Promise code, with what is ambient for the fiber carried along. */
  code<A, E>(f: () => A | PromiseLike<A>, onRejected: (reason: unknown) => E): Effect.Effect<A, E> {
    return Effect.withFiberRuntime((fiber) => {
      const place = { ambient: Ambient.carriedBy(fiber) }
      return Effect.tryPromise({
        try: () => this.storage.run(place, () => Promise.resolve().then(f)),
        catch: onRejected
      })
    })
  }

  /** Runs an effect with what is ambient here. */
  run<A, E, R>(
    runtime: Runtime.Runtime<R>,
    effect: Effect.Effect<A, E, R>,
    signal: AbortSignal | undefined
  ): Promise<Exit.Exit<A, E>> {
    const ambient = this.ambient
    // Not around the effect: a fiber that has ended still knows in what.
    const inside =
      ambient === undefined ? runtime : Runtime.make({ ...runtime, context: Context.merge(runtime.context, ambient) })
    const inner = FiberRefs.getOrDefault(runtime.fiberRefs, FiberRef.currentScheduler)
    const root: { fiber: AnyFiber | undefined } = { fiber: undefined }
    const whole = Effect.withFiberRuntime<A, E, R>((fiber) => {
      root.fiber = fiber
      return effect
    })
    const fiber = this.storage.run(root, () =>
      Runtime.runFork(inside)(whole, { scheduler: new CallerScheduler(this.storage, root, inner) })
    )
    return new Promise((resolve) => {
      const abort = (): void => fiber.unsafeInterruptAsFork(fiber.id())
      fiber.addObserver((exit) => {
        signal?.removeEventListener("abort", abort)
        resolve(exit)
      })
      if (signal?.aborted) abort()
      else signal?.addEventListener("abort", abort)
    })
  }
}
