import { PgClient } from "@effect/sql-pg"
import { Model, type SqlError } from "@effect/sql"
import { describe, it } from "@effect/vitest"
import { Cause, Deferred, Effect, Exit, Fiber, Option, Schema, Scope, Stream } from "effect"
import {
  Database,
  DbConnection,
  DbEngine,
  DbError,
  DbLayer,
  DbResolver,
  DbSession,
  withTransaction,
  type WithTransactionOptions
} from "effect-db"
import { expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import {
  committed,
  expectAtRest,
  insert,
  outcome,
  pid,
  programsOn,
  proxiedOn,
  quietly,
  reason,
  refused,
  seen,
  used
} from "./support/programs.js"
import { pending, until } from "./support/until.js"

const database = testDatabase()
const second = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

const client = Effect.map(DbEngine, ({ sql }) => sql)
const kill = (pid: number) => database.query("SELECT pg_terminate_backend($1)", [pid])
const batched = { batching: true, concurrency: "unbounded" } as const

const waitFor = (key: number) => Effect.flatMap(client, (sql) => sql`SELECT pg_advisory_xact_lock(${key}::int)`)

describe("1 a swallowed error", () => {
  test("in the outermost block: its success is TransactionAborted, and names the statement", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(withTransaction(Effect.zipRight(insert(1), Effect.ignore(refused))))
      expect(DbError.reason(error)).toMatchObject({
        _tag: "TransactionAborted",
        statement: expect.stringContaining("INSERT INTO t (id) VALUES")
      })
      expect(yield* committed(database)).toEqual([])
    }))

  test("in an inner block: that one fails with TransactionAborted, and the outer one commits without it", () =>
    Effect.gen(function* () {
      yield* withTransaction(
        Effect.gen(function* () {
          yield* insert(1)
          expect(yield* reason(withTransaction(Effect.zipRight(insert(2), Effect.ignore(refused))))).toBe(
            "TransactionAborted"
          )
        })
      )
      expect(yield* committed(database)).toEqual([1])
    }))
})

describe("2 a deferred constraint", () => {
  test(
    "that fails at COMMIT is that constraint's typed error",
    () =>
      Effect.gen(function* () {
        yield* database.query("ALTER TABLE t ADD CONSTRAINT late UNIQUE (note) DEFERRABLE INITIALLY DEFERRED")
        const sql = yield* client
        const twice = sql`INSERT INTO t (id, note) VALUES (1, 'same'), (2, 'same')`
        const error = yield* Effect.flip(withTransaction(twice))
        expect(DbError.reason(error)).toMatchObject({ _tag: "UniqueViolation", constraint: "late" })
        expect(yield* committed(database)).toEqual([])
        yield* insert(3)
      }),
    { maxConnections: 1 }
  )
})

describe("3 a connection lost during COMMIT", () => {
  proxied("is CommitUnknown, and is not retried", (proxy) =>
    Effect.gen(function* () {
      yield* pid
      proxy.reset()
      const cut = proxy.cutAfter(({ text }) => text === "COMMIT", { forward: true })
      let attempts = 0
      const work = withTransaction(
        Effect.suspend(() => {
          attempts++
          return insert(1)
        }),
        { retry: true }
      )
      const exit = yield* Effect.exit(work)
      yield* Effect.promise(() => cut)
      expect(outcome(exit)).toBe("CommitUnknown")
      expect(attempts).toBe(1)
      yield* until(
        "committed",
        Effect.map(committed(database), (ids) => ids.length === 1)
      )
    })
  )
})

