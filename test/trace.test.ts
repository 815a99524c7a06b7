import { describe, expect, it } from "@effect/vitest"
import { atomic, Database, DbConnection, DbEngine, DbQuery, DbSchema, DbSession, withTransaction } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect, Exit, Fiber, Stream } from "effect"
import { testDatabase } from "./support/database.js"
import { insert, programsOn, proxiedOn, quietly, refused, seen, whileFull } from "./support/programs.js"
import { barrier, pending } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

const INSERT = "INSERT INTO t (id) VALUES ($1)"

/** Programs, and the round trips that they take. */
const programs: ReadonlyArray<
  readonly [
    what: string,
    program: Effect.Effect<unknown, unknown, DbEngine | DbSession | DbConnection>,
    trips: ReadonlyArray<ReadonlyArray<string>>
  ]
> = [
  ["a session", DbSession.autocommit(Effect.zipRight(insert(1), insert(2))), [["BEGIN", INSERT], [INSERT], ["COMMIT"]]],
  ["a session without statements", DbSession.autocommit(Effect.void), []],
  ["an implicit statement", insert(1), [[INSERT]]],
  [
    "a rollback",
    Effect.exit(DbSession.autocommit(Effect.zipRight(insert(1), Effect.fail("no")))),
    [["BEGIN", INSERT], ["ROLLBACK"]]
  ],
  [
    "nested blocks",
    withTransaction(Effect.zipRight(withTransaction(insert(1)), withTransaction(insert(2))), {
      isolation: "serializable"
    }),
    [
      ["BEGIN ISOLATION LEVEL SERIALIZABLE", "SAVEPOINT effect_db_1", INSERT],
      ["RELEASE SAVEPOINT effect_db_1", "SAVEPOINT effect_db_2", INSERT],
      ["COMMIT"]
    ]
  ],
  [
    "statements at once in an open session",
    DbSession.autocommit(Effect.zipRight(insert(1), Effect.all([insert(2), insert(3)], { concurrency: "unbounded" }))),
    [["BEGIN", INSERT], [INSERT, INSERT], ["COMMIT"]]
  ],
  ["atomic", atomic(insert(1)), [["BEGIN", INSERT], ["COMMIT"]]],
  [
    "a session on a connection",
    DbConnection.withConnection(Effect.zipRight(insert(1), DbSession.autocommit(insert(2)))),
    [[INSERT], ["BEGIN", INSERT], ["COMMIT"]]
  ]
]

