/**
 * Hono: one session for each request. To be copied.
 *
 * With a status below 400 the session commits before the response leaves, and a commit that fails is a 500. Any other
 * status rolls back, and so does a client that goes away.
 */
import type { DbEngine, DbRuntime, DbSession } from "effect-db"
import type { MiddlewareHandler } from "hono"

export const sessionPerRequest =
  (db: DbRuntime.DbRuntime<DbEngine | DbSession, unknown>): MiddlewareHandler =>
  async (c, next) => {
    const rolledBack = new Error("the session is rolled back")
    const { signal } = c.req.raw
    const gone = new Promise<never>((_, reject) => {
      signal.addEventListener("abort", () => reject(rolledBack), { once: true })
    })
    // It may win the race, or come when nobody waits for it any more.
    gone.catch(() => {})
    let answered: Promise<void> | undefined
    try {
      await db.session(async () => {
        answered = next()
        await Promise.race([answered, gone])
        if (c.res.status >= 400) throw rolledBack
      })
    } catch (error) {
      if (error !== rolledBack) throw error
    }
    await answered
  }
