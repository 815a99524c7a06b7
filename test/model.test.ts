/**
 * Random programs against a pure model of the rows: trees of sessions, blocks, failures caught and not, forks and
 * interrupts. The model knows nothing of connections, savepoints or fibers.
 */
import { describe, it } from "@effect/vitest"
import { Deferred, Effect, Fiber } from "effect"
import { atomic, type DbOptions, DbSession, withTransaction } from "effect-db"
import * as fc from "fast-check"
import { expect, vi } from "vitest"
import { Unit } from "../src/internal/unit.js"
import { testDatabase } from "./support/database.js"
import { committed, insert, onDatabase, refused, type Services } from "./support/programs.js"

const database = testDatabase()

type Mode = "commit" | "rollback" | "append" | "raise"
type Wrap =
  | { readonly kind: "autocommit" | "isolated" | "nested" | "required" | "requiresNew" }
  | { readonly kind: "atomic"; readonly mode: Mode }

type Node =
  | { readonly tag: "Insert"; readonly id: number }
  | { readonly tag: "Refused" | "Fail" | "Commit" | "Rollback" | "Close" }
  | { readonly tag: "Catch" | "Fork"; readonly body: ReadonlyArray<Node> }
  | { readonly tag: "Block" | "Interrupted"; readonly wrap: Wrap; readonly body: ReadonlyArray<Node> }
  /** Siblings at once, each in a nested block that is caught. */
  | { readonly tag: "Siblings"; readonly bodies: ReadonlyArray<ReadonlyArray<Node>> }

/** What may stand in a body of siblings: their order is not known, so it must not matter. */
const { body: siblingBody } = fc.letrec<{ node: Node; body: ReadonlyArray<Node> }>((tie) => ({
  node: fc.oneof(
    { maxDepth: 2, depthSize: "max" },
    { weight: 5, arbitrary: fc.constant<Node>({ tag: "Insert", id: 0 }) },
    { weight: 1, arbitrary: fc.constantFrom<Node>({ tag: "Refused" }, { tag: "Fail" }) },
    { weight: 2, arbitrary: fc.record({ tag: fc.constant("Catch" as const), body: tie("body") }) },
    {
      weight: 3,
      arbitrary: fc.record({
        tag: fc.constant("Block" as const),
        wrap: fc.constantFrom<Wrap>({ kind: "nested" }, { kind: "required" }, { kind: "autocommit" }),
        body: tie("body")
      })
    }
  ),
  body: fc.array(tie("node"), { minLength: 1, maxLength: 3 })
}))

const wrap: fc.Arbitrary<Wrap> = fc.oneof(
  fc.constantFrom<Wrap>(
    { kind: "autocommit" },
    { kind: "isolated" },
    { kind: "nested" },
    { kind: "nested" },
    { kind: "required" },
    { kind: "requiresNew" }
  ),
  fc.record({
    kind: fc.constant("atomic" as const),
    mode: fc.constantFrom<Mode>("commit", "rollback", "append", "raise")
  })
)

const { body } = fc.letrec<{ node: Node; body: ReadonlyArray<Node> }>((tie) => ({
  node: fc.oneof(
    { maxDepth: 5, depthSize: "max" },
    { weight: 6, arbitrary: fc.constant<Node>({ tag: "Insert", id: 0 }) },
    { weight: 2, arbitrary: fc.constantFrom<Node>({ tag: "Refused" }, { tag: "Fail" }) },
    { weight: 1, arbitrary: fc.constantFrom<Node>({ tag: "Commit" }, { tag: "Rollback" }, { tag: "Close" }) },
    { weight: 3, arbitrary: fc.record({ tag: fc.constantFrom("Catch", "Catch", "Fork"), body: tie("body") }) },
    {
      weight: 8,
      arbitrary: fc.record({
        tag: fc.constantFrom("Block", "Block", "Block", "Interrupted"),
        wrap,
        body: tie("body")
      })
    },
    {
      weight: 1,
      arbitrary: fc.record({
        tag: fc.constant("Siblings" as const),
        bodies: fc.array(siblingBody, { minLength: 2, maxLength: 3 })
      })
    }
  ),
  body: fc.array(tie("node"), { minLength: 1, maxLength: 4 })
}))

/** What fails at the top is caught there, or most programs would be over before they have begun. */
const program: fc.Arbitrary<ReadonlyArray<Node>> = fc.array(
  fc.record({
    tag: fc.constant("Catch" as const),
    body: fc.tuple(fc.record({ tag: fc.constant("Block" as const), wrap, body }))
  }),
  { minLength: 2, maxLength: 5 }
)

