/**
 * The database to measure on: one of its own on the server of `DATABASE_URL`, else on an embedded server.
 */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Redacted from "effect/Redacted"
import * as Scope from "effect/Scope"
import Pg from "pg"
import { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import { schema } from "./contender.js"

export interface Database {
  readonly url: string
  readonly version: string
  readonly close: () => Promise<void>
}

const query = async (url: string, text: string): Promise<Array<Record<string, unknown>>> => {
  const client = new Pg.Client({ connectionString: url })
  await client.connect()
  try {
    return (await client.query<Record<string, unknown>>(text)).rows
  } finally {
    await client.end()
  }
}

export const openDatabase = async (): Promise<Database> => {
  const scope = await Effect.runPromise(Scope.make())
  const given = process.env.DATABASE_URL
  const server =
    given !== undefined && given !== ""
      ? given
      : Redacted.value((await Effect.runPromise(Scope.extend(EmbeddedServer.start(), scope))).url)
  const name = `effect_db_bench_${process.pid}`
  await query(server, `CREATE DATABASE ${name} TEMPLATE template0`)
  // The disk's part of a commit is the same for everybody, and the most uneven.
  await query(server, `ALTER DATABASE ${name} SET synchronous_commit = off`)
  const url = new URL(server)
  url.pathname = `/${name}`
  await query(url.href, schema)
  const [row] = await query(server, "SELECT current_setting('server_version') AS version")
  return {
    url: url.href,
    version: String(row!.version),
    close: async () => {
      await query(server, `DROP DATABASE ${name} WITH (FORCE)`)
      await Effect.runPromise(Scope.close(scope, Exit.void))
    }
  }
}
