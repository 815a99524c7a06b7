/**
 * The floors of `src`, bottom-up: the one list that ARCHITECTURE.md describes and `npm run floors` enforces.
 *
 * A file imports values only from lower floors or from earlier rows of its own floor. Types may point up.
 * A row is a file, or a folder written `folder/*`, whose files may import one another.
 *
 * @type {ReadonlyArray<ReadonlyArray<string>>}
 */
export const floors = [
  // 0: words
  [
    "src/internal/reasonText.ts",
    "src/internal/sqlText.ts",
    "src/internal/sqlState.ts",
    "src/internal/queryText.ts",
    "src/internal/probe.ts",
    "src/internal/reasons.ts",
    "src/DbError.ts",
    "src/Reasons.ts",
    "src/internal/dataTypes.ts",
    "src/internal/input.ts",
    "src/internal/transactionSql.ts",
    "src/internal/combinator.ts",
    "src/internal/line.ts",
    "src/internal/young.ts",
    "src/internal/rounds.ts",
    "src/internal/blocking.ts",
    "src/internal/deadline.ts",
    "src/internal/url.ts",
    "src/DbOptions.ts"
  ],
  // 1: secrets
  [
    "src/internal/neutral.ts",
    "src/internal/undisturbed.ts",
    "src/internal/entry.ts",
    "src/internal/ambient.ts",
    "src/internal/promised.ts",
    "src/internal/instead.ts",
    "src/internal/telemetry.ts"
  ],
  // 2: wire
  [
    "src/internal/protocol.ts",
    "src/internal/rows.ts",
    "src/internal/command.ts",
    "src/internal/prepared.ts",
    "src/internal/remains.ts",
    "src/internal/answers.ts",
    "src/internal/pipeline.ts",
    "src/internal/searchPath.ts",
    "src/internal/socket.ts",
    "src/internal/directSocket.ts",
    "src/internal/cancel.ts",
    "src/internal/channelBinding.ts",
    "src/internal/recycler.ts",
    "src/internal/foreign.ts",
    "src/internal/wire.ts",
    "src/internal/remote.ts",
    "src/internal/poolErrors.ts",
    "src/internal/loans.ts",
    "src/internal/backoff.ts",
    "src/internal/between.ts",
    "src/internal/pool.ts",
    "src/internal/statement.ts",
    "src/internal/writes.ts",
    "src/internal/leaving.ts"
  ],
  // 3: engine and unit of work
  [
    "src/internal/lease.ts",
    "src/internal/engine.ts",
    "src/internal/observe.ts",
    "src/internal/frame.ts",
    "src/internal/controls.ts",
    "src/internal/run.ts",
    "src/internal/unit.ts",
    "src/internal/ending.ts",
    "src/internal/slot.ts",
    "src/internal/session.ts",
    "src/internal/execute.ts",
    "src/internal/together.ts",
    "src/internal/everySession.ts",
    "src/internal/commitToken.ts",
    "src/internal/health.ts",
    "src/internal/records.ts",
    "src/internal/sqlClient.ts",
    "src/internal/batch.ts",
    "src/internal/copy.ts",
    "src/internal/listen.ts",
    "src/internal/stream.ts",
    "src/internal/outcome.ts",
    "src/internal/conflict.ts",
    "src/internal/body.ts",
    "src/internal/block.ts",
    "src/internal/autocommit.ts",
    "src/DbEngine.ts"
  ],
  // 4: nouns
  [
    "src/DbConnection.ts",
    "src/DbTransaction.ts",
    "src/DbSession.ts",
    "src/DbSchema.ts",
    "src/DbQuery.ts",
    "src/DbResolver.ts"
  ],
  // 5: one database
  ["src/DbLayer.ts", "src/Database.ts", "src/Default.ts"],
  // 6: edges
  ["src/DbHttp.ts", "src/DbRegistry.ts", "src/DbRuntime.ts", "src/testing/*", "src/embedded/*"],
  // 7: the barrel
  ["src/index.ts"]
]

/** Floors whose rows never import each other, not even earlier ones. */
export const strangers = new Set([6])
