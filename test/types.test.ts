/**
 * What the combinators add to an effect's type, in every form in which they are called. The compiler checks it; the
 * runner only sees to it that building the effects runs nothing.
 */
import type * as PgClient from "@effect/sql-pg/PgClient"
import type * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import { HttpServerResponse } from "@effect/platform"
import { Config, Context, Data, Effect, Layer, type Option, Record as Records, type Scope } from "effect"
import {
  atomic,
  Database,
  DbConnection,
  DbEngine,
  DbError,
  DbHttp,
  DbLayer,
  type DbOptions,
  DbRegistry,
  DbRuntime,
  DbSchema,
  DbSession,
  DbTransaction,
  type HookServices,
  type ManualTransaction,
  type Session,
  type Transaction,
  withTransaction
} from "effect-db"
import { DbTest } from "effect-db/testing"
import { describe, expectTypeOf, it } from "vitest"

class Needed extends Context.Tag("test/Needed")<Needed, { readonly n: number }>() {}
class Mine extends Data.TaggedError("Mine")<{}> {}

/** A: literal; E and R: something of the program's own. */
const given: Effect.Effect<"value", Mine, Needed> = Effect.as(Needed, "value" as const)
const Analytics = Database.make("analytics")

type Combined<Engine = DbEngine> = Effect.Effect<"value", Mine | SqlError, Needed | Engine>
type CombinedPlain<Engine = DbEngine> = Effect.Effect<number, SqlError, Engine>

describe("every form keeps A, E and R, and adds SqlError and the engine", () => {
  it("DbSession.autocommit", () => {
    expectTypeOf(DbSession.autocommit(given)).toEqualTypeOf<Combined>()
    expectTypeOf(DbSession.autocommit(given, { isolation: "serializable" })).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbSession.autocommit)).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbSession.autocommit({ readOnly: true }))).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbSession.autocommit({}))).toEqualTypeOf<Combined>()
    expectTypeOf([given].map(DbSession.autocommit)).toEqualTypeOf<Array<Combined>>()
    expectTypeOf(Records.map({ a: given }, DbSession.autocommit)).toEqualTypeOf<Record<"a", Combined>>()
    expectTypeOf(Effect.forEach([given], DbSession.autocommit, { concurrency: 2 })).toEqualTypeOf<
      Effect.Effect<Array<"value">, Mine | SqlError, Needed | DbEngine>
    >()
  })

  it("DbSession.isolated", () => {
    expectTypeOf(DbSession.isolated(given)).toEqualTypeOf<Combined>()
    expectTypeOf(DbSession.isolated(given, { name: "job" })).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbSession.isolated)).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbSession.isolated({ lockTimeout: "1 second" }))).toEqualTypeOf<Combined>()
    expectTypeOf([given].map(DbSession.isolated)).toEqualTypeOf<Array<Combined>>()
  })

  it("DbConnection.withConnection", () => {
    expectTypeOf(DbConnection.withConnection(given)).toEqualTypeOf<Combined>()
    expectTypeOf(DbConnection.withConnection(given, { lazy: true })).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbConnection.withConnection)).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbConnection.withConnection({ reuse: false }))).toEqualTypeOf<Combined>()
    expectTypeOf([given].map(DbConnection.withConnection)).toEqualTypeOf<Array<Combined>>()
  })

  it("withTransaction", () => {
    expectTypeOf(withTransaction(given)).toEqualTypeOf<Combined>()
    expectTypeOf(withTransaction(given, { propagation: "required" })).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(withTransaction)).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(withTransaction({ isolation: "serializable", retry: true }))).toEqualTypeOf<Combined>()
    expectTypeOf([given].map(withTransaction)).toEqualTypeOf<Array<Combined>>()
  })

  it("atomic", () => {
    expectTypeOf(atomic(given)).toEqualTypeOf<Combined>()
    expectTypeOf(atomic(given, { currentTransaction: "append" })).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(atomic)).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(atomic({ verifyOutcome: true }))).toEqualTypeOf<Combined>()
    expectTypeOf([given].map(atomic)).toEqualTypeOf<Array<Combined>>()
  })

  it("an effect that needs nothing and can't fail", () => {
    const number = Effect.succeed(1 as number)
    expectTypeOf(number.pipe(DbSession.autocommit)).toEqualTypeOf<CombinedPlain>()
    expectTypeOf(number.pipe(withTransaction)).toEqualTypeOf<CombinedPlain>()
    expectTypeOf(Effect.all([number, number].map(DbSession.isolated), { concurrency: 2 })).toEqualTypeOf<
      Effect.Effect<Array<number>, SqlError, DbEngine>
    >()
  })

  it("several in a row", () => {
    expectTypeOf(
      given.pipe(withTransaction, DbSession.autocommit, DbConnection.withConnection)
    ).toEqualTypeOf<Combined>()
  })
})

