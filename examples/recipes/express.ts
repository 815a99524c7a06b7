/**
 * Express: one session for each request. To be copied.
 *
 * The end of a response is held back: with a status below 400 the session commits first, and a commit that fails is a
 * 500. Any other status rolls back, and so does a client that goes away.
 */
import type { DbEngine, DbRuntime, DbSession } from "effect-db"
import type { RequestHandler } from "express"

export const sessionPerRequest =
  (db: DbRuntime.DbRuntime<DbEngine | DbSession, unknown>): RequestHandler =>
  (_req, res, next) => {
    const rolledBack = new Error("the session is rolled back")
    const end = res.end.bind(res) as (...args: ReadonlyArray<unknown>) => void
    let begun = false
    let leave = (): void => {}

    const answered = () =>
      new Promise<void>((commit, reject) => {
        begun = true
        res.once("close", () => reject(rolledBack))
        res.end = (...args: ReadonlyArray<unknown>) => {
          res.end = end as typeof res.end
          leave = () => end(...args)
          if (res.statusCode < 400) commit()
          else reject(rolledBack)
          return res
        }
        next()
      })

    db.session(answered).then(
      () => leave(),
      (error: unknown) => {
        if (error === rolledBack) return leave()
        if (!begun) return next(error)
        // What was streamed has left already: it can only be cut.
        if (res.headersSent) return res.destroy()
        for (const name of res.getHeaderNames()) res.removeHeader(name)
        res.statusCode = 500
        end()
      }
    )
  }
