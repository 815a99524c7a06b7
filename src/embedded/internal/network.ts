/**
 * Ports and logins.
 */
import * as Effect from "effect/Effect"
import * as Redacted from "effect/Redacted"
import { createServer } from "node:net"
import * as Pg from "pg"
import { EmbeddedError } from "../EmbeddedError.js"
import { attempt } from "./processes.js"

/** @internal */
export const invalid = (problem: string, hint: string): EmbeddedError =>
  new EmbeddedError({ reason: "InvalidOption", problem, hint })

const everywhere: Record<string, string> = { "*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1" }

/**
 * Where clients connect to when the server listens there.
 *
 * @internal
 */
export const connectHost = (host: string): string => everywhere[host] ?? host

/**
 * Binds the port, or a free one for 0, and lets go of it.
 *
 * @internal
 */
export const bindPort = (host: string, port: number): Effect.Effect<number, EmbeddedError> =>
  Effect.async<number, EmbeddedError>((resume) => {
    const server = createServer()
    server.once("error", (cause: NodeJS.ErrnoException) =>
      resume(
        cause.code === "EADDRINUSE"
          ? new EmbeddedError({
              reason: "PortInUse",
              problem: `Port ${port} on ${host} is in use`,
              hint: "Stop what uses it, choose another port, or leave the port out to get a free one",
              cause
            })
          : invalid(
              `It is not possible to listen on port ${port} of ${host} (${cause.code})`,
              "Choose another host or port"
            )
      )
    )
    server.listen({ port, host: host === "*" ? undefined : host, exclusive: true }, () => {
      const address = server.address()
      server.close(() => resume(Effect.succeed(typeof address === "object" && address !== null ? address.port : port)))
    })
    return Effect.async<void>((done) => void server.close(() => done(Effect.void)))
  })

/** @internal */
export interface Login {
  readonly host: string
  readonly port: number
  readonly user: string
  readonly password: Redacted.Redacted
  readonly database: string
}

/**
 * Readers differ in what they decode of the path (pg-connection-string leaves `%2F`): only what must be is encoded.
 *
 * @internal
 */
export const urlOf = ({ database, host, password, port, user }: Login): string =>
  `postgres://${encodeURIComponent(user)}:${encodeURIComponent(Redacted.value(password))}@${
    host.includes(":") ? `[${host}]` : host
  }:${port}/${encodeURI(database).replace(/[?#]/g, encodeURIComponent)}`

const withClient = <A>(login: Login, use: (client: Pg.Client) => Promise<A>): Effect.Effect<A, NodeJS.ErrnoException> =>
  Effect.acquireUseRelease(
    Effect.sync(() => {
      const client = new Pg.Client({
        host: login.host,
        port: login.port,
        user: login.user,
        password: Redacted.value(login.password),
        database: login.database,
        ssl: false,
        connectionTimeoutMillis: 10_000
      })
      client.on("error", () => {})
      return client
    }),
    (client) =>
      attempt(async () => {
        await client.connect()
        return use(client)
      }),
    (client) => Effect.ignore(Effect.timeout(Effect.interruptible(attempt(() => client.end())), "2 seconds"))
  )

/**
 * Logs in as a client will, and creates the database where it does not exist.
 *
 * @internal
 */
export const checkLogin = (login: Login, dataDir: string): Effect.Effect<void, EmbeddedError> =>
  withClient(login, (client) => client.query("SELECT 1")).pipe(
    Effect.catchIf(
      (error) => error.code === "3D000",
      () =>
        withClient({ ...login, database: "template1" }, (client) =>
          client.query(`CREATE DATABASE ${client.escapeIdentifier(login.database)}`)
        )
    ),
    Effect.asVoid,
    Effect.mapError((cause) => {
      const refused = cause.code === "28P01" || cause.code === "28000"
      return new EmbeddedError({
        reason: "LoginFailed",
        problem: refused
          ? `The server on the data folder ${dataDir} refuses the user ${JSON.stringify(login.user)} or its password`
          : `The database ${JSON.stringify(login.database)} can't be used: ${cause.message}`,
        hint: refused
          ? "Give the `user` and the `password` that the folder was initialised with, or choose another dataDir"
          : "Choose another name, or create it by hand",
        cause
      })
    })
  )
