import { describe, expect, it } from "@effect/vitest"
import { Effect, Logger, LogLevel, Redacted } from "effect"
import { DbEngine, DbError, DbLayer, DbRuntime, type DbOptions } from "effect-db"
import * as Net from "node:net"
import { networkInterfaces } from "node:os"
import { inspect } from "node:util"
import { resolve } from "../src/DbOptions.js"
import { testDatabase } from "./support/database.js"
import { quietly } from "./support/programs.js"
import { proxy } from "./support/proxy.js"
import { errorOf, reasonOf } from "./support/wired.js"

const database = testDatabase()
const run = (text: string) => Effect.flatMap(DbEngine, ({ sql }) => sql.unsafe<Record<string, unknown>>(text))
const on = <A, E>(options: DbOptions, effect: Effect.Effect<A, E, DbEngine>) =>
  Effect.provide(effect, quietly(DbLayer(options)))
/** The test's own url with other parameters. */
const urlWith = (query: string) => `${database.url}?${query}`
const setting = (name: string) =>
  Effect.map(run(`SELECT current_setting('${name}', true) AS value`), ([row]) => row!["value"])
const settingOf = (query: string, name: string, options: DbOptions = {}) =>
  on({ url: urlWith(query), ...options }, setting(name))
const targetOf = (url: string, options: DbOptions = {}) =>
  Effect.map(resolve({ url, ...options }), (_) => ({
    hosts: _.target.hosts.map(({ host, port }) => `${host} ${port}`),
    database: _.target.database,
    username: _.target.username
  }))

/** The url of a role with this password, written so, for the scope. */
const role = (password: string, written = password) =>
  Effect.acquireRelease(
    Effect.as(
      database.query(`CREATE ROLE url_role LOGIN PASSWORD '${password.replaceAll("'", "''")}'`),
      `postgres://url_role:${written}@${database.host}:${database.port}/${database.database}`
    ),
    () => database.query("DROP ROLE url_role")
  )

describe("a password in a url", () => {
  for (const [password, written] of [
    ["a,b"],
    ["a@b"],
    ["a@b,c@d"],
    ["#a:b"],
    ["100%"],
    ["[a],b:c&+'"],
    ["a/b?c@d %", encodeURIComponent("a/b?c@d %")]
  ] as const) {
    it.scopedLive(`may have what is special in it: ${written ?? password}`, () =>
      Effect.gen(function* () {
        const url = yield* role(password, written)
        expect(yield* on({ url: Redacted.make(url) }, run("SELECT current_user AS me"))).toEqual([{ me: "url_role" }])
        const wrong = url.replace(/@[^@]*$/, (_) => `!${_}`)
        expect((yield* reasonOf(on({ url: wrong }, run("SELECT 1"))))._tag).toBe("AuthenticationError")
      })
    )
  }

  it.live("is shown nowhere, whatever is wrong with the url", () =>
    Effect.gen(function* () {
      for (const url of [
        "postgres://ada:secret1,secret2@127.0.0.1:1/app",
        "postgres://ada:secret1@secret2@127.0.0.1:1/app",
        "postgres://ada:x@secret1,secret2@127.0.0.1:1/app",
        "postgres://ada:secret1/secret2@127.0.0.1:1/app",
        "postgres://ada:12/secret2@127.0.0.1:1/app",
        "postgres://ada:12?secret2@127.0.0.1:1/app",
        "postgres://ada:12?secret1=secret2@127.0.0.1:1/app",
        "postgres://ada:secret1:secret2@127.0.0.1:x/app",
        "postgres://ada:%ff%secret2@127.0.0.1:1/app",
        "postgres://ada:secret1,secret2@[127.0.0.1:1/app",
        "postgres://ada@127.0.0.1:1/app?password=secret2&sslmode=verify-full&sslrootcert=secret1",
        "postgres://ada@127.0.0.1:1/app?password=secret2&connect_timeout=secret1"
      ]) {
        const lines: Array<string> = []
        const logger = Logger.make<unknown, void>(({ message }) => void lines.push(String(message)))
        const engine = DbEngine.make({ url, acquireTimeout: 100 })
        const error = yield* errorOf(
          Effect.scoped(
            Effect.flatMap(engine, (_) =>
              Effect.zipRight(
                Effect.sync(() => lines.push(inspect(_.host))),
                _.ping
              )
            )
          )
        ).pipe(Effect.provide(Logger.replace(Logger.defaultLogger, logger)))
        expect(["InvalidInput", "ConnectionError"]).toContain(error.reason._tag)
        expect([inspect(error, { depth: 9 }), JSON.stringify(error), String(error), ...lines].join()).not.toMatch(
          /secret\d/
        )
      }
    })
  )
})

