/**
 * A small ledger over HTTP: `npm start`.
 *
 * `PORT` is where it listens (3000), `DATABASE_URL` the PostgreSQL that it uses instead of its own, `REPORTING_URL` a
 * replica of that for its reports.
 */
import { HttpServer } from "@effect/platform"
import { NodeRuntime } from "@effect/platform-node"
import { Config, Console, Effect, Layer } from "effect"
import { DatabaseLive, Home, MigrationsLive } from "./database.js"
import { serve } from "./server.js"
import { sentence } from "./sentence.js"

/** 0 is any port that is free. */
const port = Config.integer("PORT").pipe(
  Config.validate({ message: "is not a port", validation: (port) => port >= 0 && port <= 65_535 }),
  Config.withDefault(3000)
)

const welcome = Effect.gen(function* () {
  const home = yield* Home
  const { address } = yield* HttpServer.HttpServer
  const url = `http://127.0.0.1:${address._tag === "TcpAddress" ? address.port : ""}`
  yield* Console.log(`
The ledger listens on ${url} and keeps its data ${home}.
Open two accounts, put money into the first, and send some of it to the second:

  curl ${url}/accounts -d '{"name":"ada"}'; curl ${url}/accounts -d '{"name":"grace"}'
  curl ${url}/accounts/1/deposits -d '{"amount":10000,"note":"salary"}'
  curl ${url}/transfers -H 'Idempotency-Key: rent-may' -d '{"from":1,"to":2,"amount":2550,"note":"rent"}'
  curl ${url}/reports/daily

Ctrl-C stops it.
`)
})

const ServiceLive = Layer.unwrapEffect(
  Effect.map(port, (port) =>
    Layer.effectDiscard(welcome).pipe(Layer.provide(serve(port)), Layer.provide(MigrationsLive))
  )
).pipe(Layer.provide(DatabaseLive))

NodeRuntime.runMain(
  Effect.tapErrorCause(Layer.launch(ServiceLive), (cause) => Console.error(sentence(cause))),
  {
    disableErrorReporting: true
  }
)
