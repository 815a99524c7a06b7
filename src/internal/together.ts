/**
 * Several statements that are sent together: in a session, or outside of one as a transaction of their own.
 */
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import { Command } from "./command.js"
import type { Control, Done } from "./command.js"
import type { EngineCore } from "./engine.js"
import { ambientBound, awaiting, handedOver, homeOf, inDoubt, onPool, onRoot, unitOf } from "./execute.js"
import type { Running, Submit } from "./execute.js"
import type { Frame } from "./frame.js"
import type { Result } from "./rows.js"
import type { Run } from "./run.js"
import type { Slot } from "./slot.js"
import type { Spec } from "./statement.js"
import { mayWrite } from "./writes.js"
import { young } from "./young.js"

/**
 * Several statements outside of a session, as one transaction: one Sync group is one, without BEGIN and COMMIT.
 * @param modes - what is set in front of them, for that transaction.
 * @internal
 */
export const executeGroup = (
  fiber: Fiber.RuntimeFiber<any, any>,
  engine: EngineCore,
  specs: ReadonlyArray<Spec>,
  modes: ReadonlyArray<Control>
): Effect.Effect<Array<Result>, DbError> => {
  const entry = Ambient.entry(fiber, engine)
  const root = homeOf(engine, ambientBound, entry)
  if (root instanceof DbError) return Effect.fail(root)
  return awaiting<Array<Result>>(undefined, (resume) => {
    const results = young<Result>()
    let failure: DbError | undefined = undefined
    const done: Done = (error, result) => {
      // Taken back before it was sent: nobody waits for it, and nothing of it has happened.
      if (error === undefined && result === undefined) return
      failure ??= error
      if (failure === undefined || inDoubt(failure))
        entry.writes?.committed(specs.some(({ text }) => mayWrite("", text)))
      resume(failure === undefined ? handedOver(results) : Effect.fail(failure))
    }
    const last = specs.length - 1
    const submit: Submit = (wire, _, solo, settle) => {
      failure = undefined
      // One that the user has begun on the connection has its modes.
      const begins = modes.length > 0 && wire.status === "I"
      const owner = begins ? { takePrefix: () => [...modes, ...(solo?.takePrefix() ?? [])] } : solo
      const batch = young<Command>()
      specs.forEach((one, at) => {
        const command = new Command(
          one.text,
          one.params,
          one.rowMode,
          true,
          one.prepare,
          false,
          at === 0 ? owner : undefined,
          (error, result, multiple) => {
            if (result !== undefined) results[at] = result
            // The first to fail is the cause; what follows it was not run.
            failure ??= error
            if (at === last) settle(failure, result, multiple)
          }
        )
        command.more = at < last
        command.batch = batch
        batch.push(command)
        command.scope = one.path ?? ""
        command.watch = one.watch
        wire.submit(command)
      })
      return batch[last]!
    }
    return root === undefined
      ? onPool(engine, entry, specs[last]!, done, submit)
      : onRoot(root, engine, entry, specs[last]!, done, submit)
  })
}

/** The last first: those behind are taken back or marked, and the one that runs is waited for. */
class Runs implements Running {
  constructor(private readonly all: ReadonlyArray<Run>) {}

  get interrupt(): Effect.Effect<void> {
    return Effect.suspend(() => Effect.forEach([...this.all].reverse(), (run) => run.interrupt, { discard: true }))
  }
}

/**
 * Several statements of a session, issued before any is sent, so that they share a round trip. All are awaited; the
 * first to fail is the one that is reported.
 * @internal
 */
export const executeTogether = (
  slot: Slot,
  frame: Frame | undefined,
  specs: ReadonlyArray<Spec>
): Effect.Effect<Array<Result>, DbError> => {
  const run = awaiting<Array<Result>>(undefined, (resume) => {
    const at = unitOf(slot, frame)
    if (at instanceof Error) return Effect.fail(at)
    const results = young<Result>()
    const errors = young<DbError | undefined>()
    let open = specs.length
    let telling = false
    const batch = young<Command>()
    const runs = young<Run>()
    specs.forEach((spec, i) => {
      const run = at.unit.run(at.frame, { ...spec, batch, more: i < specs.length - 1 }, (error, result) => {
        errors[i] = error
        // Each has a time limit for its turn: one that is over is over for those that would have their turn yet. Those
        // tell nobody in turn: a large batch would use up the stack.
        if (error !== undefined && !telling) {
          telling = true
          for (const run of runs) run.abandon(error)
          telling = false
        }
        if (result !== undefined) results[i] = result
        if (--open > 0) return
        const first = errors.find((_) => _ !== undefined)
        resume(first === undefined ? handedOver(results) : Effect.fail(first))
      })
      runs.push(run)
    })
    return new Runs(runs)
  })
  return slot.needsGate ? Effect.zipRight(slot.prepare, run) : run
}
