/**
 * The async context of nobody. What outlives the request that happens to need it first, such as a socket, is opened
 * there: it would keep that request's AsyncLocalStorage stores alive, and show them to everybody whom it calls back.
 */
import { AsyncResource } from "node:async_hooks"

/** Where Node keeps what a resource has inherited: each storage for itself, or all in one frame. */
const inherited = new Set(["kResourceStore", "context_frame"])

// One per call: what is entered in one of them is in no other. There is no way to ask Node for an empty one.
const nobody = (): AsyncResource => {
  const resource = new AsyncResource("effect-db") as AsyncResource & Record<symbol, unknown>
  for (const key of Object.getOwnPropertySymbols(resource)) {
    if (inherited.has(key.description!)) resource[key] = undefined
  }
  return resource
}

/** Runs what opens something that calls back. Takes some microseconds: not for statements. @internal */
export const neutral = <A>(f: () => A): A => nobody().runInAsyncScope(f)

/** A listener that is called in nobody's context, whoever has caused the event. @internal */
export const neutrally =
  <Args extends Array<any>>(f: (...args: Args) => void): ((...args: Args) => void) =>
  (...args) =>
    neutral(() => f(...args))
