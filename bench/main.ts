/**
 * `npm run bench -- [--quick] [--only NAME,...] [--rounds N] [--json FILE] [--svg FILE]`
 *
 * effect-db beside `pg` by hand, `@effect/sql-pg`, `postgres`, Kysely, Drizzle and, where it is installed, `pgbench`:
 * all compiled JavaScript, each in a process of its own, in interleaved rounds. The table is printed; the files are the
 * same figures once more. The server is that of DATABASE_URL, else an embedded one.
 */
import { writeFile } from "node:fs/promises"
import { cpus } from "node:os"
import { parseArgs } from "node:util"
import { connections } from "./contender.js"
import { contenders as all } from "./contenders/index.js"
import { growth, idleSessions } from "./growth.js"
import { slowLink } from "./link.js"
import { kept } from "./kept.js"
import type { Kept } from "./kept.js"
import { measure } from "./measure.js"
import { toSvg } from "./picture.js"
import { connect } from "./remote.js"
import type { Remote } from "./remote.js"
import { printCurves, printIdle, printKept, printResult, resultOf, toJson } from "./report.js"
import type { Result } from "./report.js"
import { openDatabase } from "./server.js"
import { workloads } from "./workloads.js"

const { values: args } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    only: { type: "string" },
    rounds: { type: "string" },
    json: { type: "string" },
    svg: { type: "string" }
  }
})

const others = ["kept", "idle", "growth"]
const only = args.only?.split(",")
const unknown = only?.find((name) => !others.includes(name) && !workloads.some((_) => _.name === name))
if (unknown !== undefined) {
  console.error(`no workload ${unknown}; there are ${[...workloads.map((_) => _.name), ...others].join(", ")}`)
  process.exit(2)
}
const wanted = (name: string): boolean => only === undefined || only.includes(name)

const open = async (url: string, near?: string): Promise<Map<string, Remote>> => {
  const remotes = new Map<string, Remote>()
  for (const name of all.keys()) {
    const remote = await connect(name, url, near)
    if (remote === undefined) console.log(`skipped: ${name} is not installed`)
    else remotes.set(name, remote)
  }
  return remotes
}

const close = async (remotes: Map<string, Remote>): Promise<void> => {
  for (const remote of remotes.values()) await remote.close()
}

const keptOfAll = async (url: string): Promise<ReadonlyArray<Kept>> => {
  const contenders = await open(url)
  const all = await kept(contenders, { factor: args.quick ? 0.02 : 1 })
  await close(contenders)
  return all
}

const database = await openDatabase()
const link = await slowLink(database.url, 1)
try {
  const environment = {
    PostgreSQL: database.version,
    Node: process.versions.node,
    cores: cpus().length,
    connections,
    synchronous_commit: "off"
  }
  console.log(
    Object.entries(environment)
      .map(([name, value]) => `${name} ${value}`)
      .join(", ")
  )
  const results: Array<Result> = []
  for (const slow of [false, true]) {
    const contenders = slow ? await open(link.url, database.url) : await open(database.url)
    for (const workload of workloads.filter((_) => (_.slow ?? false) === slow && wanted(_.name))) {
      const works = new Map(
        [...contenders]
          .filter(([, { works }]) => works.includes(workload.name))
          .map(([name, { run }]) => [name, (n: number) => run(workload.name, n)] as const)
      )
      const samples = await measure(works, {
        n: args.quick ? workload.quick : workload.n,
        rounds: args.rounds !== undefined ? Number(args.rounds) : args.quick ? 2 : workload.rounds,
        warmUp: args.quick ? 0 : workload.warmUp
      })
      const result = resultOf(workload, samples)
      results.push(result)
      printResult(result)
    }
    await close(contenders)
  }
  const keeps = wanted("kept") ? await keptOfAll(database.url) : []
  printKept(keeps)
  const idle = wanted("idle") ? await idleSessions(database.url, args.quick ? 5000 : 100_000) : undefined
  if (idle !== undefined) printIdle(idle)
  const curves = wanted("growth") ? await growth(database.url, args.quick ? 10 : 10_000) : []
  printCurves(curves)
  const report = { environment, results, kept: keeps, idle, curves }
  if (args.json !== undefined) await writeFile(args.json, toJson(report))
  if (args.svg !== undefined) await writeFile(args.svg, toSvg(report))
} finally {
  await link.close()
  await database.close()
}
