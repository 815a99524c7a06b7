import { describe, it } from "@effect/vitest"
import type { SqlError } from "@effect/sql/SqlError"
import type * as Statement from "@effect/sql/Statement"
import { BigDecimal, Chunk, DateTime, Deferred, Effect, Fiber, Option, Redacted, Stream } from "effect"
import { DbConnection, DbEngine, DbError, DbQuery, DbSession, withTransaction } from "effect-db"
import type { DbSql } from "effect-db"
import { expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { type Lock, lockedOutside } from "./support/outside.js"
import {
  committed,
  insert,
  onDatabase,
  outcome,
  pid,
  programsOn,
  proxiedOn,
  reason,
  seen,
  sessionForms,
  used
} from "./support/programs.js"
import { latch, open, soon, took, until } from "./support/until.js"
import { one, reasonOf, sent, wired } from "./support/wired.js"
import { collected } from "./support/observed.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

const client = Effect.map(DbEngine, ({ sql }) => sql)

/** The whole numbers from 1 on, as a stream of rows. */
const numbers = (n: number) =>
  Stream.unwrap(Effect.map(client, (sql) => sql<{ n: number }>`SELECT n FROM generate_series(1, ${n}::int) n`.stream))

const collect = <A, E, R>(stream: Stream.Stream<A, E, R>) =>
  Effect.map(Stream.runCollect(stream), Chunk.toReadonlyArray)

const upTo = (n: number) => Array.from({ length: n }, (_, i) => ({ n: i + 1 }))

/** Cursors that are open in the transaction of the fiber. */
const openCursors = Effect.flatMap(client, (sql) =>
  Effect.map(
    sql<{ n: number }>`SELECT count(*)::int AS n FROM pg_cursors WHERE name LIKE 'effect_db%'`,
    (rows) => rows[0]!.n
  )
)

describe("41 stream", () => {
  for (const n of [0, 1, 19, 20, 21, 519, 520, 521, 1700]) {
    test(`gives all of ${n} rows, in order`, () =>
      Effect.map(collect(numbers(n)), (rows) => expect(rows).toEqual(upTo(n))))
  }

  test("without a transaction opens its own for its scope, on one connection", () =>
    Effect.gen(function* () {
      const rows = yield* Stream.runFold(
        Stream.mapEffect(Stream.take(numbers(1200), 600), () => used),
        new Set<number>(),
        (all, used) => all.add(used)
      )
      expect([...rows]).toEqual([1])
      expect(yield* used).toBe(0)
    }))

  test("in a session reads what the session has written, in its transaction", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          yield* insert(2)
          const sql = yield* client
          expect(yield* collect(sql<{ id: number }>`SELECT id FROM t ORDER BY id`.stream)).toEqual([
            { id: 1 },
            { id: 2 }
          ])
          expect(yield* used).toBe(1)
          yield* DbSession.rollback
        })
      )
      expect(yield* committed(database)).toEqual([])
    }))

  for (const [name, around] of [
    ["a session", <A, E, R>(effect: Effect.Effect<A, E, R>) => DbSession.autocommit(effect)],
    ["a transaction", <A, E, R>(effect: Effect.Effect<A, E, R>) => withTransaction(effect)]
  ] as const) {
    test(
      `in ${name}: statements inside the loop run, for 1 500 rows`,
      () =>
        Effect.gen(function* () {
          yield* around(Stream.runForEach(numbers(1500), ({ n }) => insert(n)))
          expect((yield* committed(database)).length).toBe(1500)
        }),
      { maxConnections: 1 }
    )
  }

  test("in a session: a nested block for each row keeps the good and undoes the bad", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Stream.runForEach(numbers(600), ({ n }) =>
          Effect.ignore(withTransaction(Effect.zipRight(insert(n), n % 2 === 0 ? Effect.fail("even") : Effect.void)))
        )
      )
      expect(yield* committed(database)).toEqual(upTo(600).flatMap(({ n }) => (n % 2 === 0 ? [] : [n])))
    }))

  test("left half-way: the cursor is closed and the session goes on", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        expect(yield* collect(Stream.take(numbers(2000), 3))).toEqual(upTo(3))
        expect(yield* openCursors).toBe(0)
        yield* insert(1)
      })
    ).pipe(Effect.zipRight(Effect.map(committed(database), (ids) => expect(ids).toEqual([1])))))

  test(
    "left half-way without a transaction: the connection is usable",
    () =>
      Effect.gen(function* () {
        expect(yield* collect(Stream.take(numbers(2000), 3))).toEqual(upTo(3))
        expect(yield* used).toBe(0)
        yield* insert(1)
      }),
    { maxConnections: 1 }
  )

  test("of several statements in one text runs all of them", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* collect(sql.unsafe("SELECT 1 AS n; INSERT INTO t (id) VALUES (1); INSERT INTO t (id) VALUES (2);").stream)
      expect(yield* committed(database)).toEqual([1, 2])
      expect(yield* collect(sql.unsafe("SELECT id FROM t ORDER BY id; -- no other").stream)).toEqual([
        { id: 1 },
        { id: 2 }
      ])
    }))

  test("of a query that makes a table of its rows makes it", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect(yield* collect(sql`SELECT 7 AS id INTO made`.stream)).toEqual([])
      expect(yield* database.query("SELECT id FROM made")).toEqual([{ id: 7 }])
      yield* database.query("DROP TABLE made")
    }))

  /** Its second FETCH waits for a lock. */
  const slow = (rows = "n") =>
    Stream.unwrap(
      Effect.map(
        client,
        (sql) =>
          sql.unsafe<{ n: number }>(
            `SELECT ${rows} AS n FROM generate_series(1, 1000) n WHERE n <> 100 OR pg_advisory_xact_lock(1) IS NOT NULL`
          ).stream
      )
    )

  /** The third row comes when it does. */
  const slowBehind = (lock: Lock, reached: Effect.Effect<unknown> = Effect.void, rows?: string) =>
    Stream.tap(slow(rows), ({ n }) => (n === 3 ? Effect.zipRight(lock.waitedFor, reached) : Effect.void))

  test("left while the next rows are still being computed: the session's transaction is unharmed", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 1)
        const reached = yield* latch
        const left = yield* Effect.fork(collect(Stream.take(slowBehind(lock, open(reached)), 3)))
        yield* Deferred.await(reached)
        yield* lock.release
        expect(yield* Fiber.join(left)).toEqual(upTo(3))
        yield* insert(1)
      })
    ).pipe(Effect.zipRight(Effect.map(committed(database), (ids) => expect(ids).toEqual([1])))))

  test(
    "left while they are being computed for longer than settleTimeout: the query is cancelled",
    () =>
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 1)
        const leaving = DbSession.autocommit(collect(Stream.take(slowBehind(lock), 3)))
        expect(yield* reason(leaving)).toBe("TransactionAborted")
      }),
    { settleTimeout: 300 }
  )

  test("left while they are being computed, without a session: the query is cancelled at once", () =>
    Effect.gen(function* () {
      const lock = yield* lockedOutside(database, 1)
      expect(yield* took(collect(Stream.take(slowBehind(lock), 3)))).toBeLessThan(soon)
      expect(yield* used).toBe(0)
    }))

  test("but one that has written is waited for, and what it has done is committed", () =>
    Effect.gen(function* () {
      yield* database.query(
        "CREATE OR REPLACE FUNCTION put(int) RETURNS int LANGUAGE sql AS 'INSERT INTO t (id) VALUES ($1) RETURNING id'"
      )
      const lock = yield* lockedOutside(database, 1)
      const reached = yield* latch
      const left = yield* Effect.fork(collect(Stream.take(slowBehind(lock, open(reached), "put(n)"), 3)))
      yield* Deferred.await(reached)
      yield* lock.release
      yield* Fiber.join(left)
      expect((yield* committed(database)).slice(0, 20)).toEqual(upTo(20).map(({ n }) => n))
    }))

  const lost = { settleTimeout: 200, connectTimeout: 500, ...one }
  wired(database, "left when no rows are on their way: nobody waits for its CLOSE, which rides along", one, (at) =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        expect((yield* collect(Stream.take(numbers(30), 25))).length).toBe(25)
        at.proxy.reset()
        yield* sql`SELECT 1`
        expect(sent(at).filter((_) => /^E (?:CLOSE|SELECT)/.test(_))).toEqual([
          expect.stringMatching(/^E CLOSE effect_db_cursor_\d+$/),
          "E SELECT 1"
        ])
        expect(at.proxy.flights()).toBe(1)
      })
    )
  )

  for (const [when, rows] of [
    ["while rows are on their way", 2000],
    ["when no rows are on their way", 30]
  ] as const) {
    wired(database, `left in a session ${when}, and the network swallows everything: it is over in time`, lost, (at) =>
      Effect.gen(function* () {
        const some = Stream.take(numbers(rows), 25).pipe(
          Stream.tap(({ n }) => (n === 25 ? Effect.sync(() => at.proxy.pause()) : Effect.void))
        )
        const work = reasonOf(DbSession.autocommit(Stream.runDrain(some)))
        expect(yield* took(work)).toBeLessThan(soon)
      })
    )
  }

  test("a consumer that fails leaves the session's transaction unharmed", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const failed = Stream.runForEach(numbers(2000), ({ n }) => (n === 3 ? Effect.fail("enough") : Effect.void))
        expect(yield* Effect.flip(failed)).toBe("enough")
        expect(yield* openCursors).toBe(0)
        yield* insert(1)
      })
    ).pipe(Effect.zipRight(Effect.map(committed(database), (ids) => expect(ids).toEqual([1])))))

  test(
    "interrupted half-way gives everything back",
    () =>
      Effect.gen(function* () {
        const third = yield* Deferred.make<void>()
        const reading = yield* Effect.fork(
          Stream.runForEach(numbers(2000), ({ n }) =>
            n === 3 ? Effect.zipRight(Deferred.succeed(third, undefined), Effect.never) : Effect.void
          )
        )
        yield* Deferred.await(third)
        yield* Fiber.interrupt(reading)
        expect(yield* used).toBe(0)
        yield* insert(1)
      }),
    { maxConnections: 1 }
  )

  test("interrupted while the server computes stops the server", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const reading = yield* Effect.fork(Stream.runDrain(sql`SELECT pg_sleep(60)`.stream))
      yield* untilActivity(database.url, ({ active }) => active === 1)
      yield* Fiber.interrupt(reading)
      yield* untilActivity(database.url, ({ active }) => active === 0)
    }))

  test("a query that the server refuses fails the stream with its reason", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect(yield* reason(Stream.runDrain(sql`SELECT * FROM nowhere`.stream))).toBe("SqlSyntaxError")
      expect(yield* reason(Stream.runDrain(sql`SELECT 1 / (1000 - n) FROM generate_series(1, 2000) n`.stream))).toBe(
        "UnknownError"
      )
    }))

  /** Streams a query that has written: a row whose parent does not exist, which the server finds out at COMMIT. */
  const writing = (parent: number) =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* sql`ALTER TABLE t ADD parent int REFERENCES t DEFERRABLE INITIALLY DEFERRED`
      yield* sql.unsafe(
        "CREATE OR REPLACE FUNCTION adds(int, int) RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES ($1, NULL, $2) RETURNING id'"
      )
      return sql<{ n: number }>`SELECT adds(n, ${parent}::int) AS n FROM generate_series(1, 3) n`.stream
    })

  test("without a session commits when it has been read to its end", () =>
    Effect.gen(function* () {
      expect(yield* collect(yield* writing(1))).toEqual(upTo(3))
      expect(yield* committed(database)).toEqual([1, 2, 3])
    }))

  test("without a session fails with what its COMMIT fails with", () =>
    Effect.gen(function* () {
      expect(yield* reason(Stream.runDrain(yield* writing(99)))).toBe("ForeignKeyViolation")
      expect(yield* used).toBe(0)
      expect(yield* committed(database)).toEqual([])
    }))

  test("without a session fails when its backend is killed before COMMIT", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const own = sql<{ pid: number }>`SELECT pg_backend_pid() AS pid`.stream
      const killed = Stream.tap(own, ({ pid }) => database.query("SELECT pg_terminate_backend($1, 5000)", [pid]))
      expect(["ConnectionError", "CommitUnknown"]).toContain(yield* reason(Stream.runDrain(killed)))
      expect(yield* used).toBe(0)
    }))

  test("without a session, left half-way with success, commits what the query has written", () =>
    Effect.gen(function* () {
      expect(yield* Stream.runHead(yield* writing(1))).toEqual(Option.some({ n: 1 }))
      expect(yield* committed(database)).toEqual([1, 2, 3])
    }))

  test("without a session, left half-way: a COMMIT that fails is logged", () =>
    Effect.gen(function* () {
      const [lines, logger] = collected()
      yield* Effect.provide(Stream.runHead(yield* writing(99)), logger)
      expect(lines).toMatchObject([
        {
          message: expect.stringContaining("left before its end, and what it did is not committed"),
          cause: expect.stringContaining("refer")
        }
      ])
      expect(yield* used).toBe(0)
      expect(yield* committed(database)).toEqual([])
    }))

  test("outlives no commit: what is read after it is TransactionClosed, and the new transaction is unharmed", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const committing = Stream.runForEach(numbers(2000), ({ n }) => (n === 1 ? DbSession.commit : Effect.void))
          expect(yield* reason(committing)).toBe("TransactionClosed")
          yield* insert(1)
        })
      )
      expect(yield* committed(database)).toEqual([1])
    }))

  test("left half-way after a commit: the new transaction is unharmed", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* Stream.runDrain(Stream.tap(Stream.take(numbers(2000), 1), () => DbSession.commit))
          yield* insert(1)
        })
      )
      expect(yield* committed(database)).toEqual([1])
    }))

  test("two streams of one session are read side by side", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const pairs = yield* collect(Stream.zip(numbers(1100), numbers(1100)))
        expect(pairs.length).toBe(1100)
        expect(pairs.every(([a, b]) => a.n === b.n)).toBe(true)
        expect(yield* used).toBe(1)
      })
    ))

  for (const [name, around] of [
    ["in a session", <A, E, R>(effect: Effect.Effect<A, E, R>) => DbSession.autocommit(effect)],
    ["each in a transaction of its own", <A, E, R>(effect: Effect.Effect<A, E, R>) => effect]
  ] as const) {
    test(`one stream that is read twice at once gives all of its rows to both, ${name}`, () =>
      Effect.gen(function* () {
        const sql = yield* client
        const rows = sql<{ n: number }>`SELECT n FROM generate_series(1, 1200) n`.stream
        const both = yield* around(Effect.all([collect(rows), collect(rows)], { concurrency: 2 }))
        expect(both).toEqual([upTo(1200), upTo(1200)])
      }))
  }

  test("a pull that is interrupted while rows are on their way loses none of them", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 1)
        const pull = yield* Stream.toPull(slow())
        expect((yield* pull).length).toBe(20)
        const pulling = yield* Effect.fork(pull)
        yield* lock.waitedFor
        yield* Fiber.interrupt(pulling)
        yield* lock.release
        const next = yield* pull
        expect(Chunk.toReadonlyArray(next)[0]).toEqual({ n: 21 })
      })
    ))

  test("INSERT ... RETURNING can be streamed, also inside of WITH", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect(
        yield* collect(sql`INSERT INTO t (id) SELECT n FROM generate_series(1, 3) n RETURNING id AS n`.stream)
      ).toEqual(upTo(3))
      expect(
        yield* collect(sql`WITH gone AS (DELETE FROM t RETURNING id) SELECT id AS n FROM gone ORDER BY id`.stream)
      ).toEqual(upTo(3))
      expect(yield* committed(database)).toEqual([])
    }))

  test("WITH of a query has a cursor", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const sql = yield* client
        const stream = sql<{ n: number }>`WITH s AS (SELECT n FROM generate_series(1, 800) n) SELECT n FROM s`.stream
        const cursors = yield* Stream.runHead(Stream.mapEffect(stream, () => openCursors))
        expect(cursors).toEqual(Option.some(1))
      })
    ))

  const queries = {
    "with a comment before it": "/* report */ SELECT generate_series(1, 800) AS n",
    "with a line of comment before it": "-- report\nSELECT generate_series(1, 800) AS n",
    "in parentheses": "(SELECT generate_series(1, 800) AS n)",
    "in parentheses, with a comment and WITH in them":
      "( /* report */ WITH s AS (SELECT generate_series(1, 800) AS n) SELECT n FROM s)",
    "WITH, and the word of a command as a value":
      "WITH s AS (SELECT generate_series(1, 800) AS n, 'delete') SELECT n FROM s"
  }
  for (const [name, text] of Object.entries(queries)) {
    test(`a query ${name} has a cursor`, () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          const { stream } = (yield* client).unsafe<{ n: number }>(text)
          expect(yield* Stream.runHead(Stream.mapEffect(stream, () => openCursors))).toEqual(Option.some(1))
          expect(yield* collect(stream)).toEqual(upTo(800))
        })
      ))
  }

  const changes = {
    "with a comment before it": "/* SELECT */ INSERT INTO t (id) SELECT generate_series(1, 3) RETURNING id AS n",
    "in WITH, behind a comment":
      "-- report\nWITH made AS (INSERT INTO t (id) SELECT generate_series(1, 3) RETURNING id) SELECT id AS n FROM made"
  }
  for (const [name, text] of Object.entries(changes)) {
    test(`a change ${name} has none, and is streamed`, () =>
      Effect.gen(function* () {
        expect(yield* collect((yield* client).unsafe<{ n: number }>(text).stream)).toEqual(upTo(3))
        expect(yield* committed(database)).toEqual(upTo(3).map(({ n }) => n))
      }))
  }

  test("of an ambient connection runs there", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const sql = yield* client
        const own = yield* pid
        expect(yield* collect(sql`SELECT pg_backend_pid() AS pid`.stream)).toEqual([{ pid: own }])
        expect(yield* used).toBe(1)
      })
    ))

  test("of an orphan's effect runs on the orphan", () =>
    DbConnection.withConnection(
      DbConnection.withConnection(
        Effect.gen(function* () {
          const sql = yield* client
          const own = yield* pid
          expect(yield* collect(sql`SELECT pg_backend_pid() AS pid`.stream)).toEqual([{ pid: own }])
          expect(yield* used).toBe(2)
        }),
        { reuse: false, reusable: false }
      )
    ))

  test("of connection.sql runs on that connection, whatever is on top of the stack", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const a = yield* DbConnection.acquire()
        yield* DbConnection.acquire()
        expect(yield* collect(a.sql`SELECT pg_backend_pid() AS pid`.stream)).toEqual([{ pid: yield* a.pid }])
        yield* a.release()
        expect(yield* reason(Stream.runDrain(a.sql`SELECT 1`.stream))).toBe("ConnectionReleased")
      })
    ))

  test("of connection.sql runs in the session that is on that connection", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const a = yield* DbConnection.acquire()
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* collect(a.sql`SELECT id AS n FROM t`.stream)).toEqual(upTo(1))
          })
        )
      })
    ))

  test("of a reserved connection runs on it", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const sql = yield* client
        const reserved = yield* sql.reserve
        const [[own]] = (yield* reserved.executeValues("SELECT pg_backend_pid()", [])) as [[number]]
        const rows = yield* collect(reserved.executeStream("SELECT pg_backend_pid() AS pid", [], undefined))
        expect(rows).toEqual([{ pid: own }])
      })
    ))

  test("of a session handle runs in that session, from wherever it is read", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const handle = yield* DbSession.make()
        yield* handle.sql`INSERT INTO t (id) VALUES (1)`
        expect(yield* collect(handle.sql`SELECT id AS n FROM t`.stream)).toEqual(upTo(1))
        expect(yield* collect((yield* client)`SELECT id AS n FROM t`.stream)).toEqual([])
        yield* handle.close
        expect(yield* reason(Stream.runDrain(handle.sql`SELECT 1`.stream))).toBe("SessionClosed")
      })
    ))

  test("of a fiber that outlives its connection is ConnectionReleased", () =>
    Effect.gen(function* () {
      const over = yield* Deferred.make<void>()
      const daemon = yield* DbConnection.withConnection(
        Effect.forkDaemon(Effect.zipRight(Deferred.await(over), Effect.exit(Stream.runDrain(numbers(1)))))
      )
      yield* Deferred.succeed(over, undefined)
      expect(outcome(yield* Fiber.join(daemon))).toBe("ConnectionReleased")
    }))

  test(
    "with neither session nor connection is NoSession when implicit execution is forbidden",
    () =>
      Effect.gen(function* () {
        expect(yield* reason(Stream.runDrain(numbers(1)))).toBe("NoSession")
        expect(yield* DbSession.autocommit(collect(numbers(2)))).toEqual(upTo(2))
      }),
    { implicitExecution: "forbid" }
  )

  test(
    "a statement of the same connection without a session waits for it, for no longer than blockTimeout",
    () =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          const error = yield* Effect.flip(Stream.runForEach(numbers(2000), ({ n }) => insert(n)))
          const why = DbError.reason(error)
          expect(why?._tag).toBe("SessionBusy")
          expect(why?.message).toContain("stream")
        })
      ),
    { blockTimeout: "100 millis" }
  )

  test(
    "gives the names that the client's transform makes",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        expect(yield* collect(sql`SELECT 1 AS some_name`.stream)).toEqual([{ someName: 1 }])
      }),
    { transformResultNames: (name) => name.replace(/_(.)/g, (_, c: string) => c.toUpperCase()) }
  )
})

