/**
 * The engine behind `DbEngine`: options, the pool of the current target, and how a connection is made.
 */
import * as Reactivity from "@effect/experimental/Reactivity"
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Redacted from "effect/Redacted"
import * as Runtime from "effect/Runtime"
import { DbError } from "../DbError.js"
import type { DbHost, HookServices, Resolved } from "../DbOptions.js"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import { isBlocking, scheduler } from "./blocking.js"
import { deadline, never } from "./deadline.js"
import { Root, StackNode } from "./lease.js"
import { neutral } from "./neutral.js"
import type { Control } from "./pipeline.js"
import { Command } from "./pipeline.js"
import { Pool } from "./pool.js"
import type { PoolStats } from "./pool.js"
import { dialRemote } from "./remote.js"
import { searchPathControl } from "./searchPath.js"
import { OperationMetrics, PoolMetrics } from "./telemetry.js"
import type { TransactionOptions } from "./transactionSql.js"
import { dial } from "./wire.js"
import type { Host, Wire } from "./wire.js"

type Stop = () => void

/** @internal */
export class EngineCore {
  config: Resolved
  closed = false
  /** Something has stood in its place: a fiber has to be asked whether it does. */
  replaced = false
  private live: Pool
  private readonly retired = new Set<Pool>()
  /** Of connections that another thread holds: for effects that this thread stands still for. */
  private apart: Pool | undefined = undefined
  private readonly metrics: PoolMetrics
  readonly operations = new OperationMetrics()
  /** Statements are of interest even where no tracer listens. */
  readonly watched: boolean
  readonly reactivity = Effect.runSync(Reactivity.make)
  /** What effects in the options are given; set as soon as there is something to give. */
  services: Context.Context<HookServices<any>> = Context.empty() as Context.Context<HookServices<any>>
  readonly beforeSession: Effect.Effect<void, DbError> | undefined

  constructor(
    readonly name: string,
    config: Resolved,
    readonly runtime: Runtime.Runtime<never>
  ) {
    this.config = config
    const { beforeSession } = config.options
    this.beforeSession =
      beforeSession === undefined ? undefined : (this.provide(beforeSession) as Effect.Effect<void, DbError>)
    this.metrics = new PoolMetrics(name, () => ({ ...this.total(this.pools), min: config.min }))
    this.watched = config.operationMetrics || config.slowMillis < never
    this.live = this.makePool()
  }

  /** Runs an effect of the options with this engine's services. */
  provide<A, E>(effect: Effect.Effect<A, E, HookServices<any>>): Effect.Effect<A, E> {
    return Effect.suspend(() => Effect.provide(effect, this.services))
  }

  pool(): Pool {
    if (!isBlocking() || this.closed) return this.live
    if (this.apart === undefined) {
      this.apart = this.makePool({ ...this.config, min: 0 }, dialRemote)
      if (this.live.suspended) this.apart.suspend()
    }
    return this.apart
  }

  suspend(): void {
    this.live.suspend()
    this.apart?.suspend()
  }

  resume(): void {
    this.live.resume()
    this.apart?.resume()
  }

  /** Of all its pools: that of `runSync` and those of hosts that the engine has left among them. */
  get stats(): PoolStats {
    return this.total(this.pools)
  }

  private total(pools: ReadonlyArray<Pool>): PoolStats {
    const all = pools.map((_) => _.stats)
    const sum = (of: (stats: PoolStats) => number) => all.reduce((sum, stats) => sum + of(stats), 0)
    return {
      total: sum((_) => _.total),
      idle: sum((_) => _.idle),
      used: sum((_) => _.used),
      connecting: sum((_) => _.connecting),
      closing: sum((_) => _.closing),
      pending: sum((_) => _.pending),
      max: this.config.max
    }
  }

  private get pools(): ReadonlyArray<Pool> {
    return [this.live, ...(this.apart === undefined ? [] : [this.apart]), ...this.retired]
  }

  evictAll(): void {
    for (const pool of this.pools) pool.evictAll()
  }

