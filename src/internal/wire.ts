/**
 * One raw connection. `pg` dials, negotiates TLS and authenticates; from the first ReadyForQuery on the socket is
 * read and written by our own pipeline, unless somebody asks for the `pg` client itself (`raw`).
 */
import * as Redacted from "effect/Redacted"
import type { EventEmitter } from "node:events"
import type { Duplex } from "node:stream"
import * as Pg from "pg"
import { DbError } from "../DbError.js"
import type { Resolved } from "../DbOptions.js"
import { after } from "./blocking.js"
import { sendCancel } from "./cancel.js"
import { demandBinding, unbound } from "./channelBinding.js"
import { deadline } from "./deadline.js"
import { DirectSocket } from "./directSocket.js"
import { ForeignQueue, guarded } from "./foreign.js"
import { neutral, neutrally } from "./neutral.js"
import { Pipeline } from "./pipeline.js"
import type { Command } from "./pipeline.js"
import { failureLeaves, leavesState } from "./remains.js"
import { connectionIsLost } from "./sqlState.js"

/** @internal */
export interface Host {
  readonly host: string
  readonly port: number
}

/** The parts of `pg`'s client that its types leave out. */
interface Internals {
  readonly connection: EventEmitter & {
    readonly stream: Duplex & { readonly bytesWritten: number }
    parsedStatements: Record<string, string>
    attachListeners(stream: Duplex): void
    end(): void
  }
  readonly processID: number
  readonly secretKey: number
  readonly readyForQuery: boolean
  _txStatus: "I" | "T" | "E" | null
  getTransactionStatus(): "I" | "T" | "E" | null
}

let ids = 0

/** Nobody waits for longer than this for the end of a connection that is given up. */
const goodbyeMillis = 1000

/** @internal */
export interface Listener {
  readonly notification: (channel: string, payload: string) => void
  readonly closed: (error: DbError) => void
}

/** @internal */
export class Wire {
  readonly id = ++ids
  readonly pipeline: Pipeline
  /** Its answers come by the event loop. */
  readonly needsLoop: boolean = true
  readonly openedAt = Date.now()
  lastUsed = Date.now()
  expiresAt = Infinity
  generation = 0
  /** What a borrower may have left behind: reset before the next one. */
  dirty = false
  /** It has used PREPARE: its names go, and ours with them. */
  prepares = false
  /** A connection of the same pool has died: this one is looked at before it is used. */
  doubted = false
  /** Why it must not be used again, though its socket may be alive. */
  doomed: string | undefined = undefined
  readonly listeners = new Set<Listener>()
  private readonly closeWaiters: Array<() => void> = []
  private socketOpen = true
  /** What it was cut off from is being told to stop. */
  private stopping = false
  private readonly pgData: ReadonlyArray<(chunk: Buffer) => void>
  private foreign: ForeignQueue | undefined = undefined

  constructor(
    readonly client: Pg.Client,
    readonly host: Host,
    readonly parameters: Map<string, string>,
    private readonly config: Resolved,
    private readonly onDeath: (wire: Wire) => void
  ) {
    const internals = this.internals
    const stream = internals.connection.stream
    const readWriteTarget = config.attrs === "read-write" || config.attrs === "primary"
    this.pipeline = new Pipeline(stream, {
      host,
      probe: config.probe,
      types: config.options.types ?? Pg.types,
      typesAreDefault: config.options.types === undefined,
      readWriteTarget,
      pipelining: config.pipelining,
      preparedStatements: config.prepared,
      settleMillis: config.settleMillis,
      cancel: (done) => this.cancel(done),
      onDeath: (error) => this.died(error),
      onNotification: (channel, payload) => {
        for (const listener of this.listeners) listener.notification(channel, payload)
      },
      onParameter: (name, value) => this.parameters.set(name, value),
      onTag: (tag, command) => {
        if (!this.dirty && leavesState(tag, command.text)) this.dirty = true
        if (tag === "PREPARE") this.prepares = true
        if (tag === "DISCARD ALL" || tag === "DEALLOCATE ALL") this.pipeline.forgetAll()
      },
      onHalf: ({ solo, text }) => {
        if (!this.dirty && failureLeaves(text, solo)) this.dirty = true
      },
      onServerError: (message, harmless) => {
        if (!harmless && connectionIsLost(message, { readWriteTarget })) {
          this.doomed ??= `the server answered ${message.code ?? "without a SQLSTATE"}`
        }
      }
    })
    // pg's parser would see every message as well: it gets the socket back for `raw` only.
    this.pgData = (stream.listeners("data") as Array<(chunk: Buffer) => void>).map((listener) => {
      stream.removeListener("data", listener)
      return guarded(internals.connection, listener, (cause) => this.destroy(cause))
    })
    this.read(true)
    // These may come from a write, and that from anybody.
    stream.on("drain", neutrally(this.pipeline.onDrain))
    client.on(
      "error",
      neutrally((cause) => this.pipeline.die(cause, "read"))
    )
    stream.once(
      "close",
      neutrally(() => {
        this.socketOpen = false
        this.pipeline.die(new Error("the server closed the connection"), "read")
        this.left()
      })
    )
  }