describe("withTransaction((tx) => ...) and atomic((tx) => ...)", () => {
  it("give the block and keep A, E and R of what the function returns", () => {
    expectTypeOf(
      withTransaction((tx) => {
        expectTypeOf(tx).toEqualTypeOf<Transaction>()
        return given
      })
    ).toEqualTypeOf<Combined>()
    expectTypeOf(withTransaction((_) => given, { name: "outer" })).toEqualTypeOf<Combined>()
    expectTypeOf(
      atomic((tx) => {
        expectTypeOf(tx.depth).toEqualTypeOf<number>()
        return given
      })
    ).toEqualTypeOf<Combined>()
  })

  it("tx.end does not widen the success", () => {
    expectTypeOf(withTransaction((tx) => Effect.zipRight(given, tx.end("rollback")))).toEqualTypeOf<
      Effect.Effect<never, Mine | SqlError, Needed | DbEngine>
    >()
    expectTypeOf(
      withTransaction((tx) => Effect.if(true, { onTrue: () => given, onFalse: () => tx.end("commit", "value") }))
    ).toEqualTypeOf<Combined>()
  })
})

describe("a body that says what its block may be ended with", () => {
  it("is held to it, and the block's type is either", () => {
    const found = withTransaction((tx: Transaction<string>) => {
      // @ts-expect-error the block ends with a string
      void tx.end("commit", 1)
      // @ts-expect-error and not with nothing
      void tx.end("commit")
      return Effect.zipRight(tx.end("commit", "early"), given)
    })
    expectTypeOf(found).toEqualTypeOf<Effect.Effect<"value" | string, Mine | SqlError, Needed | DbEngine>>()
  })

  it("may leave out a value that may be undefined", () => {
    const found = atomic((tx: Transaction<void>) => Effect.zipRight(tx.end("rollback"), given))
    expectTypeOf(found).toEqualTypeOf<Effect.Effect<"value" | void, Mine | SqlError, Needed | DbEngine>>()
  })
})

describe("Scope forms, layers and handles", () => {
  it("add Scope and the engine", () => {
    type Scoped<A> = Effect.Effect<A, SqlError, Scope.Scope | DbEngine>
    expectTypeOf(DbSession.scoped()).toEqualTypeOf<Scoped<Session>>()
    expectTypeOf(DbSession.make({ autocommit: true })).toEqualTypeOf<Scoped<Session>>()
    expectTypeOf(DbTransaction.scoped()).toEqualTypeOf<Scoped<Transaction>>()
    expectTypeOf(Effect.asVoid(DbConnection.acquire())).toEqualTypeOf<Scoped<void>>()
    expectTypeOf(DbSession.begin()).toEqualTypeOf<Effect.Effect<ManualTransaction, SqlError, DbEngine>>()
  })

  it("layers provide what they are named after", () => {
    expectTypeOf(DbSession.layer()).toEqualTypeOf<Layer.Layer<DbSession, SqlError, DbEngine>>()
    expectTypeOf(DbConnection.layer()).toEqualTypeOf<Layer.Layer<DbConnection, SqlError, DbEngine>>()
    expectTypeOf(DbLayer({})).toEqualTypeOf<
      Layer.Layer<DbEngine | DbConnection | DbSession | SqlClient.SqlClient | PgClient.PgClient, SqlError>
    >()
  })

  it("effects of the module need the engine only, those of a handle nothing", () => {
    expectTypeOf(DbSession.commit).toEqualTypeOf<Effect.Effect<void, SqlError, DbEngine>>()
    expectTypeOf(DbSession.commitAll).toEqualTypeOf<Effect.Effect<void, SqlError>>()
    expectTypeOf(DbSession.current).toEqualTypeOf<Effect.Effect<Option.Option<Session>, SqlError, DbEngine>>()
    expectTypeOf(DbTransaction.current).toEqualTypeOf<Effect.Effect<Option.Option<Transaction>, never, DbEngine>>()
    expectTypeOf(DbSession).toHaveProperty("detach")
    expectTypeOf(DbSession.detach(given)).toEqualTypeOf<typeof given>()
    expectTypeOf<Session["commit"]>().toEqualTypeOf<Effect.Effect<void, SqlError>>()
    expectTypeOf<ReturnType<Session["use"]>>().toEqualTypeOf<Effect.Effect<unknown, unknown, unknown>>()
    expectTypeOf(DbSession.afterCommit(given)).toEqualTypeOf<Effect.Effect<void, SqlError, Needed | DbEngine>>()
  })

  it("the error is a SqlError with a reason", () => {
    expectTypeOf<DbError>().toExtend<SqlError>()
    const caught = DbError.catchReason(given.pipe(withTransaction), "UniqueViolation", (reason) => {
      expectTypeOf(reason.constraint).toEqualTypeOf<string | undefined>()
      return Effect.succeed("taken" as const)
    })
    expectTypeOf(caught).toEqualTypeOf<Effect.Effect<"value" | "taken", Mine | SqlError, Needed | DbEngine>>()
  })
})

