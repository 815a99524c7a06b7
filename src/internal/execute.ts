/**
 * Where a statement runs: in the ambient session, else on the ambient connection, else on a connection of its own
 * for just this statement. No fiber, no scope and, without a tracer, no span.
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import type * as FiberStatus from "effect/FiberStatus"
import * as RuntimeFlags from "effect/RuntimeFlags"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import { stuckOn } from "./blocking.js"
import type { EngineCore } from "./engine.js"
import { withExtras } from "./observe.js"
import type { Observation } from "./observe.js"
import type { Frame } from "./frame.js"
import { releasedStack, topOf } from "./lease.js"
import type { Root } from "./lease.js"
import { Command } from "./pipeline.js"
import type { Control, Done, Owner } from "./pipeline.js"
import type { Result } from "./rows.js"
import { isRefused, makeSpec } from "./statement.js"
import type { Spec } from "./statement.js"
import type { Slot } from "./slot.js"
import type { Unit } from "./unit.js"
import type { Wire } from "./wire.js"
import { mayWrite } from "./writes.js"

/** What a client or a handle is tied to; nothing: whatever is ambient, or what `find` makes of it. @internal */
export type Bound =
  | { readonly _tag: "Ambient"; readonly find?: (entry: Entry) => Bound }
  | { readonly _tag: "Slot"; readonly slot: Slot; readonly unit: Unit | undefined }
  | { readonly _tag: "Root"; readonly root: Root; readonly gone: () => DbError | undefined }

/** @internal */
export const ambientBound: Bound = { _tag: "Ambient" }

/** What it is tied to where a fiber uses it. @internal */
export const boundIn = (bound: Bound, entry: Entry): Bound =>
  bound._tag === "Ambient" && bound.find !== undefined ? bound.find(entry) : bound

/** What made it fail happens once; more are no accident. */
const mostRepeats = 3

/** @internal */
export interface Running {
  readonly interrupt: Effect.Effect<void>
}

/** @internal */
export type Submit = (wire: Wire, spec: Spec, owner: Owner | undefined, settle: Done) => Command

const submitOne: Submit = (wire, spec, owner, settle) => {
  const command = new Command(spec.text, spec.params, spec.rowMode, true, spec.prepare, spec.simple, owner, settle)
  command.copy = spec.copy
  command.scope = spec.path ?? ""
  command.watch = spec.watch
  wire.submit(command)
  return command
}

/** A statement outside of a session: in a Sync group of its own, on a connection that is borrowed or ambient. */
class Solo implements Running, Owner {
  private stop: () => void = () => {}
  private command: Command | undefined = undefined
  private wire: Wire | undefined = undefined
  private settled = false
  private repeats = 0
  private waiter: (() => void) | undefined = undefined

  constructor(
    private readonly acquire: (done: (error: DbError | undefined, wire: Wire | undefined) => void) => () => void,
    private readonly release: ((wire: Wire) => void) | undefined,
    private readonly spec: Spec,
    private readonly controls: ReadonlyArray<Control>,
    private readonly done: Done,
    private readonly submit: Submit
  ) {
    this.begin()
  }

  private begin(): void {
    let acquired = false
    const stop = this.acquire((error, wire) => {
      acquired = true
      if (wire === undefined) return this.settle(error, undefined, undefined)
      if (this.settled) return void this.release?.(wire)
      this.wire = wire
      this.start(wire)
    })
    if (!acquired) this.stop = stop
  }

  /** On a connection that is shared a session may have come in between, in whose transaction it has no place. */
  private startAgain(wire: Wire): void {
    this.repeats++
    this.command = undefined
    if (this.release !== undefined) return this.start(wire)
    this.wire = undefined
    this.begin()
  }

  takePrefix(): ReadonlyArray<Control> {
    return this.controls
  }