  /** Whether what arrives is for our pipeline. */
  private read(ours: boolean): void {
    const { onBytes, onData, stream } = this.pipeline
    // Also where the runtime is one that makes no use of the buffer.
    if (ours) stream.on("data", onData)
    else stream.removeListener("data", onData)
    if (stream instanceof DirectSocket) stream.reader = ours ? onBytes : undefined
  }

  private get internals(): Internals {
    return this.client as unknown as Internals
  }

  get pid(): number {
    return this.internals.processID
  }

  get dead(): boolean {
    return this.pipeline.dead !== undefined
  }

  get status(): "I" | "T" | "E" {
    return this.foreign === undefined ? this.pipeline.status : (this.internals.getTransactionStatus() ?? "I")
  }

  get idle(): boolean {
    return this.foreign === undefined ? this.pipeline.idle : this.foreign.idle
  }

  whenIdle(f: () => void): void {
    if (this.foreign === undefined) this.pipeline.whenIdle(f)
    else this.foreign.whenIdle(f)
  }

  submit(command: Command): void {
    // The pipeline knows what it has died of.
    if (this.foreign === undefined || this.dead) this.pipeline.submit(command)
    else this.foreign.submit(command)
  }

  interrupt(command: Command): boolean {
    if (this.foreign !== undefined) return this.foreign.interrupt(command)
    const wait = this.pipeline.interrupt(command)
    command.copy?.stop()
    return wait
  }

  cancel(done: (error?: Error) => void, atMost = Infinity): void {
    const { connectMillis, options, settleMillis, target } = this.config
    const secret = this.internals.secretKey
    neutral(() =>
      sendCancel(
        { ...this.host, ssl: target.ssl, direct: target.direct, stream: options.stream, pid: this.pid, secret },
        Math.min(connectMillis, settleMillis, atMost),
        done
      )
    )
  }

  /**
   * Hands the socket to `pg`'s client; from now on our own statements go through it too, one at a time.
   * @param vet - asked when nothing runs any more: why it is not to be had by now.
   */
  toForeign(vet: () => DbError | undefined, done: (client: Pg.Client | DbError) => void): void {
    if (this.foreign !== undefined) return done(this.client)
    this.pipeline.whenIdle(() => {
      const gone = vet()
      if (gone !== undefined) return done(gone)
      if (this.foreign === undefined && !this.dead) {
        const stream = this.internals.connection.stream
        this.read(false)
        for (const listener of this.pgData) stream.on("data", listener)
        // Of what has happened since the login it has heard nothing.
        this.internals._txStatus = this.pipeline.status
        this.foreign = new ForeignQueue(this, this.client, stream.bytesWritten, this.config.settleMillis)
      }
      done(this.client)
    })
  }

  /** Takes the socket back. `false`: something was sent in the meantime that can't be vouched for. */
  fromForeign(): boolean {
    const foreign = this.foreign
    if (foreign === undefined) return true
    const stream = this.internals.connection.stream
    const untouched = stream.bytesWritten === foreign.written
    this.foreign = undefined
    for (const listener of this.pgData) stream.removeListener("data", listener)
    this.read(true)
    return untouched
  }

  /**
   * Takes the socket back from set-up that may have used `pg`'s client: what it did is how this connection is. `false`:
   * it has not come to rest.
   */
  settleSetUp(): boolean {
    if (this.dead || this.status !== "I") return false
    if (this.foreign !== undefined) {
      if (!this.foreign.idle || !this.internals.readyForQuery) return false
      // Of a BEGIN whose COMMIT went through pg our pipeline knows no end: pg keeps that one.
      if (this.pipeline.status === "I" && !this.fromForeign()) {
        // Nobody has told which names came and went.
        this.pipeline.forgetAll()
        this.internals.connection.parsedStatements = {}
        this.prepares = true
      }
    }
    this.dirty = false
    return true
  }

  private died(error: DbError): void {
    for (const listener of this.listeners) listener.closed(error)
    this.listeners.clear()
    this.foreign?.fail(error)
    this.onDeath(this)
  }

  /** Calls back when its socket is closed, and the server knows that nobody waits for what ran there. */
  onClose(f: () => void): void {
    this.closeWaiters.push(f)
    this.left()
  }

  private left(): void {
    if (!this.socketOpen && !this.stopping) for (const waiter of this.closeWaiters.splice(0)) waiter()
  }

  /** Something runs there, for us or for the `pg` client: left to itself it would run on without anybody. */
  private get busy(): boolean {
    return !this.pipeline.idle || this.foreign !== undefined || this.internals.readyForQuery === false
  }

  /** Says goodbye and waits for the server to hang up, so that its backend is gone when `onClose` is called. */
  end(): void {
    if (this.dead) return
    if (this.busy) return this.destroy(new Error("the connection was given back while something ran on it"))
    const stream = this.internals.connection.stream
    this.onClose(after(goodbyeMillis, () => stream.destroy(), false))
    this.internals.connection.end()
  }

