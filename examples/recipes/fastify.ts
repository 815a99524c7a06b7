/**
 * Fastify: one session for each request. To be copied.
 *
 * It begins after the body was read and ends before the payload is sent: with a status below 400 it commits, and a commit
 * that fails is a 500. Any other status rolls back, and so does a client that goes away.
 */
import type { DbEngine, DbRuntime, DbSession } from "effect-db"
import type { FastifyInstance, FastifyRequest } from "fastify"

export const sessionPerRequest = (
  app: FastifyInstance,
  db: DbRuntime.DbRuntime<DbEngine | DbSession, unknown>
): void => {
  const open = new WeakMap<FastifyRequest, (commits: boolean) => Promise<void>>()

  app.addHook("preHandler", (request, reply, done) => {
    const rolledBack = new Error("the session is rolled back")
    let begun = false

    const session = db
      .session(
        () =>
          new Promise<void>((commit, reject) => {
            begun = true
            reply.raw.once("close", () => reject(rolledBack))
            open.set(request, (commits) => {
              if (commits) commit()
              else reject(rolledBack)
              return session
            })
            done()
          })
      )
      .catch((error: unknown) => {
        if (error === rolledBack) return
        if (begun) throw error
        done(error as Error)
      })
    // Whoever ends it hears of its failure; if nobody does, the client has gone.
    session.catch(() => {})
  })

  app.addHook("onSend", async (request, reply, payload) => {
    const end = open.get(request)
    open.delete(request)
    await end?.(reply.statusCode < 400)
    return payload
  })
}
