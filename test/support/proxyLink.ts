/**
 * One connection through the proxy of `proxy.ts`: two lanes of bytes, what is read off them, and how it breaks.
 */
import * as Net from "node:net"
import { type Frame, Framer, FrontendReader, readBackend } from "./framing.js"

export type Direction = "frontend" | "backend"

/**
 * A message that reached the proxy. `type` is the protocol's letter, or `startup`, `ssl`, `gss`, `cancel`.
 * `name` is the statement or portal, the SQLSTATE of an error, the parameter of a status, the pid of a key or cancel;
 * `text` the SQL (of Parse, Query and of the Bind, Execute, Describe and Close that refer to it), tag or message.
 */
export interface Logged {
  readonly dir: Direction
  readonly conn: number
  readonly type: string
  readonly name: string
  readonly text: string
}

/**
 * How a connection ends: `rst` and `fin` towards the client (the server sees an end of stream); `halfClose` ends only
 * the direction to the client; `blackhole` leaves both sockets open and lets nothing through, until the client closes.
 */
export type Cut = "rst" | "fin" | "halfClose" | "blackhole"

/** What waits for a message, and strikes once. */
export interface Fault {
  readonly matches: (message: Logged) => boolean
  readonly forward: boolean
  readonly strike: (link: Link) => void
  readonly done: (message: Logged) => void
}

export type Mode = "relay" | "refuse" | "silent" | "silentAfterTls"

/** What a link asks of the proxy that it belongs to. */
export interface Host {
  readonly mode: Mode
  readonly dripping: boolean
  readonly answerDelay: number
  readonly held: Readonly<Record<Direction, boolean>>
  /** The fault that strikes at this message, disarmed. */
  take(message: Logged): Fault | undefined
  record(message: Logged): void
  forget(link: Link): void
  track(socket: Net.Socket): void
}

/** One direction of one connection: bytes in order, as late and as small as the proxy wants them. */
class Lane {
  held = false
  private queue: Array<{ readonly bytes: Buffer; readonly due: number; readonly then?: (() => void) | undefined }> = []
  private timer: NodeJS.Timeout | undefined
  private dripping = false

  constructor(
    private readonly from: Net.Socket,
    private readonly to: Net.Socket,
    private readonly drips: () => boolean
  ) {}

  /** `due` is the earliest time to hand it on. */
  push(bytes: Buffer, due = 0, then?: () => void): void {
    this.queue.push({ bytes, due, then })
  }

  drain(): void {
    if (this.dripping || this.timer !== undefined) return
    const ready: Array<Buffer> = []
    while (this.queue.length > 0 && !this.held) {
      const { bytes, due, then } = this.queue[0]!
      const wait = due === 0 ? 0 : due - performance.now()
      if (wait > 0) {
        this.timer = setTimeout(() => {
          this.timer = undefined
          this.drain()
        }, wait)
        break
      }
      if (this.drips() && bytes.length > 1) {
        this.queue[0] = { bytes: bytes.subarray(1), due, then }
        this.write([...ready, bytes.subarray(0, 1)])
        this.dripping = true
        setImmediate(() => {
          this.dripping = false
          this.drain()
        })
        return
      }
      this.queue.shift()
      ready.push(bytes)
      if (then !== undefined) {
        this.write(ready.splice(0))
        then()
      }
    }
    this.write(ready)
  }

  drop(): void {
    clearTimeout(this.timer)
    this.queue = []
  }

  private write(parts: Array<Buffer>): void {
    if (parts.length === 0 || this.to.destroyed || !this.to.writable) return
    if (!this.to.write(Buffer.concat(parts))) {
      this.from.pause()
      this.to.once("drain", () => this.from.resume())
    }
  }
}

/** The messages that the server answers without waiting for more. */
const groupEnds = new Set(["Q", "S", "cancel", "startup"])

/** One client connection and its connection to the server. */
export class Link {
  flights = 0
  pid: number | undefined
  kind: "session" | "cancel" = "session"
  /** `undefined` until start-up is over. */
  private answered: boolean | undefined
  private awaitsFlush = false
  private opaque = false
  private dead = false
  private frozen = false
  private awaitsTls = false
  private striking: { readonly fault: Fault; readonly message: Logged } | undefined
  private readonly reader = new FrontendReader()
  private readonly fromClient = new Framer(false)
  private readonly fromServer = new Framer(true)
  private readonly upstream: Net.Socket
  readonly toServer: Lane
  readonly toClient: Lane

  constructor(
    private readonly host: Host,
    readonly id: number,
    private readonly client: Net.Socket,
    target: Net.TcpNetConnectOpts
  ) {
    const upstream = (this.upstream = Net.connect({ ...target, allowHalfOpen: true, noDelay: true }))
    this.toServer = new Lane(client, upstream, () => false)
    this.toClient = new Lane(upstream, client, () => host.dripping)
    host.track(client)
    host.track(upstream)
    this.follow()
    client.on("data", (chunk) => this.onClient(chunk))
    upstream.on("data", (chunk) => this.onServer(chunk))
    client.on("end", () => (this.dead ? upstream.end() : this.after(this.toServer, () => upstream.end())))
    upstream.on("end", () => this.after(this.toClient, () => client.end()))
    upstream.on("error", () => this.dead || client.resetAndDestroy())
    client.on("close", () => {
      if (this.dead) upstream.end()
      else this.after(this.toServer, () => upstream.end())
      host.forget(this)
    })
  }

