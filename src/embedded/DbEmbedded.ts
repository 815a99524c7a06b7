/**
 * A real PostgreSQL from npm, with everything of `DbLayer` on top of it: for examples, tests and a first run.
 *
 * @since 0.1.0
 * @module
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type { Provided } from "../DbLayer.js"
import type { DbOptions } from "../DbOptions.js"
import { DbLayer } from "../Default.js"
import type { EmbeddedError } from "./EmbeddedError.js"
import { EmbeddedServer } from "./EmbeddedServer.js"
import type { EmbeddedServerOptions } from "./EmbeddedServer.js"

/**
 * What the server is started with, and in `engine` what the engine on top of it is told.
 *
 * @since 0.1.0
 * @category models
 */
export interface DbEmbeddedOptions extends EmbeddedServerOptions {
  readonly engine?:
    Omit<DbOptions, "url" | "host" | "port" | "hosts" | "username" | "password" | "database"> | undefined
}

/**
 * Starts a server for the scope of the layer and provides the same services as `DbLayer`. The engine is drained before
 * the server stops. Without a `dataDir` the data are thrown away.
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = (options: DbEmbeddedOptions = {}): Layer.Layer<Provided<"default">, SqlError | EmbeddedError> =>
  Layer.unwrapScoped(
    Effect.map(EmbeddedServer.start(options), (server) => DbLayer({ ...options.engine, url: server.url }))
  )

/**
 * The server of `DATABASE_URL` when it is set, else an embedded one: what a program that others try out uses.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerOrUrl = (
  options: DbEmbeddedOptions = {}
): Layer.Layer<Provided<"default">, SqlError | EmbeddedError> =>
  Layer.unwrapEffect(
    Effect.sync(() => {
      const url = process.env.DATABASE_URL
      return url === undefined || url === "" ? layer(options) : DbLayer({ ...options.engine, url })
    })
  )
