import { it } from "@effect/vitest"
import { DbEngine, DbLayer, type DbOptions, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Exit from "effect/Exit"
import * as Scope from "effect/Scope"
import { afterAll, beforeAll, describe, expect } from "vitest"
import type { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import {
  ask,
  caughtUp,
  type Cluster,
  cluster,
  type ClusterOptions,
  installed,
  promote,
  streaming,
  urlOf
} from "./support/cluster.js"
import { expectAtRest, quietly, type Services } from "./support/programs.js"
import { reasonOf, run } from "./support/wired.js"
import { again, until } from "./support/until.js"
import { ledger } from "./support/ledger.js"

// FAULTS.md 21 to 23, on a primary and a standby that streams from it. Numbers are those of that list.

const insert = (id: number) => run(`INSERT INTO t VALUES (${id})`)
/** The port of the server that a statement runs on. */
const where = Effect.map(run("SELECT inet_server_port() AS port"), ([row]) => row!["port"])
const ids = (server: EmbeddedServer) =>
  Effect.map(ask<{ id: number }>(server, "SELECT id FROM t ORDER BY id"), (rows) => rows.map((_) => _.id))
/** Lets nobody write any more, as who fails over by hand does first. */
const fence = (server: EmbeddedServer) =>
  Effect.zipRight(
    ask(server, "ALTER SYSTEM SET default_transaction_read_only = on"),
    ask(server, "SELECT pg_reload_conf()")
  )

const hostsOf = (...servers: ReadonlyArray<EmbeddedServer>): DbOptions => ({
  url: urlOf(servers[0]!),
  hosts: servers.map(({ host, port }) => ({ host, port }))
})

/** Of those servers that run. */
const atRest = (servers: ReadonlyArray<EmbeddedServer>) =>
  Effect.forEach(servers, (server) =>
    Effect.flatMap(server.pid, (pid) => (Option.isNone(pid) ? Effect.void : expectAtRest({ url: urlOf(server) })))
  )

interface At extends Cluster {
  /** Runs an effect on an engine for these hosts, and looks whether it leaves everything at rest. */
  readonly on: <A, E>(
    options: DbOptions,
    effect: Effect.Effect<A, E, Services | Scope.Scope>
  ) => Effect.Effect<A, unknown, Scope.Scope>
}

type Body = (at: At) => Effect.Effect<void, unknown, Scope.Scope>

const prepared = (at: Cluster): Effect.Effect<At> =>
  Effect.gen(function* () {
    yield* ask(at.a, "DROP TABLE IF EXISTS t; CREATE TABLE t (id int PRIMARY KEY)")
    yield* caughtUp(at.a, at.b)
    return {
      ...at,
      on: (options, effect) =>
        Effect.zipLeft(effect, atRest([at.a, at.b])).pipe(Effect.provide(quietly(DbLayer(options))))
    }
  })

/** On servers of its own. */
const test = (name: string, options: ClusterOptions, body: Body) =>
  it.scopedLive(name, () => Effect.flatMap(Effect.flatMap(cluster(options), prepared), body))

/** On servers that it leaves as they were. */
const sharing = (): ((name: string, body: Body) => void) => {
  const scope = Effect.runSync(Scope.make())
  let at: Cluster
  beforeAll(async () => {
    at = await Effect.runPromise(Scope.extend(cluster(), scope))
  })
  afterAll(() => Effect.runPromise(Scope.close(scope, Exit.void)))
  return (name, body) => it.scopedLive(name, () => Effect.flatMap(prepared(at), body))
}

describe("a standby", () => {
  const shared = sharing()

  shared("FAULTS 21: answers a write with ReadOnlyError, and keeps its connection where any host will do", (at) =>
    at.on(
      { ...hostsOf(at.b), maxConnections: 1 },
      Effect.gen(function* () {
        const pid = Effect.map(run("SELECT pg_backend_pid() AS pid"), ([row]) => row!["pid"])
        const before = yield* pid
        expect(yield* reasonOf(insert(1))).toMatchObject({
          _tag: "ReadOnlyError",
          sqlState: "25006",
          isRetryable: false
        })
        expect(yield* reasonOf(withTransaction(insert(1)))).toMatchObject({ _tag: "ReadOnlyError" })
        expect(yield* pid).toBe(before)
      })
    )
  )

  shared("is passed over by a read-write target, and is what standby and prefer-standby read from", (at) =>
    Effect.gen(function* () {
      const both = hostsOf(at.b, at.a)
      const write = Effect.zipRight(insert(1), where)
      expect(yield* at.on({ ...both, targetSessionAttrs: "read-write" }, write)).toBe(at.a.port)
      yield* caughtUp(at.a, at.b)
      for (const targetSessionAttrs of ["standby", "prefer-standby", "read-only"] as const) {
        const read = Effect.zip(run("SELECT id FROM t"), where)
        expect(yield* at.on({ ...hostsOf(at.a, at.b), targetSessionAttrs }, read)).toEqual([[{ id: 1 }], at.b.port])
      }
      yield* at.b.stop("fast")
      expect(yield* at.on({ ...both, targetSessionAttrs: "prefer-standby" }, where)).toBe(at.a.port)
      expect(yield* reasonOf(at.on({ ...both, targetSessionAttrs: "standby" }, where))).toMatchObject({
        _tag: "ConnectionError",
        phase: "connect",
        isRetryable: true
      })
      yield* at.b.start
      yield* streaming(at.a, 1)
    })
  )

  shared("53: changeHost from the primary to the standby with a live session", (at) =>
    at.on(
      hostsOf(at.a),
      Effect.gen(function* () {
        const engine = yield* DbEngine
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* engine.changeHost({ host: at.b.host, port: at.b.port })
            expect(yield* where).toBe(at.a.port)
            yield* insert(2)
          })
        )
        yield* caughtUp(at.a, at.b)
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            expect(yield* run("SELECT id FROM t ORDER BY id")).toEqual([{ id: 1 }, { id: 2 }])
            expect(yield* where).toBe(at.b.port)
          })
        )
        expect(yield* reasonOf(DbSession.autocommit(insert(3)))).toMatchObject({ _tag: "ReadOnlyError" })
        yield* until(
          "the old pool has closed its connections",
          Effect.map(
            ask(at.a, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'effect-db'"),
            (_) => _.length === 0
          )
        )
      })
    )
  )

  // A server tells of its new role with its next answer: that to the ping, at the latest.
  test("FAULTS 22: that is promoted is no standby any more, and is not handed out as one", {}, (at) =>
    at.on(
      { ...hostsOf(at.a, at.b), targetSessionAttrs: "standby", validateAfter: 0 },
      Effect.gen(function* () {
        expect(yield* where).toBe(at.b.port)
        yield* at.a.crash
        yield* promote(at.b)
        expect((yield* DbEngine.stats).idle).toBe(1)
        expect(yield* reasonOf(where)).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
        const old = yield* at.rejoin(at.a, at.b)
        expect(yield* again(where)).toBe(old.port)
      })
    )
  )
})