describe("4 a backend killed inside the block", () => {
  test(
    "is a ConnectionError, and the connection is destroyed",
    () =>
      Effect.gen(function* () {
        const exit = yield* Effect.exit(
          withTransaction(
            Effect.gen(function* () {
              yield* insert(1)
              yield* kill(yield* pid)
              yield* insert(2)
            })
          )
        )
        expect(outcome(exit)).toBe("ConnectionError")
        expect(yield* committed(database)).toEqual([])
        yield* insert(3)
        expect(yield* committed(database)).toEqual([3])
      }),
    { maxConnections: 1 }
  )

  test("does not hide the block's own error", () =>
    Effect.gen(function* () {
      const exit = yield* Effect.exit(
        withTransaction(
          Effect.gen(function* () {
            yield* insert(1)
            yield* kill(yield* pid)
            return yield* Effect.fail("mine" as const)
          })
        )
      )
      expect(Exit.isFailure(exit) && [...Cause.failures(exit.cause)]).toEqual(["mine"])
      expect(Exit.isFailure(exit) && Cause.isDie(exit.cause)).toBe(false)
    }))
})

describe("5 two databases", () => {
  const Second = Database.make("second")
  it.scopedLive("a statement for b inside a transaction of a runs on b", () =>
    Effect.gen(function* () {
      const a = yield* client
      const b = (yield* Second.DbEngine).sql
      const where = (sql: typeof a) =>
        Effect.map(sql<{ name: string }>`SELECT current_database() AS name`, (rows) => rows[0]!.name)
      expect(yield* a.withTransaction(Effect.all([where(a), where(b)]))).toEqual([database.database, second.database])
      expect(yield* withTransaction(Second.withTransaction(Effect.all([where(a), where(b)])))).toEqual([
        database.database,
        second.database
      ])
      yield* expectAtRest(database)
    }).pipe(
      Effect.provide(quietly(DbLayer({ url: database.url }))),
      Effect.provide(quietly(Second.DbLayer({ url: second.url })))
    )
  )
})

describe("6 sibling fibers with a nested block each", () => {
  test("one fails: the other's rows are there", () =>
    Effect.gen(function* () {
      const inserted = yield* Deferred.make<void>()
      yield* withTransaction(
        Effect.all(
          [
            Effect.ignore(
              withTransaction(
                Effect.all([insert(1), Deferred.succeed(inserted, undefined), Effect.fail("no")], { discard: true })
              )
            ),
            Effect.zipRight(Deferred.await(inserted), withTransaction(insert(2)))
          ],
          { concurrency: "unbounded" }
        )
      )
      expect(yield* committed(database)).toEqual([2])
    }))
})

describe("7 interrupted while waiting for a full pool", () => {
  test(
    "returns at once",
    () =>
      Effect.scoped(
        Effect.gen(function* () {
          yield* DbConnection.acquire()
          const { stats } = yield* DbEngine
          const waiting = yield* Effect.fork(DbSession.detach(withTransaction(insert(1))))
          yield* pending(1)
          yield* Fiber.interrupt(waiting)
          expect(yield* stats).toMatchObject({ pending: 0, used: 1 })
          expect(yield* committed(database)).toEqual([])
        })
      ),
    { maxConnections: 1, acquireTimeout: "20 seconds" }
  )
})

describe("8 reserve or stream interrupted while waiting", () => {
  const waits: ReadonlyArray<readonly [string, Effect.Effect<unknown, SqlError.SqlError, DbEngine>]> = [
    ["reserve", Effect.scoped(Effect.flatMap(client, (sql) => sql.reserve))],
    ["stream", Effect.flatMap(client, (sql) => Stream.runDrain(sql`SELECT 1`.stream))]
  ]
  for (const [name, wait] of waits) {
    test(
      `${name}: the slot is back`,
      () =>
        Effect.gen(function* () {
          yield* Effect.scoped(
            Effect.gen(function* () {
              yield* DbConnection.acquire()
              const waiting = yield* Effect.fork(DbSession.detach(wait))
              yield* pending(1)
              yield* Fiber.interrupt(waiting)
            })
          )
          yield* wait
          expect(yield* used).toBe(0)
        }),
      { maxConnections: 1, acquireTimeout: "20 seconds" }
    )
  }
})

describe("9 a running query interrupted while the pool is full", () => {
  proxied(
    "is cancelled at once, on a socket that is not the pool's",
    (proxy) =>
      Effect.gen(function* () {
        const sql = yield* client
        const running = yield* Effect.fork(sql`SELECT pg_sleep(60)`)
        yield* untilActivity(database.url, ({ active }) => active === 1)
        yield* Fiber.interrupt(running)
        expect(proxy.cancels.length).toBe(1)
        yield* untilActivity(database.url, ({ active }) => active === 0)
        expect((yield* DbEngine.stats).total).toBeLessThanOrEqual(1)
      }),
    { maxConnections: 1 }
  )
})

