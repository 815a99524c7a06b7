/**
 * The `SqlClient` / `PgClient` view of an engine, of a session handle or of a connection. `SqlClient.make` is not
 * used: it looks for a transaction under a tag that all databases share before it asks for a connection.
 */
import * as Reactivity from "@effect/experimental/Reactivity"
import * as PgClient from "@effect/sql-pg/PgClient"
import type { Connection } from "@effect/sql/SqlConnection"
import * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import * as Statement from "@effect/sql/Statement"
import * as Chunk from "effect/Chunk"
import * as Effect from "effect/Effect"
import type * as Fiber from "effect/Fiber"
import type * as FiberStatus from "effect/FiberStatus"
import { identity } from "effect/Function"
import type * as Mailbox from "effect/Mailbox"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import type { DbError } from "../DbError.js"
import type { EngineCore } from "./engine.js"
import { execute } from "./execute.js"
import type { Bound } from "./execute.js"
import { checkIdentifier, checkNotification, encodeJson } from "./input.js"
import { engineFor } from "./instead.js"
import { isObserved, observe, observeScoped } from "./observe.js"
import type { Observation } from "./observe.js"
import type { Result } from "./rows.js"
import { checkRecords } from "./records.js"
import { compileOf, isRefused } from "./statement.js"
import { unseenSpan } from "./telemetry.js"

/**
 * The client that every noun offers.
 *
 * @since 0.1.0
 * @category models
 */
export interface DbSql extends PgClient.PgClient {}

type TransformRows = (<A extends object>(rows: ReadonlyArray<A>) => ReadonlyArray<A>) | undefined

type Runtime = Fiber.RuntimeFiber<any, any>

const rowsOf = (result: Result, multiple: Array<Result> | undefined): ReadonlyArray<any> =>
  multiple === undefined ? result.rows : multiple.map((_) => _.rows)

const rawOf = (result: Result, multiple: Array<Result> | undefined): unknown => multiple ?? result

/** What is no text has nothing to show to those who watch: it is refused before it is sent. */
const shown = (text: unknown): string => (typeof text === "string" ? text : "")

type Runnable<A> = readonly [
  text: string,
  params: ReadonlyArray<unknown>,
  rowMode: "object" | "array",
  prepare: boolean,
  map: (result: Result, multiple: Array<Result> | undefined) => A
]

/** What a view is made from. @internal */
export interface ViewOptions {
  readonly engine: EngineCore
  readonly bound: Bound
  readonly withTransaction: SqlClient.SqlClient["withTransaction"]
  /** Rows of a cursor, in the ambient transaction or in one of its own. */
  readonly stream: (
    engine: EngineCore,
    bound: Bound,
    text: string,
    params: ReadonlyArray<unknown>,
    watch: Observation | undefined
  ) => Stream.Stream<any, SqlError>
  readonly reserve: Effect.Effect<Bound, DbError, Scope.Scope>
  readonly listen: (channel: string) => Stream.Stream<string, SqlError>
}

/** A connection as the ecosystem knows it: its statements run where the view's do. @internal */
export class ViewConnection implements Connection {
  constructor(
    readonly engine: EngineCore,
    readonly bound: Bound,
    private readonly streamOf: ViewOptions["stream"]
  ) {}

  /** The engine that its statements run on in this fiber. */
  at(fiber: Runtime): EngineCore {
    return this.bound._tag === "Ambient" ? engineFor(fiber, this.engine) : this.engine
  }

  private run<A>(...statement: Runnable<A>): Effect.Effect<A, DbError> {
    return Effect.withFiberRuntime<A, DbError>((fiber, status) => this.runIn(fiber, status, ...statement))
  }

  private runIn<A>(fiber: Runtime, status: FiberStatus.Running, ...statement: Runnable<A>): Effect.Effect<A, DbError> {
    const { bound } = this
    const engine = this.at(fiber)
    return isObserved(fiber, engine)
      ? observe(fiber, engine, { text: shown(statement[0]) }, (watch) =>
          execute(fiber, engine, bound, ...statement, watch)
        )
      : execute(fiber, engine, bound, ...statement, undefined, status)
  }

