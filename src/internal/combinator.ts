/**
 * The one signature of all combinators. Overloads would erase the generics of `effect.pipe(f)`; a conditional type
 * on one generic parameter keeps them, and serves `f(effect)`, `f(effect, options)`, `effect.pipe(f)`,
 * `effect.pipe(f(options))` and `effects.map(f)`.
 */
import * as Effect from "effect/Effect"

/**
 * What may follow the effect: options, or what `Array.prototype.map`, `Effect.forEach` and `Record.map` pass along.
 *
 * @since 0.1.0
 * @category models
 */
export type CombinatorRest<Options> =
  readonly [options?: Options | undefined] | readonly [index: number | string, effects?: unknown]

/**
 * The effect with what the combinator adds to `E` and `R`; for options, a function that adds it.
 *
 * @since 0.1.0
 * @category models
 */
export type Combined<Arg, E2, R2> =
  Arg extends Effect.Effect<infer A, infer E, infer R>
    ? Effect.Effect<A, E | E2, R | R2>
    : <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E | E2, R | R2>

/**
 * Options with a key that there is no option for are refused: misspelt, they would be ignored.
 *
 * @since 0.1.0
 * @category models
 */
export type Known<Arg, Options> = Arg extends Effect.Effect<any, any, any> | ((...args: Array<any>) => unknown)
  ? unknown
  : { readonly [K in Exclude<keyof Arg, keyof Options>]: never }

/**
 * A function from effect to effect in every form that the ecosystem knows.
 *
 * @since 0.1.0
 * @category models
 */
export interface Combinator<Options, E2, R2> {
  <Arg extends Effect.Effect<any, any, any> | Options>(
    effectOrOptions: Arg & Known<Arg, Options>,
    ...rest: CombinatorRest<Options>
  ): Combined<Arg, E2, R2>
}

const noOptions = {}

/** @internal */
export const combinator = <Options extends object, E2, R2>(
  run: (effect: Effect.Effect<any, any, any>, options: Partial<Options> & Options) => Effect.Effect<any, any, any>
): Combinator<Options, E2, R2> =>
  ((arg: unknown, ...rest: ReadonlyArray<unknown>) => {
    const given = (typeof rest[0] === "object" && rest[0] !== null ? rest[0] : noOptions) as Options
    return Effect.isEffect(arg)
      ? run(arg as Effect.Effect<any, any, any>, given)
      : (effect: Effect.Effect<any, any, any>) => run(effect, (arg ?? noOptions) as Options)
  }) as Combinator<Options, E2, R2>