describe("10 a cancel that is late", () => {
  proxied(
    "does not touch the next borrower's query",
    (proxy) =>
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 10)
        const running = yield* Effect.fork(waitFor(10))
        yield* lock.waitedFor
        // The request is on its way when the statement has already ended by itself.
        const late = proxy.holdAt(({ type }) => type === "cancel", { forward: false })
        const interrupting = yield* Effect.fork(Fiber.interrupt(running))
        yield* Effect.promise(() => late)
        yield* lock.release
        const sql = yield* client
        const next = yield* Effect.fork(sql`SELECT pg_sleep(0.3), 7 AS n`)
        yield* untilActivity(database.url, ({ active }) => active <= 1)
        proxy.resume()
        expect(yield* Fiber.join(next)).toMatchObject([{ n: 7 }])
        yield* Fiber.join(interrupting)
      }),
    { maxConnections: 1 }
  )
})

describe("11 a queued statement of a sibling interrupted", () => {
  proxied("leaves the statement that is running alone", (proxy) =>
    Effect.gen(function* () {
      const lock = yield* lockedOutside(database, 11)
      const answer = yield* Deferred.make<string>()
      const block = Effect.gen(function* () {
        const running = yield* Effect.fork(Effect.as(waitFor(11), "mine"))
        yield* lock.waitedFor
        const queued = yield* Effect.fork(insert(1))
        yield* Effect.yieldNow()
        yield* Fiber.interrupt(queued)
        const cancels = proxy.cancels.length
        yield* lock.release
        yield* Deferred.complete(answer, Fiber.join(running) as Effect.Effect<string>)
        return cancels
      })
      const exit = yield* Effect.exit(withTransaction(block))
      expect(yield* Deferred.await(answer)).toBe("mine")
      // What the sibling had sent is done, or has failed the block; it is never the answer of another.
      if (Exit.isSuccess(exit)) expect(exit.value).toBe(0)
      else expect(outcome(exit)).toMatch(/TransactionAborted|QueryCanceled/)
    })
  )
})

describe("12 a daemon that outlives the block", () => {
  test(
    "gets SessionClosed, and nobody's transaction",
    () =>
      Effect.gen(function* () {
        const over = yield* Deferred.make<void>()
        const daemon = yield* withTransaction(
          Effect.zipRight(insert(1), Effect.forkDaemon(Effect.zipRight(Deferred.await(over), Effect.exit(insert(2)))))
        )
        yield* withTransaction(
          Effect.gen(function* () {
            yield* insert(3)
            yield* Deferred.succeed(over, undefined)
            expect(outcome(yield* Fiber.join(daemon))).toBe("SessionClosed")
          })
        )
        expect(yield* committed(database)).toEqual([1, 3])
      }),
    { maxConnections: 1 }
  )
})

class Note extends Model.Class<Note>("Note")({
  id: Model.GeneratedByApp(Schema.Number),
  note: Schema.NullOr(Schema.String)
}) {}

const row = (id: number, note: string | null = null) => Note.insert.make({ id, note })

