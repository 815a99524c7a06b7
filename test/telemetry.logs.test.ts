/**
 * What is written into the log, and what into the statements themselves.
 */
import { describe, expect, it } from "@effect/vitest"
import { DbConnection, DbEngine, DbLayer, DbQuery, DbSession, withTransaction } from "effect-db"
import type { DbOptions } from "effect-db"
import * as OtelTracer from "@effect/opentelemetry/Tracer"
import { BasicTracerProvider } from "@opentelemetry/sdk-trace-base"
import { Deferred, Effect, Fiber, Layer, Stream } from "effect"
import { testDatabase } from "./support/database.js"
import { expectAtRest, programsOn, proxiedOn, reason, table, whileFull } from "./support/programs.js"
import { pending, until } from "./support/until.js"
import type { Services } from "./support/programs.js"
import { collected, resource, sameSpan, type Line } from "./support/observed.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

/** A program and the lines that are logged meanwhile, by its fibers and by the engine. */
const logged = (
  name: string,
  program: (lines: ReadonlyArray<Line>) => Effect.Effect<void, unknown, Services>,
  options: DbOptions = {}
) => {
  it.scopedLive(name, () =>
    Effect.suspend(() => {
      const [lines, logger] = collected()
      // The engine logs as well: its layer is built under the same logger.
      return Effect.zipLeft(Effect.zipRight(database.query(table), program(lines)), expectAtRest(database)).pipe(
        Effect.provide(DbLayer({ url: database.url, ...options })),
        Effect.provide(logger)
      )
    })
  )
}

const warnings = (lines: ReadonlyArray<Line>): ReadonlyArray<string> =>
  lines.map((_) => _.message).filter((_) => !_.includes("was built twice"))