describe("42 DbQuery", () => {
  const of = (n: number) =>
    Effect.map(client, (sql) => sql<{ n: number | null }>`SELECT n FROM generate_series(1, ${n}::int) n`)
  const nullRow = Effect.map(client, (sql) => sql<{ n: number | null }>`SELECT NULL::int AS n`)
  const expected: ReadonlyArray<
    readonly [
      name: string,
      query: (statement: Statement.Statement<{ n: number | null }>) => Effect.Effect<unknown, SqlError>,
      results: readonly [none: unknown, one: unknown, two: unknown, nothing: unknown]
    ]
  > = [
    ["one", DbQuery.one, ["NoResultFound", { n: 1 }, "MultipleResultsFound", { n: null }]],
    [
      "oneOrNone",
      DbQuery.oneOrNone,
      [Option.none(), Option.some({ n: 1 }), "MultipleResultsFound", Option.some({ n: null })]
    ],
    ["first", DbQuery.first, [Option.none(), Option.some({ n: 1 }), Option.some({ n: 1 }), Option.some({ n: null })]],
    ["scalar", DbQuery.scalar, [Option.none(), Option.some(1), Option.some(1), Option.none()]]
  ]
  for (const [name, query, results] of expected) {
    for (const [at, [rows, statement]] of (
      [
        ["no row", of(0)],
        ["one row", of(1)],
        ["two rows", of(2)],
        ["a NULL", nullRow]
      ] as const
    ).entries()) {
      const wanted = results[at]
      const shown = typeof wanted === "string" ? wanted : JSON.stringify(wanted)
      test(`${name} of ${rows} is ${shown}`, () =>
        Effect.gen(function* () {
          const result = query(yield* statement)
          expect(yield* typeof wanted === "string" ? reason(result) : result).toEqual(wanted)
        }))
    }
  }

  test("status tells what the statement did", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const inserted = sql`INSERT INTO t (id) SELECT n FROM generate_series(1, 3) n`
      expect(yield* DbQuery.status(inserted)).toEqual({ command: "INSERT", rowCount: 3 })
      expect(yield* DbQuery.status(sql`UPDATE t SET note = 'x' WHERE id > 1`)).toEqual({
        command: "UPDATE",
        rowCount: 2
      })
      expect(yield* DbQuery.status(sql`CREATE TEMP TABLE gone (id int)`)).toEqual({ command: "CREATE", rowCount: null })
      expect(yield* DbQuery.status(sql.unsafe("DELETE FROM t WHERE id = 1; DELETE FROM t"))).toEqual({
        command: "DELETE",
        rowCount: 2
      })
    }))

  test("a failing query keeps its own reason", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const query of [DbQuery.one, DbQuery.oneOrNone, DbQuery.first, DbQuery.scalar, DbQuery.status]) {
        expect(yield* reason<unknown, unknown, never>(query(sql`SELECT * FROM nowhere`))).toBe("SqlSyntaxError")
      }
    }))
})