  /** Holds both lanes, whatever the proxy does, until `thaw`. */
  freeze(): void {
    this.toServer.held = this.toClient.held = true
    this.frozen = true
  }

  /** Holds the lanes that the proxy holds. */
  follow(): void {
    this.toServer.held = this.frozen || this.host.held.frontend
    this.toClient.held = this.frozen || this.host.held.backend
    this.toServer.drain()
    this.toClient.drain()
  }

  thaw(): void {
    this.frozen = false
    this.follow()
  }

  write(bytes: Buffer): void {
    this.toClient.push(bytes)
    this.toClient.drain()
  }

  resetFlights(): void {
    this.flights = 0
    if (this.answered !== undefined) this.answered = true
  }

  cut(how: Cut): void {
    if (this.dead) return
    this.dead = true
    this.toServer.drop()
    this.toClient.drop()
    if (how === "rst") this.client.resetAndDestroy()
    if (how === "fin") this.client.destroySoon()
    if (how === "halfClose") this.client.end()
    if (how === "rst" || how === "fin") this.upstream.end()
  }

  /** What arrives together is handed on together. */
  private get due(): number {
    return this.host.answerDelay === 0 ? 0 : performance.now() + this.host.answerDelay
  }

  private after(lane: Lane, then: () => void): void {
    if (this.dead) return
    lane.push(Buffer.alloc(0), lane === this.toClient ? this.due : 0, then)
    lane.drain()
  }

  private onClient(chunk: Buffer): void {
    if (this.dead) return
    if (this.opaque) this.toServer.push(chunk)
    else for (const frame of this.fromClient.push(chunk)) this.onFrontend(frame)
    this.toServer.drain()
  }

  private onFrontend(frame: Frame): void {
    if (this.dead) return
    if (frame.type === "startup") this.fromClient.typed = true
    if (frame.type === "ssl" || frame.type === "gss") {
      if (this.host.mode === "silentAfterTls") return this.write(Buffer.from("S"))
      this.awaitsTls = true
    }
    if (frame.type === "cancel") this.kind = "cancel"
    if (this.answered === true && frame.type !== "X") {
      this.flights++
      this.answered = false
      this.awaitsFlush = false
    }
    if (frame.type === "H") this.awaitsFlush = true
    const message: Logged = { dir: "frontend", conn: this.id, type: frame.type, ...this.reader.read(frame) }
    const fault = this.striking === undefined ? this.host.take(message) : undefined
    this.host.record(message)
    if (fault !== undefined) {
      if (!fault.forward) {
        this.toServer.drain()
        fault.strike(this)
        fault.done(message)
      } else {
        this.striking = { fault, message }
      }
    }
    if (this.dead) return
    const ends = groupEnds.has(frame.type)
    if (this.striking === undefined || !ends) return this.toServer.push(frame.bytes)
    // what answers the group's end must not get through before the fault strikes
    const { fault: due, message: cause } = this.striking
    this.striking = undefined
    this.toClient.held = true
    this.toServer.push(frame.bytes, 0, () => {
      due.strike(this)
      due.done(cause)
    })
  }

  private onServer(chunk: Buffer): void {
    if (this.dead) return
    const { due } = this
    if (this.awaitsTls) {
      this.awaitsTls = false
      this.opaque = chunk[0] !== 0x4e
      this.toClient.push(chunk.subarray(0, 1), due)
      chunk = chunk.subarray(1)
    }
    if (this.opaque) this.toClient.push(chunk, due)
    else for (const frame of this.fromServer.push(chunk)) this.onBackend(frame, due)
    this.toClient.drain()
  }

  private onBackend(frame: Frame, due: number): void {
    if (this.dead) return
    const message: Logged = { dir: "backend", conn: this.id, type: frame.type, ...readBackend(frame) }
    if (frame.type === "K") this.pid = Number(message.name)
    this.host.record(message)
    const fault = this.host.take(message)
    if (fault !== undefined) {
      // half of the message, then the fault
      this.toClient.push(frame.bytes.subarray(0, frame.bytes.length >> 1), due, () => {
        fault.strike(this)
        fault.done(message)
      })
      return
    }
    this.toClient.push(frame.bytes, due, this.deliveryOf(frame.type))
  }

  /** What handing a message to the client means for the count of flights. */
  private deliveryOf(type: string): (() => void) | undefined {
    if (type === "Z" || type === "G" || type === "W") return () => (this.answered = true)
    const asynchronous = type === "N" || type === "S" || type === "A"
    return this.awaitsFlush && !asynchronous ? () => (this.answered = true) : undefined
  }
}