describe("two databases can't be confused", () => {
  it("each adds its own engine", () => {
    expectTypeOf(given.pipe(Analytics.DbSession.autocommit)).toEqualTypeOf<Combined<DbEngine<"analytics">>>()
    expectTypeOf(given.pipe(Analytics.withTransaction({ retry: true }))).toEqualTypeOf<
      Combined<DbEngine<"analytics">>
    >()
    expectTypeOf(given.pipe(Analytics.atomic)).toEqualTypeOf<Combined<DbEngine<"analytics">>>()
    expectTypeOf(given.pipe(Analytics.withTransaction, withTransaction)).toEqualTypeOf<
      Combined<DbEngine | DbEngine<"analytics">>
    >()
    expectTypeOf<DbEngine>().not.toEqualTypeOf<DbEngine<"analytics">>()
    expectTypeOf<DbSession>().not.toEqualTypeOf<DbSession<"analytics">>()
  })

  it("the layer of one does not provide the other's", () => {
    const program = Effect.succeed(1 as number).pipe(Analytics.DbSession.autocommit)
    // @ts-expect-error the default database is not analytics
    const wrong: Effect.Effect<number, SqlError> = program.pipe(Effect.provide(DbLayer({})))
    const right: Effect.Effect<number, SqlError> = program.pipe(Effect.provide(Analytics.DbLayer({})))
    void [wrong, right]
  })

  it("only the default one provides the ecosystem's client", () => {
    expectTypeOf(Analytics.DbLayer({})).toEqualTypeOf<
      Layer.Layer<DbEngine<"analytics"> | DbConnection<"analytics"> | DbSession<"analytics">, SqlError>
    >()
    expectTypeOf(Analytics.sqlClientLayer).toEqualTypeOf<
      Layer.Layer<SqlClient.SqlClient | PgClient.PgClient, never, DbEngine<"analytics">>
    >()
  })
})

