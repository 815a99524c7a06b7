/**
 * `atomic`: a transaction that commits by itself, also inside a session, which stays open. What becomes of the
 * transaction that the session has open already is for the caller to say.
 */
import { atomic, DbError, DbSession } from "effect-db"
import { Effect } from "effect"
import { run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

/** The names that are left when all is over; the session itself is rolled back at its end. */
const left = <E, R>(body: Effect.Effect<unknown, E, R>) =>
  body.pipe(
    Effect.zipRight(DbSession.rollback),
    DbSession.autocommit,
    Effect.ignore,
    Effect.zipRight(users),
    Effect.zipLeft(Effect.flatMap(DbSession, ({ sql }) => sql`TRUNCATE users`))
  )

const program = Effect.gen(function* () {
  yield* say("commit (the default): what was open is committed first, and stays whatever comes")
  yield* show("kept", left(Effect.all([insert("before"), atomic(insert("inner")), insert("after")])), [
    "before",
    "inner"
  ])
  const failing = insert("inner").pipe(Effect.zipRight(Effect.fail("no")), atomic, Effect.ignore)
  yield* show("kept when it fails", left(Effect.all([insert("before"), failing])), ["before"])

  yield* say("rollback: what was open is dropped first")
  yield* show(
    "kept",
    left(Effect.all([insert("before"), atomic(insert("inner"), { currentTransaction: "rollback" }), insert("after")])),
    ["inner"]
  )

  yield* say("append: it joins what is open and commits both, or neither")
  yield* show(
    "kept",
    left(Effect.all([insert("before"), atomic(insert("inner"), { currentTransaction: "append" }), insert("after")])),
    ["before", "inner"]
  )
  yield* show(
    "kept when it fails",
    left(
      Effect.all([
        insert("before"),
        insert("inner").pipe(
          Effect.zipRight(Effect.fail("no")),
          atomic({ currentTransaction: "append" }),
          Effect.ignore
        )
      ])
    ),
    []
  )

  yield* say("raise: an open transaction is a mistake")
  const raised = Effect.gen(function* () {
    yield* insert("before")
    const answer = yield* atomic(insert("inner"), { currentTransaction: "raise" }).pipe(
      Effect.as("ran"),
      DbError.catchReason("PropagationError", (reason) => Effect.succeed(reason._tag))
    )
    yield* DbSession.commit // the earlier work is still pending
    return answer
  }).pipe(DbSession.autocommit)
  yield* show("answer", raised, "PropagationError")
  yield* show("kept", users, ["before"])

  yield* say("inside a block it is a savepoint: a block never commits what its caller has not finished")
  yield* insert("undone").pipe(atomic, Effect.zipRight(Effect.fail("no")), atomic, Effect.ignore)
  yield* show("kept", users, ["before"])
})

run(program)
