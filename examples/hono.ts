/**
 * Hono: one session for each request, which commits before the response leaves.
 */
import { createAdaptorServer } from "@hono/node-server"
import { DbError, DbLayer, DbRuntime, DbSession } from "effect-db"
import type { DbEngine } from "effect-db"
import { Effect } from "effect"
import { Hono } from "hono"
import type { Server } from "node:http"
import { sessionPerRequest } from "./recipes/hono.js"
import { Databases, listening, post, run, say, show, users } from "./support.js"

const register = (name: string) =>
  Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

/** The COMMIT is refused. */
const doom = DbSession.beforeCommit(
  Effect.fail(
    DbError.make("CheckViolation", { message: "Nobody may register at this hour.", hint: "Try again later." })
  )
)

const appOn = (db: DbRuntime.DbRuntime<DbEngine | DbSession, unknown>) => {
  const app = new Hono()
  app.onError((_, c) => c.text("something went wrong", 500))
  app.use(sessionPerRequest(db))

  app.post("/users/:name", async (c) => {
    await db.run(register(c.req.param("name")))
    return c.json({ name: c.req.param("name") }, 201)
  })
  app.post("/refused/:name", async (c) => {
    await db.run(register(c.req.param("name")))
    return c.json({ error: "on second thoughts" }, 409)
  })
  app.post("/doomed/:name", async (c) => {
    await db.run(Effect.zipRight(register(c.req.param("name")), doom))
    return c.json({ name: c.req.param("name") }, 201)
  })
  return app
}

const program = Effect.gen(function* () {
  const db = DbRuntime.make(DbLayer({ url: yield* (yield* Databases).make("hono") }))
  yield* Effect.addFinalizer(() => Effect.promise(db.close))
  const registered = Effect.promise(() => db.run(users))
  const url = yield* listening(createAdaptorServer({ fetch: appOn(db).fetch }) as Server)

  yield* say("a status below 400 commits, before the response leaves")
  yield* show("POST /users/ada", post(`${url}/users/ada`), 201)
  yield* show("registered", registered, ["ada"])

  yield* say("any other rolls back, and so does an error that nobody handles")
  yield* show("POST /refused/grace", post(`${url}/refused/grace`), 409)
  yield* show("POST /users/ada, again", post(`${url}/users/ada`), 500)

  yield* say("a commit that fails is a 500, whatever the handler has said")
  yield* show("POST /doomed/edsger", post(`${url}/doomed/edsger`), 500)
  yield* show("registered", registered, ["ada"])
})

run(program)
