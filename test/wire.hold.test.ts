/**
 * What must not be sent yet, behind a BEGIN that may fail.
 */
import { DbEngine, DbQuery, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import { describe, expect } from "vitest"
import { testDatabase } from "./support/database.js"
import { committed } from "./support/programs.js"
import { freshTable, one, run, wired } from "./support/wired.js"

const database = testDatabase()

freshTable(database)

const ids = committed(database)
const kept = { ...one, resetOnRelease: "never" } as const
const deallocateAll = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"

describe("behind a BEGIN that fails", () => {
  const behind: ReadonlyArray<readonly [what: string, statement: Effect.Effect<unknown, unknown, DbEngine>]> = [
    ["several statements in one text", run("INSERT INTO t VALUES (2); INSERT INTO t VALUES (3)")],
    ["a text with a semicolon in a literal", run("INSERT INTO t SELECT length(';') + 1")],
    ["a COPY", Effect.flatMap(DbEngine, ({ sql }) => DbQuery.copyFrom(sql`COPY t FROM STDIN`, Stream.make("2\n3\n")))]
  ]
  for (const [what, statement] of behind) {
    wired(database, `${what} of a sibling: nothing is committed on its own`, kept, () =>
      Effect.gen(function* () {
        // BEGIN has a name, which goes behind the client's back.
        yield* withTransaction(run("SELECT 1"))
        yield* run(deallocateAll)
        const both = Effect.all([Effect.either(run("INSERT INTO t VALUES (1)")), Effect.either(statement)], {
          concurrency: 2
        })
        expect(yield* Effect.flip(withTransaction(Effect.zipRight(both, Effect.fail("no"))))).toBe("no")
        expect(yield* ids).toEqual([])
      })
    )
  }

  wired(database, "behind one that succeeds they run in its transaction", one, () =>
    Effect.gen(function* () {
      const all = Effect.all([run("INSERT INTO t VALUES (1)"), ...behind.map(([, statement]) => statement)], {
        concurrency: "unbounded"
      })
      yield* Effect.ignore(withTransaction(Effect.zipRight(all, Effect.fail("no"))))
      expect(yield* ids).toEqual([])
      yield* withTransaction(all)
      expect(yield* ids).toEqual([1, 2, 2, 2, 3, 3])
    })
  )
})
