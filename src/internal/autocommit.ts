/**
 * A session around an effect: one of its own, or the ambient one joined.
 */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import { markRollbackOnly } from "./block.js"
import { limited } from "./body.js"
import { conflict } from "./conflict.js"
import type { EngineCore } from "./engine.js"
import { unitOf } from "./execute.js"
import { attemptsOf, blockSpan } from "./observe.js"
import type { Attempts } from "./observe.js"
import { makeSlot, timed } from "./session.js"
import type { Slot, SlotOptions } from "./slot.js"
import { validate } from "./transactionSql.js"

type AnyEffect = Effect.Effect<any, any, any>

/** A session of its own, or the ambient one joined. @internal */
export const autocommit = (engine: EngineCore, effect: AnyEffect, options: SlotOptions): AnyEffect =>
  Effect.withFiberRuntime<any, any, any>((fiber) => {
    const entry = Ambient.entry(fiber, engine)
    const { slot } = entry
    if (slot === undefined) return own(engine, entry, effect, options, false, attemptsOf(fiber))
    const refused = validate(options)
    if (refused !== undefined) return Effect.fail(refused)
    const inside = joined(slot, entry, effect, options)
    return slot.needsGate ? Effect.zipRight(slot.prepare, inside) : inside
  })

/** @internal */
export const isolated = (engine: EngineCore, effect: AnyEffect, options: SlotOptions): AnyEffect =>
  Effect.withFiberRuntime<any, any, any>((fiber) =>
    own(engine, Ambient.entry(fiber, engine), effect, options, true, attemptsOf(fiber))
  )

const own = (
  engine: EngineCore,
  entry: Entry,
  effect: AnyEffect,
  options: SlotOptions,
  apart: boolean,
  attempts: Attempts | undefined
): AnyEffect =>
  Effect.flatMap(makeSlot(engine, entry, options, apart), (slot) => {
    const whole = timed(slot, effect, options.timeout)
    return attempts === undefined
      ? whole
      : blockSpan("session", engine, options, attempts, () => slot.unit?.outcome ?? "none", whole)
  })

/** Until it has succeeded. */
const once = <A, E, R>(effect: Effect.Effect<A, E, R>): Effect.Effect<void, E, R> => {
  let over = false
  return Effect.suspend(() =>
    over
      ? Effect.void
      : Effect.map(effect, () => {
          over = true
        })
  )
}

/** A failure marks the block that it joins as rollback-only. */
const joined = (slot: Slot, entry: Entry, effect: AnyEffect, options: SlotOptions): AnyEffect =>
  Effect.suspend(() => {
    const at = unitOf(slot, entry.frame)
    if (at instanceof Error) return Effect.fail(at)
    const refused = conflict(at.unit, at.frame, options, true)
    if (refused !== undefined) return refused
    const { beforeCommit } = options
    // Of the COMMIT that keeps what the effect does, which is not this one's to make.
    if (beforeCommit !== undefined) at.frame.top.beforeCommit.push(once(slot.engine.provide(beforeCommit)))
    return Effect.onExit(limited(effect, options.name ?? at.frame.name, options.timeout), (exit) =>
      Effect.sync(() => {
        if (Exit.isSuccess(exit) || slot.ended || slot.needsGate) return
        const { frame } = entry
        const unit = slot.get()
        const left = frame !== undefined && !frame.ended && frame.unit === unit ? frame : unit.frame
        markRollbackOnly(left, "an autocommit that joined the session failed")
      })
    )
  })
