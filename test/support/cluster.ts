/**
 * Real servers of one cluster: a primary and standbys that stream from it. A standby is made as `pg_basebackup` makes
 * it, by a backup of the running primary, so that the binaries of npm are enough. Everything ends with the scope.
 */
import * as Effect from "effect/Effect"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import { randomBytes } from "node:crypto"
import { existsSync, readdirSync } from "node:fs"
import { appendFile, copyFile, mkdir, readdir, rm, writeFile } from "node:fs/promises"
import { basename, join } from "node:path"
import Pg from "pg"
import { EmbeddedServer, type EmbeddedServerOptions } from "../../src/embedded/EmbeddedServer.js"
import type { EmbeddedError } from "../../src/embedded/EmbeddedError.js"
import { temporaryBase } from "../../src/embedded/internal/folders.js"
import { chooseAccount } from "../../src/embedded/internal/processes.js"
import { query } from "./database.js"
import { until } from "./until.js"

/** The servers of the system, by major version: where Debian and its like put them. */
export const installed: Readonly<Record<string, string>> = Object.fromEntries(
  (existsSync("/usr/lib/postgresql") ? readdirSync("/usr/lib/postgresql") : [])
    .map((major) => [major, `/usr/lib/postgresql/${major}`] as const)
    .filter(([, folder]) => existsSync(join(folder, "bin", "initdb")))
)

const secret = "cluster"

/** Nothing here has to survive the machine, and a test waits for all of it. */
const settings = {
  fsync: false,
  wal_keep_size: "256MB",
  max_connections: 100,
  wal_receiver_status_interval: "100ms",
  wal_retrieve_retry_interval: "50ms",
  hot_standby_feedback: true
}

/** A folder that the account of the servers can enter, removed with the scope. */
export const clusterFolder: Effect.Effect<string, EmbeddedError, Scope.Scope> = Effect.acquireRelease(
  Effect.gen(function* () {
    const base = yield* temporaryBase(yield* chooseAccount(undefined))
    const folder = join(base, `cluster-${randomBytes(6).toString("hex")}`)
    yield* Effect.promise(() => mkdir(folder, { mode: 0o755 }))
    return folder
  }),
  (folder) => Effect.promise(() => rm(folder, { recursive: true, force: true, maxRetries: 10, retryDelay: 50 }))
)

export const urlOf = (server: EmbeddedServer): string => Redacted.value(server.url)

/** Asks a server from outside. */
export const ask = <A extends object = Record<string, unknown>>(server: EmbeddedServer, text: string) =>
  Effect.suspend(() => query<A>(urlOf(server), text))

/** Starts a server on `folder/name`, or a new one where nothing is. */
const start = (
  folder: string,
  name: string,
  options: EmbeddedServerOptions = {}
): Effect.Effect<EmbeddedServer, EmbeddedError, Scope.Scope> =>
  EmbeddedServer.start({
    ...options,
    dataDir: join(folder, name),
    password: secret,
    settings: { ...settings, cluster_name: name, ...options.settings }
  })

/** What a backup leaves out: of the running server alone, or made anew. */
const leftOut = new Set(["postmaster.pid", "postmaster.opts", "effect-db.password", "standby.signal"])
const emptied = new Set([
  "pg_wal",
  "pg_replslot",
  "pg_dynshmem",
  "pg_notify",
  "pg_serial",
  "pg_snapshots",
  "pg_stat_tmp",
  "pg_subtrans"
])

/** Files of a running server come and go; what is not there any more is in the log. */
const copy = async (from: string, to: string, top: boolean): Promise<void> => {
  await mkdir(to, { mode: 0o700 })
  for (const entry of await readdir(from, { withFileTypes: true })) {
    if (entry.name.startsWith("pgsql_tmp") || (top && leftOut.has(entry.name))) continue
    const [source, target] = [join(from, entry.name), join(to, entry.name)]
    if (entry.isDirectory()) {
      if (top && emptied.has(entry.name)) await mkdir(target, { mode: 0o700 })
      else await copy(source, target, false)
    } else {
      await copyFile(source, target).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== "ENOENT") throw error
      })
    }
  }
  if (top) await mkdir(join(to, "pg_wal", "archive_status"), { mode: 0o700 })
}

