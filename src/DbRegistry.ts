/**
 * Several databases, started together and chosen by value or by name.
 *
 * @since 0.1.0
 * @module
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Database from "./Database.js"
import { DbError } from "./DbError.js"
import { coreOf } from "./DbEngine.js"
import type { DbEngine as EngineId, EngineService } from "./DbEngine.js"
import type { Provided } from "./DbLayer.js"
import type { DbOptions } from "./DbOptions.js"
import type { CommitToken } from "./DbSession.js"
import * as Ambient from "./internal/ambient.js"
import { combinator } from "./internal/combinator.js"
import type { Combined, CombinatorRest, Known } from "./internal/combinator.js"
import { later, tokenOf, waitFor } from "./internal/commitToken.js"
import { inPlaceOf, withEngine } from "./internal/instead.js"

/**
 * The engines of a program by name.
 *
 * @since 0.1.0
 * @category tags
 */
export class DbRegistry extends Context.Tag("effect-db/DbRegistry")<
  DbRegistry,
  {
    /** Of all databases, as they were given. */
    readonly names: ReadonlyArray<string>
    /** Of each database that has one, where statements that only read may go. */
    readonly replicas: ReadonlyMap<string, string>
    /** The engine of a name. An unknown one is `InvalidInput`. */
    readonly get: (name: string) => Effect.Effect<EngineService, SqlError>
  }
>() {}

/**
 * @since 0.1.0
 * @category models
 */
export interface RegistryOptions {
  /** Which database is the replica of which: `{ default: "reporting" }`. */
  readonly replicas?: Readonly<Record<string, string>> | undefined
}

const unknownName = (name: string, names: ReadonlyArray<string>): DbError =>
  DbError.make("InvalidInput", {
    message: `There is no database "${name}" in the registry.`,
    hint: `It has ${names.map((_) => `"${_}"`).join(", ")}.`
  })

/**
 * Starts all databases at the same time, or none: when one fails, those that have started are closed and the first
 * failure is reported. Each is checked while it starts, unless its options say `connect: "lazy"`. It provides what
 * `DbLayer` does, for each of them.
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = <const Databases extends Readonly<Record<string, DbOptions<any>>>>(
  databases: Databases & { readonly [Name in keyof Databases & string]: DbOptions<Name | "default"> },
  options: RegistryOptions = {}
): Layer.Layer<
  DbRegistry | { [Name in keyof Databases & string]: Provided<Name> }[keyof Databases & string],
  SqlError
> =>
  Layer.scopedContext(
    Effect.gen(function* () {
      const names = Object.keys(databases)
      const replicas = new Map(Object.entries(options.replicas ?? {}))
      for (const name of [...replicas.keys(), ...replicas.values()]) {
        if (!names.includes(name)) return yield* Effect.fail(unknownName(name, names))
      }
      const started = yield* Effect.forEach(
        names,
        (name) =>
          Effect.map(
            Database.make(name).DbEngine.make({ ...databases[name], connect: databases[name]?.connect ?? "eager" }),
            (service) => [name, service] as const
          ),
        { concurrency: "unbounded" }
      )
      const engines = new Map<string, EngineService>(started)
      let context: Context.Context<any> = Context.make(DbRegistry, {
        names,
        replicas,
        get: (name) => {
          const engine = engines.get(name)
          return engine === undefined ? Effect.fail(unknownName(name, names)) : Effect.succeed(engine)
        }
      })
      for (const [name, service] of started) {
        context = Context.merge(context, Database.contextOf(Database.make(name), service))
      }
      return context
    })
  )

/**
 * Gives an effect that was written for one database the services of another engine, and puts that engine in the place of
 * those that it has captured.
 */
const instead = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  service: EngineService,
  database: Database.Database<any> = Database.make("default"),
  sameData = false
): Effect.Effect<A, E, Exclude<R, Provided<"default">>> => {
  const inside = Effect.provide(effect, Database.contextOf(database, service))
  return Effect.contextWithEffect((context: Context.Context<never>) => {
    const here = Context.getOption(context, database.DbEngine as never) as Option.Option<EngineService>
    return Option.isNone(here)
      ? inside
      : withEngine(coreOf(here.value), (core) => inPlaceOf(inside, database.name, core, coreOf(service), sameData))
  })
}

/** An engine by name. What has taken its place around here, the sandbox of a test, counts before the registry's own. */
const engineOf = (name: string): Effect.Effect<EngineService, SqlError, DbRegistry> =>
  Effect.flatMap(DbRegistry, (registry) =>
    Effect.flatMap(registry.get(name), (service) =>
      Effect.contextWith((context: Context.Context<never>) => {
        const here = Context.getOption(context, Database.make(name).DbEngine as never) as Option.Option<EngineService>
        // Inside of `using` the default database's place is another's.
        return Option.isSome(here) && here.value.name === name ? here.value : service
      })
    )
  )

/**
 * Runs an effect that was written for the default database on another one: by its vocabulary, which the compiler
 * checks, or by a name that is known at run time only, where an unknown one is `InvalidInput`. Sessions stay apart:
 * a session of the default database is not touched inside. Services that the effect has from elsewhere run there too,
 * with the `DbSession`, `DbEngine` or `SqlClient` that they were built with; a handle of one session or connection stays
 * where it was opened.
 *
 * @since 0.1.0
 * @category combinators
 */