describe("DbTest.trace", () => {
  for (const [what, program, trips] of programs) {
    proxied(`tells what the wire tells: ${what}`, (via) =>
      Effect.gen(function* () {
        // The connection is there: what opening it takes is no statement.
        yield* DbEngine.ping
        via.reset()
        const [, trace] = yield* DbTest.trace(program)
        expect(trace.roundTrips).toEqual(trips)
        expect(trace.statements).toEqual(trips.flat())
        expect(trace.statements.length).toBe(via.statements().length)
        expect(trace.roundTrips.length).toBe(via.flights())
      })
    )

    test(`tells the same in a sandbox: ${what}`, () =>
      Effect.gen(function* () {
        const [, trace] = yield* DbTest.sandbox(DbTest.trace(program))
        expect(trace.statements).toEqual(trips.flat())
        expect(trace.roundTrips).toEqual(trips)
      }))
  }

  proxied("counts as the wire does: a batch, a stream, a copy, a search path, raw", (via) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* DbEngine.ping
      via.reset()
      const [, trace] = yield* DbTest.trace(
        Effect.gen(function* () {
          yield* DbSession.batch([sql`INSERT INTO t (id) VALUES (1)`, sql`INSERT INTO t (id) VALUES (2)`])
          yield* Stream.runDrain(sql`SELECT id FROM t`.stream)
          yield* DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("3\n"))
          yield* DbSchema.withSchema(seen, "public")
          yield* DbConnection.withConnection(
            Effect.gen(function* () {
              yield* (yield* DbConnection).raw
              yield* seen
              yield* seen
            })
          )
        })
      )
      expect(trace.statements.find((_) => _.startsWith("DECLARE"))).toBe(
        "DECLARE effect_db_cursor_1 NO SCROLL CURSOR FOR SELECT id FROM t"
      )
      expect(trace.statements.find((_) => _.startsWith("FETCH"))).toMatch(/^FETCH FORWARD \d+ FROM effect_db_cursor_1$/)
      expect(trace.statements).toEqual(
        via.statements().map((_) => _.replace(/effect_db_cursor_\d+/, "effect_db_cursor_1"))
      )
      // The data of the COPY is no statement.
      expect(trace.roundTrips.length).toBe(via.flights() - 1)
    })
  )

  test(
    "counts who borrows, and who had to wait because all were in use",
    () =>
      Effect.gen(function* () {
        const [, trace] = yield* DbTest.trace(
          Effect.flatMap(whileFull(Effect.zipLeft(Effect.fork(insert(1)), pending(1))), Fiber.join)
        )
        expect({ borrowed: trace.borrowed, waited: trace.waited }).toEqual({ borrowed: 2, waited: 1 })
      }),
    { maxConnections: 1 }
  )

  test("hears the fibers of the effect, and traces in traces", () =>
    Effect.gen(function* () {
      const [[, inner], outer] = yield* DbTest.trace(
        Effect.zipRight(
          insert(0),
          DbTest.trace(
            Effect.all(
              [1, 2, 3].map((id) => DbSession.isolated(insert(id))),
              { concurrency: "unbounded" }
            )
          )
        )
      )
      expect(inner.borrowed).toBe(3)
      expect([...inner.statements].sort()).toEqual([
        "BEGIN",
        "BEGIN",
        "BEGIN",
        "COMMIT",
        "COMMIT",
        "COMMIT",
        INSERT,
        INSERT,
        INSERT
      ])
      expect(outer.statements).toEqual([INSERT, ...inner.statements])
    }))

  test("tells sandboxes that run at the same time apart", () =>
    Effect.gen(function* () {
      const both = yield* barrier(2)
      const one = (id: number) =>
        DbTest.sandbox(
          DbTest.trace(
            Effect.gen(function* () {
              yield* both
              const { sql } = yield* DbSession
              yield* DbSession.autocommit(sql.unsafe(`SELECT ${id}`))
            })
          )
        )
      const traces = yield* Effect.all([one(1), one(2)], { concurrency: "unbounded" })
      expect(traces.map(([, { roundTrips }]) => roundTrips)).toEqual([
        [["BEGIN", "SELECT 1"], ["COMMIT"]],
        [["BEGIN", "SELECT 2"], ["COMMIT"]]
      ])
      expect(traces.map(([, { borrowed }]) => borrowed)).toEqual([1, 1])
    }))

  test("shows in a nested sandbox what the program sends", () =>
    Effect.gen(function* () {
      const [, trace] = yield* DbTest.trace(
        Effect.zipRight(insert(1), Effect.exit(withTransaction(Effect.zipRight(insert(2), refused))))
      ).pipe(DbTest.sandbox, DbTest.sandbox)
      expect(trace.roundTrips).toEqual([
        [INSERT],
        ["BEGIN", INSERT],
        ["INSERT INTO t (id) VALUES ('no number')"],
        ["ROLLBACK"]
      ])
    }))

  test("keeps the trace of an effect that fails, where its exit is asked for", () =>
    Effect.gen(function* () {
      const [exit, { statements }] = yield* DbTest.trace(Effect.exit(withTransaction(refused)))
      expect(Exit.isFailure(exit)).toBe(true)
      expect(statements.at(-1)).toBe("ROLLBACK")
      const silent = yield* Effect.exit(DbTest.trace(Effect.fail("as it is")))
      expect(silent).toEqual(Exit.fail("as it is"))
    }))

  it.scopedLive("listens to another database", () =>
    Effect.gen(function* () {
      const Other = Database.make("traced")
      const [, trace] = yield* DbTest.of(Other)
        .trace(Effect.flatMap(Other.DbEngine, ({ sql }) => sql`SELECT 1`))
        .pipe(Effect.provide(quietly(Other.DbLayer({ url: database.url }))))
      expect(trace.statements).toEqual(["SELECT 1"])
    })
  )
})
