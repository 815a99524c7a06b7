/**
 * What a project exports with `declaration: true`, all of it inferred: `npm run pack:check` compiles it against the
 * tarball. The compiler has to find a public name for every type of ours that is in it.
 */
import { HttpApp, HttpRouter, HttpServer, HttpServerResponse } from "@effect/platform"
import { Model, SqlClient, SqlSchema } from "@effect/sql"
import { Config, Context, Effect, Layer, Redacted, Schema, Stream } from "effect"
import {
  Database,
  DbConnection,
  DbEngine,
  DbError,
  DbHttp,
  DbLayer,
  DbQuery,
  DbRegistry,
  DbResolver,
  DbRuntime,
  DbSchema,
  DbSession,
  DbTransaction,
  atomic,
  sqlClientLayer,
  withTransaction
} from "effect-db"
import { DbEmbedded, EmbeddedServer } from "effect-db/embedded"
import { DbTest } from "effect-db/testing"

const url = Redacted.make("postgres://localhost/shop")

// sessions
export const register = (name: string) =>
  Effect.gen(function* () {
    const db = yield* DbSession
    yield* db.sql`INSERT INTO users ${db.sql.insert({ name })}`
    return db
  })
export const both = Effect.all([register("ada"), register("grace")])
export const committed = DbSession.autocommit(both)
export const piped = both.pipe(DbSession.autocommit({ isolation: "serializable" }))
export const apart = [register("ada")].map(DbSession.isolated)
export const withOptions = DbSession.isolated({ name: "report" })
export const opened = DbSession.scoped()
export const made = DbSession.make({ autocommit: true })
export const inSession = DbSession.layer()
export const session = DbSession.current
export const state = DbSession.state
export const begun = DbSession.begin()
export const savepoint = Effect.flatMap(DbSession, (db) => db.savepoint({ name: "inner" }))
export const hooked = DbSession.afterCommit(both)
export const written = DbSession.withCommitToken(both)
export const waited = DbSession.waitFor("0/3000148", { timeout: "1 second" })
export const batch = Effect.flatMap(DbSession, ({ sql }) =>
  DbSession.batch([sql<{ readonly id: number }>`SELECT 1 AS id`, sql`SELECT 2`])
)
export const detached = DbSession.detach(both)
export const { autocommit, isolated } = DbSession

// engines and connections
export const engine = DbEngine.make({ url })
export const engineLayer = DbEngine.layer({ url })
export const stats = DbEngine.stats
export const health = DbEngine.health
export const service = Effect.map(DbEngine, (_) => _)
export const used = DbConnection.withConnection(both)
export const borrowed = DbConnection.acquire({ lazy: true })
export const raw = DbConnection.raw
export const status = DbConnection.status
export const connection = DbConnection.current

// blocks
export const block = withTransaction(both)
export const retried = both.pipe(withTransaction({ retry: true, propagation: "requiresNew" }))
export const chosen = withTransaction((tx) => Effect.zipRight(register("ada"), tx.end("commit", "early")))
export const afresh = atomic(both, { currentTransaction: "append" })
export const around = withTransaction
export const here = DbTransaction.current
export const manual = DbTransaction.scoped({ name: "manual" })
export const modules = { DbConnection, DbEngine, DbSession, DbTransaction, DbSchema, DbLayer, atomic, withTransaction }

// services
export class Users extends Effect.Service<Users>()("Users", {
  effect: Effect.gen(function* () {
    const db = yield* DbSession
    const { sql } = yield* DbConnection
    return {
      db,
      sql,
      register,
      find: (name: string) => DbQuery.one(db.sql<{ readonly name: string }>`SELECT ${name} AS name`),
      add: (name: string) => register(name).pipe(withTransaction)
    }
  })
}) {}
export class Accounts extends Context.Tag("Accounts")<
  Accounts,
  { readonly open: Effect.Effect<void, DbError, DbSession> }
>() {}
export const accounts = Layer.effect(
  Accounts,
  Effect.map(DbSession, (db) => ({ open: Effect.orDie(db.sql`SELECT 1`) }))
)
export const usersLive = Users.Default.pipe(Layer.provideMerge(DbLayer({ url })))

// errors
export const failed = DbError.make("UniqueViolation", {})
export const reason = DbError.reason(failed)
export const reported = both.pipe(DbError.catchReason("UniqueViolation", (reason) => Effect.succeed(reason)))
export const named = DbError.catchReason("ConnectionError", (reason, error) => Effect.succeed([reason, error] as const))
export const several = both.pipe(
  DbError.catchReasons({
    CheckViolation: () => Effect.fail("overdrawn" as const),
    ForeignKeyViolation: (reason) => Effect.succeed(reason),
    AcquireTimeout: (reason) => Effect.fail(reason.holders)
  })
)
export const { catchReason, catchReasons } = DbError
export const reasons = {
  handler: { DeadlockError: (reason: DbError.ReasonOf<"DeadlockError">) => Effect.fail(reason) }
}
export const all = both.pipe(
  Effect.catchIf(DbError.is, (error) => Effect.succeed(error.reason)),
  Effect.either
)

// queries
export const oneRow = Effect.flatMap(DbSession, ({ sql }) => DbQuery.oneOrNone(sql<{ readonly a: 1 }>`SELECT 1 AS a`))
export const tag = Effect.flatMap(DbSession, ({ sql }) => DbQuery.status(sql`DELETE FROM users`))
export const copied = Effect.flatMap(DbSession, ({ sql }) =>
  DbQuery.copyFrom(sql`COPY users FROM STDIN`, Stream.make("ada\n"))
)
export const rows = Stream.unwrap(Effect.map(DbSession, ({ sql }) => sql`SELECT * FROM users`.stream))
export const query = DbQuery

