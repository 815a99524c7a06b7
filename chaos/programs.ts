/**
 * Work of every shape, for the proofs that only look at what is left behind. Each program writes the same id twice
 * in one transaction, so that half of it can be told from all of it, and says when it has nothing left but to commit.
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Stream from "effect/Stream"
import { DbConnection, DbError, DbSession, withTransaction } from "effect-db"
import type { Outcome, Told } from "./ledger.js"
import type { Random } from "./random.js"
import type { Services } from "./world.js"

export const schema = `
  DROP TABLE IF EXISTS marks;
  CREATE TABLE marks (id uuid NOT NULL, part int NOT NULL, PRIMARY KEY (id, part))`

export const marksText = "SELECT id, count(*)::int AS parts FROM marks GROUP BY id"

/** One transaction in the table: two parts are all of it. */
export interface Mark {
  readonly id: string
  readonly parts: number
}

/** What programs fail or die with on purpose. */
export class Meant {
  readonly _tag = "Meant"
}

const mark = (id: string, part: number) =>
  Effect.flatMap(DbSession, ({ sql }) => sql`INSERT INTO marks (id, part) VALUES (${id}, ${part})`)

const both = (id: string) => Effect.zipRight(mark(id, 1), mark(id, 2))

const meant = Effect.fail(new Meant())

type Shape = (id: string, done: Effect.Effect<void>) => Effect.Effect<unknown, unknown, Services>

const shapes: Readonly<Record<string, Shape>> = {
  session: (id, done) => DbSession.autocommit(Effect.zipRight(both(id), done)),
  transaction: (id, done) => withTransaction(Effect.zipRight(both(id), done)),
  certain: (id, done) => withTransaction(Effect.zipRight(both(id), done), { verifyOutcome: true, retry: true }),
  serializable: (id, done) =>
    withTransaction(Effect.zipRight(both(id), done), { isolation: "serializable", retry: true }),
  together: (id, done) =>
    DbSession.autocommit(
      Effect.zipRight(Effect.all([mark(id, 1), mark(id, 2)], { concurrency: 2, discard: true }), done)
    ),
  batch: (id, done) =>
    DbSession.autocommit(
      Effect.flatMap(DbSession, ({ batch, sql }) =>
        batch([
          sql`INSERT INTO marks (id, part) VALUES (${id}, 1)`,
          sql`INSERT INTO marks (id, part) VALUES (${id}, 2)`
        ])
      ).pipe(Effect.zipRight(done))
    ),
  nested: (id, done) =>
    withTransaction(
      mark(id, 1).pipe(
        Effect.zipRight(Effect.ignore(withTransaction(Effect.zipRight(mark(id, 3), meant)))),
        Effect.zipRight(withTransaction(mark(id, 2))),
        Effect.zipRight(done)
      )
    ),
  connection: (id, done) =>
    DbConnection.withConnection(DbSession.autocommit(Effect.zipRight(both(id), done)), { reuse: false }),
  settings: (id, done) =>
    withTransaction(Effect.zipRight(both(id), done), { settings: { "app.tenant": id }, statementTimeout: "5 seconds" }),
  stream: (id, done) =>
    DbSession.autocommit(
      Effect.flatMap(DbSession, ({ sql }) =>
        Effect.zipRight(
          both(id),
          Stream.runDrain(Stream.take(sql<{ n: number }>`SELECT n FROM generate_series(1, 500) n`.stream, 150))
        )
      ).pipe(Effect.zipRight(done))
    ),
  reset: (id, done) =>
    DbSession.autocommit(
      Effect.flatMap(DbSession, ({ sql }) => Effect.zipRight(sql.unsafe("SET work_mem = '5MB'"), both(id))).pipe(
        Effect.zipRight(done)
      )
    ),
  slow: (id, done) =>
    DbSession.autocommit(
      Effect.flatMap(DbSession, ({ sql }) => Effect.zipRight(both(id), sql`SELECT pg_sleep(0.003)`)).pipe(
        Effect.zipRight(done)
      )
    ),
  fails: (id) => withTransaction(Effect.zipRight(both(id), meant)),
  dies: (id) => DbSession.autocommit(Effect.zipRight(both(id), Effect.die(new Meant()))),
  refused: (id) =>
    DbSession.autocommit(
      Effect.zipRight(
        both(id),
        Effect.flatMap(DbSession, ({ sql }) => sql`SELECT 1 / 0`)
      )
    ).pipe(Effect.catchAll(() => meant)),
  closed: (id) => DbSession.autocommit(Effect.zipRight(both(id), DbSession.close)).pipe(Effect.zipRight(meant))
}

/**
 * `Effect.all` with concurrency (effect 3.22) never ends when it is interrupted while it yields between two forks: these
 * can't be made to yield there.
 */
const forking = new Set(["together", "batch"])

export interface Job {
  readonly shape: string
  /** May be made to yield after any operation. */
  readonly yields: boolean
  readonly run: Effect.Effect<unknown, unknown, Services>
  readonly told: (exit: Exit.Exit<unknown, unknown>) => Told
  /** What it failed with, other than on purpose or by interruption. */
  readonly surprise: (exit: Exit.Exit<unknown, unknown>) => string | undefined
}

const names = Object.keys(shapes)

const isMeant = (_: unknown): boolean => _ instanceof Meant

export const job = (random: Random): Job => {
  const id = random.uuid()
  const shape = random.pick(names)
  let bodyDone = false
  const outcomeOf = (exit: Exit.Exit<unknown, unknown>): Outcome =>
    Exit.isSuccess(exit) ? "acknowledged" : Cause.isInterrupted(exit.cause) && bodyDone ? "unknown" : "aborted"
  return {
    shape,
    yields: !forking.has(shape),
    run: shapes[shape]!(
      id,
      Effect.sync(() => {
        bodyDone = true
      })
    ),
    told: (exit) => ({ id, outcome: outcomeOf(exit) }),
    surprise: (exit) => {
      if (Exit.isSuccess(exit)) return undefined
      const other = [...Cause.failures(exit.cause), ...Cause.defects(exit.cause)].find((_) => !isMeant(_))
      if (other === undefined) return undefined
      return `${shape}: ${DbError.reason(other)?._tag ?? ""} ${String(other)}`
    }
  }
}
