import { it } from "@effect/vitest"
import { DbEngine, DbError, DbLayer, type DbOptions, DbRuntime, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Redacted from "effect/Redacted"
import * as Scope from "effect/Scope"
import { chown, writeFile } from "node:fs/promises"
import * as Net from "node:net"
import { join } from "node:path"
import * as Tls from "node:tls"
import Pg from "pg"
import { afterAll, beforeAll, describe, expect } from "vitest"
import { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import { chooseAccount } from "../src/embedded/internal/processes.js"
import { type Certificate, hasOpenssl, makeAuthority } from "./support/certificates.js"
import { ask, clusterFolder, urlOf } from "./support/cluster.js"
import { quietly, type Services } from "./support/programs.js"
import { proxy } from "./support/proxy.js"
import { reasonOf, run } from "./support/wired.js"
import { until } from "./support/until.js"

// FAULTS.md 8, and what TLS is for, against a server with a certificate of an authority of our own. That TLS is never
// given up where the server has none is in faults.connection.test.ts.
const scope = Effect.runSync(Scope.make())
let server: EmbeddedServer
let ca: string
let caFile: string
/** Who is trusted by the server, and who is not by anybody. */
let client: Certificate
let somebody: Certificate
let stranger: Certificate
/** Signed by the same authority as the server's own. */
let middle: Certificate
let otherCa: string

const hba = `
hostssl   certs   all 127.0.0.1/32 scram-sha-256 clientcert=verify-full
hostnossl tlsonly all 127.0.0.1/32 reject
host      all     all 127.0.0.1/32 scram-sha-256
`

beforeAll(async () => {
  if (!hasOpenssl) return
  const folder = await Effect.runPromise(Effect.orDie(Scope.extend(clusterFolder, scope)))
  const account = await Effect.runPromise(Effect.orDie(chooseAccount(undefined)))
  const authority = makeAuthority(folder, "authority")
  const other = makeAuthority(folder, "other")
  const own = authority.sign("db.internal", "DNS:localhost, IP:127.0.0.1")
  middle = authority.sign("middle", "DNS:localhost, IP:127.0.0.1")
  client = authority.sign("postgres")
  somebody = authority.sign("somebody")
  stranger = other.sign("postgres")
  ;[ca, caFile, otherCa] = [authority.cert, authority.certFile, other.cert]
  const hbaFile = join(folder, "pg_hba.conf")
  await writeFile(hbaFile, hba)
  if (account !== undefined) await chown(own.keyFile, account.uid, account.gid)
  server = await Effect.runPromise(
    Scope.extend(
      EmbeddedServer.start({
        settings: {
          ssl: true,
          ssl_cert_file: own.certFile,
          ssl_key_file: own.keyFile,
          ssl_ca_file: authority.certFile,
          hba_file: hbaFile
        }
      }),
      scope
    )
  )
  for (const database of ["certs", "tlsonly"]) await Effect.runPromise(ask(server, `CREATE DATABASE ${database}`))
})
afterAll(() => Effect.runPromise(Scope.close(scope, Exit.void)))

const secured = Effect.map(run("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"), ([row]) => row!["ssl"])

const on = <A, E>(options: DbOptions, effect: Effect.Effect<A, E, Services | Scope.Scope>) =>
  Effect.suspend(() => Effect.provide(effect, quietly(DbLayer({ url: urlOf(server), ...options }))))

/** Passes bytes on, and remembers with which each connection began. */
const recording = Effect.acquireRelease(
  Effect.async<{ readonly port: number; readonly firsts: Array<number>; readonly close: () => void }>((resume) => {
    const firsts: Array<number> = []
    const listener = Net.createServer((socket) => {
      socket.once("data", (bytes: Buffer) => void firsts.push(bytes[0]!))
      const other = Net.connect(server.port, server.host).on("error", () => {})
      socket
        .on("error", () => {})
        .pipe(other)
        .pipe(socket)
    })
    listener.listen(0, "127.0.0.1", () => {
      const { port } = listener.address() as Net.AddressInfo
      resume(Effect.succeed({ port, firsts, close: () => listener.close() }))
    })
  }),
  ({ close }) => Effect.sync(close)
)

/** The variables are read when the engine is made. */
const withVariables = <A, E, R>(variables: Record<string, string>, effect: Effect.Effect<A, E, R>) =>
  Effect.acquireUseRelease(
    Effect.sync(() => {
      const before = Object.keys(variables).map((name) => [name, process.env[name]] as const)
      Object.assign(process.env, variables)
      return before
    }),
    () => effect,
    (before) =>
      Effect.sync(() => {
        for (const [name, value] of before) {
          if (value === undefined) delete process.env[name]
          else process.env[name] = value
        }
      })
  )

const withSslMode = <A, E, R>(mode: string, effect: Effect.Effect<A, E, R>) =>
  withVariables({ PGSSLMODE: mode }, effect)

const tlsRefused = "What the url or the environment says of TLS can't be done."

const test = <A, E>(name: string, program: () => Effect.Effect<A, E, Scope.Scope>) =>
  it.scopedLive(name, () => Effect.suspend(program))

/** Refused before anything is said, and trying again would not help. */
const expectRefused = (options: DbOptions) =>
  Effect.gen(function* () {
    const through = yield* proxy(urlOf(server))
    const reason = yield* reasonOf(
      on({ ...options, url: options.url ?? through.url, port: through.port }, run("SELECT 1"))
    )
    expect(reason).toMatchObject({ _tag: "ConnectionError", phase: "connect", isRetryable: false })
    expect(reason.message).toContain("TLS")
    expect(through.log.map((_) => _.type).filter((_) => _ !== "ssl")).toEqual([])
    expect(through.log.length).toBeGreaterThan(0)
  })

/** A man in the middle: it ends the TLS of both sides, and reads along. */
const manInTheMiddle = Effect.acquireRelease(
  Effect.promise(
    () =>
      new Promise<{ readonly port: number; readonly heard: () => string; readonly close: () => void }>((resolve) => {
        let heard = ""
        const sockets = new Set<Net.Socket>()
        const track = <S extends Net.Socket>(socket: S): S => {
          sockets.add(socket)
          socket.on("error", () => {}).on("close", () => sockets.delete(socket))
          return socket
        }
        const listener = Net.createServer((socket) => {
          track(socket).once("data", () => {
            socket.write("S")
            const inner = track(new Tls.TLSSocket(socket, { isServer: true, key: middle.key, cert: middle.cert }))
            const outer = track(Net.connect(server.port, server.host))
            outer.write(Buffer.from([0, 0, 0, 8, 4, 210, 22, 47]))
            outer.once("data", () => {
              const secure = track(Tls.connect({ socket: outer, rejectUnauthorized: false }))
              inner.on("data", (bytes: Buffer) => void (heard += bytes.toString("latin1")))
              inner.pipe(secure).pipe(inner)
            })
          })
        })
        listener.listen(0, "127.0.0.1", () =>
          resolve({
            port: (listener.address() as Net.AddressInfo).port,
            heard: () => heard,
            close: () => {
              for (const socket of sockets) socket.destroy()
              listener.close()
            }
          })
        )
      })
  ),
  ({ close }) => Effect.sync(close)
)

describe.skipIf(!hasOpenssl)(`TLS${hasOpenssl ? "" : ": openssl is not installed"}`, () => {
  test("the server's certificate is verified, by address and by name", () =>
    Effect.gen(function* () {
      expect(yield* on({ ssl: { ca } }, secured)).toBe(true)
      expect(yield* on({ ssl: { ca }, host: "localhost" }, secured)).toBe(true)
      expect(yield* on({ ssl: { ca, servername: "localhost" } }, secured)).toBe(true)
      expect(yield* on({}, secured)).toBe(false)
    }))

  test("sslmode and sslrootcert of a url are understood", () =>
    Effect.gen(function* () {
      const url = `${urlOf(server)}?sslmode=verify-full&sslrootcert=${encodeURIComponent(caFile)}`
      expect(yield* on({ url }, secured)).toBe(true)
      yield* expectRefused({ url: `${urlOf(server)}?sslmode=verify-full` })
    }))

  test("FAULTS 8: an authority that nobody trusts", () => expectRefused({ ssl: true }))
  test("FAULTS 8: another authority than the one that is trusted", () => expectRefused({ ssl: { ca: otherCa } }))
  test("FAULTS 8: another name than the certificate's", () => expectRefused({ ssl: { ca, servername: "db.example" } }))

  test("FAULTS 8: a server that wants TLS, and a client that does not", () =>
    Effect.gen(function* () {
      const reason = yield* reasonOf(on({ database: "tlsonly" }, run("SELECT 1")))
      expect(reason).toMatchObject({ _tag: "AuthenticationError", sqlState: "28000", isRetryable: false })
      expect(yield* on({ database: "tlsonly", ssl: { ca } }, secured)).toBe(true)
    }))

  test("a certificate of the client's, verified by the server, and by its name", () =>
    Effect.gen(function* () {
      const login = (certificate: Certificate | undefined) =>
        on(
          {
            database: "certs",
            ssl: { ca, ...(certificate === undefined ? {} : { cert: certificate.cert, key: certificate.key }) }
          },
          run("SELECT client_dn AS dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        )
      expect(yield* login(client)).toEqual([{ dn: "/CN=postgres" }])
      for (const certificate of [undefined, somebody]) {
        expect(yield* reasonOf(login(certificate))).toMatchObject({ _tag: "AuthenticationError", isRetryable: false })
      }
      expect(yield* reasonOf(login(stranger))).toMatchObject({ _tag: "ConnectionError", phase: "connect" })
    }))

  test("channel binding: a man in the middle is refused, though his certificate is good", () =>
    Effect.gen(function* () {
      const middle = yield* manInTheMiddle
      const options = { port: middle.port, ssl: { ca } }
      expect(yield* reasonOf(on(options, run("SELECT 1")))).toMatchObject({ _tag: "AuthenticationError" })
      expect(middle.heard()).toContain("SCRAM-SHA-256-PLUS")
      expect(middle.heard()).not.toContain("SELECT 1")
      // He does his work where nobody asks for it.
      const naive = new Pg.Client({
        host: "127.0.0.1",
        port: middle.port,
        user: server.user,
        password: Redacted.value(server.password),
        database: "postgres",
        ssl: { ca }
      })
      yield* Effect.acquireUseRelease(
        Effect.promise(() => naive.connect()),
        () => Effect.promise(() => naive.query("SELECT 1")),
        () => Effect.promise(() => naive.end())
      )
      expect(middle.heard()).toContain("SELECT 1")
    }))

  test("a CancelRequest goes over TLS, and its key never in the clear", () =>
    Effect.gen(function* () {
      const through = yield* proxy(urlOf(server))
      yield* on(
        { url: through.url, ssl: { ca } },
        Effect.gen(function* () {
          yield* run("SELECT 1")
          const asked = () => through.log.filter((_) => _.type === "ssl").length
          expect(asked()).toBe(1)
          const sleeping = yield* Effect.fork(withTransaction(run("SELECT pg_sleep(60), 'cancelled'")))
          const running = ask(
            server,
            "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%''cancelled''%' AND pid <> pg_backend_pid()"
          )
          yield* until(
            "it runs",
            Effect.map(running, (_) => _.length === 1)
          )
          yield* Fiber.interrupt(sleeping)
          expect(yield* running).toEqual([])
          expect(asked()).toBe(2)
          expect(through.cancels).toEqual([])
          expect(through.log.filter((_) => _.type === "startup")).toEqual([])
        })
      )
    }))

  test("PGSSLMODE means for a CancelRequest and for health what it means for a session", () =>
    Effect.gen(function* () {
      const through = yield* proxy(urlOf(server))
      yield* withSslMode(
        "no-verify",
        on(
          { url: through.url, maxConnections: 1 },
          Effect.gen(function* () {
            const sleeping = yield* Effect.fork(run("SELECT pg_sleep(60)"))
            yield* until(
              "it runs",
              Effect.map(
                ask(server, "SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"),
                (_) => _.length === 1
              )
            )
            expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "server" })
            yield* Fiber.interrupt(sleeping)
            expect(yield* secured).toBe(true)
            expect(through.log.map((_) => _.type)).toEqual(["ssl", "ssl", "ssl"])
          })
        )
      )
    }))

  test("PGSSLMODE is that of an engine without ssl and without sslmode, as for pg", () =>
    Effect.gen(function* () {
      expect(yield* withSslMode("disable", on({}, secured))).toBe(false)
      expect(yield* withSslMode("no-verify", on({}, secured))).toBe(true)
      expect(yield* withSslMode("no-verify", on({ ssl: false }, secured))).toBe(false)
      expect(yield* withSslMode("no-verify", on({ url: `${urlOf(server)}?sslmode=disable` }, secured))).toBe(false)
      for (const mode of ["prefer", "require", "verify-ca", "verify-full"]) {
        yield* withSslMode(mode, expectRefused({}))
      }
      expect(yield* withSslMode("", on({}, secured))).toBe(false)
    }))

  test("a PGSSLMODE that is none is InvalidInput, not a connection without TLS", () =>
    Effect.gen(function* () {
      const reason = yield* reasonOf(withSslMode("verfy-full", on({}, secured)))
      expect(reason).toMatchObject({ _tag: "InvalidInput", message: tlsRefused })
      expect(yield* withSslMode("allow", on({}, secured))).toBe(false)
      expect(yield* withSslMode("verfy-full", on({ ssl: { ca } }, secured))).toBe(true)
    }))

  test("PGSSLROOTCERT is the authority of PGSSLMODE and of the url's sslmode, and asks for TLS by itself", () =>
    Effect.gen(function* () {
      const trusted = { PGSSLROOTCERT: caFile }
      const url = (query: string) => ({ url: `${urlOf(server)}?${query}` })
      expect(yield* withVariables(trusted, on({}, secured))).toBe(true)
      expect(yield* withVariables({ ...trusted, PGSSLMODE: "verify-full" }, on({}, secured))).toBe(true)
      expect(yield* withVariables(trusted, on(url("sslmode=verify-full"), secured))).toBe(true)
      expect(yield* withVariables({ ...trusted, PGSSLMODE: "disable" }, on({}, secured))).toBe(false)
      for (const query of ["sslmode=disable", "ssl=false"]) {
        expect(yield* withVariables(trusted, on(url(query), secured))).toBe(false)
      }
      expect(yield* withVariables(trusted, on({ ssl: false }, secured))).toBe(false)
      const missing = { PGSSLROOTCERT: "/nowhere/s3cret.crt" }
      const reason = yield* reasonOf(withVariables(missing, on({}, secured)))
      expect(reason).toMatchObject({ _tag: "InvalidInput", message: tlsRefused })
      yield* withVariables({ PGSSLROOTCERT: "system" }, expectRefused({}))
      // It says nothing of a mode.
      yield* withVariables({ PGSSLMODE: "require" }, expectRefused(url("uselibpqcompat=true")))
    }))

  test("sslnegotiation=direct is TLS from the first byte, for a CancelRequest and for health too", () =>
    Effect.gen(function* () {
      const query = `sslmode=verify-full&sslrootcert=${encodeURIComponent(caFile)}&sslnegotiation=direct`
      const through = yield* recording
      yield* on(
        { url: `${urlOf(server)}?${query}`, port: through.port, maxConnections: 1 },
        Effect.gen(function* () {
          const pid = Effect.map(run("SELECT pg_backend_pid() AS pid"), ([row]) => row!["pid"])
          const before = yield* pid
          const sleeping = yield* Effect.fork(run("SELECT pg_sleep(61)"))
          yield* until(
            "it runs",
            Effect.map(
              ask(server, "SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(61)' AND state = 'active'"),
              (_) => _.length === 1
            )
          )
          expect(yield* DbEngine.health).toMatchObject({ status: "up", asked: "server" })
          yield* Fiber.interrupt(sleeping)
          expect(yield* pid).toBe(before)
          expect(yield* secured).toBe(true)
          // Each begins with a handshake.
          expect(through.firsts).toEqual([22, 22, 22])
        })
      )
      const clear = { url: `${urlOf(server)}?sslnegotiation=direct` }
      expect(yield* reasonOf(on(clear, secured))).toMatchObject({ _tag: "InvalidInput" })
    }))

  test("ssl=false and ssl=no-verify of a url mean what they say, for a CancelRequest too", () =>
    Effect.gen(function* () {
      expect(yield* on({ url: `${urlOf(server)}?ssl=false` }, secured)).toBe(false)
      yield* on(
        // Without a CancelRequest that is understood the test would not end.
        { url: `${urlOf(server)}?ssl=no-verify`, maxConnections: 1, settleTimeout: "1 minute" },
        Effect.gen(function* () {
          yield* Effect.ignore(Effect.timeout(run("SELECT pg_sleep(60)"), 100))
          expect(yield* secured).toBe(true)
        })
      )
    }))

  test("sslrootcert=system trusts what Node trusts, and a file that can't be read is InvalidInput", () =>
    Effect.gen(function* () {
      yield* expectRefused({ url: `${urlOf(server)}?sslrootcert=system` })
      for (const query of ["sslrootcert=/nowhere/s3cret.crt", "sslmode=verify-ca&uselibpqcompat=true", "ssl=s3cret"]) {
        const reason = yield* reasonOf(on({ url: `${urlOf(server)}?${query}` }, secured))
        expect(reason).toMatchObject({ _tag: "InvalidInput", message: tlsRefused })
      }
    }))

  test("channel_binding=require is refused where the login is not bound, before a password is sent", () =>
    Effect.gen(function* () {
      const url = `${urlOf(server)}?channel_binding=require`
      expect(yield* on({ url, ssl: { ca } }, secured)).toBe(true)
      const through = yield* proxy(urlOf(server))
      const refused = yield* reasonOf(on({ url, port: through.port }, secured))
      expect(refused).toMatchObject({ _tag: "AuthenticationError", isRetryable: false })
      expect(refused.message).toContain("no channel binding")
      expect(through.log.filter((_) => _.dir === "frontend").map((_) => _.type)).toEqual(["startup"])
      const runtime = (options: DbOptions) =>
        Effect.acquireRelease(
          Effect.sync(() => DbRuntime.make(quietly(DbLayer(options)))),
          (_) => Effect.promise(_.close)
        )
      expect((yield* runtime({ url, ssl: { ca } })).runSync(secured)).toBe(true)
      const { runSync } = yield* runtime({ url })
      expect(yield* reasonOf(Effect.try({ try: () => runSync(secured), catch: (error) => error }))).toEqual(refused)
    }))

  test("errors of TLS say what to do, and show no key", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(
        on({ ssl: { ca: otherCa, key: client.key, cert: client.cert } }, run("SELECT 1"))
      )
      expect(DbError.reason(error)?.hint).toContain("certificate authority")
      expect(JSON.stringify(error) + String(error)).not.toContain("PRIVATE KEY")
    }))
})