describe("13 data loaders of a model", () => {
  const options = { tableName: "t", spanPrefix: "Note", idColumn: "id", window: "5 millis" } as const
  const loaders = DbResolver.makeDataLoaders(Note, options)

  proxied(
    "made elsewhere run inside the block: a rollback undoes them, and what is asked at once is one statement",
    (proxy) =>
      Effect.gen(function* () {
        const { delete: remove, findById, insert, insertVoid } = yield* loaders
        const block = Effect.gen(function* () {
          proxy.reset()
          const inserted = yield* Effect.forEach([1, 2, 3], (id) => insert(row(id)), { concurrency: "unbounded" })
          expect(inserted.map((_) => _.id)).toEqual([1, 2, 3])
          expect(proxy.statements().filter((text) => text.startsWith("INSERT")).length).toBe(1)
          yield* insertVoid(row(4, "four"))
          expect(yield* findById(4)).toEqual(Option.some(new Note({ id: 4, note: "four" })))
          yield* remove(1)
          expect(yield* seen).toEqual([2, 3, 4])
          expect(yield* used).toBe(1)
          return yield* Effect.fail("undo" as const)
        })
        expect(yield* Effect.flip(withTransaction(block))).toBe("undo")
        expect(yield* committed(database)).toEqual([])
      })
  )

  test("of two blocks at once work for each in its own", () =>
    Effect.gen(function* () {
      const { insert } = yield* loaders
      const failing = Effect.zipRight(insert(row(1)), Effect.fail("undo"))
      yield* Effect.all([Effect.ignore(withTransaction(failing)), withTransaction(insert(row(2)))], {
        concurrency: "unbounded"
      })
      expect(yield* committed(database)).toEqual([2])
    }))

  test("made inside a block work after it, outside and in another one", () =>
    Effect.gen(function* () {
      const { insert } = yield* withTransaction(loaders)
      yield* insert(row(1))
      yield* Effect.ignore(withTransaction(Effect.zipRight(insert(row(2)), Effect.fail("undo"))))
      expect(yield* committed(database)).toEqual([1])
    }))

  test("fail with typed errors", () =>
    Effect.gen(function* () {
      const { insert } = yield* loaders
      yield* insert(row(1))
      expect(yield* reason(insert(row(1)))).toBe("UniqueViolation")
    }))

  test("used by a fiber that outlives its block fail with SessionClosed", () =>
    Effect.gen(function* () {
      const { insert } = yield* loaders
      const over = yield* Deferred.make<void>()
      const daemon = yield* withTransaction(
        Effect.forkDaemon(Effect.zipRight(Deferred.await(over), Effect.exit(insert(row(1)))))
      )
      yield* Deferred.succeed(over, undefined)
      expect(outcome(yield* Fiber.join(daemon))).toBe("SessionClosed")
      expect(yield* committed(database)).toEqual([])
    }))

  test(
    "of the ecosystem, which run outside of the block, can be refused",
    () =>
      Effect.gen(function* () {
        const { insert } = yield* Model.makeDataLoaders(Note, options)
        expect(outcome(yield* Effect.exit(withTransaction(insert(row(1)))))).toBe("defect: NoSession")
        expect(yield* committed(database)).toEqual([])
      }),
    { implicitExecution: "forbid" }
  )
})

