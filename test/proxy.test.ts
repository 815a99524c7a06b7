import * as Effect from "effect/Effect"
import { createConnection } from "node:net"
import Pg from "pg"
import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { testDatabase, untilActivity } from "./support/database.js"
import { type Logged, PgProxy } from "./support/proxy.js"

// What the wire tests rely on, proved with plain `pg`.
const database = testDatabase()

let proxy: PgProxy
const clients: Array<Pg.Client> = []

const connect = async (config: Pg.ClientConfig = {}): Promise<Pg.Client> => {
  const client = new Pg.Client({ connectionString: proxy.url, ...config })
  client.on("error", () => {})
  clients.push(client)
  await client.connect()
  return client
}

const isCommit = (message: Logged): boolean => /^commit/i.test(message.text)
const code = (error: unknown): unknown => (error as { readonly code?: unknown }).code

beforeEach(async () => {
  proxy = await PgProxy.start(database.url)
  await Effect.runPromise(database.query("DROP TABLE IF EXISTS t; CREATE TABLE t (id int primary key)"))
})

afterEach(async () => {
  proxy.resume()
  for (const client of clients.splice(0)) client.connection.stream.destroy()
  await proxy.close()
  await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
})

const rows = (): Promise<number> => Effect.runPromise(database.query("SELECT FROM t")).then((found) => found.length)

describe("proxy: what it records", () => {
  it("counts BEGIN, INSERT, COMMIT one after the other as three flights", async () => {
    const client = await connect()
    expect(proxy.flights()).toBe(0)
    await client.query("BEGIN")
    await client.query("INSERT INTO t VALUES ($1)", [1])
    await client.query("COMMIT")
    expect(proxy.flights()).toBe(3)
    expect(proxy.statements()).toEqual(["BEGIN", "INSERT INTO t VALUES ($1)", "COMMIT"])
    expect(proxy.log.filter(({ dir, type }) => dir === "backend" && type === "C").map(({ text }) => text)).toEqual([
      "BEGIN",
      "INSERT 0 1",
      "COMMIT"
    ])
    proxy.reset()
    expect([proxy.flights(), proxy.log.length]).toEqual([0, 0])
    await client.end()
    expect(proxy.flights()).toBe(0)
  })

  it("counts pipelined statements as one flight, in however many pieces they come", async () => {
    const client = await connect({ pipeline: true })
    proxy.delay(50)
    await Promise.all(Array.from({ length: 20 }, (_, id) => client.query("INSERT INTO t VALUES ($1)", [id])))
    expect(proxy.flights()).toBe(1)
    await client.query("SELECT 1")
    expect(proxy.flights()).toBe(2)
  })

  it("counts what follows an answered Flush as a flight, and a Notice as nothing", async () => {
    const client = await connect()
    const { connection } = client
    const answered = new Promise((resolve) => connection.once("parseComplete", resolve))
    connection.parse({ name: "", text: "SELECT 1", types: [] }, true)
    connection.flush()
    await answered
    const ready = new Promise((resolve) => connection.once("readyForQuery", resolve))
    connection.sync()
    await ready
    expect(proxy.flights()).toBe(2)
    const other = await connect()
    await other.query("DO $$ BEGIN RAISE NOTICE 'hello'; END $$")
    expect(proxy.flights()).toBe(3)
  })

  it("knows the SQL behind a prepared statement's name", async () => {
    const client = await connect()
    const statement = { name: "add", text: "INSERT INTO t VALUES ($1)" }
    await client.query({ ...statement, values: [1] })
    proxy.reset()
    await client.query({ ...statement, values: [2] })
    expect(proxy.log.filter(({ dir }) => dir === "frontend").map(({ type, text }) => type + text)).toEqual([
      "BINSERT INTO t VALUES ($1)",
      "DINSERT INTO t VALUES ($1)",
      "EINSERT INTO t VALUES ($1)",
      "S"
    ])
  })

  it("records a CancelRequest apart from the connections", async () => {
    const client = await connect()
    const pid = proxy.connections[0]?.pid
    const sleeping = client.query("SELECT pg_sleep(60)").catch(code)
    await Effect.runPromise(untilActivity(database.url, ({ active }) => active === 1))
    const { secretKey } = client as unknown as { readonly secretKey: number }
    const request = Buffer.alloc(16)
    for (const [at, word] of [16, 80877102, pid!, secretKey].entries()) request.writeInt32BE(word, at * 4)
    createConnection(proxy.port, proxy.host).end(request)
    expect(await sleeping).toBe("57014")
    expect(proxy.cancels.map(({ name }) => name)).toEqual([String(pid)])
    expect([proxy.connections.length, proxy.accepted, proxy.flights()]).toEqual([1, 2, 1])
  })
})

