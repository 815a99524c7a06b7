/**
 * Folders: a place for temporary ones that other users of the machine can't tamper with and the account can enter, and
 * what a data folder holds.
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { randomBytes } from "node:crypto"
import { chmod, chown, lchown, lstat, mkdir, readdir, readFile, rm, stat } from "node:fs/promises"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { EmbeddedError } from "../EmbeddedError.js"
import type { Guard } from "./guard.js"
import { accountName, attempt, canEnter, isRoot, windows } from "./processes.js"
import type { Account } from "./processes.js"

/** @internal */
export const unusable = (problem: string, hint: string, cause?: unknown): EmbeddedError =>
  new EmbeddedError({ reason: "DataDirUnusable", problem, hint, cause })

/** @internal */
export const randomName = (): string => randomBytes(6).toString("hex")

/** @internal */
export const give = (path: string, account: Account | undefined): Promise<void> =>
  account === undefined ? Promise.resolve() : chown(path, account.uid >>> 0, account.gid >>> 0)

/** @internal */
export const removeFolder = (path: string): Effect.Effect<void> =>
  Effect.ignore(attempt(() => rm(path, { recursive: true, force: true, maxRetries: 10, retryDelay: 50 })))

/** @internal */
export const emptyFolder = (path: string): Effect.Effect<void> =>
  attempt(() => readdir(path)).pipe(
    Effect.flatMap((names) => Effect.forEach(names, (name) => removeFolder(join(path, name)), { discard: true })),
    Effect.ignore
  )

const ownFolder = async (path: string): Promise<boolean> => {
  // 0755 for root, whose account must pass through; what is secret below has a mode of its own
  const mode = isRoot() ? 0o755 : 0o700
  await mkdir(path, { mode }).catch((error: NodeJS.ErrnoException) =>
    error.code === "EEXIST" ? undefined : Promise.reject(error)
  )
  const found = await lstat(path)
  if (!found.isDirectory()) return false
  if (windows) return true
  // made by somebody else, who could put a program of theirs here
  if (found.uid !== process.geteuid?.() || (found.mode & 0o022) !== 0) return false
  if ((found.mode & 0o777) !== mode) await chmod(path, mode)
  return true
}

/**
 * The folder of this user for what is temporary or shared between processes: `effect-db-<uid>` below `os.tmpdir()`, or
 * below `/tmp` or `/var/tmp` where the account can't enter the first.
 *
 * @internal
 */
export const temporaryBase = Effect.fnUntraced(function* (
  account: Account | undefined
): Effect.fn.Return<string, EmbeddedError> {
  const parents = Array.from(new Set(windows ? [tmpdir()] : [tmpdir(), "/tmp", "/var/tmp"]))
  for (const parent of parents) {
    if (account !== undefined && !(yield* canEnter(parent, account))) continue
    const base = join(parent, `effect-db-${process.geteuid?.() ?? "user"}`)
    if (
      yield* Effect.orElseSucceed(
        attempt(() => ownFolder(base)),
        () => false
      )
    )
      return base
  }
  return yield* unusable(
    `There is no folder for temporary data: ${parents.join(", ")} can't be written or entered, or hold an effect-db-${process.geteuid?.() ?? "user"} of another user`,
    "Set TMPDIR to a folder that exists and that this user can write"
  )
})

/**
 * A folder that only the account can read, removed at the end of the scope and at any end of this process.
 *
 * @internal
 */
export const temporaryFolder = (
  guard: Guard,
  base: string,
  account: Account | undefined
): Effect.Effect<string, EmbeddedError, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.suspend(() => {
      const path = join(base, `run-${randomName()}`)
      guard.update((task) => task.remove.add(path))
      return privateFolder(path, account)
    }),
    (path) =>
      Effect.zipRight(
        removeFolder(path),
        Effect.sync(() => guard.update((task) => task.remove.delete(path)))
      )
  )

/** @internal */
export const privateFolder = (path: string, account: Account | undefined): Effect.Effect<string, EmbeddedError> =>
  Effect.mapError(
    attempt(async () => {
      await mkdir(path, { mode: 0o700 })
      await give(path, account)
      return path
    }),
    (cause) => unusable(`The folder ${path} can't be made (${cause.code})`, "Choose another place for it", cause)
  )