describe("the edges are of one database each", () => {
  type Other = DbEngine<"analytics">
  type OtherServices = Other | DbConnection<"analytics"> | DbSession<"analytics">

  it("DbSchema", () => {
    expectTypeOf(DbSchema.withTenant(given, "acme")).toEqualTypeOf<Combined>()
    expectTypeOf(given.pipe(DbSchema.withSchema(["acme", "public"]))).toEqualTypeOf<Combined>()
    expectTypeOf(DbSchema.requireTenant(given)).toEqualTypeOf<Combined>()
    expectTypeOf(DbSchema.create("acme")).toEqualTypeOf<Effect.Effect<void, SqlError, DbEngine>>()
    expectTypeOf<DbSchema.SchemaPath>().toEqualTypeOf<string | ReadonlyArray<string>>()
    expectTypeOf(Analytics.DbSchema.withTenant(given, "acme")).toEqualTypeOf<Combined<Other>>()
    expectTypeOf(given.pipe(Analytics.DbSchema.using("acme"))).toEqualTypeOf<Combined<Other>>()
    expectTypeOf(Analytics.DbSchema.requireTenant(given)).toEqualTypeOf<Combined<Other>>()
    expectTypeOf(Analytics.DbSchema.current).toEqualTypeOf<Effect.Effect<Option.Option<string>, never, Other>>()
    expectTypeOf(Analytics.DbSchema.drop("acme")).toEqualTypeOf<Effect.Effect<void, SqlError, Other>>()
  })

  it("DbTest", () => {
    const kit = DbTest.of(Analytics)
    expectTypeOf(DbTest.sandbox(given)).toEqualTypeOf<Combined>()
    expectTypeOf(kit.sandbox(given)).toEqualTypeOf<Combined<Other>>()
    expectTypeOf(kit.sandboxLayer).toEqualTypeOf<Layer.Layer<OtherServices, SqlError, Other>>()
    expectTypeOf<Layer.Layer.Success<ReturnType<typeof kit.layer>>>().toEqualTypeOf<OtherServices>()
    expectTypeOf<Effect.Effect.Success<ReturnType<typeof kit.database>>["layer"]>().toEqualTypeOf<
      Layer.Layer<OtherServices, SqlError>
    >()
  })

  it("DbRuntime", () => {
    const both = DbRuntime.make(Layer.merge(DbLayer({}), Analytics.DbLayer({})))
    // Never called: it would run.
    const run = () => both.run(Effect.zipRight(DbSession.commit, Effect.as(Analytics.DbSession.commit, 1 as number)))
    const session = () => both.of(Analytics).session(() => "value" as const)
    expectTypeOf(run).returns.toEqualTypeOf<Promise<number>>()
    expectTypeOf(session).returns.toEqualTypeOf<Promise<"value">>()
    const one = DbRuntime.make(Analytics.DbLayer({}), Analytics)
    expectTypeOf(one).toEqualTypeOf<DbRuntime.DbRuntime<OtherServices, SqlError>>()
    // @ts-expect-error its layer does not provide the default database
    void one.of(Database.make("default"))
    // @ts-expect-error nor does it, when nothing is said
    void DbRuntime.make(Analytics.DbLayer({}))
    // @ts-expect-error the layer is another database's
    void DbRuntime.make(DbLayer({}), Analytics)
  })

  it("DbHttp", () => {
    const app = Effect.as(Needed, HttpServerResponse.empty())
    type Engines<App extends Effect.Effect<any, any, any>> = Extract<Effect.Effect.Context<App>, DbEngine<any>>
    const enginesOf = <App extends Effect.Effect<any, any, any>>(_app: App): Engines<App> => undefined as never
    expectTypeOf(enginesOf(DbHttp.middleware()(app))).toEqualTypeOf<DbEngine>()
    expectTypeOf(enginesOf(DbHttp.middleware({ databases: [Analytics] })(app))).toEqualTypeOf<Other>()
    expectTypeOf(enginesOf(DbHttp.middleware({ databases: [Database.make("default"), Analytics] })(app))).toEqualTypeOf<
      DbEngine | Other
    >()
  })
})

describe("what must not compile", () => {
  it("options that are none, and arguments that are no effect", () => {
    // @ts-expect-error no such isolation level
    void given.pipe(withTransaction({ isolation: "chaos" }))
    // @ts-expect-error no such propagation
    void withTransaction(given, { propagation: "always" })
    // @ts-expect-error propagation is not an option of atomic
    void atomic(given, { propagation: "never" })
    // @ts-expect-error no such mode
    void given.pipe(atomic({ currentTransaction: "drop" }))
    // @ts-expect-error a number is no effect
    void DbSession.autocommit(1)
    // @ts-expect-error the function has to return an effect
    void withTransaction((_tx) => 1)
    // @ts-expect-error options of a session have no propagation
    void DbSession.autocommit(given, { propagation: "nested" })
    // @ts-expect-error a misspelt option among others
    void given.pipe(DbSession.autocommit({ name: "x", isolaton: "serializable" }))
    // @ts-expect-error an option of atomic among those of a transaction
    void given.pipe(withTransaction({ retry: true, currentTransaction: "append" }))
    // @ts-expect-error a misspelt option of a connection
    void given.pipe(DbConnection.withConnection({ reuse: false, lazi: true }))
  })

  it("an engine that was not provided", () => {
    // @ts-expect-error DbEngine is missing
    const program: Effect.Effect<number, SqlError> = Effect.succeed(1 as number).pipe(DbSession.autocommit)
    void program
  })
})

