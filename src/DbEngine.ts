/**
 * The engine: one database, its pool, its host.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as FiberRef from "effect/FiberRef"
import * as Layer from "effect/Layer"
import * as LogLevel from "effect/LogLevel"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { DbError } from "./DbError.js"
import { resolve } from "./DbOptions.js"
import type { DbHost, DbOptions, HookServices } from "./DbOptions.js"
import type { DbEngine } from "./Default.js"
import { EngineCore } from "./internal/engine.js"
import * as Ambient from "./internal/ambient.js"
import { ambientBound, boundIn, executeApart } from "./internal/execute.js"
import { withTransaction } from "./internal/block.js"
import { health } from "./internal/health.js"
import { checkStartupValue } from "./internal/input.js"
import { withEngine } from "./internal/instead.js"
import { listen } from "./internal/listen.js"
import { Root } from "./internal/lease.js"
import type { Stacked } from "./internal/lease.js"
import type { Bound } from "./internal/execute.js"
import { poolClosed } from "./internal/poolErrors.js"
import { makeCompiler, makeView } from "./internal/sqlClient.js"
import type { DbSql } from "./internal/sqlClient.js"
import { within } from "./internal/session.js"
import { streamRows } from "./internal/stream.js"

export type { DbEngine } from "./Default.js"

export type {
  /**
   * @since 0.1.0
   * @category models
   */
  DbSql
} from "./internal/sqlClient.js"

/**
 * How many connections there are. `used + idle + connecting + closing = total`, which never exceeds `max`, with two
 * exceptions that count as well. Connections to hosts that `changeHost` has left may still be lent, and
 * `DbRuntime.runSync` has a pool of its own: `max` is that of each.
 *
 * @since 0.1.0
 * @category models
 */
export interface EngineStats {
  readonly total: number
  readonly idle: number
  /** Borrowed, or on their way back: being reset or validated. */
  readonly used: number
  readonly connecting: number
  /** Ended by us, not yet closed by the server. */
  readonly closing: number
  /** Fibers that wait for a connection. */
  readonly pending: number
  readonly max: number
}

/**
 * What `DbEngine.health` found.
 *
 * @since 0.1.0
 * @category models
 */
export interface EngineHealth {
  /** `"up"`: the database answered within `healthTimeout`. A pool that is full or suspended is not "down". */
  readonly status: "up" | "down"
  /** When `health` found it so for the first time in a row. */
  readonly since: Date
  /** Who was asked: the database by a connection of the pool, or the server itself, since the pool had none to lend. */
  readonly asked: "pool" | "server"
  readonly tookMillis: number
  /** What the last check that failed met, and when: also after it is up again. */
  readonly lastError: { readonly error: DbError; readonly at: Date } | undefined
  /** `DbEngine.suspend` was called: nothing is lent until `resume`. */
  readonly suspended: boolean
  readonly host: DbHost
  readonly stats: EngineStats
}

/**
 * What `yield* DbEngine` gives.
 *
 * @since 0.1.0
 * @category models
 */
export interface EngineService {
  readonly name: string
  /** Runs in the ambient session, else on the ambient connection, else on one of its own for one statement. */
  readonly sql: DbSql
  /** The host that new connections go to; with several, the first. */
  readonly host: DbHost
  /**
   * Goes over to another host; without a port, on the same one. The same target: nothing happens. Another: sessions
   * that hold a connection finish on the old host, the next one uses the new, and the old pool closes when all have come
   * back. A suspended engine stays so. A closed one refuses with `PoolClosed`.
   */
  readonly changeHost: (target: DbHost | ReadonlyArray<DbHost>) => Effect.Effect<void, SqlError>
  /** One round trip on a connection of the pool. */
  readonly ping: Effect.Effect<void, SqlError>
  readonly stats: Effect.Effect<EngineStats>
  /**
   * Whether the database answers, for readiness probes: within `healthTimeout`, never as a failure. It needs no slot
   * of the pool: where all connections are lent, the server is asked on a socket of its own, without logging in.
   */
  readonly health: Effect.Effect<EngineHealth>
  /**
   * Closes idle connections now, those that are being opened when they are there, and lent ones when they come back;
   * those of `DbRuntime.runSync` too.
   */
  readonly evictAll: Effect.Effect<void>
  /** Lends nothing until `resume`; whoever asks waits, up to `acquireTimeout`. */
  readonly suspend: Effect.Effect<void>
  readonly resume: Effect.Effect<void>
}

const cores = new WeakMap<EngineService, EngineCore>()

