/**
 * What a program sends: told by the connections themselves, not by the program.
 */
import * as Effect from "effect/Effect"
import { coreOf } from "../DbEngine.js"
import type { EngineService } from "../DbEngine.js"
import { withEngine } from "../internal/instead.js"
import type { Listening } from "../internal/probe.js"
import { SandboxEngine } from "./sandbox.js"

/**
 * What was sent while an effect ran.
 *
 * @since 0.1.0
 * @category models
 */
export interface Trace {
  /**
   * The text of every statement in the order of sending, with what the library sends by itself: `BEGIN` and its
   * settings, `SAVEPOINT`, `RELEASE`, `COMMIT`, `ROLLBACK`. Savepoints and cursors are numbered from 1 on, so that the
   * names are the same each time.
   */
  readonly statements: ReadonlyArray<string>
  /**
   * The same by round trip: what travelled together, without an answer in between. Its length is how many there were.
   * The data of a COPY, and what is sent with the `pg` client that `raw` gives, are not in it.
   */
  readonly roundTrips: ReadonlyArray<ReadonlyArray<string>>
  /** How often the pool lent a connection. */
  readonly borrowed: number
  /** How often somebody had to wait for one, because all were in use. */
  readonly waited: number
}

const numbered = /\beffect_db_((?:cursor_)?)\d+\b/g

/** Collects, and gives names of the library numbers of their own. */
class Recorder implements Listening {
  readonly statements: Array<string> = []
  readonly roundTrips: Array<Array<string>> = []
  borrowed = 0
  waited = 0
  private readonly latest = new Map<object, { readonly trip: Array<string>; readonly heard: number }>()
  private readonly names = new Map<string, string>()
  private readonly counts = { "": 0, cursor_: 0 }

  readonly sent: Listening["sent"] = (connection, text, _, heard) => {
    const shown = text.replace(numbered, (name, kind: "" | "cursor_") => {
      let known = this.names.get(name)
      if (known === undefined) this.names.set(name, (known = `effect_db_${kind}${++this.counts[kind]}`))
      return known
    })
    const before = this.latest.get(connection)
    if (before?.heard === heard) {
      before.trip.push(shown)
    } else {
      const trip = [shown]
      this.latest.set(connection, { trip, heard })
      this.roundTrips.push(trip)
    }
    this.statements.push(shown)
  }

  readonly lent = (waited: boolean): void => {
    this.borrowed++
    if (waited) this.waited++
  }
}

/**
 * Runs an effect with the given engine's connections listened to.
 *
 * @internal
 */
export const traceOn = <A, E, R>(
  effect: Effect.Effect<A, E, R>,
  engine: EngineService
): Effect.Effect<readonly [result: A, trace: Trace], E, R> =>
  withEngine(coreOf(engine), (core) => {
    const recorder = new Recorder()
    const stop = core instanceof SandboxEngine ? core.listen(recorder) : core.config.probe.listen(recorder)
    return Effect.map(Effect.ensuring(effect, Effect.sync(stop)), (result) => {
      const { borrowed, roundTrips, statements, waited } = recorder
      return [result, { statements, roundTrips, borrowed, waited }] as const
    })
  })
