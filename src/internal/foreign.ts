/**
 * Our statements while `pg`'s client has the socket: one at a time, through its public `query`. And the socket as that
 * client hears it.
 */
import type { EventEmitter } from "node:events"
import type * as Pg from "pg"
import { DbError } from "../DbError.js"
import { State } from "./command.js"
import type { Command } from "./command.js"
import { deadline } from "./deadline.js"
import { Backend, ProtocolViolation, Reader } from "./protocol.js"
import { inRounds } from "./rounds.js"
import { makeResult } from "./rows.js"
import type { Field } from "./rows.js"
import { connectionIsLost, isServerError } from "./sqlState.js"
import type { Wire } from "./wire.js"

const apart = (what: string): DbError =>
  DbError.make("InvalidInput", {
    message: `${what} was run outside of a session on a connection whose pg client is in use`,
    hint: "It would not be one transaction there. Put withTransaction around it; nothing was sent."
  })

const copyRefused = (): DbError =>
  DbError.make("InvalidInput", {
    message: "A COPY with data was run on a connection whose pg client is in use",
    hint: "That client has the socket, and would drop the data. Use another connection, or pg-copy-streams with the client; nothing was sent."
  })

/** No established connection is told these again: `pg` would answer with the password. */
const refuseLogin = (type: number): void => {
  if (type === Backend.Authentication || type === Backend.BackendKeyData || type === Backend.NegotiateProtocol) {
    throw new ProtocolViolation("a login that nobody asked for")
  }
}

/**
 * A listener of `pg`'s for the data of the socket, told only what a server sends. At the rest it throws, out of the
 * socket, where nobody would catch it, or waits for the end of a message that has none: the connection fails instead.
 * @internal
 */
export const guarded = (
  connection: EventEmitter,
  listener: (chunk: Buffer) => void,
  die: (cause: unknown) => void
): ((chunk: Buffer) => void) => {
  const reader = new Reader(refuseLogin)
  let handling = 0
  const emit = connection.emit
  connection.emit = (...args) => {
    handling++
    const heard = emit.apply(connection, args)
    handling--
    return heard
  }
  return (chunk) => {
    handling = 0
    try {
      reader.push(chunk)
      listener(chunk)
    } catch (cause) {
      const theirs = handling > 0
      die(cause)
      // Its parser would take what it was about for the next message, too.
      connection.emit("error", cause)
      // What a handler of the user's throws is to be seen.
      if (theirs) throw cause
    }
  }
}

/** @internal */
export class ForeignQueue {
  private readonly queue: Array<Command> = []
  private readonly waiters: Array<() => void> = []
  private current: Command | undefined = undefined
  /** A CancelRequest is on its way: what is sent now could be hit by it. */
  private canceling = false
  /** Ends the asking for a cancel, and its timers. */
  private stopAsking: (() => void) | undefined = undefined

  constructor(
    private readonly wire: Wire,
    private readonly client: Pg.Client,
    readonly written: number,
    private readonly settleMillis: number
  ) {}

  get idle(): boolean {
    return this.current === undefined && this.queue.length === 0
  }

  whenIdle(f: () => void): void {
    if (this.idle) f()
    else this.waiters.push(f)
  }

  submit(command: Command): void {
    // Each is a round trip and a transaction of its own here.
    if (command.solo && (command.more || (command.batch?.length ?? 1) > 1)) {
      return command.settle(apart("A batch"), undefined, undefined)
    }
    if (command.copy !== undefined) return command.settle(copyRefused(), undefined, undefined)
    command.state = State.Queued
    this.queue.push(command)
    if (this.current === undefined) this.next()
  }

  interrupt(command: Command): boolean {
    if (command.settled) return false
    // Behind a query of the user's it has not been sent either, and a cancel would hit that one.
    if (!command.sent) {
      command.state = State.Settled
      return false
    }
    if (command.canceled) return true
    command.canceled = true
    this.wire.doomed = "a statement was cancelled while the pg client was in use"
    this.cancel(command)
    return true
  }

