/**
 * Results larger than memory: a cursor in the ambient transaction, or in one of its own for the scope of the stream,
 * which commits when the rows have been read to their end.
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
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import { plain } from "./controls.js"
import { deadline } from "./deadline.js"
import type { EngineCore } from "./engine.js"
import { boundIn, execute, executeSpec, homeOf } from "./execute.js"
import type { Bound } from "./execute.js"
import { framesAbove } from "./frame.js"
import type { Observation } from "./observe.js"
import { codeOf } from "./queryText.js"
import { endSlot } from "./session.js"
import { Slot } from "./slot.js"
import { isRefused, makeSpec } from "./statement.js"
import type { Spec } from "./statement.js"
import { executeTogether } from "./together.js"

/** The first FETCH is small: nobody knows yet how wide the rows are. Those after it are as large as fits. */
const firstRows = 20
const mostRows = 500
const bytesPerFetch = 1 << 20

let cursors = 0

/**
 * Only one query has a cursor. INSERT ... RETURNING, also inside of WITH, comes in one piece; so does SELECT ... INTO,
 * what stands in one text with others, and what is no text.
 */
const hasCursor = (text: unknown): boolean => {
  if (typeof text !== "string") return false
  const code = codeOf(text)
  return (
    /^[\s(]*(?:select|values|table|with)\b/i.test(code) &&
    !/;\s*[^\s;]/.test(code) &&
    !(/^[\s(]*with\b/i.test(code) ? /\b(?:insert|update|delete|merge|into)\b/i : /\binto\b/i).test(code)
  )
}

/** A row, when the transaction has written something: what a query may do by its functions can't be seen in its text. */
const hasWritten = "SELECT WHERE pg_catalog.txid_current_if_assigned() IS NOT NULL"

/** In a finalizer, which nothing interrupts: not for ever. */
const endOf = (fiber: Fiber.RuntimeFiber<unknown, unknown>, millis: number): Effect.Effect<void> =>
  Effect.async<void>((resume) => {
    const stop = deadline(millis, () => resume(Effect.void))
    fiber.addObserver(() => {
      stop()
      resume(Effect.void)
    })
  })

/** @internal */
export const streamRows = (
  engine: EngineCore,
  given: Bound,
  text: string,
  params: ReadonlyArray<unknown>,
  watch: Observation | undefined
): Stream.Stream<any, SqlError> =>
  Stream.unwrapScoped(
    Effect.withFiberRuntime<Stream.Stream<any, SqlError>, SqlError, Scope.Scope>((fiber) => {
      const timed = <A>(rows: Effect.Effect<A, SqlError>): Effect.Effect<A, SqlError> =>
        watch === undefined
          ? rows
          : Effect.ensuring(
              rows,
              Effect.sync(() => watch.answered())
            )
      const run = (text: string, params: ReadonlyArray<unknown>, at: Bound) =>
        Effect.withFiberRuntime<ReadonlyArray<any>, SqlError>((fiber) =>
          timed(execute(fiber, engine, at, text, params, "object", false, (result) => result.rows, watch))
        )
      const entry = Ambient.entry(fiber, engine)
      const bound = boundIn(given, entry)
      if (!hasCursor(text)) {
        return Effect.succeed(Stream.unwrap(Effect.map(run(text, params, bound), Stream.fromIterable)))
      }
      const path = Ambient.searchPath(entry)
      const session =
        bound._tag === "Slot"
          ? bound.slot
          : bound._tag === "Ambient" || entry.slot?.runsOn(bound.root) === true
            ? entry.slot
            : undefined
      const home = session === undefined ? homeOf(engine, bound, entry) : undefined
      if (home instanceof DbError) return Effect.fail(home)
      const slot = session ?? new Slot(engine, { name: "stream" }, home)
      const cursor = `effect_db_cursor_${++cursors}`
      // Left while the server worked for rows that nobody will read.
      let cut = false
      return Effect.gen(function* () {
        const scope = yield* Effect.scope
        // Of a stream that was read to its end nothing is left to do. Of one that was left only the log can be told.
        if (session === undefined) {
          yield* Scope.addFinalizerExit(scope, (exit) =>
            Effect.catchAllCause(endSlot(slot, undefined, Exit.isSuccess(exit) && !cut), (cause) =>
              Exit.isSuccess(exit)
                ? Effect.logError(
                    "effect-db: a stream was left before its end, and what it did is not committed",
                    cause
                  )
                : Effect.void
            )
          )
        }
        const first: Bound = bound._tag === "Slot" ? bound : { _tag: "Slot", slot, unit: undefined }
        yield* run(`DECLARE ${cursor} NO SCROLL CURSOR FOR ${text}`, params, first)
        const unit = slot.get()
        const at: Bound = { _tag: "Slot", slot, unit }
        const { transactions } = unit
        const block = entry.slot === slot && entry.frame?.unit === unit ? entry.frame.top : unit.frame.top
        let rowsPerFetch = firstRows
        let bytes = 0
        const weigh = (size: number): void => {
          bytes = size
        }
        // A cursor is its transaction's, and goes with a block that is rolled back: asked for afterwards, it would make
        // the transaction fail that is open then.
        const of = {
          get isGone() {
            return unit.transactions !== transactions || framesAbove(block).some((_) => _.undone)
          }
        }
        // It rides with the next statement, as RELEASE does: a finalizer must not wait behind what siblings run.
        yield* Scope.addFinalizer(
          scope,
          Effect.sync(() => {
            if (session !== undefined && !unit.aborted && !of.isGone) unit.pending.push(plain(`CLOSE ${cursor}`))
          })
        )
        // Whoever asks for rows, what the query calls looks its names up where the cursor was declared.
        const made = (text: string, prepare: boolean): Spec | DbError =>
          makeSpec(text, [], "object", { several: false, prepare, path })
        let sent = false
        const sending = {
          sent: () => {
            sent = true
            watch?.fetching()
          }
        }
        let wrote = false
        const fetchOne = Effect.withFiberRuntime<void, SqlError>((fiber) => {
          sent = false
          const fetch = made(`FETCH FORWARD ${rowsPerFetch} FROM ${cursor}`, false)
          if (isRefused(fetch)) return Effect.fail(fetch)
          const spec: Spec = { ...fetch, cursor: of, weigh, watch: sending }
          if (session !== undefined) {
            return executeSpec(fiber, engine, at, spec, ({ rows }) => {
              fetched = rows
            })
          }
          const asked = made(hasWritten, true)
          if (isRefused(asked)) return Effect.fail(asked)
          return Effect.map(executeTogether(slot, block, [spec, asked]), ([rows, written]) => {
            wrote = written!.rows.length > 0
            fetched = rows!.rows
          })
        })
        let next: Fiber.RuntimeFiber<void, SqlError> | undefined = undefined
        // Not the fiber's value, which V8 may keep for as long as it likes.
        let fetched: ReadonlyArray<any> = []
        const fetch = Effect.uninterruptible(
          Effect.map(Effect.forkDaemon(Effect.interruptible(timed(fetchOne))), (fiber) => {
            next = fiber
          })
        )
        yield* Scope.addFinalizerExit(scope, (exit) =>
          Effect.suspend(() => {
            if (next === undefined) return Effect.void
            // Of a session of its own nothing is kept but what the query has written.
            cut = session === undefined && !wrote && next.unsafePoll() === null
            const undone = cut || Exit.isInterrupted(exit) || (session === undefined && Exit.isFailure(exit))
            // Who stops reading has not asked for a failed transaction, which is what a cancelled FETCH leaves.
            const ended = undone || !sent ? Effect.void : endOf(next, engine.config.settleMillis)
            return Effect.zipRight(ended, Fiber.interrupt(next))
          })
        )
        yield* fetch
        // Here and not in a finalizer: a COMMIT that fails is the stream's failure.
        const end = session === undefined ? endSlot(slot, undefined, true) : Effect.void
        const pull = Effect.suspend(() =>
          next === undefined
            ? Effect.zipRight(Effect.mapError(end, Option.some), Effect.fail(Option.none()))
            : Effect.mapError(Fiber.join(next), Option.some)
        ).pipe(
          Effect.flatMap(() => {
            const rows = fetched
            fetched = []
            next = undefined
            if (rows.length < rowsPerFetch) return Effect.succeed(rows)
            rowsPerFetch = Math.max(1, Math.min(mostRows, Math.floor((bytesPerFetch * rows.length) / bytes)))
            return Effect.as(fetch, rows)
          }),
          Effect.map(Chunk.unsafeFromArray as (rows: ReadonlyArray<any>) => Chunk.Chunk<any>)
        )
        return Stream.repeatEffectChunkOption(pull)
      })
    })
  )
