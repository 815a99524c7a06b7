/**
 * Several statements in one transaction and one round trip.
 */
import type { SqlError } from "@effect/sql/SqlError"
import type * as Statement from "@effect/sql/Statement"
import * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { EngineCore } from "./engine.js"
import { executeGroup, executeTogether } from "./execute.js"
import { isObserved, observe, withExtras } from "./observe.js"
import type { Observation, Observed } from "./observe.js"
import { codeOf, describeSql } from "./queryText.js"
import { compileOf, isRefused, makeSpec } from "./statement.js"
import type { Spec } from "./statement.js"

/**
 * The rows of each statement, in order.
 *
 * @since 0.1.0
 * @category models
 */
export type BatchResult<Statements extends ReadonlyArray<Statement.Statement<any>>> = {
  readonly [K in keyof Statements]: Statements[K] extends Statement.Statement<infer Row> ? ReadonlyArray<Row> : never
}

type Compiled = Statement.Statement<any> & {
  readonly transformRows: ((rows: ReadonlyArray<any>) => ReadonlyArray<any>) | undefined
}

const control = /^\s*(?:begin|start\s+transaction|commit|end|rollback|abort|prepare\s+transaction)\b/i

const controlsTransaction = (text: string): boolean => control.test(/^\s*[-/]/.test(text) ? codeOf(text) : text)

const refuseControl = (): DbError =>
  DbError.make("InvalidInput", {
    message: "A batch outside of a session is one transaction, and a statement in it would end or open one",
    hint: "Leave BEGIN, COMMIT and ROLLBACK out of it; nothing was sent."
  })

const refuseEntry = (number: number): DbError =>
  DbError.make("InvalidInput", {
    message: `Entry ${number} of the batch is not a statement.`,
    hint: "Give what sql`...` makes, neither run nor mapped; nothing was sent."
  })

/** @internal */
export const runBatch = <const Statements extends ReadonlyArray<Statement.Statement<any>>>(
  engine: EngineCore,
  statements: Statements
): Effect.Effect<BatchResult<Statements>, SqlError> =>
  Effect.withFiberRuntime<any, SqlError>((fiber) => {
    const entry = Ambient.entry(fiber, engine)
    const path = Ambient.searchPath(entry)
    const specs: Array<Spec> = []
    for (const [at, statement] of statements.entries()) {
      if (typeof (statement as Partial<Compiled> | undefined)?.compile !== "function") {
        return Effect.fail(refuseEntry(at + 1))
      }
      const compiled = compileOf(statement)
      if (isRefused(compiled)) return Effect.fail(compiled)
      const [text, params] = compiled
      const spec: Spec | DbError = makeSpec(text, params, "object", { several: false, prepare: true, path })
      if (isRefused(spec)) return Effect.fail(spec)
      if (entry.slot === undefined && controlsTransaction(text)) return Effect.fail(refuseControl())
      specs.push(spec)
    }
    if (specs.length === 0) return Effect.succeed([])
    const shape = (rows: ReadonlyArray<any>, at: number) => {
      const { transformRows } = statements[at] as Compiled
      return transformRows === undefined ? rows : transformRows(rows)
    }
    const run = (specs: ReadonlyArray<Spec>): Effect.Effect<any, DbError> => {
      const answers =
        entry.slot === undefined ? executeGroup(fiber, engine, specs) : executeTogether(entry.slot, entry.frame, specs)
      return Effect.map(answers, (results) => results.map((_, i) => shape(_.rows, i)))
    }
    const extra = (watch: Observation | undefined) =>
      run(specs.map((spec, at) => ({ ...withExtras(engine, spec, watch), watch: at === 0 ? watch : undefined })))
    if (isObserved(fiber, engine)) return observe(fiber, engine, whole(specs), extra)
    return engine.config.comment === undefined ? run(specs) : extra(undefined)
  })

/** A batch as the conventions see it; one statement is none. */
const whole = (specs: ReadonlyArray<Spec>): Observed => {
  const texts = [...new Set(specs.map((_) => _.text))]
  if (specs.length === 1) return { text: texts[0]! }
  const { summary } = describeSql(texts[0]!)
  return {
    text: texts.join("; "),
    summary: texts.length === 1 && summary !== "" ? `BATCH ${summary}` : "BATCH",
    batch: specs.length
  }
}
