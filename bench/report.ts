/**
 * The results as text, as JSON, and as a picture.
 */
import type { Curve, IdleSessions } from "./growth.js"
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
  readonly idle: IdleSessions | undefined
  readonly curves: ReadonlyArray<Curve>
}

export const ours = "effect-db"

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

const micros = (value: number): string => (value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en"))

const verdict = ({ beyond, most, ratio }: Reached): string =>
  beyond !== undefined && ratio <= beyond ? "beyond" : ratio <= most ? "reached" : "MISSED"

export const printResult = ({ goals, samples, workload }: Result): void => {
  const own = samples.find((_) => _.name === ours)
  console.log(`\n${workload.title}`)
  for (const sample of samples) {
    const times = own === undefined || sample === own ? "" : `  ${ratio(own, sample).toFixed(2)} of it`
    console.log(
      `  ${sample.name.padEnd(20)} ${micros(median(sample.micros)).padStart(10)} µs` +
        `${micros(Math.min(...sample.micros)).padStart(10)} best${micros(median(sample.cpu)).padStart(10)} cpu${times}`
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

export const toJson = ({ curves, environment, idle, results }: Report): string =>
  JSON.stringify(
    {
      environment,
      workloads: results.map(({ goals, samples, workload }) => ({
        name: workload.name,
        title: workload.title,
        micros: Object.fromEntries(samples.map((_) => [_.name, median(_.micros)])),
        best: Object.fromEntries(samples.map((_) => [_.name, Math.min(..._.micros)])),
        cpu: Object.fromEntries(samples.map((_) => [_.name, median(_.cpu)])),
        goals
      })),
      idle,
      curves
    },
    undefined,
    2
  )

const escape = (text: string): string => text.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`)

/** A group of bars for each workload, each group to a scale of its own. Shorter is better. */
export const toSvg = ({ environment, results }: Report): string => {
  const left = 150
  const width = 380
  const bar = 14
  const lines: Array<string> = []
  let y = 30
  for (const { samples, workload } of results) {
    lines.push(`<text x="0" y="${y}" font-weight="bold">${escape(workload.title)}</text>`)
    y += 8
    const slowest = Math.max(...samples.map((_) => median(_.micros)))
    for (const { micros: values, name } of samples) {
      const value = median(values)
      const length = Math.max(1, (value / slowest) * width)
      const colour = name === ours ? "#2f81f7" : "#8b949e"
      const label = value >= 10_000 ? `${(value / 1000).toFixed(value < 100_000 ? 1 : 0)} ms` : `${micros(value)} µs`
      lines.push(
        `<text x="${left - 8}" y="${y + 11}" text-anchor="end">${escape(name)}</text>`,
        `<rect x="${left}" y="${y}" width="${length.toFixed(1)}" height="${bar - 2}" rx="2" fill="${colour}"/>`,
        `<text x="${(left + length + 6).toFixed(1)}" y="${y + 11}">${label}</text>`
      )
      y += bar + 2
    }
    y += 24
  }
  const foot = `shorter is better; medians; ${Object.entries(environment)
    .map(([name, value]) => `${name} ${value}`)
    .join(", ")}`
  lines.push(`<text x="0" y="${y}" font-size="10">${escape(foot)}</text>`)
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${left + width + 90} ${y + 10}" ` +
    `font-family="system-ui, sans-serif" font-size="12" fill="#6e7681">\n${lines.join("\n")}\n</svg>\n`
  )
}
