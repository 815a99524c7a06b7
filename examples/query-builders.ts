/**
 * Query builders: Kysely and Drizzle as effects, through the ecosystem's packages, and as promises, through a small
 * adapter. Either way their statements run in the session that they stand in.
 */
import * as PgDrizzle from "@effect/sql-drizzle/Pg"
import * as PgKysely from "@effect/sql-kysely/Pg"
import type { SqlError } from "@effect/sql"
import { eq } from "drizzle-orm"
import { integer, pgTable, text } from "drizzle-orm/pg-core"
import type { PgRemoteDatabase } from "drizzle-orm/pg-proxy"
import { DbLayer, DbRuntime, DbSession, withTransaction } from "effect-db"
import { Effect } from "effect"
import type { Generated } from "kysely"
import { drizzleOn } from "./recipes/drizzle.js"
import { kyselyOn } from "./recipes/kysely.js"
import { Databases, run, say, show, users } from "./support.js"

interface Tables {
  readonly users: { readonly id: Generated<number>; readonly name: string }
}

const usersTable = pgTable("users", {
  id: integer().primaryKey().generatedAlwaysAsIdentity(),
  name: text().notNull()
})

/**
 * In a project whose `moduleResolution` is `"bundler"` a query of sql-drizzle is an effect to the compiler as well. Under
 * `"nodenext"`, as here, its declarations mean the CommonJS ones of Drizzle, which are other types.
 */
const effectOf = <A>(query: PromiseLike<A>) => query as unknown as Effect.Effect<A, SqlError.SqlError>

const asEffects = Effect.gen(function* () {
  const kysely = yield* PgKysely.make<Tables>()
  const drizzle = (yield* PgDrizzle.make()) as unknown as PgRemoteDatabase

  yield* say("yielded: both in one session, with its statements")
  yield* Effect.gen(function* () {
    yield* kysely.insertInto("users").values({ name: "ada" })
    yield* effectOf(drizzle.insert(usersTable).values({ name: "grace" }))
    yield* kysely.updateTable("users").set({ name: "grace hopper" }).where("name", "=", "grace")
  }).pipe(DbSession.autocommit)
  yield* show("registered", users, ["ada", "grace hopper"])

  yield* say("and undone with the block that they are in")
  yield* Effect.gen(function* () {
    yield* effectOf(drizzle.delete(usersTable))
    yield* kysely.insertInto("users").values({ name: "edsger" })
    return yield* Effect.fail("no")
  }).pipe(withTransaction, Effect.ignore)
  yield* show("registered", users, ["ada", "grace hopper"])
})

const asPromises = Effect.gen(function* () {
  const url = yield* (yield* Databases).make("builders")
  const names = Effect.promise(async () => {
    const db = DbRuntime.make(DbLayer({ url }))
    const kysely = kyselyOn<Tables>(db)
    const drizzle = drizzleOn(db)

    await db.session(async () => {
      await kysely.insertInto("users").values({ name: "ada" }).execute()
      await drizzle.insert(usersTable).values({ name: "grace" })
      await db
        .transaction(async () => {
          await drizzle.update(usersTable).set({ name: "edsger" }).where(eq(usersTable.name, "ada"))
          throw new Error("changed my mind")
        })
        .catch(() => {})
    })

    const rows = await kysely.selectFrom("users").select("name").orderBy("id").execute()
    await db.close()
    return rows.map(({ name }) => name)
  })
  yield* say("awaited: in the session of a runtime")
  yield* show("registered", names, ["ada", "grace"])
})

run(Effect.zipRight(asEffects, asPromises))
