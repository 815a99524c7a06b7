/**
 * What must not be sent yet, sent again or kept: behind a BEGIN that may fail, after an answer that leaves a doubt, and
 * when a statement has failed half-way.
 */
import { DbConnection, DbEngine, DbQuery, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Stream from "effect/Stream"
import { describe, expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { committed } from "./support/programs.js"
import type { Wired } from "./support/wired.js"
import {
  answered,
  executes,
  forkUntil,
  freshTable,
  one,
  reasonOf,
  run,
  seen,
  startups,
  wired
} from "./support/wired.js"

const database = testDatabase()

freshTable(database)

const ids = committed(database)
const kept = { ...one, resetOnRelease: "never" } as const
const isCancel = (_: { readonly type: string }): boolean => _.type === "cancel"
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

describe("a name or a plan that is gone, in what has committed on its way", () => {
  const once: ReadonlyArray<readonly [what: string, text: string]> = [
    ["several statements in one text", "BEGIN; INSERT INTO t VALUES (1); COMMIT; DEALLOCATE missing"],
    ["a DO", "DO $$ BEGIN INSERT INTO t VALUES (1); COMMIT; EXECUTE 'DEALLOCATE missing'; END $$"]
  ]
  for (const [what, text] of once) {
    wired(database, `${what}: is not run again`, one, (at) =>
      Effect.gen(function* () {
        expect((yield* reasonOf(run(text))).sqlState).toBe("26000")
        expect(yield* ids).toEqual([1])
        yield* run("SELECT 1")
        expect(startups(at)).toBe(1)
      })
    )
  }

  wired(database, "a CALL in front of a stale plan: the batch is not run again", one, () =>
    Effect.gen(function* () {
      yield* database.query(
        "CREATE OR REPLACE PROCEDURE keep() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO t VALUES (1); COMMIT; END $$"
      )
      yield* run("SELECT * FROM t")
      yield* database.query("ALTER TABLE t ADD COLUMN note text")
      const { sql } = yield* DbEngine
      const batch = DbSession.batch([sql`CALL keep()`, sql`SELECT * FROM t`])
      expect((yield* reasonOf(batch)).sqlState).toBe("0A000")
      expect(yield* ids).toEqual([1])
    })
  )
})

/** Interrupts a statement that is over before its cancel arrives, which finds whatever runs then. */
const missed = <A = void, R = never>(at: Wired, behind?: Effect.Effect<A, never, R>) =>
  Effect.gen(function* () {
    const lock = yield* lockedOutside(database, 3)
    const first = yield* Effect.fork(run("SELECT pg_advisory_xact_lock(3)"))
    yield* lock.waitedFor
    const next = behind === undefined ? undefined : yield* behind
    const held = at.proxy.holdAt(isCancel, { forward: false })
    const done = seen(at, answered(/^SELECT/))
    const interrupting = yield* Effect.fork(Fiber.interrupt(first))
    yield* Effect.promise(() => held)
    yield* lock.release
    yield* done
    if (behind !== undefined) yield* running
    at.proxy.resume()
    yield* Fiber.join(interrupting)
    return next
  })

describe("a statement that a cancel for another one has hit", () => {
  wired(database, "is not sent again into the transaction of a session behind it", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const insert = run("INSERT INTO t SELECT 7 FROM pg_sleep(0.5)")
        const session = DbSession.autocommit(Effect.zipRight(run("INSERT INTO t VALUES (1)"), Effect.fail("no")))
        const hit = Effect.all([
          forkUntil(at, executes(/pg_sleep/), insert),
          forkUntil(at, executes(/VALUES/), Effect.flip(session))
        ])
        yield* Effect.forEach((yield* missed(at, hit))!, (fiber) => Fiber.join<unknown, unknown>(fiber))
        expect(sentAs(at, /pg_sleep/)).toBe(2)
        expect(yield* ids).toEqual([7])
      })
    )
  )

  wired(database, "is sent again with all of its batch, once", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const batch = DbSession.batch([
          sql`INSERT INTO t VALUES (1) RETURNING id`,
          sql`INSERT INTO t SELECT 2 FROM pg_sleep(0.5) RETURNING id`,
          sql`INSERT INTO t VALUES (3) RETURNING id`
        ])
        const fiber = (yield* missed(at, forkUntil(at, executes(/VALUES \(3\)/), batch)))!
        expect(yield* Fiber.join(fiber)).toEqual([[{ id: 1 }], [{ id: 2 }], [{ id: 3 }]])
        expect(yield* ids).toEqual([1, 2, 3])
      })
    )
  )

  wired(database, "and that has taken a lock of the session is not sent again, but fails typed", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const hit = forkUntil(at, executes(/pg_sleep/), run("SELECT pg_advisory_lock(8), pg_sleep(5)"))
        const fiber = (yield* missed(at, hit))!
        expect((yield* reasonOf(Fiber.join(fiber)))._tag).toBe("QueryCanceled")
        expect(sentAs(at, /pg_sleep/)).toBe(1)
      })
    )
  )
})

