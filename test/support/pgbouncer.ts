/**
 * A real PgBouncer in front of a server, for the length of a scope.
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import type { ChildProcess } from "node:child_process"
import { existsSync } from "node:fs"
import { chown, writeFile } from "node:fs/promises"
import { createServer } from "node:net"
import type { AddressInfo } from "node:net"
import { join } from "node:path"
import { chooseAccount, spawnChild } from "../../src/embedded/internal/processes.js"
import { clusterFolder } from "./cluster.js"
import { query } from "./database.js"
import { until } from "./until.js"

/** Where it is installed. */
export const pgbouncerProgram = ["/usr/sbin/pgbouncer", "/usr/local/bin/pgbouncer", "/opt/homebrew/bin/pgbouncer"].find(
  (file) => existsSync(file)
)

export interface Pooler {
  /** The server's URL with the pooler's address in it. */
  readonly url: string
  readonly port: number
  /** Ends it at once and with it every connection; while it does not run: nothing. */
  readonly stop: Effect.Effect<void>
  /** Starts it again on its port, and waits until it lets in. */
  readonly start: Effect.Effect<void>
  /** What its console answers: `SHOW POOLS` and so on. */
  readonly console: (command: string) => Effect.Effect<Array<Record<string, unknown>>>
  readonly log: () => ReadonlyArray<string>
}

const freePort = Effect.promise(
  () =>
    new Promise<number>((resolve, reject) => {
      const server = createServer()
      server.once("error", reject).listen(0, "127.0.0.1", () => {
        const { port } = server.address() as AddressInfo
        server.close(() => resolve(port))
      })
    })
)

/** It ends with us, however we end: the shell is told by the end of its input. */
const watched = '"$@" & pid=$!; cat >/dev/null; kill -TERM $pid; wait $pid'

/** Clients log in with the server's own user and password. */
export const pgbouncer = Effect.fnUntraced(function* (
  url: string,
  mode: "session" | "transaction",
  settings: Readonly<Record<string, string | number>> = {}
): Effect.fn.Return<Pooler, never, Scope.Scope> {
  const folder = yield* Effect.orDie(clusterFolder)
  const account = yield* Effect.orDie(chooseAccount(undefined))
  const port = yield* freePort
  const { hostname, password, port: serverPort, username } = new URL(url)
  const users = join(folder, "users.txt")
  const config = join(folder, "pgbouncer.ini")
  const lines = {
    listen_addr: "127.0.0.1",
    listen_port: port,
    unix_socket_dir: "",
    auth_type: "scram-sha-256",
    auth_file: users,
    admin_users: decodeURIComponent(username),
    pool_mode: mode,
    default_pool_size: 20,
    max_client_conn: 200,
    ...settings
  }
  yield* Effect.promise(async () => {
    await writeFile(users, `"${decodeURIComponent(username)}" "${decodeURIComponent(password)}"\n`, { mode: 0o600 })
    await writeFile(
      config,
      [
        "[databases]",
        `* = host=${hostname} port=${serverPort || 5432}`,
        "[pgbouncer]",
        ...Object.entries(lines).map(([name, value]) => `${name} = ${value}`),
        ""
      ].join("\n")
    )
    if (account !== undefined) await chown(users, account.uid, account.gid)
  })
  const at = new URL(url)
  at.hostname = "127.0.0.1"
  at.port = String(port)
  const consoleUrl = new URL(at)
  consoleUrl.pathname = "/pgbouncer"
  const log: Array<string> = []
  let child: ChildProcess | undefined = undefined
  const console_ = (command: string) => query(consoleUrl.href, command)
  const start = Effect.suspend(() => {
    if (child !== undefined) return Effect.void
    const now = spawnChild("/bin/sh", ["-c", watched, "sh", pgbouncerProgram!, config], { account, stdin: "pipe" })
    child = now
    for (const stream of [now.stdout, now.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => void log.push(text))
    }
    return until(
      "the pooler lets in",
      Effect.match(Effect.sandbox(console_("SHOW VERSION")), { onFailure: () => false, onSuccess: () => true }),
      10_000
    ).pipe(Effect.tapDefect(() => Effect.logError(log.join(""))))
  })
  const stop = Effect.suspend(() => {
    const now = child
    child = undefined
    if (now === undefined || now.exitCode !== null) return Effect.void
    return Effect.async<void>((resume) => {
      now.once("close", () => resume(Effect.void))
      now.stdin!.end()
    })
  })
  yield* Effect.addFinalizer(() => stop)
  yield* start
  return { url: at.href, port, stop, start, console: console_, log: () => log }
})
