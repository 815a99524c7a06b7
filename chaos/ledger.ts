/**
 * What the clients were told about each transfer, held against what the database has in the end.
 */

/**
 * - `acknowledged`: it was said to be committed.
 * - `aborted`: it was said to have failed.
 * - `unknown`: it was said that nobody knows, or nobody was left to be told.
 */
export type Outcome = "acknowledged" | "aborted" | "unknown"

export interface Told {
  readonly id: string
  readonly outcome: Outcome
  /** Why it was not acknowledged, and whether its commit was to be proved: for the report. */
  readonly reason?: string | undefined
  readonly verifies?: boolean | undefined
  /** What hooks were told: how many commits, and how many rollbacks since the last attempt began. */
  readonly commits?: number | undefined
  readonly rollbacks?: number | undefined
}

export interface Verdict {
  readonly acknowledged: number
  readonly aborted: number
  readonly unknown: number
  /** Of the unknown ones, by looking. */
  readonly settled: { readonly committed: number; readonly aborted: number }
  /** Acknowledged, and not there. */
  readonly lost: ReadonlyArray<string>
  /** Said to have failed, and there. */
  readonly ghosts: ReadonlyArray<string>
  /** There, and nobody asked for it. */
  readonly strangers: ReadonlyArray<string>
  /** A hook that contradicts what is there. */
  readonly wrongHooks: ReadonlyArray<string>
}

export const judge = (told: Iterable<Told>, present: ReadonlySet<string>): Verdict => {
  const counts = { acknowledged: 0, aborted: 0, unknown: 0 }
  const settled = { committed: 0, aborted: 0 }
  const lost: Array<string> = []
  const ghosts: Array<string> = []
  const wrongHooks: Array<string> = []
  const known = new Set<string>()
  for (const { commits, id, outcome, reason, rollbacks, verifies } of told) {
    known.add(id)
    counts[outcome]++
    const there = present.has(id)
    if (outcome === "acknowledged" && !there) lost.push(id)
    if (outcome === "aborted" && there) ghosts.push(id)
    if (outcome === "unknown") settled[there ? "committed" : "aborted"]++
    if (commits === undefined || rollbacks === undefined) continue
    const contradicts =
      commits > 1 ||
      (commits > 0 && (rollbacks > 0 || !there)) ||
      (rollbacks > 0 && there) ||
      (outcome === "acknowledged" && commits === 0)
    if (contradicts)
      wrongHooks.push(
        `${id}: ${outcome} (${reason}, verified: ${verifies}), there: ${there}, hooks: ${commits} and ${rollbacks}`
      )
  }
  const strangers = [...present].filter((id) => !known.has(id))
  return { ...counts, settled, lost, ghosts, strangers, wrongHooks }
}
