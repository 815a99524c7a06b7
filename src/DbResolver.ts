/**
 * Request resolvers that batch inside the session of whoever asks.
 *
 * They have the constructors and options of `@effect/sql`'s `SqlResolver`, and differ where that one leaves the session
 * or loses an answer:
 *
 * - A request carries what is ambient for the fiber that asks. Its statement runs there, wherever the resolver was made
 *   and whoever runs the batch; requests of two sessions never share a statement.
 * - The same id asked for twice in one batch is sent once and answered twice.
 * - A resolver is itself only: two of the same tag, for two databases say, are never taken for one another.
 *
 * @since 0.1.0
 * @module
 */
import * as RequestResolverX from "@effect/experimental/RequestResolver"
import type * as Model from "@effect/sql/Model"
import * as SqlClient from "@effect/sql/SqlClient"
import type { SqlError } from "@effect/sql/SqlError"
import { ResultLengthMismatch } from "@effect/sql/SqlError"
import type { NonEmptyArray } from "effect/Array"
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Equal from "effect/Equal"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as FiberRef from "effect/FiberRef"
import * as Hash from "effect/Hash"
import * as MutableHashMap from "effect/MutableHashMap"
import * as Option from "effect/Option"
import type { ParseError } from "effect/ParseResult"
import * as Request from "effect/Request"
import * as RequestResolver from "effect/RequestResolver"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import type * as Types from "effect/Types"
import * as Ambient from "./internal/ambient.js"

/**
 * One question to a resolver. Two are equal when they ask the same of the same session: with request caching, what one
 * session has read is not answered to another.
 *
 * @since 0.1.0
 * @category models
 */
export interface DbRequest<Tag extends string, I, A, E> extends Request.Request<A, E | ParseError> {
  readonly _tag: Tag
  readonly input: I
  readonly encoded: unknown
}

/**
 * @since 0.1.0
 * @category models
 */
export interface DbResolver<Tag extends string, I, A, E, R> extends RequestResolver.RequestResolver<
  DbRequest<Tag, I, A, E>
> {
  /** Asks. With batching, what is asked at once goes in one statement for each session. */
  readonly execute: (input: I) => Effect.Effect<A, E | ParseError, R>
  /** `execute` through another resolver made from this one, such as a data loader. */
  readonly makeExecute: (
    resolver: RequestResolver.RequestResolver<DbRequest<Tag, I, A, E>>
  ) => (input: I) => Effect.Effect<A, E | ParseError, R>
  /** The question itself, asked from the session of the fiber that makes it. */
  readonly request: (input: I) => Effect.Effect<DbRequest<Tag, I, A, E>, ParseError, R>
  /** Answers the question in the request cache, for the session of this fiber. */
  readonly cachePopulate: (input: I, answer: A) => Effect.Effect<void>
  /** Forgets the answer in the request cache, for the session of this fiber. */
  readonly cacheInvalidate: (input: I) => Effect.Effect<void>
}

/** The request as it is made: the proxies that `Effect.request` puts around it rule out private fields. */
class Asked<Tag extends string, I, A, E>
  extends Request.Class<A, E | ParseError, {}>
  implements DbRequest<Tag, I, A, E>
{
  declare readonly ambient: Ambient.Ambient

  constructor(
    readonly _tag: Tag,
    readonly input: I,
    readonly encoded: unknown,
    ambient: Ambient.Ambient
  ) {
    super()
    // Not enumerable: a rendering of the request would show the whole engine.
    Object.defineProperty(this, "ambient", { value: ambient, enumerable: false })
  }

  [Equal.symbol](that: unknown): boolean {
    return (
      that instanceof Asked &&
      this._tag === that._tag &&
      this.ambient === that.ambient &&
      Equal.equals(this.input, that.input)
    )
  }

  [Hash.symbol](): number {
    return Hash.combine(Hash.hash(this.input))(Hash.string(this._tag))
  }
}

