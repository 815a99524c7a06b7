/**
 * A contender that runs in a process of its own, from here.
 */
import { fork } from "node:child_process"
import { fileURLToPath } from "node:url"
import type { WorkloadName } from "./contender.js"
import type { Answer, Request, Taken } from "./worker.js"

export interface Remote {
  readonly works: ReadonlyArray<WorkloadName>
  readonly run: (work: WorkloadName, n: number) => Promise<Taken>
  /** Bytes that are kept of one unit; see `kept.ts`. */
  readonly kept: (work: WorkloadName, n: number) => Promise<number>
  readonly close: () => Promise<void>
}

/** Nothing: it is not installed. Where the database is far away, `near` is where to warm up. */
export const connect = async (name: string, url: string, near?: string): Promise<Remote | undefined> => {
  const args = near === undefined ? [name, url] : [name, url, near]
  const child = fork(fileURLToPath(new URL("worker.js", import.meta.url)), args)
  const next = (): Promise<Answer> =>
    new Promise((resolve, reject) => {
      const gone = (code: number | null) => reject(new Error(`${name} ended with ${code}`))
      child.once("exit", gone)
      child.once("message", (answer: Answer) => {
        child.off("exit", gone)
        if (typeof answer === "object" && "failed" in answer) reject(new Error(`${name}: ${answer.failed}`))
        else resolve(answer)
      })
    })
  const ask = async (request: Request): Promise<Answer> => {
    const answer = next()
    child.send(request)
    return await answer
  }
  const { works } = (await next()) as { readonly works: ReadonlyArray<WorkloadName> | undefined }
  if (works === undefined) return undefined
  return {
    works,
    run: async (work, n) => (await ask({ work, n })) as Taken,
    kept: async (work, n) => ((await ask({ work, n, kept: true })) as { readonly bytes: number }).bytes,
    close: async () => {
      await ask("close")
      child.disconnect()
    }
  }
}
