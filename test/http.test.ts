import {
  HttpApi,
  HttpApiBuilder,
  HttpApiEndpoint,
  HttpApiGroup,
  HttpApp,
  HttpRouter,
  HttpServer,
  HttpServerRequest,
  HttpServerRespondable,
  HttpServerResponse
} from "@effect/platform"
import type { SqlError } from "@effect/sql/SqlError"
import { describe, it } from "@effect/vitest"
import type { Context } from "effect"
import { Data, Deferred, Effect, Fiber, Layer, Option, Schema, type Scope, Stream } from "effect"
import { Database, DbConnection, DbEngine, DbError, DbHttp, DbSchema, DbSession, withTransaction } from "effect-db"
import { request as httpRequest } from "node:http"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import {
  committed,
  expectAtRest,
  insert,
  onDatabase,
  pid,
  programsOn,
  proxiedOn,
  quietly,
  reason,
  refused,
  seen,
  type Services,
  used
} from "./support/programs.js"
import { barrier, until } from "./support/until.js"
import { listening } from "./support/served.js"

const database = testDatabase()
const other = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)
const rows = committed(database)

type Options = DbHttp.MiddlewareOptions
type App<E, R> = HttpApp.Default<E, R | Services | Scope.Scope>

type Serving = Layer.Layer<never, never, HttpServer.HttpServer | Services>

/** Where the middleware can stand. */
const places: ReadonlyArray<
  readonly [name: string, serve: <E, R>(router: HttpRouter.HttpRouter<E, R>, options?: Options) => Serving]
> = [
  [
    "HttpRouter.use",
    (router, options) => HttpServer.serve(router.pipe(HttpRouter.use(DbHttp.middleware(options)))) as never
  ],
  ["HttpServer.serve", (router, options) => HttpServer.serve(router, DbHttp.middleware(options)) as never],
  [
    "around the app",
    (router, options) =>
      HttpServer.serve(
        router.pipe(
          Effect.map((_) => _),
          DbHttp.middleware(options)
        )
      ) as never
  ]
]

const get = <E, R>(path: `/${string}`, handler: App<E, R>) => HttpRouter.empty.pipe(HttpRouter.get(path, handler))

interface Answer {
  readonly status: number
  readonly text: string
}

const fetching = (url: string, init: RequestInit = {}): Effect.Effect<Answer> =>
  Effect.promise(async (signal) => {
    const response = await fetch(url, { redirect: "manual", signal, ...init })
    return { status: response.status, text: await response.text() }
  })

const status = (url: string) => Effect.map(fetching(url), (_) => _.status)

const empty = (status: number) => HttpServerResponse.empty({ status })

const encoder = new TextEncoder()

/** A text for the body, when its turn comes. */
const chunk = <E>(text: Effect.Effect<string, E>): Stream.Stream<Uint8Array, E> =>
  Stream.fromEffect(Effect.map(text, (_) => encoder.encode(_)))

/** A request whose client can go away. */
const leaving = (url: string) =>
  Effect.acquireRelease(
    Effect.sync(() => {
      const request = httpRequest(url)
      request.on("error", () => {})
      request.end()
      return request
    }),
    (request) => Effect.sync(() => request.destroy())
  )

/** A constraint that is checked at COMMIT and fails there. */
const doomed: Effect.Effect<void, SqlError, DbSession> = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.asVoid(sql`INSERT INTO late (id) VALUES (4711)`)
)
const withLate = Effect.zipRight(
  database.query("DROP TABLE IF EXISTS late; CREATE TABLE late (id int REFERENCES t DEFERRABLE INITIALLY DEFERRED)"),
  Effect.succeed(undefined)
)

