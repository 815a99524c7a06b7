import { Cookies, HttpRouter, HttpServer, HttpServerResponse } from "@effect/platform"
import { it } from "@effect/vitest"
import { Database, DbEngine, DbHttp, DbLayer, type DbOptions, DbRegistry, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import { afterAll, beforeAll, describe, expect } from "vitest"
import type { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import { ask, caughtUp, type Cluster, cluster, promote, urlOf } from "./support/cluster.js"
import { expectAtRest, quietly, type Services } from "./support/programs.js"
import { proxy } from "./support/proxy.js"
import { reasonOf, run } from "./support/wired.js"
import { until } from "./support/until.js"
import { listening } from "./support/served.js"

// What has been written on a primary is read from its standby, which streams from it.
const scope = Effect.runSync(Scope.make())
let at: Cluster
beforeAll(async () => {
  at = await Effect.runPromise(Scope.extend(cluster(), scope))
  await Effect.runPromise(ask(at.a, "CREATE FUNCTION add(id int) RETURNS void LANGUAGE sql AS 'SELECT 1'"))
})
afterAll(() => Effect.runPromise(Scope.close(scope, Exit.void)))

const Other = Database.make("other")
const insert = (id: number) => run(`INSERT INTO t VALUES (${id})`)
const ids = Effect.map(run("SELECT id FROM t ORDER BY id"), (rows) => rows.map((_) => _["id"]))
const port = Effect.map(run("SELECT inet_server_port() AS port"), ([row]) => row!["port"])

/** The standby keeps what it gets to itself, until the end of the scope. */
const behind = Effect.acquireRelease(
  Effect.suspend(() =>
    Effect.zipRight(
      ask(at.b, "SELECT pg_wal_replay_pause()"),
      until(
        "replay is paused",
        Effect.map(
          ask<{ state: string }>(at.b, "SELECT pg_get_wal_replay_pause_state() AS state"),
          ([row]) => row!.state === "paused"
        )
      )
    )
  ),
  () => resume
)
const resume = Effect.suspend(() => ask(at.b, "SELECT pg_wal_replay_resume()"))

/** From now on: what waits until the standby has been asked how far it is. */
const standbyAsked = Effect.suspend(() =>
  Effect.map(ask<{ now: string }>(at.b, "SELECT clock_timestamp()::text AS now"), ([row]) =>
    until(
      "the standby is asked",
      Effect.map(
        ask(
          at.b,
          `SELECT FROM pg_stat_activity WHERE query LIKE '%pg_last_wal_replay_lsn%'
             AND query_start > '${row!.now}' AND pid <> pg_backend_pid()`
        ),
        (_) => _.length > 0
      )
    )
  )
)

const emptied = Effect.suspend(() =>
  Effect.zipRight(ask(at.a, "DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY)"), caughtUp(at.a, at.b))
)

/** Of either server. */
const atRest = Effect.suspend(() =>
  Effect.zipRight(expectAtRest({ url: urlOf(at.a) }), expectAtRest({ url: urlOf(at.b) }))
)

const test = <A, E>(
  name: string,
  program: () => Effect.Effect<A, E, Services | DbRegistry.DbRegistry | Other | Scope.Scope>,
  options: { readonly default?: DbOptions; readonly replica?: DbOptions } = {}
) =>
  it.scopedLive(name, () =>
    Effect.gen(function* () {
      yield* emptied
      const registry = DbRegistry.layer(
        {
          default: { url: urlOf(at.a), ...options.default },
          other: { url: urlOf(at.a) },
          replica: { url: urlOf(at.b), readOnly: true, ...options.replica }
        },
        { replicas: { default: "replica", other: "replica" } }
      )
      yield* Effect.suspend(program).pipe(Effect.zipLeft(atRest), Effect.provide(quietly(registry)))
    })
  )
type Other = DbEngine<"other"> | DbSession<"other">

/** An effect on a server of the cluster, whatever is ambient. */
const on = <A, E>(server: () => EmbeddedServer, effect: Effect.Effect<A, E, Services>) =>
  Effect.suspend(() => Effect.provide(effect, quietly(DbLayer({ url: urlOf(server()) }))))
const onStandby = <A, E>(effect: Effect.Effect<A, E, Services>) => on(() => at.b, effect)

describe("a commit token", () => {
  test("is there when a commit has written something, and only then", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const token = DbSession.commitToken
        yield* run("SELECT 1")
        yield* DbSession.commit
        expect(yield* token).toEqual(Option.none())
        yield* insert(1)
        expect(yield* token).toEqual(Option.none())
        yield* DbSession.rollback
        expect(yield* token).toEqual(Option.none())
        yield* insert(2)
        yield* DbSession.commit
        const first = Option.getOrThrow(yield* token)
        expect(first).toMatch(/^[0-9A-F]+\/[0-9A-F]+$/)
        yield* run("SELECT 1")
        yield* DbSession.commit
        expect(yield* token).not.toEqual(Option.none())
        yield* run("WITH added AS (INSERT INTO t VALUES (3) RETURNING id) SELECT * FROM added")
        yield* DbSession.commit
        expect(yield* token).not.toEqual(Option.some(first))
      })
    ))

  it.scopedLive("costs a round trip for who asks, once for the same commits, and nothing for who does not", () =>
    Effect.gen(function* () {
      yield* emptied
      const through = yield* proxy(urlOf(at.a))
      yield* Effect.gen(function* () {
        yield* run("SELECT 1")
        through.reset()
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* insert(2)
            yield* DbSession.commit
            expect(through.flights()).toBe(3)
            const token = yield* DbSession.commitToken
            expect(through.flights()).toBe(4)
            expect(yield* DbSession.commitToken).toEqual(token)
            expect(through.flights()).toBe(4)
          })
        )
        expect(through.flights()).toBe(4)
      }).pipe(Effect.provide(quietly(DbLayer({ url: through.url, maxConnections: 1 }))))
    })
  )

  test("of an effect is that of all that it has committed", () =>
    Effect.gen(function* () {
      const writes = [
        insert(1),
        withTransaction(insert(2)),
        DbSession.autocommit(insert(3)),
        DbSession.autocommit(DbSession.isolated(insert(4))),
        DbSession.autocommit(Effect.zipRight(insert(5), DbSession.commit)),
        Effect.flatMap(DbEngine, ({ sql }) => DbSession.batch([sql`INSERT INTO t VALUES (6)`, sql`SELECT 1`]))
      ]
      for (const write of writes) {
        const [, token] = yield* DbSession.withCommitToken(write)
        yield* onStandby(DbSession.waitFor(Option.getOrThrow(token)))
        expect(yield* onStandby(ids)).toHaveLength(writes.indexOf(write) + 1)
      }
      const reads = [
        ids,
        withTransaction(ids),
        withTransaction(run("SELECT 'INSERT'"), { readOnly: true }),
        Effect.ignore(withTransaction(Effect.zipRight(insert(7), Effect.fail("no"))))
      ]
      for (const read of reads) expect((yield* DbSession.withCommitToken(read))[1]).toEqual(Option.none())
      // In a session what is committed within it counts, and nothing else.
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          expect((yield* DbSession.withCommitToken(insert(7)))[1]).toEqual(Option.none())
          expect((yield* DbSession.withCommitToken(DbSession.commit))[1]).not.toEqual(Option.none())
          const read = Effect.zipRight(ids, DbSession.commit)
          expect((yield* DbSession.withCommitToken(read))[1]).toEqual(Option.none())
          yield* DbSession.isolated(insert(8))
        })
      )
    }))

  test("of another database is its own", () =>
    Effect.gen(function* () {
      const write = Effect.flatMap(Other.DbSession, ({ sql }) => sql`INSERT INTO t VALUES (1)`)
      expect((yield* DbSession.withCommitToken(write))[1]).toEqual(Option.none())
      const [, token] = yield* Other.DbSession.withCommitToken(
        Other.DbSession.autocommit(Effect.flatMap(Other.DbSession, ({ sql }) => sql`INSERT INTO t VALUES (2)`))
      )
      yield* onStandby(DbSession.waitFor(Option.getOrThrow(token)))
      yield* Other.DbSession.waitFor(Option.getOrThrow(token))
      expect(yield* onStandby(ids)).toEqual([1, 2])
    }))
})

