import { assert, describe, it } from "@effect/vitest"
import { Duration, FastCheck as fc, Schedule } from "effect"
import type { TransactionOptions } from "../src/internal/transactionSql.js"
import {
  begin,
  conflicts,
  release,
  rollbackTo,
  savepoint,
  setConfigText,
  settings,
  validate
} from "../src/internal/transactionSql.js"

describe("begin", () => {
  it.each([
    [{}, "BEGIN"],
    [{ isolation: "read uncommitted" }, "BEGIN ISOLATION LEVEL READ UNCOMMITTED"],
    [{ isolation: "read committed" }, "BEGIN ISOLATION LEVEL READ COMMITTED"],
    [{ isolation: "repeatable read" }, "BEGIN ISOLATION LEVEL REPEATABLE READ"],
    [{ isolation: "serializable" }, "BEGIN ISOLATION LEVEL SERIALIZABLE"],
    [{ readOnly: true }, "BEGIN READ ONLY"],
    [{ readOnly: false }, "BEGIN READ WRITE"],
    [{ deferrable: true }, "BEGIN DEFERRABLE"],
    [{ deferrable: false }, "BEGIN NOT DEFERRABLE"],
    [{ isolation: undefined, readOnly: undefined, deferrable: undefined }, "BEGIN"],
    [
      { isolation: "serializable", readOnly: true, deferrable: true },
      "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE"
    ]
  ] satisfies ReadonlyArray<[TransactionOptions, string]>)("of %o is %s", (options, text) => {
    assert.strictEqual(begin(options), text)
  })

  it("has nothing in its text but words of its own", () => {
    fc.assert(
      fc.property(fc.anything(), fc.anything(), fc.anything(), (isolation, readOnly, deferrable) => {
        assert.match(begin({ isolation, readOnly, deferrable } as TransactionOptions), /^BEGIN[A-Z ]*$/)
      })
    )
  })
})

describe("settings", () => {
  it("are none where none are given", () => {
    assert.deepStrictEqual(settings({}), [])
    assert.deepStrictEqual(settings({ statementTimeout: undefined, lockTimeout: undefined, settings: undefined }), [])
  })

  it("are the limits in milliseconds, then the user's in their order", () => {
    assert.deepStrictEqual(
      settings({
        statementTimeout: "5 seconds",
        lockTimeout: Duration.millis(250),
        settings: { "app.tenant": "acme", "app.user": "7" }
      }),
      [
        ["statement_timeout", "5000"],
        ["lock_timeout", "250"],
        ["app.tenant", "acme"],
        ["app.user", "7"]
      ]
    )
  })

  it("round up, because a limit of 0 is no limit", () => {
    assert.deepStrictEqual(settings({ statementTimeout: "1 micros", lockTimeout: 1.5 }), [
      ["statement_timeout", "1"],
      ["lock_timeout", "2"]
    ])
  })

  it("lift a limit by 0", () => {
    assert.deepStrictEqual(settings({ statementTimeout: 0 }), [["statement_timeout", "0"]])
  })
})

describe("setConfigText", () => {
  it("sets n settings for the transaction by parameters", () => {
    assert.strictEqual(setConfigText(1), "SELECT set_config($1,$2,true)")
    assert.strictEqual(
      setConfigText(3),
      "SELECT set_config($1,$2,true), set_config($3,$4,true), set_config($5,$6,true)"
    )
  })

  it("is the same text each time, so that the server can know it", () => {
    assert.strictEqual(setConfigText(2), setConfigText(2))
  })
})

describe("savepoints", () => {
  it("are set, released and rolled back to by one name", () => {
    assert.strictEqual(savepoint(7), "SAVEPOINT effect_db_7")
    assert.strictEqual(release(7), "RELEASE SAVEPOINT effect_db_7")
    assert.strictEqual(rollbackTo(7), "ROLLBACK TO SAVEPOINT effect_db_7")
  })
})

