import type { SqlError } from "@effect/sql/SqlError"
import { describe, it } from "@effect/vitest"
import { Deferred, Effect, Exit, Fiber, Layer, Option, Scope, Stream } from "effect"
import {
  type Connection,
  type ConnectionOptions,
  DbConnection,
  DbEngine,
  DbError,
  DbLayer,
  DbQuery,
  DbSession,
  withTransaction
} from "effect-db"
import { Socket } from "node:net"
import { Readable } from "node:stream"
import { pipeline } from "node:stream/promises"
import { from, to } from "pg-copy-streams"
import QueryStream from "pg-query-stream"
import { expect } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { proxy } from "./support/proxy.js"
import {
  committed,
  expectAtRest,
  insert,
  killAmbient,
  onDatabase,
  outcome,
  pid,
  programsOn,
  proxiedOn,
  quietly,
  reason,
  refused,
  seen,
  sessionForms,
  sleep,
  used
} from "./support/programs.js"
import { latch, open, pending, soon, timed, took, until, untilStats } from "./support/until.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

const acquire = DbConnection.acquire

/** Borrowed by the pool's own count, and as many backends on the server as the pool says. */
const expectBorrowed = (n: number) =>
  Effect.gen(function* () {
    const { closing, connecting, idle, used } = yield* DbEngine.stats
    expect({ used, connecting, closing }).toEqual({ used: n, connecting: 0, closing: 0 })
    expect((yield* database.activity).total).toBe(used + idle)
  })

/** The connection on top of the fiber's stack. */
const top = Effect.map(DbConnection.current, Option.getOrThrow)
const topName = Effect.map(
  DbConnection.current,
  Option.map(({ name }) => name)
)

describe("29-31 how many connections a nesting of acquisitions borrows", () => {
  const root: ConnectionOptions = { reuse: false }
  const reuse: ConnectionOptions = { reuse: true }
  const orphan: ConnectionOptions = { reuse: false, reusable: false }
  const lazy: ConnectionOptions = { reuse: false, lazy: true }
  const lazyReuse: ConnectionOptions = { reuse: true, lazy: true }
  const lazyOrphan: ConnectionOptions = { reuse: false, lazy: true, reusable: false }
  const nestings: ReadonlyArray<readonly [string, ReadonlyArray<ConnectionOptions>, number]> = [
    ["a root", [root], 1],
    ["root, root", [root, root], 2],
    ["root, reuse", [root, reuse], 1],
    ["reuse on an empty stack", [reuse], 1],
    ["reuse, reuse: the first became a root", [reuse, reuse], 1],
    ["root, reuse, reuse", [root, reuse, reuse], 1],
    ["root, reuse, root, reuse", [root, reuse, root, reuse], 2],
    ["an orphan", [orphan], 1],
    ["root, orphan", [root, orphan], 2],
    ["root, orphan, reuse: shares the root", [root, orphan, reuse], 2],
    ["orphan, reuse: nobody reuses an orphan", [orphan, reuse], 2],
    ["orphan, orphan", [orphan, orphan], 2],
    ["lazy root", [lazy], 0],
    ["lazy root, lazy root", [lazy, lazy], 0],
    ["lazy root, lazy reuse", [lazy, lazyReuse], 0],
    ["lazy reuse on an empty stack", [lazyReuse], 0],
    ["lazy root, reuse: the root borrows now", [lazy, reuse], 1],
    ["lazy root, lazy reuse, reuse", [lazy, lazyReuse, reuse], 1],
    ["lazy root, root", [lazy, root], 1],
    ["root, lazy reuse", [root, lazyReuse], 1],
    ["lazy orphan", [lazyOrphan], 0],
    ["root, lazy orphan", [root, lazyOrphan], 1],
    ["lazy root, orphan, reuse", [lazy, orphan, reuse], 2]
  ]
  for (const [name, options, n] of nestings) {
    test(`acquire: ${name}: ${n}`, () =>
      Effect.zipRight(
        Effect.scoped(
          Effect.zipRight(
            Effect.forEach(options, (one) => acquire(one)),
            expectBorrowed(n)
          )
        ),
        Effect.map(used, (_) => expect(_).toBe(0))
      ))

    test(`withConnection: ${name}: ${n}`, () =>
      Effect.zipRight(
        options.reduceRight<Effect.Effect<void, unknown, DbEngine>>(
          (inner, one) => DbConnection.withConnection(inner, one),
          expectBorrowed(n)
        ),
        Effect.map(used, (_) => expect(_).toBe(0))
      ))
  }

  test("withConnection shares what is ambient unless it is told otherwise", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const outer = yield* pid
        expect(yield* DbConnection.withConnection(pid)).toBe(outer)
        expect(yield* pid.pipe(DbConnection.withConnection)).toBe(outer)
        expect(yield* pid.pipe(DbConnection.withConnection({ reuse: false }))).not.toBe(outer)
        expect(yield* Effect.all([pid, pid].map(DbConnection.withConnection))).toEqual([outer, outer])
      })
    ))
})

test("an option that is undefined is one that was left out", () =>
  DbConnection.withConnection(
    Effect.gen(function* () {
      expect(yield* DbConnection.withConnection(DbConnection.pid, { reuse: undefined })).toBe(yield* DbConnection.pid)
    })
  ))

describe("29 who shares whom", () => {
  test("root, reuse, root, reuse: each shares the root below it", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const a = yield* acquire()
        const a2 = yield* acquire({ reuse: true })
        const b = yield* acquire()
        const b2 = yield* acquire({ reuse: true })
        expect(yield* a2.pid).toBe(yield* a.pid)
        expect(yield* b2.pid).toBe(yield* b.pid)
        expect(yield* b.pid).not.toBe(yield* a.pid)
      })
    ))

  test("statements go to the top of the stack, with none of their own borrowed", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const a = yield* acquire()
        expect(yield* pid).toBe(yield* a.pid)
        const b = yield* acquire()
        expect(yield* pid).toBe(yield* b.pid)
        expect(yield* used).toBe(2)
      })
    ))

  test("the facade resolves to the top of the stack at each use", () =>
    Effect.gen(function* () {
      const facade = yield* DbConnection
      expect(yield* reason(facade.pid)).toBe("NoSession")
      expect(yield* facade.status).toBe("lazy")
      const a = yield* DbConnection.withConnection(Effect.all([facade.pid, DbConnection.pid, pid]))
      expect(new Set(a).size).toBe(1)
      yield* Effect.scoped(
        Effect.gen(function* () {
          yield* acquire()
          const b = yield* acquire()
          expect(yield* facade.pid).toBe(yield* b.pid)
          const gone = yield* b.pid
          yield* b.release()
          expect(yield* facade.pid).not.toBe(gone)
          expect(yield* facade.status).toBe("idle")
        })
      )
    }))

  test("the end of the scope takes it off the stack", () =>
    Effect.gen(function* () {
      yield* Effect.scoped(acquire({ name: "gone" }))
      expect(yield* topName).toEqual(Option.none())
    }))
})

