/**
 * A pipeline whose server is the test.
 */
import type { DbError } from "effect-db"
import type { Duplex } from "node:stream"
import Pg from "pg"
import { Command, Pipeline } from "../../src/internal/pipeline.js"
import { Probe } from "../../src/internal/probe.js"
import type { Result } from "../../src/internal/rows.js"
import { type Frame, Framer } from "./framing.js"

export const pipelineOn = (stream: Duplex, onDeath: (error: DbError) => void = () => {}): Pipeline =>
  new Pipeline(stream, {
    host: { host: "nowhere", port: 5432 },
    probe: new Probe(),
    types: Pg.types,
    typesAreDefault: true,
    readWriteTarget: false,
    pipelining: true,
    preparedStatements: 10,
    settleMillis: 1000,
    cancel: (done) => done(),
    onDeath
  })

/** Sends a statement, in a group of its own. */
export const submit = (pipeline: Pipeline, text: string, prepare = false): Promise<Result> =>
  new Promise((resolve, reject) =>
    pipeline.submit(
      new Command(text, [], "object", true, prepare, false, undefined, (error, result) =>
        error === undefined ? resolve(result!) : reject(error)
      )
    )
  )

/** The messages of a whole stream. */
export const messagesOf = (bytes: Buffer): Array<Frame> => [...new Framer(true).push(bytes)]

/** Cuts bytes into chunks. */
export const cut = (bytes: Buffer, at: ReadonlyArray<number>): Array<Buffer> => {
  const points = [...new Set(at.map((_) => _ % (bytes.length + 1)))].sort((a, b) => a - b)
  return [...points, bytes.length].map((end, i) => Buffer.from(bytes.subarray(points[i - 1] ?? 0, end)))
}

/** Hands chunks on as a socket does: at the beginning of one buffer, which is overwritten after each call. */
export const arrive = (chunks: ReadonlyArray<Buffer>, onBytes: (buffer: Buffer, length: number) => void): void => {
  const buffer = Buffer.alloc(Math.max(64, ...chunks.map((_) => _.length)))
  for (const chunk of chunks) {
    chunk.copy(buffer)
    onBytes(buffer, chunk.length)
    buffer.fill(0xa5)
  }
}
