/**
 * What an engine is told when it is made. A superset of `PgClientConfig` of `@effect/sql-pg`: the same names
 * mean the same.
 *
 * @since 0.1.0
 */
import type { PgClient, PgClientConfig } from "@effect/sql-pg/PgClient"
import type { SqlClient } from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import type * as Schedule from "effect/Schedule"
import type { ConnectionOptions } from "node:tls"
import type { DbConnection } from "./DbConnection.js"
import type { DbEngine } from "./DbEngine.js"
import { DbError } from "./DbError.js"
import type { DbSession } from "./DbSession.js"
import { never } from "./internal/deadline.js"
import { checkStartupValue } from "./internal/input.js"
import { Probe } from "./internal/probe.js"
import { checkBoolean, isBelowZero, validate } from "./internal/transactionSql.js"
import type { IsolationLevel } from "./internal/transactionSql.js"
import { env, ignoredOf, ignoredVariables, parseUrl, sslOf, withEnvironment } from "./internal/url.js"

/**
 * A server to connect to.
 *
 * @since 0.1.0
 * @category models
 */
export interface DbHost {
  readonly host: string
  /** Default: the option `port`, else 5432; in `changeHost` the port as it is. */
  readonly port?: number | undefined
}

/**
 * Which kind of server a connection may go to, with the names and meaning of libpq's `target_session_attrs`.
 *
 * @since 0.1.0
 * @category models
 */
export type TargetSessionAttrs = "any" | "read-write" | "read-only" | "primary" | "standby" | "prefer-standby"

/**
 * The options of an engine. Everything is optional: without `url` or `host`, libpq's environment variables
 * (`PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGDATABASE`) and its defaults apply; without `ssl` or `sslmode`,
 * `PGSSLMODE` as `pg` reads it. `PGAPPNAME`, `PGCONNECT_TIMEOUT`, `PGOPTIONS` and others stand in for parameters of `url`.
 *
 * Durations are `Duration.DurationInput`: a number is milliseconds, and `Infinity` is never.
 *
 * @since 0.1.0
 * @category models
 */
