/**
 * One `postgres` process on a data folder: started, watched, ended.
 */
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberId from "effect/FiberId"
import type { ChildProcess } from "node:child_process"
import { readFileSync } from "node:fs"
import { readFile, rm } from "node:fs/promises"
import { join } from "node:path"
import { EmbeddedError } from "../EmbeddedError.js"
import type { Binaries } from "./binaries.js"
import type { Guard } from "./guard.js"
import { attempt, isAlive, run, spawnChild, windows } from "./processes.js"
import type { Account } from "./processes.js"

/** @internal */
export interface Launch {
  readonly binaries: Binaries
  readonly guard: Guard
  readonly account: Account | undefined
  readonly dataDir: string
  readonly keep: boolean
  readonly host: string
  readonly port: number
  readonly settings: Readonly<Record<string, string>>
  readonly startTimeout: Duration.Duration
  readonly onLine: (line: string) => void
  /** Asked in the moment of the start: the scope may have ended since. */
  readonly refusal: () => EmbeddedError | undefined
}

/** @internal */
export interface Postmaster {
  readonly pid: number
  /** The process itself has ended. */
  readonly exited: Deferred.Deferred<void>
  /** So have all of its children. */
  readonly drained: Deferred.Deferred<void>
  readonly child: ChildProcess
  readonly lines: Array<string>
  ended: boolean
  /** Was told to end. */
  stopping: boolean
}

const lockFile = (dataDir: string) => join(dataDir, "postmaster.pid")

interface Lock {
  readonly pid: number
  readonly status: string
}

const readLock = (dataDir: string): Effect.Effect<Lock | undefined> =>
  attempt(() => readFile(lockFile(dataDir), "utf8")).pipe(
    Effect.map((text) => {
      const lines = text.split("\n")
      // negative for a server without a postmaster (`postgres --single`)
      return { pid: Math.abs(Number(lines[0])), status: (lines[7] ?? "").trim() }
    }),
    Effect.orElseSucceed(() => undefined)
  )

