/**
 * The receiving half of a pipeline: which answer belongs to which statement is told by counting, up to the
 * ReadyForQuery of each group.
 */
import { DbError } from "../DbError.js"
import type { Command, Group, Step } from "./command.js"
import { copyRefused } from "./input.js"
import type { PreparedStatements } from "./prepared.js"
import { Backend, cstringEnd, endsAt, lastString, ProtocolViolation, readServerMessage } from "./protocol.js"
import type { ServerMessage } from "./protocol.js"
import { makeResult, makeShape, noShape, readFields } from "./rows.js"
import type { Result, TypeParsers } from "./rows.js"
import { leavesByText } from "./remains.js"
import { isStalePlan, isStatementTimeout } from "./sqlState.js"
import { withoutLiterals } from "./sqlText.js"

/** What happens besides the answers to statements. @internal */
export interface AnswersOptions {
  readonly types: TypeParsers
  readonly typesAreDefault: boolean
  /** The target is to be writable: 25006 says that this host no longer is. */
  readonly readWriteTarget: boolean
  readonly onNotification?: ((channel: string, payload: string, pid: number) => void) | undefined
  readonly onParameter?: ((name: string, value: string) => void) | undefined
  readonly onTag?: ((tag: string, command: Command) => void) | undefined
  /** A statement that has failed after it had begun. */
  readonly onHalf?: ((command: Command) => void) | undefined
  /** Every ErrorResponse. `harmless`: whatever its code, the connection is as it was. */
  readonly onServerError?: ((message: ServerMessage, harmless: boolean) => void) | undefined
}

/** What the receiving half asks of the sending one. @internal */
export interface Sender {
  readonly copyIn: (group: Group, step: Step) => void
  readonly copyOut: (command: Command | undefined, chunk: Buffer) => void
  /** Whether 57014 may have been meant for somebody else, by a cancel that has hit nobody yet: it hits once. */
  readonly takeStray: () => boolean
}

// Tags after which the transaction may be over: believed only with the status that follows.
const endsTransaction = /^(?:COMMIT|ROLLBACK|PREPARE TRANSACTION|BEGIN|START TRANSACTION)/

// Statements that have done nothing when they were cancelled: not CALL and DO, which commit on their way.
const repeatable = /^\s*(?:select|insert|update|delete|with|values|merge|table|show)\b/i

/** @internal */
export class Answers {
  /** What the last ReadyForQuery said: idle, in a transaction, in a failed one. */
  status: "I" | "T" | "E" = "I"
  groups: Array<Group> = []
  inFlight = 0
  /** BEGIN is unanswered: whatever came after it could run without it. */
  opening = false
  /** Only the last: a loop that raises notices must not fill the memory. */
  lastNotice: ServerMessage | undefined = undefined
  /** Why the server has ended the connection. */
  lost: ServerMessage | undefined = undefined

  constructor(
    private readonly options: AnswersOptions,
    private readonly prepared: PreparedStatements,
    private readonly sender: Sender
  ) {}

  /** The command that the server is working on, if nobody wants it any more. */
  abandoned(): Command | undefined {
    const group = this.groups[0]
    if (group === undefined) return undefined
    // The commands of a batch are one: cancelling any of them undoes all.
    for (let i = group.solo ? 0 : group.at; i < group.steps.length; i++) {
      const command = group.steps[i]!.command
      if (command === undefined) continue
      if (command.abandoned && !command.settled) return command
      // Its prefix counts as the statement: it can wait for a lock as well.
      if (!group.solo) return undefined
    }
    return undefined
  }