describe("30 an orphan", () => {
  test("is not reused: who reuses inside it shares what was there before", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const a = yield* acquire()
        const orphan = yield* acquire({ reusable: false })
        const reuser = yield* acquire({ reuse: true })
        expect(yield* reuser.pid).toBe(yield* a.pid)
        expect(yield* orphan.pid).not.toBe(yield* a.pid)
      })
    ))

  test("serves the statements of its own effect, and no session's", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const a = yield* pid
        yield* DbConnection.withConnection(
          Effect.gen(function* () {
            const own = yield* pid
            expect(own).not.toBe(a)
            expect(yield* DbConnection.pid).toBe(own)
            expect(yield* DbConnection.withConnection(DbSession.autocommit(pid))).toBe(a)
          }),
          { reuse: false, reusable: false }
        )
      })
    ))

  test("gives its place up to a connection that is shared inside it", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const a = yield* pid
        const inside = Effect.zip(pid, DbConnection.pid)
        yield* DbConnection.withConnection(
          Effect.gen(function* () {
            expect(yield* DbConnection.withConnection(inside)).toEqual([a, a])
            expect(yield* pid).not.toBe(a)
          }),
          { reuse: false, reusable: false }
        )
      })
    ))
})

describe("31 a lazy root", () => {
  test("is on the stack at once", () =>
    Effect.scoped(
      Effect.gen(function* () {
        yield* acquire({ lazy: true, name: "lazy" })
        expect(yield* topName).toEqual(Option.some("lazy"))
        expect(yield* DbConnection.status).toBe("lazy")
      })
    ))

  for (const first of ["root", "reuser"] as const) {
    test(`borrows one for a statement on the ${first}, whichever is first`, () =>
      Effect.scoped(
        Effect.gen(function* () {
          const root = yield* acquire({ lazy: true })
          const reuser = yield* acquire({ lazy: true, reuse: true })
          const [one, two] = first === "root" ? [root, reuser] : [reuser, root]
          yield* one.sql`SELECT 1`
          yield* expectBorrowed(1)
          yield* two.sql`SELECT 1`
          yield* expectBorrowed(1)
          expect(yield* one.pid).toBe(yield* two.pid)
        })
      ))
  }

  test("borrows for a session's first statement", () =>
    DbConnection.withConnection(
      DbSession.autocommit(
        Effect.gen(function* () {
          expect(yield* used).toBe(0)
          yield* insert(1)
          expect(yield* used).toBe(1)
          expect(yield* DbConnection.pid).toBe(yield* pid)
        })
      ),
      { lazy: true }
    ))

  test("opens no socket when nothing is run", () =>
    Effect.gen(function* () {
      yield* DbConnection.withConnection(DbSession.autocommit(DbSession.state), { lazy: true })
      expect((yield* database.activity).total).toBe(0)
    }))

  test("asked by ten fibers at once, borrows one", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const pids = yield* Effect.all(
          Array.from({ length: 10 }, () => pid),
          { concurrency: "unbounded" }
        )
        expect(new Set(pids).size).toBe(1)
        yield* expectBorrowed(1)
      }),
      { lazy: true }
    ))
})

describe("32 release for the time being", () => {
  test("of a root: nothing is borrowed, and root and reuser borrow again together", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        const reuser = yield* acquire({ reuse: true })
        yield* root.release({ permanent: false })
        expect(yield* used).toBe(0)
        expect([yield* root.status, yield* reuser.status]).toEqual(["lazy", "lazy"])
        yield* reuser.sql`SELECT 1`
        expect(yield* used).toBe(1)
        expect(yield* root.pid).toBe(yield* reuser.pid)
      })
    ))

  test("of a reuser: the root keeps its connection, and both work", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        const reuser = yield* acquire({ reuse: true })
        const before = yield* root.pid
        yield* reuser.release({ permanent: false })
        expect(yield* used).toBe(1)
        expect([yield* root.pid, yield* reuser.pid]).toEqual([before, before])
      })
    ))

  test("twice, and of a root that has nothing: nothing", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire({ lazy: true })
        yield* root.release({ permanent: false })
        yield* root.release({ permanent: false })
        yield* root.sql`SELECT 1`
        expect(yield* used).toBe(1)
      })
    ))

  test(
    "lets somebody else have it meanwhile",
    () =>
      Effect.scoped(
        Effect.gen(function* () {
          const root = yield* acquire()
          const before = yield* root.pid
          yield* root.release({ permanent: false })
          expect(yield* DbConnection.withConnection(pid, { reuse: false })).toBe(before)
          expect(yield* root.pid).toBe(before)
        })
      ),
    { maxConnections: 1 }
  )

  test("in an open transaction is SessionBusy, and the transaction goes on", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(root.release({ permanent: false }))).toBe("SessionBusy")
            yield* insert(2)
          })
        )
        expect(yield* committed(database)).toEqual([1, 2])
      })
    ))
})

