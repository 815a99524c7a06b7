/**
 * One session per HTTP request, for `@effect/platform`.
 *
 * @since 0.1.0
 * @module
 */
import * as HttpApp from "@effect/platform/HttpApp"
import * as HttpRouter from "@effect/platform/HttpRouter"
import * as HttpServerRequest from "@effect/platform/HttpServerRequest"
import * as HttpServerResponse from "@effect/platform/HttpServerResponse"
import type { SqlError } from "@effect/sql/SqlError"
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as FiberRef from "effect/FiberRef"
import { identity } from "effect/Function"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import type { NoInfer } from "effect/Types"
import * as Database from "./Database.js"
import { coreOf } from "./DbEngine.js"
import type { DbEngine, EngineService } from "./DbEngine.js"
import { DbEngine as DefaultEngine } from "./Default.js"
import type { SessionOptions } from "./DbSession.js"
import * as Ambient from "./internal/ambient.js"
import { engineFor } from "./internal/instead.js"
import { isToken, tokenOf } from "./internal/commitToken.js"
import type { EngineCore } from "./internal/engine.js"
import { goneFrom } from "./internal/execute.js"
import { endSlot, inSlot, makeSlot, runBefore } from "./internal/session.js"
import type { Slot } from "./internal/slot.js"

/**
 * @since 0.1.0
 * @category models
 */
export interface MiddlewareOptions<Name extends string = "default"> extends Omit<
  SessionOptions<NoInfer<Name> | "default">,
  "timeout"
> {
  /** Whether the response commits. Default: a status below 400. */
  readonly commits?: ((response: HttpServerResponse.HttpServerResponse) => boolean) | undefined
  /**
   * What becomes of the session when the body of the response is a stream. `"close"` ends it before the response
   * leaves, so that a body that uses it gets `SessionClosed`; `"keepOpen"` ends it with the body, which commits when
   * the body was sent in full. Default: `"close"`; one response opts in with `DbHttp.keepOpen(response)`.
   */
  readonly streams?: "close" | "keepOpen" | undefined
  /**
   * What a client has written its next requests read, also from a standby (`DbRegistry.readOnly`): a response of a
   * request that has written carries a cookie, which those bring along. Costs such a request one round trip. Default:
   * off.
   */
  readonly readYourWrites?: boolean | ReadYourWrites | undefined
  /** The databases (of `Database.make`) that get a session for the request. Default: the default one. */
  readonly databases?: ReadonlyArray<{ readonly name: Name }> | undefined
}

/**
 * The cookie that carries a commit token. It is neither secret nor signed: who forges one makes his own requests wait
 * for a standby, and then read from the primary.
 *
 * @since 0.1.0
 * @category models
 */
export interface ReadYourWrites {
  /** The name of the cookie; that of a database other than the default one has `-` and its name behind it. Default: `"db-after"`. */
  readonly cookie?: string | undefined
  /** For how long it is remembered: longer than a standby is ever behind. Default: 1 min. */
  readonly maxAge?: Duration.DurationInput | undefined
  /** Send it over TLS only. Default: false. */
  readonly secure?: boolean | undefined
}

// By the body: other combinators make another response around the same one. What was ambient where it was kept, for its
// tenant.
const kept = new WeakMap<object, Ambient.Ambient | undefined>()

/**
 * Keeps the request's session open until the streamed body of this response has been sent; then it commits, or rolls
 * back when the body failed or the client went away. A commit that fails then can't become a 5xx any more: it is
 * reported as the failure of the body. Called inside `DbSchema.withTenant` (or `withSchema`, `using`), the body runs in
 * that tenant.
 *
 * @since 0.1.0
 * @category combinators
 */
