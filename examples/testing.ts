/**
 * Tests against a real database that leave nothing behind: a sandbox for each of them, or a database of its own.
 */
import { atomic, DbEngine, DbSession } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect } from "effect"
import { run, say, show, users } from "./support.js"

/** The program under test commits as it likes. */
const register = (name: string) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    yield* sql`INSERT INTO users ${sql.insert({ name })}`
    yield* DbSession.commit
    yield* sql`INSERT INTO users ${sql.insert({ name: `friend of ${name}` })}`.pipe(atomic)
  }).pipe(DbSession.autocommit)

const isControl = (text: string) => !text.startsWith("INSERT")

const program = Effect.gen(function* () {
  yield* say("inside the sandbox the program finds what it has committed")
  yield* register("ada").pipe(Effect.zipRight(show("inside", users, ["ada", "friend of ada"])), DbTest.sandbox)
  yield* show("outside", users, [])

  yield* say("the same for a test that fails half-way")
  yield* register("grace").pipe(Effect.zipRight(Effect.fail("not as expected")), DbTest.sandbox, Effect.ignore)
  yield* show("outside", users, [])

  yield* say("what it sends is a list that a test can compare")
  const [, trace] = yield* register("alan").pipe(DbTest.trace, DbTest.sandbox)
  yield* show("statements that begin or end something", Effect.succeed(trace.statements.filter(isControl)), [
    "BEGIN",
    "COMMIT",
    "BEGIN",
    "COMMIT"
  ])
  yield* show("round trips", Effect.succeed(trace.roundTrips.length), 4)
  yield* show("borrowed", Effect.succeed(trace.borrowed), 1)
  yield* show("outside", users, [])

  yield* say("in a test file: it.layer(DbTest.layer({ url })), and DbTest.sandbox around each test")
  yield* show(
    "connections",
    Effect.map(DbEngine.stats, (_) => _.used),
    0
  )
})

run(program)