export interface DbOptions<Name extends string = "default"> extends Omit<PgClientConfig, "password" | "url"> {
  /**
   * `postgres://user:password@host:port/database?sslmode=...`, with several hosts as libpq writes them; the single
   * options below win over its parts. What is special in the password is encoded by `encodeURIComponent`; `@`, `,` and
   * `#` may stand there as they are.
   *
   * Its parameters are those of `pg` and libpq: `sslmode`, `sslrootcert`, `sslcert`, `sslkey`, `sslnegotiation`,
   * `application_name`, `options` (`-c search_path=app`), `statement_timeout`, `lock_timeout`,
   * `idle_in_transaction_session_timeout` and `transaction_timeout` (milliseconds), `connect_timeout` (seconds),
   * `target_session_attrs`, `load_balance_hosts`, `keepalives`, `keepalives_idle`, `channel_binding`, `host`, `port`,
   * `user`, `password`, `dbname`. A value that can't be meant is `InvalidInput`. Others, such as a provider's own, do
   * nothing: a warning names them.
   */
  readonly url?: Redacted.Redacted | string | undefined
  /** A secret, or an effect that is run for each new connection, within `connectTimeout`: credentials may rotate. */
  readonly password?: Redacted.Redacted | Effect.Effect<Redacted.Redacted, unknown> | undefined
  /** Several servers, tried in order, instead of `host` and `port`. */
  readonly hosts?: ReadonlyArray<DbHost> | undefined
  /** Shuffle `hosts` for each new connection. Default: false. */
  readonly loadBalanceHosts?: boolean | undefined
  /** Default: `"any"`. */
  readonly targetSessionAttrs?: TargetSessionAttrs | undefined
  /** `"lazy"` opens no socket before the first use; `"eager"` checks while the layer is built. Default: `"lazy"`. */
  readonly connect?: "lazy" | "eager" | undefined
  /** How often `connect: "eager"` tries again before the layer fails. Default: not at all. */
  readonly startupRetry?: Schedule.Schedule<unknown, SqlError> | undefined
  /** The longest wait for a connection of the pool. Default: 5 s. */
  readonly acquireTimeout?: Duration.DurationInput | undefined
  /** TCP, TLS, authentication, role and `afterConnect`, for each host; before, the effect `password`. Default: 5 s. */
  readonly connectTimeout?: Duration.DurationInput | undefined
  /** The most connections on the server, those being opened and closed included. Default: 10. */
  readonly maxConnections?: number | undefined
  /** Kept open even when idle, from the first use on. Default: 0. */
  readonly minConnections?: number | undefined
  /** An idle connection above the minimum is closed after this. Default: 10 min. */
  readonly idleTimeout?: Duration.DurationInput | undefined
  /** The lifetime of a connection, varied by 10 % so that they don't all end at once. Default: 30 min. */
  readonly connectionTTL?: Duration.DurationInput | undefined
  /** A connection that idled for longer is pinged before it is handed out. Default: 1 s. */
  readonly validateAfter?: Duration.DurationInput | undefined
  /** Whether session state that a borrower left behind is reset. Default: `"auto"`, by command tags and text. */
  readonly resetOnRelease?: "auto" | "always" | "never" | undefined
  /** Named statements, kept per connection (the number is how many; `true`: 256). Off for poolers that can't. Default: on. */
  readonly preparedStatements?: boolean | number | undefined
  /** Send without waiting for the answer before. Off for poolers that can't. Default: on. */
  readonly pipelining?: boolean | undefined
  /** `statement_timeout` of each connection. Default: the server's. */
  readonly statementTimeout?: Duration.DurationInput | undefined
  /** `lock_timeout` of each connection. Default: the server's. */
  readonly lockTimeout?: Duration.DurationInput | undefined
  /** `idle_in_transaction_session_timeout` of each connection. Default: the server's. */
  readonly idleInTransactionTimeout?: Duration.DurationInput | undefined
  /** `transaction_timeout` of each connection, PostgreSQL 17 and later. Default: the server's. */
  readonly transactionTimeout?: Duration.DurationInput | undefined
  /** The longest wait for another fiber's nested block. Default: 30 s. */
  readonly blockTimeout?: Duration.DurationInput | undefined
  /** How long a COMMIT, a ROLLBACK or a cancellation may take. Default: 10 s. */
  readonly settleTimeout?: Duration.DurationInput | undefined
  /** How long closing the engine waits for work in hand; `Infinity`: until it is done. Default: 10 s. */
  readonly drainTimeout?: Duration.DurationInput | undefined
  /** Several statements in one text without parameters. Default: `"allow"`. */
  readonly multipleStatements?: "allow" | "forbid" | undefined
  /** Isolation level of sessions and transactions that don't name one. Default: the server's. */
  readonly isolation?: IsolationLevel | undefined
  /** Whether transactions that don't say are read-only. Default: the server's. */
  readonly readOnly?: boolean | undefined
  /** Whether transactions that don't say are deferrable. Default: the server's. */
  readonly deferrable?: boolean | undefined
  /** A statement with neither session nor connection: runs on a connection of its own, or is a typed error. Default: `"allow"`. */
  readonly implicitExecution?: "allow" | "forbid" | undefined
  /**
   * Run before every creation of a session, once for it and outside of it: nothing is ambient but schemas and tenants.
   * It may call `DbEngine.changeHost`, run statements and open sessions, for which it is not run again.
   */
  readonly beforeSession?: Effect.Effect<unknown, SqlError, HookServices<Name>> | undefined
  /**
   * Run on each new raw connection, which is the ambient one for it and for nobody afterwards: what outlives it gets
   * `ConnectionReleased`. Counts towards `connectTimeout`.
   */
  readonly afterConnect?: Effect.Effect<unknown, unknown, HookServices<Name>> | undefined
  /** Log a borrower that keeps a connection for longer than this. Default: never. */
  readonly leakTimeout?: Duration.DurationInput | undefined
  /**
   * Log a statement that takes longer than this from being sent to its answer, with its text, literals masked, and who
   * ran it; never its parameters. Of a stream the round trips count, not its reader; COPY as a whole. Default: never.
   */
  readonly slowStatement?: Duration.DurationInput | undefined
  /**
   * Record `db.client.operation.duration` for every statement. Where a tracer is installed it is recorded anyway.
   * Default: false.
   */
  readonly operationMetrics?: boolean | undefined
  /**
   * Append a sqlcommenter comment to statements, for the server's log and `pg_stat_activity`. `true` names the span
   * (`traceparent`, `tracestate`) where a sampled one is around. Such a text is another one each time: it is sent unnamed, parsed
   * and planned anew. `tags` are the same each time and keep statements prepared. Default: off.
   */
  readonly sqlCommenter?: boolean | SqlCommenterOptions | undefined
  /** How long `DbEngine.health` waits for an answer. Default: 1 s. */
  readonly healthTimeout?: Duration.DurationInput | undefined
}

