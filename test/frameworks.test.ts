/** A session for each request of Express, Fastify and Hono, by the recipes of `examples/recipes`, over real sockets. */
import { createAdaptorServer } from "@hono/node-server"
import { describe, expect, it } from "@effect/vitest"
import { Effect } from "effect"
import { DbEngine, DbLayer, DbRuntime, DbSession } from "effect-db"
import express from "express"
import fastify from "fastify"
import { Hono } from "hono"
import { createServer, request, type Server } from "node:http"
import type { AddressInfo } from "node:net"
import * as ofExpress from "../examples/recipes/express.js"
import * as ofFastify from "../examples/recipes/fastify.js"
import * as ofHono from "../examples/recipes/hono.js"
import { testDatabase } from "./support/database.js"
import { committed, insert, place, quietly } from "./support/programs.js"
import { untilStats } from "./support/until.js"
import { latch, onRuntime } from "./support/promises.js"

const database = testDatabase()
const rows = () => Effect.runPromise(committed(database))

type Db = DbRuntime.DbRuntime<DbEngine | DbSession, unknown>

/** What the handlers of all frameworks do with `{ id }` of the body, and the status that they answer. */
type Handler = (id: number) => Promise<{ readonly status: 200 | 404 | 500; readonly body: unknown }>

interface Served {
  readonly server: Server
  readonly close?: () => Promise<void>
}

const frameworks: ReadonlyArray<readonly [string, (db: Db, handler: Handler) => Promise<Served>]> = [
  [
    "Express",
    (db, handler) => {
      const app = express().set("env", "test")
      // Reading the body is what loses an AsyncLocalStorage most easily: once before and once after.
      app.post("/before", express.json(), ofExpress.sessionPerRequest(db), async (req, res) => {
        const { body, status } = await handler(req.body.id)
        res.status(status).json(body)
      })
      app.post("/after", ofExpress.sessionPerRequest(db), express.json(), async (req, res) => {
        const { body, status } = await handler(req.body.id)
        res.status(status).json(body)
      })
      return Promise.resolve({ server: createServer(app) })
    }
  ],
  [
    "Fastify",
    async (db, handler) => {
      const app = fastify()
      ofFastify.sessionPerRequest(app, db)
      for (const path of ["/before", "/after"]) {
        app.post<{ Body: { id: number } }>(path, async (req, reply) => {
          const { body, status } = await handler(req.body.id)
          return reply.status(status).send(body)
        })
      }
      await app.ready()
      return { server: app.server, close: () => app.close() }
    }
  ],
  [
    "Hono",
    (db, handler) => {
      const app = new Hono()
      app.onError((_, c) => c.text("error", 500))
      app.use(ofHono.sessionPerRequest(db))
      for (const path of ["/before", "/after"]) {
        app.post(path, async (c) => {
          const { body, status } = await handler((await c.req.json()).id)
          return c.json(body as object, status)
        })
      }
      return Promise.resolve({ server: createAdaptorServer({ fetch: app.fetch }) as Server })
    }
  ]
]

interface To {
  readonly db: Db
  readonly url: string
  readonly send: (id: number, path?: string) => Promise<{ readonly status: number; readonly body: string }>
}

