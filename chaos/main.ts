/**
 * `npm run chaos -- [--seconds N] [--seed N] [--json] [--only bank,control,histories,single,soak] [--tries N]`
 * `npm run soak -- [--rounds N]`
 *
 * The proof under faults, on a server of its own. `--seconds` is how long the bank works under chaos; the other
 * proofs have a size instead. The seed repeats all choices, not what the network makes of them.
 */
import * as Effect from "effect/Effect"
import { parseArgs } from "node:util"
import { bank, faultsOf } from "./bank.js"
import type { Tally } from "./faults.js"
import type { Analysis } from "./history.js"
import { lists, writeSkew } from "./lists.js"
import { forgetful, loss } from "./loss.js"
import { Random } from "./random.js"
import { single } from "./single.js"
import { soak } from "./soak.js"
import { makeWorld, onEngine } from "./world.js"

const { values: args } = parseArgs({
  options: {
    seconds: { type: "string", default: "60" },
    seed: { type: "string" },
    only: { type: "string", default: "bank,control,histories,single" },
    tries: { type: "string", default: "10000" },
    rounds: { type: "string", default: "1000" },
    json: { type: "boolean", default: false }
  }
})

const proofs = ["bank", "control", "histories", "single", "soak"]
const only = args.only.split(",")
const numbers = [args.seconds, args.tries, args.rounds, args.seed ?? "1"].map(Number)
if (only.some((name) => !proofs.includes(name)) || numbers.some((_) => !(_ >= 0))) {
  console.error(`the proofs are ${proofs.join(", ")}; everything else is a number`)
  process.exit(2)
}

const seed = args.seed === undefined ? Math.floor(Math.random() * 2 ** 31) : Number(args.seed)
const say = args.json ? () => {} : console.log
const results: Record<string, unknown> = { seed }
const wrong: Array<string> = []

const unhandled = (cause: unknown): void => void wrong.push(`unhandled: ${String(cause)}`)
process.on("unhandledRejection", unhandled)
process.on("uncaughtException", unhandled)

/** Says what came out, keeps it for `--json`, and remembers what is wrong. */
const report = (
  name: string,
  result: object,
  lines: ReadonlyArray<string>,
  amiss: ReadonlyArray<string> = []
): Effect.Effect<void> =>
  Effect.sync(() => {
    results[name] = result
    say(`\n${name}`)
    for (const line of lines) say(`  ${line}`)
    for (const line of amiss.slice(0, 20)) say(`  WRONG: ${line}`)
    wrong.push(...amiss.map((_) => `${name}: ${_}`))
  })

const each = (tally: Tally): string =>
  Object.entries(tally)
    .sort(([, a], [, b]) => b - a)
    .map(([what, times]) => `${what} ${times}`)
    .join(", ")

const kindsOf = ({ cycles }: Analysis): string =>
  cycles.length === 0
    ? "no cycles"
    : each(
        Object.fromEntries(
          [...new Set(cycles.map((_) => _.kind))].map((kind) => [kind, cycles.filter((_) => _.kind === kind).length])
        )
      )

const program = Effect.gen(function* () {
  const random = new Random(seed)
  const seeds = { bank: random.fork(), control: random.fork(), histories: random.fork(), single: random.fork() }
  const world = yield* makeWorld()
  say(`PostgreSQL ${world.server.version}, Node ${process.versions.node}, seed ${seed}`)

  if (only.includes("bank")) {
    const seen = yield* bank(world, seeds.bank, { seconds: Number(args.seconds) })
    yield* report(
      "bank",
      { ...seen, lost: seen.lost.length, ghosts: seen.ghosts.length },
      [
        `${seen.seconds} s of chaos: ${seen.acknowledged} transactions acknowledged, ${seen.aborted} aborted, ` +
          `${seen.unknown} unknown (settled by looking: ${seen.settled.committed} committed, ${seen.settled.aborted} not)`,
        `lost ${seen.lost.length}, ghosts ${seen.ghosts.length}, leaked ${seen.leaked}`,
        `${faultsOf(seen)} faults survived: ${each(seen.faults)}`,
        `clients were told: ${each(seen.reasons)}`
      ],
      seen.wrong
    )
  }

  if (only.includes("control")) {
    const seen = yield* Effect.scoped(Effect.flatMap(makeWorld(forgetful), (other) => loss(other, seeds.control)))
    yield* report(
      "control",
      { acknowledged: seen.acknowledged, lost: seen.lost.length },
      [`synchronous_commit = off and a crash: ${seen.lost.length} of ${seen.acknowledged} acknowledged are lost`],
      seen.lost.length > 0 ? [] : ["the checker has seen no loss where there must be some"]
    )
  }

  if (only.includes("histories")) {
    const run = onEngine(world)
    for (const isolation of ["serializable", "repeatable read"] as const) {
      const seen = yield* run(lists(seeds.histories, { isolation, transactions: 1000 }))
      const skew = yield* run(writeSkew(isolation))
      const forbidden = [...seen.cycles, ...skew.cycles].filter((_) => isolation === "serializable" || _.kind !== "G2")
      yield* report(
        `histories, ${isolation}`,
        { ...seen, cycles: seen.cycles.length },
        [
          `${seen.transactions} transactions, ${seen.edges} dependencies: ${kindsOf(seen)}`,
          `write skew on purpose: ${kindsOf(skew)}`
        ],
        [
          ...seen.broken,
          ...skew.broken,
          ...forbidden.map((_) => `${_.kind} among ${_.transactions.join(", ")}`),
          ...(isolation === "serializable" || skew.cycles.length > 0 ? [] : ["the checker does not see write skew"])
        ]
      )
    }
  }

  if (only.includes("single")) {
    const seen = yield* onEngine(world, { maxConnections: 1 })(single(world, seeds.single, Number(args.tries)))
    yield* report(
      "single",
      { tries: seen.tries, interrupted: seen.interrupted, lost: seen.lost.length, ghosts: seen.ghosts.length },
      [
        `a pool of one: ${seen.tries} tries, ${seen.interrupted} of them interrupted, the slot is never lost`,
        `${seen.acknowledged} acknowledged, ${seen.aborted} aborted, ${seen.unknown} unknown ` +
          `(settled by looking: ${seen.settled.committed} committed, ${seen.settled.aborted} not), lost ${seen.lost.length}, ghosts ${seen.ghosts.length}`
      ],
      seen.wrong
    )
  }

  if (only.includes("soak")) {
    const seen = yield* onEngine(world, { maxConnections: 8 })(soak(world, random.fork(), Number(args.rounds)))
    const mega = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(2)} MiB`
    yield* report(
      "soak",
      seen,
      [
        `${seen.rounds} rounds, ${seen.jobs} jobs; in balance with the server after each`,
        ...(seen.files === undefined ? [] : [`open files besides connections: ${seen.files[0]} to ${seen.files[1]}`]),
        `heap, medians of the four quarters: ${seen.heap.map(mega).join(", ")}`
      ],
      seen.wrong
    )
  }
}).pipe(Effect.scoped)

await Effect.runPromise(program)
// A rejection is told of a turn later.
await new Promise((resolve) => setImmediate(resolve))
if (args.json) console.log(JSON.stringify({ ...results, wrong }, undefined, 2))
else say(wrong.length === 0 ? "\nnothing wrong" : `\n${wrong.length} wrong; repeat with --seed ${seed}`)
process.exitCode = wrong.length === 0 ? 0 : 1
