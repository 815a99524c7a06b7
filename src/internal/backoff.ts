/**
 * Pauses between attempts that fail: longer each time, and never the same for two pools.
 */
import { after } from "./blocking.js"

const first = 25
const most = 1000

/** @internal */
export class Backoff {
  private millis = 0
  private timer: (() => void) | undefined = undefined

  /** It is too early for another attempt. */
  get pausing(): boolean {
    return this.timer !== undefined
  }

  /** Calls back after the pause. `awaited`: somebody waits for it, and keeps the process running. */
  pause(awaited: boolean, f: () => void): void {
    this.millis = Math.min(most, this.millis === 0 ? first : this.millis * 2)
    const millis = this.millis * (0.5 + Math.random())
    const over = () => {
      this.timer = undefined
      f()
    }
    this.timer = after(millis, over, awaited)
  }

  /** An attempt has succeeded. */
  reset(): void {
    this.millis = 0
  }

  stop(): void {
    this.timer?.()
  }
}
