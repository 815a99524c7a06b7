import { Effect, Fiber } from "effect"
import { DbSession, DbEngine } from "effect-db"
import { expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { committed, insert, proxiedOn } from "./support/programs.js"
const database = testDatabase()
const proxied = proxiedOn(database)
proxied("sibling statement while COMMIT in flight", (proxy) => Effect.gen(function*(){
  yield* DbSession.autocommit(Effect.gen(function*(){
    yield* insert(1)
    const held = proxy.seen((m) => m.dir === "frontend" && m.text === "COMMIT")
    proxy.pause("backend")
    const c = yield* Effect.fork(DbSession.commit)
    yield* Effect.promise(() => held)
    const i = yield* Effect.fork(insert(2))
    yield* Effect.sleep("50 millis")
    proxy.resume()
    yield* Fiber.join(c)
    yield* Fiber.join(i)
    yield* DbSession.rollback
  }))
  console.log(proxy.statements(), yield* committed(database))
  expect(yield* committed(database)).toEqual([1])
}))
