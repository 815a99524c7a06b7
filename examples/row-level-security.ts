/**
 * Row-level security: settings that last as long as the transaction, travel with BEGIN, and reach nobody else.
 */
import { DbEngine, DbSession, withTransaction } from "effect-db"
import { Effect } from "effect"
import { randomBytes } from "node:crypto"
import { run, say, show, users } from "./support.js"

/** Owners and superusers see every row; the application is neither. */
const role = `example_application_${randomBytes(4).toString("hex")}`

const prepare = Effect.gen(function* () {
  const { sql } = yield* DbEngine
  yield* sql`ALTER TABLE users ADD COLUMN tenant text NOT NULL DEFAULT current_setting('app.tenant', true)`
  yield* sql`ALTER TABLE users ENABLE ROW LEVEL SECURITY`
  // after a reset a custom setting is '' and not NULL
  yield* sql`CREATE POLICY own_tenant ON users USING (tenant = nullif(current_setting('app.tenant', true), ''))`
  yield* Effect.acquireRelease(sql`CREATE ROLE ${sql(role)}`, () =>
    Effect.orDie(Effect.zipRight(sql`DROP OWNED BY ${sql(role)}`, sql`DROP ROLE ${sql(role)}`))
  )
  yield* sql`GRANT SELECT, INSERT ON users TO ${sql(role)}`
})

const as = (tenant: string) => DbSession.autocommit({ settings: { role, "app.tenant": tenant } })

const insert = (name: string) => Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO users ${sql.insert({ name })}`)

const program = Effect.gen(function* () {
  yield* prepare
  yield* say("the settings ride with BEGIN and the first statement")
  yield* insert("ada").pipe(as("acme"))
  yield* insert("grace").pipe(as("globex"))
  yield* show("acme sees", users.pipe(as("acme")), ["ada"])
  yield* show("globex sees", users.pipe(as("globex")), ["grace"])
  yield* show("nobody in particular sees", users.pipe(DbSession.autocommit({ settings: { role } })), [])

  yield* say("an inner block may change them; they are restored at its end")
  const inside = Effect.gen(function* () {
    const inner = yield* users.pipe(withTransaction({ settings: { "app.tenant": "globex" } }))
    return [...inner, ...(yield* users)]
  })
  yield* show("inside, then outside", inside.pipe(as("acme")), ["grace", "ada"])
})

run(program)
