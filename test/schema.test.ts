import { SqlClient } from "@effect/sql"
import type { SqlError } from "@effect/sql/SqlError"
import { describe } from "@effect/vitest"
import { Chunk, Deferred, Effect, Exit, Fiber, Option, Redacted, Stream } from "effect"
import {
  Database,
  DbConnection,
  DbEngine,
  DbError,
  DbQuery,
  DbRegistry,
  DbSchema,
  DbSession,
  type EngineService,
  withTransaction
} from "effect-db"
import { beforeAll, expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { type Around, path, pid, programsOn, proxiedOn, quietly, reason, refused } from "./support/programs.js"
import type { PgProxy } from "./support/proxy.js"

const database = testDatabase()
const test = programsOn(database)
const proxied = proxiedOn(database)

const schemas = Array.from({ length: 10 }, (_, i) => `s${i}`)

beforeAll(async () => {
  const { Client } = (await import("pg")).default
  const client = new Client({ connectionString: database.url })
  await client.connect()
  await client.query("CREATE TABLE who AS SELECT 'public' AS name")
  for (const name of schemas) {
    await client.query(`CREATE SCHEMA ${name}; CREATE TABLE ${name}.who AS SELECT '${name}' AS name`)
  }
  await client.query(
    `CREATE FUNCTION who_f() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN (SELECT name FROM who); END $$`
  )
  await client.query("CREATE TABLE s0.v (x int); INSERT INTO s0.v VALUES (1)")
  await client.query("CREATE TABLE s1.v (x text); INSERT INTO s1.v VALUES ('one')")
  await client.end()
})

/** In which schema an unqualified name is found. */
const who = Effect.flatMap(DbSession, ({ sql }) =>
  Effect.map(sql<{ name: string }>`SELECT name FROM who`, ([row]) => row!.name)
)
const usual = '"$user", public'

const holder: { engine?: EngineService } = {}

const { using, withSchema, withTenant } = DbSchema

describe("55 using > tenant > schema > default", () => {
  const levels = [
    ["schema", withSchema("s1")],
    ["tenant", withTenant("s2")],
    ["using", using("s3")]
  ] as const

  test("nothing: the engine's default", () =>
    Effect.gen(function* () {
      expect(yield* who).toBe("public")
      expect(yield* DbSchema.current).toEqual(Option.none())
    }))

  for (const [name, level] of levels) {
    test(`${name} alone`, () =>
      Effect.gen(function* () {
        const expected = { schema: "s1", tenant: "s2", using: "s3" }[name]
        expect(yield* level(who)).toBe(expected)
        expect(yield* level(DbSession.autocommit(who))).toBe(expected)
        expect(yield* DbSession.autocommit(level(who))).toBe(expected)
        expect(yield* level(DbSchema.current)).toEqual(Option.some(`"${expected}"`))
        expect(yield* who).toBe("public")
      }))
  }

  const permutations: ReadonlyArray<readonly [number, number, number]> = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0]
  ]
  for (const order of permutations) {
    test(`whichever is inside: ${order.map((i) => levels[i]![0]).join(" > ")}`, () =>
      Effect.gen(function* () {
        const around = (order: ReadonlyArray<number>) =>
          order.reduceRight<Effect.Effect<string, SqlError, DbSession | DbEngine>>(
            (inner, i) => levels[i]![1](inner),
            who
          )
        expect(yield* around(order)).toBe("s3")
        expect(yield* around(order.filter((i) => i !== 2))).toBe("s2")
      }))
  }

  for (const [name, at] of [
    ["withSchema", withSchema],
    ["withTenant", withTenant],
    ["using", using]
  ] as const) {
    test(`${name}: the inner one wins, and the outer one is back afterwards, also after a failure`, () =>
      Effect.gen(function* () {
        const nested = Effect.gen(function* () {
          const before = yield* who
          const inner = yield* at(who, "s5")
          yield* Effect.ignore(at(Effect.fail("no"), "s6"))
          yield* Effect.ignore(at(refused, "s7"))
          return [before, inner, yield* who]
        })
        expect(yield* at(nested, "s4")).toEqual(["s4", "s5", "s4"])
        expect(yield* at(who, ["s8", "s9"])).toBe("s8")
        expect(yield* at(path, ["s8", "public"])).toBe('"s8", "public"')
      }))

    test(`${name}: in one transaction the path changes and comes back, also to the default`, () =>
      Effect.gen(function* () {
        const seen = yield* DbSession.autocommit(
          Effect.all([who, at(who, "s1"), who, at(Effect.all([who, at(who, "s2"), who]), "s1"), path])
        )
        expect(seen).toEqual(["public", "s1", "public", ["s1", "s2", "s1"], usual])
      }))
  }

  test("children inherit it; a child's own does not leak back", () =>
    Effect.gen(function* () {
      const seen = yield* withSchema(
        Effect.gen(function* () {
          const child = yield* Effect.fork(withSchema(who, "s2"))
          return [yield* Fiber.join(child), yield* Effect.flatMap(Effect.forkDaemon(who), Fiber.join), yield* who]
        }),
        "s1"
      )
      expect(seen).toEqual(["s2", "s1", "s1"])
    }))

  test("detach leaves the session and keeps the tenant", () =>
    withTenant(
      DbSession.autocommit(
        Effect.gen(function* () {
          const inside = yield* pid
          const [name, other] = yield* DbSession.detach(Effect.all([who, pid]))
          expect(name).toBe("s1")
          expect(other).not.toBe(inside)
        })
      ),
      "s1"
    ))

  test("every kind of statement runs in it, in a session and outside", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const client = yield* SqlClient.SqlClient
      const name = ([row]: ReadonlyArray<unknown>) => (row as { name: string }).name
      const kinds = Effect.gen(function* () {
        const text = sql<{ name: string }>`SELECT name FROM who`
        const [one, two] = yield* DbSession.batch([text, text])
        const copied = yield* Stream.runCollect(DbQuery.copyTo(sql`COPY (SELECT name FROM who) TO STDOUT`))
        return [
          name(yield* text),
          name(yield* sql.unsafe("SELECT name FROM who")),
          name(yield* client`SELECT name FROM who`),
          (yield* text.values)[0]![0],
          name(yield* text.withoutTransform),
          name(Chunk.toReadonlyArray(yield* Stream.runCollect(text.stream))),
          name(one),
          name(two),
          Buffer.concat(Chunk.toReadonlyArray(copied)).toString().trim()
        ]
      })
      expect(new Set(yield* withSchema(kinds, "s1"))).toEqual(new Set(["s1"]))
      expect(new Set(yield* withSchema(DbSession.autocommit(kinds), "s2"))).toEqual(new Set(["s2"]))
      expect(new Set(yield* DbSession.autocommit(withSchema(kinds, "s3")))).toEqual(new Set(["s3"]))
      expect(new Set(yield* DbConnection.withConnection(withSchema(kinds, "s4")))).toEqual(new Set(["s4"]))
      expect(new Set(yield* DbSession.autocommit(kinds))).toEqual(new Set(["public"]))
    }))

  test("several statements in one text, all of them, and nothing is left behind", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const two = sql.unsafe("CREATE TABLE several (x int); INSERT INTO several VALUES (7)")
      yield* withSchema(two, "s6")
      yield* DbSession.autocommit(withSchema(two, "s7"))
      expect(yield* path).toBe(usual)
      expect(
        yield* database.query("SELECT (SELECT x FROM s6.several) AS six, (SELECT x FROM s7.several) AS seven")
      ).toEqual([{ six: 7, seven: 7 }])
    }))

  test(
    "a failed text of several statements leaves no path behind",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        expect(yield* reason(withSchema(sql.unsafe("SELECT 1; SELECT nonsense"), "s6"))).toBe("SqlSyntaxError")
        expect(yield* path).toBe(usual)
      }),
    { maxConnections: 1 }
  )

  test("rows of a cursor come from where it was opened, while statements of the loop run elsewhere", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const rows = sql<{ name: string; n: number }>`SELECT name, n FROM who, generate_series(1, 1500) AS n`.stream
      const counted = yield* DbSession.autocommit(
        withSchema(
          Stream.runFold(
            Stream.mapEffect(rows, (row) =>
              row.n % 500 === 0
                ? Effect.map(withSchema(who, "s2"), (inner) => `${row.name} ${inner}`)
                : Effect.succeed(row.name)
            ),
            new Map<string, number>(),
            (seen, name) => seen.set(name, (seen.get(name) ?? 0) + 1)
          ),
          "s1"
        )
      )
      expect([...counted]).toEqual([
        ["s1", 1497],
        ["s1 s2", 3]
      ])
    }))

  // The body of a function looks its names up when a row is fetched.
  const called = Effect.map(
    DbSession,
    ({ sql }) => sql<{ name: string }>`SELECT public.who_f() AS name FROM generate_series(1, 1200)`.stream
  )
  // Statements of the loop change the path in between, where they are the session's.
  const between = withSchema(who, "s2")
  const places: ReadonlyArray<
    readonly [name: string, around: Around, inner: Effect.Effect<unknown, SqlError, DbSession | DbEngine>]
  > = [
    ["on a connection of its own", (effect) => effect, Effect.void],
    ["on an ambient connection", (effect) => DbConnection.withConnection(effect), Effect.void],
    ["in a session", (effect) => DbSession.autocommit(effect), between],
    ["in a block", (effect) => withTransaction(effect), between]
  ]
  for (const [name, around, inner] of places) {
    test(`a function that a cursor calls, ${name}, finds the tables of where it was opened`, () =>
      Effect.gen(function* () {
        const seen = Effect.flatMap(called, (stream) =>
          Stream.mapEffect(stream, ({ name }) => Effect.as(inner, name)).pipe(
            Stream.take(600),
            Stream.runCollect,
            Effect.map((names) => [...new Set(names)])
          )
        )
        expect(yield* withTenant(around(seen), "s1")).toEqual(["s1"])
        expect(yield* around(withSchema(seen, "s1"))).toEqual(["s1"])
        expect(yield* around(seen)).toEqual(["public"])
        expect(yield* path).toBe(usual)
      }))
  }

  test("a cursor that is read on in another tenant stays with the one in which it was opened", () =>
    DbSession.autocommit(
      Effect.scoped(
        Effect.gen(function* () {
          const pull = yield* Effect.flatMap(called, Stream.toPull)
          const seen = new Set<string>()
          const next = Effect.map(pull, (rows) => {
            for (const { name } of rows) seen.add(name)
          })
          yield* withTenant(next, "s1")
          expect(yield* Effect.flip(withTenant(Effect.forever(next), "s2"))).toEqual(Option.none())
          expect([...seen]).toEqual(["s1"])
        })
      )
    ))

  test(
    "what a connection has by itself comes back, whoever has set it",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        holder.engine = yield* DbEngine
        // The engine's default, by afterConnect.
        expect(yield* who).toBe("s9")
        expect(
          yield* DbSession.autocommit(Effect.all([withSchema(who, "s1"), who, withSchema(who, "s2"), who]))
        ).toEqual(["s1", "s9", "s2", "s9"])
        // The user's own, in the transaction.
        const chosen = yield* DbSession.autocommit(
          Effect.all([sql`SET LOCAL search_path TO s8`, withSchema(who, "s1"), who])
        )
        expect(chosen.slice(1)).toEqual(["s1", "s8"])
        // Even none at all.
        const none = yield* DbSession.autocommit(
          Effect.all([sql`SET LOCAL search_path TO ''`, withSchema(who, "s1"), path])
        )
        expect(none.slice(1)).toEqual(["s1", '""'])
      }),
    {
      maxConnections: 1,
      afterConnect: Effect.suspend(() => Effect.asVoid(holder.engine!.sql`SET search_path TO s9`))
    }
  )

  test("another database's statements have its own default", () =>
    Effect.gen(function* () {
      const Other = Database.make("schema-test-other")
      const layer = quietly(Other.DbLayer({ url: database.url }))
      const there = Effect.flatMap(Other.DbSession, ({ sql }) =>
        Effect.map(sql<{ name: string }>`SELECT name FROM who`, ([row]) => row!.name)
      )
      yield* Effect.gen(function* () {
        expect(yield* withSchema(Effect.all([who, there]), "s1")).toEqual(["s1", "public"])
        // Its own schema, where it stands for the default database.
        const both = DbRegistry.using(withSchema(Effect.all([who, there]), "s2"), Other)
        expect(yield* withSchema(both, "s1")).toEqual(["s2", "s2"])
      }).pipe(Effect.provide(layer))
    }))
})

