/**
 * Spans as somebody with OpenTelemetry sees them: with `@effect/opentelemetry` and an exporter in memory.
 */
import * as OtelTracer from "@effect/opentelemetry/Tracer"
import { Statement } from "@effect/sql"
import { describe, expect, it } from "@effect/vitest"
import { vi } from "vitest"
import { SpanKind, SpanStatusCode } from "@opentelemetry/api"
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from "@opentelemetry/sdk-trace-base"
import type { ReadableSpan } from "@opentelemetry/sdk-trace-base"
import {
  ATTR_DB_NAMESPACE,
  ATTR_DB_OPERATION_BATCH_SIZE,
  ATTR_DB_OPERATION_NAME,
  ATTR_DB_QUERY_SUMMARY,
  ATTR_DB_QUERY_TEXT,
  ATTR_DB_RESPONSE_STATUS_CODE,
  ATTR_DB_SYSTEM_NAME,
  ATTR_ERROR_TYPE,
  ATTR_SERVER_ADDRESS,
  ATTR_SERVER_PORT,
  DB_SYSTEM_NAME_VALUE_POSTGRESQL
} from "@opentelemetry/semantic-conventions"
import { atomic, DbEngine, DbError, DbQuery, DbSchema, DbSession, withTransaction } from "effect-db"
import { Effect, Layer, Stream, Tracer } from "effect"
import { testDatabase } from "./support/database.js"
import { insert, programsOn, proxiedOn, quietly, refused } from "./support/programs.js"
import { proxy } from "./support/proxy.js"
import { resource } from "./support/observed.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

/** Runs an effect under OpenTelemetry's tracer and gives the spans that were exported. */
const traced = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
  Effect.suspend(() => {
    const exporter = new InMemorySpanExporter()
    const provider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] })
    const layer = OtelTracer.layer.pipe(
      Layer.provide(Layer.succeed(OtelTracer.OtelTracerProvider, provider)),
      Layer.provide(resource)
    )
    return Effect.map(Effect.exit(Effect.provide(effect, layer)), (exit) => ({
      exit,
      spans: exporter.getFinishedSpans()
    }))
  })

interface Tree {
  readonly [name: string]: Tree
}

/** What stands in what; of the same name and place the last. */
const tree = (spans: ReadonlyArray<ReadableSpan>, parent?: ReadableSpan): Tree =>
  Object.fromEntries(
    spans
      .filter((span) =>
        parent === undefined
          ? !spans.some((_) => _.spanContext().spanId === span.parentSpanContext?.spanId)
          : span.parentSpanContext?.spanId === parent.spanContext().spanId
      )
      .map((span) => [span.name, tree(spans, span)])
  )

const named = (spans: ReadonlyArray<ReadableSpan>, name: string): ReadableSpan => {
  const found = spans.filter((span) => span.name === name)
  expect(found.length, `${name} among ${spans.map((_) => _.name).join(", ")}`).toBe(1)
  return found[0]!
}

const where = {
  [ATTR_DB_SYSTEM_NAME]: DB_SYSTEM_NAME_VALUE_POSTGRESQL,
  get [ATTR_DB_NAMESPACE]() {
    return database.database
  },
  get [ATTR_SERVER_ADDRESS]() {
    return database.host
  },
  get [ATTR_SERVER_PORT]() {
    return database.port
  }
}

const session = DbSession.autocommit

