/**
 * What is left of work that has ended until a major collection takes it: objects that the engine has made in the old
 * generation, or that hang on one, though nobody uses them any more. They cost their copying now and a pause later.
 */
import { Session } from "node:inspector/promises"
import type { HeapProfiler } from "node:inspector"
import { fibers } from "./contender.js"
import type { Work, WorkloadName } from "./contender.js"
import type { Remote } from "./remote.js"

/** In C, or parts of ours. */
const others = ["pgbench, in C", "20 fibers alone", "20 fibers, the wire"]

/** Bytes of one unit, sampled. */
export const keptBy = async (work: Work, n: number): Promise<number> => {
  const session = new Session()
  session.connect()
  try {
    await session.post("HeapProfiler.startSampling", {
      samplingInterval: 2048,
      includeObjectsCollectedByMajorGC: true,
      includeObjectsCollectedByMinorGC: false
    } as HeapProfiler.StartSamplingParameterType)
    await work(n)
    // Of the last units nobody knows yet.
    for (let i = 0; i < 2; i++) void globalThis.gc?.({ type: "minor" })
    const { profile } = await session.post("HeapProfiler.stopSampling")
    const sizeOf = (node: HeapProfiler.SamplingHeapProfileNode): number =>
      node.children.reduce((sum, child) => sum + sizeOf(child), node.selfSize)
    return sizeOf(profile.head) / n
  } finally {
    session.disconnect()
  }
}

export interface Kept {
  readonly name: WorkloadName
  readonly bytes: Readonly<Record<string, number>>
}

/** Units of a turn, and after how many turns the compiler has learnt what it will. */
const turns = [
  ["insert", 1000, 12],
  ["twenty", 300, 12],
  ["select", 2000, 12],
  ["fibersInsert", fibers * 30, 12],
  ["fibersSelect", fibers * 60, 12],
  ["stream", 1, 2]
] as const

/** Of each contender, at work for a while. */
export const kept = async (
  contenders: ReadonlyMap<string, Remote>,
  { factor }: { readonly factor: number }
): Promise<ReadonlyArray<Kept>> => {
  const all: Array<Kept> = []
  for (const [name, units, warmUp] of turns) {
    const n = Math.max(1, Math.ceil(units * factor))
    const bytes: Record<string, number> = {}
    for (const [contender, remote] of contenders) {
      if (others.includes(contender) || !remote.works.includes(name)) continue
      for (let i = 0; i < warmUp; i++) await remote.run(name, n)
      bytes[contender] = await remote.kept(name, n * 2)
    }
    all.push({ name, bytes })
  }
  return all
}
