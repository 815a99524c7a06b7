/**
 * Whether a block can have its options in the transaction that it stands in.
 */
import * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import { atTurn, framesAbove } from "./frame.js"
import type { Frame } from "./frame.js"
import { conflicts, settings } from "./transactionSql.js"
import type { TransactionOptions } from "./transactionSql.js"
import type { Unit } from "./unit.js"

/** @internal */
export const refuse = (message: string, hint: string): Effect.Effect<never, DbError> =>
  Effect.fail(DbError.make("PropagationError", { message, hint }))

/** Whether a setting was set to something else, or to nothing, where the block would join. */
const differs = (unit: Unit, frame: Frame, [name, value]: readonly [string, string]): boolean => {
  for (const { options } of [...framesAbove(frame), unit]) {
    const found = settings(options).find(([_]) => _ === name)
    if (found !== undefined) return found[1] !== value
  }
  return true
}

/** Options that the open transaction can't honour any more. @internal */
export const conflict = (
  unit: Unit,
  frame: Frame,
  options: TransactionOptions,
  joins: boolean
): Effect.Effect<never, DbError> | undefined => {
  const readOnly = unit.options.readOnly === true || framesAbove(frame).some((_) => _.options.readOnly === true)
  const current = { ...unit.options, readOnly: readOnly ? true : unit.options.readOnly }
  // A savepoint can be read-only inside a transaction that is not.
  const wanted = !joins && options.readOnly === true ? { ...options, readOnly: undefined } : options
  const name =
    conflicts(current, wanted) ??
    (joins
      ? (["settings", "statementTimeout", "lockTimeout"] as const).find((_) =>
          settings({ [_]: options[_] }).some((setting) => differs(unit, frame.top, setting))
        )
      : undefined)
  return name === undefined
    ? undefined
    : refuse(
        `The open transaction of the session "${unit.name}" can't honour the option ${name} of a block inside it.`,
        'Open the session with it, or use propagation: "requiresNew" or DbSession.isolated.'
      )
}

const asksNothing = ({
  deferrable,
  isolation,
  lockTimeout,
  readOnly,
  settings,
  statementTimeout
}: TransactionOptions) =>
  (deferrable ?? isolation ?? lockTimeout ?? readOnly ?? settings ?? statementTimeout) === undefined

/**
 * The block that one with these options can join: known when it is its turn, since what a sibling has open then is not
 * what the statements will be in.
 * @internal
 */
export const joinable = (unit: Unit, frame: Frame, options: TransactionOptions): Effect.Effect<Frame, DbError> => {
  const join = () => conflict(unit, frame, options, true) ?? Effect.succeed(frame.top)
  if (asksNothing(options) || frame.free) return join()
  return atTurn(frame, join)
}
