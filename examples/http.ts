/**
 * One session for each HTTP request: a status below 400 commits, everything else rolls back, and the commit happens
 * before the response leaves.
 */
import { HttpApp, HttpRouter, HttpServerResponse } from "@effect/platform"
import type { DbEngine } from "effect-db"
import { DbHttp, DbSession } from "effect-db"
import { Effect } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

/** Registers whoever is named in the path, and answers with the status in the path. */
const app = HttpRouter.empty.pipe(
  HttpRouter.post(
    "/:name/:status",
    Effect.gen(function* () {
      const { name, status } = yield* HttpRouter.params
      yield* insert(name!)
      return HttpServerResponse.empty({ status: Number(status) })
    })
  ),
  HttpRouter.get("/nothing", HttpServerResponse.empty()),
  HttpRouter.use(DbHttp.middleware())
)

const program = Effect.gen(function* () {
  const handler = HttpApp.toWebHandlerRuntime(yield* Effect.runtime<DbEngine | DbSession>())(app)
  const send = (method: string, path: string) =>
    Effect.promise(() => handler(new Request(`http://example.test${path}`, { method }))).pipe(
      Effect.map(({ status }) => status)
    )

  yield* show("POST /ada", send("POST", "/ada/201"), 201)
  yield* show("POST /grace", send("POST", "/grace/303"), 303)
  yield* show("POST /edsger", send("POST", "/edsger/409"), 409)
  yield* show("POST /tony", send("POST", "/tony/500"), 500)
  yield* show("kept", users, ["ada", "grace"])

  yield* show("a constraint that nobody handles", send("POST", "/ada/201"), 500)

  yield* say("a handler that uses no database borrows nothing")
  yield* show("GET /nothing", send("GET", "/nothing"), 204)
  yield* show("borrowed", borrowed, 0)
})

run(program)