describe("never mixed", () => {
  test(
    "a hundred fibers with different schemas over four connections",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const started = yield* Deferred.make<void>()
        const own = (i: number) => {
          const mine = schemas[i % 10]!
          const next = schemas[(i + 1) % 10]!
          const twice = Effect.zipWith(who, Effect.zipRight(Effect.yieldNow(), who), (a, b) => [a, b])
          const work = [
            twice,
            DbSession.autocommit(twice),
            withTransaction(Effect.zipWith(who, withTransaction(who), (a, b) => [a, b])),
            DbSession.autocommit(
              Effect.map(Effect.all([who, withSchema(who, next), who]), ([a, b, c]) => [a, b === next ? c : b])
            ),
            DbSession.autocommit(Effect.all([who, who], { concurrency: "unbounded" })),
            DbConnection.withConnection(twice),
            // One that fails, and whose transaction is rolled back.
            Effect.zipRight(Effect.ignore(DbSession.autocommit(Effect.zipRight(sql`SELECT nonsense`, who))), twice)
          ][i % 7]!
          return Effect.map(Effect.zipRight(Deferred.await(started), withTenant(work, mine)), (seen) => [mine, ...seen])
        }
        const fibers = yield* Effect.forEach(
          Array.from({ length: 100 }, (_, i) => own(i)),
          Effect.fork
        )
        yield* Deferred.succeed(started, undefined)
        for (const fiber of fibers) {
          const [mine, ...seen] = yield* Fiber.join(fiber)
          expect(new Set(seen)).toEqual(new Set([mine]))
        }
        // Nor has the pool carried one over.
        const left = yield* Effect.all(
          Array.from({ length: 4 }, () => DbSession.isolated(Effect.zip(path, pid))),
          { concurrency: 4 }
        )
        expect(new Set(left.map(([path]) => path))).toEqual(new Set([usual]))
      }),
    { maxConnections: 4, acquireTimeout: "20 seconds" }
  )

  test("siblings of one session, each with its own schema", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        const seen = yield* Effect.all(
          schemas.flatMap((name) => [withSchema(who, name), withSchema(withTransaction(who), name)]),
          { concurrency: "unbounded" }
        )
        expect(seen).toEqual(schemas.flatMap((name) => [name, name]))
        expect(yield* who).toBe("public")
      })
    ))

  const ways: ReadonlyArray<readonly [name: string, leave: Effect.Effect<unknown, unknown, DbSession>]> = [
    ["a success", Effect.void],
    ["a failure", Effect.fail("no")],
    ["a failed statement", refused],
    ["an interruption", Effect.interrupt]
  ]
  for (const [name, leave] of ways) {
    test(
      `the pool carries none over after ${name}`,
      () =>
        Effect.gen(function* () {
          const first = yield* pid
          yield* Effect.exit(withSchema(DbSession.autocommit(Effect.zipRight(who, leave)), "s1"))
          yield* Effect.exit(withSchema(withTransaction(Effect.zipRight(who, leave)), "s2"))
          yield* Effect.exit(withSchema(Effect.zipRight(who, leave), "s3"))
          yield* Effect.exit(withSchema(DbConnection.withConnection(Effect.zipRight(who, leave)), "s4"))
          expect(yield* path).toBe(usual)
          expect(yield* DbSession.autocommit(path)).toBe(usual)
          if (name !== "an interruption") expect(yield* pid).toBe(first)
        }),
      { maxConnections: 1 }
    )
  }

  test("a commit and a rollback in the middle of a session end the path with the transaction", () =>
    DbSession.autocommit(
      Effect.gen(function* () {
        expect(yield* withSchema(who, "s1")).toBe("s1")
        yield* DbSession.commit
        expect(yield* who).toBe("public")
        expect(yield* withSchema(who, "s1")).toBe("s1")
        yield* DbSession.rollback
        expect(yield* withSchema(who, "s1")).toBe("s1")
        expect(yield* path).toBe(usual)
      })
    ))

  const ends: ReadonlyArray<readonly [name: string, inner: Effect.Effect<unknown, unknown, DbSession>]> = [
    ["kept", Effect.void],
    ["rolled back", Effect.fail("no")],
    ["rolled back by a failed statement", refused]
  ]
  for (const [name, inner] of ends) {
    test(`after a savepoint that was ${name} the path is what each statement asks for`, () =>
      DbSession.autocommit(
        Effect.gen(function* () {
          const block = (at: string) => Effect.exit(withTransaction(Effect.zipRight(withSchema(who, at), inner)))
          // The first change of the path is inside of the savepoint.
          yield* block("s1")
          expect(yield* who).toBe("public")
          expect(yield* withSchema(who, "s1")).toBe("s1")
          yield* block("s1")
          expect(yield* withSchema(who, "s1")).toBe("s1")
          yield* block("s2")
          expect(yield* withSchema(who, "s1")).toBe("s1")
          yield* withSchema(block("s3"), "s1")
          expect(yield* who).toBe("public")
          yield* withTransaction(
            Effect.zipRight(
              block("s4"),
              Effect.map(who, (_) => expect(_).toBe("public"))
            )
          )
          expect(yield* path).toBe(usual)
        })
      ))
  }
})

