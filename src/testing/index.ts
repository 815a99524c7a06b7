/**
 * Tests against a real database that leave nothing behind.
 *
 * @since 0.1.0
 */
export * as DbTest from "./DbTest.js"
