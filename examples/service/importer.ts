/**
 * `POST /import`: a CSV of transfers, of any length, all or nothing.
 *
 * Lines are staged in a temporary table as they arrive, five thousand to a COPY. Nothing is locked and nobody is made to
 * wait until the last one has come; then a few statements post them all. Memory holds one batch.
 */
import { DbQuery, DbSession } from "effect-db"
import type { Session } from "effect-db"
import { Chunk, Effect, Either, Schema, Stream } from "effect"
import { BadLine, fields, lines, row } from "./csv.js"
import { complaint, ImportLine } from "./schema.js"

export const header = "from,to,amount,note"

const batchSize = 5000

/** What the caller is told while it goes on; the last one is `done` or, when nothing was kept, an error. */
export type Progress =
  | { readonly staged: number }
  | { readonly posting: number }
  | { readonly done: true; readonly transfers: number; readonly accountsOpened: number }

interface Line extends ImportLine {
  readonly line: number
}

const decode = Schema.decodeUnknownEither(ImportLine, { errors: "all" })

const parse = (text: string, line: number): Line | BadLine | undefined => {
  if (line === 1) {
    return text.replace(/^\uFEFF/, "") === header
      ? undefined
      : new BadLine({ line, message: `must be the header ${header}` })
  }
  if (text === "") return undefined
  const found = fields(text)
  if (found === undefined) return new BadLine({ line, message: "has quotes that do not fit together" })
  if (found.length !== 4) return new BadLine({ line, message: `has ${found.length} fields instead of 4` })
  const [from, to, amount, note] = found
  return Either.match(decode({ from: from === "" ? null : from, to, amount, note: note === "" ? null : note }), {
    onLeft: (error) => new BadLine({ line, message: complaint(error) }),
    onRight: (decoded) => ({ ...decoded, line })
  })
}

const createStage = Effect.gen(function* () {
  const { sql } = yield* DbSession
  yield* sql`CREATE TEMPORARY TABLE staged
    (line integer, from_name text, to_name text, amount bigint, note text) ON COMMIT DROP`
})

/** What was checked goes out as CSV again: names and amounts in the columns of the table, NULL as nothing at all. */
const stage = (batch: ReadonlyArray<Line>) =>
  Effect.gen(function* () {
    const { sql } = yield* DbSession
    const text = batch.map((_) => row([String(_.line), _.from, _.to, String(_.amount), _.note])).join("")
    yield* DbQuery.copyFrom(sql`COPY staged FROM STDIN WITH (FORMAT csv)`, Stream.succeed(text))
  })

/** As if each line had been a transfer of its own: no account may be overdrawn after any of them. */
const post = Effect.gen(function* () {
  const { sql } = yield* DbSession
  const opened = yield* sql`
    INSERT INTO accounts (name)
    SELECT name FROM (SELECT from_name FROM staged UNION SELECT to_name FROM staged) AS named (name)
    WHERE name IS NOT NULL ORDER BY name
    ON CONFLICT DO NOTHING RETURNING id`
  // in the order of their numbers, as every transfer does
  yield* sql`
    SELECT count(*) FROM (
      SELECT FROM accounts
      WHERE name IN (SELECT from_name FROM staged UNION SELECT to_name FROM staged)
      ORDER BY id FOR NO KEY UPDATE
    ) AS locked`
  yield* sql`
    CREATE TEMPORARY TABLE movements ON COMMIT DROP AS
    SELECT line, incoming, id AS account, balance + sum(amount) OVER (PARTITION BY id ORDER BY line) AS balance
    FROM (
      SELECT line, false AS incoming, from_name AS name, -amount AS amount FROM staged WHERE from_name IS NOT NULL
      UNION ALL
      SELECT line, true, to_name, amount FROM staged
    ) AS movement JOIN accounts USING (name)`
  const [overdrawn] = yield* sql<{ readonly line: number; readonly name: string }>`
    SELECT line, name FROM movements m JOIN accounts a ON a.id = m.account
    WHERE m.balance < 0 ORDER BY line LIMIT 1`
  if (overdrawn !== undefined) {
    return yield* new BadLine({ line: overdrawn.line, message: `would overdraw the account "${overdrawn.name}"` })
  }
  const posted = yield* sql<{ readonly transfers: number }>`
    WITH posted AS (
      INSERT INTO transfers (from_account, from_balance, to_account, to_balance, amount, note)
      SELECT f.account, f.balance, t.account, t.balance, s.amount, s.note
      FROM staged s
      JOIN movements t ON t.line = s.line AND t.incoming
      LEFT JOIN movements f ON f.line = s.line AND NOT f.incoming
      ORDER BY s.line
      RETURNING id
    )
    SELECT count(*)::integer AS transfers FROM posted`
  yield* sql`
    UPDATE accounts SET balance = last.balance
    FROM (SELECT DISTINCT ON (account) account, balance FROM movements ORDER BY account, line DESC) AS last
    WHERE id = last.account`
  return { done: true, transfers: posted[0]!.transfers, accountsOpened: opened.length } as const
})

/**
 * The import as a stream of its progress. It outlives the handler that answers with it, and so has a session of its
 * own for as long as the stream is read: what ends the stream early, a bad line or a client that goes away, rolls back.
 */
export const importTransfers = <E>(csv: Stream.Stream<Uint8Array, E>) =>
  Stream.unwrapScoped(
    Effect.gen(function* () {
      const session: Session = yield* DbSession.make({ name: "import" })
      yield* session.use(createStage)
      let staged = 0
      const staging = lines(csv, parse).pipe(
        Stream.rechunk(batchSize),
        Stream.chunks,
        Stream.mapEffect((batch): Effect.Effect<Progress, unknown, DbSession> => {
          staged += batch.length
          return Effect.as(session.use(stage(Chunk.toReadonlyArray(batch))), { staged })
        })
      )
      const posting = Stream.suspend(() =>
        Stream.concat(
          Stream.succeed<Progress>({ posting: staged }),
          Stream.fromEffect(Effect.tap(session.use(post), () => session.commit))
        )
      )
      return Stream.concat(staging, posting)
    })
  )
