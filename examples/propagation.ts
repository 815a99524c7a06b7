/**
 * Where a block stands to the transaction around it: the seven propagations.
 */
import { DbError, DbSession, withTransaction } from "effect-db"
import type { Propagation } from "effect-db"
import { Effect } from "effect"
import { run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

/** Inserts by a block of this kind, inside a transaction that is rolled back, and outside of any. */
const both = (propagation: Propagation) =>
  Effect.gen(function* () {
    const block = (name: string) =>
      insert(name).pipe(
        withTransaction({ propagation }),
        Effect.as("ran"),
        DbError.catchReason("PropagationError", () => Effect.succeed("refused"))
      )
    const inside = yield* withTransaction((tx) =>
      Effect.gen(function* () {
        const result = yield* block(`${propagation} inside`)
        yield* tx.end("rollback", result)
        return result
      })
    )
    return `${inside} inside, ${yield* block(`${propagation} outside`)} outside`
  })

const program = Effect.gen(function* () {
  yield* say("each of them inside a transaction that is rolled back, then outside of any")
  yield* show("nested", both("nested"), "ran inside, ran outside")
  yield* show("required", both("required"), "ran inside, ran outside")
  yield* show("requiresNew", both("requiresNew"), "ran inside, ran outside")
  yield* show("mandatory", both("mandatory"), "ran inside, refused outside")
  yield* show("supports", both("supports"), "ran inside, ran outside")
  yield* show("notSupported", both("notSupported"), "ran inside, ran outside")
  yield* show("never", both("never"), "refused inside, ran outside")

  yield* say("of what ran inside, only what was not part of the transaction is still there")
  yield* show(
    "kept",
    Effect.map(users, (names) => names.filter((name) => name.endsWith("inside"))),
    ["requiresNew inside", "notSupported inside"]
  )
})

run(program)
