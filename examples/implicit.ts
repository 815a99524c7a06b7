/**
 * Implicit execution: without a session around it, a statement borrows a connection, runs, and gives it back.
 */
import { DbEngine, DbError, DbLayer, DbQuery, DbSession } from "effect-db"
import { Effect } from "effect"
import { borrowed, Databases, run, say, show, users } from "./support.js"

const program = Effect.gen(function* () {
  const { sql } = yield* DbEngine
  yield* say("one statement, one round trip, committed by itself")
  yield* sql`INSERT INTO users ${sql.insert({ name: "ada" })}`
  yield* show("the only user", DbQuery.one(sql`SELECT name FROM users`).pipe(Effect.map((_) => _.name)), "ada")
  yield* show("borrowed afterwards", borrowed, 0)

  yield* say("the same client, inside a session, is the session")
  yield* sql`INSERT INTO users ${sql.insert({ name: "grace" })}`.pipe(
    Effect.zipRight(DbSession.rollback),
    DbSession.autocommit
  )
  yield* show("after its rollback", users, ["ada"])

  yield* say('who wants every statement in a session asks for it: implicitExecution: "forbid"')
  const url = yield* (yield* Databases).make("strict")
  const refused = users.pipe(
    Effect.as("ran"),
    DbError.catchReason("NoSession", (reason) => Effect.succeed(reason._tag)),
    Effect.provide(DbLayer({ url, implicitExecution: "forbid" }))
  )
  yield* show("a statement without one", refused, "NoSession")
})

run(program)
