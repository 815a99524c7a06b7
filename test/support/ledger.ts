import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import type * as Scope from "effect/Scope"
import { DbError } from "effect-db"
import { expect } from "vitest"

/** What writers under load have been told of each id. */
export interface Ledger {
  readonly acknowledged: ReadonlySet<number>
  readonly undone: ReadonlySet<number>
  readonly unknown: ReadonlySet<number>
  /** Lets the writers end what they have in hand. */
  readonly close: Effect.Effect<void>
  /** What was acknowledged is among the ids that are there, what has failed is not, and nothing is missing. */
  readonly agrees: (ids: ReadonlyArray<number>) => void
}

/** So many writers, each with one id after the other, until the ledger is closed. */
export const ledger = <R>(
  writers: number,
  write: (id: number) => Effect.Effect<unknown, unknown, R>,
  errors: ReadonlyArray<string>
): Effect.Effect<Ledger, never, R | Scope.Scope> =>
  Effect.gen(function* () {
    const [acknowledged, undone, unknown] = [new Set<number>(), new Set<number>(), new Set<number>()]
    let next = 0
    let over = false
    const one = Effect.suspend(() => {
      const id = ++next
      return Effect.matchEffect(write(id), {
        onSuccess: () => Effect.sync(() => acknowledged.add(id)),
        onFailure: (error) => {
          const tag = DbError.reason(error)?._tag
          expect(errors).toContain(tag)
          ;(tag === "CommitUnknown" ? unknown : undone).add(id)
          // As an application would, it waits a moment before it goes on.
          return Effect.sleep("10 millis")
        }
      })
    })
    const fiber = yield* Effect.forkScoped(
      Effect.all(
        Array.from({ length: writers }, () => Effect.repeat(one, { until: () => over })),
        { concurrency: "unbounded" }
      )
    )
    return {
      acknowledged,
      undone,
      unknown,
      close: Effect.suspend(() => {
        over = true
        return Effect.asVoid(Fiber.join(fiber))
      }),
      agrees: (ids) => {
        const there = new Set(ids)
        expect([...acknowledged].filter((id) => !there.has(id))).toEqual([])
        expect([...undone].filter((id) => there.has(id))).toEqual([])
        expect(acknowledged.size + undone.size + unknown.size).toBe(next)
      }
    }
  })
