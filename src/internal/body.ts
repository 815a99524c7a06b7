/**
 * The body of a block: run so that it can be ended early (`tx.end`), and what its exit means for the block.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Cause from "effect/Cause"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import { aroundOf, framesAbove } from "./frame.js"
import type { Ending, Frame } from "./frame.js"
import { settle } from "./session.js"
import type { Slot } from "./slot.js"
import type { Unit } from "./unit.js"

/** One block that an effect runs in, or joins. @internal */
export class Block {
  ending: Ending | undefined = undefined
  /** The one that runs the body, where that was given the block. */
  fiber: Fiber.RuntimeFiber<any, any> | undefined = undefined

  constructor(
    readonly slot: Slot,
    readonly unit: Unit,
    /** The block on the server that this one is, or has joined. */
    readonly frame: Frame
  ) {}

  private get isOver(): boolean {
    const { ending, fiber, frame } = this
    return frame.ended || ending !== undefined || (fiber !== undefined && fiber.unsafePoll() !== null)
  }

  /**
   * Ends this block from inside, through the blocks in it: by interrupting the fiber that runs its body, which no
   * error handler can trap.
   */
  readonly end = (how: "commit" | "rollback", value?: unknown): Effect.Effect<never, SqlError> =>
    Effect.withFiberRuntime((caller) => {
      if (this.isOver) {
        return Effect.fail(
          DbError.make("TransactionClosed", {
            message: `The block "${this.frame.name}" has ended.`,
            hint: "tx.end works inside its block only, and once."
          })
        )
      }
      const ending: Ending = { commits: how === "commit", value, failure: undefined }
      this.ending = ending
      // The blocks around the caller end the same way, also from a session of its own or from none: those of other
      // fibers are not finished.
      this.frame.ending ??= ending
      for (let at = aroundOf(Ambient.entry(caller, this.unit.engine)); at !== undefined; at = at.next) {
        for (const frame of framesAbove(at.frame)) {
          if (!frame.isWithin(this.frame)) break
          frame.ending ??= ending
        }
      }
      const fiber = this.fiber
      if (fiber !== undefined) fiber.unsafeInterruptAsFork(fiber.id())
      return Effect.interruptible(Effect.never)
    })
}

/** A function is given nothing where it runs without a transaction. @internal */
export type Body = Effect.Effect<any, any, any> | ((block: Block | undefined) => Effect.Effect<any, any, any>)

const call = (body: Body, block: Block | undefined): Effect.Effect<any, any, any> =>
  Effect.isEffect(body) ? body : Effect.suspend(() => (body as Exclude<Body, Effect.Effect<any, any, any>>)(block))

/** The body where there is no block. @internal */
export const bare = (body: Body): Effect.Effect<any, any, any> => call(body, undefined)

/** With a time limit of its own. @internal */
export const limited = (
  effect: Effect.Effect<any, any, any>,
  name: string,
  timeout: Duration.DurationInput | undefined,
  undone = true
): Effect.Effect<any, any, any> =>
  timeout === undefined
    ? effect
    : Effect.timeoutFail(effect, { duration: timeout, onTimeout: () => lateError(name, timeout, undone) })

/** @internal */
export const lateError = (name: string, timeout: Duration.DurationInput, undone = true): DbError =>
  DbError.make("TransactionTimeout", {
    message: `The block "${name}" did not end within ${Duration.format(timeout)}.`,
    hint: undone
      ? "It was rolled back. Do less in one transaction, or raise its timeout."
      : "It ran without a transaction: what it had done by then stays. Do less in it, or raise its timeout."
  })

/** Runs the body so that `block.end` can interrupt it. Only a body that was given the block can ask for it. @internal */
export const runBody = (
  block: Block,
  body: Body,
  options: { readonly timeout?: Duration.DurationInput | undefined }
): Effect.Effect<any, any, any> => {
  const timed = (effect: Effect.Effect<any, any, any>) => limited(effect, block.frame.name, options.timeout)
  if (Effect.isEffect(body)) return timed(body)
  const whole = Effect.withFiberRuntime<any, any, any>((fiber) => {
    block.fiber = fiber
    // Where the block can't be interrupted, as in a finalizer, its body is: nobody but `block.end` knows its fiber.
    return Effect.interruptible(timed(call(body, block)))
  })
  // A daemon, because children get every interruption of their parent's, and nothing ends the block before its body.
  return Effect.uninterruptibleMask((restore) =>
    Effect.flatMap(Effect.forkDaemon(whole), (fiber) =>
      Effect.onInterrupt(restore(Fiber.join(fiber)), () => Fiber.interrupt(fiber))
    )
  )
}

/** Whether what ended like this is kept: done, or passed through by the `tx.end` of a block around it. @internal */
export const keeps = ({ ending }: Frame, exit: Exit.Exit<unknown, unknown>): boolean =>
  Exit.isSuccess(exit) || (ending?.commits === true && Cause.isInterruptedOnly(exit.cause))

/** What the body's exit means when this block, or one around it, was told how to end. @internal */
export const exitOf = (
  block: Block,
  exit: Exit.Exit<any, any>
): { readonly exit: Exit.Exit<any, any>; readonly commits: boolean } => {
  const { ending, frame } = block
  if (Exit.isSuccess(exit) || ending === undefined) return { exit, commits: keeps(frame, exit) }
  // What dies on the way out is no way to end.
  const defects = Cause.keepDefects(exit.cause)
  if (Option.isSome(defects)) return { exit: Exit.failCause(defects.value), commits: false }
  if (ending.failure !== undefined) return { exit: Exit.fail(ending.failure), commits: false }
  return { exit: Exit.succeed(ending.value), commits: ending.commits }
}

/** The exit of the block, with what comes of its end. @internal */
export const endAs = (
  { ending }: Frame,
  exit: Exit.Exit<any, any>,
  commits: boolean,
  end: Effect.Effect<void, any>
): Effect.Effect<any, any> =>
  commits && !Exit.isSuccess(exit)
    ? // An outer block ends by commit, through this one: it is kept, and the interruption goes on.
      Effect.matchEffect(end, {
        onSuccess: () => exit,
        onFailure: (error: DbError) => {
          if (ending !== undefined) ending.failure ??= error
          return exit
        }
      })
    : settle(exit, () => end)
