/**
 * A bank under chaos. Transfers between accounts, each with its row in the ledger in the same transaction, while
 * connections, backends and the server are broken. What the clients were told must be what is there in the end.
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Redacted from "effect/Redacted"
import type { SqlError } from "@effect/sql/SqlError"
import { DbEngine, DbError, DbSession, withTransaction } from "effect-db"
import type { DbOptions } from "effect-db"
import { count, heal, strike, untilUp } from "./faults.js"
import type { Tally } from "./faults.js"
import { judge } from "./ledger.js"
import type { Told, Verdict } from "./ledger.js"
import { proxy as makeProxy } from "../test/support/proxy.js"
import type { Random } from "./random.js"
import { describeFiles, onEngine, openFiles, settles, unrest } from "./world.js"
import type { World } from "./world.js"

export const accounts = 200
export const initial = 1000

export const schema = `
  DROP TABLE IF EXISTS accounts, ledger;
  CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL);
  CREATE TABLE ledger (id uuid PRIMARY KEY, source int NOT NULL, target int NOT NULL, amount int NOT NULL);
  INSERT INTO accounts SELECT n, ${initial} FROM generate_series(1, ${accounts}) n`

export interface Record extends Told {
  readonly verifies: boolean
  readonly reason: string | undefined
}

class Refused {
  readonly _tag = "Refused"
}

/** One transfer as the client sees it: what it asks for, how far it came, what it was told. */
class Transfer {
  readonly id: string
  readonly source: number
  readonly target: number
  readonly amount: number
  readonly verifies: boolean
  /** A row of a nested block that fails: never there, whatever becomes of the transfer. */
  readonly fee: string | undefined
  private readonly shape: "sequential" | "together" | "nested" | "refused" | "defect"
  private readonly retries: boolean
  private readonly pauses: boolean
  private bodyDone = false
  private commits = 0
  private rollbacks = 0

  constructor(random: Random) {
    this.id = random.uuid()
    this.source = random.between(1, accounts)
    this.target = ((this.source + random.between(0, accounts - 2)) % accounts) + 1
    this.amount = random.between(1, 50)
    this.verifies = random.chance(0.6)
    this.retries = random.chance(0.8)
    this.pauses = random.chance(0.1)
    this.shape = random.chance(0.9)
      ? random.pick(["sequential", "together", "nested"] as const)
      : random.pick(["refused", "defect"] as const)
    this.fee = this.shape === "nested" ? random.uuid() : undefined
  }

  private get body(): Effect.Effect<void, SqlError | Refused, DbSession> {
    const { amount, fee, id, shape, source, target } = this
    const that = this
    return Effect.gen(function* () {
      that.bodyDone = false
      that.commits = that.rollbacks = 0
      const { afterCommit, afterRollback, sql } = yield* DbSession
      yield* afterCommit(Effect.sync(() => void that.commits++))
      yield* afterRollback(Effect.sync(() => void that.rollbacks++))
      yield* sql`SELECT id FROM accounts WHERE id IN (${source}, ${target}) ORDER BY id FOR UPDATE`
      const take = sql`UPDATE accounts SET balance = balance - ${amount} WHERE id = ${source}`
      const give = sql`UPDATE accounts SET balance = balance + ${amount} WHERE id = ${target}`
      const note = (id: string) =>
        sql`INSERT INTO ledger (id, source, target, amount) VALUES (${id}, ${source}, ${target}, ${amount})`
      if (shape === "together") {
        yield* Effect.all([take, give, note(id)], { concurrency: "unbounded", discard: true })
      } else {
        yield* take
        if (fee !== undefined) {
          yield* withTransaction(Effect.zipRight(note(fee), Effect.fail(new Refused()))).pipe(
            Effect.catchIf(
              (error) => error instanceof Refused,
              () => Effect.void
            )
          )
        }
        yield* give
        yield* note(id)
      }
      if (that.pauses) yield* Effect.sleep("5 millis")
      if (shape === "refused") return yield* Effect.fail(new Refused())
      if (shape === "defect") return yield* Effect.die(new Refused())
      that.bodyDone = true
    }) as Effect.Effect<void, SqlError | Refused, DbSession>
  }

  get run(): Effect.Effect<void, SqlError | Refused, DbSession | DbEngine> {
    return withTransaction(this.body, { retry: this.retries, verifyOutcome: this.verifies, timeout: "3 seconds" })
  }

