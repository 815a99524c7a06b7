/**
 * `GET /export`: all transfers as CSV, in the form that `POST /import` takes. The rows come through a cursor, so memory
 * holds a few hundred of them, and from one snapshot, whatever happens meanwhile.
 */
import { DbSession } from "effect-db"
import { Chunk, Effect, Stream } from "effect"
import { row } from "./csv.js"
import { header } from "./importer.js"

interface Row {
  readonly from: string | null
  readonly to: string
  readonly amount: string
  readonly note: string | null
}

export const exportTransfers = Stream.unwrapScoped(
  Effect.gen(function* () {
    const { sql } = yield* DbSession.make({ name: "export", readOnly: true, isolation: "repeatable read" })
    const rows = sql<Row>`
      SELECT f.name AS "from", t.name AS "to", amount, note
      FROM transfers JOIN accounts t ON t.id = to_account LEFT JOIN accounts f ON f.id = from_account
      ORDER BY transfers.id`.stream
    return Stream.concat(
      Stream.succeed(`${header}\n`),
      Stream.map(rows, ({ amount, from, note, to }) => row([from, to, amount, note]))
    )
  })
).pipe(
  // one write to the socket for as many rows as there are
  Stream.mapChunks((rows) => Chunk.of(Chunk.join(rows, ""))),
  Stream.encodeText
)