describe("33 release for good", () => {
  test("of a root: root and reusers fail with ConnectionReleased, whatever they are asked", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        const reuser = yield* acquire({ reuse: true })
        yield* root.release()
        expect(yield* used).toBe(0)
        for (const one of [root, reuser]) {
          expect(yield* reason(one.sql`SELECT 1`)).toBe("ConnectionReleased")
          expect(yield* reason(one.pid)).toBe("ConnectionReleased")
          expect(yield* reason(one.raw)).toBe("ConnectionReleased")
          expect(yield* one.status).toBe("released")
        }
      })
    ))

  test("a second time, of either kind, is ConnectionReleased", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        yield* root.release()
        expect(yield* reason(root.release())).toBe("ConnectionReleased")
        expect(yield* reason(root.release({ permanent: false }))).toBe("ConnectionReleased")
        expect(yield* used).toBe(0)
      })
    ))

  test("of a reuser: that one is released, the root is not", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        const reuser = yield* acquire({ reuse: true })
        yield* reuser.release()
        expect(yield* reason(reuser.sql`SELECT 1`)).toBe("ConnectionReleased")
        yield* root.sql`SELECT 1`
        expect(yield* used).toBe(1)
      })
    ))

  test("in an open transaction rolls it back", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        yield* Effect.exit(DbSession.autocommit(Effect.zipRight(insert(1), root.release())))
        expect(yield* committed(database)).toEqual([])
        expect(yield* used).toBe(0)
      })
    ))

  for (const [name, around] of sessionForms) {
    const lost = name === "autocommit" ? "ConnectionReleased" : "defect: ConnectionReleased"
    const gone: ReadonlyArray<
      readonly [how: string, go: (root: Connection, scope: Scope.CloseableScope) => Effect.Effect<unknown, SqlError>]
    > = [
      ["released", (root) => root.release()],
      ["closed with its scope", (_, scope) => Scope.close(scope, Exit.void)]
    ]
    for (const [how, go] of gone) {
      const on = (
        body: (go: Effect.Effect<unknown, SqlError>) => Effect.Effect<unknown, unknown, DbEngine | DbSession>
      ) =>
        Effect.gen(function* () {
          const scope = yield* Scope.make()
          const root = yield* Scope.extend(acquire(), scope)
          const exit = yield* Effect.exit(around(body(go(root, scope))))
          yield* Scope.close(scope, Exit.void)
          expect(yield* used).toBe(0)
          return outcome(exit)
        })

      test(`${name}: a session whose transaction goes with its connection, ${how}, does not end as a success`, () =>
        Effect.gen(function* () {
          const log: Array<string> = []
          const body = (go: Effect.Effect<unknown, SqlError>) =>
            Effect.all([
              DbSession.afterCommit(Effect.sync(() => log.push("committed"))),
              DbSession.afterRollback(Effect.sync(() => log.push("rolled back"))),
              insert(1),
              go
            ])
          expect(yield* on(body)).toBe(lost)
          expect(log).toEqual(["rolled back"])
          expect(yield* committed(database)).toEqual([])
        }))

      test(`${name}: nor does its commit, its block or a statement of it, ${how}`, () =>
        Effect.gen(function* () {
          expect(
            yield* on((go) =>
              Effect.gen(function* () {
                yield* insert(1)
                expect(yield* reason(withTransaction(Effect.zipRight(insert(2), go)))).toBe("ConnectionReleased")
                expect(yield* reason(insert(3))).toBe("ConnectionReleased")
                expect(yield* DbSession.state).toBe("failed")
                expect(yield* reason(DbSession.commit)).toBe("ConnectionReleased")
              })
            )
          ).toBe("success")
          expect(yield* committed(database)).toEqual([])
        }))

      test(`${name}: one that has nothing open is not touched when its connection is ${how}`, () =>
        Effect.gen(function* () {
          expect(yield* on((go) => go)).toBe("success")
          expect(yield* on((go) => Effect.all([insert(1), DbSession.commit, go]))).toBe("success")
          expect(yield* on((go) => Effect.all([insert(2), go, DbSession.rollback]))).toBe("success")
          expect(yield* committed(database)).toEqual([1])
        }))
    }
  }

  proxied("a session whose COMMIT is on its way when its connection is released has lost nothing", (proxy) =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            proxy.pause("backend")
            const sent = proxy.seen(({ text }) => text === "COMMIT")
            const commit = yield* Effect.fork(DbSession.commit)
            yield* Effect.promise(() => sent)
            const release = yield* Effect.fork(root.release())
            yield* Effect.yieldNow()
            proxy.resume()
            yield* Fiber.join(commit)
            yield* Fiber.join(release)
            expect(yield* DbSession.state).toBe("idle")
          })
        )
        expect(yield* committed(database)).toEqual([1])
      })
    )
  )

  test("while the hooks after its rollback run the session knows already, and nobody else is let in", () =>
    Effect.gen(function* () {
      const [begun, done] = yield* Effect.all([Deferred.make<void>(), Deferred.make<void>()])
      const scope = yield* Scope.make()
      const root = yield* Scope.extend(acquire(), scope)
      const hook = Effect.zipRight(Deferred.succeed(begun, undefined), Deferred.await(done))
      const exit = yield* Effect.exit(
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* Effect.zipRight(DbSession.afterRollback(hook), insert(1))
            yield* Effect.forkDaemon(root.release())
            yield* Deferred.await(begun)
            expect(yield* reason(insert(2))).toBe("ConnectionReleased")
            expect(yield* reason(DbSession.isolated(root.sql`INSERT INTO t (id) VALUES (3)`))).toBe(
              "ConnectionReleased"
            )
          })
        )
      )
      expect(outcome(exit)).toBe("ConnectionReleased")
      yield* Deferred.succeed(done, undefined)
      yield* Scope.close(scope, Exit.void)
      yield* until(
        "the connection is back",
        Effect.map(used, (_) => _ === 0)
      )
      expect(yield* committed(database)).toEqual([])
    }))

  test("takes it away from the fiber that releases it: below it is what was there before, or nothing", () =>
    Effect.gen(function* () {
      const released = Effect.zipRight(DbConnection.release(), DbConnection.pid)
      expect(yield* reason(DbConnection.withConnection(released))).toBe("NoSession")
      yield* DbConnection.withConnection(
        Effect.gen(function* () {
          const outer = yield* DbConnection.pid
          expect(yield* DbConnection.withConnection(released, { reuse: false })).toBe(outer)
        })
      )
    }))

  test("after a release for the time being is for good", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        yield* root.release({ permanent: false })
        yield* root.release()
        expect(yield* reason(root.pid)).toBe("ConnectionReleased")
      })
    ))
})

describe("34 releases in any order", () => {
  const orders = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0]
  ] as const
  for (const order of orders) {
    test(`three roots released ${order.map((_) => _ + 1).join(", ")}: the current one is the last that is left`, () =>
      Effect.scoped(
        Effect.gen(function* () {
          const names = ["1", "2", "3"]
          const roots = yield* Effect.forEach(names, (name) => acquire({ name }))
          const left = new Set(names)
          for (const at of order) {
            yield* roots[at]!.release()
            left.delete(names[at]!)
            expect(yield* topName).toEqual(Option.fromNullable([...left].at(-1)))
            expect(yield* used).toBe(left.size)
          }
        })
      ))
  }

  test("scopes closed in any order leave the others' connections alone", () =>
    Effect.gen(function* () {
      const outer = yield* Scope.make()
      const inner = yield* Scope.make()
      const a = yield* Scope.extend(acquire({ name: "a" }), outer)
      const b = yield* Scope.extend(acquire({ name: "b" }), inner)
      yield* Scope.close(outer, Exit.void)
      expect(yield* topName).toEqual(Option.some("b"))
      expect(yield* reason(a.pid)).toBe("ConnectionReleased")
      yield* b.sql`SELECT 1`
      yield* Scope.close(inner, Exit.void)
      expect(yield* topName).toEqual(Option.none())
      expect(yield* used).toBe(0)
    }))
})

describe("35 child fibers", () => {
  test("share the ambient connection", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        const pids = yield* Effect.all([pid, Effect.flatten(Effect.fork(pid)), Effect.timeout(pid, "5 seconds")], {
          concurrency: "unbounded"
        })
        expect(new Set(pids)).toEqual(new Set([yield* root.pid]))
      })
    ))

  test("with reuse: false have their own, and the parent's is itself all the while", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const root = yield* acquire()
        const mine = yield* root.pid
        const acquired = yield* Deferred.make<number>()
        const go = yield* Deferred.make<void>()
        const child = yield* Effect.fork(
          Effect.scoped(
            Effect.gen(function* () {
              const own = yield* acquire({ reuse: false })
              yield* Deferred.succeed(acquired, yield* own.pid)
              yield* Deferred.await(go)
              return yield* pid
            })
          )
        )
        const theirs = yield* Deferred.await(acquired)
        expect(theirs).not.toBe(mine)
        expect(yield* (yield* acquire({ reuse: true })).pid).toBe(mine)
        expect(yield* pid).toBe(mine)
        yield* Deferred.succeed(go, undefined)
        expect(yield* Fiber.join(child)).toBe(theirs)
        expect(yield* pid).toBe(mine)
        expect(yield* topName).toEqual(Option.some(root.name))
      })
    ))
})