/** Each insert its own row, by its place in the program. */
const numbered = (body: ReadonlyArray<Node>): ReadonlyArray<Node> => {
  let next = 0
  const all = (body: ReadonlyArray<Node>): ReadonlyArray<Node> =>
    body.map((node): Node => {
      if (node.tag === "Insert") return { ...node, id: next++ }
      if ("bodies" in node) return { ...node, bodies: node.bodies.map(all) }
      return "body" in node ? { ...node, body: all(node.body) } : node
    })
  return all(body)
}

// The model ---------------------------------------------------------------------------------------------------------

class Failure {}

interface ModelBlock {
  readonly kind: "session" | "transaction" | "savepoint"
  rows: Array<number>
  failed: boolean
  rollbackOnly: boolean
}

interface ModelSession {
  blocks: Array<ModelBlock>
  open: boolean
}

const emptyBlock = (kind: ModelBlock["kind"]): ModelBlock => ({ kind, rows: [], failed: false, rollbackOnly: false })

class Model {
  readonly committed: Array<number> = []

  run(body: ReadonlyArray<Node>, session: ModelSession | undefined): void {
    for (const node of body) this.step(node, session)
  }

  private step(node: Node, session: ModelSession | undefined): void {
    switch (node.tag) {
      case "Insert": {
        if (session === undefined) return void this.committed.push(node.id)
        session.open = true
        if (this.aborted(session)) throw new Failure()
        return void session.blocks.at(-1)!.rows.push(node.id)
      }
      case "Refused": {
        if (session !== undefined) {
          session.open = true
          if (!this.aborted(session)) session.blocks.at(-1)!.failed = true
        }
        throw new Failure()
      }
      case "Fail":
        throw new Failure()
      case "Commit":
      case "Rollback": {
        if (session === undefined || session.blocks.length > 1) throw new Failure()
        return node.tag === "Commit" ? this.commit(session) : this.rollback(session)
      }
      case "Close": {
        if (session === undefined) return
        if (session.blocks.length > 1) throw new Failure()
        this.rollback(session)
        // The next one is another session.
        session.blocks = [emptyBlock("session")]
        return
      }
      case "Catch":
        return this.caught(() => this.run(node.body, session))
      case "Fork":
        return this.run(node.body, session)
      case "Block":
        return this.wrapped(node.wrap, session, (session) => this.run(node.body, session))
      case "Interrupted":
        return this.caught(() =>
          this.wrapped(node.wrap, session, (session) => {
            this.run(node.body, session)
            throw new Failure()
          })
        )
      case "Siblings":
        for (const body of node.bodies) {
          this.caught(() => this.wrapped({ kind: "nested" }, session, (session) => this.run(body, session)))
        }
    }
  }

  private caught(f: () => void): void {
    try {
      f()
    } catch (error) {
      if (!(error instanceof Failure)) throw error
    }
  }

  private aborted(session: ModelSession): boolean {
    return session.blocks.some((_) => _.failed)
  }

  private spoiled(session: ModelSession, block: ModelBlock): boolean {
    return this.aborted(session) || block.rollbackOnly
  }

  private rollback(session: ModelSession): void {
    session.blocks = [Object.assign(session.blocks[0]!, emptyBlock("session"))]
    session.open = false
  }

  private commit(session: ModelSession): void {
    const lost = session.blocks.some((_) => _.failed || _.rollbackOnly)
    const rows = session.blocks.flatMap((_) => _.rows)
    this.rollback(session)
    if (lost) throw new Failure()
    this.committed.push(...rows)
  }

  private wrapped(wrap: Wrap, outer: ModelSession | undefined, body: (session: ModelSession) => void): void {
    if (outer === undefined || wrap.kind === "isolated" || wrap.kind === "requiresNew") {
      const session: ModelSession = { blocks: [emptyBlock("session")], open: false }
      if (wrap.kind !== "autocommit" && wrap.kind !== "isolated") session.blocks.push(emptyBlock("transaction"))
      body(session)
      return this.commit(session)
    }
    if (wrap.kind === "autocommit" || wrap.kind === "required") {
      const joined = outer.blocks.at(-1)!
      try {
        return body(outer)
      } catch (error) {
        // A joining autocommit is about the session that there is at its end.
        ;(wrap.kind === "autocommit" ? outer.blocks.at(-1)! : joined).rollbackOnly = true
        throw error
      }
    }
    if (wrap.kind !== "atomic") return this.nested(outer, body)
    if (outer.blocks.length === 1) return this.atomic(wrap.mode, outer, body)
    if (wrap.mode === "raise") throw new Failure()
    this.nested(outer, body)
  }

  private nested(session: ModelSession, body: (session: ModelSession) => void): void {
    const block = emptyBlock("savepoint")
    session.blocks.push(block)
    try {
      body(session)
      if (this.spoiled(session, block)) throw new Failure()
    } catch (error) {
      session.blocks.pop()
      throw error
    }
    session.blocks.pop()
    session.blocks.at(-1)!.rows.push(...block.rows)
  }

