/**
 * The engine in an application: built once, at the edge, by a layer; opened by the first use; drained at the end.
 */
import { DbEngine, DbError, DbLayer } from "effect-db"
import { Effect, Fiber, Layer, Schedule } from "effect"
import { Databases, run, say, show, users } from "./support.js"

/** What an application is made of; none of it knows where the database is. */
class Registrar extends Effect.Service<Registrar>()("examples/Registrar", {
  effect: Effect.gen(function* () {
    const { sql } = yield* DbEngine // captured once: it runs in whatever session is around each call
    return { register: (name: string) => sql`INSERT INTO users ${sql.insert({ name })}` }
  })
}) {}

const application = Effect.gen(function* () {
  const { register } = yield* Registrar
  yield* show(
    "connections before the first use",
    Effect.map(DbEngine.stats, (_) => _.total),
    0
  )
  yield* DbEngine.ping
  yield* show(
    "connections after it",
    Effect.map(DbEngine.stats, (_) => _.total),
    1
  )
  yield* register("ada")
  return yield* users
})

const program = Effect.gen(function* () {
  const url = yield* (yield* Databases).make("application")
  const live = Layer.provideMerge(Registrar.Default, DbLayer({ url, maxConnections: 5 }))
  yield* show("the application", Effect.provide(application, live), ["ada"])

  yield* say("closing the engine waits for work in hand, and refuses what comes later")
  const { engine, work } = yield* Effect.scoped(
    Effect.gen(function* () {
      const engine = yield* DbEngine.make({ url: yield* (yield* Databases).make("another") })
      const work = yield* Effect.forkDaemon(engine.sql`SELECT pg_sleep(0.2)`)
      yield* Effect.repeat(engine.stats, { until: (stats) => stats.used === 1, schedule: Schedule.spaced("1 millis") })
      return { engine, work }
    })
  )
  yield* show(
    "the work in hand",
    Effect.map(Fiber.join(work), (rows) => rows.length),
    1
  )
  const late = engine.ping.pipe(
    Effect.as("ran"),
    DbError.catchReason("PoolClosed", (reason) => Effect.succeed(reason._tag))
  )
  yield* show("a late one", late, "PoolClosed")
})

run(program)
