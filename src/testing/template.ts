/**
 * Databases to be copied, made once.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import { createHash } from "node:crypto"
import type { DbOptions } from "../DbOptions.js"
import { checkIdentifier, quoteIdentifier } from "../internal/input.js"
import { connect } from "./admin.js"

/**
 * How to reach the server, and what the template is known by.
 *
 * @since 0.1.0
 * @category models
 */
export interface TemplateOptions<Name extends string = "default"> extends DbOptions<Name> {
  /**
   * What makes it another one when it changes: the texts of the migrations, or a number. Its hash is part of the name.
   */
  readonly version: string | number | ReadonlyArray<string>
  /** The beginning of the name. Default: `"template"`. */
  readonly prefix?: string | undefined
}

/** @internal */
export const makeTemplate = <Name extends string, E>(
  options: TemplateOptions<Name | "default">,
  fill: (options: DbOptions<Name | "default">) => Effect.Effect<unknown, E | SqlError>
): Effect.Effect<string, E | SqlError> =>
  Effect.scoped(
    Effect.gen(function* () {
      const { prefix = "template", version, ...server } = options
      const hash = createHash("sha256").update(JSON.stringify(version)).digest("hex").slice(0, 16)
      const name = `${prefix}_${hash}`
      const refused = checkIdentifier(name)
      if (refused !== undefined) return yield* Effect.fail(refused)
      const literal = `'${name.replace(/'/g, "''")}'`
      const quoted = quoteIdentifier(name)
      const ask = yield* connect(server)
      const made = Effect.map(
        ask(`SELECT FROM pg_database WHERE datname = ${literal} AND datistemplate`),
        (_) => _.length > 0
      )
      if (yield* made) return name
      // One at a time: whoever comes later finds it made. The lock goes with the connection.
      yield* ask(`SELECT pg_advisory_lock(hashtextextended('effect-db template ' || ${literal}, 0))`)
      if (yield* made) return name
      yield* ask(`DROP DATABASE IF EXISTS ${quoted} WITH (FORCE)`)
      yield* ask(`CREATE DATABASE ${quoted}`)
      yield* fill({ ...server, database: name })
      // Last: what is no template yet is not finished.
      yield* ask(`ALTER DATABASE ${quoted} WITH IS_TEMPLATE true ALLOW_CONNECTIONS false`)
      return name
    })
  )