type Batch<Tag extends string, I, A, E> = NonEmptyArray<Asked<Tag, I, A, E>>

/** Each session's share of a batch, in the order in which they asked first. */
const shares = <Tag extends string, I, A, E>(
  requests: Batch<Tag, I, A, E>
): ReadonlyArray<readonly [Ambient.Ambient, Batch<Tag, I, A, E>]> => {
  const found = new Map<Ambient.Ambient, Batch<Tag, I, A, E>>()
  for (const request of requests) {
    const share = found.get(request.ambient)
    if (share === undefined) found.set(request.ambient, [request])
    else share.push(request)
  }
  return [...found]
}

const make = <Tag extends string, I, II, RI, A, E, R>(
  tag: Tag,
  input: Schema.Schema<I, II, RI>,
  withContext: boolean | undefined,
  answer: (requests: Batch<Tag, I, A, E>) => Effect.Effect<void, E | ParseError, R>
): Effect.Effect<DbResolver<Tag, I, A, E, RI>, never, R> =>
  Effect.map(
    withContext === true ? Effect.context<R>() : Effect.succeed(Context.empty() as Context.Context<R>),
    (context) => {
      const encode = Schema.encode(input)
      const self = RequestResolver.makeBatched((requests: NonEmptyArray<DbRequest<Tag, I, A, E>>) =>
        Effect.forEach(
          shares(requests as unknown as Batch<Tag, I, A, E>),
          ([ambient, share]) =>
            answer(share).pipe(
              Effect.catchAllCause((cause) =>
                Effect.forEach(share, (request) => Request.failCause(request, cause), { discard: true })
              ),
              // Inside what was captured with the context, which may hold another session.
              (effect) => Ambient.resume(effect, ambient),
              Effect.provide(context)
            ),
          { concurrency: "unbounded", discard: true }
        )
      )
      const asked = (
        fiber: Fiber.RuntimeFiber<unknown, unknown>,
        input: I,
        encoded: unknown
      ): DbRequest<Tag, I, A, E> => new Asked(tag, input, encoded, Ambient.current(fiber))
      const request = (input: I): Effect.Effect<DbRequest<Tag, I, A, E>, ParseError, RI> =>
        Effect.withFiberRuntime((fiber) => Effect.map(encode(input), (encoded) => asked(fiber, input, encoded)))
      const makeExecute =
        (resolver: RequestResolver.RequestResolver<DbRequest<Tag, I, A, E>>) =>
        (input: I): Effect.Effect<A, E | ParseError, RI> =>
          Effect.flatMap(request(input), (request) => Effect.request(request, resolver))
      return Object.assign(self, {
        makeExecute,
        execute: makeExecute(self),
        request,
        cachePopulate: (input: I, answer: A): Effect.Effect<void> =>
          Effect.withFiberRuntime((fiber) =>
            Effect.cacheRequestResult(asked(fiber, input, undefined), Exit.succeed(answer))
          ),
        cacheInvalidate: (input: I): Effect.Effect<void> =>
          Effect.withFiberRuntime((fiber) =>
            fiber.getFiberRef(FiberRef.currentRequestCache).invalidate(asked(fiber, input, undefined))
          )
      })
    }
  )

/** What to ask the database for, without the questions that were asked already. */
const distinct = <II>(requests: ReadonlyArray<{ readonly input: unknown; readonly encoded: unknown }>): Array<II> => {
  const seen = MutableHashMap.empty<unknown, true>()
  return requests.flatMap(({ encoded, input }) => {
    if (MutableHashMap.has(seen, input)) return []
    MutableHashMap.set(seen, input, true)
    return [encoded as II]
  })
}

const all = <II>(requests: ReadonlyArray<{ readonly encoded: unknown }>): Array<II> =>
  requests.map((request) => request.encoded as II)