/** A base backup of a running primary, by the protocol of `pg_basebackup`, ready to be started as its standby. */
const backup = (primary: EmbeddedServer, to: string, name: string): Effect.Effect<void> =>
  Effect.promise(async () => {
    const client = new Pg.Client({ connectionString: urlOf(primary) })
    await client.connect()
    try {
      await client.query("SELECT pg_backup_start('standby', true)")
      await copy(primary.dataDir, to, true)
      const { rows } = await client.query<{ label: string }>("SELECT labelfile AS label FROM pg_backup_stop(false)")
      await writeFile(join(to, "backup_label"), rows[0]!.label)
    } finally {
      await client.end()
    }
    const conninfo = `host=${primary.host} port=${primary.port} user=${primary.user} password=${secret} application_name=${name}`
    await appendFile(join(to, "postgresql.auto.conf"), `primary_conninfo = '${conninfo}'\n`)
    await writeFile(join(to, "standby.signal"), "")
  })

/** Waits until this many standbys stream from a primary. */
export const streaming = (primary: EmbeddedServer, standbys: number): Effect.Effect<void> =>
  until(
    "the standby streams",
    Effect.map(
      ask<{ n: number }>(primary, "SELECT count(*)::int AS n FROM pg_stat_replication WHERE state = 'streaming'"),
      ([row]) => row!.n === standbys
    ),
    15_000
  )

/** Waits until a standby shows what a primary has done so far. */
export const caughtUp = (primary: EmbeddedServer, standby: EmbeddedServer): Effect.Effect<void> =>
  Effect.flatMap(ask<{ lsn: string }>(primary, "SELECT pg_current_wal_insert_lsn()::text AS lsn"), ([row]) =>
    until(
      "the standby has caught up",
      Effect.map(
        ask<{ there: boolean }>(standby, `SELECT pg_last_wal_replay_lsn() >= '${row!.lsn}'::pg_lsn AS there`),
        ([row]) => row!.there
      ),
      15_000
    )
  )

/** Makes a standby a primary, as `pg_ctl promote` does. */
export const promote = (standby: EmbeddedServer): Effect.Effect<void> =>
  Effect.asVoid(ask(standby, "SELECT pg_promote(true, 30)"))

export interface Cluster {
  /** The first primary. */
  readonly a: EmbeddedServer
  /** The first standby, which streams from it. */
  readonly b: EmbeddedServer
  /** Makes a server that has been stopped a standby of a primary, on its old port: the server from then on. */
  readonly rejoin: (
    old: EmbeddedServer,
    primary: EmbeddedServer
  ) => Effect.Effect<EmbeddedServer, EmbeddedError, Scope.Scope>
}

export interface ClusterOptions extends EmbeddedServerOptions {
  /** A commit on the first primary waits for its standby. */
  readonly synchronous?: boolean | undefined
}

/** A primary `a` and a standby `b` that streams from it. */
export const cluster = Effect.fnUntraced(function* ({
  synchronous = false,
  ...options
}: ClusterOptions = {}): Effect.fn.Return<Cluster, EmbeddedError, Scope.Scope> {
  const folder = yield* clusterFolder
  const a = yield* start(folder, "a", {
    ...options,
    // on the command line: in the data it would come along with a backup, and a promoted standby would wait for itself
    settings: { ...(synchronous ? { synchronous_standby_names: "b" } : {}), ...options.settings }
  })
  yield* backup(a, join(folder, "b"), "b")
  const b = yield* start(folder, "b", options)
  yield* streaming(a, 1)
  return {
    a,
    b,
    rejoin: (old, primary) =>
      Effect.gen(function* () {
        const name = basename(old.dataDir)
        yield* old.stop()
        yield* Effect.promise(() => rm(old.dataDir, { recursive: true, force: true }))
        yield* backup(primary, old.dataDir, name)
        const again = yield* start(folder, name, { ...options, port: old.port })
        yield* streaming(primary, 1)
        return again
      })
  }
})
