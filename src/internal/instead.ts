/**
 * What stands in the place of an engine for the running fiber: a sandbox, or the engine that `using` has put there. It
 * is looked up where a fiber comes in by a tag, a facade or a client, which may have been built before.
 *
 * Set by the FiberRef alone: with the ecosystem's tag in the context a client that is not ours could not run.
 */
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import { identity } from "effect/Function"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import type { EngineCore } from "./engine.js"

/** The engine that a fiber means by this one. @internal */
export const engineFor = (fiber: Fiber.RuntimeFiber<any, any>, core: EngineCore): EngineCore =>
  core.replaced ? (Ambient.entry(fiber, core).instead ?? core) : core

/** Goes on with the engine that the running fiber means by this one. @internal */
export const withEngine = <A, E, R>(
  core: EngineCore,
  f: (core: EngineCore) => Effect.Effect<A, E, R>
): Effect.Effect<A, E, R> => Effect.withFiberRuntime((fiber) => f(engineFor(fiber, core)))

type Known = ReadonlyArray<readonly [core: EngineCore, entry: Entry]>

/** Changes entries for the time of an effect. What is opened in its scope meanwhile stays. */
const during = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  change: (known: Known) => ReadonlyArray<readonly [core: EngineCore, entry: Partial<Entry>]>
): Effect.Effect<A, E, R> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.flatMap(Ambient.entries, (known) => {
      const changes = change(known as Known)
      for (const [core] of changes) core.replaced = true
      return Effect.flatMap(
        Effect.forEach(changes, ([core, some]) => Ambient.open(core, (entry) => ({ ...entry, ...some }), identity)),
        (opened) => Effect.onExit(restore(effect), () => Effect.forEach(opened, (_) => _.leave, { discard: true }))
      )
    })
  )

const names = (entry: Entry = Ambient.emptyEntry) => ({
  schema: entry.schema,
  tenant: entry.tenant,
  using: entry.using
})

/** Runs an effect with a sandbox in the place of the engine that it is of, and of what that one stands for. @internal */
export const inSandbox = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  of: EngineCore,
  sandbox: EngineCore
): Effect.Effect<A, E, R> =>
  during(effect, (known) => {
    const own = known.find(([core]) => core === of)?.[1]
    return [
      [of, { instead: sandbox, sandbox }],
      [sandbox, names(own)],
      ...known
        .filter(([core, { instead, sandbox }]) => core !== of && (instead === of || sandbox === of))
        .map(([core, entry]) => {
          const place = (engine: EngineCore | undefined) => (engine === of ? sandbox : engine)
          return [core, { instead: place(entry.instead), sandbox: place(entry.sandbox) }] as const
        })
    ]
  })

/**
 * Runs an effect that was written for the database of this name with another engine in the place of the one that it
 * has here. By its own name a database comes back to its place. With the same data there it has the schema and the
 * tenant of here.
 * @internal
 */
export const inPlaceOf = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  name: string,
  here: EngineCore,
  other: EngineCore,
  sameData: boolean
): Effect.Effect<A, E, R> =>
  during(effect, (known) => {
    const all: Known = known.some(([core]) => core === here) ? known : [...known, [here, Ambient.emptyEntry]]
    const there = all.find(([core]) => core === other)?.[1].sandbox ?? other
    const own = all.find(([core]) => core === here)?.[1]
    return [
      ...all
        .filter(([core, { instead }]) => core.name === name && (instead ?? core) === here)
        .map(([core, { sandbox }]) => [core, { instead: other.name === name ? sandbox : there }] as const),
      ...(sameData ? [[there, names(own)] as const] : [])
    ]
  })
