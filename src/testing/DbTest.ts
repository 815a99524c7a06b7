/**
 * Tests against a real database that leave nothing behind.
 *
 * @since 0.1.0
 * @module
 */
import type { SqlError } from "@effect/sql/SqlError"
import type * as ConfigError from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import { randomBytes } from "node:crypto"
import { borrow, coreOf, makeService } from "../DbEngine.js"
import type { DbEngine, EngineService } from "../DbEngine.js"
import * as Database from "../Database.js"
import type { Provided } from "../DbLayer.js"
import type { DbOptions } from "../DbOptions.js"
import type { EngineCore } from "../internal/engine.js"
import { inSandbox, withEngine } from "../internal/instead.js"
import { Command } from "../internal/command.js"
import { deadline } from "../internal/deadline.js"
import { checkIdentifier, quoteIdentifier } from "../internal/input.js"
import { Root } from "../internal/lease.js"
import type { Wire } from "../internal/wire.js"
import { admin } from "./admin.js"
import { SandboxEngine } from "./sandbox.js"
import { makeTemplate } from "./template.js"
import type { TemplateOptions } from "./template.js"
import { traceOn } from "./trace.js"
import type { Trace } from "./trace.js"

const statement = (wire: Wire, text: string): Effect.Effect<void, SqlError> =>
  Effect.async<void, SqlError>((resume) => {
    wire.submit(
      new Command(text, [], "array", true, false, false, undefined, (error) =>
        resume(error === undefined ? Effect.void : Effect.fail(error))
      )
    )
  })

/** A server that does not answer in time loses the connection. */
const limited = (core: EngineCore, wire: Wire, text: string): Effect.Effect<void, SqlError> =>
  Effect.suspend(() => {
    const limit = core.config.settleMillis
    const stop = deadline(limit, () => wire.destroy(new Error(`the server did not answer ${text} within ${limit} ms`)))
    return Effect.ensuring(statement(wire, text), Effect.sync(stop))
  })

/** An engine on one borrowed connection, in a transaction that is rolled back when the scope closes. */
const sandboxed = (core: EngineCore): Effect.Effect<EngineService, SqlError, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.suspend(() => {
      const root = new Root(core, { name: "sandbox" }, core.config.acquireMillis)
      return Effect.flatMap(borrow(root), () => {
        const wire = root.wire!
        return Effect.as(limited(core, wire, "BEGIN"), { root, wire })
      }).pipe(Effect.onError(() => Effect.sync(() => root.release(true))))
    }),
    ({ root, wire }) =>
      Effect.zipRight(
        Effect.ignore(limited(core, wire, "ROLLBACK")),
        Effect.sync(() => root.release(true))
      )
  ).pipe(
    Effect.flatMap(({ wire }) =>
      Effect.map(
        Effect.acquireRelease(
          Effect.sync(() => new SandboxEngine(core, wire)),
          (sandbox) => sandbox.close
        ),
        (sandbox) => {
          const service = makeService(sandbox)
          sandbox.services = Database.hookServices(service)
          return service
        }
      )
    )
  )

/**
 * @since 0.1.0
 * @category models
 */
export interface DatabaseOptions<Name extends string = "default"> extends DbOptions<Name> {
  /** The beginning of the name. Default: `"test"`. */
  readonly prefix?: string | undefined
  /** The whole name, instead of a prefix and something random. */
  readonly name?: string | undefined
  /** The database to copy: one that is migrated already makes a new one in milliseconds. Default: the server's. */
  readonly template?: string | undefined
  /** Use the database of `name` if it exists, with what is in it, and don't drop it. Default: false. */
  readonly useExisting?: boolean | undefined
  /** Keep it at the end. Default: false. */
  readonly keep?: boolean | undefined
}

/**
 * A database of its own for the scope.
 *
 * @since 0.1.0
 * @category models
 */
export interface TestDatabase<Name extends string = "default"> {
  readonly name: string
  /** The options of an engine on it. */
  readonly options: DbOptions<Name | "default">
  readonly layer: Layer.Layer<Provided<Name>, SqlError>
}

/**
 * The testing kit of one database.
 *
 * @since 0.1.0
 * @category models
 */
