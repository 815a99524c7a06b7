import { DbConnection, DbEngine, DbError, withTransaction } from "effect-db"
import * as Effect from "effect/Effect"
import * as fc from "fast-check"
import { PassThrough } from "node:stream"
import Pg from "pg"
import { describe, expect, it, vi } from "vitest"
import { ProtocolViolation, Reader, readServerMessage, Writer } from "../src/internal/protocol.js"
import { makeShape, readFields } from "../src/internal/rows.js"
import { testDatabase } from "./support/database.js"
import { arrive, cut, messagesOf, pipelineOn, submit } from "./support/pipelines.js"
import { reasonOf, run, wired } from "./support/wired.js"

interface Message {
  readonly type: number
  readonly body: Buffer
}

const encode = ({ body, type }: Message): Buffer => {
  const head = Buffer.alloc(5)
  head[0] = type
  head.writeUInt32BE(body.length + 4, 1)
  return Buffer.concat([head, body])
}

const read = (chunks: ReadonlyArray<Buffer>): Array<Message> => {
  const messages: Array<Message> = []
  const reader = new Reader((type, buffer, start, end) =>
    messages.push({ type, body: Buffer.from(buffer.subarray(start, end)) })
  )
  arrive(chunks, (buffer, length) => reader.push(buffer, length))
  return messages
}

const backendTypes = [..."RK23CWdcGHDIEvnNAtS1sZT"].map((_) => _.charCodeAt(0))

const message = fc.record({
  type: fc.constantFrom(...backendTypes),
  body: fc.uint8Array({ maxLength: 300 }).map((_) => Buffer.from(_))
})

describe("Reader", () => {
  it("gives the same messages however the stream is cut", () => {
    fc.assert(
      fc.property(fc.array(message, { maxLength: 20 }), fc.array(fc.nat()), (messages, at) => {
        expect(read(cut(Buffer.concat(messages.map(encode)), at))).toEqual(messages)
      })
    )
  })

  it("gives the same messages one byte at a time", () => {
    fc.assert(
      fc.property(fc.array(message, { maxLength: 5 }), (messages) => {
        const bytes = Buffer.concat(messages.map(encode))
        expect(read(Array.from(bytes, (byte) => Buffer.from([byte])))).toEqual(messages)
      }),
      { numRuns: 50 }
    )
  })

  it("refuses every type that no server sends", () => {
    for (let type = 0; type < 256; type++) {
      const push = () => read([encode({ type, body: Buffer.alloc(0) })])
      if (backendTypes.includes(type)) expect(push).not.toThrow()
      else expect(push).toThrow(ProtocolViolation)
    }
  })

  it("refuses absurd lengths as soon as it sees them, before anything of that length has come", () => {
    const head = (type: string, length: number) => {
      const bytes = Buffer.alloc(5)
      bytes.write(type, 0, "latin1")
      bytes.writeUInt32BE(length, 1)
      return bytes
    }
    for (const length of [0, 3, 0x40000004, 0x7fffffff, 0x80000000, 0xffffffff]) {
      expect(() => read([head("D", length)])).toThrow(ProtocolViolation)
    }
    // Types that are short in every answer of a server.
    for (const type of "ZC12SK") expect(() => read([head(type, 30001)])).toThrow(ProtocolViolation)
    expect(() => read([head("D", 0x3fffffff)])).not.toThrow()
  })

  it("never throws anything but ProtocolViolation on garbage, and keeps no more than it was given", () => {
    fc.assert(
      fc.property(fc.array(fc.uint8Array({ maxLength: 200 })), (chunks) => {
        const reader = new Reader(() => {})
        let total = 0
        try {
          for (const chunk of chunks) {
            total += chunk.length
            reader.push(Buffer.from(chunk))
          }
        } catch (error) {
          expect(error).toBeInstanceOf(ProtocolViolation)
        }
        expect((reader as unknown as { restLength: number }).restLength).toBeLessThanOrEqual(total)
      })
    )
  })

  it("joins a long message once, not at every chunk", () => {
    const body = Buffer.alloc(32 << 20, 7)
    const bytes = encode({ type: 0x44, body })
    const chunks: Array<Buffer> = []
    for (let at = 0; at < bytes.length; at += 16384) chunks.push(bytes.subarray(at, at + 16384))
    const joined = vi.spyOn(Buffer, "concat")
    try {
      expect(read(chunks)[0]!.body.equals(body)).toBe(true)
      // Joining at each of the 2048 chunks would copy 32 GB.
      expect(joined.mock.calls.map(([parts]) => parts.length)).toEqual([chunks.length])
    } finally {
      joined.mockRestore()
    }
  })
})