/** @internal */
export type DataDir =
  | { readonly _tag: "Absent" }
  | { readonly _tag: "Empty" }
  | {
      readonly _tag: "Cluster"
      readonly major: string
      /** Where the owner is not root. */
      readonly owner: Account | undefined
    }

/**
 * What a data folder holds.
 *
 * @internal
 */
export const inspect = Effect.fnUntraced(function* (path: string): Effect.fn.Return<DataDir, EmbeddedError> {
  const found = yield* Effect.either(attempt(async () => ({ status: await stat(path), names: await readdir(path) })))
  if (found._tag === "Left") {
    const cause = found.left
    if (cause.code === "ENOENT") return { _tag: "Absent" }
    if (cause.code === "ENOTDIR") {
      return yield* unusable(`The data folder ${path} is not a folder`, "Choose another dataDir", cause)
    }
    const owner = yield* Effect.option(attempt(() => stat(path)))
    return yield* unusable(
      `The data folder ${path} can't be read (${cause.code})${
        owner._tag === "Some" && !windows ? `: it belongs to ${accountName(owner.value.uid)}` : ""
      }`,
      "Run as its owner or as root, or choose another dataDir",
      cause
    )
  }
  const { names, status } = found.right
  if (names.includes("PG_VERSION")) {
    const major = yield* Effect.mapError(
      attempt(() => readFile(join(path, "PG_VERSION"), "utf8")),
      (cause) => unusable(`${join(path, "PG_VERSION")} can't be read (${cause.code})`, "Choose another dataDir", cause)
    )
    const owner = status.uid === 0 ? undefined : { name: accountName(status.uid), uid: status.uid, gid: status.gid }
    return { _tag: "Cluster", major: major.trim(), owner: windows ? undefined : owner }
  }
  if (names.length > 0) {
    return yield* unusable(
      `The folder ${path} holds files that are not PostgreSQL's (${names.slice(0, 3).join(", ")}${names.length > 3 ? ", ..." : ""})`,
      "Choose a dataDir that is empty or does not exist yet"
    )
  }
  return { _tag: "Empty" }
})

/**
 * Gives an existing data folder the owner and the mode that PostgreSQL insists on. As root a folder that root copied
 * or restored is given to the account, with all that is in it.
 *
 * @internal
 */
export const adopt = (path: string, account: Account | undefined): Effect.Effect<void, EmbeddedError> =>
  windows
    ? Effect.void
    : Effect.mapError(
        attempt(async () => {
          const status = await stat(path)
          if (account !== undefined && status.uid === 0) {
            for (const entry of await readdir(path, { recursive: true })) {
              await lchown(join(path, entry), account.uid >>> 0, account.gid >>> 0)
            }
            await give(path, account)
          }
          if ((status.mode & 0o027) !== 0) await chmod(path, 0o700)
        }),
        (cause) =>
          unusable(
            `The data folder ${path} can't be given to the account that PostgreSQL runs as (${cause.code})`,
            "Run as its owner or as root, or choose another dataDir",
            cause
          )
      )

/**
 * Makes the folder above a data folder and sees to it that the account can enter it.
 *
 * @internal
 */
export const makeParent = Effect.fnUntraced(function* (
  path: string,
  account: Account | undefined
): Effect.fn.Return<void, EmbeddedError> {
  const parent = dirname(path)
  yield* Effect.mapError(
    attempt(async () => {
      const first = await mkdir(parent, { recursive: true, mode: isRoot() ? 0o755 : 0o777 })
      if (first === undefined || account === undefined) return
      // a strict umask would shut the account out of what was made for it
      for (let made = parent; made.length >= first.length; made = dirname(made)) await chmod(made, 0o755)
    }),
    (cause) => unusable(`The folder ${parent} can't be made (${cause.code})`, "Choose another dataDir", cause)
  )
  if (account === undefined || (yield* canEnter(parent, account))) return
  return yield* unusable(
    `The data folder ${path} lies below a folder that the account "${account.name}" can't enter; PostgreSQL runs as that account because this process is root`,
    `Choose a dataDir that it can enter, let it pass (chmod o+x on the folders above), or run as an ordinary user`
  )
})