describe("slowStatement", () => {
  logged(
    "logs a statement that takes longer, with its text masked, and who ran it; no parameter",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        yield* sql`SELECT pg_sleep(0.1), ${"secret-1"}::text, 'secret-2'`.pipe(DbSession.autocommit({ name: "report" }))
        yield* sql`SELECT 1`
        const [line, ...others] = lines.filter((_) => _.message.includes("took"))
        expect(others).toEqual([])
        expect(line!.level).toBe("WARN")
        expect(line!.message).toMatch(
          /^effect-db: a statement of "report" took \d+ ms, after \d+ ms until it was sent: SELECT pg_sleep\(0\.1\), \$1::text, \?$/
        )
        expect(line!.annotations).toMatchObject({ "effect_db.database": "default", "effect_db.holder": "report" })
        expect(JSON.stringify(lines)).not.toContain("secret-")
      }),
    { slowStatement: "80 millis" }
  )

  logged(
    "counts from the moment it is sent: a wait for the pool is no slow statement",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const waiter = yield* whileFull(
          // Longer than is slow.
          Effect.zipLeft(Effect.fork(sql`SELECT 1`), Effect.zipRight(pending(1), Effect.sleep("1200 millis")))
        )
        yield* Fiber.join(waiter)
        expect(warnings(lines)).toEqual([])
      }),
    { slowStatement: "1 second", maxConnections: 1 }
  )

  logged(
    "logs one that fails as well, and a statement on a connection by the connection's name",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const slow = sql`SELECT 1 / CASE WHEN pg_sleep(0.1)::text = ${""} THEN 0 END`
        yield* Effect.ignore(slow)
        yield* DbConnection.withConnection(slow).pipe(Effect.ignore)
        expect(warnings(lines).map((_) => /a statement of "(\w+)/.exec(_)?.[1])).toEqual(["implicit", "connection"])
      }),
    { slowStatement: "80 millis" }
  )

  logged(
    "logs a batch as a whole, in a session and outside of any",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const batch = DbSession.batch([sql`SELECT 1`, sql`SELECT pg_sleep(0.1)`])
        yield* batch
        yield* DbSession.autocommit(batch, { name: "report" })
        expect(warnings(lines).map((_) => /a statement of "(\w+).* sent: (.*)/.exec(_)?.slice(1))).toEqual([
          ["implicit", "SELECT ?; SELECT pg_sleep(?)"],
          ["report", "SELECT ?; SELECT pg_sleep(?)"]
        ])
      }),
    { slowStatement: "80 millis" }
  )

  const slow = (lines: ReadonlyArray<Line>): ReadonlyArray<string> =>
    warnings(lines).map((_) => _.replace(/\d+ ms/g, "… ms"))

  logged(
    "adds up what the server takes for a stream, of which no fetch is slow by itself",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        // Of 20 rows and of 40.
        const rows = sql`SELECT pg_sleep(0.01), ${"secret-1"}::text, 'secret-2' FROM generate_series(1, 60)`.stream
        const read = yield* Stream.runCount(rows).pipe(DbSession.autocommit({ name: "export" }))
        expect(read).toBe(60)
        expect(slow(lines)).toEqual([
          'effect-db: a stream of "export" took … ms, after … ms until it was sent: SELECT pg_sleep(0.01), $1::text, ? FROM generate_series(1, 60)'
        ])
        expect(Number(/took (\d+) ms/.exec(warnings(lines)[0]!)![1])).toBeGreaterThanOrEqual(600)
        expect(JSON.stringify(lines)).not.toContain("secret-")
      }),
    { slowStatement: "550 millis" }
  )

  logged(
    "does not count what the reader of a stream takes",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const rows = sql`SELECT id FROM generate_series(1, 60) AS id`.stream
        yield* Stream.runForEachChunk(rows, () => Effect.sleep("600 millis"))
        expect(warnings(lines)).toEqual([])
      }),
    { slowStatement: "1 second" }
  )

  logged(
    "logs a stream that fails or is left, and one that has no cursor",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        yield* Effect.ignore(Stream.runDrain(sql`SELECT 1 / (length(pg_sleep(0.1)::text) * 0)`.stream))
        yield* Stream.runDrain(Stream.take(sql`SELECT pg_sleep(0.005) FROM generate_series(1, 30)`.stream, 1))
        const made = sql`INSERT INTO t (id) SELECT 1 FROM pg_sleep(0.1) RETURNING id`.stream
        yield* DbConnection.withConnection(Stream.runDrain(made))
        expect(warnings(lines).map((_) => /a stream of "(\w+).* sent: (\w+)/.exec(_)?.slice(1))).toEqual([
          ["implicit", "SELECT"],
          ["implicit", "SELECT"],
          ["connection", "INSERT"]
        ])
      }),
    { slowStatement: "80 millis" }
  )

  logged(
    "takes COPY as a whole, in and out",
    (lines) =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const source = Stream.fromEffect(Effect.delay(Effect.succeed("1\tsecret-1\n"), "100 millis"))
        yield* DbQuery.copyFrom(sql`COPY t (id, note) FROM STDIN`, source).pipe(
          DbSession.autocommit({ name: "import" })
        )
        yield* Stream.runDrain(DbQuery.copyTo(sql`COPY (SELECT pg_sleep(0.1), 'secret-2') TO STDOUT`))
        expect(slow(lines)).toEqual([
          'effect-db: a statement of "import" took … ms, after … ms until it was sent: COPY t (id, note) FROM STDIN',
          'effect-db: a statement of "implicit statement" took … ms, after … ms until it was sent: COPY (SELECT pg_sleep(?), ?) TO STDOUT'
        ])
        expect(JSON.stringify(lines)).not.toContain("secret-")
      }),
    { slowStatement: "80 millis" }
  )

  logged("is off by default", (lines) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* sql`SELECT pg_sleep(0.1)`
      yield* Stream.runDrain(sql`SELECT pg_sleep(0.1)`.stream)
      expect(warnings(lines)).toEqual([])
    })
  )
})

describe("leakTimeout", () => {
  logged(
    "logs who keeps a connection for longer, once, while it is still kept",
    (lines) =>
      Effect.gen(function* () {
        const release = yield* Deferred.make<void>()
        const { sql } = yield* DbSession
        const leaking = yield* Effect.fork(
          DbSession.isolated(Effect.zipRight(sql`SELECT 1`, Deferred.await(release)), { name: "leaky" })
        )
        yield* DbSession.isolated(sql`SELECT 1`, { name: "tidy" })
        yield* until(
          "it was logged",
          Effect.sync(() => warnings(lines).length > 0)
        )
        yield* Deferred.succeed(release, undefined)
        yield* Fiber.join(leaking)
        expect(warnings(lines)).toEqual([
          'effect-db: "leaky" has held a connection of "default" for 50 ms. Is it never released?'
        ])
      }),
    { leakTimeout: "50 millis" }
  )
})

const parent = "traceparent='00-d4cda95b652f4a1592b449d5929fda1b-6e0c63257de34c92-01'"

