/**
 * One connection for several queries, without a transaction around them; and several statements in one round trip.
 */
import { DbConnection, DbEngine, DbSession } from "effect-db"
import { Effect } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const pid = Effect.flatMap(DbEngine, ({ sql }) => sql<{ readonly pid: number }>`SELECT pg_backend_pid() AS pid`).pipe(
  Effect.map((rows) => rows[0]!.pid)
)

const program = Effect.gen(function* () {
  yield* say("borrowed once, used by every statement inside")
  const pids = yield* Effect.all([pid, pid, pid]).pipe(DbConnection.withConnection)
  yield* show("backends", Effect.succeed(new Set(pids).size), 1)
  yield* show("borrowed afterwards", borrowed, 0)

  const { sql } = yield* DbEngine
  yield* say("a batch: three statements, one transaction, one round trip")
  const [, , counted] = yield* DbSession.batch([
    sql`INSERT INTO users ${sql.insert({ name: "ada" })}`,
    sql`INSERT INTO users ${sql.insert({ name: "grace" })}`,
    sql<{ readonly count: number }>`SELECT count(*)::integer AS count FROM users`
  ])
  yield* show("counted in the same batch", Effect.succeed(counted[0]!.count), 2)

  yield* say("all or nothing")
  yield* DbSession.batch([
    sql`INSERT INTO users ${sql.insert({ name: "edsger" })}`,
    sql`INSERT INTO users ${sql.insert({ name: "ada" })}`
  ]).pipe(Effect.ignore)
  yield* show("kept", users, ["ada", "grace"])
})

run(program)
