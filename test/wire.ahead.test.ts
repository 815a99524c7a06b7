/**
 * Many statements at once: the server has the first while the rest is still being issued, in the same round trip.
 */
import { describe, expect, it } from "@effect/vitest"
import { PassThrough } from "node:stream"
import Pg from "pg"
import { ForeignQueue } from "../src/internal/foreign.js"
import { Command, Pipeline } from "../src/internal/pipeline.js"
import { Probe } from "../src/internal/probe.js"
import { Framer } from "./support/framing.js"

/** A pipeline and what it has written since it was last asked, as the letters of the messages. */
const offline = () => {
  const stream = new PassThrough()
  const cancels: Array<() => void> = []
  const pipeline = new Pipeline(stream, {
    host: { host: "nowhere", port: 5432 },
    probe: new Probe(),
    types: Pg.types,
    typesAreDefault: true,
    readWriteTarget: false,
    pipelining: true,
    preparedStatements: 10,
    settleMillis: 1000,
    cancel: (done) => cancels.push(() => done()),
    onDeath: () => {}
  })
  const framer = new Framer(true)
  const written = (): string => {
    const bytes = stream.read() as Buffer | null
    return bytes === null ? "" : [...framer.push(bytes)].map(({ type }) => type).join("")
  }
  const submit = (more = false): Command => {
    const command = new Command("SELECT 1", [], "object", false, false, false, undefined, () => {})
    command.more = more
    pipeline.submit(command)
    return command
  }
  return { cancels, pipeline, submit, written }
}

const endOfTurn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const statement = "PBDE"
const behind = (n: number) => ("H" + statement).repeat(n)

describe("statements that are issued at once", () => {
  it("a few go out together, at the end of the turn", async () => {
    const { submit, written } = offline()
    for (let i = 0; i < 7; i++) submit()
    expect(written()).toBe("")
    await endOfTurn()
    expect(written()).toBe(statement + behind(6) + "S")
  })

  it("of many the first go out while the rest is issued, and one Sync ends them all", async () => {
    const { submit, written } = offline()
    for (let i = 0; i < 8; i++) submit()
    expect(written()).toBe(statement + behind(7))
    for (let i = 0; i < 15; i++) submit()
    expect(written()).toBe("")
    submit()
    expect(written()).toBe(behind(16))
    submit()
    await endOfTurn()
    expect(written()).toBe(behind(1) + "S")
  })

  it("each turn begins anew", async () => {
    const { submit, written } = offline()
    for (let i = 0; i < 8; i++) submit()
    await endOfTurn()
    expect(written()).toBe(statement + behind(7) + "S")
    for (let i = 0; i < 8; i++) submit()
    expect(written()).toBe(statement + behind(7))
    await endOfTurn()
    expect(written()).toBe("S")
  })

  it("a batch is not torn apart", async () => {
    const { submit, written } = offline()
    for (let i = 0; i < 12; i++) submit(true)
    expect(written()).toBe("")
    submit()
    expect(written()).toBe(statement.repeat(13))
    await endOfTurn()
    expect(written()).toBe("S")
  })

  it("one that is interrupted when it has gone out is cancelled, and the Sync goes out all the same", async () => {
    const { cancels, pipeline, submit, written } = offline()
    const [first] = Array.from({ length: 8 }, () => submit())
    expect(pipeline.interrupt(first!)).toBe(true)
    submit()
    await endOfTurn()
    // The one behind the cancel waits: it could be hit.
    expect(written()).toBe(statement + behind(7) + "S")
    expect(cancels).toHaveLength(1)
    pipeline.die(new Error("over"), "read")
  })

  it("nothing is sent any more on a connection that dies in between", async () => {
    const { pipeline, submit, written } = offline()
    for (let i = 0; i < 8; i++) submit()
    expect(written()).toBe(statement + behind(7))
    pipeline.die(new Error("lost"), "read")
    submit()
    await endOfTurn()
    expect(written()).toBe("")
  })
})

describe("a statement that is being cancelled", () => {
  it("is one cancellation, however much of it still arrives", async () => {
    const { cancels, pipeline, submit } = offline()
    const command = submit()
    await endOfTurn()
    expect(pipeline.interrupt(command)).toBe(true)
    for (const message of ["1\0\0\0\u0004", "2\0\0\0\u0004", "n\0\0\0\u0004"]) pipeline.onData(Buffer.from(message))
    expect(cancels.length).toBe(1)
    pipeline.die(new Error("the end"), "read")
  })

  it("is one cancellation while the pg client has the socket, however often it is interrupted", () => {
    const cancels: Array<() => void> = []
    const wire = { cancel: (done: () => void) => cancels.push(done), pipeline: { heard: 0, tell: () => {} } }
    const client = { readyForQuery: true, query: () => {} }
    const queue = new ForeignQueue(wire as never, client as never, 0, 1000)
    const command = new Command("SELECT 1", [], "object", false, false, false, undefined, () => {})
    queue.submit(command)
    expect([queue.interrupt(command), queue.interrupt(command)]).toEqual([true, true])
    expect(cancels.length).toBe(1)
    command.settle(undefined, undefined, undefined)
    cancels[0]!()
    expect(queue.idle).toBe(true)
  })
})
