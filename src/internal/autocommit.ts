/**
 * A session around an effect: one of its own, or the ambient one joined.
 */
import * as Effect from "effect/Effect"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import { markUnkept } from "./block.js"
import { keeps, limited } from "./body.js"
import { joinable } from "./conflict.js"
import type { EngineCore } from "./engine.js"
import { framesAbove } from "./frame.js"
import type { Frame } from "./frame.js"
import { unitOf } from "./execute.js"
import { attemptsOf, blockSpan } from "./observe.js"
import type { Attempts } from "./observe.js"
import { makeSlot, timed } from "./session.js"
import type { Slot, SlotOptions } from "./slot.js"
import { validateOwn } from "./transactionSql.js"

type AnyEffect = Effect.Effect<any, any, any>

/** A session of its own, or the ambient one joined. @internal */
export const autocommit = (engine: EngineCore, effect: AnyEffect, options: SlotOptions): AnyEffect =>
  Effect.withFiberRuntime<any, any, any>((fiber) => {
    const entry = Ambient.entry(fiber, engine)
    const { slot } = entry
    if (slot === undefined) return own(engine, entry, effect, options, false, attemptsOf(fiber))
    const refused = validateOwn(options)
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

/** Before the COMMIT of a block, or of one around it that keeps its work: until it has succeeded, or is taken back. */
const once = (block: Frame, effect: Effect.Effect<unknown, unknown>): (() => void) => {
  // A block that is released has handed it on.
  const end = () => {
    for (const frame of framesAbove(block)) frame.beforeCommit?.delete(hook)
  }
  const hook: Effect.Effect<unknown, unknown> = Effect.map(effect, end)
  block.addBeforeCommit(hook)
  return end
}

/** A failure marks the block that it joins as rollback-only. */
const joined = (slot: Slot, entry: Entry, effect: AnyEffect, options: SlotOptions): AnyEffect =>
  Effect.suspend(() => {
    const at = unitOf(slot, entry.frame)
    if (at instanceof Error) return Effect.fail(at)
    return Effect.uninterruptibleMask((restore) =>
      Effect.flatMap(restore(joinable(at.unit, at.frame, options)), (block) => {
        const { beforeCommit } = options
        // Of the COMMIT that keeps what the effect does, which is not this one's to make.
        const end = beforeCommit === undefined ? undefined : once(block, slot.engine.provide(beforeCommit))
        const body = restore(limited(effect, options.name ?? at.frame.name, options.timeout))
        return Effect.flatMap(Effect.exit(body), (exit) => {
          if (keeps(block, exit)) {
            if (end !== undefined) block.addAfter("afterRollback", Effect.sync(end))
            return exit
          }
          end?.()
          if (!slot.needsGate) {
            const unit = slot.get()
            markUnkept(block.unit === unit ? block : unit.frame, "an autocommit that joined the session failed")
          }
          return exit
        })
      })
    )
  })
