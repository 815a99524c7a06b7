/**
 * Work that has to come to its end though the fiber that waits for it is interrupted.
 */
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"

/**
 * Runs an effect in a fiber that is nobody's child, and awaits it. For what must not be interrupted and may fork: an
 * interrupt reaches the children of a fiber, those of a timeout or a race, even while the fiber itself is
 * uninterruptible.
 * @internal
 */
export const undisturbed = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.uninterruptible(Effect.flatMap(Effect.forkDaemon(effect), Fiber.join))
