import { assert, describe, it } from "@effect/vitest"
import {
  BigDecimal,
  Cause,
  Chunk,
  Cron,
  Data,
  DateTime,
  Duration,
  Effect,
  Either,
  Exit,
  FastCheck as fc,
  FiberId,
  HashMap,
  HashSet,
  List,
  MutableHashMap,
  MutableHashSet,
  MutableList,
  MutableQueue,
  MutableRef,
  Option,
  Order,
  RedBlackTree,
  Redacted,
  Secret,
  SortedMap,
  SortedSet,
  Trie
} from "effect"
import { inspect } from "node:util"
import { runInNewContext } from "node:vm"
// @ts-expect-error: neither pg nor its types describe this file
import { prepareValue } from "pg/lib/utils.js"
import { DbError } from "../src/DbError.js"
import { checkIdentifier, checkStartupValue, checkText, encodeParams, quoteIdentifier } from "../src/internal/input.js"

/** The refusal, which has to be an `InvalidInput`. */
const refusal = (result: unknown): DbError => {
  assert(DbError.is(result), "expected a refusal")
  assert.strictEqual(result.reason._tag, "InvalidInput")
  assert.isFalse(result.isRetryable)
  return result
}

const encoded = (...params: ReadonlyArray<unknown>): ReadonlyArray<null | string | Buffer> => {
  const result = encodeParams(params)
  assert(!DbError.is(result), inspect(result))
  return result
}

const parameterOf = (error: DbError): number | undefined =>
  error.reason._tag === "InvalidInput" ? error.reason.parameter : undefined

describe("checkText", () => {
  it("takes a statement", () => {
    assert.isUndefined(checkText("SELECT '😀', $1"))
    assert.isUndefined(checkText(""))
  })

  it.each([undefined, null, 1, {}, [], Buffer.from("SELECT 1"), new String("SELECT 1"), Symbol("x")])(
    "refuses %o, which is not a string",
    (sql) => {
      refusal(checkText(sql))
    }
  )

  it("refuses a NUL character", () => {
    assert.include(refusal(checkText("SELECT 'a\0b'")).message, "NUL")
  })

  it.each(["\ud800", "\udfff", "a\ud83d", "\ude00a", "\ude00\ud83d"])("refuses the lone surrogate in %o", (text) => {
    assert.include(refusal(checkText(`SELECT '${text}'`)).message, "surrogate")
  })
})