  private atomic(mode: Mode, session: ModelSession, body: (session: ModelSession) => void): void {
    if (session.open || session.blocks[0]!.rollbackOnly) {
      if (mode === "raise") throw new Failure()
      if (mode === "commit") this.commit(session)
      if (mode === "rollback") this.rollback(session)
    }
    session.blocks.push(emptyBlock("transaction"))
    try {
      body(session)
    } catch (error) {
      this.rollback(session)
      throw error
    }
    this.commit(session)
  }
}

const predict = (body: ReadonlyArray<Node>): { readonly rows: ReadonlyArray<number>; readonly ok: boolean } => {
  const model = new Model()
  let ok = true
  try {
    model.run(body, undefined)
  } catch (error) {
    if (!(error instanceof Failure)) throw error
    ok = false
  }
  return { rows: model.committed.sort((a, b) => a - b), ok }
}

// The real thing ----------------------------------------------------------------------------------------------------

type Program = Effect.Effect<void, unknown, Services>

const interpret = (body: ReadonlyArray<Node>): Program => {
  const all = (body: ReadonlyArray<Node>): Program => Effect.forEach(body, step, { discard: true })
  const step = (node: Node): Program => {
    switch (node.tag) {
      case "Insert":
        return insert(node.id)
      case "Refused":
        return Effect.asVoid(refused)
      case "Fail":
        return Effect.fail("fail")
      case "Commit":
        return DbSession.commit
      case "Rollback":
        return DbSession.rollback
      case "Close":
        return DbSession.close
      case "Catch":
        return Effect.ignore(all(node.body))
      case "Fork":
        return Effect.flatMap(Effect.fork(all(node.body)), Fiber.join)
      case "Block":
        return around(node.wrap, all(node.body))
      case "Interrupted":
        return Effect.gen(function* () {
          const arrived = yield* Deferred.make<void>()
          const inside = Effect.all([all(node.body), Deferred.succeed(arrived, undefined), Effect.never])
          const fiber = yield* Effect.fork(around(node.wrap, Effect.asVoid(inside)))
          yield* Effect.raceFirst(Deferred.await(arrived), Effect.exit(Fiber.await(fiber)))
          yield* Fiber.interrupt(fiber)
        })
      case "Siblings": {
        const bodies = node.bodies.map((body) => Effect.ignore(withTransaction(all(body))))
        return Effect.all(bodies, { concurrency: "unbounded", discard: true })
      }
    }
  }
  return Effect.suspend(() => all(body))
}

const around = (wrap: Wrap, body: Program): Program => {
  switch (wrap.kind) {
    case "autocommit":
      return DbSession.autocommit(body)
    case "isolated":
      return DbSession.isolated(body)
    case "atomic":
      return atomic(body, { currentTransaction: wrap.mode })
    default:
      return withTransaction(body, { propagation: wrap.kind })
  }
}

/** Runs random programs until the model and the database disagree. */
const check = (runs: number, seed: number, options: DbOptions = {}) =>
  Effect.gen(function* () {
    const runtime = yield* Effect.runtime<Services>()
    const property = fc.asyncProperty(program, async (random) => {
      const body = numbered(random)
      const predicted = predict(body)
      const found = await Effect.gen(function* () {
        yield* database.query("TRUNCATE t")
        const exit = yield* Effect.exit(interpret(body))
        const rows = yield* committed(database)
        return { rows, ok: exit._tag === "Success" }
      }).pipe(Effect.provide(runtime), Effect.runPromise)
      expect(found).toEqual(predicted)
    })
    return yield* Effect.promise(() => fc.check(property, { numRuns: runs, seed, endOnFailure: runs < 50 }))
  }).pipe(onDatabase(database, options))

const report = (details: fc.RunDetails<[ReadonlyArray<Node>]>): string | undefined =>
  details.failed ? fc.defaultReportMessage(details) : undefined

describe("random programs", () => {
  it.scopedLive("leave the rows that the model says", () =>
    Effect.map(check(60, 20_240_601), (details) => expect(report(details)).toBeUndefined())
  )

  it.scopedLive("also without pipelining and prepared statements", () =>
    Effect.map(check(20, 7, { pipelining: false, preparedStatements: false }), (details) =>
      expect(report(details)).toBeUndefined()
    )
  )

  it.scopedLive("negative control: a commit that overlooks the rollback-only mark is found", () =>
    Effect.gen(function* () {
      const defect = vi.spyOn(Unit.prototype as unknown as { refusal: () => undefined }, "refusal")
      defect.mockReturnValue(undefined)
      const details = yield* Effect.ensuring(
        check(40, 20_240_601),
        Effect.sync(() => defect.mockRestore())
      )
      expect(details.failed).toBe(true)
    })
  )
})
