import { DbConnection, DbEngine, DbError, DbSession, withTransaction } from "effect-db"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Stream from "effect/Stream"
import { beforeEach, describe, expect } from "vitest"
import type { DbOptions } from "../src/DbOptions.js"
import { testDatabase } from "./support/database.js"
import type { Wired } from "./support/wired.js"
import { errorOf, executes, forkUntil, one, reasonOf, run, startups, wired } from "./support/wired.js"
import { barrier, untilStats } from "./support/until.js"
import { committed } from "./support/programs.js"

// FAULTS.md: statements and transactions that fail on a connection that lives. Numbers are those of that list.
const database = testDatabase()

beforeEach(async () => {
  await Effect.runPromise(
    database.query(
      `DROP TABLE IF EXISTS t, late;
       CREATE TABLE t (id int PRIMARY KEY, n int DEFAULT 0);
       CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)`
    )
  )
})

const ids = committed(database)
const insert = (id: number) => run(`INSERT INTO t VALUES (${id})`)

/** The server refused it, and the connection is as good as before. */
const recovers = (at: Wired) =>
  Effect.gen(function* () {
    expect(yield* run("SELECT 1 AS one")).toEqual([{ one: 1 }])
    expect(startups(at)).toBe(1)
  })

describe("statements", () => {
  const timeouts: ReadonlyArray<readonly [string, string, DbOptions]> = [
    ["StatementTimeoutError", "SELECT pg_sleep(60)", { statementTimeout: 60 }],
    ["LockTimeoutError", "LOCK TABLE t IN ACCESS EXCLUSIVE MODE", { lockTimeout: 60 }],
    ["LockTimeoutError", "LOCK TABLE t IN ACCESS EXCLUSIVE MODE NOWAIT", {}]
  ]
  for (const [tag, text, options] of timeouts) {
    wired(
      database,
      `FAULTS 25: ${text}: ${tag}, rolled back, the connection is used on`,
      { ...options, maxConnections: 2 },
      (at) =>
        DbSession.isolated(
          Effect.gen(function* () {
            yield* run("LOCK TABLE t IN SHARE MODE")
            const block = DbSession.isolated(Effect.zipRight(run("SELECT 'before'"), run(text)))
            expect((yield* reasonOf(block))._tag).toBe(tag)
            yield* DbSession.isolated(run("SELECT 'after'"))
            expect(startups(at)).toBe(2)
          })
        )
    )
  }

  wired(
    database,
    "FAULTS 28: a deadlock is typed for one, and the other goes on; with retry both succeed",
    { maxConnections: 4 },
    () =>
      Effect.gen(function* () {
        yield* database.query("INSERT INTO t VALUES (1), (2)")
        const cross = (first: number, second: number, meet: Effect.Effect<void>, retry: boolean) =>
          withTransaction(
            Effect.gen(function* () {
              yield* run(`UPDATE t SET n = n + 1 WHERE id = ${first}`)
              yield* meet
              yield* run(`UPDATE t SET n = n + 1 WHERE id = ${second}`)
            }),
            { retry }
          )
        const both = (retry: boolean) =>
          Effect.gen(function* () {
            const meet = yield* barrier(2)
            return yield* Effect.all(
              [Effect.either(cross(1, 2, meet, retry)), Effect.either(cross(2, 1, meet, retry))],
              { concurrency: 2 }
            )
          })
        const failed = (yield* both(false)).flatMap((_) => (_._tag === "Left" ? [DbError.reason(_.left)] : []))
        expect(failed.map((_) => _?._tag)).toEqual(["DeadlockError"])
        expect((yield* both(true)).map((_) => _._tag)).toEqual(["Right", "Right"])
        expect(yield* database.query("SELECT id, n FROM t ORDER BY id")).toEqual([
          { id: 1, n: 3 },
          { id: 2, n: 3 }
        ])
      })
  )

  wired(
    database,
    "FAULTS 28: write skew fails serializable, typed and retryable, wherever it is noticed",
    { maxConnections: 2 },
    () =>
      Effect.gen(function* () {
        yield* database.query("INSERT INTO t VALUES (1), (2)")
        const meet = yield* barrier(2)
        const skew = (id: number) =>
          DbSession.isolated(
            Effect.gen(function* () {
              yield* run("SELECT sum(n) FROM t")
              yield* meet
              yield* run(`UPDATE t SET n = 1 WHERE id = ${id}`)
            }),
            { isolation: "serializable" }
          )
        const exits = yield* Effect.all([Effect.either(skew(1)), Effect.either(skew(2))], { concurrency: 2 })
        const failed = exits.flatMap((_) => (_._tag === "Left" ? [DbError.reason(_.left)] : []))
        expect(failed).toMatchObject([{ _tag: "SerializationError", isRetryable: true }])
      })
  )

  wired(database, "FAULTS 29: what follows a swallowed error reports the first cause", one, (at) =>
    Effect.gen(function* () {
      const work = withTransaction(Effect.zipRight(Effect.ignore(run("SELECT 1/0")), run("SELECT 2")))
      const reason = yield* reasonOf(work)
      expect(reason._tag).toBe("TransactionAborted")
      expect((reason as { firstError?: DbError }).firstError?.reason.sqlState).toBe("22012")
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 30: a value or a row that is too large: typed, rolled back", one, (at) =>
    Effect.gen(function* () {
      expect((yield* reasonOf(withTransaction(run("SELECT repeat('x', 1100000000)")))).sqlState).toBe("54000")
      const columns = Array.from({ length: 1000 }, (_, i) => `c${i} numeric`).join(", ")
      yield* database.query(`DROP TABLE IF EXISTS wide; CREATE TABLE wide (${columns})`)
      const values = Array.from({ length: 1000 }, () => "12345678901234567890").join(", ")
      expect((yield* reasonOf(run(`INSERT INTO wide VALUES (${values})`))).sqlState).toBe("54000")
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 32: several statements in one text run as one", one, (at) =>
    Effect.gen(function* () {
      yield* run("INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)")
      expect((yield* reasonOf(run("INSERT INTO t VALUES (3); INSERT INTO t VALUES (1)")))._tag).toBe("UniqueViolation")
      expect(yield* ids).toEqual([1, 2])
      expect((yield* reasonOf(withTransaction(run("INSERT INTO t VALUES (4); SELECT 1/0")))).sqlState).toBe("22012")
      expect(yield* ids).toEqual([1, 2])
      yield* recovers(at)
    })
  )

  wired(
    database,
    'FAULTS 32: refused with multipleStatements: "forbid", nothing half done',
    { ...one, multipleStatements: "forbid" },
    (at) =>
      Effect.gen(function* () {
        const text = "INSERT INTO t VALUES (1); INSERT INTO t VALUES (2)"
        expect((yield* reasonOf(run(text)))._tag).toBe("SqlSyntaxError")
        expect((yield* reasonOf(withTransaction(run(text))))._tag).toBe("SqlSyntaxError")
        yield* run("SELECT 'a;b' AS x;")
        expect(yield* ids).toEqual([])
        yield* recovers(at)
      })
  )

  wired(database, "FAULTS 33: a stream that is abandoned leaves no cursor open", one, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const rows = sql`SELECT generate_series(1, 10000) AS i`.stream
      const cursors = run("SELECT count(*)::int AS n FROM pg_cursors WHERE name <> ''")
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          expect((yield* Stream.runCollect(Stream.take(rows, 3))).length).toBe(3)
          expect(yield* cursors).toEqual([{ n: 0 }])
        })
      )
      yield* Stream.runCollect(Stream.take(rows, 3))
      yield* untilStats("given back", (_) => _.used === 0)
      yield* recovers(at)
    })
  )
})

