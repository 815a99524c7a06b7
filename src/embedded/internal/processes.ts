/**
 * Child processes: which account they run as, what they inherit, how they are ended.
 */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberId from "effect/FiberId"
import { spawn } from "node:child_process"
import type { ChildProcess } from "node:child_process"
import { readFileSync } from "node:fs"
import { readFile } from "node:fs/promises"
import { EmbeddedError } from "../EmbeddedError.js"

/** @internal */
export const windows = process.platform === "win32"

/** @internal */
export const isRoot = (): boolean => process.geteuid?.() === 0

/** @internal */
export interface Account {
  readonly name: string
  readonly uid: number
  readonly gid: number
}

/** @internal */
export const attempt = <A>(evaluate: () => Promise<A>): Effect.Effect<A, NodeJS.ErrnoException> =>
  Effect.tryPromise({ try: evaluate, catch: (cause) => cause as NodeJS.ErrnoException })

/**
 * What a child inherits of the environment: nothing that changes its behaviour (`PG*`, `LC_*`, `TZ`, `NODE_OPTIONS`)
 * and no secret of the program, which anybody with `COPY ... PROGRAM` could read.
 */
const inherited = windows
  ? ["PATH", "Path", "PATHEXT", "SystemRoot", "SystemDrive", "windir", "ComSpec", "TEMP", "TMP"]
  : ["PATH"]

const environment = (): Record<string, string> => {
  const env: Record<string, string> = { LC_ALL: "C", TZ: "UTC" }
  for (const name of inherited) {
    const value = process.env[name]
    if (value !== undefined) env[name] = value
  }
  return env
}

/** @internal */
export interface SpawnOptions {
  /** Root only: the account to become. */
  readonly account?: Account | undefined
  readonly stdin?: "pipe" | undefined
  readonly output?: "ignore" | undefined
  readonly env?: Record<string, string> | undefined
}

/**
 * A child in a process group of its own, so that Ctrl-C in a terminal reaches our finalizers and not the child.
 * An error of `spawn` arrives as the `error` event or is thrown: the caller takes both.
 *
 * @internal
 */
export const spawnChild = (file: string, args: ReadonlyArray<string>, options: SpawnOptions = {}): ChildProcess => {
  const output = options.output ?? "pipe"
  return spawn(file, args, {
    // the working directory of this process may be closed to the account
    ...(windows ? {} : { cwd: "/" }),
    // accounts like macOS's nobody (-2) are signed here and unsigned in a chown
    ...(options.account === undefined ? {} : { uid: options.account.uid | 0, gid: options.account.gid | 0 }),
    env: { ...environment(), ...options.env },
    stdio: [options.stdin ?? "ignore", output, output],
    detached: true,
    windowsHide: true
  })
}

/** @internal */
export const killGroup = (pid: number, signal: NodeJS.Signals): void => {
  try {
    process.kill(windows ? pid : -pid, signal)
  } catch {
    // it has ended
  }
}

/** @internal */
export interface Run {
  readonly code: number | null
  readonly output: string
  readonly error: NodeJS.ErrnoException | undefined
}

/** @internal */
export const succeeded = (run: Run): boolean => run.error === undefined && run.code === 0

/**
 * Runs a program to its end. Never fails: the result says what happened. Interruption kills the whole group and
 * returns when it is gone.
 *
 * @internal
 */
export const run = (
  file: string,
  args: ReadonlyArray<string>,
  options: {
    readonly account?: Account | undefined
    readonly onPid?: ((pid: number | undefined) => void) | undefined
  } = {}
): Effect.Effect<Run> =>
  Effect.async<Run>((resume) => {
    const ended = Deferred.unsafeMake<Run>(FiberId.none)
    let output = ""
    const end = (code: number | null, error: NodeJS.ErrnoException | undefined) => {
      options.onPid?.(undefined)
      Deferred.unsafeDone(ended, Exit.succeed({ code, output: output.trim(), error }))
      resume(Deferred.await(ended))
    }
    let child: ChildProcess
    try {
      child = spawnChild(file, args, { account: options.account })
    } catch (error) {
      return end(null, error as NodeJS.ErrnoException)
    }
    const pid = child.pid
    if (pid !== undefined) options.onPid?.(pid)
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => {
        output += text
      })
    }
    child.once("error", (error) => end(null, error))
    child.once("close", (code) => end(code, undefined))
    return Effect.suspend(() => {
      if (pid !== undefined) killGroup(pid, "SIGKILL")
      return Effect.asVoid(Deferred.await(ended))
    })
  })

