import * as Effect from "effect/Effect"
import { parseArgs } from "node:util"
import { bank } from "./bank.js"
import { Random } from "./random.js"
import { makeWorld } from "./world.js"
const { values: args } = parseArgs({
  options: { seconds: { type: "string", default: "10" }, seed: { type: "string" } }
})
process.on("unhandledRejection", (e) => console.log("UNHANDLED", e))
const seed = args.seed ? Number(args.seed) : Date.now() % 1e9
console.log("seed", seed)
await Effect.runPromise(
  Effect.scoped(
    Effect.gen(function* () {
      console.time("start")
      const world = yield* makeWorld()
      console.timeEnd("start")
      const r = yield* bank(world, new Random(seed), { seconds: Number(args.seconds) })
      console.log({ ...r, lost: r.lost.length, ghosts: r.ghosts.length })
    })
  )
)
