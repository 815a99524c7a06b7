// node .ci/counts.mjs REPORT VERDICT: prints `PASSED FAILED` of vitest's JSON report, and below it what failed.
import { existsSync, readFileSync } from "node:fs"
import { relative } from "node:path"

const [path = "", verdict] = process.argv.slice(2)
const report = existsSync(path) ? JSON.parse(readFileSync(path, "utf8")) : { testResults: [] }

/** @type {Array<{ status: string, fullName: string, failureMessages?: string[] }>} */
let tests = []
/** @type {string[]} */
const failures = []
for (const file of report.testResults) {
  const name = relative(process.cwd(), file.name)
  const failing = file.assertionResults.filter((test) => test.status === "failed")
  tests = tests.concat(file.assertionResults)
  for (const test of failing) {
    failures.push(`${name} > ${test.fullName}\n${(test.failureMessages ?? []).join("\n")}`)
  }
  // a file that could not run
  if (file.status === "failed" && failing.length === 0) failures.push(`${name}\n${file.message ?? ""}`)
}
const passed = tests.filter((test) => test.status === "passed").length
if (failures.length === 0 && (verdict !== "passed" || passed === 0)) {
  failures.push("the run broke without a failing test: an unhandled error, a time limit, or no tests at all")
}

console.log(`${passed} ${failures.length}`)
for (const failure of failures) console.log(failure.split("\n").slice(0, 8).join("\n    ").slice(0, 800))
