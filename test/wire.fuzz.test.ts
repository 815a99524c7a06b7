/**
 * What a real server has said, broken in every way that a network or a bug may break it: each statement gets its own
 * rows or a typed error. Values have no checksum and answers no number: a bit that flips inside a value, and rows that
 * change places, nobody can see; everything around them is looked at.
 */
import { DbError } from "effect-db"
import * as fc from "fast-check"
import { PassThrough } from "node:stream"
import type { Duplex } from "node:stream"
import Pg from "pg"
import { afterAll, beforeAll, describe, expect, it } from "vitest"
import { testDatabase } from "./support/database.js"
import { arrive, cut, messagesOf, pipelineOn, submit } from "./support/pipelines.js"

const database = testDatabase()

type Outcome = ReadonlyArray<unknown> | DbError

/**
 * Each row says whose it is. The refused one is the last: an error at a Sync has no other mark than its place. None has
 * RETURNING: under a rule the rows and their count may differ on a server that is well.
 */
const statements: ReadonlyArray<string> = [
  "SELECT 0 AS own, i, 'ä' || i AS s FROM generate_series(1, 3) AS i",
  "SELECT 1 AS own, NULL::text AS s, '' AS nothing",
  "CREATE TEMP TABLE fuzz (own int, s text)",
  "INSERT INTO fuzz SELECT 4, 'x' FROM generate_series(1, 5)",
  "SELECT 5 AS own WHERE false",
  "UPDATE fuzz SET s = 'y' WHERE own = 4",
  "SELECT 7 AS own, repeat('x', 2000) AS s",
  "SELECT 0 AS own, i, 'ä' || i AS s FROM generate_series(1, 3) AS i",
  "SELECT 9 AS own, 1 / (9 - 9)"
]

/** A pipeline with all statements on their way, each in a group of its own. */
const begin = async (stream: Duplex) => {
  const pipeline = pipelineOn(stream)
  const outcomes = statements.map((text) =>
    submit(pipeline, text, true).then(
      ({ rows }): Outcome => rows,
      (error: DbError): Outcome => error
    )
  )
  await new Promise((resolve) => setImmediate(resolve))
  return { pipeline, outcomes: Promise.all(outcomes) }
}

const client = new Pg.Client({ connectionString: database.url, application_name: "effect-db test support" })
client.on("error", () => {})
const conversation: Array<Buffer> = []
let expected: ReadonlyArray<Outcome> = []

beforeAll(async () => {
  await client.connect()
  const { stream } = (client as unknown as { readonly connection: { readonly stream: Duplex } }).connection
  stream.removeAllListeners("data")
  const heard: Array<Buffer> = []
  const { outcomes, pipeline } = await begin(stream)
  stream.on("data", (chunk: Buffer) => {
    heard.push(Buffer.from(chunk))
    pipeline.onData(chunk)
  })
  expected = await outcomes
  await new Promise<void>((resolve) => pipeline.whenIdle(resolve))
  conversation.push(...messagesOf(Buffer.concat(heard)).map((_) => _.bytes))
})

afterAll(() => {
  ;(client as unknown as { readonly connection: { readonly stream: Duplex } }).connection.stream.destroy()
})

/** Replays bytes as the server's answers; then the connection ends. */
const replay = async (bytes: Buffer, cuts: ReadonlyArray<number> = []): Promise<ReadonlyArray<Outcome>> => {
  const { outcomes, pipeline } = await begin(new PassThrough())
  arrive(cut(bytes, cuts), (buffer, length) => {
    pipeline.onBytes(buffer, length)
    const { restLength } = (pipeline as unknown as { readonly reader: { readonly restLength: number } }).reader
    expect(restLength).toBeLessThanOrEqual(bytes.length)
  })
  pipeline.die(new Error("the end"), "read")
  return outcomes
}

const isDefensible = (outcomes: ReadonlyArray<Outcome>): void => {
  for (const [i, outcome] of outcomes.entries()) {
    if (!DbError.is(outcome)) expect(outcome, statements[i]).toEqual(expected[i])
  }
}

const typeOf = (message: Buffer): string => String.fromCharCode(message[0]!)

/** Where a flipped bit is not inside of what only the two ends understand: names and types of columns, values. */
const structure = (message: Buffer): ReadonlyArray<number> => {
  const places = [0, 1, 2, 3, 4]
  if (typeOf(message) === "T") return places
  if (typeOf(message) !== "D") return [...message.keys()]
  places.push(5, 6)
  for (let at = 7; at < message.length;) {
    places.push(at, at + 1, at + 2, at + 3)
    at += 4 + Math.max(0, message.readInt32BE(at))
  }
  return places
}

