import { SqlClient } from "@effect/sql"
import { Effect } from "effect"

/** Amounts and balances are cents. A transfer remembers the balances that it left, so that a statement is one read. */
export default Effect.gen(function* () {
  const sql = yield* SqlClient.SqlClient
  yield* sql`
    CREATE TABLE accounts (
      id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      name text NOT NULL CONSTRAINT accounts_name_taken UNIQUE,
      balance bigint NOT NULL DEFAULT 0 CONSTRAINT accounts_not_overdrawn CHECK (balance >= 0)
    )`
  yield* sql`
    CREATE TABLE transfers (
      id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
      from_account integer REFERENCES accounts,
      from_balance bigint CONSTRAINT transfers_not_overdrawn CHECK (from_balance >= 0),
      to_account integer NOT NULL REFERENCES accounts,
      to_balance bigint NOT NULL,
      amount bigint NOT NULL CHECK (amount > 0),
      note text,
      created_at timestamptz NOT NULL DEFAULT now(),
      CHECK (from_account <> to_account),
      CHECK ((from_account IS NULL) = (from_balance IS NULL))
    )`
  yield* sql`CREATE INDEX transfers_by_from ON transfers (from_account, id)`
  yield* sql`CREATE INDEX transfers_by_to ON transfers (to_account, id)`
})
