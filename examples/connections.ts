/**
 * Connections by hand: nested, shared, lazy, given back early, and orphans that nobody shares.
 */
import { DbConnection, DbError } from "effect-db"
import { Effect } from "effect"
import { borrowed, run, say, show } from "./support.js"

const program = Effect.gen(function* () {
  yield* say("acquire, acquire: two; acquire and share the one on top of the stack: one")
  yield* Effect.gen(function* () {
    const root = yield* DbConnection.acquire()
    yield* Effect.scoped(Effect.zipRight(DbConnection.acquire(), show("borrowed", borrowed, 2)))
    const sharer = yield* DbConnection.acquire({ reuse: true })
    yield* show("borrowed", borrowed, 1)
    yield* show("the same backend", Effect.zipWith(root.pid, sharer.pid, Object.is), true)
  }).pipe(Effect.scoped)

  yield* say("lazy: on the stack at once, and borrowed when it is needed")
  yield* Effect.gen(function* () {
    const root = yield* DbConnection.acquire({ lazy: true })
    yield* show("borrowed", borrowed, 0)
    const sharer = yield* DbConnection.acquire({ reuse: true, lazy: true })
    yield* sharer.sql`SELECT 1`
    yield* show("borrowed after the first statement", borrowed, 1)

    yield* root.release({ permanent: false })
    yield* show("borrowed after giving it back for now", borrowed, 0)
    yield* sharer.sql`SELECT 1`
    yield* show("borrowed again", borrowed, 1)

    yield* root.release()
    const refused = sharer.sql`SELECT 1`.pipe(
      Effect.as("ran"),
      DbError.catchReason("ConnectionReleased", (reason) => Effect.succeed(reason._tag))
    )
    yield* show("after giving it back for good", refused, "ConnectionReleased")
  }).pipe(Effect.scoped)

  yield* say("an orphan is never shared")
  yield* Effect.gen(function* () {
    const orphan = yield* DbConnection.acquire({ reusable: false })
    const other = yield* DbConnection.acquire({ reuse: true })
    yield* show("the same backend", Effect.zipWith(orphan.pid, other.pid, Object.is), false)
  }).pipe(Effect.scoped)

  yield* say("withConnection shares by default, so functions that nest it borrow once")
  const inner = DbConnection.withConnection(show("borrowed", borrowed, 1))
  yield* DbConnection.withConnection(inner)
})

run(program)
