import { SqlClient } from "@effect/sql"
import { Effect } from "effect"

export default Effect.gen(function* () {
  const sql = yield* SqlClient.SqlClient
  yield* sql`ALTER TABLE transfers ADD COLUMN idempotency_key text`
  yield* sql`CREATE UNIQUE INDEX transfers_key_reused ON transfers (idempotency_key) WHERE idempotency_key IS NOT NULL`
})
