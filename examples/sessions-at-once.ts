/**
 * Several sessions at once, in all five styles: which of them share a connection, and who commits.
 */
import { DbSession } from "effect-db"
import { Effect, Exit } from "effect"
import { run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

/** 1: in the session that is around it, which commits for all of its fibers. */
const ambient = insert("ambient")

/** 2: in a session of its own, which commits by itself. */
const isolated = insert("isolated").pipe(DbSession.isolated)

/** 3: the same, committed and closed by hand. */
const byHand = Effect.gen(function* () {
  yield* insert("isolated, by hand")
  yield* DbSession.commit
  yield* DbSession.close
}).pipe(DbSession.isolated)

/** 4: a handle that commits at the end of its scope. */
const handle = Effect.scoped(
  Effect.gen(function* () {
    const session = yield* DbSession.make({ autocommit: true })
    yield* session.use(insert("make, autocommit"))
  })
)

/** 5: a handle that is committed by hand. */
const handleByHand = Effect.scoped(
  Effect.gen(function* () {
    const session = yield* DbSession.make()
    yield* session.use(insert("make, by hand"))
    yield* session.commit
  })
)

/** One that fails takes nothing of the others with it. */
const failing = insert("failing").pipe(Effect.zipRight(Effect.fail("no")), DbSession.isolated)

const program = Effect.gen(function* () {
  yield* say("all of them at the same time")
  const exits = yield* Effect.all([ambient, isolated, byHand, handle, handleByHand, failing].map(Effect.exit), {
    concurrency: "unbounded"
  }).pipe(DbSession.autocommit)
  yield* show("how many failed", Effect.succeed(exits.filter(Exit.isFailure).length), 1)
  yield* show(
    "kept",
    Effect.map(users, (names) => [...names].sort()),
    ["ambient", "isolated", "isolated, by hand", "make, autocommit", "make, by hand"]
  )

  yield* say("parallel work is many isolated sessions, each with its own connection and its own commit")
  yield* Effect.all(["a", "b", "c", "d"].map(insert).map(DbSession.isolated), { concurrency: 4 })

  yield* say("many statements of one session at once share its connection and one round trip")
  yield* Effect.all(["e", "f", "g", "h"].map(insert), { concurrency: "unbounded" }).pipe(DbSession.autocommit)
  yield* show(
    "all there",
    Effect.map(users, (names) => names.length),
    13
  )
})

run(program)
