/**
 * Metrics as somebody with OpenTelemetry sees them: with `@effect/opentelemetry` and an exporter in memory.
 */
import * as OtelMetrics from "@effect/opentelemetry/Metrics"
import { describe, expect, it } from "@effect/vitest"
import {
  AggregationTemporality,
  DataPointType,
  InMemoryMetricExporter,
  PeriodicExportingMetricReader
} from "@opentelemetry/sdk-metrics"
import type { Histogram, MetricData } from "@opentelemetry/sdk-metrics"
import {
  ATTR_DB_NAMESPACE,
  ATTR_DB_QUERY_SUMMARY,
  ATTR_DB_RESPONSE_STATUS_CODE,
  ATTR_DB_SYSTEM_NAME,
  ATTR_ERROR_TYPE,
  ATTR_SERVER_ADDRESS,
  ATTR_SERVER_PORT,
  METRIC_DB_CLIENT_OPERATION_DURATION
} from "@opentelemetry/semantic-conventions"
import {
  ATTR_DB_CLIENT_CONNECTION_POOL_NAME,
  ATTR_DB_CLIENT_CONNECTION_STATE,
  METRIC_DB_CLIENT_CONNECTION_COUNT,
  METRIC_DB_CLIENT_CONNECTION_CREATE_TIME,
  METRIC_DB_CLIENT_CONNECTION_IDLE_MAX,
  METRIC_DB_CLIENT_CONNECTION_IDLE_MIN,
  METRIC_DB_CLIENT_CONNECTION_MAX,
  METRIC_DB_CLIENT_CONNECTION_PENDING_REQUESTS,
  METRIC_DB_CLIENT_CONNECTION_TIMEOUTS,
  METRIC_DB_CLIENT_CONNECTION_USE_TIME,
  METRIC_DB_CLIENT_CONNECTION_WAIT_TIME
} from "@opentelemetry/semantic-conventions/incubating"
import { Database } from "effect-db"
import type { DbOptions } from "effect-db"
import { Deferred, Effect, Fiber, Layer } from "effect"
import { testDatabase } from "./support/database.js"
import { quietly, reason } from "./support/programs.js"
import { until } from "./support/until.js"
import { resource, sameSpan } from "./support/observed.js"

const database = testDatabase()

type Collect = Effect.Effect<ReadonlyArray<MetricData>>

/** Runs a program that may look at what would be exported at that moment. */
const measured = <A, E, R>(program: (collect: Collect) => Effect.Effect<A, E, R>) =>
  Effect.suspend(() => {
    const exporter = new InMemoryMetricExporter(AggregationTemporality.CUMULATIVE)
    const reader = new PeriodicExportingMetricReader({ exporter, exportIntervalMillis: 3_600_000 })
    const collect = Effect.promise(async () => {
      exporter.reset()
      await reader.forceFlush()
      return exporter.getMetrics().flatMap((_) => _.scopeMetrics.flatMap((_) => _.metrics))
    })
    const layer = OtelMetrics.layer(() => reader).pipe(Layer.provide(resource))
    return Effect.provide(program(collect), layer)
  })

const find = (metrics: ReadonlyArray<MetricData>, name: string): MetricData | undefined =>
  metrics.find((_) => _.descriptor.name === name)

/** What one pool says under a name. Metrics are the process's: each test has a pool of its own name. */
const points = (metrics: ReadonlyArray<MetricData>, name: string, pool: string): ReadonlyArray<any> =>
  (find(metrics, name)?.dataPoints ?? [])
    .filter((_) => _.attributes[ATTR_DB_CLIENT_CONNECTION_POOL_NAME] === pool)
    .map((_) => _.value)

const levels = (metrics: ReadonlyArray<MetricData>, pool: string) => ({
  idle: state(metrics, pool, "idle"),
  used: state(metrics, pool, "used"),
  pending: points(metrics, METRIC_DB_CLIENT_CONNECTION_PENDING_REQUESTS, pool)[0] ?? 0,
  max: points(metrics, METRIC_DB_CLIENT_CONNECTION_MAX, pool)[0] ?? 0,
  idleMax: points(metrics, METRIC_DB_CLIENT_CONNECTION_IDLE_MAX, pool)[0] ?? 0,
  idleMin: points(metrics, METRIC_DB_CLIENT_CONNECTION_IDLE_MIN, pool)[0] ?? 0
})