describe("36 no connection becomes free in time", () => {
  test(
    "fails with AcquireTimeout when the time is over, names the holder, and leaves the stack as it was",
    () =>
      Effect.scoped(
        Effect.gen(function* () {
          const root = yield* acquire({ name: "the greedy one" })
          const [elapsed, error] = yield* timed(Effect.flip(acquire({ timeout: "100 millis" })))
          expect(elapsed).toBeGreaterThanOrEqual(95)
          expect(elapsed).toBeLessThan(soon)
          const why = DbError.reason(error)
          if (why?._tag !== "AcquireTimeout") return expect.fail(String(error))
          expect(why.holders?.map((_) => _.name)).toEqual(["the greedy one"])
          expect(error.message).toContain("the greedy one")
          expect(yield* topName).toEqual(Option.some("the greedy one"))
          expect(yield* pid).toBe(yield* root.pid)
          yield* root.release()
          yield* acquire({ timeout: "100 millis" })
        })
      ),
    { maxConnections: 1 }
  )

  test(
    "a lazy one waits for as long at its first use, and works afterwards",
    () =>
      Effect.scoped(
        Effect.gen(function* () {
          const root = yield* acquire()
          const lazy = yield* acquire({ lazy: true, timeout: "50 millis" })
          expect(yield* reason(lazy.sql`SELECT 1`)).toBe("AcquireTimeout")
          yield* root.release()
          yield* lazy.sql`SELECT 1`
        })
      ),
    { maxConnections: 1 }
  )

  it.scopedLive("tells a database that is down from a pool that is exhausted", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(
        Effect.provide(
          DbSession.autocommit(pid),
          quietly(DbLayer({ host: "127.0.0.1", port: 1, acquireTimeout: "200 millis" }))
        )
      )
      expect(DbError.reason(error)?._tag).toBe("ConnectionError")
      expect(error.message).toContain("127.0.0.1:1")
    })
  )

  it.scopedLive("names all hosts that are down, and what each has met where that differs", () =>
    Effect.gen(function* () {
      const via = yield* proxy(database.url)
      const silent = new URL(via.url)
      via.accept("silent")
      const down = (...ports: ReadonlyArray<number>) =>
        Effect.map(
          Effect.flip(
            Effect.provide(
              DbEngine.ping,
              quietly(DbLayer({ hosts: ports.map((port) => ({ host: "127.0.0.1", port })), connectTimeout: 200 }))
            )
          ),
          (_) => _.message
        )
      expect(yield* down(1, 2)).toContain(
        "Cannot connect (127.0.0.1:1, 127.0.0.1:2): nothing accepts connections there (ECONNREFUSED)"
      )
      expect(yield* down(1, Number(silent.port))).toMatch(
        /^Cannot connect \(127\.0\.0\.1:1\): nothing accepts.*; .*127\.0\.0\.1:\d+.* within 200 ms/
      )
    })
  )

  test("an option that is no boolean is InvalidInput, and is not taken for its default", () =>
    Effect.forEach(["reuse", "lazy", "reusable"], (name) =>
      Effect.scoped(Effect.map(reason(acquire({ [name]: "yes" })), (_) => expect(_).toBe("InvalidInput")))
    ))

  test("a timeout that is no duration is InvalidInput", () =>
    Effect.forEach(["soon", -1, NaN], (timeout) =>
      Effect.scoped(Effect.map(reason(acquire({ timeout: timeout as never })), (_) => expect(_).toBe("InvalidInput")))
    ))
})

describe("37 a pool of one", () => {
  test(
    "serves nested ambient use without a deadlock",
    () =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          const own = yield* pid
          expect(yield* DbConnection.withConnection(withTransaction(DbSession.autocommit(pid)))).toBe(own)
        })
      ),
    { maxConnections: 1, acquireTimeout: "2 seconds" }
  )

  for (const [name, independent] of [
    ["isolated", DbSession.isolated(pid)],
    ["requiresNew", withTransaction(pid, { propagation: "requiresNew" })],
    ["reuse: false", DbConnection.withConnection(pid, { reuse: false })],
    ["reserve", Effect.scoped(Effect.flatMap(DbSession, ({ sql }) => sql.reserve))]
  ] as const) {
    test(
      `fails nested independent use (${name}) with AcquireTimeout, not with a hang`,
      () =>
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            expect(yield* reason(independent as Effect.Effect<unknown, unknown, DbEngine | DbSession>)).toBe(
              "AcquireTimeout"
            )
            yield* insert(2)
          })
        ),
      { maxConnections: 1, acquireTimeout: "100 millis" }
    )
  }
})

describe("38 interrupted fifty times", () => {
  const max = 3
  /** Every connection that the pool may have can be had at once. */
  const wholePool = Effect.scoped(
    Effect.gen(function* () {
      yield* Effect.all(
        Array.from({ length: max }, () => acquire({ timeout: "5 seconds" })),
        { concurrency: "unbounded" }
      )
      expect(yield* used).toBe(max)
    })
  )
  const borrowing = {
    acquire: Effect.scoped(Effect.zipRight(acquire(), Effect.never)),
    "withConnection of a statement": Effect.zipRight(
      DbConnection.withConnection(pid, { reuse: false, lazy: true }),
      Effect.never
    ),
    "a session": DbSession.isolated(Effect.zipRight(pid, Effect.never)),
    "an implicit statement": Effect.zipRight(DbSession.detach(pid), Effect.never),
    reserve: Effect.scoped(
      Effect.zipRight(
        Effect.flatMap(DbSession, ({ sql }) => sql.reserve),
        Effect.never
      )
    )
  }
  for (const [name, borrow] of Object.entries(borrowing) as ReadonlyArray<
    [string, Effect.Effect<never, unknown, DbEngine | DbSession>]
  >) {
    test(
      `waiting for ${name}: the interrupt returns at once and the whole pool can be acquired`,
      () =>
        Effect.gen(function* () {
          yield* Effect.scoped(
            Effect.gen(function* () {
              yield* Effect.all(Array.from({ length: max }, () => acquire()))
              for (let i = 0; i < 50; i++) {
                const waiting = yield* Effect.fork(DbSession.detach(borrow))
                const { stats } = yield* DbEngine
                yield* pending(1)
                yield* Fiber.interrupt(waiting)
                expect(yield* stats).toMatchObject({ pending: 0, used: max })
              }
            })
          )
          yield* wholePool
        }),
      { maxConnections: max, acquireTimeout: "20 seconds" }
    )

    test(
      `in the hand-over to ${name}: nothing is lost`,
      () =>
        Effect.gen(function* () {
          for (let i = 0; i < 50; i++) {
            yield* Effect.scoped(
              Effect.gen(function* () {
                const held = yield* Effect.all(Array.from({ length: max }, () => acquire()))
                const waiting = yield* Effect.fork(DbSession.detach(borrow))
                yield* pending(1)
                // The connection is its own from here on; the fiber has not run yet, or is a few steps on.
                yield* held[0]!.release()
                for (let step = i % 5; step > 0; step--) yield* Effect.yieldNow()
                yield* Fiber.interrupt(waiting)
              })
            )
            yield* untilStats("all are back", (_) => _.used === 0 && _.pending === 0)
          }
          yield* wholePool
        }),
      { maxConnections: max, acquireTimeout: "20 seconds" }
    )
  }

  proxied(
    "connecting: the connection that was on its way serves the next",
    (proxy) =>
      Effect.gen(function* () {
        const { evictAll, stats } = yield* DbEngine
        for (let i = 0; i < 50; i++) {
          proxy.pause("backend")
          const startup = proxy.seen(({ type }) => type === "startup")
          const waiting = yield* Effect.fork(DbSession.isolated(pid))
          yield* Effect.promise(() => startup)
          yield* Fiber.interrupt(waiting)
          expect((yield* stats).connecting).toBe(1)
          proxy.resume()
          yield* untilStats("connected", (_) => _.connecting === 0)
          expect(yield* stats).toMatchObject({ used: 0, pending: 0, idle: 1 })
          yield* evictAll
          yield* untilStats("closed", (_) => _.total === 0)
        }
        yield* wholePool
      }),
    { maxConnections: max }
  )
})

