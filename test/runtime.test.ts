import { describe, expect, it, vi } from "@effect/vitest"
import { Context, Deferred, Effect, Either, Exit, Fiber, Layer, Option, Ref, Schedule, Scope, Stream } from "effect"
import {
  DbConnection,
  DbEngine,
  DbError,
  DbLayer,
  type DbOptions,
  DbRuntime,
  DbSchema,
  DbSession,
  withTransaction
} from "effect-db"
import { AsyncLocalStorage } from "node:async_hooks"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { createServer, type AddressInfo } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Worker } from "node:worker_threads"
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import { threadOptions } from "../src/internal/remote.js"
import { testDatabase, untilActivity } from "./support/database.js"
import { committed, conflict, insert, pid, place, quietly, refused, seen, type Services } from "./support/programs.js"
import { until } from "./support/until.js"
import { proxy } from "./support/proxy.js"
import { barrier, latch, onRuntime, rejection } from "./support/promises.js"

const database = testDatabase()
const rows = () => Effect.runPromise(committed(database))

type Db = DbRuntime.DbRuntime<Services, unknown>

const stats = (db: Db) => db.run(DbEngine.stats)

/** Promise code with a runtime, on an empty table. */
const test = (name: string, program: (db: Db) => Promise<void>, options: DbOptions = {}): void => {
  it(name, () => onRuntime(database, program, options))
}

const reasonOf = async (promise: Promise<unknown>): Promise<string> => {
  const error = await rejection(promise)
  return DbError.reason(error)?._tag ?? String(error)
}

const thrown = (f: () => unknown): unknown => {
  try {
    f()
  } catch (error) {
    return error
  }
  throw new Error("it returned")
}

const reasonThrown = (f: () => unknown): string => {
  const error = thrown(f)
  return DbError.reason(error)?._tag ?? String(error)
}