/**
 * One result for each request, in their order: for `INSERT ... RETURNING *`. Equal requests stay two. Another number of
 * results is a `ResultLengthMismatch`.
 *
 * @since 0.1.0
 * @category constructors
 */
export const ordered = <Tag extends string, I, II, RI, A, IA, Row, E, RA = never, R = never>(
  tag: Tag,
  options:
    | {
        readonly Request: Schema.Schema<I, II, RI>
        readonly Result: Schema.Schema<A, IA>
        readonly execute: (requests: Array<Types.NoInfer<II>>) => Effect.Effect<ReadonlyArray<Row>, E>
        readonly withContext?: false
      }
    | {
        readonly Request: Schema.Schema<I, II, RI>
        readonly Result: Schema.Schema<A, IA, RA>
        readonly execute: (requests: Array<Types.NoInfer<II>>) => Effect.Effect<ReadonlyArray<Row>, E, R>
        readonly withContext: true
      }
): Effect.Effect<DbResolver<Tag, I, A, E | ResultLengthMismatch, RI>, never, RA | R> => {
  const decode = Schema.decodeUnknown(Schema.Array(options.Result as Schema.Schema<A, IA, RA>))
  const execute = options.execute as (requests: Array<II>) => Effect.Effect<ReadonlyArray<Row>, E, R>
  return make<Tag, I, II, RI, A, E | ResultLengthMismatch, RA | R>(
    tag,
    options.Request,
    options.withContext,
    (requests) =>
      execute(all(requests)).pipe(
        Effect.filterOrFail(
          (rows) => rows.length === requests.length,
          (rows) => new ResultLengthMismatch({ expected: requests.length, actual: rows.length })
        ),
        Effect.flatMap(decode),
        Effect.flatMap((results) =>
          Effect.forEach(requests, (request, at) => Request.succeed(request, results[at] as A), { discard: true })
        )
      )
  )
}

/**
 * All results of a group for each request: for the children of parents. No result is an empty array, and each request
 * gets an array of its own.
 *
 * @since 0.1.0
 * @category constructors
 */
export const grouped = <Tag extends string, I, II, K, RI, A, IA, Row, E, RA = never, R = never>(
  tag: Tag,
  options:
    | {
        readonly Request: Schema.Schema<I, II, RI>
        readonly RequestGroupKey: (request: Types.NoInfer<I>) => K
        readonly Result: Schema.Schema<A, IA>
        readonly ResultGroupKey: (result: Types.NoInfer<A>, row: Types.NoInfer<Row>) => K
        readonly execute: (requests: Array<Types.NoInfer<II>>) => Effect.Effect<ReadonlyArray<Row>, E>
        readonly withContext?: false
      }
    | {
        readonly Request: Schema.Schema<I, II, RI>
        readonly RequestGroupKey: (request: Types.NoInfer<I>) => K
        readonly Result: Schema.Schema<A, IA, RA>
        readonly ResultGroupKey: (result: Types.NoInfer<A>, row: Types.NoInfer<Row>) => K
        readonly execute: (requests: Array<Types.NoInfer<II>>) => Effect.Effect<ReadonlyArray<Row>, E, R>
        readonly withContext: true
      }
): Effect.Effect<DbResolver<Tag, I, Array<A>, E, RI>, never, RA | R> => {
  const decode = Schema.decodeUnknown(Schema.Array(options.Result as Schema.Schema<A, IA, RA>))
  const execute = options.execute as (requests: Array<II>) => Effect.Effect<ReadonlyArray<Row>, E, R>
  return make<Tag, I, II, RI, Array<A>, E, RA | R>(tag, options.Request, options.withContext, (requests) =>
    Effect.flatMap(execute(distinct(requests)), (rows) =>
      Effect.flatMap(decode(rows), (results) => {
        const groups = MutableHashMap.empty<K, Array<A>>()
        results.forEach((result, at) => {
          const key = options.ResultGroupKey(result, rows[at] as Row)
          const group = Option.getOrUndefined(MutableHashMap.get(groups, key))
          if (group === undefined) MutableHashMap.set(groups, key, [result])
          else group.push(result)
        })
        return Effect.forEach(
          requests,
          (request) =>
            Request.succeed(request, [
              ...Option.getOrElse(
                MutableHashMap.get(groups, options.RequestGroupKey(request.input)),
                (): Array<A> => []
              )
            ]),
          { discard: true }
        )
      })
    )
  )
}

