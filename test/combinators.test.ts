/**
 * Every function that takes an effect, in every form in which it may be called, at the root and on a database of another
 * name: the compiler knows what comes out, and it runs where it says.
 */
import type { SqlError } from "@effect/sql/SqlError"
import type { Statement } from "@effect/sql/Statement"
import { expect, it } from "@effect/vitest"
import { Context, Data, Effect, Layer, Logger, LogLevel, Option, type Stream } from "effect"
import {
  Database,
  DbConnection,
  DbEngine,
  DbError,
  DbQuery,
  DbRegistry,
  DbSchema,
  DbSession,
  type Session,
  withTransaction
} from "effect-db"
import { DbTest } from "effect-db/testing"
import { describe, expectTypeOf } from "vitest"
import { testDatabase } from "./support/database.js"

const database = testDatabase()
const other = testDatabase()
const Analytics = Database.make("analytics")

class Needed extends Context.Tag("test/Needed")<Needed, { readonly n: number }>() {}
class Mine extends Data.TaggedError("Mine")<{}> {}

/** A: literal; E and R: something of the program's own. */
const given: Effect.Effect<"value", Mine, Needed> = Effect.as(Needed, "value" as const)

type Of<Name extends string> = Effect.Effect<"value", Mine | SqlError, Needed | DbEngine<Name>>
type Own = Of<"default">
type Other = Of<"analytics">
type Read<Name extends string = "default"> = Effect.Effect<
  "value",
  Mine | SqlError,
  Needed | DbEngine<Name> | DbRegistry.DbRegistry
>

