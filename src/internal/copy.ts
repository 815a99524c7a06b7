/**
 * COPY in and out, in the session or on the connection where a statement would run.
 */
import type { SqlError } from "@effect/sql/SqlError"
import type { Statement } from "@effect/sql/Statement"
import type * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Runtime from "effect/Runtime"
import * as Stream from "effect/Stream"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Command, CopyHandler } from "./command.js"
import { executeSpec } from "./execute.js"
import { observeOwn } from "./observe.js"
import type { Pipeline } from "./pipeline.js"
import { copiesOf } from "./queryText.js"
import type { Result } from "./rows.js"
import { ViewConnection } from "./sqlClient.js"
import { compileOf, isRefused, makeSpec } from "./statement.js"

const refuse = (message: string, hint: string): DbError => DbError.make("InvalidInput", { message, hint })

/** Runs the statement of one of our clients with a handler for its data. */
const run = (statement: Statement<any>, way: "in" | "out", copy: CopyHandler): Effect.Effect<Result, SqlError> =>
  Effect.scoped(
    Effect.flatMap((statement as unknown as { acquirer: Effect.Effect<unknown, SqlError> }).acquirer, (connection) =>
      Effect.withFiberRuntime<Result, SqlError>((fiber) => {
        if (!(connection instanceof ViewConnection)) {
          return Effect.fail(
            refuse("The statement belongs to another SqlClient.", "Use the sql of DbSession or DbEngine.")
          )
        }
        const compiled = compileOf(statement)
        if (isRefused(compiled)) return Effect.fail(compiled)
        const [text, params] = compiled
        const engine = connection.at(fiber)
        const path = Ambient.searchPath(Ambient.entry(fiber, engine))
        const spec = makeSpec(text, [], "array", { several: false, prepare: false, copy, path })
        if (isRefused(spec)) return Effect.fail(spec)
        const copies = copiesOf(text)
        if (copies[0] !== way || copies.slice(1).some((_) => _ !== undefined)) {
          return Effect.fail(
            refuse(
              "The statement is not the COPY that this function is for.",
              "COPY ... FROM STDIN, or COPY ... TO STDOUT."
            )
          )
        }
        if (params.length > 0) {
          return Effect.fail(
            refuse("COPY takes no parameters.", "Put names in with sql(name), constants with sql.literal.")
          )
        }
        return observeOwn(engine, { text }, (watch) =>
          executeSpec(fiber, engine, connection.bound, { ...spec, watch }, (result) => result)
        )
      })
    )
  )

/** Bytes go out as they come; text is UTF-8. */
const bytes = (chunk: string | Uint8Array): Buffer =>
  typeof chunk === "string" ? Buffer.from(chunk, "utf8") : Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength)