export interface TestModule<Name extends string> {
  /**
   * Runs an effect in a sandbox: everything inside, commits, rollbacks, closes and isolated sessions included, stays on
   * one connection of the ambient engine and is rolled back at the end, whatever the outcome. So does what it calls of
   * services that were built outside, with the `DbSession`, `DbEngine` or `SqlClient` that they have captured. Sandboxes
   * nest; other databases are not touched.
   *
   * Outside stay fibers that were started there, effects that are run with a `Runtime` that was captured there, and
   * handles of sessions and connections that were opened there.
   *
   * What outlives it gets `PoolClosed` at its next use; what that runs is cancelled.
   *
   * Its limits are those of one connection in one transaction: the transactions of several sessions take turns, one
   * inside the other, so an isolated session does not survive the rollback of the transaction that it was opened in, and
   * one that waits for the end of that fails it with `SessionBusy`; isolation levels are those of the sandbox, and inside
   * of a read-only session all are; `now()` is when it began; a NOTIFY is not heard; `connection.raw` is refused, with
   * `InvalidInput`. A plain BEGIN, COMMIT or ROLLBACK outside of a session is played; any other text that
   * begins or ends a transaction is refused as well.
   */
  readonly sandbox: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E | SqlError, R | DbEngine<Name>>
  /**
   * What `DbLayer(options)` provides, in a sandbox that lasts as long as the layer. Without options the server is that of
   * the environment (`DATABASE_URL`, else `PGHOST` and so on). With `layer` of `@effect/vitest` the tests of a group share
   * it, and see each other's work; `sandbox` around each of them keeps them apart.
   */
  readonly layer: (
    options?: DbOptions<Name | "default">
  ) => Layer.Layer<Provided<Name>, SqlError | ConfigError.ConfigError>
  /** A sandbox over an engine that is there already. */
  readonly sandboxLayer: Layer.Layer<Provided<Name>, SqlError, DbEngine<Name>>
  /**
   * Runs an effect and gives what it yields, and what was sent meanwhile. It changes nothing of that: the same
   * statements go the same way.
   *
   * It listens to the connections of the ambient engine and hears whatever they send, also for fibers outside of the
   * effect. In a sandbox it hears that sandbox alone, so that tests that run at the same time are told apart. There the
   * statements are shown as they would be sent without it (`BEGIN`, not the savepoint that plays it); what the sandbox
   * adds is neither shown nor counted.
   *
   * A failure of the effect is the failure of the whole: `Effect.exit(effect)` keeps the trace.
   *
   * ```ts
   * const costs = Effect.gen(function* () {
   *   const [, trace] = yield* DbTest.trace(DbSession.autocommit(register("ada")))
   *   expect(trace.roundTrips).toEqual([["BEGIN", "INSERT INTO users (name) VALUES ($1)"], ["COMMIT"]])
   * })
   * ```
   */
  readonly trace: <A, E, R>(
    effect: Effect.Effect<A, E, R>
  ) => Effect.Effect<readonly [result: A, trace: Trace], E, R | DbEngine<Name>>
  /**
   * Creates a database for the scope and drops it at the end, with `FORCE`: backends that are still attached, a leaked
   * one of the program under test for example, don't keep it. A failing body drops it too. It is reached as an engine
   * with these options reaches the database that they name (default: `postgres`), by a user who may create databases.
   */
  readonly database: (
    options: DatabaseOptions<Name | "default">
  ) => Effect.Effect<TestDatabase<Name>, SqlError, Scope.Scope>
  /**
   * The name of a database that the effect has filled, to be the `template` of `database`, which then takes
   * milliseconds. It is made once for each `version`: test files that ask at the same time, in this process or another,
   * wait for the first, and a later run finds it. One whose making was cut off is made anew. It stays; drop it with
   * `ALTER DATABASE name IS_TEMPLATE false` and `DROP DATABASE name`.
   */
  readonly template: <E>(
    options: TemplateOptions<Name | "default">,
    fill: Effect.Effect<unknown, E, Provided<Name>>
  ) => Effect.Effect<string, E | SqlError>
}

