import * as Effect from "effect/Effect"
import { DbLayer } from "effect-db"
import { single } from "./single.js"
import { soak } from "./soak.js"
import { Random } from "./random.js"
import { makeWorld, applicationName } from "./world.js"
process.on("unhandledRejection", (e) => console.log("UNHANDLED", e))
await Effect.runPromise(
  Effect.scoped(
    Effect.gen(function* () {
      const world = yield* makeWorld()
      console.time("single")
      const s = yield* Effect.provide(
        single(world, new Random(1), Number(process.argv[2])),
        DbLayer({ url: world.proxy.url, applicationName, maxConnections: 1 })
      )
      console.timeEnd("single")
      console.log(s)
      yield* Effect.sleep(1000)
      console.time("soak")
      const k = yield* Effect.provide(
        soak(world, new Random(1), 50),
        DbLayer({ url: world.proxy.url, applicationName, maxConnections: 8 })
      )
      console.timeEnd("soak")
      console.log(k)
    })
  )
)