/** @internal */
export const copyIn = <E, R>(
  statement: Statement<any>,
  source: Stream.Stream<string | Uint8Array, E, R>
): Effect.Effect<Result, E | SqlError, R> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.flatMap(Deferred.make<void>(), (begun) => {
      let taking: { readonly pipeline: Pipeline; readonly command: Command } | undefined = undefined
      // Not after the answer, which the fiber of the source hears of later: the connection may be somebody else's by then.
      const taker = (): Pipeline | undefined => (taking?.command.settled === false ? taking.pipeline : undefined)
      const copy: CopyHandler = {
        onIn: (pipeline, command) => {
          taking = { pipeline, command }
          Deferred.unsafeDone(begun, Exit.void)
        },
        // Told that there will be no more, the server undoes what it has taken.
        stop: () => end((_) => _.copyFail("the source of the copy failed or was interrupted"))
      }
      const end = (how: (pipeline: Pipeline) => void): void => {
        const pipeline = taker()
        taking = undefined
        if (pipeline !== undefined) how(pipeline)
      }
      const pump = Effect.zipRight(
        Deferred.await(begun),
        Effect.zipRight(
          Stream.runForEachChunk(source, (chunk) =>
            Effect.suspend(() => {
              const pipeline = taker()
              if (pipeline === undefined) return Effect.void
              for (const part of Chunk.toReadonlyArray(chunk)) pipeline.copyData(bytes(part))
              // No faster than the server takes it.
              return Effect.async<void>((resume) => pipeline.whenWritable(() => resume(Effect.void)))
            })
          ),
          Effect.sync(() => end((_) => _.copyDone()))
        )
      )
      // At once, so that it keeps its place among the statements of other fibers.
      const start = Effect.map(Effect.runtime<never>(), (runtime) =>
        Runtime.runFork(runtime)(Effect.interruptible(run(statement, "in", copy)))
      )
      return Effect.flatMap(start, (copying) => {
        let broken: Cause.Cause<E> | undefined = undefined
        // A source that fails ends the copy. No race, which hangs when it is interrupted before it has begun.
        const pumping = Effect.onError(Effect.interruptible(pump), (cause) =>
          Effect.suspend(() => {
            if (copying.unsafePoll() !== null) return Effect.void
            broken = cause
            return Fiber.interrupt(copying)
          })
        )
        // Nobody's child: an interrupt that the caller does not let in must not end it half-way.
        return Effect.flatMap(Effect.forkDaemon(pumping), (source) =>
          restore(Fiber.await(copying)).pipe(
            Effect.onInterrupt(() => Fiber.interrupt(copying)),
            Effect.ensuring(Fiber.interrupt(source)),
            Effect.flatMap((exit): Effect.Effect<Result, E | SqlError> =>
              broken === undefined ? exit : Effect.failCause(broken)
            )
          )
        )
      })
    })
  )

/** It was cancelled too late to fail on the server, and is not whole. */
const cutShort = (): DbError =>
  DbError.make("QueryCanceled", {
    message: "The transaction of the COPY was rolled back before all of its data was read.",
    hint: "Read it to its end, or join the fiber that does, before the session is rolled back."
  })

/** How much is kept for a consumer that is slower than the server, before the socket is paused. */
const highWater = 1 << 20

/** @internal */
export const copyOut = (statement: Statement<any>): Stream.Stream<Uint8Array, SqlError> =>
  Stream.unwrapScoped(
    Effect.gen(function* () {
      const chunks: Array<Buffer> = []
      let size = 0
      let left = false
      let dropped = false
      let pipeline: Pipeline | undefined = undefined
      let wake: (() => void) | undefined = undefined
      const notify = (): void => {
        const f = wake
        wake = undefined
        f?.()
      }
      const onData = (chunk: Buffer, from: Pipeline): void => {
        pipeline = from
        if (left) {
          dropped = true
          return
        }
        chunks.push(chunk)
        size += chunk.length
        if (size > highWater) from.stream.pause()
        notify()
      }
      // Whoever leaves half-way cancels the rest, whose answer has to be read; so does the end of its transaction.
      const stop = (): void => {
        left = true
        pipeline?.stream.resume()
      }
      let end: Exit.Exit<Result, SqlError> | undefined = undefined
      const fiber = yield* Effect.forkScoped(
        Effect.onExit(run(statement, "out", { onData, stop }), (exit) =>
          Effect.sync(() => {
            // The connection may be somebody else's by now, who has to hear what is said on it.
            pipeline?.stream.resume()
            pipeline = undefined
            end = exit
            notify()
          })
        )
      )
      yield* Effect.addFinalizer(() => Effect.zipRight(Effect.sync(stop), Fiber.interrupt(fiber)))
      const pull: Effect.Effect<Chunk.Chunk<Uint8Array>, SqlError | undefined> = Effect.suspend(() => {
        if (chunks.length > 0) {
          const taken = chunks.splice(0)
          size = 0
          pipeline?.stream.resume()
          return Effect.succeed(Chunk.unsafeFromArray(taken as Array<Uint8Array>))
        }
        if (end !== undefined) {
          if (Exit.isFailure(end)) return Effect.failCause(end.cause)
          return Effect.fail(dropped ? cutShort() : undefined)
        }
        return Effect.zipRight(
          Effect.async<void>((resume) => {
            wake = () => resume(Effect.void)
          }),
          pull
        )
      })
      return Stream.repeatEffectChunkOption(
        Effect.mapError(pull, (error) => (error === undefined ? Option.none() : Option.some(error)))
      )
    })
  )
