import {
  ClusterSchema,
  Entity,
  Runner,
  RunnerAddress,
  RunnerStorage,
  ShardId,
  ShardingConfig,
  SingleRunner,
  SqlMessageStorage,
  SqlRunnerStorage
} from "@effect/cluster"
import { Rpc } from "@effect/rpc"
import { describe } from "@effect/vitest"
import { Deferred, Effect, Layer, Schema } from "effect"
import { DbEngine, DbSession } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { committed, insert, programsOn, used } from "./support/programs.js"
import { until } from "./support/until.js"

const database = testDatabase()

/** A runner that an earlier test has left registered would be given shards. */
const fresh = database.query(
  "DROP TABLE IF EXISTS cluster_runners, cluster_locks, cluster_messages, cluster_replies, cluster_migrations CASCADE"
)
const run = programsOn(database)
const test: typeof run = (name, program, options) =>
  run(name, () => Effect.zipRight(fresh, Effect.suspend(program)), options)

const addressOf = (port: number) => RunnerAddress.make("localhost", port)
const runnerOf = (port: number) => Runner.make({ address: addressOf(port), groups: ["default"], weight: 1 })
const shards = [1, 2, 3].map((id) => ShardId.make("default", id))
const idsOf = (shards: ReadonlyArray<ShardId.ShardId>) => shards.map((_) => _.id).sort()

/** What a runner sees: a storage of its own, on our client. */
const storage = (options: Partial<ShardingConfig.ShardingConfig["Type"]> = {}) =>
  Effect.map(
    Layer.build(Layer.provide(SqlRunnerStorage.layer, ShardingConfig.layer(options))),
    (context) => context.unsafeMap.get(RunnerStorage.RunnerStorage.key) as RunnerStorage.RunnerStorage["Type"]
  )

/** Of this database: the server has others, of other files. */
const ours = `locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`
const advisoryLocks = Effect.map(
  database.query<{ n: number; pids: number }>(
    `SELECT count(*)::int AS n, count(DISTINCT pid)::int AS pids FROM pg_locks WHERE ${ours} AND granted`
  ),
  (rows) => rows[0]!
)

describe("SqlRunnerStorage", () => {
  for (const shardLockDisableAdvisory of [false, true]) {
    const locks = shardLockDisableAdvisory ? "a lock table" : "advisory locks"
    test(`with ${locks}: runners register, and each shard has one owner`, () =>
      Effect.scoped(
        Effect.gen(function* () {
          const a = yield* storage({ shardLockDisableAdvisory })
          const b = yield* storage({ shardLockDisableAdvisory })
          yield* a.register(runnerOf(1), true)
          yield* b.register(runnerOf(2), true)
          expect((yield* a.getRunners).map(([runner, healthy]) => [runner.address.port, healthy])).toEqual([
            [1, true],
            [2, true]
          ])
          yield* a.setRunnerHealth(addressOf(2), false)
          expect((yield* b.getRunners).map(([, healthy]) => healthy)).toEqual([true, false])

          expect(idsOf(yield* a.acquire(addressOf(1), shards.slice(0, 2)))).toEqual([1, 2])
          expect(idsOf(yield* b.acquire(addressOf(2), shards))).toEqual([3])
          expect(idsOf(yield* a.refresh(addressOf(1), shards.slice(0, 2)))).toEqual([1, 2])
          yield* a.release(addressOf(1), shards[0]!)
          expect(idsOf(yield* b.acquire(addressOf(2), shards))).toEqual([1, 3])
          yield* b.releaseAll(addressOf(2))
          expect(idsOf(yield* a.acquire(addressOf(1), shards))).toEqual([1, 2, 3])
          yield* a.releaseAll(addressOf(1))
          yield* a.unregister(addressOf(1))
          yield* a.unregister(addressOf(2))
          expect(yield* a.getRunners).toEqual([])
        })
      ))
  }

  test("keeps its shard locks on one reserved connection for each runner, and none of them afterwards", () =>
    Effect.gen(function* () {
      yield* Effect.scoped(
        Effect.gen(function* () {
          const a = yield* storage()
          yield* a.register(runnerOf(1), true)
          yield* a.acquire(addressOf(1), shards)
          // Statements and transactions of others, whose connections are given back and reset meanwhile.
          yield* Effect.all(
            Array.from({ length: 20 }, (_, id) => DbSession.isolated(insert(id))),
            { concurrency: "unbounded" }
          )
          expect(yield* used).toBe(1)
          expect(yield* advisoryLocks).toEqual({ n: 3, pids: 1 })
        })
      )
      yield* until(
        "given back",
        Effect.map(used, (_) => _ === 0)
      )
      expect(yield* advisoryLocks).toEqual({ n: 0, pids: 0 })
      expect((yield* committed(database)).length).toBe(20)
    }))

  test("takes another connection when the reserved one is lost", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const a = yield* storage()
        yield* a.register(runnerOf(1), true)
        yield* a.acquire(addressOf(1), shards)
        yield* database.query(`SELECT pg_terminate_backend(pid) FROM pg_locks WHERE ${ours}`)
        yield* until(
          "acquired again",
          Effect.map(
            Effect.orElseSucceed(a.acquire(addressOf(1), shards), () => []),
            (mine) => mine.length === 3
          )
        )
        expect(yield* advisoryLocks).toEqual({ n: 3, pids: 1 })
      })
    ))
})