describe("14 resolvers", () => {
  const findById = Effect.flatMap(client, (sql) =>
    DbResolver.findById("FindT", {
      Id: Schema.Number,
      Result: Note,
      ResultId: (note) => note.id,
      execute: (ids) => sql`SELECT * FROM t WHERE ${sql.in("id", ids)}`
    })
  )
  const ids = (found: ReadonlyArray<Option.Option<Note>>) => found.map((_) => Option.getOrNull(_)?.id ?? null)

  proxied("findById with duplicate ids in one batch gives each its row, and asks for each id once", (proxy) =>
    Effect.gen(function* () {
      const resolver = yield* findById
      yield* insert(1)
      yield* insert(2)
      proxy.reset()
      const found = yield* Effect.forEach([1, 2, 1, 3, 3, 2], (id) => resolver.execute(id), batched)
      expect(ids(found)).toEqual([1, 2, 1, null, null, 2])
      const sent = proxy.log.filter(({ text, type }) => type === "E" && text.startsWith("SELECT"))
      expect(sent.map(({ text }) => text)).toEqual([`SELECT * FROM t WHERE "id" IN ($1,$2,$3)`])
    })
  )

  test("made elsewhere run in the session of whoever asks", () =>
    Effect.gen(function* () {
      const resolver = yield* DbSession.isolated(findById)
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          yield* insert(1)
          expect(ids(yield* Effect.forEach([1, 1], (id) => resolver.execute(id), batched))).toEqual([1, 1])
          yield* DbSession.rollback
        })
      )
      expect(ids([yield* resolver.execute(1)])).toEqual([null])
    }))

  test("with a context that was captured in another session still run in that of whoever asks", () =>
    Effect.gen(function* () {
      const other = yield* Effect.scoped(
        Effect.gen(function* () {
          const handle = yield* DbSession.make()
          return yield* handle.use(
            DbResolver.findById("FindT", {
              Id: Schema.Number,
              Result: Note,
              ResultId: (note) => note.id,
              withContext: true,
              execute: (ids) => Effect.flatMap(DbSession, ({ sql }) => sql`SELECT * FROM t WHERE ${sql.in("id", ids)}`)
            })
          )
        })
      )
      yield* insert(1)
      expect(ids([yield* other.execute(1)])).toEqual([1])
      expect(ids([yield* DbSession.autocommit(other.execute(1))])).toEqual([1])
    }))

  test("batched over sessions of children, of Scope forms too, each answer from its own", () =>
    Effect.gen(function* () {
      const resolver = yield* findById
      const session = (id: number) =>
        Effect.scoped(
          Effect.gen(function* () {
            yield* DbSession.scoped()
            yield* insert(id)
            const found = yield* resolver.execute(id)
            yield* DbSession.rollback
            return found
          })
        )
      expect(ids(yield* Effect.forEach([1, 2, 3], session, batched))).toEqual([1, 2, 3])
      expect(yield* committed(database)).toEqual([])
    }))

  test("ordered and void keep equal requests apart", () =>
    Effect.gen(function* () {
      yield* database.query("ALTER TABLE t DROP CONSTRAINT t_pkey")
      const sql = yield* client
      const add = yield* DbResolver.ordered("Add", {
        Request: Schema.Number,
        Result: Schema.Struct({ id: Schema.Number }),
        execute: (ids) => sql`INSERT INTO t ${sql.insert(ids.map((id) => ({ id }))).returning("id")}`
      })
      const addVoid = yield* DbResolver.void("AddVoid", {
        Request: Schema.Number,
        execute: (ids) => sql`INSERT INTO t ${sql.insert(ids.map((id) => ({ id })))}`
      })
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* Effect.forEach([1, 1], (id) => add.execute(id), batched)).toEqual([{ id: 1 }, { id: 1 }])
          yield* Effect.forEach([2, 2], (id) => addVoid.execute(id), batched)
        })
      )
      expect(yield* committed(database)).toEqual([1, 1, 2, 2])
    }))

  test("ordered with another number of results fails all of its requests with ResultLengthMismatch", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const resolver = yield* DbResolver.ordered("Wrong", {
        Request: Schema.Number,
        Result: Schema.Struct({ n: Schema.Number }),
        execute: () => sql`SELECT 1 AS n`
      })
      const exits = yield* Effect.forEach([1, 2], (n) => Effect.flip(resolver.execute(n)), batched)
      expect(exits.map((_) => _._tag)).toEqual(["ResultLengthMismatch", "ResultLengthMismatch"])
    }))

  test("grouped gives each request an array of its own, and an empty one when there is nothing", () =>
    Effect.gen(function* () {
      yield* database.query("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'a')")
      const sql = yield* client
      const byNote = yield* DbResolver.grouped("ByNote", {
        Request: Schema.String,
        RequestGroupKey: (note) => note,
        Result: Note,
        ResultGroupKey: (found) => found.note!,
        execute: (notes) => sql`SELECT * FROM t WHERE ${sql.in("note", notes)} ORDER BY id`
      })
      const groups = yield* Effect.forEach(["a", "b", "a", "c"], (note) => byNote.execute(note), batched)
      expect(groups.map((notes) => notes.map((_) => _.id))).toEqual([[1, 3], [2], [1, 3], []])
      expect(groups[0]).not.toBe(groups[2])
    }))

  test("a query that fails, fails each of its requests with its reason", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const broken = yield* DbResolver.findById("Broken", {
        Id: Schema.Number,
        Result: Note,
        ResultId: (note) => note.id,
        execute: () => sql`SELECT * FROM nowhere`
      })
      const reasons = yield* Effect.forEach([1, 1, 2], (id) => reason(broken.execute(id)), batched)
      expect(reasons).toEqual(["SqlSyntaxError", "SqlSyntaxError", "SqlSyntaxError"])
    }))

  test("with request caching do not answer one session with what another has read", () =>
    Effect.withRequestCaching(
      Effect.gen(function* () {
        const resolver = yield* findById
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            expect(ids([yield* resolver.execute(1)])).toEqual([1])
            yield* DbSession.rollback
          })
        )
        expect(ids([yield* DbSession.autocommit(resolver.execute(1))])).toEqual([null])
        yield* resolver.cachePopulate(1, Option.some(new Note({ id: 9, note: null })))
        expect(ids([yield* resolver.execute(1)])).toEqual([9])
        yield* resolver.cacheInvalidate(1)
        expect(ids([yield* resolver.execute(1)])).toEqual([null])
      }),
      true
    ))

  test("two of the same tag are not taken for one another", () =>
    Effect.gen(function* () {
      const sql = yield* client
      const constant = (note: string) =>
        DbResolver.findById("Same", {
          Id: Schema.Number,
          Result: Note,
          ResultId: (found) => found.id,
          execute: (ids) => sql`SELECT id, ${note}::text AS note FROM unnest(${[...ids]}::int[]) id`
        })
      const a = yield* constant("a")
      const b = yield* constant("b")
      const found = yield* Effect.all([a.execute(1), b.execute(1)], batched)
      expect(found.map((_) => Option.getOrNull(_)?.note)).toEqual(["a", "b"])
    }))
})