describe("the same text in two schemas with other types", () => {
  const read = Effect.flatMap(DbSession, ({ sql }) =>
    Effect.map(sql<{ x: unknown }>`SELECT x FROM v`, ([row]) => row!.x)
  )
  const compare = (x: unknown) =>
    Effect.flatMap(DbSession, ({ sql }) => Effect.map(sql`SELECT x FROM v WHERE x = ${x}`, (rows) => rows.length))

  for (const [name, around] of [
    ["implicit", <A, E, R>(effect: Effect.Effect<A, E, R>) => effect],
    ["in one transaction", <A, E, R>(effect: Effect.Effect<A, E, R>) => DbSession.autocommit(effect)],
    ["on one connection", <A, E, R>(effect: Effect.Effect<A, E, R>) => DbConnection.withConnection(effect)]
  ] as const) {
    test(
      `${name}: each gets its own`,
      () =>
        around(
          Effect.gen(function* () {
            for (let i = 0; i < 4; i++) {
              expect(yield* withSchema(read, "s0")).toBe(1)
              expect(yield* withSchema(read, "s1")).toBe("one")
              expect(yield* withSchema(compare(1), "s0")).toBe(1)
              expect(yield* withSchema(compare("one"), "s1")).toBe(1)
            }
          })
        ),
      { maxConnections: 1 }
    )
  }

  proxied(
    "each is prepared once, and once only",
    (proxy) =>
      Effect.gen(function* () {
        for (let i = 0; i < 3; i++) {
          yield* withSchema(read, "s0")
          yield* withSchema(DbSession.autocommit(read), "s1")
        }
        const parsed = proxy.log.filter(({ text, type }) => type === "P" && text === "SELECT x FROM v")
        expect(parsed.length).toBe(2)
        expect(new Set(parsed.map((_) => _.name)).size).toBe(2)
      }),
    { maxConnections: 1 }
  )

  test(
    "a type that changes under a prepared statement is noticed",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        yield* sql`CREATE SCHEMA changing`
        yield* sql`CREATE TABLE changing.v (x int)`
        yield* sql`INSERT INTO changing.v VALUES (5)`
        expect(yield* withSchema(read, "changing")).toBe(5)
        yield* sql`ALTER TABLE changing.v ALTER x TYPE text`
        expect(yield* withSchema(read, "changing")).toBe("5")
        yield* DbSchema.drop("changing", { cascade: true })
      }),
    { maxConnections: 1 }
  )
})

