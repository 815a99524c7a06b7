/**
 * Several statements in one transaction and one round trip.
 */
import type { SqlError } from "@effect/sql/SqlError"
import * as Statement from "@effect/sql/Statement"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import { DbError } from "../DbError.js"
import * as Ambient from "./ambient.js"
import type { Entry } from "./ambient.js"
import type { Control } from "./command.js"
import { plain } from "./controls.js"
import type { EngineCore } from "./engine.js"
import { ambientBound, homeOf } from "./execute.js"
import { isObserved, observe, withExtras } from "./observe.js"
import type { Observation, Observed } from "./observe.js"
import { codeOf, describeSql } from "./queryText.js"
import { Direct } from "./sqlClient.js"
import { compileOf, isRefused, makeSpec } from "./statement.js"
import type { Spec } from "./statement.js"
import { executeGroup, executeTogether } from "./together.js"
import * as Sql from "./transactionSql.js"
import { young } from "./young.js"

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

const control = /^[\s;]*(?:begin|start\s+transaction|commit|end|rollback|abort|prepare\s+transaction)\b/i

const controlsTransaction = (text: string): boolean => control.test(/^\s*[-/;]/.test(text) ? codeOf(text) : text)

const refuseControl = (): DbError =>
  DbError.make("InvalidInput", {
    message: "A batch outside of a session is one transaction, and a statement in it would end or open one",
    hint: "Leave BEGIN, COMMIT and ROLLBACK out of it; nothing was sent."
  })

const refuseAll = (): DbError =>
  DbError.make("InvalidInput", {
    message: "The batch is not an array of statements.",
    hint: "Give [sql`...`, sql`...`], neither run nor mapped; nothing was sent."
  })

const refuseEntry = (number: number): DbError =>
  DbError.make("InvalidInput", {
    message: `Entry ${number} of the batch is not a statement.`,
    hint: "Give what sql`...` makes, neither run nor mapped; nothing was sent."
  })

const elsewhere = (at: number, whose: string, hint: string): DbError =>
  DbError.make("InvalidInput", {
    message: `Entry ${at + 1} of the batch is a statement ${whose}, which the batch does not run on`,
    hint: `${hint} Nothing was sent.`
  })

/** Why a statement of this client can't be a part of the batch: it would run somewhere else by itself. */
const outOfPlace = (
  fiber: Fiber.RuntimeFiber<any, any>,
  engine: EngineCore,
  entry: Entry,
  statement: unknown,
  at: number
): DbError | undefined => {
  if (!(statement instanceof Direct)) {
    return Statement.isFragment(statement)
      ? elsewhere(at, "of another SqlClient", "Build it with the sql of DbSession or DbEngine.")
      : refuseEntry(at + 1)
  }
  const { bound } = statement.connection
  const own = statement.connection.at(fiber)
  if (bound._tag === "Slot") {
    const { slot, unit } = bound
    if (unit?.ended === true) return unit.closedError()
    if (entry.slot === slot) return undefined
    return elsewhere(at, `of the session "${slot.name}"`, "Run it with the batch of that session's handle.")
  }
  if (own !== engine) {
    const other = own.name === engine.name ? "of another engine" : `of the database "${own.name}"`
    return elsewhere(at, other, "Give each database a batch of its own: no transaction spans two.")
  }
  if (bound._tag === "Ambient") return undefined
  const gone = bound.gone()
  if (gone !== undefined) return gone
  const here =
    entry.slot === undefined ? homeOf(engine, ambientBound, entry) === bound.root : entry.slot.runsOn(bound.root)
  if (here) return undefined
  const whose = `of the connection "${bound.root.holder.name}"`
  return elsewhere(at, whose, "Build it with the sql of DbSession, which runs where the batch does.")
}

/** What BEGIN says in a session that has no options. */
const modesOf = (engine: EngineCore): ReadonlyArray<Control> =>
  Sql.modes(engine.transactionOptions({})).map((text) => ({ ...plain(text), named: true }))

/** @internal */
export const runBatch = <const Statements extends ReadonlyArray<Statement.Statement<any>>>(
  engine: EngineCore,
  statements: Statements
): Effect.Effect<BatchResult<Statements>, SqlError> =>
  Effect.withFiberRuntime<any, SqlError>((fiber) => {
    if (!Array.isArray(statements as unknown)) return Effect.fail(refuseAll())
    const entry = Ambient.entry(fiber, engine)
    for (const [at, statement] of statements.entries()) {
      const refused = outOfPlace(fiber, engine, entry, statement, at)
      if (refused !== undefined) return Effect.fail(refused)
    }
    if (Option.isNone(fiber.getFiberRef(Statement.currentTransformer))) return runCompiled(fiber, engine, statements)
    return Effect.flatMap(
      Effect.forEach(statements, (statement) =>
        statement instanceof Direct ? statement.transformed(fiber) : Effect.succeed(statement)
      ),
      (sent) => runCompiled(fiber, engine, statements, sent)
    )
  })

/** `sent`: what a transformer has made of the statements. */
const runCompiled = (
  fiber: Fiber.RuntimeFiber<any, any>,
  engine: EngineCore,
  statements: ReadonlyArray<Statement.Statement<any>>,
  sent: ReadonlyArray<Pick<Statement.Statement<any>, "compile">> = statements
): Effect.Effect<any, SqlError> => {
  const entry = Ambient.entry(fiber, engine)
  const path = Ambient.searchPath(entry)
  const specs = young<Spec>()
  for (const statement of sent) {
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
      entry.slot === undefined
        ? executeGroup(fiber, engine, specs, modesOf(engine))
        : executeTogether(entry.slot, entry.frame, specs)
    // Taken out: what has asked for them may be kept for longer than they are wanted.
    return Effect.map(answers, (results) => results.splice(0).map((_, i) => shape(_.rows, i)))
  }
  const extra = (watch: Observation | undefined) =>
    run(specs.map((spec, at) => ({ ...withExtras(engine, spec, watch), watch: at === 0 ? watch : undefined })))
  if (isObserved(fiber, engine)) return observe(fiber, engine, whole(specs), extra)
  return engine.config.comment === undefined ? run(specs) : extra(undefined)
}

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
