import { describe, expect, it } from "@effect/vitest"
import { Context, Deferred, Effect, Exit, Fiber, Layer, Scope } from "effect"
import { DbEngine, DbError, DbSession, withTransaction } from "effect-db"
import { DbEmbedded } from "effect-db/embedded"
import { existsSync } from "node:fs"
import { createConnection } from "node:net"
import { join } from "node:path"
import { isAlive } from "../src/embedded/internal/processes.js"
import { folder } from "./support/folder.js"
import { quietly, reason, type Services } from "./support/programs.js"
import { until } from "./support/until.js"

interface Facts {
  readonly dataDir: string
  readonly backend: number
  readonly database: string
  readonly port: number
}

const facts = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(
    sql<Facts>`SELECT current_setting('data_directory') AS "dataDir", pg_backend_pid() AS backend,
      current_database() AS database, current_setting('port')::int AS port`,
    ([row]) => row!
  )
)

/** Builds the layer for a scope of its own, which the program closes. */
const opened = (options?: DbEmbedded.DbEmbeddedOptions) =>
  Effect.gen(function* () {
    const scope = yield* Scope.make()
    yield* Effect.addFinalizer((exit) => Scope.close(scope, exit))
    const context = yield* Layer.buildWithScope(quietly(DbEmbedded.layer(options)), scope)
    return {
      run: <A, E>(effect: Effect.Effect<A, E, Services>) => Effect.provide(effect, context),
      context: context as Context.Context<Services>,
      close: Scope.close(scope, Exit.void)
    }
  })

const refusesConnections = (port: number) =>
  Effect.async<boolean>((resume) => {
    const socket = createConnection({ host: "127.0.0.1", port })
    socket.once("connect", () => {
      socket.destroy()
      resume(Effect.succeed(false))
    })
    socket.once("error", () => resume(Effect.succeed(true)))
  })

