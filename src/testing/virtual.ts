/**
 * Many connections played on one: each virtual connection's transaction is a savepoint of the real one, so that
 * whatever a program commits, rolls back or closes stays inside a transaction that is rolled back at the end.
 */
import { DbError } from "../DbError.js"
import { Command } from "../internal/command.js"
import type { Control, Owner } from "../internal/command.js"
import { setConfig } from "../internal/controls.js"
import { quoteIdentifier } from "../internal/input.js"
import { modes } from "../internal/transactionSql.js"
import type { Wire } from "../internal/wire.js"
import { endOf, refusal } from "./endings.js"
import type { End } from "./endings.js"
import { follow, localSettings, rollsBackTo } from "./texts.js"
import type { Sandbox } from "./turns.js"

const queued = 1
const settled = 3

let savepoints = 0

const rawRefused = (): DbError =>
  DbError.make("InvalidInput", {
    message: "The pg client of a connection was asked for in a sandbox, whose connections are all one",
    hint: "A test of what uses connection.raw needs a database of its own: DbTest.database."
  })

const noResult = (command: string) => ({ command, rowCount: null, oid: 0, rows: [], fields: [] })

/** In a session BEGIN is only a warning of the server's. */
const isRefused = ({ solo, text }: Command): boolean => {
  const end = endOf(text)
  return end !== undefined && (end !== "BEGIN" || solo)
}

const aborted = (statement: string): DbError =>
  DbError.fromServer(
    {
      severity: "ERROR",
      code: "25P02",
      message: "current transaction is aborted, commands ignored until end of transaction block"
    },
    { statement }
  )

/** What its owner asks a command about while a clone of it is on its way. */
const mirrored = ["sent", "abandoned", "canceled", "confirmed"] as const

/** What the engine takes for a raw connection. */
export class VirtualWire {
  doomed: string | undefined = undefined
  dirty = false
  lastUsed = Date.now()
  readonly listeners: Wire["listeners"]
  /** Nobody has it any more: what it has open is undone when it is the innermost again. */
  forsaken = false
  /** What the settings were that its transaction has changed: a released savepoint keeps them. */
  readonly before = new Map<string, string>()
  /** Of the transaction that it is in. */
  private savepoint: string | undefined = undefined
  /** It is of one statement, or of one batch: the next ones have their own. */
  alone = false
  /** It was sent. */
  private begun = false
  /** Those that are there on the server, its own and then the program's. */
  private readonly savepoints: Array<string> = []
  /** Others go on: on the server it is undone up to its innermost savepoint, and here it is refused what comes. */
  private failed = false
  private lost: DbError | undefined = undefined
  private readonly clones = new Map<Command, Command>()
  private readonly leavers = new WeakMap<Command, () => void>()
  private outstanding = 0
  private idleWaiters: Array<() => void> = []

  constructor(
    readonly sandbox: Sandbox,
    readonly name: string
  ) {
    this.listeners = sandbox.listeners
  }

  get needsLoop(): boolean {
    return this.sandbox.real.needsLoop
  }

  get pid(): number {
    return this.sandbox.real.pid
  }

  get pipeline(): { readonly dead: DbError | undefined; readonly suspect: boolean } {
    return { dead: this.lost ?? this.sandbox.dead, suspect: false }
  }

  get dead(): boolean {
    return this.pipeline.dead !== undefined
  }

  /** The statements of its transaction come behind each other, and nobody else's in between. */
  get open(): boolean {
    return this.savepoint !== undefined
  }

  /** Nothing of its transaction is left on the server, and its owner has not ended it. */
  get undone(): boolean {
    return this.failed && this.savepoints.length === 0
  }

  get status(): "I" | "T" | "E" {
    const { sandbox } = this
    return !this.open ? "I" : this.failed ? "E" : sandbox.innermost === this ? sandbox.real.status : "T"
  }

  get idle(): boolean {
    return this.outstanding === 0
  }

  whenIdle(f: () => void): void {
    if (this.idle) f()
    else this.idleWaiters.push(f)
  }