  readonly onMessage = (type: number, buffer: Buffer, start: number, end: number): void => {
    const group = this.groups[0]
    const step = group === undefined ? undefined : group.steps[group.at]
    switch (type) {
      case Backend.DataRow:
        return this.row(step, buffer, start, end)
      case Backend.BindComplete:
        if (step !== undefined) step.bound = true
        return endsAt(start, end)
      case Backend.CloseComplete:
        return endsAt(start, end)
      case Backend.ParseComplete: {
        endsAt(start, end)
        if (step?.prepared !== undefined) step.prepared.parsing = undefined
        return
      }
      case Backend.RowDescription:
        return this.describe(step, buffer, start, end)
      case Backend.NoData: {
        endsAt(start, end)
        if (step === undefined || step.shape !== undefined) {
          throw new ProtocolViolation("an answer that nobody asked for")
        }
        step.shape = noShape
        if (step.prepared !== undefined) step.prepared.shape = noShape
        return
      }
      case Backend.CommandComplete:
        return this.complete(group, step, lastString(buffer, start, end))
      case Backend.EmptyQuery:
      case Backend.PortalSuspended:
        endsAt(start, end)
        return this.complete(group, step, "")
      case Backend.ReadyForQuery: {
        const status = end === start + 1 ? String.fromCharCode(buffer[start]!) : ""
        if (group === undefined || (status !== "I" && status !== "T" && status !== "E")) {
          throw new ProtocolViolation("ReadyForQuery out of turn")
        }
        return this.ready(group, status)
      }
      case Backend.Error:
        return this.failed(group, step, readServerMessage(buffer, start, end))
      case Backend.Notice:
        this.lastNotice = readServerMessage(buffer, start, end)
        return
      case Backend.ParameterStatus: {
        const stop = cstringEnd(buffer, start, end)
        const name = buffer.toString("utf8", start, stop)
        const value = lastString(buffer, stop + 1, end)
        this.options.onParameter?.(name, value)
        return
      }
      case Backend.Notification: {
        if (end - start < 4) throw new ProtocolViolation("NotificationResponse is cut short")
        const pid = buffer.readInt32BE(start)
        const stop = cstringEnd(buffer, start + 4, end)
        const channel = buffer.toString("utf8", start + 4, stop)
        const payload = lastString(buffer, stop + 1, end)
        this.options.onNotification?.(channel, payload, pid)
        return
      }
      case Backend.CopyInResponse:
        if (step?.command === undefined) throw new ProtocolViolation("a COPY that nobody asked for")
        return this.sender.copyIn(group!, step)
      case Backend.CopyOutResponse:
        if (step !== undefined && step.command?.copy?.onData === undefined) step.copies = "out"
        return
      case Backend.CopyDone:
        return endsAt(start, end)
      case Backend.CopyData: {
        this.sender.copyOut(step?.command, Buffer.from(buffer.subarray(start, end)))
        return
      }
      default:
        throw new ProtocolViolation(`unexpected message 0x${type.toString(16)}`)
    }
  }

  private row(step: Step | undefined, buffer: Buffer, start: number, end: number): void {
    const shape = step?.shape
    if (step === undefined || shape === undefined) throw new ProtocolViolation("a row that nobody asked for")
    if (step.failure !== undefined) return
    step.bytes += end - start
    try {
      const asObject = step.command !== undefined && step.command.rowMode === "object"
      step.rows.push(asObject ? shape.object(buffer, start, end) : shape.array(buffer, start, end))
    } catch (cause) {
      if (cause instanceof ProtocolViolation) throw cause
      // What the user's parser throws fails the statement, not the connection.
      step.failure = { cause }
    }
  }

