/**
 * One session per HTTP request, for `@effect/platform`.
 *
 * @since 0.1.0
 */
import * as HttpServerResponse from "@effect/platform/HttpServerResponse"
import type * as HttpApp from "@effect/platform/HttpApp"
import * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Stream from "effect/Stream"
import type { Database } from "./Database.js"
import { coreOf } from "./DbEngine.js"
import type { DbEngine } from "./DbEngine.js"
import { DbEngine as DefaultEngine } from "./Default.js"
import type { SessionOptions } from "./DbSession.js"
import * as Ambient from "./internal/ambient.js"
import { endSlot, inSlot, makeSlot, runBefore } from "./internal/session.js"
import type { Slot } from "./internal/slot.js"

/**
 * @since 0.1.0
 * @category models
 */
export interface MiddlewareOptions<Name extends string = "default"> extends SessionOptions {
  /** Whether the response commits. Default: a status below 400. */
  readonly commits?: ((response: HttpServerResponse.HttpServerResponse) => boolean) | undefined
  /**
   * What becomes of the session when the body of the response is a stream. `"close"` ends it before the response
   * leaves, so that a body that uses it gets `SessionClosed`; `"keepOpen"` ends it with the body, which commits when
   * the body was sent in full. Default: `"close"`; one response opts in with `DbHttp.keepOpen(response)`.
   */
  readonly streams?: "close" | "keepOpen" | undefined
  /** The databases that get a session for the request. Default: the default one. */
  readonly databases?: ReadonlyArray<Pick<Database<Name>, "DbEngine">> | undefined
}

const kept = new WeakSet<HttpServerResponse.HttpServerResponse>()

/**
 * Keeps the request's session open until the streamed body of this response has been sent; then it commits, or rolls
 * back when the body failed or the client went away. A commit that fails then can't become a 5xx any more: it is
 * reported as the failure of the body.
 *
 * @since 0.1.0
 * @category combinators
 */
export const keepOpen = (response: HttpServerResponse.HttpServerResponse): HttpServerResponse.HttpServerResponse => {
  kept.add(response)
  return response
}

/** Ends them all; after the first failure the rest is rolled back. */
const endAll = (slots: ReadonlyArray<Slot>, success: boolean): Effect.Effect<void, SqlError> => {
  const next = (
    at: number,
    success: boolean,
    failure: Cause.Cause<SqlError> | undefined
  ): Effect.Effect<void, SqlError> => {
    const slot = slots[at]
    if (slot === undefined) return failure === undefined ? Effect.void : Effect.failCause(failure)
    return Effect.matchCauseEffect(endSlot(slot, undefined, success), {
      onSuccess: () => next(at + 1, success, failure),
      onFailure: (cause) => next(at + 1, false, failure ?? cause)
    })
  }
  return Effect.uninterruptible(next(0, success, undefined))
}

const before = (slots: ReadonlyArray<Slot>): Effect.Effect<void, SqlError> =>
  Effect.forEach(slots, (slot) => (slot.unit === undefined ? Effect.void : runBefore(slot, slot.unit, undefined)), {
    discard: true
  })

/** Runs the hooks and ends the sessions: by success they commit. */
const finish = (slots: ReadonlyArray<Slot>, success: boolean): Effect.Effect<void, SqlError> =>
  success
    ? Effect.matchCauseEffect(before(slots), {
        onSuccess: () => endAll(slots, true),
        onFailure: (cause) => Effect.zipRight(endAll(slots, false), Effect.failCause(cause))
      })
    : endAll(slots, false)

const withSlots = <A, E, R>(effect: Effect.Effect<A, E, R>, slots: ReadonlyArray<Slot>): Effect.Effect<A, E, R> =>
  slots.reduce((inner, slot) => Ambient.locally(inner, slot.engine, inSlot(slot)), effect)

/**
 * Gives every request a lazy session. A response with a status below 400 commits; 400 and above, a failure, a defect
 * and a client that goes away roll back. The commit happens before the response leaves, so that a failed commit is a
 * 5xx. A handler that uses no database borrows nothing, and a request that has a session already is left alone.
 *
 * ```ts
 * HttpServer.serve(router, DbHttp.middleware())
 * ```
 *
 * @since 0.1.0
 * @category middleware
 */
export const middleware =
  <Name extends string = "default">(options: MiddlewareOptions<Name> = {}) =>
  <E, R>(app: HttpApp.Default<E, R>): HttpApp.Default<E | SqlError, R | DbEngine<Name>> => {
    const tags = options.databases?.map((_) => _.DbEngine) ?? [DefaultEngine as never as Database<Name>["DbEngine"]]
    const commits = options.commits ?? ((response) => response.status < 400)
    return Effect.flatMap(Effect.all(tags), (services) =>
      Effect.withFiberRuntime<HttpServerResponse.HttpServerResponse, E | SqlError, any>((fiber) => {
        const fresh = services.map(coreOf).filter((core) => Ambient.entry(fiber, core).slot === undefined)
        if (fresh.length === 0) return app as HttpApp.Default<E, any>
        return Effect.uninterruptibleMask((restore) =>
          Effect.flatMap(
            Effect.forEach(fresh, (core) => makeSlot(core, Ambient.entry(fiber, core), options, false)),
            (slots): Effect.Effect<HttpServerResponse.HttpServerResponse, E | SqlError, any> =>
              // What is ambient in the handler, for a body that is sent after it.
              restore(withSlots(Effect.zip(app as HttpApp.Default<E, any>, Effect.context<never>()), slots)).pipe(
                Effect.exit,
                Effect.flatMap((exit): Effect.Effect<HttpServerResponse.HttpServerResponse, E | SqlError, any> => {
                  if (Exit.isFailure(exit)) {
                    return Effect.zipRight(Effect.exit(endAll(slots, false)), Effect.failCause(exit.cause))
                  }
                  const [response, context] = exit.value
                  const success = commits(response)
                  const { body } = response
                  if (body._tag !== "Stream") return Effect.as(restoring(restore, slots, success), response)
                  const open = options.streams === "keepOpen" || kept.has(response)
                  const carrier = Context.pick(SqlClient.TransactionConnection)(context as never)
                  const stream = Stream.provideSomeContext(body.stream, carrier as Context.Context<never>)
                  const ending = open
                    ? Stream.ensuringWith(stream, (exit) =>
                        Effect.matchCauseEffect(finish(slots, success && Exit.isSuccess(exit)), {
                          onSuccess: () => Effect.void,
                          onFailure: (cause) => Effect.die(Cause.squash(cause))
                        })
                      )
                    : stream
                  const wrapped = HttpServerResponse.setBody(response, withStream(body, ending))
                  return open ? Effect.succeed(wrapped) : Effect.as(restoring(restore, slots, success), wrapped)
                })
              )
          )
        )
      })
    ) as HttpApp.Default<E | SqlError, R | DbEngine<Name>>
  }

const withStream = <Body extends object>(body: Body, stream: Stream.Stream<Uint8Array, unknown>): Body =>
  Object.assign(Object.create(Object.getPrototypeOf(body)), body, { stream })

/** Hooks are the user's and may be interrupted; then it is rolled back. */
const restoring = (
  restore: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>,
  slots: ReadonlyArray<Slot>,
  success: boolean
): Effect.Effect<void, SqlError> =>
  success
    ? Effect.matchCauseEffect(restore(before(slots)), {
        onSuccess: () => endAll(slots, true),
        onFailure: (cause) => Effect.zipRight(endAll(slots, false), Effect.failCause(cause))
      })
    : endAll(slots, false)
