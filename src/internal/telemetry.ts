/**
 * What is going on, by the names of OpenTelemetry's conventions for database clients: who listens, and the metrics of
 * statements and of the pool.
 */
import * as Context from "effect/Context"
import * as DefaultServices from "effect/DefaultServices"
import type * as Fiber from "effect/Fiber"
import * as Metric from "effect/Metric"
import * as MetricBoundaries from "effect/MetricBoundaries"
import * as MetricLabel from "effect/MetricLabel"
import * as Option from "effect/Option"
import * as Tracer from "effect/Tracer"
import type { DbError } from "../DbError.js"

const nativeTracer = Context.get(DefaultServices.liveServices, Tracer.Tracer)

/** Somebody has installed a tracer, who will have installed something for metrics as well. @internal */
export const hasTracer = (fiber: Fiber.RuntimeFiber<any, any>): boolean => fiber.currentTracer !== nativeTracer

/** Nobody looks at the spans of the built-in tracer, unless a span of the user's is around. @internal */
export const isTraced = (fiber: Fiber.RuntimeFiber<any, any>): boolean =>
  fiber.currentTracer !== nativeTracer || fiber.currentSpan !== undefined

/** For code that wants a span to write to, where there is none. @internal */
export const unseenSpan = (): Tracer.Span =>
  nativeTracer.span("sql.execute", Option.none(), Context.empty(), [], BigInt(0), "client")

interface TraceState {
  readonly serialize?: () => unknown
}

/** What `@effect/opentelemetry` keeps of a span from elsewhere. */
const givenTraceState = Context.GenericTag<TraceState>("@effect/opentelemetry/Tracer/OtelTraceState")

/** Of OpenTelemetry's own span, which has that of its parent or its sampler's; else of the parent from elsewhere. */
const stateOf = (span: Tracer.AnySpan): TraceState | undefined => {
  const { span: own } = span as {
    readonly span?: { readonly spanContext?: () => { readonly traceState?: TraceState } }
  }
  if (typeof own?.spanContext === "function") return own.spanContext().traceState
  if (span._tag === "ExternalSpan") return Option.getOrUndefined(Context.getOption(span.context, givenTraceState))
  return Option.isSome(span.parent) ? stateOf(span.parent.value) : undefined
}

/** The span in the headers of W3C's trace context; nothing, where it can't be named so. @internal */
export const traceContext = (span: Tracer.Span): Readonly<Record<string, string>> | undefined => {
  if (!/^[\da-f]{32}$/.test(span.traceId) || !/^[\da-f]{16}$/.test(span.spanId)) return undefined
  const traceparent = `00-${span.traceId}-${span.spanId}-01`
  const tracestate = stateOf(span)?.serialize?.()
  return typeof tracestate === "string" && /^[\x20-\x7e]+$/.test(tracestate)
    ? { traceparent, tracestate }
    : { traceparent }
}

// The conventions' own advice, in seconds.
const boundaries = MetricBoundaries.fromIterable([0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10])

const histogram = (name: string, description: string) => Metric.histogram(name, boundaries, description)

/** Up and down, as the conventions say: pools of the same name add up. */
const level = (name: string, description: string) => Metric.counter(name, { description })

const duration = histogram("db.client.operation.duration", "Duration of database client operations.")
const count = level(
  "db.client.connection.count",
  "The number of connections that are currently in state described by the state attribute."
)
const idleMax = level("db.client.connection.idle.max", "The maximum number of idle open connections allowed.")
const idleMin = level("db.client.connection.idle.min", "The minimum number of idle open connections allowed.")
const most = level("db.client.connection.max", "The maximum number of open connections allowed.")
const pending = level(
  "db.client.connection.pending_requests",
  "The number of current pending requests for an open connection."
)
const timeouts = Metric.counter("db.client.connection.timeouts", {
  description: "The number of connection timeouts that have occurred trying to obtain a connection from the pool.",
  incremental: true
})
const createTime = histogram("db.client.connection.create_time", "The time it took to create a new connection.")
const waitTime = histogram(
  "db.client.connection.wait_time",
  "The time it took to obtain an open connection from the pool."
)
const useTime = histogram(
  "db.client.connection.use_time",
  "The time between borrowing a connection and returning it to the pool."
)

interface PoolFigures {
  readonly idle: number
  readonly used: number
  readonly pending: number
  readonly max: number
  readonly min: number
}

type Labels = ReadonlyArray<MetricLabel.MetricLabel>