describe("batch", () => {
  proxied("outside of a session: one round trip, one transaction", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* sql`SELECT 1`
      proxy.reset()
      const result = yield* DbSession.batch([
        sql`INSERT INTO t (id) VALUES (1)`,
        sql<{ id: number }>`SELECT id FROM t`,
        sql<{ xid: string }>`SELECT pg_current_xact_id()::text AS xid`,
        sql<{ xid: string }>`SELECT pg_current_xact_id()::text AS xid`
      ])
      expect(proxy.flights()).toBe(1)
      expect(result[1]).toEqual([{ id: 1 }])
      expect(result[2]).toEqual(result[3])
      expect(yield* committed(database)).toEqual([1])
    })
  )

  proxied("in a session: one round trip, in its transaction", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* sql`SELECT 1`
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          proxy.reset()
          const [, rows] = yield* DbSession.batch([
            sql`INSERT INTO t (id) VALUES (1)`,
            sql<{ id: number }>`SELECT id FROM t`
          ])
          expect(proxy.flights()).toBe(1)
          expect(rows).toEqual([{ id: 1 }])
          yield* DbSession.rollback
        })
      )
      expect(yield* committed(database)).toEqual([])
    })
  )

  test("one that fails undoes all of it, and is the one that is reported", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const failing = DbSession.batch([
        sql`INSERT INTO t (id) VALUES (1)`,
        sql`INSERT INTO t (id) VALUES (1)`,
        sql`SELECT * FROM nowhere`
      ])
      expect(yield* reason(failing)).toBe("UniqueViolation")
      expect(yield* committed(database)).toEqual([])
      expect(yield* reason(DbSession.autocommit(failing))).toBe("UniqueViolation")
      expect(yield* committed(database)).toEqual([])
    }))

  for (const [name, around] of sessionForms) {
    test(`interrupted in ${name}: its statements end, and the session goes on after a rollback`, () =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* around(
          Effect.gen(function* () {
            const fiber = yield* Effect.fork(
              DbSession.batch([
                sql`INSERT INTO t (id) VALUES (1)`,
                sql`SELECT pg_sleep(${60})`,
                sql`INSERT INTO t (id) VALUES (2)`
              ])
            )
            yield* until(
              "the server sleeps",
              Effect.map(
                database.query(
                  `SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()`
                ),
                (_) => _.length > 0
              )
            )
            yield* Fiber.interrupt(fiber)
            yield* DbSession.rollback
            yield* insert(3)
          })
        )
        expect(yield* committed(database)).toEqual([3])
      }))
  }

  test("in a block of its own undoes only itself", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          const failing = DbSession.batch([sql`INSERT INTO t (id) VALUES (2)`, sql`INSERT INTO t (id) VALUES (1)`])
          expect(yield* reason(withTransaction(failing))).toBe("UniqueViolation")
        })
      )
      expect(yield* committed(database)).toEqual([1])
    }))

  test("of nothing is nothing", () =>
    Effect.gen(function* () {
      expect(yield* DbSession.batch([])).toEqual([])
      expect((yield* DbEngine.stats).total).toBe(0)
    }))

  test("on an ambient connection runs there", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const sql = yield* client
        const [[row]] = yield* DbSession.batch([sql<{ pid: number }>`SELECT pg_backend_pid() AS pid`])
        expect(row).toEqual({ pid: yield* pid })
        expect(yield* used).toBe(1)
      })
    ))

  test(
    "without a session is NoSession when implicit execution is forbidden",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        expect(yield* reason(DbSession.batch([sql`SELECT 1`]))).toBe("NoSession")
      }),
    { implicitExecution: "forbid" }
  )

  test("several statements in one text are refused, and nothing of the batch has run", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const batch = DbSession.batch([
        sql`INSERT INTO t (id) VALUES (1)`,
        sql.unsafe("INSERT INTO t (id) VALUES (2); INSERT INTO t (id) VALUES (3)")
      ])
      expect(yield* reason(batch)).toBe("SqlSyntaxError")
      expect(yield* committed(database)).toEqual([])
    }))

  proxied("bad input anywhere in it sends nothing", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* sql`SELECT 1`
      proxy.reset()
      const batch = DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql`SELECT ${"\0"}`])
      expect(yield* reason(batch)).toBe("InvalidInput")
      expect(proxy.flights()).toBe(0)
    })
  )

  test(
    "applies the client's transform to each",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        expect(yield* DbSession.batch([sql`SELECT 1 AS a_b`, sql`SELECT 2 AS c_d`])).toEqual([
          [{ "a-b": 1 }],
          [{ "c-d": 2 }]
        ])
      }),
    { transformResultNames: (name) => name.replaceAll("_", "-") }
  )

  test("interrupted undoes all of it", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const running = yield* Effect.fork(
        DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql`SELECT pg_sleep(60)`])
      )
      yield* untilActivity(database.url, ({ active }) => active === 1)
      yield* Fiber.interrupt(running)
      yield* untilActivity(database.url, ({ active }) => active === 0)
      expect(yield* committed(database)).toEqual([])
    }))
})

