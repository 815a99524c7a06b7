/**
 * `npm run floors`: no circular imports, nothing imported that a user would not have, and the floors of
 * `scripts/floors.mjs`, each file of which has its row in ARCHITECTURE.md. dependency-cruiser reads the graph; the floor
 * rule is applied here.
 */
import { spawnSync } from "node:child_process"
import { readFileSync, realpathSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { floors, strangers } from "./floors.mjs"

/**
 * @typedef {{ readonly resolved: string, readonly dependencyTypes?: ReadonlyArray<string>, readonly preCompilationOnly?: boolean }} Dependency
 * @typedef {{ readonly source: string, readonly dependencies: ReadonlyArray<Dependency> }} Module
 * @typedef {{ readonly floor: number, readonly row: number, readonly pattern: string }} Place
 * @typedef {{ readonly floors: ReadonlyArray<ReadonlyArray<string>>, readonly strangers: ReadonlySet<number> }} Rule
 */

/**
 * @param {Rule} rule
 * @param {string} file
 * @returns {Place | undefined}
 */
const placeOf = (rule, file) => {
  for (const [floor, rows] of rule.floors.entries()) {
    for (const [row, pattern] of rows.entries()) {
      if (pattern.endsWith("/*") ? file.startsWith(pattern.slice(0, -1)) : file === pattern) {
        return { floor, row, pattern }
      }
    }
  }
  return undefined
}

/** @param {Dependency} dependency */
const isValue = (dependency) =>
  !dependency.preCompilationOnly && !(dependency.dependencyTypes ?? []).includes("type-only")

/**
 * What breaks the rule, in words. Empty when nothing does.
 *
 * @param {ReadonlyArray<Module>} modules
 * @param {Rule} rule
 * @returns {Array<string>}
 */
export const violations = (modules, rule = { floors, strangers }) => {
  /** @type {Array<string>} */
  const found = []
  for (const { dependencies, source } of modules) {
    if (!source.startsWith("src/")) continue
    const from = placeOf(rule, source)
    if (from === undefined) {
      found.push(`${source} stands on no floor: give it a row in scripts/floors.mjs`)
      continue
    }
    for (const dependency of dependencies) {
      const to = isValue(dependency) ? placeOf(rule, dependency.resolved) : undefined
      if (to === undefined || to.pattern === from.pattern) continue
      if (to.floor > from.floor) {
        found.push(`${source} (floor ${from.floor}) imports a value from ${dependency.resolved} (floor ${to.floor})`)
      } else if (to.floor === from.floor && rule.strangers.has(from.floor)) {
        found.push(`${source} imports a value from ${dependency.resolved}: files of floor ${from.floor} are strangers`)
      } else if (to.floor === from.floor && to.row > from.row) {
        found.push(`${source} imports a value from ${dependency.resolved}, a later row of floor ${from.floor}`)
      }
    }
  }
  return found
}

/**
 * Where the tables of ARCHITECTURE.md and the list of floors differ, in words.
 *
 * @param {string} text
 * @param {ReadonlyArray<ReadonlyArray<string>>} [list]
 * @returns {Array<string>}
 */
export const undescribed = (text, list = floors) => {
  const files = list.flat()
  const rows = [...text.matchAll(/^(?:\| |\*\*.*\*\* )`(src\/[^`]+)`/gm)].map(([, file = ""]) => file)
  const found = [
    ...files.filter((file) => !rows.includes(file)).map((file) => `${file} has no row in ARCHITECTURE.md`),
    ...rows
      .filter((row) => !files.includes(row))
      .map((row) => `ARCHITECTURE.md has a row for ${row}, which has no floor`)
  ]
  const late = rows.find((row, at) => row !== files[at])
  if (found.length === 0 && late !== undefined) found.push(`ARCHITECTURE.md has ${late} in another place than the list`)
  return found
}

const main = () => {
  const cruiser = fileURLToPath(
    new URL("../node_modules/dependency-cruiser/bin/dependency-cruise.mjs", import.meta.url)
  )
  const run = spawnSync(
    process.execPath,
    [cruiser, "src", "--config", ".dependency-cruiser.cjs", "--output-type", "json"],
    { cwd: fileURLToPath(new URL("..", import.meta.url)), encoding: "utf8", maxBuffer: 1 << 28 }
  )
  if (run.error !== undefined || run.stdout === "") {
    console.error(run.error ?? run.stderr)
    return 1
  }
  const graph = JSON.parse(run.stdout)
  const found = [
    ...graph.summary.violations.map(
      (
        /** @type {{ rule: { name: string }, from: string, to: string, cycle?: Array<{ name: string }> }} */ violation
      ) =>
        `${violation.rule.name}: ${[violation.from, ...(violation.cycle?.map((step) => step.name) ?? [violation.to])].join(" -> ")}`
    ),
    ...violations(graph.modules),
    ...undescribed(readFileSync(new URL("../ARCHITECTURE.md", import.meta.url), "utf8"))
  ]
  for (const violation of found) console.error(violation)
  console.log(`${graph.summary.totalCruised} modules, ${found.length} violations`)
  return found.length === 0 ? 0 : 1
}

const asked = process.argv[1]
if (asked !== undefined && realpathSync(asked) === realpathSync(fileURLToPath(import.meta.url)))
  process.exitCode = main()
