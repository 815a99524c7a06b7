/** What the service refuses, and with which status. Each of them rolls back the session of its request. */
import { Data } from "effect"

export class BadInput extends Data.TaggedError("BadInput")<{ readonly message: string }> {
  readonly status = 400
}

export class NotFound extends Data.TaggedError("NotFound")<{ readonly message: string }> {
  readonly status = 404
}

export class NameTaken extends Data.TaggedError("NameTaken")<{ readonly message: string }> {
  readonly status = 409
}

export class TooLarge extends Data.TaggedError("TooLarge")<{ readonly message: string }> {
  readonly status = 413
}

export class Overdrawn extends Data.TaggedError("Overdrawn")<{ readonly message: string }> {
  readonly status = 422
}

export class KeyReused extends Data.TaggedError("KeyReused")<{ readonly message: string }> {
  readonly status = 422
}

export type Refusal = BadInput | NotFound | NameTaken | TooLarge | Overdrawn | KeyReused
