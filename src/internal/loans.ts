/**
 * Who has which connection of a pool, since when, and for too long.
 */
import { never } from "./deadline.js"
import type { Wire } from "./wire.js"

/** Who borrows, for error messages and the leak report. @internal */
export interface Holder {
  readonly name: string
}

interface Loan {
  readonly holder: Holder
  readonly since: number
  readonly leak: NodeJS.Timeout | undefined
}

/** @internal */
export class Loans {
  private readonly byWire = new Map<Wire, Loan>()

  constructor(
    private readonly leakMillis: number,
    private readonly onLeak: (holder: Holder, millis: number) => void
  ) {}

  get size(): number {
    return this.byWire.size
  }

  begin(wire: Wire, holder: Holder): void {
    const { leakMillis } = this
    let leak: NodeJS.Timeout | undefined = undefined
    if (leakMillis < never) leak = setTimeout(() => this.onLeak(holder, leakMillis), leakMillis).unref()
    this.byWire.set(wire, { holder, since: Date.now(), leak })
  }

  /** For how long it was lent, in milliseconds; nothing: it was not. */
  end(wire: Wire): number | undefined {
    const loan = this.byWire.get(wire)
    if (loan === undefined) return undefined
    this.byWire.delete(wire)
    clearTimeout(loan.leak)
    return Date.now() - loan.since
  }

  /** All of them, ended. */
  endAll(): ReadonlyArray<Wire> {
    const wires = [...this.byWire.keys()]
    for (const wire of wires) this.end(wire)
    return wires
  }

  get holders(): ReadonlyArray<{ readonly name: string; readonly millis: number }> {
    const now = Date.now()
    return [...this.byWire.values()].map(({ holder, since }) => ({ name: holder.name, millis: now - since }))
  }
}