describe("waitFor", () => {
  const written = Effect.map(DbSession.withCommitToken(insert(1)), ([, token]) => Option.getOrThrow(token))

  test("returns when the standby shows it, and on a primary at once", () =>
    Effect.gen(function* () {
      yield* behind
      const token = yield* written
      yield* DbSession.waitFor(token)
      const asked = yield* standbyAsked
      const reading = yield* Effect.fork(
        onStandby(Effect.zip(ids, Effect.zipRight(DbSession.waitFor(token, { timeout: "20 seconds" }), ids)))
      )
      yield* asked
      yield* resume
      expect(yield* Fiber.join(reading)).toEqual([[], [1]])
    }))

  test("is ReplicaBehind when the time is over, and leaves everything usable", () =>
    Effect.gen(function* () {
      yield* behind
      const token = yield* written
      yield* onStandby(
        Effect.gen(function* () {
          expect(yield* reasonOf(DbSession.waitFor(token, { timeout: 50 }))).toMatchObject({
            _tag: "ReplicaBehind",
            isRetryable: true
          })
          yield* DbSession.autocommit(
            Effect.gen(function* () {
              expect((yield* reasonOf(DbSession.waitFor(token, { timeout: 50 })))._tag).toBe("ReplicaBehind")
              expect(yield* ids).toEqual([])
            })
          )
          expect((yield* DbEngine.stats).used).toBe(0)
        })
      )
    }))

  test("in a session it is its connection that waits, before the transaction takes its snapshot", () =>
    Effect.gen(function* () {
      yield* behind
      const token = yield* written
      const asked = yield* standbyAsked
      yield* Effect.forkScoped(Effect.zipRight(asked, resume))
      yield* onStandby(
        DbSession.autocommit(
          Effect.gen(function* () {
            yield* DbSession.waitFor(token, { timeout: "20 seconds" })
            expect(yield* DbSession.state).toBe("idle")
            expect((yield* DbEngine.stats).used).toBe(1)
            expect(yield* ids).toEqual([1])
            expect(yield* reasonOf(DbSession.waitFor(token))).toMatchObject({ _tag: "InvalidInput" })
          }),
          { isolation: "repeatable read" }
        )
      )
    }))

  test("in a transaction that is open it waits there", () =>
    Effect.gen(function* () {
      yield* behind
      const token = yield* written
      yield* onStandby(
        withTransaction(
          Effect.gen(function* () {
            expect(yield* ids).toEqual([])
            yield* resume
            yield* DbSession.waitFor(token, { timeout: "20 seconds" })
            expect(yield* ids).toEqual([1])
          })
        )
      )
    }))

  test("refuses what is no token", () =>
    Effect.gen(function* () {
      for (const token of ["", "0", "0/", "x/y", "0/0'; DROP TABLE t", "0/123456789"]) {
        expect((yield* reasonOf(DbSession.waitFor(token)))._tag).toBe("InvalidInput")
      }
    }))
})