describe("39 interrupted in mid-statement", () => {
  const forms: Record<string, Effect.Effect<unknown, unknown, DbEngine | DbConnection | DbSession>> = {
    "an implicit statement": Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT pg_sleep(60)`),
    "a statement on a connection": DbConnection.withConnection(
      Effect.flatMap(DbConnection, ({ sql }) => sql`SELECT pg_sleep(60)`)
    ),
    "a statement of a session": DbSession.autocommit(Effect.flatMap(DbSession, ({ sql }) => sql`SELECT pg_sleep(60)`))
  }
  for (const [name, sleeping] of Object.entries(forms)) {
    test(
      `${name}: the server's query ends, and the next borrower gets its own answer`,
      () =>
        Effect.gen(function* () {
          const running = yield* Effect.fork(sleeping)
          yield* untilActivity(database.url, ({ active }) => active === 1)
          expect(yield* took(Fiber.interrupt(running))).toBeLessThan(soon)
          yield* untilActivity(database.url, ({ active }) => active === 0)
          const { sql } = yield* DbEngine
          for (let n = 0; n < 20; n++) expect(yield* sql`SELECT ${n}::int AS n`).toEqual([{ n }])
        }),
      { maxConnections: 1 }
    )
  }

  test("the connection that it was interrupted on is still its owner's", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const before = yield* pid
        const { sql } = yield* DbConnection
        const running = yield* Effect.fork(sql`SELECT pg_sleep(60)`)
        yield* untilActivity(database.url, ({ active }) => active === 1)
        yield* Fiber.interrupt(running)
        expect(yield* pid).toBe(before)
      })
    ))
})

describe("40 a fiber that outlives its connection", () => {
  for (const [name, around] of [
    ["withConnection", <A, E>(effect: Effect.Effect<A, E, DbEngine>) => DbConnection.withConnection(effect)],
    ["acquire", <A, E>(effect: Effect.Effect<A, E, DbEngine>) => Effect.scoped(Effect.zipRight(acquire(), effect))]
  ] as const) {
    test(`${name}: gets ConnectionReleased at its next use, and nobody's connection`, () =>
      Effect.gen(function* () {
        const over = yield* Deferred.make<void>()
        const daemon = yield* around(
          Effect.forkDaemon(
            Effect.zipRight(
              Deferred.await(over),
              Effect.flatMap(DbEngine, ({ sql }) => Effect.exit(sql`SELECT 1`))
            )
          )
        )
        yield* Deferred.succeed(over, undefined)
        expect(outcome(yield* Fiber.join(daemon))).toBe("ConnectionReleased")
      }))
  }

  test("detached it runs on one of its own", () =>
    Effect.gen(function* () {
      const over = yield* Deferred.make<void>()
      const daemon = yield* DbConnection.withConnection(
        Effect.forkDaemon(DbSession.detach(Effect.zipRight(Deferred.await(over), pid)))
      )
      yield* Deferred.succeed(over, undefined)
      expect(yield* Fiber.join(daemon)).toBeGreaterThan(0)
    }))

  test("gets ConnectionReleased for what it had in the queue", () =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      const connection = yield* Scope.extend(acquire(), scope)
      yield* Scope.close(scope, Exit.void)
      expect(yield* reason(connection.sql`SELECT 1`)).toBe("ConnectionReleased")
    }))
})