for (const [place, serve] of places) {
  describe(`47 ${place}`, () => {
    for (const code of [200, 201, 304, 307, 399]) {
      test(`${code} commits`, () =>
        Effect.gen(function* () {
          const url = yield* listening(serve(get("/", Effect.as(insert(1), empty(code)))))
          expect(yield* status(url)).toBe(code)
          expect(yield* rows).toEqual([1])
          expect(yield* used).toBe(0)
        }))
    }

    for (const code of [400, 404, 500, 503]) {
      test(`${code} rolls back`, () =>
        Effect.gen(function* () {
          const url = yield* listening(serve(get("/", Effect.as(insert(1), empty(code)))))
          expect(yield* status(url)).toBe(code)
          expect(yield* rows).toEqual([])
          expect(yield* used).toBe(0)
        }))
    }

    test("a handler that fails rolls back", () =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", Effect.zipRight(insert(1), Effect.fail("no")))))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      }))

    test("a handler that dies rolls back", () =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", Effect.zipRight(insert(1), Effect.die("oops")))))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      }))

    test("a statement that fails, unhandled, is a 500 and rolls back", () =>
      Effect.gen(function* () {
        const handler = Effect.as(Effect.zipRight(insert(1), refused), empty(200))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      }))

    test("an explicit early commit survives a 500, and what came after it does not", () =>
      Effect.gen(function* () {
        const handler = Effect.as(Effect.all([insert(1), DbSession.commit, insert(2)]), empty(500))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([1])
      }))

    test("`commits` decides instead of the status", () =>
      Effect.gen(function* () {
        const handler = Effect.flatMap(HttpServerRequest.HttpServerRequest, ({ url }) =>
          Effect.as(insert(url === "/?keep" ? 1 : 2), empty(url === "/?keep" ? 500 : 200))
        )
        const url = yield* listening(serve(get("/", handler), { commits: (response) => response.status === 500 }))
        expect(yield* status(`${url}/?keep`)).toBe(500)
        expect(yield* status(`${url}/`)).toBe(200)
        expect(yield* rows).toEqual([1])
      }))

    test("`commits` that throws is a 500, and nothing is kept or leaked", () =>
      Effect.gen(function* () {
        const commits = () => {
          throw new Error("no")
        }
        const url = yield* listening(serve(get("/", Effect.as(insert(1), empty(200))), { commits }))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
        expect(yield* used).toBe(0)
      }))

    test("each request has a session of its own, and all statements of one run in it", () =>
      Effect.gen(function* () {
        const inside = yield* barrier(2)
        const handler = Effect.gen(function* () {
          const one = yield* pid
          yield* inside
          const two = yield* Effect.suspend(() => pid)
          return HttpServerResponse.text(`${one} ${two}`)
        })
        const url = yield* listening(serve(get("/", handler)))
        const [a, b] = yield* Effect.all([fetching(url), fetching(url)], { concurrency: 2 })
        for (const { text } of [a, b]) expect(text.split(" ")[0]).toBe(text.split(" ")[1])
        expect(a.text).not.toBe(b.text)
      }))

    test("the session has the middleware's options", () =>
      Effect.gen(function* () {
        const handler = Effect.flatMap(DbSession, ({ sql }) =>
          Effect.map(
            sql<{
              mode: string
            }>`SELECT current_setting('transaction_isolation') || current_setting('app.user') AS mode`,
            ([row]) => HttpServerResponse.text(row!.mode)
          )
        )
        const options: Options = { isolation: "serializable", settings: { "app.user": "ada" } }
        const url = yield* listening(serve(get("/", handler), options))
        expect((yield* fetching(url)).text).toBe("serializableada")
      }))
  })

  describe(`48 ${place}`, () => {
    test("a commit that fails is a 5xx, and nothing is kept", () =>
      Effect.gen(function* () {
        yield* withLate
        const url = yield* listening(serve(get("/", Effect.as(Effect.zipRight(insert(1), doomed), empty(200)))))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
        expect(yield* used).toBe(0)
      }))

    test("a statement error that the handler swallowed is a 5xx, and nothing is kept", () =>
      Effect.gen(function* () {
        const handler = Effect.as(Effect.zipRight(insert(1), Effect.ignore(refused)), empty(200))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      }))

    test("a beforeCommit that fails is a 5xx, and nothing is kept", () =>
      Effect.gen(function* () {
        const beforeCommit = DbError.make("CheckViolation", { message: "no", hint: "no" })
        const url = yield* listening(
          serve(get("/", Effect.as(insert(1), empty(200))), { beforeCommit: Effect.fail(beforeCommit) })
        )
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
        expect(yield* used).toBe(0)
      }))

    test("a beforeCommit that dies is a 5xx, and nothing is kept", () =>
      Effect.gen(function* () {
        const handler = Effect.as(Effect.zipRight(insert(1), DbSession.beforeCommit(Effect.die("no"))), empty(200))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      }))

    test("beforeCommit runs inside, once, and not for a response that rolls back", () =>
      Effect.gen(function* () {
        let runs = 0
        const handler = Effect.flatMap(HttpServerRequest.HttpServerRequest, ({ url }) =>
          Effect.as(
            Effect.zipRight(
              insert(1),
              DbSession.beforeCommit(
                Effect.zipRight(
                  insert(2),
                  Effect.sync(() => ++runs)
                )
              )
            ),
            empty(url === "/?no" ? 500 : 200)
          )
        )
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(`${url}/?no`)).toBe(500)
        expect(runs).toBe(0)
        expect(yield* status(`${url}/`)).toBe(200)
        expect(runs).toBe(1)
        expect(yield* rows).toEqual([1, 2])
      }))

    test("afterCommit has run, and sees the committed row, when the response arrives", () =>
      Effect.gen(function* () {
        const after: Array<unknown> = []
        const hook = Effect.zipRight(
          Effect.map(used, (_) => after.push(_)),
          Effect.map(seen, (_) => after.push(_))
        )
        const handler = Effect.as(Effect.zipRight(insert(1), DbSession.afterCommit(hook)), empty(200))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(200)
        expect(after).toEqual([0, [1]])
      }))

    proxied("the response does not leave before the commit is answered", (proxy) =>
      Effect.gen(function* () {
        const router = HttpRouter.empty.pipe(
          HttpRouter.get("/write", Effect.as(insert(1), empty(200))),
          HttpRouter.get("/free", HttpServerResponse.text("free"))
        )
        const url = yield* listening(serve(router))
        const held = proxy.holdAt(({ text, type }) => type === "E" && text === "COMMIT", { forward: false })
        let arrived = false
        const writing = yield* Effect.fork(
          Effect.tap(status(`${url}/write`), () => {
            arrived = true
          })
        )
        yield* Effect.promise(() => held)
        // Others come through meanwhile.
        for (let i = 0; i < 3; i++) expect((yield* fetching(`${url}/free`)).text).toBe("free")
        expect(arrived).toBe(false)
        expect(yield* rows).toEqual([])
        proxy.resume()
        expect(yield* Fiber.join(writing)).toBe(200)
        expect(yield* rows).toEqual([1])
      })
    )

    proxied("a connection that is lost during COMMIT is a 5xx", (proxy) =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", Effect.as(insert(1), empty(200)))))
        void proxy.cutAfter(({ text, type }) => type === "E" && text === "COMMIT", { forward: false })
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      })
    )

    test("what the handler adds to the response on its way out is not lost", () =>
      Effect.gen(function* () {
        const handler = Effect.as(
          Effect.zipRight(
            insert(1),
            HttpApp.appendPreResponseHandler((_, response) =>
              Effect.succeed(HttpServerResponse.setHeader(response, "x-late", "yes"))
            )
          ),
          empty(200)
        )
        const url = yield* listening(serve(get("/", handler)))
        const header = yield* Effect.promise(async () => (await fetch(url)).headers.get("x-late"))
        expect(header).toBe("yes")
        expect(yield* rows).toEqual([1])
      }))
  })

  describe(`49 ${place}`, () => {
    test("a client that goes away rolls back, and nothing is leaked", () =>
      Effect.gen(function* () {
        const inside = yield* Deferred.make<void>()
        const ended = yield* Deferred.make<void>()
        const handler = Effect.onInterrupt(
          Effect.zipRight(Effect.zipRight(insert(1), Deferred.succeed(inside, undefined)), Effect.never),
          () => Deferred.succeed(ended, undefined)
        )
        const url = yield* listening(serve(get("/", handler)))
        const request = yield* leaving(url)
        yield* Deferred.await(inside)
        expect(yield* used).toBe(1)
        request.destroy()
        yield* Deferred.await(ended)
        yield* expectAtRest(database)
        expect(yield* rows).toEqual([])
      }))

    test("a client that goes away while a hook before the commit runs ends the hook, and rolls back", () =>
      Effect.gen(function* () {
        const inside = yield* Deferred.make<void>()
        const hook = DbSession.beforeCommit(Effect.zipRight(Deferred.succeed(inside, undefined), Effect.never))
        const url = yield* listening(serve(get("/", Effect.as(Effect.zipRight(insert(1), hook), empty(200)))))
        const request = yield* leaving(url)
        yield* Deferred.await(inside)
        request.destroy()
        yield* expectAtRest(database)
        expect(yield* rows).toEqual([])
      }))

    proxied("a client that goes away in mid-statement ends the statement on the server", (proxy) =>
      Effect.gen(function* () {
        const handler = Effect.flatMap(DbSession, ({ sql }) =>
          Effect.as(Effect.zipRight(insert(1), sql`SELECT pg_sleep(${60})`), empty(200))
        )
        const url = yield* listening(serve(get("/", handler)))
        const sleeping = proxy.seen(({ text, type }) => type === "E" && text.includes("pg_sleep"))
        const request = yield* leaving(url)
        yield* Effect.promise(() => sleeping)
        request.destroy()
        yield* expectAtRest(database)
        expect(yield* rows).toEqual([])
      })
    )

    proxied("once COMMIT is on its way it is finished, though the client has gone away", (proxy) =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", Effect.as(insert(1), empty(200)))))
        const held = proxy.holdAt(({ text, type }) => type === "E" && text === "COMMIT", { forward: false })
        const request = yield* leaving(url)
        yield* Effect.promise(() => held)
        request.destroy()
        proxy.resume()
        yield* expectAtRest(database)
        expect(yield* rows).toEqual([1])
      })
    )
  })

  describe(`50 ${place}`, () => {
    const streamed = (options?: Parameters<typeof HttpServerResponse.stream>[1]) =>
      Effect.map(DbSession, ({ sql }) =>
        HttpServerResponse.stream(
          chunk(
            Effect.match(sql`INSERT INTO t (id) VALUES (2)`, {
              onFailure: (error) => DbError.reason(error)?._tag ?? String(error),
              onSuccess: () => "written"
            })
          ),
          options
        )
      )

    test("a streamed body that uses the session gets SessionClosed, and what the handler did is committed", () =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", Effect.zipRight(insert(1), streamed()))))
        expect(yield* fetching(url)).toEqual({ status: 200, text: "SessionClosed" })
        expect(yield* rows).toEqual([1])
        expect(yield* used).toBe(0)
      }))

    test("so does one that brings along the handler's context", () =>
      Effect.gen(function* () {
        const handler = Effect.map(Effect.context<DbSession>(), (context) =>
          HttpServerResponse.stream(Stream.provideContext(chunk(reason(insert(2)) as never), context))
        )
        const url = yield* listening(serve(get("/", Effect.zipRight(insert(1), handler))))
        expect((yield* fetching(url)).text).toBe("SessionClosed")
        expect(yield* rows).toEqual([1])
      }))

    for (const [how, opt, options] of [
      ["DbHttp.keepOpen", DbHttp.keepOpen, undefined],
      ['streams: "keepOpen"', (_: HttpServerResponse.HttpServerResponse) => _, { streams: "keepOpen" }]
    ] as const) {
      test(`${how}: the body runs in the session, which commits at its end`, () =>
        Effect.gen(function* () {
          const gate = yield* Deferred.make<void>()
          const sent = yield* Deferred.make<void>()
          const handler = Effect.gen(function* () {
            const { sql } = yield* DbSession
            yield* insert(1)
            const body = Stream.concat(
              chunk(Effect.as(sql`INSERT INTO t (id) VALUES (2)`, "a")),
              chunk(
                Effect.as(
                  Effect.zipRight(Deferred.succeed(sent, undefined), Deferred.await(gate)).pipe(
                    Effect.zipRight(sql`INSERT INTO t (id) VALUES (3)`)
                  ),
                  "b"
                )
              )
            )
            return opt(HttpServerResponse.stream(body))
          })
          const url = yield* listening(serve(get("/", handler), options))
          const fiber = yield* Effect.fork(fetching(url))
          yield* Deferred.await(sent)
          expect(yield* rows).toEqual([])
          expect(yield* used).toBe(1)
          yield* Deferred.succeed(gate, undefined)
          expect(yield* Fiber.join(fiber)).toEqual({ status: 200, text: "ab" })
          expect(yield* rows).toEqual([1, 2, 3])
          expect(yield* used).toBe(0)
        }))

      test(`${how}: a client that goes away rolls back`, () =>
        Effect.gen(function* () {
          const sent = yield* Deferred.make<void>()
          const handler = Effect.gen(function* () {
            const { sql } = yield* DbSession
            yield* insert(1)
            const body = Stream.concat(
              chunk(Effect.as(sql`INSERT INTO t (id) VALUES (2)`, "a")),
              Stream.fromEffect(Effect.zipRight(Deferred.succeed(sent, undefined), Effect.never))
            )
            return opt(HttpServerResponse.stream(body))
          })
          const url = yield* listening(serve(get("/", handler), options))
          const request = yield* leaving(url)
          yield* Deferred.await(sent)
          request.destroy()
          yield* until(
            "the connection back",
            Effect.map(used, (_) => _ === 0)
          )
          expect(yield* rows).toEqual([])
        }))

      test(`${how}: a body that fails rolls back`, () =>
        Effect.gen(function* () {
          const handler = Effect.map(insert(1), () =>
            opt(HttpServerResponse.stream(Stream.concat(chunk(Effect.succeed("a")), Stream.fail("no"))))
          )
          const url = yield* listening(serve(get("/", handler), options))
          expect((yield* fetching(url)).text).toBe("a")
          yield* until(
            "the connection back",
            Effect.map(used, (_) => _ === 0)
          )
          expect(yield* rows).toEqual([])
        }))

      test(`${how}: a status of 400 and above rolls back at the end of the body`, () =>
        Effect.gen(function* () {
          const handler = Effect.map(insert(1), () =>
            opt(HttpServerResponse.stream(chunk(Effect.succeed("a")), { status: 422 }))
          )
          const url = yield* listening(serve(get("/", handler), options))
          expect(yield* fetching(url)).toEqual({ status: 422, text: "a" })
          expect(yield* rows).toEqual([])
          expect(yield* used).toBe(0)
        }))

      test(`${how}: the answer to HEAD has no body, and the session is ended all the same`, () =>
        Effect.gen(function* () {
          const handler = Effect.zipRight(insert(1), Effect.map(streamed(), opt))
          const url = yield* listening(serve(get("/", handler), options))
          expect(yield* fetching(url, { method: "HEAD" })).toEqual({ status: 200, text: "" })
          expect(yield* used).toBe(0)
          expect(yield* rows).toEqual([1])
        }))

      test(`${how}: a commit that fails at the end of the body keeps nothing and leaks nothing`, () =>
        Effect.gen(function* () {
          yield* withLate
          const handler = Effect.gen(function* () {
            yield* insert(1)
            yield* doomed
            return opt(HttpServerResponse.stream(chunk(Effect.succeed("a"))))
          })
          const url = yield* listening(serve(get("/", handler), options))
          yield* fetching(url)
          expect(yield* used).toBe(0)
          expect(yield* rows).toEqual([])
        }))
    }

    test("the opt-in outlives what is changed in the response afterwards", () =>
      Effect.gen(function* () {
        const handler = Effect.map(streamed(), (response) =>
          HttpServerResponse.setHeader(DbHttp.keepOpen(response), "x-more", "yes")
        )
        const url = yield* listening(serve(get("/", handler)))
        expect((yield* fetching(url)).text).toBe("written")
        expect(yield* rows).toEqual([2])
      }))

    test("the stream keeps its content type and length", () =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", streamed({ contentType: "text/csv", contentLength: 13 }))))
        const headers = yield* Effect.promise(async () => {
          const response = await fetch(url)
          await response.text()
          return [response.headers.get("content-type"), response.headers.get("content-length")]
        })
        expect(headers).toEqual(["text/csv", "13"])
      }))

    test("rows that are streamed from a cursor come out in full with the opt-in", () =>
      Effect.gen(function* () {
        const handler = Effect.map(DbSession, ({ sql }) =>
          DbHttp.keepOpen(
            HttpServerResponse.stream(
              Stream.map(sql<{ n: number }>`SELECT generate_series(1, 2000) AS n`.stream, ({ n }) =>
                encoder.encode(`${n} `)
              )
            )
          )
        )
        const url = yield* listening(serve(get("/", handler)))
        expect((yield* fetching(url)).text.split(" ").length).toBe(2001)
        expect(yield* used).toBe(0)
      }))

    test("the body runs in the tenant in which keepOpen was called, also one response for all", () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const shared = HttpServerResponse.stream(
          chunk(Effect.map(sql<{ path: string }>`SELECT current_setting('search_path') AS path`, ([row]) => row!.path))
        )
        const both = yield* barrier(2)
        const handler = (tenant: string) =>
          Effect.gen(function* () {
            const response = DbHttp.keepOpen(shared)
            // Both have it in hand before either is sent.
            yield* both
            return response
          }).pipe(DbSchema.withTenant(tenant))
        const router = HttpRouter.empty.pipe(
          HttpRouter.get("/a", handler("a")),
          HttpRouter.get("/b", handler("b")),
          HttpRouter.get("/none", Effect.succeed(DbHttp.keepOpen(shared)))
        )
        const url = yield* listening(serve(router))
        const answers = yield* Effect.all([fetching(`${url}/a`), fetching(`${url}/b`)], { concurrency: "unbounded" })
        expect(answers.map(({ text }) => text)).toEqual(['"a"', '"b"'])
        expect((yield* fetching(`${url}/none`)).text).toBe('"$user", public')
        expect(yield* used).toBe(0)
      }))

    test("a tenant around the middleware is that of a body, wherever its response was made", () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const response = DbHttp.keepOpen(
          HttpServerResponse.stream(
            chunk(
              Effect.map(sql<{ path: string }>`SELECT current_setting('search_path') AS path`, ([row]) => row!.path)
            )
          )
        )
        const app = DbSchema.withTenant(DbHttp.middleware()(Effect.succeed(response)), "outer")
        const url = yield* listening(HttpServer.serve(app) as Serving)
        expect((yield* fetching(url)).text).toBe('"outer"')
      }))

    test("a daemon that uses the session after the response gets SessionClosed", () =>
      Effect.gen(function* () {
        const gate = yield* Deferred.make<void>()
        const late = yield* Deferred.make<string>()
        const daemon = Effect.flatMap(Effect.zipRight(Deferred.await(gate), reason(insert(2))), (tag) =>
          Deferred.succeed(late, tag)
        )
        const handler = Effect.as(Effect.zipRight(insert(1), Effect.forkDaemon(Effect.ignore(daemon))), empty(200))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(200)
        yield* Deferred.succeed(gate, undefined)
        expect(yield* Deferred.await(late)).toBe("SessionClosed")
        expect(yield* rows).toEqual([1])
      }))

    test("a detached daemon works after the response", () =>
      Effect.gen(function* () {
        const gate = yield* Deferred.make<void>()
        const done = yield* Deferred.make<void>()
        const daemon = Effect.zipRight(
          DbSession.detach(Effect.zipRight(Deferred.await(gate), insert(2))),
          Deferred.succeed(done, undefined)
        )
        const handler = Effect.as(Effect.zipRight(insert(1), Effect.forkDaemon(daemon)), empty(200))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(200)
        yield* Deferred.succeed(gate, undefined)
        yield* Deferred.await(done)
        expect(yield* rows).toEqual([1, 2])
      }))
  })

  describe(`51 ${place}`, () => {
    proxied("a handler without database opens no connection", (proxy) =>
      Effect.gen(function* () {
        const handler = Effect.zipRight(DbSession.current, Effect.succeed(empty(200)))
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(200)
        expect((yield* DbEngine.stats).total).toBe(0)
        expect(proxy.accepted).toBe(0)
      })
    )

    test("an already open session is left alone", () =>
      Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.scoped(
            Effect.gen(function* () {
              yield* insert(1)
              const url = yield* listening(serve(get("/", Effect.as(insert(2), empty(500)))))
              expect(yield* status(url)).toBe(500)
              expect(yield* rows).toEqual([])
              expect(yield* seen).toEqual([1, 2])
            })
          )
        )
        expect(yield* rows).toEqual([1, 2])
      }))

    test("of two middlewares the outer one decides", () =>
      Effect.gen(function* () {
        const router = get("/", Effect.as(insert(1), empty(500)))
        const url = yield* listening(serve(router.pipe(HttpRouter.use(DbHttp.middleware({ commits: () => true })))))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
      }))
  })
}

