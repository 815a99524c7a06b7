/**
 * What is ambient: for each engine the session, the innermost block, the stack of connections and the schema of
 * the fiber. The only FiberRef of this library, and the only place that touches the ecosystem's transaction tag.
 *
 * Two carriers, because neither is enough: a FiberRef is inherited by every child but lost by request batching,
 * which runs in the parent and forwards the transaction tag alone; the context can't be set by a Scope form. Each
 * state has a number, and of the two the later one counts.
 */
import * as SqlClient from "@effect/sql/SqlClient"
import type { Connection } from "@effect/sql/SqlConnection"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as FiberRef from "effect/FiberRef"
import * as FiberRefs from "effect/FiberRefs"
import { identity } from "effect/Function"
import { globalValue } from "effect/GlobalValue"
import * as Stream from "effect/Stream"
import { DbError } from "../DbError.js"
import type { Frame } from "./frame.js"
import type { Stacked, StackNode } from "./lease.js"
import type { Slot } from "./slot.js"
import type { Writes } from "./writes.js"

/** What is ambient for one engine. @internal */
export interface Entry {
  readonly slot: Slot | undefined
  /** The innermost block around the fiber, of the slot's session. */
  readonly frame: Frame | undefined
  readonly stack: StackNode | undefined
  /** A connection for the statements of its own effect, which nobody shares. */
  readonly orphan: Stacked | undefined
  readonly schema: string | undefined
  readonly tenant: string | undefined
  readonly using: string | undefined
  /** Where commits are counted, for who wants to read his own writes on a standby. */
  readonly writes?: Writes | undefined
  /** What a standby has to show before it is read from. */
  readonly after?: string | undefined
}

/** @internal */
export const emptyEntry: Entry = {
  slot: undefined,
  frame: undefined,
  stack: undefined,
  orphan: undefined,
  schema: undefined,
  tenant: undefined,
  using: undefined
}

/** Where unqualified names are looked up; nothing: as the engine's connections do. @internal */
export const searchPath = (entry: Entry): string | undefined => entry.using ?? entry.tenant ?? entry.schema

/**
 * What is ambient for each engine, in the order in which they got it. There are few engines and many sessions: a list
 * is looked through sooner than a map is copied, and takes a quarter of the memory.
 */
interface Entries {
  readonly key: object
  readonly entry: Entry
  readonly next: Entries | undefined
}

const find = (entries: Entries | undefined, key: object): Entry => {
  for (let at = entries; at !== undefined; at = at.next) if (at.key === key) return at.entry
  return emptyEntry
}

const replace = (entries: Entries | undefined, key: object, entry: Entry): Entries =>
  entries === undefined
    ? { key, entry, next: undefined }
    : entries.key === key
      ? { key, entry, next: entries.next }
      : { key: entries.key, entry: entries.entry, next: replace(entries.next, key, entry) }

/** @internal */
export class Ambient {
  /** The same reference for the same state: request batching groups by it. */
  readonly tuple: readonly [Carrier, number]

  constructor(
    readonly sequence: number,
    readonly entries: Entries | undefined
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

const state = globalValue("effect-db/ambient", () => ({ sequence: 0 }))

const makeAmbient = (entries: Entries | undefined): Ambient => new Ambient(++state.sequence, entries)

const nothing = new Ambient(-1, undefined)

const ref: FiberRef.FiberRef<Ambient> = globalValue("effect-db/ambient/ref", () =>
  // A child's changes stay with the child.
  FiberRef.unsafeMake(nothing, { join: (parent) => parent })
)

type Runtime = Fiber.RuntimeFiber<any, any>

const tagKey = SqlClient.TransactionConnection.key

/** @internal */
export const current = (fiber: Runtime): Ambient => {
  const inherited = fiber.getFiberRef(ref)
  const tuple = fiber.currentContext.unsafeMap.get(tagKey) as readonly [unknown, number] | undefined
  if (tuple === undefined || !(tuple[0] instanceof Carrier)) return inherited
  const forwarded = tuple[0].ambient
  return forwarded.sequence > inherited.sequence ? forwarded : inherited
}

/** @internal */
export const entry = (fiber: Runtime, key: object): Entry => find(current(fiber).entries, key)

/** All engines that have something ambient, in the order in which they got it. @internal */
export const entries: Effect.Effect<ReadonlyArray<readonly [object, Entry]>> = Effect.withFiberRuntime((fiber) => {
  const all: Array<readonly [object, Entry]> = []
  for (let at = current(fiber).entries; at !== undefined; at = at.next) all.push([at.key, at.entry])
  return Effect.succeed(all)
})

const change = ({ entries }: Ambient, key: object, f: (entry: Entry) => Entry): Ambient =>
  makeAmbient(replace(entries, key, f(find(entries, key))))

const put = (ambient: Ambient, context: Context.Context<never>): Effect.Effect<void> =>
  Effect.updateFiberRefs((id, refs) =>
    FiberRefs.updateManyAs(refs, {
      entries: [
        [ref, [[id, ambient]]],
        [FiberRef.currentContext, [[id, context]]]
      ]
    })
  )

/** Both carriers at once, for callers that nothing interrupts: two times `Effect.locally` costs four times as much. */
const swap = <A, E, R, B, E2, R2>(
  fiber: Runtime,
  effect: Effect.Effect<A, E, R>,
  ambient: Ambient,
  context: Context.Context<never>,
  next: (exit: Exit.Exit<A, E>) => Effect.Effect<B, E2, R2>
): Effect.Effect<B, E2, R | R2> => {
  const before = fiber.getFiberRef(ref)
  const contextBefore = fiber.currentContext
  return Effect.flatMap(put(ambient, context), () =>
    Effect.matchCauseEffect(effect, {
      onFailure: (cause) => Effect.flatMap(put(before, contextBefore), () => next(Exit.failCause(cause))),
      onSuccess: (value) => Effect.flatMap(put(before, contextBefore), () => next(Exit.succeed(value)))
    })
  )
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

/** For Scope forms: changes the running fiber's own state, which its children inherit from now on. @internal */
export const update = (key: object, f: (entry: Entry) => Entry): Effect.Effect<void> =>
  Effect.withFiberRuntime((fiber) => {
    return FiberRef.set(ref, change(current(fiber), key, f))
  })

/** For Layer forms: the state as a context, which is what a layer can hand on. @internal */
export const context = (key: object, f: (entry: Entry) => Entry): Effect.Effect<Context.Context<never>> =>
  Effect.withFiberRuntime((fiber) =>
    Effect.succeed(
      Context.make(
        SqlClient.TransactionConnection,
        change(current(fiber), key, f).tuple
      ) as unknown as Context.Context<never>
    )
  )

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

/** Of a captured context only what is ambient in it: to be carried to where the fiber does not go. @internal */
export const carried = (context: Context.Context<never>): Context.Context<never> =>
  Context.pick(SqlClient.TransactionConnection)(context as never) as Context.Context<never>

/** Runs an effect with nothing ambient but the schemas and tenants. @internal */
export const detach = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.withFiberRuntime((fiber) => {
    let kept: Entries | undefined = undefined
    for (let at = current(fiber).entries; at !== undefined; at = at.next) {
      const { schema, tenant, using } = at.entry
      if ((schema ?? tenant ?? using) === undefined) continue
      kept = replace(kept, at.key, { ...emptyEntry, schema, tenant, using })
    }
    return withoutTag(effect, makeAmbient(kept))
  })