describe("encodeParams", () => {
  it("sends null and undefined as null", () => {
    assert.deepStrictEqual(encoded(null, undefined), [null, null])
  })

  it("sends holes as null", () => {
    assert.deepStrictEqual(encodeParams(new Array<unknown>(2)), [null, null])
  })

  it("sends numbers as text, those that only floats have too", () => {
    assert.deepStrictEqual(encoded(1, -0, 1.5, 1e21, NaN, Infinity, -Infinity, 2n ** 64n), [
      "1",
      "0",
      "1.5",
      "1e+21",
      "NaN",
      "Infinity",
      "-Infinity",
      "18446744073709551616"
    ])
  })

  it("sends bytes as bytes, of the part that a view shows", () => {
    const view = new Uint8Array([0, 1, 2, 3]).subarray(1, 3)
    assert.deepStrictEqual(encoded(Buffer.from([0, 255]), view), [Buffer.from([0, 255]), Buffer.from([1, 2])])
  })

  it("sends what toPostgres gives", () => {
    const point = { toPostgres: (prepare: (value: unknown) => unknown) => `(${String(prepare(1))},2)` }
    assert.deepStrictEqual(encoded(point, { toPostgres: () => point }, { toPostgres: () => null }), [
      "(1,2)",
      "(1,2)",
      null
    ])
  })

  it("sends as null what JSON has no text for, as pg does", () => {
    assert.deepStrictEqual(encoded({ toJSON: () => undefined }), [null])
  })

  it("sends JSON with NUL and lone surrogates escaped", () => {
    assert.deepStrictEqual(encoded({ a: "\0\ud800" }), ['{"a":"\\u0000\\ud800"}'])
  })

  it("converts exactly as pg does", () => {
    const leaf = fc.oneof(
      fc.string({ unit: "binary" }).filter((text) => !text.includes("\0")),
      fc.double(),
      fc.bigInt(),
      fc.boolean(),
      fc.constantFrom(null, undefined),
      fc.date({ noInvalidDate: true }),
      fc.uint8Array()
    )
    const value = fc.oneof(leaf, fc.array(fc.oneof(leaf, fc.array(leaf))), fc.dictionary(fc.string(), fc.jsonValue()))
    fc.assert(
      fc.property(fc.array(value), (params) => {
        assert.deepStrictEqual(
          encodeParams(params),
          params.map((param) => prepareValue(param) as never)
        )
      }),
      { numRuns: 300 }
    )
  })

  it("never throws, whatever it is given", () => {
    fc.assert(
      fc.property(
        fc.array(fc.anything({ withDate: true, withTypedArray: true, withNullPrototype: true, withSparseArray: true })),
        (params) => {
          const result = encodeParams(params)
          if (DbError.is(result)) refusal(result)
          else
            for (const value of result)
              assert.isTrue(value === null || typeof value === "string" || Buffer.isBuffer(value))
        }
      ),
      { numRuns: 500 }
    )
  })

  it("takes 65 535 parameters and refuses 65 536, which would wrap around", () => {
    assert.lengthOf(encoded(...new Array<number>(65_535).fill(1)), 65_535)
    assert.include(refusal(encodeParams(new Array<number>(65_536).fill(1))).message, "65536")
  })

  const circular: Record<string, unknown> = {}
  circular.self = circular
  const endless: Array<unknown> = []
  endless.push(endless)
  const itself = { toPostgres: (): unknown => itself }
  const thrower = {
    toPostgres: () => {
      throw new Error("hunter2")
    }
  }

  it.each([
    ["a NUL character", "hunter2\0"],
    ["a lone surrogate", "hunter2\ud800"],
    ["a NUL character in an array", ["hunter2\0"]],
    ["an invalid Date", new Date(NaN)],
    ["an invalid Date of another realm", runInNewContext("new Date(NaN)")],
    ["an invalid Date in an array", [[new Date(NaN)]]],
    ["an invalid Date from toPostgres", { toPostgres: () => new Date(NaN) }],
    ["a function", () => "hunter2"],
    ["a function in an array", [() => "hunter2"]],
    ["a function from toPostgres", { toPostgres: () => () => "hunter2" }],
    ["a symbol", Symbol("hunter2")],
    ["a symbol in an array", [Symbol("hunter2")]],
    ["a circular object", circular],
    ["a circular array", endless],
    ["a circular toPostgres", itself],
    ["a conversion that throws", thrower],
    ["a bigint in an object, which JSON does not have", { hunter2: 1n }],
    ["a Redacted, which would be stored as <redacted>", Redacted.make("hunter2")],
    ["a Redacted in an array", [Redacted.make("hunter2")]],
    ["an Either", Either.right("hunter2")],
    ["an Exit", Exit.die("hunter2")],
    ["a Set", new Set(["hunter2"])],
    ["a Map of another realm", runInNewContext("new Map([['hunter2', 1]])")],
    ["a Promise in an array", [[Promise.resolve("hunter2")]]],
    ["an Option from toPostgres", { toPostgres: () => Option.some("hunter2") }]
  ])("refuses %s, by its number and without its value", (_, value) => {
    const error = refusal(encodeParams([1, value]))
    assert.strictEqual(parameterOf(error), 2)
    assert.include(error.message, "$2")
    assert.notInclude(inspect(error, { depth: 10, showHidden: true }) + JSON.stringify(error), "hunter2")
  })

  it.each([
    [Option.some("hunter2"), "Parameter $1 is an Option. Use Option.getOrNull(it)."],
    [Option.none(), "Parameter $1 is an Option. Use Option.getOrNull(it)."],
    [Effect.succeed("hunter2"), "Parameter $1 is an Effect that was not run. yield* it first."],
    [Promise.resolve("hunter2"), "Parameter $1 is a Promise. Await it first."],
    [{ then: () => "hunter2" }, "Parameter $1 is a Promise. Await it first."],
    [new Map([["hunter2", 1]]), "Parameter $1 is a Map. Use Object.fromEntries(it) or [...it]."],
    [Redacted.make("hunter2"), "Parameter $1 is Redacted. Pass Redacted.value(it) if the database shall have it."],
    [[1, Option.none()], "Parameter $1 is an array with an Option. Use Option.getOrNull(it)."],
    [Secret.fromString("hunter2"), "Parameter $1 is Redacted. Pass Redacted.value(it) if the database shall have it."],
    [Chunk.of("hunter2"), "Parameter $1 is a Chunk. Use Chunk.toReadonlyArray(it)."],
    [Chunk.empty(), "Parameter $1 is a Chunk. Use Chunk.toReadonlyArray(it)."],
    [List.of("hunter2"), "Parameter $1 is a List. Use List.toArray(it)."],
    [List.empty(), "Parameter $1 is a List. Use List.toArray(it)."],
    [HashSet.make("hunter2"), "Parameter $1 is a HashSet. Use [...it]."],
    [HashMap.make(["hunter2", 1]), "Parameter $1 is a HashMap. Use Object.fromEntries(it) or [...it]."],
    [SortedSet.make(Order.string)("hunter2"), "Parameter $1 is a SortedSet. Use [...it]."],
    [
      SortedMap.make(Order.string)(["hunter2", 1]),
      "Parameter $1 is a SortedMap. Use Object.fromEntries(it) or [...it]."
    ],
    [
      RedBlackTree.make(Order.string)(["hunter2", 1]),
      "Parameter $1 is a RedBlackTree. Use Object.fromEntries(it) or [...it]."
    ],
    [Trie.make(["hunter2", 1]), "Parameter $1 is a Trie. Use Object.fromEntries(it) or [...it]."],
    [MutableHashSet.make("hunter2"), "Parameter $1 is a MutableHashSet. Use [...it]."],
    [MutableHashMap.make(["hunter2", 1]), "Parameter $1 is a MutableHashMap. Use Object.fromEntries(it) or [...it]."],
    [MutableList.make("hunter2"), "Parameter $1 is a MutableList. Use [...it]."],
    [MutableQueue.unbounded(), "Parameter $1 is a MutableQueue. Use [...it]."],
    [MutableRef.make("hunter2"), "Parameter $1 is a MutableRef. Use MutableRef.get(it)."],
    [
      Duration.seconds(1),
      "Parameter $1 is a Duration. Use Duration.toMillis(it); an interval is `${Duration.toSeconds(it)} seconds`."
    ],
    [Cause.fail("hunter2"), "Parameter $1 is a Cause. Use Cause.pretty(it)."],
    [DateTime.zoneMakeOffset(0), "Parameter $1 is a TimeZone. Use DateTime.zoneToString(it)."],
    [DateTime.zoneUnsafeMakeNamed("Europe/Berlin"), "Parameter $1 is a TimeZone. Use DateTime.zoneToString(it)."],
    [Cron.unsafeParse("* * * * *"), "Parameter $1 is a Cron. Convert it to a value that PostgreSQL has a type for."],
    [FiberId.none, "Parameter $1 is a FiberId. Use FiberId.threadName(it)."],
    [[[1, Chunk.of(1)]], "Parameter $1 is an array with an array with a Chunk. Use Chunk.toReadonlyArray(it)."],
    [{ toPostgres: () => HashSet.make("hunter2") }, "Parameter $1 is a HashSet. Use [...it]."],
    [
      { a: [Redacted.make("hunter2")] },
      "Parameter $1 is an object with a Redacted in it. Pass Redacted.value(it) if the database shall have it."
    ]
  ])("says of %o, of which JSON would make something else, what to give instead", (value, message) => {
    assert.strictEqual(refusal(encodeParams([value])).message, message)
  })

  it("sends what PostgreSQL has one type for as a value of it, in arrays and from toPostgres too", () => {
    const half = BigDecimal.make(50n, 2)
    const noon = DateTime.unsafeMake("2024-01-01T12:00:00Z")
    assert.deepStrictEqual(
      encoded(
        half,
        [half, null, [half]],
        { toPostgres: () => half },
        noon,
        [1, noon],
        DateTime.unsafeMakeZoned(noon, { timeZone: "Asia/Tokyo" })
      ),
      [
        "0.5",
        '{"0.5",NULL,{"0.5"}}',
        "0.5",
        "2024-01-01T12:00:00.000Z",
        '{"1","2024-01-01T12:00:00.000Z"}',
        "2024-01-01T21:00:00.000+09:00"
      ]
    )
  })

  it("leaves the array that it was given as it was", () => {
    const given = [BigDecimal.make(1n, 0), "a"]
    const before = [...given]
    encoded(given)
    assert.deepStrictEqual(given, before)
  })

  it("sends objects of classes as JSON, what they make of Effect's types included", () => {
    class Point extends Data.Class<{ readonly x: number }> {}
    assert.deepStrictEqual(encoded(new Point({ x: 1 }), Data.struct({ y: 2 }), { some: Option.some(1) }), [
      '{"x":1}',
      '{"y":2}',
      '{"some":{"_id":"Option","_tag":"Some","value":1}}'
    ])
  })

  it("sends a text that only looks like a Redacted", () => {
    assert.deepStrictEqual(encoded("<redacted>", { a: "<redacted>", b: [1] }, ["<redacted>", 1n]), [
      "<redacted>",
      '{"a":"<redacted>","b":[1]}',
      '{"<redacted>","1"}'
    ])
  })

  it("sends the fields of an error of Effect's, which is an effect as well", () => {
    class Refused extends Data.TaggedError("Refused")<{ readonly why: string }> {}
    assert.deepStrictEqual(encoded(new Refused({ why: "late" })), ['{"why":"late","_tag":"Refused"}'])
  })

  it("refuses parameters of over 1 GiB together", () => {
    const part = Buffer.alloc(2 ** 26)
    assert.lengthOf(encoded(...new Array<Buffer>(15).fill(part)), 15)
    assert.include(refusal(encodeParams(new Array<Buffer>(16).fill(part))).message, "1 GiB")
  })

  it("counts the bytes of text, not its characters", () => {
    const part = "a".repeat(2 ** 24)
    assert.lengthOf(encoded(...new Array<string>(32).fill(part)), 32)
    const wide = "€".repeat(2 ** 24)
    assert.include(refusal(encodeParams(new Array<string>(32).fill(wide))).message, "1 GiB")
  })
})