  private start(wire: Wire): void {
    const stuck = stuckOn(wire)
    if (stuck !== undefined) return this.settle(stuck, undefined, undefined)
    this.command = this.submit(
      wire,
      this.spec,
      this.controls.length > 0 ? this : undefined,
      (error, result, multiple) => {
        // Its plan was gone or out of date, or a cancel meant for another statement has hit it.
        const { abandoned, undone } = this.command ?? {}
        if (undone === true && abandoned === false && !wire.dead && this.repeats < mostRepeats) {
          return this.startAgain(wire)
        }
        this.settle(error, result, multiple)
      }
    )
  }

  private settle(error: DbError | undefined, result: Result | undefined, multiple: Array<Result> | undefined): void {
    if (this.settled) return
    this.settled = true
    const left = error === undefined && result !== undefined && this.leavesOpen
    if (this.wire !== undefined) this.release?.(this.wire)
    if (left) this.done(leftOpen(), undefined, undefined)
    else this.done(error, result, multiple)
    this.waiter?.()
  }

  /** A transaction, on a connection that goes back to the pool: what its user runs next would not be in it. */
  private get leavesOpen(): boolean {
    return this.wire !== undefined && this.release !== undefined && this.wire.status !== "I"
  }

  get interrupt(): Effect.Effect<void> {
    return Effect.suspend(() => {
      if (this.settled) return Effect.void
      const { command, wire } = this
      if (command === undefined || wire === undefined) {
        this.stop()
        this.settled = true
        return Effect.void
      }
      const wait = wire.interrupt(command)
      if (command.settled) {
        this.settle(undefined, undefined, undefined)
        return Effect.void
      }
      if (!wait) return Effect.void
      return Effect.async<void>((resume) => {
        if (this.settled) resume(Effect.void)
        else this.waiter = () => resume(Effect.void)
      })
    })
  }
}

const leftOpen = (): DbError =>
  DbError.make("InvalidInput", {
    message: "The statement has left a transaction open on a connection that it had for itself",
    hint: "It was rolled back. Use withTransaction for a transaction, or DbConnection.withConnection for a BEGIN of your own."
  })

type Fail = Effect.Effect<never, DbError>

const noSessionError = (): DbError =>
  DbError.make("NoSession", {
    message: "A statement was run with neither a session nor a connection around it.",
    hint: 'implicitExecution is "forbid": put DbSession.autocommit, withTransaction or DbConnection.withConnection around it.'
  })

const noSession = (): Fail => Effect.fail(noSessionError())

/** What a fiber is told that has outlived its session, or the block of it that it is in. @internal */
export const goneFrom = (slot: Slot, frame: Frame | undefined): DbError | undefined =>
  slot.ended ? slot.get().closedError() : frame?.ended === true ? frame.closedError() : undefined

/** The session of a slot and the block of it that the fiber is in; or why there is none. @internal */
export const unitOf = (slot: Slot, frame: Frame | undefined): { unit: Unit; frame: Frame } | DbError => {
  const gone = goneFrom(slot, frame)
  if (gone !== undefined) return gone
  const unit = slot.get()
  return { unit, frame: frame !== undefined && frame.unit === unit ? frame : unit.frame }
}

const start = (engine: EngineCore, bound: Bound, entry: Entry, spec: Spec, done: Done): Running | Fail => {
  switch (bound._tag) {
    case "Slot": {
      const { slot } = bound
      if (bound.unit !== undefined && bound.unit.ended) return Effect.fail(bound.unit.closedError())
      const at = unitOf(slot, entry.slot === slot ? entry.frame : undefined)
      return at instanceof Error ? Effect.fail(at) : at.unit.run(at.frame, spec, done)
    }
    case "Root": {
      const gone = bound.gone()
      if (gone !== undefined) return Effect.fail(gone)
      // In the session that runs on this connection, when it is the fiber's own.
      if (entry.slot?.runsOn(bound.root) === true) {
        const at = unitOf(entry.slot, entry.frame)
        return at instanceof Error ? Effect.fail(at) : at.unit.run(at.frame, spec, done)
      }
      return onRoot(bound.root, engine, entry, spec, done)
    }
    default: {
      if (entry.slot !== undefined) {
        const at = unitOf(entry.slot, entry.frame)
        return at instanceof Error ? Effect.fail(at) : at.unit.run(at.frame, spec, done)
      }
      if (entry.stack !== undefined || entry.orphan !== undefined) {
        const root = (entry.orphan ?? topOf(entry.stack))?.root()
        return root === undefined ? Effect.fail(releasedStack()) : onRoot(root, engine, entry, spec, done)
      }
      if (!engine.config.implicit) return noSession()
      return onPool(engine, entry, spec, done)
    }
  }
}

