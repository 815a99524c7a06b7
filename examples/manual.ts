/**
 * Commit, rollback and close by hand: the session goes on after each of them.
 */
import { DbConnection, DbSession } from "effect-db"
import { Effect } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const program = Effect.gen(function* () {
  yield* Effect.gen(function* () {
    yield* insert("ada")
    yield* DbSession.commit
    yield* say("committed: ada stays, and so does the connection")
    yield* show("borrowed", borrowed, 1)

    yield* insert("grace") // opens a new transaction on the same connection
    yield* DbSession.rollback
    yield* show("state after the rollback", DbSession.state, "idle")

    yield* insert("edsger")
    yield* DbSession.close // gives the connection back; what was not committed is gone
    yield* show("borrowed after the close", borrowed, 0)

    yield* insert("barbara") // a new session, which the end commits
  }).pipe(DbSession.autocommit)
  yield* show("kept", users, ["ada", "barbara"])

  yield* say("the same with a scope instead of a function around it")
  yield* Effect.scoped(
    Effect.gen(function* () {
      yield* DbSession.scoped()
      yield* insert("donald")
    })
  )
  yield* show("kept", users, ["ada", "barbara", "donald"])

  yield* say("a handle of one's own session: ambient nowhere, and committed by hand")
  yield* Effect.scoped(
    Effect.gen(function* () {
      const session = yield* DbSession.make()
      yield* session.use(insert("tony"))
      yield* session.commit
      yield* session.use(insert("forgotten"))
    })
  )
  yield* show("kept", users, ["ada", "barbara", "donald", "tony"])
  yield* show(
    "no connection is ambient now",
    Effect.map(DbConnection.current, (_) => _._tag),
    "None"
  )
})

run(program)
