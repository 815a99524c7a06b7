/**
 * Time limits on others: what counts is time in which this process could have listened to them. While it computes
 * without a pause, as when a hundred thousand fibers start at once, nobody's answer is read, and the clock would blame
 * the network or the server for it.
 */
import { after, isBlocking } from "./blocking.js"

const slices = 10
/** Shorter ones would say more about timers than about time. */
const shortest = 20

/** As long as a timer can count, and longer: what is switched off. @internal */
export const never = 2 ** 31 - 1

/** Calls back once after that many milliseconds, whatever this process did meanwhile; it keeps no process alive. @internal */
export const timer = (millis: number, f: () => void): (() => void) => {
  return millis >= never ? () => {} : after(millis, f, false)
}

/**
 * Calls back once after that many milliseconds, of which a standstill counts as one slice; after `never`, not at all. The
 * returned function stops it.
 * @internal
 */
export const deadline = (millis: number, f: () => void): (() => void) => {
  if (millis >= never) return () => {}
  let stop: () => void = () => {}
  let left = millis
  const since = performance.now()
  const next = (): void => {
    // Timers count from when their turn of the event loop has begun: a little early, each of them.
    if (left <= 0) left = millis - (performance.now() - since)
    // What has arrived meanwhile is read before anybody is called late.
    if (left <= 0) {
      stop = afterReading(f)
      return
    }
    const slice = Math.min(left, Math.max(shortest, millis / slices))
    left -= slice
    stop = after(slice, next)
  }
  next()
  return () => stop()
}

const afterReading = (f: () => void): (() => void) => {
  if (isBlocking()) return after(0, f)
  const last = setImmediate(f)
  return () => clearImmediate(last)
}