describe("transactions", () => {
  wired(database, "FAULTS 36: an error that was swallowed: TransactionAborted, nothing is kept", one, (at) =>
    Effect.gen(function* () {
      const work = insert(1).pipe(Effect.zipRight(Effect.ignore(run("SELECT 1/0"))))
      for (const block of [withTransaction(work), DbSession.autocommit(work)]) {
        const reason = yield* reasonOf(block)
        expect(reason._tag).toBe("TransactionAborted")
        expect((reason as { statement?: string }).statement).toBe("SELECT ?/?")
      }
      expect(yield* ids).toEqual([])
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 37: a deferred constraint at COMMIT is that constraint's error", one, (at) =>
    Effect.gen(function* () {
      const twice = Effect.zipRight(run("INSERT INTO late VALUES (1)"), run("INSERT INTO late VALUES (1)"))
      for (const block of [withTransaction(twice), DbSession.autocommit(twice)]) {
        expect(yield* reasonOf(block)).toMatchObject({
          _tag: "UniqueViolation",
          constraint: "late_id_key",
          table: "late"
        })
      }
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 37: so is one that fails at the Sync of an implicit statement or of a batch", one, (at) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const text = "INSERT INTO late VALUES (1), (1)"
      expect(yield* reasonOf(run(text))).toMatchObject({ _tag: "UniqueViolation", constraint: "late_id_key" })
      const batch = DbSession.batch([sql`INSERT INTO t VALUES (1)`, sql.unsafe(text)])
      expect((yield* reasonOf(batch))._tag).toBe("UniqueViolation")
      expect(yield* ids).toEqual([])
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 44: a defect in the body or in a finalizer rolls back and is kept", one, (at) =>
    Effect.gen(function* () {
      const bodies = [Effect.zipRight(insert(1), Effect.die("boom")), Effect.ensuring(insert(2), Effect.die("boom"))]
      for (const body of bodies) {
        const exit = yield* Effect.exit(withTransaction(body))
        expect(Exit.isFailure(exit) && String(exit.cause)).toContain("boom")
      }
      expect(yield* ids).toEqual([])
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 44: a hook that dies after COMMIT undoes nothing", one, (at) =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(Effect.zipRight(insert(1), DbSession.afterCommit(Effect.die("boom"))))
      expect(yield* ids).toEqual([1])
      yield* recovers(at)
    })
  )

  wired(database, "FAULTS 45: of concurrent siblings' blocks one fails, the others are kept", one, (at) =>
    Effect.gen(function* () {
      const sibling = (id: number) =>
        Effect.either(withTransaction(Effect.zipRight(insert(id), id % 2 === 0 ? Effect.fail("no") : Effect.void)))
      yield* DbSession.autocommit(Effect.all([1, 2, 3, 4, 5].map(sibling), { concurrency: "unbounded" }))
      expect(yield* ids).toEqual([1, 3, 5])
      yield* recovers(at)
    })
  )

  for (const text of ["COMMIT", "ROLLBACK"]) {
    wired(
      database,
      `FAULTS 47: a ${text} in the user's SQL is noticed, typed, and the connection destroyed`,
      one,
      (at) =>
        Effect.gen(function* () {
          const work = withTransaction(
            insert(1).pipe(Effect.zipRight(Effect.ignore(run(text))), Effect.zipRight(insert(2)))
          )
          expect((yield* reasonOf(work))._tag).toBe("TransactionAborted")
          expect(yield* ids).toEqual(text === "COMMIT" ? [1] : [])
          yield* run("SELECT 1")
          expect(startups(at)).toBe(2)
        })
    )
  }

  const left: ReadonlyArray<readonly [text: string, kept: ReadonlyArray<number>]> = [
    ["INSERT INTO t VALUES (10); COMMIT; INSERT INTO t VALUES (11)", [1, 10, 11]],
    ["COMMIT AND CHAIN", [1]],
    ["ROLLBACK AND CHAIN", []],
    ["ROLLBACK; BEGIN", []],
    ["INSERT INTO t VALUES (10); COMMIT; INSERT INTO t VALUES (11); COMMIT; INSERT INTO t VALUES (1)", [1, 10, 11]],
    ["SAVEPOINT s; ROLLBACK TO s; ROLLBACK; BEGIN; SELECT 'rollback to'", []]
  ]
  for (const [text, kept] of left) {
    wired(database, `FAULTS 47: so is ${text}`, one, (at) =>
      Effect.gen(function* () {
        const work = withTransaction(
          insert(1).pipe(Effect.zipRight(Effect.ignore(run(text))), Effect.zipRight(insert(2)))
        )
        const reason = yield* reasonOf(work)
        expect(reason._tag).toBe("TransactionAborted")
        expect(reason.message).toContain("behind its back")
        expect(yield* ids).toEqual(kept)
        yield* run("SELECT 1")
        expect(startups(at)).toBe(2)
      })
    )
  }

  for (const text of ["COMMIT", "END", "COMMIT AND CHAIN", "PREPARE TRANSACTION 'x'"]) {
    wired(database, `FAULTS 47: so is a ${text} that fails: the next statement does not commit by itself`, one, (at) =>
      Effect.gen(function* () {
        const work = withTransaction(
          run("INSERT INTO late VALUES (1), (1)").pipe(
            Effect.zipRight(Effect.ignore(run(text))),
            Effect.zipRight(Effect.ignore(insert(2)))
          )
        )
        const reason = yield* reasonOf(work)
        expect(reason._tag).toBe("TransactionAborted")
        expect(reason.message).toContain("behind its back")
        expect(yield* ids).toEqual([])
        yield* run("SELECT 1")
        expect(startups(at)).toBe(2)
      })
    )
  }

  const endsNothing: ReadonlyArray<readonly [string, ReadonlyArray<number>]> = [
    ["ROLLBACK TO SAVEPOINT s", [2]],
    ["rollback work to s", [2]],
    ["SAVEPOINT r; ROLLBACK TO r; ROLLBACK TRANSACTION TO s", [2]],
    ["PREPARE one AS SELECT 'COMMIT'", [1, 2]],
    ["BEGIN", [1, 2]]
  ]
  for (const [text, kept] of endsNothing) {
    wired(database, `FAULTS 47: ${text} ends nothing`, one, () =>
      Effect.gen(function* () {
        yield* withTransaction(
          Effect.all([run("SAVEPOINT s"), insert(1), run(text), insert(2)]).pipe(
            Effect.ensuring(Effect.ignore(run("DEALLOCATE ALL")))
          )
        )
        expect(yield* ids).toEqual(kept)
      })
    )
  }

  wired(database, "FAULTS 47: PREPARE as the first statement of a transaction ends nothing", one, () =>
    Effect.gen(function* () {
      yield* withTransaction(Effect.all([run("PREPARE first AS SELECT 1"), insert(1), run("DEALLOCATE first")]))
      expect(yield* ids).toEqual([1])
    })
  )

  for (const [text, kept] of [
    ["COMMIT", [1]],
    ["ROLLBACK", []]
  ] as const) {
    const raw = Effect.flatMap(DbConnection.raw, (client) => Effect.promise(() => client.query(text)))
    const raws: ReadonlyArray<readonly [string, Effect.Effect<unknown, unknown, DbEngine>]> = [
      ["before a statement", Effect.zipRight(raw, Effect.ignore(insert(2)))],
      ["before the end", raw],
      ["before the end of a block inside", withTransaction(Effect.zipRight(insert(3), raw))],
      ["before a block that fails", Effect.zipRight(raw, Effect.ignore(withTransaction(Effect.fail("no"))))]
    ]
    for (const [where, then] of raws) {
      wired(database, `FAULTS 47: so is a ${text} of the pg client ${where}`, one, (at) =>
        Effect.gen(function* () {
          const reason = yield* reasonOf(DbSession.autocommit(Effect.zipRight(insert(1), then)))
          expect(reason._tag).toBe("TransactionAborted")
          expect(reason.message).toContain("behind its back")
          expect((yield* ids).filter((_) => _ !== 3)).toEqual(kept)
          yield* run("SELECT 1")
          expect(startups(at)).toBe(2)
        })
      )
    }
  }

  wired(database, "FAULTS 47: after it a session can go on, on another connection", one, (at) =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const client = yield* DbConnection.raw
          yield* Effect.promise(() => client.query("ROLLBACK"))
          expect((yield* reasonOf(DbSession.commit))._tag).toBe("TransactionAborted")
          yield* insert(2)
        })
      )
      expect(yield* ids).toEqual([2])
      expect(startups(at)).toBe(2)
    })
  )

  wired(
    database,
    "FAULTS 48: a daemon that outlives its session is refused, typed, and never runs elsewhere",
    one,
    (at) =>
      Effect.gen(function* () {
        const go = yield* Deferred.make<void>()
        const daemon = Effect.zipRight(Deferred.await(go), reasonOf(insert(48)))
        const fiber = yield* DbSession.autocommit(Effect.zipRight(insert(1), Effect.forkDaemon(daemon)))
        const block = yield* withTransaction(Effect.zipRight(insert(2), Effect.forkDaemon(daemon)))
        const held = yield* DbConnection.withConnection(Effect.zipRight(insert(3), Effect.forkDaemon(daemon)))
        yield* Deferred.succeed(go, undefined)
        const tags = yield* Effect.forEach([fiber, block, held], (_) =>
          Effect.map(Fiber.join(_), (reason) => reason._tag)
        )
        expect(tags).toEqual(["SessionClosed", "SessionClosed", "ConnectionReleased"])
        expect(yield* ids).toEqual([1, 2, 3])
        yield* recovers(at)
      })
  )

  wired(database, "what fails in a block that has ended already is the first cause of what fails after it", one, (at) =>
    Effect.gen(function* () {
      const work = DbSession.autocommit(
        Effect.gen(function* () {
          const slow = "SELECT 1 / (SELECT count(*) FROM pg_sleep(0.2) WHERE false)"
          const daemon = yield* withTransaction(
            Effect.zipRight(insert(1), forkUntil(at, executes(/pg_sleep/), run(slow)))
          )
          yield* Effect.ignore(Fiber.join(daemon))
          yield* run("SELECT 'after'")
        })
      )
      const reason = yield* reasonOf(work)
      expect(reason._tag).toBe("TransactionAborted")
      expect((reason as { firstError?: DbError }).firstError?.reason.sqlState).toBe("22012")
      expect(yield* ids).toEqual([])
      yield* recovers(at)
    })
  )

  wired(
    database,
    "FAULTS 26: a session interrupted while its siblings' statements run leaves nothing behind",
    one,
    (at) =>
      Effect.gen(function* () {
        const first = yield* Deferred.make<void>()
        const work = DbSession.autocommit(
          Effect.all(
            [
              Effect.zipRight(insert(1), Deferred.succeed(first, undefined)),
              run("SELECT pg_sleep(60)"),
              insert(2),
              run("SELECT pg_sleep(60), 'last'")
            ],
            { concurrency: 4 }
          )
        )
        const fiber = yield* forkUntil(at, executes(/'last'/), work)
        // Its answer is here: the second one runs.
        yield* Deferred.await(first)
        yield* Fiber.interrupt(fiber)
        expect(yield* ids).toEqual([])
        yield* recovers(at)
      })
  )

  wired(database, "an error names the statement, without its values", one, () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* insert(1)
      const error = yield* errorOf(sql`INSERT INTO t (id, n) VALUES (${1}, ${987654})`)
      expect(error.reason).toMatchObject({ _tag: "UniqueViolation", constraint: "t_pkey", table: "t" })
      expect(JSON.stringify(error) + String(error)).not.toContain("987654")
    })
  )
})