describe("an app that is no router", () => {
  for (const [name, serve] of [
    ["with the server's middleware", (app: App<never, never>) => HttpServer.serve(app, DbHttp.middleware())],
    ["with the middleware around it", (app: App<never, never>) => HttpServer.serve(DbHttp.middleware()(app))]
  ] as const) {
    test(`${name}: a client that goes away interrupts it and rolls back`, () =>
      Effect.gen(function* () {
        const inside = yield* Deferred.make<void>()
        const app = Effect.zipRight(
          Effect.zipRight(Effect.orDie(insert(1)), Deferred.succeed(inside, undefined)),
          Effect.never
        )
        const url = yield* listening(serve(app))
        const request = yield* leaving(url)
        yield* Deferred.await(inside)
        request.destroy()
        yield* until(
          "the connection back",
          Effect.map(used, (_) => _ === 0)
        )
        expect(yield* rows).toEqual([])
      }))
  }
})

describe("a route that asks not to be interrupted", () => {
  for (const [place, serve] of places) {
    test(`${place}: is finished, and committed, when the client goes away`, () =>
      Effect.gen(function* () {
        const inside = yield* Deferred.make<void>()
        const gate = yield* Deferred.make<void>()
        const handler = Effect.all([insert(1), Deferred.succeed(inside, undefined), Deferred.await(gate), insert(2)])
        const router = HttpRouter.empty.pipe(
          HttpRouter.get("/", Effect.as(handler, empty(200)), { uninterruptible: true })
        )
        const url = yield* listening(serve(router))
        const request = yield* leaving(url)
        yield* Deferred.await(inside)
        const gone = new Promise((resolve) => request.once("close", resolve))
        request.destroy()
        yield* Effect.promise(() => gone)
        yield* Deferred.succeed(gate, undefined)
        yield* until(
          "the connection back",
          Effect.map(used, (_) => _ === 0)
        )
        expect(yield* rows).toEqual([1, 2])
      }))
  }
})