describe("DbRegistry.readOnly", () => {
  const where = Effect.map(Effect.zip(ids, port), ([ids, port]) => [...ids, port])

  test("reads from the standby, and what the session has committed is there", () =>
    Effect.gen(function* () {
      expect(yield* DbRegistry.readOnly(where)).toEqual([at.b.port])
      for (let id = 1; id <= 30; id++) {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(id)
            expect(yield* DbRegistry.readOnly(port)).toBe(at.a.port)
            yield* DbSession.commit
            const seen = yield* DbRegistry.readOnly(where)
            expect([seen.length, seen.includes(id)]).toEqual([id + 1, true])
          })
        )
      }
    }))

  test("waits for a standby that is behind, for as long as it may, and then reads from the primary", () =>
    Effect.gen(function* () {
      yield* behind
      const [, token] = yield* DbSession.withCommitToken(insert(1))
      const after = Option.getOrThrow(token)
      expect(yield* DbRegistry.readOnly(where)).toEqual([at.b.port])
      expect(yield* DbRegistry.readOnly(where, { after, timeout: 50 })).toEqual([1, at.a.port])
      const asked = yield* standbyAsked
      const reading = yield* Effect.fork(where.pipe(DbRegistry.readOnly({ after, timeout: "20 seconds" })))
      yield* asked
      yield* resume
      expect(yield* Fiber.join(reading)).toEqual([1, at.b.port])
      expect((yield* reasonOf(DbRegistry.readOnly(where, { after: "no token" })))._tag).toBe("InvalidInput")
    }))

  test("refuses to write there", () =>
    Effect.map(reasonOf(DbRegistry.readOnly(DbSession.autocommit(insert(1)))), (_) =>
      expect(_._tag).toBe("ReadOnlyError")
    ))

  test(
    "of several standbys it is one that is waited for and read from",
    () =>
      Effect.gen(function* () {
        yield* behind
        const [, token] = yield* DbSession.withCommitToken(insert(1))
        const after = Option.getOrThrow(token)
        // Of the two hosts only the primary has come so far; each connection goes to either.
        for (let i = 0; i < 20; i++) {
          const read = Effect.zip(ids, DbSession.autocommit(ids))
          expect(yield* DbRegistry.readOnly(read, { after, timeout: 20 })).toEqual([[1], [1]])
        }
      }),
    {
      replica: {
        get hosts() {
          return [at.a, at.b].map(({ host, port }) => ({ host, port }))
        },
        loadBalanceHosts: true,
        idleTimeout: 10
      }
    }
  )

  test("of another database", () =>
    Effect.gen(function* () {
      const database = Other
      const read = Effect.flatMap(Other.DbSession, ({ sql }) =>
        Effect.map(sql<{ port: number }>`SELECT inet_server_port() AS port`, ([row]) => row!.port)
      )
      const { sql } = yield* Other.DbSession
      expect(yield* DbRegistry.readOnly(read, { database })).toBe(at.b.port)
      yield* Other.withTransaction(
        Effect.gen(function* () {
          yield* sql`INSERT INTO t VALUES (1)`
          expect(yield* DbRegistry.readOnly(read, { database })).toBe(at.a.port)
        })
      )
    }))
})