describe("several statements in one text", () => {
  test("run without parameters, and give the rows of each", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect(yield* sql.unsafe("INSERT INTO t (id) VALUES (1); SELECT id FROM t; SELECT 2 AS two")).toEqual([
        [],
        [{ id: 1 }],
        [{ two: 2 }]
      ])
    }))

  test("outside of a session are one transaction", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const failing = sql.unsafe("INSERT INTO t (id) VALUES (1); INSERT INTO t (id) VALUES (1)")
      expect(yield* reason(failing)).toBe("UniqueViolation")
      expect(yield* committed(database)).toEqual([])
    }))

  test("in a session are part of its transaction", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* sql.unsafe("INSERT INTO t (id) VALUES (1); INSERT INTO t (id) VALUES (2)")
          expect(yield* seen).toEqual([1, 2])
          yield* DbSession.rollback
        })
      )
      expect(yield* committed(database)).toEqual([])
    }))

  test("with parameters are refused by the server, and the connection is unharmed", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const sql = yield* client
        const before = yield* pid
        expect(yield* reason(sql.unsafe("SELECT $1::int; SELECT 2", [1]))).toBe("SqlSyntaxError")
        expect(yield* pid).toBe(before)
      })
    ))

  test("a semicolon at the end or in a literal is one statement", () =>
    Effect.gen(function* () {
      const sql = yield* client
      expect(yield* sql.unsafe("SELECT 1 AS n; ")).toEqual([{ n: 1 }])
      expect(yield* sql.unsafe("SELECT 'a;b' AS v")).toEqual([{ v: "a;b" }])
    }))

  test(
    'are refused with multipleStatements: "forbid", with nothing run and the connection unharmed',
    () =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          const sql = yield* client
          const before = yield* pid
          expect(yield* reason(sql.unsafe("INSERT INTO t (id) VALUES (1); INSERT INTO t (id) VALUES (2)"))).toBe(
            "SqlSyntaxError"
          )
          expect(yield* committed(database)).toEqual([])
          expect(yield* pid).toBe(before)
          expect(yield* sql.unsafe("SELECT 'a;b' AS v;")).toEqual([{ v: "a;b" }])
        })
      ),
    { multipleStatements: "forbid" }
  )

  test("that hide a COMMIT in a session are found out", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const hidden = DbSession.autocommit(Effect.zipRight(insert(1), sql.unsafe("SELECT 1; COMMIT")))
      expect(yield* reason(hidden)).toBe("TransactionAborted")
    }))
})