/**
 * The result with the id that is asked for, or none. The same id any number of times in one batch is one id in the
 * query.
 *
 * @since 0.1.0
 * @category constructors
 */
export const findById = <Tag extends string, I, II, RI, A, IA, Row, E, RA = never, R = never>(
  tag: Tag,
  options:
    | {
        readonly Id: Schema.Schema<I, II, RI>
        readonly Result: Schema.Schema<A, IA>
        readonly ResultId: (result: Types.NoInfer<A>, row: Types.NoInfer<Row>) => I
        readonly execute: (ids: Array<Types.NoInfer<II>>) => Effect.Effect<ReadonlyArray<Row>, E>
        readonly withContext?: false
      }
    | {
        readonly Id: Schema.Schema<I, II, RI>
        readonly Result: Schema.Schema<A, IA, RA>
        readonly ResultId: (result: Types.NoInfer<A>, row: Types.NoInfer<Row>) => I
        readonly execute: (ids: Array<Types.NoInfer<II>>) => Effect.Effect<ReadonlyArray<Row>, E, R>
        readonly withContext: true
      }
): Effect.Effect<DbResolver<Tag, I, Option.Option<A>, E, RI>, never, RA | R> => {
  const decode = Schema.decodeUnknown(Schema.Array(options.Result as Schema.Schema<A, IA, RA>))
  const execute = options.execute as (ids: Array<II>) => Effect.Effect<ReadonlyArray<Row>, E, R>
  return make<Tag, I, II, RI, Option.Option<A>, E, RA | R>(tag, options.Id, options.withContext, (requests) =>
    Effect.flatMap(execute(distinct(requests)), (rows) =>
      Effect.flatMap(decode(rows), (results) => {
        const found = MutableHashMap.empty<I, A>()
        results.forEach((result, at) => {
          const id = options.ResultId(result, rows[at] as Row)
          if (!MutableHashMap.has(found, id)) MutableHashMap.set(found, id, result)
        })
        return Effect.forEach(
          requests,
          (request) => Request.succeed(request, MutableHashMap.get(found, request.input)),
          { discard: true }
        )
      })
    )
  )
}

/** No result: for writes. Equal requests stay two. */
const void_ = <Tag extends string, I, II, RI, E, R = never>(
  tag: Tag,
  options:
    | {
        readonly Request: Schema.Schema<I, II, RI>
        readonly execute: (requests: Array<Types.NoInfer<II>>) => Effect.Effect<unknown, E>
        readonly withContext?: false
      }
    | {
        readonly Request: Schema.Schema<I, II, RI>
        readonly execute: (requests: Array<Types.NoInfer<II>>) => Effect.Effect<unknown, E, R>
        readonly withContext: true
      }
): Effect.Effect<DbResolver<Tag, I, void, E, RI>, never, R> => {
  const execute = options.execute as (requests: Array<II>) => Effect.Effect<unknown, E, R>
  return make<Tag, I, II, RI, void, E, R>(tag, options.Request, options.withContext, (requests) =>
    Effect.zipRight(
      execute(all(requests)),
      Effect.forEach(requests, (request) => Request.succeed(request, undefined), { discard: true })
    )
  )
}

export {
  /**
   * No result: for writes. Equal requests stay two.
   *
   * @since 0.1.0
   * @category constructors
   */
  void_ as void
}

/**
 * What a model's data loaders do.
 *
 * @since 0.1.0
 * @category models
 */
