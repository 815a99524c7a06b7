/**
 * A connection that databases are made with: as the engine of a program makes its own, apart from that one.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import type { DbOptions } from "../DbOptions.js"
import { resolve } from "../DbOptions.js"
import { EngineCore } from "../internal/engine.js"
import { execute } from "../internal/execute.js"
import type { Bound } from "../internal/execute.js"
import { Root } from "../internal/lease.js"

type Rows = ReadonlyArray<unknown>

/** @internal */
export type Ask = (text: string) => Effect.Effect<Rows, SqlError>

/** What the options say for the program's connections is not for this one: CREATE DATABASE takes as long as it takes. */
const itsOwn: DbOptions = {
  maxConnections: 1,
  minConnections: 0,
  afterConnect: undefined,
  leakTimeout: undefined,
  statementTimeout: undefined,
  lockTimeout: undefined,
  idleInTransactionTimeout: undefined,
  transactionTimeout: undefined
}

/** A connection to the database that the options name, for the scope. @internal */
export const connect = (options: DbOptions<any>): Effect.Effect<Ask, SqlError, Scope.Scope> =>
  Effect.gen(function* () {
    const { acquireMillis, connectMillis, target, ...rest } = yield* resolve({ ...options, ...itsOwn })
    const config = {
      ...rest,
      acquireMillis,
      connectMillis,
      target: { ...target, database: target.database ?? "postgres" }
    }
    const runtime = yield* Effect.runtime<never>()
    const core = yield* Effect.acquireRelease(
      Effect.sync(() => new EngineCore("DbTest", config, runtime)),
      (core) => core.close
    )
    const root = yield* Effect.acquireRelease(
      // Time for each of the hosts, also where a program would rather give up than wait for the last.
      Effect.sync(() => new Root(core, { name: "DbTest" }, acquireMillis + connectMillis * target.hosts.length)),
      (root) => Effect.sync(() => root.release(true))
    )
    // Lost, it is not borrowed anew: the lock that it held is nobody's.
    const bound: Bound = { _tag: "Root", root, gone: () => root.wire?.pipeline.dead }
    return (text) =>
      Effect.withFiberRuntime<Rows, SqlError>((fiber) =>
        execute(fiber, core, bound, text, [], "object", false, (result) => result.rows)
      )
  })

/** One statement on a connection of its own. @internal */
export const admin = (options: DbOptions<any>, text: string): Effect.Effect<Rows, SqlError> =>
  Effect.scoped(Effect.flatMap(connect(options), (ask) => ask(text)))
