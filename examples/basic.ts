/**
 * The session: functions ask for it where they need it, and whoever calls them decides where the unit of work ends.
 */
import { DbSession } from "effect-db"
import { Effect } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const register = (name: string) =>
  Effect.gen(function* () {
    const db = yield* DbSession // nothing is borrowed yet
    yield* db.sql`INSERT INTO users ${db.sql.insert({ name })}` // the first statement borrows, and BEGIN rides along
  })

const program = Effect.gen(function* () {
  yield* say("two functions, one session: one connection, one transaction, one COMMIT")
  yield* Effect.all([register("ada"), register("grace")]).pipe(DbSession.autocommit)
  yield* show("registered", users, ["ada", "grace"])

  yield* say("a session that runs no statement costs nothing at all")
  yield* DbSession.autocommit(Effect.void)
  yield* show("borrowed", borrowed, 0)
})

run(program)
