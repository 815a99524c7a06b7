/**
 * Connections between two borrowers, neither idle nor lent: waited for, checked, reset. Most are back within a round
 * trip; of one that stays away for longer nobody knows whether it comes back.
 */
import { deadline } from "./deadline.js"
import type { Wire } from "./wire.js"

/** Who stays for more than one of these, and at most two, is late. */
const tickMillis = 125

/** @internal */
export class Between {
  /** With how many ticks they have been away. */
  private readonly ages = new Map<Wire, number>()
  private ticking = false

  constructor(private readonly onLate: () => void) {}

  get size(): number {
    return this.ages.size
  }

  get wires(): ReadonlyArray<Wire> {
    return [...this.ages.keys()]
  }

  has(wire: Wire): boolean {
    return this.ages.has(wire)
  }

  add(wire: Wire): void {
    if (!this.ages.has(wire)) this.ages.set(wire, 0)
  }

  delete(wire: Wire): void {
    this.ages.delete(wire)
  }

  /** How many will soon serve somebody. Whoever relies on them is told when one is late. */
  soon(): number {
    let count = 0
    for (const age of this.ages.values()) if (age < 2) count++
    if (count > 0 && !this.ticking) {
      this.ticking = true
      deadline(tickMillis, () => {
        this.ticking = false
        for (const [wire, age] of this.ages) this.ages.set(wire, age + 1)
        this.onLate()
      })
    }
    return count
  }
}
