/**
 * Many connections played on one: each virtual connection's transaction is a savepoint of the real one, so that
 * whatever a program commits, rolls back or closes stays inside a transaction that is rolled back at the end.
 */
import { DbError } from "../DbError.js"
import { Command } from "../internal/command.js"
import type { Control, Owner } from "../internal/command.js"
import type { Wire } from "../internal/wire.js"
import { endOf, refusal } from "./endings.js"
import type { End } from "./endings.js"

const queued = 1
const settled = 3

interface Entry {
  readonly wire: VirtualWire
  /** `opens`: it is the first of its transaction. */
  readonly go: (opens: boolean) => void
}

/** The real connection, and whose transaction is innermost on it. */
export class Sandbox {
  private readonly stack: Array<VirtualWire> = []
  private queue: Array<Entry> = []
  private running = 0

  constructor(readonly real: Wire) {}

  /** What the statements go out on in the end: sandboxes nest. */
  get connection(): object {
    const { real } = this as { readonly real: unknown }
    return real instanceof VirtualWire ? real.sandbox.connection : this.real.pipeline
  }

  /**
   * Lets a command go when its transaction is the innermost, or opens one when nothing is on its way: a savepoint
   * behind a statement that fails would not be there.
   */
  enter(entry: Entry): () => void {
    this.queue.push(entry)
    this.pump()
    return () => {
      this.queue = this.queue.filter((_) => _ !== entry)
    }
  }

  private admits({ wire }: Entry): boolean {
    return wire.open ? this.stack[this.stack.length - 1] === wire : this.running === 0
  }

  private pump(): void {
    for (;;) {
      const at = this.queue.findIndex((_) => this.admits(_))
      if (at === -1) return
      const [entry] = this.queue.splice(at, 1)
      const opens = !entry!.wire.open
      if (opens) this.stack.push(entry!.wire)
      entry!.go(opens)
    }
  }

  leave(wire: VirtualWire): void {
    const at = this.stack.indexOf(wire)
    if (at !== -1) this.stack.splice(at, 1)
  }

  submit(command: Command): void {
    this.real.submit(command)
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
    this.real.submit(command)
  }
}

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

/** What the engine takes for a raw connection. */
export class VirtualWire {
  doomed: string | undefined = undefined
  dirty = false
  lastUsed = Date.now()
  readonly listeners: Wire["listeners"]
  /** Of the transaction that it is in. */
  private savepoint: string | undefined = undefined
  /** It was sent. */
  private begun = false
  private readonly before: Array<readonly [name: string, value: string]> = []
  private readonly clones = new WeakMap<Command, Command>()
  private readonly leavers = new WeakMap<Command, () => void>()
  private outstanding = 0
  private idleWaiters: Array<() => void> = []

  constructor(readonly sandbox: Sandbox) {
    this.listeners = sandbox.real.listeners
  }

  get pid(): number {
    return this.sandbox.real.pid
  }

  get pipeline(): { readonly dead: DbError | undefined; readonly suspect: boolean } {
    return { dead: this.sandbox.real.pipeline.dead, suspect: false }
  }

  get dead(): boolean {
    return this.sandbox.real.dead
  }

  /** The statements of its transaction come behind each other, and nobody else's in between. */
  get open(): boolean {
    return this.savepoint !== undefined
  }

  get status(): "I" | "T" | "E" {
    return this.open ? this.sandbox.real.status : "I"
  }

  get idle(): boolean {
    return this.outstanding === 0
  }

  whenIdle(f: () => void): void {
    if (this.idle) f()
    else this.idleWaiters.push(f)
  }

  destroy(): void {
    this.doomed = "destroyed"
  }

  /** Handed out, the client would take the socket of the whole sandbox along. */
  toForeign(done: (refused: DbError) => void): void {
    done(rawRefused())
  }

  submit(command: Command): void {
    this.outstanding++
    command.state = queued
    // A batch goes on with its last one.
    if (command.more) return
    const commands = command.batch ?? [command]
    const end = commands.length === 1 && command.solo ? endOf(command.text) : undefined
    const plays = end === "refused" ? undefined : end
    if (plays === undefined && commands.some(isRefused)) {
      const error = refusal()
      for (const one of commands) this.finish(one, error, "")
      return
    }
    const leave = this.sandbox.enter({ wire: this, go: (opens) => this.go(command, commands, opens, plays) })
    this.leavers.set(command, leave)
  }

  private go(command: Command, commands: ReadonlyArray<Command>, opens: boolean, plays: End | undefined): void {
    if (opens) this.savepoint = `effect_db_sandbox_${++savepoints}`
    if (plays === undefined) return opens && command.solo ? this.alone(commands) : this.inside(commands)
    if (plays === "BEGIN" && !this.begun) return this.begin(command)
    if (plays !== "BEGIN" && this.begun) return plays === "COMMIT" ? this.commit(command) : this.rollback(command)
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
    if (this.sandbox.real.interrupt(clone)) return true
    // Taken back before it was sent, and with it the savepoint that it would have brought along.
    if (clone.settled) {
      for (const one of commands) this.withdraw(one)
      if (!this.begun && this.idle) this.close()
      for (const _ of commands) this.sandbox.end()
    }
    return false
  }

  private withdraw(command: Command): void {
    command.state = settled
    this.over()
  }

  private over(): void {
    this.outstanding--
    if (this.outstanding === 0) for (const waiter of this.idleWaiters.splice(0)) waiter()
  }