describe("a response that somebody replaces", () => {
  test("a kept session whose body is never sent ends with the request, rolled back", () =>
    Effect.gen(function* () {
      const handler = Effect.map(insert(1), () =>
        DbHttp.keepOpen(HttpServerResponse.stream(chunk(Effect.succeed("never"))))
      )
      const router = get("/", handler).pipe(
        HttpRouter.use(DbHttp.middleware()),
        HttpRouter.use((app) => Effect.as(app, HttpServerResponse.text("other")))
      )
      const url = yield* listening(HttpServer.serve(router))
      expect((yield* fetching(url)).text).toBe("other")
      yield* until(
        "the connection back",
        Effect.map(used, (_) => _ === 0)
      )
      expect(yield* rows).toEqual([])
    }))
})

describe("an open connection", () => {
  test("the session of a request runs on it", () =>
    Effect.gen(function* () {
      const app = get(
        "/",
        Effect.map(Effect.all([pid, used]), (_) => HttpServerResponse.text(_.join(" ")))
      )
      const url = yield* listening(
        HttpServer.serve(DbConnection.withConnection(DbHttp.middleware()(app), { reuse: false }))
      )
      expect((yield* fetching(url)).text).toMatch(/ 1$/)
    }))
})

describe("what a request has committed, when its commit token can't be had", () => {
  for (const [how, strike] of [
    ["the connection is lost", "cutAfter"],
    ["the server says nothing any more", "holdAt"]
  ] as const) {
    proxied(
      `${how}: the response leaves without the cookie`,
      (proxy) =>
        Effect.gen(function* () {
          const app = get("/", Effect.as(insert(1), empty(201)))
          const url = yield* listening(HttpServer.serve(app, DbHttp.middleware({ readYourWrites: true })) as Serving)
          const struck = proxy[strike](({ text }) => text.includes("pg_current_wal"), { forward: false })
          const response = yield* Effect.promise(() => fetch(url))
          yield* Effect.promise(() => struck)
          expect([response.status, response.headers.getSetCookie()]).toEqual([201, []])
          expect(yield* rows).toEqual([1])
          proxy.resume()
        }),
      { settleTimeout: 200 }
    )
  }
})

