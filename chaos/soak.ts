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
  /** Medians of the four quarters of the rounds, in bytes. */
  readonly heap: ReadonlyArray<number>
  readonly wrong: ReadonlyArray<string>
}

/** Until every path has been compiled and every cache has its entries. */
const warmUp = 15

/** More than this is a leak: less is the caches of statement texts, which are full after some thousand cursors. */
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
    const quarters = [0, 1, 2, 3].map((n) =>
      median(heaps.slice(Math.floor((n * heaps.length) / 4), Math.ceil(((n + 1) * heaps.length) / 4)))
    )
    const growth = quarters[3]! - quarters[0]!
    if (growth > allowedGrowth) wrong.push(`the heap grew by ${growth} bytes`)
    return {
      rounds,
      jobs,
      files: files.length === 0 ? undefined : ([Math.min(...files), Math.max(...files)] as const),
      heap: quarters,
      wrong
    }
  })