const spawnPostmaster = (launch: Launch): Effect.Effect<Postmaster, EmbeddedError> =>
  Effect.async<Postmaster, EmbeddedError>((resume) => {
    const refuse = (cause: NodeJS.ErrnoException) =>
      resume(
        new EmbeddedError({
          reason: "StartFailed",
          problem: `PostgreSQL can't be started: ${cause.message}`,
          hint: "Check that the file exists and may be run",
          cause
        })
      )
    const settings = {
      listen_addresses: launch.host,
      // a socket file needs a folder that the account can write and whose name is short: TCP needs neither
      unix_socket_directories: "",
      // what is read below must be in English and on stderr
      lc_messages: "C",
      log_destination: "stderr",
      logging_collector: "off",
      ...launch.settings
    }
    const refusal = launch.refusal()
    if (refusal !== undefined) return resume(refusal)
    let child: ChildProcess
    try {
      child = spawnChild(
        launch.binaries.postgres,
        [
          "-D",
          launch.dataDir,
          "-p",
          String(launch.port),
          ...Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`])
        ],
        { account: launch.account }
      )
    } catch (cause) {
      return refuse(cause as NodeJS.ErrnoException)
    }
    const pid = child.pid
    if (pid === undefined) return void child.once("error", refuse)
    launch.guard.update((task) => (task.server = { pid, dataDir: launch.dataDir, keep: launch.keep }))
    const postmaster: Postmaster = {
      pid,
      exited: Deferred.unsafeMake(FiberId.none),
      drained: Deferred.unsafeMake(FiberId.none),
      child,
      lines: [],
      ended: false,
      stopping: false
    }
    let rest = ""
    child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      const lines = (rest + text).split(/\r?\n/)
      rest = lines.pop() ?? ""
      for (const line of lines) {
        postmaster.lines.push(line)
        launch.onLine(line)
      }
      if (postmaster.lines.length > 500) postmaster.lines.splice(0, postmaster.lines.length - 500)
    })
    child.stdout?.resume()
    child.once("error", () => {})
    child.once("exit", () => {
      postmaster.ended = true
      launch.guard.update((task) => (task.server = undefined))
      Deferred.unsafeDone(postmaster.exited, Exit.void)
    })
    child.once("close", () => Deferred.unsafeDone(postmaster.drained, Exit.void))
    resume(Effect.succeed(postmaster))
  })

const inUse = (launch: Launch, pid: string | undefined): EmbeddedError =>
  new EmbeddedError({
    reason: "DataDirInUse",
    problem: `The data folder ${launch.dataDir} is already in use by a server${pid === undefined ? "" : ` with pid ${pid}`}`,
    hint: "Stop that server or connect to it, or choose another dataDir"
  })

/** Why it ended while it was starting, from what it wrote. */
const explain = (launch: Launch, postmaster: Postmaster): EmbeddedError => {
  const text = postmaster.lines.join("\n")
  if (text.includes('lock file "postmaster.pid" already exists')) {
    return inUse(launch, /\(PID (\d+)\)/.exec(text)?.[1])
  }
  if (text.includes("pre-existing shared memory block")) return inUse(launch, undefined)
  if (/could not bind|could not create any TCP\/IP sockets/.test(text)) {
    const taken = /in use/i.test(text)
    return new EmbeddedError({
      reason: taken ? "PortInUse" : "StartFailed",
      problem: taken
        ? `Port ${launch.port} on ${launch.host} is in use`
        : `PostgreSQL can't listen on port ${launch.port} of ${launch.host}: ${/could not bind[^\n]*/.exec(text)?.[0] ?? text}`,
      hint: taken
        ? "Stop what uses it, choose another port, or leave the port out to get a free one"
        : "Choose another host or port"
    })
  }
  const words = postmaster.lines
    .filter((line) => /FATAL|PANIC|ERROR|DETAIL|HINT|not permitted/.test(line))
    .slice(-6)
    .map((line) => line.replace(/^.*? (?=FATAL|PANIC|ERROR|DETAIL|HINT)/, "").replace(/:\s+/, ": "))
  return new EmbeddedError({
    reason: text.includes("database files are incompatible with server") ? "DataDirVersion" : "StartFailed",
    problem: `PostgreSQL ended while starting: ${words.join(" ") || text.trim() || "it wrote nothing"}`,
    hint: "See what it says; `settings` and `dataDir` are what it was started with"
  })
}

const signal = (launch: Launch, pid: number, name: "INT" | "QUIT" | "TERM" | "KILL"): Effect.Effect<void> =>
  windows && name !== "KILL"
    ? Effect.asVoid(run(launch.binaries.pgCtl, ["kill", name, String(pid)]))
    : Effect.sync(() => {
        try {
          process.kill(pid, `SIG${name}`)
        } catch {
          // it has ended
        }
      })

/** Bounded also in a finalizer, where nothing else can be interrupted. */
const awaitFor = (deferred: Deferred.Deferred<void>, limit: Duration.Duration): Effect.Effect<void> =>
  Effect.asVoid(Effect.timeoutOption(Effect.interruptible(Deferred.await(deferred)), limit))

/**
 * Waits until everybody who shares the log's pipe has gone; a program that a backend started may keep it open.
 *
 * @internal
 */
export const drained = (postmaster: Postmaster): Effect.Effect<void> =>
  Effect.zipRight(Deferred.await(postmaster.exited), awaitFor(postmaster.drained, Duration.seconds(5)))

/**
 * Ends it and waits until it is gone with all of its children. `smart` waits for clients without a limit; the others
 * are followed by stronger means when it does not end within `limit`.
 *
 * @internal
 */
export const halt = Effect.fnUntraced(function* (
  launch: Launch,
  postmaster: Postmaster,
  mode: "fast" | "immediate" | "smart",
  limit: Duration.Duration
): Effect.fn.Return<void> {
  const steps =
    mode === "smart"
      ? ([["TERM", Duration.infinity]] as const)
      : mode === "fast"
        ? ([
            ["INT", limit],
            ["QUIT", Duration.seconds(5)],
            ["KILL", Duration.infinity]
          ] as const)
        : ([
            ["QUIT", Duration.seconds(5)],
            ["KILL", Duration.infinity]
          ] as const)
  for (const [name, wait] of steps) {
    if (postmaster.ended) break
    yield* signal(launch, postmaster.pid, name)
    if (!Duration.isFinite(wait)) yield* Deferred.await(postmaster.exited)
    else yield* awaitFor(postmaster.exited, wait)
  }
  yield* drained(postmaster)
})

const awaitReady = Effect.fnUntraced(function* (
  launch: Launch,
  postmaster: Postmaster
): Effect.fn.Return<void, EmbeddedError> {
  while (true) {
    if (postmaster.ended) {
      yield* drained(postmaster)
      return yield* explain(launch, postmaster)
    }
    // as pg_ctl does: it does not depend on what the log's settings let through
    const lock = yield* readLock(launch.dataDir)
    if (lock?.pid === postmaster.pid && (lock.status === "ready" || lock.status === "standby")) return
    yield* Effect.sleep("10 millis")
  }
})

const launchOnce = (
  launch: Launch,
  register: (postmaster: Postmaster) => void
): Effect.Effect<Postmaster, EmbeddedError> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.flatMap(spawnPostmaster(launch), (postmaster) => {
      register(postmaster)
      return restore(
        Effect.timeoutFail(awaitReady(launch, postmaster), {
          duration: launch.startTimeout,
          onTimeout: () =>
            new EmbeddedError({
              reason: "Timeout",
              problem: `PostgreSQL did not accept connections within ${Duration.format(launch.startTimeout)}; the last it wrote: ${postmaster.lines.slice(-3).join(" ") || "nothing"}`,
              hint: "Raise startTimeout where recovery after a crash takes its time"
            })
        })
      ).pipe(
        Effect.onExit((exit) =>
          Exit.isFailure(exit) ? halt(launch, postmaster, "immediate", Duration.zero) : Effect.void
        ),
        Effect.map(() => {
          // the server does not keep this process running
          postmaster.child.unref()
          for (const stream of [postmaster.child.stdout, postmaster.child.stderr]) {
            ;(stream as unknown as { readonly unref?: () => void } | null)?.unref?.()
          }
          return postmaster
        })
      )
    })
  )

