/**
 * A TCP proxy in front of a real server. It records what travels, counts round trips and breaks things on request.
 *
 * A **flight** is a run of frontend messages that begins after an answer has been handed to the client: after a
 * ReadyForQuery, or, when the client asked with Flush, after any answer to it. Start-up, CancelRequest and Terminate
 * do not count. How TCP cuts the bytes does not matter. A client that writes twice without waiting may be answered in
 * between; `delay(ms)` holds answers back long enough for such writes to count as the one flight that they are.
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import * as Net from "node:net"
import { type Cut, type Direction, type Fault, type Host, Link, type Logged, type Mode } from "./proxyLink.js"

export type { Cut, Direction, Logged, Mode } from "./proxyLink.js"

/** Whether the message that triggers a fault, and the rest of its Sync group, still reaches the server. */
export interface FaultOptions {
  readonly forward: boolean
  readonly how?: Cut | undefined
}

/** The proxy itself. Start one with `PgProxy.start(url)` or, in an Effect, `proxy(url)`. */
export class PgProxy implements Host {
  readonly host = "127.0.0.1"
  /** Everything that reached the proxy since the start or the last `reset`, in order of arrival. */
  readonly log: Array<Logged> = []
  /** Connections accepted since the start, those of CancelRequests included. */
  accepted = 0
  /** Where new connections go; may be changed. */
  target: { host: string; port: number }
  mode: Mode = "relay"
  dripping = false
  answerDelay = 0
  readonly held = { frontend: false, backend: false }
  private readonly links = new Set<Link>()
  private readonly sockets = new Set<Net.Socket>()
  private readonly faults = new Set<Fault>()
  private readonly watchers = new Set<{ matches: (message: Logged) => boolean; done: (message: Logged) => void }>()
  private readonly server = Net.createServer({ allowHalfOpen: true, noDelay: true }, (client) => this.onClient(client))

  private constructor(private readonly serverUrl: URL) {
    this.target = { host: serverUrl.hostname, port: Number(serverUrl.port || 5432) }
  }

  static async start(url: string): Promise<PgProxy> {
    const proxy = new PgProxy(new URL(url))
    await new Promise<void>((resolve, reject) => {
      proxy.server.once("error", reject).listen(0, proxy.host, resolve)
    })
    return proxy
  }

  async close(): Promise<void> {
    for (const link of this.links) link.cut("blackhole")
    for (const socket of this.sockets) socket.destroy()
    await new Promise<void>((resolve) => this.server.close(() => resolve()))
  }

  get port(): number {
    return (this.server.address() as Net.AddressInfo).port
  }

  /** The server's URL with the proxy's address in it. */
  get url(): string {
    const url = new URL(this.serverUrl)
    url.hostname = this.host
    url.port = String(this.port)
    return url.href
  }

  /** The open connections, without those of CancelRequests. */
  get connections(): ReadonlyArray<{
    readonly id: number
    readonly pid: number | undefined
    readonly flights: number
  }> {
    return [...this.links].filter((link) => link.kind === "session")
  }

  /** The CancelRequests since the last `reset`; `name` is the pid they ask to cancel. */
  get cancels(): ReadonlyArray<Logged> {
    return this.log.filter((message) => message.type === "cancel")
  }

  /** The SQL that was executed, in order: of Query and of Execute. */
  statements(): Array<string> {
    return this.log.filter(({ dir, type }) => dir === "frontend" && (type === "Q" || type === "E")).map((m) => m.text)
  }

  /** Round trips since the last `reset`, over all connections, closed ones included. */
  flights(): number {
    return [...this.links].reduce((sum, link) => sum + link.flights, this.closedFlights)
  }
  private closedFlights = 0

  reset(): void {
    this.log.length = 0
    this.closedFlights = 0
    for (const link of this.links) link.resetFlights()
  }

  /** The next message (either direction) that satisfies the predicate, as it arrives at the proxy. */
  seen(matches: (message: Logged) => boolean): Promise<Logged> {
    return new Promise((resolve) => {
      const watcher = {
        matches,
        done: (message: Logged) => {
          this.watchers.delete(watcher)
          resolve(message)
        }
      }
      this.watchers.add(watcher)
    })
  }