describe("raw", () => {
  test("is the pg client of the same backend, beside our own statements", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const client = yield* DbConnection.raw
        const { rows } = yield* Effect.promise(() => client.query<{ pid: number }>("SELECT pg_backend_pid() AS pid"))
        expect(rows).toEqual([{ pid: yield* pid }])
        yield* insert(1)
        const counted = yield* Effect.promise(() => client.query("SELECT count(*)::int AS n FROM t"))
        expect(counted.rows).toEqual([{ n: 1 }])
      })
    ))

  for (const [name, options] of Object.entries({ ours: {}, "of the user's": { stream: () => new Socket() } })) {
    test(
      `serves what reads and writes its stream in its own ways, a stream ${name}`,
      () =>
        DbConnection.withConnection(
          Effect.flatMap(DbConnection.raw, (client) =>
            Effect.promise(async () => {
              const lines = Array.from({ length: 20_000 }, (_, i) => `${i}\n`)
              await pipeline(Readable.from(lines), client.query(from("COPY t (id) FROM STDIN")))
              const copied: Array<Buffer> = []
              for await (const chunk of client.query(to("COPY t (id) TO STDOUT"))) copied.push(chunk as Buffer)
              expect(Buffer.concat(copied).toString()).toBe(lines.join(""))
              let read = 0
              for await (const { id } of client.query(new QueryStream("SELECT id FROM t ORDER BY id"))) {
                expect(id).toBe(read++)
              }
              expect(read).toBe(lines.length)
              expect((await client.query("SELECT 1 AS one")).rows).toEqual([{ one: 1 }])
            })
          )
        ),
      options
    )
  }

  test("that was used is destroyed when it is given back", () =>
    Effect.gen(function* () {
      const before = yield* DbConnection.withConnection(
        Effect.gen(function* () {
          const client = yield* DbConnection.raw
          yield* Effect.promise(() => client.query("SELECT 1"))
          return yield* DbConnection.pid
        })
      )
      expect(yield* DbConnection.withConnection(DbConnection.pid)).not.toBe(before)
    }))

  test("that was looked at only is kept", () =>
    Effect.gen(function* () {
      const before = yield* DbConnection.withConnection(Effect.zipRight(DbConnection.raw, DbConnection.pid))
      expect(yield* DbConnection.withConnection(DbConnection.pid)).toBe(before)
    }))

  test("left in a transaction leaves nothing to the next", () =>
    Effect.gen(function* () {
      yield* DbConnection.withConnection(
        Effect.flatMap(DbConnection.raw, (client) =>
          Effect.promise(async () => {
            await client.query("BEGIN")
            await client.query("INSERT INTO t (id) VALUES (1)")
          })
        )
      )
      yield* untilActivity(database.url, ({ idleInTransaction }) => idleInTransaction === 0)
      expect(yield* committed(database)).toEqual([])
    }))

  test("in an open transaction is in it, and our own statements go on in it", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            const client = yield* DbConnection.raw
            expect(yield* DbConnection.status).toBe("active")
            yield* insert(2)
            yield* Effect.promise(() => client.query("INSERT INTO t (id) VALUES (3)"))
            yield* insert(4)
          })
        )
        expect(yield* committed(database)).toEqual([1, 2, 3, 4])
      })
    ))

  test("in a failed transaction is in that one", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const failed = DbSession.autocommit(
          Effect.gen(function* () {
            yield* Effect.ignore(refused)
            yield* DbConnection.raw
            expect(yield* DbConnection.status).toBe("failed")
          })
        )
        expect(yield* reason(failed)).toBe("TransactionAborted")
        expect(yield* DbConnection.status).toBe("idle")
      })
    ))

  for (const [name, copy] of [
    ["copyTo", Effect.flatMap(DbEngine, ({ sql }) => Stream.runDrain(DbQuery.copyTo(sql`COPY t TO STDOUT`)))],
    [
      "copyFrom",
      Effect.flatMap(DbEngine, ({ sql }) => DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("2\n")))
    ]
  ] as const) {
    test(`beside it ${name} is refused, and nothing is sent`, () =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          yield* DbConnection.raw
          expect(yield* reason(copy)).toBe("InvalidInput")
          yield* DbSession.autocommit(
            Effect.gen(function* () {
              yield* insert(1)
              expect(yield* reason(copy)).toBe("InvalidInput")
            })
          )
          expect(yield* committed(database)).toEqual([1])
        })
      ))
  }

  test("a statement interrupted behind the client's own query never happens", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const client = yield* DbConnection.raw
        const lock = yield* lockedOutside(database, 1)
        const slow = client.query("SELECT pg_advisory_xact_lock(1)")
        yield* lock.waitedFor
        const queued = yield* Effect.fork(insert(1))
        yield* Effect.yieldNow()
        yield* Fiber.interrupt(queued)
        yield* lock.release
        yield* Effect.promise(() => slow)
        expect(yield* seen).toEqual([])
      })
    ))

  test("a statement behind the client's own query fails when the connection is lost", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const client = yield* DbConnection.raw
        const slow = client.query("SELECT pg_sleep(60)").catch((error: unknown) => error)
        yield* untilActivity(database.url, ({ active }) => active === 1)
        const queued = yield* Effect.fork(Effect.exit(insert(1)))
        yield* Effect.yieldNow()
        yield* database.query("SELECT pg_terminate_backend($1)", [yield* DbConnection.pid])
        expect(yield* Effect.promise(() => slow)).toBeInstanceOf(Error)
        expect(outcome(yield* Fiber.join(queued))).toBe("ConnectionError")
      })
    ))

  for (const [what, bytes] of [
    ["of no known type and without end", Buffer.from([0x21, 0x7f, 0xff, 0xff, 0xff])],
    ["that are a message without its body", Buffer.from([0x44, 0, 0, 0, 4])],
    ["that ask for a login of a kind that nobody knows", Buffer.from([0x52, 0, 0, 0, 8, 0, 0, 0, 99])],
    ["that ask for the password", Buffer.from([0x52, 0, 0, 0, 8, 0, 0, 0, 3])]
  ] as const) {
    proxied(`bytes ${what} end the connection, typed, for the client's own query as for what is behind it`, (at) =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          const client = yield* DbConnection.raw
          const asked = at.seen((_) => _.text.includes("pg_sleep"))
          const slow = client.query("SELECT pg_sleep(60)").catch((error: unknown) => error)
          yield* Effect.promise(() => asked)
          const queued = yield* Effect.fork(Effect.flip(insert(1)))
          yield* Effect.yieldNow()
          at.reset()
          at.injectGarbage(bytes)
          // What was wrong, not that the connection was cut for it.
          expect(String(yield* Effect.promise(() => slow))).toMatch(/^(?:ProtocolViolation|RangeError)/)
          expect(DbError.reason(yield* Fiber.join(queued))?._tag).toBe("ConnectionError")
          yield* insert(2)
          expect(yield* committed(database)).toEqual([2])
          expect(at.log.filter(({ conn, type }) => conn === 1 && type === "p")).toEqual([])
        })
      )
    )
  }

  proxied("garbage ends a statement of ours that runs there with a ConnectionError of the phase read", (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* DbConnection.raw
        const asked = at.seen((_) => _.text.includes("pg_sleep"))
        const slow = yield* Effect.fork(Effect.flip(sleep))
        yield* Effect.promise(() => asked)
        at.injectGarbage()
        expect(DbError.reason(yield* Fiber.join(slow))).toMatchObject({ _tag: "ConnectionError", phase: "read" })
      })
    )
  )

  test("what a handler of the client throws is seen, and ends the connection", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const client = yield* DbConnection.raw
        client.on("notice", () => {
          throw new Error("the handler's")
        })
        const own = process.listeners("uncaughtException")
        process.removeAllListeners("uncaughtException")
        const thrown = new Promise<Error>((resolve) => process.once("uncaughtException", resolve))
        const noticed = client.query("DO $$ BEGIN RAISE NOTICE 'look'; END $$").catch((error: unknown) => error)
        expect((yield* Effect.promise(() => thrown)).message).toBe("the handler's")
        for (const listener of own) process.on("uncaughtException", listener)
        expect(yield* Effect.promise(() => noticed)).toBeInstanceOf(Error)
        expect(yield* seen).toEqual([])
      })
    ))

  test("thousands of statements behind a ROLLBACK of the client's are all refused", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const session = DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            const client = yield* DbConnection.raw
            const rollback = client.query("ROLLBACK")
            const exits = yield* Effect.forEach(Array.from({ length: 10_000 }), () => Effect.exit(insert(2)), {
              concurrency: "unbounded"
            })
            yield* Effect.promise(() => rollback)
            expect([...new Set(exits.map(outcome))]).toEqual(["TransactionAborted"])
          })
        )
        expect(yield* reason(session)).toBe("TransactionAborted")
        expect(yield* committed(database)).toEqual([])
      })
    ))

  test("lost in a transaction of the client's own behind its own query fails what comes after, too", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const client = yield* DbConnection.raw
        yield* Effect.promise(() => client.query("BEGIN"))
        const slow = client.query("SELECT pg_sleep(60)").catch((error: unknown) => error)
        yield* untilActivity(database.url, ({ active }) => active === 1)
        const queued = yield* Effect.fork(Effect.exit(insert(1)))
        yield* Effect.yieldNow()
        yield* database.query("SELECT pg_terminate_backend($1)", [yield* DbConnection.pid])
        yield* Effect.promise(() => slow)
        expect(outcome(yield* Fiber.join(queued))).toBe("ConnectionError")
        expect(yield* reason(insert(2))).toBe("ConnectionError")
      })
    ))

  proxied("a statement whose cancel comes before it is cancelled by the next", (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* DbConnection.raw
        const held = at.holdAt((_) => _.text.includes("pg_sleep"), { forward: false })
        const slow = yield* Effect.fork(sleep)
        yield* Effect.promise(() => held)
        const left = yield* Effect.fork(Fiber.interrupt(slow))
        yield* until("the first has come", () => at.cancels.length > 1)
        at.resume()
        expect(yield* took(Fiber.join(left))).toBeLessThan(soon)
      })
    )
  )

  proxied(
    "a statement whose cancel is not answered does not hold who interrupts it",
    (at) =>
      DbConnection.withConnection(
        Effect.gen(function* () {
          yield* DbConnection.raw
          const held = at.holdAt((_) => _.text.includes("pg_sleep"), { forward: true })
          const slow = yield* Effect.fork(sleep)
          yield* Effect.promise(() => held)
          expect(yield* took(Fiber.interrupt(slow))).toBeLessThan(soon)
        })
      ),
    { settleTimeout: 200 }
  )

  proxied("a statement that ends while its cancel pauses leaves no timer behind", (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection
        yield* DbConnection.raw
        const timers = () => process.getActiveResourcesInfo().filter((_) => _ === "Timeout").length
        const before = timers()
        const held = at.holdAt((_) => _.text === "SELECT 1", { forward: false })
        const fiber = yield* Effect.fork(sql.unsafe("SELECT 1"))
        yield* Effect.promise(() => held)
        const left = yield* Effect.fork(Fiber.interrupt(fiber))
        // By now it pauses for longer than the rest of this test takes.
        yield* until("it has been asked for often", () => at.cancels.length > 4)
        at.resume()
        yield* Fiber.join(left)
        expect(timers()).toBeLessThanOrEqual(before)
      })
    )
  )

  proxied("a cancel that comes too late hits nothing that follows", (at) =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        yield* DbConnection.raw
        const lock = yield* lockedOutside(database, 1)
        const { sql } = yield* DbConnection
        const first = yield* Effect.fork(sql`SELECT pg_advisory_xact_lock(1)`)
        yield* lock.waitedFor
        const second = yield* Effect.fork(sql`SELECT pg_sleep(0.3)`)
        const asked = at.holdAt((_) => _.type === "cancel", { forward: false })
        const left = yield* Effect.fork(Fiber.interrupt(first))
        yield* Effect.promise(() => asked)
        yield* lock.release
        yield* until("it is over", () => at.log.some((_) => _.dir === "backend" && _.type === "C"))
        at.resume()
        yield* Fiber.join(left)
        yield* Fiber.join(second)
      })
    )
  )

  test("who waited for it in vain has not taken it: a COPY runs as ever", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection
        const lock = yield* lockedOutside(database, 1)
        const slow = yield* Effect.fork(sql`SELECT pg_advisory_xact_lock(1)`)
        yield* lock.waitedFor
        const waiting = yield* Effect.fork(DbConnection.raw)
        yield* Effect.yieldNow()
        yield* Fiber.interrupt(waiting)
        yield* lock.release
        yield* Fiber.join(slow)
        yield* DbQuery.copyFrom(sql`COPY t (id) FROM STDIN`, Stream.make("1\n"))
        expect(yield* committed(database)).toEqual([1])
      })
    ))

  test("whose connection goes while it is waited for is ConnectionReleased, and the next borrower has it", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const lock = yield* lockedOutside(database, 1)
        const one = yield* acquire()
        const slow = yield* Effect.fork(one.sql`SELECT pg_advisory_xact_lock(1), pg_backend_pid() AS pid`)
        yield* lock.waitedFor
        const waiting = yield* Effect.fork(reason(one.raw))
        yield* Effect.yieldNow()
        yield* one.release()
        yield* lock.release
        expect(yield* Fiber.join(waiting)).toBe("ConnectionReleased")
        expect((yield* Fiber.join(slow))[0]).toMatchObject({ pid: yield* pid })
      })
    ))

  test("makes a lazy root borrow", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        expect(yield* used).toBe(0)
        yield* DbConnection.raw
        expect(yield* used).toBe(1)
      }),
      { lazy: true }
    ))
})

