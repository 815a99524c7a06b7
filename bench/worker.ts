/**
 * One contender in a process of its own, as in a program that uses no other: what the compiler has learnt from one
 * library is nothing that it has to unlearn for the next. Told by messages what to run, and answers with what it took.
 */
import type { Contender, Work, WorkloadName } from "./contender.js"
import { contenders } from "./contenders/index.js"
import { keptBy } from "./kept.js"

export interface Taken {
  readonly micros: number
  /** Of these, what the process spent computing: steadier than the clock on a busy machine. None by a clock of its own. */
  readonly cpu: number | undefined
}

export type Request = { readonly work: WorkloadName; readonly n: number; readonly kept?: boolean } | "close"

export type Answer =
  | { readonly works: ReadonlyArray<WorkloadName> | undefined }
  | Taken
  | { readonly bytes: number }
  | { readonly failed: string }
  | "closed"

const run = async (work: Work, n: number): Promise<Taken> => {
  const cpuBefore = process.cpuUsage()
  const start = performance.now()
  const own = await work(n)
  const taken = ((performance.now() - start) * 1000) / n
  const { system, user } = process.cpuUsage(cpuBefore)
  return typeof own === "number" ? { micros: own, cpu: undefined } : { micros: taken, cpu: (user + system) / n }
}

const answer = (value: Answer): void => void process.send!(value)

const [name = "", url = "", nearUrl] = process.argv.slice(2)
const connect = contenders.get(name)!
let contender: Contender | undefined = undefined
// Whoever asked is gone, and nobody would ever close it.
process.once("disconnect", () => process.exit())
process.on("message", (request: Request) => {
  const answered =
    request === "close"
      ? contender!.close().then(() => "closed" as const)
      : request.kept === true
        ? keptBy(contender!.work[request.work]!, request.n).then((bytes) => ({ bytes }))
        : run(contender!.work[request.work]!, request.n)
  answered.then(answer, (error: unknown) => answer({ failed: String(error) }))
})
if (nearUrl !== undefined) {
  // Over a slow link the compiler would learn for as long as is measured: it is taught without one.
  const near = await connect(nearUrl)
  await near?.work.tpcb?.(1000)
  await near?.close()
}
contender = await connect(url)
answer({ works: contender === undefined ? undefined : (Object.keys(contender.work) as Array<WorkloadName>) })
if (contender === undefined) process.disconnect()
