/**
 * What is more than memory holds: it waits where it is, on the server or in the program, not in between.
 */
import { describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber, Stream } from "effect"
import { DbEngine, DbQuery, DbSession } from "effect-db"
import { execFile } from "node:child_process"
import { fileURLToPath } from "node:url"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import type { Flood } from "./support/flood.js"
import { committed, programsOn } from "./support/programs.js"
import { until } from "./support/until.js"
import { executes, wired } from "./support/wired.js"

const database = testDatabase()
const test = programsOn(database)

const mega = 1 << 20

/** A program of `support/flood.ts` in a process with so many megabytes of heap, which ends it when they are too few. */
const flood = (name: string, heap: number): Effect.Effect<Flood> =>
  Effect.promise(
    (signal) =>
      new Promise((resolve, reject) => {
        const program = fileURLToPath(new URL("./support/flood.ts", import.meta.url))
        execFile(
          process.execPath,
          [`--max-old-space-size=${heap}`, "--import", "tsx", program, database.url, name],
          { signal },
          (error, stdout, stderr) =>
            error === null ? resolve(JSON.parse(stdout) as Flood) : reject(new Error(`${name}: ${stderr}`))
        )
      })
  )

describe("more than memory holds", () => {
  for (const [promise, name, heap, count] of [
    // A hundred thousand fibers of Effect take most of it.
    ["100 000 statements at once in a session, 100 MB each way", "statements", 1400, 100_000],
    ["300 MB of rows through stream and 96 MB of heap", "stream", 96, 300_000_000],
    ["rows of a megabyte each through stream and 128 MB of heap", "wide", 128, 300_000_000],
    ["300 MB of COPY TO through 96 MB of heap", "copyTo", 96, 300_000_000],
    ["300 MB of COPY FROM through 96 MB of heap", "copyFrom", 96, 300_000]
  ] as const) {
    it.live(
      promise,
      () =>
        Effect.map(flood(name, heap), (found) => {
          expect(found.count).toBe(count)
          expect(found.buffers).toBeLessThan(64 * mega)
        }),
      300_000
    )
  }
})

/** Until nothing has changed for a good many turns of the event loop. */
const untilStill = (value: () => number): Effect.Effect<number> =>
  Effect.promise(async () => {
    for (let last = value(), still = 0; still < 500; still++) {
      await new Promise((resolve) => setImmediate(resolve))
      if (value() !== last) still = 0
      last = value()
    }
    return value()
  })

/** What the only statement under way that is not ours waits for. */
const waitsFor = (event: string): Effect.Effect<boolean> =>
  Effect.map(
    database.query(
      `SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'active' AND wait_event = '${event}'`
    ),
    (rows) => rows.length > 0
  )

describe("who is slow makes the other side wait", () => {
  test("COPY TO: the server waits for a consumer that does not read, and nothing is lost", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const first = yield* Deferred.make<void>()
      const goOn = yield* Deferred.make<void>()
      const before = process.memoryUsage().external
      const copied = yield* Effect.fork(
        DbQuery.copyTo(sql`COPY (SELECT repeat('x', 999) FROM generate_series(1, 100000)) TO STDOUT`).pipe(
          Stream.mapEffect((chunk) =>
            Effect.as(Effect.zipRight(Deferred.succeed(first, undefined), Deferred.await(goOn)), chunk.length)
          ),
          Stream.runSum
        )
      )
      yield* Deferred.await(first)
      yield* until("the server waits", waitsFor("ClientWrite"))
      expect(process.memoryUsage().external - before).toBeLessThan(30 * mega)
      yield* Deferred.succeed(goOn, undefined)
      expect(yield* Fiber.join(copied)).toBe(100_000_000)
    }))

  test("COPY FROM: the source is not asked while the server does not take it, and nothing is lost", () =>
    Effect.gen(function* () {
      yield* database.query(`
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$;
        CREATE TRIGGER wait BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION wait()`)
      const { sql } = yield* DbEngine
      const rows = 50_000
      let asked = 0
      const note = "x".repeat(1000)
      const source = Stream.range(1, rows).pipe(
        Stream.map((id) => {
          asked = id
          return `${id}\t${note}\n`
        }),
        Stream.rechunk(100)
      )
      const copy = yield* Effect.scoped(
        Effect.gen(function* () {
          const lock = yield* sql.reserve
          yield* lock.executeUnprepared("SELECT pg_advisory_lock(1)", [], undefined)
          const fiber = yield* Effect.fork(DbQuery.copyFrom(sql`COPY t FROM STDIN`, source))
          yield* until("the server waits", waitsFor("advisory"))
          expect(yield* untilStill(() => asked)).toBeLessThan(rows)
          yield* lock.executeUnprepared("SELECT pg_advisory_unlock(1)", [], undefined)
          return fiber
        })
      )
      expect((yield* Fiber.join(copy)).rowCount).toBe(rows)
      expect((yield* committed(database)).length).toBe(rows)
    }))

  wired(database, "stream: one FETCH ahead of a consumer that does not read, and the session goes on", {}, (at) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const fetches = () => at.proxy.log.filter(executes(/^FETCH/)).length
        const first = yield* Deferred.make<void>()
        const goOn = yield* Deferred.make<void>()
        const read = yield* Effect.fork(
          sql<{ n: number }>`SELECT generate_series(1, 3000) AS n`.stream.pipe(
            Stream.tap(() => Effect.zipRight(Deferred.succeed(first, undefined), Deferred.await(goOn))),
            Stream.runCount
          )
        )
        yield* Deferred.await(first)
        yield* until(
          "one is ahead",
          Effect.sync(() => fetches() === 2)
        )
        for (let i = 0; i < 20; i++) yield* sql`SELECT ${i}::int`
        expect(fetches()).toBe(2)
        yield* Deferred.succeed(goOn, undefined)
        expect(yield* Fiber.join(read)).toBe(3000)
      })
    )
  )
})