  /** The rows of a statement, for a fiber that does nothing else before. */
  rowsIn(
    fiber: Runtime,
    status: FiberStatus.Running,
    text: string,
    params: ReadonlyArray<unknown>,
    transformRows: TransformRows
  ): Effect.Effect<ReadonlyArray<any>, DbError> {
    const rows = this.runIn(fiber, status, text, params, "object", true, rowsOf)
    return transformRows === undefined ? rows : Effect.map(rows, transformRows)
  }

  execute(text: string, params: ReadonlyArray<unknown>, transformRows: TransformRows) {
    const rows = this.run(text, params, "object", true, rowsOf)
    return transformRows === undefined ? rows : Effect.map(rows, transformRows)
  }

  executeRaw(text: string, params: ReadonlyArray<unknown>) {
    return this.run(text, params, "object", true, rawOf)
  }

  executeValues(text: string, params: ReadonlyArray<unknown>) {
    return this.run(text, params, "array", true, rowsOf)
  }

  executeUnprepared(text: string, params: ReadonlyArray<unknown>, transformRows: TransformRows) {
    const rows = this.run(text, params, "object", false, rowsOf)
    return transformRows === undefined ? rows : Effect.map(rows, transformRows)
  }

  private observedStream(text: string, params: ReadonlyArray<unknown>): Stream.Stream<any, SqlError> {
    return Stream.unwrapScoped(
      Effect.withFiberRuntime<Stream.Stream<any, SqlError>, never, Scope.Scope>((fiber) => {
        const engine = this.at(fiber)
        return isObserved(fiber, engine)
          ? Effect.map(observeScoped(fiber, engine, shown(text)), ({ failed, watch }) =>
              Stream.tapError(this.streamOf(engine, this.bound, text, params, watch), (error) =>
                Effect.sync(() => failed(error))
              )
            )
          : Effect.succeed(this.streamOf(engine, this.bound, text, params, undefined))
      })
    )
  }

  executeStream(text: string, params: ReadonlyArray<unknown>, transformRows: TransformRows) {
    const rows = this.observedStream(text, params)
    return transformRows === undefined
      ? rows
      : Stream.mapChunks(rows, (chunk) =>
          Chunk.unsafeFromArray(transformRows(Chunk.toReadonlyArray(chunk)) as Array<any>)
        )
  }
}

/** Makes no other text than that of its place: no fragment and no helper. */
const isValue = (u: unknown): boolean =>
  u === null || (typeof u !== "object" && typeof u !== "function") || u instanceof Date || u instanceof Uint8Array

const isTemplate = (u: unknown): u is TemplateStringsArray => Array.isArray(u) && "raw" in u

type Segments = ReadonlyArray<Statement.Segment>

type Compiled = readonly [sql: string, params: ReadonlyArray<unknown>]

/** What the statements of one client have in common. */
interface Client {
  /** The ecosystem's constructor, which knows of segments. */
  readonly base: Statement.Constructor & ((...args: ReadonlyArray<unknown>) => { readonly segments: Segments })
  readonly acquirer: Connection.Acquirer
  readonly connection: ViewConnection
  readonly compiler: Statement.Compiler
  readonly transformRows: TransformRows
  /** Building and hashing the same text again costs more than anything else of a statement. */
  readonly texts: WeakMap<TemplateStringsArray, string>
}

/**
 * A statement of our clients. It goes straight to the connection, which has a span where a tracer listens: the
 * ecosystem's own opens a scope and a span for each execution.
 * @internal
 */
export abstract class Direct {
  constructor(protected readonly client: Client) {}

  get connection(): ViewConnection {
    return this.client.connection
  }

  /** Only a text that is not known yet needs them. */
  abstract get segments(): Segments

  abstract compile(withoutTransform?: boolean): Compiled