/** @internal */
export const coreOf = (engine: EngineService): EngineCore => {
  const core = cores.get(engine)
  if (core === undefined) throw new Error("not an engine of effect-db: make it with DbEngine.make or DbLayer")
  return core
}

/** Goes on with the engine that is meant where it runs: what stands in its place there, if anything does. @internal */
export const coreHere = <A, E, R>(
  engine: EngineService,
  f: (core: EngineCore) => Effect.Effect<A, E, R>
): Effect.Effect<A, E, R> => {
  const core = coreOf(engine)
  return core.replaced ? withEngine(core, f) : f(core)
}

/** What has no state of its own is made once for each engine. @internal */
export const onceFor = <Engine extends EngineService | EngineCore, A>(
  make: (engine: Engine) => A
): ((engine: Engine) => A) => {
  const made = new WeakMap<Engine, A>()
  return (engine) => {
    let one = made.get(engine)
    if (one === undefined) made.set(engine, (one = make(engine)))
    return one
  }
}

const compilerOf = onceFor((core: EngineCore) => makeCompiler(core))

/** The client of an engine, of a session handle, of a connection. @internal */
export const viewOf = (core: EngineCore, bound: Bound): DbSql => {
  // A handle is one session's or one connection's, whatever stands in the place of its engine.
  const at: typeof withEngine = bound._tag === "Ambient" ? withEngine : (core, f) => f(core)
  return makeView(
    {
      engine: core,
      bound,
      withTransaction: (effect) => at(core, (core) => inBound(core, bound, withTransaction(core, effect, {}))),
      stream: streamRows,
      reserve: at(core, reserve),
      listen: (channel) => Stream.unwrap(at(core, (core) => Effect.succeed(listen(core, channel))))
    },
    compilerOf(core)
  )
}

/** Runs an effect where the statements of a view run, with what they run in as the ambient one. */
const inBound = <A, E, R>(
  core: EngineCore,
  bound: Bound,
  effect: Effect.Effect<A, E, R>
): Effect.Effect<A, E | SqlError, R> => {
  if (bound === ambientBound) return effect
  return Effect.withFiberRuntime((fiber) => {
    const entry = Ambient.entry(fiber, core)
    const at = boundIn(bound, entry)
    if (at._tag === "Ambient") return effect
    if (at._tag === "Slot") return within(at.slot, at.unit ?? at.slot.get(), effect)
    const { gone, root } = at
    const error = gone()
    if (error !== undefined) return Effect.fail(error)
    if (entry.slot?.runsOn(root) === true) return effect
    const of: Stacked = { ready: Effect.void, root: () => (gone() === undefined ? root : undefined) }
    return Ambient.locally(effect, core, (entry) => ({
      ...entry,
      ...Ambient.nowhere,
      stack: { of, next: entry.stack },
      writes: entry.writes ?? entry.slot?.writes
    }))
  })
}

/** A connection that nobody reuses, until the scope closes. */
const reserve = (core: EngineCore): Effect.Effect<Bound, DbError, Scope.Scope> =>
  Effect.acquireReleaseInterruptible(
    Effect.suspend(() => {
      const root = new Root(core, { name: "reserved connection" }, core.config.acquireMillis)
      return Effect.as(
        Effect.onError(borrow(root), () => Effect.sync(() => root.release(true))),
        root
      )
    }),
    () => Effect.void
  ).pipe(
    Effect.tap((root) => Effect.addFinalizer(() => Effect.sync(() => root.release(true)))),
    Effect.uninterruptible,
    Effect.map((root): Bound => ({
      _tag: "Root",
      root,
      gone: () => (root.released ? root.releasedError() : undefined)
    }))
  )

/**
 * Makes a root borrow now. Interrupting the wait gives up. In the hand-over the root has its connection all the same,
 * and others may be using it already: whoever owns the root gives it back.
 * @internal
 */
export const borrow = (root: Root): Effect.Effect<void, DbError> =>
  Effect.interruptible(
    Effect.async<void, DbError>((resume) => {
      const stop = root.borrow((error) => resume(error === undefined ? Effect.void : Effect.fail(error)))
      return Effect.sync(stop)
    })
  )

/** The same engine for one target, made again within this time, is the mistake of providing a layer per request. */
const soon = 5000

/** Which loggers have been told of a mistake: whoever makes it makes it for each request. */
interface Told {
  readonly loggers: WeakSet<object>
  /** Loggers may be made per request as well. */
  warnings: number
}

const mostWarnings = 20