describe("round trips", () => {
  const count = <A, E, R>(proxy: PgProxy, effect: Effect.Effect<A, E, R>) =>
    Effect.gen(function* () {
      proxy.reset()
      yield* effect
      return proxy.flights()
    })
  const works: Record<string, Effect.Effect<unknown, SqlError, DbSession | DbEngine>> = {
    "an implicit statement": who,
    "a session of three statements": DbSession.autocommit(Effect.all([who, who, who])),
    "a nested block": DbSession.autocommit(Effect.zipRight(who, withTransaction(who))),
    "three statements at once": DbSession.autocommit(
      Effect.zipRight(who, Effect.all([who, who, who], { concurrency: "unbounded" }))
    )
  }
  for (const [name, work] of Object.entries(works)) {
    proxied(
      `${name}: no more with a schema than without`,
      (proxy) =>
        Effect.gen(function* () {
          proxy.delay(5)
          yield* who
          const without = yield* count(proxy, work)
          expect(yield* count(proxy, withSchema(work, "s1"))).toBe(without)
          expect(yield* count(proxy, withTenant(work, ["s2", "public"]))).toBe(without)
          expect(without).toBe(name === "an implicit statement" ? 1 : name.startsWith("a session") ? 4 : 3)
        }),
      { maxConnections: 1 }
    )
  }

  proxied(
    "none to change the path in mid-transaction and back",
    (proxy) =>
      Effect.gen(function* () {
        yield* who
        const work = DbSession.autocommit(Effect.all([who, withSchema(who, "s1"), withSchema(who, "s2"), who]))
        expect(yield* count(proxy, work)).toBe(5)
      }),
    { maxConnections: 1 }
  )

  proxied(
    "and the path is set once, not for each statement",
    (proxy) =>
      Effect.gen(function* () {
        yield* withSchema(DbSession.autocommit(Effect.all([who, who, withSchema(who, "s1"), who])), "s1")
        expect(proxy.statements().filter((text) => text.includes("search_path")).length).toBe(1)
      }),
    { maxConnections: 1 }
  )
})