class Taken extends Schema.TaggedError<Taken>()("Taken", { id: Schema.Number }) {}

const users = HttpApiGroup.make("users")
  .add(
    HttpApiEndpoint.post("add", "/add")
      .setPayload(Schema.Struct({ id: Schema.Number }))
      .addSuccess(Schema.Number, { status: 201 })
  )
  .add(HttpApiEndpoint.get("taken", "/taken").addSuccess(Schema.Void).addError(Taken, { status: 409 }))
  .add(HttpApiEndpoint.get("dies", "/dies").addSuccess(Schema.Void))
  .add(HttpApiEndpoint.get("late", "/late").addSuccess(Schema.Void))
  .add(HttpApiEndpoint.get("free", "/free").addSuccess(Schema.Number))
const api = HttpApi.make("api").add(users)

const Users = HttpApiBuilder.group(api, "users", (handlers) =>
  handlers
    .handle("add", ({ payload }) => Effect.orDie(Effect.as(insert(payload.id), payload.id)))
    .handle("taken", () => Effect.zipRight(Effect.orDie(insert(1)), Effect.fail(new Taken({ id: 1 }))))
    .handle("dies", () => Effect.zipRight(Effect.orDie(insert(1)), Effect.die("oops")))
    .handle("late", () => Effect.orDie(Effect.zipRight(insert(1), doomed)))
    .handle("free", () => used)
)