describe("60 promise-style code", () => {
  test("two awaited calls in one session share it", async (db) => {
    const [one, two] = await db.session(async () => {
      const one = await db.run(place)
      await db.run(insert(1))
      expect(await rows()).toEqual([])
      expect((await stats(db)).used).toBe(1)
      return [one, await db.run(place)]
    })
    expect(one).toEqual(two)
    expect(await rows()).toEqual([1])
  })

  test("deep in calls, timers, callbacks and parallel calls as well", async (db) => {
    const deep = async (): Promise<number> => {
      await new Promise((resolve) => setImmediate(resolve))
      return db.run(pid)
    }
    await db.session(async () => {
      const pids = await Promise.all([
        deep(),
        new Promise<number>((resolve, reject) => setTimeout(() => void deep().then(resolve, reject), 1)),
        new Promise<number>((resolve, reject) => process.nextTick(() => void deep().then(resolve, reject))),
        (async () => {
          const seen: Array<number> = []
          for (const one of [deep, deep]) seen.push(await one())
          return seen[1]!
        })()
      ])
      expect(new Set(pids).size).toBe(1)
    })
  })

  test("two concurrent sessions never do", async (db) => {
    const written = barrier(2)
    const looked = barrier(2)
    const inside = async (id: number) => {
      const first = await db.run(pid)
      await db.run(insert(id))
      await written()
      expect(await db.run(seen)).toEqual([id])
      expect(await db.run(pid)).toBe(first)
      await looked()
      return first
    }
    const pids = await Promise.all([db.session(() => inside(1)), db.session(() => inside(2))])
    expect(pids[0]).not.toBe(pids[1])
    expect(await rows()).toEqual([1, 2])
  })

  test(
    "a hundred concurrent sessions over four connections never mix, and half of them roll back",
    async (db) => {
      const results = await Promise.allSettled(
        Array.from({ length: 100 }, (_, id) =>
          db.session(async () => {
            const first = await db.run(place)
            await db.run(insert(id))
            await new Promise((resolve) => setImmediate(resolve))
            expect(await db.run(seen)).toContain(id)
            expect(await db.run(place)).toEqual(first)
            if (id % 2 === 1) throw new Error("odd")
          })
        )
      )
      expect(results.filter(({ status }) => status === "fulfilled").length).toBe(50)
      expect(await rows()).toEqual(Array.from({ length: 50 }, (_, i) => 2 * i))
    },
    { maxConnections: 4, acquireTimeout: "20 seconds" }
  )

  test("a rejected promise rolls back and rejects with the same error", async (db) => {
    class Mine extends Error {}
    const mine = new Mine("no")
    const failed = db.session(async () => {
      await db.run(insert(1))
      throw mine
    })
    expect(await rejection(failed)).toBe(mine)
    expect(await rows()).toEqual([])
  })

  for (const [what, value] of [
    ["undefined", undefined],
    ["null", null],
    ["a string", "no"],
    ["an object", { _tag: "Rejected", reason: 1 }]
  ] as const) {
    test(`also with ${what}`, async (db) => {
      const failed = db.session(async () => {
        await db.run(insert(1))
        throw value
      })
      expect(await rejection(failed)).toBe(value)
      expect(await rows()).toEqual([])
    })
  }

  test("a callback that throws before its first promise, or that is not async", async (db) => {
    const mine = new Error("no")
    const failed = db.session(() => {
      throw mine
    })
    expect(await rejection(failed)).toBe(mine)
    expect(await db.session(() => 7)).toBe(7)
    expect((await stats(db)).total).toBe(0)
  })

  test("an effect's own error goes through both, the same object", async (db) => {
    const mine = { mine: true }
    let inner: unknown = undefined
    const failed = db.session(async () => {
      await db.run(insert(1))
      try {
        await db.run(Effect.fail(mine))
      } catch (error) {
        inner = error
        throw error
      }
    })
    expect(await rejection(failed)).toBe(mine)
    expect(inner).toBe(mine)
    expect(await rejection(db.run(Effect.die(mine)))).toBe(mine)
    expect(await rows()).toEqual([])
  })

  test("a session inside a session joins it", async (db) => {
    await db.session(async () => {
      const outer = await db.run(place)
      await db.session(async () => {
        expect(await db.run(place)).toEqual(outer)
        await db.run(insert(1))
      })
      expect(await rows()).toEqual([])
    })
    expect(await rows()).toEqual([1])
  })

  test("an inner one that is rejected and caught makes the outer commit fail", async (db) => {
    const failed = db.session(async () => {
      await db.run(insert(1))
      await rejection(db.session(() => Promise.reject(new Error("no"))))
    })
    expect(await reasonOf(failed)).toBe("TransactionAborted")
    expect(await rows()).toEqual([])
  })

  test("isolated is always its own, commits by itself and leaves the outer one untouched", async (db) => {
    const no = new Error("no")
    const failed = db.session(async () => {
      await db.run(insert(1))
      const outer = await db.run(place)
      await db.isolated(async () => {
        expect((await db.run(place)).pid).not.toBe(outer.pid)
        await db.run(insert(2))
      })
      expect(await rows()).toEqual([2])
      const inner = db.isolated(async () => {
        await db.run(insert(3))
        throw no
      })
      expect(await rejection(inner)).toBe(no)
      expect(await db.run(place)).toEqual(outer)
      throw no
    })
    expect(await rejection(failed)).toBe(no)
    expect(await rows()).toEqual([2])
  })

  test("a transaction is a savepoint in a session: what is rejected in it alone is undone", async (db) => {
    await db.session(async () => {
      await db.run(insert(1))
      const mine = new Error("no")
      const failed = db.transaction(async () => {
        await db.run(insert(2))
        throw mine
      })
      expect(await rejection(failed)).toBe(mine)
      // One whose statement the server has refused.
      await rejection(db.transaction(() => db.run(refused)))
      expect(await db.transaction(async (tx) => (await db.run(insert(3)), tx.depth))).toBe(1)
      expect(await db.run(seen)).toEqual([1, 3])
    })
    expect(await rows()).toEqual([1, 3])
  })

  test("a transaction outside of a session is one of its own, with its options", async (db) => {
    await db.transaction(
      async (tx) => {
        expect(tx.isolation).toBe("serializable")
        await db.run(insert(1))
        expect(await rows()).toEqual([])
      },
      { isolation: "serializable" }
    )
    expect(await rows()).toEqual([1])
    await rejection(db.transaction(async () => (await db.run(insert(2)), Promise.reject(new Error("no")))))
    expect(await rows()).toEqual([1])
  })

  test("a transaction can be ended early from inside", async (db) => {
    await db.session(async () => {
      const value = await db.transaction<string>(async (tx) => {
        await db.run(insert(1))
        await db.run(tx.end("rollback", "early"))
        return "never"
      })
      expect(value).toBe("early")
      await db.run(insert(2))
    })
    expect(await rows()).toEqual([2])
  })

  test("atomic commits inside a session, which goes on", async (db) => {
    const no = new Error("no")
    const failed = db.session(async () => {
      await db.atomic(() => db.run(insert(1)))
      expect(await rows()).toEqual([1])
      await db.run(insert(2))
      throw no
    })
    expect(await rejection(failed)).toBe(no)
    expect(await rows()).toEqual([1])
  })

  test("explicit commit, rollback and close, and the session's options", async (db) => {
    await db.session(
      async () => {
        await db.run(insert(1))
        await db.run(DbSession.commit)
        await db.run(insert(2))
        await db.run(DbSession.rollback)
        await db.run(insert(3))
        await db.run(DbSession.close)
        const { sql } = await db.run(DbSession)
        const [row] = await db.run(sql`SELECT current_setting('app.user') AS who`)
        expect(row).toEqual({ who: "ada" })
      },
      { settings: { "app.user": "ada" } }
    )
    expect(await rows()).toEqual([1])
  })

  test("a session that runs no statement borrows nothing", async (db) => {
    expect(await db.session(async () => "done")).toBe("done")
    expect((await stats(db)).total).toBe(0)
  })

  test("a commit that fails rejects with the DbError", async (db) => {
    const failed = db.session(async () => {
      // Checked at COMMIT.
      await db.run(insert(1))
      await db.run(insert(1))
    })
    expect(await rejection(failed)).toBeInstanceOf(DbError)
    expect(await reasonOf(failed)).toBe("UniqueViolation")
    expect(await rows()).toEqual([])
  })

  test("a statement error that was swallowed rejects with TransactionAborted", async (db) => {
    const failed = db.session(async () => {
      await db.run(insert(1))
      await rejection(db.run(refused))
    })
    expect(await reasonOf(failed)).toBe("TransactionAborted")
    expect(await rows()).toEqual([])
  })

  test("run outside of a session is implicit execution", async (db) => {
    await db.run(insert(1))
    expect(await rows()).toEqual([1])
    expect((await stats(db)).used).toBe(0)
    await db.run(DbSession.autocommit(Effect.zipRight(insert(2), insert(3))))
    expect(await rows()).toEqual([1, 2, 3])
    expect(await reasonOf(db.run(DbSession.commit))).toBe("NoSession")
  })

  test(
    "and a typed rejection where that is forbidden",
    async (db) => {
      expect(await reasonOf(db.run(insert(1)))).toBe("NoSession")
      await db.session(() => db.run(insert(2)))
      expect(await rows()).toEqual([2])
    },
    { implicitExecution: "forbid" }
  )

  test("a tenant around a run reaches its statements in the session", async (db) => {
    await db.run(DbSchema.create("acme"))
    await db.session(async () => {
      const { sql } = await db.run(DbSession)
      await db.run(DbSchema.withTenant(sql`CREATE TABLE only_here (x int)`, "acme"))
    })
    expect(await Effect.runPromise(database.query("SELECT count(*)::int AS n FROM acme.only_here"))).toEqual([{ n: 0 }])
    await db.run(DbSchema.drop("acme", { cascade: true }))
  })

  test("what was not awaited gets SessionClosed after the session, never implicit execution", async (db) => {
    const gate = latch()
    let late = Promise.resolve("not begun")
    await db.session(async () => {
      await db.run(insert(1))
      late = gate.opened.then(() => rejection(db.run(insert(2)))).then((error) => String(error))
    })
    gate.open()
    expect(await late).toContain(
      "A fiber, a promise that was not awaited, or a captured handle outlived it. Join or await"
    )
    expect(await rows()).toEqual([1])
  })

  test("so does what follows a time limit that has struck", async (db) => {
    const gate = latch()
    let late = Promise.resolve("not begun")
    const failed = db.session(
      () => {
        late = gate.opened.then(() => reasonOf(db.run(insert(2))))
        return db.run(Effect.zipRight(insert(1), Effect.never))
      },
      { timeout: 50 }
    )
    expect(await reasonOf(failed)).toBe("TransactionTimeout")
    gate.open()
    expect(await late).toBe("SessionClosed")
    expect(await rows()).toEqual([])
  })
})