describe("the hosts of a url", () => {
  it.live("are read as libpq writes them", () =>
    Effect.gen(function* () {
      for (const [url, ...hosts] of [
        ["postgres://h/d", "h 5432"],
        ["postgresql://u:p@h:1/d", "h 1"],
        ["postgres://u:p@a:1,b:2,c/d", "a 1", "b 2", "c 5432"],
        ["postgres://u:p,w@a,b/d", "a 5432", "b 5432"],
        ["postgres://[::1]:1,[::2]/d", "::1 1", "::2 5432"],
        ["postgres://u:p@[fe80::1%25eth0]:1/d", "fe80::1%eth0 1"],
        ["postgres://u:p@%2Fvar%2Frun:1/d", "/var/run 1"],
        ["postgres://u:p@/d?host=/var/run", "/var/run 5432"],
        ["postgres:///d?host=a,b&port=1,2", "a 1", "b 2"],
        ["postgres:///d?host=a,b&port=1", "a 1", "b 1"],
        ["postgres://u@:1/d", "localhost 1"]
      ] as const) {
        expect([url, yield* targetOf(url)]).toEqual([url, expect.objectContaining({ hosts, database: "d" })])
      }
      expect(yield* targetOf("postgres://a%40b:p@h/x%2Fy?user=&dbname=")).toEqual({
        hosts: ["h 5432"],
        database: "x/y",
        username: "a@b"
      })
    })
  )

  it.live("give way to the single options", () =>
    Effect.gen(function* () {
      const url = "postgres://u:p@a:1,b:2/d"
      for (const [options, ...hosts] of [
        [{ port: 3 }, "a 3", "b 3"],
        [{ host: "c" }, "c 5432"],
        [{ host: "c", port: 3 }, "c 3"],
        [{ path: "/run" }, "/run 5432"],
        [{ hosts: [{ host: "c" }, { host: "d", port: 4 }], port: 3 }, "c 3", "d 4"]
      ] as const) {
        expect((yield* targetOf(url, options)).hosts).toEqual(hosts)
      }
      expect((yield* targetOf("postgres://u:p@a:1/d", { host: "c" })).hosts).toEqual(["c 1"])
    })
  )

  it.live("that can't be told apart are refused", () =>
    Effect.gen(function* () {
      for (const url of [
        "mysql://h/d",
        "postgres://[::1/d",
        "postgres://[::1]x/d",
        "postgres://::1/d",
        "postgres://a,b,c:0/d",
        "postgres://a:1x/d",
        "postgres:///d?host=a,b,c&port=1,2"
      ]) {
        expect([url, (yield* reasonOf(targetOf(url)))._tag]).toEqual([url, "InvalidInput"])
      }
    })
  )

  const v6 = Object.values(networkInterfaces()).some((all) => all?.some((_) => _.address === "::1") === true)
  it.scopedLive.skipIf(!v6)("may be addresses of IPv6, tried in turn", () =>
    Effect.gen(function* () {
      const listener = yield* Effect.acquireRelease(
        Effect.async<Net.Server>((resume) => {
          const server = Net.createServer((socket) => {
            const other = Net.connect(database.port, database.host)
            socket
              .on("error", () => {})
              .pipe(other.on("error", () => {}))
              .pipe(socket)
          })
          server.listen(0, "::1", () => resume(Effect.succeed(server)))
        }),
        (server) => Effect.sync(() => server.close())
      )
      const { port } = listener.address() as Net.AddressInfo
      const url = database.url.replace(/@[^/]*/, `@[::1]:1,[::1]:${port}`)
      expect(yield* on({ url }, run("SELECT 1 AS one"))).toEqual([{ one: 1 }])
      expect(yield* on({ url: database.url.replace(/@[^/]*/, `@[::1]:${port}`) }, run("SELECT 1 AS one"))).toEqual([
        { one: 1 }
      ])
    })
  )
})