  get acquirer(): Connection.Acquirer {
    return this.client.acquirer
  }

  get transformRows(): TransformRows {
    return this.client.transformRows
  }

  commit(): Effect.Effect<ReadonlyArray<any>, SqlError> {
    return Effect.withFiberRuntime<ReadonlyArray<any>, SqlError>((fiber: Runtime, status) => {
      const { connection, transformRows } = this.client
      if (Option.isSome(fiber.getFiberRef(Statement.currentTransformer))) {
        return this.sent(fiber, false, (text, params) => connection.execute(text, params, transformRows))
      }
      const compiled = compileOf(this)
      return isRefused(compiled)
        ? Effect.fail(compiled)
        : connection.rowsIn(fiber, status, compiled[0], compiled[1], transformRows)
    })
  }

  /** What the other ways to run it are made of: `raw`, `values`, `unprepared`, `withoutTransform`. */
  withConnection(
    _operation: string,
    f: (connection: Connection, sql: string, params: ReadonlyArray<unknown>) => Effect.Effect<any, SqlError>,
    withoutTransform = false
  ): Effect.Effect<any, SqlError> {
    return Effect.withFiberRuntime<any, SqlError>((fiber: Runtime) =>
      this.sent(fiber, withoutTransform, (text, params) => f(this.client.connection, text, params))
    )
  }

  get stream(): Stream.Stream<any, SqlError> {
    const { connection, transformRows } = this.client
    return Stream.unwrap(
      Effect.withFiberRuntime<Stream.Stream<any, SqlError>, SqlError>((fiber: Runtime) =>
        this.sent(fiber, false, (text, params) => Effect.succeed(connection.executeStream(text, params, transformRows)))
      )
    )
  }

  /** What is sent of it, for `f`. */
  private sent<A>(
    fiber: Runtime,
    withoutTransform: boolean,
    f: (text: string, params: ReadonlyArray<unknown>) => Effect.Effect<A, SqlError>
  ): Effect.Effect<A, SqlError> {
    return Effect.flatMap(this.transformed(fiber), (statement): Effect.Effect<A, SqlError> => {
      const compiled = compileOf(statement, withoutTransform)
      return isRefused(compiled) ? Effect.fail(compiled) : f(...compiled)
    })
  }

  /** The statement that is sent: what a transformer makes of it. */
  transformed(fiber: Runtime): Effect.Effect<{ readonly compile: (withoutTransform?: boolean) => Compiled }> {
    const transformer = fiber.getFiberRef(Statement.currentTransformer)
    return Option.isNone(transformer)
      ? Effect.succeed(this)
      : transformer.value(
          this as unknown as Statement.Statement<unknown>,
          this.client.base,
          fiber.getFiberRefs(),
          unseenSpan()
        )
  }
}

// What we leave as it is comes from the ecosystem's class, whose constructor would give each statement fields that are
// the client's here. The statement that leads to it is never run.
Object.setPrototypeOf(
  Direct.prototype,
  Object.getPrototypeOf(Statement.make(Effect.never, undefined as never, [], undefined).unsafe("")) as object
)

class Tagged extends Direct {
  private parts: Segments | undefined = undefined

  constructor(
    client: Client,
    private readonly strings: TemplateStringsArray,
    private readonly args: ReadonlyArray<unknown>
  ) {
    super(client)
  }

  override get segments(): Segments {
    return (this.parts ??= this.client.base(this.strings, ...this.args).segments)
  }

  override compile(withoutTransform = false): Compiled {
    const { args, client, strings } = this
    // With nothing but values in it its text is always the same.
    if (!args.every(isValue)) return this.compiled(withoutTransform)
    let text = client.texts.get(strings)
    if (text === undefined) client.texts.set(strings, (text = this.compiled(withoutTransform)[0]))
    return [text, args]
  }