const state = (metrics: ReadonlyArray<MetricData>, pool: string, state: string): unknown =>
  find(metrics, METRIC_DB_CLIENT_CONNECTION_COUNT)?.dataPoints.find(
    (_) =>
      _.attributes[ATTR_DB_CLIENT_CONNECTION_POOL_NAME] === pool &&
      _.attributes[ATTR_DB_CLIENT_CONNECTION_STATE] === state
  )?.value ?? 0

/** Levels are sampled: it takes a moment until they are as they should be. */
const untilLevels = (collect: Collect, pool: string, expected: Partial<ReturnType<typeof levels>>) =>
  until(
    JSON.stringify(expected),
    Effect.map(collect, (metrics) =>
      Object.entries(expected).every(([key, value]) => levels(metrics, pool)[key as "idle"] === value)
    )
  )

const on = <Name extends string>(db: Database.Database<Name>, options: DbOptions = {}) =>
  quietly(db.DbLayer({ url: database.url, ...options }))

describe("metrics of the pool", () => {
  it.scopedLive("have the names, instruments, units and attributes of the conventions, and count what happens", () =>
    measured((collect) => {
      const Pool = Database.make("metrics-pool")
      const program = Effect.gen(function* () {
        const { sql, stats } = yield* Pool.DbEngine
        const held = yield* Deferred.make<void>()
        const hold = Pool.DbSession.isolated(Effect.zipRight(sql`SELECT 1`, Deferred.await(held)))
        const holding = yield* Effect.fork(Effect.all([hold, hold], { concurrency: "unbounded" }))
        yield* until(
          "both in use",
          Effect.map(stats, (_) => _.used === 2)
        )
        expect(yield* reason(Pool.DbConnection.withConnection(Effect.void, { timeout: 20 }))).toBe("AcquireTimeout")
        const waiting = yield* Effect.fork(sql`SELECT 1`)
        yield* untilLevels(collect, "metrics-pool", { idle: 0, used: 2, pending: 1, max: 2, idleMax: 2, idleMin: 1 })
        yield* Deferred.succeed(held, undefined)
        yield* Fiber.join(holding)
        yield* Fiber.join(waiting)
        yield* untilLevels(collect, "metrics-pool", { idle: 2, used: 0, pending: 0 })

        const metrics = yield* collect
        const shape = (name: string) => {
          const data = find(metrics, name)!
          const monotonic = data.dataPointType === DataPointType.SUM && data.isMonotonic
          return [DataPointType[data.dataPointType], monotonic ? "up" : "", data.descriptor.unit].join(" ")
        }
        expect({
          count: shape(METRIC_DB_CLIENT_CONNECTION_COUNT),
          idleMax: shape(METRIC_DB_CLIENT_CONNECTION_IDLE_MAX),
          idleMin: shape(METRIC_DB_CLIENT_CONNECTION_IDLE_MIN),
          max: shape(METRIC_DB_CLIENT_CONNECTION_MAX),
          pending: shape(METRIC_DB_CLIENT_CONNECTION_PENDING_REQUESTS),
          timeouts: shape(METRIC_DB_CLIENT_CONNECTION_TIMEOUTS),
          create: shape(METRIC_DB_CLIENT_CONNECTION_CREATE_TIME),
          wait: shape(METRIC_DB_CLIENT_CONNECTION_WAIT_TIME),
          use: shape(METRIC_DB_CLIENT_CONNECTION_USE_TIME)
        }).toEqual({
          count: "SUM  {connection}",
          idleMax: "SUM  {connection}",
          idleMin: "SUM  {connection}",
          max: "SUM  {connection}",
          pending: "SUM  {request}",
          timeouts: "SUM up {timeout}",
          create: "HISTOGRAM  s",
          wait: "HISTOGRAM  s",
          use: "HISTOGRAM  s"
        })
        expect(points(metrics, METRIC_DB_CLIENT_CONNECTION_TIMEOUTS, "metrics-pool")[0]).toBe(1)
        const created = points(metrics, METRIC_DB_CLIENT_CONNECTION_CREATE_TIME, "metrics-pool")[0] as Histogram
        const used = points(metrics, METRIC_DB_CLIENT_CONNECTION_USE_TIME, "metrics-pool")[0] as Histogram
        const waited = points(metrics, METRIC_DB_CLIENT_CONNECTION_WAIT_TIME, "metrics-pool")[0] as Histogram
        expect([created.count, used.count, waited.count]).toEqual([2, 3, 3])
        // Of the unit, @effect/opentelemetry makes an attribute as well.
        expect(
          find(metrics, METRIC_DB_CLIENT_CONNECTION_COUNT)!
            .dataPoints.map((_) => _.attributes)
            .filter((_) => _[ATTR_DB_CLIENT_CONNECTION_POOL_NAME] === "metrics-pool")
        ).toEqual(
          ["used", "idle"].map((state) => ({
            unit: "{connection}",
            [ATTR_DB_CLIENT_CONNECTION_POOL_NAME]: "metrics-pool",
            [ATTR_DB_CLIENT_CONNECTION_STATE]: state
          }))
        )
      }).pipe(Effect.provide(on(Pool, { maxConnections: 2, minConnections: 1 })))
      return Effect.zipRight(
        program,
        // With the engine go its levels.
        Effect.map(collect, (metrics) =>
          expect(levels(metrics, "metrics-pool")).toEqual({
            idle: 0,
            used: 0,
            pending: 0,
            max: 0,
            idleMax: 0,
            idleMin: 0
          })
        )
      )
    })
  )
})

