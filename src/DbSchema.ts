/**
 * Schemas and tenants: where the unqualified names of an effect's statements are looked up.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import type * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import { DbError } from "./DbError.js"
import { coreHere, coreOf } from "./DbEngine.js"
import type { DbEngine, EngineService } from "./DbEngine.js"
import * as Ambient from "./internal/ambient.js"
import { engineFor } from "./internal/instead.js"
import { checkIdentifier, quoteIdentifier } from "./internal/input.js"

/**
 * One schema, or several in the order in which names are looked up. Only what is named is searched, besides
 * `pg_catalog`: `["acme", "public"]` to see extensions and shared tables.
 *
 * @since 0.1.0
 * @category models
 */
export type SchemaPath = string | ReadonlyArray<string>

type Level = "schema" | "tenant" | "using"

const noTenant = (database: string): DbError =>
  DbError.make("InvalidInput", {
    message: "There is no tenant, and this needs one.",
    hint: `Put ${database === "default" ? "" : `Database.make("${database}").`}DbSchema.withTenant(effect, name) around it.`
  })

/** PostgreSQL reads it as the name of the role, quoted or not. */
const userSchema = (): DbError =>
  DbError.make("InvalidInput", {
    message: 'A search path can\'t have a schema of the name "$user".',
    hint: "PostgreSQL would look into the schema that is named like the role. Name the schema itself."
  })

const pathOf = (path: SchemaPath): string | DbError => {
  const names: ReadonlyArray<string> = Array.isArray(path) ? path : [path]
  if (names.length === 0) {
    return DbError.make("InvalidInput", { message: "No schema was named.", hint: "Name at least one." })
  }
  for (const name of names) {
    const refused = checkIdentifier(name) ?? (name === "$user" ? userSchema() : undefined)
    if (refused !== undefined) return refused
  }
  return names.map(quoteIdentifier).join(", ")
}

/**
 * What runs an effect with the unqualified names of its statements looked up elsewhere.
 *
 * @since 0.1.0
 * @category models
 */
export interface WithinSchema<Name extends string> {
  (path: SchemaPath): <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E | SqlError, R | DbEngine<Name>>
  <A, E, R>(effect: Effect.Effect<A, E, R>, path: SchemaPath): Effect.Effect<A, E | SqlError, R | DbEngine<Name>>
}

/**
 * @since 0.1.0
 * @category models
 */
export interface CreateSchemaOptions {
  /** Default: false, which fails when it exists. */
  readonly ifNotExists?: boolean | undefined
}

/**
 * @since 0.1.0
 * @category models
 */
export interface DropSchemaOptions {
  /** Default: false, which fails when it does not exist. */
  readonly ifExists?: boolean | undefined
  /** With everything in it. Default: false, which fails when there is anything. */
  readonly cascade?: boolean | undefined
}

/**
 * The schemas and tenants of one database.
 *
 * @since 0.1.0
 * @category models
 */
export interface SchemaModule<Name extends string> {
  /**
   * Runs an effect with the unqualified names of its statements looked up in this schema. It is set for the transaction
   * or the single statement only, in the same round trip, so the pool never carries it over and fibers never mix. Nests;
   * the inner one wins. Names that are empty, over 63 bytes or no identifiers fail with `InvalidInput` before any SQL.
   */
  readonly withSchema: WithinSchema<Name>
  /** As `withSchema`, for the tenant that a request belongs to: it wins over every `withSchema`, inside or outside of it. */
  readonly withTenant: WithinSchema<Name>
  /** The explicit choice for an effect: it wins over tenant and schema. */
  readonly using: WithinSchema<Name>
  /** The search path that a statement would run with; none: the engine's default. */
  readonly current: Effect.Effect<Option.Option<string>, never, DbEngine<Name>>
  /** Runs an effect only inside `withTenant` (or `using`): without, it fails with `InvalidInput` before any SQL. */
  readonly requireTenant: <A, E, R>(
    effect: Effect.Effect<A, E, R>
  ) => Effect.Effect<A, E | SqlError, R | DbEngine<Name>>
  /** Creates a schema, in the ambient transaction if there is one. */
  readonly create: (name: string, options?: CreateSchemaOptions) => Effect.Effect<void, SqlError, DbEngine<Name>>
  /** Drops a schema, in the ambient transaction if there is one. */
  readonly drop: (name: string, options?: DropSchemaOptions) => Effect.Effect<void, SqlError, DbEngine<Name>>
}

/** @internal */
export const make = <Name extends string>(
  name: Name,
  engine: Context.Tag<DbEngine<Name>, EngineService>
): SchemaModule<Name> => {
  const at = (level: Level): WithinSchema<Name> =>
    ((...args: readonly [SchemaPath] | readonly [Effect.Effect<any, any, any>, SchemaPath]) => {
      const within = (effect: Effect.Effect<any, any, any>, path: SchemaPath) =>
        Effect.flatMap(engine, (service) => {
          const text = pathOf(path)
          return typeof text === "string"
            ? coreHere(service, (core) => Ambient.locally(effect, core, (entry) => ({ ...entry, [level]: text })))
            : Effect.fail(text)
        })
      return args.length === 2
        ? within(args[0], args[1])
        : (effect: Effect.Effect<any, any, any>) => within(effect, args[0])
    }) as WithinSchema<Name>
  const ambient = Effect.flatMap(engine, (service) =>
    Effect.withFiberRuntime<Ambient.Entry>((fiber) =>
      Effect.succeed(Ambient.entry(fiber, engineFor(fiber, coreOf(service))))
    )
  )
  const run = (schema: string, textOf: (quoted: string) => string): Effect.Effect<void, SqlError, DbEngine<Name>> =>
    Effect.flatMap(engine, ({ sql }) => {
      const refused = checkIdentifier(schema)
      return refused === undefined ? Effect.asVoid(sql.unsafe(textOf(quoteIdentifier(schema)))) : Effect.fail(refused)
    })
  return {
    withSchema: at("schema"),
    withTenant: at("tenant"),
    using: at("using"),
    current: Effect.map(ambient, (entry) => Option.fromNullable(Ambient.searchPath(entry))),
    requireTenant: <A, E, R>(effect: Effect.Effect<A, E, R>) =>
      Effect.flatMap(ambient, ({ tenant, using }): Effect.Effect<A, E | SqlError, R> =>
        tenant === undefined && using === undefined ? Effect.fail(noTenant(name)) : effect
      ),
    create: (schema, options) =>
      run(schema, (quoted) => `CREATE SCHEMA ${options?.ifNotExists === true ? "IF NOT EXISTS " : ""}${quoted}`),
    drop: (schema, options) =>
      run(
        schema,
        (quoted) =>
          `DROP SCHEMA ${options?.ifExists === true ? "IF EXISTS " : ""}${quoted}${options?.cascade === true ? " CASCADE" : ""}`
      )
  }
}