/** Lost before its answer, it may have been committed: who asks gets a position that is late enough. @internal */
export const inDoubt = (error: DbError | undefined): boolean =>
  error?.reason._tag === "ConnectionError" && error.reason.phase === "read" && !error.reason.isRetryable

/** A statement without a session is its own commit. */
const counted = (entry: Entry, spec: Spec, done: Done): Done => {
  const { writes } = entry
  if (writes === undefined) return done
  return (error, result, multiple) => {
    if (result !== undefined || inDoubt(error)) writes.committed(mayWrite(result?.command ?? "", spec.text))
    done(error, result, multiple)
  }
}

/** @internal */
export const onPool = (engine: EngineCore, entry: Entry, spec: Spec, done: Done, submit = submitOne): Running =>
  new Solo(
    (done) => engine.pool().take(implicitHolder, engine.config.acquireMillis, done) as () => void,
    (wire) => engine.giveBack(wire),
    spec,
    engine.statementPrefix(entry),
    counted(entry, spec, done),
    submit
  )

/** A statement of our own, whatever is ambient or forbidden: on this connection, or on one of the pool. @internal */
export const executeApart = (
  engine: EngineCore,
  text: string,
  params: ReadonlyArray<unknown>,
  root?: Root
): Effect.Effect<Result, DbError> =>
  Effect.suspend(() => {
    const spec = makeSpec(text, params, "array", { several: true, prepare: false })
    return isRefused(spec)
      ? Effect.fail(spec)
      : awaiting<Result>(undefined, (resume) => {
          const done: Done = (error, result) =>
            resume(error === undefined ? Effect.succeed(result!) : Effect.fail(error))
          return root === undefined
            ? onPool(engine, Ambient.emptyEntry, spec, done)
            : onRoot(root, engine, Ambient.emptyEntry, spec, done)
        })
  })

const implicitHolder = { name: "implicit statement" }

/** The connection of a statement without a session; nothing: one of the pool; or why it can't run. @internal */
export const homeOf = (engine: EngineCore, bound: Bound, entry: Entry): Root | DbError | undefined => {
  if (bound._tag === "Root") return bound.gone() ?? bound.root
  if (entry.stack !== undefined || entry.orphan !== undefined) {
    return (entry.orphan ?? topOf(entry.stack))?.root() ?? releasedStack()
  }
  return engine.config.implicit ? undefined : noSessionError()
}

/** @internal */
export const onRoot = (
  root: Root,
  engine: EngineCore,
  entry: Entry,
  spec: Spec,
  done: Done,
  submit = submitOne
): Running =>
  new Solo(
    (done) => {
      let stop: () => void = () => {}
      const leave = root.claim(undefined, (error) => {
        if (error !== undefined) return done(error, undefined)
        stop = root.borrow(done)
      })
      return () => {
        leave()
        stop()
      }
    },
    undefined,
    spec,
    engine.statementPrefix(entry),
    counted(entry, spec, done),
    submit
  )

/**
 * Runs one statement. The text and the parameters are checked before anything is borrowed. Interrupting it never
 * touches another statement; it returns when this one is known to be over, or is only waiting behind others.
 * @internal
 */