const durations = (metrics: ReadonlyArray<MetricData>) =>
  (find(metrics, METRIC_DB_CLIENT_OPERATION_DURATION)?.dataPoints ?? [])
    .filter((_) => _.attributes[ATTR_DB_NAMESPACE] === database.database)
    .map(({ attributes, value }) => ({ attributes, value: value as Histogram }))

describe("db.client.operation.duration", () => {
  it.scopedLive("is recorded for every statement when it is asked for, by summary, host and error", () =>
    measured((collect) =>
      Effect.gen(function* () {
        const Timed = Database.make("metrics-timed")
        const Untimed = Database.make("metrics-untimed")
        const { sql: untimed } = yield* Untimed.DbEngine
        yield* untimed`SELECT 1 FROM pg_database LIMIT 1`
        expect(durations(yield* collect)).toEqual([])

        const { sql } = yield* Timed.DbEngine
        yield* Effect.all([sql`SELECT 1 FROM pg_class LIMIT 1`, sql`SELECT 2 FROM pg_class LIMIT 2`])
        yield* Effect.ignore(sql`SELECT FROM missing`)
        const metrics = yield* collect
        const { dataPointType, descriptor } = find(metrics, METRIC_DB_CLIENT_OPERATION_DURATION)!
        expect([DataPointType[dataPointType], descriptor.unit]).toEqual(["HISTOGRAM", "s"])
        const where = {
          unit: "s",
          [ATTR_DB_SYSTEM_NAME]: "postgresql",
          [ATTR_DB_NAMESPACE]: database.database,
          [ATTR_SERVER_ADDRESS]: database.host,
          [ATTR_SERVER_PORT]: String(database.port)
        }
        expect(durations(metrics).map(({ attributes, value }) => [attributes, value.count])).toEqual([
          [{ ...where, [ATTR_DB_QUERY_SUMMARY]: "SELECT pg_class" }, 2],
          [
            {
              ...where,
              [ATTR_DB_QUERY_SUMMARY]: "SELECT missing",
              [ATTR_ERROR_TYPE]: "SqlSyntaxError",
              [ATTR_DB_RESPONSE_STATUS_CODE]: "42P01"
            },
            1
          ]
        ])
        expect(durations(metrics)[0]!.value.buckets.boundaries).toEqual([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10])
      }).pipe(
        Effect.provide(
          Layer.merge(
            on(Database.make("metrics-timed"), { operationMetrics: true }),
            on(Database.make("metrics-untimed"))
          )
        )
      )
    )
  )

  it.scopedLive("is recorded where a tracer is installed, without being asked for", () =>
    measured((collect) =>
      Effect.gen(function* () {
        const Spied = Database.make("metrics-spied")
        const { sql } = yield* Spied.DbEngine
        yield* Effect.withTracer(sql`SELECT 1 FROM pg_type LIMIT 1`, sameSpan(false))
        expect(
          durations(yield* collect).filter((_) => _.attributes[ATTR_DB_QUERY_SUMMARY] === "SELECT pg_type").length
        ).toBe(1)
      }).pipe(Effect.provide(on(Database.make("metrics-spied"))))
    )
  )
})
