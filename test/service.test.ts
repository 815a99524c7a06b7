/** The example service over real sockets: what it promises to whoever talks to it, and that nothing stays borrowed. */
import { HttpServer } from "@effect/platform"
import { afterAll, afterEach, beforeAll, describe, expect, it } from "@effect/vitest"
import { DbEngine, DbError, DbRegistry } from "effect-db"
import { Effect, Layer, Logger, LogLevel, ManagedRuntime, Redacted } from "effect"
import { spawn } from "node:child_process"
import type { ChildProcess } from "node:child_process"
import { chmod, mkdtemp, rm } from "node:fs/promises"
import * as Http from "node:http"
import * as Net from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Readable } from "node:stream"
import { fileURLToPath } from "node:url"
import Pg from "pg"
import { databases, MigrationsLive } from "../examples/service/database.js"
import { serve } from "../examples/service/server.js"
import { testDatabase, untilActivity } from "./support/database.js"
import { outside } from "./support/outside.js"
import { until } from "./support/until.js"

const database = testDatabase()

const rows = <A extends object = Record<string, unknown>>(text: string, values?: ReadonlyArray<unknown>) =>
  Effect.runPromise(database.query<A>(text, values))

const runtime = ManagedRuntime.make(
  serve(0).pipe(
    // what fails here does so on purpose
    Layer.provideMerge(Logger.minimumLogLevel(LogLevel.None)),
    Layer.provideMerge(MigrationsLive),
    Layer.provideMerge(Layer.unwrapEffect(Effect.sync(() => databases(Redacted.make(database.url)))))
  )
)

let url = ""

beforeAll(async () => {
  // our client waits for longer, so that of a deadlock the service is the one that is told
  await rows(`ALTER DATABASE ${database.database} SET deadlock_timeout = '500ms'`)
  url = await runtime.runPromise(
    Effect.map(HttpServer.HttpServer, ({ address }) =>
      address._tag === "TcpAddress" ? `http://127.0.0.1:${address.port}` : ""
    )
  )
})

afterAll(() => runtime.dispose())

/** Nothing borrowed, nobody waiting, and no transaction left open on the server. */
afterEach(async () => {
  await Effect.runPromise(
    untilActivity(database.url, (_) => _.active + _.idleInTransaction + _.idleInTransactionAborted === 0)
  )
  for (const name of ["default", "reporting"]) {
    const { pending, used } = await runtime.runPromise(DbRegistry.using(DbEngine.stats, name))
    expect({ pending, used }).toEqual({ pending: 0, used: 0 })
  }
})

interface Answer {
  readonly status: number
  readonly body: any
}

const send = async (
  method: string,
  path: string,
  body?: unknown,
  headers: Record<string, string> = {}
): Promise<Answer> => {
  const response = await fetch(url + path, {
    method,
    headers,
    ...(body === undefined ? {} : { body: typeof body === "string" ? body : JSON.stringify(body) })
  })
  return { status: response.status, body: await response.json() }
}
const get = (path: string) => send("GET", path)
const post = (path: string, body: unknown, headers?: Record<string, string>) => send("POST", path, body, headers)

let named = 0
/** A new account with so many cents. */
const account = async (cents = 0): Promise<{ readonly id: number; readonly name: string }> => {
  const { body } = await post("/accounts", { name: `account ${++named}` })
  if (cents > 0) expect(await post(`/accounts/${body.id}/deposits`, { amount: cents })).toMatchObject({ status: 201 })
  return body
}
const balance = async ({ id }: { readonly id: number }): Promise<string> => (await get(`/accounts/${id}`)).body.balance
const everything = () =>
  rows(`SELECT (SELECT count(*) FROM transfers)::int AS transfers, (SELECT count(*) FROM accounts)::int AS accounts,
               (SELECT coalesce(sum(balance), 0) FROM accounts)::text AS balance`)

