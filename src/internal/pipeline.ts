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
import { Backend, cstringEnd, ProtocolViolation, Reader, readServerMessage, Writer } from "./protocol.js"
import type { ServerMessage } from "./protocol.js"
import { makeResult, makeShape, readFields } from "./rows.js"
import type { Result, Shape, TypeParsers } from "./rows.js"

/** A statement of ours that rides in front of a user's: BEGIN, SAVEPOINT, RELEASE, settings. @internal */
export interface Control {
  readonly text: string
  readonly params: ReadonlyArray<string>
  /** After it nothing else may be sent until it has been answered. */
  readonly opens: boolean
  /** The same text is sent again and again: worth a named statement. */
  readonly named: boolean
  /** Called with the first row's values when it succeeded, or with nothing when it failed or was skipped. */
  readonly done?: ((ok: boolean, row: ReadonlyArray<unknown> | undefined) => void) | undefined
}

/** Whose statements these are: asked for its prefix at the moment of sending, so that what is never sent has no effect. @internal */
export interface Owner {
  readonly takePrefix: () => ReadonlyArray<Control>
}

/** @internal */
export interface CopyHandler {
  /** COPY ... FROM STDIN has begun: send with `copyData`, end with `copyDone` or `copyFail`. */
  readonly onIn?: ((pipeline: Pipeline) => void) | undefined
  /** COPY ... TO STDOUT: called for each chunk. */
  readonly onData?: ((chunk: Buffer) => void) | undefined
}

/** @internal */
export type Done = (error: DbError | undefined, result: Result | undefined, multiple: Array<Result> | undefined) => void

const enum State {
  Idle,
  Queued,
  Sent,
  Settled
}

/** One statement on its way. @internal */
export class Command {
  state: number = State.Idle
  abandoned = false
  /** The client asked the server to cancel it. */
  canceled = false
  /** The server answered 57014. */
  confirmed = false
  copy: CopyHandler | undefined = undefined
  /** The same text means something else under another search path: named statements are kept apart by it. */
  scope = ""
  /** The next command belongs to the same group: both happen or neither. */
  more = false

  constructor(
    readonly text: string,
    readonly params: ReadonlyArray<null | string | Buffer>,
    readonly rowMode: "object" | "array",
    /** Its own group: an implicit statement, COMMIT, ROLLBACK. */
    readonly solo: boolean,
    readonly prepare: boolean,
    readonly simple: boolean,
    readonly owner: Owner | undefined,
    readonly done: Done
  ) {}

  get settled(): boolean {
    return this.state === State.Settled
  }

  get sent(): boolean {
    return this.state >= State.Sent
  }
}

interface Prepared {
  readonly name: string
  ready: boolean
  group: Group
  shape: Shape | undefined
  used: number
}

interface Step {
  readonly command: Command | undefined
  readonly control: Control | undefined
  prepared: Prepared | undefined
  shape: Shape | undefined
  rows: Array<any>
  results: Array<Result> | undefined
  failure: unknown
}

interface Group {
  readonly steps: Array<Step>
  /** Prefix statements that were folded into the text of a simple query. */
  folded: number
  readonly simple: boolean
  readonly solo: boolean
  readonly opens: boolean
  at: number
  error: DbError | undefined
  deferred: Array<() => void>
}

const noShape: Shape = { fields: [], object: () => undefined, array: () => undefined }

/** More than these in flight wait on the client: what the server can't take would pile up in the socket. */
const windowSteps = 1000
const windowBytes = 1 << 20

// Tags after which the transaction may be over: believed only with the status that follows.
const endsTransaction = /^(?:COMMIT|ROLLBACK|PREPARE TRANSACTION|BEGIN|START TRANSACTION)/

