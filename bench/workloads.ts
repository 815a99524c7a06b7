/**
 * What is measured, and what was promised of it.
 */
import { fibers, rowsOfStream } from "./contender.js"
import type { WorkloadName } from "./contender.js"

/** The ratio of effect-db's time to that of another: at most, and better than promised. */
export interface Goal {
  readonly against: string
  readonly most: number
  readonly beyond?: number
}

export interface Workload {
  readonly name: WorkloadName
  readonly title: string
  /** Units of one turn: in full, and with `--quick`. */
  readonly n: number
  readonly quick: number
  readonly rounds: number
  /** Turns of everybody before the rounds that count. */
  readonly warmUp: number
  /** Over the link that adds a millisecond to each round trip. */
  readonly slow?: boolean
  readonly goals: ReadonlyArray<Goal>
}

export const workloads: ReadonlyArray<Workload> = [
  {
    name: "insert",
    title: "transaction with one insert",
    n: 1000,
    quick: 20,
    rounds: 15,
    warmUp: 4,
    goals: [
      { against: "pg", most: 0.95, beyond: 0.8 },
      { against: "@effect/sql-pg", most: 0.55, beyond: 0.45 }
    ]
  },
  { name: "five", title: "transaction with five statements", n: 400, quick: 10, rounds: 11, warmUp: 2, goals: [] },
  {
    name: "twenty",
    title: "transaction with twenty inserts at once",
    n: 300,
    quick: 5,
    rounds: 15,
    warmUp: 4,
    goals: [
      { against: "@effect/sql-pg", most: 0.2, beyond: 0.15 },
      { against: "postgres", most: 1, beyond: 0.7 }
    ]
  },
  {
    name: "select",
    title: "one select, no transaction",
    n: 2000,
    quick: 40,
    rounds: 15,
    warmUp: 4,
    goals: [
      { against: "@effect/sql-pg", most: 0.6, beyond: 0.5 },
      { against: "pg", most: 1, beyond: 0.9 }
    ]
  },
  {
    name: "fibersInsert",
    title: `${fibers} fibers, each transaction one insert`,
    n: fibers * 30,
    quick: fibers,
    rounds: 15,
    warmUp: 4,
    goals: [
      { against: "@effect/sql-pg", most: 0.5, beyond: 0.4 },
      { against: "pg", most: 1.1, beyond: 0.9 }
    ]
  },
  {
    name: "fibersSelect",
    title: `${fibers} fibers, one select each time`,
    n: fibers * 60,
    quick: fibers,
    rounds: 15,
    warmUp: 4,
    goals: [
      { against: "pg", most: 0.7, beyond: 0.5 },
      { against: "postgres", most: 1.3, beyond: 1 }
    ]
  },
  {
    name: "tpcb",
    title: "TPC-B over a link of 1 ms",
    // Who has stood still for the turns of eight others needs some tens before it is what it is in a program at work.
    n: 150,
    quick: 3,
    rounds: 9,
    warmUp: 2,
    slow: true,
    goals: [{ against: "pg", most: 0.87 }]
  },
  {
    name: "stream",
    title: `stream of ${rowsOfStream.toLocaleString("en")} rows`,
    n: 1,
    quick: 1,
    rounds: 5,
    warmUp: 1,
    goals: [{ against: "@effect/sql-pg", most: 0.8, beyond: 0.6 }]
  }
]
