import { it } from "@effect/vitest"
import { DbEngine, DbLayer, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { execFileSync } from "node:child_process"
import { chown, mkdir, mkdtemp, rmdir } from "node:fs/promises"
import { mkdtempSync, rmdirSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { describe, expect } from "vitest"
import { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import { chooseAccount, isRoot } from "../src/embedded/internal/processes.js"
import { clusterFolder, urlOf } from "./support/cluster.js"
import { testDatabase } from "./support/database.js"
import { programsOn, quietly } from "./support/programs.js"
import { reasonOf, run } from "./support/wired.js"

// FAULTS.md 30: a disk that is really full, or as full as it may be.

const count = Effect.map(run("SELECT count(*)::int AS n FROM t"), ([row]) => row!["n"])
const pid = Effect.map(run("SELECT pg_backend_pid() AS pid"), ([row]) => row!["pid"])

/** A query that sorts more than fits into memory. */
const spill = "SELECT n FROM generate_series(1, 2000000) n ORDER BY md5(n::text) LIMIT 1"

/** Fails as told, in a transaction whose work is undone, and leaves the connection as good as it was. */
const fails = (state: string, work: Effect.Effect<unknown, unknown, DbEngine>) =>
  Effect.gen(function* () {
    const before = yield* pid
    const reason = yield* reasonOf(withTransaction(Effect.zipRight(run("INSERT INTO t (id) VALUES (1)"), work)))
    expect(reason.sqlState).toBe(state)
    expect(reason.hint).toMatch(/disk|limit/)
    expect(yield* count).toBe(0)
    expect(yield* pid).toBe(before)
    yield* run("INSERT INTO t (id) VALUES (2)")
    expect(yield* count).toBe(1)
  })

describe("a limit on temporary files", () => {
  const database = testDatabase()
  const test = programsOn(database)

  test(
    "FAULTS 30: is typed, rolled back, and the connection goes on",
    () =>
      fails(
        "53400",
        Effect.zipRight(run("SET LOCAL work_mem = '64kB'; SET LOCAL temp_file_limit = '1MB'"), run(spill))
      ),
    { maxConnections: 1 }
  )
})

const mount = (folder: string) =>
  execFileSync("mount", ["-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], { stdio: "pipe" })
const unmount = (folder: string) => execFileSync("umount", [folder], { stdio: "pipe" })

/** Whether this process may: root of a container often may not. */
const mayMount = ((): boolean => {
  if (process.platform !== "linux" || !isRoot()) return false
  const folder = mkdtempSync(join(tmpdir(), "effect-db-mount-"))
  try {
    mount(folder)
    unmount(folder)
    return true
  } catch {
    return false
  } finally {
    rmdirSync(folder)
  }
})()

describe.skipIf(!mayMount)(`a disk that is full${mayMount ? "" : ": this process may not mount one"}`, () => {
  /** A server with a tablespace on a disk of 4 MB. */
  const small = Effect.gen(function* () {
    const folder = yield* clusterFolder
    const account = yield* chooseAccount(undefined)
    const disk = yield* Effect.acquireRelease(
      Effect.promise(async () => {
        const disk = await mkdtemp(join(folder, "disk-"))
        mount(disk)
        return disk
      }),
      (disk) =>
        Effect.promise(async () => {
          unmount(disk)
          await rmdir(disk)
        })
    )
    const place = join(disk, "place")
    yield* Effect.promise(async () => {
      await mkdir(place, { mode: 0o700 })
      for (const path of [disk, place]) if (account !== undefined) await chown(path, account.uid, account.gid)
    })
    const server = yield* EmbeddedServer.start()
    return quietly(DbLayer({ url: urlOf(server), maxConnections: 1 })).pipe((layer) => ({ layer, place }))
  })

  const test = (name: string, body: Effect.Effect<void, unknown, DbEngine | Scope.Scope>) =>
    it.scopedLive(name, () =>
      Effect.gen(function* () {
        const { layer, place } = yield* small
        yield* Effect.gen(function* () {
          yield* run(`CREATE TABLESPACE small LOCATION '${place}'`)
          yield* run("CREATE TABLE t (id int PRIMARY KEY, note text) TABLESPACE small")
          yield* body
          expect((yield* DbEngine.stats).used).toBe(0)
        }).pipe(Effect.provide(layer))
      })
    )

  test(
    "FAULTS 30: under a table: typed, rolled back, and the connection goes on",
    fails("53100", run("INSERT INTO t SELECT n, repeat('x', 1000) FROM generate_series(10, 10000) n"))
  )

  test(
    "FAULTS 30: under temporary files: typed, rolled back, and the connection goes on",
    fails(
      "53100",
      Effect.zipRight(run("SET LOCAL work_mem = '64kB'; SET LOCAL temp_tablespaces = 'small'"), run(spill))
    )
  )
})