  private describe(step: Step | undefined, buffer: Buffer, start: number, end: number): void {
    if (step === undefined || step.shape !== undefined) {
      throw new ProtocolViolation("a row description that nobody asked for")
    }
    const fields = readFields(buffer, start, end)
    try {
      step.shape = makeShape(fields, this.options.types, this.options.typesAreDefault)
      if (step.prepared !== undefined) step.prepared.shape = step.shape
    } catch (cause) {
      step.shape = noShape
      step.failure = { cause }
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
    command.weigh?.(step.bytes)
    const result = makeResult(tag, step.rows, step.shape?.fields ?? [])
    if (miscounts(step, result)) throw new ProtocolViolation("the rows and their count disagree")
    if (group.simple) {
      // There may be more statements in the text: ReadyForQuery ends it.
      ;(step.results ??= []).push(result)
      step.rows = []
      step.shape = undefined
      return
    }
    this.advance(group)
    const settle = () => command.settle(failureOf(step), result, undefined)
    // An implicit transaction commits at the Sync, and can fail there.
    if (group.solo || endsTransaction.test(tag)) group.deferred.push(settle)
    else settle()
  }

  private advance(group: Group): void {
    group.at++
    this.inFlight--
  }

  private ready(group: Group, status: "I" | "T" | "E"): void {
    const step = group.steps[group.at]
    const early = step !== undefined && group.error === undefined
    // Before the group is taken off: what it has not been told fails with the connection.
    if (early && (!group.simple || step.command === undefined)) {
      throw new ProtocolViolation("ReadyForQuery before the answer")
    }
    this.groups.shift()
    this.status = status
    if (group.opens) this.opening = false
    if (early && step.command !== undefined) {
      const results = step.results ?? []
      this.advance(group)
      step.command.settle(
        failureOf(step),
        results[results.length - 1] ?? makeResult("", [], []),
        results.length > 1 ? results : undefined
      )
    }
    if (group.undone && status === "I") {
      for (const { command } of group.steps) if (command !== undefined) command.undone = true
    }
    for (const settle of group.deferred) settle()
    if (group.error !== undefined) this.skip(group, group.error)
  }

  /** What follows an error up to the Sync was not run. */
  private skip(group: Group, error: DbError): void {
    for (let i = group.at; i < group.steps.length; i++) {
      const step = group.steps[i]!
      this.inFlight--
      step.control?.done?.(false, undefined)
      this.unprepare(step, i > group.at)
      step.command?.settle(i === group.at ? error : DbError.skipped(error), undefined, undefined)
    }
  }

  private unprepare(step: Step, skipped: boolean): void {
    if (step.prepared?.parsing !== undefined) this.prepared.forget(step.prepared)
    if (skipped && step.closed !== undefined) this.prepared.closeLater(step.closed)
  }

  private failed(group: Group | undefined, step: Step | undefined, message: ServerMessage): void {
    const fatal = message.severity === "FATAL" || message.severity === "PANIC"
    if (fatal) this.lost = message
    const gone = message.code === "26000"
    const named = gone || isStalePlan(message)
    // Of a name of ours the server speaks when it is bound; later, of one that the text has used.
    const ours = named && step?.prepared !== undefined && !step.bound
    const theirs = named && (step?.bound === true || group?.simple === true)
    // It was waiting for data, and got something else: whatever it calls that.
    const noData = !fatal && step?.copies === "in"
    // Outside a transaction nothing is lost with the old plan: it is made again. Inside, the block has failed.
    const healed = ours && group !== undefined && this.status === "I" && isUndone(group, group.at)
    this.options.onServerError?.(message, healed || theirs || noData)
    if (group === undefined || step === undefined) {
      // Between statements only the end of the connection is announced; its close follows. An error after
      // the last answer of a group belongs to its Sync: a deferred constraint of an implicit transaction.
      if (group !== undefined && !fatal) this.failAtSync(group, message)
      return
    }
    // Its end may be announced after the error of a statement, which says more about that statement.
    if (group.error !== undefined && !group.undone) return
    const command = step.command
    const hit = message.code === "57014" && !noData && !isStatementTimeout(message)
    let canceled = false
    for (const { command } of group.steps) {
      if (command === undefined || !command.canceled) continue
      canceled = true
      if (hit) command.confirmed = true
    }
    if (ours && gone) this.prepared.forgetAll()
    else if (ours) this.prepared.drop(step.prepared!)
    const stray = hit && !canceled && this.sender.takeStray()
    group.undone = healed || (stray && isUndone(group, group.at + 1))
    if (command !== undefined && (step.bound || group.simple)) this.options.onHalf?.(command)
    group.error = noData
      ? copyRefused("in")
      : DbError.fromServer(message, {
          statement: command?.text ?? step.control?.text,
          names: step.control?.params,
          canceledByUs: canceled,
          targetReadWrite: this.options.readWriteTarget,
          retryable: isLostWhole(group) ? true : undefined,
          offset: group.folded
        })
    if (command !== undefined) return
    // A failed prefix fails the statement that it carries: the error is that statement's.
    step.control!.done?.(false, undefined)
    this.unprepare(step, false)
    this.advance(group)
    while (group.at < group.steps.length && group.steps[group.at]!.command === undefined) {
      const next = group.steps[group.at]!
      next.control!.done?.(false, undefined)
      this.unprepare(next, true)
      this.advance(group)
    }
  }

  private failAtSync(group: Group, message: ServerMessage): void {
    const last = group.steps[group.steps.length - 1]?.command
    const error = DbError.fromServer(message, {
      statement: last?.text,
      canceledByUs: last?.canceled === true,
      targetReadWrite: this.options.readWriteTarget,
      offset: 0
    })
    group.deferred = []
    for (const step of group.steps) step.command?.settle(error, undefined, undefined)
  }

  /** The connection is lost: what was sent fails with what the server said about it, else with this. */
  die(lost: (undone: boolean) => DbError): void {
    const groups = this.groups
    this.groups = []
    for (const group of groups) {
      const sent = lost(isLostWhole(group))
      for (let i = 0; i < group.steps.length; i++) {
        const step = group.steps[i]!
        if (i >= group.at) step.control?.done?.(false, undefined)
        step.command?.settle(group.undone ? sent : (group.error ?? sent), undefined, undefined)
      }
    }
  }
}

/** A row that was lost or came twice. Rules may make the counts of other commands differ from their rows. */
const miscounts = (step: Step, { command, rowCount, rows }: Result): boolean =>
  rowCount !== rows.length &&
  (command === "SELECT" || command === "FETCH") &&
  step.shape !== undefined &&
  step.shape !== noShape &&
  step.failure === undefined

const commits = /(?:^|;)\s*(?:commit|end|prepare\s*transaction)\b/i

/** All of it was in a transaction that is not being committed: with the connection it is gone. */
const isLostWhole = (group: Group): boolean =>
  !group.solo &&
  !group.simple &&
  !group.steps.some(({ command }) => command !== undefined && commits.test(withoutLiterals(command.text)))

/** Whether its first steps, which may have run, are undone with the group: a lock of the session would stay. */
const isUndone = (group: Group, steps: number): boolean =>
  group.solo &&
  !group.simple &&
  group.steps
    .slice(0, steps)
    .every(({ command }) => command === undefined || (repeatable.test(command.text) && !leavesByText(command.text)))

const failureOf = (step: Step): DbError | undefined =>
  step.failure === undefined
    ? step.copies && copyRefused(step.copies)
    : DbError.make("UnknownError", {
        message: "A type parser threw while it read a value of the result. The statement itself was executed.",
        hint: "Check the `types` option: a parser gets the text of the value and must not throw.",
        cause: step.failure.cause
      })
