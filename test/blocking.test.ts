/**
 * `runSync` and connections of the event loop, which stands still meanwhile: nothing may go out whose answer nobody
 * could wait for.
 */
import { describe, expect, it } from "@effect/vitest"
import { Effect, Exit, Scope, Stream } from "effect"
import { atomic, DbConnection, DbEngine, DbError, DbQuery, DbRuntime, DbSession, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { testDatabase } from "./support/database.js"
import { committed, insert, outcome, quietly, reason, seen, type Services } from "./support/programs.js"
import { onRuntime } from "./support/promises.js"

const database = testDatabase()
const rows = () => Effect.runPromise(committed(database))

type Db = DbRuntime.DbRuntime<Services, unknown>

/** Promise code with a runtime and a scope that is open for as long. */
const test = (name: string, program: (db: Db, scope: Scope.CloseableScope) => Promise<void>): void => {
  it(name, () =>
    onRuntime(database, async (db) => {
      const scope = Effect.runSync(Scope.make())
      await program(db, scope)
      await db.run(Scope.close(scope, Exit.void))
    })
  )
}

/** Refused by `runSync`, and nobody has to wait to know that nothing was sent. */
const isRefused = (db: Db, effect: Effect.Effect<unknown, unknown, Services>): void => {
  let error: unknown = "it returned"
  try {
    db.runSync(effect)
  } catch (thrown) {
    error = thrown
  }
  const reason = DbError.reason(error)
  expect(reason?._tag).toBe("InvalidInput")
  expect(reason?.message).toMatch(/connection that the event loop holds/)
}

describe("in runSync a connection from outside is refused before anything is sent", () => {
  test("a statement of a connection, however it is run", async (db, scope) => {
    const { raw, sql } = await db.run(Scope.extend(DbConnection.acquire(), scope))
    const add = sql`INSERT INTO t (id) VALUES (1) RETURNING id`
    const copy = DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("1\n"))
    for (const run of [add, add.raw, add.values, Stream.runDrain(add.stream)]) isRefused(db, run)
    isRefused(db, Stream.runDrain(sql`SELECT 1`.stream))
    isRefused(db, copy)
    isRefused(db, raw)
    // Behind whatever might have gone out.
    await db.run(sql`SELECT 1`)
    expect(await rows()).toEqual([])
    await db.run(add)
    expect(await rows()).toEqual([1])
  })

  test("a statement of a session, which goes on afterwards", async (db, scope) => {
    const handle = await db.run(Scope.extend(DbSession.make(), scope))
    const add = (id: number) => handle.sql`INSERT INTO t (id) VALUES (${id})`
    await db.run(add(1))
    isRefused(db, add(2))
    isRefused(db, handle.batch([add(3), add(4)]))
    isRefused(db, handle.use(withTransaction(insert(5))))
    isRefused(db, Stream.runDrain(handle.sql`SELECT 1`.stream))
    await db.run(Effect.zipRight(add(6), handle.commit))
    isRefused(db, add(7))
    await db.run(Effect.zipRight(add(8), handle.commit))
    expect(await rows()).toEqual([1, 6, 8])
  })

  test("the end of a transaction of its own, which stays open", async (db, scope) => {
    const handle = await db.run(Scope.extend(DbSession.make(), scope))
    await db.run(handle.sql`INSERT INTO t (id) VALUES (1)`)
    for (const end of [handle.commit, handle.rollback, handle.close]) isRefused(db, end)
    isRefused(db, handle.use(atomic(insert(2))))
    expect(await db.run(handle.state)).toBe("active")
    await db.run(handle.commit)
    // Nothing is open, and nothing has to be sent.
    db.runSync(Effect.zipRight(handle.commit, handle.rollback))
    const block = await db.run(handle.begin())
    await db.run(handle.sql`INSERT INTO t (id) VALUES (3)`)
    for (const end of [block.commit, block.rollback]) isRefused(db, end)
    await db.run(block.commit)
    expect(await rows()).toEqual([1, 3])
  })

  test("the end of a session's scope fails as its commit does, and nothing is committed", async (db, scope) => {
    const handle = await db.run(Scope.extend(DbSession.make({ autocommit: true }), scope))
    await db.run(handle.sql`INSERT INTO t (id) VALUES (1)`)
    isRefused(db, Scope.close(scope, Exit.void))
    expect(await rows()).toEqual([])
    expect(outcome(await db.run(Effect.exit(handle.sql`SELECT 1`)))).toBe("SessionClosed")
  })

  it("whatever runs in a sandbox that the layer of the runtime has opened", async () => {
    await Effect.runPromise(database.query("DROP TABLE IF EXISTS t CASCADE; CREATE TABLE t (id int PRIMARY KEY)"))
    const db = DbRuntime.make(quietly(DbTest.layer({ url: database.url })))
    await db.run(insert(1))
    isRefused(db, insert(2))
    isRefused(db, DbSession.autocommit(insert(3)))
    isRefused(db, withTransaction(insert(4)))
    expect(await db.run(seen)).toEqual([1])
    await db.close()
  })
})

for (const [name, call] of [
  ["runSync", (db, effect) => db.runSync(effect)],
  ["run", (db, effect) => db.run(effect)]
] as ReadonlyArray<readonly [string, (db: Db, effect: Effect.Effect<void, never, Services>) => Promise<void> | void]>) {
  test(`suspend and resume by ${name} hold for run and runSync`, async (db) => {
    const short = DbConnection.withConnection(insert(1), { timeout: "50 millis" })
    const lateInSync = () => Effect.runSync(Effect.exit(Effect.sync(() => db.runSync(short))))
    // The first time there is no pool for runSync yet.
    for (const id of [1, 2]) {
      await call(db, DbEngine.suspend)
      expect(outcome(lateInSync())).toBe("defect: AcquireTimeout")
      expect(await db.run(reason(short))).toBe("AcquireTimeout")
      await call(db, DbEngine.resume)
      db.runSync(insert(id * 10))
      await db.run(insert(id * 10 + 1))
    }
    expect(await rows()).toEqual([10, 11, 20, 21])
  })
}

test("in runSync a sandbox that the effect opens has a connection of its own", async (db) => {
  expect(db.runSync(DbTest.sandbox(Effect.zipRight(DbSession.autocommit(insert(1)), seen)))).toEqual([1])
  expect(await rows()).toEqual([])
})

test("a lazy connection that runSync is the first to use can be used in both", async (db, scope) => {
  const { sql } = await db.run(Scope.extend(DbConnection.acquire({ lazy: true }), scope))
  db.runSync(sql`INSERT INTO t (id) VALUES (1)`)
  await db.run(sql`INSERT INTO t (id) VALUES (2)`)
  db.runSync(sql`INSERT INTO t (id) VALUES (3)`)
  expect(await rows()).toEqual([1, 2, 3])
})