/** @internal */
export interface PipelineOptions {
  readonly types: TypeParsers
  readonly typesAreDefault: boolean
  readonly pipelining: boolean
  readonly preparedStatements: number
  readonly settleMillis: number
  /** Sends a CancelRequest; calls back when its socket is closed by the server, or with an error. */
  readonly cancel: (done: (error?: Error) => void) => void
  readonly onDeath: (error: DbError) => void
  readonly onNotification?: ((channel: string, payload: string, pid: number) => void) | undefined
  readonly onParameter?: ((name: string, value: string) => void) | undefined
  readonly onTag?: ((tag: string, command: Command) => void) | undefined
}

/** @internal */
export class Pipeline {
  /** What the last ReadyForQuery said: idle, in a transaction, in a failed one. */
  status: "I" | "T" | "E" = "I"
  dead: DbError | undefined = undefined
  /** A cancel was sent that did not end what it was meant for: it may still hit somebody. */
  suspect = false
  lastNotice: ServerMessage | undefined = undefined
  lost: ServerMessage | undefined = undefined
  /** Commands sent, for the counters. */
  statements = 0

  private readonly writer = new Writer()
  private readonly reader: Reader
  private queue: Array<Command> = []
  private head = 0
  private groups: Array<Group> = []
  private inFlight = 0
  private opening = false
  private holds = 0
  private scheduled = false
  private blocked = false
  private cancelTarget: Command | undefined = undefined
  private cancelTimer: NodeJS.Timeout | undefined = undefined
  private readonly prepared = new Map<string, Prepared>()
  private names = 0
  private clock = 0
  private idleWaiters: Array<() => void> = []

  constructor(
    readonly stream: Duplex,
    readonly options: PipelineOptions
  ) {
    this.reader = new Reader(this.onMessage)
  }

  /** Nothing queued and nothing unanswered. */
  get idle(): boolean {
    return this.groups.length === 0 && this.head >= this.queue.length && this.cancelTarget === undefined
  }

  whenIdle(f: () => void): void {
    if (this.idle || this.dead !== undefined) f()
    else this.idleWaiters.push(f)
  }

  readonly onData = (chunk: Buffer): void => {
    if (this.dead !== undefined) return
    try {
      this.reader.push(chunk)
    } catch (cause) {
      return this.die(cause, "read")
    }
    this.afterAnswers()
  }

  readonly onDrain = (): void => {
    this.blocked = false
    this.schedule()
  }

  submit(command: Command): void {
    if (this.dead !== undefined) {
      command.state = State.Settled
      command.done(this.dead, undefined, undefined)
      return
    }
    command.state = State.Queued
    this.queue.push(command)
    this.schedule()
  }

  /**
   * Takes back what has not been sent, cancels what is running, and marks what waits behind others to be
   * cancelled when its turn comes. `true`: the caller should wait until the command has settled.
   */
  interrupt(command: Command): boolean {
    switch (command.state) {
      case State.Idle:
      case State.Settled:
        command.state = State.Settled
        return false
      case State.Queued:
        command.state = State.Settled
        return false
      default: {
        command.abandoned = true
        const group = this.groups[0]
        // The commands of a batch are one: cancelling any of them undoes all.
        const batched = group !== undefined && group.solo && group.steps.some((_) => _.command === command)
        if (!batched && this.running() !== command) return false
        this.cancel(command)
        return true
      }
    }
  }

  private running(): Command | undefined {
    const group = this.groups[0]
    if (group === undefined) return undefined
    // Its prefix counts as the statement: it can wait for a lock as well.
    for (let i = group.at; i < group.steps.length; i++) {
      const command = group.steps[i]!.command
      if (command !== undefined) return command
    }
    return undefined
  }

  private cancel(command: Command): void {
    if (this.cancelTarget !== undefined) return
    this.cancelTarget = command
    command.canceled = true
    // Nothing new is sent while a cancel is on its way: it could hit it.
    this.holds++
    const deadline = Date.now() + this.options.settleMillis
    let pause = 50
    const attempt = (): void => {
      this.options.cancel((error) => {
        if (this.dead !== undefined) return
        if (command.settled) return this.canceled(command)
        if (error !== undefined && Date.now() >= deadline) {
          return this.die(error, "read")
        }
        // It may have arrived before the statement did: ask again until it is answered.
        const wait = Math.max(1, Math.min(pause, deadline - Date.now()))
        pause *= 2
        this.cancelTimer = setTimeout(() => {
          this.cancelTimer = undefined
          if (this.dead !== undefined) return
          if (command.settled) return this.canceled(command)
          if (Date.now() >= deadline) {
            return this.die(new Error("the server did not confirm the cancellation in time"), "read")
          }
          attempt()
        }, wait)
      })
    }
    attempt()
  }

