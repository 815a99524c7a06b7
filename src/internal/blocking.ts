/**
 * Effects that are run while this thread stands still. The event loop brings nothing meanwhile: what would wait for its
 * turn waits in a queue, sleeping is sleeping, and what comes from another thread is fetched.
 */
import * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import type * as Exit from "effect/Exit"
import * as Runtime from "effect/Runtime"
import * as Scheduler from "effect/Scheduler"
import { DbError } from "../DbError.js"

/** Something that another thread works for. @internal */
export interface Source {
  /** An answer is due. */
  readonly pending: () => boolean
  /** Hands on what has come. `false`: nothing has. */
  readonly receive: () => boolean
}

/** Counted up and notified by the other thread, after it has sent something. @internal */
export const bell = new Int32Array(new SharedArrayBuffer(4))

/** @internal */
export const sources = new Set<Source>()

interface Timer {
  readonly at: number
  readonly run: () => void
  /** It keeps the process running, while the event loop has it. */
  readonly awaited: boolean
  /** What it waits for belongs to the connections of the other thread, which the next call may need. */
  readonly comesBack: boolean
  /** That of the event loop, between two calls. */
  loop: NodeJS.Timeout | undefined
}

let queue: Array<() => void> | undefined = undefined
const timers = new Set<Timer>()
/** None of them is due before. */
let earliest = Infinity

/** @internal */
export const isBlocking = (): boolean => queue !== undefined

/** Why nothing can be sent on a connection whose answers only the event loop brings, while it stands still. @internal */
export const stuckOn = (wire: { readonly needsLoop: boolean }): DbError | undefined =>
  queue !== undefined && wire.needsLoop ? heldByLoop() : undefined

const heldByLoop = (): DbError =>
  DbError.make("InvalidInput", {
    message: "runSync was given an effect that uses a connection that the event loop holds.",
    hint: "It was opened outside: a handle, or a sandbox of DbTest. Open it in the effect, or await run(effect). Nothing was sent."
  })

/** As `process.nextTick`, or in the queue of the effect that this thread is blocked for. @internal */
export const later = (f: () => void): void => {
  if (queue === undefined) process.nextTick(f)
  else queue.push(f)
}

const start = (millis: number, f: () => void, awaited: boolean, comesBack: boolean): (() => void) => {
  const timer: Timer = { at: performance.now() + millis, run: f, awaited, comesBack, loop: undefined }
  timers.add(timer)
  earliest = Math.min(earliest, timer.at)
  return () => {
    timers.delete(timer)
    clearTimeout(timer.loop)
  }
}

/**
 * Calls back once after that many milliseconds, also while this thread is blocked. One that began before a call belongs
 * to the event loop, which hears nothing meanwhile either, and waits for it; one that outlives the call goes on with the
 * event loop, and comes back with the next call. The returned function stops it.
 * @internal
 */
export const after = (millis: number, f: () => void, awaited = true): (() => void) => {
  if (queue !== undefined) return start(millis, f, awaited, true)
  const timer = setTimeout(f, millis)
  if (!awaited) timer.unref()
  return () => clearTimeout(timer)
}

/** @internal */
export const scheduler: Scheduler.Scheduler = {
  shouldYield: Scheduler.defaultShouldYield,
  scheduleTask: (task, priority, fiber) => {
    if (queue === undefined) Scheduler.defaultScheduler.scheduleTask(task, priority, fiber)
    else queue.push(task)
  }
}

const usual = Clock.make()

const clock: Clock.Clock = Object.create(usual, {
  sleep: {
    value: (duration: Duration.Duration): Effect.Effect<void> =>
      queue === undefined
        ? usual.sleep(duration)
        : // A fiber that the call leaves sleeps on with the event loop: no later call waits for it.
          Effect.async<void>((resume) =>
            Effect.sync(start(Duration.toMillis(duration), () => resume(Effect.void), true, false))
          )
  }
}) as Clock.Clock

const drain = (queue: Array<() => void>): void => {
  let taken = 0
  try {
    while (taken < queue.length) queue[taken++]!()
  } finally {
    // One that throws leaves the rest to the event loop, and nothing to be run twice.
    queue.splice(0, taken)
  }
}

const ring = (): boolean => {
  const now = performance.now()
  if (now < earliest) return false
  earliest = Infinity
  const due: Array<Timer> = []
  for (const timer of timers) {
    if (timer.at <= now) due.push(timer)
    else earliest = Math.min(earliest, timer.at)
  }
  // One may stop another.
  for (const timer of due.sort((a, b) => a.at - b.at)) if (timers.delete(timer)) timer.run()
  return due.length > 0
}

const toLoop = (): void => {
  for (const timer of timers) {
    timer.loop = setTimeout(() => {
      timers.delete(timer)
      timer.run()
    }, timer.at - performance.now())
    if (!timer.awaited) timer.loop.unref()
    if (!timer.comesBack) timers.delete(timer)
  }
}

const fromLoop = (): void => {
  earliest = Infinity
  for (const timer of timers) {
    clearTimeout(timer.loop)
    earliest = Math.min(earliest, timer.at)
  }
}

/** Waits for the next thing to happen. `false`: nothing can. */
const wait = (): boolean => {
  for (;;) {
    const heard = Atomics.load(bell, 0)
    let received = false
    for (const source of sources) received = source.receive() || received
    if (ring() || received) return true
    const pending = [...sources].some((source) => source.pending())
    const next = timers.size === 0 ? Infinity : earliest
    if (!pending && next === Infinity) return false
    Atomics.wait(bell, 0, heard, next === Infinity ? Infinity : Math.max(0, next - performance.now()))
  }
}

/** Runs an effect to its end before it returns. @internal */
export const runBlocking = <A, E, R>(runtime: Runtime.Runtime<R>, effect: Effect.Effect<A, E, R>): Exit.Exit<A, E> => {
  if (queue !== undefined) {
    throw DbError.make("InvalidInput", {
      message: "runSync was called inside of an effect that runSync runs.",
      hint: "Compose the effects, and run the whole."
    })
  }
  const mine: Array<() => void> = (queue = [])
  fromLoop()
  try {
    const ended: { exit?: Exit.Exit<A, E> } = {}
    let stuck = false
    const fiber = Runtime.runFork(runtime)(Effect.withClock(effect, clock), { scheduler })
    fiber.addObserver((exit) => {
      ended.exit = exit
    })
    for (;;) {
      drain(mine)
      if (ended.exit !== undefined && !stuck) return ended.exit
      if (ended.exit === undefined && wait()) continue
      if (stuck) {
        throw DbError.make("InvalidInput", {
          message: "runSync was given an effect that waits for something that only the event loop can bring.",
          hint: "It runs statements, sleeps and pure code. Await run(effect) for the rest."
        })
      }
      // What it holds is given back first.
      stuck = true
      fiber.unsafeInterruptAsFork(fiber.id())
    }
  } finally {
    queue = undefined
    // What goes on behind the effect has the event loop again.
    for (const task of mine) setImmediate(task)
    toLoop()
  }
}