describe("status and pid", () => {
  test("status tells lazy, idle, active, failed, released", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* acquire({ lazy: true })
        expect(yield* connection.status).toBe("lazy")
        yield* connection.sql`SELECT 1`
        expect(yield* connection.status).toBe("idle")
        yield* Effect.ignore(
          withTransaction(
            Effect.gen(function* () {
              yield* insert(1)
              expect(yield* connection.status).toBe("active")
              yield* Effect.exit(connection.sql`SELECT 1/0`)
              expect(yield* connection.status).toBe("failed")
            })
          )
        )
        expect(yield* connection.status).toBe("idle")
        yield* connection.release()
        expect(yield* connection.status).toBe("released")
      })
    ))

  test("one that has died is not idle, and the next use borrows another", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const first = yield* pid
        yield* killAmbient(database, first)
        expect(yield* DbConnection.status).toBe("lazy")
        yield* insert(1)
        expect(yield* DbConnection.status).toBe("idle")
        expect(yield* DbConnection.pid).not.toBe(first)
        yield* expectBorrowed(1)
        expect(yield* committed(database)).toEqual([1])
      })
    ))

  test("one that has died in a session's transaction serves again when that has ended", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const lost = DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* killAmbient(database, yield* pid)
            expect(yield* DbConnection.status).toBe("failed")
            yield* insert(2)
          })
        )
        expect(yield* reason(lost)).toBe("ConnectionError")
        yield* DbSession.autocommit(insert(3))
        yield* insert(4)
        expect(yield* committed(database)).toEqual([3, 4])
      })
    ))

  test("one that has died in a transaction of the user's own does not go on outside of it", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const { sql } = yield* DbConnection
        yield* sql`BEGIN`
        yield* killAmbient(database, yield* pid)
        expect(yield* DbConnection.status).toBe("failed")
        expect(yield* reason(insert(1))).toBe("ConnectionError")
        expect(yield* reason(insert(1))).toBe("ConnectionError")
        yield* DbConnection.release({ permanent: false })
        yield* insert(2)
        expect(yield* committed(database)).toEqual([2])
      })
    ))

  test("pid is that of the backend", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        expect(yield* DbConnection.pid).toBe(yield* pid)
      })
    ))
})