describe("15 a statement inside a stream's loop", () => {
  test(
    "of the same transaction runs, for 1 000 rows and more",
    () =>
      Effect.gen(function* () {
        const sql = yield* client
        yield* withTransaction(
          Stream.runForEach(sql<{ n: number }>`SELECT n FROM generate_series(1, 1200) n`.stream, ({ n }) => insert(n))
        )
        expect((yield* committed(database)).length).toBe(1200)
      }),
    { maxConnections: 1 }
  )
})

describe("16 notify", () => {
  proxied("works, with any payload", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* PgClient.PgClient
      const listening = proxy.seen(({ text, type }) => type === "C" && text === "LISTEN")
      const heard = yield* Effect.fork(Stream.runCollect(Stream.take(sql.listen("a channel"), 2)))
      yield* Effect.promise(() => listening)
      yield* sql.notify("a channel", "it's; 'quoted'")
      yield* withTransaction(sql.notify("a channel", ""))
      expect([...(yield* Fiber.join(heard))]).toEqual(["it's; 'quoted'", ""])
    })
  )
})

describe("17 listen after the backend died", () => {
  proxied("fails, and listening again works", (proxy) =>
    Effect.gen(function* () {
      const sql = yield* PgClient.PgClient
      const listening = Effect.gen(function* () {
        const ready = proxy.seen(({ text, type }) => type === "C" && text === "LISTEN")
        const fiber = yield* Effect.fork(Stream.runHead(sql.listen("news")))
        yield* Effect.promise(() => ready)
        return fiber
      })
      const first = yield* listening
      for (const { pid } of proxy.connections) if (pid !== undefined) yield* kill(pid)
      expect(outcome(yield* Fiber.await(first))).toBe("ConnectionError")
      const again = yield* listening
      yield* sql.notify("news", "hello")
      expect(yield* Fiber.join(again)).toEqual(Option.some("hello"))
    })
  )
})