const chunking = fc.array(fc.nat(), { maxLength: 20 })
const place = fc.nat()
const at = (n: number): number => n % conversation.length

/** Ways to break the conversation. */
const mutations: Readonly<Record<string, fc.Arbitrary<() => Array<Buffer>>>> = {
  "messages that come twice": place.map((n) => () => conversation.toSpliced(at(n), 0, conversation[at(n)]!)),
  "messages that are lost": place.map((n) => () => conversation.toSpliced(at(n), 1)),
  "messages that come at another place": fc.tuple(place, place).map(([from, to]) => () => {
    const message = conversation[at(from)]!
    const without = conversation.toSpliced(at(from), 1)
    const moved = without.toSpliced(at(to), 0, message)
    // Rows of one result that change places are still its rows.
    const order = (messages: ReadonlyArray<Buffer>) => messages.map(typeOf).join("")
    return typeOf(message) === "D" && order(moved) === order(conversation) ? conversation : moved
  }),
  "a bit that flips": fc.tuple(place, fc.nat(), fc.nat(7)).map(([n, where, bit]) => () => {
    const message = Buffer.from(conversation[at(n)]!)
    const places = structure(message)
    message[places[where % places.length]!]! ^= 1 << bit
    return conversation.toSpliced(at(n), 1, message)
  }),
  "lengths that are not true": fc
    .tuple(place, fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }))
    .map(([n, length]) => () => {
      const message = Buffer.from(conversation[at(n)]!)
      if (message.readInt32BE(1) !== length) message.writeInt32BE(length, 1)
      return conversation.toSpliced(at(n), 1, message)
    }),
  "bytes that nobody knows": fc.tuple(place, fc.uint8Array({ minLength: 1, maxLength: 300 })).map(
    ([n, bytes]) =>
      () =>
        conversation.toSpliced(at(n), 0, Buffer.from(bytes))
  )
}

describe("a server's answers", () => {
  it("are what was asked for, as recorded", () => {
    expect(expected.map((_) => (DbError.is(_) ? _.reason.sqlState : _.length))).toEqual([
      ...[3, 1, 0, 0, 0, 0, 1, 3],
      "22012"
    ])
  })

  it("are the same at every place where the stream may be cut in two, and byte by byte", async () => {
    const bytes = Buffer.concat(conversation)
    for (let cut = 0; cut <= bytes.length; cut++) {
      const outcomes = await replay(bytes, [cut])
      for (const [i, outcome] of outcomes.entries()) {
        if (DbError.is(outcome)) expect(outcome.reason.sqlState).toBe("22012")
        else expect(outcome).toEqual(expected[i])
      }
    }
    isDefensible(await replay(bytes, [...bytes.keys()]))
  })

  it("that end at any byte leave each statement with its rows or an error", async () => {
    const bytes = Buffer.concat(conversation)
    let before = statements.length
    for (let end = bytes.length; end >= 0; end--) {
      const outcomes = await replay(bytes.subarray(0, end))
      isDefensible(outcomes)
      const answered = outcomes.filter((_) => !DbError.is(_)).length
      expect(answered).toBeLessThanOrEqual(before)
      before = answered
    }
    expect(before).toBe(0)
  })

  for (const [what, mutation] of Object.entries(mutations)) {
    it(`${what}: each statement gets its rows or a typed error, never others`, async () => {
      await fc.assert(
        fc.asyncProperty(mutation, chunking, async (broken, cuts) => {
          isDefensible(await replay(Buffer.concat(broken()), cuts))
        }),
        { numRuns: 500 }
      )
    })
  }

  it("several at once: each statement gets its rows or a typed error, never others", async () => {
    const some = fc.array(fc.uint8Array({ minLength: 1, maxLength: 40 }), { minLength: 1, maxLength: 4 })
    await fc.assert(
      fc.asyncProperty(
        some,
        fc.array(place, { minLength: 4, maxLength: 4 }),
        chunking,
        async (garbage, places, cuts) => {
          let messages = conversation
          for (const [i, bytes] of garbage.entries()) {
            const n = places[i]! % messages.length
            messages = messages.toSpliced(n, i % 2, Buffer.from(bytes))
          }
          isDefensible(await replay(Buffer.concat(messages), cuts))
        }
      ),
      { numRuns: 500 }
    )
  })
})