/** The messages of a frontend. */
const frames = (bytes: Buffer) => messagesOf(bytes).map(({ bytes, type }) => ({ type, body: bytes.subarray(5) }))

const textArb = fc.string({ unit: "grapheme", maxLength: 200 }).map((_) => _.replaceAll("\0", ""))
const param = fc.oneof(
  fc.constant(null),
  textArb,
  fc.uint8Array({ maxLength: 200 }).map((_) => Buffer.from(_))
)

describe("Writer", () => {
  it("writes each Bind as the protocol has it, for any parameters", () => {
    fc.assert(
      fc.property(textArb, fc.array(param, { maxLength: 30 }), (name, params) => {
        const [bind, sync, ...rest] = frames(new Writer().bind(name, params).sync().take())
        expect([bind!.type, sync!.type, rest.length]).toEqual(["B", "S", 0])
        const { body } = bind!
        let at = 1
        const nameBytes = Buffer.from(name)
        expect(body.subarray(at, at + nameBytes.length + 1)).toEqual(Buffer.concat([nameBytes, Buffer.from([0])]))
        at += nameBytes.length + 1
        const formats = body.readUInt16BE(at)
        expect(formats).toBe(params.some((_) => Buffer.isBuffer(_)) ? params.length : 0)
        for (let i = 0; i < formats; i++)
          expect(body.readUInt16BE(at + 2 + i * 2)).toBe(Buffer.isBuffer(params[i]) ? 1 : 0)
        at += 2 + formats * 2
        expect(body.readUInt16BE(at)).toBe(params.length)
        at += 2
        for (const value of params) {
          const length = body.readInt32BE(at)
          at += 4
          if (value === null) expect(length).toBe(-1)
          else {
            expect(body.subarray(at, at + length).equals(Buffer.from(value as string))).toBe(true)
            at += length
          }
        }
        expect([body.readUInt16BE(at), at + 2]).toEqual([0, body.length])
      })
    )
  })

  it("carries 65 535 parameters", () => {
    const [bind] = frames(
      new Writer()
        .bind(
          "",
          Array.from({ length: 65535 }, () => "x")
        )
        .take()
    )
    expect(bind!.body.readUInt16BE(4)).toBe(65535)
  })

  it("writes any texts in order and hands each over once", () => {
    fc.assert(
      fc.property(fc.array(textArb, { minLength: 1, maxLength: 20 }), (texts) => {
        const writer = new Writer()
        for (const text of texts) writer.parse("n", text).describePortal().execute().closeStatement("n")
        const found = frames(writer.take())
        expect(found.map((_) => _.type).join("")).toBe("PDEC".repeat(texts.length))
        expect(found.filter((_) => _.type === "P").map((_) => _.body.toString("utf8", 2, _.body.length - 3))).toEqual(
          texts
        )
        expect(writer.take().length).toBe(0)
      })
    )
  })

  it("what it has handed over is not changed by what is written next", () => {
    for (const size of [10, 5000, 3 << 20]) {
      const writer = new Writer()
      const first = writer.query("a".repeat(size)).take()
      const copy = Buffer.from(first)
      writer.query("b".repeat(size)).take()
      expect(first.equals(copy)).toBe(true)
    }
  })
})

