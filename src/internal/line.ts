/**
 * Who waits for something, in order of coming. Joining, leaving from anywhere and being next cost the same however long
 * the line is: a hundred thousand fibers may stand in it, and be interrupted.
 */

/** A place in a line. @internal */
export class Place<A> {
  after: Place<A> | undefined = undefined
  /** Nobody stands there any more. */
  left = false

  constructor(
    readonly value: A,
    public before: Place<A> | undefined
  ) {}
}

/** @internal */
export class Line<A> {
  length = 0
  private head: Place<A> | undefined = undefined
  private tail: Place<A> | undefined = undefined

  /** Who is next; stays in line. */
  get first(): A | undefined {
    return this.head?.value
  }

  join(value: A): Place<A> {
    const place = new Place(value, this.tail)
    if (this.tail === undefined) this.head = place
    else this.tail.after = place
    this.tail = place
    this.length++
    return place
  }

  /** `false`: it had left before. */
  leave(place: Place<A>): boolean {
    if (place.left) return false
    place.left = true
    if (place.before === undefined) this.head = place.after
    else place.before.after = place.after
    if (place.after === undefined) this.tail = place.before
    else place.after.before = place.before
    // Whoever keeps the place would keep all that come after it.
    place.before = place.after = undefined
    this.length--
    return true
  }

  /** Takes who is next out of the line. */
  next(): A | undefined {
    const place = this.head
    if (place === undefined) return undefined
    this.leave(place)
    return place.value
  }

  /** Everybody as of now, in order. */
  get places(): Array<Place<A>> {
    const all: Array<Place<A>> = []
    for (let place = this.head; place !== undefined; place = place.after) all.push(place)
    return all
  }

  /** Takes everybody out, in order. */
  empty(): Array<A> {
    return this.places.map((place) => {
      this.leave(place)
      return place.value
    })
  }
}
