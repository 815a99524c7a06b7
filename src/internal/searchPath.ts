/**
 * The search path of a statement, set for its transaction in the same round trip.
 */
import type { Control, Owner } from "./pipeline.js"

// Where a transaction keeps the path that it had before the first change: afterConnect or a SET may have chosen it.
const saved = "effect_db.search_path"

const save = `set_config('${saved}', coalesce(nullif(current_setting('${saved}', true), ''), '=' || current_setting('search_path')), true)`

const restore = `SELECT set_config('search_path', substr(path, 2), true) FROM (SELECT current_setting('${saved}', true)) AS saved(path) WHERE path <> ''`

/** For the transaction only; nothing: what the connection has by itself. @internal */
export const searchPathControl = (path: string | undefined): Control =>
  path === undefined
    ? { text: restore, params: [], opens: false, named: true }
    : { text: `SELECT ${save}, set_config('search_path', $1, true)`, params: [path], opens: false, named: true }

/** Which path a transaction has at the moment. @internal */
export interface PathState {
  /** Nothing: the connection's own. `null`: a rollback to a savepoint has brought back an earlier one. */
  path: string | undefined | null
}

/** The owner's prefix and, where the path differs from what the statement wants, the change of it. @internal */
export const withPath = (owner: Owner, state: PathState, path: string | undefined): Owner => ({
  vet: (wire) => owner.vet?.(wire),
  takePrefix: () => {
    const prefix = owner.takePrefix()
    if (state.path === path) return prefix
    state.path = path
    return [...prefix, searchPathControl(path)]
  }
})