describe("sqlCommenter", () => {
  proxied("is off by default", (via) =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      via.reset()
      yield* Effect.withTracer(sql`SELECT 1`, sameSpan(true))
      expect(via.statements()).toEqual(["SELECT 1"])
    })
  )

  proxied(
    "names the span, sends such a statement unnamed, and leaves what runs without a span prepared",
    (via) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const names = () =>
          via.log
            .filter((_) => _.dir === "frontend" && _.type === "P")
            .map((_) => [_.name === "" ? "" : "named", _.text])
        via.reset()
        yield* Effect.withTracer(sql`SELECT ${1}::int`, sameSpan(true))
        expect(names()).toEqual([["", `SELECT $1::int /*${parent}*/`]])
        via.reset()
        yield* Effect.withTracer(sql`SELECT ${1}::int`, sameSpan(false))
        yield* sql`SELECT ${2}::int`
        expect(names()).toEqual([["named", "SELECT $1::int"]])
        expect(via.flights()).toBe(2)
      }),
    { sqlCommenter: true }
  )

  const traceId = "d4cda95b652f4a1592b449d5929fda1b"
  const elsewhere = (traceState?: string) =>
    OtelTracer.makeExternalSpan({ traceId, spanId: "00f067aa0ba902b7", traceFlags: 1, traceState })
  const otel = OtelTracer.layer.pipe(
    Layer.provide(Layer.succeed(OtelTracer.OtelTracerProvider, new BasicTracerProvider())),
    Layer.provide(resource)
  )

  proxied(
    "has the trace state of a span from elsewhere, under OpenTelemetry's tracer and any other",
    (via) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const state = "tracestate='congo%3Dt61rcWkgMzE%2Crojo%3D00f067aa0ba902b7'"
        const parent = elsewhere("congo=t61rcWkgMzE,rojo=00f067aa0ba902b7")
        const under = Effect.withParentSpan(Effect.withSpan(sql`SELECT 1`, "outer"), parent)
        via.reset()
        yield* Effect.withTracer(under, sameSpan(true))
        yield* Effect.provide(under, otel)
        const [any, opentelemetry] = via.statements()
        expect(any).toBe(`SELECT 1 /*traceparent='00-${traceId}-6e0c63257de34c92-01',${state}*/`)
        expect(opentelemetry!.replace(/-[\da-f]{16}-01/, "-it-01")).toBe(
          `SELECT 1 /*traceparent='00-${traceId}-it-01',${state}*/`
        )
        via.reset()
        yield* Effect.provide(Effect.withParentSpan(sql`SELECT 1`, elsewhere()), otel)
        expect(via.statements()[0]).toMatch(/^SELECT 1 \/\*traceparent='[^']*'\*\/$/)
      }),
    { sqlCommenter: true }
  )

  proxied(
    "encodes and sorts, and constant tags keep statements prepared",
    (via) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const statement = (n: number) => sql`SELECT ${n}::int`
        yield* statement(1)
        via.reset()
        expect(yield* statement(2)).toEqual([{ int4: 2 }])
        expect(via.statements()).toEqual(
          ["SELECT $1::int /*app='it\\'s%20%2A%2F',route='%2Fa%2F%3Aid'*/"].map((_) => _.replace("%2A", "*"))
        )
        // Known by its name: nothing was parsed.
        expect(via.log.filter((_) => _.dir === "frontend" && _.type === "P")).toEqual([])
      }),
    { sqlCommenter: { traceparent: false, tags: { route: "/a/:id", app: "it's */" } } }
  )

  proxied(
    "leaves a statement alone that has a comment, and reaches batches and streams",
    (via) =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        via.reset()
        yield* sql.unsafe("SELECT 1 -- mine")
        yield* DbSession.batch([sql`SELECT 2`, sql`SELECT 3`])
        expect(via.statements()).toEqual(["SELECT 1 -- mine", "SELECT 2 /*a='b'*/", "SELECT 3 /*a='b'*/"])
      }),
    { sqlCommenter: { tags: { a: "b" } } }
  )

  test(
    "keeps errors as they are: where the server points to, and no comment in the message",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbEngine
        const error = yield* Effect.flip(withTransaction(sql`SELECT missing FROM t`))
        expect(yield* reason(Effect.fail(error))).toBe("SqlSyntaxError")
        expect(JSON.stringify(error) + String(error)).not.toContain("/*")
      }),
    { sqlCommenter: { tags: { a: "b" } } }
  )

  it.live("refuses tags that are no strings", () =>
    Effect.gen(function* () {
      const make = DbEngine.make({ url: database.url, sqlCommenter: { tags: { a: 1 as never } } })
      expect(yield* reason(Effect.scoped(Effect.asVoid(make)))).toBe("InvalidInput")
    })
  )
})
