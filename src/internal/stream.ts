/**
 * Results larger than memory: a cursor in the ambient transaction, or in one of its own for the scope of the stream.
 * The next FETCH is on its way while a chunk is consumed; other statements of the session run in between.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Chunk from "effect/Chunk"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as Ambient from "./ambient.js"
import type { EngineCore } from "./engine.js"
import { execute } from "./execute.js"
import type { Bound } from "./execute.js"
import { endSlot, makeSlot } from "./session.js"

const rowsPerFetch = 500

let cursors = 0

const readsOnly = /^[\s(]*(?:select|values|table|with)\b/i

/** @internal */
export const streamRows = (
  engine: EngineCore,
  bound: Bound,
  text: string,
  params: ReadonlyArray<unknown>
): Stream.Stream<any, SqlError> =>
  Stream.unwrapScoped(
    Effect.withFiberRuntime<Stream.Stream<any, SqlError>, SqlError, Scope.Scope>((fiber) => {
      const run = (text: string, params: ReadonlyArray<unknown>, at: Bound) =>
        Effect.withFiberRuntime<ReadonlyArray<any>, SqlError>((fiber) =>
          execute(fiber, engine, at, text, params, "object", false, (result) => result.rows)
        )
      // Only queries have cursors: INSERT ... RETURNING comes in one piece.
      if (!readsOnly.test(text)) {
        return Effect.succeed(Stream.unwrap(Effect.map(run(text, params, bound), Stream.fromIterable)))
      }
      const entry = Ambient.entry(fiber, engine)
      const inSession = bound._tag === "Slot" || (bound._tag === "Ambient" && entry.slot !== undefined)
      const cursor = `effect_db_cursor_${++cursors}`
      return Effect.gen(function* () {
        const scope = yield* Effect.scope
        let at: Bound = bound
        if (!inSession) {
          const slot = yield* makeSlot(engine, entry, { name: "stream" }, bound._tag === "Root" && false)
          yield* Scope.addFinalizerExit(scope, (exit) => Effect.ignore(endSlot(slot, undefined, Exit.isSuccess(exit))))
          at = { _tag: "Slot", slot, unit: undefined }
        }
        const place = at
        yield* run(`DECLARE ${cursor} NO SCROLL CURSOR FOR ${text}`, params, place)
        if (inSession) {
          // In a failed transaction it is gone already.
          yield* Scope.addFinalizer(scope, Effect.ignore(run(`CLOSE ${cursor}`, [], place)))
        }
        const fetch = Effect.forkIn(run(`FETCH FORWARD ${rowsPerFetch} FROM ${cursor}`, [], place), scope)
        let next = yield* fetch
        const pull = Effect.gen(function* () {
          const rows = yield* Effect.mapError(Fiber.join(next), Option.some)
          if (rows.length === 0) return yield* Effect.fail(Option.none())
          if (rows.length < rowsPerFetch) next = yield* Effect.fork(Effect.succeed([]))
          else next = yield* fetch
          return Chunk.unsafeFromArray(rows as Array<any>)
        })
        return Stream.repeatEffectChunkOption(pull)
      })
    })
  )
