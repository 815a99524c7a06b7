/**
 * Tests against a real database that leave nothing behind.
 *
 * @since 0.1.0
 * @module effect-db/testing
 */
export * as DbTest from "./DbTest.js"
export type { DatabaseOptions, TemplateOptions, TestDatabase, TestModule, Trace } from "./DbTest.js"
