/** The schema, step by step: what has not been applied yet is, in one transaction, at every start. */
import * as Migrator from "@effect/sql/Migrator"
import { Effect } from "effect"
import ledger from "./0001_ledger.js"
import idempotency from "./0002_idempotency.js"

export const migrate = Migrator.make({})({
  loader: Effect.succeed([
    [1, "ledger", Effect.succeed(ledger)],
    [2, "idempotency", Effect.succeed(idempotency)]
  ])
})
