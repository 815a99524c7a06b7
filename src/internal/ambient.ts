/**
 * What is ambient: for each engine the session, the innermost block, the stack of connections and the schema of
 * the fiber. The only FiberRef of this library, and the only place that touches the ecosystem's transaction tag.
 *
 * Two carriers, because neither is enough: a FiberRef is inherited by every child but lost by request batching,
 * which runs in the parent and forwards the transaction tag alone; the context can't be set by a Scope form. Each
 * state has a number, and of two for the same engine the later one counts.
 *
 * A combinator makes a whole state for its effect. What has no effect around it, Scope forms and Layer forms, adds a
 * change to what is there: changes go in any order, and layers can be merged.
 */
import * as SqlClient from "@effect/sql/SqlClient"
import type { Connection } from "@effect/sql/SqlConnection"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as FiberId from "effect/FiberId"
import * as FiberRef from "effect/FiberRef"
import { identity } from "effect/Function"
import { globalValue } from "effect/GlobalValue"
import * as Stream from "effect/Stream"
import { DbError } from "../DbError.js"
import { emptyEntry, find, replace } from "./entry.js"
import type { Entries, Entry } from "./entry.js"

export { emptyEntry, nowhere, searchPath } from "./entry.js"
export type { Entry } from "./entry.js"

const state = globalValue("effect-db/ambient", () => ({
  sequence: 0,
  /** How many tags Layer forms have: one for each form and engine. */
  tags: 0,
  tagsOf: new WeakMap<object, Map<string, string>>()
}))

/** What a Scope form or a Layer form has added for an engine: no copy of the rest, so that it takes nothing along. */
class Change {
  readonly sequence = ++state.sequence
  /** Of a Scope form that is over: for these fibers it is no longer there, for others what it gave has ended. */
  readonly leftBy: Array<FiberId.FiberId> = []

  constructor(
    readonly key: object,
    readonly f: (entry: Entry) => Entry
  ) {}
}

/** @internal */
export class Ambient {
  /** The same reference for the same state: request batching groups by it. */
  readonly tuple: readonly [Carrier, number]

  constructor(
    readonly sequence: number,
    readonly entries: Entries | undefined,
    readonly changes: ReadonlyArray<Change>,
    /** What is older than this does not count: it was detached from. */
    readonly floor: number
  ) {
    this.tuple = [new Carrier(this), 0]
  }
}

const refuse = (): DbError =>
  DbError.make("PropagationError", {
    message: "Another SqlClient was about to run its statement inside a session of effect-db.",
    hint: "It looks for a transaction under the tag that all SqlClients share. Run it with DbSession.detach(effect)."
  })

/**
 * Sits behind the ecosystem's transaction tag. A client that is not ours would use it as a connection: it gets a
 * typed error instead of our transaction.
 */
class Carrier implements Connection {
  // Private: a rendering of the context would show the whole engine.
  readonly #ambient: Ambient

  constructor(ambient: Ambient) {
    this.#ambient = ambient
  }

  get ambient(): Ambient {
    return this.#ambient
  }

  execute() {
    return Effect.fail(refuse())
  }

  executeRaw() {
    return Effect.fail(refuse())
  }

  executeStream() {
    return Stream.fail(refuse())
  }

  executeValues() {
    return Effect.fail(refuse())
  }

  // Its savepoint was refused, so there is nothing to undo; a failure here would replace that error by a defect.
  executeUnprepared(sql: string) {
    return sql.startsWith("ROLLBACK TO SAVEPOINT effect_sql_") ? Effect.succeed([]) : Effect.fail(refuse())
  }
}

const none: ReadonlyArray<never> = []

const nothing = new Ambient(-1, undefined, none, -1)

const ref: FiberRef.FiberRef<Ambient> = globalValue("effect-db/ambient/ref", () =>
  // A child's changes stay with the child.
  FiberRef.unsafeMake(nothing, { join: (parent) => parent })
)

type Runtime = Fiber.RuntimeFiber<any, any>

const tagKey = SqlClient.TransactionConnection.key

const forwardedIn = (context: Context.Context<never>): Ambient => {
  const tuple = context.unsafeMap.get(tagKey) as readonly [unknown, number] | undefined
  return tuple !== undefined && tuple[0] instanceof Carrier ? tuple[0].ambient : nothing
}

const layeredIn = (context: Context.Context<never>): ReadonlyArray<Change> => {
  if (state.tags === 0) return none
  const found: Array<Change> = []
  for (const value of context.unsafeMap.values()) if (value instanceof Change) found.push(value)
  return found.length === 0 ? none : found
}