/**
 * What the comment of a statement says.
 *
 * @since 0.1.0
 * @category models
 */
export interface SqlCommenterOptions {
  /** The span that is around, when it is sampled, with its trace state. Default: true. */
  readonly traceparent?: boolean | undefined
  /** Pairs that every statement has: `{ application: "shop" }`. No secrets, anybody who sees the server's log reads them. */
  readonly tags?: Readonly<Record<string, string>> | undefined
}

/**
 * What an effect in the options is given: the services of the engine that it is an option of, under the tags of that
 * database and under the default one's, so that one hook serves databases of several names.
 *
 * @since 0.1.0
 * @category models
 */
export type HookServices<Name extends string = "default"> =
  DbEngine<Name | "default"> | DbConnection<Name | "default"> | DbSession<Name | "default"> | SqlClient | PgClient

/** @internal */
export interface Target {
  readonly hosts: ReadonlyArray<{ readonly host: string; readonly port: number }>
  readonly database: string | undefined
  readonly username: string | undefined
  readonly password: Effect.Effect<Redacted.Redacted | undefined, unknown>
  readonly ssl: boolean | ConnectionOptions | undefined
  /** TLS from the first byte on, without a wish for it before. */
  readonly direct: boolean
}

/** Options with every default filled in, durations in milliseconds. @internal */
export interface Resolved {
  readonly options: DbOptions
  readonly target: Target
  readonly attrs: TargetSessionAttrs
  readonly loadBalance: boolean
  readonly applicationName: string
  readonly acquireMillis: number
  readonly connectMillis: number
  readonly max: number
  readonly min: number
  readonly idleMillis: number
  readonly ttlMillis: number
  readonly validateMillis: number
  readonly blockMillis: number
  readonly settleMillis: number
  readonly drainMillis: number
  readonly leakMillis: number
  readonly reset: "auto" | "always" | "never"
  readonly prepared: number
  readonly pipelining: boolean
  readonly multiple: boolean
  readonly implicit: boolean
  /** What the server is told in the first message besides names. */
  readonly startup: ReadonlyArray<readonly [name: string, value: string]>
  readonly keepAlive: boolean
  readonly keepAliveMillis: number
  readonly channelBinding: "prefer" | "require" | "disable"
  /** Parameters of the url that do nothing. */
  readonly ignored: ReadonlyArray<string>
  readonly slowMillis: number
  readonly operationMetrics: boolean
  readonly comment: { readonly trace: boolean; readonly tags: Readonly<Record<string, string>> } | undefined
  readonly healthMillis: number
  /** Of the engine: its connections tell it what they send. */
  readonly probe: Probe
}

const bad = (message: string, hint: string): DbError => DbError.make("InvalidInput", { message, hint })

const millis = (
  name: string,
  input: Duration.DurationInput | undefined,
  fallback: number
): Effect.Effect<number, DbError> =>
  Effect.suspend(() => {
    if (input === undefined) return Effect.succeed(fallback)
    const decoded = isBelowZero(input) ? Option.none() : Duration.decodeUnknown(input)
    return Option.isNone(decoded)
      ? Effect.fail(bad(`The option ${name} is not a duration of 0 or more.`, 'Write milliseconds, or "5 seconds".'))
      : Effect.succeed(Math.min(Duration.toMillis(decoded.value), never))
  })

/** A limit of 0, under which nothing would ever be done in time. */
const positive = (...args: Parameters<typeof millis>): Effect.Effect<number, DbError> =>
  Effect.filterOrFail(
    millis(...args),
    (given) => given > 0,
    () => bad(`The option ${args[0]} is 0, in which nothing can be done.`, "Write more than 0; Infinity is no limit.")
  )