describe("52 identifiers", () => {
  const bad: ReadonlyArray<readonly [what: string, name: unknown]> = [
    ["empty", ""],
    ["a NUL", "a\0b"],
    ["a lone surrogate", "a\ud800"],
    ["64 bytes", "x".repeat(64)],
    ["64 bytes of two-byte letters", "ä".repeat(32)],
    ["no string", 7]
  ]
  for (const [what, name] of bad) {
    proxied(`${what}: InvalidInput before any SQL`, (proxy) =>
      Effect.gen(function* () {
        for (const at of [withSchema, withTenant, using]) {
          expect(yield* reason(at(who, name as string))).toBe("InvalidInput")
          expect(yield* reason(at(who, ["public", name as string]))).toBe("InvalidInput")
        }
        expect(yield* reason(DbSchema.create(name as string))).toBe("InvalidInput")
        expect(yield* reason(DbSchema.drop(name as string))).toBe("InvalidInput")
        expect(proxy.accepted).toBe(0)
      })
    )
  }

  proxied("no schema at all, and the role's own by another name: InvalidInput before any SQL", (proxy) =>
    Effect.gen(function* () {
      expect(yield* reason(withSchema(who, []))).toBe("InvalidInput")
      expect(yield* reason(withTenant(who, "$user"))).toBe("InvalidInput")
      expect(proxy.accepted).toBe(0)
    })
  )

  const strange = [
    'a"b',
    'a"; DROP SCHEMA s0 CASCADE; --',
    'a", "s0',
    "a, s0",
    "it's",
    "back\\slash",
    " s0 ",
    "S0",
    "sélection ключ 🔑",
    "x".repeat(63),
    "select",
    "$1"
  ]
  for (const name of strange) {
    test(`${JSON.stringify(name)} is a name as any other`, () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        yield* DbSchema.create(name)
        yield* withSchema(sql`CREATE TABLE who AS SELECT 'strange' AS name`, name)
        for (const at of [withSchema, withTenant, using]) {
          expect(yield* at(who, name)).toBe("strange")
          expect(yield* DbSession.autocommit(at(who, name))).toBe("strange")
          // By the simple protocol, which has no parameters.
          expect(yield* DbSession.autocommit(at(sql.unsafe("SELECT 1 AS x; SELECT name FROM who"), name))).toEqual([
            [{ x: 1 }],
            [{ name: "strange" }]
          ])
          expect(yield* at(who, ["s0", name])).toBe("s0")
        }
        const [there] = yield* database.query("SELECT nspname FROM pg_namespace WHERE nspname = $1", [name])
        expect(there).toEqual({ nspname: name })
        yield* DbSchema.drop(name, { cascade: true })
        expect(yield* who).toBe("public")
      }))
  }
})

