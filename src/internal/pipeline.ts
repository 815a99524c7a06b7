/**
 * The pipeline of one raw connection: commands go out in order of issue, all that are ready in one write, and
 * their answers are told apart by counting.
 *
 * Commands are sent in groups; a group ends with one Sync. Inside a transaction the commands of one write share
 * a group, so that BEGIN and the statement that it rides with stand or fall together; an implicit statement has
 * a group of its own, because its transaction commits at the Sync.
 */
import type { Duplex } from "node:stream"
import { DbError } from "../DbError.js"
import { Answers } from "./answers.js"
import type { AnswersOptions } from "./answers.js"
import { after, later } from "./blocking.js"
import { Group, State, Step } from "./command.js"
import type { Command, Control } from "./command.js"
import { deadline } from "./deadline.js"
import { PreparedStatements } from "./prepared.js"
import type { Probe } from "./probe.js"
import { ProtocolViolation, Reader, Writer } from "./protocol.js"
import type { Host } from "./wire.js"

export { Command } from "./command.js"
export type { Control, CopyHandler, Done, Owner } from "./command.js"

/** More than these in flight wait on the client: what the server can't take would pile up in the socket. */
const windowSteps = 1000
const windowBytes = 1 << 20

/** As many issued at once go out before the rest is issued, and then twice as many: the server need not wait for it. */
const firstAhead = 8

const none: ReadonlyArray<Control> = []

/** @internal */
export interface PipelineOptions extends AnswersOptions {
  /** For those who watch. */
  readonly host: Host
  readonly probe: Probe
  readonly pipelining: boolean
  readonly preparedStatements: number
  readonly settleMillis: number
  /** Sends a CancelRequest; calls back when its socket is closed by the server, or with an error. */
  readonly cancel: (done: (error?: Error) => void) => void
  readonly onDeath: (error: DbError) => void
}

/** A command that the server is asked to cancel. */
interface Cancellation {
  readonly command: Command
  requests: number
  /** By then the server has to have answered. */
  readonly stop: () => void
  /** Until it is asked again; nothing while a request is on its way. */
  pause: (() => void) | undefined
}

/** @internal */
export class Pipeline {
  dead: DbError | undefined = undefined
  /** A cancel was sent that did not end what it was meant for: it may still hit somebody. */
  suspect = false

  private readonly writer = new Writer()
  private readonly prepared: PreparedStatements
  private readonly answers: Answers
  private readonly reader: Reader
  private queue: Array<Command> = []
  private head = 0
  private scheduled = false
  private ahead = firstAhead
  /** What is issued in this turn joins it: its Sync goes out at the end of the turn. */
  private group: Group | undefined = undefined
  private blocked = false
  private cancellation: Cancellation | undefined = undefined
  /** CancelRequests that may still hit somebody. */
  private strays = 0
  /** How often something has come in: what goes out in between is one round trip. */
  heard = 0
  private readonly idleWaiters: Array<() => void> = []
  private readonly writeWaiters: Array<() => void> = []
  /** A COPY FROM STDIN that is under way. */
  private copying: Command | undefined = undefined

  constructor(
    readonly stream: Duplex,
    readonly options: PipelineOptions
  ) {
    this.prepared = new PreparedStatements(options.preparedStatements)
    this.answers = new Answers(options, this.prepared, {
      copyIn: (group, step) => this.copyIn(group, step),
      copyOut: (command, chunk) => command?.copy?.onData?.(chunk, this),
      takeStray: () => this.strays > 0 && this.strays-- > 0
    })
    this.reader = new Reader(this.answers.onMessage)
  }

  /** What the last ReadyForQuery said: idle, in a transaction, in a failed one. */
  get status(): "I" | "T" | "E" {
    return this.answers.status
  }

  /** Nothing queued and nothing unanswered. */
  get idle(): boolean {
    return this.answers.groups.length === 0 && this.head >= this.queue.length && this.cancellation === undefined
  }

