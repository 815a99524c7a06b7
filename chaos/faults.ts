/**
 * What is done to the connections, the backends and the server while programs run. Each fault says whether it struck.
 */
import * as Effect from "effect/Effect"
import * as Schedule from "effect/Schedule"
import type { Cut, Logged } from "../test/support/proxy.js"
import type { Random } from "./random.js"
import { isBackend } from "./world.js"
import type { World } from "./world.js"

export type Tally = Record<string, number>

export const count = (tally: Tally, what: string, by = 1): void => {
  tally[what] = (tally[what] ?? 0) + by
}

interface Stage {
  readonly world: World
  readonly random: Random
  /** Interrupts one of the fibers at work. */
  readonly interruptOne: Effect.Effect<boolean>
}

type Fault = (stage: Stage) => Effect.Effect<boolean>

const isCommit = (message: Logged): boolean => message.type === "E" && message.text === "COMMIT"
const isStatement = (message: Logged): boolean => message.type === "E"

/** Waits for an armed fault to strike, and takes it back when nothing comes by. */
const armed = ({ world }: Stage, arm: () => Promise<Logged>): Effect.Effect<boolean> =>
  Effect.promise(arm).pipe(
    Effect.timeoutTo({ duration: "500 millis", onSuccess: () => true, onTimeout: () => false }),
    Effect.ensuring(Effect.sync(() => world.proxy.disarm()))
  )

const cutAll =
  (how: Cut): Fault =>
  ({ world }) =>
    Effect.sync(() => {
      const any = world.proxy.connections.length > 0
      world.proxy.cutAll(how)
      return any
    })

const atCommit =
  (forward: boolean): Fault =>
  (stage) =>
    armed(stage, () =>
      stage.world.proxy.cutAfter(isCommit, { forward, how: stage.random.pick(["rst", "fin", "halfClose"] as const) })
    )

const blackhole: Fault = (stage) =>
  armed(stage, () =>
    stage.world.proxy.cutAfter(stage.random.chance(0.5) ? isCommit : isStatement, {
      forward: stage.random.chance(0.5),
      how: "blackhole"
    })
  )

/** Nothing gets through in either direction, and nobody is told; what was under way arrives when it is over. */
const partition: Fault = (stage) =>
  Effect.gen(function* () {
    const { proxy } = stage.world
    const struck = yield* armed(stage, () => proxy.holdAt(isCommit, { forward: stage.random.chance(0.5) }))
    if (!struck) return false
    yield* Effect.sleep(stage.random.pick([100, 400, 2500]))
    proxy.resume()
    return true
  })

/** One backend that the proxy has a connection to. */
const victim = ({ random, world }: Stage): Effect.Effect<number | undefined> =>
  Effect.gen(function* () {
    const pids = world.proxy.connections.flatMap(({ pid }) => (pid === undefined ? [] : [pid]))
    if (pids.length === 0) return undefined
    const pid = random.pick(pids)
    return (yield* isBackend(world, pid)) ? pid : undefined
  })

const bySql =
  (f: string): Fault =>
  (stage) =>
    Effect.flatMap(victim(stage), (pid) =>
      pid === undefined
        ? Effect.succeed(false)
        : Effect.match(stage.world.ask<{ done: boolean }>(`SELECT ${f}($1) AS done`, [pid]), {
            onFailure: () => false,
            onSuccess: ([row]) => row?.done === true
          })
    )

const signal = (pid: number, name: NodeJS.Signals): boolean => {
  try {
    return process.kill(pid, name)
  } catch {
    return false
  }
}

const bySignal =
  (name: NodeJS.Signals): Fault =>
  (stage) =>
    Effect.map(victim(stage), (pid) => pid !== undefined && signal(pid, name))

const freezeBackend: Fault = (stage) =>
  Effect.flatMap(victim(stage), (pid) =>
    pid === undefined || !signal(pid, "SIGSTOP")
      ? Effect.succeed(false)
      : Effect.as(
          Effect.ensuring(
            Effect.sleep(stage.random.between(50, 400)),
            Effect.sync(() => signal(pid, "SIGCONT"))
          ),
          true
        )
  )

const crash: Fault = ({ random, world: { server } }) =>
  Effect.gen(function* () {
    yield* server.crash
    yield* Effect.sleep(random.between(0, 200))
    yield* Effect.orDie(server.start)
    return true
  })