/** Creates it for the scope. */
const created = <Name extends string>(
  options: DatabaseOptions<Name | "default">
): Effect.Effect<Omit<TestDatabase<Name>, "layer">, SqlError, Scope.Scope> => {
  const { keep, name: given, prefix, template, useExisting, ...server } = options
  const name = given ?? `${prefix ?? "test"}_${randomBytes(6).toString("hex")}`
  const create = Effect.gen(function* () {
    const refused = checkIdentifier(name) ?? (template === undefined ? undefined : checkIdentifier(template))
    if (refused !== undefined) return yield* Effect.fail(refused)
    if (useExisting === true) {
      const literal = `'${name.replace(/'/g, "''")}'`
      const found = yield* admin(server, `SELECT 1 FROM pg_database WHERE datname = ${literal}`)
      if (found.length > 0) return false
    }
    const from = template === undefined ? "" : ` TEMPLATE ${quoteIdentifier(template)}`
    yield* admin(server, `CREATE DATABASE ${quoteIdentifier(name)}${from}`)
    return true
  })
  const engine: DbOptions<Name | "default"> = { ...server, database: name }
  return Effect.as(
    Effect.acquireRelease(create, (created) =>
      created && keep !== true
        ? Effect.orDie(admin(server, `DROP DATABASE IF EXISTS ${quoteIdentifier(name)} WITH (FORCE)`))
        : Effect.void
    ),
    { name, options: engine }
  )
}

/**
 * The testing kit of another database.
 *
 * ```ts
 * const Analytics = Database.make("analytics")
 * const events = Effect.flatMap(Analytics.DbSession, ({ sql }) => sql`SELECT what FROM events`)
 * const leavesNothing = DbTest.of(Analytics).sandbox(events)
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const of = <Name extends string>(database: Database.Database<Name>): TestModule<Name> => {
  const { DbEngine, DbLayer } = database
  const sandboxLayer: TestModule<Name>["sandboxLayer"] = Layer.scopedContext(
    Effect.map(
      Effect.flatMap(DbEngine, (engine) => withEngine(coreOf(engine), sandboxed)),
      (service) => Database.contextOf(database, service)
    )
  )
  return {
    sandbox: <A, E, R>(effect: Effect.Effect<A, E, R>) =>
      Effect.scopedWith((scope) =>
        Effect.flatMap(DbEngine, (engine) =>
          withEngine(coreOf(engine), (core) =>
            Effect.flatMap(Scope.extend(sandboxed(core), scope), (service) => {
              const inside = Effect.mapInputContext(effect, (context: Context.Context<R>) =>
                Context.merge(context, Database.contextOf(database, service))
              )
              return inSandbox(inside, core, coreOf(service))
            })
          )
        )
      ) as Effect.Effect<A, E | SqlError, R | DbEngine<Name>>,
    layer: (options) => Layer.provide(sandboxLayer, options === undefined ? DbLayer.env : DbLayer(options)),
    sandboxLayer,
    trace: (effect) => Effect.flatMap(DbEngine, (engine) => traceOn(effect, engine)),
    template: (options, fill) => makeTemplate(options, (options) => Effect.provide(fill, DbLayer(options))),
    database: (options) =>
      Effect.map(created(options), ({ name, options }) => ({ name, options, layer: DbLayer(options) }))
  }
}

const own = of(Database.make("default"))

/**
 * `sandbox` of the default database.
 *
 * @since 0.1.0
 * @category sandbox
 */
export const sandbox = own.sandbox

/**
 * `layer` of the default database.
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = own.layer

/**
 * `sandboxLayer` of the default database.
 *
 * @since 0.1.0
 * @category layers
 */
export const sandboxLayer = own.sandboxLayer

/**
 * `database` whose `layer` is that of the default database.
 *
 * @since 0.1.0
 * @category databases
 */
export const database = own.database

/**
 * `template` of the default database.
 *
 * @since 0.1.0
 * @category databases
 */
export const template = own.template

/**
 * `trace` of the default database.
 *
 * @since 0.1.0
 * @category trace
 */
export const trace = own.trace

export type {
  /**
   * @since 0.1.0
   * @category models
   */
  TemplateOptions
} from "./template.js"
export type {
  /**
   * @since 0.1.0
   * @category models
   */
  Trace
} from "./trace.js"