describe("what comes out, for the compiler", () => {
  it("sessions, connections and blocks of another database, in every form", () => {
    const { atomic, DbConnection, DbSession, withTransaction } = Analytics
    expectTypeOf(DbSession.autocommit(given)).toEqualTypeOf<Other>()
    expectTypeOf(DbSession.autocommit(given, { readOnly: true })).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(DbSession.autocommit)).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(DbSession.autocommit({ readOnly: true }))).toEqualTypeOf<Other>()
    expectTypeOf([given].map(DbSession.autocommit)).toEqualTypeOf<Array<Other>>()
    expectTypeOf(DbSession.isolated(given)).toEqualTypeOf<Other>()
    expectTypeOf(DbSession.isolated(given, { readOnly: true })).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(DbSession.isolated)).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(DbSession.isolated({ readOnly: true }))).toEqualTypeOf<Other>()
    expectTypeOf([given].map(DbSession.isolated)).toEqualTypeOf<Array<Other>>()
    expectTypeOf(DbConnection.withConnection(given)).toEqualTypeOf<Other>()
    expectTypeOf(DbConnection.withConnection(given, { lazy: true })).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(DbConnection.withConnection)).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(DbConnection.withConnection({ lazy: true }))).toEqualTypeOf<Other>()
    expectTypeOf([given].map(DbConnection.withConnection)).toEqualTypeOf<Array<Other>>()
    expectTypeOf(withTransaction(given)).toEqualTypeOf<Other>()
    expectTypeOf(withTransaction(given, { retry: true })).toEqualTypeOf<Other>()
    expectTypeOf(withTransaction((_tx) => given, { retry: true })).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(withTransaction)).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(withTransaction({ retry: true }))).toEqualTypeOf<Other>()
    expectTypeOf([given].map(withTransaction)).toEqualTypeOf<Array<Other>>()
    expectTypeOf(atomic(given)).toEqualTypeOf<Other>()
    expectTypeOf(atomic(given, { retry: true })).toEqualTypeOf<Other>()
    expectTypeOf(atomic((_tx) => given)).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(atomic)).toEqualTypeOf<Other>()
    expectTypeOf(given.pipe(atomic({ retry: true }))).toEqualTypeOf<Other>()
    expectTypeOf([given].map(atomic)).toEqualTypeOf<Array<Other>>()
  })

  it("in a function that is generic itself", () => {
    const around = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E | SqlError, R | DbEngine> =>
      effect.pipe(withTransaction, DbSession.autocommit({ readOnly: true }), DbConnection.withConnection)
    expectTypeOf(around(given)).toEqualTypeOf<Own>()
  })

  it("what only reads: the database is the one that the options name", () => {
    const { readOnly } = DbRegistry
    const options: DbRegistry.ReadOnlyOptions<"analytics"> = { database: Analytics }
    expectTypeOf(readOnly(given)).toEqualTypeOf<Read>()
    expectTypeOf(readOnly(given, { timeout: "1 second" })).toEqualTypeOf<Read>()
    expectTypeOf(readOnly(given, { database: Analytics })).toEqualTypeOf<Read<"analytics">>()
    expectTypeOf(readOnly(given, options)).toEqualTypeOf<Read<"analytics">>()
    expectTypeOf(given.pipe(readOnly)).toEqualTypeOf<Read>()
    expectTypeOf(given.pipe(readOnly({ after: "0/1" }))).toEqualTypeOf<Read>()
    expectTypeOf(given.pipe(readOnly({ database: undefined }))).toEqualTypeOf<Read>()
    expectTypeOf(given.pipe(readOnly({ database: Analytics }))).toEqualTypeOf<Read<"analytics">>()
    expectTypeOf(given.pipe(readOnly(options))).toEqualTypeOf<Read<"analytics">>()
    expectTypeOf([given].map(readOnly)).toEqualTypeOf<Array<Read>>()
    // @ts-expect-error a misspelt option
    void readOnly(given, { databse: Analytics })
    // @ts-expect-error the same, among others
    void given.pipe(readOnly({ timeout: 1, databse: Analytics }))
  })

  it("using: by vocabulary or by name", () => {
    type Named = Effect.Effect<"value", Mine | SqlError, Needed | DbRegistry.DbRegistry>
    type There = Effect.Effect<"value", Mine, Needed | DbEngine<"analytics">>
    const written: Effect.Effect<"value", Mine, Needed | DbEngine | DbSession> = Effect.zipRight(DbSession, given)
    expectTypeOf(DbRegistry.using(written, "analytics")).toEqualTypeOf<Named>()
    expectTypeOf(DbRegistry.using(written, Analytics)).toEqualTypeOf<There>()
    expectTypeOf(written.pipe(DbRegistry.using("analytics"))).toEqualTypeOf<Named>()
    expectTypeOf(written.pipe(DbRegistry.using(Analytics))).toEqualTypeOf<There>()
    expectTypeOf([written].map(DbRegistry.using("analytics"))).toEqualTypeOf<Array<Named>>()
    expectTypeOf([written].map(DbRegistry.using(Analytics))).toEqualTypeOf<Array<There>>()
  })

  it("schemas and tenants", () => {
    for (const within of [DbSchema.withSchema, DbSchema.withTenant, DbSchema.using]) {
      expectTypeOf(within(given, "acme")).toEqualTypeOf<Own>()
      expectTypeOf(given.pipe(within("acme"))).toEqualTypeOf<Own>()
      expectTypeOf([given].map(within(["acme", "public"]))).toEqualTypeOf<Array<Own>>()
    }
    for (const within of [Analytics.DbSchema.withSchema, Analytics.DbSchema.withTenant, Analytics.DbSchema.using]) {
      expectTypeOf(within(given, "acme")).toEqualTypeOf<Other>()
      expectTypeOf(given.pipe(within("acme"))).toEqualTypeOf<Other>()
      expectTypeOf([given].map(within("acme"))).toEqualTypeOf<Array<Other>>()
    }
    expectTypeOf(given.pipe(DbSchema.requireTenant)).toEqualTypeOf<Own>()
    expectTypeOf([given].map(DbSchema.requireTenant)).toEqualTypeOf<Array<Own>>()
    expectTypeOf(given.pipe(Analytics.DbSchema.requireTenant)).toEqualTypeOf<Other>()
    expectTypeOf([given].map(Analytics.DbSchema.requireTenant)).toEqualTypeOf<Array<Other>>()
  })

  it("of a session: detach, use, hooks, tokens", () => {
    type Used = Effect.Effect<"value", Mine | SqlError, Needed>
    type Hooked<R> = Effect.Effect<void, SqlError, Needed | R>
    expectTypeOf(given.pipe(DbSession.detach)).toEqualTypeOf<typeof given>()
    expectTypeOf([given].map(Analytics.DbSession.detach)).toEqualTypeOf<Array<typeof given>>()
    const inSession = (session: Session) => {
      expectTypeOf(session.use(given)).toEqualTypeOf<Used>()
      expectTypeOf(given.pipe(session.use)).toEqualTypeOf<Used>()
      expectTypeOf([given].map(session.use)).toEqualTypeOf<Array<Used>>()
      expectTypeOf(given.pipe(session.afterCommit)).toEqualTypeOf<Hooked<never>>()
    }
    void inSession
    const hook: Effect.Effect<"value", SqlError, Needed> = Effect.orDie(given)
    expectTypeOf(hook.pipe(DbSession.beforeCommit)).toEqualTypeOf<Hooked<DbEngine>>()
    expectTypeOf([given].map(DbSession.afterCommit)).toEqualTypeOf<Array<Hooked<DbEngine>>>()
    expectTypeOf(given.pipe(DbSession.afterRollback)).toEqualTypeOf<Hooked<DbEngine>>()
    expectTypeOf(given.pipe(Analytics.DbSession.afterCommit)).toEqualTypeOf<Hooked<DbEngine<"analytics">>>()
    // @ts-expect-error before a commit it fails as the commit would
    void given.pipe(DbSession.beforeCommit)
    type Token<Name extends string> = Effect.Effect<
      readonly ["value", Option.Option<string>],
      Mine | SqlError,
      Needed | DbEngine<Name>
    >
    expectTypeOf(given.pipe(DbSession.withCommitToken)).toEqualTypeOf<Token<"default">>()
    expectTypeOf([given].map(Analytics.DbSession.withCommitToken)).toEqualTypeOf<Array<Token<"analytics">>>()
  })

  it("of tests", () => {
    type Traced<Name extends string> = Effect.Effect<readonly ["value", DbTest.Trace], Mine, Needed | DbEngine<Name>>
    const kit = DbTest.of(Analytics)
    expectTypeOf(given.pipe(DbTest.sandbox)).toEqualTypeOf<Own>()
    expectTypeOf([given].map(DbTest.sandbox)).toEqualTypeOf<Array<Own>>()
    expectTypeOf(given.pipe(kit.sandbox)).toEqualTypeOf<Other>()
    expectTypeOf([given].map(kit.sandbox)).toEqualTypeOf<Array<Other>>()
    expectTypeOf(DbTest.trace(given)).toEqualTypeOf<Traced<"default">>()
    expectTypeOf(given.pipe(DbTest.trace)).toEqualTypeOf<Traced<"default">>()
    expectTypeOf([given].map(kit.trace)).toEqualTypeOf<Array<Traced<"analytics">>>()
  })

  it("of errors", () => {
    type Caught = Effect.Effect<"value" | 1, Mine, Needed>
    const one = () => Effect.succeed(1 as const)
    expectTypeOf(DbError.catchReason(given, "UniqueViolation", one)).toEqualTypeOf<Caught>()
    expectTypeOf(given.pipe(DbError.catchReason("UniqueViolation", one))).toEqualTypeOf<Caught>()
    expectTypeOf([given].map(DbError.catchReason("UniqueViolation", one))).toEqualTypeOf<Array<Caught>>()
    expectTypeOf(DbError.catchReasons(given, { UniqueViolation: one })).toEqualTypeOf<Caught>()
    expectTypeOf(given.pipe(DbError.catchReasons({ UniqueViolation: one }))).toEqualTypeOf<Caught>()
    expectTypeOf([given].map(DbError.catchReasons({ UniqueViolation: one }))).toEqualTypeOf<Array<Caught>>()
  })

  it("of statements", () => {
    const ofStatement = (statement: Statement<{ readonly n: number }>, statements: Array<typeof statement>) => {
      type Row<A> = Effect.Effect<A, SqlError>
      expectTypeOf(statement.pipe(DbQuery.one)).toEqualTypeOf<Row<{ readonly n: number }>>()
      expectTypeOf(statements.map(DbQuery.one)).toEqualTypeOf<Array<Row<{ readonly n: number }>>>()
      expectTypeOf(DbQuery.oneOrNone(statement)).toEqualTypeOf<Row<Option.Option<{ readonly n: number }>>>()
      expectTypeOf(statements.map(DbQuery.first)).toEqualTypeOf<Array<Row<Option.Option<{ readonly n: number }>>>>()
      expectTypeOf(DbQuery.scalar<number>(statement)).toEqualTypeOf<Row<Option.Option<number>>>()
      expectTypeOf(statements.map(DbQuery.status)).toEqualTypeOf<Array<Row<DbQuery.CommandStatus>>>()
      expectTypeOf(statements.map(DbQuery.copyTo)).toEqualTypeOf<Array<Stream.Stream<Uint8Array, SqlError>>>()
    }
    void ofStatement
  })
})