const rowDescription = (names: ReadonlyArray<string>, type: number): Buffer => {
  const parts: Array<Buffer> = [Buffer.from([names.length >> 8, names.length & 255])]
  for (const name of names) {
    const rest = Buffer.alloc(18)
    rest.writeUInt32BE(type, 6)
    parts.push(Buffer.from(name), Buffer.from([0]), rest)
  }
  return Buffer.concat(parts)
}

const dataRow = (values: ReadonlyArray<string | null>): Buffer => {
  const parts: Array<Buffer> = [Buffer.from([values.length >> 8, values.length & 255])]
  for (const value of values) {
    const length = Buffer.alloc(4)
    const bytes = Buffer.from(value ?? "")
    length.writeInt32BE(value === null ? -1 : bytes.length)
    parts.push(length, bytes)
  }
  return Buffer.concat(parts)
}

const nameArb = fc.string({ unit: "grapheme", minLength: 1, maxLength: 20 }).map((_) => _.replaceAll("\0", "x"))

describe("rows", () => {
  it("come back as they were sent, as objects and as arrays", () => {
    const cells = fc.uniqueArray(fc.oneof(nameArb, fc.constantFrom("__proto__", "constructor", "1")), { minLength: 1 })
    fc.assert(
      fc.property(
        cells.chain((names) =>
          fc.tuple(
            fc.constant(names),
            fc.array(fc.option(textArb), { minLength: names.length, maxLength: names.length })
          )
        ),
        ([names, values]) => {
          const head = rowDescription(names, 25)
          const shape = makeShape(readFields(head, 0, head.length), Pg.types, true)
          const row = dataRow(values)
          const object = shape.object(row, 0, row.length) as object
          expect(shape.array(row, 0, row.length)).toEqual(values)
          for (const [i, name] of names.entries()) {
            expect(Object.getOwnPropertyDescriptor(object, name)?.value).toBe(values[i])
          }
          expect(Object.getPrototypeOf(object)).toBe(Object.prototype)
        }
      )
    )
  })

  it("a row or a description that is cut short, or has another width, is a ProtocolViolation", () => {
    fc.assert(
      fc.property(fc.array(textArb, { minLength: 1, maxLength: 5 }), fc.nat(), (values, n) => {
        const names = values.map((_, i) => `c${i}`)
        const head = rowDescription(names, 25)
        const shape = makeShape(readFields(head, 0, head.length), Pg.types, true)
        const row = dataRow(values)
        const shorter = row.subarray(0, n % row.length)
        expect(() => shape.array(shorter, 0, shorter.length)).toThrow(ProtocolViolation)
        const wider = dataRow([...values, "x"])
        expect(() => shape.array(wider, 0, wider.length)).toThrow(ProtocolViolation)
        const less = head.subarray(0, n % head.length)
        expect(() => readFields(less, 0, less.length)).toThrow(ProtocolViolation)
      })
    )
  })

  it("an error message without its end is a ProtocolViolation", () => {
    const cutShort = Buffer.from("SERROR\0C42")
    expect(() => readServerMessage(cutShort, 0, cutShort.length)).toThrow(ProtocolViolation)
  })
})

/** A pipeline whose server is the test. */
const offline = () => {
  let death: DbError | undefined
  const pipeline = pipelineOn(new PassThrough(), (error) => {
    death = error
  })
  return { pipeline, submit: (text: string) => submit(pipeline, text), death: () => death }
}

const bytesOf = (type: string, body: Buffer = Buffer.alloc(0)): Buffer => encode({ type: type.charCodeAt(0), body })

