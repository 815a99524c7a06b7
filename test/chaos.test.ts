/**
 * The proof under faults, as much of it as fits into a run of all tests; `npm run chaos` is the rest. Below it, one
 * test for each fault of this library that chaos has found.
 */
import { describe, expect, it, vi } from "@effect/vitest"
import { Effect, Exit, Fiber } from "effect"
import { DbError, DbSession, withTransaction } from "effect-db"
import type { DbOptions } from "effect-db"
import { bank } from "../chaos/bank.js"
import { analyse } from "../chaos/history.js"
import { judge } from "../chaos/ledger.js"
import { lists, writeSkew } from "../chaos/lists.js"
import { forgetful, loss } from "../chaos/loss.js"
import { Random } from "../chaos/random.js"
import { single } from "../chaos/single.js"
import { soak } from "../chaos/soak.js"
import { makeWorld, onEngine } from "../chaos/world.js"
import { resolve } from "../src/DbOptions.js"
import { Backoff } from "../src/internal/backoff.js"
import { Pool } from "../src/internal/pool.js"
import { PoolMetrics } from "../src/internal/telemetry.js"
import { testDatabase } from "./support/database.js"
import { committed, proxiedOn } from "./support/programs.js"
import { until } from "./support/until.js"
import type { Logged } from "./support/proxy.js"

const seed = 20_240_229

describe("under chaos", () => {
  it.scopedLive(
    "a bank keeps its promises: nothing acknowledged is lost, nothing aborted is there, nothing leaks",
    () =>
      Effect.gen(function* () {
        const report = yield* bank(yield* makeWorld(), new Random(seed), { seconds: 6, fibers: 16 })
        expect(report.wrong).toEqual([])
        expect({ lost: report.lost, ghosts: report.ghosts, leaked: report.leaked }).toEqual({
          lost: [],
          ghosts: [],
          leaked: 0
        })
        expect(report.unknown).toBe(report.settled.committed + report.settled.aborted)
        expect(report.acknowledged).toBeGreaterThan(0)
        expect(Object.keys(report.faults).length).toBeGreaterThan(5)
      }),
    90_000
  )

  it.scopedLive("a pool of one never loses its slot, wherever its borrowers are interrupted", () =>
    Effect.gen(function* () {
      const world = yield* makeWorld()
      const report = yield* onEngine(world, { maxConnections: 1 })(single(world, new Random(seed), 500))
      expect(report.wrong).toEqual([])
      expect(report.tries).toBe(500)
      expect(report.interrupted).toBeGreaterThan(50)
    })
  )

  it.scopedLive(
    "after each of 50 rounds connections, files and memory are in balance",
    () =>
      Effect.gen(function* () {
        const world = yield* makeWorld()
        const report = yield* onEngine(world, { maxConnections: 8 })(soak(world, new Random(seed), 50))
        expect(report.wrong).toEqual([])
      }),
    90_000
  )
})