/** Once to each logger. One that hears nothing is not told. */
const warnOnce = (told: Told, text: string): Effect.Effect<void> =>
  Effect.withFiberRuntime((fiber) => {
    const heard = LogLevel.lessThanEqual(fiber.getFiberRef(FiberRef.currentMinimumLogLevel), LogLevel.Warning)
    const loggers = heard ? [...fiber.getFiberRef(FiberRef.currentLoggers)] : []
    if (told.warnings >= mostWarnings || loggers.every((logger) => told.loggers.has(logger))) return Effect.void
    told.warnings++
    for (const logger of loggers) told.loggers.add(logger)
    return Effect.logWarning(text)
  })

const targetOf = ({ config, name }: EngineCore): string => {
  const { database, hosts, username } = config.target
  return JSON.stringify([name, hosts, database, username])
}

/** Builds of an engine for one target that follow each other soon. */
const rows = new Map<string, Told & { at: number }>()

const warnIfSoon = (core: EngineCore): Effect.Effect<void> =>
  Effect.suspend(() => {
    const key = targetOf(core)
    const now = Date.now()
    for (const [other, { at }] of rows) if (now - at > soon) rows.delete(other)
    const row = rows.get(key)
    if (row === undefined) {
      rows.set(key, { at: now, loggers: new WeakSet(), warnings: 0 })
      return Effect.void
    }
    const millis = now - row.at
    row.at = now
    return warnOnce(
      row,
      `effect-db: the engine "${core.name}" was built twice for the same database within ${millis} ms. Build its layer once, at the edge of the program: Effect.provide(DbLayer(...)) inside a request handler opens a pool for each request.`
    )
  })

/** Who has been told that another engine is built inside of a session of this one. */
const toldInside = new WeakMap<EngineCore, Told>()

/** However late: what runs on the second engine is not undone with the session that seems to be around it. */
const warnIfInside = (core: EngineCore, outer: EngineCore): Effect.Effect<void> => {
  let told = toldInside.get(outer)
  if (told === undefined) toldInside.set(outer, (told = { loggers: new WeakSet(), warnings: 0 }))
  return warnOnce(
    told,
    `effect-db: another engine "${core.name}" for the same database is built inside of a session of the first one: what runs on it is outside of that session. Build the layer once, at the edge of the program.`
  )
}

/** The engine of this name and target that the fiber is in a session or on a connection of; in a sandbox, none. */
const outerOf = (core: EngineCore): Effect.Effect<EngineCore | undefined> =>
  Effect.map(Ambient.entries, (all) => {
    const target = targetOf(core)
    const alike = (all as ReadonlyArray<readonly [EngineCore, Ambient.Entry]>).filter(([_]) => targetOf(_) === target)
    if (alike.some(([, { sandbox }]) => sandbox !== undefined)) return undefined
    return alike.find(([, { orphan, slot, stack }]) => (slot === undefined ? (stack ?? orphan) : !slot.ended))?.[0]
  })

const warnIfTwice = (core: EngineCore): Effect.Effect<void> =>
  Effect.flatMap(outerOf(core), (outer) => (outer === undefined ? warnIfSoon(core) : warnIfInside(core, outer)))

const warnOfIgnored = ({ config: { ignored }, name }: EngineCore): Effect.Effect<void> =>
  ignored.length === 0
    ? Effect.void
    : Effect.logWarning(
        `effect-db: the engine "${name}" takes no notice of these parameters of its url or variables of the environment: ${ignored.join(", ")}. Leave them out, or give the option that is meant.`
      )

