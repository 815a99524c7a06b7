/**
 * A server of our own, a proxy in front of it, and what can be seen of both from outside: by plain `pg` past the
 * proxy, and in the tables of the operating system.
 */
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import type { SqlError } from "@effect/sql/SqlError"
import { DbLayer } from "effect-db"
import type { DbConnection, DbEngine, DbOptions, DbSession, EngineService } from "effect-db"
import { EmbeddedServer } from "effect-db/embedded"
import type { EmbeddedError, EmbeddedServerOptions } from "effect-db/embedded"
import { readdirSync, readFileSync, readlinkSync } from "node:fs"
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import Pg from "pg"
import { proxy as makeProxy } from "../test/support/proxy.js"
import type { PgProxy } from "../test/support/proxy.js"

/** How the engine under test calls itself, so that the server can tell its backends. */
export const applicationName = "effect-db chaos"

export interface World {
  readonly server: EmbeddedServer
  readonly proxy: PgProxy
  /** Past the proxy, on a connection of its own. Fails when the server is away. */
  readonly ask: <A extends object = Record<string, unknown>>(
    text: string,
    values?: ReadonlyArray<unknown>
  ) => Effect.Effect<Array<A>, Error>
}

const asError = (cause: unknown): Error => (cause instanceof Error ? cause : new Error(String(cause)))

const asker =
  (url: string): World["ask"] =>
  (text, values) =>
    Effect.tryPromise({
      try: async () => {
        const client = new Pg.Client({ connectionString: url, application_name: "observer" })
        client.on("error", () => {})
        try {
          await client.connect()
          return (await client.query(text, values === undefined ? undefined : [...values])).rows
        } finally {
          await client.end()
        }
      },
      catch: asError
    })

/** Data are thrown away at the end, but until then written as carefully as those that are kept. */
const durable = { fsync: true, full_page_writes: true, deadlock_timeout: "20ms" }

export const makeWorld = (
  settings: EmbeddedServerOptions["settings"] = {}
): Effect.Effect<World, EmbeddedError, Scope.Scope> =>
  Effect.gen(function* () {
    const server = yield* EmbeddedServer.start({
      settings: { max_connections: 100, shared_buffers: "32MB", ...durable, ...settings }
    })
    const url = Redacted.value(server.url)
    return { server, proxy: yield* makeProxy(url), ask: asker(url) }
  })

export type Services = DbEngine | DbConnection | DbSession

const quiet = Logger.minimumLogLevel(LogLevel.None)

/** An engine of its own through the proxy, for one program. What it would log is part of the play. */
export const onEngine =
  (world: World, options: DbOptions = {}) =>
  <A, E>(program: Effect.Effect<A, E, Services>): Effect.Effect<A, E | SqlError> =>
    program.pipe(
      Effect.provide(Layer.provide(DbLayer({ url: world.proxy.url, applicationName, ...options }), quiet)),
      Effect.provide(quiet)
    )

/** Looks again until it is so; `undefined`: it is, else what was seen last. */
export const settles = <A, E, R>(
  look: Effect.Effect<A, E, R>,
  holds: (seen: A) => boolean,
  withinMillis = 5000
): Effect.Effect<A | undefined, E, R> =>
  Effect.suspend(() => {
    const deadline = performance.now() + withinMillis
    const again: Effect.Effect<A | undefined, E, R> = Effect.flatMap(look, (seen) =>
      holds(seen)
        ? Effect.succeed(undefined)
        : performance.now() > deadline
          ? Effect.succeed(seen)
          : Effect.delay(again, "20 millis")
    )
    return again
  })

export interface Backends {
  readonly total: number
  readonly inTransaction: number
}

const backends = (world: World): Effect.Effect<Backends, Error> =>
  Effect.map(
    world.ask<Backends>(
      `SELECT count(*)::int AS "total",
              count(*) FILTER (WHERE state <> 'idle')::int AS "inTransaction"
         FROM pg_stat_activity WHERE application_name = $1`,
      [applicationName]
    ),
    ([row]) => row!
  )

/** What is not as it should be when nothing is running. */
export const unrest = (world: World, engine: EngineService): Effect.Effect<ReadonlyArray<string>, Error> =>
  Effect.gen(function* () {
    const faults: Array<string> = []
    const still = yield* settles(
      engine.stats,
      (_) => _.used + _.pending + _.connecting + _.closing === 0 && _.idle === _.total && _.total <= _.max
    )
    if (still !== undefined) faults.push(`the pool is not at rest: ${JSON.stringify(still)}`)
    const { total } = yield* engine.stats
    const there = yield* settles(backends(world), (_) => _.inTransaction === 0 && _.total === total)
    if (there !== undefined) faults.push(`the pool has ${total} connections, the server ${JSON.stringify(there)}`)
    return faults
  })

/** Open file descriptors of this process by what they are; nothing where the system does not tell. */
export const openFiles = (): ReadonlyArray<string> | undefined => {
  const nameOf = (fd: string): string => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`)
    } catch {
      return "the listing itself"
    }
  }
  try {
    return readdirSync("/proc/self/fd").map(nameOf)
  } catch {
    return undefined
  }
}

/** With the peers of sockets, as far as the system tells. */
export const describeFiles = (names: ReadonlyArray<string>): string => {
  const inodes = names.flatMap((_) => /^socket:\[(\d+)\]$/.exec(_)?.[1] ?? [])
  try {
    const lines = readFileSync("/proc/self/net/tcp", "utf8")
      .split("\n")
      .map((_) => _.trim().split(/\s+/))
    const peers = inodes.map(
      (inode) =>
        lines
          .find((_) => _[9] === inode)
          ?.slice(1, 4)
          .join(" ") ?? `no TCP: ${inode}`
    )
    return [...names.filter((_) => !_.startsWith("socket")), ...peers].join(", ")
  } catch {
    return names.join(", ")
  }
}

setFlagsFromString("--expose-gc")
const gc = runInNewContext("gc") as () => void

/** What is reachable, in bytes. */
export const heap = (): number => {
  gc()
  gc()
  return process.memoryUsage().heapUsed
}

/** Whether it is a child of the server: a pid may belong to somebody else by now. */
export const isBackend = (world: World, pid: number): Effect.Effect<boolean> =>
  Effect.gen(function* () {
    const postmaster = yield* world.server.pid
    if (Option.isNone(postmaster)) return false
    try {
      const stat = readFileSync(`/proc/${pid}/stat`, "utf8")
      return Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]) === postmaster.value
    } catch {
      if (process.platform === "linux") return false
    }
    const rows = yield* Effect.orElseSucceed(
      world.ask("SELECT 1 FROM pg_stat_activity WHERE pid = $1 AND backend_type = 'client backend'", [pid]),
      () => []
    )
    return rows.length > 0
  })
