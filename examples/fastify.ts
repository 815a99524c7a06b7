/**
 * Fastify: one session for each request, which commits before the response leaves.
 */
import { DbError, DbLayer, DbRuntime, DbSession } from "effect-db"
import type { DbEngine } from "effect-db"
import { Effect } from "effect"
import fastify from "fastify"
import { sessionPerRequest } from "./recipes/fastify.js"
import { Databases, post, run, say, show, users } from "./support.js"

const register = (name: string) =>
  Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

/** The COMMIT is refused. */
const doom = DbSession.beforeCommit(
  Effect.fail(
    DbError.make("CheckViolation", { message: "Nobody may register at this hour.", hint: "Try again later." })
  )
)

interface Named {
  readonly Params: { readonly name: string }
}

const appOn = (db: DbRuntime.DbRuntime<DbEngine | DbSession, unknown>) => {
  const app = fastify()
  sessionPerRequest(app, db)

  app.post<Named>("/users/:name", async ({ params }, reply) => {
    await db.run(register(params.name))
    return reply.status(201).send({ name: params.name })
  })
  app.post<Named>("/refused/:name", async ({ params }, reply) => {
    await db.run(register(params.name))
    return reply.status(409).send({ error: "on second thoughts" })
  })
  app.post<Named>("/doomed/:name", async ({ params }, reply) => {
    await db.run(Effect.zipRight(register(params.name), doom))
    return reply.status(201).send({ name: params.name })
  })
  return app
}

const program = Effect.gen(function* () {
  const db = DbRuntime.make(DbLayer({ url: yield* (yield* Databases).make("fastify") }))
  yield* Effect.addFinalizer(() => Effect.promise(db.close))
  const registered = Effect.promise(() => db.run(users))
  const app = appOn(db)
  yield* Effect.addFinalizer(() => Effect.promise(() => app.close()))
  const url = yield* Effect.promise(() => app.listen({ host: "127.0.0.1", port: 0 }))

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