  /** Of what waits for others the time is up. What is on the server, and not answered there, ends the sandbox. */
  destroy(cause: unknown): void {
    if (this.dead) return
    const busy = this.sandbox.busy(this)
    this.sandbox.release(busy, this)
    if (this.idle) this.lost = busy
    else this.sandbox.real.destroy(cause)
    this.forsake()
  }

  forsake(): void {
    if (this.undone) this.close()
    this.forsaken = this.open
    this.sandbox.pump()
  }

  undoForsaken(): void {
    this.undo("ROLLBACK", () => {})
  }

  /** Its transaction has failed, and another one is to be opened, which the server would refuse. */
  setAside(): void {
    this.failed = true
    if (this.savepoints.length > 1) {
      const inner = this.savepoints[this.savepoints.length - 1]!
      return this.sandbox.must(`ROLLBACK TO SAVEPOINT ${quoteIdentifier(inner)}`, "", () => {})
    }
    // All of it is lost. What others commit from now on does not have to go with it.
    this.savepoints.length = 0
    this.sandbox.leave(this)
    this.sandbox.must(this.undoing, "", () => {})
  }

  /** The sandbox ends: what is on its way is cancelled. */
  cut(error: DbError): void {
    const open = [...this.clones.keys()].filter((_) => !_.settled)
    for (const command of open) this.interrupt(command)
    for (const command of open) if (command.settled) command.done(error, undefined, undefined)
  }

  /** Handed out, the client would take the socket of the whole sandbox along. */
  toForeign(_vet: unknown, done: (refused: DbError) => void): void {
    done(rawRefused())
  }

  submit(command: Command): void {
    this.outstanding++
    command.state = queued
    // A batch goes on with its last one.
    if (command.more) return
    const commands = command.batch ?? [command]
    const refuse = (error: DbError) => {
      for (const one of commands) this.finish(one, error, "")
    }
    const { dead } = this.pipeline
    if (dead !== undefined) return refuse(dead)
    const end = commands.length === 1 && command.solo ? endOf(command.text) : undefined
    const plays = end === "refused" ? undefined : end
    if (plays === undefined && commands.some(isRefused)) return refuse(refusal())
    const recovers = this.failed && !this.undone && rollsBackTo(command.text)
    if (recovers) {
      this.failed = false
    } else if (this.failed && (plays === undefined || plays === "BEGIN")) {
      for (const one of commands) one.sent = true
      return refuse(aborted(command.text))
    }
    const never = () => {
      if (recovers) this.failed = true
    }
    const leave = this.sandbox.enter({
      wire: this,
      go: (opens) => this.go(command, commands, opens, plays),
      refuse: (error) => {
        never()
        refuse(error)
      },
      stop: () => {}
    })
    // Of a batch any may be the first that is taken back.
    for (const one of commands) {
      this.leavers.set(one, () => {
        never()
        leave()
      })
    }
  }

  private go(command: Command, commands: ReadonlyArray<Command>, opens: boolean, plays: End | undefined): void {
    if (opens) this.savepoint = `effect_db_sandbox_${++savepoints}`
    if (plays === undefined) return opens && command.solo ? this.implicitly(commands) : this.inside(commands)
    if (plays === "BEGIN" && !this.begun) return this.begin(command)
    if (plays !== "BEGIN" && this.begun) {
      return plays === "COMMIT" && !this.failed ? this.commit(command) : this.rollback(command)
    }
    // There is nothing to end, or it has begun already: a warning of the server's.
    if (opens) this.close()
    this.finish(command, undefined, plays)
  }

  interrupt(command: Command): boolean {
    if (command.settled) return false
    const commands = command.batch ?? [command]
    const clone = this.clones.get(command)
    if (clone === undefined) {
      this.leavers.get(command)?.()
      for (const one of commands) this.withdraw(one)
      return false
    }
    // Answered, and its savepoint is being ended: what has come of it is known in a moment.
    if (clone.settled) return true
    if (this.sandbox.real.interrupt(clone)) return true
    // Taken back before it was sent, and with it the savepoint that it would have brought along.
    if (clone.settled) {
      for (const one of commands) this.withdraw(one)
      if (!this.begun && (this.alone || this.idle)) this.close()
      for (const _ of commands) this.sandbox.end()
    }
    return false
  }