describe("sessions on a connection", () => {
  test("a session runs on the ambient connection and gives it back with no transaction", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        const before = yield* pid
        expect(yield* DbSession.autocommit(Effect.zipRight(insert(1), pid))).toBe(before)
        expect(yield* DbConnection.status).toBe("idle")
        expect(yield* used).toBe(1)
        expect(yield* pid).toBe(before)
        expect(yield* committed(database)).toEqual([1])
      })
    ))

  it.scopedLive("thousands that wait for their turn are all told when there is no connection any more", () =>
    Effect.gen(function* () {
      yield* database.query("DROP TABLE IF EXISTS t; CREATE TABLE t (id int)")
      const scope = yield* Scope.make()
      const context = yield* Layer.buildWithScope(quietly(DbLayer({ url: database.url })), scope)
      const outcomes = yield* DbConnection.withConnection(
        Effect.gen(function* () {
          const [inside, go] = [yield* latch, yield* latch]
          const holder = Effect.zipRight(insert(1), Effect.zipRight(open(inside), Deferred.await(go)))
          yield* Effect.forkScoped(Effect.exit(DbSession.autocommit(holder)))
          yield* Deferred.await(inside)
          let waiting = 0
          const waiter = DbSession.autocommit(
            Effect.zipRight(
              Effect.sync(() => void waiting++),
              insert(2)
            )
          )
          const all = yield* Effect.forkScoped(
            Effect.forEach(Array.from({ length: 5000 }), () => Effect.exit(waiter), { concurrency: "unbounded" })
          )
          yield* until("all have come", () => waiting === 5000)
          yield* killAmbient(database, yield* DbConnection.pid)
          const closing = yield* Effect.forkScoped(Scope.close(scope, Exit.void))
          yield* until(
            "the engine is closed",
            Effect.map(Effect.exit(DbSession.isolated(insert(3))), (exit) => outcome(exit) === "PoolClosed")
          )
          yield* open(go)
          const exits = yield* Fiber.join(all)
          yield* Fiber.join(closing)
          return exits.map(outcome)
        })
      ).pipe(Effect.provide(context))
      expect(outcomes.filter((_) => _ !== "ConnectionError" && _ !== "PoolClosed")).toEqual([])
    })
  )

  test("isolated never does", () =>
    DbConnection.withConnection(
      Effect.gen(function* () {
        expect(yield* DbSession.isolated(pid)).not.toBe(yield* pid)
      })
    ))

  test("connection.sql inside a session on that connection runs in the session", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* acquire()
        const rolledBack = DbSession.autocommit(
          Effect.zipRight(connection.sql`INSERT INTO t (id) VALUES (1)`, Effect.fail("undo" as const))
        )
        expect(yield* Effect.flip(rolledBack)).toBe("undo")
        expect(yield* committed(database)).toEqual([])
      })
    ))

  test("connection.sql may be the first statement of that session, behind beforeSession too", () =>
    Effect.gen(function* () {
      const before = yield* Deferred.make<void>()
      yield* Effect.scoped(
        Effect.gen(function* () {
          const connection = yield* acquire()
          yield* DbSession.autocommit(
            Effect.gen(function* () {
              yield* connection.sql`INSERT INTO t (id) VALUES (1)`
              expect(yield* DbSession.state).toBe("active")
              yield* DbSession.rollback
            })
          )
        })
      ).pipe(
        Effect.provide(
          quietly(DbLayer({ url: database.url, beforeSession: Effect.asVoid(Deferred.succeed(before, undefined)) }))
        )
      )
      expect(yield* Deferred.isDone(before)).toBe(true)
      expect(yield* committed(database)).toEqual([])
    }))

  test("connection.sql inside a session of another connection stays on its own", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* acquire()
        const rolledBack = DbSession.isolated(
          Effect.zipRight(connection.sql`INSERT INTO t (id) VALUES (1)`, Effect.fail("undo" as const))
        )
        expect(yield* Effect.flip(rolledBack)).toBe("undo")
        expect(yield* committed(database)).toEqual([1])
      })
    ))

  test("a statement that has no session waits for the transaction that another fiber has open there", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const connection = yield* acquire()
        const open = yield* Deferred.make<void>()
        const end = yield* Deferred.make<void>()
        const session = yield* Effect.fork(
          DbSession.autocommit(
            insert(1).pipe(
              Effect.zipRight(Deferred.succeed(open, undefined)),
              Effect.zipRight(Deferred.await(end)),
              Effect.zipRight(Effect.fail("undo"))
            )
          )
        )
        yield* Deferred.await(open)
        const outside = yield* Effect.fork(connection.sql`INSERT INTO t (id) VALUES (2)`)
        yield* Effect.yieldNow()
        yield* Deferred.succeed(end, undefined)
        yield* Fiber.await(session)
        yield* Fiber.join(outside)
        expect(yield* committed(database)).toEqual([2])
      })
    ))
})

describe("the Layer form", () => {
  const layered = <A, E>(
    effect: Effect.Effect<A, E, DbConnection | DbSession | DbEngine>,
    options?: ConnectionOptions
  ) => Effect.provide(effect, DbConnection.layer(options))

  test("is the ambient connection of what it is provided to", () =>
    Effect.gen(function* () {
      const pids = yield* layered(Effect.all([pid, DbConnection.pid, DbSession.autocommit(pid)]))
      expect(new Set(pids).size).toBe(1)
      expect(yield* used).toBe(0)
    }))

  test("borrows nothing when it is lazy and nothing is run", () =>
    Effect.gen(function* () {
      expect(yield* layered(used, { lazy: true })).toBe(0)
      expect(yield* layered(used)).toBe(1)
    }))

  test("merged with other layers is ambient all the same", () =>
    Effect.gen(function* () {
      const both = Layer.merge(DbConnection.layer(), Layer.effectDiscard(Effect.void))
      const pids = yield* Effect.provide(Effect.all([pid, pid], { concurrency: 2 }), both)
      expect(new Set(pids).size).toBe(1)
    }))

  test("is an orphan by reusable: false: no session and no one who reuses has it", () =>
    layered(
      Effect.gen(function* () {
        const own = yield* DbConnection.pid
        expect(yield* pid).toBe(own)
        expect(yield* DbSession.autocommit(pid)).not.toBe(own)
        expect(yield* DbConnection.withConnection(pid)).not.toBe(own)
      }),
      { reusable: false }
    ))

  test("is released with its scope", () =>
    Effect.gen(function* () {
      const facade = yield* layered(Effect.flatMap(DbConnection.current, (_) => Effect.succeed(Option.getOrThrow(_))))
      expect(yield* reason(facade.sql`SELECT 1`)).toBe("ConnectionReleased")
    }))
})

describe("by hand", () => {
  it.scopedLive("DbEngine.make gives an engine whose connections end with its scope", () =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      const engine = yield* Scope.extend(DbEngine.make({ url: database.url }), scope).pipe(
        Effect.provide(quietly(Layer.empty))
      )
      yield* engine.ping
      yield* Scope.close(scope, Exit.void)
      yield* untilActivity(database.url, ({ total }) => total === 0)
      expect(yield* reason(engine.ping)).toBe("PoolClosed")
    })
  )

  it.scopedLive("a current connection of one engine is none of another's", () =>
    onDatabase(database)(
      DbConnection.withConnection(
        Effect.gen(function* () {
          const mine = yield* pid
          const theirs = yield* Effect.provide(
            Effect.gen(function* () {
              expect(yield* DbConnection.current).toEqual(Option.none())
              const answer = yield* DbConnection.withConnection(pid)
              yield* expectAtRest(database)
              return answer
            }),
            quietly(DbLayer({ url: database.url }))
          )
          expect(theirs).not.toBe(mine)
          expect(yield* (yield* top).pid).toBe(mine)
        })
      )
    )
  )
})