describe("after a cancel that has hit nobody", () => {
  wired(database, "a statement over its time limit is not sent again", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* missed(at)
        yield* run("SET statement_timeout = 100")
        for (const n of [1, 2]) {
          expect((yield* reasonOf(run(`SELECT pg_sleep(5), 'limited ${n}'`)))._tag).toBe("StatementTimeoutError")
        }
        expect(sentAs(at, /limited/)).toBe(2)
      })
    )
  )

  wired(database, "what an administrator cancels is taken for its victim at most once", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* missed(at)
        const [row] = yield* run("SELECT pg_backend_pid() AS pid")
        const cancel = database.query("SELECT pg_cancel_backend($1)", [row!["pid"]])
        const long = (n: number) => Effect.fork(reasonOf(run(`SELECT pg_sleep(60), 'long ${n}'`)))
        const again = seen(at, (_) => sentAs(at, /long 1/) === 2)
        const first = yield* long(1)
        yield* running
        yield* cancel
        yield* again
        yield* running
        yield* cancel
        expect((yield* Fiber.join(first))._tag).toBe("QueryCanceled")
        const second = yield* long(2)
        yield* running
        yield* cancel
        expect((yield* Fiber.join(second))._tag).toBe("QueryCanceled")
        expect([sentAs(at, /long 1/), sentAs(at, /long 2/)]).toEqual([2, 1])
      })
    )
  )

  wired(
    database,
    "a statement in a transaction that was begun by hand is not sent again: all of it has failed",
    one,
    (at) =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          yield* missed(at)
          const [row] = yield* run("SELECT pg_backend_pid() AS pid")
          yield* run("BEGIN")
          const fiber = yield* Effect.fork(reasonOf(run("SELECT pg_sleep(60), 'by hand'")))
          yield* running
          yield* database.query("SELECT pg_cancel_backend($1)", [row!["pid"]])
          expect((yield* Fiber.join(fiber))._tag).toBe("QueryCanceled")
          expect(sentAs(at, /by hand/)).toBe(1)
          yield* run("ROLLBACK")
        })
      )
  )
})

describe("after a cancel that has hit its statement", () => {
  wired(database, "what an administrator cancels is not sent again", one, (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const [row] = yield* run("SELECT pg_backend_pid() AS pid")
        const interrupted = yield* Effect.fork(run("SELECT pg_sleep(60)"))
        yield* running
        yield* Fiber.interrupt(interrupted)
        const next = yield* forkUntil(at, executes(/next/), reasonOf(run("SELECT pg_sleep(60), 'next'")))
        yield* running
        yield* database.query("SELECT pg_cancel_backend($1)", [row!["pid"]])
        expect((yield* Fiber.join(next))._tag).toBe("QueryCanceled")
        expect(sentAs(at, /next/)).toBe(1)
      })
    )
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

describe("the names of our statements, when the user's go", () => {
  const names = Effect.map(
    run("/* unnamed */ SELECT count(*)::int AS n FROM pg_prepared_statements"),
    (rows) => rows[0]?.["n"]
  )
  const going: ReadonlyArray<readonly [text: string, sqlState: string | undefined]> = [
    ["PREPARE mine AS SELECT 1; DEALLOCATE mine", undefined],
    ["EXECUTE missing", "26000"],
    ["DEALLOCATE missing", "26000"]
  ]
  for (const [text, sqlState] of going) {
    wired(database, `${text}: ours stay in use`, { ...kept, preparedStatements: 2 }, (at) =>
      Effect.gen(function* () {
        const ours = Effect.zipRight(run("SELECT 'a' AS x"), run("SELECT 'b' AS x"))
        yield* ours
        if (sqlState === undefined) yield* run(text)
        else expect((yield* reasonOf(run(text))).sqlState).toBe(sqlState)
        at.proxy.reset()
        yield* ours
        expect(at.proxy.log.filter((_) => _.dir === "frontend" && _.type === "P")).toEqual([])
        expect(yield* names).toBe(2)
      })
    )
  }

  wired(database, "PREPARE: they go with the sweep behind it, and with no later one", one, (at) =>
    Effect.gen(function* () {
      for (const text of ["PREPARE mine AS SELECT 1", "SET work_mem = '5MB'"]) {
        yield* run(text)
        yield* run("SELECT 1")
      }
      expect([sentAs(at, /RESET ALL/), sentAs(at, /DEALLOCATE ALL/)]).toEqual([2, 1])
    })
  )

  wired(database, "EXECUTE missing in a transaction: the connection goes on", one, (at) =>
    Effect.gen(function* () {
      expect((yield* reasonOf(withTransaction(run("EXECUTE missing")))).sqlState).toBe("26000")
      yield* run("SELECT 1")
      expect(startups(at)).toBe(1)
    })
  )
})
