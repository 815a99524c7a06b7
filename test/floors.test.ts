import { describe, expect, it } from "vitest"
import { undescribed, violations } from "../scripts/check-floors.mjs"

const rule = {
  floors: [["src/word.ts", "src/verb.ts"], ["src/engine.ts"], ["src/http.ts", "src/testing/*"], ["src/index.ts"]],
  strangers: new Set([2])
}

const imports = (source: string, resolved: string, options: { readonly type?: boolean } = {}) => ({
  source,
  dependencies: [{ resolved, preCompilationOnly: options.type === true, dependencyTypes: ["local", "import"] }]
})

describe("floors", () => {
  it("let values come from below and from earlier rows", () => {
    expect(
      violations(
        [
          imports("src/verb.ts", "src/word.ts"),
          imports("src/engine.ts", "src/verb.ts"),
          imports("src/http.ts", "src/engine.ts"),
          imports("src/testing/a.ts", "src/testing/b.ts"),
          imports("src/index.ts", "src/http.ts"),
          imports("src/word.ts", "node_modules/effect/Effect.js")
        ],
        rule
      )
    ).toEqual([])
  })

  it("find a value that comes from above", () => {
    expect(violations([imports("src/word.ts", "src/engine.ts")], rule)).toEqual([
      "src/word.ts (floor 0) imports a value from src/engine.ts (floor 1)"
    ])
  })

  it("find a value that comes from a later row", () => {
    expect(violations([imports("src/word.ts", "src/verb.ts")], rule)).toEqual([
      "src/word.ts imports a value from src/verb.ts, a later row of floor 0"
    ])
  })

  it("find an edge that imports another edge", () => {
    expect(violations([imports("src/testing/a.ts", "src/http.ts")], rule)).toEqual([
      "src/testing/a.ts imports a value from src/http.ts: files of floor 2 are strangers"
    ])
  })

  it("find a file that stands nowhere", () => {
    expect(violations([imports("src/lost.ts", "src/word.ts")], rule)).toEqual([
      "src/lost.ts stands on no floor: give it a row in scripts/floors.mjs"
    ])
  })

  it("let types point up", () => {
    expect(violations([imports("src/word.ts", "src/index.ts", { type: true })], rule)).toEqual([])
    expect(
      violations(
        [{ source: "src/word.ts", dependencies: [{ resolved: "src/index.ts", dependencyTypes: ["type-only"] }] }],
        rule
      )
    ).toEqual([])
  })

  it("are those of the tables that describe them", () => {
    const row = (file: string) => `| \`${file}\` | what |\n`
    const rows = ["src/word.ts", "src/verb.ts", "src/engine.ts", "src/http.ts", "src/testing/*"].map(row)
    const barrel = "**7: the barrel.** `src/index.ts`.\n"
    expect(undescribed(rows.join("") + barrel, rule.floors)).toEqual([])
    expect(undescribed(rows.slice(1).join("") + row("src/old.ts") + barrel, rule.floors)).toEqual([
      "src/word.ts has no row in ARCHITECTURE.md",
      "ARCHITECTURE.md has a row for src/old.ts, which has no floor"
    ])
    expect(undescribed([...rows].reverse().join("") + barrel, rule.floors)).toEqual([
      "ARCHITECTURE.md has src/testing/* in another place than the list"
    ])
  })
})
