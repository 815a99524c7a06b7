/**
 * What is going on, by the names of OpenTelemetry's conventions for database clients: spans of statements where a
 * tracer listens, and metrics of statements and of the pool.
 */
import * as Context from "effect/Context"
import * as DefaultServices from "effect/DefaultServices"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import * as Metric from "effect/Metric"
import * as MetricBoundaries from "effect/MetricBoundaries"
import * as MetricLabel from "effect/MetricLabel"
import * as Tracer from "effect/Tracer"
import { DbError } from "../DbError.js"
import { redactSql } from "./sqlState.js"

const nativeTracer = Context.get(DefaultServices.liveServices, Tracer.Tracer)

/** Nobody looks at the spans of the built-in tracer, unless a span of the user's is around. @internal */
export const isTraced = (fiber: Fiber.RuntimeFiber<any, any>): boolean =>
  fiber.currentTracer !== nativeTracer || fiber.currentSpan !== undefined

const operationOf = (text: string): string => /^[\s(]*([a-z]+)/i.exec(text)?.[1]?.toUpperCase() ?? "QUERY"

/** Runs a statement in a span of its own. Literals in its text are masked; parameters are never in it. @internal */
export const statementSpan = <A, E>(
  text: string,
  attributes: ReadonlyArray<readonly [string, unknown]>,
  effect: Effect.Effect<A, E>
): Effect.Effect<A, E> => {
  const operation = operationOf(text)
  return Effect.useSpan(operation, { kind: "client", captureStackTrace: false }, (span) => {
    for (const [name, value] of attributes) span.attribute(name, value)
    span.attribute("db.operation.name", operation)
    span.attribute("db.query.text", redactSql(text))
    return Effect.tapError(effect, (error) =>
      Effect.sync(() => {
        const reason = DbError.reason(error)
        if (reason === undefined) return
        span.attribute("error.type", reason._tag)
        if (reason.sqlState !== undefined) span.attribute("db.response.status_code", reason.sqlState)
      })
    )
  })
}

/** Runs a transaction or a session in a span, where a tracer listens. @internal */
export const blockSpan = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  name: string,
  attributes: Readonly<Record<string, unknown>>
): Effect.Effect<A, E, R> =>
  Effect.withFiberRuntime((fiber) =>
    isTraced(fiber) ? Effect.withSpan(effect, name, { kind: "internal", captureStackTrace: false, attributes }) : effect
  )

// The conventions' own advice, in seconds.
const seconds = MetricBoundaries.fromIterable([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10])

const count = Metric.gauge("db.client.connection.count", { description: "The number of connections by state." })
const most = Metric.gauge("db.client.connection.max", { description: "The most connections that are allowed." })
const pending = Metric.gauge("db.client.connection.pending_requests", {
  description: "How many wait for a connection."
})
const timeouts = Metric.counter("db.client.connection.timeouts", {
  description: "How many waited for a connection in vain.",
  incremental: true
})
const createTime = Metric.histogram("db.client.connection.create_time", seconds, "How long it took to connect.")
const waitTime = Metric.histogram("db.client.connection.wait_time", seconds, "How long borrowers waited.")
const useTime = Metric.histogram("db.client.connection.use_time", seconds, "How long connections were borrowed.")

interface PoolFigures {
  readonly idle: number
  readonly used: number
  readonly pending: number
  readonly max: number
}

/** The figures of one pool; each update is a map look-up. @internal */
export class PoolMetrics {
  // The same array for the same labels: Effect finds the metric by its reference.
  private readonly pool: ReadonlyArray<MetricLabel.MetricLabel>
  private readonly idle: ReadonlyArray<MetricLabel.MetricLabel>
  private readonly used: ReadonlyArray<MetricLabel.MetricLabel>

  private sampling = false

  constructor(name: string) {
    const pool = MetricLabel.make("db.client.connection.pool.name", name)
    this.pool = [pool]
    this.idle = [pool, MetricLabel.make("db.client.connection.state", "idle")]
    this.used = [pool, MetricLabel.make("db.client.connection.state", "used")]
  }

  /** Sampled: gauges are read far less often than connections are lent. */
  readonly changed = (stats: () => PoolFigures): void => {
    if (this.sampling) return
    this.sampling = true
    setTimeout(() => {
      this.sampling = false
      this.counted(stats())
    }, 100).unref()
  }

  private counted(stats: PoolFigures): void {
    count.unsafeUpdate(stats.idle, this.idle)
    count.unsafeUpdate(stats.used, this.used)
    pending.unsafeUpdate(stats.pending, this.pool)
    most.unsafeUpdate(stats.max, this.pool)
  }

  readonly created = (millis: number): void => createTime.unsafeUpdate(millis / 1000, this.pool)
  readonly waited = (millis: number): void => waitTime.unsafeUpdate(millis / 1000, this.pool)
  readonly usedFor = (millis: number): void => useTime.unsafeUpdate(millis / 1000, this.pool)
  readonly timedOut = (): void => timeouts.unsafeUpdate(1, this.pool)
}