const Api = Layer.provide(HttpApiBuilder.api(api), Users)

describe("HttpApi", () => {
  const post = (url: string, body: unknown) =>
    fetching(`${url}/add`, {
      method: "POST",
      body: JSON.stringify(body),
      headers: { "content-type": "application/json" }
    })
  const served = listening(Layer.provide(HttpApiBuilder.serve(DbHttp.middleware()), Api))

  test("a success commits", () =>
    Effect.gen(function* () {
      const url = yield* served
      expect(yield* post(url, { id: 3 })).toEqual({ status: 201, text: "3" })
      expect(yield* rows).toEqual([3])
    }))

  test("an error that it encodes rolls back", () =>
    Effect.gen(function* () {
      const url = yield* served
      expect(yield* fetching(`${url}/taken`)).toEqual({ status: 409, text: '{"id":1,"_tag":"Taken"}' })
      expect(yield* rows).toEqual([])
      expect(yield* used).toBe(0)
    }))

  test("a request that it refuses, or does not know, opens no session", () =>
    Effect.gen(function* () {
      const url = yield* served
      expect((yield* post(url, { id: "no" })).status).toBe(400)
      expect(yield* status(`${url}/nowhere`)).toBe(404)
      expect((yield* DbEngine.stats).total).toBe(0)
    }))

  test("a handler that dies rolls back", () =>
    Effect.gen(function* () {
      const url = yield* served
      expect(yield* status(`${url}/dies`)).toBe(500)
      expect(yield* rows).toEqual([])
    }))

  test("a commit that fails is a 5xx", () =>
    Effect.gen(function* () {
      yield* withLate
      const url = yield* served
      expect(yield* status(`${url}/late`)).toBe(500)
      expect(yield* rows).toEqual([])
    }))

  test("a handler without database borrows nothing", () =>
    Effect.gen(function* () {
      const url = yield* served
      expect(yield* fetching(`${url}/free`)).toEqual({ status: 200, text: "0" })
      expect((yield* DbEngine.stats).total).toBe(0)
    }))

  test("as a layer of the api it has the same rule", () =>
    Effect.gen(function* () {
      yield* withLate
      const sessions = HttpApiBuilder.middleware<DbEngine>(DbHttp.middleware(), { withContext: true })
      const url = yield* listening(Layer.provide(HttpApiBuilder.serve(), Layer.merge(Api, sessions)))
      expect(yield* post(url, { id: 3 })).toEqual({ status: 201, text: "3" })
      const statuses = yield* Effect.forEach(["taken", "dies", "late", "free"], (path) => status(`${url}/${path}`))
      expect(statuses).toEqual([409, 500, 500, 200])
      expect(yield* rows).toEqual([3])
    }))
})