/** A connection from outside, for locks that the service has to wait for. */
const outsider = <A>(use: (ask: (text: string, values?: ReadonlyArray<unknown>) => Promise<unknown>) => Promise<A>) =>
  Effect.runPromise(
    Effect.scoped(
      Effect.flatMap(outside(database.url), (ask) =>
        Effect.promise(() => use((text, values) => Effect.runPromise(ask(text, values))))
      )
    )
  )
const untilWaitingForLock = (application = "ledger") =>
  Effect.runPromise(
    until(
      "the service waits for a lock",
      Effect.map(
        database.query(
          `SELECT FROM pg_stat_activity
           WHERE datname = current_database() AND application_name = $1 AND wait_event_type = 'Lock'`,
          [application]
        ),
        (_) => _.length > 0
      )
    )
  )

describe("accounts and transfers", () => {
  it("opens accounts, takes deposits, moves money and tells the story", async () => {
    const ada = await account(10_000)
    const grace = await account()
    const sent = await post("/transfers", { from: ada.id, to: grace.id, amount: "2550", note: "rent" })
    expect(sent).toMatchObject({ status: 201, body: { from: ada.id, to: grace.id, amount: "2550", note: "rent" } })
    expect([await balance(ada), await balance(grace)]).toEqual(["7450", "2550"])
    const { body } = await get(`/accounts/${ada.id}/statement`)
    expect(body).toMatchObject({
      account: { ...ada, balance: "7450" },
      entries: [
        { transfer: sent.body.id, counterparty: grace.name, amount: "-2550", balance: "7450", note: "rent" },
        { counterparty: null, amount: "10000", balance: "10000", note: null }
      ],
      next: null
    })
    expect(await get("/health")).toEqual({ status: 200, body: { status: "ok", database: "ok" } })
    expect((await get("/accounts?limit=500")).body).toContainEqual({ ...ada, balance: "7450" })
  })

  it("pages through a statement without gaps or repeats", async () => {
    const ada = await account(1000)
    const grace = await account()
    for (let i = 0; i < 6; i++) await post("/transfers", { from: ada.id, to: grace.id, amount: 10 + i })
    const seen: Array<string> = []
    let before = ""
    do {
      const { body } = await get(`/accounts/${ada.id}/statement?limit=3${before}`)
      seen.push(...body.entries.map((entry: { readonly amount: string }) => entry.amount))
      before = body.next === null ? "" : `&before=${body.next}`
    } while (before !== "")
    expect(seen).toEqual(["-15", "-14", "-13", "-12", "-11", "-10", "1000"])
  })

  it("keeps every cent of an amount that no floating-point number holds together", async () => {
    const ada = await account()
    for (let i = 0; i < 3; i++) await post(`/accounts/${ada.id}/deposits`, { amount: "999999999999" })
    await rows("UPDATE accounts SET balance = 9007199254740993 WHERE id = $1", [ada.id])
    await post(`/accounts/${ada.id}/deposits`, { amount: 2 })
    expect(await balance(ada)).toBe("9007199254740995")
  })

  it("refuses an overdraft by the constraint, and rolls back", async () => {
    const ada = await account(100)
    const grace = await account()
    const before = await everything()
    expect(await post("/transfers", { from: ada.id, to: grace.id, amount: 101 })).toEqual({
      status: 422,
      body: { error: "Overdrawn", message: `Account ${ada.id} would be overdrawn.` }
    })
    expect(await everything()).toEqual(before)
    expect(await post("/transfers", { from: ada.id, to: grace.id, amount: 100 })).toMatchObject({ status: 201 })
  })

  it("refuses bad input with a clear message, and changes nothing", async () => {
    const ada = await account(100)
    const cents = "must be a whole number of cents from 1 to 1000000000000"
    const before = await everything()
    const refused: ReadonlyArray<readonly [path: string, body: unknown, status: number, message: string]> = [
      ["/transfers", "{", 400, "The body is not JSON."],
      ["/transfers", "[]", 400, "The body is not a JSON object."],
      ["/transfers", "", 400, "The body is not a JSON object."],
      ["/transfers", { from: ada.id, to: ada.id, amount: 1 }, 400, "to: must not be the account it is from"],
      ["/transfers", { from: ada.id, to: 2 ** 31, amount: 1 }, 400, "to: must be the number of an account"],
      ["/transfers", { from: ada.id, to: 999_999, amount: 1 }, 404, "There is no account 999999."],
      ["/transfers", "x".repeat(70_000), 413, "The body is larger than 65536 bytes."],
      ["/accounts", { name: "" }, 400, "name: must be one line of 1 to 100 characters, with no space around it"],
      [
        "/accounts",
        '{"name":"a\\u0000"}',
        400,
        "name: must be one line of 1 to 100 characters, with no space around it"
      ],
      [
        "/accounts",
        '{"name":"\\ud800"}',
        400,
        "name: must be one line of 1 to 100 characters, with no space around it"
      ],
      ["/accounts", { name: ada.name }, 409, `There is an account named "${ada.name}" already.`],
      ["/accounts/999999/deposits", { amount: 1 }, 404, "There is no account 999999."],
      ["/accounts/x/deposits", { amount: 1 }, 400, 'id: Unable to decode "x" into a number'],
      ...[0, -1, 1.5, 1e13, 2 ** 53, "1.5", "-1", "", " 1", "1e3", null, true, [1]].map(
        (amount) => [`/accounts/${ada.id}/deposits`, { amount }, 400, `amount: ${cents}`] as const
      ),
      [
        `/accounts/${ada.id}/deposits`,
        { ammount: 1, amount: 1 },
        400,
        'ammount: is unexpected, expected: "amount" | "note"'
      ]
    ]
    for (const [path, body, status, message] of refused) {
      const answer = await post(path, body)
      expect({ path, body, status: answer.status, message: answer.body.message }).toEqual({
        path,
        body,
        status,
        message
      })
    }
    expect(await get("/nowhere")).toMatchObject({ status: 404, body: { message: "There is no GET /nowhere." } })
    expect(await get(`/accounts/${ada.id}/statement?limit=0`)).toMatchObject({ status: 400 })
    expect(await get(`/accounts/${ada.id}/statement?before=x`)).toMatchObject({ status: 400 })
    expect(await everything()).toEqual(before)
  })
})