  private withdraw(command: Command): void {
    command.state = settled
    this.over(command)
  }

  private over(command: Command): void {
    this.clones.delete(command)
    this.outstanding--
    if (this.outstanding === 0) for (const waiter of this.idleWaiters.splice(0)) waiter()
  }

  private finish(command: Command, error: DbError | undefined, tag: string): void {
    if (command.settled) return
    command.state = settled
    this.over(command)
    command.done(error, error === undefined ? noResult(tag) : undefined, undefined)
  }

  private close(): void {
    this.savepoint = undefined
    this.alone = false
    this.begun = false
    this.failed = false
    this.forsaken = false
    this.savepoints.length = 0
    this.before.clear()
    this.sandbox.leave(this)
  }

  private begin(command: Command): void {
    this.begun = true
    this.sandbox.controls(this.opening("BEGIN"), (error) => {
      const done = () => this.finish(command, error, "BEGIN")
      if (error === undefined) done()
      else this.undo("", done)
    })
  }

  /** Deferred constraints are checked at COMMIT: in a savepoint of their own, which takes the mode back again. */
  private keep(as: string, done: (error: DbError | undefined) => void): void {
    const check = `${this.savepoint}_check`
    const text = `SAVEPOINT ${check};SET CONSTRAINTS ALL IMMEDIATE;ROLLBACK TO SAVEPOINT ${check};${this.release()}`
    this.sandbox.control(text, as, (error) => {
      if (error !== undefined) return this.undo("", () => done(error))
      this.close()
      done(undefined)
    })
  }

  private commit(command: Command): void {
    this.keep("COMMIT", (error) => {
      const aborted = error?.reason.sqlState === "25P02"
      this.finish(command, aborted ? undefined : error, error === undefined ? "COMMIT" : "ROLLBACK")
    })
  }

  private rollback(command: Command): void {
    const done = () => this.finish(command, undefined, "ROLLBACK")
    if (!this.undone) return this.undo("ROLLBACK", done)
    // Only for those who watch.
    this.sandbox.control("SELECT", "ROLLBACK", () => {
      this.close()
      done()
    })
  }

  private get undoing(): string {
    return `ROLLBACK TO SAVEPOINT ${this.savepoint};RELEASE SAVEPOINT ${this.savepoint}`
  }

  private undo(as: string, done: () => void): void {
    this.sandbox.must(this.undoing, as, () => {
      this.close()
      done()
    })
  }

  private release(): string {
    const restored = [...this.before]
      .reverse()
      .map(([name, value]) => `SELECT set_config('${name.replace(/'/g, "''")}', '${value.replace(/'/g, "''")}', true)`)
    return [`RELEASE SAVEPOINT ${this.savepoint}`, ...restored].join(";")
  }

  /** An implicit statement, or a batch: a transaction of its own. */
  private implicitly(commands: ReadonlyArray<Command>): void {
    this.alone = true
    const last = commands[commands.length - 1]
    const owner = this.owner(commands, () => {
      this.begun = true
      return this.opening("")
    })
    this.forward(commands, owner, (command, settle) => {
      if (command !== last) return settle()
      if (this.sandbox.real.status === "E") return this.undo("", settle)
      // The check is of all that is open: what others still have to bring along is not the fault of this one.
      if (!this.sandbox.shared) return this.keep("", settle)
      this.sandbox.must(this.release(), "", () => {
        this.close()
        settle()
      })
    })
  }

  private inside(commands: ReadonlyArray<Command>): void {
    this.forward(
      commands,
      this.owner(commands, () => []),
      (_, settle) => settle()
    )
  }

  /** What rides in front: of ours first, then of theirs. */
  private owner(commands: ReadonlyArray<Command>, first: () => ReadonlyArray<Control>): Owner {
    const { owner } = commands[0]!
    const names = commands.flatMap((_) => localSettings(_.text))
    return {
      takePrefix: () => [...first(), ...this.translated(owner?.takePrefix() ?? []), ...this.asking(names)]
    }
  }

