import { NodeHttpServer } from "@effect/platform-node"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { createServer } from "node:http"
import type { AddressInfo } from "node:net"

/** Serves it on a free port, for the scope, and yields the address. */
export const listening = <E, R>(layer: Layer.Layer<never, E, R>) =>
  Effect.gen(function* () {
    const server = yield* Effect.acquireRelease(
      Effect.sync(() => createServer()),
      (server) => Effect.sync(() => server.closeAllConnections())
    )
    yield* Layer.build(
      Layer.provide(
        layer,
        NodeHttpServer.layer(() => server, { port: 0, host: "127.0.0.1" })
      )
    )
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  })
