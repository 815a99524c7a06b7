/**
 * Arrays for what soon ends. V8 learns at each literal how long what it makes lives: in busy times long enough for it to
 * make them in the old generation from then on, and with them all that is put there is kept until a major collection.
 * Of a million rows that was two fifths of what the client computed. What a constructor makes is not counted, nor a copy.
 */
const nothing: ReadonlyArray<never> = []

/** An empty array. @internal */
export const young = <A>(): Array<A> => nothing.slice()
