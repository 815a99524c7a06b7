import * as fc from "fast-check"
import { describe, expect, it } from "vitest"
import { deadline } from "../src/internal/deadline.js"
import { Line } from "../src/internal/line.js"
import type { Place } from "../src/internal/line.js"

describe("a line", () => {
  it("keeps the order of coming, whoever leaves from wherever", () => {
    const step = fc.oneof(
      fc.constant({ _tag: "Join" as const }),
      fc.constant({ _tag: "Next" as const }),
      fc.constant({ _tag: "Empty" as const }),
      fc.record({ _tag: fc.constant("Leave" as const), at: fc.nat(30) })
    )
    fc.assert(
      fc.property(fc.array(step, { maxLength: 100 }), (steps) => {
        const line = new Line<number>()
        const places: Array<Place<number>> = []
        let model: Array<number> = []
        for (const step of steps) {
          switch (step._tag) {
            case "Join": {
              model.push(places.length)
              places.push(line.join(places.length))
              break
            }
            case "Next": {
              expect(line.next()).toBe(model.shift())
              break
            }
            case "Empty": {
              expect(line.empty()).toEqual(model)
              model = []
              break
            }
            case "Leave": {
              const place = places[step.at]
              if (place === undefined) break
              expect(line.leave(place)).toBe(model.includes(place.value))
              model = model.filter((_) => _ !== place.value)
            }
          }
          expect([line.length, line.first, line.places.map((_) => _.value)]).toEqual([model.length, model[0], model])
        }
      })
    )
  })
})

describe("who has left a line", () => {
  it("holds on to nobody who was in it, and to nobody who comes", () => {
    const line = new Line<number>()
    const [first, second, third] = [line.join(1), line.join(2), line.join(3)]
    line.leave(second)
    line.next()
    line.join(4)
    line.empty()
    for (const { after, before } of [first, second, third]) expect([before, after]).toEqual([undefined, undefined])
  })
})

const turn = () => new Promise((resolve) => setImmediate(resolve))

const standStill = (millis: number): void => {
  for (const end = performance.now() + millis; performance.now() < end;);
}

describe("a deadline", () => {
  it("is not over because this process stood still: the answers of the meantime are read first", async () => {
    let late = false
    deadline(200, () => {
      late = true
    })
    for (let i = 0; i < 5; i++) {
      standStill(200)
      await turn()
      expect(late).toBe(false)
    }
  })

  it("is over when the time is, for a process that listens, and once", async () => {
    const start = performance.now()
    let calls = 0
    await new Promise<void>((resolve) => {
      deadline(60, () => {
        calls++
        resolve()
      })
    })
    expect(performance.now() - start).toBeGreaterThanOrEqual(58)
    await turn()
    expect(calls).toBe(1)
  })

  it("that is for ever sets no timer", () => {
    const timers = () => process.getActiveResourcesInfo().filter((_) => _ === "Timeout").length
    const before = timers()
    for (const millis of [Infinity, 2 ** 31 + 1999, 2 ** 31 - 1]) deadline(millis, () => {})
    expect(timers()).toBe(before)
    const stop = deadline(2 ** 31 - 2, () => {})
    expect(timers()).toBe(before + 1)
    stop()
  })

  it("never comes once it was stopped, also in its last turn", async () => {
    let late = false
    const stops = [0, 1, 25].map((millis) =>
      deadline(millis, () => {
        late = true
      })
    )
    for (const stop of stops) stop()
    await new Promise((resolve) => setTimeout(resolve, 60))
    expect(late).toBe(false)
  })
})
