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
import type { EngineCore } from "./engine.js"
import { executeApart } from "./execute.js"
import { makeSpec } from "./statement.js"
import type { OutcomeMarker, Unit } from "./unit.js"

const create =
  "CREATE TABLE IF NOT EXISTS effect_db_outcome " +
  "(id uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), aborted boolean NOT NULL DEFAULT false)"

/** An update, not "do nothing": it waits for the row, and returns the one that is there. */
const question =
  "INSERT INTO effect_db_outcome AS o (id, aborted) VALUES ($1, true) " +
  "ON CONFLICT (id) DO UPDATE SET at = o.at RETURNING o.aborted::text"

const prepared = new WeakMap<EngineCore, true>()

/** Makes sure that the table is there, once per engine. Two that create it at once is no error. @internal */
export const prepareOutcome = (engine: EngineCore): Effect.Effect<void, DbError> =>
  prepared.has(engine)
    ? Effect.void
    : executeApart(engine, create, []).pipe(
        Effect.catchIf(
          (error) => error.reason.sqlState === "23505" || error.reason.sqlState === "42P07",
          () => Effect.void
        ),
        Effect.zipRight(executeApart(engine, "DELETE FROM effect_db_outcome WHERE at < now() - interval '1 day'", [])),
        Effect.zipRight(Effect.sync(() => prepared.set(engine, true))),
        Effect.asVoid
      )

/** @internal */
export const makeMarker = (unit: Unit): OutcomeMarker => {
  const id = randomUUID()
  const { engine } = unit
  return {
    write: Effect.async<void, DbError>((resume) => {
      const spec = makeSpec("INSERT INTO effect_db_outcome (id) VALUES ($1)", [id], "array", {
        several: false,
        prepare: true
      })
      if (spec instanceof Error) return resume(Effect.fail(spec))
      unit.runLast(spec, (error) => resume(error === undefined ? Effect.void : Effect.fail(error)))
    }),
    settle: executeApart(engine, question, [id]).pipe(
      Effect.map((result) => ((result.rows[0] as ReadonlyArray<string>)[0] === "true" ? "aborted" : "committed")),
      // The server may be restarting: the question stays the same, and asking twice changes nothing.
      Effect.retry(
        Schedule.exponential("50 millis").pipe(
          Schedule.union(Schedule.spaced("1 second")),
          Schedule.upTo(Math.max(engine.config.settleMillis, 1))
        )
      ),
      // Where the server has not noticed that the connection is gone, the original holds the key for as long.
      Effect.interruptible,
      Effect.timeoutFail({
        duration: engine.config.acquireMillis + engine.config.settleMillis,
        onTimeout: () => stillOpen(engine)
      })
    )
  }
}

const stillOpen = (engine: EngineCore): DbError =>
  DbError.make("ConnectionError", {
    phase: "commit",
    message: `Whether it was committed could not be found out within ${engine.config.settleMillis} ms.`,
    hint: "The transaction may still be open on the server, which has not noticed that its connection is gone."
  })
