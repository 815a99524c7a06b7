/**
 * Where the ledger is kept: on the server of `DATABASE_URL`, else on one that this process starts itself. Reports are
 * read from the server of `REPORTING_URL`, a replica, else from the same one over a few connections of their own, so
 * that they never take those of the transfers.
 */
import { DbRegistry } from "effect-db"
import { EmbeddedServer } from "effect-db/embedded"
import { Config, Context, Effect, Layer, Option, Redacted } from "effect"
import { migrate } from "./migrations/index.js"

/** Where that is, in words. */
export class Home extends Context.Tag("Home")<Home, string>() {}

export const databases = (primary: Redacted.Redacted, reporting = primary) =>
  DbRegistry.layer(
    {
      default: { url: primary, connect: "eager", applicationName: "ledger" },
      // the ledger is in order without its reports
      reporting: {
        url: reporting,
        connect: "lazy",
        applicationName: "ledger reports",
        readOnly: true,
        statementTimeout: "30 seconds",
        maxConnections: 2
      }
    },
    { replicas: { default: "reporting" } }
  )

const url = (name: string) =>
  Effect.map(
    Config.option(Config.redacted(name)),
    Option.filter((url) => Redacted.value(url) !== "")
  )

export const DatabaseLive = Layer.unwrapScoped(
  Effect.gen(function* () {
    const given = yield* url("DATABASE_URL")
    const reporting = Option.getOrUndefined(yield* url("REPORTING_URL"))
    if (Option.isSome(given)) {
      return Layer.merge(databases(given.value, reporting), Layer.succeed(Home, "on the server of DATABASE_URL"))
    }
    const dataDir = yield* EmbeddedServer.defaultDataDir()
    const server = yield* EmbeddedServer.start({ dataDir, database: "ledger" })
    return Layer.merge(databases(server.url, reporting), Layer.succeed(Home, `in ${dataDir}`))
  })
)

export const MigrationsLive = Layer.effectDiscard(migrate)