describe("a web handler", () => {
  const handling = <E>(app: App<E, never>) =>
    Effect.map(Effect.runtime<Services>(), (runtime) => HttpApp.toWebHandlerRuntime(runtime)(app, DbHttp.middleware()))

  test("commits before it responds, and rolls back by status", () =>
    Effect.gen(function* () {
      const handler = yield* handling(
        Effect.flatMap(HttpServerRequest.HttpServerRequest, ({ method }) =>
          Effect.as(insert(method === "GET" ? 1 : 2), empty(method === "GET" ? 200 : 400))
        )
      )
      expect((yield* Effect.promise(() => handler(new Request("http://host/")))).status).toBe(200)
      expect(yield* rows).toEqual([1])
      expect((yield* Effect.promise(() => handler(new Request("http://host/", { method: "POST" })))).status).toBe(400)
      expect(yield* rows).toEqual([1])
    }))

  test("rolls back by the status of a response of the web, which is sent as it is", () =>
    Effect.gen(function* () {
      const response = new Response("no", { status: 500 })
      const handler = yield* handling(Effect.as(insert(1), HttpServerResponse.raw(response)))
      expect((yield* Effect.promise(() => handler(new Request("http://host/")))).status).toBe(500)
      expect(yield* rows).toEqual([])
    }))

  test("a kept session ends with the body, or with whoever stops reading it", () =>
    Effect.gen(function* () {
      const handler = yield* handling(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* insert(1)
          const more = chunk(Effect.as(sql`SELECT 1`, "x".repeat(10)))
          return DbHttp.keepOpen(HttpServerResponse.stream(Stream.take(Stream.forever(more), 5)))
        })
      )
      const response = yield* Effect.promise(() => handler(new Request("http://host/")))
      expect((yield* Effect.promise(() => response.text())).length).toBe(50)
      expect(yield* rows).toEqual([1])
      yield* database.query("DELETE FROM t")
      const left = yield* Effect.promise(() => handler(new Request("http://host/")))
      yield* Effect.promise(async () => {
        const reader = left.body!.getReader()
        await reader.read()
        await reader.cancel()
      })
      yield* until(
        "the connection back",
        Effect.map(used, (_) => _ === 0)
      )
      expect(yield* rows).toEqual([])
    }))
})

