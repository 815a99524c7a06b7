/**
 * A schema for each tenant: names are looked up where the fiber says, in the same round trip, and the pool carries
 * nothing over.
 */
import { DbEngine, DbSchema, DbSession } from "effect-db"
import { Effect } from "effect"
import { run, say, show, users } from "./support.js"

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const open = (tenant: string) =>
  Effect.gen(function* () {
    const { sql } = yield* DbEngine
    yield* DbSchema.create(tenant)
    yield* sql`CREATE TABLE ${sql(tenant)}.users (LIKE public.users INCLUDING ALL)`
  }).pipe(DbSession.autocommit)

const program = Effect.gen(function* () {
  yield* Effect.all([open("acme"), open("globex")])

  yield* say("the same function, once for each tenant, at the same time")
  yield* Effect.all(
    ["acme", "globex"].map((tenant) =>
      insert(`somebody of ${tenant}`).pipe(DbSession.isolated, DbSchema.withTenant(tenant))
    ),
    { concurrency: "unbounded" }
  )
  yield* show("acme", DbSchema.withTenant(users, "acme"), ["somebody of acme"])
  yield* show("globex", DbSchema.withTenant(users, "globex"), ["somebody of globex"])
  yield* show("public", users, [])

  yield* say("a tenant wins over a schema, whichever is inside")
  yield* show("who", users.pipe(DbSchema.withSchema("globex"), DbSchema.withTenant("acme")), ["somebody of acme"])
})

run(program)
