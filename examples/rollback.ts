/**
 * What rolls a session back: a failure, a defect, an interruption. The error comes out as it went in.
 */
import { DbError, DbSession } from "effect-db"
import { Effect, Exit } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const outcome = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.map(Effect.exit(effect), Exit.match({ onSuccess: () => "committed", onFailure: (cause) => cause._tag }))

const program = Effect.gen(function* () {
  const failing = insert("ada").pipe(Effect.zipRight(Effect.fail("no such page")), DbSession.autocommit)
  yield* show("a failure", outcome(failing), "Fail")

  const dying = insert("ada").pipe(Effect.zipRight(Effect.dieMessage("a bug")), DbSession.autocommit)
  yield* show("a defect", outcome(dying), "Die")

  const leaving = insert("ada").pipe(Effect.zipRight(Effect.interrupt), DbSession.autocommit)
  yield* show("an interruption", outcome(leaving), "Interrupt")

  yield* show("kept", users, [])
  yield* show("borrowed", borrowed, 0)

  yield* say("a constraint is a typed reason, not a text to be parsed")
  const twice = Effect.all([insert("ada"), insert("ada")]).pipe(
    DbSession.autocommit,
    Effect.as("registered"),
    DbError.catchReason("UniqueViolation", ({ constraint }) => Effect.succeed(`refused by ${constraint}`))
  )
  yield* show("the same name twice", twice, "refused by users_name_taken")
  yield* show("kept", users, [])

  yield* say("a statement error that is swallowed can't turn into a success: nothing would be committed")
  const swallowed = insert("ada").pipe(
    Effect.zipRight(Effect.ignore(insert("ada"))),
    DbSession.autocommit,
    Effect.as("committed"),
    DbError.catchReason("TransactionAborted", (reason) => Effect.succeed(reason._tag))
  )
  yield* show("so it says", swallowed, "TransactionAborted")
})

run(program)