describe("the parameters of a url", () => {
  it.live("are the start-up parameters of each connection", () =>
    Effect.gen(function* () {
      for (const [query, name, value] of [
        ["application_name=shop", "application_name", "shop"],
        ["fallback_application_name=shop", "application_name", "shop"],
        ["application_name=shop&fallback_application_name=other", "application_name", "shop"],
        ["statement_timeout=1234", "statement_timeout", "1234ms"],
        ["lock_timeout=1234", "lock_timeout", "1234ms"],
        ["idle_in_transaction_session_timeout=1234", "idle_in_transaction_session_timeout", "1234ms"],
        ["options=-c%20work_mem%3D6MB", "work_mem", "6MB"],
        ["options=-c work_mem=6MB -c statement_timeout=1234", "statement_timeout", "1234ms"],
        ["client_encoding=UTF8", "client_encoding", "UTF8"]
      ] as const) {
        expect([query, yield* settingOf(query, name)]).toEqual([query, value])
      }
    })
  )

  it.live("give way to the option of the same meaning", () =>
    Effect.gen(function* () {
      expect(yield* settingOf("application_name=url", "application_name", { applicationName: "own" })).toBe("own")
      const limits = { statementTimeout: 2000, lockTimeout: 2000 }
      expect(yield* settingOf("statement_timeout=1", "statement_timeout", limits)).toBe("2s")
      expect(yield* settingOf("options=-c lock_timeout=1", "lock_timeout", limits)).toBe("2s")
    })
  )

  it.live("options survives a reset, and stands beside the limits of the engine", () =>
    on(
      { url: urlWith("options=-c search_path=app -c work_mem=6MB"), maxConnections: 1, statementTimeout: 2000 },
      Effect.gen(function* () {
        for (const text of ["SELECT 1", "SET search_path = other; SET work_mem = '9MB'", "RESET ALL", "DISCARD ALL"]) {
          yield* run(text)
          expect(yield* setting("search_path")).toBe("app")
          expect(yield* setting("work_mem")).toBe("6MB")
          expect(yield* setting("statement_timeout")).toBe("2s")
        }
      })
    )
  )

  it.live("options stands beside transactionTimeout, which wins", () =>
    Effect.gen(function* () {
      const [row] = yield* database.query<{ version: string }>(
        "SELECT current_setting('server_version_num') AS version"
      )
      if (Number(row!.version) < 170000) return
      const query = "options=-c search_path=app -c transaction_timeout=90000"
      yield* on(
        { url: urlWith(query), transactionTimeout: 2000 },
        Effect.gen(function* () {
          expect(yield* setting("search_path")).toBe("app")
          expect(yield* setting("transaction_timeout")).toBe("2s")
        })
      )
      expect(yield* settingOf("transaction_timeout=3000", "transaction_timeout")).toBe("3s")
    })
  )

  it("reach the connections of runSync", async () => {
    const runtime = DbRuntime.make(quietly(DbLayer({ url: urlWith("application_name=shop&options=-c work_mem=6MB") })))
    expect(runtime.runSync(setting("work_mem"))).toBe("6MB")
    expect(runtime.runSync(setting("application_name"))).toBe("shop")
    await runtime.close()
  })

  it.scopedLive("connect_timeout bounds the dial, in seconds", () =>
    Effect.gen(function* () {
      const through = yield* proxy(database.url)
      through.accept("silent")
      const url = `${through.url}?connect_timeout=1`
      expect((yield* reasonOf(on({ url }, run("SELECT 1")))).message).toContain("within 1000 ms")
      const own = { url, connectTimeout: 150 }
      expect((yield* reasonOf(on(own, run("SELECT 1")))).message).toContain("within 150 ms")
    })
  )

  it.live("target_session_attrs and load_balance_hosts choose the server", () =>
    Effect.gen(function* () {
      const url = database.url.replace(/@([^/]*)/, "@$1,$1")
      const { attrs, loadBalance } = yield* resolve({
        url: `${url}?target_session_attrs=read-write&load_balance_hosts=random`
      })
      expect({ attrs, loadBalance }).toEqual({ attrs: "read-write", loadBalance: true })
      const standby = on({ url: urlWith("target_session_attrs=standby"), acquireTimeout: 1500 }, run("SELECT 1"))
      expect((yield* reasonOf(standby)).message).toContain("is standby")
      yield* on({ url: urlWith("target_session_attrs=primary") }, run("SELECT 1"))
    })
  )

  it.live("keepalives and channel_binding are told to pg", () =>
    Effect.gen(function* () {
      const options = yield* resolve({ url: urlWith("keepalives=0&keepalives_idle=7&channel_binding=disable") })
      expect(options).toMatchObject({ keepAlive: false, keepAliveMillis: 7000, channelBinding: "disable" })
      expect(yield* resolve({ url: database.url })).toMatchObject({ keepAlive: true, channelBinding: "prefer" })
    })
  )

  it.live("that can't be meant are refused: the name is shown, the value is not", () =>
    Effect.gen(function* () {
      for (const [name, value] of [
        ["statement_timeout", "5s"],
        ["lock_timeout", "-5"],
        ["connect_timeout", "s3cret"],
        ["keepalives", "s3cret"],
        ["keepalives_idle", "s3cret"],
        ["load_balance_hosts", "s3cret"],
        ["channel_binding", "s3cret"],
        ["sslnegotiation", "s3cret"],
        ["options", "s3cret%00"]
      ] as const) {
        const error = yield* errorOf(Effect.scoped(DbEngine.make({ url: urlWith(`${name}=${value}`) })))
        expect([name, DbError.reason(error)]).toMatchObject([name, { _tag: "InvalidInput" }])
        expect(error.message).toContain(name)
        expect(error.message).not.toContain("s3cret")
      }
    })
  )

  it.live("that mean nothing here are named in one warning, and do no harm", () =>
    Effect.gen(function* () {
      const warnings = (query: string) => {
        const lines: Array<string> = []
        const logger = Logger.make<unknown, void>(
          ({ logLevel, message }) => void (logLevel === LogLevel.Warning && lines.push(String(message)))
        )
        return Effect.as(
          Effect.provide(run("SELECT 1"), DbLayer({ url: urlWith(query) })).pipe(
            Effect.provide(Logger.replace(Logger.defaultLogger, logger))
          ),
          lines
        ).pipe(Effect.map((_) => _.filter((line) => !line.includes("built twice"))))
      }
      expect(yield* warnings("application_name=shop&sslmode=disable&channel_binding=prefer")).toEqual([])
      const prisma = yield* warnings("schema=s3cret&connection_limit=5&pgbouncer=true&sslmode=disable")
      expect(prisma).toHaveLength(1)
      expect(prisma[0]).toContain("of its url or variables of the environment: schema, connection_limit, pgbouncer.")
      expect(prisma[0]).not.toContain("s3cret")
      expect(yield* warnings("client_encoding=latin1")).toHaveLength(1)
    })
  )
})