describe("SqlMessageStorage", () => {
  const Counter = Entity.make("Counter", [
    Rpc.make("Add", { payload: { n: Schema.Number }, success: Schema.Number })
  ]).annotateRpcs(ClusterSchema.Persisted, true)

  /** A single node with its messages and its runner in our database. */
  const node = (handled: (n: number) => Effect.Effect<void>) =>
    Counter.toLayer(
      Effect.sync(() => {
        let total = 0
        return Counter.of({
          Add: ({ payload }) => Effect.as(handled(payload.n), (total += payload.n))
        })
      })
    ).pipe(
      Layer.provideMerge(
        SingleRunner.layer({
          runnerStorage: "sql",
          shardingConfig: { entityMessagePollInterval: "50 millis", entityTerminationTimeout: 0, shardsPerGroup: 4 }
        })
      )
    )

  const rows = (table: string) =>
    Effect.map(database.query<{ n: number }>(`SELECT count(*)::int AS n FROM ${table}`), (rows) => rows[0]!.n)

  test("an entity's messages and replies are kept in the database", () =>
    Effect.gen(function* () {
      const client = yield* Counter.client
      expect(yield* client("a").Add({ n: 2 })).toBe(2)
      expect(yield* client("a").Add({ n: 3 })).toBe(5)
      expect(yield* client("b").Add({ n: 1 })).toBe(1)
      expect(yield* rows("cluster_messages")).toBe(3)
      expect(yield* rows("cluster_replies")).toBe(3)
    }).pipe(Effect.provide(node(() => Effect.void)), Effect.scoped))

  test("a message sent in a session is delivered when the session commits, and never when it rolls back", () =>
    Effect.gen(function* () {
      const seen: Array<number> = []
      const last = yield* Deferred.make<void>()
      const handled = (n: number) =>
        Effect.suspend(() => {
          seen.push(n)
          return n === 3 ? Effect.asVoid(Deferred.succeed(last, undefined)) : Effect.void
        })
      yield* Effect.gen(function* () {
        const client = yield* Counter.client
        const send = (n: number) => client("outbox").Add({ n }, { discard: true })
        yield* DbSession.autocommit(Effect.all([insert(1), send(1), DbSession.rollback]))
        yield* DbSession.autocommit(Effect.all([insert(2), send(2)]))
        yield* send(3)
        yield* Deferred.await(last)
      }).pipe(Effect.provide(node(handled)), Effect.scoped)
      expect(seen).toEqual([2, 3])
      expect(yield* committed(database)).toEqual([2])
    }))

  test("two storages that start at once both find their tables", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const start = Layer.build(Layer.provide(SqlMessageStorage.layer, ShardingConfig.layer({})))
        yield* start
        yield* Effect.all([start, start], { concurrency: 2 })
        expect(yield* rows("cluster_messages")).toBe(0)
        expect((yield* DbEngine.stats).pending).toBe(0)
      })
    ))
})