  /** The same statements on the real connection, whose progress is that of the originals. */
  private forward(
    commands: ReadonlyArray<Command>,
    owner: Owner,
    after: (command: Command, settle: (failed?: DbError) => void) => void
  ): void {
    const batch: Array<Command> = []
    commands.forEach((command, at) => {
      this.sandbox.begin()
      const clone: Command = new Command(
        command.text,
        command.params,
        command.rowMode,
        false,
        command.prepare,
        command.simple,
        at === 0 ? owner : undefined,
        (error, result, multiple) => {
          if (error === undefined) follow(this.savepoints, command.text)
          after(command, (failed = error) => {
            command.state = settled
            this.over(command)
            // What the end of the sandbox has cancelled.
            command.done(failed === undefined ? undefined : (this.sandbox.over ?? failed), result, multiple)
          })
          this.sandbox.end()
        }
      )
      clone.copy = command.copy
      clone.weigh = command.weigh
      clone.scope = command.scope
      clone.watch = command.watch
      clone.as = command.as
      clone.more = command.more
      if (command.batch !== undefined) {
        clone.batch = batch
        batch.push(clone)
      }
      this.clones.set(command, clone)
      for (const field of mirrored) Object.defineProperty(command, field, { get: () => clone[field] })
      // Until the end its state is what its owner asks about.
      let state = -1
      Object.defineProperty(command, "state", {
        get: () => (state === settled ? settled : clone.state === settled ? 2 : clone.state),
        set: (next: number) => {
          state = next
        }
      })
      this.sandbox.submit(clone)
    })
  }

  /** The savepoint that plays a transaction, in which a connection of its own would know nothing of the others around. */
  private opening(as: string, done?: Control["done"]): ReadonlyArray<Control> {
    const { before } = this.sandbox
    const savepoint = this.following({ ...ours(`SAVEPOINT ${this.savepoint}`), as, done })
    if (before.length === 0) return [savepoint]
    const reset = setConfig(before, (was) => {
      for (const [name, value] of was) this.before.set(name, value)
    })
    return [savepoint, { ...reset, named: false, as: "" }]
  }

  private translated(controls: ReadonlyArray<Control>): ReadonlyArray<Control> {
    return controls.flatMap((control): ReadonlyArray<Control> => {
      // Of the modes of a transaction a savepoint can only have this one.
      if (isMode(control) && control.text !== readOnly) return [{ ...ours("SELECT"), as: control.text }]
      if (!control.opens) return [...this.asking(settingsOf(control)), this.following(control)]
      this.begun = true
      const opening = this.opening(control.as ?? control.text, control.done)
      return control.text.includes("READ ONLY") ? [...opening, ours("SET TRANSACTION READ ONLY")] : opening
    })
  }

  /** Which savepoints there are is known from what succeeds. */
  private following(control: Control): Control {
    return {
      ...control,
      done: (ok, row) => {
        if (ok) follow(this.savepoints, control.text)
        control.done?.(ok, row)
      }
    }
  }

  /** Asks for the values of settings before they are changed for the first time. */
  private asking(names: ReadonlyArray<string>): ReadonlyArray<Control> {
    // The modes of a transaction can't be changed in one that is inside.
    const asked = names.filter((_) => !this.before.has(_) && !_.startsWith("transaction_"))
    if (asked.length === 0) return []
    return [
      {
        ...ours(`SELECT ${asked.map((_, i) => `current_setting($${i + 1}, true)`).join(", ")}`),
        params: asked,
        done: (ok, row) => {
          if (!ok || row === undefined) return
          asked.forEach((name, i) => {
            const value = row[i] as string | null
            // Of a name without a dot that the server does not know nothing can be put back.
            if (!this.before.has(name) && (value !== null || name.includes("."))) this.before.set(name, value ?? "")
          })
        }
      }
    ]
  }
}

const [readOnly] = modes({ readOnly: true })

const isMode = ({ text }: Control): boolean => text.startsWith("SET transaction_")

/** Nobody who watches sees it. */
const ours = (text: string): Control => ({ text, params: [], opens: false, named: false, as: "" })

/** The names of what a control of the library sets. */
const settingsOf = ({ params, text }: Control): ReadonlyArray<string> =>
  !text.includes("set_config(")
    ? []
    : text.includes("'search_path'")
      ? ["search_path", "effect_db.search_path"]
      : params.filter((_, i) => i % 2 === 0)