describe("COPY", () => {
  for (const [name, around] of [
    ["outside of a session", <A, E>(effect: Effect.Effect<A, E, DbEngine>) => DbConnection.withConnection(effect)],
    ["in a session", <A, E>(effect: Effect.Effect<A, E, DbEngine>) => DbSession.autocommit(withTransaction(effect))]
  ] as const) {
    test(`FROM STDIN as a statement is refused ${name}, with a typed error`, () =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* DbConnection.withConnection(
          Effect.gen(function* () {
            const before = yield* pid
            expect(yield* reason(around(sql.unsafe("COPY t FROM STDIN")))).toBe("InvalidInput")
            expect(yield* pid).toBe(before)
            expect(yield* committed(database)).toEqual([])
          })
        )
      }))
  }

  test("FROM STDIN among several statements is refused, and nothing of them is kept", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const sql = yield* client
        const before = yield* pid
        const copying = sql.unsafe("INSERT INTO t (id) VALUES (1); COPY t FROM STDIN; INSERT INTO t (id) VALUES (2)")
        expect(yield* reason(copying)).toBe("InvalidInput")
        expect(yield* pid).toBe(before)
        expect(yield* committed(database)).toEqual([])
      })
    ))

  test("refused beside statements of other fibers leaves them their own answers", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const sql = yield* client
        const results = yield* Effect.all(
          Array.from({ length: 12 }, (_, n) =>
            n % 3 === 0
              ? Effect.as(reason(sql.unsafe("COPY t FROM STDIN")), "refused")
              : Effect.map(sql<{ n: number }>`SELECT ${n}::int AS n`, (rows) => rows[0]!.n)
          ),
          { concurrency: "unbounded" }
        )
        expect(results).toEqual(Array.from({ length: 12 }, (_, n) => (n % 3 === 0 ? "refused" : n)))
      })
    ))

  test("TO STDOUT leaves the connection usable", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const sql = yield* client
        const before = yield* pid
        yield* insert(1)
        yield* Effect.exit(sql.unsafe("COPY t TO STDOUT"))
        expect(yield* pid).toBe(before)
        expect(yield* seen).toEqual([1])
      })
    ))
})