  whenIdle(f: () => void): void {
    if (this.idle || this.dead !== undefined) f()
    else this.idleWaiters.push(f)
  }

  readonly onData = (chunk: Buffer): void => this.onBytes(chunk, chunk.length)

  /** What has arrived at the beginning of a buffer, which is only valid during the call. */
  readonly onBytes = (buffer: Buffer, length: number): void => {
    if (this.dead !== undefined) return
    this.heard++
    try {
      this.reader.push(buffer, length)
    } catch (cause) {
      return this.die(cause, "read")
    }
    this.afterAnswers()
  }

  readonly onDrain = (): void => {
    this.blocked = false
    for (const waiter of this.writeWaiters.splice(0)) waiter()
    this.schedule()
  }

  /** When what was written has gone out to the server, or never will. */
  whenWritable(f: () => void): void {
    if (this.blocked && this.dead === undefined) this.writeWaiters.push(f)
    else f()
  }

  submit(command: Command): void {
    if (this.dead !== undefined) return command.settle(this.dead, undefined, undefined)
    command.state = State.Queued
    this.queue.push(command)
    this.schedule()
    if (this.queue.length - this.head < this.ahead || command.more) return
    this.ahead *= 2
    this.send()
  }

  /**
   * Takes back what has not been sent, cancels what is running, and marks what waits behind others to be
   * cancelled when its turn comes. `true`: the caller should wait until the command has settled.
   */
  interrupt(command: Command): boolean {
    if (command.state !== State.Sent) {
      this.withdraw(command)
      return false
    }
    command.abandoned = true
    if (this.answers.abandoned() !== command) return false
    this.cancel(command)
    return true
  }

  /** With the others of its batch: both happen or neither. */
  private withdraw(command: Command): void {
    // Flush passes over what is settled: nothing is searched for in a queue that may be long.
    command.state = State.Settled
    if (command.batch !== undefined) for (const other of command.batch) other.state = State.Settled
  }

  /** One at a time: a second one waits until the first is known to be over. */
  private cancel(command: Command): void {
    if (this.cancellation !== undefined) return
    command.canceled = true
    const stop = deadline(this.options.settleMillis, () =>
      this.die(new Error("the server did not confirm the cancellation in time"), "read")
    )
    const cancellation: Cancellation = { command, requests: 0, stop, pause: undefined }
    this.cancellation = cancellation
    let pause = 50
    const attempt = (): void => {
      cancellation.requests++
      this.strays++
      this.options.cancel(() => {
        if (this.cancellation !== cancellation) return
        if (command.settled) return this.canceled(cancellation)
        // It may have arrived before the statement did, or not at all: ask again until it is answered.
        cancellation.pause = after(pause, () => {
          cancellation.pause = undefined
          attempt()
        })
        pause *= 2
      })
    }
    attempt()
  }

  /** The command has been answered and no request is on its way: what comes next is safe from it. */
  private canceled(cancellation: Cancellation): void {
    this.endCancellation()
    if (!cancellation.command.confirmed) this.suspect = true
    else this.strays = Math.max(0, this.strays - cancellation.requests)
    this.afterAnswers()
    this.schedule()
  }

  private endCancellation(): void {
    this.cancellation?.stop()
    this.cancellation?.pause?.()
    this.cancellation = undefined
  }

  private schedule(): void {
    if (this.scheduled) return
    this.scheduled = true
    // After the microtasks: every fiber that can run has had its turn, and their statements share a write.
    later(this.flush)
  }

  /** For those who listen to a statement or to the engine. */
  tell(command: Command, prefix: ReadonlyArray<Control>): void {
    if (command.watch !== undefined) command.watch.sent(prefix, this.options.host)
    const { listener } = this.options.probe
    if (listener === undefined) return
    for (const control of prefix) listener.sent(this, control.text, control.as, this.heard)
    listener.sent(this, command.text, command.as, this.heard)
  }

