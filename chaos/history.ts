/**
 * Histories: transactions append to lists and read them, and from what they read it follows who came before whom.
 * After the way of Elle: a list shows the order of its writers, so the dependencies between transactions are known,
 * and a cycle among them is an anomaly.
 */

export interface Op {
  readonly key: number
  /** What was read; nothing: `value` was appended. */
  readonly read?: ReadonlyArray<number> | undefined
  readonly value?: number | undefined
}

export interface Transaction {
  readonly id: number
  readonly ops: ReadonlyArray<Op>
}

/** `ww`: overwrote what the other wrote. `wr`: read what the other wrote. `rw`: read what the other then overwrote. */
export type Dependency = "ww" | "wr" | "rw"

export interface Cycle {
  /** G0: writes only. G1c: writes and reads. G-single: one anti-dependency. G2: several, as in write skew. */
  readonly kind: "G0" | "G1c" | "G-single" | "G2"
  readonly transactions: ReadonlyArray<number>
}

export interface Analysis {
  readonly transactions: number
  readonly edges: number
  /** One for each knot of transactions that depend on each other. */
  readonly cycles: ReadonlyArray<Cycle>
  /** What no isolation level allows: aborted or intermediate reads, lost or doubled appends, lists that disagree. */
  readonly broken: ReadonlyArray<string>
}

type Graph = Map<number, Map<number, Set<Dependency>>>

/** Knots of more than one, in the graph of these dependencies (Tarjan, without recursion). */
const knots = (graph: Graph, kinds: ReadonlySet<Dependency>): ReadonlyArray<ReadonlyArray<number>> => {
  const successors = (id: number): Array<number> =>
    [...(graph.get(id) ?? [])].filter(([, how]) => [...how].some((kind) => kinds.has(kind))).map(([to]) => to)
  const index = new Map<number, number>()
  const low = new Map<number, number>()
  const onStack = new Set<number>()
  const stack: Array<number> = []
  const found: Array<Array<number>> = []
  for (const start of graph.keys()) {
    if (index.has(start)) continue
    const work = [{ id: start, next: successors(start) }]
    const enter = (id: number): void => {
      index.set(id, index.size)
      low.set(id, index.get(id)!)
      stack.push(id)
      onStack.add(id)
    }
    enter(start)
    while (work.length > 0) {
      const top = work[work.length - 1]!
      const to = top.next.pop()
      if (to !== undefined) {
        if (!index.has(to)) {
          enter(to)
          work.push({ id: to, next: successors(to) })
        } else if (onStack.has(to)) {
          low.set(top.id, Math.min(low.get(top.id)!, index.get(to)!))
        }
        continue
      }
      work.pop()
      const above = work[work.length - 1]
      if (above !== undefined) low.set(above.id, Math.min(low.get(above.id)!, low.get(top.id)!))
      if (low.get(top.id) !== index.get(top.id)) continue
      const knot: Array<number> = []
      for (;;) {
        const id = stack.pop()!
        onStack.delete(id)
        knot.push(id)
        if (id === top.id) break
      }
      if (knot.length > 1) found.push(knot)
    }
  }
  return found
}

const reaches = (graph: Graph, from: number, to: number, kinds: ReadonlySet<Dependency>): boolean => {
  const seen = new Set([from])
  const todo = [from]
  while (todo.length > 0) {
    for (const [next, how] of graph.get(todo.pop()!) ?? []) {
      if (seen.has(next) || ![...how].some((kind) => kinds.has(kind))) continue
      if (next === to) return true
      seen.add(next)
      todo.push(next)
    }
  }
  return false
}

const writes = new Set<Dependency>(["ww"])
const flow = new Set<Dependency>(["ww", "wr"])
const all = new Set<Dependency>(["ww", "wr", "rw"])

const kindOf = (graph: Graph, knot: ReadonlyArray<number>): Cycle["kind"] => {
  const inside: Graph = new Map(
    knot.map((id) => [id, new Map([...(graph.get(id) ?? [])].filter(([to]) => knot.includes(to)))])
  )
  if (knots(inside, writes).length > 0) return "G0"
  if (knots(inside, flow).length > 0) return "G1c"
  for (const [from, edges] of inside) {
    for (const [to, how] of edges) if (how.has("rw") && reaches(inside, to, from, flow)) return "G-single"
  }
  return "G2"
}

/**
 * What committed, held against itself and against the lists as they are in the end. `failed`: values whose
 * transactions were said to have failed.
 */
export const analyse = (
  committed: ReadonlyArray<Transaction>,
  lists: ReadonlyMap<number, ReadonlyArray<number>>,
  failed: ReadonlySet<number> = new Set()
): Analysis => {
  const broken: Array<string> = []
  const writer = new Map<number, number>()
  const lastOf = new Map<string, number>()
  for (const { id, ops } of committed) {
    for (const { key, read, value } of ops) {
      if (read !== undefined || value === undefined) continue
      writer.set(value, id)
      lastOf.set(`${id} ${key}`, value)
    }
  }
  for (const [key, list] of lists) {
    if (new Set(list).size !== list.length) broken.push(`list ${key} has a value twice`)
    for (const value of list) if (failed.has(value)) broken.push(`list ${key} has ${value} of a failed transaction`)
  }
  const graph: Graph = new Map(committed.map(({ id }) => [id, new Map()]))
  let edges = 0
  const depend = (from: number | undefined, to: number | undefined, how: Dependency): void => {
    if (from === undefined || to === undefined || from === to) return
    const known = graph.get(from)!.get(to)
    if (known === undefined) graph.get(from)!.set(to, new Set([how]))
    else known.add(how)
    edges++
  }
  for (const list of lists.values()) {
    for (let i = 1; i < list.length; i++) depend(writer.get(list[i - 1]!), writer.get(list[i]!), "ww")
  }
  for (const { id, ops } of committed) {
    for (const { key, read, value } of ops) {
      const list = lists.get(key) ?? []
      if (read === undefined) {
        if (value !== undefined && !list.includes(value)) broken.push(`list ${key} has lost ${value}`)
        continue
      }
      if (read.some((value, i) => list[i] !== value)) {
        broken.push(`transaction ${id} read a list ${key} that never was`)
        continue
      }
      const last = read[read.length - 1]
      const by = last === undefined ? undefined : writer.get(last)
      if (by !== undefined && by !== id && lastOf.get(`${by} ${key}`) !== last) {
        broken.push(`transaction ${id} saw the middle of transaction ${by}`)
      }
      // Its own appends behind what others wrote are no dependency.
      const foreign = read.filter((value) => writer.get(value) !== id)
      depend(writer.get(foreign[foreign.length - 1] ?? NaN), id, "wr")
      const next = list.slice(read.length).find((value) => writer.get(value) !== id)
      depend(id, writer.get(next ?? NaN), "rw")
    }
  }
  const cycles = knots(graph, all).map((knot): Cycle => ({ kind: kindOf(graph, knot), transactions: knot }))
  return { transactions: committed.length, edges, cycles, broken }
}
