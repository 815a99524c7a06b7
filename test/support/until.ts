/**
 * Waiting for conditions instead of sleeping.
 */
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Schedule from "effect/Schedule"
import { DbEngine } from "effect-db"
import type { EngineStats } from "../../src/DbEngine.js"

/** Waits for what happens in the background, by looking; dies after `millis`. */
export const until = <R = never>(
  what: string,
  holds: Effect.Effect<boolean, never, R> | (() => boolean),
  millis = 15_000
): Effect.Effect<void, never, R> =>
  Effect.suspend(() => {
    const deadline = performance.now() + millis
    const check: Effect.Effect<boolean, never, R> = typeof holds === "function" ? Effect.sync(holds) : holds
    const look: Effect.Effect<void, never, R> = Effect.flatMap(check, (yes) =>
      yes
        ? Effect.void
        : performance.now() > deadline
          ? Effect.dieMessage(`not within ${millis} ms: ${what}`)
          : Effect.zipRight(
              Effect.promise(() => new Promise((resolve) => setTimeout(resolve, 5))),
              look
            )
    )
    return look
  })

/** Waits until the pool is as described. */
export const untilStats = (
  what: string,
  holds: (stats: EngineStats) => boolean,
  millis?: number
): Effect.Effect<void, never, DbEngine> => until(what, Effect.map(DbEngine.stats, holds), millis)

/** Waits until so many wait for a connection. */
export const pending = (n: number): Effect.Effect<void, never, DbEngine> =>
  untilStats(`${n} wait for a connection`, (stats) => stats.pending === n)

/** Waits until so many connections are idle and none is in use. */
export const idle = (n: number): Effect.Effect<void, never, DbEngine> =>
  untilStats(`${n} are idle`, (stats) => stats.idle === n && stats.used === 0)

/** Where so many meet: each waits at it for the others. */
export const barrier = (parties: number): Effect.Effect<Effect.Effect<void>> =>
  Effect.map(Deferred.make<void>(), (all) => {
    let arrived = 0
    return Effect.suspend(() =>
      ++arrived < parties ? Deferred.await(all) : Effect.asVoid(Deferred.succeed(all, undefined))
    )
  })

/** Tries again until it works: a server that comes up lets nobody in at first. */
export const again = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.retry(effect, { schedule: Schedule.spaced("20 millis"), times: 250 })

/** It has not come to its end. */
export const stillRuns = (fiber: Fiber.Fiber<unknown, unknown>): Effect.Effect<boolean> =>
  Effect.map(Fiber.poll(fiber), Option.isNone)

/** Something to wait for, and what ends the wait. */
export const latch = Deferred.make<void>()
export const open = (latch: Deferred.Deferred<void>): Effect.Effect<boolean> => Deferred.succeed(latch, undefined)

/**
 * Milliseconds: less than any limit that a test leaves as it is takes to be over (the shortest default is 5 s), and more
 * than a busy machine stands still.
 */
export const soon = 4500

/** How many milliseconds an effect takes, and what it yields. */
export const timed = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<readonly [number, A], E, R> =>
  Effect.map(Effect.timed(effect), ([duration, value]) => [Duration.toMillis(duration), value] as const)

/** How many milliseconds an effect takes. */
export const took = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<number, E, R> =>
  Effect.map(timed(effect), ([millis]) => millis)
