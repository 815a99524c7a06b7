/** The service on its port. */
import { HttpServer } from "@effect/platform"
import { NodeHttpServer } from "@effect/platform-node"
import { Effect, Layer } from "effect"
import { createServer } from "node:http"
import type { Server } from "node:http"
import { routes } from "./routes.js"

/** Takes no new connections, lets requests in hand finish, and cuts off those that take longer than that. */
const drain = (server: Server) =>
  Effect.async<void>((resume) => {
    server.close(() => resume(Effect.void))
    const idle = setInterval(() => server.closeIdleConnections(), 50)
    const cut = setTimeout(() => server.closeAllConnections(), 10_000)
    return Effect.sync(() => {
      clearInterval(idle)
      clearTimeout(cut)
    })
  })

/** Serves until the layer's scope is closed. Port 0 is any that is free. */
export const serve = (port: number) =>
  Layer.suspend(() => {
    const server = createServer()
    return Layer.scopedDiscard(Effect.addFinalizer(() => drain(server))).pipe(
      Layer.provideMerge(HttpServer.serve(routes)),
      Layer.provideMerge(NodeHttpServer.layer(() => server, { port, host: "127.0.0.1" }))
    )
  })