export const keepOpen = (response: HttpServerResponse.HttpServerResponse): HttpServerResponse.HttpServerResponse => {
  const { body } = response
  if (body._tag !== "Stream") return response
  // Its own, since one response may be given to the requests of several tenants.
  const own = withStream(body, body.stream)
  kept.set(own, Option.getOrUndefined(Option.map(Fiber.getCurrentFiber(), Ambient.current)))
  return HttpServerResponse.setBody(response, own)
}

const withStream = <Body extends object>(body: Body, stream: Stream.Stream<Uint8Array, unknown>): Body =>
  Object.assign(Object.create(Object.getPrototypeOf(body)), body, { stream })

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

type Restore = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>

/** Runs the hooks, which are the user's and may be interrupted, and ends the sessions: by success they commit. */
const finish = (slots: ReadonlyArray<Slot>, success: boolean, restore: Restore): Effect.Effect<void, SqlError> =>
  success
    ? Effect.matchCauseEffect(restore(before(slots)), {
        onSuccess: () => endAll(slots, true),
        onFailure: (cause) => Effect.zipRight(endAll(slots, false), Effect.failCause(cause))
      })
    : endAll(slots, false)

const withSlots = <A, E, R>(effect: Effect.Effect<A, E, R>, slots: ReadonlyArray<Slot>): Effect.Effect<A, E, R> =>
  slots.reduce((inner, slot) => Ambient.locally(inner, slot.engine, inSlot(slot)), effect)

/** Ends the sessions of a request, or sees to it that its streamed body does. Runs where they are ambient. */
const answer = (
  response: HttpServerResponse.HttpServerResponse,
  slots: ReadonlyArray<Slot>,
  success: boolean,
  streams: "close" | "keepOpen" | undefined,
  restore: Restore
): Effect.Effect<HttpServerResponse.HttpServerResponse, SqlError> => {
  const { body } = response
  if (body._tag !== "Stream") return Effect.as(finish(slots, success, restore), response)
  return Effect.contextWithEffect((context: Context.Context<never>) => {
    const request = Context.getOption(
      context,
      HttpServerRequest.HttpServerRequest as never
    ) as Option.Option<HttpServerRequest.HttpServerRequest>
    // What is ambient here, for a body that is sent later.
    const carrier = Ambient.carried(context, kept.get(body))
    const stream = Stream.provideSomeContext(body.stream, carrier)
    const withBody = (stream: Stream.Stream<Uint8Array, unknown>) =>
      HttpServerResponse.setBody(response, withStream(body, stream))
    // Nobody runs the body of an answer to HEAD.
    const runs = Option.isNone(request) || request.value.method !== "HEAD"
    if (!runs || !(streams === "keepOpen" || kept.has(body))) {
      return Effect.as(finish(slots, success, restore), withBody(stream))
    }
    const ending = Stream.ensuringWith(stream, (exit) =>
      Effect.orDie(finish(slots, success && Exit.isSuccess(exit), identity))
    )
    // And whoever replaces the response drops its body.
    const scope = Context.getOption(context, Scope.Scope as never) as Option.Option<Scope.Scope>
    return Effect.as(
      Option.isNone(scope) ? Effect.void : Scope.addFinalizer(scope.value, Effect.ignore(endAll(slots, false))),
      withBody(ending)
    )
  })
}

/** What the client gets: a web handler sends a response of the web as it is. */
const statusOf = ({ body, status }: HttpServerResponse.HttpServerResponse): number =>
  body._tag === "Raw" && body.body instanceof Response ? body.body.status : status

/** What becomes of an app's errors: one whose errors are all the server's business stays so, as `HttpApiBuilder` asks. */
type Failure<E> = [E] extends [never] ? never : E | SqlError

/**
 * A server runs what is no route uninterruptibly, also when the client has gone away. Here it is interrupted, unless it
 * has come to a route that asks not to be. A daemon, because children get every interruption of their parent's.
 */
