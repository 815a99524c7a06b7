import { describe, expect, it } from "@effect/vitest"
import { DbEngine } from "effect-db"
import { DbTest } from "effect-db/testing"
import { Effect, Exit } from "effect"
import { randomBytes } from "node:crypto"
import { testDatabase } from "./support/database.js"

const database = testDatabase()

const marked = (prefix: string) =>
  Effect.map(
    database.query<{ datname: string }>("SELECT datname FROM pg_database WHERE starts_with(datname, $1)", [prefix]),
    (rows) => rows.map((_) => _.datname).sort()
  )

/** A prefix of the test's own, of which nothing is left. */
const withPrefix = <A, E>(f: (prefix: string) => Effect.Effect<A, E>) =>
  Effect.suspend(() => {
    const prefix = `edb_template_${randomBytes(4).toString("hex")}`
    const drop = Effect.flatMap(marked(prefix), (names) =>
      Effect.forEach(names, (name) =>
        Effect.zipRight(
          database.query(`ALTER DATABASE "${name}" WITH IS_TEMPLATE false`),
          database.query(`DROP DATABASE "${name}" WITH (FORCE)`)
        )
      )
    )
    return Effect.ensuring(f(prefix), drop)
  })

/** Migrations that count how often they are run. */
const migrations = (runs: { count: number }) =>
  Effect.flatMap(DbEngine, ({ sql }) =>
    Effect.suspend(() => {
      runs.count++
      return Effect.zipRight(sql`CREATE TABLE users (name text)`, sql`INSERT INTO users VALUES ('ada')`)
    })
  )

const users = Effect.flatMap(DbEngine, ({ sql }) => sql<{ name: string }>`SELECT name FROM users`)

describe("DbTest.template", () => {
  it.live("is made once for those who ask at the same time, and copied by each", () =>
    withPrefix((prefix) =>
      Effect.gen(function* () {
        const runs = { count: 0 }
        const file = Effect.scoped(
          Effect.gen(function* () {
            const template = yield* DbTest.template(
              { url: database.url, prefix, version: ["create users"] },
              migrations(runs)
            )
            const own = yield* DbTest.database({ url: database.url, template })
            return { template, users: yield* Effect.provide(users, own.layer) }
          })
        )
        const found = yield* Effect.all([file, file, file], { concurrency: "unbounded" })
        expect(runs.count).toBe(1)
        expect(found.map((_) => _.users)).toEqual(Array(3).fill([{ name: "ada" }]))
        expect(new Set(found.map((_) => _.template)).size).toBe(1)
        yield* file
        expect(runs.count).toBe(1)
      })
    )
  )

  it.live("is another one for another version", () =>
    withPrefix((prefix) =>
      Effect.gen(function* () {
        const runs = { count: 0 }
        const one = yield* DbTest.template({ url: database.url, prefix, version: 1 }, migrations(runs))
        const two = yield* DbTest.template({ url: database.url, prefix, version: 2 }, migrations(runs))
        expect(one).not.toBe(two)
        expect(runs.count).toBe(2)
        expect(yield* marked(prefix)).toEqual([one, two].sort())
      })
    )
  )

  it.live("is made anew when its making had failed half-way", () =>
    withPrefix((prefix) =>
      Effect.gen(function* () {
        const runs = { count: 0 }
        const options = { url: database.url, prefix, version: "1" }
        const half = Effect.zipRight(migrations(runs), Effect.fail("half-way"))
        expect(yield* Effect.exit(DbTest.template(options, half))).toEqual(Exit.fail("half-way"))
        const name = yield* DbTest.template(options, migrations(runs))
        expect(runs.count).toBe(2)
        expect(yield* marked(prefix)).toEqual([name])
      })
    )
  )

  it.live("takes no connection that would keep it from being copied", () =>
    withPrefix((prefix) =>
      Effect.gen(function* () {
        const name = yield* DbTest.template({ url: database.url, prefix, version: 1 }, Effect.void)
        const exit = yield* Effect.exit(
          Effect.scoped(Effect.flatMap(DbEngine.make({ url: database.url, database: name }), (_) => _.ping))
        )
        expect(Exit.isFailure(exit)).toBe(true)
      })
    )
  )
})
