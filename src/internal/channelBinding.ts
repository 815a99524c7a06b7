/**
 * `channel_binding=require`: a login that is not bound to the TLS channel is refused before a password is sent. `pg` binds
 * where the server offers it, and does without where it does not.
 */
import type { EventEmitter } from "node:events"
import { DbError } from "../DbError.js"

/** Must come before `connect`, after which `pg` answers what the server asks. @internal */
export const demandBinding = (connection: Pick<EventEmitter, "on">, refuse: () => void): void => {
  let bound = false
  connection.on("authenticationSASL", ({ mechanisms }: { readonly mechanisms: ReadonlyArray<string> }) => {
    bound = mechanisms.includes("SCRAM-SHA-256-PLUS")
    if (!bound) refuse()
  })
  connection.on("authenticationCleartextPassword", refuse)
  connection.on("authenticationMD5Password", refuse)
  connection.on("authenticationOk", () => {
    if (!bound) refuse()
  })
}

/** @internal */
export const unbound = (): DbError =>
  DbError.make("AuthenticationError", {
    message: "The server offers no channel binding, which the url requires.",
    hint: "It takes TLS and a password stored as scram-sha-256; channel_binding=prefer does without."
  })
