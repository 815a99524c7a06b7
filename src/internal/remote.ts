/**
 * Connections whose sockets another thread holds, for effects that this thread stands still for. The other thread
 * dials, negotiates TLS, authenticates, and from then on passes bytes; pipeline and pool are the same as ever.
 */
import * as Redacted from "effect/Redacted"
import { EventEmitter } from "node:events"
import { MessageChannel, receiveMessageOnPort, Worker } from "node:worker_threads"
import type { MessagePort, WorkerOptions } from "node:worker_threads"
import { DbError } from "../DbError.js"
import { bell, sources } from "./blocking.js"
import type { Source } from "./blocking.js"
import { unbound } from "./channelBinding.js"
import { clientOptions, Wire } from "./wire.js"
import type { dial } from "./wire.js"

const work = `
const { workerData } = require("node:worker_threads")
const { bell, from, life, port } = workerData
const pg = () => require("node:module").createRequire(from)("pg")
const clients = new Map()

const say = (message) => {
  port.postMessage(message)
  Atomics.add(bell, 0, 1)
  Atomics.notify(bell, 0)
}

const sayFailed = (id, cause) => say({ id, type: "failed", message: cause.message, cause: { ...cause, code: cause.code } })

// Whoever waits for this thread stands still and hears of nothing but the bell: nothing may end here without it.
// Whose it was is not known.
process.on("uncaughtException", (cause) => {
  for (const { fail } of [...clients.values()]) fail(cause)
})

const connect = ({ id, millis, mustBind, options }) => {
  const client = new (pg().Client)({ ...options, password: options.password ?? (() => undefined) })
  const { connection } = client
  const parameters = []
  let over = false
  const failed = (cause) => {
    if (over) return
    over = true
    clearTimeout(timer)
    connection.stream.destroy()
    clients.delete(id)
    sayFailed(id, cause)
  }
  const timer = setTimeout(() => failed({ code: "ETIMEDOUT", message: "no connection within " + millis + " ms" }), millis)
  clients.set(id, { client, fail: (cause) => (over ? connection.stream.destroy() : failed(cause)), options })
  if (mustBind) {
    const refuse = () => failed({ message: "", unbound: true })
    let bound = false
    connection.on("authenticationSASL", ({ mechanisms }) => {
      bound = mechanisms.includes("SCRAM-SHA-256-PLUS")
      if (!bound) refuse()
    })
    connection.on("authenticationCleartextPassword", refuse)
    connection.on("authenticationMD5Password", refuse)
    connection.on("authenticationOk", () => bound || refuse())
  }
  connection.on("parameterStatus", (_) => parameters.push([_.parameterName, _.parameterValue]))
  client.on("error", failed)
  client.connect((cause) => {
    if (cause) return failed(cause)
    if (over) return
    over = true
    clearTimeout(timer)
    const { stream } = connection
    for (const listener of stream.listeners("data")) stream.removeListener("data", listener)
    stream.on("data", (chunk) => say({ id, type: "data", chunk }))
    stream.once("close", () => {
      clients.delete(id)
      say({ id, type: "close" })
    })
    say({ id, type: "ready", pid: client.processID, secret: client.secretKey, parameters })
  })
}

const cancel = ({ id }) => {
  const { client, options } = clients.get(id)
  const other = new (pg().Client)(options)
  const { connection } = other
  const done = () => {
    clearTimeout(timer)
    connection.stream.destroy()
    say({ id, type: "canceled" })
  }
  const timer = setTimeout(done, 2000)
  connection.on("error", () => {})
  connection.once("end", done)
  connection.once(other.ssl ? "sslconnect" : "connect", () => connection.cancel(client.processID, client.secretKey))
  if (other.host.startsWith("/")) connection.connect(other.host + "/.s.PGSQL." + other.port)
  else connection.connect(other.port, other.host)
}

const take = (message) => {
  if (message.type === "connect") return connect(message)
  const connection = clients.get(message.id)?.client.connection
  if (connection === undefined) return message.type === "cancel" && say({ id: message.id, type: "canceled" })
  if (message.type === "write") connection.stream.write(message.chunk)
  else if (message.type === "end") connection.end()
  else if (message.type === "cancel") cancel(message)
  else connection.stream.destroy()
}

port.on("message", (message) => {
  try {
    take(message)
  } catch (cause) {
    const { id, type } = message
    if (type === "cancel") say({ id, type: "canceled" })
    const known = clients.get(id)
    if (known !== undefined) known.fail(cause)
    else if (type === "connect") sayFailed(id, cause)
  }
})
`