describe("FAULTS 18: what no server sends", () => {
  const wrong: ReadonlyArray<readonly [string, Buffer]> = [
    ["garbage", Buffer.from([0x21, 0x7f, 0xff, 0xff, 0xff, 0xde, 0xad])],
    ["an absurd length", Buffer.from([0x44, 0xff, 0xff, 0xff, 0xff])],
    ["a row that nobody asked for", bytesOf("D", dataRow(["1"]))],
    ["an unterminated tag", bytesOf("C", Buffer.from("SELECT 1"))],
    ["ReadyForQuery before the answer", bytesOf("Z", Buffer.from("I"))],
    ["ReadyForQuery without a status", bytesOf("Z")],
    ["a status that there is not", bytesOf("Z", Buffer.from("X"))],
    ["a description cut short", bytesOf("T", Buffer.from([0, 3, 65]))],
    ["an empty description", bytesOf("T")],
    ["a notification cut short", bytesOf("A", Buffer.from([0, 0]))],
    ["a parameter cut short", bytesOf("S", Buffer.from("TimeZone\0"))],
    ["an authentication request", bytesOf("R", Buffer.alloc(4))],
    ["CopyBothResponse", bytesOf("W", Buffer.from([0, 0, 0]))]
  ]
  for (const [what, bytes] of wrong) {
    it(`${what}: the statement fails as lost, and nothing is trusted any more`, async () => {
      const { death, pipeline, submit } = offline()
      const answer = submit("SELECT 1").catch((error: DbError) => error)
      await new Promise((resolve) => setImmediate(resolve))
      pipeline.onData(bytes)
      const error = (await answer) as DbError
      expect(DbError.is(error)).toBe(true)
      expect([error.reason._tag, (error.reason as { phase?: string }).phase]).toEqual(["ConnectionError", "read"])
      expect(error.isRetryable).toBe(false)
      expect([death() !== undefined, pipeline.dead !== undefined]).toEqual([true, true])
    })
  }

  it("random bytes never throw out of the pipeline and never succeed", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fc.oneof(fc.uint8Array({ maxLength: 40 }), message.map(encode))), async (chunks) => {
        const { pipeline, submit } = offline()
        const answer = submit("SELECT 1").then(
          () => "succeeded",
          (error) => error
        )
        await new Promise((resolve) => setImmediate(resolve))
        for (const chunk of chunks) {
          // A success may only come of what says so.
          if (chunk[0] === 0x43 || chunk[0] === 0x49 || chunk[0] === 0x73) continue
          pipeline.onData(Buffer.from(chunk))
        }
        pipeline.die(new Error("the end"), "read")
        expect(DbError.is(await answer)).toBe(true)
      })
    )
  })
})

describe("who waits until nothing runs", () => {
  it("goes on waiting when another one who did has begun something", async () => {
    const { pipeline, submit } = offline()
    const zero = Buffer.concat([
      bytesOf("1"),
      bytesOf("2"),
      bytesOf("n"),
      bytesOf("C", Buffer.from("SELECT 0\0")),
      bytesOf("Z", Buffer.from("I"))
    ])
    const first = submit("SELECT 1 WHERE false")
    await new Promise((resolve) => setImmediate(resolve))
    const begun: Array<Promise<unknown>> = []
    const found: Array<boolean> = []
    pipeline.whenIdle(() => void begun.push(submit("SELECT 2 WHERE false")))
    pipeline.whenIdle(() => found.push(pipeline.idle))
    pipeline.onData(zero)
    await first
    expect(found).toEqual([])
    await new Promise((resolve) => setImmediate(resolve))
    pipeline.onData(zero)
    await Promise.all(begun)
    expect(found).toEqual([true])
  })
})

const database = testDatabase()

const broken = {
  getTypeParser: (oid: number) => (text: string) => {
    if (oid === 20) throw new Error(`secret value ${text}`)
    return text
  }
}

