/**
 * With `node --test` and no other runner: promise code in a sandbox that lasts as long as the file.
 *
 * `DATABASE_URL=... node --import tsx --test examples/runners/node.test.ts`
 */
import { DbQuery, DbRuntime, DbSession } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect } from "effect"
import assert from "node:assert/strict"
import { after, before, describe, it } from "node:test"

const runtime = DbRuntime.make(DbTest.layer())

const insert = (name: string) =>
  Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO runner_users (name) VALUES (${name})`)

const count = Effect.flatMap(DbSession, ({ sql }) =>
  DbQuery.scalar<number>(sql`SELECT count(*)::int FROM runner_users`)
).pipe(Effect.map((found) => (found._tag === "Some" ? found.value : 0)))

/** The program under test, as it is in production: it commits, closes, isolates, runs in parallel. */
const register = async (names: ReadonlyArray<string>): Promise<void> => {
  await runtime.session(async () => {
    await runtime.run(Effect.all(names.map(insert), { concurrency: "unbounded" }))
    await runtime.run(DbSession.commit)
    await runtime.run(DbSession.close)
  })
  await Promise.all(names.map((name) => runtime.isolated(() => runtime.run(insert(`friend of ${name}`)))))
}

describe("register", () => {
  before(() =>
    runtime.run(Effect.flatMap(DbSession, ({ sql }) => sql`CREATE TABLE runner_users (name text PRIMARY KEY)`))
  )
  after(() => runtime.close())

  it("commits, and finds what it has committed", async () => {
    await register(["ada", "grace"])
    assert.equal(await runtime.run(count), 4)
  })

  it("undoes in a sandbox of its own what one test does", async () => {
    const before = await runtime.run(count)
    await runtime.run(DbTest.sandbox(DbSession.autocommit(insert("only here"))))
    assert.equal(await runtime.run(count), before)
  })

  it("sends what it is meant to send", async () => {
    const [, trace] = await runtime.run(DbTest.trace(DbSession.autocommit(insert("traced"))))
    assert.deepEqual(trace.roundTrips, [["BEGIN", "INSERT INTO runner_users (name) VALUES ($1)"], ["COMMIT"]])
  })
})