describe("the checkers can fail", () => {
  it.scopedLive("a server that forgets commits in a crash is found out", () =>
    Effect.gen(function* () {
      const verdict = yield* loss(yield* makeWorld(forgetful), new Random(seed))
      expect(verdict.acknowledged).toBe(200)
      expect(verdict.lost.length).toBeGreaterThan(0)
    })
  )

  it("lost and doubled, ghosts, strangers and hooks that lie are told apart", () => {
    const verdict = judge(
      [
        { id: "kept", outcome: "acknowledged", commits: 1, rollbacks: 0 },
        { id: "lost", outcome: "acknowledged", commits: 1, rollbacks: 0 },
        { id: "gone", outcome: "aborted", commits: 0, rollbacks: 1 },
        { id: "ghost", outcome: "aborted" },
        { id: "there after all", outcome: "unknown", commits: 0, rollbacks: 0 },
        { id: "not there", outcome: "unknown" },
        { id: "told of a rollback", outcome: "unknown", commits: 0, rollbacks: 1 }
      ],
      new Set(["kept", "ghost", "there after all", "told of a rollback", "stranger"])
    )
    expect(verdict).toMatchObject({
      lost: ["lost"],
      ghosts: ["ghost"],
      strangers: ["stranger"],
      settled: { committed: 2, aborted: 1 }
    })
    expect(verdict.wrongHooks.map((_) => _.split(":")[0])).toEqual(["lost", "told of a rollback"])
  })

  it("cycles are named by what they are made of", () => {
    const write = (key: number, value: number) => ({ key, value })
    const read = (key: number, ...read: Array<number>) => ({ key, read })
    const kinds = (
      lists: Record<number, Array<number>>,
      ...ops: Array<ReadonlyArray<ReturnType<typeof write | typeof read>>>
    ) =>
      analyse(
        ops.map((ops, id) => ({ id, ops })),
        new Map(Object.entries(lists).map(([key, list]) => [Number(key), list]))
      )
    expect(
      kinds({ 1: [1, 2], 2: [4, 3] }, [write(1, 1), write(2, 3)], [write(1, 2), write(2, 4)]).cycles
    ).toMatchObject([{ kind: "G0" }])
    expect(kinds({ 1: [1], 2: [2] }, [write(1, 1), read(2, 2)], [write(2, 2), read(1, 1)]).cycles).toMatchObject([
      { kind: "G1c" }
    ])
    expect(kinds({ 1: [1, 2] }, [read(1), write(1, 1)], [read(1), write(1, 2)]).cycles).toMatchObject([
      { kind: "G-single" }
    ])
    expect(kinds({ 1: [1], 2: [2] }, [read(2), write(1, 1)], [read(1), write(2, 2)]).cycles).toMatchObject([
      { kind: "G2" }
    ])
    expect(kinds({ 1: [1, 2] }, [write(1, 1)], [read(1, 1), write(1, 2)])).toMatchObject({ cycles: [], broken: [] })
    expect(kinds({ 1: [1] }, [write(1, 1)], [write(1, 2)]).broken).toEqual(["list 1 has lost 2"])
    expect(kinds({ 1: [1] }, [write(1, 1)], [read(1, 1, 7)]).broken).toEqual([
      "transaction 1 read a list 1 that never was"
    ])
    expect(kinds({ 1: [1, 2] }, [write(1, 1), write(1, 2)], [read(1, 1)]).broken).toEqual([
      "transaction 1 saw the middle of transaction 0"
    ])
  })
})

describe("histories", () => {
  it.scopedLive("serializable has no cycles; repeatable read has write skew, which the checker sees", () =>
    Effect.gen(function* () {
      const run = onEngine(yield* makeWorld())
      const strict = yield* run(lists(new Random(seed), { isolation: "serializable", transactions: 150 }))
      expect({ cycles: strict.cycles, broken: strict.broken }).toEqual({ cycles: [], broken: [] })
      expect(strict.edges).toBeGreaterThan(100)
      expect((yield* run(writeSkew("serializable"))).cycles).toEqual([])
      const snapshots = yield* run(lists(new Random(seed), { isolation: "repeatable read", transactions: 150 }))
      expect(snapshots.broken).toEqual([])
      for (const cycle of snapshots.cycles) expect(cycle.kind).toBe("G2")
      expect((yield* run(writeSkew("repeatable read"))).cycles).toMatchObject([{ kind: "G2" }])
    })
  )
})

