/**
 * The core promises, as a suite: over options that change the wire, a pool of one, an ambient connection, a pooler.
 */
import { SqlClient } from "@effect/sql"
import { Deferred, Effect, Fiber, Option, Stream } from "effect"
import { atomic, type DbEngine, type DbOptions, DbSession, DbTransaction, withTransaction } from "effect-db"
import { describe, expect } from "vitest"
import { type TestDatabase } from "./database.js"
import { committed, insert, no, outcome, place, reason, refused, seen, type Services } from "./programs.js"

/** A way to run the promises. */
export interface Implementation {
  readonly name: string
  readonly options: DbOptions
  /** Connections that a program may have at once. */
  readonly connections: number
  readonly around: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, unknown, R | DbEngine>
}

/** A promise: the program, the rows that are committed afterwards, and how many connections it takes. */
interface Promised {
  readonly name: string
  readonly program: Effect.Effect<unknown, unknown, Services>
  readonly rows: ReadonlyArray<number>
  readonly connections?: number
}

const fails = (effect: Effect.Effect<unknown, unknown, Services>, with_: string) =>
  Effect.map(reason(effect), (tag) => expect(tag).toBe(with_))

const promises = (rows: Effect.Effect<ReadonlyArray<number>>): ReadonlyArray<Promised> => [
  { name: "an implicit statement", program: insert(1), rows: [1] },
  { name: "a session commits", program: DbSession.autocommit(Effect.zipRight(insert(1), insert(2))), rows: [1, 2] },
  {
    name: "a failing session rolls back",
    program: fails(DbSession.autocommit(Effect.zipRight(insert(1), no)), "no"),
    rows: []
  },
  {
    name: "a scoped session commits",
    program: Effect.scoped(Effect.zipRight(DbSession.scoped(), insert(1))),
    rows: [1]
  },
  {
    name: "a session's layer commits",
    program: Effect.provide(insert(1), DbSession.layer()),
    rows: [1]
  },
  {
    name: "commit, rollback and close",
    program: DbSession.autocommit(
      Effect.all([
        insert(1),
        DbSession.commit,
        insert(2),
        DbSession.rollback,
        insert(3),
        DbSession.commit,
        insert(4),
        DbSession.close,
        insert(5)
      ])
    ),
    rows: [1, 3, 5]
  },
  {
    name: "one transaction, and another after a commit",
    program: DbSession.autocommit(
      Effect.gen(function* () {
        const [one, two] = [yield* place, yield* place]
        yield* DbSession.commit
        const three = yield* place
        expect([two.xid, three.pid]).toEqual([one.xid, one.pid])
        expect(three.xid).not.toBe(one.xid)
      })
    ),
    rows: []
  },
  { name: "autocommit joins", program: DbSession.autocommit(DbSession.autocommit(insert(1))), rows: [1] },
  {
    name: "isolated is independent",
    program: Effect.ignore(DbSession.autocommit(Effect.all([insert(1), DbSession.isolated(insert(2)), no]))),
    rows: [2],
    connections: 2
  },
  {
    name: "make",
    program: Effect.scoped(Effect.flatMap(DbSession.make({ autocommit: true }), (_) => _.use(insert(1)))),
    rows: [1]
  },
  {
    name: "a handle after close is SessionClosed",
    program: DbSession.autocommit(
      Effect.gen(function* () {
        const handle = Option.getOrThrow(yield* DbSession.current)
        yield* insert(1)
        yield* handle.close
        yield* fails(handle.sql`SELECT 1`, "SessionClosed")
        yield* insert(2)
      })
    ),
    rows: [2]
  },
  {
    name: "withTransaction commits, and rolls back",
    program: Effect.all([withTransaction(insert(1)), fails(withTransaction(Effect.zipRight(insert(2), no)), "no")]),
    rows: [1]
  },
  {
    name: "a nested block is undone alone",
    program: withTransaction(
      Effect.all([
        insert(1),
        Effect.ignore(withTransaction(Effect.zipRight(insert(2), refused))),
        withTransaction(insert(3)),
        Effect.ignore(withTransaction(Effect.zipRight(withTransaction(insert(4)), no))),
        insert(5)
      ])
    ),
    rows: [1, 3, 5]
  },
  {
    name: "required marks its outer",
    program: fails(
      withTransaction(Effect.zipRight(insert(1), Effect.ignore(withTransaction(no, { propagation: "required" })))),
      "TransactionAborted"
    ),
    rows: []
  },
  {
    name: "requiresNew is independent",
    program: Effect.ignore(
      withTransaction(Effect.all([insert(1), withTransaction(insert(2), { propagation: "requiresNew" }), no]))
    ),
    rows: [2],
    connections: 2
  },
  {
    name: "a swallowed error is TransactionAborted",
    program: fails(withTransaction(Effect.zipRight(insert(1), Effect.ignore(refused))), "TransactionAborted"),
    rows: []
  },
  {
    name: "a unique violation is typed",
    program: fails(withTransaction(Effect.zipRight(insert(1), insert(1))), "UniqueViolation"),
    rows: []
  },
  {
    name: "atomic commits by itself",
    program: Effect.ignore(DbSession.autocommit(Effect.all([insert(1), atomic(insert(2)), insert(3), no]))),
    rows: [1, 2]
  },
  {
    name: "atomic appends, and takes the earlier work along when it fails",
    program: DbSession.autocommit(
      Effect.all([
        insert(1),
        atomic(insert(2), { currentTransaction: "append" }),
        insert(3),
        Effect.ignore(atomic(no, { currentTransaction: "append" })),
        insert(4)
      ])
    ),
    rows: [1, 2, 4]
  },
  {
    name: "tx.end through inner blocks",
    program: withTransaction(
      Effect.all([
        insert(1),
        withTransaction((tx) => withTransaction(Effect.zipRight(insert(2), tx.end("commit")))),
        withTransaction((tx) => withTransaction(Effect.zipRight(insert(3), tx.end("rollback"))))
      ])
    ),
    rows: [1, 2]
  },
  {
    name: "siblings of one session take turns",
    program: DbSession.autocommit(
      Effect.all(
        [1, 2, 3, 4].map((id) =>
          Effect.exit(withTransaction(Effect.zipRight(insert(id), id % 2 === 0 ? no : Effect.void)))
        ),
        { concurrency: "unbounded" }
      )
    ),
    rows: [1, 3]
  },
  {
    name: "many statements at once have each its own answer",
    program: DbSession.autocommit(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const numbers = Array.from({ length: 30 }, (_, i) => i)
        const answers = yield* Effect.all(
          numbers.map((n) => Effect.map(sql<{ n: number }>`SELECT ${n}::int AS n`, (_) => _[0]!.n)),
          { concurrency: "unbounded" }
        )
        expect(answers).toEqual(numbers)
      })
    ),
    rows: []
  },
  {
    name: "an interruption rolls back",
    program: Effect.gen(function* () {
      const inserted = yield* Deferred.make<void>()
      const fiber = yield* Effect.fork(
        withTransaction(Effect.all([insert(1), Deferred.succeed(inserted, undefined), Effect.never]))
      )
      yield* Deferred.await(inserted)
      expect(outcome(yield* Fiber.interrupt(fiber))).toBe("interrupted")
    }),
    rows: []
  },
  {
    name: "manual blocks",
    program: DbSession.autocommit(
      Effect.gen(function* () {
        const one = yield* DbSession.begin()
        yield* insert(1)
        const two = yield* DbSession.savepoint()
        yield* insert(2)
        yield* two.rollback
        yield* one.commit
        yield* insert(3)
      })
    ),
    rows: [1, 3]
  },
  {
    name: "a scoped block",
    program: DbSession.autocommit(
      Effect.all([
        insert(1),
        Effect.ignore(Effect.scoped(Effect.all([DbTransaction.scoped(), insert(2), no]))),
        Effect.scoped(Effect.all([DbTransaction.scoped(), insert(3)]))
      ])
    ),
    rows: [1, 3]
  },
  {
    name: "options apply and are gone afterwards",
    program: Effect.gen(function* () {
      const { sql } = yield* DbSession
      const now = Effect.map(
        sql<{ now: string }>`SELECT concat_ws(' ', current_setting('transaction_isolation'),
          current_setting('statement_timeout'), nullif(current_setting('app.tenant', true), '')) AS now`,
        (_) => _[0]?.now
      )
      const options = { isolation: "serializable", statementTimeout: 5000, settings: { "app.tenant": "acme" } } as const
      expect(yield* withTransaction(now, options)).toBe("serializable 5s acme")
      expect(yield* withTransaction(now)).toBe("read committed 0")
    }),
    rows: []
  },
  {
    name: "hooks",
    program: Effect.gen(function* () {
      const log: Array<string> = []
      yield* withTransaction(
        Effect.all([
          DbSession.beforeCommit(insert(2)),
          DbSession.afterCommit(Effect.sync(() => log.push("after"))),
          Effect.ignore(
            withTransaction(Effect.zipRight(DbSession.afterCommit(Effect.sync(() => log.push("never"))), no))
          ),
          insert(1)
        ])
      )
      expect(log).toEqual(["after"])
    }),
    rows: [1, 2]
  },
  {
    name: "a batch is one transaction",
    program: Effect.gen(function* () {
      const { sql } = yield* DbSession
      const add = (id: number) => sql`INSERT INTO t (id) VALUES (${id})`
      yield* DbSession.batch([add(1), add(2)])
      yield* fails(DbSession.batch([add(3), add(1)]), "UniqueViolation")
      yield* Effect.ignore(DbSession.autocommit(Effect.zipRight(DbSession.batch([add(4), add(5)]), no)))
    }),
    rows: [1, 2]
  },
  {
    name: "a stream in a session, with statements of the session in the loop",
    program: DbSession.autocommit(
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const numbers = sql<{ n: number }>`SELECT generate_series(1, 1000) AS n`.stream
        yield* Stream.runForEach(numbers, ({ n }) => (n % 250 === 0 ? insert(n) : Effect.void))
      })
    ),
    rows: [250, 500, 750, 1000]
  },
  {
    name: "several statements in one text",
    program: DbSession.autocommit(
      Effect.flatMap(SqlClient.SqlClient, (sql) =>
        sql.unsafe("INSERT INTO t (id) VALUES (1); INSERT INTO t (id) VALUES (2)")
      )
    ),
    rows: [1, 2]
  },
  {
    name: "the ecosystem's client runs inside",
    program: DbSession.autocommit(
      Effect.gen(function* () {
        const sql = yield* SqlClient.SqlClient
        yield* sql`INSERT INTO t (id) VALUES (1)`
        yield* Effect.ignore(sql.withTransaction(Effect.zipRight(sql`INSERT INTO t (id) VALUES (2)`, no)))
        expect(yield* seen).toEqual([1])
        expect(yield* rows).toEqual([])
      })
    ),
    rows: [1]
  }
]

/** How a file runs its tests: `programsOn` and its like. */
export type Test = <A, E>(name: string, program: () => Effect.Effect<A, E, Services>, options: DbOptions) => void

/** Declares a test for each promise on each implementation. */
export const contract = (database: TestDatabase, test: Test, implementations: ReadonlyArray<Implementation>): void => {
  const rows = committed(database)
  for (const { around, connections, name, options } of implementations) {
    describe(name, () => {
      for (const promise of promises(rows)) {
        if ((promise.connections ?? 1) > connections) continue
        test(
          promise.name,
          () =>
            Effect.gen(function* () {
              yield* around(promise.program)
              expect(yield* rows).toEqual(promise.rows)
            }),
          options
        )
      }
    })
  }
}