describe("proxy: what it breaks", () => {
  it("cuts after COMMIT was forwarded: the rows are there", async () => {
    const client = await connect()
    await client.query("BEGIN; INSERT INTO t VALUES (1)")
    const cut = proxy.cutAfter(isCommit, { forward: true })
    expect(code(await client.query({ text: "COMMIT", name: "end" }).catch((error) => error))).toBe("ECONNRESET")
    expect((await cut).text).toBe("COMMIT")
    await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
    expect(await rows()).toBe(1)
  })

  it("cuts before COMMIT is forwarded: no row is there", async () => {
    const client = await connect()
    await client.query("BEGIN; INSERT INTO t VALUES (1)")
    void proxy.cutAfter(isCommit, { forward: false, how: "fin" })
    await expect(client.query("COMMIT")).rejects.toThrow("Connection terminated unexpectedly")
    await Effect.runPromise(untilActivity(database.url, ({ total }) => total === 0))
    expect(await rows()).toBe(0)
  })

  it("holds at COMMIT until told to go on", async () => {
    const client = await connect()
    await client.query("BEGIN; INSERT INTO t VALUES (1)")
    const held = proxy.holdAt(isCommit, { forward: true })
    const committed = proxy.seen(({ dir, text, type }) => dir === "backend" && type === "C" && text === "COMMIT")
    let answered = false
    const commit = client.query("COMMIT").then(() => (answered = true))
    await held
    await committed
    expect([answered, await rows()]).toEqual([false, 1])
    proxy.resume()
    await commit

    await client.query("BEGIN; INSERT INTO t VALUES (2)")
    const stopped = proxy.holdAt(isCommit, { forward: false })
    const late = client.query("COMMIT")
    await stopped
    expect(await rows()).toBe(1)
    proxy.resume()
    await late
    expect(await rows()).toBe(2)
  })

  it("cuts in the middle of a row", async () => {
    for (const how of ["rst", "fin", "halfClose"] as const) {
      const client = await connect()
      const received: Array<Pg.QueryResultRow> = []
      const query = new Pg.Query("SELECT i FROM generate_series(1, 10) AS i")
      query.on("row", (row: Pg.QueryResultRow) => received.push(row))
      const cut = proxy.cutInTheMiddleOfRow({ row: 4, how })
      await expect(
        new Promise((resolve, reject) => client.query(query).on("end", resolve).on("error", reject))
      ).rejects.toThrow()
      await cut
      expect(received.length).toBeLessThanOrEqual(3)
      client.connection.stream.destroy()
    }
  })

  it("swallows everything in a blackhole, and frees the server when the client gives up", async () => {
    const client = await connect()
    proxy.cutAll("blackhole")
    let over = false
    void client.query("SELECT 1").then(
      () => (over = true),
      () => (over = true)
    )
    // Another one is connected and answered in the meantime.
    await (await connect()).query("SELECT 1")
    expect(over).toBe(false)
  })

  it("delivers one byte at a time", async () => {
    const client = await connect()
    proxy.oneByteAtATime()
    const { rows } = await client.query("SELECT i, repeat('x', i) AS s FROM generate_series(1, 50) AS i")
    expect(rows.map(({ i, s }) => [i, s.length])).toEqual(Array.from({ length: 50 }, (_, i) => [i + 1, i + 1]))
  })

  it("passes on large messages", async () => {
    const client = await connect()
    const text = "x".repeat(20_000_000)
    const { rows } = await client.query("SELECT $1::text AS text", [text])
    expect(rows[0].text === text).toBe(true)
  })

  it("pauses and resumes", async () => {
    const client = await connect()
    proxy.pause("backend")
    const answer = client.query("SELECT 1 AS one")
    await proxy.seen(({ dir, type }) => dir === "backend" && type === "Z")
    expect(proxy.flights()).toBe(1)
    proxy.resume()
    expect((await answer).rows).toEqual([{ one: 1 }])
  })

  it("adds a round-trip time", async () => {
    const client = await connect()
    proxy.delay(100)
    const start = performance.now()
    await client.query("SELECT 1")
    expect(performance.now() - start).toBeGreaterThan(95)
  })

  it("sends garbage", async () => {
    const client = await connect()
    const failed = new Promise((resolve) => client.once("error", resolve))
    proxy.injectGarbage(Buffer.from([0x21, 0, 0, 0, 4]))
    expect(String(await failed)).toContain("received invalid response: 21")
  })

  it("refuses and keeps silent", async () => {
    proxy.accept("refuse")
    await expect(connect()).rejects.toThrow()
    proxy.accept("silent")
    await expect(connect({ connectionTimeoutMillis: 100 })).rejects.toThrow("timeout")
    proxy.accept("silentAfterTls")
    await expect(connect({ connectionTimeoutMillis: 100, ssl: true })).rejects.toThrow("timeout")
    proxy.accept("relay")
    await connect()
  })

  it("passes on that nothing listens", async () => {
    proxy.target = { host: "127.0.0.1", port: 1 }
    await expect(connect()).rejects.toThrow("ECONNRESET")
  })
})