const count = (
  name: string,
  value: number | undefined,
  fallback: number,
  least: number
): Effect.Effect<number, DbError> =>
  value === undefined
    ? Effect.succeed(fallback)
    : Number.isInteger(value) && value >= least
      ? Effect.succeed(value)
      : Effect.fail(bad(`The option ${name} is ${shown(value)}.`, `It is a whole number, ${least} or more.`))

/** With its quotes, where it is text. */
const shown = (value: unknown): string => (typeof value === "string" ? JSON.stringify(value) : String(value))

const oneOf = <A extends string>(
  name: string,
  value: string | undefined,
  fallback: A,
  allowed: ReadonlyArray<A>
): Effect.Effect<A, DbError> =>
  value === undefined
    ? Effect.succeed(fallback)
    : allowed.includes(value as A)
      ? Effect.succeed(value as A)
      : Effect.fail(bad(`The option ${name} is not one of ${allowed.join(", ")}.`, "Choose one of them."))

const port = (value: unknown): Effect.Effect<number, DbError> => {
  const number = typeof value === "string" && !/^\s*\d+\s*$/.test(value) ? NaN : Number(value)
  return Number.isInteger(number) && number > 0 && number < 65536
    ? Effect.succeed(number)
    : Effect.fail(bad("The port is not between 1 and 65535.", "PostgreSQL listens on 5432 unless told otherwise."))
}

/** A number in the parameters of a url, not below 0 but where libpq has a variable for it. */
const numberIn = (
  parameters: ReadonlyMap<string, string>,
  name: string,
  unit: string,
  variable?: string
): Effect.Effect<number | undefined, DbError> => {
  const text = parameters.get(name)
  const whose = variable === undefined ? "The parameter" : `The variable ${variable}, or the parameter`
  return text === undefined || (variable === undefined ? /^\d{1,10}$/ : /^-?\d{1,10}$/).test(text)
    ? Effect.succeed(text === undefined ? undefined : Number(text))
    : Effect.fail(bad(`${whose} ${name} of the url is not a whole number.`, `Write how many ${unit}.`))
}

const nothing: ReadonlyMap<string, string> = new Map()
const isSecret = (u: unknown): boolean => u === undefined || Redacted.isRedacted(u)
const urlForm = "postgres://user:password@host:5432/database"