describe("a callback that returns an effect", () => {
  for (const form of ["session", "isolated", "transaction", "atomic"] as const) {
    test(`which it has not run is rejected by ${form}, and what it did before is rolled back`, async (db) => {
      const { sql } = await db.run(DbEngine)
      for (const effect of [insert(2), sql`INSERT INTO t (id) VALUES (3)`]) {
        const error = await rejection(
          db[form](async () => {
            await db.run(insert(1))
            return effect
          })
        )
        expect(DbError.reason(error)?._tag).toBe("InvalidInput")
        expect(String(error)).toContain(
          `The callback of ${form} returned an Effect, which was not run. Return runtime.run(effect).`
        )
      }
      expect(await rows()).toEqual([])
    })
  }

  test("as a value that it has got is fulfilled with that", async (db) => {
    const values = [Option.some(1), Option.none(), Either.right(1), Exit.succeed(1), Effect.runSync(Ref.make(1))]
    for (const value of values) expect(await db.session(() => value)).toBe(value)
    const fiber = Effect.runFork(Effect.void)
    expect(await db.session(() => fiber)).toBe(fiber)
  })
})

describe("signal", () => {
  test("aborts a statement that runs, and rejects with its reason", async (db) => {
    const via = await Effect.runPromise(Scope.make())
    const front = await Effect.runPromise(Scope.extend(proxy(database.url), via))
    const other = DbRuntime.make(quietly(DbLayer({ url: front.url })))
    const { sql } = await other.run(DbSession)
    const controller = new AbortController()
    const sleeping = front.seen(({ text, type }) => type === "E" && text.includes("pg_sleep"))
    const running = other.run(sql`SELECT pg_sleep(${60})`, { signal: controller.signal })
    await sleeping
    const why = new Error("enough")
    controller.abort(why)
    expect(await rejection(running)).toBe(why)
    await Effect.runPromise(untilActivity(database.url, ({ active }) => active === 0))
    expect((await stats(other)).used).toBe(0)
    await other.close()
    await Effect.runPromise(Scope.close(via, Exit.void))
    await db.run(Effect.void)
  })

  test("that was aborted before lets nothing begin", async (db) => {
    let ran = false
    const controller = new AbortController()
    controller.abort()
    const error = await rejection(
      db.run(
        Effect.sync(() => {
          ran = true
        }),
        { signal: controller.signal }
      )
    )
    expect((error as Error).name).toBe("AbortError")
    expect(ran).toBe(false)
  })

  test("of one statement in a session: the session's code decides what follows", async (db) => {
    const controller = new AbortController()
    await db.session(async () => {
      await db.run(DbSession.detach(insert(1)))
      const started = latch()
      const waiting = db.run(Effect.zipRight(Effect.sync(started.open), Effect.never), { signal: controller.signal })
      await started.opened
      controller.abort()
      expect(((await rejection(waiting)) as Error).name).toBe("AbortError")
      await db.run(insert(2))
    })
    expect(await rows()).toEqual([1, 2])
  })

  test("an effect that ends in its own error keeps it, though it was aborted before", async (db) => {
    const controller = new AbortController()
    const aborted = Effect.zipRight(
      Effect.sync(() => controller.abort()),
      Effect.fail("mine")
    )
    expect(await rejection(db.run(Effect.uninterruptible(aborted), { signal: controller.signal }))).toBe("mine")
  })
})

describe("close", () => {
  const make = (options: DbOptions = {}) => DbRuntime.make(quietly(DbLayer({ url: database.url, ...options })))
  const table = () => Effect.runPromise(database.query("DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY)"))

  it("lets a session in hand finish, refuses what comes later, and leaves no connection", async () => {
    await table()
    const db = make()
    const inside = latch()
    const gate = latch()
    const session = db.session(async () => {
      await db.run(insert(1))
      inside.open()
      await gate.opened
      await db.run(insert(2))
      await db.transaction(() => db.run(insert(3)))
    })
    await inside.opened
    let closed = false
    const closing = db.close().then(() => {
      closed = true
    })
    expect(await reasonOf(db.run(insert(9)))).toBe("PoolClosed")
    expect(await reasonOf(db.session(() => 1))).toBe("PoolClosed")
    expect(await reasonOf(db.isolated(() => 1))).toBe("PoolClosed")
    expect(await reasonOf(db.transaction(() => 1))).toBe("PoolClosed")
    expect(closed).toBe(false)
    gate.open()
    await session
    await closing
    expect(await rows()).toEqual([1, 2, 3])
    await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
  })

  it("a session that has not borrowed yet gets PoolClosed", async () => {
    await table()
    const db = make()
    await db.run(insert(1))
    const gate = latch()
    const session = db.session(async () => {
      await gate.opened
      await db.run(insert(2))
    })
    const closing = db.close()
    gate.open()
    expect(await reasonOf(session)).toBe("PoolClosed")
    await closing
    expect(await rows()).toEqual([1])
  })

  it("cuts what does not end within drainTimeout", async () => {
    await table()
    const db = make({ drainTimeout: 50 })
    const inside = latch()
    const session = db.session(async () => {
      await db.run(insert(1))
      inside.open()
      await db.run(Effect.never)
    })
    session.catch(() => {})
    await inside.opened
    await db.close()
    await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
    expect(await rows()).toEqual([])
  })

  it("twice does nothing more, and both wait", async () => {
    const db = make()
    await db.run(Effect.asVoid(Effect.flatMap(DbSession, ({ sql }) => sql`SELECT 1`)))
    await Promise.all([db.close(), db.close()])
    await db.close()
    await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
    expect(await reasonOf(db.run(insert(1)))).toBe("PoolClosed")
  })

  it("before the first use builds nothing, and is for good", async () => {
    let built = 0
    const db = DbRuntime.make(
      quietly(Layer.merge(DbLayer({ url: database.url }), Layer.effectDiscard(Effect.sync(() => built++))))
    )
    await db.close()
    expect(await reasonOf(db.run(Effect.void))).toBe("PoolClosed")
    expect(built).toBe(0)
  })
})