/** The lock file names a process that runs and is no server: its id was used again, as ids in containers are. */
const isStranger = (pid: number): boolean => {
  if (process.platform !== "linux") return false
  try {
    return readFileSync(`/proc/${pid}/comm`, "utf8").trim() !== "postgres"
  } catch {
    return false
  }
}

/**
 * Starts a server and waits until it accepts connections. Where the last server on the data folder is still ending,
 * as after a quick restart of the program, it waits for that first; on failure and on interruption nothing is left.
 *
 * @internal
 */
export const launch = Effect.fnUntraced(function* (
  options: Launch,
  register: (postmaster: Postmaster) => void
): Effect.fn.Return<Postmaster, EmbeddedError> {
  const began = Date.now()
  const limit = Duration.toMillis(options.startTimeout)
  while (true) {
    const result = yield* Effect.either(launchOnce(options, register))
    if (result._tag === "Right") return result.right
    const error = result.left
    if (error.reason !== "DataDirInUse") return yield* error
    const lock = yield* readLock(options.dataDir)
    const waited = Date.now() - began
    if (lock !== undefined && isAlive(lock.pid) && isStranger(lock.pid)) {
      yield* Effect.ignore(attempt(() => rm(lockFile(options.dataDir), { force: true })))
    } else if (
      lock !== undefined && isAlive(lock.pid) && lock.status !== "stopping" ? waited > 1_000 : waited > limit
    ) {
      return yield* error
    }
    yield* Effect.sleep("100 millis")
  }
})