describe("sql.json", () => {
  const values: ReadonlyArray<unknown> = [
    { a: [1, { b: "c" }] },
    [1, 2],
    [{ a: 1 }, 2, null, "x"],
    [null],
    [[]],
    [],
    "s",
    '{"a":1}',
    "",
    1.5,
    false,
    'it\'s \\ "quoted"'
  ]
  const names = { transformQueryNames: (name: string) => name }
  for (const options of [{}, names]) {
    test(
      `gives the database the JSON that it was given${"transformQueryNames" in options ? ", with names transformed" : ""}`,
      () =>
        Effect.gen(function* () {
          const sql = yield* client
          for (const value of values) {
            expect(yield* sql`SELECT ${sql.json(value)}::jsonb AS v`).toEqual([{ v: value }])
            expect(yield* sql`SELECT ${sql.json(value)}::json AS v`).toEqual([{ v: value }])
          }
          yield* sql`ALTER TABLE t ALTER note TYPE jsonb USING NULL`
          yield* sql`INSERT INTO t ${sql.insert(values.map((value, id) => ({ id, note: sql.json(value) })) as never)}`
          expect(yield* sql`SELECT note FROM t ORDER BY id`).toEqual(values.map((note) => ({ note })))
          yield* sql`UPDATE t SET ${sql.update({ note: sql.json([3]) })} WHERE id = ${0}`
          expect(yield* sql`SELECT note FROM t WHERE id = ${0}`).toEqual([{ note: [3] }])
        }),
      options
    )
  }

  test("takes null for SQL's NULL, as undefined", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const value of [null, undefined]) {
        expect(yield* sql`SELECT ${sql.json(value)}::jsonb IS NULL AS "isNull"`).toEqual([{ isNull: true }])
      }
    }))

  test(
    "transforms the names in it as it does those of columns, but not withoutTransform",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        const statement = sql`SELECT ${sql.json([null, { aB: [{ cD: "eF" }] }])}::text AS v`
        expect(yield* statement).toEqual([{ v: '[null,{"a_b":[{"c_d":"eF"}]}]' }])
        expect(yield* statement.withoutTransform).toEqual([{ v: '[null,{"aB":[{"cD":"eF"}]}]' }])
      }),
    { transformQueryNames: (name) => name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`) }
  )

  test(
    "leaves the names in it alone with transformJson: false",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        expect(yield* sql`SELECT ${sql.json({ aB: 1 })}::text AS v`).toEqual([{ v: '{"aB":1}' }])
      }),
    { transformQueryNames: (name) => name.toLowerCase(), transformJson: false }
  )

  test("of what JSON can't express is InvalidInput before the wire", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const circular: Array<unknown> = []
      circular.push({ circular })
      for (const value of [circular, { n: 1n }, () => 1]) {
        expect(yield* reason(sql`SELECT ${sql.json(value)}::jsonb`)).toBe("InvalidInput")
      }
    }))
})

describe("a value of Effect's that PostgreSQL has one type for", () => {
  const at = (text: string, zone: string) => DateTime.unsafeMakeZoned(text, { timeZone: zone })
  const numbers = ["0", "-0.5", "1.50", "100", "12345678901234567890.123456789", "1e-20", "1e18", "-1e40"]

  test("is sent as it: a BigDecimal as its digits, which an integer column takes too", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const text of numbers) {
        const number = BigDecimal.unsafeFromString(text)
        expect(yield* sql`SELECT ${number}::numeric = ${text}::numeric AS same`).toEqual([{ same: true }])
      }
      const large = BigDecimal.make(1n, -18)
      expect(yield* sql`SELECT ${large}::bigint AS v`).toEqual([{ v: "1000000000000000000" }])
      expect(yield* sql`SELECT ${BigDecimal.make(700n, 2)}::int AS v`).toEqual([{ v: 7 }])
      expect(yield* sql`SELECT ${[[BigDecimal.make(15n, 1)], [large]]}::numeric[]::text AS v`).toEqual([
        { v: "{{1.5},{1000000000000000000}}" }
      ])
    }))

  test("is sent as it: a DateTime as its moment, with the offset of its zone", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const time of [
        DateTime.unsafeMake("2024-03-01T12:00:00.123Z"),
        at("2024-03-01T12:00:00.123Z", "America/New_York"),
        at("2024-03-01T12:00:00.123Z", "Asia/Kathmandu"),
        DateTime.unsafeMakeZoned("2024-03-01T12:00:00Z", { timeZone: -3_600_000 }),
        at("1900-01-01T00:00:00Z", "Europe/Amsterdam"),
        DateTime.unsafeMake("+012345-01-01T00:00:00.000Z"),
        DateTime.unsafeMake("0000-06-01T00:00:00.000Z"),
        DateTime.unsafeMake("-000043-03-15T00:00:00.000Z"),
        at("-000043-03-15T00:00:00.000Z", "+02:00")
      ]) {
        const millis = sql`SELECT (extract(epoch FROM ${time}::timestamptz) * 1000)::bigint AS v`
        expect(yield* millis).toEqual([{ v: String(DateTime.toEpochMillis(time)) }])
        const all = sql`SELECT (extract(epoch FROM (${[time, null]}::timestamptz[])[1]) * 1000)::bigint AS v`
        expect(yield* all).toEqual([{ v: String(DateTime.toEpochMillis(time)) }])
      }
      const evening = at("2024-03-02T01:00:00Z", "America/New_York")
      expect(yield* sql`SELECT ${evening}::date::text AS day, ${DateTime.toUtc(evening)}::date::text AS utc`).toEqual([
        { day: "2024-03-01", utc: "2024-03-02" }
      ])
    }))

  test("is sent as it in the rows of an insert and an update", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* sql`ALTER TABLE t ADD price numeric, ADD made timestamptz`
      const price = BigDecimal.unsafeFromString("19.90")
      const made = at("2024-03-01T12:00:00Z", "Europe/Berlin")
      yield* sql`INSERT INTO t ${sql.insert({ id: 1, price, made } as never)}`
      yield* sql`INSERT INTO t ${sql.insert({ id: 2, price: null, made: null })}`
      yield* sql`UPDATE t SET ${sql.update({ price, made } as never)} WHERE id = 2`
      const row = { price: "19.9", made: new Date("2024-03-01T12:00:00Z") }
      expect(yield* sql`SELECT price, made FROM t`).toEqual([row, row])
    }))
})

describe("bad input is refused before the wire", () => {
  const circular: Record<string, unknown> = {}
  circular.self = circular
  const bad: ReadonlyArray<readonly [name: string, text: unknown, params: ReadonlyArray<unknown>]> = [
    ["a NUL in the text", "SELECT 1 \0", []],
    ["a lone surrogate in the text", "SELECT '\ud800'", []],
    ["text that is no string", 1, []],
    ["text that is an object", { text: "SELECT 1" }, []],
    ["a NUL in a parameter", "SELECT $1::text", ["a\0b"]],
    ["a NUL in an array", "SELECT $1::text[]", [["a\0b"]]],
    ["a NUL in JSON's own text", "SELECT $1::text", [{ toPostgres: () => "\0" }]],
    ["a lone surrogate in a parameter", "SELECT $1::text", ["\udc00"]],
    ["an invalid Date", "SELECT $1::timestamptz", [new Date(NaN)]],
    ["an invalid Date in an array", "SELECT $1::timestamptz[]", [[new Date(NaN)]]],
    ["a function", "SELECT $1::text", [() => 1]],
    ["a symbol", "SELECT $1::text", [Symbol("s")]],
    ["a Redacted", "SELECT $1::text", [Redacted.make("secret")]],
    ["an Option", "SELECT $1::jsonb", [Option.some("secret")]],
    ["an Effect that was not run", "SELECT $1::jsonb", [Effect.succeed("secret")]],
    ["a Promise in an array", "SELECT $1::jsonb[]", [[Promise.resolve("secret")]]],
    ["circular JSON", "SELECT $1::json", [circular]],
    ["a bigint in JSON", "SELECT $1::json", [{ n: 1n }]],
    [
      "a conversion that throws",
      "SELECT $1::text",
      [
        {
          toPostgres: () => {
            throw new Error("secret")
          }
        }
      ]
    ],
    ["65 536 parameters", "SELECT 1", Array.from({ length: 65_536 }, () => 1)]
  ]
  for (const [name, text, params] of bad) {
    proxied(`${name}: InvalidInput, nothing is sent, and connection and transaction are unharmed`, (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        const statement = sql.unsafe(text as string, params as ReadonlyArray<never>)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            const before = yield* pid
            proxy.reset()
            const error = yield* Effect.flip(statement)
            expect(DbError.reason(error)?._tag).toBe("InvalidInput")
            expect(proxy.log).toEqual([])
            expect(JSON.stringify(error) + String(error)).not.toContain("secret")
            expect(yield* pid).toBe(before)
          })
        )
        proxy.reset()
        expect(yield* reason(statement)).toBe("InvalidInput")
        expect(proxy.log).toEqual([])
        expect(yield* committed(database)).toEqual([1])
      })
    )
  }

  test("a Redacted anywhere in JSON is refused, whose secret would be lost", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const deep = { users: [{ password: Redacted.make("secret"), id: 1 }] }
      for (const statement of [
        sql`SELECT ${deep as never}::jsonb`,
        sql`SELECT ${[deep] as never}::jsonb[]`,
        sql`SELECT ${sql.json(deep)}::jsonb`,
        sql`INSERT INTO t ${sql.insert({ id: 1, note: sql.json(deep) })}`
      ]) {
        const error = yield* Effect.flip(statement)
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
        expect(error.message).toContain("an object with a Redacted in it. Pass Redacted.value(it)")
      }
      const said = { text: "<redacted>", at: [1n].length }
      expect(yield* sql`SELECT ${sql.json(said)}::jsonb AS v`).toEqual([{ v: said }])
      expect(yield* committed(database)).toEqual([])
    }))

  test(
    "what has a toJSON is in JSON what that gives, with names transformed too",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        const value = { madeAt: DateTime.unsafeMake(0), some: Option.some(1) }
        expect(yield* sql`SELECT ${sql.json(value)}::jsonb AS v`).toEqual([
          { v: { made_at: "1970-01-01T00:00:00.000Z", some: { _id: "Option", _tag: "Some", value: 1 } } }
        ])
        const error = yield* Effect.flip(sql`SELECT ${sql.json({ madeBy: Redacted.make("secret") })}::jsonb`)
        expect(error.message).toContain("an object with a Redacted in it.")
      }),
    { transformQueryNames: (name) => name.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`) }
  )

  test("a Chunk in a helper is refused, and in sql.json", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const note = Chunk.of("secret")
      for (const statement of [
        sql`INSERT INTO t ${sql.insert({ id: 1, note } as never)}`,
        sql`UPDATE t SET ${sql.update({ note } as never)}`,
        sql`SELECT ${sql.json(note)}::jsonb`
      ]) {
        const error = yield* Effect.flip(statement)
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
        expect(error.message).toContain("a Chunk. Use Chunk.toReadonlyArray(it).")
      }
    }))

  test("an Option in a helper is refused, and in sql.json", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const note = Option.some("secret")
      for (const statement of [
        sql`INSERT INTO t ${sql.insert({ id: 1, note })}`,
        sql`INSERT INTO t ${sql.insert([{ id: 1, note: null }, { id: 2, note } as never])}`,
        sql`UPDATE t SET ${sql.update({ note })}`,
        sql`SELECT ${sql.json(note)}::jsonb`,
        sql`SELECT ${sql.json([note])}::jsonb`,
        sql`INSERT INTO t ${sql.insert({ id: 1, note: sql.json(note) })}`
      ]) {
        const error = yield* Effect.flip(statement)
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
        expect(error.message).toContain("an Option. Use Option.getOrNull(it).")
      }
      expect(yield* committed(database)).toEqual([])
    }))

  test("what an insert or an update would leave out is InvalidInput that says what to do, however it is run", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const refused: ReadonlyArray<readonly [statement: Statement.Statement<unknown>, message: string]> = [
        [
          sql`INSERT INTO t ${sql.insert([])}`,
          "sql.insert was given no rows. Skip the statement when there is nothing to insert."
        ],
        [sql`INSERT INTO t ${sql.insert({})}`, "sql.insert was given no columns."],
        [sql`INSERT INTO t ${sql.insert({ id: sql`` })}`, "sql.insert was given a piece of SQL as a value."],
        [sql`INSERT INTO t ${sql.insert([{}, {}])}`, "sql.insert was given no columns."],
        [sql`UPDATE t SET ${sql.update({})}`, "sql.update was given no columns."],
        [sql`UPDATE t SET ${sql.update({ id: 1 }, ["id"])} WHERE id = ${1}`, "sql.update was given no columns."],
        [sql`UPDATE t SET note = v.note FROM ${sql.updateValues([], "v")}`, "sql.updateValues was given no rows."],
        [
          sql`INSERT INTO t ${sql.insert([{ id: 1 }, { id: 2, note: "lost" }] as Array<Record<string, unknown>>)}`,
          "sql.insert was given a column in row 2 that the first row does not have. Give all rows the same columns"
        ],
        [
          sql`INSERT INTO t ${sql.insert({ id: 1, note: sql.literal("now()") })}`,
          "sql.insert was given a piece of SQL as a value. It takes values and sql.json"
        ],
        [sql`UPDATE t SET ${sql.update({ note: sql`upper(note)` })}`, "sql.update was given a piece of SQL as a value."]
      ]
      for (const [statement, message] of refused) {
        const batch = DbSession.batch([sql`SELECT 1`, statement])
        for (const run of [statement, statement.raw, DbSession.autocommit(statement), batch] as const) {
          const error = yield* Effect.flip(run as Effect.Effect<unknown, SqlError, DbEngine>)
          expect(DbError.reason(error)?._tag).toBe("InvalidInput")
          expect(error.message).toContain(message)
        }
        expect(yield* Effect.map(Effect.flip(Stream.runDrain(statement.stream)), (_) => _.message)).toContain(message)
      }
    }))

  test("what is no statement in a batch is refused by its place", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const entry of [Effect.succeed(1), Effect.map(sql`SELECT 1`, () => 1), undefined, "SELECT 1"]) {
        const batch = DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, entry as never])
        for (const run of [batch, DbSession.autocommit(batch)]) {
          const error = yield* Effect.flip(run)
          expect(DbError.reason(error)?._tag).toBe("InvalidInput")
          expect(error.message).toContain("Entry 2 of the batch is not a statement.")
        }
      }
      expect(yield* committed(database)).toEqual([])
    }))

  test("65 535 parameters are sent", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const n = 65_535
      const text = `SELECT ${Array.from({ length: n }, (_, i) => `$${i + 1}::int`).join("+")} AS sum`
      const deep = sql.unsafe(
        `SELECT count(*)::int AS n FROM unnest(ARRAY[${text.slice(7, -7).replaceAll("+", ",")}])`,
        Array.from({ length: n }, () => 1)
      )
      expect(yield* deep).toEqual([{ n }])
    }))

  test(
    "a bad statement does not wait for a connection",
    () =>
      Effect.scoped(
        Effect.gen(function* () {
          yield* DbConnection.acquire({ reusable: false })
          const sql = yield* client
          expect(yield* reason(sql`SELECT ${"\0"}`)).toBe("InvalidInput")
          expect((yield* DbEngine.stats).pending).toBe(0)
        })
      ),
    { maxConnections: 1 }
  )

  test("a channel that is no identifier is refused by listen", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const channel of ["", "\0", "x".repeat(64)]) {
        expect(yield* reason(Stream.runDrain(sql.listen(channel)))).toBe("InvalidInput")
      }
      expect((yield* DbEngine.stats).total).toBe(0)
    }))

  it.scopedLive("what is refused in one fiber harms no other's statement", () =>
    onDatabase(database)(
      DbConnection.withConnection(
        Effect.gen(function* () {
          const sql = yield* client
          const answers = yield* Effect.all(
            Array.from({ length: 30 }, (_, n) =>
              n % 2 === 0
                ? Effect.as(reason(sql`SELECT ${"\0"}`), -1)
                : Effect.map(sql<{ n: number }>`SELECT ${n}::int AS n`, (rows) => rows[0]!.n)
            ),
            { concurrency: "unbounded" }
          )
          expect(answers).toEqual(Array.from({ length: 30 }, (_, n) => (n % 2 === 0 ? -1 : n)))
        })
      )
    )
  )
})