/** What is ambient for a fiber, put together from what it has inherited and what its context says. @internal */
export const current = (fiber: Runtime): Ambient => {
  const inherited = fiber.getFiberRef(ref)
  const forwarded = forwardedIn(fiber.currentContext)
  const layered = layeredIn(fiber.currentContext)
  if (inherited.changes === none && forwarded.changes === none && layered === none) {
    if (forwarded === nothing || forwarded === inherited) return inherited
    if (inherited === nothing) return forwarded
  }
  return together(fiber.id(), inherited, forwarded, layered)
}

/** Siblings that ask for the same get the same, so that their requests share a batch. */
const composed = new WeakMap<
  Ambient,
  { readonly forwarded: Ambient; readonly changes: ReadonlyArray<Change>; readonly whole: Ambient }
>()

const together = (
  id: FiberId.FiberId,
  inherited: Ambient,
  forwarded: Ambient,
  layered: ReadonlyArray<Change>
): Ambient => {
  const floor = Math.max(inherited.floor, forwarded.floor)
  const changes = [...new Set([...inherited.changes, ...forwarded.changes, ...layered])]
    .filter(({ leftBy, sequence }) => sequence >= floor && !leftBy.includes(id))
    .sort((a, b) => a.sequence - b.sequence)
  const known = composed.get(inherited)
  if (known !== undefined && known.forwarded === forwarded && same(known.changes, changes)) return known.whole
  let made: Entries | undefined = undefined
  for (const from of [inherited.entries, forwarded.entries]) {
    for (let at = from; at !== undefined; at = at.next) {
      if (at.sequence < floor || (find(made, at.key)?.sequence ?? -1) >= at.sequence) continue
      made = replace(made, at.key, at.entry, at.sequence)
    }
  }
  let entries = made
  for (const { f, key, sequence } of changes) {
    // What a combinator has made holds all that was there before it.
    if ((find(made, key)?.sequence ?? -1) >= sequence) continue
    entries = replace(entries, key, f(find(entries, key)?.entry ?? emptyEntry), sequence)
  }
  const last = Math.max(inherited.sequence, forwarded.sequence, ...changes.map((_) => _.sequence))
  const whole = new Ambient(last, entries, none, floor)
  composed.set(inherited, { forwarded, changes, whole })
  return whole
}

const same = (a: ReadonlyArray<unknown>, b: ReadonlyArray<unknown>): boolean =>
  a.length === b.length && a.every((one, i) => one === b[i])

/** @internal */
export const entry = (fiber: Runtime, key: object): Entry => find(current(fiber).entries, key)?.entry ?? emptyEntry

/** All engines that have something ambient, in the order in which they got it. @internal */
export const entries: Effect.Effect<ReadonlyArray<readonly [object, Entry]>> = Effect.withFiberRuntime((fiber) => {
  const all: Array<readonly [object, Entry]> = []
  for (let at = current(fiber).entries; at !== undefined; at = at.next) all.push([at.key, at.entry])
  return Effect.succeed(all)
})

const change = ({ entries, floor }: Ambient, key: object, f: (entry: Entry) => Entry): Ambient => {
  const sequence = ++state.sequence
  return new Ambient(sequence, replace(entries, key, f(find(entries, key)?.entry ?? emptyEntry), sequence), none, floor)
}

/** What every fiber can do for itself, though its public type leaves it out. */
interface Settable {
  setFiberRef<A>(ref: FiberRef.FiberRef<A>, value: A): void
}

/** Both carriers at once, of the running fiber. */
const put = (fiber: Runtime, ambient: Ambient, context: Context.Context<never>): void => {
  const running = fiber as unknown as Settable
  running.setFiberRef(ref, ambient)
  running.setFiberRef(FiberRef.currentContext, context)
}

/** For callers that nothing interrupts, where the fiber runs: two times `Effect.locally` costs many times as much. */
const swap = <A, E, R, B, E2, R2>(
  fiber: Runtime,
  effect: Effect.Effect<A, E, R>,
  ambient: Ambient,
  context: Context.Context<never>,
  next: (exit: Exit.Exit<A, E>) => Effect.Effect<B, E2, R2>
): Effect.Effect<B, E2, R | R2> => {
  const before = fiber.getFiberRef(ref)
  const contextBefore = fiber.currentContext
  put(fiber, ambient, context)
  return Effect.matchCauseEffect(effect, {
    onFailure: (cause) => {
      put(fiber, before, contextBefore)
      return next(Exit.failCause(cause))
    },
    onSuccess: (value) => {
      put(fiber, before, contextBefore)
      return next(Exit.succeed(value))
    }
  })
}

