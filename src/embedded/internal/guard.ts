/**
 * A small process that outlives this one. It holds the read end of a pipe; when this process ends in any way
 * (`process.exit`, a signal, a crash, SIGKILL), the pipe closes, and it stops the server and removes what was to be
 * thrown away.
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import type { ChildProcess } from "node:child_process"
import { EmbeddedError } from "../EmbeddedError.js"
import { spawnChild } from "./processes.js"

interface Task {
  /** The process group of a running `initdb`. */
  group?: number | undefined
  server?: { readonly pid: number; readonly dataDir: string; readonly keep: boolean } | undefined
  /** Folders to remove. */
  readonly remove: Set<string>
  /** Folders to empty: an `initdb` works in them. */
  readonly empty: Set<string>
}

/** @internal */
export interface Guard {
  /** Changes what is to be done at the end of this process. Written at once, also when the process exits next. */
  readonly update: (change: (task: Task) => void) => void
}

/** Plain JavaScript: it must run without this package, a loader or a transpiler. */
const script = `
"use strict"
const fs = require("node:fs")
const path = require("node:path")
const { spawnSync } = require("node:child_process")
const windows = process.platform === "win32"
let task = {}
let text = ""
const attempt = (f) => { try { return f() } catch { return undefined } }
const alive = (pid) => {
  try { process.kill(pid, 0) } catch (error) { return error.code === "EPERM" }
  const stat = attempt(() => fs.readFileSync("/proc/" + pid + "/stat", "utf8"))
  return stat === undefined || !/\\) [ZX] /.test(stat)
}
const owner = (dataDir) => attempt(() => Number(fs.readFileSync(path.join(dataDir, "postmaster.pid"), "utf8").split("\\n")[0]))
const gone = async (pid, millis) => {
  for (const end = Date.now() + millis; alive(pid); await new Promise((resolve) => setTimeout(resolve, 20))) {
    if (Date.now() > end) return false
  }
  return true
}
const send = (pid, signal) => {
  if (windows && signal !== "SIGKILL") spawnSync(task.pgCtl, ["kill", signal.slice(3), String(pid)], { windowsHide: true })
  else attempt(() => process.kill(pid, signal))
}
const remove = (folder) => attempt(() => fs.rmSync(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 }))
const finish = async () => {
  if (task.group) {
    attempt(() => process.kill(windows ? task.group : -task.group, "SIGKILL"))
    await gone(task.group, 5000)
  }
  const server = task.server
  if (server && [undefined, server.pid].includes(owner(server.dataDir))) {
    const signals = server.keep ? [["SIGINT", 10000], ["SIGQUIT", 5000], ["SIGKILL", 5000]] : [["SIGQUIT", 5000], ["SIGKILL", 5000]]
    for (const [signal, millis] of signals) {
      if (!alive(server.pid)) break
      send(server.pid, signal)
      if (await gone(server.pid, millis)) break
    }
  }
  for (const folder of task.empty ?? []) {
    for (const name of attempt(() => fs.readdirSync(folder)) ?? []) remove(path.join(folder, name))
  }
  for (const folder of task.remove ?? []) remove(folder)
  process.exit(0)
}
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => {})
process.stdin.setEncoding("utf8")
process.stdin.on("data", (chunk) => {
  const lines = (text + chunk).split("\\n")
  text = lines.pop()
  if (lines.length > 0) task = JSON.parse(lines[lines.length - 1])
})
process.stdin.once("close", finish)
process.stdin.once("error", () => {})
`

/**
 * A guard for as long as the scope is open. Afterwards it ends by itself, with nothing to do.
 *
 * @internal
 */
export const makeGuard = (pgCtl: string): Effect.Effect<Guard, EmbeddedError, Scope.Scope> =>
  Effect.map(
    Effect.acquireRelease(
      Effect.async<ChildProcess, EmbeddedError>((resume) => {
        const refuse = (cause: unknown) =>
          resume(
            new EmbeddedError({
              reason: "StartFailed",
              problem: `The process that stops PostgreSQL when this one crashes can't be started: ${String(cause)}`,
              hint: "Check that Node can start itself (process.execPath)",
              cause
            })
          )
        try {
          const child = spawnChild(process.execPath, ["-e", script], {
            stdin: "pipe",
            output: "ignore",
            env: { ELECTRON_RUN_AS_NODE: "1" }
          })
          child.once("error", refuse)
          child.stdin?.on("error", () => {})
          child.once("spawn", () => {
            // neither the process nor its pipe keeps this one running
            child.unref()
            ;(child.stdin as unknown as { readonly unref?: () => void } | null)?.unref?.()
            resume(Effect.succeed(child))
          })
        } catch (cause) {
          refuse(cause)
        }
      }),
      (child) =>
        Effect.sync(() => {
          child.stdin?.end("{}\n")
        })
    ),
    (child) => {
      const task: Task = { remove: new Set(), empty: new Set() }
      return {
        update: (change) => {
          change(task)
          child.stdin?.write(
            `${JSON.stringify({ ...task, pgCtl, remove: Array.from(task.remove), empty: Array.from(task.empty) })}\n`
          )
        }
      }
    }
  )