describe("found by chaos", () => {
  const database = testDatabase()
  const proxied = proxiedOn(database)
  const quick: DbOptions = { settleTimeout: "300 millis", acquireTimeout: "1 second" }
  const isCommit = (message: Logged): boolean => message.type === "E" && message.text === "COMMIT"
  const isMarker = (message: Logged): boolean =>
    message.type === "E" && /^INSERT INTO \S*effect_db_outcome \(/.test(message.text)
  const isQuestion = (message: Logged): boolean =>
    message.type === "E" && /^INSERT INTO \S*effect_db_outcome AS/.test(message.text)
  const one = (id: number) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO t (id) VALUES (${id})`)
  const certain = { verifyOutcome: true, retry: true }

  proxied("1: the question for the outcome may be answered twice, and says the same each time", (proxy) =>
    Effect.gen(function* () {
      // COMMIT never arrives; the question does, and its answer is lost.
      void proxy.cutAfter(isCommit, { forward: false })
      const asked = proxy.cutAfter(isQuestion, { forward: true })
      let attempts = 0
      const body = Effect.zipRight(
        Effect.sync(() => attempts++),
        one(1)
      )
      yield* withTransaction(body, certain)
      yield* Effect.promise(() => asked)
      expect({ attempts, rows: yield* committed(database) }).toEqual({ attempts: 2, rows: [1] })
    })
  )

  proxied(
    "2: a marker row that the network swallows ends with settleTimeout, and the transaction is run again",
    (proxy) =>
      Effect.gen(function* () {
        void proxy.cutAfter(isMarker, { forward: true, how: "blackhole" })
        yield* withTransaction(one(1), certain)
        expect(yield* committed(database)).toEqual([1])
      }),
    quick
  )

  proxied(
    "3: while the server has not noticed that the connection is gone, the outcome is unknown, in time",
    (proxy) =>
      Effect.gen(function* () {
        void proxy.holdAt(isCommit, { forward: false })
        const exit = yield* Effect.exit(withTransaction(one(1), certain))
        const reason = Exit.isFailure(exit) && exit.cause._tag === "Fail" ? DbError.reason(exit.cause.error) : undefined
        expect(reason?._tag).toBe("CommitUnknown")
        // It arrives after all.
        proxy.resume()
        yield* until(
          "it has arrived",
          Effect.map(committed(database), (rows) => rows.length === 1)
        )
      }),
    quick
  )

  for (const forward of [true, false]) {
    proxied(
      `3a: interrupted while the outcome is asked for (${forward ? "committed" : "not committed"}): the hooks tell what is there`,
      (proxy) =>
        Effect.gen(function* () {
          void proxy.cutAfter(isCommit, { forward })
          const asked = proxy.holdAt(isQuestion, { forward: false })
          const told: Array<string> = []
          const body = Effect.gen(function* () {
            yield* DbSession.afterCommit(Effect.sync(() => told.push("committed")))
            yield* DbSession.afterRollback(Effect.sync(() => told.push("rolled back")))
            yield* one(1)
          })
          const fiber = yield* Effect.fork(withTransaction(body, { verifyOutcome: true }))
          yield* Effect.promise(() => asked)
          const interrupting = yield* Effect.fork(Fiber.interrupt(fiber))
          yield* Effect.yieldNow()
          proxy.resume()
          yield* Fiber.join(interrupting)
          expect(told).toEqual([forward ? "committed" : "rolled back"])
          expect(yield* committed(database)).toEqual(forward ? [1] : [])
        })
    )
  }

  it.live("4: connections that are refused together are one reason to wait, not as many", () =>
    Effect.gen(function* () {
      const config = yield* resolve({ acquireTimeout: "1 second" })
      const full = DbError.make("ConnectionError", { phase: "connect", message: "full", hint: "", sqlState: "53300" })
      let dials = 0
      const pool = new Pool({
        config,
        connect: (_, done) => {
          dials++
          const turn = setImmediate(() => done(full, undefined))
          return () => clearImmediate(turn)
        },
        fits: () => true,
        onLeak: () => {},
        metrics: new PoolMetrics("test", () => ({ idle: 0, used: 0, pending: 0, max: 10, min: 0 }))
      })
      const pauses = vi.spyOn(Backoff.prototype, "pause")
      const waiters = Array.from({ length: 8 }, () => pool.take({ name: "test" }, 1000, () => {}))
      yield* until("a third round", () => dials > 16)
      // Each is twice as long as the one before.
      expect(pauses.mock.calls.length).toBeLessThanOrEqual(3)
      pauses.mockRestore()
      for (const giveUp of waiters) giveUp()
      yield* Effect.async<void>((resume) => pool.close(() => resume(Effect.void)))
    })
  )

  proxied("5: a COMMIT that the server refuses leaves nothing open for the next transaction", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const { commit, sql } = yield* DbSession
        yield* one(1)
        yield* commit
        yield* one(2)
        // The name of COMMIT is gone, and nobody has told the client.
        yield* sql.unsafe("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
        expect(Exit.isFailure(yield* Effect.exit(commit))).toBe(true)
        yield* one(3)
        yield* commit
        expect(yield* committed(database)).toEqual([1, 3])
      })
    )
  )
})
