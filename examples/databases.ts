/**
 * Several databases: each has its own vocabulary, its own types and its own session. A statement for one never runs in
 * a transaction of the other.
 */
import { Database, DbSession } from "effect-db"
import { Effect } from "effect"
import { Databases, run, say, show, users } from "./support.js"

const Analytics = Database.make("analytics")

const register = (name: string) =>
  Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const count = (name: string) =>
  Effect.flatMap(Analytics.DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name: `counted ${name}` })}`)

const counted = Effect.flatMap(Analytics.DbEngine, ({ sql }) =>
  Effect.map(sql<{ readonly name: string }>`SELECT name FROM users ORDER BY id`, (rows) => rows.map((_) => _.name))
)

const program = Effect.gen(function* () {
  const url = yield* (yield* Databases).make("analytics")
  yield* Effect.gen(function* () {
    yield* say("two sessions at the same time, one for each database")
    yield* Effect.all([register("ada"), count("ada")]).pipe(DbSession.autocommit, Analytics.DbSession.autocommit)
    yield* show("registered", users, ["ada"])
    yield* show("counted", counted, ["counted ada"])

    yield* say("what the one rolls back, the other keeps")
    yield* Effect.all([register("grace"), Analytics.DbSession.isolated(count("grace"))]).pipe(
      Effect.zipRight(Effect.fail("no")),
      DbSession.autocommit,
      Effect.ignore
    )
    yield* show("registered", users, ["ada"])
    yield* show("counted", counted, ["counted ada", "counted grace"])

    yield* say("commitAll commits every session of the fiber, in the order in which they were opened")
    yield* Effect.all([register("edsger"), count("edsger"), DbSession.commitAll]).pipe(
      Effect.zipRight(Effect.fail("too late to matter")),
      DbSession.autocommit,
      Analytics.DbSession.autocommit,
      Effect.ignore
    )
    yield* show("registered", users, ["ada", "edsger"])
    yield* show("counted", counted, ["counted ada", "counted grace", "counted edsger"])
  }).pipe(Effect.provide(Analytics.DbLayer({ url })))
})

run(program)