describe("rows of a real server", () => {
  wired(database, "a column called __proto__ is a column", {}, () =>
    Effect.gen(function* () {
      const [row] = yield* run(`SELECT 'x' AS "__proto__", NULL AS "constructor", 1 AS n`)
      expect(Object.getOwnPropertyDescriptor(row, "__proto__")?.value).toBe("x")
      expect(Object.getPrototypeOf(row)).toBe(Object.prototype)
      expect([row!["constructor"], row!["n"]]).toEqual([null, 1])
    })
  )

  wired(database, "1 600 columns, with and without values", {}, () =>
    Effect.gen(function* () {
      const columns = Array.from({ length: 1600 }, (_, i) => `${i % 3 === 0 ? "NULL::int" : i} AS c${i}`)
      const [row] = yield* run(`SELECT ${columns.join(", ")}`)
      expect(Object.keys(row!).length).toBe(1600)
      expect([row!["c3"], row!["c1598"]]).toEqual([null, 1598])
    })
  )

  wired(database, "FAULTS 19: one byte at a time, late: the rows are right", {}, (at) =>
    Effect.gen(function* () {
      yield* DbEngine.ping
      at.proxy.delay(10)
      at.proxy.oneByteAtATime()
      const rows = yield* run("SELECT i, repeat('ä', i) AS s FROM generate_series(1, 40) AS i")
      at.proxy.oneByteAtATime(false)
      expect(rows.map((_) => [_["i"], String(_["s"]).length])).toEqual(
        Array.from({ length: 40 }, (_, i) => [i + 1, i + 1])
      )
    })
  )

  wired(database, "FAULTS 19: one byte at a time: the login and what the pg client reads are right", {}, (at) =>
    Effect.gen(function* () {
      at.proxy.oneByteAtATime()
      const { rows } = yield* DbConnection.withConnection(
        Effect.flatMap(DbConnection.raw, (client) =>
          Effect.promise(() => client.query("SELECT i, repeat('ä', i) AS s FROM generate_series(1, 40) AS i"))
        )
      )
      at.proxy.oneByteAtATime(false)
      expect(rows.map((_) => [_.i, _.s.length])).toEqual(Array.from({ length: 40 }, (_, i) => [i + 1, i + 1]))
    })
  )

  wired(
    database,
    "FAULTS 34: a type parser that throws is a typed error, and the connection is used on",
    { types: broken as never, maxConnections: 1 },
    (at) =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(run("SELECT i::bigint AS i FROM generate_series(1, 3) AS i"))
        expect(DbError.reason(error)?._tag).toBe("UnknownError")
        expect(JSON.stringify(error) + String(error)).not.toContain("secret")
        expect(yield* run("SELECT 'fine' AS x")).toEqual([{ x: "fine" }])
        const inside = withTransaction(Effect.zipRight(Effect.ignore(run("SELECT 1::bigint")), run("SELECT 'ok' AS x")))
        expect(yield* inside).toEqual([{ x: "ok" }])
        expect(at.proxy.accepted).toBe(1)
      })
  )

  wired(
    database,
    "FAULTS 34: so is a `types` option that has no parser to give",
    {
      types: {
        getTypeParser: (oid: number) => {
          if (oid === 20) throw new Error("no parser")
          return (text: string) => text
        }
      } as never,
      maxConnections: 1
    },
    (at) =>
      Effect.gen(function* () {
        expect((yield* reasonOf(run("SELECT 1::bigint AS i")))._tag).toBe("UnknownError")
        expect(yield* run("SELECT 'fine' AS x")).toEqual([{ x: "fine" }])
        expect(at.proxy.accepted).toBe(1)
      })
  )

  wired(
    database,
    "FAULTS 18: garbage from the server destroys the connection, and the next one is good",
    { maxConnections: 1 },
    (at) =>
      Effect.gen(function* () {
        yield* DbEngine.ping
        at.proxy.injectGarbage()
        // Seen while idle or by the next statement: never an answer.
        yield* Effect.ignore(run("SELECT 1"))
        expect(yield* run("SELECT 2 AS two")).toEqual([{ two: 2 }])
        expect(at.proxy.accepted).toBe(2)
      })
  )

  wired(database, "FAULTS 35: 100 000 notices take no memory", {}, (at) =>
    Effect.gen(function* () {
      yield* run("SELECT 1")
      globalThis.gc?.()
      const before = process.memoryUsage().heapUsed
      yield* run("DO $$ BEGIN FOR i IN 1..100000 LOOP RAISE NOTICE 'notice % %', i, repeat('x', 100); END LOOP; END $$")
      expect(at.proxy.log.filter((_) => _.type === "N").length).toBe(100_000)
      at.proxy.reset()
      globalThis.gc?.()
      expect(process.memoryUsage().heapUsed - before).toBeLessThan(10 << 20)
    })
  )
})
