import { HttpRouter, HttpServerRequest, HttpServerResponse } from "@effect/platform"
import { NodeHttpServerRequest, NodeStream } from "@effect/platform-node"
import { DbEngine, DbError } from "effect-db"
import type { DbSession } from "effect-db"
import { Cause, Effect, Stream } from "effect"
import * as Accounts from "./accounts.js"
import { BadLine } from "./csv.js"
import { BadInput } from "./errors.js"
import { exportTransfers } from "./exporter.js"
import { body, input, json, transactional } from "./http.js"
import { importTransfers } from "./importer.js"
import * as Reports from "./reports.js"
import * as Schemas from "./schema.js"
import * as Transfers from "./transfers.js"

const accountId = HttpRouter.params.pipe(
  Effect.flatMap((params) => input(Schemas.AccountPath, params)),
  Effect.map(({ id }) => id)
)

const page = Effect.flatMap(HttpServerRequest.ParsedSearchParams, (params) => input(Schemas.Page, params))

const accounts = HttpRouter.empty.pipe(
  HttpRouter.post(
    "/accounts",
    Effect.gen(function* () {
      const { name } = yield* body(Schemas.NewAccount)
      return json(yield* Accounts.open(name), 201)
    })
  ),
  HttpRouter.get(
    "/accounts",
    Effect.gen(function* () {
      const { limit } = yield* page
      return json(yield* Accounts.list(limit))
    })
  ),
  HttpRouter.get(
    "/accounts/:id",
    Effect.gen(function* () {
      return json(yield* Accounts.find(yield* accountId))
    })
  ),
  HttpRouter.get(
    "/accounts/:id/statement",
    Effect.gen(function* () {
      return json(yield* Accounts.statement(yield* accountId, yield* page))
    })
  ),
  HttpRouter.post(
    "/accounts/:id/deposits",
    Effect.gen(function* () {
      const id = yield* accountId
      const { amount, note } = yield* body(Schemas.Deposit)
      return json(yield* Transfers.deposit(id, amount, note), 201)
    })
  )
)

const transfers = HttpRouter.empty.pipe(
  HttpRouter.post(
    "/transfers",
    Effect.gen(function* () {
      const { headers } = yield* HttpServerRequest.HttpServerRequest
      const key = headers["idempotency-key"]
      if (key !== undefined) yield* input(Schemas.IdempotencyKey, key)
      const transfer = yield* body(Schemas.Transfer)
      return json(yield* Transfers.make(transfer, key), 201)
    })
  )
)

/** The last line of an import that failed. */
const explain = (cause: Cause.Cause<unknown>) =>
  Effect.gen(function* () {
    const error = Cause.squash(cause)
    if (error instanceof BadLine) return { error: `line ${error.line}: ${error.message}; nothing was kept` }
    yield* Effect.logError("The import failed", error)
    return DbError.reason(error)?._tag === "CommitUnknown"
      ? { error: "the connection was lost at the very end: look whether the transfers are there" }
      : { error: "the service failed; nothing was kept" }
  })

/** Bodies that are streamed outlive the session of their request, and have one of their own. */
const files = HttpRouter.empty.pipe(
  HttpRouter.post(
    "/import",
    Effect.gen(function* () {
      const request = yield* HttpServerRequest.HttpServerRequest
      const context = yield* Effect.context<DbEngine | DbSession>()
      const upload = NodeHttpServerRequest.toIncomingMessage(request)
      const csv = NodeStream.fromReadable(
        () => upload,
        () => new BadInput({ message: "The upload was cut off." }),
        // a bad line ends the reading, and must not end the connection before the client knows
        { closeOnDone: false }
      )
      const progress = importTransfers(csv).pipe(
        Stream.catchAllCause((cause) =>
          Cause.isInterruptedOnly(cause) ? Stream.failCause(cause) : Stream.fromEffect(explain(cause))
        ),
        Stream.map((progress) => `${JSON.stringify(progress)}\n`),
        Stream.encodeText,
        Stream.ensuring(Effect.sync(() => upload.resume())),
        Stream.provideContext(context)
      )
      return HttpServerResponse.stream(progress, { contentType: "application/x-ndjson" })
    })
  ),
  HttpRouter.get(
    "/export",
    Effect.gen(function* () {
      const request = yield* HttpServerRequest.HttpServerRequest
      const context = yield* Effect.context<DbEngine | DbSession>()
      const response = NodeHttpServerRequest.toServerResponse(request)
      const csv = exportTransfers.pipe(
        // an export that fails half-way must not look complete
        Stream.tapErrorCause((cause) =>
          Effect.zipRight(
            Effect.logError("The export failed", cause),
            Effect.sync(() => response.destroy())
          )
        ),
        Stream.provideContext(context)
      )
      return HttpServerResponse.stream(csv, { contentType: "text/csv; charset=utf-8" })
    })
  )
)

const reports = HttpRouter.empty.pipe(
  HttpRouter.get(
    "/reports/daily",
    Effect.gen(function* () {
      const { limit } = yield* page
      return json(yield* Reports.daily(limit))
    })
  )
)

const health = HttpRouter.empty.pipe(
  HttpRouter.get(
    "/health",
    // busy is not away: a pool whose connections are all lent is no reason to send the traffic elsewhere
    Effect.map(DbEngine.health, ({ lastError, since, stats, status }) =>
      status === "up"
        ? json({ status: "ok", database: "ok" })
        : json({ status: "failing", database: "away", since, reason: lastError?.error.reason._tag, stats }, 503)
    )
  )
)

export const routes = HttpRouter.concatAll(accounts, transfers, files, reports, health).pipe(
  HttpRouter.use(transactional),
  Effect.catchTag("RouteNotFound", ({ request }) =>
    Effect.succeed(
      json({ error: "NotFound", message: `There is no ${request.method} ${request.url.split("?")[0]}.` }, 404)
    )
  )
)