/** `@effect/opentelemetry` takes an instrument's unit from the label of this name. */
const unit = (name: string): MetricLabel.MetricLabel => MetricLabel.make("unit", name)

/** The figures of the pools of one engine; each update is a map look-up. @internal */
export class PoolMetrics {
  // The same array for the same labels: Effect finds the metric by its reference.
  private readonly seconds: Labels
  private readonly timeouts: Labels
  private readonly levels: ReadonlyArray<{
    readonly metric: Metric.Metric.Counter<number>
    readonly labels: Labels
    readonly of: (figures: PoolFigures) => number
    last: number
  }>
  private sampling: NodeJS.Timeout | undefined = undefined
  private closed = false

  constructor(
    name: string,
    private readonly figures: () => PoolFigures
  ) {
    const pool = MetricLabel.make("db.client.connection.pool.name", name)
    const connections = [pool, unit("{connection}")]
    const state = (name: string): Labels => [...connections, MetricLabel.make("db.client.connection.state", name)]
    this.seconds = [pool, unit("s")]
    this.timeouts = [pool, unit("{timeout}")]
    this.levels = [
      { metric: count, labels: state("idle"), of: (_) => _.idle, last: 0 },
      { metric: count, labels: state("used"), of: (_) => _.used, last: 0 },
      { metric: pending, labels: [pool, unit("{request}")], of: (_) => _.pending, last: 0 },
      { metric: most, labels: connections, of: (_) => _.max, last: 0 },
      { metric: idleMax, labels: connections, of: (_) => _.max, last: 0 },
      { metric: idleMin, labels: connections, of: (_) => _.min, last: 0 }
    ]
  }

  /** Sampled: levels are read far less often than connections are lent. */
  readonly changed = (): void => {
    if (this.sampling !== undefined || this.closed) return
    this.sampling = setTimeout(() => {
      this.sampling = undefined
      const figures = this.figures()
      for (const one of this.levels) this.set(one, one.of(figures))
    }, 100)
    this.sampling.unref()
  }

  private set(level: PoolMetrics["levels"][number], value: number): void {
    if (value === level.last) return
    level.metric.unsafeUpdate(value - level.last, level.labels)
    level.last = value
  }

  /** The pool is gone, and its levels with it. */
  close(): void {
    this.closed = true
    clearTimeout(this.sampling)
    for (const one of this.levels) this.set(one, 0)
  }

  readonly created = (millis: number): void => createTime.unsafeUpdate(millis / 1000, this.seconds)
  readonly waited = (millis: number): void => waitTime.unsafeUpdate(millis / 1000, this.seconds)
  readonly usedFor = (millis: number): void => useTime.unsafeUpdate(millis / 1000, this.seconds)
  readonly timedOut = (): void => timeouts.unsafeUpdate(1, this.timeouts)
}

/** Texts that are made at run time must not fill the memory: what comes after these has no summary. */
const mostSeries = 1000

/** How long the statements of one engine take. @internal */
export class OperationMetrics {
  private readonly series = new Map<string, Labels>()

  readonly took = (
    millis: number,
    namespace: string,
    summary: string,
    host: { readonly host: string; readonly port: number },
    error: DbError | undefined
  ): void => duration.unsafeUpdate(millis / 1000, this.labels(namespace, summary, host, error))

  private labels(
    namespace: string,
    summary: string,
    host: { readonly host: string; readonly port: number },
    error: DbError | undefined
  ): Labels {
    const code = error?.reason.sqlState
    const parts = [namespace, summary, host.host, host.port, error?.reason._tag, code]
    const key = parts.join("\0")
    const known = this.series.get(key)
    if (known !== undefined) return known
    if (this.series.size >= mostSeries && summary !== "") return this.labels(namespace, "", host, error)
    const labels = [
      unit("s"),
      MetricLabel.make("db.system.name", "postgresql"),
      MetricLabel.make("db.namespace", namespace),
      MetricLabel.make("server.address", host.host),
      ...(host.host.startsWith("/") ? [] : [MetricLabel.make("server.port", String(host.port))]),
      ...(summary === "" ? [] : [MetricLabel.make("db.query.summary", summary)]),
      ...(error === undefined ? [] : [MetricLabel.make("error.type", error.reason._tag)]),
      ...(code === undefined ? [] : [MetricLabel.make("db.response.status_code", code)])
    ]
    this.series.set(key, labels)
    return labels
  }
}
