/**
 * Statements and blocks with somebody listening: in spans, timed, logged when they are slow. Whoever runs a statement
 * asks `isObserved` first, so that nothing of this costs where nobody does.
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as DefaultServices from "effect/DefaultServices"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import type * as Scope from "effect/Scope"
import type * as Tracer from "effect/Tracer"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Control, Watch } from "./command.js"
import type { EngineCore } from "./engine.js"
import { topOf } from "./lease.js"
import { describeSql, withComment } from "./queryText.js"
import { hasTracer, isTraced, traceContext } from "./telemetry.js"
import type { Spec } from "./statement.js"
import type { TransactionOptions } from "./transactionSql.js"
import type { Host } from "./wire.js"

type Runtime = Fiber.RuntimeFiber<any, any>

/** Somebody wants to know of the statements of this fiber. @internal */
export const isObserved = (fiber: Runtime, engine: EngineCore): boolean => engine.watched || isTraced(fiber)

/** What is run. @internal */
export interface Observed {
  readonly text: string
  /** Instead of what its text says. */
  readonly summary?: string | undefined
  /** How many statements, where they are several in one. */
  readonly batch?: number | undefined
}

const databaseOf = (engine: EngineCore): string => {
  const { target } = engine.config
  return target.database ?? target.username ?? "postgres"
}

/** The first of a path that is quoted where it must be. */
const firstSchema = (path: string): string => {
  const quoted = /^"((?:[^"]|"")*)"/.exec(path)
  return quoted === null ? (path.split(",")[0] ?? "").trim() : quoted[1]!.replaceAll('""', '"')
}

/** The database and, where the library knows of one, the schema. */
const namespaceOf = (fiber: Runtime, engine: EngineCore): string => {
  const path = Ambient.searchPath(Ambient.entry(fiber, engine))
  return path === undefined ? databaseOf(engine) : `${databaseOf(engine)}|${firstSchema(path)}`
}

/** Who runs it, for the log. */
const holderOf = (fiber: Runtime, engine: EngineCore): string => {
  const { orphan, slot, stack } = Ambient.entry(fiber, engine)
  return slot?.name ?? (orphan ?? topOf(stack))?.root()?.holder.name ?? "implicit statement"
}

/** @internal */
export class Observation implements Watch {
  readonly pairs: Readonly<Record<string, string>> | undefined
  private readonly began = performance.now()
  /** Of what has not been answered yet. */
  private sentAt: number | undefined = undefined
  private waited = 0
  /** From being sent to the answer; of a stream, of each of its fetches. */
  private served = 0
  private host: Host
  private readonly clock: Clock.Clock

  constructor(
    private readonly fiber: Runtime,
    private readonly engine: EngineCore,
    private readonly what: Observed,
    private readonly summary: string,
    private readonly span: Tracer.Span | undefined
  ) {
    this.host = engine.config.target.hosts[0]!
    this.clock = Context.get(fiber.getFiberRef(DefaultServices.currentServices), Clock.Clock)
    this.pairs = span?.sampled === true && engine.config.comment?.trace === true ? traceContext(span) : undefined
  }

  readonly sent = (prefix: ReadonlyArray<Control>, host: Host): void => {
    this.sentAt = performance.now()
    this.waited = this.sentAt - this.began
    this.host = host
    const { span } = this
    if (span === undefined) return
    hostAttributes(span, host)
    const now = this.clock.unsafeCurrentTimeNanos()
    for (const { text } of prefix) span.event(describeSql(text).summary, now, { "db.query.text": text })
    span.event("sent", now)
  }

  /** The next rows of a stream are asked for. */
  fetching(): void {
    this.sentAt = performance.now()
  }

  answered(): void {
    if (this.sentAt !== undefined) this.served += performance.now() - this.sentAt
    this.sentAt = undefined
  }

  ended(exit: Exit.Exit<unknown, unknown>): Effect.Effect<void> {
    const error = errorOf(exit)
    const { engine, fiber, span } = this
    if (span !== undefined && error !== undefined) errorAttributes(span, error)
    if (engine.config.operationMetrics || hasTracer(fiber)) {
      const took = performance.now() - this.began
      engine.operations.took(took, databaseOf(engine), this.summary, this.host, error)
    }
    return this.logIfSlow("statement", holderOf(fiber, engine))
  }

  logIfSlow(kind: "statement" | "stream", holder: string): Effect.Effect<void> {
    this.answered()
    const { engine, served, waited, what } = this
    if (served < engine.config.slowMillis) return Effect.void
    const took = Math.round(served)
    const text = describeSql(what.text).text
    return Effect.annotateLogs(
      Effect.logWarning(
        `effect-db: a ${kind} of "${holder}" took ${took} ms, after ${Math.round(waited)} ms until it was sent: ${text}`
      ),
      { "effect_db.database": engine.name, "effect_db.holder": holder, "effect_db.duration": took }
    )
  }
}

const errorOf = (exit: Exit.Exit<unknown, unknown>): DbError | undefined => {
  if (Exit.isSuccess(exit)) return undefined
  const failure = Option.getOrUndefined(Cause.failureOption(exit.cause))
  return failure instanceof DbError ? failure : undefined
}

const hostAttributes = (span: Tracer.Span, host: Host): void => {
  span.attribute("server.address", host.host)
  if (!host.host.startsWith("/")) span.attribute("server.port", host.port)
}

const errorAttributes = (span: Tracer.Span, { reason }: DbError): void => {
  span.attribute("error.type", reason._tag)
  if (reason.sqlState !== undefined) span.attribute("db.response.status_code", reason.sqlState)
}

