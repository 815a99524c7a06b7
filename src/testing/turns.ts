/**
 * The one connection of a sandbox and whose turn it is: the transactions of virtual connections are open one inside the
 * other, and only the innermost goes on.
 */
import { DbError } from "../DbError.js"
import { Command } from "../internal/command.js"
import type { Control } from "../internal/command.js"
import { deadline } from "../internal/deadline.js"
import type { Listener, Wire } from "../internal/wire.js"
import type { VirtualWire } from "./virtual.js"

/** A command that waits for its turn. */
export interface Entry {
  readonly wire: VirtualWire
  /** `opens`: it is the first of its transaction. */
  readonly go: (opens: boolean) => void
  readonly refuse: (error: DbError) => void
  /** Its time limit. */
  stop: () => void
}

const spoilt = (cause: DbError): DbError =>
  DbError.make("TransactionAborted", {
    message: "The transaction of the sandbox has failed as a whole: nothing more can run in it.",
    hint: "Something has taken a savepoint of the sandbox away. What does so needs a database of its own: DbTest.database.",
    cause
  })

/** The real connection, and whose transaction is innermost on it. */
export class Sandbox {
  /** Why nothing more can run. */
  over: DbError | undefined = undefined
  readonly listeners = new Set<Listener>()
  private readonly stack: Array<VirtualWire> = []
  private queue: Array<Entry> = []
  private running = 0
  private readonly listener: Listener = {
    notification: (channel, payload) => {
      for (const one of this.listeners) one.notification(channel, payload)
    },
    closed: (error) => this.release(error)
  }

  constructor(
    readonly real: Wire,
    private readonly blockMillis: number
  ) {
    real.listeners.add(this.listener)
  }

  /** What the statements go out on in the end: sandboxes nest. */
  get connection(): object {
    const { pipeline, sandbox } = this.real as Wire & { readonly sandbox?: Sandbox }
    return sandbox === undefined ? pipeline : sandbox.connection
  }

  get dead(): DbError | undefined {
    return this.over ?? this.real.pipeline.dead
  }

  get innermost(): VirtualWire | undefined {
    return this.stack[this.stack.length - 1]
  }

  /** More than one transaction is open. */
  get shared(): boolean {
    return this.stack.length > 1
  }

  /** What the settings were that open transactions have changed, the last one first: a role may allow them. */
  get before(): ReadonlyArray<readonly [name: string, value: string]> {
    const all = new Map<string, string>()
    for (const { before } of this.stack) for (const [name, value] of before) if (!all.has(name)) all.set(name, value)
    return [...all].reverse()
  }

  /** Lets a command go when its transaction is the innermost, or can be opened. The returned function gives up. */
  enter(entry: Entry): () => void {
    this.queue.push(entry)
    this.pump()
    if (!this.queue.includes(entry)) return () => {}
    const leave = () => {
      entry.stop()
      this.queue = this.queue.filter((_) => _ !== entry)
    }
    entry.stop = deadline(this.blockMillis, () => {
      leave()
      entry.refuse(this.busy(entry.wire))
    })
    return leave
  }

  /** A savepoint behind a statement that fails would not be there: one is opened when nothing is on its way. */
  private admits({ wire }: Entry): boolean {
    const { innermost, real, running } = this
    if (wire.undone) return true
    if (wire.alone) return false
    return wire.open ? innermost === wire : running === 0 && real.status !== "E" && innermost?.forsaken !== true
  }

  pump(): void {
    for (;;) {
      const at = this.queue.findIndex((_) => this.admits(_))
      if (at === -1) break
      const [entry] = this.queue.splice(at, 1)
      entry!.stop()
      const opens = !entry!.wire.open
      if (opens) this.stack.push(entry!.wire)
      entry!.go(opens)
    }
    const { innermost } = this
    if (innermost === undefined || this.running > 0) return
    if (innermost.forsaken) innermost.undoForsaken()
    else if (this.real.status === "E" && this.queue.some(({ wire }) => !wire.open)) innermost.setAside()
  }

  leave(wire: VirtualWire): void {
    const at = this.stack.indexOf(wire)
    if (at !== -1) this.stack.splice(at, 1)
  }

  busy(wire: VirtualWire): DbError {
    const block = this.innermost?.name ?? "another session"
    return DbError.make("SessionBusy", {
      message: `"${wire.name}" waited too long for its turn: "${block}" has the one connection of the sandbox.`,
      hint:
        "The transactions of a sandbox take turns, one inside the other: let the inner one end first. Sessions that " +
        "wait for each other need a database of their own: DbTest.database. blockTimeout and settleTimeout are the limits.",
      block
    })
  }

  /** What waits is told; of one connection or of all. */
  release(error: DbError, wire?: VirtualWire): void {
    const told = this.queue.filter((_) => wire === undefined || _.wire === wire)
    this.queue = this.queue.filter((_) => !told.includes(_))
    for (const entry of told) {
      entry.stop()
      entry.refuse(error)
    }
    if (wire !== undefined) return
    for (const one of [...this.listeners]) one.closed(error)
    this.listeners.clear()
  }

  /** From now on nothing is sent: what runs is cancelled, and what comes later is told. */
  close(error: DbError): void {
    if (this.over !== undefined) return
    this.over = error
    this.real.listeners.delete(this.listener)
    for (const wire of this.stack) wire.cut(error)
    this.release(error)
  }

  submit(command: Command): void {
    // The connection may be somebody else's by now.
    if (this.over === undefined) this.real.submit(command)
    else command.settle(this.over, undefined, undefined)
  }

  begin(): void {
    this.running++
  }

  end(): void {
    this.running--
    this.pump()
  }

  /** Statements of ours, in one message; `as`: what they are to the program. */
  control(text: string, as: string, done: (error: DbError | undefined) => void): void {
    this.begin()
    const command = new Command(text, [], "array", true, false, true, undefined, (error) => {
      done(error)
      this.end()
    })
    command.as = as
    this.submit(command)
  }

  /** The same, each with what it does with its answer. */
  controls(controls: ReadonlyArray<Control>, done: (error: DbError | undefined) => void): void {
    this.begin()
    const prefix = controls.slice(0, -1)
    const { as, done: heard, params, text } = controls[prefix.length]!
    const command = new Command(
      text,
      params,
      "array",
      true,
      false,
      false,
      { takePrefix: () => prefix },
      (error, result) => {
        heard?.(error === undefined, result?.rows[0])
        done(error)
        this.end()
      }
    )
    command.as = as
    this.submit(command)
  }

  /** The same, without which nothing goes on: a savepoint of ours is left. */
  must(text: string, as: string, done: () => void): void {
    this.control(text, as, (error) => {
      if (error !== undefined && this.dead === undefined) this.close(spoilt(error))
      done()
    })
  }
}
