/**
 * What must not be sent yet, sent again or kept: behind a BEGIN that may fail, after an answer that leaves a doubt, and
 * when a statement has failed half-way.
 */
import { DbEngine, DbQuery, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Stream from "effect/Stream"
import { describe, expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { committed } from "./support/programs.js"
import type { Wired } from "./support/wired.js"
import { executes, freshTable, one, run, startups, wired } from "./support/wired.js"

const database = testDatabase()

freshTable(database)

const ids = committed(database)
const kept = { ...one, resetOnRelease: "never" } as const
const deallocateAll = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"

/** The statement is on the server and runs. */
const running = untilActivity(database.url, (_) => _.active === 1)

const sentAs = (at: Wired, pattern: RegExp): number => at.proxy.log.filter(executes(pattern)).length

describe("behind a BEGIN that fails", () => {
  const behind: ReadonlyArray<readonly [what: string, statement: Effect.Effect<unknown, unknown, DbEngine>]> = [
    ["several statements in one text", run("INSERT INTO t VALUES (2); INSERT INTO t VALUES (3)")],
    ["a text with a semicolon in a literal", run("INSERT INTO t SELECT length(';') + 1")],
    ["a COPY", Effect.flatMap(DbEngine, ({ sql }) => DbQuery.copyFrom(sql`COPY t FROM STDIN`, Stream.make("2\n3\n")))]
  ]
  for (const [what, statement] of behind) {
    wired(database, `${what} of a sibling: nothing is committed on its own`, kept, () =>
      Effect.gen(function* () {
        // BEGIN has a name, which goes behind the client's back.
        yield* withTransaction(run("SELECT 1"))
        yield* run(deallocateAll)
        const both = Effect.all([Effect.either(run("INSERT INTO t VALUES (1)")), Effect.either(statement)], {
          concurrency: 2
        })
        expect(yield* Effect.flip(withTransaction(Effect.zipRight(both, Effect.fail("no"))))).toBe("no")
        expect(yield* ids).toEqual([])
      })
    )
  }

  wired(database, "behind one that succeeds they run in its transaction", one, () =>
    Effect.gen(function* () {
      const all = Effect.all([run("INSERT INTO t VALUES (1)"), ...behind.map(([, statement]) => statement)], {
        concurrency: "unbounded"
      })
      yield* Effect.ignore(withTransaction(Effect.zipRight(all, Effect.fail("no"))))
      expect(yield* ids).toEqual([])
      yield* withTransaction(all)
      expect(yield* ids).toEqual([1, 2, 2, 2, 3, 3])
    })
  )
})

describe("what a statement leaves behind that did not succeed", () => {
  const locks = "(SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"
  const workMem = "current_setting('work_mem')"
  const look = (what: string) => Effect.map(run(`SELECT ${what} AS found`), (rows) => rows[0]?.["found"])
  const lockAndFail = run("SELECT pg_advisory_lock(i), 1 / (2 - i) FROM generate_series(1, 2) i")
  const interrupted = (text: string) =>
    Effect.flatMap(Effect.fork(run(text)), (fiber) => Effect.zipRight(running, Fiber.interrupt(fiber)))

  const leftovers: ReadonlyArray<
    readonly [what: string, leave: Effect.Effect<unknown, unknown, DbEngine>, look: string, clean: string]
  > = [
    ["a lock of a statement that failed", lockAndFail, locks, "0"],
    ["a lock of a transaction that failed", withTransaction(lockAndFail), locks, "0"],
    ["a lock of an interrupted statement", interrupted("SELECT pg_advisory_lock(7), pg_sleep(60)"), locks, "0"],
    [
      "a SET that a DO has committed",
      run("DO $$ BEGIN SET work_mem = '5MB'; COMMIT; RAISE EXCEPTION 'x'; END $$"),
      workMem,
      "4MB"
    ],
    [
      "a SET that a CALL has committed",
      Effect.zipRight(
        database.query(
          "CREATE OR REPLACE PROCEDURE tune(n int) LANGUAGE plpgsql AS " +
            "$$ BEGIN SET work_mem = '5MB'; COMMIT; PERFORM 1 / n; END $$"
        ),
        Effect.flatMap(DbEngine, ({ sql }) => sql`/* by hand */ CALL tune(${0})`)
      ),
      workMem,
      "4MB"
    ]
  ]
  for (const [what, leave, found, clean] of leftovers) {
    wired(database, `${what}: the next borrower does not see it`, one, (at) =>
      Effect.gen(function* () {
        yield* Effect.exit(leave)
        expect(yield* look(found)).toBe(clean)
        expect(startups(at)).toBe(1)
      })
    )
  }

  wired(database, "one that can have left nothing costs no reset", one, (at) =>
    Effect.gen(function* () {
      yield* Effect.exit(run("SELECT 1 / 0"))
      yield* Effect.exit(run("SELECT pg_advisory_lock(1) FROM nowhere"))
      yield* Effect.exit(withTransaction(run("DO $$ BEGIN RAISE EXCEPTION 'x'; END $$")))
      yield* run("SELECT 1")
      expect(sentAs(at, /RESET ALL/)).toBe(0)
    })
  )
})
