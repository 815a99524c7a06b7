/**
 * Express: one session for each request, which commits before the response leaves.
 */
import { DbError, DbLayer, DbRuntime, DbSession } from "effect-db"
import type { DbEngine } from "effect-db"
import { Effect } from "effect"
import express from "express"
import { createServer } from "node:http"
import { sessionPerRequest } from "./recipes/express.js"
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
  const app = express().set("env", "test") // which does not print errors
  app.use(express.json(), sessionPerRequest(db))

  app.post("/users/:name", async (req, res) => {
    await db.run(register(req.params.name))
    res.status(201).json({ name: req.params.name })
  })
  app.post("/refused/:name", async (req, res) => {
    await db.run(register(req.params.name))
    res.status(409).json({ error: "on second thoughts" })
  })
  app.post("/doomed/:name", async (req, res) => {
    await db.run(Effect.zipRight(register(req.params.name), doom))
    res.status(201).json({ name: req.params.name })
  })
  return app
}

const program = Effect.gen(function* () {
  const db = DbRuntime.make(DbLayer({ url: yield* (yield* Databases).make("express") }))
  yield* Effect.addFinalizer(() => Effect.promise(db.close))
  const registered = Effect.promise(() => db.run(users))
  const url = yield* listening(createServer(appOn(db)))

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