describe("the layer", () => {
  it("is built once, at the first use, by however many calls", async () => {
    let built = 0
    const db = DbRuntime.make(
      quietly(Layer.merge(DbLayer({ url: database.url }), Layer.effectDiscard(Effect.sync(() => built++))))
    )
    expect(built).toBe(0)
    await Promise.all(Array.from({ length: 20 }, () => db.run(Effect.flatMap(DbSession, ({ sql }) => sql`SELECT 1`))))
    expect(built).toBe(1)
    await db.close()
  })

  it("may provide more, which run can use, also in a session", async () => {
    class Greeting extends Context.Tag("test/Greeting")<Greeting, string>() {}
    const db = DbRuntime.make(Layer.merge(quietly(DbLayer({ url: database.url })), Layer.succeed(Greeting, "hello")))
    expect(await db.run(Greeting)).toBe("hello")
    expect(await db.session(() => db.run(Effect.zip(Greeting, pid)))).toEqual(["hello", expect.any(Number)])
    await db.close()
  })

  it("that can't be built rejects each call with its own error", async () => {
    const db = DbRuntime.make(DbLayer({ url: "nonsense" }))
    expect(await reasonOf(db.run(insert(1)))).toBe("InvalidInput")
    expect(await reasonOf(db.session(() => 1))).toBe("InvalidInput")
    await db.close()
  })
})