  /** The end of the turn. */
  private readonly flush = (): void => {
    this.scheduled = false
    this.ahead = firstAhead
    if (this.dead !== undefined) return
    this.fill()
    if (this.group !== undefined) this.sync()
    this.write()
    this.checkIdle()
  }

  private send(): void {
    this.fill()
    this.write()
  }

  /** Nothing new is sent while a cancel is on its way, which could hit it. */
  private get held(): boolean {
    return this.dead !== undefined || this.cancellation !== undefined || this.blocked || this.copying?.settled === false
  }

  private fill(): void {
    if (this.held) return
    this.copying = undefined
    const { answers, writer } = this
    const one = !this.options.pipelining
    let glued = false
    while (this.head < this.queue.length) {
      const full = answers.inFlight >= windowSteps || writer.size >= windowBytes
      if (!glued && (full || (one && answers.groups.length > 0))) break
      const command: Command = this.queue[this.head]!
      if (command.state !== State.Queued) {
        this.head++
        continue
      }
      const apart = command.simple || command.solo || one
      // Behind a BEGIN that may fail, only what stands or falls with it.
      if (!glued && answers.opening && (apart || this.group === undefined)) break
      this.head++
      const prefix = command.owner === undefined ? none : command.owner.takePrefix()
      const opens = prefix.some((control) => control.opens)
      this.tell(command, prefix)
      if (this.group !== undefined && !glued) {
        if (apart) this.sync()
        // The answers before are awaited by somebody: they must not wait for this one.
        else writer.flush()
      }
      const group = (this.group ??= this.open(command, opens))
      command.state = State.Sent
      command.sent = true
      if (opens) answers.opening = true
      if (command.simple) {
        this.writeSimple(group, command, prefix)
        this.group = undefined
        // Between its text and its end the server takes nothing but data.
        if (command.copy?.onIn !== undefined) {
          this.copying = command
          break
        }
      } else {
        for (const control of prefix) {
          this.writeExtended(group, control.text, control.params, control.named, undefined, control)
        }
        this.writeExtended(group, command.text, command.params, command.prepare, command, undefined)
        glued = command.more
        if (command.solo && !glued) this.sync()
      }
    }
    if (this.head >= this.queue.length) {
      this.queue.length = 0
      this.head = 0
    } else if (this.head > 1024) {
      this.queue = this.queue.slice(this.head)
      this.head = 0
    }
  }

  private sync(): void {
    this.writer.sync()
    this.group = undefined
  }

  private open({ simple, solo }: Command, opens: boolean): Group {
    const group = new Group(simple, solo, opens)
    this.answers.groups.push(group)
    if (!simple) for (const name of this.prepared.takeLeftovers()) this.writer.closeStatement(name)
    return group
  }

  private write(): void {
    if (this.writer.size > 0 && !this.stream.write(this.writer.take())) this.blocked = true
  }

  private step(group: Group, command: Command | undefined, control: Control | undefined): Step {
    const step = new Step(command, control)
    group.steps.push(step)
    this.answers.inFlight++
    return step
  }

  private writeSimple(group: Group, command: Command, prefix: ReadonlyArray<Control>): void {
    let text = ""
    for (const control of prefix) {
      this.step(group, undefined, control)
      text += inline(control) + ";\n"
    }
    group.folded = text.length
    this.step(group, command, undefined)
    this.writer.query(text + command.text)
  }

  private writeExtended(
    group: Group,
    text: string,
    params: ReadonlyArray<null | string | Buffer>,
    named: boolean,
    command: Command | undefined,
    control: Control | undefined
  ): void {
    const writer = this.writer
    const step = this.step(group, command, control)
    const scope = command?.scope ?? ""
    const naming = named ? this.prepared.use(scope === "" ? text : `${scope}\0${text}`, group) : undefined
    switch (naming?._tag) {
      case "Known": {
        const { prepared } = naming
        writer.bind(prepared.name, params)
        step.prepared = prepared
        step.shape = prepared.shape
        if (prepared.shape === undefined) writer.describePortal()
        break
      }
      case "New": {
        step.prepared = naming.prepared
        step.closed = naming.evicted
        if (naming.evicted !== undefined) writer.closeStatement(naming.evicted)
        writer.parse(naming.prepared.name, text).bind(naming.prepared.name, params).describePortal()
        break
      }
      default:
        writer.parse("", text).bind("", params).describePortal()
    }
    writer.execute()
  }

