/**
 * Programs that are not written with Effect: promises share the session that they are awaited in.
 */
import { DbEngine, DbLayer, DbRuntime, DbSession } from "effect-db"
import { Effect } from "effect"
import { Databases, run, say, show, users } from "./support.js"

const register = (name: string) =>
  Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const program = Effect.gen(function* () {
  const url = yield* (yield* Databases).make("promises")

  yield* say("one session for everything that is awaited inside")
  const names = Effect.promise(async () => {
    const db = DbRuntime.make(DbLayer({ url }))

    await db.session(async () => {
      await db.run(register("ada"))
      await db.run(register("grace"))
    })

    // a rejected promise rolls back, and comes out as it went in
    await db
      .session(async () => {
        await db.run(register("edsger"))
        throw new Error("changed my mind")
      })
      .catch(() => {})

    const names = await db.run(users)
    const { used } = await db.run(DbEngine.stats)
    await db.close()
    return [...names, `${used} borrowed`]
  })
  yield* show("registered", names, ["ada", "grace", "0 borrowed"])
})

run(program)