export const execute = <A>(
  fiber: Fiber.RuntimeFiber<any, any>,
  engine: EngineCore,
  bound: Bound,
  text: string,
  params: ReadonlyArray<unknown>,
  rowMode: "object" | "array",
  prepare: boolean,
  map: (result: Result, multiple: Array<Result> | undefined) => A,
  watch?: Observation,
  status?: FiberStatus.Running
): Effect.Effect<A, DbError> => {
  const entry = Ambient.entry(fiber, engine)
  const path = Ambient.searchPath(entry)
  const spec = makeSpec(text, params, rowMode, { several: engine.config.multiple, prepare, path })
  if (isRefused(spec)) return Effect.fail(spec)
  const extra = watch !== undefined || engine.config.comment !== undefined
  return executeIn(entry, engine, boundIn(bound, entry), extra ? withExtras(engine, spec, watch) : spec, map, status)
}

/** @internal */
export const executeSpec = <A>(
  fiber: Fiber.RuntimeFiber<any, any>,
  engine: EngineCore,
  bound: Bound,
  spec: Spec,
  map: (result: Result, multiple: Array<Result> | undefined) => A
): Effect.Effect<A, DbError> => {
  const entry = Ambient.entry(fiber, engine)
  return executeIn(entry, engine, boundIn(bound, entry), spec, map, undefined)
}

const executeIn = <A>(
  entry: Entry,
  engine: EngineCore,
  bound: Bound,
  spec: Spec,
  map: (result: Result, multiple: Array<Result> | undefined) => A,
  status: FiberStatus.Running | undefined
): Effect.Effect<A, DbError> => {
  const slot =
    bound._tag === "Slot"
      ? bound.slot
      : bound._tag === "Ambient" || entry.slot?.runsOn(bound.root) === true
        ? entry.slot
        : undefined
  const run = awaiting<A>(status, (resume) =>
    start(engine, bound, entry, spec, (error, result, multiple) => {
      if (error !== undefined) resume(Effect.fail(error))
      else if (result !== undefined) resume(handedOver(map(result, multiple)))
    })
  )
  return slot !== undefined && slot.needsGate ? Effect.zipRight(slot.prepare, run) : run
}

/**
 * A value that is gone once it has been taken: the messages between fibers may live as long as V8 likes, and with them
 * the rows that they bring.
 * @internal
 */
export const handedOver = <A>(value: A): Effect.Effect<A> => {
  let held: A | undefined = value
  return Effect.sync(() => {
    const taken = held as A
    held = undefined
    return taken
  })
}

type Start<A> = (resume: (answer: Effect.Effect<A, DbError>) => void) => Running | Fail

/**
 * Waits for what was set going; interrupted, it interrupts that first. An async effect with a finalizer does the same
 * in more steps, of which each is a part of every statement's time.
 * @param status - of the fiber, when it runs the effect with the flags that it has now: what is taken for
 * uninterruptible can't be cancelled.
 * @internal
 */
export const awaiting = <A>(status: FiberStatus.Running | undefined, start: Start<A>): Effect.Effect<A, DbError> =>
  status === undefined ? Effect.withFiberRuntime((_, status) => awaitingIn(status, start)) : awaitingIn(status, start)

const awaitingIn = <A>(status: FiberStatus.Running, start: Start<A>): Effect.Effect<A, DbError> => {
  let running: Running | undefined = undefined
  const answer = Effect.async<A, DbError>((resume) => {
    const started = start(resume)
    if ("interrupt" in started) running = started
    else resume(started)
  })
  if (!RuntimeFlags.interruption(status.runtimeFlags)) return answer
  return Effect.uninterruptible(
    Effect.catchAllCause(Effect.interruptible(answer), (cause) =>
      running !== undefined && Cause.isInterruptedOnly(cause)
        ? Effect.zipRight(running.interrupt, Effect.failCause(cause))
        : Effect.failCause(cause)
    )
  )
}