  private finish(command: Command, error: DbError | undefined, tag: string): void {
    command.state = settled
    this.over()
    command.done(error, error === undefined ? noResult(tag) : undefined, undefined)
  }

  private close(): void {
    this.savepoint = undefined
    this.begun = false
    this.before.length = 0
    this.sandbox.leave(this)
  }

  private begin(command: Command): void {
    this.begun = true
    this.sandbox.control(`SAVEPOINT ${this.savepoint}`, "BEGIN", (error) => {
      if (error !== undefined) this.close()
      this.finish(command, error, "BEGIN")
    })
  }

  /** Deferred constraints are checked at COMMIT: in a savepoint of their own, which takes the mode back again. */
  private commit(command: Command): void {
    const check = `${this.savepoint}_check`
    const text = `SAVEPOINT ${check};SET CONSTRAINTS ALL IMMEDIATE;ROLLBACK TO SAVEPOINT ${check};RELEASE SAVEPOINT ${this.savepoint}${this.restore()}`
    this.sandbox.control(text, "COMMIT", (error) => {
      if (error === undefined) {
        this.close()
        return this.finish(command, undefined, "COMMIT")
      }
      this.undo("", () => {
        const aborted = error.reason.sqlState === "25P02"
        this.finish(command, aborted ? undefined : error, "ROLLBACK")
      })
    })
  }

  private rollback(command: Command): void {
    this.undo("ROLLBACK", () => this.finish(command, undefined, "ROLLBACK"))
  }

  private undo(as: string, done: () => void): void {
    this.sandbox.control(`ROLLBACK TO SAVEPOINT ${this.savepoint};RELEASE SAVEPOINT ${this.savepoint}`, as, () => {
      this.close()
      done()
    })
  }

  /** Settings that ended with the transaction are put back: a released savepoint keeps them. */
  private restore(): string {
    return this.before
      .map(([name, value]) => `;SELECT set_config('${name.replace(/'/g, "''")}', '${value.replace(/'/g, "''")}', true)`)
      .join("")
  }

  /** An implicit statement, or a batch: a transaction of its own. */
  private alone(commands: ReadonlyArray<Command>): void {
    const [first] = commands
    const last = commands[commands.length - 1]
    const { savepoint } = this
    const owner: Owner = {
      takePrefix: () => {
        this.begun = true
        return [
          { text: `SAVEPOINT ${savepoint}`, params: [], opens: false, named: false, as: "" },
          ...this.translated(first!.owner?.takePrefix() ?? [])
        ]
      }
    }
    let failure: DbError | undefined = undefined
    this.forward(commands, owner, (command, error, settle) => {
      failure ??= error
      if (command !== last) return settle()
      if (failure !== undefined && !this.sandbox.real.dead) return this.undo("", settle)
      this.sandbox.control(`RELEASE SAVEPOINT ${savepoint}${this.restore()}`, "", () => {
        this.close()
        settle()
      })
    })
  }

  private inside(commands: ReadonlyArray<Command>): void {
    const owner = commands[0]!.owner
    const translated: Owner | undefined =
      owner === undefined ? undefined : { takePrefix: () => this.translated(owner.takePrefix()) }
    this.forward(commands, translated, (_, __, settle) => settle())
  }

  /** The same statements on the real connection, whose progress is that of the originals. */
  private forward(
    commands: ReadonlyArray<Command>,
    owner: Owner | undefined,
    after: (command: Command, error: DbError | undefined, settle: () => void) => void
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
          after(command, error, () => {
            command.state = settled
            this.over()
            command.done(error, result, multiple)
          })
          this.sandbox.end()
        }
      )
      clone.copy = command.copy
      clone.scope = command.scope
      clone.watch = command.watch
      clone.as = command.as
      clone.more = command.more
      if (command.batch !== undefined) {
        clone.batch = batch
        batch.push(clone)
      }
      this.clones.set(command, clone)
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

  private translated(controls: ReadonlyArray<Control>): ReadonlyArray<Control> {
    return controls.flatMap((control): ReadonlyArray<Control> => {
      if (control.opens) {
        this.begun = true
        const savepoint: Control = {
          ...control,
          text: `SAVEPOINT ${this.savepoint}`,
          opens: false,
          named: false,
          as: control.as ?? control.text
        }
        return control.text.includes("READ ONLY")
          ? [savepoint, { text: "SET TRANSACTION READ ONLY", params: [], opens: false, named: false, as: "" }]
          : [savepoint]
      }
      return control.text.startsWith("SELECT set_config(") ? [this.remembering(control)] : [control]
    })
  }

  /** Asks for the values that a change of settings replaces. */
  private remembering(control: Control): Control {
    const names = control.text.includes("'search_path'")
      ? ["search_path"]
      : control.params.filter((_, i) => i % 2 === 0)
    const count = control.params.length
    const asks = names.map((_, i) => `current_setting($${count + i + 1}, true)`).join(", ")
    return {
      ...control,
      named: false,
      as: control.as ?? control.text,
      text: `SELECT ${asks}, ${control.text.slice("SELECT ".length)}`,
      params: [...control.params, ...names],
      done: (ok, row) => {
        if (ok && row !== undefined) names.forEach((name, i) => this.before.unshift([name, (row[i] as string) ?? ""]))
        control.done?.(ok, row)
      }
    }
  }
}