  get host(): DbHost {
    const first = this.config.target.hosts[0]!
    return { host: first.host, port: first.port }
  }

  /** The pool that lent it may be a retired one. */
  giveBack(wire: Wire): void {
    this.live.give(wire)
    this.apart?.give(wire)
    for (const pool of this.retired) pool.give(wire)
  }

  /** What BEGIN says when the session does not. */
  transactionOptions(options: TransactionOptions): TransactionOptions {
    const { deferrable, isolation, readOnly } = this.config.options
    if (isolation === undefined && readOnly === undefined && deferrable === undefined) return options
    return {
      ...options,
      isolation: options.isolation ?? isolation,
      readOnly: options.readOnly ?? readOnly,
      deferrable: options.deferrable ?? deferrable
    }
  }

  /** What rides with a statement that runs in no session: local to the implicit transaction of its Sync group. */
  statementPrefix(entry: Entry): ReadonlyArray<Control> {
    const path = Ambient.searchPath(entry)
    return path === undefined ? noControls : [searchPathControl(path)]
  }

  /** `false`: it is the target already. */
  changeHost(hosts: ReadonlyArray<Host>): boolean {
    const now = this.config.target.hosts
    if (now.length === hosts.length && now.every((_, i) => _.host === hosts[i]!.host && _.port === hosts[i]!.port)) {
      return false
    }
    this.config = { ...this.config, target: { ...this.config.target, hosts } }
    const old = this.live
    this.live = this.makePool()
    if (old.suspended) this.live.suspend()
    this.retired.add(old)
    old.retire(this.live, () => this.retired.delete(old))
    const apart = this.apart
    this.apart = undefined
    if (apart !== undefined) {
      this.retired.add(apart)
      apart.close(() => this.retired.delete(apart))
    }
    return true
  }

  /** Drains: no new work, what is in hand may finish until `drainTimeout`, the rest is cut. */
  readonly close: Effect.Effect<void> = Effect.suspend(() => {
    this.closed = true
    const { pools } = this
    return Effect.async<void>((resume) => {
      let open = pools.length
      const stopTimer = deadline(this.config.drainMillis, () => {
        for (const pool of pools) pool.destroyAll()
      })
      // Its sockets may take a moment more, but nothing waits for them for ever.
      const over = () => {
        this.metrics.close()
        resume(Effect.void)
      }
      const stopLast = deadline(this.config.drainMillis + 2000, over)
      for (const pool of pools) {
        pool.close(() => {
          if (--open > 0) return
          stopTimer()
          stopLast()
          over()
        })
      }
    })
  })

  log(effect: Effect.Effect<void>): void {
    Runtime.runFork(this.runtime)(effect)
  }

  private makePool(config = this.config, open = dial): Pool {
    return new Pool({
      config,
      connect: (onDeath, done) => neutral(() => this.connect(config, open, onDeath, done)),
      fits: (wire) => fits(config, wire, false) === true,
      afterReset:
        config.options.afterConnect === undefined
          ? undefined
          : (wire, done) => void this.prepare(wire, config.connectMillis, done),
      metrics: this.metrics,
      onLeak: (holder, millis) =>
        this.log(
          Effect.logWarning(
            `effect-db: "${holder.name}" has held a connection of "${this.name}" for ${millis} ms. Is it never released?`
          )
        )
    })
  }

  private run<A, E>(effect: Effect.Effect<A, E>, done: (exit: Exit.Exit<A, E>) => void): Stop {
    const here = isBlocking() ? Effect.withScheduler(effect, scheduler) : effect
    const cancel = Runtime.runCallback(this.runtime)(here, { onExit: done })
    return () => cancel()
  }

