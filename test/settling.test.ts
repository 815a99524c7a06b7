import { Effect, Fiber, FiberStatus } from "effect"
import { DbSession } from "effect-db"
import { describe, expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { lockedOutside } from "./support/outside.js"
import { committed, insert, proxiedOn, reason } from "./support/programs.js"
import { until } from "./support/until.js"

const database = testDatabase()
const proxied = proxiedOn(database)

describe("a statement that another fiber issues while the transaction is being ended", () => {
  for (const [text, end, kept] of [
    ["COMMIT", DbSession.commit, [1]],
    ["ROLLBACK", DbSession.rollback, []]
  ] as const) {
    proxied(`by ${text}: belongs to the next transaction, with a BEGIN of its own`, (proxy) =>
      Effect.gen(function* () {
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            yield* insert(1)
            proxy.reset()
            const sent = proxy.seen(({ dir, text: sent }) => dir === "frontend" && sent === text)
            proxy.pause("backend")
            const ending = yield* Effect.fork(end)
            yield* Effect.promise(() => sent)
            const sibling = yield* Effect.fork(insert(2))
            yield* until("it waits", Effect.map(sibling.status, FiberStatus.isSuspended))
            proxy.resume()
            yield* Fiber.join(ending)
            yield* Fiber.join(sibling)
            expect(proxy.statements().slice(0, 3)).toEqual([text, "BEGIN", "INSERT INTO t (id) VALUES ($1)"])
            yield* DbSession.rollback
          })
        )
        expect(yield* committed(database)).toEqual(kept)
      })
    )
  }

  proxied("by a commit that waits, and is then refused: belongs to the next transaction, and is not cancelled", () =>
    Effect.gen(function* () {
      const lock = yield* lockedOutside(database, 1)
      yield* DbSession.autocommit(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          const failing = yield* Effect.fork(Effect.ignore(sql`SELECT 1 / length(pg_advisory_xact_lock(1)::text)`))
          yield* lock.waitedFor
          const committing = yield* Effect.fork(reason(DbSession.commit))
          yield* until("it waits", Effect.map(committing.status, FiberStatus.isSuspended))
          const sibling = yield* Effect.fork(insert(2))
          yield* until("it waits as well", Effect.map(sibling.status, FiberStatus.isSuspended))
          yield* lock.release
          yield* Fiber.join(failing)
          expect(yield* Fiber.join(committing)).toBe("TransactionAborted")
          yield* Fiber.join(sibling)
        })
      )
      expect(yield* committed(database)).toEqual([2])
    })
  )
})
