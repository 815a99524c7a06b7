/**
 * `npm run tour`: runs every file of `examples/` and shows what it says next to what happens on the wire, which a proxy
 * between the example and PostgreSQL sees. The server is that of `DATABASE_URL`, else an embedded one.
 *
 * It ends with 1 when an example fails or leaves something borrowed.
 */
import { NodeRuntime } from "@effect/platform-node"
import { Cause, Console, Effect, Exit, Redacted } from "effect"
import { readdir, readFile } from "node:fs/promises"
import { handTo, provide, start } from "../examples/support.js"
import type { Example } from "../examples/support.js"
import { PgProxy } from "../test/support/proxy.js"
import { told, WireLog } from "./wire-log.js"

/** In the order in which they are best read; what is not named here follows. */
const order = `basic implicit manual rollback http transaction propagation atomic sessions-at-once one-connection
  connections engine databases streaming retry hooks row-level-security tenants promises express fastify hono
  query-builders testing`.split(/\s+/)

const folder = new URL("../examples/", import.meta.url)

const colours = process.stdout.isTTY === true && process.env.NO_COLOR === undefined
const style = (code: number) => (text: string) => (colours ? `\u001b[${code}m${text}\u001b[0m` : text)
const bold = style(1)
const dim = style(2)
const red = style(31)
const green = style(32)
const cyan = style(36)

const names = Effect.promise(async () => {
  const files = (await readdir(folder)).filter((file) => file.endsWith(".ts") && file !== "support.ts")
  const place = (name: string) => (order.includes(name) ? order.indexOf(name) : order.length)
  return files.map((file) => file.slice(0, -3)).sort((a, b) => place(a) - place(b) || a.localeCompare(b))
})

/** The sentences that a file begins with. */
const about = (source: string): string =>
  (/^\/\*\*([\s\S]*?)\*\//.exec(source)?.[1] ?? "")
    .split("\n")
    .map((line) => line.replace(/^ \* ?/, "").trim())
    .filter((line) => line !== "")
    .join("\n")

const legend = `Between what an example says stands what went over the wire, one line for each answer:

  ${cyan("#1")}  the connection; a new one says that it connects
  ${cyan("┌ │ └")}  a transaction begins, goes on, ends; ${cyan("─")} is a statement on its own
  ${cyan("+")}  statements that travelled together; ${cyan("→")} what the server answered`

const tour = Effect.gen(function* () {
  const server = yield* start
  const proxy = yield* Effect.acquireRelease(
    Effect.promise(() => PgProxy.start(Redacted.value(server.url))),
    (proxy) => Effect.promise(() => proxy.close())
  )
  const through = (url: string): string => {
    const other = new URL(url)
    other.hostname = proxy.host
    other.port = String(proxy.port)
    return other.href
  }

  let wire = new WireLog(proxy.log)
  const listen = Effect.suspend(() =>
    Effect.forEach(
      told([...wire.lines()], "\n").split("\n"),
      (line) => (line === "" ? Effect.void : Console.log(dim(`      ${line}`))),
      {
        discard: true
      }
    )
  )
  let example: Example = Effect.dieMessage("it runs nothing")
  handTo({
    run: (given) => (example = given),
    say: (words) => Effect.zipRight(listen, Console.log(`  ${words}`))
  })

  yield* Console.log(`${legend}\n`)
  const began = Date.now()
  const failed: Array<string> = []
  for (const name of yield* names) {
    const file = new URL(`${name}.ts`, folder)
    const source = yield* Effect.promise(() => readFile(file, "utf8"))
    yield* Console.log(`${bold(`examples/${name}.ts`)}\n${cyan(about(source))}\n`)
    proxy.reset()
    wire = new WireLog(proxy.log)
    example = Effect.dieMessage("it runs nothing")
    yield* Effect.promise(() => import(file.href))
    const exit = yield* Effect.exit(provide(example, server, through))
    yield* listen
    const cost = `${count(proxy.flights(), "round trip")} on ${count(wire.connections, "connection")}`
    if (Exit.isSuccess(exit)) {
      yield* Console.log(`\n  ${green("ok")}: ${cost}, and nothing left borrowed\n`)
    } else {
      failed.push(name)
      yield* Console.log(`\n  ${red("failed")}: ${cost}\n${Cause.pretty(exit.cause)}\n`)
    }
  }
  const seconds = ((Date.now() - began) / 1000).toFixed(1)
  yield* Console.log(
    failed.length === 0
      ? green(`All examples do what they say (${seconds} s).`)
      : red(`${failed.join(", ")}: not what they say (${seconds} s).`)
  )
  return yield* failed.length === 0 ? Effect.void : Effect.fail("an example failed")
})

const count = (n: number, what: string): string => `${n} ${what}${n === 1 ? "" : "s"}`

NodeRuntime.runMain(
  Effect.scoped(tour).pipe(
    Effect.tapErrorCause((cause) =>
      Cause.squash(cause) === "an example failed" ? Effect.void : Console.error(Cause.pretty(cause))
    )
  ),
  { disableErrorReporting: true }
)
