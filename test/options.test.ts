import { describe, expect, it } from "@effect/vitest"
import { Effect, Redacted } from "effect"
import { Database, DbConnection, DbEngine, DbError, DbLayer, DbSession, withTransaction } from "effect-db"
import type { DbOptions } from "effect-db"
import { resolve } from "../src/DbOptions.js"
import { testDatabase } from "./support/database.js"
import { expectAtRest, quietly } from "./support/programs.js"

const database = testDatabase()

const one = Effect.flatMap(
  DbSession,
  ({ sql }) => sql<{ name: string }>`SELECT current_setting('app.name', true) AS name`
)

describe("effects in the options", () => {
  it.live("afterConnect is given the engine's services and runs on the new connection", () =>
    Effect.gen(function* () {
      expect((yield* one)[0]?.name).toBe("set")
      yield* expectAtRest(database)
    }).pipe(
      Effect.provide(
        DbLayer({
          url: database.url,
          afterConnect: Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT set_config('app.name', 'set', false)`)
        })
      )
    )
  )

  it.live("beforeSession is given the engine's services", () =>
    Effect.gen(function* () {
      yield* DbSession.autocommit(one)
      yield* expectAtRest(database)
    }).pipe(
      Effect.provide(
        DbLayer({
          url: database.url,
          // The same host: nothing happens, and the session is opened.
          beforeSession: DbEngine.changeHost({ host: database.host, port: database.port })
        })
      )
    )
  )

  for (const [name, inside] of [
    ["runs a statement", DbEngine.ping],
    ["runs a statement by the client", Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT 1`)],
    ["opens a session", DbSession.autocommit(one)],
    ["opens an isolated session", DbSession.isolated(one)],
    ["opens a detached transaction", DbSession.detach(withTransaction(one))],
    ["takes a connection", DbConnection.withConnection(DbSession.autocommit(one))]
  ] as const) {
    it.live(`beforeSession that ${name} runs once for each session, and not in it`, () => {
      let runs = 0
      const beforeSession = Effect.zipRight(
        Effect.sync(() => void runs++),
        inside
      )
      return Effect.gen(function* () {
        yield* DbSession.autocommit(one)
        expect(runs).toBe(1)
        yield* DbConnection.withConnection(withTransaction(Effect.all([one, one], { concurrency: 2 })))
        expect(runs).toBe(2)
        yield* expectAtRest(database)
      }).pipe(Effect.provide(DbLayer({ url: database.url, beforeSession })))
    })
  }

  it.live("beforeCommit is given the engine's services and runs inside", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* sql`CREATE TABLE notes (text text)`
      const note = Effect.flatMap(DbSession, (db) => db.sql`INSERT INTO notes VALUES ('before commit')`)
      yield* DbSession.autocommit(sql`SELECT 1`, { beforeCommit: note })
      expect(yield* sql`SELECT text FROM notes`).toEqual([{ text: "before commit" }])
      yield* expectAtRest(database)
    }).pipe(Effect.provide(DbLayer({ url: database.url })))
  )

  it.live("those of another database are written for the default one and run on their own", () => {
    const Other = Database.make("options-other")
    return Effect.gen(function* () {
      const rows = yield* Effect.flatMap(
        Other.DbEngine,
        ({ sql }) => sql<{ name: string }>`SELECT current_setting('app.name', true) AS name`
      )
      expect(rows[0]?.name).toBe("other")
      yield* Effect.provideServiceEffect(expectAtRest(database), DbEngine, Other.DbEngine)
    }).pipe(
      Effect.provide(
        Other.DbLayer({
          url: database.url,
          afterConnect: Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT set_config('app.name', 'other', false)`)
        })
      )
    )
  })
})

describe("options that can't be meant", () => {
  const refused: ReadonlyArray<readonly [name: string, values: ReadonlyArray<unknown>]> = [
    ["acquireTimeout", [-1, NaN, "-5 seconds", "soon"]],
    ["blockTimeout", [-1, NaN]],
    ["drainTimeout", [-1, NaN]],
    ["idleTimeout", [-1, NaN]],
    ["validateAfter", [-1, NaN]],
    ["leakTimeout", [-1, NaN]],
    ["slowStatement", [-1, NaN]],
    ["statementTimeout", [-5, NaN]],
    ["lockTimeout", [-5, NaN]],
    ["idleInTransactionTimeout", [-5, NaN]],
    ["transactionTimeout", [-5, NaN]],
    ["connectTimeout", [0, -1, NaN]],
    ["connectionTTL", [0, "0 millis", -1]],
    ["settleTimeout", [0, -1]],
    ["healthTimeout", [0, -1]],
    ["isolation", ["bogus"]],
    ["readOnly", ["yes"]],
    ["deferrable", [1]],
    ["connect", ["bogus"]],
    ["pipelining", ["off"]],
    ["loadBalanceHosts", ["yes"]],
    ["operationMetrics", ["yes"]]
  ]
  it.each(refused)("%s: InvalidInput, which names it and says what is allowed", (name, values) =>
    Effect.runPromise(
      Effect.forEach(
        values,
        (value) =>
          Effect.gen(function* () {
            const error = yield* Effect.flip(Effect.scoped(DbEngine.make({ url: database.url, [name]: value })))
            expect(DbError.reason(error)).toMatchObject({ _tag: "InvalidInput" })
            expect(error.message).toContain(name)
            expect(DbError.reason(error)?.hint).toMatch(/^(Write|Give|Choose) /)
          }),
        { discard: true }
      )
    )
  )

  const encode = "encoded by encodeURIComponent."
  const unencoded = "The port in the url is not a number. Is a / or ? in the password not encoded (encodeURIComponent)?"
  it.live.each<readonly [options: object, message: string]>([
    [{ password: "secret" }, "The option password is a string. Give Redacted.make(password)."],
    [{ url: 5 }, "The option url is neither a string nor a Redacted."],
    [{ url: Redacted.make(5) }, "The option url is neither a string nor a Redacted."],
    [{ url: null }, "The option url is neither a string nor a Redacted."],
    [{ url: "http://secret" }, encode],
    [{ url: "postgres://ada@corp:sec/ret@db/app" }, unencoded],
    [{ url: "postgres://a:1,b:secret/app" }, unencoded],
    [{ maxConnections: "5" }, 'The option maxConnections is "5". It is a whole number, 1 or more.'],
    [{ maxConnections: NaN }, "The option maxConnections is NaN."]
  ])("%o: InvalidInput that says what is wrong with it", ([options, message]) =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(Effect.scoped(DbEngine.make(options)))
      expect(DbError.reason(error)?._tag).toBe("InvalidInput")
      expect(error.message).toContain(message)
      expect(error.message).not.toContain("secret")
    })
  )

  it.live("an effect that yields a password that is no Redacted is a typed error", () =>
    Effect.gen(function* () {
      const options = { url: database.url, password: Effect.succeed("secret") as never }
      const error = yield* Effect.flip(Effect.provide(DbEngine.ping, quietly(DbLayer(options))))
      expect(DbError.reason(error)?._tag).toBe("AuthenticationError")
      expect(String((error.cause as Error).message)).toContain("Yield Redacted.make(password).")
      expect(error.message).not.toContain("secret")
    })
  )

  it.live("a time of 0 that means something, and Infinity, are taken", () => {
    const off = ["statementTimeout", "lockTimeout", "idleInTransactionTimeout"]
    const atOnce = ["acquireTimeout", "blockTimeout", "drainTimeout", "idleTimeout", "validateAfter", "slowStatement"]
    const limits = ["acquireTimeout", "connectTimeout", "connectionTTL", "settleTimeout", "healthTimeout"]
    const given = (names: ReadonlyArray<string>, value: number) => names.map((name) => ({ [name]: value }))
    return Effect.forEach(
      [...given([...off, ...atOnce, "leakTimeout"], 0), ...given([...limits, "leakTimeout"], Infinity)],
      (options) => Effect.scoped(DbEngine.make({ url: database.url, ...options })),
      { discard: true }
    )
  })
})

describe("DbLayer.env", () => {
  const names = [
    ...["DATABASE_URL", "PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGAPPNAME", "PGCONNECT_TIMEOUT"],
    ...["PGOPTIONS", "PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS", "PGCHANNELBINDING", "PGSSLNEGOTIATION"],
    ...["PGSSLCRL", "PGSERVICE", "PGGSSENCMODE"]
  ]
  /** Of these names the process has those variables and no others. */
  const withVariables = <A, E, R>(variables: Record<string, string>, effect: Effect.Effect<A, E, R>) =>
    Effect.acquireUseRelease(
      Effect.sync(() => {
        const before = { ...process.env }
        for (const name of names) delete process.env[name]
        Object.assign(process.env, variables)
        return before
      }),
      () => effect,
      (before) =>
        Effect.sync(() => {
          for (const name of names) delete process.env[name]
          Object.assign(process.env, before)
        })
    )
  const where = (variables: Record<string, string>) =>
    Effect.flatMap(DbEngine, ({ sql }) => sql<{ database: string }>`SELECT current_database() AS database`).pipe(
      Effect.map(([row]) => row!.database),
      Effect.provide(quietly(DbLayer.env)),
      (effect) => withVariables(variables, effect)
    )
  const all = {
    PGHOST: database.host,
    PGPORT: String(database.port),
    PGUSER: database.user,
    PGPASSWORD: Redacted.value(database.password),
    PGDATABASE: database.database
  }
  const empty = Object.fromEntries(names.map((name) => [name, ""]))

  it.live("DATABASE_URL wins over the others, unless it is empty", () =>
    Effect.gen(function* () {
      expect(yield* where({ ...all, PGPORT: "1", DATABASE_URL: database.url })).toBe(database.database)
      expect(yield* where({ ...all, DATABASE_URL: "" })).toBe(database.database)
    })
  )

  it.live("an empty variable is as none", () =>
    Effect.gen(function* () {
      expect(yield* where({ ...empty, DATABASE_URL: database.url })).toBe(database.database)
      // As libpq: the database with the name of the user, where there is one.
      const [own] = yield* database.query("SELECT FROM pg_database WHERE datname = $1", [database.user])
      if (own !== undefined) expect(yield* where({ ...all, PGDATABASE: "" })).toBe(database.user)
    })
  )

  for (const [name, options] of [
    ["DbLayer.env", undefined],
    ["the options", {}]
  ] as const) {
    it.scopedLive(`empty variables are as none: ${name} mean libpq's host and port`, () =>
      Effect.gen(function* () {
        const layer = quietly(options === undefined ? DbLayer.env : DbLayer(options))
        const host = Effect.provide(
          Effect.map(DbEngine, ({ host }) => host),
          layer
        )
        expect(yield* withVariables(empty, host)).toEqual({ host: "localhost", port: 5432 })
      })
    )
  }

  it.live("PGAPPNAME and PGOPTIONS are those of each connection, unless the url or an option says otherwise", () =>
    Effect.gen(function* () {
      const setting = (name: string) =>
        Effect.flatMap(DbEngine, ({ sql }) => sql<{ value: string }>`SELECT current_setting(${name}) AS value`).pipe(
          Effect.map(([row]) => row!.value)
        )
      const said = (layer: typeof DbLayer.env) =>
        Effect.all([setting("application_name"), setting("work_mem")]).pipe(Effect.provide(quietly(layer)), (effect) =>
          withVariables({ ...all, PGAPPNAME: "shop", PGOPTIONS: "-c work_mem=6MB" }, effect)
        )
      expect(yield* said(DbLayer.env)).toEqual(["shop", "6MB"])
      expect(yield* said(DbLayer({ url: database.url }))).toEqual(["shop", "6MB"])
      const url = `${database.url}?application_name=till&options=${encodeURIComponent("-c work_mem=7MB")}`
      expect(yield* said(DbLayer({ url }))).toEqual(["till", "7MB"])
      expect(yield* said(DbLayer({ url: `${database.url}?fallback_application_name=till` }))).toEqual(["shop", "6MB"])
      expect(yield* said(DbLayer({ applicationName: "desk" }))).toEqual(["desk", "6MB"])
    })
  )

  it.live("PGCONNECT_TIMEOUT is seconds; 0 and less is no limit, and what is no number is InvalidInput", () =>
    Effect.gen(function* () {
      const millis = (value: string, options: DbOptions = {}) =>
        withVariables(
          { PGCONNECT_TIMEOUT: value },
          Effect.map(resolve(options), ({ connectMillis }) => connectMillis)
        )
      expect(yield* millis("7")).toBe(7000)
      expect(yield* millis("")).toBe(5000)
      expect(yield* millis("0")).toBe(yield* millis("-1"))
      expect(yield* millis("0")).toBeGreaterThan(1e9)
      expect(yield* millis("7", { url: `${database.url}?connect_timeout=3` })).toBe(3000)
      expect(yield* millis("7", { connectTimeout: "2 seconds" })).toBe(2000)
      const error = yield* Effect.flip(millis("s3cret"))
      expect(error).toMatchObject({ reason: { _tag: "InvalidInput" } })
      expect(error.message).toContain("PGCONNECT_TIMEOUT")
      expect(error.message).not.toContain("s3cret")
    })
  )

  it.live(
    "the other variables stand in for the url's parameters, and a value that can't be meant is InvalidInput",
    () =>
      Effect.gen(function* () {
        const variables = {
          PGTARGETSESSIONATTRS: "read-write",
          PGLOADBALANCEHOSTS: "random",
          PGCHANNELBINDING: "require"
        }
        const meant = { attrs: "read-write", loadBalance: true, channelBinding: "require" }
        expect(yield* withVariables(variables, resolve({}))).toMatchObject(meant)
        for (const name of [...Object.keys(variables), "PGSSLNEGOTIATION"]) {
          const error = yield* Effect.flip(withVariables({ [name]: "s3cret" }, resolve({})))
          expect(error).toMatchObject({ reason: { _tag: "InvalidInput" } })
          expect(error.message).toContain(name)
          expect(error.message).not.toContain("s3cret")
        }
      })
  )

  it.live("variables that ask for more safety or for another server, and are not read, are told of", () =>
    Effect.gen(function* () {
      const ignored = (variables: Record<string, string>) =>
        withVariables(
          variables,
          Effect.map(resolve({}), ({ ignored }) => ignored)
        )
      expect(yield* ignored({ PGSSLCRL: "/crl.pem", PGSERVICE: "shop", PGGSSENCMODE: "require" })).toEqual([
        "PGSSLCRL",
        "PGSERVICE",
        "PGGSSENCMODE"
      ])
      expect(yield* ignored({ PGSSLCRL: "", PGGSSENCMODE: "prefer" })).toEqual([])
    })
  )

  it.live("one that is no number is an error of the configuration", () =>
    Effect.map(Effect.flip(where({ ...all, PGPORT: "abc" })), (error) => {
      expect(String(error)).toContain("Expected an integer value")
    })
  )
})
