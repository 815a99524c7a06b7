/**
 * Work that asks for itself again through what it calls: one round after the other, not one within the other.
 */

/** Runs a round; asked for during one, another after it. @internal */
export const inRounds = (round: () => void): (() => void) => {
  let running = false
  let asked = false
  return () => {
    asked = true
    if (running) return
    running = true
    try {
      while (asked) {
        asked = false
        round()
      }
    } finally {
      running = false
    }
  }
}