const forAWhile =
  (on: (stage: Stage) => void, off: (stage: Stage) => void): Fault =>
  (stage) =>
    Effect.acquireUseRelease(
      Effect.sync(() => on(stage)),
      () => Effect.as(Effect.sleep(stage.random.between(20, 150)), true),
      () => Effect.sync(() => off(stage))
    )

const faults: Readonly<Record<string, Fault>> = {
  "all connections reset": cutAll("rst"),
  "all connections ended": cutAll("fin"),
  "cut after COMMIT was forwarded": atCommit(true),
  "cut before COMMIT was forwarded": atCommit(false),
  "a connection swallowed": blackhole,
  "a partition around COMMIT": partition,
  "a row cut in half": (stage) => armed(stage, () => stage.world.proxy.cutInTheMiddleOfRow()),
  "garbage instead of an answer": ({ world }) =>
    Effect.sync(() => {
      world.proxy.injectGarbage()
      return true
    }),
  "connections refused": forAWhile(
    ({ world }) => {
      world.proxy.accept("refuse")
      world.proxy.cutAll("rst")
    },
    ({ world }) => world.proxy.accept("relay")
  ),
  "slow answers": forAWhile(
    ({ random, world }) => world.proxy.delay(random.between(1, 15)),
    ({ world }) => world.proxy.delay(0)
  ),
  "answers byte by byte": forAWhile(
    ({ world }) => world.proxy.oneByteAtATime(),
    ({ world }) => world.proxy.oneByteAtATime(false)
  ),
  "a pause of the network": forAWhile(
    ({ random, world }) => world.proxy.pause(random.pick(["frontend", "backend", "both"] as const)),
    ({ world }) => world.proxy.resume()
  ),
  "a backend terminated": bySql("pg_terminate_backend"),
  "a statement cancelled": bySql("pg_cancel_backend"),
  "a backend killed": bySignal("SIGKILL"),
  "a backend stopped for a while": freezeBackend,
  "a crash of the server": crash,
  "a fiber interrupted": ({ interruptOne }) => interruptOne
}

export const faultKinds: ReadonlyArray<string> = Object.keys(faults)

/** Those that take the whole server down cost a recovery each. */
const heavy = new Set(["a backend killed", "a crash of the server", "a partition around COMMIT"])
const frequent = new Set(["a fiber interrupted", "a statement cancelled", "cut after COMMIT was forwarded"])

const deck = faultKinds.flatMap((kind) => Array<string>(frequent.has(kind) ? 4 : heavy.has(kind) ? 1 : 2).fill(kind))

/** Whatever was done to it, server and network are well again. */
export const heal = (world: World): Effect.Effect<void> =>
  Effect.zipRight(
    Effect.sync(() => {
      const { proxy } = world
      proxy.disarm()
      proxy.accept("relay")
      proxy.delay(0)
      proxy.oneByteAtATime(false)
      proxy.resume()
    }),
    Effect.orDie(world.server.start)
  )

/** Fault after fault, each kind in its turn, until it is interrupted. */
export const strike = (stage: Stage, tally: Tally): Effect.Effect<never> => {
  const one = (kind: string, triesLeft: number): Effect.Effect<void> =>
    Effect.delay(
      Effect.suspend(() => faults[kind]!(stage)),
      stage.random.between(20, 150)
    ).pipe(
      // Half of a crash would leave the server down: it is finished first.
      Effect.uninterruptible,
      Effect.flatMap((struck) => {
        if (struck) count(tally, kind)
        return struck || triesLeft === 0 ? Effect.void : one(kind, triesLeft - 1)
      })
    )
  return Effect.suspend(() =>
    Effect.forEach(stage.random.shuffled(deck), (kind) => one(kind, 2), { discard: true })
  ).pipe(Effect.forever, Effect.ensuring(heal(stage.world)))
}

/** Waits until the server takes connections again, as after the recovery that a killed backend brings about. */
export const untilUp = (world: World): Effect.Effect<void, Error> =>
  Effect.gen(function* () {
    yield* heal(world)
    yield* Effect.retry(world.ask("SELECT 1"), Schedule.spaced("50 millis").pipe(Schedule.upTo("30 seconds")))
  })