describe("the idempotency key", () => {
  const key = (value: string) => ({ "Idempotency-Key": value })

  it("makes a transfer once, however often it is sent", async () => {
    const ada = await account(100)
    const grace = await account()
    const transfer = { from: ada.id, to: grace.id, amount: 30 }
    const first = await post("/transfers", transfer, key("once"))
    expect(first.status).toBe(201)
    expect(await post("/transfers", transfer, key("once"))).toEqual(first)
    expect(await balance(grace)).toBe("30")
  })

  it("makes it once when twenty come at the same time", async () => {
    const ada = await account(100)
    const grace = await account()
    const transfer = { from: ada.id, to: grace.id, amount: 30 }
    const answers = await Promise.all(Array.from({ length: 20 }, () => post("/transfers", transfer, key("twenty"))))
    expect(new Set(answers.map((answer) => JSON.stringify(answer))).size).toBe(1)
    expect(answers[0]!.status).toBe(201)
    expect(await balance(grace)).toBe("30")
  })

  it("is refused for another transfer, also at the same time", async () => {
    const [a, b, c, d] = [await account(100), await account(), await account(100), await account()]
    const answers = await Promise.all([
      post("/transfers", { from: a.id, to: b.id, amount: 1 }, key("reused")),
      post("/transfers", { from: c.id, to: d.id, amount: 1 }, key("reused"))
    ])
    expect(answers.map(({ status }) => status).sort()).toEqual([201, 422])
    const won = answers[0]!.status === 201 ? a : c
    expect([await balance(b), await balance(d)].sort()).toEqual(["0", "1"])
    expect(
      await post("/transfers", { from: won.id, to: (won === a ? b : d).id, amount: 2 }, key("reused"))
    ).toMatchObject({ status: 422, body: { error: "KeyReused" } })
    expect(await post("/transfers", { from: a.id, to: b.id, amount: 1 }, key("ü"))).toMatchObject({ status: 400 })
  })

  it("is free again after a refusal", async () => {
    const ada = await account(10)
    const grace = await account()
    const transfer = { from: ada.id, to: grace.id, amount: 30 }
    expect(await post("/transfers", transfer, key("again"))).toMatchObject({ status: 422 })
    await post(`/accounts/${ada.id}/deposits`, { amount: 20 })
    expect(await post("/transfers", transfer, key("again"))).toMatchObject({ status: 201 })
  })
})