  private canceled(command: Command): void {
    if (this.cancelTarget !== command) return
    this.cancelTarget = undefined
    if (!command.confirmed) this.suspect = true
    this.holds--
    this.schedule()
    this.checkIdle()
  }

  private schedule(): void {
    if (this.scheduled) return
    this.scheduled = true
    // After the microtasks: every fiber that can run has had its turn, and their statements share a write.
    process.nextTick(this.flush)
  }

  /** Nothing of ours is sent until `release` is called. */
  hold(): () => void {
    this.holds++
    let held = true
    return () => {
      if (!held) return
      held = false
      this.holds--
      this.schedule()
    }
  }

  private readonly flush = (): void => {
    this.scheduled = false
    if (this.dead !== undefined || this.holds > 0 || this.opening || this.blocked) return
    const writer = this.writer
    const one = !this.options.pipelining
    let group: Group | undefined = undefined
    let glued = false
    while (this.head < this.queue.length) {
      if (!glued && (this.inFlight >= windowSteps || writer.size >= windowBytes || (one && this.groups.length > 0))) {
        break
      }
      const command: Command = this.queue[this.head]!
      this.head++
      if (command.state !== State.Queued) continue
      const prefix = command.owner === undefined ? [] : command.owner.takePrefix()
      const opens = prefix.some((control) => control.opens)
      if (!glued && (command.simple || command.solo || (one && group !== undefined))) {
        if (group !== undefined) writer.sync()
        group = undefined
      } else if (group !== undefined && !glued) {
        // The answers before are awaited by somebody: they must not wait for this one.
        writer.flush()
      }
      if (group === undefined) {
        group = {
          steps: [],
          folded: 0,
          simple: command.simple,
          solo: command.solo,
          opens,
          at: 0,
          error: undefined,
          deferred: []
        }
        this.groups.push(group)
      }
      command.state = State.Sent
      this.statements++
      if (command.simple) {
        this.writeSimple(group, command, prefix)
        group = undefined
      } else {
        for (const control of prefix) {
          this.writeExtended(group, control.text, control.params, control.named, undefined, control)
        }
        this.writeExtended(group, command.text, command.params, command.prepare, command, undefined)
        glued = command.more
        if (command.solo && !glued) {
          writer.sync()
          group = undefined
        }
      }
      if (opens) {
        this.opening = true
        if (group === undefined) break
      }
    }
    if (group !== undefined) writer.sync()
    if (this.head >= this.queue.length) {
      this.queue.length = 0
      this.head = 0
    } else if (this.head > 1024) {
      this.queue = this.queue.slice(this.head)
      this.head = 0
    }
    if (writer.size > 0) this.write()
    this.checkIdle()
  }

  private write(): void {
    if (!this.stream.write(this.writer.take())) this.blocked = true
  }

  private step(group: Group, command: Command | undefined, control: Control | undefined): Step {
    const step: Step = {
      command,
      control,
      prepared: undefined,
      shape: undefined,
      rows: [],
      results: undefined,
      failure: undefined
    }
    group.steps.push(step)
    this.inFlight++
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
    const key = command === undefined || command.scope === "" ? text : `${command.scope}\0${text}`
    let known = named && this.options.preparedStatements > 0 ? this.prepared.get(key) : undefined
    if (known !== undefined && (known.ready || known.group === group)) {
      known.used = ++this.clock
      writer.bind(known.name, params)
      step.shape = known.shape
      if (known.shape === undefined) {
        step.prepared = known
        writer.describePortal()
      }
    } else if (known === undefined && named && this.options.preparedStatements > 0) {
      if (this.prepared.size >= this.options.preparedStatements) this.evict()
      known = { name: `edb${++this.names}`, ready: false, group, shape: undefined, used: ++this.clock }
      this.prepared.set(key, known)
      step.prepared = known
      writer.parse(known.name, text).bind(known.name, params).describePortal()
    } else {
      // Its Parse is in flight in another group and may fail there: not yet a name to rely on.
      writer.parse("", text).bind("", params).describePortal()
    }
    writer.execute()
  }

