/**
 * For promise code.
 */
import * as Effect from "effect/Effect"
import { DbLayer, type DbOptions, DbRuntime } from "effect-db"
import { type TestDatabase, untilActivity } from "./database.js"
import { expectAtRest, quietly, type Services } from "./programs.js"

/** A promise and who keeps it. */
export const latch = (): { readonly open: () => void; readonly opened: Promise<void> } => {
  let open = (): void => {}
  const opened = new Promise<void>((resolve) => {
    open = resolve
  })
  return { open: () => open(), opened }
}

/** Where so many meet: each waits at it for the others. */
export const barrier = (parties: number): (() => Promise<void>) => {
  const { open, opened } = latch()
  let arrived = 0
  return () => {
    if (++arrived === parties) open()
    return opened
  }
}

/** What a promise is rejected with; one that is fulfilled fails the test. */
export const rejection = (promise: Promise<unknown>): Promise<unknown> =>
  promise.then(
    (value) => {
      throw new Error(`it was fulfilled: ${String(value)}`)
    },
    (error: unknown) => error
  )

/** Runs promise code with a runtime, on an empty table `t`, and looks whether it has left everything at rest. */
export const onRuntime = async (
  database: TestDatabase,
  program: (db: DbRuntime.DbRuntime<Services, unknown>) => Promise<void>,
  options: DbOptions = {},
  columns = "id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED"
): Promise<void> => {
  await Effect.runPromise(database.query(`DROP TABLE IF EXISTS t CASCADE; CREATE TABLE t (${columns})`))
  const db = DbRuntime.make(quietly(DbLayer({ url: database.url, ...options })))
  try {
    await program(db)
    await db.run(expectAtRest(database))
  } finally {
    await db.close()
  }
  await Effect.runPromise(untilActivity(database.url, (_) => _.total === 0))
}
