/**
 * Whether a COMMIT whose answer was lost took effect. A row written in the same transaction proves it: who finds
 * out inserts the same key, which waits for the transaction if it is still in progress, and then either collides
 * (committed) or takes the key, so that a late original collides (aborted). Who has the key is in the row: the answer to
 * the question can be lost as well, and it has to be the same when it is asked again. `pg_xact_status` alone can't
 * tell: after a crash transaction ids are used again.
 */
import * as Effect from "effect/Effect"
import * as Schedule from "effect/Schedule"
import { randomUUID } from "node:crypto"
import { DbError } from "../DbError.js"
import { sendLast } from "./ending.js"
import type { EngineCore } from "./engine.js"
import { executeApart } from "./execute.js"
import type { Root } from "./lease.js"
import type { TransactionOptions } from "./transactionSql.js"
import { undisturbed } from "./undisturbed.js"
import type { OutcomeMarker, Unit } from "./unit.js"

const create =
  "CREATE TABLE IF NOT EXISTS effect_db_outcome " +
  "(id uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), aborted boolean NOT NULL DEFAULT false)"

const clean = "DELETE FROM effect_db_outcome WHERE at < now() - interval '1 day'"

// The transaction that writes the marker may look for names elsewhere: in a tenant's schema, or nowhere.
const place =
  "SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class AS c " +
  "JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = to_regclass('effect_db_outcome')"

/** An update, not "do nothing": it waits for the row, and returns the one that is there. */
const question = (table: string): string =>
  `INSERT INTO ${table} AS o (id, aborted) VALUES ($1, true) ` +
  "ON CONFLICT (id) DO UPDATE SET at = o.at RETURNING o.aborted::text"

/** The qualified name of the table, where it is known to be there. */
const tables = new WeakMap<EngineCore, string>()

/** What `IF NOT EXISTS` says when another one is quicker: a key of the catalogue, a table, the type of its rows. */
const createdMeanwhile = new Set(["23505", "42P07", "42710"])

/**
 * Makes sure that the table is there, once per engine. Two that create it at once is no error. A transaction that only
 * reads needs none, and may be on a server that can't have one.
 * @param root - the connection that the caller has, with no transaction open on it: the pool may have no other to give.
 * @internal
 */
export const prepareOutcome = (
  engine: EngineCore,
  { readOnly }: TransactionOptions,
  root: Root | undefined
): Effect.Effect<void, DbError> =>
  tables.has(engine) || readOnly === true
    ? Effect.void
    : executeApart(engine, create, [], root).pipe(
        Effect.catchIf(
          ({ reason }) => reason.sqlState !== undefined && createdMeanwhile.has(reason.sqlState),
          () => Effect.void
        ),
        Effect.zipRight(executeApart(engine, clean, [], root)),
        Effect.zipRight(executeApart(engine, place, [], root)),
        Effect.map((result) => void tables.set(engine, (result.rows[0] as ReadonlyArray<string>)[0]!)),
        within(engine, (limit) =>
          DbError.make("ConnectionError", {
            phase: "read",
            message: `The table of outcomes was not ready within ${limit} ms.`,
            hint: "verifyOutcome needs it before the transaction begins, of which nothing has run.",
            isRetryable: true
          })
        )
      )

/** Nobody's own time limit covers what is asked here: a network that swallows the question would hold the fiber. */
const within =
  (engine: EngineCore, error: (limit: number) => DbError) =>
  <A>(effect: Effect.Effect<A, DbError>): Effect.Effect<A, DbError> => {
    const duration = engine.config.acquireMillis + engine.config.settleMillis
    return Effect.timeoutFail(Effect.interruptible(effect), { duration, onTimeout: () => error(duration) })
  }

/**
 * The marker of a transaction that is about to commit. One that only reads can't write it, and leaves nothing to be in
 * doubt: it was not committed, whatever became of it.
 * @internal
 */
export const makeMarker = (unit: Unit): OutcomeMarker => {
  if (unit.options.readOnly === true) return { write: Effect.void, settle: Effect.succeed("aborted") }
  const id = randomUUID()
  const { engine } = unit
  const table = tables.get(engine) ?? "effect_db_outcome"
  return {
    write: Effect.tapError(sendLast(unit, `INSERT INTO ${table} (id) VALUES ($1)`, [id]), ({ reason }) =>
      // It was dropped, or a failover has lost it: the next transaction makes it again.
      Effect.sync(() => void (reason.sqlState === "42P01" && tables.delete(engine)))
    ),
    settle: executeApart(engine, question(table), [id]).pipe(
      Effect.map((result) => ((result.rows[0] as ReadonlyArray<string>)[0] === "true" ? "aborted" : "committed")),
      // The server may be restarting: the question stays the same, and asking twice changes nothing.
      Effect.retry(
        Schedule.exponential("50 millis").pipe(
          Schedule.union(Schedule.spaced("1 second")),
          Schedule.upTo(Math.max(engine.config.settleMillis, 1))
        )
      ),
      // Where the server has not noticed that the connection is gone, the original holds the key for as long.
      within(engine, stillOpen),
      undisturbed
    )
  }
}

const stillOpen = (limit: number): DbError =>
  DbError.make("ConnectionError", {
    phase: "commit",
    message: `Whether it was committed could not be found out within ${limit} ms.`,
    hint: "The transaction may still be open on the server, which has not noticed that its connection is gone."
  })