describe("create and drop", () => {
  /** The SQLSTATE that it is refused with. */
  const refusedBy = <A, R>(effect: Effect.Effect<A, unknown, R>) =>
    Effect.map(Effect.flip(effect), (error) => DbError.reason(error)?.sqlState)

  const exists = (name: string) =>
    Effect.map(database.query("SELECT FROM pg_namespace WHERE nspname = $1", [name]), (rows) => rows.length === 1)

  test("create twice fails, unless ifNotExists; drop twice fails, unless ifExists", () =>
    Effect.gen(function* () {
      yield* DbSchema.create("twice")
      expect(yield* exists("twice")).toBe(true)
      expect(yield* refusedBy(DbSchema.create("twice"))).toBe("42P06")
      yield* DbSchema.create("twice", { ifNotExists: true })
      yield* DbSchema.drop("twice")
      expect(yield* exists("twice")).toBe(false)
      expect(yield* refusedBy(DbSchema.drop("twice"))).toBe("3F000")
      yield* DbSchema.drop("twice", { ifExists: true })
    }))

  test("drop of one that is not empty fails, unless cascade", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      yield* DbSchema.create("full")
      yield* sql`CREATE TABLE "full".x (y int)`
      expect(yield* refusedBy(DbSchema.drop("full"))).toBe("2BP01")
      expect(yield* exists("full")).toBe(true)
      yield* DbSchema.drop("full", { cascade: true })
      expect(yield* exists("full")).toBe(false)
    }))

  test("in a transaction they stand or fall with it", () =>
    Effect.gen(function* () {
      const { sql } = yield* DbSession
      const onboard = (name: string) =>
        Effect.zipRight(DbSchema.create(name), withTenant(sql`CREATE TABLE who AS SELECT ${name}::text AS name`, name))
      yield* Effect.ignore(withTransaction(Effect.zipRight(onboard("acme"), Effect.fail("no"))))
      expect(yield* exists("acme")).toBe(false)
      yield* withTransaction(onboard("acme"))
      expect(yield* withTenant(who, "acme")).toBe("acme")
      yield* DbSchema.drop("acme", { cascade: true })
    }))
})