describe("one session for each request", () => {
  it("keeps the sum over a hundred transfers at once, in all directions", async () => {
    const accounts = await Promise.all([account(1000), account(1000), account(1000), account(1000)])
    const answers = await Promise.all(
      Array.from({ length: 100 }, (_, i) =>
        post("/transfers", { from: accounts[i % 4]!.id, to: accounts[(i + 1 + (i % 3)) % 4]!.id, amount: 1 + i })
      )
    )
    const made = answers.filter(({ status }) => status === 201)
    expect(answers.every(({ status }) => status === 201 || status === 422)).toBe(true)
    expect(made.length).toBeGreaterThan(50)
    const balances = (await Promise.all(accounts.map(balance))).map(Number)
    expect(balances.reduce((sum, one) => sum + one)).toBe(4000)
    for (const [i, { id }] of accounts.entries()) {
      // every entry's balance follows from the one before it
      const { body } = await get(`/accounts/${id}/statement?limit=500`)
      let running = 0
      for (const entry of body.entries.reverse()) expect((running += Number(entry.amount))).toBe(Number(entry.balance))
      expect(running).toBe(balances[i])
    }
  })

  it("runs a request again when it loses a deadlock", async () => {
    const ada = await account(100)
    const grace = await account()
    const answer = await outsider(async (ask) => {
      await ask("SET deadlock_timeout = '1h'; BEGIN")
      await ask("SELECT FROM accounts WHERE id = $1 FOR UPDATE", [grace.id])
      const answer = post("/transfers", { from: ada.id, to: grace.id, amount: 5 })
      await untilWaitingForLock()
      // got only when the service gives way: this side never asks whether there is a deadlock
      await ask("SELECT FROM accounts WHERE id = $1 FOR UPDATE", [ada.id])
      await ask("COMMIT")
      return answer
    })
    expect(answer).toMatchObject({ status: 201 })
    expect([await balance(ada), await balance(grace)]).toEqual(["95", "5"])
  })

  it("answers with a 500 when the commit fails, before anything has been said", async () => {
    await rows(`
      CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
      CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON transfers DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.note = 'refuse me') EXECUTE FUNCTION refuse()`)
    const ada = await account(10)
    const answer = await post(`/accounts/${ada.id}/deposits`, { amount: 1, note: "refuse me" })
    expect(answer).toEqual({
      status: 500,
      body: { error: "Failed", message: "The service failed. Nothing was changed." }
    })
    expect(await balance(ada)).toBe("10")
  })

  it("rolls back when the client goes away", async () => {
    const ada = await account(100)
    const grace = await account()
    await outsider(async (ask) => {
      await ask("BEGIN")
      await ask("SELECT FROM accounts WHERE id = $1 FOR UPDATE", [ada.id])
      const request = Http.request(`${url}/transfers`, { method: "POST" })
      request.on("error", () => {})
      request.end(JSON.stringify({ from: ada.id, to: grace.id, amount: 5 }))
      await untilWaitingForLock()
      request.destroy()
      // while the lock is still held: it is the departure that ends the statement
      await Effect.runPromise(untilActivity(database.url, (_) => _.active + _.idleInTransaction === 0))
      await ask("COMMIT")
    })
    expect([await balance(ada), await balance(grace)]).toEqual(["100", "0"])
  })
})

