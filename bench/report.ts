/**
 * The results as text and as JSON.
 */
import { ours } from "./contenders/index.js"
import type { Curve, IdleSessions } from "./growth.js"
import type { Kept } from "./kept.js"
import { bestRatio, median, ratio } from "./measure.js"
import type { Sample } from "./measure.js"
import type { Workload } from "./workloads.js"

export interface Reached {
  readonly against: string
  readonly ratio: number
  /** Of the fastest rounds. */
  readonly best: number
  readonly most: number
  readonly beyond: number | undefined
}

export interface Result {
  readonly workload: Workload
  readonly samples: ReadonlyArray<Sample>
  readonly goals: ReadonlyArray<Reached>
}

export interface Report {
  readonly environment: Readonly<Record<string, string | number>>
  readonly results: ReadonlyArray<Result>
  readonly kept: ReadonlyArray<Kept>
  readonly idle: IdleSessions | undefined
  readonly curves: ReadonlyArray<Curve>
}

export const resultOf = (workload: Workload, samples: ReadonlyArray<Sample>): Result => {
  const own = samples.find((_) => _.name === ours)
  return {
    workload,
    samples,
    goals: workload.goals.flatMap(({ against, beyond, most }) => {
      const other = samples.find((_) => _.name === against)
      return own === undefined || other === undefined
        ? []
        : [{ against, ratio: ratio(own, other), best: bestRatio(own, other), most, beyond }]
    })
  }
}

export const micros = (value: number): string =>
  value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en")

const verdict = ({ beyond, most, ratio }: Reached): string =>
  beyond !== undefined && ratio <= beyond ? "beyond" : ratio <= most ? "reached" : "MISSED"

export const printResult = ({ goals, samples, workload }: Result): void => {
  const own = samples.find((_) => _.name === ours)
  console.log(`\n${workload.title}`)
  for (const sample of samples) {
    const times = own === undefined || sample === own ? "" : `  ${ratio(sample, own).toFixed(2)} × ${ours}`
    const cpu = sample.cpu.length === 0 ? "–" : micros(median(sample.cpu))
    console.log(
      `  ${sample.name.padEnd(20)} ${micros(median(sample.micros)).padStart(10)} µs` +
        `${micros(Math.min(...sample.micros)).padStart(10)} best${cpu.padStart(10)} cpu${times}`
    )
  }
  for (const goal of goals) {
    const limits = `at most ${goal.most.toFixed(2)}${goal.beyond === undefined ? "" : `, beyond at ${goal.beyond.toFixed(2)}`}`
    console.log(
      `  goal against ${goal.against}: ${limits}; now ${goal.ratio.toFixed(2)}: ${verdict(goal)} (best rounds ${goal.best.toFixed(2)})`
    )
  }
}

export const printIdle = ({ bytes, connections, micros, sessions }: IdleSessions): void => {
  const verdict = (ok: boolean) => (ok ? "reached" : "MISSED")
  console.log(`\nsessions that run nothing (${sessions.toLocaleString("en")})`)
  console.log(`  time         ${micros.toFixed(2)} µs each, goal 15: ${verdict(micros < 15)}`)
  console.log(`  memory       ${Math.round(bytes)} bytes each, goal 2 048: ${verdict(bytes < 2048)}`)
  console.log(`  connections  ${connections}, goal 0: ${verdict(connections === 0)}`)
}

export const printKept = (kept: ReadonlyArray<Kept>): void => {
  if (kept.length > 0) console.log("\nbytes of a unit that are kept until a major collection")
  for (const { bytes, name } of kept) {
    const each = Object.entries(bytes).map(
      ([contender, bytes]) => `${contender} ${Math.round(bytes).toLocaleString("en")}`
    )
    console.log(`  ${name.padEnd(14)} ${each.join(", ")}`)
  }
}

export const printCurves = (curves: ReadonlyArray<Curve>): void => {
  for (const title of new Set(curves.map((_) => _.title))) {
    const some = curves.filter((_) => _.title === title)
    console.log(`\n${title}: µs per ${some[0]!.unit}`)
    console.log(`  ${"".padEnd(20)} ${some[0]!.points.map((_) => String(_.size).padStart(9)).join("")}`)
    for (const { contender, points } of some) {
      console.log(`  ${contender.padEnd(20)} ${points.map((_) => micros(_.micros).padStart(9)).join("")}`)
    }
  }
}

/** More digits than anybody reads would only make each file another one. */
const rounded = (_: string, value: unknown): unknown => (typeof value === "number" ? Number(value.toFixed(2)) : value)

export const toJson = ({ curves, environment, idle, kept, results }: Report): string => {
  const workloads = results.map(({ goals, samples, workload: { name, title } }) => {
    const own = samples.find((_) => _.name === ours)
    const each = (of: (sample: Sample) => number) => Object.fromEntries(samples.map((_) => [_.name, of(_)]))
    return {
      name,
      title,
      micros: each((_) => median(_.micros)),
      best: each((_) => Math.min(..._.micros)),
      // Null where another process has computed.
      cpu: each((_) => median(_.cpu)),
      relative: own === undefined ? undefined : each((_) => ratio(_, own)),
      goals
    }
  })
  return JSON.stringify({ environment, workloads, kept, idle, curves }, rounded, 2) + "\n"
}