export interface DataLoaders<S extends Model.AnyNoContext, Id extends keyof S["Type"] & keyof S["fields"]> {
  /** Inserts a row and yields it. */
  readonly insert: (
    insert: S["insert"]["Type"]
  ) => Effect.Effect<S["Type"], SqlError | ResultLengthMismatch | ParseError>
  /** Inserts a row. */
  readonly insertVoid: (insert: S["insert"]["Type"]) => Effect.Effect<void, SqlError | ParseError>
  /** The row of an id, if there is one. */
  readonly findById: (id: S["Type"][Id]) => Effect.Effect<Option.Option<S["Type"]>, SqlError | ParseError>
  /** Deletes the row of an id, if there is one. */
  readonly delete: (id: S["Type"][Id]) => Effect.Effect<void, SqlError | ParseError>
}

/**
 * Data loaders of a model, with the options of `Model.makeDataLoaders`: what is asked within the `window`, batched or
 * not, goes in one statement for each session, inside it. Failures are typed.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeDataLoaders = <
  S extends Model.AnyNoContext,
  Id extends keyof S["Type"] & keyof S["update"]["Type"] & keyof S["fields"]
>(
  model: S,
  options: {
    readonly tableName: string
    readonly spanPrefix: string
    readonly idColumn: Id
    readonly window: Duration.DurationInput
    readonly maxBatchSize?: number | undefined
  }
): Effect.Effect<DataLoaders<S, Id>, never, SqlClient.SqlClient | Scope.Scope> =>
  Effect.gen(function* () {
    const sql = yield* SqlClient.SqlClient
    const { spanPrefix } = options
    const column = options.idColumn as string
    const table = sql(options.tableName)
    type Row = S["Type"]
    type Key = S["Type"][Id]
    const rows = model as unknown as Schema.Schema<Row, unknown>
    const inserts = model.insert as Schema.Schema<S["insert"]["Type"], Record<string, unknown>>
    const ids = model.fields[options.idColumn as keyof S["fields"]] as unknown as Schema.Schema<Key, string | number>
    const load = <Tag extends string, I, A, E>(name: string, resolver: DbResolver<Tag, I, A, E, never>) =>
      Effect.map(
        RequestResolverX.dataLoader(resolver, {
          window: options.window,
          ...(options.maxBatchSize === undefined ? {} : { maxBatchSize: options.maxBatchSize })
        }),
        (loader) => {
          const execute = resolver.makeExecute(loader)
          return (input: I) => Effect.withSpan(execute(input), `${spanPrefix}.${name}`, { captureStackTrace: false })
        }
      )
    return {
      insert: yield* Effect.flatMap(
        ordered(`${spanPrefix}/insert`, {
          Request: inserts,
          Result: rows,
          execute: (requests) => sql`INSERT INTO ${table} ${sql.insert(requests).returning("*")}`
        }),
        (resolver) => load("insert", resolver)
      ),
      insertVoid: yield* Effect.flatMap(
        void_(`${spanPrefix}/insertVoid`, {
          Request: inserts,
          execute: (requests) => sql`INSERT INTO ${table} ${sql.insert(requests)}`
        }),
        (resolver) => load("insertVoid", resolver)
      ),
      findById: yield* Effect.flatMap(
        findById(`${spanPrefix}/findById`, {
          Id: ids,
          Result: rows,
          ResultId: (result: Row) => result[options.idColumn] as Key,
          execute: (ids) => sql`SELECT * FROM ${table} WHERE ${sql.in(column, ids)}`
        }),
        (resolver) => load("findById", resolver)
      ),
      delete: yield* Effect.flatMap(
        void_(`${spanPrefix}/delete`, {
          Request: ids,
          execute: (ids) => sql`DELETE FROM ${table} WHERE ${sql.in(column, ids)}`
        }),
        (resolver) => load("delete", resolver)
      )
    }
  })
