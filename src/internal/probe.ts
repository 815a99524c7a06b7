/**
 * Where somebody may listen to what an engine sends and lends. Nobody does but `DbTest.trace`: one look at a field is
 * what it costs.
 */

/** What a listener is told, as it happens. @internal */
export interface Listening {
  /**
   * A statement goes out on a connection, which has heard so many answers before. `as`: what it stands for in a
   * sandbox; empty, when it is the sandbox's own.
   */
  readonly sent: (connection: object, text: string, as: string | undefined, heard: number) => void
  /** The pool has lent a connection. */
  readonly lent: (waited: boolean) => void
}

/** @internal */
export class Probe {
  /** Nothing, unless somebody listens. */
  listener: Listening | undefined = undefined
  private readonly all = new Set<Listening>()

  /** The returned function stops. */
  readonly listen = (listening: Listening): (() => void) => {
    this.all.add(listening)
    this.refresh()
    return () => {
      this.all.delete(listening)
      this.refresh()
    }
  }

  private refresh(): void {
    const all = [...this.all]
    this.listener =
      all.length <= 1
        ? all[0]
        : {
            sent: (connection, text, as, heard) => {
              for (const one of all) one.sent(connection, text, as, heard)
            },
            lent: (waited) => {
              for (const one of all) one.lent(waited)
            }
          }
  }
}
