/**
 * Atomic blocks: outside of a session `withTransaction` is a transaction, inside it is a savepoint.
 */
import { DbSession, DbTransaction, withTransaction } from "effect-db"
import { Effect, Option } from "effect"
import { run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const program = Effect.gen(function* () {
  yield* say("outside: BEGIN and COMMIT")
  yield* insert("ada").pipe(withTransaction({ isolation: "serializable" }))

  yield* say("inside: what the inner block did is undone, and the outer one goes on")
  yield* Effect.gen(function* () {
    yield* insert("grace")
    yield* insert("nobody").pipe(Effect.zipRight(Effect.fail("changed my mind")), withTransaction, Effect.ignore)
    yield* insert("edsger").pipe(withTransaction)
  }).pipe(withTransaction)
  yield* show("kept", users, ["ada", "grace", "edsger"])

  yield* say("a chosen block can be ended early, with a value, from as deep inside as it may be")
  const found = withTransaction((tx) =>
    Effect.gen(function* () {
      yield* insert("tony")
      yield* insert("nobody").pipe(Effect.zipRight(tx.end("commit", "early")), withTransaction)
      return "late"
    })
  )
  yield* show("ended", found, "early")
  yield* show("kept", users, ["ada", "grace", "edsger", "tony", "nobody"])

  yield* say("what a block is, from inside")
  const depth = Effect.map(DbTransaction.current, (tx) => (Option.isSome(tx) ? tx.value.depth : 0))
  yield* show("depth", depth.pipe(withTransaction, withTransaction), 2)
})

run(program)