  /** What the client knows now. */
  told(exit: Exit.Exit<void, SqlError | Refused>): Record {
    const { commits, id, rollbacks, verifies } = this
    const of = (outcome: Record["outcome"], reason: string | undefined): Record => ({
      id,
      outcome,
      reason,
      verifies,
      commits,
      rollbacks
    })
    if (Exit.isSuccess(exit)) return of("acknowledged", undefined)
    if (commits > 0) return of("acknowledged", "interrupted")
    const tags = [...Cause.failures(exit.cause)].map((error) => {
      if (error instanceof Refused) return "Refused"
      const tag = DbError.reason(error)?._tag ?? "no DbError"
      return expected.has(tag) ? tag : `${tag}: ${error.message}`
    })
    if (tags.includes("CommitUnknown")) return of("unknown", "CommitUnknown")
    const defects = [...Cause.defects(exit.cause)].filter((_) => !(_ instanceof Refused))
    if (defects.length > 0) return of("unknown", `defect: ${String(defects[0])}`)
    if (Cause.isInterrupted(exit.cause)) return of(this.bodyDone ? "unknown" : "aborted", "interrupted")
    return of("aborted", tags[0] ?? "Refused")
  }
}

/** What may be said to a client under these faults. Anything else is a bug: a ghost's key, a closed session ... */
const expected = new Set([
  "Refused",
  "interrupted",
  "CommitUnknown",
  "ConnectionError",
  "AcquireTimeout",
  "QueryCanceled",
  "TransactionAborted",
  "TransactionTimeout",
  "DeadlockError",
  "SerializationError"
])

export interface BankOptions {
  readonly seconds: number
  readonly fibers?: number | undefined
  readonly engine?: DbOptions | undefined
}

export interface BankReport extends Verdict {
  readonly seconds: number
  readonly unknownThoughVerified: number
  /** Connections, transactions and files that are still there when nothing is running. */
  readonly leaked: number
  readonly reasons: Tally
  readonly faults: Tally
  /** Everything that is wrong, in words; empty: nothing. */
  readonly wrong: ReadonlyArray<string>
}

const sumOf = (tally: Tally): number => Object.values(tally).reduce((a, b) => a + b, 0)

export const faultsOf = (report: BankReport): number => sumOf(report.faults)

/** What is in the database, with what can be told from it alone. */
export const audit = (
  world: World
): Effect.Effect<{ readonly present: ReadonlySet<string>; readonly wrong: ReadonlyArray<string> }, Error> =>
  Effect.gen(function* () {
    const rows = yield* world.ask<{ id: string }>("SELECT id FROM ledger")
    const [sum] = yield* world.ask<{ total: string }>("SELECT sum(balance) AS total FROM accounts")
    const off = yield* world.ask<{ id: number }>(
      `SELECT id FROM accounts WHERE balance <> ${initial}
         + (SELECT coalesce(sum(amount), 0) FROM ledger WHERE target = accounts.id)
         - (SELECT coalesce(sum(amount), 0) FROM ledger WHERE source = accounts.id)`
    )
    const wrong: Array<string> = []
    if (Number(sum!.total) !== accounts * initial) wrong.push(`the balances add up to ${sum!.total}`)
    if (off.length > 0) wrong.push(`${off.length} balances are not what the ledger says`)
    return { present: new Set(rows.map((_) => _.id)), wrong }
  })

/** Connections for half of the fibers, and limits that a network which swallows everything can be met with. */
const limits: DbOptions = { maxConnections: 12, connectTimeout: "2 seconds", settleTimeout: "2 seconds" }

