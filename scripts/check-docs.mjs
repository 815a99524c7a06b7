/**
 * `npm run docs:check`: every TypeScript block of README.md, of docs/ and of the comments in src/ compiles, and every
 * relative link of the words leads somewhere.
 *
 * A block that imports is a program as it stands. One that does not is given the imports of the names that it uses and
 * the cast below. Only "```ts" is looked at.
 */
import { spawnSync } from "node:child_process"
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { dirname, join, relative } from "node:path"
import { fileURLToPath } from "node:url"

const root = fileURLToPath(new URL("..", import.meta.url))
const folder = join(root, ".tmp", "docs")

/** Where a name comes from that a block uses without an import. */
const modules = {
  effect:
    "Cause Chunk Config Console Context Data Deferred Duration Effect Exit Fiber Layer Logger ManagedRuntime Option " +
    "Redacted Runtime Schedule Schema Scope Stream",
  "effect-db":
    "Database DbConnection DbEngine DbError DbHttp DbLayer DbQuery DbRegistry DbResolver DbRuntime DbSchema DbSession " +
    "DbTransaction atomic sqlClientLayer withTransaction",
  "effect-db/embedded": "DbEmbedded EmbeddedServer",
  "effect-db/testing": "DbTest",
  "@effect/platform": "HttpRouter HttpServer HttpServerRequest HttpServerResponse",
  "@effect/platform-node": "NodeHttpServer NodeRuntime",
  "@effect/sql": "Migrator Model SqlClient SqlError SqlResolver SqlSchema Statement",
  "@effect/sql-pg": "PgClient",
  "@effect/vitest": "it layer",
  vitest: "expect"
}

/** Who plays in the examples. */
const cast = `import type { Effect, Redacted, Scope } from "effect"
import type { SqlError } from "@effect/sql/SqlError"
import type { DbEngine, DbSession, DbSql, Session, Transaction as Block } from "effect-db"
declare global {
  const url: Redacted.Redacted
  const db: Session
  const sql: DbSql
  const register: (name: string) => Effect.Effect<void, SqlError, DbSession>
  const transfer: (from: number, to: number, amount: number) => Effect.Effect<void, SqlError, DbSession>
  const audit: (what: string) => Effect.Effect<void, SqlError, DbSession>
  const report: Effect.Effect<ReadonlyArray<{ readonly day: string; readonly total: number }>, SqlError, DbSession>
  const sendMail: (to: string) => Effect.Effect<void>
  const program: Effect.Effect<void, SqlError, DbEngine | DbSession>
  const work: Effect.Effect<number, SqlError, DbSession>
  const first: Effect.Effect<void, SqlError, DbSession>
  const second: Effect.Effect<void, SqlError, DbSession>
  type Transaction<A> = Block<A>
}
`

const pages = ["README.md", ...readdirSync(join(root, "docs")).map((name) => `docs/${name}`)].filter((name) =>
  name.endsWith(".md")
)
const words = [...pages, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"].filter((name) =>
  existsSync(join(root, name))
)

const sources = readdirSync(join(root, "src"), { recursive: true, encoding: "utf8" })
  .filter((name) => name.endsWith(".ts"))
  .map((name) => `src/${name}`)

/** @param {string} page */
const read = (page) => readFileSync(join(root, page), "utf8")

/** What is written: of a source file its comments, each line in its place. @param {string} page */
const textOf = (page) =>
  page.endsWith(".md") ? read(page) : read(page).replace(/^(?:\s*\* ?(.*)|.*)$/gm, (_, line = "") => line)

/**
 * The fenced blocks of a page: what stands behind the fence, the code, and the line of the fence.
 *
 * @param {string} page
 */
