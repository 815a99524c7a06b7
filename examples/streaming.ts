/**
 * Results larger than memory: rows come through a cursor, and the session goes on working in between.
 */
import { DbEngine, DbSession } from "effect-db"
import { Effect, Stream } from "effect"
import { borrowed, run, say, show, users } from "./support.js"

const program = Effect.gen(function* () {
  const { sql } = yield* DbEngine
  const numbers = (count: number) => sql<{ readonly n: number }>`SELECT n FROM generate_series(1, ${count}::int) AS n`

  yield* say("ten thousand rows, at most five hundred at a time, in a transaction of the stream's own")
  yield* show(
    "sum",
    Stream.runFold(numbers(10_000).stream, 0, (sum, { n }) => sum + n),
    50_005_000
  )

  yield* say("statements of the same session run inside the loop")
  yield* numbers(1500).stream.pipe(
    Stream.filter(({ n }) => n % 500 === 0),
    Stream.runForEach(({ n }) => sql`INSERT INTO users ${sql.insert({ name: `number ${n}` })}`),
    DbSession.autocommit
  )
  yield* show("inserted", users, ["number 500", "number 1000", "number 1500"])

  yield* say("left half-way, nothing stays behind")
  yield* show(
    "taken",
    Effect.map(Stream.runCollect(Stream.take(numbers(1_000_000).stream, 3)), (_) => _.length),
    3
  )
  yield* show("borrowed", borrowed, 0)
})

run(program)