const preferred = ["postgres", "_postgres", "nobody"]

const parseAccounts = (passwd: string): ReadonlyArray<Account> => {
  const accounts: Array<Account> = []
  for (const line of passwd.split("\n")) {
    const [name, , uid, gid] = line.split(":")
    if (name === undefined || uid === undefined || gid === undefined || line.startsWith("#")) continue
    const account = { name, uid: Number(uid), gid: Number(gid) }
    if (Number.isInteger(account.uid) && Number.isInteger(account.gid)) accounts.push(account)
  }
  return accounts
}

/** @internal */
export const accountName = (uid: number): string => {
  try {
    const accounts = parseAccounts(readFileSync("/etc/passwd", "utf8"))
    return accounts.find((account) => account.uid >>> 0 === uid >>> 0)?.name ?? `uid ${uid}`
  } catch {
    return `uid ${uid}`
  }
}

/**
 * The account that PostgreSQL, which refuses to run as root, is run as: `undefined` is this process's own. As root the
 * owner of an existing data folder, else `postgres`, `nobody` or any other of `/etc/passwd` that this process may
 * become: a container can forbid it.
 *
 * @internal
 */
export const chooseAccount = Effect.fnUntraced(function* (
  owner: Account | undefined,
  passwdFile: string = "/etc/passwd"
): Effect.fn.Return<Account | undefined, EmbeddedError> {
  if (!isRoot()) return undefined
  const passwd = yield* Effect.orElseSucceed(
    attempt(() => readFile(passwdFile, "utf8")),
    () => ""
  )
  const known = parseAccounts(passwd).filter((account) => account.uid !== 0)
  const rank = (account: Account) => (preferred.includes(account.name) ? preferred.indexOf(account.name) : Infinity)
  const candidates =
    owner === undefined ? known.toSorted((a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b))) : [owner]
  let refusal: Run | undefined
  for (const account of candidates) {
    const probe = yield* run("/bin/sh", ["-c", "exit 0"], { account })
    if (succeeded(probe)) return account
    refusal = probe
  }
  return yield* new EmbeddedError({
    reason: "NoAccount",
    problem:
      refusal === undefined
        ? "PostgreSQL refuses to run as root, and this system has no other account to run it as"
        : `PostgreSQL refuses to run as root, and this process may not become another account (${candidates
            .slice(0, 3)
            .map((account) => account.name)
            .join(", ")}: ${refusal.error?.code ?? `exit code ${refusal.code}`})`,
    hint:
      refusal === undefined
        ? "Add one (`useradd --system postgres`), run this process as an ordinary user, or set DATABASE_URL to a server of your own"
        : "Run this process as an ordinary user, or set DATABASE_URL to a server of your own",
    cause: refusal?.error
  })
})

/**
 * Whether the account, or without one this process, can enter the folder. Asked of the system, which knows about
 * access lists and mounts.
 *
 * @internal
 */
export const canEnter = (folder: string, account: Account | undefined): Effect.Effect<boolean> =>
  windows
    ? Effect.succeed(true)
    : Effect.map(run("/bin/sh", ["-c", 'cd -- "$1"', "sh", folder], { account }), succeeded)

/**
 * Whether a process with this id runs. One that has ended and that nobody waited for does not.
 *
 * @internal
 */
export const isAlive = (pid: number): boolean => {
  try {
    process.kill(pid, 0)
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM"
  }
  try {
    return !/\) [ZX] /.test(readFileSync(`/proc/${pid}/stat`, "utf8"))
  } catch {
    return true
  }
}