type AnyEffect = Effect.Effect<any, any, any>
type Call = (...args: ReadonlyArray<any>) => any

const only = (effects: ReadonlyArray<AnyEffect>): AnyEffect =>
  Effect.map(Effect.all(effects), ([only]) => only as unknown)

const live = () =>
  DbRegistry.layer(
    { default: { url: database.url }, analytics: { url: other.url } },
    { replicas: { default: "analytics", analytics: "default" } }
  )

/** Runs each form with both databases, and looks what became of the effect in it. */
const forms = <A>(name: string, forms: () => Readonly<Record<string, AnyEffect>>, expected: () => A): void => {
  it.live(
    name,
    () =>
      Effect.forEach(
        Object.entries(forms()),
        ([form, effect]) => Effect.map(effect, (found) => expect(found, form).toEqual(expected())),
        { discard: true }
      ).pipe(Effect.provide(Layer.provide(live(), Logger.minimumLogLevel(LogLevel.Error)))) as Effect.Effect<
        void,
        unknown
      >
  )
}

describe("it runs where it says", () => {
  const isSome = <A, E, R>(effect: Effect.Effect<Option.Option<A>, E, R>) => Effect.map(effect, Option.isSome)
  for (const [name, vocabulary] of [
    ["the default database", Database.make("default")],
    ["another one", Analytics]
  ] as const) {
    const { atomic, DbConnection, DbEngine, DbSchema, DbSession, DbTransaction, withTransaction } =
      vocabulary as Database.Database<any>
    const every = (f: Call, options: object, effect: AnyEffect): Readonly<Record<string, AnyEffect>> => ({
      "f(effect)": f(effect),
      "f(effect, options)": f(effect, options),
      "effect.pipe(f)": effect.pipe(f),
      "effect.pipe(f(options))": effect.pipe(f(options) as Call),
      "effect.pipe(f({}))": effect.pipe(f({}) as Call),
      "effect.pipe(f())": effect.pipe(f() as Call),
      "[effect].map(f)": only([effect].map(f)),
      "Effect.forEach([effect], f)": Effect.map(Effect.forEach([effect], f), ([only]) => only as unknown)
    })
    const is = () => true
    describe(name, () => {
      forms("autocommit", () => every(DbSession.autocommit, { name: "s" }, isSome(DbSession.current)), is)
      forms("isolated", () => every(DbSession.isolated, { name: "s" }, isSome(DbSession.current)), is)
      forms("withConnection", () => every(DbConnection.withConnection, { name: "c" }, isSome(DbConnection.current)), is)
      forms("withTransaction", () => every(withTransaction, { name: "t" }, isSome(DbTransaction.current)), is)
      forms("atomic", () => every(atomic, { name: "a" }, isSome(DbTransaction.current)), is)

      const tx = (tx: { readonly depth: number }) => Effect.succeed(tx.depth === 1)
      forms("blocks with a body", () => ({ a: withTransaction(tx), b: withTransaction(tx, {}), c: atomic(tx) }), is)

      const place = Effect.flatMap(DbEngine, ({ sql }) =>
        Effect.map(DbQuery.scalar<string>(sql`SELECT current_database()`), Option.getOrThrow)
      )
      const replica = () => (vocabulary.name === "default" ? other : database).database
      const { readOnly } = DbRegistry
      const options = { database: vocabulary }
      forms(
        "readOnly",
        () =>
          vocabulary.name === "default"
            ? every(readOnly, options, place)
            : {
                "f(effect, options)": readOnly(place, options),
                "effect.pipe(f(options))": place.pipe(readOnly(options))
              },
        replica
      )

      const path = Effect.map(DbSchema.current, Option.getOrThrow)
      for (const within of ["withSchema", "withTenant", "using"] as const) {
        forms(
          within,
          () => ({
            "f(effect, path)": DbSchema[within](path, "acme"),
            "effect.pipe(f(path))": path.pipe(DbSchema[within]("acme")),
            "[effect].map(f(path))": only([path].map(DbSchema[within]("acme")))
          }),
          () => '"acme"'
        )
      }

      const plain = (f: Call, effect: AnyEffect): Readonly<Record<string, AnyEffect>> => ({
        "f(effect)": f(effect),
        "effect.pipe(f)": effect.pipe(f),
        "[effect].map(f)": only([effect].map(f))
      })
      const each = (all: Readonly<Record<string, AnyEffect>>, f: (effect: AnyEffect) => AnyEffect) =>
        Object.fromEntries(Object.entries(all).map(([form, effect]) => [form, f(effect)]))
      const kit = DbTest.of(vocabulary as Database.Database<any>)
      forms(
        "detach",
        () => each(plain(DbSession.detach, isSome(DbSession.current)), DbSession.autocommit),
        () => false
      )
      forms(
        "requireTenant",
        () => each(plain(DbSchema.requireTenant, path), DbSchema.withTenant("acme")),
        () => '"acme"'
      )
      forms(
        "sandbox",
        () => plain(kit.sandbox, isSome(DbSession.current)),
        () => false
      )
      forms(
        "trace",
        () =>
          each(
            plain(kit.trace, place),
            Effect.map((found) => (found as any)[1].statements.length)
          ),
        () => 1
      )
      forms(
        "withCommitToken",
        () =>
          each(
            plain(DbSession.withCommitToken, Effect.succeed(1)),
            Effect.map((found) => (found as any)[0])
          ),
        () => 1
      )
      forms(
        "session.use",
        () => ({
          all: Effect.scoped(
            Effect.flatMap(DbSession.make(), (session) =>
              Effect.map(Effect.all(plain(session.use, isSome(DbSession.current))), (found) =>
                Object.values(found).every((_) => _ === true)
              )
            )
          )
        }),
        is
      )
    })
  }

  const where = Effect.flatMap(DbEngine, ({ sql }) =>
    Effect.map(DbQuery.scalar<string>(sql`SELECT current_database()`), Option.getOrThrow)
  )
  forms(
    "using",
    () => ({
      "f(effect, name)": DbRegistry.using(where, "analytics"),
      "f(effect, database)": DbRegistry.using(where, Analytics),
      "effect.pipe(f(name))": where.pipe(DbRegistry.using("analytics")),
      "effect.pipe(f(database))": where.pipe(DbRegistry.using(Analytics)),
      "[effect].map(f(name))": only([where].map(DbRegistry.using("analytics")))
    }),
    () => other.database
  )

  const bad = Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT * FROM nowhere`)
  const caught = () => Effect.succeed("caught")
  forms(
    "catchReason and catchReasons",
    () => ({
      "f(effect, tag, g)": DbError.catchReason(bad, "SqlSyntaxError", caught),
      "effect.pipe(f(tag, g))": bad.pipe(DbError.catchReason("SqlSyntaxError", caught)),
      "f(effect, cases)": DbError.catchReasons(bad, { SqlSyntaxError: caught }),
      "effect.pipe(f(cases))": bad.pipe(DbError.catchReasons({ SqlSyntaxError: caught })),
      "[effect].map(f(cases))": only([bad].map(DbError.catchReasons({ SqlSyntaxError: caught })))
    }),
    () => "caught"
  )
})
