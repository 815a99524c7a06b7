/** Why the service did not start, in one sentence for whoever started it. */
import { HttpServerError } from "@effect/platform"
import { EmbeddedError } from "effect-db/embedded"
import { DbError } from "effect-db"
import { Cause, ConfigError } from "effect"

const ofDatabase = (reason: DbError.Reason): string => {
  switch (reason._tag) {
    case "AuthenticationError":
      return "The database refused the user or the password: correct DATABASE_URL."
    case "AuthorizationError":
      return "The user may not use the database, or it does not exist: correct DATABASE_URL."
    case "ConnectionError":
      return `The database${reason.address === undefined ? "" : ` at ${reason.address}`} can't be reached: start it, or correct DATABASE_URL.`
    case "InvalidInput":
      return `DATABASE_URL can't be used: ${reason.message}`
    default:
      return `The database can't be used: ${reason.message}`
  }
}

export const sentence = (cause: Cause.Cause<unknown>): string => {
  const error = Cause.squash(cause)
  const reason = DbError.reason(error)
  if (reason !== undefined) return ofDatabase(reason)
  if (error instanceof EmbeddedError) return error.message
  if (ConfigError.isConfigError(error)) return "PORT is not the number of a port: set it to one from 1 to 65535."
  if (error instanceof HttpServerError.ServeError) {
    const { code, port } = error.cause as { readonly code?: string; readonly port?: number }
    return code === "EADDRINUSE"
      ? `Port ${port} is in use: stop what listens there, or set PORT to another one.`
      : `The service can't listen on port ${port} (${code}): set PORT to another one.`
  }
  return Cause.pretty(cause)
}