describe("a name that PostgreSQL would cut, or that is empty", () => {
  const long = "n".repeat(64)
  const bad: ReadonlyArray<readonly [name: string, of: (sql: DbSql) => Statement.Statement<object>]> = [
    ["sql(name)", (sql) => sql`SELECT ${sql(long)} FROM t`],
    ["an empty name", (sql) => sql`SELECT 1 AS ${sql("")}`],
    ["64 bytes of 32 letters", (sql) => sql`SELECT 1 AS ${sql("ü".repeat(32))}`],
    ["a part of a dotted name", (sql) => sql`SELECT ${sql(`t.${long}`)} FROM t`],
    ["sql.insert", (sql) => sql`INSERT INTO t ${sql.insert({ id: 1, [long]: 2 })}`],
    ["sql.insert of several", (sql) => sql`INSERT INTO t ${sql.insert([{ [long]: 2 }, { [long]: 3 }])}`],
    ["sql.update", (sql) => sql`UPDATE t SET ${sql.update({ id: 1, [long]: 2 }, ["id"])}`],
    ["sql.updateValues", (sql) => sql`UPDATE t SET note = 'x' FROM ${sql.updateValues([{ [long]: 1 }], "d")}`],
    ["sql.in", (sql) => sql`SELECT 1 FROM t WHERE ${sql.in(long, [1])}`]
  ]

  for (const [name, of] of bad) {
    proxied(`is InvalidInput before the wire, however it is run: ${name}`, (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* sql`SELECT 1`
        proxy.reset()
        const statement = of(sql)
        const runs: ReadonlyArray<Effect.Effect<unknown, SqlError>> = [
          statement,
          statement.raw,
          statement.values,
          statement.unprepared,
          statement.withoutTransform,
          Stream.runDrain(statement.stream),
          DbQuery.copyFrom(statement, Stream.empty)
        ]
        for (const run of runs) expect(yield* reason(run)).toBe("InvalidInput")
        expect(yield* reason(DbSession.batch([sql`SELECT 1`, statement]))).toBe("InvalidInput")
        expect(() => statement.compile()).toThrow(DbError)
        expect(proxy.flights()).toBe(0)
      })
    )
  }

  test("leaves a session as it was", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* withTransaction(
        Effect.zipRight(insert(1), Effect.ignore(sql`SELECT ${sql(long)} FROM t`)).pipe(Effect.zipRight(insert(2)))
      )
      expect(yield* committed(database)).toEqual([1, 2])
    }))

  test(
    "is one that is so after the client's transform",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        const name = "n".repeat(60)
        expect(yield* reason(sql`SELECT 1 AS ${sql(name)}`)).toBe("InvalidInput")
        expect(yield* sql`SELECT 1 AS ${sql(name)}`.withoutTransform).toEqual([{ [name]: 1 }])
        expect(yield* sql.withoutTransforms()`SELECT 1 AS ${sql(name)}`).toEqual([{ [name]: 1 }])
        expect(yield* sql`SELECT 1 AS ${sql("ok")}`).toEqual([{ long_ok: 1 }])
      }),
    {
      transformQueryNames: (name) => `long_${name}`,
      transformResultNames: (name) => name
    }
  )

  test("is none of 63 bytes, and may have quotes", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const name of ["n".repeat(63), 'it"s']) {
        expect(yield* sql`SELECT t.id AS ${sql(name)} FROM (VALUES (1)) AS t (id)`).toEqual([{ [name]: 1 }])
      }
      expect(yield* sql`SELECT ${sql("t.id")} FROM (VALUES (1)) AS t (id)`).toEqual([{ id: 1 }])
    }))
})