/**
 * That this thread has ended is heard from its port by others, in their event loops: not by the one that stands still. So
 * a third has no other work.
 */
const guard = `
const { bell, life, watch } = require("node:worker_threads").workerData
life.on("message", () => {})
life.once("close", () => {
  watch.postMessage("ended")
  Atomics.add(bell, 0, 1)
  Atomics.notify(bell, 0)
})
`

/** Of the thread that does the work: tests let it end by them. */
export const threadOptions: Pick<WorkerOptions, "execArgv" | "resourceLimits"> = { execArgv: [] }

type Message =
  | { readonly id: number; readonly type: "failed"; readonly message: string; readonly cause: object }
  | {
      readonly id: number
      readonly type: "ready"
      readonly pid: number
      readonly secret: number
      readonly parameters: ReadonlyArray<readonly [string, string]>
    }
  | { readonly id: number; readonly type: "data"; readonly chunk: Uint8Array }
  | { readonly id: number; readonly type: "close" | "canceled" }

let ids = 0

/** The other thread's socket, as much of it as the pipeline knows. */
class RemoteStream extends EventEmitter {
  readonly id = ++ids
  bytesWritten = 0
  /** Connecting, closing: something of it is due, besides answers to what was sent. */
  busy = true
  readonly canceled: Array<() => void> = []
  closed = false
  wire: Wire | undefined = undefined

  constructor(
    readonly relay: Relay,
    readonly onMessage: (message: Message) => void
  ) {
    super()
  }

  get pending(): boolean {
    return this.busy || this.canceled.length > 0 || (this.wire !== undefined && !this.wire.dead && !this.wire.idle)
  }

  write(chunk: Uint8Array): boolean {
    this.bytesWritten += chunk.length
    this.relay.post({ id: this.id, type: "write", chunk })
    return true
  }

  /** What has come lies in the port, read or not. */
  pause(): void {}

  resume(): void {}

  end(): void {
    this.busy = true
    this.relay.post({ id: this.id, type: "end" })
  }

  destroy(): void {
    this.busy = true
    this.relay.post({ id: this.id, type: "destroy" })
  }
}

class Relay implements Source {
  private readonly streams = new Map<number, RemoteStream>()
  private readonly port: MessagePort
  /** Here comes that the worker has ended. */
  private readonly watch: MessagePort
  private readonly worker: Worker
  private readonly watcher: Worker

  constructor() {
    const data = new MessageChannel()
    const end = new MessageChannel()
    this.port = data.port1
    this.watch = end.port1
    const life = new MessageChannel()
    this.worker = new Worker(work, {
      ...threadOptions,
      eval: true,
      workerData: { bell, from: import.meta.url, life: life.port1, port: data.port2 },
      transferList: [data.port2, life.port1]
    })
    this.watcher = new Worker(guard, {
      eval: true,
      execArgv: [],
      workerData: { bell, life: life.port2, watch: end.port2 },
      transferList: [life.port2, end.port2]
    })
    // While this thread runs freely, what is idle is looked after as well, and keeps no process running.
    this.port.on("message", this.dispatch)
    this.port.unref()
    this.watch.on("message", this.ended)
    this.watch.unref()
    this.worker.unref()
    this.worker.on("error", this.ended)
    this.watcher.unref()
    sources.add(this)
  }

  open(onMessage: (message: Message) => void): RemoteStream {
    const stream = new RemoteStream(this, onMessage)
    this.streams.set(stream.id, stream)
    return stream
  }

  post(message: object): void {
    this.port.postMessage(message)
  }

  readonly pending = (): boolean => [...this.streams.values()].some((stream) => stream.pending)

  readonly receive = (): boolean => {
    // Asked first: what the thread has said before its end is there by now.
    const over = receiveMessageOnPort(this.watch) !== undefined
    const received = this.drain()
    if (over) this.ended()
    return received || over
  }

