/**
 * What is logged and traced, for tests to look at.
 */
import * as OtelResource from "@effect/opentelemetry/Resource"
import * as Cause from "effect/Cause"
import * as HashMap from "effect/HashMap"
import type * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as Tracer from "effect/Tracer"

export interface Line {
  readonly level: string
  readonly message: string
  readonly cause: string
  readonly annotations: Readonly<Record<string, unknown>>
}

/** What is logged where the layer is provided. */
export const collected = (): readonly [lines: ReadonlyArray<Line>, layer: Layer.Layer<never>] => {
  const lines: Array<Line> = []
  const logger = Logger.make<unknown, void>(({ annotations, cause, logLevel, message }) => {
    lines.push({
      level: logLevel.label,
      message: String(message),
      cause: Cause.pretty(cause),
      annotations: Object.fromEntries(HashMap.toEntries(annotations))
    })
  })
  return [lines, Logger.replace(Logger.defaultLogger, logger)]
}

/** A tracer of which every span is the same. */
export const sameSpan = (sampled: boolean): Tracer.Tracer =>
  Tracer.make({
    span: (name, parent, context, links, startTime, kind) => ({
      _tag: "Span",
      name,
      parent,
      context,
      links,
      kind,
      spanId: "6e0c63257de34c92",
      traceId: "d4cda95b652f4a1592b449d5929fda1b",
      sampled,
      status: { _tag: "Started", startTime },
      attributes: new Map(),
      attribute: () => {},
      event: () => {},
      addLinks: () => {},
      end: () => {}
    }),
    context: (f) => f()
  })

export const resource = OtelResource.layer({ serviceName: "test" })