  /** The server's statements are gone: parse them again. */
  forgetAll(): void {
    this.prepared.forgetAll()
  }

  private copyIn(group: Group, step: Step): void {
    const command = step.command!
    const onIn = command.copy?.onIn
    if (onIn !== undefined && !command.abandoned) return onIn(this, command)
    if (onIn === undefined) step.copies = "in"
    // The copy mode swallows a Sync, and fails at any other message. Behind one of its own group an older server goes on
    // at the Sync of that; a newer one ends the connection.
    if (group.at < group.steps.length - 1) return
    // One of another group has no answer, or one that is not its own.
    if (this.answers.groups.length > 1) throw new ProtocolViolation("a COPY waits for data among other statements")
    this.writer.copyFail(onIn === undefined ? "there is no data" : "the copy was interrupted")
    // The Sync that was already sent was swallowed.
    if (!group.simple) this.writer.sync()
    this.write()
  }

  copyData(chunk: Buffer): boolean {
    this.writer.copyData(chunk)
    if (this.writer.size < 65536) return true
    this.write()
    return !this.blocked
  }

  copyDone(): void {
    this.writer.copyDone()
    this.write()
  }

  copyFail(message: string): void {
    this.writer.copyFail(message)
    this.write()
  }

  private afterAnswers(): void {
    if (this.dead !== undefined) return
    const { cancellation } = this
    // Answered between two requests.
    if (cancellation !== undefined && cancellation.command.settled && cancellation.pause !== undefined) {
      return this.canceled(cancellation)
    }
    const abandoned = this.answers.abandoned()
    if (abandoned !== undefined) this.cancel(abandoned)
    if (this.head < this.queue.length) this.schedule()
    this.checkIdle()
  }

  private checkIdle(): void {
    // Each may have put something to do in front of the next.
    while (this.idleWaiters.length > 0 && this.idle) this.idleWaiters.shift()!()
  }

  /** The connection is lost, or can't be trusted: everything on it fails, what was sent as `read`. */
  die(cause: unknown, phase: "send" | "read"): void {
    if (this.dead !== undefined) return
    this.endCancellation()
    const { lastNotice, lost } = this.answers
    // A backend that is told to go because another has crashed says so in a notice.
    const said = lost ?? (lastNotice?.code?.startsWith("57P") === true ? lastNotice : undefined)
    const errorFor = (phase: "send" | "read", undone: boolean): DbError =>
      said !== undefined
        ? DbError.fromServer(said, { phase, retryable: undone })
        : DbError.fromSocket(cause, phase, undefined, undone)
    const unsent = (this.dead = errorFor("send", true))
    const queue = this.queue.slice(this.head)
    this.queue = []
    this.head = 0
    this.stream.destroy()
    this.options.onDeath(this.dead)
    this.answers.die((undone) => errorFor(phase, phase === "send" || undone))
    for (const command of queue) command.settle(unsent, undefined, undefined)
    for (const waiter of this.writeWaiters.splice(0)) waiter()
    this.checkIdle()
  }
}

/** For the simple protocol, which has no parameters: only settings have any, and they are strings of ours. */
const inline = (control: Control): string =>
  control.text.replace(/\$(\d+)/g, (_, n: string) => {
    const value = control.params[Number(n) - 1] ?? ""
    return value.includes("\\") ? ` E'${value.replace(/[\\']/g, "$&$&")}'` : `'${value.replace(/'/g, "''")}'`
  })