describe("runSync", () => {
  const statement = (text: string) => Effect.flatMap(DbSession, ({ sql }) => sql.unsafe(text))

  test("runs a statement before it returns", async (db) => {
    db.runSync(insert(1))
    expect(db.runSync(seen)).toEqual([1])
    expect(await rows()).toEqual([1])
    expect(db.runSync(DbEngine.stats)).toMatchObject({ total: 1, used: 0, idle: 1 })
  })

  test("its connections count in stats, whoever asks", async (db) => {
    db.runSync(insert(1))
    expect(await stats(db)).toMatchObject({ total: 1, used: 0, idle: 1, max: 10 })
    // It has none of those of the event loop.
    await db.run(insert(2))
    expect(await stats(db)).toMatchObject({ total: 2, used: 0, idle: 2, max: 10 })
    expect(db.runSync(DbEngine.stats)).toEqual(await stats(db))
  })

  test("evictAll closes its connections too", async (db) => {
    db.runSync(insert(1))
    await db.run(insert(2))
    await db.run(DbEngine.evictAll)
    await vi.waitFor(async () => expect((await stats(db)).total).toBe(0))
    expect(db.runSync(seen)).toEqual([1, 2])
  })

  test("a session has one connection and one transaction, and commits", async (db) => {
    const [one, two] = db.runSync(DbSession.autocommit(Effect.all([place, Effect.zipRight(insert(1), place)])))
    expect(one).toEqual(two)
    expect(await rows()).toEqual([1])
  })

  test("a failure rolls back and throws the same error", async (db) => {
    const mine = new Error("no")
    expect(thrown(() => db.runSync(DbSession.autocommit(Effect.zipRight(insert(1), Effect.fail(mine)))))).toBe(mine)
    expect(thrown(() => db.runSync(Effect.zipRight(withTransaction(insert(2)), Effect.die(mine))))).toBe(mine)
    expect(reasonThrown(() => db.runSync(DbSession.autocommit(Effect.all([insert(3), insert(3)]))))).toBe(
      "UniqueViolation"
    )
    expect(
      reasonThrown(() => db.runSync(DbSession.autocommit(Effect.zipRight(insert(4), Effect.ignore(refused)))))
    ).toBe("TransactionAborted")
    expect(await rows()).toEqual([2])
  })

  test("blocks, siblings, isolated sessions and streams are as ever", async (db) => {
    const found = db.runSync(
      DbSession.autocommit(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* insert(1)
          yield* Effect.ignore(withTransaction(Effect.zipRight(insert(2), Effect.fail("no"))))
          yield* DbSession.isolated(insert(3))
          yield* Effect.forEach([4, 5, 6], (id) => withTransaction(insert(id)), { concurrency: "unbounded" })
          const streamed = yield* Stream.runCount(sql`SELECT generate_series(1, 1200)`.stream)
          expect(streamed).toBe(1200)
          return yield* seen
        })
      )
    )
    expect(found).toEqual([1, 3, 4, 5, 6])
    expect(await rows()).toEqual([1, 3, 4, 5, 6])
  })

  test("large results, large values, and a thousand calls", async (db) => {
    const { sql } = await db.run(DbSession)
    const large = "x".repeat(3_000_000)
    const [row] = db.runSync(sql<{ n: number }>`SELECT length(${large}) AS n`)
    expect(row).toEqual({ n: large.length })
    expect(db.runSync(sql`SELECT generate_series(1, 50000) AS n, 'some text' AS text`).length).toBe(50_000)
    for (let i = 0; i < 1000; i++) expect(db.runSync(sql`SELECT ${i}::int AS i`)).toEqual([{ i }])
    expect(db.runSync(DbEngine.stats).total).toBe(1)
  })

  test("a service that has captured the facade can be used", async () => {
    class Users extends Effect.Service<Users>()("test/Users", {
      effect: Effect.map(DbSession, (db) => ({ add: (id: number) => db.sql`INSERT INTO t (id) VALUES (${id})` }))
    }) {}
    const layer = quietly(DbLayer({ url: database.url }))
    const db = DbRuntime.make(Layer.provideMerge(Users.Default, layer))
    db.runSync(DbSession.autocommit(Effect.zipRight(Users.pipe(Effect.flatMap((_) => _.add(7))), insert(8))))
    expect(await rows()).toEqual([7, 8])
    await db.close()
  })

  test("sleeps, and a time limit that cancels the statement", async (db) => {
    const started = performance.now()
    db.runSync(Effect.sleep(30))
    expect(performance.now() - started).toBeGreaterThan(25)
    const limited = Effect.timeoutFail(Effect.zipRight(insert(1), statement("SELECT pg_sleep(60)")), {
      duration: 50,
      onTimeout: () => "late"
    })
    expect(thrown(() => db.runSync(DbSession.autocommit(limited)))).toBe("late")
    expect(db.runSync(seen)).toEqual([])
  })

  test("retries a serialization failure, with the pauses in between", async (db) => {
    await db.run(insert(1))
    let attempts = 0
    const body = Effect.gen(function* () {
      yield* seen
      if (++attempts === 1) yield* DbSession.isolated(statement("UPDATE t SET id = 2"))
      yield* statement("UPDATE t SET id = id + 10")
    })
    db.runSync(withTransaction(body, { isolation: "serializable", retry: true }))
    expect(attempts).toBe(2)
    expect(await rows()).toEqual([12])
  })

  test("what only the event loop can bring is refused, and what was begun is rolled back", async (db) => {
    const never = Effect.promise(() => new Promise<void>((resolve) => setTimeout(resolve, 1)))
    expect(reasonThrown(() => db.runSync(never))).toBe("InvalidInput")
    expect(reasonThrown(() => db.runSync(DbSession.autocommit(Effect.zipRight(insert(1), never))))).toBe("InvalidInput")
    expect(db.runSync(DbEngine.stats)).toMatchObject({ used: 0, pending: 0 })
    expect(await rows()).toEqual([])
  })

  test(
    "a wait for a connection that only this effect could give back is AcquireTimeout",
    async (db) => {
      const nested = DbSession.autocommit(Effect.zipRight(insert(1), DbSession.isolated(insert(2))))
      expect(reasonThrown(() => db.runSync(nested))).toBe("AcquireTimeout")
      expect(db.runSync(DbEngine.stats)).toMatchObject({ used: 0, pending: 0 })
      expect(await rows()).toEqual([])
    },
    { maxConnections: 1, acquireTimeout: 100 }
  )

  test("the time limit of a block that has no effect to interrupt ends its statement", async (db) => {
    db.runSync(seen)
    const late = Effect.flatMap(DbSession.begin({ timeout: 300 }), () => statement("SELECT pg_sleep(60)"))
    expect(reasonThrown(() => db.runSync(DbSession.autocommit(late)))).toBe("TransactionTimeout")
  })

  test(
    "a wait for a block that only this effect could end is SessionBusy",
    async (db) => {
      const waits = Effect.gen(function* () {
        const tx = yield* DbSession.begin()
        yield* Effect.zipRight(insert(1), Effect.ignore(tx.rollback))
        const gate = yield* Deferred.make<void>()
        const block = yield* Effect.fork(withTransaction(Effect.zipRight(insert(2), Deferred.await(gate))))
        yield* Effect.yieldNow()
        const exit = yield* Effect.exit(insert(3))
        yield* Deferred.succeed(gate, undefined)
        yield* Fiber.join(block)
        return yield* exit
      })
      expect(reasonThrown(() => db.runSync(DbSession.autocommit(waits)))).toBe("SessionBusy")
    },
    { blockTimeout: 100 }
  )

  describe("while the server takes no more connections", () => {
    const limited = async (body: (url: string, more: () => void) => Promise<void>): Promise<void> => {
      const role = `limited_${process.pid}`
      const admin = DbRuntime.make(quietly(DbLayer({ url: database.url })))
      await admin.run(statement(`CREATE ROLE ${role} LOGIN PASSWORD 'x' CONNECTION LIMIT 0`))
      const url = new URL(database.url)
      url.username = role
      url.password = "x"
      try {
        await body(url.href, () => admin.runSync(statement(`ALTER ROLE ${role} CONNECTION LIMIT -1`)))
      } finally {
        await admin.run(statement(`DROP ROLE ${role}`))
        await admin.close()
      }
    }
    const one = statement("SELECT 1 AS one")

    it("it tries again until acquireTimeout, which tells why", () =>
      limited(async (url) => {
        const db = DbRuntime.make(quietly(DbLayer({ url, acquireTimeout: 2000 })))
        const error = thrown(() => db.runSync(one))
        expect(DbError.reason(error)).toMatchObject({ _tag: "AcquireTimeout" })
        expect(String((error as Error).message)).toContain("too many connections")
        await db.close()
      }))

    it("the pause that one call has left holds the next one up for no longer than it lasts", () =>
      limited(async (url, more) => {
        const db = DbRuntime.make(quietly(DbLayer({ url })))
        const hurried = DbConnection.withConnection(one, { timeout: 150 })
        expect(reasonThrown(() => db.runSync(hurried))).toBe("AcquireTimeout")
        more()
        expect(db.runSync(one)).toEqual([{ one: 1 }])
        await db.close()
      }))
  })

  test("in the session of promise code it is refused: that one can't be shared", async (db) => {
    await db.session(async () => {
      await db.run(insert(1))
      expect(reasonThrown(() => db.runSync(insert(2)))).toBe("PropagationError")
      await db.run(insert(3))
    })
    expect(await rows()).toEqual([1, 3])
    expect(reasonThrown(() => db.runSync(Effect.sync(() => db.runSync(insert(4)))))).toBe("InvalidInput")
  })

  test("a session of the event loop that is open meanwhile is not touched", async (db) => {
    const inside = latch()
    const gate = latch()
    const session = db.session(async () => {
      await db.run(insert(1))
      inside.open()
      await gate.opened
      await db.run(insert(2))
    })
    await inside.opened
    expect(db.runSync(seen)).toEqual([])
    db.runSync(insert(3))
    gate.open()
    await session
    expect(db.runSync(seen)).toEqual([1, 2, 3])
  })

  test(
    "nothing that one call has set reaches the next",
    async (db) => {
      const path = statement("SELECT current_setting('search_path') AS path, current_setting('work_mem') AS memory")
      const before = db.runSync(path)
      db.runSync(
        Effect.zipRight(statement("SET search_path TO nowhere"), Effect.exit(statement("SET work_mem TO '5MB'")))
      )
      db.runSync(Effect.exit(DbSchema.withTenant(statement("SELECT 1; SELECT nonsense"), "acme")))
      expect(db.runSync(path)).toEqual(before)
      db.runSync(DbConnection.withConnection(Effect.zipRight(statement("BEGIN"), insert(1))))
      expect(db.runSync(path)).toEqual(before)
      expect(await rows()).toEqual([])
    },
    { maxConnections: 1 }
  )

  test("a connection that the server has ended is replaced", async (db) => {
    const first = db.runSync(pid)
    await Effect.runPromise(database.query("SELECT pg_terminate_backend($1)", [first]))
    await Effect.runPromise(
      until(
        "the thread has said so",
        Effect.sync(() => db.runSync(DbEngine.stats).total === 0)
      )
    )
    expect(db.runSync(pid)).not.toBe(first)
  })

  it("a server that is not there is a typed error, in time", async () => {
    const url = new URL(database.url)
    url.pathname = "/no_such_database"
    const wrong = DbRuntime.make(quietly(DbLayer({ url: url.href })))
    expect(reasonThrown(() => wrong.runSync(insert(1)))).toBe("AuthorizationError")
    await wrong.close()
    const none = DbRuntime.make(quietly(DbLayer({ host: "127.0.0.1", port: 1 })))
    expect(reasonThrown(() => none.runSync(insert(1)))).toBe("ConnectionError")
    await none.close()
    // One that accepts and says nothing: this thread, which stands still.
    const silent = createServer().listen(0, "127.0.0.1")
    await new Promise((resolve) => silent.once("listening", resolve))
    const { port } = silent.address() as AddressInfo
    const slow = DbRuntime.make(quietly(DbLayer({ host: "127.0.0.1", port, connectTimeout: 100 })))
    expect(reasonThrown(() => slow.runSync(insert(1)))).toBe("ConnectionError")
    await slow.close()
    silent.close()
  })

  it("a server that says what pg does not understand is a typed error", async () => {
    // This thread stands still: another one has to say it.
    const strange = new Worker(
      `const { parentPort } = require("node:worker_threads")
       const answer = Buffer.from([0x52, 0, 0, 0, 8, 0, 0, 0, 99])
       const server = require("node:net").createServer((socket) => {
         socket.on("error", () => {})
         socket.once("data", () => socket.write(answer))
       })
       server.listen(0, "127.0.0.1", () => parentPort.postMessage(server.address().port))`,
      { eval: true }
    )
    const port = await new Promise<number>((resolve) => strange.once("message", resolve))
    const db = DbRuntime.make(quietly(DbLayer({ host: "127.0.0.1", port })))
    expect(reasonThrown(() => db.runSync(insert(1)))).toBe("ConnectionError")
    await db.close()
    await strange.terminate()
  })

  test("a thread that ends takes its connections along, and another one takes its place", async (db) => {
    const unref = vi.spyOn(Worker.prototype, "unref")
    db.runSync(insert(1))
    const [thread] = unref.mock.contexts as Array<Worker>
    unref.mockRestore()
    const left = new Promise((resolve) => thread!.once("exit", resolve))
    thread!.emit("error", new Error("out of memory"))
    await left
    expect(db.runSync(DbEngine.stats).total).toBe(0)
    expect(db.runSync(seen)).toEqual([1])
  })

  describe("whose thread ends while it waits", () => {
    /** Code that the thread loads before its own: it ends the thread in place of sending a text that says so. */
    const fatal = `
      const { Socket } = require("node:net")
      const { write } = Socket.prototype
      Socket.prototype.write = function (chunk, ...rest) {
        const text = Buffer.isBuffer(chunk) || chunk instanceof Uint8Array ? Buffer.from(chunk).toString("latin1") : ""
        if (text.includes("end the thread")) process.exit(1)
        const kept = []
        while (text.includes("fill the memory")) kept.push([...kept.slice(0, 100)])
        return write.call(this, chunk, ...rest)
      }`
    const dying = async (program: (db: Db) => Promise<void>, options: DbOptions = {}): Promise<void> => {
      const folder = mkdtempSync(join(tmpdir(), "effect-db-thread-"))
      const file = join(folder, "fatal.cjs")
      writeFileSync(file, fatal)
      const before = { ...threadOptions }
      Object.assign(threadOptions, { execArgv: ["--require", file], resourceLimits: { maxOldGenerationSizeMb: 32 } })
      try {
        await onRuntime(database, program, options)
      } finally {
        Object.assign(threadOptions, { resourceLimits: undefined }, before)
        rmSync(folder, { recursive: true })
      }
    }

    for (const [what, how] of [
      ["by itself", "end the thread"],
      ["out of memory", "fill the memory"]
    ] as const) {
      it(`${what} fails with a ConnectionError, and the next call has another one`, () =>
        dying(async (db) => {
          const error = thrown(() =>
            db.runSync(DbSession.autocommit(Effect.zipRight(insert(1), statement(`SELECT '${how}'`))))
          )
          expect(DbError.reason(error)).toMatchObject({
            _tag: "ConnectionError",
            phase: "read",
            code: "ERR_WORKER_EXIT"
          })
          expect(db.runSync(DbEngine.stats)).toMatchObject({ total: 0, pending: 0 })
          db.runSync(insert(2))
          expect(db.runSync(seen)).toEqual([2])
        }))
    }

    it("a fiber of the same call that waits for a connection gets one of another thread", () =>
      dying(
        (db) => {
          const ends = Effect.exit(statement("SELECT 'end the thread'"))
          db.runSync(Effect.all([ends, insert(1), insert(2)], { concurrency: "unbounded", discard: true }))
          expect(db.runSync(seen)).toEqual([1, 2])
          return Promise.resolve()
        },
        { maxConnections: 1 }
      ))
  })

  it("whose thread can't begin fails with a ConnectionError", async () => {
    const before = { ...threadOptions }
    Object.assign(threadOptions, { execArgv: ["--require", "/nowhere/at/all.cjs"] })
    const db = DbRuntime.make(quietly(DbLayer({ url: database.url, acquireTimeout: 500 })))
    expect(reasonThrown(() => db.runSync(insert(1)))).toMatch(/^(?:ConnectionError|AcquireTimeout)$/)
    await db.close()
    Object.assign(threadOptions, before)
  })

  it("a layer that needs the event loop has to be built before", async () => {
    await Effect.runPromise(database.query("DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY)"))
    const db = DbRuntime.make(quietly(DbLayer({ url: database.url, connect: "eager" })))
    expect(reasonThrown(() => db.runSync(insert(1)))).toBe("InvalidInput")
    await db.run(Effect.void)
    db.runSync(insert(1))
    expect(await rows()).toEqual([1])
    await db.close()
  })

  it("after close it throws PoolClosed, and no backend is left", async () => {
    const db = DbRuntime.make(quietly(DbLayer({ url: database.url })))
    db.runSync(seen)
    await db.run(seen)
    await db.close()
    await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
    expect(reasonThrown(() => db.runSync(seen))).toBe("PoolClosed")
  })

  test("what a call leaves running goes on with the event loop", async (db) => {
    const done = latch()
    db.runSync(Effect.forkDaemon(Effect.zipRight(Effect.sleep(5), Effect.sync(done.open))))
    await done.opened
  })
})