  private cancel(command: Command): void {
    const stop = deadline(this.settleMillis, () =>
      this.wire.destroy(new Error("the server did not confirm the cancellation in time"))
    )
    this.stopAsking = stop
    let pause = 50
    const attempt = (): void => {
      this.canceling = true
      this.wire.cancel(() => {
        this.canceling = false
        if (command.settled) return this.next()
        // It may have arrived before the statement did, or not at all: ask again until it is answered.
        const again = setTimeout(attempt, pause)
        this.stopAsking = () => {
          stop()
          clearTimeout(again)
        }
        pause *= 2
      })
    }
    attempt()
  }

  /** The connection is gone: pg answers for what it was given, and here is the rest. */
  fail(error: DbError): void {
    const unsent = this.queue.splice(0)
    if (this.current?.sent === false) {
      unsent.unshift(this.current)
      this.current = undefined
    }
    for (const command of unsent) command.settle(error, undefined, undefined)
    if (this.idle) this.wake()
  }

  private wake(): void {
    for (const waiter of this.waiters.splice(0)) waiter()
  }

  // Thousands may be in line that are refused at once.
  private readonly next = inRounds(() => {
    this.current = undefined
    let command = this.queue.shift()
    while (command !== undefined && command.settled) command = this.queue.shift()
    if (command === undefined) return this.wake()
    this.current = command
    // pg calls it deprecated to queue behind a query of the user's.
    if (!(this.client as unknown as { readonly readyForQuery: boolean }).readyForQuery) {
      this.client.once("drain", () => (command.settled ? this.next() : this.run(command)))
    } else {
      this.run(command)
    }
  })

  private settle(command: Command, error: unknown, result: Pg.QueryArrayResult | undefined): void {
    command.state = State.Settled
    this.stopAsking?.()
    this.stopAsking = undefined
    if (error !== null && error !== undefined) {
      if (!isServerError(error) || connectionIsLost(error)) this.wire.doomed ??= "it failed while pg had it"
      command.done(
        isServerError(error)
          ? DbError.fromServer(error, { statement: command.text, canceledByUs: command.canceled })
          : DbError.fromSocket(error, "read"),
        undefined,
        undefined
      )
    } else {
      const many = (Array.isArray(result) ? result : [result]) as Array<Pg.QueryArrayResult>
      const results = many.map((one) => ({
        ...makeResult("", one.rows, one.fields as ReadonlyArray<Field>),
        command: one.command,
        rowCount: one.rowCount
      }))
      command.done(undefined, results[results.length - 1], results.length > 1 ? results : undefined)
    }
    if (!this.canceling) this.next()
  }

  private run(command: Command): void {
    // What the user has done through pg, nobody has told us.
    const gone = command.owner?.vet?.(this.wire)
    if (gone !== undefined) {
      command.settle(gone, undefined, undefined)
      return this.next()
    }
    const prefix = command.owner === undefined ? [] : [...command.owner.takePrefix()]
    if (command.solo && prefix.length > 0) {
      command.settle(apart("A statement with a search path or an isolation level of its own"), undefined, undefined)
      return this.next()
    }
    command.state = State.Sent
    command.sent = true
    // One at a time: each is a round trip.
    this.wire.pipeline.heard++
    this.wire.pipeline.tell(command, prefix)
    const step = (): void => {
      const control = prefix.shift()
      if (control !== undefined) {
        this.client.query({ text: control.text, values: [...control.params], rowMode: "array" }, (error, result) => {
          control.done?.(error === null || error === undefined, result?.rows[0])
          if (error) {
            for (const skipped of prefix) skipped.done?.(false, undefined)
            return this.settle(command, error, undefined)
          }
          step()
        })
        return
      }
      const query = command.simple
        ? { text: command.text, rowMode: command.rowMode }
        : { text: command.text, values: [...command.params], rowMode: command.rowMode }
      this.client.query(query as Pg.QueryArrayConfig, (error, result) => this.settle(command, error, result))
    }
    step()
  }
}
