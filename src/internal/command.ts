/**
 * What travels on a connection: a statement on its way, what rides in front of it, and the Sync group they are in.
 */
import type { DbError } from "../DbError.js"
import type { Pipeline } from "./pipeline.js"
import type { Prepared } from "./prepared.js"
import type { Result, Shape } from "./rows.js"
import type { Host, Wire } from "./wire.js"
import { young } from "./young.js"

/** A statement of ours that rides in front of a user's: BEGIN, SAVEPOINT, RELEASE, settings. @internal */
export interface Control {
  readonly text: string
  readonly params: ReadonlyArray<string>
  /** After it nothing else may be sent until it has been answered. */
  readonly opens: boolean
  /** The same text is sent again and again: worth a named statement. */
  readonly named: boolean
  /** What it stands for, where a sandbox plays it. */
  readonly as?: string | undefined
  /** Called with the first row's values when it succeeded, or with nothing when it failed or was skipped. */
  readonly done?: ((ok: boolean, row: ReadonlyArray<unknown> | undefined) => void) | undefined
}

/** Whose statements these are: asked for its prefix at the moment of sending, so that what is never sent has no effect. @internal */
export interface Owner {
  readonly takePrefix: () => ReadonlyArray<Control>
  /** Asked before that where somebody else may have used the connection: why nothing of this one can be sent. */
  readonly vet?: ((wire: Wire) => DbError | undefined) | undefined
}

/** Told what a statement goes out with: for spans and the log of slow ones. @internal */
export interface Watch {
  readonly sent: (prefix: ReadonlyArray<Control>, host: Host) => void
}

/** @internal */
export interface CopyHandler {
  /** COPY ... FROM STDIN has begun: until it is settled, send with `copyData`, end with `copyDone` or `copyFail`. */
  readonly onIn?: ((pipeline: Pipeline, command: Command) => void) | undefined
  /** COPY ... TO STDOUT: called for each chunk. */
  readonly onData?: ((chunk: Buffer, pipeline: Pipeline) => void) | undefined
  /** It is to be cancelled: a server that waits for data, or for its own to be read, hears nothing of that. */
  readonly stop: () => void
}

/** @internal */
export type Done = (error: DbError | undefined, result: Result | undefined, multiple: Array<Result> | undefined) => void

/** @internal */
export const enum State {
  Idle,
  Queued,
  Sent,
  Settled
}

/** One statement on its way. @internal */
export class Command {
  state: number = State.Idle
  /** It was handed to the socket, and may have been run. */
  sent = false
  abandoned = false
  /** The client asked the server to cancel it. */
  canceled = false
  /** The server answered 57014. */
  confirmed = false
  /** It has failed and nothing of its group has happened: it can be sent again. */
  undone = false
  copy: CopyHandler | undefined = undefined
  weigh: ((bytes: number) => void) | undefined = undefined
  /** The same text means something else under another search path: named statements are kept apart by it. */
  scope = ""
  watch: Watch | undefined = undefined
  /** As of a control. */
  as: string | undefined = undefined
  /** The next command belongs to the same group: both happen or neither. */
  more = false
  /** All of its batch, itself included: taken back together. */
  batch: ReadonlyArray<Command> | undefined = undefined

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

  settle(error: DbError | undefined, result: Result | undefined, multiple: Array<Result> | undefined): void {
    if (this.state === State.Settled) return
    this.state = State.Settled
    this.done(error, result, multiple)
  }
}

/** A command or a control in its group, with what has been answered so far. @internal */
export class Step {
  /** The named statement that this step runs. */
  prepared: Prepared | undefined = undefined
  /** The name that this step closed, to make room. */
  closed: string | undefined = undefined
  /** The server has begun with it: before that nothing of it can have happened. */
  bound = false
  shape: Shape | undefined = undefined
  rows: Array<any> = young()
  /** Of the rows, as they came. */
  bytes = 0
  results: Array<Result> | undefined = undefined
  /** What a type parser threw. */
  failure: { readonly cause: unknown } | undefined = undefined
  /** A COPY that nobody has data for, or takes those of: whatever the server says about it, this is what it comes to. */
  copies: "in" | "out" | undefined = undefined

  constructor(
    readonly command: Command | undefined,
    readonly control: Control | undefined
  ) {}
}

/** What one Sync ends. @internal */
export class Group {
  readonly steps = young<Step>()
  /** How many characters of prefix were folded into the text of a simple query. */
  folded = 0
  at = 0
  error: DbError | undefined = undefined
  /** The error is none of its statements' own, and nothing of it has happened. */
  undone = false
  deferred = young<() => void>()

  constructor(
    readonly simple: boolean,
    readonly solo: boolean,
    readonly opens: boolean
  ) {}
}