  private compiled(withoutTransform: boolean): Compiled {
    for (const segment of this.segments) {
      const refused = checkRecords(segment)
      if (refused !== undefined) throw refused
    }
    return this.client.compiler.compile(this as unknown as Statement.Fragment, withoutTransform)
  }
}

class Unsafe extends Direct {
  constructor(
    client: Client,
    private readonly text: string,
    private readonly params: ReadonlyArray<unknown>
  ) {
    super(client)
  }

  override get segments(): Segments {
    return (this.client.base.unsafe(this.text, this.params) as unknown as { readonly segments: Segments }).segments
  }

  // Whatever it was given: what is no text and no array is refused when it is run.
  override compile(): Compiled {
    return [this.text, this.params]
  }
}

/** The tagged template and its helpers, with our statements. */
const makeConstructor = (
  acquirer: Connection.Acquirer,
  connection: ViewConnection,
  compiler: Statement.Compiler,
  transformRows: TransformRows
): Statement.Constructor => {
  const base = Statement.make(acquirer, compiler, [], transformRows) as Client["base"]
  const client: Client = { base, acquirer, connection, compiler, transformRows, texts: new WeakMap() }
  const sql = (first: unknown, ...rest: ReadonlyArray<unknown>): unknown =>
    isTemplate(first) ? new Tagged(client, first, rest) : base(first, ...rest)
  return Object.assign(sql, base, {
    unsafe: (text: string, params?: ReadonlyArray<unknown> | null) =>
      new Unsafe(client, text, Array.isArray(params) ? [...params] : (params ?? []))
  }) as unknown as Statement.Constructor
}

/** PgClient's shape of the options, for code that reads `client.config`. */
const configOf = (engine: EngineCore): PgClient.PgClientConfig => {
  const { options, target } = engine.config
  const { password: _, url, ...rest } = options
  return {
    ...rest,
    host: target.hosts[0]!.host,
    port: target.hosts[0]!.port,
    database: target.database,
    username: target.username,
    ...(Redacted.isRedacted(url) ? { url } : typeof url === "string" ? { url: Redacted.make(url) } : {}),
    ...(Redacted.isRedacted(options.password) ? { password: options.password } : {})
  } as PgClient.PgClientConfig
}

// PgClient keeps the constructor of its JSON fragment to itself.
const json = Statement.custom<Statement.Custom<"PgJson", unknown>>("PgJson") as unknown as (
  value: unknown,
  ...rest: Array<unknown>
) => Statement.Fragment

/** What the constructor of the ecosystem's compiler is given. */
interface CompilerParts {
  readonly dialect: Statement.Dialect
  readonly parameterPlaceholder: (index: number, value: unknown) => string
  readonly onRecordUpdate: Parameters<typeof Statement.makeCompiler>[0]["onRecordUpdate"]
  readonly onCustom: Parameters<typeof Statement.makeCompiler>[0]["onCustom"]
}

/** With other names, as PgClient gives them; of an array it looks at the first item alone, and into what has a `toJSON`. */
const withKeys = (value: unknown, transform: (name: string) => string): unknown =>
  Array.isArray(value)
    ? value.map((item) => withKeys(item, transform))
    : value?.constructor === Object && typeof (value as { readonly toJSON?: unknown }).toJSON !== "function"
      ? Object.fromEntries(Object.entries(value).map(([key, of]) => [transform(key), withKeys(of, transform)]))
      : value

const quote = Statement.defaultEscape('"')
const knownNames = 4096

/** The name in quotes; a dot separates names. Throws what `checkIdentifier` has against one of them. */
const makeQuote = (): ((name: string) => string) => {
  const known = new Map<string, string>()
  return (name) => {
    let quoted = known.get(name)
    if (quoted === undefined) {
      for (const part of name.split(".")) {
        const refused = checkIdentifier(part)
        if (refused !== undefined) throw refused
      }
      quoted = quote(name)
      if (known.size >= knownNames) known.clear()
      known.set(name, quoted)
    }
    return quoted
  }
}

