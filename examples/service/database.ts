/** Where the ledger is kept: on the server of `DATABASE_URL`, else on one that this process starts itself. */
import { DbLayer } from "effect-db"
import { DbEmbedded, EmbeddedServer } from "effect-db/embedded"
import { Config, Context, Effect, Layer, Option, Redacted } from "effect"
import { migrate } from "./migrations/index.js"

/** Where that is, in words. */
export class Home extends Context.Tag("Home")<Home, string>() {}

const given = (url: Redacted.Redacted) =>
  Layer.merge(
    DbLayer({ url, connect: "eager", applicationName: "ledger" }),
    Layer.succeed(Home, "on the server of DATABASE_URL")
  )

const embedded = Effect.map(EmbeddedServer.defaultDataDir(), (dataDir) =>
  Layer.merge(
    DbEmbedded.layer({ dataDir, database: "ledger", engine: { applicationName: "ledger" } }),
    Layer.succeed(Home, `in ${dataDir}`)
  )
)

export const DatabaseLive = Layer.unwrapEffect(
  Effect.gen(function* () {
    const url = yield* Config.option(Config.redacted("DATABASE_URL"))
    return yield* Option.match(
      Option.filter(url, (url) => Redacted.value(url) !== ""),
      {
        onNone: () => embedded,
        onSome: (url) => Effect.succeed(given(url))
      }
    )
  })
)

export const MigrationsLive = Layer.effectDiscard(migrate)
