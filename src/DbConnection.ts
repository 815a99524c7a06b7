/**
 * The connection: a wrapper of at most one borrowed raw connection.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Context from "effect/Context"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import type * as Pg from "pg"
import { DbError } from "./DbError.js"
import { borrow, coreHere, coreOf, onceFor, viewOf } from "./DbEngine.js"
import type { DbEngine, DbSql, EngineService } from "./DbEngine.js"
import type { DbConnection } from "./Default.js"
import * as Ambient from "./internal/ambient.js"
import { combinator } from "./internal/combinator.js"
import type { Combinator } from "./internal/combinator.js"
import { stuckOn } from "./internal/blocking.js"
import type { EngineCore } from "./internal/engine.js"
import { ambientBound } from "./internal/execute.js"
import type { Bound } from "./internal/execute.js"
import { engineFor } from "./internal/instead.js"
import { Root, StackNode, topOf, without } from "./internal/lease.js"
import type { Stacked } from "./internal/lease.js"
import { undoReleased } from "./internal/session.js"
import { checkBoolean, isBelowZero } from "./internal/transactionSql.js"
import type { Wire } from "./internal/wire.js"

export type { DbConnection } from "./Default.js"

/**
 * @since 0.1.0
 * @category models
 */
export interface ConnectionOptions {
  /** The longest wait for a connection of the pool. Default: the engine's `acquireTimeout`. */
  readonly timeout?: Duration.DurationInput | undefined
  /** Share the connection on top of the fiber's stack. Default: false for `acquire`, true for `withConnection`. */
  readonly reuse?: boolean | undefined
  /** Borrow nothing before a statement, a transaction or `raw` needs it. Default: false. */
  readonly lazy?: boolean | undefined
  /** Put it on the stack, for others to share. Default: true. */
  readonly reusable?: boolean | undefined
  /** Its name in errors: "pool exhausted" tells who holds what. */
  readonly name?: string | undefined
}

/**
 * `"lazy"`: nothing is borrowed, or it has died with no transaction open: the next use borrows. `"idle"`, `"active"`,
 * `"failed"`: what the server said last about its transaction; one that has died in it is `"failed"`. `"released"`: for
 * good.
 *
 * @since 0.1.0
 * @category models
 */
export type ConnectionStatus = "lazy" | "idle" | "active" | "failed" | "released"

/**
 * @since 0.1.0
 * @category models
 */
export interface Connection {
  readonly name: string
  /**
   * Runs on this connection; inside a session that is on it, in that session. Its `withTransaction` is a transaction on
   * this connection, or a block of that session. That of the facade runs where the engine's does, if no connection is
   * ambient.
   */
  readonly sql: DbSql
  /** The backend's process id. Borrows if nothing is borrowed. */
  readonly pid: Effect.Effect<number, SqlError>
  readonly status: Effect.Effect<ConnectionStatus>
  /**
   * The `pg` client, for what this library does not cover. From now on, and until it is given back, nothing is
   * pipelined on it; afterwards it is destroyed unless nothing was sent. Borrows if nothing is borrowed. In a sandbox of
   * `DbTest`: `InvalidInput`.
   */
  readonly raw: Effect.Effect<Pg.Client, SqlError>
  /**
   * Gives the raw connection back before the scope does.
   *
   * For good (`permanent: true`, the default) a root and those who share it fail with `ConnectionReleased` from then
   * on, as does a second release. Not for good, the next use of a root or of its reusers borrows again; on a reuser
   * nothing happens. In an open transaction: for good rolls it back, and its session fails with `ConnectionReleased`
   * instead of committing; else `SessionBusy`.
   */
  readonly release: (options?: { readonly permanent?: boolean | undefined }) => Effect.Effect<void, SqlError>
}

/** A wrapper: the root of a chain, or one that shares another's root. */
class Handle implements Connection, Stacked {
  released = false
  private view: DbSql | undefined = undefined

  // Out of sight: what an inspection of a handle shows must not be the engine with its options.
  readonly #core: EngineCore
  readonly #shared: Root
  #opened: Ambient.Opened | undefined = undefined

  constructor(
    core: EngineCore,
    shared: Root,
    readonly isRoot: boolean
  ) {
    this.#core = core
    this.#shared = shared
  }

  get name(): string {
    return this.#shared.holder.name
  }

  readonly ready = Effect.suspend(() => {
    const gone = this.gone()
    return gone === undefined ? Effect.void : Effect.fail(gone)
  })