for (const [name, serve] of frameworks) {
  describe(name, () => {
    /** Serves the handler for as long as the program runs. */
    const served = async (db: Db, handler: Handler, program: (to: To) => Promise<void>): Promise<void> => {
      const { close, server } = await serve(db, handler)
      await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
      const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
      const send = async (id: number, path = "/before") => {
        const response = await fetch(url + path, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ id })
        })
        return { status: response.status, body: await response.text() }
      }
      try {
        await program({ db, url, send })
      } finally {
        server.closeAllConnections()
        await (close === undefined ? new Promise((resolve) => server.close(resolve)) : close())
      }
    }

    const test = (promise: string, handler: (db: Db) => Handler, program: (to: To) => Promise<void>) =>
      it(promise, () => onRuntime(database, (db) => served(db, handler(db), program), { maxConnections: 4 }))

    const atRest = (db: Db) => db.run(untilStats("the pool at rest", (_) => _.used === 0 && _.pending === 0))

    for (const path of ["/before", "/after"]) {
      test(
        `${path}: a status below 400 commits before the response leaves, any other rolls back`,
        (db) => async (id) => {
          const one = await db.run(place)
          await db.run(insert(id))
          const two = await db.run(place)
          return { status: id === 1 ? 200 : id === 2 ? 404 : 500, body: { same: one.xid === two.xid } }
        },
        async ({ db, send }) => {
          expect(await send(1, path)).toEqual({ status: 200, body: '{"same":true}' })
          expect(await rows()).toEqual([1])
          expect(await send(2, path)).toEqual({ status: 404, body: '{"same":true}' })
          expect(await send(3, path)).toEqual({ status: 500, body: '{"same":true}' })
          expect(await rows()).toEqual([1])
          await atRest(db)
        }
      )
    }

    test(
      "a handler that fails rolls back",
      (db) => async (id) => {
        await db.run(insert(id))
        throw new Error("on purpose")
      },
      async ({ db, send }) => {
        expect((await send(1)).status).toBe(500)
        expect(await rows()).toEqual([])
        await atRest(db)
      }
    )

    test(
      "a commit that fails is a 500, though the handler has answered 200",
      (db) => async (id) => {
        await db.run(Effect.zipRight(insert(id), insert(id)))
        return { status: 200, body: { fine: "said the handler" } }
      },
      async ({ db, send }) => {
        const { body, status } = await send(1)
        expect(status).toBe(500)
        expect(body).not.toContain("said the handler")
        expect(await rows()).toEqual([])
        await atRest(db)
      }
    )

    test(
      "a statement's error that the handler swallows is a 500 as well",
      (db) => async (id) => {
        await db.run(Effect.zipRight(insert(id), Effect.ignore(DbSession.pipe(Effect.flatMap((_) => _.sql`nonsense`)))))
        return { status: 200, body: {} }
      },
      async ({ send }) => {
        expect((await send(1)).status).toBe(500)
        expect(await rows()).toEqual([])
      }
    )

    test(
      "concurrent requests have sessions of their own",
      (db) => async (id) => {
        const one = await db.run(place)
        await db.run(insert(id))
        const two = await db.run(place)
        return { status: id % 2 === 0 ? 200 : 404, body: { same: one.xid === two.xid } }
      },
      async ({ db, send }) => {
        const answers = await Promise.all(
          Array.from({ length: 20 }, (_, id) => send(id, id < 10 ? "/before" : "/after"))
        )
        expect(new Set(answers.map((_) => _.body))).toEqual(new Set(['{"same":true}']))
        expect(await rows()).toEqual([0, 2, 4, 6, 8, 10, 12, 14, 16, 18])
        await atRest(db)
      }
    )

    test(
      "a handler that uses no database borrows nothing",
      (db) => async () => ({ status: 200, body: { used: (await db.run(DbEngine.stats)).total } }),
      async ({ send }) => {
        expect((await send(1)).body).toBe('{"used":0}')
      }
    )

    const inserted = latch()
    const left = latch()
    test(
      "a client that goes away rolls back, and nothing is left",
      (db) => async (id) => {
        await db.run(insert(id))
        inserted.open()
        await left.opened
        return { status: 200, body: {} }
      },
      async ({ db, url }) => {
        const body = JSON.stringify({ id: 1 })
        const headers = { "content-type": "application/json", "content-length": body.length }
        const client = request(url + "/before", { method: "POST", headers })
        client.on("error", () => {})
        client.end(body)
        await inserted.opened
        client.destroy()
        // Though the handler has not come to its end yet.
        await atRest(db)
        left.open()
        await atRest(db)
        expect(await rows()).toEqual([])
      }
    )

    it("a runtime that is closed is a 500, not a request without an end", async () => {
      const db = DbRuntime.make(quietly(DbLayer({ url: database.url })))
      const handler: Handler = () => Promise.resolve({ status: 200, body: {} })
      await served(db, handler, async ({ send }) => {
        await db.close()
        expect((await send(1)).status).toBe(500)
      })
    })
  })
}