describe("validate", () => {
  const refused = (options: unknown): string | undefined => {
    const error = validate(options as TransactionOptions)
    if (error !== undefined) assert.strictEqual(error.reason._tag, "InvalidInput")
    return error?.message
  }

  it("takes what is right", () => {
    assert.isUndefined(validate({}))
    assert.isUndefined(
      validate({
        isolation: "serializable",
        readOnly: true,
        deferrable: false,
        statementTimeout: "5 seconds",
        lockTimeout: [1, 5],
        timeout: Duration.minutes(1),
        name: "transfer",
        settings: { "app.tenant": "acme", search_path: "", "a.b.c$1": "é" }
      })
    )
  })

  it.each(["SERIALIZABLE", "snapshot", "", 1, null, {}, "constructor"])(
    "refuses the isolation level %o",
    (isolation) => {
      assert.include(refused({ isolation }), "isolation")
    }
  )

  it.each(["readOnly", "deferrable"])("refuses %s that is not a boolean", (name) => {
    assert.include(refused({ [name]: "true" }), name)
    assert.include(refused({ [name]: null }), name)
  })

  it.each([
    ["propagation", ["nested", "required", "requiresNew", "mandatory", "supports", "notSupported", "never"]],
    ["currentTransaction", ["commit", "rollback", "append", "raise"]],
    ["retry", [true, false, Schedule.recurs(3)]],
    ["verifyOutcome", [true, false]]
  ])("takes for the block's option %s what there is, and nothing else", (name, allowed) => {
    for (const value of [undefined, ...allowed]) assert.isUndefined(refused({ [name]: value }))
    for (const value of ["bogus", "yes", "", 1, null, {}]) assert.include(refused({ [name]: value }), name)
  })

  it("refuses a name that is not a string", () => {
    assert.include(refused({ name: 1 }), "name")
  })

  const limits = ["statementTimeout", "lockTimeout", "timeout"] as const

  it.each([
    -1,
    -0.5,
    -1n,
    NaN,
    Infinity,
    -Infinity,
    Duration.infinity,
    "-5 seconds",
    "5",
    "soon",
    [-1, 0],
    [NaN, 0],
    [Infinity, 0],
    null,
    {},
    true,
    2 ** 31,
    "5 weeks"
  ])("refuses the duration %s for each limit", (duration) => {
    for (const name of limits) assert.include(refused({ [name]: duration }), name)
  })

  it.each([0, 1, 2 ** 31 - 1, 1n, "0 millis", "3 weeks", [0, 1], Duration.zero])(
    "takes the duration %s for each limit",
    (duration) => {
      for (const name of limits) assert.isUndefined(refused({ [name]: duration }))
    }
  )

  it.each(["", "a b", "a;b", "a'", "1a", "a.", ".a", "a..b", "a-b", "a\0", "ä", "a\n"])(
    "refuses a setting with the name %o",
    (name) => {
      assert.include(refused({ settings: { [name]: "x" } }), "name")
    }
  )

  it("refuses a value of a setting that is not a text that PostgreSQL can store, and does not show it", () => {
    for (const value of [1, null, undefined, {}, "hunter2\0", "hunter2\ud800"]) {
      const message = refused({ settings: { "app.tenant": value } })
      assert.include(message, "app.tenant")
      assert.notInclude(message, "hunter2")
    }
  })

  it.each([null, "x", 1])("refuses settings that are %o", (given) => {
    assert.include(refused({ settings: given }), "settings")
  })

  it("never throws, and what it takes has settings in milliseconds", () => {
    fc.assert(
      fc.property(
        fc.record(
          {
            isolation: fc.anything(),
            readOnly: fc.anything(),
            statementTimeout: fc.oneof(fc.anything(), fc.double(), fc.bigInt()),
            lockTimeout: fc.oneof(fc.anything(), fc.tuple(fc.double(), fc.double())),
            settings: fc.oneof(fc.anything(), fc.dictionary(fc.string(), fc.string()))
          },
          { requiredKeys: [] }
        ),
        (options) => {
          if (validate(options as TransactionOptions) !== undefined) return
          for (const [name, value] of settings(options as TransactionOptions)) {
            assert.match(name, /^[\w$.]+$/)
            if (name === "statement_timeout" || name === "lock_timeout") assert.match(value, /^\d+$/)
          }
        }
      ),
      { numRuns: 500 }
    )
  })
})

describe("conflicts", () => {
  it("are none where nothing is wanted", () => {
    assert.isUndefined(conflicts({ isolation: "serializable", readOnly: true, deferrable: true }, {}))
  })

  it.each([
    [{ isolation: "serializable" }, { isolation: "serializable" }, undefined],
    [{ isolation: "serializable" }, { isolation: "read committed" }, "isolation"],
    [{ isolation: "repeatable read" }, { isolation: "serializable" }, "isolation"],
    [{}, { isolation: "read committed" }, undefined],
    [{}, { isolation: "read uncommitted" }, undefined],
    [{ isolation: "read uncommitted" }, { isolation: "read committed" }, undefined],
    [{}, { isolation: "serializable" }, "isolation"],
    [{ readOnly: true }, { readOnly: false }, "readOnly"],
    [{}, { readOnly: true }, "readOnly"],
    [{ readOnly: false }, { readOnly: true }, "readOnly"],
    [{}, { readOnly: false }, undefined],
    [{ readOnly: true }, { readOnly: true }, undefined],
    [{}, { deferrable: true }, "deferrable"],
    [{ deferrable: true }, { deferrable: true }, undefined],
    [{ deferrable: true }, { deferrable: false }, undefined],
    [{}, { deferrable: false }, undefined],
    [{}, { isolation: "serializable", readOnly: true, deferrable: true }, "isolation"]
  ] satisfies ReadonlyArray<[TransactionOptions, TransactionOptions, string | undefined]>)(
    "of %o with %o: %s",
    (current, wanted, conflict) => {
      assert.strictEqual(conflicts(current, wanted), conflict)
    }
  )
})