  /** Tries the hosts in turn; a connection counts when it has the role that is wanted and `afterConnect` has run. */
  private connect(
    config: Resolved,
    open: typeof dial,
    onDeath: (wire: Wire) => void,
    done: (error: DbError | undefined, wire: Wire | undefined) => void
  ): Stop {
    let stop: Stop = () => {}
    let over = false
    const hosts = config.loadBalance ? shuffled(config.target.hosts) : config.target.hosts
    const passes: ReadonlyArray<boolean> = config.attrs === "prefer-standby" ? [true, false] : [false]
    const attempts = passes.flatMap((strict) => hosts.map((host) => ({ host, strict })))
    const met: Array<DbError> = []
    const next = (at: number, password: Redacted.Redacted | undefined): void => {
      if (over) return
      const attempt = attempts[at]
      if (attempt === undefined) return done(allOf(met) ?? wrongRole(config), undefined)
      const started = Date.now()
      const failed = (error: DbError): void => {
        met.push(error)
        // A wrong password is wrong everywhere, and trying on may lock the account.
        if (error.reason._tag === "AuthenticationError") return done(error, undefined)
        next(at + 1, password)
      }
      // Its place is free when the server has seen it go.
      const refused = (wire: Wire, error: DbError): void => {
        if (wire.idle) wire.end()
        else wire.destroy(error)
        wire.onClose(() => failed(error))
      }
      stop = open(config, attempt.host, password, onDeath, (error, wire) => {
        if (wire === undefined) return failed(error!)
        stop = () => wire.destroy(new Error("given up"))
        const left = (): number => Math.max(1, config.connectMillis - (Date.now() - started))
        this.role(config, wire, attempt.strict, left(), (fit, error) => {
          if (!fit) return refused(wire, error ?? wrongRole(config))
          stop = this.prepare(wire, left(), (ok, error) => {
            if (ok) done(undefined, wire)
            else refused(wire, error!)
          })
        })
      })
    }
    let answered = false
    const giveUp = (): void => {
      over = true
      stopTimer()
      stop()
    }
    const stopTimer = deadline(config.connectMillis, () => {
      giveUp()
      done(passwordTimeout(config.connectMillis), undefined)
    })
    const stopAsking = this.run(config.target.password, (exit) => {
      answered = true
      stopTimer()
      if (over) return
      if (Exit.isSuccess(exit)) return next(0, exit.value)
      done(
        DbError.make("AuthenticationError", {
          message: "The effect that yields the password failed.",
          hint: "See its own error, which is the cause.",
          cause: Cause.squash(exit.cause)
        }),
        undefined
      )
    })
    if (!answered) stop = stopAsking
    return giveUp
  }

  private role(
    config: Resolved,
    wire: Wire,
    strict: boolean,
    millis: number,
    done: (fits: boolean, error?: DbError) => void
  ): void {
    const known = fits(config, wire, strict)
    if (known !== undefined) return done(known)
    let late: DbError | undefined = undefined
    const stopTimer = deadline(millis, () => wire.destroy((late = roleTimeout(config.connectMillis, wire.host))))
    // Servers before 14 don't report it.
    const text = "SELECT pg_is_in_recovery()::text, current_setting('default_transaction_read_only')"
    wire.submit(
      new Command(text, [], "array", true, false, false, undefined, (error, result) => {
        stopTimer()
        if (error !== undefined) return done(false, late)
        const row = result!.rows[0] as ReadonlyArray<string>
        wire.parameters.set("in_hot_standby", row[0] === "true" ? "on" : "off")
        wire.parameters.set("default_transaction_read_only", row[1]!)
        done(fits(config, wire, strict) === true)
      })
    )
  }