describe("18 what a borrower leaves behind", () => {
  const left: ReadonlyArray<readonly [name: string, leave: string, look: string, clean: unknown]> = [
    ["search_path", "SET search_path = pg_catalog", "SELECT current_setting('search_path') AS v", '"$user", public'],
    ["a role", "SET ROLE pg_monitor", "SELECT (current_user = session_user)::text AS v", "true"],
    ["a temporary table", "CREATE TEMP TABLE mine (id int)", "SELECT to_regclass('mine')::text AS v", null],
    [
      "an advisory lock",
      "SELECT pg_advisory_lock(18)",
      "SELECT count(*)::text AS v FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
      "0"
    ],
    [
      "an open transaction",
      "BEGIN; SELECT pg_current_xact_id()",
      "SELECT (pg_current_xact_id_if_assigned() IS NULL)::text AS v",
      "true"
    ],
    ["a listener", "LISTEN news", "SELECT count(*)::text AS v FROM pg_listening_channels()", "0"],
    ["a setting", "SET work_mem = '17MB'", "SELECT (current_setting('work_mem') = '17MB')::text AS v", "false"],
    [
      "a setting by set_config",
      "SELECT set_config('my.tenant', 'secret', false)",
      "SELECT coalesce(nullif(current_setting('my.tenant', true), ''), 'none') AS v",
      "none"
    ],
    [
      "a cursor WITH HOLD",
      "DECLARE held CURSOR WITH HOLD FOR SELECT 1",
      "SELECT count(*)::text AS v FROM pg_cursors WHERE name = 'held'",
      "0"
    ]
  ]
  for (const [name, leave, look, clean] of left) {
    test(
      `${name} does not reach the next`,
      () =>
        Effect.gen(function* () {
          const sql = yield* client
          yield* DbConnection.withConnection(sql.unsafe(leave))
          // Once for the statement, and once for its own connection.
          expect(yield* sql.unsafe(look)).toEqual([{ v: clean }])
          // A transaction that is left open is an error as well.
          yield* Effect.exit(sql.unsafe(leave))
          expect(yield* DbConnection.withConnection(sql.unsafe(look))).toEqual([{ v: clean }])
        }),
      { maxConnections: 1 }
    )
  }
})

describe("19 shutdown with work in hand", () => {
  it.scopedLive("lets it finish, and refuses new work", () =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      const engine = yield* Scope.extend(DbEngine.make({ url: database.url }), scope).pipe(
        Effect.provide(quietly(DbLayer({ url: database.url })))
      )
      // Longer than the second that the incumbent gives it.
      const running = yield* Effect.fork(engine.sql<{ n: number }>`SELECT 19 AS n FROM pg_sleep(1.5)`)
      yield* untilActivity(database.url, ({ active }) => active === 1)
      const closing = yield* Effect.fork(Scope.close(scope, Exit.void))
      yield* until(
        "refusing",
        Effect.map(Effect.exit(engine.ping), (exit) => outcome(exit) === "PoolClosed")
      )
      expect(yield* Fiber.join(running)).toEqual([{ n: 19 }])
      yield* Fiber.join(closing)
      yield* untilActivity(database.url, ({ total }) => total === 0)
    })
  )
})

describe("20 a BEGIN that fails", () => {
  proxied("is that error alone: no ROLLBACK is sent, and there is no defect", (proxy) =>
    Effect.gen(function* () {
      yield* pid
      proxy.reset()
      const cut = proxy.cutAfter(({ text }) => text === "BEGIN", { forward: false })
      const exit = yield* Effect.exit(withTransaction(withTransaction(insert(1))))
      yield* Effect.promise(() => cut)
      expect(outcome(exit)).toBe("ConnectionError")
      expect(proxy.statements()).not.toContain("ROLLBACK")
      expect(yield* committed(database)).toEqual([])
    })
  )

  const refusedOptions: ReadonlyArray<readonly [string, WithTransactionOptions, sqlState: string]> = [
    ["a setting that does not exist", { settings: { nonsense: "1" } }, "42704"],
    ["a value that a setting can't have", { settings: { work_mem: "much" } }, "22023"]
  ]
  for (const [name, options, sqlState] of refusedOptions) {
    test(
      `with ${name}: that error alone, nested too, and the connection is clean`,
      () =>
        Effect.gen(function* () {
          for (const work of [
            withTransaction(insert(1), options),
            withTransaction(withTransaction(insert(1), options)),
            DbSession.autocommit(insert(1), options)
          ]) {
            expect(DbError.reason(yield* Effect.flip(work))?.sqlState).toBe(sqlState)
            expect(yield* committed(database)).toEqual([])
            yield* pid
          }
        }),
      { maxConnections: 1 }
    )
  }
})