const leavable: Restore = (app) =>
  Effect.flatMap(Effect.forkDaemon(Effect.interruptible(app)), (fiber) =>
    Effect.flatMap(Effect.exit(Effect.interruptible(Fiber.join(fiber))), (exit) => {
      if (Exit.isSuccess(exit) || !Cause.isInterrupted(exit.cause)) return exit
      const route = Context.getOption(fiber.getFiberRef(FiberRef.currentContext), HttpRouter.RouteContext as never)
      return Option.exists(route as Option.Option<HttpRouter.RouteContext>, (_) => _.route.uninterruptible)
        ? Fiber.join(fiber)
        : Effect.zipRight(Fiber.interrupt(fiber), exit)
    })
  )

/** The cookie of a database, and what stands in it. A slash may not stand in a cookie everywhere. */
const cookieOf = (name: string, options: ReadYourWrites): string =>
  `${options.cookie ?? "db-after"}${name === "default" ? "" : `-${name}`}`

const afterOf = (core: EngineCore, options: ReadYourWrites): Effect.Effect<string | undefined> =>
  Effect.map(Effect.serviceOption(HttpServerRequest.HttpServerRequest), (request) => {
    const text = Option.isSome(request) ? request.value.cookies[cookieOf(core.name, options)] : undefined
    const token = text?.replace("-", "/")
    return token !== undefined && isToken(token) ? token : undefined
  })

/** What the request has brought along is ambient for whoever reads from a standby. */
const afterwards = <A, E, R>(app: Effect.Effect<A, E, R>, slots: ReadonlyArray<Slot>, options: ReadYourWrites) =>
  slots.reduce<Effect.Effect<A, E, R>>(
    (app, { engine }) =>
      Effect.flatMap(afterOf(engine, options), (after) =>
        after === undefined ? app : Ambient.locally(app, engine, (entry) => ({ ...entry, after }))
      ),
    app
  )

/** A GET or HEAD has written what is seen to write; of the others each statement may have. */
const isSafe = Effect.map(Effect.serviceOption(HttpServerRequest.HttpServerRequest), (request) =>
  Option.exists(request, ({ method }) => method === "GET" || method === "HEAD")
)

/** Adds the cookies of what a request has committed. What was committed stays so, whether or not they can be had. */
const withTokens = (
  response: HttpServerResponse.HttpServerResponse,
  slots: ReadonlyArray<Slot>,
  options: ReadYourWrites
): Effect.Effect<HttpServerResponse.HttpServerResponse> =>
  Effect.flatMap(isSafe, (safe) =>
    Effect.reduce(slots, response, (response, { engine, writes }) =>
      Effect.match(
        Effect.interruptible(Effect.timeout(tokenOf(engine, writes, undefined, !safe), engine.config.settleMillis)),
        {
          onFailure: () => response,
          onSuccess: (token) =>
            Option.isNone(token)
              ? response
              : HttpServerResponse.unsafeSetCookie(
                  response,
                  cookieOf(engine.name, options),
                  token.value.replace("/", "-"),
                  {
                    path: "/",
                    httpOnly: true,
                    sameSite: "lax",
                    secure: options.secure === true,
                    maxAge: options.maxAge ?? "1 minute"
                  }
                )
        }
      )
    )
  )

/** The hook is one for all databases of the request: it knows each by its name. */
const withWords = <Options extends MiddlewareOptions<any>>(
  options: Options,
  services: ReadonlyArray<EngineService>
): Options =>
  options.beforeCommit === undefined
    ? options
    : {
        ...options,
        beforeCommit: services
          .filter((_) => _.name !== "default")
          .reduce(
            (hook, service) => Effect.provide(hook, Database.contextOf(Database.make(service.name), service)),
            options.beforeCommit
          )
      }

type Engines<Name extends string> = { [One in Name]: DbEngine<One> }[Name]