describe("DbEmbedded.layer", () => {
  it.scopedLive("is a PostgreSQL and everything of DbLayer, and is gone with its data when the scope closes", () =>
    Effect.gen(function* () {
      const db = yield* opened()
      const { sql } = yield* db.run(DbSession)
      yield* db.run(sql`CREATE TABLE t (id int)`)
      yield* db.run(DbSession.autocommit(withTransaction(sql`INSERT INTO t VALUES (1)`)))
      yield* db.run(
        Effect.ignore(DbSession.autocommit(Effect.zipRight(sql`INSERT INTO t VALUES (2)`, Effect.fail("no"))))
      )
      expect(yield* db.run(sql`SELECT id FROM t`)).toEqual([{ id: 1 }])
      const { backend, dataDir, database, port } = yield* db.run(facts)
      expect(database).toBe("postgres")
      expect(isAlive(backend)).toBe(true)
      expect(existsSync(dataDir)).toBe(true)
      const stats = yield* db.run(DbEngine.stats)
      expect(stats).toMatchObject({ used: 0, pending: 0 })
      yield* db.close
      expect(isAlive(backend)).toBe(false)
      expect(existsSync(dataDir)).toBe(false)
      expect(yield* refusesConnections(port)).toBe(true)
      expect(yield* reason(db.run(sql`SELECT 1`))).toBe("PoolClosed")
    })
  )

  it.scopedLive("keeps what is in dataDir over two layers, and two at once have nothing in common", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "data")
      const [first, other] = yield* Effect.all([opened({ dataDir, database: "kept" }), opened()], { concurrency: 2 })
      const create = Effect.flatMap(DbSession, ({ sql }) => sql`CREATE TABLE kept AS SELECT 7 AS n`)
      const read = Effect.flatMap(DbSession, ({ sql }) => sql`SELECT n FROM kept`)
      yield* first.run(create)
      const here = yield* first.run(facts)
      expect(here.database).toBe("kept")
      expect(here.dataDir).toBe(dataDir)
      expect((yield* other.run(facts)).port).not.toBe(here.port)
      expect(yield* reason(other.run(read))).toBe("SqlSyntaxError")
      yield* Effect.all([first.close, other.close], { concurrency: 2 })
      expect(isAlive(here.backend)).toBe(false)
      expect(existsSync(dataDir)).toBe(true)

      const second = yield* opened({ dataDir, database: "kept" })
      expect(yield* second.run(read)).toEqual([{ n: 7 }])
      yield* second.close
      expect(existsSync(dataDir)).toBe(true)
    })
  )

  it.scopedLive("the engine and the server are told their options, and work in hand ends before the server does", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "data")
      const db = yield* opened({
        dataDir,
        settings: { work_mem: "7MB" },
        engine: { maxConnections: 2, isolation: "serializable", applicationName: "mine", implicitExecution: "forbid" }
      })
      const { sql } = yield* db.run(DbSession)
      expect(yield* reason(db.run(sql`SELECT 1`))).toBe("NoSession")
      const settings = sql`SELECT current_setting('transaction_isolation') AS level,
        current_setting('application_name') AS name, current_setting('work_mem') AS memory`
      expect(yield* db.run(DbSession.autocommit(settings))).toEqual([
        { level: "serializable", name: "mine", memory: "7MB" }
      ])
      expect((yield* db.run(DbEngine.stats)).max).toBe(2)

      yield* db.run(DbSession.autocommit(sql`CREATE TABLE t (id int)`))
      const gate = yield* Deferred.make<void>()
      const inside = yield* Deferred.make<void>()
      const work = yield* Effect.fork(
        db.run(
          DbSession.autocommit(
            Effect.all([
              sql`INSERT INTO t VALUES (1)`,
              Deferred.succeed(inside, undefined),
              Deferred.await(gate),
              sql`INSERT INTO t VALUES (2)`
            ])
          )
        )
      )
      yield* Deferred.await(inside)
      const closing = yield* Effect.fork(db.close)
      yield* until(
        "new work is refused",
        Effect.match(db.run(DbSession.autocommit(sql`SELECT 1`)), {
          onFailure: (error) => DbError.reason(error)?._tag === "PoolClosed",
          onSuccess: () => false
        })
      )
      yield* Deferred.succeed(gate, undefined)
      yield* Fiber.join(work)
      yield* Fiber.join(closing)

      const again = yield* opened({ dataDir })
      expect(yield* again.run(Effect.flatMap(DbSession, (_) => _.sql`SELECT id FROM t ORDER BY id`))).toEqual([
        { id: 1 },
        { id: 2 }
      ])
    })
  )

  it.scopedLive("where the engine's options are wrong it fails typed, and no server is left", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "data")
      const lines: Array<string> = []
      const error = yield* Effect.flip(
        opened({ dataDir, persistent: false, onLog: (line) => lines.push(line), engine: { maxConnections: 0 } })
      )
      expect(DbError.reason(error)?._tag).toBe("InvalidInput")
      expect(existsSync(dataDir)).toBe(false)
      const pid = Number(/\[(\d+)\]/.exec(lines[0] ?? "")?.[1])
      expect(pid).toBeGreaterThan(1)
      expect(isAlive(pid)).toBe(false)
    })
  )

  it.scopedLive("where the server can't start it fails with its error", () =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(opened({ settings: { no_such_setting: 1 } }))
      expect((error as { readonly _tag: string })._tag).toBe("EmbeddedError")
    })
  )
})

describe("DbEmbedded.layerOrUrl", () => {
  /** With this value of the variable, for the scope. */
  const withUrl = (value: string | undefined) =>
    Effect.acquireRelease(
      Effect.sync(() => {
        const before = process.env.DATABASE_URL
        if (value === undefined) delete process.env.DATABASE_URL
        else process.env.DATABASE_URL = value
        return before
      }),
      (before) =>
        Effect.sync(() => {
          if (before === undefined) delete process.env.DATABASE_URL
          else process.env.DATABASE_URL = before
        })
    )

  it.scopedLive("goes to DATABASE_URL when it is set, and starts a server when it is not", () =>
    Effect.gen(function* () {
      const port = yield* Effect.scoped(
        Effect.gen(function* () {
          yield* withUrl(undefined)
          const context = yield* Layer.build(quietly(DbEmbedded.layerOrUrl()))
          return (yield* Effect.provide(facts, context)).port
        })
      )
      expect(yield* refusesConnections(port)).toBe(true)
      yield* withUrl(`postgres://nobody@127.0.0.1:${port}/postgres`)
      const context = yield* Layer.build(quietly(DbEmbedded.layerOrUrl({ engine: { applicationName: "mine" } })))
      expect(Context.get(context, DbEngine).host).toEqual({ host: "127.0.0.1", port })
      expect(yield* reason(Effect.provide(facts, context))).toBe("ConnectionError")
    })
  )
})