describe("failover", () => {
  test("FAULTS 21: a primary that is fenced: ReadOnlyError, its connection destroyed, the next host used", {}, (at) =>
    at.on(
      { ...hostsOf(at.a, at.b), targetSessionAttrs: "read-write", maxConnections: 1 },
      Effect.gen(function* () {
        const write = DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            yield* DbSession.commit
            yield* fence(at.a)
            yield* caughtUp(at.a, at.b)
            yield* promote(at.b)
            // the session keeps its connection, and with it the old primary
            yield* until(
              "the backend knows",
              Effect.map(
                Effect.orDie(run("SHOW transaction_read_only")),
                ([row]) => row!["transaction_read_only"] === "on"
              )
            )
            yield* insert(2)
          })
        )
        expect(yield* reasonOf(write)).toMatchObject({ _tag: "ReadOnlyError", sqlState: "25006", isRetryable: true })
        yield* insert(3)
        expect(yield* where).toBe(at.b.port)
        expect(yield* ids(at.a)).toEqual([1])
        expect(yield* ids(at.b)).toEqual([1, 3])
      })
    )
  )

  const load = (at: At) =>
    at.on(
      { ...hostsOf(at.a, at.b), targetSessionAttrs: "read-write", acquireTimeout: 1000, maxConnections: 8 },
      Effect.gen(function* () {
        const { acknowledged, agrees, close, unknown } = yield* ledger(16, (id) => withTransaction(insert(id)), [
          "CommitUnknown",
          "ConnectionError",
          "AcquireTimeout",
          "ReadOnlyError"
        ])
        yield* until("there is load", () => acknowledged.size > 200)
        yield* at.a.crash
        const before = acknowledged.size
        yield* promote(at.b)
        yield* until("the writers go on", () => acknowledged.size > before + 200)
        yield* close
        expect(yield* where).toBe(at.b.port)
        agrees(yield* ids(at.b))
        // What the crash met on its way is unknown, and no more than was on its way.
        expect(unknown.size).toBeLessThanOrEqual(16)
      })
    )

  test("FAULTS 22: promote under load loses no acknowledged write", { synchronous: true }, load)

  const other = Object.entries(installed)[0]
  const name = `FAULTS 22: so it is with PostgreSQL ${other?.[0] ?? "of the system"}`
  if (other === undefined) it.skip(`${name}: there is none in /usr/lib/postgresql`)
  else test(name, { synchronous: true, binaries: other[1] }, load)

  test("FAULTS 22: the ledger can fail: without synchronous replication acknowledged writes are lost", {}, (at) =>
    at.on(
      { ...hostsOf(at.a, at.b), targetSessionAttrs: "read-write" },
      Effect.gen(function* () {
        yield* insert(1)
        yield* caughtUp(at.a, at.b)
        // The network between the servers has gone.
        yield* ask(at.b, "ALTER SYSTEM SET primary_conninfo = ''")
        yield* ask(at.b, "SELECT pg_reload_conf()")
        yield* until(
          "nothing is streamed any more",
          Effect.map(ask(at.a, "SELECT 1 FROM pg_stat_replication"), (_) => _.length === 0)
        )
        yield* insert(2)
        yield* at.a.crash
        yield* promote(at.b)
        yield* again(where)
        expect(yield* ids(at.b)).toEqual([1])
      })
    )
  )

  test("FAULTS 23: the old primary that comes back as a standby is not written to", {}, (at) =>
    at.on(
      { ...hostsOf(at.a, at.b), targetSessionAttrs: "read-write", maxConnections: 4 },
      Effect.gen(function* () {
        yield* Effect.all(
          Array.from({ length: 4 }, () => DbSession.isolated(where)),
          { concurrency: 4 }
        )
        yield* caughtUp(at.a, at.b)
        yield* at.a.stop("fast")
        yield* promote(at.b)
        yield* again(insert(1))
        const old = yield* at.rejoin(at.a, at.b)
        yield* (yield* DbEngine).evictAll
        const ports = yield* Effect.all(
          Array.from({ length: 12 }, (_, i) => DbSession.isolated(Effect.zipRight(insert(i + 2), where))),
          { concurrency: 4 }
        )
        expect(new Set(ports)).toEqual(new Set([at.b.port]))
        yield* caughtUp(at.b, old)
        expect((yield* ids(old)).length).toBe(13)
      })
    )
  )

  test("FAULTS 23: a primary that is fenced while its connections idle: they are evicted", {}, (at) =>
    at.on(
      { ...hostsOf(at.a, at.b), targetSessionAttrs: "read-write", validateAfter: 0 },
      Effect.gen(function* () {
        yield* insert(1)
        yield* fence(at.a)
        yield* caughtUp(at.a, at.b)
        yield* promote(at.b)
        expect((yield* DbEngine.stats).idle).toBe(1)
        yield* insert(2)
        expect(yield* where).toBe(at.b.port)
        expect(yield* ids(at.a)).toEqual([1])
      })
    )
  )
})