describe("checkIdentifier", () => {
  it("takes names of up to 63 bytes, whatever they hold", () => {
    for (const name of ["users", 'it"s', "a b", "ä".repeat(31), "a".repeat(63)])
      assert.isUndefined(checkIdentifier(name))
  })

  it.each([
    ["empty", ""],
    ["over 63 bytes", "a".repeat(64)],
    ["over 63 bytes in UTF-8", "ä".repeat(32)],
    ["with a NUL character", "a\0b"],
    ["with a lone surrogate", "a\ud800"],
    ["not a string", 1],
    ["undefined", undefined]
  ])("refuses a name that is %s", (_, name) => {
    refusal(checkIdentifier(name))
  })
})

describe("quoteIdentifier", () => {
  it("doubles the quotes inside", () => {
    assert.strictEqual(quoteIdentifier('a"; DROP TABLE users; --'), '"a""; DROP TABLE users; --"')
  })

  it("can be read back, whatever the name", () => {
    fc.assert(
      fc.property(fc.string(), (name) => {
        const quoted = quoteIdentifier(name)
        assert.match(quoted, /^"(?:[^"]|"")*"$/)
        assert.strictEqual(quoted.slice(1, -1).replaceAll('""', '"'), name)
      })
    )
  })
})

describe("checkStartupValue", () => {
  it("takes text", () => {
    assert.isUndefined(checkStartupValue("application_name", "café 😀"))
    assert.isUndefined(checkStartupValue("options", ""))
  })

  it.each(["x\0user\0low", "a\nb", "a\tb", "\u001b[0m", "\u007f", "\u0085", "\ud800"])("refuses %o", (value) => {
    const error = refusal(checkStartupValue("application_name", value))
    assert.include(error.message, "application_name")
  })

  it("refuses what is not a string", () => {
    refusal(checkStartupValue("application_name", 1))
  })

  it("does not show the value", () => {
    assert.notInclude(inspect(checkStartupValue("password", "hunter2\n")), "hunter2")
  })
})
