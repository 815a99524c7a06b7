// node .ci/counts.mjs REPORT VERDICT: prints `PASSED FAILED` of vitest's JSON report.
import { existsSync, readFileSync } from "node:fs"

const [path = "", verdict] = process.argv.slice(2)
const report = existsSync(path) ? JSON.parse(readFileSync(path, "utf8")) : { testResults: [] }

/** @type {Array<{ status: string, assertionResults: Array<{ status: string }> }>} */
const files = report.testResults
const tests = files.flatMap((file) => file.assertionResults)
const passed = tests.filter((test) => test.status === "passed").length
let failed = tests.filter((test) => test.status === "failed").length
failed += files.filter(
  (file) => file.status === "failed" && !file.assertionResults.some((t) => t.status === "failed")
).length
if (failed === 0 && (verdict !== "passed" || passed === 0)) failed = 1

console.log(`${passed} ${failed}`)