  /** Cuts the connection; what runs on the server is told to stop. */
  destroy(cause: unknown): void {
    if (this.dead) return
    if (this.busy) {
      this.stopping = true
      this.cancel(() => {
        this.stopping = false
        this.left()
      }, goodbyeMillis)
    }
    this.pipeline.die(cause, "read")
  }
}

/** What `pg` is told, but the password. @internal */
export const clientOptions = (config: Resolved, host: Host): Pg.ClientConfig => {
  const { startup, target } = config
  // It knows no such parameter; the last one counts.
  const line = startup.flatMap(([name, value]) =>
    name === "options" ? [value] : name === "transaction_timeout" ? [`-c transaction_timeout=${value}`] : []
  )
  return {
    ...Object.fromEntries(startup.filter(([name]) => name !== "transaction_timeout")),
    host: host.host,
    port: host.port,
    database: target.database,
    user: target.username,
    ssl: target.ssl,
    sslnegotiation: target.direct ? "direct" : "postgres",
    application_name: config.applicationName,
    keepAlive: config.keepAlive,
    keepAliveInitialDelayMillis: config.keepAliveMillis,
    enableChannelBinding: config.channelBinding !== "disable",
    ...(line.length === 0 ? {} : { options: line.join(" ") })
  } as Pg.ClientConfig
}

/** Dials one host. Calls back once; the returned function gives up. @internal */
export const dial = (
  config: Resolved,
  host: Host,
  password: Redacted.Redacted | undefined,
  onDeath: (wire: Wire) => void,
  done: (error: DbError | undefined, wire: Wire | undefined) => void
): (() => void) => {
  const { stream } = config.options
  const where = host.host.startsWith("/") ? host.host : `${host.host}:${host.port}`
  let client: Pg.Client
  try {
    client = new Pg.Client({
      ...clientOptions(config, host),
      // Without one pg would go looking for a password file.
      password: password === undefined ? () => undefined as never : Redacted.value(password),
      // Over TLS it is another socket that is read from.
      ...(stream !== undefined ? { stream } : config.target.ssl ? {} : { stream: () => new DirectSocket() })
    } as Pg.ClientConfig)
  } catch (cause) {
    // The option stream is the user's code.
    done(DbError.fromSocket(cause, "connect", where), undefined)
    return () => {}
  }
  const parameters = new Map<string, string>()
  const internals = client as unknown as Internals
  internals.connection.on("parameterStatus", (message) => {
    parameters.set(message.parameterName, message.parameterValue)
  })
  if (config.channelBinding === "require") {
    demandBinding(internals.connection, () => finish(unbound(), undefined))
  }
  let finished = false
  const finish = (error: DbError | undefined, wire: Wire | undefined): void => {
    if (finished) return
    finished = true
    stop()
    if (error !== undefined) {
      client.on("error", () => {})
      internals.connection.stream.destroy()
    }
    done(error, wire)
  }
  const stop = deadline(config.connectMillis, () => {
    finish(
      DbError.make("ConnectionError", {
        phase: "connect",
        address: where,
        message: `${where} did not complete the connection within ${config.connectMillis} ms.`,
        hint: "Is it a PostgreSQL server, and is the network open? connectTimeout bounds TCP, TLS and authentication.",
        isRetryable: true
      }),
      undefined
    )
  })
  client.on("error", (cause) => finish(DbError.fromSocket(cause, "connect", where), undefined))
  // pg throws at what it does not know, such as a login by GSSAPI: out of the socket, where nobody would catch it.
  const attach = internals.connection.attachListeners.bind(internals.connection)
  internals.connection.attachListeners = (stream) => {
    const others = stream.listeners("data")
    attach(stream)
    for (const listener of stream.listeners("data")) {
      if (others.includes(listener)) continue
      stream.removeListener("data", listener as (chunk: Buffer) => void)
      stream.on("data", (chunk) => {
        try {
          listener(chunk)
        } catch (cause) {
          if (finished) throw cause
          internals.connection.emit("error", cause)
        }
      })
    }
  }
  const connected = (cause: Error | null | undefined): void => {
    if (finished) {
      internals.connection.stream.destroy()
      return
    }
    if (cause) {
      const server = cause as { readonly severity?: string; readonly code?: string }
      return finish(
        server.severity !== undefined
          ? DbError.fromServer(cause as never, { phase: "connect" })
          : DbError.fromSocket(cause, "connect", where),
        undefined
      )
    }
    client.removeAllListeners("error")
    finish(undefined, new Wire(client, host, parameters, config, onDeath))
  }
  try {
    client.connect(connected)
  } catch (cause) {
    // A stream of the user's that is no socket.
    finish(DbError.fromSocket(cause, "connect", where), undefined)
  }
  return () => {
    finished = true
    stop()
    client.on("error", () => {})
    internals.connection.stream.destroy()
  }
}