  /** New connections are passed on (`relay`), closed at once (`refuse`), accepted and ignored (`silent`), or answered
   * `S` to a TLS request and then ignored (`silentAfterTls`). */
  accept(mode: Mode): void {
    this.mode = mode
  }

  /** Lets nothing through, in one direction or both, until `resume`. */
  pause(direction: Direction | "both" = "both"): void {
    if (direction !== "backend") this.held.frontend = true
    if (direction !== "frontend") this.held.backend = true
    for (const link of this.links) link.follow()
  }

  /** Ends `pause` and every `holdAt` that has struck. */
  resume(): void {
    this.held.frontend = this.held.backend = false
    for (const link of this.links) link.thaw()
  }

  /** Adds a round-trip time: answers reach the client this much later. */
  delay(milliseconds: number): void {
    this.answerDelay = milliseconds
  }

  oneByteAtATime(on = true): void {
    this.dripping = on
  }

  /** Ends every open connection. */
  cutAll(how: Cut = "rst"): void {
    for (const link of this.links) link.cut(how)
  }

  /** Once: when a frontend message satisfies the predicate, its connection is cut, before or after it is forwarded. */
  cutAfter(matches: (message: Logged) => boolean, { forward, how = "rst" }: FaultOptions): Promise<Logged> {
    return this.arm("frontend", matches, forward, (link) => link.cut(how))
  }

  /** Once: as `cutAfter`, but the connection is held in both directions until `resume`. */
  holdAt(matches: (message: Logged) => boolean, { forward }: Pick<FaultOptions, "forward">): Promise<Logged> {
    return this.arm("frontend", matches, forward, (link) => link.freeze())
  }

  /** Once: the n-th row from now is forwarded by half, then its connection is cut. */
  cutInTheMiddleOfRow({ how = "rst", row = 1 }: { readonly how?: Cut; readonly row?: number } = {}): Promise<Logged> {
    let left = row
    return this.arm(
      "backend",
      (message) => message.type === "D" && --left === 0,
      false,
      (link) => link.cut(how)
    )
  }

  /** Sends bytes that no server sends to every client: by default an unknown message of absurd length. */
  injectGarbage(bytes: Buffer = Buffer.from([0x21, 0x7f, 0xff, 0xff, 0xff, 0xde, 0xad])): void {
    for (const link of this.links) link.write(bytes)
  }

  /** Takes back the faults that have not struck. */
  disarm(): void {
    this.faults.clear()
  }

  /** @internal */
  take(message: Logged): Fault | undefined {
    for (const fault of this.faults) {
      if (fault.matches(message)) {
        this.faults.delete(fault)
        return fault
      }
    }
    return undefined
  }

  /** @internal */
  record(message: Logged): void {
    this.log.push(message)
    for (const watcher of this.watchers) if (watcher.matches(message)) watcher.done(message)
  }

  /** @internal */
  forget(link: Link): void {
    if (this.links.delete(link)) this.closedFlights += link.flights
  }

  /** @internal */
  track(socket: Net.Socket): void {
    this.sockets.add(socket)
    socket.on("error", () => {}).on("close", () => this.sockets.delete(socket))
  }

  private arm(
    dir: Direction,
    matches: (message: Logged) => boolean,
    forward: boolean,
    strike: (link: Link) => void
  ): Promise<Logged> {
    return new Promise((done) => {
      this.faults.add({ matches: (message) => message.dir === dir && matches(message), forward, strike, done })
    })
  }

  private onClient(client: Net.Socket): void {
    this.accepted++
    if (this.mode === "relay" || this.mode === "silentAfterTls") {
      this.links.add(new Link(this, this.accepted, client, this.target))
    } else {
      this.track(client)
      if (this.mode === "refuse") client.destroy()
      else client.resume()
    }
  }
}

/** A proxy in front of the server of `url`, closed with the scope. */
export const proxy = (url: string): Effect.Effect<PgProxy, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.promise(() => PgProxy.start(url)),
    (proxy) => Effect.promise(() => proxy.close())
  )
