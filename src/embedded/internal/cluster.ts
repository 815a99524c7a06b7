/**
 * A new data folder, by `initdb`. It is there whole or not at all.
 */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import { readFile, rename, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { EmbeddedError } from "../EmbeddedError.js"
import type { Binaries } from "./binaries.js"
import {
  emptyFolder,
  give,
  makeParent,
  privateFolder,
  randomName,
  removeFolder,
  temporaryFolder,
  unusable
} from "./folders.js"
import type { Guard } from "./guard.js"
import { attempt, run, succeeded, windows } from "./processes.js"
import type { Account } from "./processes.js"

/** Where the generated password of a kept data folder is: readable by its owner alone, as everything there. */
const passwordFile = "effect-db.password"

/** @internal */
export const keptPassword = (dataDir: string): Effect.Effect<Redacted.Redacted | undefined> =>
  attempt(() => readFile(join(dataDir, passwordFile), "utf8")).pipe(
    Effect.map((text) => Redacted.make(text.trim())),
    Effect.orElseSucceed(() => undefined)
  )

/** @internal */
export interface NewCluster {
  readonly dataDir: string
  /** The folder is there, and empty. */
  readonly exists: boolean
  readonly user: string
  readonly password: Redacted.Redacted
  /** Write the password into the folder, for the next start. */
  readonly keepPassword: boolean
  readonly authentication: string
  /** Data that survives a crash of the machine. */
  readonly durable: boolean
  /** Runs when the data are in their place, and nothing comes in between. */
  readonly made: Effect.Effect<void, never, Scope.Scope>
}

const initdb = Effect.fnUntraced(function* (
  binaries: Binaries,
  guard: Guard,
  base: string,
  account: Account | undefined,
  folder: string,
  options: NewCluster
): Effect.fn.Return<void, EmbeddedError> {
  const write = (path: string) =>
    Effect.mapError(
      attempt(async () => {
        await writeFile(path, `${Redacted.value(options.password)}\n`, { mode: 0o600 })
        await give(path, account)
      }),
      (cause) => unusable(`${path} can't be written (${cause.code})`, "Choose another dataDir", cause)
    )
  yield* Effect.scoped(
    Effect.gen(function* () {
      const secrets = yield* temporaryFolder(guard, base, account)
      const file = join(secrets, "password")
      yield* write(file)
      const result = yield* run(
        binaries.initdb,
        [
          `--pgdata=${folder}`,
          `--username=${options.user}`,
          `--pwfile=${file}`,
          `--auth=${options.authentication}`,
          // code points decide the order and Unicode the case, on every machine and after every update of its libc
          "--encoding=UTF8",
          "--locale=C",
          ...(binaries.major >= 17 ? ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] : []),
          ...(options.durable ? [] : ["--no-sync"])
        ],
        { account, onPid: (pid) => guard.update((task) => (task.group = pid)) }
      )
      if (succeeded(result)) return
      const lines = result.output.split("\n").filter((line) => /error|fatal|detail|hint|could not/i.test(line))
      return yield* new EmbeddedError({
        reason: "InitFailed",
        problem: `The data folder ${options.dataDir} can't be initialised: ${
          result.error?.message ?? (lines.join(" ") || result.output || `exit code ${result.code}`)
        }`,
        hint: result.output.includes("could not look up effective user ID")
          ? "PostgreSQL needs an entry in /etc/passwd for the user that it runs as: add one, or run as another user"
          : "See what initdb says; DATABASE_URL can name a server of your own instead",
        cause: result.error
      })
    })
  )
  if (options.keepPassword) yield* write(join(folder, passwordFile))
})

/**
 * Initialises a data folder. One that does not exist is made beside its place and renamed, so that a crash never
 * leaves half of it; in an empty one that exists (a mounted volume) `initdb` works directly, and a failure or an
 * interruption empties it again. False when another process was faster: its folder is left there.
 *
 * @internal
 */
export const initialise = Effect.fnUntraced(function* (
  binaries: Binaries,
  guard: Guard,
  base: string,
  account: Account | undefined,
  options: NewCluster
): Effect.fn.Return<boolean, EmbeddedError, Scope.Scope> {
  const { dataDir } = options
  if (options.exists) {
    yield* Effect.acquireUseRelease(
      Effect.mapError(
        attempt(() => give(dataDir, account)),
        (cause) =>
          unusable(`The data folder ${dataDir} can't be given an owner (${cause.code})`, "Choose another", cause)
      ).pipe(Effect.zipRight(Effect.sync(() => guard.update((task) => task.empty.add(dataDir))))),
      () => initdb(binaries, guard, base, account, dataDir, options),
      (_, exit) => {
        const done = Effect.sync(() => guard.update((task) => task.empty.delete(dataDir)))
        return Exit.isFailure(exit) ? Effect.zipRight(emptyFolder(dataDir), done) : Effect.zipRight(done, options.made)
      }
    )
    return true
  }
  yield* makeParent(dataDir, account)
  const work = `${dataDir}.new-${randomName()}`
  return yield* Effect.acquireUseRelease(
    Effect.suspend(() => {
      guard.update((task) => task.remove.add(work))
      return privateFolder(work, account)
    }),
    () =>
      Effect.zipRight(
        initdb(binaries, guard, base, account, work, options),
        // an interruption in the middle would leave a folder that nobody removes
        Effect.uninterruptible(
          Effect.matchEffect(
            attempt(() => rename(work, dataDir)),
            {
              onSuccess: () => Effect.as(options.made, true),
              onFailure: (cause) =>
                cause.code === "ENOTEMPTY" || cause.code === "EEXIST" || (windows && cause.code === "EPERM")
                  ? Effect.succeed(false)
                  : unusable(
                      `The data folder ${dataDir} can't be made (${cause.code})`,
                      "Choose another dataDir",
                      cause
                    )
            }
          )
        )
      ),
    () =>
      Effect.zipRight(
        removeFolder(work),
        Effect.sync(() => guard.update((task) => task.remove.delete(work)))
      )
  )
})