/**
 * The compiler of an engine, shared by all its views: PgClient's, but for names that PostgreSQL would cut, and for the
 * JSON of arrays and of text.
 * @internal
 */
export const makeCompiler = (engine: EngineCore): Statement.Compiler => {
  const { transformJson, transformQueryNames: transform } = engine.config.options
  const { dialect, onCustom, onRecordUpdate, parameterPlaceholder } = PgClient.makeCompiler(
    transform,
    transformJson
  ) as unknown as CompilerParts
  const quoted = makeQuote()
  return Statement.makeCompiler({
    dialect,
    placeholder: parameterPlaceholder,
    onIdentifier: (name, withoutTransform) =>
      quoted(transform === undefined || withoutTransform ? name : transform(name)),
    onRecordUpdate,
    onCustom: (fragment, placeholder, withoutTransform) => {
      if (fragment.kind !== "PgJson") return onCustom(fragment, placeholder, withoutTransform)
      const named = transform !== undefined && transformJson !== false && !withoutTransform
      const encoded = encodeJson(fragment.i0, named ? (value) => withKeys(value, transform) : identity)
      if (isRefused(encoded)) throw encoded
      return [placeholder(undefined), [encoded]]
    }
  })
}

/** @internal */
export const makeView = (options: ViewOptions, compiler: Statement.Compiler): DbSql => {
  const { bound, engine } = options
  const config = engine.config.options
  const transformRows: TransformRows =
    config.transformResultNames === undefined
      ? undefined
      : (Statement.defaultTransforms(config.transformResultNames, config.transformJson).array as TransformRows)
  const connection = new ViewConnection(engine, bound, options.stream)
  const acquirer = Effect.succeed(connection)
  const reactivity = reactivityOf(engine)
  const build = (compiler: Statement.Compiler, transformRows: TransformRows): DbSql => {
    const constructor = makeConstructor(acquirer, connection, compiler, transformRows)
    const notify = (channel: string, payload: string): Effect.Effect<void, SqlError> =>
      Effect.suspend((): Effect.Effect<unknown, DbError> => {
        const refused = checkNotification(channel, payload)
        return refused === undefined
          ? connection.execute("SELECT pg_notify($1, $2)", [channel, payload], undefined)
          : Effect.fail(refused)
      }).pipe(Effect.asVoid)
    const view = Object.assign(constructor, {
      [SqlClient.TypeId]: SqlClient.TypeId,
      [PgClient.TypeId]: PgClient.TypeId,
      safe: undefined as unknown,
      withTransaction: options.withTransaction,
      reserve: Effect.map(options.reserve, (bound) => new ViewConnection(engine, bound, options.stream)),
      withoutTransforms: () =>
        transformRows === undefined
          ? view
          : build((compiler as { withoutTransform: Statement.Compiler }).withoutTransform, undefined),
      reactive: <A, E, R>(keys: Keys, effect: Effect.Effect<A, E, R>) =>
        Stream.unwrap(Effect.map(reactivity, (_) => _.stream(keys, effect))),
      reactiveMailbox: <A, E, R>(
        keys: Keys,
        effect: Effect.Effect<A, E, R>
      ): Effect.Effect<Mailbox.ReadonlyMailbox<A, E>, never, R | Scope.Scope> =>
        Effect.flatMap(reactivity, (_) => _.query(keys, effect)),
      config: configOf(engine),
      json: (value: unknown) => json(value, undefined, undefined),
      listen: options.listen,
      notify
    }) as unknown as DbSql
    ;(view as { safe: unknown }).safe = view
    return view
  }
  return build(compiler, transformRows)
}

type Keys = Parameters<SqlClient.SqlClient["reactive"]>[0]

/** The caller's Reactivity when there is one, so that its invalidations are seen; else the engine's own. */
const reactivityOf = (engine: EngineCore): Effect.Effect<Reactivity.Reactivity.Service> =>
  Effect.map(
    Effect.serviceOption(Reactivity.Reactivity),
    Option.getOrElse(() => engine.reactivity)
  )
