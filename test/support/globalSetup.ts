import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Redacted from "effect/Redacted"
import * as Scope from "effect/Scope"
import type { TestProject } from "vitest/node"

declare module "vitest" {
  export interface ProvidedContext {
    /** A superuser's URL of the server that the run uses. */
    databaseUrl: string
  }
}

/** One real server per run: that of `DATABASE_URL`, else an embedded one that is gone afterwards. */
export default async (project: TestProject): Promise<() => Promise<void>> => {
  const given = process.env.DATABASE_URL
  if (given !== undefined && given !== "") {
    project.provide("databaseUrl", given)
    return async () => {}
  }
  const { EmbeddedServer } = await import("../../src/embedded/EmbeddedServer.js")
  const scope = Effect.runSync(Scope.make())
  const close = () => Effect.runPromise(Scope.close(scope, Exit.void))
  try {
    const server = await EmbeddedServer.start({ settings: { max_connections: 300 } }).pipe(
      Scope.extend(scope),
      Effect.runPromise
    )
    project.provide("databaseUrl", Redacted.value(server.url))
  } catch (error) {
    await close()
    throw error
  }
  return close
}
