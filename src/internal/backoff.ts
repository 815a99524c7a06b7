/**
 * Pauses between attempts that fail: longer each time, and never the same for two pools.
 */

const first = 25
const most = 1000

/** @internal */
export class Backoff {
  private millis = 0
  private timer: NodeJS.Timeout | undefined = undefined

  /** It is too early for another attempt. */
  get pausing(): boolean {
    return this.timer !== undefined
  }

  /** Calls back after the pause. `awaited`: somebody waits for it, and keeps the process running. */
  pause(awaited: boolean, f: () => void): void {
    this.millis = Math.min(most, this.millis === 0 ? first : this.millis * 2)
    this.timer = setTimeout(
      () => {
        this.timer = undefined
        f()
      },
      this.millis * (0.5 + Math.random())
    )
    if (!awaited) this.timer.unref()
  }

  /** An attempt has succeeded. */
  reset(): void {
    this.millis = 0
  }

  stop(): void {
    clearTimeout(this.timer)
  }
}