// resolvers and models
export class User extends Model.Class<User>("User")({ id: Model.Generated(Schema.Number), name: Schema.String }) {}
export const byId = Effect.flatMap(DbSession, ({ sql }) =>
  DbResolver.findById("UserById", {
    Id: Schema.Number,
    Result: User,
    ResultId: (user) => user.id,
    execute: (ids) => sql`SELECT * FROM users WHERE ${sql.in("id", ids)}`
  })
)
export const inserts = Effect.flatMap(DbSession, ({ sql }) =>
  DbResolver.ordered("InsertUser", {
    Request: User.insert,
    Result: User,
    execute: (users) => sql`INSERT INTO users ${sql.insert(users).returning("*")}`
  })
)
export const loaders = DbResolver.makeDataLoaders(User, {
  tableName: "users",
  spanPrefix: "Users",
  idColumn: "id",
  window: "5 millis"
})
export const question = Effect.flatMap(byId, (users) => users.request(1))
export const found = Effect.flatMap(byId, (users) => users.execute(1))
export const schema = Effect.map(SqlClient.SqlClient, (sql) =>
  SqlSchema.findAll({ Request: Schema.Void, Result: User, execute: () => sql`SELECT * FROM users` })
)

// layers
export const live = DbLayer({ url, beforeSession: Effect.void })
export const fromConfig = DbLayer.config({ url: Config.redacted("DATABASE_URL") })
export const fromEnv = DbLayer.env
export const client = sqlClientLayer
export const provided = committed.pipe(Effect.provide(live))

// several databases
export const Analytics = Database.make("analytics")
export const event = Effect.gen(function* () {
  const db = yield* Analytics.DbSession
  yield* db.sql`INSERT INTO events DEFAULT VALUES`
  return { db, engine: yield* Analytics.DbEngine, connection: yield* Analytics.DbConnection }
})
export const events = Effect.zip(event, register("ada")).pipe(DbSession.autocommit, Analytics.DbSession.autocommit)
export const { DbSession: AnalyticsSession, withTransaction: inAnalytics } = Analytics
export const analyticsLive = Analytics.DbLayer({ url })
export const analyticsBlock = Analytics.withTransaction((tx) => Effect.as(event, tx.depth))
export class Events extends Effect.Service<Events>()("Events", {
  effect: Effect.map(Analytics.DbSession, (db) => ({ db, record: event.pipe(Analytics.atomic) }))
}) {}
export const registry = DbRegistry.layer(
  { default: { url }, analytics: { url } },
  { replicas: { default: "analytics" } }
)
export const names = Effect.map(DbRegistry.DbRegistry, (_) => _.names)
export const elsewhere = DbRegistry.using(committed, Analytics)
export const byName = committed.pipe(DbRegistry.using("analytics"))
export const readOnly = DbRegistry.readOnly(committed)
export const readEvents = event.pipe(DbRegistry.readOnly({ database: Analytics }))
export const registries = DbRegistry

// schemas
export const tenant = both.pipe(DbSchema.withTenant("acme"))
export const path = DbSchema.current
export const created = DbSchema.create("acme", { ifNotExists: true })
export const within = DbSchema.using
export const analyticsTenant = event.pipe(Analytics.DbSchema.requireTenant)

// HTTP
export const middleware = DbHttp.middleware()
export const ofBoth = DbHttp.middleware({ databases: [Database.make("default"), Analytics], readYourWrites: true })
export const router = HttpRouter.empty.pipe(
  HttpRouter.post("/users", Effect.as(register("ada"), HttpServerResponse.empty({ status: 201 })))
)
export const app = DbHttp.middleware()(router)
export const handler = HttpApp.toWebHandlerLayer(app, live)
export const server = HttpServer.serve(router, DbHttp.middleware())
export const streamed = DbHttp.keepOpen(HttpServerResponse.empty())

// promises
export const runtime = DbRuntime.make(live)
export const analyticsRuntime = DbRuntime.make(Analytics.DbLayer({ url }), Analytics)
export const ofAnalytics = DbRuntime.make(Layer.merge(live, Analytics.DbLayer({ url }))).of(Analytics)
export const withUsers = DbRuntime.make(usersLive)
export const inPromise = () => runtime.session(() => runtime.run(register("ada")))
export const inBlock = () => runtime.transaction((tx) => Promise.resolve(tx))

// tests
export const sandboxed = DbTest.sandbox(both)
export const sandboxLayer = DbTest.layer()
export const overEngine = DbTest.sandboxLayer
export const testDatabase = DbTest.database({ url, prefix: "shop" })
export const template = DbTest.template({ url, version: 1 }, both)
export const traced = DbTest.trace(committed)
export const ofEvents = DbTest.of(Analytics)
export const eventsDatabase = DbTest.of(Analytics).database({ url })

// the embedded server
export const embedded = DbEmbedded.layer()
export const embeddedOrUrl = DbEmbedded.layerOrUrl()
export const started = EmbeddedServer.start({ dataDir: ".data" })
export const whereItFailed = started.pipe(Effect.catchTag("EmbeddedError", (error) => Effect.succeed(error.reason)))
export const locally = committed.pipe(Effect.provide(DbEmbedded.layer({ dataDir: ".data" })))
