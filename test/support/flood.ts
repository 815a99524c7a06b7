/**
 * Programs that move more than their heap holds, each for a process of its own:
 * `node --max-old-space-size=MB --import tsx test/support/flood.ts URL NAME`. What they found out is one line of JSON.
 */
import * as Chunk from "effect/Chunk"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import { DbEngine, DbLayer, DbQuery, DbSession } from "../../src/index.js"

export interface Flood {
  /** What came out of it: rows, statements or bytes. */
  readonly count: number
  /** The most that Buffers took, which the limit of the heap does not count. */
  readonly buffers: number
}

const kilobyte = "x".repeat(1000)
const some = 300_000

const text = (column: string, rows: number) =>
  Effect.map(DbEngine, ({ sql }) => sql.unsafe<{ s: string }>(`SELECT ${column} AS s FROM generate_series(1, ${rows})`))

const bytesOf = (column: string, rows: number) =>
  Effect.flatMap(text(column, rows), ({ stream }) => Stream.runFold(stream, 0, (bytes, { s }) => bytes + s.length))

const programs: Readonly<Record<string, Effect.Effect<number, unknown, DbEngine | DbSession>>> = {
  // Each sends a kilobyte and gets it back.
  statements: Effect.gen(function* () {
    const { sql } = yield* DbSession
    let answered = 0
    yield* Effect.forEach(
      Chunk.range(1, 100_000),
      () =>
        Effect.map(
          sql<{ s: string }>`SELECT ${kilobyte}::text AS s`,
          ([row]) => void (answered += row!.s.length / 1000)
        ),
      { concurrency: "unbounded", discard: true }
    )
    return answered
  }).pipe(DbSession.autocommit),

  stream: bytesOf("repeat('x', 1000)", some),

  wide: bytesOf("repeat('x', 1000000)", some / 1000),

  copyTo: Effect.flatMap(DbEngine, ({ sql }) =>
    Stream.runFold(
      DbQuery.copyTo(
        sql`COPY (SELECT repeat('x', 999) FROM generate_series(1, ${sql.literal(String(some))})) TO STDOUT`
      ),
      0,
      (bytes, chunk) => bytes + chunk.length
    )
  ),

  copyFrom: Effect.gen(function* () {
    const { sql } = yield* DbSession
    yield* sql`CREATE TEMP TABLE flooded (s text)`
    yield* DbQuery.copyFrom(sql`COPY flooded FROM STDIN`, Stream.take(Stream.repeatValue(`${kilobyte}\n`), some))
    return Option.getOrThrow(yield* DbQuery.scalar<number>(sql`SELECT count(*)::int FROM flooded`))
  }).pipe(DbSession.autocommit)
}

const [url = "", name = ""] = process.argv.slice(2)
let buffers = 0
const look = (): void => {
  buffers = Math.max(buffers, process.memoryUsage().external)
}
setInterval(look, 5).unref()
const count = await Effect.runPromise(Effect.provide(programs[name]!, DbLayer({ url })))
look()
console.log(JSON.stringify({ count, buffers } satisfies Flood))