  readonly root = (): Root | undefined => (this.released || this.#shared.released ? undefined : this.#shared)

  private readonly gone = (): DbError | undefined =>
    this.released || this.#shared.released ? this.#shared.releasedError() : undefined

  /** Where its statements run. */
  bound(): Bound {
    return { _tag: "Root", root: this.#shared, gone: this.gone }
  }

  get sql(): DbSql {
    return (this.view ??= viewOf(this.#core, this.bound()))
  }

  private readonly wire: Effect.Effect<Wire, DbError> = Effect.suspend(() => {
    const gone = this.gone()
    if (gone !== undefined) return Effect.fail(gone)
    const shared = this.#shared
    return Effect.flatMap(borrow(shared), () =>
      shared.wire === undefined ? Effect.fail(shared.releasedError()) : Effect.succeed(shared.wire)
    )
  })

  readonly pid = Effect.map(this.wire, (wire) => wire.pid)

  readonly status = Effect.sync((): ConnectionStatus => {
    if (this.gone() !== undefined) return "released"
    const { stale, wire } = this.#shared
    if (wire === undefined || stale) return "lazy"
    return wire.dead ? "failed" : wire.status === "I" ? "idle" : wire.status === "T" ? "active" : "failed"
  })

  readonly raw = Effect.flatMap(this.wire, (wire) =>
    Effect.async<Pg.Client, DbError>((resume) => {
      const stuck = stuckOn(wire)
      if (stuck !== undefined) return resume(Effect.fail(stuck))
      let waits = true
      // It waits for what runs there, and the connection may be somebody else's by then.
      const vet = (): DbError | undefined =>
        waits && this.gone() === undefined && this.#shared.wire === wire ? undefined : this.#shared.releasedError()
      wire.toForeign(vet, (client) => resume(DbError.is(client) ? Effect.fail(client) : Effect.succeed(client)))
      return Effect.sync(() => {
        waits = false
      })
    })
  )

  /** Its owner never came to have it. */
  readonly abandon: Effect.Effect<void> = Effect.sync(() => {
    if (this.isRoot) this.#shared.release(true)
  })

  readonly borrow: Effect.Effect<void, DbError> = Effect.suspend(() => borrow(this.#shared))

  readonly release = (options?: { readonly permanent?: boolean | undefined }): Effect.Effect<void, SqlError> =>
    Effect.uninterruptible(
      Effect.suspend((): Effect.Effect<void, SqlError> => {
        const gone = this.gone()
        if (gone !== undefined) return Effect.fail(gone)
        const permanent = options?.permanent ?? true
        if (!this.isRoot) {
          this.released = permanent
          return permanent ? this.pop("drop") : Effect.void
        }
        const shared = this.#shared
        const { unit } = shared
        if (unit?.open !== true) return this.end(permanent)
        if (!permanent) {
          return Effect.fail(
            DbError.make("SessionBusy", {
              message: `The connection "${this.name}" can't be given back while the session "${unit.name}" has a transaction open on it.`,
              hint: "Commit or roll back first, or release it for good."
            })
          )
        }
        // Whoever waits for the connection must not get it in between.
        shared.released = true
        return undoReleased(unit, shared.releasedError(), this.end(true))
      })
    )

  private readonly end = (permanent: boolean): Effect.Effect<void> =>
    Effect.suspend(() => {
      this.#shared.release(permanent)
      this.released = permanent
      return permanent ? this.pop("drop") : Effect.void
    })

  /** The end of its scope, whatever was done with it before. */
  readonly close: Effect.Effect<void> = Effect.suspend(() =>
    Effect.zipRight(this.gone() !== undefined ? Effect.void : Effect.ignore(this.release()), this.pop("leave"))
  )

  /** Onto the fiber's stack, for as long as its scope. */
  readonly push: Effect.Effect<void> = Effect.suspend(() =>
    Effect.map(Ambient.open(this.#core, push(this), this.takeOut), (opened) => {
      this.#opened = opened
    })
  )

  private readonly takeOut = (entry: Ambient.Entry): Ambient.Entry => {
    const stack = without(entry.stack, this)
    return stack === entry.stack ? entry : { ...entry, stack }
  }

  /** For the fiber that releases it, it is no longer there; for others it is, released. */
  private readonly pop = (how: "leave" | "drop"): Effect.Effect<void> =>
    Effect.suspend(() => this.#opened?.[how] ?? Ambient.takeOut(this.#core, this.takeOut))
}

let connections = 0

/** A wrapper for this fiber: shares what is on top of the stack, or begins a chain of its own. */
const makeHandle = (core: EngineCore, entry: Ambient.Entry, options: ConnectionOptions): Handle => {
  const top = options.reuse === true ? topOf(entry.stack)?.root() : undefined
  if (top !== undefined) return new Handle(core, top, false)
  const name = options.name ?? `connection ${++connections}`
  const millis = options.timeout === undefined ? core.config.acquireMillis : Duration.toMillis(options.timeout)
  return new Handle(core, new Root(core, { name }, millis), true)
}

const stacks = (handle: Handle, options: ConnectionOptions): boolean => handle.isRoot && options.reusable !== false

const push =
  (handle: Handle) =>
  (entry: Ambient.Entry): Ambient.Entry => ({ ...entry, orphan: undefined, stack: new StackNode(handle, entry.stack) })

const refuse = (options: ConnectionOptions): DbError | undefined => {
  const wrong =
    checkBoolean("reuse", options.reuse) ??
    checkBoolean("lazy", options.lazy) ??
    checkBoolean("reusable", options.reusable)
  if (wrong !== undefined || options.timeout === undefined) return wrong
  return !isBelowZero(options.timeout) && Option.isSome(Duration.decodeUnknown(options.timeout))
    ? undefined
    : DbError.make("InvalidInput", {
        message: "The option timeout is not a duration of 0 or more.",
        hint: 'Write milliseconds, or "5 seconds".'
      })
}

/** Makes the wrapper, borrows unless it is lazy, and sees to its end. Nothing has changed when it fails. */
const open = (core: EngineCore, options: ConnectionOptions): Effect.Effect<Handle, SqlError, Scope.Scope> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.withFiberRuntime<Handle, SqlError, Scope.Scope>((fiber) => {
      const refused = refuse(options)
      if (refused !== undefined) return Effect.fail(refused)
      const entry = Ambient.entry(fiber, core)
      const before = options.reuse === true ? restore(topOf(entry.stack)?.ready ?? Effect.void) : Effect.void
      const made = Effect.suspend(() => {
        const handle = makeHandle(core, entry, options)
        // Interrupted in the hand-over: nobody has the handle, and it is on no stack.
        const held = options.lazy === true ? Effect.void : Effect.onError(restore(handle.borrow), () => handle.abandon)
        return Effect.zipRight(
          held,
          Effect.flatMap(Effect.scope, (scope) => Scope.addFinalizerExit(scope, () => handle.close))
        ).pipe(Effect.as(handle))
      })
      return Effect.zipRight(before, made)
    })
  )

const acquire = (core: EngineCore, options: ConnectionOptions): Effect.Effect<Connection, SqlError, Scope.Scope> =>
  Effect.tap(open(core, options), (handle) => (stacks(handle, options) ? handle.push : Effect.void))

const withConnection = (
  core: EngineCore,
  effect: Effect.Effect<any, any, any>,
  given: ConnectionOptions
): Effect.Effect<any, any, any> => {
  const options = { ...given, reuse: given.reuse ?? true }
  return Effect.scopedWith((scope) =>
    Effect.flatMap(Scope.extend(open(core, options), scope), (handle) =>
      Ambient.locally(effect, core, handle.isRoot ? around(handle, options) : onTopOfStack)
    )
  )
}

/** An orphan serves the statements of its own effect, but whoever wants to reuse finds what was there before. */
const around = (handle: Handle, options: ConnectionOptions): ((entry: Ambient.Entry) => Ambient.Entry) =>
  handle.isRoot && options.reusable === false ? (entry) => ({ ...entry, orphan: handle }) : push(handle)

/** What is shared is on the stack already: an orphan would take its place. */
const onTopOfStack = (entry: Ambient.Entry): Ambient.Entry => ({ ...entry, orphan: undefined })

/**
 * The connection of one database, as a tag with its constructors and effects. The service is a facade: it resolves
 * to the ambient connection at each use.
 *
 * @since 0.1.0
 * @category models
 */
export interface ConnectionModule<Name extends string> extends Context.Tag<DbConnection<Name>, Connection> {
  /**
   * A connection for the current scope, on the fiber's stack unless `reusable` is false. Fails with `AcquireTimeout`
   * when none becomes free in time; the stack is then as it was.
   */
  readonly acquire: (options?: ConnectionOptions) => Effect.Effect<Connection, SqlError, DbEngine<Name> | Scope.Scope>
  /** Runs an effect with an ambient connection, by default the one that is ambient already. */
  readonly withConnection: Combinator<ConnectionOptions, SqlError, DbEngine<Name>>
  /** The ambient connection for as long as the layer lasts. */
  readonly layer: (options?: ConnectionOptions) => Layer.Layer<DbConnection<Name>, SqlError, DbEngine<Name>>
  /** The connection on top of the fiber's stack. */
  readonly current: Effect.Effect<Option.Option<Connection>, never, DbEngine<Name>>
  readonly pid: Effect.Effect<number, SqlError, DbEngine<Name>>
  readonly status: Effect.Effect<ConnectionStatus, never, DbEngine<Name>>
  readonly raw: Effect.Effect<Pg.Client, SqlError, DbEngine<Name>>
  /** `release` of the ambient connection. Without one: `NoSession`. */
  readonly release: (options?: {
    readonly permanent?: boolean | undefined
  }) => Effect.Effect<void, SqlError, DbEngine<Name>>
}

const currentOf = (given: EngineCore): Effect.Effect<Option.Option<Handle>, DbError> =>
  Effect.withFiberRuntime((fiber) => {
    const core = engineFor(fiber, given)
    const entry = Ambient.entry(fiber, core)
    const top = entry.orphan ?? topOf(entry.stack)
    if (top === undefined) return Effect.succeed(Option.none())
    if (top instanceof Handle) return Effect.succeed(Option.some(top))
    return Effect.map(top.ready, () => {
      const root = top.root()
      return root === undefined ? Option.none() : Option.some(new Handle(core, root, false))
    })
  })

/** The connection that is ambient where the facade's client is used; a session's own is used by the session alone. */
const onTop: Bound = {
  _tag: "Ambient",
  find: (entry) => {
    const top = entry.orphan ?? topOf(entry.stack)
    return top instanceof Handle ? top.bound() : ambientBound
  }
}

/** Where it can't be had there is none: its first use says why. */
const current = (core: EngineCore): Effect.Effect<Option.Option<Handle>> =>
  Effect.orElseSucceed(currentOf(core), () => Option.none())

/** @internal */
export const facadeOf = onceFor((service: EngineService): Connection => {
  const core = coreOf(service)
  let view: DbSql | undefined = undefined
  const use = <A, E>(f: (handle: Handle) => Effect.Effect<A, E>): Effect.Effect<A, E | SqlError> =>
    Effect.flatMap(currentOf(core), (current): Effect.Effect<A, E | SqlError> =>
      Option.isSome(current)
        ? f(current.value)
        : Effect.fail(
            DbError.make("NoSession", {
              message: "There is no ambient connection.",
              hint: "Put DbConnection.withConnection around it, or DbConnection.acquire before it."
            })
          )
    )
  return {
    name: core.name,
    get sql() {
      return (view ??= viewOf(core, onTop))
    },
    pid: use((_) => _.pid),
    raw: use((_) => _.raw),
    release: (options) => use((_) => _.release(options)),
    status: Effect.flatMap(
      current(core),
      Option.match({ onNone: () => Effect.succeed<ConnectionStatus>("lazy"), onSome: (_) => _.status })
    )
  }
})

/** @internal */
export const make = <Name extends string>(
  name: Name,
  engine: Context.Tag<DbEngine<Name>, EngineService>
): ConnectionModule<Name> => {
  const tag = Context.GenericTag<DbConnection<Name>, Connection>(`effect-db/DbConnection/${name}`)
  const withCore = <A, E, R>(f: (core: EngineCore) => Effect.Effect<A, E, R>) =>
    Effect.flatMap(engine, (service) => coreHere(service, f))
  const facade = <A, E>(f: (connection: Connection) => Effect.Effect<A, E>) =>
    Effect.flatMap(engine, (service) => f(facadeOf(service)))
  const layer = (options: ConnectionOptions = {}): Layer.Layer<DbConnection<Name>, SqlError, DbEngine<Name>> =>
    Layer.scopedContext(
      Effect.flatMap(engine, (service) =>
        coreHere(service, (core) =>
          Effect.flatMap(open(core, options), (handle) =>
            Effect.map(Ambient.context(core, "connection", around(handle, options)), (context) =>
              Context.merge(Context.make(tag, facadeOf(service)), context)
            )
          )
        )
      )
    )
  return Object.assign(tag, {
    acquire: (options: ConnectionOptions = {}) => withCore((core) => acquire(core, options)),
    withConnection: combinator<ConnectionOptions, SqlError, DbEngine<Name>>((effect, options) =>
      withCore((core) => withConnection(core, effect, options))
    ),
    layer,
    current: Effect.flatMap(engine, (service) => current(coreOf(service))),
    pid: facade((_) => _.pid),
    status: facade((_) => _.status),
    raw: facade((_) => _.raw),
    release: (options?: { readonly permanent?: boolean | undefined }) => facade((_) => _.release(options))
  })
}