const blocksOf = (page) => {
  /** @type {Array<{ info: string, line: number, code: Array<string> }>} */
  const blocks = []
  /** @type {{ info: string, line: number, code: Array<string>, fence: string } | undefined} */
  let open
  for (const [at, line] of textOf(page).split("\n").entries()) {
    const fence = /^(`{3,})(.*)$/.exec(line)
    if (open !== undefined) {
      if (fence?.[1] === open.fence && fence[2] === "") {
        blocks.push(open)
        open = undefined
      } else {
        open.code.push(line)
      }
    } else if (fence !== null) {
      open = { info: fence[2] ?? "", line: at + 1, code: [], fence: fence[1] ?? "" }
    }
  }
  if (open !== undefined) throw new Error(`${page}:${open.line} is never closed`)
  return blocks
}

/** @param {string} code */
const importsFor = (code) =>
  Object.entries(modules)
    .map(([module, names]) => [module, names.split(" ").filter((name) => uses(code, name))])
    .filter(([, names]) => names?.length !== 0)
    .map(([module, names]) => `import { ${/** @type {Array<string>} */ (names).join(", ")} } from "${module}"`)

/**
 * Whether the code uses a name that it does not declare itself.
 *
 * @param {string} code
 * @param {string} name
 */
const uses = (code, name) =>
  new RegExp(`(?<![\\w$.])${name}(?![\\w$]|\\s*:)`).test(code) &&
  !new RegExp(`^(?:export )?(?:const|class|function|interface|type|declare const) ${name}\\b`, "m").test(code)

/**
 * The block as a module, and how many lines stand in front of it.
 *
 * @param {string} code
 * @returns {readonly [text: string, offset: number]}
 */
const moduleOf = (code) => {
  if (/^import\b/m.test(code)) return [code, 0]
  const head = importsFor(code)
  return [[...head, code, "export {}"].join("\n"), head.length]
}

/** @type {Array<string>} */
const found = []

/** @type {Map<string, { page: string, line: number }>} */
const places = new Map()
rmSync(folder, { recursive: true, force: true })
mkdirSync(folder, { recursive: true })
writeFileSync(
  join(folder, "tsconfig.json"),
  JSON.stringify({
    extends: "../../tsconfig.json",
    compilerOptions: { noUnusedLocals: false, noUnusedParameters: false, incremental: false },
    include: ["*.ts"]
  })
)
writeFileSync(join(folder, "cast.d.ts"), cast)
for (const page of [...pages, ...sources]) {
  for (const { code, info, line } of blocksOf(page)) {
    if (info !== "ts") continue
    const [text, offset] = moduleOf(code.join("\n"))
    const name = `${page.replace(/\W/g, "-")}-${line}.ts`
    places.set(name, { page, line: line - offset })
    writeFileSync(join(folder, name), text)
  }
}
const tsc = spawnSync(
  process.execPath,
  [join(root, "node_modules/typescript/bin/tsc"), "--pretty", "false", "-p", folder],
  { cwd: folder, encoding: "utf8", maxBuffer: 1 << 26 }
)
if (tsc.error !== undefined) throw tsc.error
for (const message of tsc.stdout.split("\n").filter((line) => line !== "")) {
  const at = /^([^(]+)\((\d+),\d+\): (.*)$/.exec(message)
  const place = at === null ? undefined : places.get(at[1] ?? "")
  if (place !== undefined) found.push(`${place.page}:${place.line + Number(at?.[2])} ${at?.[3]}`)
  // what is wrong in src is told by `npm run types`
  else if (at === null && !message.startsWith(" ")) found.push(message)
}

/** The anchor that GitHub gives a heading. @param {string} heading */
const anchorOf = (heading) =>
  heading
    .toLowerCase()
    .replace(/[^\p{L}\p{N}\s_-]/gu, "")
    .trim()
    .replace(/\s/g, "-")

/** A page without its code. @param {string} page */
const proseOf = (page) => read(page).replace(/^(`{3,}).*\n[\s\S]*?^\1$/gm, "")

/** @param {string} page */
const anchorsOf = (page) => [...proseOf(page).matchAll(/^#+ (.*)$/gm)].map(([, heading]) => anchorOf(heading ?? ""))

for (const page of words) {
  for (const [, link] of proseOf(page).matchAll(/\]\(([^)\s]+)\)/g)) {
    if (link === undefined || /^[a-z]+:/.test(link)) continue
    const [path = "", anchor] = link.split("#")
    const target = path === "" ? page : relative(root, join(root, dirname(page), path))
    if (!existsSync(join(root, target))) found.push(`${page} links to ${link}, which does not exist`)
    else if (anchor !== undefined && !anchorsOf(target).includes(anchor)) {
      found.push(`${page} links to ${link}, which has no such heading`)
    }
  }
}

// The headings of the FAQ are our error messages, "…" for what differs. Effect's own says a key of ours.
const texts = sources.map(read)
for (const [, heading = ""] of proseOf("docs/faq.md").matchAll(/^### (.*)$/gm)) {
  const parts = heading
    .replace(/^Service not found: /, "")
    .split("…")
    .map((part) => part.trim())
  const lost = parts.filter((part) => part.length > 3 && !texts.some((text) => text.includes(part)))
  for (const part of lost) found.push(`docs/faq.md: no error says "${part}"`)
}

for (const message of found) console.error(message)
console.log(`${places.size} blocks of ${pages.length} pages and of src, ${found.length} mistakes`)
process.exitCode = found.length === 0 ? 0 : 1
