import { it } from "@effect/vitest"
import { DbEngine, DbLayer, DbRuntime, DbSession, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Redacted from "effect/Redacted"
import * as Scope from "effect/Scope"
import { afterAll, beforeAll, describe, expect } from "vitest"
import type { DbOptions } from "../src/DbOptions.js"
import { EmbeddedServer } from "../src/embedded/EmbeddedServer.js"
import { query } from "./support/database.js"
import type { Services, Wired } from "./support/wired.js"
import { errorOf, executes, forkUntil, one, reasonOf, run, wire } from "./support/wired.js"
import { again, soon, took, until, untilStats } from "./support/until.js"
import { expectAtRest, quietly } from "./support/programs.js"

// FAULTS.md: what happens to a server of our own. Numbers are those of that list.
const scope = Effect.runSync(Scope.make())
let server: EmbeddedServer

beforeAll(async () => {
  server = await Effect.runPromise(
    Scope.extend(
      EmbeddedServer.start({ authentication: "scram-sha-256", settings: { restart_after_crash: true } }),
      scope
    )
  )
  await Effect.runPromise(query(Redacted.value(server.url), "CREATE TABLE t (id int)"))
})
afterAll(() => Effect.runPromise(Scope.close(scope, Exit.void)))

const ask = (text: string) => Effect.suspend(() => query<{ id: number }>(Redacted.value(server.url), text))
const ids = Effect.map(ask("SELECT id FROM t ORDER BY id"), (rows) => rows.map((_) => _.id))

type Body = (at: Wired) => Effect.Effect<void, unknown, Services | Scope.Scope>

const onServer = (name: string, options: DbOptions, body: Body): void =>
  it.scopedLive(name, () =>
    Effect.gen(function* () {
      yield* again(Effect.suspend(() => Effect.sandbox(ask("TRUNCATE t"))))
      const { context, ...at } = yield* wire({ url: Redacted.value(server.url) }, options)
      yield* Effect.provide(body(at), context)
      at.proxy.disarm()
      at.proxy.resume()
      yield* Effect.provide(again(run("SELECT 1")), context)
      yield* Effect.provide(expectAtRest({ url: Redacted.value(server.url) }), context)
    })
  )

describe("logging in", () => {
  for (const [what, change] of [
    ["a wrong password", (url: URL) => void (url.password = "wr0ng")],
    ["a missing password", (url: URL) => void (url.password = "")]
  ] as const) {
    it.scopedLive(`FAULTS 6: ${what} is an AuthenticationError, not retried, without the secret`, () =>
      Effect.gen(function* () {
        const url = new URL(Redacted.value(server.url))
        change(url)
        const engine = yield* DbEngine.make({ url: url.href, username: server.user, acquireTimeout: 2000 })
        const error = yield* errorOf(engine.ping)
        expect(error.reason).toMatchObject({ _tag: "AuthenticationError", isRetryable: false })
        expect(JSON.stringify(error) + String(error)).not.toContain("wr0ng")
      })
    )
  }
})

describe("the server goes", () => {
  onServer(
    "FAULTS 14: kill -9 of a backend: siblings get typed errors, and the pool recovers",
    { maxConnections: 3 },
    (at) =>
      Effect.gen(function* () {
        const sleeping = yield* forkUntil(at, executes(/'victim'/), reasonOf(run("SELECT pg_sleep(60), 'victim'")))
        const sibling = yield* forkUntil(
          at,
          executes(/'sibling'/),
          reasonOf(
            withTransaction(Effect.zipRight(run("INSERT INTO t VALUES (1)"), run("SELECT pg_sleep(60), 'sibling'")))
          )
        )
        const found = yield* ask(
          "SELECT pid AS id FROM pg_stat_activity WHERE query LIKE '%''victim''%' AND pid <> pg_backend_pid()"
        )
        process.kill(found[0]!.id, "SIGKILL")
        expect(yield* Fiber.join(sleeping)).toMatchObject({ _tag: "ConnectionError", isRetryable: false })
        expect((yield* Fiber.join(sibling))._tag).toBe("ConnectionError")
        yield* again(run("SELECT 1"))
        expect(yield* ids).toEqual([])
      })
  )

  for (const mode of ["fast", "immediate"] as const) {
    onServer(`FAULTS 15: stop -m ${mode}, then start: typed errors, and the pool recovers by itself`, one, (at) =>
      Effect.gen(function* () {
        const work = withTransaction(Effect.zipRight(run("INSERT INTO t VALUES (1)"), run("SELECT pg_sleep(60)")))
        const fiber = yield* forkUntil(at, executes(/pg_sleep/), reasonOf(work))
        yield* server.stop(mode)
        expect((yield* Fiber.join(fiber))._tag).toBe("ConnectionError")
        expect(yield* reasonOf(run("SELECT 1"))).toMatchObject({
          _tag: "ConnectionError",
          phase: "connect",
          isRetryable: true
        })
        yield* server.start
        yield* again(run("SELECT 1"))
        expect(yield* ids).toEqual([])
      })
    )
  }

  onServer("FAULTS 15: a server that is stopped while all is idle is noticed, and found again", one, () =>
    Effect.gen(function* () {
      yield* run("SELECT 1")
      yield* server.restart("fast")
      yield* untilStats("it was noticed", (_) => _.idle === 0)
      yield* again(run("SELECT 1"))
    })
  )

  onServer(
    "FAULTS 16: a backend that is stopped: the interrupt ends within settleTimeout, the socket is destroyed",
    { maxConnections: 2, settleTimeout: 200 },
    (at) =>
      Effect.gen(function* () {
        const pid = Number((yield* run("SELECT pg_backend_pid() AS pid"))[0]!["pid"])
        yield* Effect.acquireRelease(
          Effect.sync(() => process.kill(pid, "SIGSTOP")),
          () => Effect.sync(() => process.kill(pid, "SIGCONT"))
        )
        const fiber = yield* forkUntil(at, executes(/'stopped'/), run("SELECT 'stopped'"))
        expect(yield* took(Fiber.interrupt(fiber))).toBeLessThan(soon)
        yield* run("SELECT 1")
      })
  )

  it.scopedLive("FAULTS 16: a backend that is stopped: runSync too is over within settleTimeout", () =>
    Effect.gen(function* () {
      const layer = quietly(DbLayer({ url: Redacted.value(server.url), settleTimeout: 200 }))
      const db = yield* Effect.acquireRelease(
        Effect.sync(() => DbRuntime.make(layer)),
        (_) => Effect.promise(_.close)
      )
      const pid = Number(db.runSync(run("SELECT pg_backend_pid() AS pid"))[0]!["pid"])
      yield* Effect.acquireRelease(
        Effect.sync(() => process.kill(pid, "SIGSTOP")),
        () => Effect.sync(() => process.kill(pid, "SIGCONT"))
      )
      const limited = Effect.timeoutTo(run("SELECT 1"), { duration: 50, onSuccess: () => "", onTimeout: () => "late" })
      expect(yield* took(Effect.sync(() => expect(db.runSync(limited)).toBe("late")))).toBeLessThan(soon)
      expect(db.runSync(run("SELECT 1 AS one"))).toEqual([{ one: 1 }])
    })
  )

  onServer("FAULTS 40: a crash with COMMIT in flight is CommitUnknown; verifyOutcome finds the truth", one, (at) =>
    Effect.gen(function* () {
      const insert = run("INSERT INTO t VALUES (1)")
      // Before it is forwarded, and after.
      for (const forward of [false, true]) {
        for (const verifyOutcome of [false, true]) {
          yield* again(ask("TRUNCATE t"))
          yield* again(run("SELECT 1"))
          const held = at.proxy.holdAt(executes(/^COMMIT/), { forward })
          const fiber = yield* Effect.forkScoped(Effect.either(withTransaction(insert, { verifyOutcome })))
          yield* Effect.promise(() => held)
          if (forward)
            yield* until(
              "it is committed",
              Effect.map(ids, (_) => _.length === 1)
            )
          yield* server.crash
          at.proxy.cutAll()
          yield* server.start
          at.proxy.resume()
          const outcome = yield* Fiber.join(fiber)
          const tag =
            outcome._tag === "Right" ? "committed" : (outcome.left as { reason?: { _tag: string } }).reason?._tag
          const there = yield* ids
          expect(there).toEqual(forward ? [1] : [])
          expect(tag).toBe(!verifyOutcome ? "CommitUnknown" : forward ? "committed" : "ConnectionError")
        }
      }
    })
  )

  onServer(
    "FAULTS 20: transaction_timeout ends the transaction with its own cause",
    { ...one, transactionTimeout: 100 },
    () =>
      Effect.gen(function* () {
        const work = DbSession.autocommit(Effect.zipRight(run("INSERT INTO t VALUES (1)"), run("SELECT pg_sleep(60)")))
        expect(yield* reasonOf(work)).toMatchObject({ _tag: "TransactionTimeout", sqlState: "25P04" })
        expect(yield* ids).toEqual([])
      })
  )
})
