/**
 * A pool of one under interruption. Fibers contend for the one connection and are interrupted at random steps: while
 * they wait, while they borrow, in BEGIN, in the body, in COMMIT. The slot is never lost, and all or nothing is there.
 */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import { DbEngine } from "effect-db"
import { judge } from "./ledger.js"
import type { Told, Verdict } from "./ledger.js"
import { job, marksText, schema } from "./programs.js"
import type { Mark } from "./programs.js"
import type { Random } from "./random.js"
import { unrest } from "./world.js"
import type { Services, World } from "./world.js"

export interface SingleReport extends Verdict {
  readonly tries: number
  readonly interrupted: number
  readonly wrong: ReadonlyArray<string>
}

const turn = Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))

/** Runs `tries` jobs by three fibers on an engine with one connection. */
export const single = (world: World, random: Random, tries: number): Effect.Effect<SingleReport, Error, Services> =>
  Effect.gen(function* () {
    const engine = yield* DbEngine
    yield* world.ask(schema)
    const log: Array<Told> = []
    const wrong: Array<string> = []
    let interrupted = 0
    let left = tries

    const one = (own: Random) =>
      Effect.gen(function* () {
        const work = job(own)
        // Few operations at a time make many places to be interrupted at; turns of the loop let answers in.
        // One that hangs must not keep the run from saying so.
        const fiber = yield* Effect.forkDaemon(
          Effect.withMaxOpsBeforeYield(work.run, work.yields ? own.pick([16, 64, 2048]) : 2048)
        )
        // Rather early than late, where most places are.
        const steps = Math.floor(2 ** (own.next() * 7)) - 1
        const step = own.pick([Effect.yieldNow(), turn, turn, Effect.sleep("1 millis")])
        for (let i = 0; i < steps && fiber.unsafePoll() === null; i++) yield* step
        const ended = yield* Effect.timeoutOption(Effect.disconnect(Fiber.interrupt(fiber)), "20 seconds")
        if (ended._tag === "None") {
          left = 0
          wrong.push(`${work.shape} never ended: ${JSON.stringify(yield* engine.stats)}`)
          return
        }
        const exit = ended.value
        if (Exit.isInterrupted(exit)) interrupted++
        const surprise = work.surprise(exit)
        if (surprise !== undefined) wrong.push(surprise)
        log.push(work.told(exit))
      })
    const worker = (own: Random) =>
      Effect.gen(function* () {
        while (left-- > 0) yield* one(own)
      })
    yield* Effect.all([worker(random.fork()), worker(random.fork()), worker(random.fork())], {
      concurrency: 3,
      discard: true
    })
    wrong.push(...(yield* unrest(world, engine)))
    yield* Effect.catchAll(engine.ping, (error) => Effect.sync(() => void wrong.push(String(error))))
    const marks = yield* world.ask<Mark>(marksText)
    for (const { id, parts } of marks) if (parts !== 2) wrong.push(`half of ${id} is there`)
    const verdict = judge(log, new Set(marks.map((_) => _.id)))
    for (const what of ["lost", "ghosts", "strangers"] as const) {
      if (verdict[what].length > 0) wrong.push(`${what}: ${verdict[what].length}, such as ${verdict[what][0]}`)
    }
    return { ...verdict, tries: log.length, interrupted, wrong }
  })