  private evict(): void {
    let oldest: string | undefined = undefined
    let used = Infinity
    for (const [text, prepared] of this.prepared) {
      if (prepared.used < used) {
        used = prepared.used
        oldest = text
      }
    }
    if (oldest === undefined) return
    this.writer.closeStatement(this.prepared.get(oldest)!.name)
    this.prepared.delete(oldest)
  }

  private forget(prepared: Prepared): void {
    for (const [text, candidate] of this.prepared) {
      if (candidate === prepared) {
        this.prepared.delete(text)
        return
      }
    }
  }

  /** The server's statements are gone (DISCARD ALL, another server behind a pooler): parse them again. */
  forgetAll(): void {
    this.prepared.clear()
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

  private readonly onMessage = (type: number, buffer: Buffer, start: number, end: number): void => {
    const group = this.groups[0]
    const step = group === undefined ? undefined : group.steps[group.at]
    switch (type) {
      case Backend.DataRow: {
        const shape = step?.shape
        if (step === undefined || shape === undefined) throw new ProtocolViolation("a row that nobody asked for")
        if (step.failure !== undefined) return
        try {
          const row =
            step.command !== undefined && step.command.rowMode === "object"
              ? shape.object(buffer, start, end)
              : shape.array(buffer, start, end)
          step.rows.push(row)
        } catch (cause) {
          if (cause instanceof ProtocolViolation) throw cause
          step.failure = cause
        }
        return
      }
      case Backend.BindComplete:
      case Backend.CloseComplete:
        return
      case Backend.ParseComplete: {
        if (step?.prepared !== undefined) step.prepared.ready = true
        return
      }
      case Backend.RowDescription: {
        if (step === undefined) throw new ProtocolViolation("a row description that nobody asked for")
        step.shape = makeShape(readFields(buffer, start, end), this.options.types, this.options.typesAreDefault)
        if (step.prepared !== undefined) step.prepared.shape = step.shape
        return
      }
      case Backend.NoData: {
        if (step === undefined) throw new ProtocolViolation("an answer that nobody asked for")
        step.shape = noShape
        if (step.prepared !== undefined) step.prepared.shape = noShape
        return
      }
      case Backend.CommandComplete: {
        const tag = buffer.toString("latin1", start, cstringEnd(buffer, start, end))
        return this.complete(group, step, tag)
      }
      case Backend.EmptyQuery:
      case Backend.PortalSuspended:
        return this.complete(group, step, "")
      case Backend.ReadyForQuery: {
        const status = String.fromCharCode(buffer[start]!)
        if (group === undefined || (status !== "I" && status !== "T" && status !== "E")) {
          throw new ProtocolViolation("ReadyForQuery out of turn")
        }
        return this.ready(group, status)
      }
      case Backend.Error:
        return this.failed(group, step, readServerMessage(buffer, start, end))
      case Backend.Notice:
        // Only the last: a loop that raises notices must not fill the memory.
        this.lastNotice = readServerMessage(buffer, start, end)
        return
      case Backend.ParameterStatus: {
        const stop = cstringEnd(buffer, start, end)
        const name = buffer.toString("utf8", start, stop)
        const value = buffer.toString("utf8", stop + 1, cstringEnd(buffer, stop + 1, end))
        this.options.onParameter?.(name, value)
        return
      }
      case Backend.Notification: {
        const pid = buffer.readInt32BE(start)
        const stop = cstringEnd(buffer, start + 4, end)
        const channel = buffer.toString("utf8", start + 4, stop)
        const payload = buffer.toString("utf8", stop + 1, cstringEnd(buffer, stop + 1, end))
        this.options.onNotification?.(channel, payload, pid)
        return
      }
      case Backend.CopyInResponse: {
        const onIn = step?.command?.copy?.onIn
        if (onIn !== undefined) return onIn(this)
        this.writer.copyFail("COPY FROM STDIN needs DbQuery.copyFrom")
        // The Sync that was already sent was swallowed by the copy mode.
        if (group !== undefined && !group.simple) this.writer.sync()
        return this.write()
      }
      case Backend.CopyOutResponse:
      case Backend.CopyDone:
        return
      case Backend.CopyData: {
        step?.command?.copy?.onData?.(Buffer.from(buffer.subarray(start, end)))
        return
      }
      default:
        throw new ProtocolViolation(`unexpected message 0x${type.toString(16)}`)
    }
  }

  private complete(group: Group | undefined, step: Step | undefined, tag: string): void {
    if (group === undefined || step === undefined) throw new ProtocolViolation("an answer that nobody asked for")
    const command = step.command
    if (command === undefined) {
      const control = step.control!
      this.advance(group)
      if (control.opens) this.opening = false
      control.done?.(true, step.rows[0])
      return
    }
    this.options.onTag?.(tag, command)
    const result = makeResult(tag, step.rows, step.shape?.fields ?? [])
    if (group.simple) {
      // There may be more statements in the text: ReadyForQuery ends it.
      ;(step.results ??= []).push(result)
      step.rows = []
      step.shape = undefined
      return
    }
    this.advance(group)
    const settle = () => this.settle(command, this.parseFailure(step), result, undefined)
    if (group.solo || endsTransaction.test(tag)) group.deferred.push(settle)
    else settle()
  }

  private parseFailure(step: Step): DbError | undefined {
    return step.failure === undefined
      ? undefined
      : DbError.make("UnknownError", {
          message: "A type parser threw while it read a value of the result. The statement itself was executed.",
          hint: "Check the `types` option: a parser gets the text of the value and must not throw.",
          cause: step.failure
        })
  }

  private advance(group: Group): void {
    group.at++
    this.inFlight--
  }

  private settle(
    command: Command,
    error: DbError | undefined,
    result: Result | undefined,
    multiple: Array<Result> | undefined
  ): void {
    if (command.state === State.Settled) return
    command.state = State.Settled
    command.done(error, result, multiple)
  }

  private ready(group: Group, status: "I" | "T" | "E"): void {
    this.groups.shift()
    this.status = status
    if (group.opens) this.opening = false
    const step = group.steps[group.at]
    if (step !== undefined && group.error === undefined) {
      if (!group.simple || step.command === undefined) throw new ProtocolViolation("ReadyForQuery before the answer")
      const results = step.results ?? []
      this.advance(group)
      this.settle(
        step.command,
        this.parseFailure(step),
        results[results.length - 1] ?? makeResult("", [], []),
        results.length > 1 ? results : undefined
      )
    }
    for (const settle of group.deferred) settle()
    if (group.error !== undefined) {
      // What follows an error up to the Sync was not run.
      for (let i = group.at; i < group.steps.length; i++) {
        const skipped = group.steps[i]!
        this.inFlight--
        skipped.control?.done?.(false, undefined)
        if (skipped.prepared !== undefined && !skipped.prepared.ready) this.forget(skipped.prepared)
        if (skipped.command !== undefined) {
          this.settle(
            skipped.command,
            i === group.at ? group.error : DbError.skipped(group.error),
            undefined,
            undefined
          )
        }
      }
    }
  }

  private failed(group: Group | undefined, step: Step | undefined, message: ServerMessage): void {
    const fatal = message.severity === "FATAL" || message.severity === "PANIC"
    if (fatal) this.lost = message
    if (group === undefined || step === undefined) {
      // Between statements only the end of the connection is announced; its close follows. An error after
      // the last answer of a group belongs to its Sync: a deferred constraint of an implicit transaction.
      if (group !== undefined && !fatal) this.failAtSync(group, message)
      return
    }
    const command = step.command
    const canceled = command?.canceled === true || group.steps.some((_) => _.command?.canceled === true)
    if (command?.canceled === true && message.code === "57014") command.confirmed = true
    if (message.code === "26000" || message.code === "0A000") this.forgetAll()
    group.error = DbError.fromServer(message, {
      statement: command?.text ?? step.control?.text,
      canceledByUs: canceled,
      offset: group.folded
    })
    // A failed prefix fails the statement that it carries: the error is that statement's.
    if (command === undefined) {
      step.control!.done?.(false, undefined)
      if (step.prepared !== undefined && !step.prepared.ready) this.forget(step.prepared)
      this.advance(group)
      while (group.at < group.steps.length && group.steps[group.at]!.command === undefined) {
        group.steps[group.at]!.control!.done?.(false, undefined)
        this.advance(group)
      }
    }
  }

  private failAtSync(group: Group, message: ServerMessage): void {
    const last = group.steps[group.steps.length - 1]?.command
    const error = DbError.fromServer(message, {
      statement: last?.text,
      canceledByUs: last?.canceled === true,
      offset: 0
    })
    group.deferred = []
    for (const step of group.steps) {
      if (step.command !== undefined) this.settle(step.command, error, undefined, undefined)
    }
  }

  private afterAnswers(): void {
    const target = this.cancelTarget
    if (target !== undefined && target.settled && this.cancelTimer !== undefined) {
      clearTimeout(this.cancelTimer)
      this.cancelTimer = undefined
      this.canceled(target)
    }
    const running = this.running()
    if (running !== undefined && running.abandoned && running.state === State.Sent) this.cancel(running)
    if (this.head < this.queue.length) this.schedule()
    this.checkIdle()
  }

  private checkIdle(): void {
    if (this.idleWaiters.length === 0 || !this.idle) return
    const waiters = this.idleWaiters
    this.idleWaiters = []
    for (const waiter of waiters) waiter()
  }

  /** The connection is lost, or can't be trusted: everything on it fails, what was sent as `read`. */
  die(cause: unknown, phase: "send" | "read"): void {
    if (this.dead !== undefined) return
    if (this.cancelTimer !== undefined) clearTimeout(this.cancelTimer)
    this.cancelTarget = undefined
    const said = this.lost ?? (this.lastNotice?.code?.startsWith("57P") === true ? this.lastNotice : undefined)
    const errorFor = (phase: "send" | "read"): DbError =>
      said !== undefined
        ? DbError.fromServer(said, { phase, retryable: phase === "send" })
        : DbError.fromSocket(cause, phase, undefined, phase === "send")
    const unsent = (this.dead = errorFor("send"))
    const sent = errorFor(phase)
    const groups = this.groups
    const queue = this.queue.slice(this.head)
    this.groups = []
    this.queue = []
    this.head = 0
    this.stream.destroy()
    this.options.onDeath(this.dead)
    for (const group of groups) {
      for (let i = 0; i < group.steps.length; i++) {
        const step = group.steps[i]!
        if (i >= group.at) step.control?.done?.(false, undefined)
        if (step.command !== undefined) this.settle(step.command, group.error ?? sent, undefined, undefined)
      }
    }
    for (const command of queue) this.settle(command, unsent, undefined, undefined)
    this.checkIdle()
  }
}

/** For the simple protocol, which has no parameters: only settings have any, and they are strings of ours. */
const inline = (control: Control): string =>
  control.text.replace(/\$(\d+)/g, (_, n: string) => {
    const value = control.params[Number(n) - 1] ?? ""
    return value.includes("\\") ? ` E'${value.replace(/[\\']/g, "$&$&")}'` : `'${value.replace(/'/g, "''")}'`
  })