describe("DbHttp.middleware({ readYourWrites: true })", () => {
  const routes = HttpRouter.empty.pipe(
    HttpRouter.get(
      "/",
      Effect.map(DbRegistry.readOnly(Effect.zip(ids, port)), ([ids, port]) =>
        HttpServerResponse.unsafeJson({ ids, port })
      )
    ),
    HttpRouter.get("/other", Effect.as(DbSession.autocommit(ids), HttpServerResponse.empty())),
    HttpRouter.post(
      "/:id",
      Effect.flatMap(HttpRouter.params, ({ id }) => Effect.as(insert(Number(id)), HttpServerResponse.empty()))
    ),
    HttpRouter.post("/function/call", Effect.as(run("SELECT add(1)"), HttpServerResponse.empty())),
    HttpRouter.post(
      "/early/exit",
      Effect.as(Effect.zipRight(insert(99), DbSession.commit), HttpServerResponse.empty({ status: 500 }))
    ),
    HttpRouter.post("/failing/one", Effect.as(insert(1), HttpServerResponse.empty({ status: 400 })))
  )
  const serving = (options: DbHttp.ReadYourWrites | true) =>
    Effect.gen(function* () {
      const base = yield* listening(HttpServer.serve(routes, DbHttp.middleware({ readYourWrites: options })))
      return (method: string, path: string, cookie?: string) =>
        Effect.promise(async () => {
          const response = await fetch(base + path, { method, headers: cookie === undefined ? {} : { cookie } })
          const set = Cookies.fromSetCookie(response.headers.getSetCookie())
          return { body: await response.text(), set, status: response.status }
        })
    })
  const pair = (cookies: Cookies.Cookies) => Cookies.toCookieHeader(cookies)

  test("a request that has written is followed by reads that show it", () =>
    Effect.gen(function* () {
      const request = yield* serving(true)
      for (let id = 1; id <= 20; id++) {
        const { set } = yield* request("POST", `/${id}`)
        const { body } = yield* request("GET", "/", pair(set))
        expect(JSON.parse(body).ids).toHaveLength(id)
      }
    }))

  test("also while the standby is behind: then they go to the primary", () =>
    Effect.gen(function* () {
      yield* behind
      const request = yield* serving(true)
      const { set } = yield* request("POST", "/1")
      expect(JSON.parse((yield* request("GET", "/")).body)).toEqual({ ids: [], port: at.b.port })
      expect(JSON.parse((yield* request("GET", "/", pair(set))).body)).toEqual({ ids: [1], port: at.a.port })
    }))

  test("the cookie: of what is committed, and of nothing else", () =>
    Effect.gen(function* () {
      const request = yield* serving({ cookie: "after", maxAge: "5 seconds", secure: true })
      const names = (path: string, method = "POST") =>
        Effect.map(request(method, path), ({ set }) => Object.keys(set.cookies))
      const { set } = yield* request("POST", "/1")
      const cookie = Option.getOrThrow(Cookies.get(set, "after"))
      expect(cookie.value).toMatch(/^[0-9A-F]+-[0-9A-F]+$/)
      expect(cookie.options).toMatchObject({ path: "/", httpOnly: true, sameSite: "lax", secure: true })
      expect(yield* names("/", "GET")).toEqual([])
      expect(yield* names("/other", "GET")).toEqual([])
      expect(yield* names("/failing/one")).toEqual([])
      expect(yield* names("/early/exit")).toEqual(["after"])
      // What a function does can't be seen: a POST is taken at its word.
      expect(yield* names("/function/call")).toEqual(["after"])
    }))

  test("a cookie that is none is not listened to", () =>
    Effect.gen(function* () {
      const request = yield* serving(true)
      for (const value of ["", "x", "0", "'; DROP TABLE t", "%00"]) {
        const { body, status } = yield* request("GET", "/", `db-after=${value}`)
        expect([status, JSON.parse(body).port]).toEqual([200, at.b.port])
      }
    }))
})

it.scopedLive("a token is good after a failover", () =>
  Effect.gen(function* () {
    const { a, b } = yield* cluster({ synchronous: true })
    yield* ask(a, "CREATE TABLE t (id int PRIMARY KEY)")
    const [, token] = yield* on(() => a, DbSession.withCommitToken(insert(1)))
    yield* a.crash
    yield* promote(b)
    expect(yield* on(() => b, Effect.zipRight(DbSession.waitFor(Option.getOrThrow(token)), ids))).toEqual([1])
  })
)