describe("code of both kinds", () => {
  test("an effect that awaits promise code of the runtime does not lose its session by it", async (db) => {
    await db.session(async () => {
      const outer = await db.run(pid)
      const inner = await db.run(
        Effect.gen(function* () {
          const gate = yield* Deferred.make<number>()
          yield* Effect.forkDaemon(Effect.flatMap(pid, (_) => Deferred.succeed(gate, _)))
          return yield* Effect.zip(
            Deferred.await(gate),
            Effect.promise(() => db.run(pid))
          )
        })
      )
      expect(inner).toEqual([outer, outer])
    })
  })

  /** Promise code that awaits something of its own before it runs a statement. */
  const later = async (db: Db): Promise<number> => {
    await new Promise((resolve) => setImmediate(resolve))
    return db.run(pid)
  }

  test("the session of an effect is that of the promise code that it awaits", async (db) => {
    const pids = await db.run(
      DbSession.autocommit(
        Effect.all([
          pid,
          Effect.promise(() => db.run(pid)),
          Effect.promise(() => later(db)),
          Effect.promise(() => db.session(() => later(db))),
          Effect.zipRight(
            Effect.sleep(1),
            Effect.promise(() => later(db))
          )
        ])
      )
    )
    expect(new Set(pids).size).toBe(1)
  })

  test("fibers at once have one each, of their own", async (db) => {
    const met = barrier(3)
    const inner = Effect.gen(function* () {
      const own = yield* pid
      yield* Effect.promise(met)
      expect(yield* Effect.promise(() => db.run(pid))).toBe(own)
      expect(yield* Effect.promise(() => later(db))).toBe(own)
      return own
    })
    const pids = await db.session(() =>
      db.run(Effect.all([inner, DbSession.isolated(inner), DbSession.isolated(inner)], { concurrency: "unbounded" }))
    )
    expect(new Set(pids).size).toBe(3)
  })

  test("a detached effect has none", async (db) => {
    await db.session(async () => {
      const outer = await db.run(pid)
      const both = Effect.all([Effect.promise(() => db.run(pid)), Effect.promise(() => later(db))])
      expect(await db.run(DbSession.detach(both))).not.toContain(outer)
    })
  })

  test(
    "a connection that was opened for a session leads nobody else into it",
    async (db) => {
      const opened = latch()
      const gate = latch()
      const no = new Error("no")
      const session = db.session(async () => {
        await db.run(insert(1))
        // Whoever comes next gets the connection that this session has opened.
        await db.run(DbSession.close)
        opened.open()
        await gate.opened
        await db.run(insert(2))
        throw no
      })
      await opened.opened
      const stranger = Effect.zipRight(
        pid,
        Effect.promise(async () => {
          await db.run(insert(3))
          await later(db)
          await db.run(insert(4))
        })
      )
      await db.run(stranger)
      await db.managed.runPromise(
        Effect.zipRight(
          pid,
          Effect.promise(() => db.run(insert(5)))
        )
      )
      expect(await rows()).toEqual([3, 4, 5])
      gate.open()
      expect(await rejection(session)).toBe(no)
      expect(await rows()).toEqual([3, 4, 5])
    },
    { maxConnections: 1 }
  )

  test("what an effect has not awaited gets SessionClosed after the session of the promise code", async (db) => {
    const gate = latch()
    let late = Promise.resolve("not begun")
    await db.session(() =>
      db.run(
        Effect.zipRight(
          insert(1),
          Effect.sync(() => {
            late = gate.opened.then(() => reasonOf(db.run(insert(2))))
          })
        )
      )
    )
    gate.open()
    expect(await late).toBe("SessionClosed")
    expect(await rows()).toEqual([1])
  })

  test("runSync in the session of an effect is refused as well", async (db) => {
    const within = Effect.zipRight(
      insert(1),
      Effect.sync(() => reasonThrown(() => db.runSync(insert(2))))
    )
    expect(await db.run(DbSession.autocommit(within))).toBe("PropagationError")
    expect(await rows()).toEqual([1])
  })
})