const within = <A, E, R>(effect: Effect.Effect<A, E, R>, ambient: Ambient): Effect.Effect<A, E, R> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.withFiberRuntime((fiber) =>
      swap(fiber, restore(effect), ambient, withTag(fiber.currentContext, ambient), identity)
    )
  )

const withTag = (context: Context.Context<never>, ambient: Ambient): Context.Context<never> =>
  Context.add(context, SqlClient.TransactionConnection, ambient.tuple) as Context.Context<never>

/** Runs an effect with another entry for this engine. @internal */
export const locally = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  key: object,
  f: (entry: Entry) => Entry
): Effect.Effect<A, E, R> => Effect.uninterruptibleMask((restore) => during(restore(effect), key, f, identity))

/**
 * As `locally`, with what comes next, whatever the exit. Only where nothing interrupts; the effect itself is restored
 * by the caller.
 * @internal
 */
export const during = <A, E, R, B, E2, R2>(
  effect: Effect.Effect<A, E, R>,
  key: object,
  f: (entry: Entry) => Entry,
  next: (exit: Exit.Exit<A, E>) => Effect.Effect<B, E2, R2>
): Effect.Effect<B, E2, R | R2> =>
  Effect.withFiberRuntime((fiber) => {
    const ambient = change(current(fiber), key, f)
    return swap(fiber, effect, ambient, withTag(fiber.currentContext, ambient), next)
  })

/** A change of a Scope form, to be ended by who has made it. @internal */
export interface Opened {
  /** Its scope has ended: for the running fiber, and for the one that opened it, it is no longer there. */
  readonly leave: Effect.Effect<void>
  /** It was given up: for the running fiber it is no longer there, others are told when they use it. */
  readonly drop: Effect.Effect<void>
}

/**
 * For Scope forms: changes the running fiber's own state, which its children inherit from now on. `undo` takes it out
 * of a state that a combinator has made meanwhile; where it is not, it gives back what it got.
 * @internal
 */
export const open = (key: object, f: (entry: Entry) => Entry, undo: (entry: Entry) => Entry): Effect.Effect<Opened> =>
  Effect.flatMap(add(key, f), ([change, opener]) => {
    const leave = (...others: ReadonlyArray<FiberId.FiberId>): Effect.Effect<void> =>
      Effect.withFiberRuntime((fiber) => {
        change.leftBy.push(fiber.id(), ...others)
        return Effect.zipRight(
          FiberRef.update(ref, (own) => tidy(own, fiber.id())),
          takeOut(key, undo)
        )
      })
    return Effect.succeed({ leave: Effect.suspend(() => leave(opener)), drop: Effect.suspend(() => leave()) })
  })

/** Takes something out of the running fiber's state, if it is there. @internal */
export const takeOut = (key: object, undo: (entry: Entry) => Entry): Effect.Effect<void> =>
  Effect.withFiberRuntime((fiber) => {
    const now = entry(fiber, key)
    return undo(now) === now ? Effect.void : Effect.asVoid(add(key, undo))
  })

const add = (key: object, f: (entry: Entry) => Entry): Effect.Effect<readonly [Change, FiberId.FiberId]> =>
  Effect.withFiberRuntime((fiber) => {
    const change = new Change(key, f)
    return Effect.as(
      FiberRef.update(ref, (own) => {
        const { changes, entries, floor } = tidy(own, fiber.id())
        return new Ambient(change.sequence, entries, [...changes, change], floor)
      }),
      [change, fiber.id()]
    )
  })

/** Without what is over for this fiber. */
const tidy = (own: Ambient, id: FiberId.FiberId): Ambient => {
  if (own.changes.every(({ leftBy }) => !leftBy.includes(id))) return own
  const changes = own.changes.filter(({ leftBy }) => !leftBy.includes(id))
  return new Ambient(own.sequence, own.entries, changes.length === 0 ? none : changes, own.floor)
}

const tagOf = (key: object, form: string): string => {
  let tags = state.tagsOf.get(key)
  if (tags === undefined) state.tagsOf.set(key, (tags = new Map()))
  let tag = tags.get(form)
  if (tag === undefined) tags.set(form, (tag = `effect-db/ambient/${++state.tags}`))
  return tag
}

/**
 * For Layer forms: the change as a context, which is what a layer can hand on. Each form has a tag of its own for each
 * engine, so that layers can be merged; the ecosystem's is for request batching, which forwards no other.
 * @internal
 */