/** @internal */
export const resolveTarget = Effect.fnUntraced(function* (
  options: DbOptions
): Effect.fn.Return<Target & { readonly parameters: ReadonlyMap<string, string> }, DbError> {
  const text: unknown = Redacted.isRedacted(options.url) ? Redacted.value(options.url) : options.url
  if (text !== undefined && typeof text !== "string") {
    return yield* Effect.fail(bad("The option url is neither a string nor a Redacted.", `Write ${urlForm}.`))
  }
  const url = text === undefined ? undefined : parseUrl(text)
  if (text !== undefined && url === undefined) {
    const encoded = "with what is special in user and password encoded by encodeURIComponent"
    return yield* Effect.fail(bad("The url is not a PostgreSQL URL.", `Write ${urlForm}, ${encoded}.`))
  }
  const { hosts: urlHosts = [], parameters: urlParameters = nothing } = url ?? {}
  const parameters = withEnvironment(urlParameters)
  if (urlHosts.some(({ port = "1" }) => !/^\s*\d+\s*$/.test(port))) {
    const hint = "Is a / or ? in the password not encoded (encodeURIComponent)?"
    return yield* Effect.fail(bad("The port in the url is not a number.", hint))
  }
  if (options.hosts !== undefined && options.hosts.length === 0) {
    return yield* Effect.fail(bad("The option hosts is empty.", "Name at least one host, or leave it out."))
  }
  const urlPort = urlHosts.length === 1 ? urlHosts[0]!.port : undefined
  const defaultPort = yield* port(options.port ?? urlPort ?? env("PGPORT") ?? 5432)
  const alone = options.host ?? options.path
  const given: ReadonlyArray<{ readonly host: string | undefined; readonly port?: number | string | undefined }> =
    options.hosts ??
    (alone === undefined ? urlHosts.map(({ host, port }) => ({ host, port: options.port ?? port })) : [{ host: alone }])
  const hosts: Array<{ readonly host: string; readonly port: number }> = []
  for (const one of given.length > 0 ? given : [{ host: undefined }]) {
    hosts.push({
      host: one.host ?? env("PGHOST") ?? "localhost",
      port: one.port === undefined ? defaultPort : yield* port(one.port)
    })
  }
  const secret = options.password
  const plainPassword = url?.password ?? env("PGPASSWORD")
  if (typeof secret === "string") {
    return yield* Effect.fail(bad("The option password is a string.", "Give Redacted.make(password)."))
  }
  const password: Target["password"] =
    secret === undefined
      ? Effect.succeed(plainPassword === undefined ? undefined : Redacted.make(plainPassword))
      : Redacted.isRedacted(secret)
        ? Effect.succeed(secret)
        : Effect.filterOrFail(secret, isSecret, () => bad("It yielded no Redacted.", "Yield Redacted.make(password)."))
  const ssl = yield* Effect.try({
    try: () => options.ssl ?? sslOf(urlParameters),
    catch: () =>
      bad(
        "What the url or the environment says of TLS can't be done.",
        "sslrootcert, sslcert and sslkey name files that can be read; ssl is true, false or no-verify; PGSSLMODE is a mode."
      )
  })
  const negotiation = parameters.get("sslnegotiation")
  const direct =
    (yield* oneOf("sslnegotiation or PGSSLNEGOTIATION", negotiation, "postgres", ["postgres", "direct"])) === "direct"
  if (direct && (ssl === undefined || ssl === false)) {
    return yield* Effect.fail(bad("sslnegotiation is direct, without TLS.", "Set ssl, or sslmode in the url."))
  }
  return {
    hosts,
    database: options.database ?? url?.database ?? env("PGDATABASE"),
    username: options.username ?? url?.user ?? env("PGUSER"),
    password,
    ssl,
    direct,
    parameters
  }
})

const commentOf = (
  given: DbOptions["sqlCommenter"]
): Effect.Effect<{ readonly trace: boolean; readonly tags: Readonly<Record<string, string>> } | undefined, DbError> => {
  if (given === undefined || given === false) return Effect.succeed(undefined)
  const { tags = {}, traceparent = true } = given === true ? {} : given
  const wrong = Object.entries(tags).find((pair) => pair.some((_) => typeof _ !== "string" || !_.isWellFormed()))
  return wrong === undefined
    ? Effect.succeed({ trace: traceparent, tags })
    : Effect.fail(bad("A tag of the option sqlCommenter is not a string.", 'Give strings: { application: "shop" }.'))
}

const attrsAllowed: ReadonlyArray<TargetSessionAttrs> = [
  "any",
  "read-write",
  "read-only",
  "primary",
  "standby",
  "prefer-standby"
]