describe("another number of values than the statement has parameters", () => {
  const wrong = (sql: DbSql) => [
    sql.unsafe("SELECT $1::int, $2::int", [1]),
    sql.unsafe("SELECT 1", [1]),
    sql.unsafe("SELECT $1::int, $2::int")
  ]

  test("is the statement's fault, says so, and leaves the connection", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const before = yield* sql`SELECT pg_backend_pid() AS pid`
      for (const statement of wrong(sql)) {
        const error = yield* Effect.flip(statement)
        expect(DbError.reason(error)).toMatchObject({ _tag: "SqlSyntaxError", sqlState: "08P01", isRetryable: false })
        expect(error.message).toMatch(/number of values than it has parameters: \d for \d .*Count \$1/)
      }
      expect(yield* sql`SELECT pg_backend_pid() AS pid`).toEqual(before)
    }))

  test("fails its block like any other error", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const statement of wrong(sql)) {
        expect(yield* reason(withTransaction(Effect.zipRight(insert(1), Effect.ignore(statement))))).toBe(
          "TransactionAborted"
        )
        yield* DbSession.autocommit(
          Effect.zipRight(insert(2), Effect.ignore(withTransaction(statement))).pipe(Effect.zipRight(insert(3)))
        )
        expect(yield* committed(database)).toEqual([2, 3])
        yield* sql`DELETE FROM t`
      }
    }))
})

describe("the error of a statement", () => {
  const says = (text: string, params: ReadonlyArray<unknown>, message: string) =>
    Effect.gen(function* () {
      const sql = yield* client
      const error = yield* Effect.flip(sql.unsafe(text, params))
      expect(error.message).toContain(message)
      expect(DbError.reason(error)?.statement).toBe(text)
      expect(JSON.stringify(error)).not.toContain("hunter2")
    })

  test("names the parameter and the type that refuses it, and has the statement, also in a session", () => {
    const all = Effect.all([
      says("INSERT INTO t (id) VALUES ($1)", ["hunter2"], "Parameter $1 does not have the form of type integer"),
      says("SELECT $1::text, $2::date", ["a", "hunter2"], "Parameter $2 does not have the form of type date"),
      says("SELECT $1::smallint", ["99999"], "Parameter $1 is outside the range of type smallint"),
      says("SELECT $1::jsonb", ["{hunter2"], "Parameter $1 does not have the form of type json"),
      says("SELECT $1::text::int", ["hunter2"], "A value does not have the form of type integer"),
      says("SELECT * FROM nowhere", [], 'names a table or view that does not exist: relation "nowhere" does not exist')
    ])
    return Effect.zipRight(
      all,
      Effect.forEach(["hunter2", "3"], (id) =>
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const error = yield* Effect.flip(
            DbSession.autocommit(Effect.zipRight(insert(1), sql`INSERT INTO t (id, nope) VALUES (${id}, 'hunter2')`))
          )
          expect(DbError.reason(error)?.statement).toBe("INSERT INTO t (id, nope) VALUES ($1, '...')")
        })
      )
    )
  })

  test("has the statement of a batch that has failed", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const batch = DbSession.batch([sql`SELECT 1`, sql`INSERT INTO t (id) VALUES (${"hunter2"})`, sql`SELECT 2`])
      for (const run of [batch, DbSession.autocommit(batch)]) {
        expect(DbError.reason(yield* Effect.flip(run))?.statement).toBe("INSERT INTO t (id) VALUES ($1)")
      }
    }))

  test("says what to use where a value stands for a list or a name", () =>
    Effect.gen(function* () {
      const sql = yield* client
      for (const statement of [sql`SELECT * FROM t WHERE id IN ${[1, 2] as never}`, sql`SELECT * FROM ${"t"}`]) {
        const error = yield* Effect.flip(statement)
        expect(error.message).toContain("Use sql.in(column, values) for a list, sql(name) for a name.")
      }
    }))

  test("names a setting of a session that does not exist", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(DbSession.autocommit(insert(1), { settings: { tenant: "hunter2" } }))
      expect(error.message).toContain('There is no setting "tenant"')
      expect(error.message).toContain('One of your own has a dot in its name: "app.tenant".')
      expect(JSON.stringify(error)).not.toContain("hunter2")
    }))
})

describe("BEGIN outside of a session", () => {
  const openings = [
    "BEGIN",
    "/* by hand */ START TRANSACTION",
    "BEGIN; SELECT pg_current_xact_id()",
    "BEGIN; INSERT INTO t (id) VALUES (1)",
    "INSERT INTO t (id) VALUES (1); BEGIN; INSERT INTO t (id) VALUES (2)"
  ]

  test("is InvalidInput that leads to withTransaction, and what it has opened is undone", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const before = yield* sql`SELECT pg_backend_pid() AS pid`
      for (const text of openings) {
        const error = yield* Effect.flip(sql.unsafe(text))
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
        expect(error.message).toContain("withTransaction")
        expect(yield* sql`SELECT pg_backend_pid() AS pid, pg_current_xact_id_if_assigned()::text AS xid`).toEqual([
          { ...before[0], xid: null }
        ])
      }
      expect(yield* committed(database)).toEqual([])
    }))

  test("stops a transaction by hand before its first statement commits by itself", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const byHand = sql`BEGIN`.pipe(Effect.zipRight(insert(1)), Effect.zipRight(sql`ROLLBACK`))
      expect(yield* reason(byHand)).toBe("InvalidInput")
      expect(yield* committed(database)).toEqual([])
    }))

  test("is fine in one text with its COMMIT, and on a connection of one's own", () =>
    Effect.gen(function* () {
      const sql = yield* client
      yield* sql.unsafe("BEGIN; INSERT INTO t (id) VALUES (1); COMMIT")
      yield* DbConnection.withConnection(Effect.zipRight(sql`BEGIN`, insert(2)).pipe(Effect.zipRight(sql`COMMIT`)))
      expect(yield* committed(database)).toEqual([1, 2])
    }))

  for (const text of ["BEGIN", "start transaction", "COMMIT", "end", "ROLLBACK", "-- now\nABORT", "/* now */ commit"]) {
    proxied(`${text} in a batch outside of a session is InvalidInput before the wire`, (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* sql`SELECT 1`
        proxy.reset()
        const batch = DbSession.batch([
          sql`INSERT INTO t (id) VALUES (1)`,
          sql.unsafe(text),
          sql`INSERT INTO t (id) VALUES (2)`
        ])
        expect(yield* reason(batch)).toBe("InvalidInput")
        expect(yield* reason(DbConnection.withConnection(batch))).toBe("InvalidInput")
        expect(proxy.flights()).toBe(0)
      })
    )
  }
})