  private prepare(wire: Wire, millis: number, done: (ok: boolean, error?: DbError) => void): Stop {
    const effect = this.config.options.afterConnect
    if (effect === undefined) {
      done(true)
      return () => {}
    }
    const root = Root.around(this, { name: "afterConnect" }, wire)
    const ambient = Ambient.locally(this.provide(effect), this, () => ({
      ...Ambient.emptyEntry,
      stack: new StackNode({ ready: Effect.void, root: () => root }, undefined)
    }))
    const refuse = (message: string, cause?: unknown) =>
      done(
        false,
        DbError.make("ConnectionError", {
          phase: "connect",
          message,
          hint: "afterConnect runs on each new connection and has to leave it idle, within connectTimeout.",
          cause
        })
      )
    let finished = false
    const finish = (): void => {
      finished = true
      stopTimer()
      root.release(true)
    }
    const stopTimer = deadline(millis, () => {
      finish()
      stop()
      refuse(`afterConnect did not end within ${millis} ms.`)
    })
    const stop = this.run(ambient, (exit) => {
      if (finished) return
      // Whoever has outlived it has no connection any more, and what is on its way there is waited for.
      root.release(true)
      if (Exit.isFailure(exit)) {
        finish()
        return refuse("afterConnect failed.", Cause.squash(exit.cause))
      }
      wire.whenIdle(() => {
        if (finished) return
        finish()
        // What it set up is how a connection of this engine is: not something to be swept away.
        if (wire.settleSetUp()) done(true)
        else refuse("afterConnect left a transaction open or lost the connection.")
      })
    })
    return () => {
      finish()
      stop()
      wire.destroy(new Error("given up"))
    }
  }
}

const noControls: ReadonlyArray<Control> = []

const shuffled = <A>(items: ReadonlyArray<A>): ReadonlyArray<A> => {
  const out = [...items]
  for (let i = out.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1))
    ;[out[i], out[j]] = [out[j]!, out[i]!]
  }
  return out
}

/** By parameter status, which the server keeps up to date through a promotion; `undefined`: it does not say. */
const fits = (config: Resolved, wire: Wire, strict: boolean): boolean | undefined => {
  if (config.attrs === "any" || (config.attrs === "prefer-standby" && !strict)) return true
  const standby = wire.parameters.get("in_hot_standby")
  const readOnly = wire.parameters.get("default_transaction_read_only")
  if (standby === undefined || readOnly === undefined) return undefined
  switch (config.attrs) {
    case "read-write":
      return standby === "off" && readOnly === "off"
    case "read-only":
      return standby === "on" || readOnly === "on"
    case "primary":
      return standby === "off"
    default:
      return standby === "on"
  }
}

/** What several hosts have met, in one error, where none of them could be reached; else the last of it. */
const allOf = (met: ReadonlyArray<DbError>): DbError | undefined => {
  const last = met[met.length - 1]
  const down = met.flatMap(({ reason }) => (reason._tag === "ConnectionError" && reason.address ? [reason] : []))
  const addresses = [...new Set(down.map((_) => _.address!))]
  if (last === undefined || down.length < met.length || addresses.length < 2) return last
  const { _tag, ...reason } = down[down.length - 1]!
  const texts = new Set(down.map(({ address, message }) => message.replace(` (${address})`, "")))
  const address = addresses.join(", ")
  const message =
    texts.size === 1
      ? reason.message.replace(`(${reason.address})`, `(${address})`)
      : [...new Set(down.map((_) => _.message.replace(/\.$/, "")))].join("; ")
  return DbError.make("ConnectionError", { ...reason, message, address, cause: last })
}

const passwordTimeout = (millis: number): DbError =>
  DbError.make("ConnectionError", {
    phase: "connect",
    message: `The effect that yields the password did not end within ${millis} ms.`,
    hint: "connectTimeout bounds it. Give it a time limit of its own, or yield a secret that was fetched before.",
    isRetryable: true
  })

const roleTimeout = (millis: number, { host, port }: Host): DbError =>
  DbError.make("ConnectionError", {
    phase: "connect",
    message: `${host}:${port} did not say within ${millis} ms whether it is a standby.`,
    hint: "It has let the connection in and then fallen silent. connectTimeout bounds the question of targetSessionAttrs.",
    isRetryable: true
  })

const wrongRole = (config: Resolved): DbError =>
  DbError.make("ConnectionError", {
    phase: "connect",
    message: `None of the hosts (${config.target.hosts.map((_) => `${_.host}:${_.port}`).join(", ")}) is ${config.attrs}.`,
    hint: "A failover may be under way, or targetSessionAttrs asks for a role that no host has.",
    isRetryable: true
  })