describe("several databases", () => {
  const Other = Database.make("other")
  const both = [Database.make("default"), Other] as const
  const intoOther = (id: number) =>
    Effect.flatMap(Other.DbSession, ({ sql }) => Effect.asVoid(sql`INSERT INTO t (id) VALUES (${id})`))
  const othersRows = committed(other)

  const withBoth = <A, E>(
    name: string,
    program: () => Effect.Effect<A, E, Services | DbEngine<"other"> | DbSession<"other"> | Scope.Scope>
  ) =>
    it.scopedLive(name, () =>
      Effect.gen(function* () {
        yield* other.query(
          "DROP TABLE IF EXISTS t CASCADE; CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)"
        )
        yield* withLate
        yield* onDatabase(database)(
          Effect.gen(function* () {
            yield* withLate
            yield* program()
            expect((yield* Other.DbEngine.stats).used).toBe(0)
          }).pipe(Effect.provide(quietly(Other.DbLayer({ url: other.url }))))
        )
      })
    )

  for (const [name, app] of [
    [
      "as the server's middleware",
      (handler: HttpApp.Default<unknown, any>) =>
        HttpServer.serve(handler, DbHttp.middleware({ databases: both })) as never
    ],
    [
      "around the app",
      (handler: HttpApp.Default<unknown, any>) =>
        HttpServer.serve(DbHttp.middleware({ databases: both })(handler)) as never
    ]
  ] as const) {
    const serving = (handler: HttpApp.Default<unknown, any>) =>
      Effect.flatMap(Effect.context<DbEngine<"other"> | DbSession<"other">>(), (context) =>
        listening(
          Layer.provide(app(handler) as Layer.Layer<never>, Layer.succeedContext(context as Context.Context<never>))
        )
      )

    withBoth(`${name}: a success commits all of them`, () =>
      Effect.gen(function* () {
        const url = yield* serving(Effect.as(Effect.zipRight(insert(1), intoOther(2)), empty(200)))
        expect(yield* status(url)).toBe(200)
        expect(yield* rows).toEqual([1])
        expect(yield* othersRows).toEqual([2])
      })
    )

    withBoth(`${name}: anything else rolls all of them back`, () =>
      Effect.gen(function* () {
        const url = yield* serving(Effect.as(Effect.zipRight(insert(1), intoOther(2)), empty(500)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
        expect(yield* othersRows).toEqual([])
      })
    )

    withBoth(`${name}: where the first commit fails the second is rolled back`, () =>
      Effect.gen(function* () {
        const url = yield* serving(Effect.as(Effect.all([insert(1), doomed, intoOther(2)]), empty(200)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
        expect(yield* othersRows).toEqual([])
      })
    )

    withBoth(`${name}: where the second commit fails the first stays, and the client is told`, () =>
      Effect.gen(function* () {
        const url = yield* serving(Effect.as(Effect.all([insert(1), intoOther(2), intoOther(2)]), empty(200)))
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([1])
        expect(yield* othersRows).toEqual([])
      })
    )

    withBoth(`${name}: a beforeCommit of any of them that fails keeps nothing of both`, () =>
      Effect.gen(function* () {
        const no = Effect.fail(DbError.make("CheckViolation", { message: "no", hint: "no" }))
        const url = yield* serving(
          Effect.as(Effect.all([insert(1), intoOther(2), Other.DbSession.beforeCommit(no)]), empty(200))
        )
        expect(yield* status(url)).toBe(500)
        expect(yield* rows).toEqual([])
        expect(yield* othersRows).toEqual([])
      })
    )
  }
})

describe("the middleware as an effect", () => {
  test("a commit that fails is the typed error of the app", () =>
    Effect.gen(function* () {
      yield* withLate
      const app = Effect.zipRight(insert(1), doomed).pipe(Effect.as(empty(200)), DbHttp.middleware())
      const request = HttpServerRequest.fromWeb(new Request("http://host/"))
      const tag = yield* reason(Effect.provideService(app, HttpServerRequest.HttpServerRequest, request))
      expect(tag).toBe("ForeignKeyViolation")
      expect(yield* rows).toEqual([])
    }))

  test("withTransaction in a handler is a savepoint of the request's transaction", () =>
    Effect.gen(function* () {
      const handler = Effect.as(
        Effect.zipRight(insert(1), Effect.ignore(withTransaction(Effect.zipRight(insert(2), refused)))),
        empty(200)
      )
      const url = yield* listening(HttpServer.serve(get("/", handler), DbHttp.middleware()) as Serving)
      expect(yield* status(url)).toBe(200)
      expect(yield* rows).toEqual([1])
      expect(Option.isNone(yield* DbSession.current)).toBe(true)
    }))
})

describe("a failure whose response is a redirect", () => {
  class Elsewhere extends Data.TaggedError("Elsewhere") implements HttpServerRespondable.Respondable {
    [HttpServerRespondable.symbol]() {
      return HttpServerResponse.empty({ status: 303 })
    }
  }
  const handler = Effect.zipRight(insert(1), Effect.fail(new Elsewhere()))
  for (const [place, serve] of places) {
    // There the server has made the response of it before anybody can tell it from a success.
    const kept = place === "HttpServer.serve"
    test(`${place}: ${kept ? "counts by its status, and commits" : "is a failure, and rolls back"}`, () =>
      Effect.gen(function* () {
        const url = yield* listening(serve(get("/", handler)))
        expect(yield* status(url)).toBe(303)
        expect(yield* rows).toEqual(kept ? [1] : [])
      }))
  }

  test("HttpServer.serve: rolls back where commits says so", () =>
    Effect.gen(function* () {
      const middleware = DbHttp.middleware({ commits: ({ status }) => status < 300 })
      const url = yield* listening(HttpServer.serve(get("/", handler), middleware) as Serving)
      expect(yield* status(url)).toBe(303)
      expect(yield* rows).toEqual([])
    }))
})