describe("50 a tenant that is missing", () => {
  proxied("requireTenant fails with InvalidInput before any SQL, and before the effect begins", (proxy) =>
    Effect.gen(function* () {
      let ran = false
      const work = DbSchema.requireTenant(
        Effect.zipRight(
          Effect.sync(() => void (ran = true)),
          who
        )
      )
      expect(yield* reason(work)).toBe("InvalidInput")
      expect(yield* reason(withSchema(work, "s1"))).toBe("InvalidInput")
      expect(yield* reason(DbSession.autocommit(work))).toBe("InvalidInput")
      expect(ran).toBe(false)
      expect(proxy.accepted).toBe(0)
      expect(yield* withTenant(work, "s1")).toBe("s1")
      expect(yield* using(work, "s2")).toBe("s2")
    })
  )
})

describe("51 row-level security through settings", () => {
  const role = `effect_db_tenant_${process.pid}`
  const tenants = 20
  const each = 5

  beforeAll(async () => {
    const { Client } = (await import("pg")).default
    const client = new Client({ connectionString: database.url })
    await client.connect()
    // No superuser: those see every row.
    await client.query(`
      CREATE ROLE ${role} LOGIN PASSWORD 'secret';
      CREATE TABLE orders (id int, tenant text);
      INSERT INTO orders SELECT n, 'tenant ' || n % ${tenants} FROM generate_series(1, ${tenants * each}) AS n;
      ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
      CREATE POLICY by_tenant ON orders USING (tenant = nullif(current_setting('app.tenant', true), ''));
      GRANT SELECT ON orders TO ${role}`)
    await client.end()
    return async () => {
      const client = new Client({ connectionString: database.url })
      await client.connect()
      await client.query(`DROP OWNED BY ${role}; DROP ROLE ${role}`)
      await client.end()
    }
  })

  const options = { username: role, password: Redacted.make("secret"), maxConnections: 4 } as const

  const orders = Effect.flatMap(DbSession, ({ sql }) =>
    Effect.map(sql<{ tenant: string }>`SELECT tenant FROM orders`, (rows) => rows.map((_) => _.tenant))
  )

  test(
    "a session sees its tenant's rows, the next borrower of the connection none",
    () =>
      Effect.gen(function* () {
        expect(yield* orders).toEqual([])
        const mine = yield* DbSession.autocommit(orders, { settings: { "app.tenant": "tenant 3" } })
        expect(mine).toEqual(Array.from({ length: each }, () => "tenant 3"))
        expect(yield* orders).toEqual([])
        expect(yield* DbSession.autocommit(orders)).toEqual([])
        yield* DbSession.autocommit(
          Effect.gen(function* () {
            const inner = yield* withTransaction(orders, { settings: { "app.tenant": "tenant 4" } })
            expect(new Set(inner)).toEqual(new Set(["tenant 4"]))
            expect(new Set(yield* orders)).toEqual(new Set(["tenant 3"]))
            yield* DbSession.commit
            // And in the next transaction of the same session.
            expect(new Set(yield* orders)).toEqual(new Set(["tenant 3"]))
          }),
          { settings: { "app.tenant": "tenant 3" } }
        )
      }),
    { ...options, maxConnections: 1 }
  )

  type Lookup = Effect.Effect<unknown, SqlError, DbSession | DbEngine>

  /** The foreign rows that so many tenants see, and how many rows were seen at all. */
  const chaos = (
    as: (tenant: string, effect: typeof orders) => Effect.Effect<ReadonlyArray<string>, SqlError, DbSession | DbEngine>,
    times = 1000,
    survive: (effect: Lookup) => Lookup = (effect) => effect
  ) =>
    Effect.gen(function* () {
      let seed = 12_345
      const random = (below: number): number => {
        seed = (seed * 1_103_515_245 + 12_345) % 2_147_483_648
        return Math.floor((seed / 2_147_483_648) * below)
      }
      let foreign = 0
      let own = 0
      let interrupted = 0
      const look = (tenant: string | undefined) => (rows: ReadonlyArray<string>) =>
        Effect.sync(() => {
          for (const row of rows) {
            if (row === tenant) own++
            else foreign++
          }
        })
      const step = (i: number) => {
        const tenant = `tenant ${random(tenants)}`
        const kind = i % 5
        const steps = random(40)
        const work =
          kind === 4
            ? Effect.flatMap(orders, look(undefined))
            : as(tenant, Effect.tap(Effect.zipLeft(orders, Effect.yieldNow()), look(tenant)))
        if (kind !== 1 && kind !== 2) return work
        return Effect.gen(function* () {
          const fiber = yield* Effect.fork(work)
          for (let at = 0; at < steps; at++) yield* Effect.yieldNow()
          const exit = yield* Fiber.interrupt(fiber)
          if (Exit.isInterrupted(exit)) interrupted++
          else if (Exit.isFailure(exit)) yield* exit
        })
      }
      yield* Effect.forEach(
        Array.from({ length: times }, (_, i) => i),
        (i) => survive(step(i)),
        { concurrency: 16, discard: true }
      )
      return { foreign, own, interrupted }
    })

  proxied(
    "five thousand random tenants over four connections, with interruptions and cut connections: no foreign row",
    (proxy) =>
      Effect.gen(function* () {
        let turn = 0
        let lost = 0
        const isLoss = (error: unknown) =>
          ["ConnectionError", "CommitUnknown"].includes(DbError.reason(error)?._tag ?? "")
        const cutNow = Effect.sync(() => {
          if (++turn % 400 === 0) proxy.cutAll("rst")
        })
        const seen = yield* chaos(
          (tenant, effect) =>
            DbSession.autocommit(Effect.zipLeft(effect, cutNow), { settings: { "app.tenant": tenant } }),
          5000,
          (effect) => Effect.catchIf(effect, isLoss, () => Effect.sync(() => lost++))
        )
        expect(seen.foreign).toBe(0)
        expect(seen.own).toBeGreaterThan(5000)
        expect(seen.interrupted).toBeGreaterThan(250)
        expect(lost).toBeGreaterThan(0)
      }),
    { ...options, acquireTimeout: "20 seconds" }
  )

  test(
    "and the check can see them: a setting of the whole connection, never reset, shows foreign rows",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const seen = yield* chaos((tenant, effect) =>
          DbConnection.withConnection(
            Effect.zipRight(sql`SELECT set_config('app.tenant', ${tenant}, false)`, effect) as never
          )
        )
        expect(seen.foreign).toBeGreaterThan(0)
      }),
    { ...options, acquireTimeout: "20 seconds", resetOnRelease: "never" }
  )

  test(
    "a setting of the whole connection is reset for the next borrower",
    () =>
      Effect.gen(function* () {
        const { sql } = yield* DbSession
        const seen = yield* chaos((tenant, effect) =>
          DbConnection.withConnection(
            Effect.zipRight(sql`SELECT set_config('app.tenant', ${tenant}, false)`, effect) as never
          )
        )
        expect(seen.foreign).toBe(0)
        expect(seen.own).toBeGreaterThan(1000)
      }),
    { ...options, acquireTimeout: "20 seconds" }
  )
})
