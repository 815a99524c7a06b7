/**
 * Programs on two databases: the default one and `analytics`.
 */
import { it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import type * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { Database, type DbConnection, type DbEngine, type DbOptions, DbRegistry, type DbSession } from "effect-db"
import { beforeEach } from "vitest"
import { testDatabase, untilActivity } from "./database.js"
import { committed, expectAtRest, quietly, seen, type Services } from "./programs.js"

export const Analytics = Database.make("analytics")

export type Both =
  | Services
  | DbRegistry.DbRegistry
  | DbEngine<"analytics">
  | DbConnection<"analytics">
  | DbSession<"analytics">
  | Scope.Scope

export const intoOther = (id: number) =>
  Effect.flatMap(Analytics.DbSession, ({ sql }) => Effect.asVoid(sql`INSERT INTO t (id) VALUES (${id})`))

export const seenInOther = DbRegistry.using(seen, Analytics)

interface Options {
  readonly default?: DbOptions
  readonly analytics?: DbOptions
  readonly registry?: DbRegistry.RegistryOptions
}

/** Call it at the top of a file. Each test finds an empty table `t` in both. */
export const twoDatabases = () => {
  const [database, other] = [testDatabase(), testDatabase()]
  const table = `DROP TABLE IF EXISTS t CASCADE; CREATE TABLE t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED);
    DROP SCHEMA IF EXISTS acme CASCADE`
  beforeEach(() => Effect.runPromise(Effect.all([database.query(table), other.query(table)])))
  const registry = (options: Options = {}): Layer.Layer<Exclude<Both, Scope.Scope>, unknown> =>
    quietly(
      DbRegistry.layer(
        {
          default: { url: database.url, ...options.default },
          analytics: { url: other.url, ...options.analytics }
        },
        options.registry
      )
    )
  return {
    database,
    other,
    rows: committed(database),
    othersRows: committed(other),
    registry,
    /** Runs a program with both, and looks whether both are left at rest. */
    test: <A, E>(name: string, program: () => Effect.Effect<A, E, Both>, options?: Options): void => {
      it.scopedLive(name, () =>
        Effect.gen(function* () {
          yield* Effect.suspend(program).pipe(
            Effect.zipLeft(expectAtRest(database)),
            Effect.zipLeft(DbRegistry.using(expectAtRest(other), Analytics)),
            Effect.provide(registry(options))
          )
          yield* untilActivity(database.url, ({ total }) => total === 0)
          yield* untilActivity(other.url, ({ total }) => total === 0)
        })
      )
    }
  }
}