  private drain(): boolean {
    let received = false
    for (;;) {
      const next = receiveMessageOnPort(this.port) as { readonly message: Message } | undefined
      if (next === undefined) return received
      received = true
      this.dispatch(next.message)
    }
  }

  private readonly dispatch = (message: Message): void => {
    const stream = this.streams.get(message.id)
    if (stream === undefined) return
    stream.onMessage(message)
    if (stream.closed && stream.canceled.length === 0) this.forget(stream)
  }

  /** The thread has ended, and its sockets with it. */
  private readonly ended = (): void => {
    this.drain()
    // Whoever dials because of it gets another thread.
    this.leave()
    const code = "ERR_WORKER_EXIT"
    const cause = Object.assign(new Error("the thread has ended"), { code })
    for (const stream of [...this.streams.values()]) {
      stream.wire?.pipeline.die(cause, "read")
      for (let left = stream.canceled.length; left > 0; left--) this.dispatch({ id: stream.id, type: "canceled" })
      this.dispatch(
        stream.wire === undefined
          ? { id: stream.id, type: "failed", message: cause.message, cause: { code } }
          : { id: stream.id, type: "close" }
      )
    }
  }

  private leave(): void {
    if (relay === this) relay = undefined
  }

  forget(stream: RemoteStream): void {
    this.streams.delete(stream.id)
    if (this.streams.size > 0) return
    this.leave()
    sources.delete(this)
    this.port.close()
    this.watch.close()
    void this.worker.terminate()
    void this.watcher.terminate()
  }
}

let relay: Relay | undefined = undefined

/** As `dial`, through the other thread. */
export const dialRemote: typeof dial = (config, host, password, onDeath, done) => {
  const where = host.host.startsWith("/") ? host.host : `${host.host}:${host.port}`
  const through = (relay ??= new Relay())
  const stream = through.open((message) => {
    switch (message.type) {
      case "failed": {
        stream.busy = false
        stream.closed = true
        const cause = Object.assign(new Error(message.message), message.cause)
        const error =
          "unbound" in cause
            ? unbound()
            : "severity" in cause
              ? DbError.fromServer(cause as never, { phase: "connect" })
              : DbError.fromSocket(cause, "connect", where)
        return done(error, undefined)
      }
      case "ready": {
        stream.busy = false
        const client = Object.assign(new EventEmitter(), {
          connection: { stream, end: () => stream.end() },
          processID: message.pid,
          secretKey: message.secret,
          query: () => {
            throw new Error("the pg client can't be used in runSync")
          }
        })
        stream.wire = new RemoteWire(stream, client as never, host, new Map(message.parameters), config, onDeath)
        return done(undefined, stream.wire)
      }
      case "data":
        return void stream.emit(
          "data",
          Buffer.from(message.chunk.buffer, message.chunk.byteOffset, message.chunk.length)
        )
      case "canceled":
        return stream.canceled.shift()?.()
      default:
        stream.busy = false
        stream.closed = true
        return void stream.emit("close")
    }
  })
  try {
    through.post({
      id: stream.id,
      type: "connect",
      millis: config.connectMillis,
      mustBind: config.channelBinding === "require",
      options: {
        ...clientOptions(config, host),
        ...(password === undefined ? {} : { password: Redacted.value(password) }),
        stream: config.options.stream
      }
    })
  } catch (cause) {
    through.forget(stream)
    done(
      DbError.make("ConnectionError", {
        phase: "connect",
        message: "runSync can't hand the options of the connection to its thread.",
        hint: "Functions can't be handed over: the option ssl has one, or stream is set.",
        cause
      }),
      undefined
    )
  }
  return () => stream.destroy()
}

class RemoteWire extends Wire {
  override readonly needsLoop = false

  constructor(
    private readonly stream: RemoteStream,
    ...rest: ConstructorParameters<typeof Wire>
  ) {
    super(...rest)
  }

  override cancel(done: (error?: Error) => void): void {
    if (this.stream.closed) return done()
    this.stream.canceled.push(done)
    this.stream.relay.post({ id: this.stream.id, type: "cancel" })
  }
}