/** @internal */
export const makeService = (core: EngineCore): EngineService => {
  const inPlace = <A, E>(f: (core: EngineCore) => Effect.Effect<A, E>): Effect.Effect<A, E> => withEngine(core, f)
  const changeHost = (target: DbHost | ReadonlyArray<DbHost>): Effect.Effect<void, SqlError> =>
    Effect.suspend(() => {
      const now = core.config.target.hosts
      const given: ReadonlyArray<DbHost> = Array.isArray(target) ? target : [target]
      // A port that is not given stays as it is: that of this host, if it is one already.
      const hosts = given.map(({ host, port }, at) => ({
        host,
        port: port ?? (now[at]?.host === host ? now[at] : (now.find((_) => _.host === host) ?? now[0]!)).port
      }))
      const usable = ({ host, port }: { readonly host: string; readonly port: number }): boolean =>
        checkStartupValue("host", host) === undefined &&
        host !== "" &&
        Number.isInteger(port) &&
        port > 0 &&
        port < 65536
      if (hosts.length === 0 || !hosts.every(usable)) {
        return Effect.fail(
          DbError.make("InvalidInput", {
            message: "changeHost was given no usable host.",
            hint: "Give { host, port }."
          })
        )
      }
      return inPlace((core) => {
        if (core.closed) return Effect.fail(poolClosed())
        core.changeHost(hosts)
        return Effect.void
      })
    })
  const service: EngineService = {
    name: core.name,
    sql: viewOf(core, ambientBound),
    get host() {
      return core.host
    },
    changeHost,
    ping: inPlace((core) => Effect.asVoid(executeApart(core, "SELECT 1", []))),
    stats: inPlace((core) => Effect.sync(() => core.stats)),
    health: inPlace(health),
    evictAll: inPlace((core) => Effect.sync(() => core.evictAll())),
    suspend: inPlace((core) => Effect.sync(() => core.suspend())),
    resume: inPlace((core) => Effect.sync(() => core.resume()))
  }
  cores.set(service, core)
  return service
}

/** @internal */
export const makeEngine = (
  name: string,
  options: DbOptions<any>,
  servicesOf: (service: EngineService) => Context.Context<HookServices<any>>
): Effect.Effect<EngineService, SqlError, Scope.Scope> =>
  Effect.gen(function* () {
    const config = yield* resolve(options)
    const runtime = yield* Effect.runtime<never>()
    const core = yield* Effect.acquireRelease(
      Effect.sync(() => new EngineCore(name, config, runtime)),
      (core) => core.close
    )
    yield* warnOfIgnored(core)
    yield* warnIfTwice(core)
    const service = makeService(core)
    core.services = servicesOf(service)
    if (options.connect === "eager") {
      yield* options.startupRetry === undefined ? service.ping : Effect.retry(service.ping, options.startupRetry)
    }
    return service
  })

/**
 * The engine of one database, as a tag with its constructors and effects.
 *
 * @since 0.1.0
 * @category models
 */
export interface EngineModule<Name extends string> extends Context.Tag<DbEngine<Name>, EngineService> {
  /**
   * An engine for the current scope. Closing the scope drains it. Made again for the same target within five seconds it
   * logs a warning: once to each logger, to twenty at most, until five seconds have passed without another. So it does at
   * any time where the fiber is in a session or connection of an engine of the same name for the same target.
   */
  readonly make: (options: DbOptions<Name | "default">) => Effect.Effect<EngineService, SqlError, Scope.Scope>
  /** The engine alone, without the facades and the ecosystem's client of `DbLayer`. Closing it drains. */
  readonly layer: (options: DbOptions<Name | "default">) => Layer.Layer<DbEngine<Name>, SqlError>
  /** `changeHost` of the engine. */
  readonly changeHost: (target: DbHost | ReadonlyArray<DbHost>) => Effect.Effect<void, SqlError, DbEngine<Name>>
  readonly ping: Effect.Effect<void, SqlError, DbEngine<Name>>
  readonly stats: Effect.Effect<EngineStats, never, DbEngine<Name>>
  readonly health: Effect.Effect<EngineHealth, never, DbEngine<Name>>
  readonly evictAll: Effect.Effect<void, never, DbEngine<Name>>
  readonly suspend: Effect.Effect<void, never, DbEngine<Name>>
  readonly resume: Effect.Effect<void, never, DbEngine<Name>>
}

/** @internal */
export const make = <Name extends string>(
  name: Name,
  servicesOf: (service: EngineService) => Context.Context<HookServices<any>>
): EngineModule<Name> => {
  const tag = Context.GenericTag<DbEngine<Name>, EngineService>(`effect-db/DbEngine/${name}`)
  const use = <A, E>(f: (engine: EngineService) => Effect.Effect<A, E>): Effect.Effect<A, E, DbEngine<Name>> =>
    Effect.flatMap(tag, f)
  const make = (options: DbOptions<Name | "default">) => makeEngine(name, options, servicesOf)
  return Object.assign(tag, {
    make,
    layer: (options: DbOptions<Name | "default">) => Layer.scoped(tag, make(options)),
    changeHost: (target: DbHost | ReadonlyArray<DbHost>) => use((_) => _.changeHost(target)),
    ping: use((_) => _.ping),
    stats: use((_) => _.stats),
    health: use((_) => _.health),
    evictAll: use((_) => _.evictAll),
    suspend: use((_) => _.suspend),
    resume: use((_) => _.resume)
  })
}