export const using: {
  (
    name: string
  ): <A, E, R>(
    effect: Effect.Effect<A, E, R>
  ) => Effect.Effect<A, E | SqlError, Exclude<R, Provided<"default">> | DbRegistry>
  <Name extends string>(
    database: Database.Database<Name>
  ): <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, Exclude<R, Provided<"default">> | EngineId<Name>>
  <A, E, R>(
    effect: Effect.Effect<A, E, R>,
    name: string
  ): Effect.Effect<A, E | SqlError, Exclude<R, Provided<"default">> | DbRegistry>
  <A, E, R, Name extends string>(
    effect: Effect.Effect<A, E, R>,
    database: Database.Database<Name>
  ): Effect.Effect<A, E, Exclude<R, Provided<"default">> | EngineId<Name>>
} = ((...args: ReadonlyArray<unknown>) => {
  const run = (effect: Effect.Effect<any, any, any>, which: string | Database.Database<string>) =>
    typeof which === "string"
      ? Effect.flatMap(engineOf(which), (service) => instead(effect, service))
      : Effect.flatMap(which.DbEngine, (service) => instead(effect, service))
  return args.length === 2
    ? run(args[0] as Effect.Effect<any, any, any>, args[1] as string)
    : (effect: Effect.Effect<any, any, any>) => run(effect, args[0] as string)
}) as never

/**
 * @since 0.1.0
 * @category models
 */
export interface ReadOnlyOptions<Name extends string = "default"> {
  /** The database that the effect is written for (of `Database.make`). Default: the default one. */
  readonly database?: { readonly name: Name } | undefined
  /** What the replica has to show: what `DbSession.commitToken` yields. */
  readonly after?: CommitToken | undefined
  /** How long the replica may take for it; then the primary is read from. Default: 1 s. */
  readonly timeout?: Duration.DurationInput | undefined
}

/** The database that options name; the default one, when they name none. */
type NameIn<Options> = Options extends { readonly database?: infer Given } ? NameOf<NonNullable<Given>> : "default"

type NameOf<Given> = [Given] extends [never]
  ? "default"
  : Given extends { readonly name: infer Name extends string }
    ? Name
    : "default"

/**
 * A combinator whose options name the database that it is for.
 *
 * @since 0.1.0
 * @category models
 */
export interface ReadOnly {
  <Arg extends Effect.Effect<any, any, any> | ReadOnlyOptions<any>, Name extends string = "default">(
    effectOrOptions: Arg & Known<Arg, ReadOnlyOptions>,
    ...rest: CombinatorRest<ReadOnlyOptions<Name>>
  ): Combined<Arg, SqlError, EngineId<Arg extends Effect.Effect<any, any, any> ? Name : NameIn<Arg>> | DbRegistry>
}

/**
 * Runs an effect that only reads on the database's replica, if the registry knows one; inside of `using` on the replica
 * of that database. Inside a session whose transaction is open it stays there, since a replica would not show what that
 * transaction has done; so it does in the sandbox of a test. There it has the schema and the tenant that it has here.
 *
 * The replica has to show what the session has committed before, what the request has brought along (the option
 * `readYourWrites` of `DbHttp.middleware`) and what `after` says. It is waited for; when it takes longer than `timeout`
 * the effect runs on the primary. A replica that can't be reached is an error.
 *
 * @since 0.1.0
 * @category combinators
 */
export const readOnly: ReadOnly = combinator((effect, options) => onReplica(effect, options)) as never

const onReplica = (effect: Effect.Effect<any, any, any>, options: ReadOnlyOptions<string>) =>
  Effect.gen(function* () {
    const registry = yield* DbRegistry
    const vocabulary = Database.make(options.database?.name ?? "default")
    const here = yield* vocabulary.DbEngine
    const primary = yield* withEngine(coreOf(here), Effect.succeed)
    // A sandbox has taken the place of the one that has a replica.
    const known = yield* Effect.option(registry.get(primary.name))
    const replica =
      Option.isSome(known) && coreOf(known.value) === primary ? registry.replicas.get(primary.name) : undefined
    const { after, slot } = yield* Effect.withFiberRuntime<Ambient.Entry>((fiber) =>
      Effect.succeed(Ambient.entry(fiber, primary))
    )
    const unit = slot?.unit
    const busy = unit !== undefined && unit.open && unit.options.readOnly !== true
    if (replica === undefined || busy) return yield* effect
    const service = yield* engineOf(replica)
    const there = <A, E, R>(effect: Effect.Effect<A, E, R>) => instead(effect, service, vocabulary, true)
    const own = slot === undefined ? Option.none() : yield* tokenOf(primary, slot.writes, unit)
    const token = [options.after, after, Option.getOrUndefined(own)].reduce(later)
    if (token === undefined) return yield* there(effect)
    const shows = Effect.as(waitFor(coreOf(service), token, options.timeout), true)
    const shown = Effect.catchIf(
      shows,
      (error) => error.reason._tag === "ReplicaBehind",
      () => Effect.succeed(false)
    )
    // Of several standbys it is one that has been waited for.
    const one = coreOf(service).config.target.hosts.length === 1
    const onOne = Effect.flatMap(shown, (shown) => (shown ? Effect.asSome(there(effect)) : Effect.succeedNone))
    const read = yield* one ? onOne : there(vocabulary.DbConnection.withConnection(onOne))
    return Option.isSome(read) ? read.value : yield* effect
  })