describe("reports", () => {
  const borrowedFromPrimary = async () => (await runtime.runPromise(DbEngine.stats)).used

  it("tell what was moved, from the reporting database, in a transaction that can't write", async () => {
    const ada = await account(700)
    const [today] = await rows<{ readonly day: string; readonly transfers: number; readonly amount: string }>(
      `SELECT max((created_at AT TIME ZONE 'UTC')::date)::text AS day, count(*)::int AS transfers, sum(amount)::text AS amount
       FROM transfers`
    )
    expect(await get("/reports/daily")).toEqual({ status: 200, body: [today] })
    expect(await balance(ada)).toBe("700")
    const backends = await rows(`SELECT count(*)::int AS n FROM pg_stat_activity
      WHERE datname = current_database() AND application_name = 'ledger reports'`)
    expect(backends).toEqual([{ n: 1 }])
    const write = Effect.flatMap(DbEngine, ({ sql }) => sql.withTransaction(sql`DELETE FROM transfers`))
    const refused = await runtime.runPromise(Effect.flip(DbRegistry.using(write, "reporting")))
    expect(DbError.reason(refused)?._tag).toBe("ReadOnlyError")
  })

  it("take nothing from the transfers: a slow one borrows no connection of theirs", async () => {
    const ada = await account(1)
    await outsider(async (ask) => {
      await ask("BEGIN")
      await ask("LOCK TABLE transfers IN ACCESS EXCLUSIVE MODE")
      const slow = get("/reports/daily")
      await untilWaitingForLock("ledger reports")
      expect(await borrowedFromPrimary()).toBe(0)
      expect(await balance(ada)).toBe("1")
      await ask("COMMIT")
      expect((await slow).status).toBe(200)
    })
  })
})

