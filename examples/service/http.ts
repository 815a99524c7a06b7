/** What every route needs: input that is checked, and answers for what goes wrong. */
import { FileSystem, HttpServerRequest, HttpServerResponse } from "@effect/platform"
import type { HttpApp } from "@effect/platform"
import { DbError, DbHttp } from "effect-db"
import { Effect, Option, ParseResult, Schedule, Schema } from "effect"
import { BadInput, TooLarge } from "./errors.js"
import type { Refusal } from "./errors.js"
import { complaint } from "./schema.js"

const maxBody = 64 * 1024

const checked = <A, E, R>(effect: Effect.Effect<A, E | ParseResult.ParseError, R>) =>
  Effect.mapError(effect, (error) =>
    ParseResult.isParseError(error) ? new BadInput({ message: complaint(error) }) : error
  )

/** The JSON body, which is an object. */
export const body = <A, I>(schema: Schema.Schema<A, I>) =>
  Effect.gen(function* () {
    const request = yield* HttpServerRequest.HttpServerRequest
    // refused before it is read: what is cut off while it is read gets no answer
    if (Number(request.headers["content-length"]) > maxBody) {
      return yield* new TooLarge({ message: `The body is larger than ${maxBody} bytes.` })
    }
    const json = yield* Effect.mapError(request.json, () => new BadInput({ message: "The body is not JSON." }))
    if (typeof json !== "object" || json === null || Array.isArray(json)) {
      return yield* new BadInput({ message: "The body is not a JSON object." })
    }
    return yield* checked(Schema.decodeUnknown(schema, { errors: "all", onExcessProperty: "error" })(json))
  }).pipe(HttpServerRequest.withMaxBodySize(Option.some(FileSystem.Size(maxBody))))

/** A part of the request that arrives as text. */
export const input = <A, I>(schema: Schema.Schema<A, I>, given: unknown) =>
  checked(Schema.decodeUnknown(schema, { errors: "all" })(given))

export const json = (value: unknown, status = 200): HttpServerResponse.HttpServerResponse =>
  HttpServerResponse.unsafeJson(value, { status })

const refuse = (error: { readonly _tag: string; readonly status: number; readonly message: string }) =>
  json({ error: error._tag, message: error.message }, error.status)

/** What is no fault of the request: told to the log, and to the client without details. */
const failed = (error: unknown) =>
  Effect.as(
    Effect.logError("The request failed", error),
    DbError.isRetryable(error)
      ? refuse({ _tag: "Unavailable", status: 503, message: "The database is busy or away. Try again." })
      : refuse({ _tag: "Failed", status: 500, message: "The service failed. Nothing was changed." })
  )

const isRefusal = (error: unknown): error is Refusal =>
  typeof error === "object" && error !== null && "_tag" in error && "status" in error

const conflicts = new Set<string | undefined>(["SerializationError", "DeadlockError"])

/**
 * One session for each request: a response below 400 commits, everything else rolls back. Who lost against a concurrent
 * transaction is run again, each time in a session of its own. Errors become responses outside of the session.
 */
export const transactional = <E, R>(handler: HttpApp.Default<E, R>) =>
  handler.pipe(
    DbHttp.middleware({ name: "request" }),
    Effect.retry({
      while: (error) => conflicts.has(DbError.reason(error)?._tag),
      schedule: Schedule.jittered(Schedule.exponential("10 millis")),
      times: 5
    }),
    Effect.catchAll((error) => (isRefusal(error) ? Effect.succeed(refuse(error)) : failed(error))),
    Effect.catchAllDefect(failed)
  )