describe("AsyncLocalStorage of somebody else", () => {
  const user = new AsyncLocalStorage<string>()
  const users = ["ann", "bob", "cid", "dan", "eve"]
  const sees = async (): Promise<string | undefined> => {
    await Promise.resolve()
    return user.getStore()
  }
  const each = (f: () => Promise<unknown>) => Promise.all(users.map((name) => user.run(name, f)))
  const few: DbOptions = { maxConnections: 3 }

  for (const [what, of] of [
    ["session", (db) => db.session(sees)],
    ["isolated", (db) => db.isolated(sees)],
    ["transaction", (db) => db.transaction(sees)],
    ["transaction whose outcome is verified", (db) => db.transaction(sees, { verifyOutcome: true })],
    ["transaction in a session", (db) => db.session(async () => (await db.run(pid), db.transaction(sees)))],
    ["atomic in a session", (db) => db.session(async () => (await db.run(place), db.atomic(sees)))],
    ["transaction with a time limit", (db) => db.transaction(sees, { timeout: "10 seconds" })]
  ] as ReadonlyArray<readonly [string, (db: Db) => Promise<unknown>]>) {
    test(
      `the callback of a ${what} sees its caller's`,
      async (db) => expect(await each(() => of(db))).toEqual(users),
      few
    )
  }

  test(
    "so do blocks that take turns, and attempts that are repeated",
    async (db) => {
      const block = () => db.transaction(async () => (await db.run(pid), user.getStore()))
      const turns = await each(() => db.session(() => Promise.all([block(), block()])))
      expect(turns).toEqual(users.map((name) => [name, name]))
      const repeated = await each(async () => {
        const seen: Array<string | undefined> = []
        const attempt = async () => {
          seen.push(user.getStore())
          if (seen.length < 3) await db.run(conflict)
        }
        await db.transaction(attempt, { retry: true })
        return seen
      })
      expect(repeated).toEqual(users.map((name) => [name, name, name]))
    },
    few
  )

  test(
    "a session that begins with an effect of the options",
    async (db) => expect(await each(() => db.session(sees))).toEqual(users),
    {
      ...few,
      beforeSession: Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT 1`)
    }
  )

  test(
    "an effect sees its caller's before and after a statement, a pause and a fork",
    async (db) => {
      const look = Effect.sync(() => user.getStore())
      const looks = Effect.gen(function* () {
        const before = yield* look
        yield* pid
        const after = yield* look
        yield* Effect.sleep(1)
        const later = yield* look
        const both = yield* Effect.all([Effect.zipRight(pid, look), look], { concurrency: "unbounded" })
        return [before, after, later, ...both]
      })
      expect(await each(() => db.run(looks))).toEqual(users.map((name) => [name, name, name, name, name]))
    },
    few
  )

  test("the layer, and what it opens, is nobody's", async () => {
    let built: string | undefined = "never"
    let connected: string | undefined = "never"
    const db = DbRuntime.make(
      quietly(
        Layer.merge(
          DbLayer({ url: database.url, afterConnect: Effect.sync(() => void (connected = user.getStore())) }),
          Layer.effectDiscard(Effect.sync(() => void (built = user.getStore())))
        )
      )
    )
    await user.run("ann", () => db.run(pid))
    expect([built, connected]).toEqual([undefined, undefined])
    // Effects that are run without a caller's context: not ann's, who has opened the connection.
    const after = Effect.map(pid, () => user.getStore())
    expect(await db.managed.runPromise(after)).toBe(undefined)
    await db.close()
  })

  test("a connection keeps nothing alive of the request that has opened it", async (db) => {
    setFlagsFromString("--expose-gc")
    const collect = runInNewContext("gc") as () => void
    const request = new AsyncLocalStorage<object>()
    const served = async (): Promise<WeakRef<object>> => {
      const store = { large: "x".repeat(1000) }
      await request.run(store, () => db.session(() => db.run(insert(1))))
      return new WeakRef(store)
    }
    const kept = await served()
    expect((await stats(db)).idle).toBe(1)
    await Effect.runPromise(
      until(
        "it is collected",
        Effect.sync(() => {
          collect()
          return kept.deref() === undefined
        })
      )
    )
  })
})

describe("an SqlError that promise code is rejected with", () => {
  for (const form of ["transaction", "atomic"] as const) {
    test(`${form} tries again when it is one that passes`, async (db) => {
      let attempts = 0
      const value = await db[form](
        async () => {
          await db.run(insert(++attempts))
          if (attempts < 3) await db.run(conflict)
          return "done"
        },
        { retry: true }
      )
      expect([value, attempts]).toEqual(["done", 3])
      expect(await rows()).toEqual([3])
    })

    test(`${form} does not try again for another one, nor for what is none`, async (db) => {
      let attempts = 0
      const again = (failed: () => Promise<unknown>) => db[form](() => (attempts++, failed()), { retry: true })
      expect(await rejection(again(() => db.run(refused)))).toBeInstanceOf(DbError)
      const mine = new Error("no")
      expect(await rejection(again(() => Promise.reject(mine)))).toBe(mine)
      expect(attempts).toBe(2)
    })
  }

  test("is what the caller's promise is rejected with, the same object", async (db) => {
    for (const form of ["session", "isolated", "transaction", "atomic"] as const) {
      let inner: unknown = undefined
      const failed = db[form](async () => {
        inner = await rejection(db.run(conflict))
        throw inner
      })
      expect(await rejection(failed)).toBe(inner)
      expect(DbError.reason(inner)?._tag).toBe("SerializationError")
    }
  })

  test("also when the attempts are used up", async (db) => {
    const inner: Array<unknown> = []
    const failed = db.transaction(
      async () => {
        inner.push(await rejection(db.run(conflict)))
        throw inner.at(-1)
      },
      { retry: Schedule.recurs(1) }
    )
    expect(await rejection(failed)).toBe(inner[1])
    expect(inner.length).toBe(2)
  })
})
