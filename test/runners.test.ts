/**
 * The testing kit under three runners: `it.layer` of `@effect/vitest`, plain vitest, and `node --test`. The program under
 * test commits, closes, isolates and runs in parallel; nothing of it is there afterwards.
 */
import { layer } from "@effect/vitest"
import { DbQuery, DbRuntime, DbSession, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect, Layer, Option } from "effect"
import { execFile } from "node:child_process"
import { fileURLToPath } from "node:url"
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest"
import { testDatabase } from "./support/database.js"

const database = testDatabase()

const rows = () => Effect.runPromise(database.query("SELECT name FROM users ORDER BY name"))

beforeAll(() => Effect.runPromise(database.query("CREATE TABLE users (name text PRIMARY KEY)")))

// Whatever the tests have committed.
afterEach(async () => {
  expect(await rows()).toEqual([])
})

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users (name) VALUES (${name})`)

const count = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(DbQuery.scalar<number>(sql`SELECT count(*)::int FROM users`), Option.getOrThrow)
)

const register = (name: string) =>
  Effect.gen(function* () {
    yield* insert(name)
    yield* DbSession.commit
    yield* DbSession.close
    yield* withTransaction(insert(`friend of ${name}`))
  }).pipe(DbSession.autocommit)

const everybody = Effect.all(["ada", "grace", "alan"].map(register), { concurrency: "unbounded" }).pipe(
  Effect.zipRight(Effect.all([DbSession.isolated(insert("edsger")), DbSession.isolated(insert("barbara"))])),
  Effect.zipRight(count)
)

layer(Layer.unwrapEffect(Effect.sync(() => DbTest.layer({ url: database.url }))), { excludeTestServices: true })(
  "it.layer of @effect/vitest",
  (it) => {
    it.effect("runs a program that commits, closes, isolates and runs in parallel", () =>
      Effect.map(DbTest.sandbox(everybody), (found) => expect(found).toBe(8))
    )

    it.effect("finds nothing of it in the next test", () => Effect.map(count, (found) => expect(found).toBe(0)))

    it.effect("traces in it", () =>
      Effect.map(DbTest.sandbox(DbTest.trace(withTransaction(insert("ada")))), ([, { roundTrips }]) =>
        expect(roundTrips).toEqual([["BEGIN", "INSERT INTO users (name) VALUES ($1)"], ["COMMIT"]])
      )
    )
  }
)

describe("plain vitest", () => {
  const make = () => DbRuntime.make(DbTest.layer({ url: database.url }))
  let runtime: ReturnType<typeof make>
  beforeAll(() => {
    runtime = make()
  })
  afterAll(() => runtime.close())

  it("runs effects", async () => {
    expect(await runtime.run(DbTest.sandbox(everybody))).toBe(8)
    expect(await runtime.run(count)).toBe(0)
  })

  it("runs promise code, whose commits are undone with the runtime", async () => {
    await runtime.session(async () => {
      await runtime.run(insert("ada"))
      await runtime.run(DbSession.commit)
    })
    await expect(
      runtime.transaction(async () => {
        await runtime.run(insert("grace"))
        throw new Error("no")
      })
    ).rejects.toThrow("no")
    expect(await runtime.run(count)).toBe(1)
  })
})

describe("node --test", () => {
  const root = fileURLToPath(new URL("..", import.meta.url))

  it("runs examples/runners/node.test.ts, which leaves nothing behind", { timeout: 60_000 }, async () => {
    const { NODE_OPTIONS: _, VITEST: __, ...env } = process.env
    const { code, output } = await new Promise<{ code: unknown; output: string }>((resolve) => {
      const args = ["--import", "tsx", "--test", "--test-reporter=tap", "examples/runners/node.test.ts"]
      execFile(
        process.execPath,
        args,
        { cwd: root, env: { ...env, DATABASE_URL: database.url, TSX_TSCONFIG_PATH: "tsconfig.json" } },
        (error, stdout, stderr) => resolve({ code: error?.code ?? 0, output: stdout + stderr })
      )
    })
    expect(output).toContain("# pass 3")
    expect(code, output).toBe(0)
    const left = await Effect.runPromise(database.query("SELECT FROM pg_class WHERE relname = 'runner_users'"))
    expect(left).toEqual([])
  })
})