/** Lets the bank work under chaos for a while, heals everything, and looks. */
export const bank = (around: World, random: Random, options: BankOptions): Effect.Effect<BankReport, Error> =>
  Effect.gen(function* () {
    const log: Array<Record> = []
    /** Rows of nested blocks that failed. */
    const fees: Array<Told> = []
    const faults: Tally = {}
    const reasons: Tally = {}
    const wrong: Array<string> = []
    let leaked = 0
    yield* around.ask(schema)
    // What the runtime opens once, such as for its resolver, is open now.
    const filesBefore = openFiles()

    const work = (world: World) =>
      Effect.gen(function* () {
        const { proxy } = world
        const engine = yield* DbEngine
        const running = new Map<Fiber.RuntimeFiber<void, SqlError | Refused>, Transfer>()
        let stopping = false

        const worker = (own: Random): Effect.Effect<void, never, DbSession | DbEngine> =>
          Effect.gen(function* () {
            while (!stopping) {
              const transfer = new Transfer(own)
              // One that hangs must not keep the run from saying so.
              const fiber = yield* Effect.forkDaemon(transfer.run)
              running.set(fiber, transfer)
              const told = transfer.told(yield* Fiber.await(fiber))
              running.delete(fiber)
              log.push(told)
              if (transfer.fee !== undefined) fees.push({ id: transfer.fee, outcome: "aborted" })
              if (told.reason !== undefined) count(reasons, told.reason)
              yield* Effect.yieldNow()
            }
          })

        const choice = random.fork()
        const interruptOne = Effect.sync(() => {
          if (running.size === 0) return false
          const fiber = choice.pick([...running.keys()])
          fiber.unsafeInterruptAsFork(fiber.id())
          return true
        })
        // The identity has to hold at every moment, not only at rest.
        const watch = Effect.sync(() => {
          const { closing, connecting, idle, max, total, used } = Effect.runSync(engine.stats)
          if (used + idle + connecting + closing !== total || total > max) {
            wrong.push(`the pool counts wrongly: ${JSON.stringify({ closing, connecting, idle, max, total, used })}`)
          }
        }).pipe(Effect.delay("3 millis"), Effect.forever)
        // What travelled is of no interest here, and would fill the memory.
        const forget = Effect.sync(() => proxy.reset()).pipe(Effect.delay("200 millis"), Effect.forever)

        const helpers = yield* Effect.forkAll([watch, forget])
        const workers = yield* Effect.forkAll(Array.from({ length: options.fibers ?? 24 }, () => worker(random.fork())))
        const storm = yield* Effect.fork(strike({ world, random: random.fork(), interruptOne }, faults))
        yield* Effect.sleep(options.seconds * 1000)
        yield* Fiber.interrupt(storm)
        yield* untilUp(world)
        stopping = true
        const ended = yield* Effect.timeoutOption(Fiber.join(workers), "30 seconds")
        if (ended._tag === "None") {
          const stuck = [...running.values()].map((_) => JSON.stringify(_))
          wrong.push(`${running.size} transfers never ended: ${stuck.join(", ")}`)
        }
        yield* Fiber.interrupt(helpers)
        const left = yield* unrest(world, engine)
        leaked += left.length
        wrong.push(...left)
        yield* Effect.mapError(engine.ping, (error) => new Error("the pool does not serve any more", { cause: error }))
      })

    // A proxy of its own: of what it swallows, sockets stay open until it closes.
    yield* Effect.flatMap(makeProxy(Redacted.value(around.server.url)), (proxy) => {
      const world = { ...around, proxy }
      return work(world).pipe(onEngine(world, { ...limits, ...options.engine }), Effect.ensuring(heal(world)))
    }).pipe(
      Effect.scoped,
      Effect.mapError((error) => (error instanceof Error ? error : new Error(String(error))))
    )

    const filesAfter = yield* settles(
      Effect.sync(openFiles),
      (_) => _ === undefined || filesBefore === undefined || _.length <= filesBefore.length
    )
    if (filesAfter !== undefined && filesBefore !== undefined) {
      leaked += filesAfter.length - filesBefore.length
      const added = filesAfter.filter((_) => !filesBefore.includes(_))
      wrong.push(`${filesAfter.length} open files, ${filesBefore.length} before: ${describeFiles(added)}`)
    }
    const { present, wrong: inside } = yield* audit(around)
    const verdict = judge([...log, ...fees], present)
    wrong.push(...inside)
    for (const what of ["lost", "ghosts", "strangers", "wrongHooks"] as const) {
      if (verdict[what].length > 0) wrong.push(`${what}: ${verdict[what].length}, such as ${verdict[what][0]}`)
    }
    for (const reason of Object.keys(reasons)) {
      if (!expected.has(reason)) wrong.push(`clients were told of ${reason} (${reasons[reason]} times)`)
    }
    return {
      ...verdict,
      aborted: verdict.aborted - fees.length,
      seconds: options.seconds,
      unknownThoughVerified: log.filter((_) => _.reason === "CommitUnknown" && _.verifies).length,
      leaked,
      reasons,
      faults,
      wrong
    }
  })