describe("effects in the options", () => {
  const Billing = Database.make("billing")
  const plain: DbOptions = { url: "postgres://host", afterConnect: DbEngine.ping }
  const own: DbOptions<"analytics"> = { url: "postgres://host", afterConnect: Analytics.DbEngine.ping }

  it("of the default database may need its services, and no other's", () => {
    expectTypeOf<HookServices>().toEqualTypeOf<
      DbEngine | DbConnection | DbSession | SqlClient.SqlClient | PgClient.PgClient
    >()
    void DbLayer({ afterConnect: Effect.flatMap(DbConnection, (_) => _.pid), beforeSession: DbEngine.ping })
    // @ts-expect-error written for another database
    void DbLayer({ afterConnect: Analytics.DbEngine.ping })
    // @ts-expect-error the same
    void DbLayer(own)
    // @ts-expect-error the same
    void given.pipe(DbSession.autocommit({ beforeCommit: Analytics.DbEngine.ping }))
    // @ts-expect-error a service of the program's own, which nobody gives it
    void DbLayer({ beforeSession: Needed })
  })

  it("of another one may be written in its words, and in the default one's", () => {
    void Analytics.DbLayer(own)
    void Analytics.DbLayer(plain)
    void Analytics.DbLayer({ beforeSession: Analytics.DbEngine.changeHost({ host: "other" }) })
    void Analytics.DbLayer.config({ afterConnect: Config.succeed(Analytics.DbEngine.ping) })
    void Analytics.DbEngine.make(own)
    void Analytics.DbSession.scoped({ beforeCommit: Analytics.DbSession.commit })
    const hooked = { beforeCommit: Effect.zipRight(DbEngine.ping, Analytics.DbEngine.ping) }
    expectTypeOf(given.pipe(Analytics.DbSession.autocommit(hooked))).toEqualTypeOf<Combined<DbEngine<"analytics">>>()
    expectTypeOf(Analytics.DbSession.isolated(given, hooked)).toEqualTypeOf<Combined<DbEngine<"analytics">>>()
    // @ts-expect-error the words of a third one
    void Billing.DbLayer(own)
    // @ts-expect-error the words of a third one
    void Analytics.DbSession.isolated(given, { beforeCommit: Billing.DbEngine.ping })
  })

  it("of an entry of the registry: in the words of its name", () => {
    const enginesOf = <R, E>(_layer: Layer.Layer<R, E>): Extract<R, DbEngine<any>> => undefined as never
    expectTypeOf(
      enginesOf(DbRegistry.layer({ default: plain, analytics: { ...own, connect: "lazy" }, billing: plain }))
    ).toEqualTypeOf<DbEngine | DbEngine<"analytics"> | DbEngine<"billing">>()
    // @ts-expect-error another one's
    void DbRegistry.layer({ default: plain, billing: own })
    // @ts-expect-error the default one has no other's
    void DbRegistry.layer({ default: own, analytics: own })
  })

  it("of tests, promise code and requests", () => {
    const kit = DbTest.of(Analytics)
    void kit.layer(own)
    void kit.database({ ...own, prefix: "own" })
    void kit.template({ ...own, version: 1 }, Analytics.DbEngine.ping)
    // @ts-expect-error the default one's kit
    void DbTest.layer(own)
    const runtime = DbRuntime.make(Analytics.DbLayer(own), Analytics)
    expectTypeOf(runtime.session<void>).toBeCallableWith(() => {}, { beforeCommit: Analytics.DbEngine.ping })
    expectTypeOf(runtime.of(Analytics)).toExtend<DbRuntime.PromiseSessions>()
    void DbHttp.middleware({ databases: [Analytics], beforeCommit: Analytics.DbEngine.ping })
    void DbHttp.middleware({ databases: [Analytics, Billing], beforeCommit: Billing.DbEngine.ping })
    // @ts-expect-error the hook says nothing about which databases there are
    void DbHttp.middleware({ beforeCommit: Analytics.DbEngine.ping })
  })
})
