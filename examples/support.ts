/**
 * What the examples share: a database to run on, and a voice.
 *
 * Each of them gets an empty database with the table `users`, on the server of `DATABASE_URL` or on an embedded
 * PostgreSQL that is gone afterwards: `npx tsx examples/basic.ts`.
 */
import { NodeRuntime } from "@effect/platform-node"
import type { SqlClient, SqlError } from "@effect/sql"
import type { PgClient } from "@effect/sql-pg"
import { DbEngine, DbLayer } from "effect-db"
import type { DbConnection, DbSession } from "effect-db"
import { EmbeddedServer } from "effect-db/embedded"
import { DbTest } from "effect-db/testing"
import { Console, Context, Data, Effect, Equal, Redacted } from "effect"
import type { Scope } from "effect"
import type { Server as HttpServer } from "node:http"
import type { AddressInfo } from "node:net"

/** Makes more databases, for examples that need a second one. They are dropped at the end. */
export class Databases extends Context.Tag("examples/Databases")<
  Databases,
  { readonly make: (name: string) => Effect.Effect<Redacted.Redacted, SqlError.SqlError, Scope.Scope> }
>() {}

export type Provided =
  DbEngine | DbConnection | DbSession | SqlClient.SqlClient | PgClient.PgClient | Databases | Scope.Scope

export type Example = Effect.Effect<unknown, unknown, Provided>

/** Says something. */
export const say = (words: string): Effect.Effect<void> => Effect.suspend(() => voice(words))

/** Says what a query or a counter yields, and insists on it: what an example promises is true, or it fails. */
export const show = <A, E, R>(what: string, effect: Effect.Effect<A, E, R>, expected: A): Effect.Effect<A, E, R> =>
  Effect.tap(effect, (value) =>
    Effect.zipRight(
      say(`${what}: ${text(value)}`),
      Equal.equals(comparable(value), comparable(expected))
        ? Effect.void
        : Effect.dieMessage(`${what}: ${text(value)} instead of ${text(expected)}`)
    )
  )

/** Who is in the table. Runs in the ambient session or connection, else as a statement of its own. */
export const users = Effect.flatMap(DbEngine, ({ sql }) =>
  Effect.map(sql<{ readonly name: string }>`SELECT name FROM users ORDER BY id`, (rows) => rows.map((_) => _.name))
)

/** How many connections are borrowed at this moment. */
export const borrowed = Effect.map(DbEngine.stats, (stats) => stats.used)

const text = (value: unknown): string =>
  Array.isArray(value) ? (value.length === 0 ? "nobody" : value.join(", ")) : String(value)

const comparable = (value: unknown): unknown => (Array.isArray(value) ? Data.array(value) : value)

/** Listens on a port of its own until the scope closes, and yields where. */
export const listening = (server: HttpServer): Effect.Effect<string, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.async<string>((resume) => {
      server.listen(0, "127.0.0.1", () =>
        resume(Effect.succeed(`http://127.0.0.1:${(server.address() as AddressInfo).port}`))
      )
    }),
    () =>
      Effect.async<void>((resume) => {
        server.close(() => resume(Effect.void))
        server.closeAllConnections()
      })
  )

/** Sends a request and yields the status of the response. */
export const post = (url: string): Effect.Effect<number> =>
  Effect.promise(async () => {
    const response = await fetch(url, { method: "POST" })
    await response.arrayBuffer()
    return response.status
  })

/** A server, and on it a database that those of the examples are copied from. */
export interface Server {
  readonly url: Redacted.Redacted
  readonly template: string
}

/** The server of `DATABASE_URL`, else an embedded one, for the scope. */
export const start = Effect.gen(function* () {
  const given = process.env.DATABASE_URL
  const url = given === undefined || given === "" ? (yield* EmbeddedServer.start()).url : Redacted.make(given)
  const template = yield* DbTest.database({ url, prefix: "example_template" })
  yield* createTable.pipe(Effect.provide(template.layer))
  return { url, template: template.name } satisfies Server
})

const createTable = Effect.flatMap(
  DbEngine,
  ({ sql }) => sql`CREATE TABLE users (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL CONSTRAINT users_name_taken UNIQUE
  )`
)

/** What an example is given; `through` is the address that it connects to. */
export const provide = (example: Example, { template, url }: Server, through: (url: string) => string = (url) => url) =>
  Effect.gen(function* () {
    const make = (name: string) =>
      Effect.map(DbTest.database({ url, template, prefix: `example_${name}` }), ({ name }) => {
        const own = new URL(Redacted.value(url))
        own.pathname = `/${name}`
        return Redacted.make(through(own.href))
      })
    yield* example.pipe(
      Effect.scoped,
      // an example that ends with something borrowed is a bad example
      Effect.zipRight(Effect.flatMap(DbEngine.stats, ({ pending, used }) => check(used + pending))),
      Effect.provide(DbLayer({ url: yield* make("default"), applicationName: "examples" })),
      Effect.provideService(Databases, { make })
    )
  }).pipe(Effect.scoped)

const check = (left: number) => (left === 0 ? Effect.void : Effect.dieMessage(`${left} connections were left borrowed`))

let voice: (words: string) => Effect.Effect<void> = (words) => Console.log(words)

let runner = (example: Example): void =>
  NodeRuntime.runMain(Effect.scoped(Effect.flatMap(start, (server) => provide(example, server))))

/** Runs an example as the program that it is. */
export const run = (example: Example): void => runner(example)

/** Hands the examples that are imported from now on to somebody else: the tour. */
export const handTo = (other: { readonly run: (example: Example) => void; readonly say: typeof voice }): void => {
  runner = other.run
  voice = other.say
}