describe("spans of statements", () => {
  test("have the names and attributes of the conventions", () =>
    Effect.gen(function* () {
      const { spans } = yield* traced(
        Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT note FROM t WHERE id = ${7} AND note <> 'constant'`)
      )
      expect(spans.map((_) => [_.name, _.kind, _.status.code])).toEqual([
        ["SELECT t", SpanKind.CLIENT, SpanStatusCode.OK]
      ])
      expect(spans[0]!.attributes).toEqual({
        ...where,
        [ATTR_DB_QUERY_SUMMARY]: "SELECT t",
        [ATTR_DB_QUERY_TEXT]: "SELECT note FROM t WHERE id = $1 AND note <> ?"
      })
    }))

  test("of an error have its reason and its SQLSTATE, and no value", () =>
    Effect.gen(function* () {
      const secret = "4111111111111111"
      const { spans } = yield* traced(
        Effect.flatMap(DbEngine, ({ sql }) =>
          Effect.zipRight(
            sql`INSERT INTO t (id, note) VALUES (${1}, ${secret})`,
            sql`INSERT INTO t (id, note) VALUES (${1}, ${secret})`
          )
        )
      )
      expect(spans.map((_) => _.status.code)).toEqual([SpanStatusCode.OK, SpanStatusCode.ERROR])
      expect(spans[1]!.attributes).toEqual({
        ...where,
        [ATTR_DB_QUERY_SUMMARY]: "INSERT t",
        [ATTR_DB_QUERY_TEXT]: "INSERT INTO t (id, note) VALUES ($1, $2)",
        [ATTR_ERROR_TYPE]: "UniqueViolation",
        [ATTR_DB_RESPONSE_STATUS_CODE]: "23505"
      })
      expect(exported(spans)).not.toContain(secret)
    }))

  test("show nothing secret: no literal of a text without parameters, no parameter, no row, no password", () =>
    Effect.gen(function* () {
      const password = new URL(database.url).password
      const { spans } = yield* traced(
        Effect.gen(function* () {
          const { sql } = yield* DbSession
          yield* sql`SELECT ${"secret-1"}::text AS value`
          yield* sql.unsafe("SELECT 'secret-2', 987654321, $q$secret-3$q$ /* secret-4 */ -- secret-5")
          yield* Effect.exit(sql.unsafe("SELECT 'secret-6'::int"))
        }).pipe(withTransaction, Effect.ignore)
      )
      expect(spans.map((_) => _.name)).toEqual(["SELECT", "SELECT", "SELECT", "ROLLBACK", "sql.transaction"])
      const all = exported(spans)
      expect(all).not.toMatch(/secret-|987654321/)
      if (password !== "") expect(all).not.toContain(password)
    }))

  test("name the schema that names are looked up in", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* sql`CREATE SCHEMA IF NOT EXISTS "a ""b"`
      const { spans } = yield* traced(DbSchema.withSchema(sql`SELECT 1`, ['a "b', "public"]))
      expect(named(spans, "SELECT").attributes[ATTR_DB_NAMESPACE]).toBe(`${database.database}|a "b`)
    }))

  it.scopedLive("name the host that is really used: the second of two, and the one that was changed to", () =>
    Effect.gen(function* () {
      const first = yield* proxy(database.url)
      const second = yield* proxy(database.url)
      first.accept("refuse")
      const hosts = [first, second].map(({ host, port }) => ({ host, port }))
      const program = Effect.gen(function* () {
        const engine = yield* DbEngine
        yield* engine.sql`SELECT 1`
        yield* engine.changeHost({ host: database.host, port: database.port })
        yield* engine.sql`SELECT 2`
      })
      const { spans } = yield* traced(program).pipe(
        Effect.provide(quietly(DbEngine.layer({ url: database.url, hosts })))
      )
      expect(spans.map((_) => _.attributes[ATTR_SERVER_PORT])).toEqual([second.port, database.port])
    })
  )

  test("stand for a batch as a whole", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const one = sql`INSERT INTO t (id) VALUES (${1})`
      const { spans } = yield* traced(
        Effect.gen(function* () {
          yield* DbSession.batch([one, sql`INSERT INTO t (id) VALUES (${2})`])
          yield* session(DbSession.batch([sql`SELECT 1`, sql`SELECT id FROM t`]))
          yield* DbSession.batch([sql`SELECT note FROM t`])
        })
      )
      expect(spans.map((_) => _.name)).toEqual(["BATCH INSERT t", "BATCH", "COMMIT", "sql.session", "SELECT t"])
      expect(spans[0]!.attributes).toEqual({
        ...where,
        [ATTR_DB_OPERATION_NAME]: "BATCH",
        [ATTR_DB_OPERATION_BATCH_SIZE]: 2,
        [ATTR_DB_QUERY_SUMMARY]: "BATCH INSERT t",
        [ATTR_DB_QUERY_TEXT]: "INSERT INTO t (id) VALUES ($1)"
      })
      expect(spans[1]!.attributes[ATTR_DB_QUERY_TEXT]).toBe("SELECT ?; SELECT id FROM t")
      expect(spans[4]!.attributes[ATTR_DB_OPERATION_BATCH_SIZE]).toBeUndefined()
    }))

  test("last as long as a stream is read, one for all its fetches", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      yield* sql`INSERT INTO t (id) SELECT generate_series(1, 1200)`
      const { spans } = yield* traced(Stream.runDrain(sql`SELECT id FROM t`.stream))
      expect(spans.map((_) => _.name)).toEqual(["COMMIT", "SELECT t"])
      expect(spans[1]!.attributes).toEqual({
        ...where,
        [ATTR_DB_QUERY_SUMMARY]: "SELECT t",
        [ATTR_DB_QUERY_TEXT]: "SELECT id FROM t"
      })
      const failing = yield* traced(Effect.exit(Stream.runDrain(sql`SELECT id FROM missing`.stream)))
      expect(named(failing.spans, "SELECT missing").attributes[ATTR_ERROR_TYPE]).toBe("SqlSyntaxError")
    }))

  test("cover COPY", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const { spans } = yield* traced(DbQuery.copyFrom(sql`COPY t (id, note) FROM STDIN`, Stream.make("1\tsecret-1\n")))
      expect(named(spans, "COPY t").attributes).toEqual({
        ...where,
        [ATTR_DB_QUERY_SUMMARY]: "COPY t",
        [ATTR_DB_QUERY_TEXT]: "COPY t (id, note) FROM STDIN"
      })
      expect(exported(spans)).not.toContain("secret-1")
    }))

  test("are those of the statement that a transformer has made", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const changed = Statement.withTransformer((self, sql) => Effect.succeed(sql`${self} LIMIT 1`))
      const { spans } = yield* traced(
        Effect.zipRight(changed(sql`SELECT id FROM t`), changed(Stream.runDrain(sql`SELECT note FROM t`.stream)))
      )
      expect(spans.map((_) => _.attributes[ATTR_DB_QUERY_TEXT])).toEqual([
        "SELECT id FROM t LIMIT ?",
        "COMMIT",
        "SELECT note FROM t LIMIT ?"
      ])
    }))

  test(
    "carry the attributes of the option spanAttributes",
    () =>
      Effect.gen(function* () {
        const { spans } = yield* traced(Effect.flatMap(DbEngine, ({ sql }) => sql`SELECT 1`))
        expect(spans[0]!.attributes["peer.service"]).toBe("ledger")
      }),
    { spanAttributes: { "peer.service": "ledger" } }
  )

  test("are not made where nobody looks", () =>
    Effect.gen(function* () {
      const made: Array<string> = []
      const spy = Tracer.make({
        span: (name) => {
          made.push(name)
          throw new Error("a span was made")
        },
        context: (f) => f()
      })
      const native = vi.spyOn(yield* Effect.tracer, "span")
      yield* session(Effect.zipRight(insert(1), withTransaction(insert(2))))
      expect(native).toHaveBeenCalledTimes(0)
      native.mockRestore()
      const exit = yield* Effect.exit(Effect.withTracer(insert(3), spy))
      expect(exit._tag).toBe("Failure")
      expect(made).toEqual(["INSERT t"])
    }))

  test("follow a span of the user's without a tracer of another make", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbEngine
      const seen = yield* Effect.withSpan(
        Effect.zipRight(
          sql`SELECT 1`,
          Effect.map(Effect.currentSpan, (_) => _.name)
        ),
        "mine"
      )
      expect(seen).toBe("mine")
    }))
})

