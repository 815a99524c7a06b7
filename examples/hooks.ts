/**
 * Hooks: what has to happen with a commit, and what must not happen without one.
 */
import { DbSession, withTransaction } from "effect-db"
import { Effect, Ref } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const program = Effect.gen(function* () {
  const mails = yield* Ref.make<ReadonlyArray<string>>([])

  /** The mail goes out when the user is really there, and never for one who is not. */
  const register = (name: string) =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* sql`INSERT INTO users ${sql.insert({ name })}`
      yield* DbSession.afterCommit(Ref.update(mails, (sent) => [...sent, name]))
    })

  yield* say("after the commit, and after the connection was given back")
  yield* register("ada").pipe(
    Effect.zipRight(DbSession.afterCommit(show("borrowed by then", borrowed, 0))),
    DbSession.autocommit
  )
  yield* show("mails", Ref.get(mails), ["ada"])

  yield* say("not after a rollback, and not for what a savepoint has undone")
  yield* register("grace").pipe(Effect.zipRight(Effect.fail("no")), DbSession.autocommit, Effect.ignore)
  yield* Effect.gen(function* () {
    yield* register("edsger")
    yield* register("tony").pipe(Effect.zipRight(Effect.fail("no")), withTransaction, Effect.ignore)
  }).pipe(DbSession.autocommit)
  yield* show("mails", Ref.get(mails), ["ada", "edsger"])
  yield* show("users", users, ["ada", "edsger"])

  yield* say("before the commit, still inside: what it writes is committed with the rest")
  const audit = Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name: "auditor" })}`)
  yield* register("barbara").pipe(Effect.zipRight(DbSession.beforeCommit(audit)), DbSession.autocommit)
  yield* show("users", users, ["ada", "edsger", "barbara", "auditor"])
})

run(program)