export const context = (
  key: object,
  form: "connection" | "session",
  f: (entry: Entry) => Entry
): Effect.Effect<Context.Context<never>> =>
  Effect.withFiberRuntime((fiber) => {
    const { entries, floor } = current(fiber)
    const change = new Change(key, f)
    const { tuple } = new Ambient(change.sequence, entries, [change], floor)
    return Effect.succeed(
      Context.unsafeMake(
        new Map<string, unknown>([
          [tagKey, tuple],
          [tagOf(key, form), change]
        ])
      )
    )
  })

const withoutTag = <A, E, R>(effect: Effect.Effect<A, E, R>, ambient: Ambient): Effect.Effect<A, E, R> =>
  Effect.locally(
    Effect.mapInputContext(
      effect,
      (context: Context.Context<R>) => Context.omit(SqlClient.TransactionConnection as never)(context as never) as never
    ) as Effect.Effect<A, E, R>,
    ref,
    ambient
  )

/** Runs an effect with what was ambient for another fiber: for requests, which run where they are batched. @internal */
export const resume = <A, E, R>(effect: Effect.Effect<A, E, R>, ambient: Ambient): Effect.Effect<A, E, R> =>
  ambient.entries === undefined ? withoutTag(effect, ambient) : within(effect, ambient)

/**
 * Of a captured context only what is ambient in it: to be carried to where the fiber does not go. With the schemas and
 * tenants of another fiber, if it had any.
 * @internal
 */
export const carried = (context: Context.Context<never>, names?: Ambient): Context.Context<never> =>
  names !== undefined && hasNames(names) && context.unsafeMap.get(tagKey) !== undefined
    ? withTag(Context.empty(), named(together(FiberId.none, nothing, forwardedIn(context), layeredIn(context)), names))
    : Context.unsafeMake(
        new Map([...context.unsafeMap].filter(([tag, value]) => tag === tagKey || value instanceof Change))
      )

/** As `carried`, of a fiber as it is now; `undefined`: nothing is ambient. @internal */
export const carriedBy = (fiber: Runtime): Context.Context<never> | undefined => {
  const ambient = current(fiber)
  return ambient.entries === undefined ? undefined : withTag(Context.empty(), ambient)
}

/**
 * Runs an effect with nothing ambient but the schemas and tenants, what stands in an engine's place, and that it is part
 * of `beforeSession`.
 * @internal
 */
export const detach = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.withFiberRuntime((fiber) => {
    const sequence = ++state.sequence
    let kept: Entries | undefined = undefined
    for (let at = current(fiber).entries; at !== undefined; at = at.next) {
      const { instead, preparing, sandbox, schema, tenant, using } = at.entry
      if ((schema ?? tenant ?? using ?? preparing ?? instead ?? sandbox) === undefined) continue
      kept = replace(kept, at.key, { ...emptyEntry, schema, tenant, using, preparing, instead, sandbox }, sequence)
    }
    return withoutTag(effect, new Ambient(sequence, kept, none, sequence))
  })

/**
 * Runs an effect with the schemas and tenants that were ambient for another fiber, for every engine: for hooks, which
 * are run by whoever ends the transaction.
 * @internal
 */
export const withNames = <A, E, R>(effect: Effect.Effect<A, E, R>, from: Ambient): Effect.Effect<A, E, R> =>
  Effect.withFiberRuntime((fiber) => {
    const ambient = named(current(fiber), from)
    return fiber.currentContext.unsafeMap.has(tagKey) ? within(effect, ambient) : withoutTag(effect, ambient)
  })

const isNamed = ({ schema, tenant, using }: Entry): boolean => (schema ?? tenant ?? using) !== undefined

const hasNames = ({ entries }: Ambient): boolean => {
  for (let at = entries; at !== undefined; at = at.next) if (isNamed(at.entry)) return true
  return false
}

const named = ({ entries, floor }: Ambient, from: Ambient): Ambient => {
  const sequence = ++state.sequence
  let all = entries
  for (let at = entries; at !== undefined; at = at.next) {
    all = replace(all, at.key, { ...at.entry, schema: undefined, tenant: undefined, using: undefined }, sequence)
  }
  for (let at = from.entries; at !== undefined; at = at.next) {
    const { schema, tenant, using } = at.entry
    const entry = find(all, at.key)?.entry ?? emptyEntry
    if (isNamed(at.entry)) all = replace(all, at.key, { ...entry, schema, tenant, using }, sequence)
  }
  return new Ambient(sequence, all, none, floor)
}