describe("import and export", () => {
  const header = "from,to,amount,note\n"

  /** So many lines over fifty accounts, in pieces that respect no line. */
  async function* csv(count: number, note = "", last = "") {
    let text = header
    for (let i = 0; i < 50; i++) text += `,${prefix}${i},1000000000,\n`
    for (let i = 50; i < count; i++) {
      text += `${prefix}${i % 50},${prefix}${(i * 7 + 1) % 50 === i % 50 ? (i + 1) % 50 : (i * 7 + 1) % 50},${1 + (i % 90)},"${note}, ""${i}"""\n`
      if (text.length > 65_521) {
        yield Buffer.from(text.slice(0, 65_521))
        text = text.slice(65_521)
      }
    }
    yield Buffer.from(text + last)
  }
  let prefix = "import "

  /** The lines of the answer, while the file is on its way. */
  const upload = async function* (file: string | AsyncIterable<Uint8Array>, signal?: AbortSignal) {
    const request = Http.request(`${url}/import`, { method: "POST", ...(signal === undefined ? {} : { signal }) })
    const answer = new Promise<Http.IncomingMessage>((resolve, reject) =>
      request.once("response", resolve).once("error", reject)
    )
    request.on("error", () => {})
    const sending = Readable.from(typeof file === "string" ? [file] : file)
    sending.on("error", () => {}).pipe(request)
    const response = await answer
    expect(response.statusCode).toBe(200)
    let text = ""
    for await (const chunk of response.setEncoding("utf8")) {
      const lines = (text + String(chunk)).split("\n")
      text = lines.pop()!
      for (const line of lines) yield JSON.parse(line) as Record<string, unknown>
    }
    expect(text).toBe("")
  }
  const all = async <A>(items: AsyncIterable<A>): Promise<Array<A>> => {
    const found: Array<A> = []
    for await (const item of items) found.push(item)
    return found
  }
  const imported = async (body: string | AsyncIterable<Uint8Array>) => (await all(upload(body))).at(-1)

  it("keeps nothing of a file with one bad line", async () => {
    const before = await everything()
    const lines: ReadonlyArray<readonly [last: string, error: string]> = [
      ["a,b,1.5,\n", "amount: must be a whole number of cents from 1 to 1000000000000"],
      ["a,b,1\n", "has 3 fields instead of 4"],
      ['a,"b"x,1,\n', "has quotes that do not fit together"],
      ["a,a,1,\n", "to: must not be the account it is from"],
      [`a,b,1,${"x".repeat(20_000)}`, "is longer than 10000 characters"],
      ["import 1,import 2,999999999999,\n", 'would overdraw the account "import 1"'],
      ["a,,1,\n", "to: must be one line of 1 to 100 characters, with no space around it"]
    ]
    for (const [last, error] of lines) {
      expect(await imported(csv(6000, "", last))).toEqual({ error: `line 6002: ${error}; nothing was kept` })
    }
    expect(await imported("a;b\n")).toEqual({
      error: "line 1: must be the header from,to,amount,note; nothing was kept"
    })
    const latin1 = (async function* () {
      yield Buffer.from(`${header},M\u00fcller,1,\n`, "latin1")
    })()
    expect(await imported(latin1)).toEqual({ error: "line 1: is not UTF-8; nothing was kept" })
    expect(await everything()).toEqual(before)
  })

  it("refuses a bad line at once, without the rest of the file", async () => {
    let sent = 0
    const endless = (async function* () {
      yield Buffer.from(`${header}nonsense\n`)
      for (; sent < 1000; sent++) yield Buffer.alloc(65_536, "x")
    })()
    expect(await imported(endless)).toEqual({ error: "line 2: has 1 fields instead of 4; nothing was kept" })
    expect(sent).toBeLessThan(1000)
  })

  it(
    "takes 100 000 transfers in bounded memory, tells how far it is, and gives them back",
    { timeout: 60_000 },
    async () => {
      const before = await rows<{ readonly n: number }>("SELECT count(*)::int AS n FROM transfers")
      globalThis.gc?.()
      const idle = process.memoryUsage()
      let most = 0
      const progress: Array<Record<string, unknown>> = []
      // 50 MB, of which never more than a few batches are held
      for await (const step of upload(csv(100_000, "x".repeat(480)))) {
        progress.push(step)
        globalThis.gc?.()
        const { arrayBuffers, heapUsed } = process.memoryUsage()
        most = Math.max(most, heapUsed - idle.heapUsed + arrayBuffers - idle.arrayBuffers)
      }
      expect(progress.filter((step) => "staged" in step).map(({ staged }) => staged)).toEqual(
        Array.from({ length: 20 }, (_, i) => (i + 1) * 5000)
      )
      expect(progress.slice(20)).toEqual([{ posting: 100_000 }, { done: true, transfers: 100_000, accountsOpened: 50 }])
      expect(most).toBeLessThan(25 * 1024 * 1024)
      const [sums] = await rows(`
      SELECT count(*)::int AS accounts, sum(balance)::text AS balance FROM accounts WHERE name LIKE 'import %'`)
      expect(sums).toEqual({ accounts: 50, balance: "50000000000" })

      const response = await fetch(`${url}/export`)
      expect(response.headers.get("content-type")).toBe("text/csv; charset=utf-8")
      const exported = (await response.text()).split("\n")
      expect(exported.length).toBe(1 + before[0]!.n + 100_000 + 1)
      const given = Buffer.concat(await all(csv(100_000, "x".repeat(480))))
        .toString()
        .split("\n")
      expect(exported.slice(-100_001)).toEqual(given.slice(-100_001))
    }
  )

  it("does not pass off half an export as a whole one", async () => {
    const response = await fetch(`${url}/export`)
    const reader = response.body!.getReader()
    await reader.read()
    await rows(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND application_name = 'ledger' AND state <> 'idle'`)
    const rest = async (): Promise<void> => {
      while (!(await reader.read()).done);
    }
    await expect(rest()).rejects.toThrow()
  })

  it("keeps nothing when the client goes away in the middle", async () => {
    const before = await everything()
    const gone = new AbortController()
    const half = async function* () {
      for await (const part of csv(20_000)) yield part
      await new Promise((resolve) => gone.signal.addEventListener("abort", resolve))
    }
    const progress = upload(half(), gone.signal)
    expect(await progress.next()).toEqual({ done: false, value: { staged: 5000 } })
    gone.abort()
    await expect(all(progress)).rejects.toThrow()
    await Effect.runPromise(untilActivity(database.url, (_) => _.active + _.idleInTransaction === 0))
    expect(await everything()).toEqual(before)
  })

  it("holds nobody up while a slow file arrives", async () => {
    prefix = "slow "
    let resume = (): void => {}
    const paused = new Promise<void>((resolve) => (resume = resolve))
    const slow = async function* () {
      for await (const part of csv(6000)) yield part
      await paused
      yield Buffer.from("slow 1,slow 2,7,\n")
    }
    const ada = await account(100)
    const progress = upload(slow())
    expect(await progress.next()).toEqual({ done: false, value: { staged: 5000 } })
    expect(await post(`/accounts/${ada.id}/deposits`, { amount: 1 })).toMatchObject({ status: 201 })
    expect(await post("/accounts", { name: "slow 0" })).toMatchObject({ status: 201 })
    resume()
    expect((await all(progress)).at(-1)).toEqual({ done: true, transfers: 6001, accountsOpened: 49 })
  })
})

describe("npm start", { timeout: 60_000 }, () => {
  const root = fileURLToPath(new URL("..", import.meta.url))

  /** What a test that failed would leave behind. */
  const running = new Set<() => void>()
  afterEach(() => {
    for (const kill of running) kill()
  })

  interface Running {
    readonly child: ChildProcess
    /** Ctrl-C. */
    readonly interrupt: () => void
    readonly out: () => string
    readonly err: () => string
    readonly exit: Promise<number | null>
  }

  const start = (command: string, args: ReadonlyArray<string>, cwd: string, env: Record<string, string>): Running => {
    const { DATABASE_URL: _, ...inherited } = process.env
    // a process group of its own, as a terminal would give it: Ctrl-C goes to all of it
    const child = spawn(command, args, {
      cwd,
      env: { ...inherited, ...env },
      stdio: ["ignore", "pipe", "pipe"],
      detached: true
    })
    const interrupt = () => process.kill(-child.pid!, "SIGINT")
    const kill = () => process.kill(-child.pid!, "SIGKILL")
    running.add(kill)
    let out = ""
    let err = ""
    child.stdout.on("data", (chunk: Buffer) => (out += chunk.toString()))
    child.stderr.on("data", (chunk: Buffer) => (err += chunk.toString()))
    // npm ends itself by the signal that it was sent, which a shell reports as 130
    const exit = new Promise<number | null>((resolve) =>
      child.once("close", (code, signal) => resolve(signal === "SIGINT" ? 130 : code))
    )
    void exit.then(() => running.delete(kill))
    return { child, interrupt, out: () => out, err: () => err, exit }
  }
  const npmStart = (env: Record<string, string>) => start("npm", ["start"], root, env)

  /** Where it listens, once it says so. */
  const listening = async (running: Running): Promise<string> =>
    new Promise((resolve, reject) => {
      const look = () => {
        const found = /listens on (\S+)/.exec(running.out())
        if (found !== null) resolve(found[1]!)
      }
      running.child.stdout!.on("data", look)
      void running.exit.then((code) => reject(new Error(`ended with ${code}: ${running.err()}`)))
    })

  const failure = async (env: Record<string, string>) => {
    const running = npmStart(env)
    return { code: await running.exit, err: running.err() }
  }

  it("says in one sentence why it can't start", async () => {
    const occupied = Net.createServer().listen(0, "127.0.0.1")
    await new Promise((resolve) => occupied.once("listening", resolve))
    const { port } = occupied.address() as Net.AddressInfo
    const [inUse, unreachable, notAPort] = await Promise.all([
      failure({ PORT: String(port), DATABASE_URL: database.url }),
      failure({ PORT: "0", DATABASE_URL: "postgres://postgres@127.0.0.1:1/ledger" }),
      failure({ PORT: "http", DATABASE_URL: database.url })
    ])
    occupied.close()
    expect(inUse).toEqual({
      code: 1,
      err: `Port ${port} is in use: stop what listens there, or set PORT to another one.\n`
    })
    expect(unreachable).toEqual({
      code: 1,
      err: "The database at 127.0.0.1:1 can't be reached: start it, or correct DATABASE_URL.\n"
    })
    expect(notAPort).toEqual({
      code: 1,
      err: "PORT is not the number of a port: set it to one from 1 to 65535.\n"
    })
  })

  it("says so when the password is wrong", async ({ skip }) => {
    const wrong = new URL(database.url)
    wrong.password = "not the password"
    const client = new Pg.Client({ connectionString: wrong.href })
    const asked = await client.connect().then(
      () => client.end().then(() => false),
      () => true
    )
    if (!asked) skip("this server asks for no password")
    expect(await failure({ PORT: "0", DATABASE_URL: wrong.href })).toEqual({
      code: 1,
      err: "The database refused the user or the password: correct DATABASE_URL.\n"
    })
  })

  it("finishes what it has in hand when it is told to stop", async () => {
    const ada = await account(100)
    const running = npmStart({ PORT: "0", DATABASE_URL: database.url })
    const there = await listening(running)
    await outsider(async (ask) => {
      await ask("BEGIN")
      await ask("SELECT FROM accounts WHERE id = $1 FOR UPDATE", [ada.id])
      const answer = fetch(`${there}/accounts/${ada.id}/deposits`, { method: "POST", body: '{"amount":5}' })
      await untilWaitingForLock()
      running.interrupt()
      // it takes nothing new from now on
      const refuses = Effect.promise(() =>
        fetch(`${there}/health`).then(
          () => false,
          () => true
        )
      )
      await Effect.runPromise(until("it takes nothing new", refuses))
      await ask("COMMIT")
      expect((await answer).status).toBe(201)
    })
    expect([0, 130]).toContain(await running.exit)
    expect(running.err()).toBe("")
    expect(await balance(ada)).toBe("105")
  })

  it("keeps a PostgreSQL of its own, and finds its data again", async () => {
    const folder = await mkdtemp(join(tmpdir(), "ledger-"))
    // the account that PostgreSQL runs as may be another one
    await chmod(folder, 0o755)
    const once = async <A>(use: (url: string) => Promise<A>): Promise<A> => {
      const args = ["--tsconfig", join(root, "tsconfig.json"), join(root, "examples/service/main.ts")]
      const running = start(process.execPath, [join(root, "node_modules/tsx/dist/cli.mjs"), ...args], folder, {
        PORT: "0"
      })
      try {
        return await use(await listening(running))
      } finally {
        running.interrupt()
        expect([0, 130]).toContain(await running.exit)
        expect(running.err()).toBe("")
      }
    }
    try {
      await once(async (there) => {
        const answer = await fetch(`${there}/accounts`, { method: "POST", body: '{"name":"ada"}' })
        expect(answer.status).toBe(201)
      })
      await once(async (there) => {
        expect(await (await fetch(`${there}/accounts`)).json()).toEqual([{ id: 1, name: "ada", balance: "0" }])
      })
    } finally {
      await rm(folder, { recursive: true, force: true })
    }
  })
})
