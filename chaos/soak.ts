/**
 * The balance after each of many rounds of random work: connections as the client counts them and as the server does,
 * open files, and the heap.
 */
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import { DbEngine } from "effect-db"
import { judge } from "./ledger.js"
import type { Told } from "./ledger.js"
import { job, marksText, schema } from "./programs.js"
import type { Mark } from "./programs.js"
import type { Random } from "./random.js"
import { heap, openFiles, unrest } from "./world.js"
import type { Services, World } from "./world.js"

export interface SoakReport {
  readonly rounds: number
  readonly jobs: number
  /** Open files besides those of the connections: the least and the most after a round. */
  readonly files: readonly [least: number, most: number] | undefined
  /** Medians of the first and the last quarter of the rounds, in bytes. */
  readonly heap: readonly [first: number, last: number]
  readonly wrong: ReadonlyArray<string>
}

/** Until every path has been compiled and every cache has its entries. */
const warmUp = 15

/** More than this between the first and the last quarter is a leak, at the latest after a thousand rounds. */
export const allowedGrowth = 2 << 20

const median = (numbers: ReadonlyArray<number>): number => [...numbers].sort((a, b) => a - b)[numbers.length >> 1] ?? 0

export const soak = (world: World, random: Random, rounds: number): Effect.Effect<SoakReport, Error, Services> =>
  Effect.gen(function* () {
    const engine = yield* DbEngine
    yield* world.ask(schema)
    const wrong: Array<string> = []
    const files: Array<number> = []
    const heaps: Array<number> = []
    let log: Array<Told> = []
    let jobs = 0

    const one = (own: Random) =>
      Effect.gen(function* () {
        const work = job(own)
        const exit = own.chance(0.3)
          ? yield* Effect.fork(work.run).pipe(
              Effect.tap(() => Effect.sleep(own.below(8))),
              Effect.flatMap(Fiber.interrupt)
            )
          : yield* Effect.exit(work.run)
        const surprise = work.surprise(exit)
        if (surprise !== undefined) wrong.push(surprise)
        log.push(work.told(exit))
        jobs++
      })

    for (let round = 0; round < warmUp + rounds; round++) {
      yield* Effect.forEach(
        Array.from({ length: 16 }, () => random.fork()),
        one,
        { concurrency: 10, discard: true }
      )
      if (random.chance(0.05)) yield* engine.evictAll
      wrong.push(...(yield* unrest(world, engine)).map((_) => `round ${round}: ${_}`))
      const marks = yield* world.ask<Mark>(marksText)
      const verdict = judge(log, new Set(marks.map((_) => _.id)))
      const amiss = verdict.lost.length + verdict.ghosts.length + verdict.strangers.length
      if (amiss > 0 || marks.some((_) => _.parts !== 2)) wrong.push(`round ${round}: ${amiss} rows are not as told`)
      yield* world.ask("TRUNCATE marks")
      log = []
      world.proxy.reset()
      const { total } = yield* engine.stats
      if (round < warmUp) continue
      heaps.push(heap())
      // Through the proxy each connection is three sockets of this process: ours, and the proxy's two.
      const open = openFiles()
      if (open !== undefined) files.push(open.length - 3 * total)
    }
    if (new Set(files).size > 1) wrong.push(`open files: from ${Math.min(...files)} to ${Math.max(...files)}`)
    const quarter = Math.max(1, heaps.length >> 2)
    const growth = [median(heaps.slice(0, quarter)), median(heaps.slice(-quarter))] as const
    if (growth[1] - growth[0] > allowedGrowth) wrong.push(`the heap grew by ${growth[1] - growth[0]} bytes`)
    return {
      rounds,
      jobs,
      files: files.length === 0 ? undefined : ([Math.min(...files), Math.max(...files)] as const),
      heap: growth,
      wrong
    }
  })