/**
 * Gives every request a lazy session. A response with a status below 400 commits; 400 and above, a failure, a defect
 * and a client that goes away roll back. The commit happens before the response leaves, so that a failed commit is a
 * 5xx. A handler that uses no database borrows nothing, and a request that has a session already is left alone. Where a
 * session was and has ended, in a fiber that has outlived it, it fails with `SessionClosed`.
 *
 * Around a route, a router, an app, or as the middleware of `HttpServer.serve` and `HttpApiBuilder.serve`. In the last
 * two the server has made a response of a failure before, and says no more than its status: an error that has a response
 * below 400 of its own, such as a redirect, commits. Around the router it rolls back.
 *
 * ```ts
 * const router = HttpRouter.empty.pipe(
 *   HttpRouter.post("/users", Effect.as(register("ada"), HttpServerResponse.empty({ status: 201 })))
 * )
 * const server = HttpServer.serve(router, DbHttp.middleware())
 * ```
 *
 * @since 0.1.0
 * @category middleware
 */
export const middleware =
  <Name extends string = "default">(options: MiddlewareOptions<Name> = {}) =>
  <E, R>(app: HttpApp.Default<E, R>): HttpApp.Default<Failure<E>, R | Engines<Name>> => {
    type App = Effect.Effect<HttpServerResponse.HttpServerResponse, E | SqlError, any>
    const tags = options.databases?.map((_) => Database.make(_.name).DbEngine) ?? [DefaultEngine]
    const commits = options.commits ?? ((response) => statusOf(response) < 400)
    const { readYourWrites } = options
    const tokens = readYourWrites === true ? {} : readYourWrites === false ? undefined : readYourWrites
    const around = (slots: ReadonlyArray<Slot>, restore: Restore): App => {
      let answered = false
      const once = (response: HttpServerResponse.HttpServerResponse) =>
        Effect.uninterruptibleMask((restore) => {
          if (answered) return Effect.succeed(response)
          answered = true
          const settled = Effect.suspend(() => answer(response, slots, commits(response), options.streams, restore))
          const ended = tokens === undefined ? settled : Effect.flatMap(settled, (_) => withTokens(_, slots, tokens))
          return Effect.onError(ended, () => Effect.ignore(endAll(slots, false)))
        })
      // As a server's middleware the app sends the response as well: the handler comes in between. Around a route it
      // is called when all is over.
      const handler = HttpApp.appendPreResponseHandler(
        (_, response) => once(response) as Effect.Effect<typeof response>
      )
      const whole = withSlots(restore(Effect.flatMap(Effect.zipRight(handler, app), once)), slots)
      return Effect.flatMap(Effect.exit(whole), (exit) => {
        if (answered) return exit
        answered = true
        return Effect.zipRight(Effect.exit(endAll(slots, false)), exit)
      })
    }
    return Effect.flatMap(Effect.all(tags as ReadonlyArray<typeof DefaultEngine>), (services) =>
      Effect.withFiberRuntime<HttpServerResponse.HttpServerResponse, E | SqlError, any>((fiber) => {
        const cores = services.map((service) => engineFor(fiber, coreOf(service)))
        const fresh: Array<EngineCore> = []
        for (const core of new Set(cores)) {
          const { frame, slot } = Ambient.entry(fiber, core)
          const gone = slot === undefined ? undefined : goneFrom(slot, frame)
          if (gone !== undefined) return Effect.fail(gone)
          if (slot === undefined) fresh.push(core)
        }
        if (fresh.length === 0) return app as App
        const given = withWords(options, services)
        const routed = fiber.currentContext.unsafeMap.has(HttpRouter.RouteContext.key)
        return Effect.uninterruptibleMask((restore) =>
          Effect.flatMap(
            Effect.forEach(fresh, (core) => makeSlot(core, Ambient.entry(fiber, core), given, false)),
            (slots) => {
              const app = around(slots, routed ? restore : leavable)
              return tokens === undefined ? app : afterwards(app, slots, tokens)
            }
          )
        )
      })
    ) as HttpApp.Default<Failure<E>, R | Engines<Name>>
  }
