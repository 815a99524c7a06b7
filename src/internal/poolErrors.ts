/**
 * Why the pool gives no connection, in words that tell "all are in use" from "the database can't be reached".
 */
import { DbError } from "../DbError.js"
import type { PoolStats } from "./pool.js"

/** @internal */
export const acquireTimeout = (at: {
  readonly timeoutMillis: number
  readonly waited: number
  readonly stats: PoolStats
  readonly holders: ReadonlyArray<{ readonly name: string; readonly millis: number }>
  readonly suspended: boolean
  readonly lastError: DbError | undefined
}): DbError => {
  const { holders, stats, suspended, timeoutMillis, waited } = at
  const full = stats.used >= stats.max
  const down = full || suspended ? undefined : at.lastError
  const held = holders.map((_) => `${_.name} for ${_.millis} ms`).join(", ")
  const [reason, hint] = suspended
    ? ["the pool is suspended", "Call resume, or give those who wait an acquireTimeout longer than the pause."]
    : full
      ? [
          `all ${stats.max} are in use (${held}), ${stats.pending} more wait`,
          "Hold connections for shorter, raise maxConnections, or look for a fiber that holds one and waits for another."
        ]
      : [
          down === undefined
            ? `the database has not let one in yet (${stats.connecting} are being opened, ${stats.closing} closed)`
            : `the database can't be reached (${down.reason.message})`,
          "Check the server and the network; the cause says what the last attempt met."
        ]
  return DbError.make("AcquireTimeout", {
    message: `No connection within ${timeoutMillis} ms: ${reason}`,
    hint,
    holders,
    waited,
    isRetryable: true,
    cause: down
  })
}

/** @internal */
export const poolClosed = (): DbError =>
  DbError.make("PoolClosed", {
    message: "The engine is closed.",
    hint: "Its layer's scope has ended. Work that outlives it needs an engine of a longer scope."
  })

/** Refused for now: too many connections, starting, stopping. @internal */
export const isTemporary = (error: DbError): boolean => {
  const state = error.reason.sqlState
  return state !== undefined && (state.startsWith("53") || state === "57P03" || state === "57P02" || state === "57P01")
}

/** The same answer for everybody until somebody has changed something, and more of it may lock an account. @internal */
export const isFinal = ({ reason }: DbError): boolean =>
  reason._tag === "AuthenticationError" || reason._tag === "AuthorizationError" || reason._tag === "InvalidInput"