const attributesOf = (fiber: Runtime, engine: EngineCore, what: Observed, summary: string): Record<string, unknown> => {
  const host = engine.config.target.hosts[0]!
  return {
    ...engine.config.options.spanAttributes,
    "db.system.name": "postgresql",
    "db.namespace": namespaceOf(fiber, engine),
    "server.address": host.host,
    ...(host.host.startsWith("/") ? {} : { "server.port": host.port }),
    ...(summary === "" ? {} : { "db.query.summary": summary }),
    ...(what.text === "" ? {} : { "db.query.text": describeSql(what.text).text }),
    ...(what.batch === undefined ? {} : { "db.operation.name": "BATCH" }),
    ...(what.batch === undefined || what.batch < 2 ? {} : { "db.operation.batch.size": what.batch })
  }
}

const summaryOf = (what: Observed): string => what.summary ?? describeSql(what.text).summary

const client = { kind: "client", captureStackTrace: false } as const

/** Runs a statement with somebody listening. What it is sent with tells the watch. @internal */
export const observe = <A, E>(
  fiber: Runtime,
  engine: EngineCore,
  what: Observed,
  run: (watch: Observation) => Effect.Effect<A, E>
): Effect.Effect<A, E> => {
  const summary = summaryOf(what)
  const go = (span: Tracer.Span | undefined) => {
    const observation = new Observation(fiber, engine, what, summary, span)
    return Effect.onExit(
      Effect.suspend(() => run(observation)),
      (exit) => observation.ended(exit)
    )
  }
  return isTraced(fiber)
    ? Effect.useSpan(
        summary === "" ? "postgresql" : summary,
        { ...client, attributes: attributesOf(fiber, engine, what, summary) },
        go
      )
    : Effect.suspend(() => go(undefined))
}

/** A statement of ours, observed when the statements of the fiber are. @internal */
export const observeOwn = <A, E>(
  engine: EngineCore,
  what: Observed,
  run: (watch: Watch | undefined) => Effect.Effect<A, E>
): Effect.Effect<A, E> =>
  Effect.withFiberRuntime((fiber) => (isObserved(fiber, engine) ? observe(fiber, engine, what, run) : run(undefined)))

/** Of rows that are read as they are wanted: a span that is open for as long as the scope, and what the server took. @internal */
export const observeScoped = (
  fiber: Runtime,
  engine: EngineCore,
  text: string
): Effect.Effect<{ readonly watch: Observation; readonly failed: (error: unknown) => void }, never, Scope.Scope> => {
  const what: Observed = { text }
  const summary = summaryOf(what)
  // Another fiber may read the last of it, and outlive the session.
  const holder = holderOf(fiber, engine)
  const span = isTraced(fiber)
    ? Effect.makeSpanScoped(summary === "" ? "postgresql" : summary, {
        ...client,
        attributes: attributesOf(fiber, engine, what, summary)
      })
    : Effect.succeed(undefined)
  return Effect.flatMap(span, (span) => {
    const watch = new Observation(fiber, engine, what, summary, span)
    const failed = (error: unknown): void => {
      if (span !== undefined && error instanceof DbError) errorAttributes(span, error)
    }
    return Effect.as(
      Effect.addFinalizer(() => Effect.suspend(() => watch.logIfSlow("stream", holder))),
      { watch, failed }
    )
  })
}

/**
 * A statement with its watch, and with the comment that the options ask for. One that names the span is another text
 * each time: a named statement for each would fill the server's memory and push out those that are used again.
 * @internal
 */
export const withExtras = (engine: EngineCore, spec: Spec, watch: Observation | undefined): Spec => {
  const { comment } = engine.config
  if (comment === undefined) return { ...spec, watch }
  const pairs = watch?.pairs
  const text = withComment(spec.text, { ...comment.tags, ...pairs })
  return { ...spec, text, prepare: spec.prepare && (pairs === undefined || text === spec.text), watch }
}

/** What became of a session's transaction or of a block. @internal */
export type Outcome = "none" | "committed" | "released" | "rolled back" | "unknown"

/** Counts the attempts of one call; there where a tracer listens, nowhere else. @internal */
export interface Attempts {
  count: number
}

/** @internal */
export const attemptsOf = (fiber: Runtime): Attempts | undefined => (isTraced(fiber) ? { count: 0 } : undefined)

/** Runs a session, a transaction or a savepoint in a span that says how it ended. @internal */
export const blockSpan = <A, E, R>(
  kind: "session" | "transaction" | "savepoint",
  engine: EngineCore,
  options: TransactionOptions & { readonly name?: string | undefined; readonly retry?: unknown },
  attempts: Attempts,
  outcome: () => Outcome,
  effect: Effect.Effect<A, E, R>
): Effect.Effect<A, E, R> => {
  const attempt = ++attempts.count
  const isolation = options.isolation ?? (kind === "savepoint" ? undefined : engine.config.options.isolation)
  return Effect.useSpan(
    `sql.${kind}`,
    {
      kind: "internal",
      captureStackTrace: false,
      attributes: {
        "effect_db.database": engine.name,
        ...(options.name === undefined ? {} : { "effect_db.name": options.name }),
        ...(isolation === undefined ? {} : { "effect_db.isolation": isolation }),
        ...(options.readOnly === undefined ? {} : { "effect_db.read_only": options.readOnly }),
        ...(options.retry === undefined || options.retry === false ? {} : { "effect_db.attempt": attempt })
      }
    },
    (span) =>
      Effect.withParentSpan(
        Effect.onExit(effect, (exit) =>
          Effect.sync(() => {
            span.attribute("effect_db.outcome", outcome())
            const error = errorOf(exit)
            if (error !== undefined) span.attribute("error.type", error.reason._tag)
          })
        ),
        span
      ) as Effect.Effect<A, E, R>
  )
}