/** Everything that leaves the process. */
const exported = (spans: ReadonlyArray<ReadableSpan>): string =>
  JSON.stringify(
    spans.map(({ attributes, events, links, name, status }) => ({ attributes, events, links, name, status }))
  )

const outcomes = (spans: ReadonlyArray<ReadableSpan>) =>
  spans.filter((_) => _.name.startsWith("sql.")).map((_) => [_.name, _.attributes["effect_db.outcome"]])

describe("spans of sessions and transactions", () => {
  test("have the statements in them, and how they ended", () =>
    Effect.gen(function* () {
      const { spans } = yield* traced(
        Effect.zipRight(insert(1), withTransaction(insert(2), { name: "inner" })).pipe(
          session({ isolation: "serializable", name: "outer" }),
          Effect.withSpan("request")
        )
      )
      expect(tree(spans)).toEqual({
        request: { "sql.session": { "INSERT t": {}, "sql.savepoint": { "INSERT t": {} }, COMMIT: {} } }
      })
      expect(named(spans, "sql.session").attributes).toEqual({
        "effect_db.database": "default",
        "effect_db.name": "outer",
        "effect_db.isolation": "serializable",
        "effect_db.outcome": "committed"
      })
      expect(named(spans, "sql.savepoint").attributes).toEqual({
        "effect_db.database": "default",
        "effect_db.name": "inner",
        "effect_db.outcome": "released"
      })
      expect(named(spans, "sql.session").kind).toBe(SpanKind.INTERNAL)
      expect(named(spans, "COMMIT").attributes).toEqual({
        ...where,
        [ATTR_DB_QUERY_SUMMARY]: "COMMIT",
        [ATTR_DB_QUERY_TEXT]: "COMMIT"
      })
    }))

  test("tell by events what rode in front of a statement, and when it went out", () =>
    Effect.gen(function* () {
      const { spans } = yield* traced(
        withTransaction(
          withTransaction(Effect.zipRight(insert(1), insert(2)), { settings: { "app.user": "secret-1" } }),
          {
            isolation: "repeatable read"
          }
        )
      )
      const events = spans
        .filter((_) => _.name === "INSERT t")
        .map((_) => _.events.map(({ attributes, name }) => [name, attributes?.[ATTR_DB_QUERY_TEXT]]))
      expect(events[0]![0]).toEqual(["BEGIN", "BEGIN ISOLATION LEVEL REPEATABLE READ"])
      expect(events[0]![1]![0]).toBe("SAVEPOINT")
      expect(events[0]!.at(-1)).toEqual(["sent", undefined])
      expect(events[1]).toEqual([["sent", undefined]])
      expect(exported(spans)).not.toContain("secret-1")
    }))

  test("say committed, rolled back, released and none", () =>
    Effect.gen(function* () {
      const { spans } = yield* traced(
        Effect.gen(function* () {
          yield* withTransaction(insert(1))
          yield* Effect.ignore(withTransaction(Effect.zipRight(insert(2), Effect.fail("no"))))
          yield* session(
            Effect.gen(function* () {
              yield* insert(3)
              yield* Effect.ignore(withTransaction(refused))
              yield* withTransaction(insert(4))
              yield* withTransaction(Effect.void)
            })
          )
          yield* DbSession.isolated(Effect.void)
          yield* session(Effect.zipRight(insert(5), atomic(insert(6))))
          yield* withTransaction((tx) => Effect.zipRight(insert(7), tx.end("rollback", 1)))
        })
      )
      expect(outcomes(spans)).toEqual([
        ["sql.transaction", "committed"],
        ["sql.transaction", "rolled back"],
        ["sql.savepoint", "rolled back"],
        ["sql.savepoint", "released"],
        ["sql.savepoint", "none"],
        ["sql.session", "committed"],
        ["sql.session", "none"],
        ["sql.transaction", "committed"],
        ["sql.session", "committed"],
        ["sql.transaction", "rolled back"]
      ])
    }))

  proxied("say unknown when the answer to COMMIT is lost", (via) =>
    Effect.gen(function* () {
      const cut = via.cutAfter((_) => _.dir === "frontend" && _.text === "COMMIT", { forward: true })
      const { spans } = yield* traced(withTransaction(insert(1)))
      yield* Effect.promise(() => cut)
      const transaction = named(spans, "sql.transaction")
      expect(transaction.attributes["effect_db.outcome"]).toBe("unknown")
      expect(transaction.attributes[ATTR_ERROR_TYPE]).toBe("CommitUnknown")
      expect(named(spans, "COMMIT").attributes[ATTR_ERROR_TYPE]).toBe("ConnectionError")
    })
  )

  test("are one for each attempt", () =>
    Effect.gen(function* () {
      let runs = 0
      const { spans } = yield* traced(
        Effect.suspend(() =>
          ++runs < 3
            ? Effect.zipRight(insert(1), Effect.fail(DbError.make("DeadlockError", { message: "again", hint: "" })))
            : insert(1)
        ).pipe(withTransaction({ retry: true }))
      )
      expect(
        spans
          .filter((_) => _.name === "sql.transaction")
          .map((_) => [
            _.attributes["effect_db.attempt"],
            _.attributes["effect_db.outcome"],
            _.attributes[ATTR_ERROR_TYPE]
          ])
      ).toEqual([
        [1, "rolled back", "DeadlockError"],
        [2, "rolled back", "DeadlockError"],
        [3, "committed", undefined]
      ])
    }))

  test("are none for a scope form: its statements and its COMMIT are in the span around the scope", () =>
    Effect.gen(function* () {
      const { spans } = yield* traced(
        Effect.scoped(Effect.flatMap(DbSession.scoped(), ({ sql }) => sql`INSERT INTO t (id) VALUES (1)`)).pipe(
          Effect.withSpan("request")
        )
      )
      expect(tree(spans)).toEqual({ request: { "INSERT t": {}, COMMIT: {} } })
    }))

  test("of parallel sessions hold the statements of their own fibers", () =>
    Effect.gen(function* () {
      const { spans } = yield* traced(
        Effect.all(
          [1, 2, 3].map((id) => DbSession.isolated(insert(id), { name: `s${id}` })),
          {
            concurrency: "unbounded"
          }
        ).pipe(Effect.withSpan("all"))
      )
      for (const session of spans.filter((_) => _.name === "sql.session")) {
        expect(tree(spans, session)).toEqual({ "INSERT t": {}, COMMIT: {} })
      }
      expect(outcomes(spans)).toEqual(Array(3).fill(["sql.session", "committed"]))
    }))
})
