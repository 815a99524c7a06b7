/**
 * Interleaved rounds: in each, every contender has its turn, in another order each time. What slows the machine down
 * for a while slows all of them down; ratios are taken within a round.
 */
import type { Taken } from "./worker.js"

export interface Sample {
  readonly name: string
  /** Microseconds of one unit, by round. */
  readonly micros: ReadonlyArray<number>
  /** Of these, what its process spent computing. None by a clock of its own. */
  readonly cpu: ReadonlyArray<number>
}

export const median = (values: ReadonlyArray<number>): number => {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
}

/** The median of the ratios of the rounds. */
export const ratio = (a: Sample, b: Sample): number => median(a.micros.map((_, i) => _ / b.micros[i]!))

/** As `ratio`, of the fastest round of each: what it comes to when nothing else runs. */
export const bestRatio = (a: Sample, b: Sample): number => Math.min(...a.micros) / Math.min(...b.micros)

export const measure = async (
  contenders: ReadonlyMap<string, (n: number) => Promise<Taken>>,
  { n, rounds, warmUp }: { readonly n: number; readonly rounds: number; readonly warmUp: number }
): Promise<ReadonlyArray<Sample>> => {
  const all = [...contenders].map(([name, work]) => ({
    name,
    work,
    micros: [] as Array<number>,
    cpu: [] as Array<number>
  }))
  // Long enough for the compiler; a forced garbage collection in between would throw its work away.
  for (let round = 0; round < warmUp; round++) for (const { work } of all) await work(n)
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < all.length; i++) {
      const { cpu, micros, work } = all[(i + round) % all.length]!
      const taken = await work(n)
      micros.push(taken.micros)
      if (taken.cpu !== undefined) cpu.push(taken.cpu)
    }
  }
  return all
}
