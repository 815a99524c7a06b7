/**
 * Schemas and tenants: where the unqualified names of an effect's statements are looked up.
 *
 * @since 0.1.0
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import { DbError } from "./DbError.js"
import { coreOf } from "./DbEngine.js"
import { DbEngine } from "./Default.js"
import * as Ambient from "./internal/ambient.js"
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

type Within = {
  (path: SchemaPath): <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E | SqlError, R | DbEngine>
  <A, E, R>(effect: Effect.Effect<A, E, R>, path: SchemaPath): Effect.Effect<A, E | SqlError, R | DbEngine>
}

const at = (level: Level): Within =>
  ((...args: readonly [SchemaPath] | readonly [Effect.Effect<any, any, any>, SchemaPath]) => {
    const within = (effect: Effect.Effect<any, any, any>, path: SchemaPath) =>
      Effect.flatMap(DbEngine, (service) => {
        const text = pathOf(path)
        return typeof text === "string"
          ? Ambient.locally(effect, coreOf(service), (entry) => ({ ...entry, [level]: text }))
          : Effect.fail(text)
      })
    return args.length === 2
      ? within(args[0], args[1])
      : (effect: Effect.Effect<any, any, any>) => within(effect, args[0])
  }) as Within

/**
 * Runs an effect with the unqualified names of its statements looked up in this schema. It is set for the transaction
 * or the single statement only, in the same round trip, so the pool never carries it over and fibers never mix. Nests;
 * the inner one wins. Names that are empty, over 63 bytes or no identifiers fail with `InvalidInput` before any SQL.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withSchema: Within = at("schema")

/**
 * As `withSchema`, for the tenant that a request belongs to: it wins over every `withSchema`, inside or outside of it.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withTenant: Within = at("tenant")

/**
 * The explicit choice for an effect: it wins over tenant and schema.
 *
 * @since 0.1.0
 * @category combinators
 */
export const using: Within = at("using")

/**
 * The search path that a statement would run with; none: the engine's default.
 *
 * @since 0.1.0
 * @category accessors
 */
export const current: Effect.Effect<Option.Option<string>, never, DbEngine> = Effect.flatMap(DbEngine, (service) =>
  Effect.withFiberRuntime((fiber) =>
    Effect.succeed(Option.fromNullable(Ambient.searchPath(Ambient.entry(fiber, coreOf(service)))))
  )
)

/**
 * Runs an effect only inside `withTenant` (or `using`): without, it fails with `InvalidInput` before any SQL.
 *
 * @since 0.1.0
 * @category combinators
 */
export const requireTenant = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R | DbEngine> =>
  Effect.flatMap(DbEngine, (service) =>
    Effect.withFiberRuntime<A, E | SqlError, R>((fiber) => {
      const { tenant, using } = Ambient.entry(fiber, coreOf(service))
      return tenant === undefined && using === undefined
        ? Effect.fail(
            DbError.make("InvalidInput", {
              message: "There is no tenant, and this needs one.",
              hint: "Put DbSchema.withTenant(effect, name) around it."
            })
          )
        : effect
    })
  )

const run = (text: string): Effect.Effect<void, SqlError, DbEngine> =>
  Effect.flatMap(DbEngine, ({ sql }) => Effect.asVoid(sql.unsafe(text)))

const named = (
  name: string,
  f: (quoted: string) => Effect.Effect<void, SqlError, DbEngine>
): Effect.Effect<void, SqlError, DbEngine> =>
  Effect.suspend(() => {
    const refused = checkIdentifier(name)
    return refused === undefined ? f(quoteIdentifier(name)) : Effect.fail(refused)
  })

/**
 * Creates a schema, in the ambient transaction if there is one.
 *
 * @since 0.1.0
 * @category schemas
 */
export const create = (
  name: string,
  options?: { /** Default: false, which fails when it exists. */ readonly ifNotExists?: boolean | undefined }
): Effect.Effect<void, SqlError, DbEngine> =>
  named(name, (quoted) => run(`CREATE SCHEMA ${options?.ifNotExists === true ? "IF NOT EXISTS " : ""}${quoted}`))

/**
 * Drops a schema, in the ambient transaction if there is one.
 *
 * @since 0.1.0
 * @category schemas
 */
export const drop = (
  name: string,
  options?: {
    /** Default: false, which fails when it does not exist. */
    readonly ifExists?: boolean | undefined
    /** With everything in it. Default: false, which fails when there is anything. */
    readonly cascade?: boolean | undefined
  }
): Effect.Effect<void, SqlError, DbEngine> =>
  named(name, (quoted) =>
    run(
      `DROP SCHEMA ${options?.ifExists === true ? "IF EXISTS " : ""}${quoted}${options?.cascade === true ? " CASCADE" : ""}`
    )
  )