/** Checks everything that can be checked without a server. @internal */
export const resolve = Effect.fnUntraced(function* (options: DbOptions): Effect.fn.Return<Resolved, DbError> {
  const { parameters, ...target } = yield* resolveTarget(options)
  const applicationName =
    options.applicationName ??
    parameters.get("application_name") ??
    parameters.get("fallback_application_name") ??
    "effect-db"
  const serverOptions = parameters.get("options")
  for (const [name, value] of [
    ["applicationName", applicationName],
    ["username", target.username],
    ["database", target.database],
    ["options", serverOptions],
    ...target.hosts.map((_) => ["host", _.host] as const)
  ] as const) {
    const refused = value === undefined ? undefined : checkStartupValue(name, value)
    if (refused !== undefined) return yield* Effect.fail(refused)
  }
  const { deferrable, isolation, loadBalanceHosts, operationMetrics, pipelining, readOnly } = options
  const wrong =
    validate({ isolation, readOnly, deferrable }) ??
    checkBoolean("loadBalanceHosts", loadBalanceHosts) ??
    checkBoolean("operationMetrics", operationMetrics) ??
    checkBoolean("pipelining", pipelining)
  if (wrong !== undefined) return yield* Effect.fail(wrong)
  yield* oneOf("connect", options.connect, "lazy", ["lazy", "eager"])
  const startup: Array<readonly [string, string]> = serverOptions === undefined ? [] : [["options", serverOptions]]
  for (const [name, setting, input] of [
    ["statementTimeout", "statement_timeout", options.statementTimeout],
    ["lockTimeout", "lock_timeout", options.lockTimeout],
    ["idleInTransactionTimeout", "idle_in_transaction_session_timeout", options.idleInTransactionTimeout],
    ["transactionTimeout", "transaction_timeout", options.transactionTimeout]
  ] as const) {
    const given = yield* numberIn(parameters, setting, "milliseconds")
    const value = input === undefined ? given : Math.ceil(yield* millis(name, input, 0))
    if (value !== undefined) startup.push([setting, String(value)])
  }
  const connectSeconds = yield* numberIn(parameters, "connect_timeout", "seconds", "PGCONNECT_TIMEOUT")
  const balancing = parameters.get("load_balance_hosts")
  const balance = yield* oneOf("load_balance_hosts or PGLOADBALANCEHOSTS", balancing, "disable", ["disable", "random"])
  const max = yield* count("maxConnections", options.maxConnections, 10, 1)
  const min = yield* count("minConnections", options.minConnections, 0, 0)
  if (min > max) {
    return yield* Effect.fail(bad(`minConnections (${min}) is more than maxConnections (${max}).`, "Lower it."))
  }
  const prepared =
    options.preparedStatements === undefined || options.preparedStatements === true
      ? 256
      : options.preparedStatements === false
        ? 0
        : yield* count("preparedStatements", options.preparedStatements, 256, 0)
  return {
    options,
    target,
    attrs: yield* oneOf(
      "targetSessionAttrs or PGTARGETSESSIONATTRS",
      options.targetSessionAttrs ?? parameters.get("target_session_attrs"),
      "any",
      attrsAllowed
    ),
    loadBalance: loadBalanceHosts ?? balance === "random",
    applicationName,
    acquireMillis: yield* millis("acquireTimeout", options.acquireTimeout, 5000),
    // As for libpq, there 0 and less is no limit.
    connectMillis: yield* positive(
      "connectTimeout",
      options.connectTimeout,
      connectSeconds === undefined ? 5000 : connectSeconds > 0 ? connectSeconds * 1000 : never
    ),
    max,
    min,
    idleMillis: yield* millis("idleTimeout", options.idleTimeout, 600_000),
    ttlMillis: yield* positive("connectionTTL", options.connectionTTL, 1_800_000),
    validateMillis: yield* millis("validateAfter", options.validateAfter, 1000),
    blockMillis: yield* millis("blockTimeout", options.blockTimeout, 30_000),
    settleMillis: yield* positive("settleTimeout", options.settleTimeout, 10_000),
    drainMillis: yield* millis("drainTimeout", options.drainTimeout, 10_000),
    leakMillis: yield* millis("leakTimeout", options.leakTimeout, never),
    reset: yield* oneOf("resetOnRelease", options.resetOnRelease, "auto", ["auto", "always", "never"]),
    prepared,
    pipelining: pipelining ?? true,
    multiple:
      (yield* oneOf("multipleStatements", options.multipleStatements, "allow", ["allow", "forbid"])) === "allow",
    implicit: (yield* oneOf("implicitExecution", options.implicitExecution, "allow", ["allow", "forbid"])) === "allow",
    startup,
    keepAlive: (yield* oneOf("keepalives", parameters.get("keepalives"), "1", ["1", "0"])) === "1",
    keepAliveMillis: ((yield* numberIn(parameters, "keepalives_idle", "seconds")) ?? 0) * 1000,
    channelBinding: yield* oneOf("channel_binding or PGCHANNELBINDING", parameters.get("channel_binding"), "prefer", [
      "prefer",
      "require",
      "disable"
    ]),
    ignored: [...ignoredOf(parameters), ...ignoredVariables()],
    slowMillis: yield* millis("slowStatement", options.slowStatement, never),
    operationMetrics: operationMetrics ?? false,
    comment: yield* commentOf(options.sqlCommenter),
    healthMillis: yield* positive("healthTimeout", options.healthTimeout, 1000),
    probe: new Probe()
  }
})
