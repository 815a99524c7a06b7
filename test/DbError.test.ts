import { assert, describe, expect, expectTypeOf, it } from "@effect/vitest"
import { SqlError } from "@effect/sql/SqlError"
import { Cause, Effect, Exit, FastCheck as fc } from "effect"
import { inspect } from "node:util"
import type { ReasonTag } from "../src/DbError.js"
import type { UniqueViolation } from "../src/Reasons.js"
import { DbError } from "../src/DbError.js"
import type { ErrorContext, ServerError } from "../src/internal/sqlState.js"
import { connectionIsLost, redactSql } from "../src/internal/sqlState.js"

const reasonOf = (fields: ServerError, context?: ErrorContext) => DbError.fromServer(fields, context).reason

const fromState = (code: string, context?: ErrorContext) => reasonOf({ code, severity: "ERROR" }, context)

/** Every way in which an error gets printed. */
const renderings = (error: unknown): ReadonlyArray<string> => {
  const traced = Effect.runSyncExit(Effect.fail(error).pipe(Effect.withSpan("span")))
  const cause = Exit.isFailure(traced) ? traced.cause : Cause.empty
  return [
    String(error),
    (error as Error).message,
    (error as Error).stack!,
    JSON.stringify(error),
    inspect(error, { depth: 10 }),
    inspect(error, { depth: 10, showHidden: true, getters: true, showProxy: true }),
    inspect({ error: [error] }, { depth: 10 }),
    JSON.stringify(Object.entries(error as object)),
    Cause.pretty(Cause.fail(error), { renderErrorCause: true }),
    Cause.pretty(Cause.die(error), { renderErrorCause: true }),
    Cause.pretty(cause, { renderErrorCause: true }),
    inspect(Cause.prettyErrors(cause), { depth: 10 }),
    inspect(traced, { depth: 10 }),
    String(traced),
    JSON.stringify(traced)
  ]
}

const states = (
  "08006 0A000 22001 22P02 23502 23503 23505 23514 23P01 25006 25P02 28P01 3D000 3F000 40001 40P01 42501 42601 42703 " +
  "42704 42883 42P01 42P07 44000 53200 53300 55P03 57014 57P01 57P03 P0001 XX000 99999"
).split(" ")

// long enough that no sentence of ours can hold it by chance
const secret = fc.stringMatching(/^[a-z]{4,8}[0-9]{8}[A-Za-z']{4}$/)

describe("DbError", () => {
  it("is a SqlError, so that programs for the ecosystem handle it", () => {
    const error = DbError.make("NoSession", {})
    assert.instanceOf(error, SqlError)
    assert.instanceOf(error, Error)
    assert.strictEqual(error._tag, "SqlError")
  })

  it.effect("is caught by its tag SqlError", () =>
    Effect.gen(function* () {
      const caught = yield* Effect.fail(DbError.make("NoSession", {})).pipe(
        Effect.catchTag("SqlError", (error) => Effect.succeed(error.reason._tag))
      )
      assert.strictEqual(caught, "NoSession")
    })
  )

  it.effect("can be yielded as an effect that fails with it", () =>
    Effect.gen(function* () {
      const error = DbError.make("NoSession", {})
      assert.strictEqual(yield* Effect.flip(error), error)
    })
  )

  it("says what happened and what to do in its message", () => {
    const error = DbError.make("SessionClosed", { message: "The session orders has ended.", hint: "Open another." })
    assert.strictEqual(error.message, "The session orders has ended. Open another.")
    assert.strictEqual(error.reason.message, "The session orders has ended.")
    assert.strictEqual(error.reason.hint, "Open another.")
  })

  it("has words of its own for each reason", () => {
    const error = DbError.make("ConnectionReleased", {})
    assert.isAbove(error.reason.message.length, 10)
    assert.isAbove(error.reason.hint.length, 10)
  })

  it("keeps what its raiser adds to the reason", () => {
    const { reason } = DbError.make("AcquireTimeout", { waited: 5000, holders: [{ name: "orders", millis: 4000 }] })
    assert(reason._tag === "AcquireTimeout")
    assert.deepStrictEqual(reason.holders, [{ name: "orders", millis: 4000 }])
    assert.strictEqual(reason.waited, 5000)
  })

  it("has no keys for what is not known", () => {
    assert.deepStrictEqual(Object.keys(DbError.make("UnknownError", { sqlState: undefined }).reason).sort(), [
      "_tag",
      "hint",
      "isRetryable",
      "message"
    ])
  })

  it("is recognized when a span has wrapped it", () => {
    const exit = Effect.runSyncExit(Effect.fail(DbError.fromServer({ code: "40001" })).pipe(Effect.withSpan("span")))
    assert(Exit.isFailure(exit) && Cause.isFailType(exit.cause))
    const { error } = exit.cause
    assert.isTrue(DbError.is(error))
    assert.isTrue(DbError.isRetryable(error))
    assert.deepStrictEqual(error.serverError, { code: "40001" })
  })

  describe("TransactionAborted", () => {
    it("has the first error as its cause, once", () => {
      const firstError = DbError.fromServer({ code: "23505", severity: "ERROR", constraint: "users_key" })
      const error = DbError.make("TransactionAborted", { firstError, statement: "INSERT INTO users DEFAULT VALUES" })
      assert(error.reason._tag === "TransactionAborted")
      assert.strictEqual(error.cause, firstError)
      assert.strictEqual(error.reason.firstError, firstError)
      assert.include(error.message, "users_key")
      assert.include(JSON.stringify(error), '"cause"')
      assert.notInclude(JSON.stringify(error.reason), "firstError")
    })

    it("can be done again if what it failed with can", () => {
      const aborted = (code: string) =>
        DbError.make("TransactionAborted", { firstError: DbError.fromServer({ code }) }).isRetryable
      assert.isTrue(aborted("40001"))
      assert.isFalse(aborted("23505"))
    })

    it("shows the statement without its literals", () => {
      const { reason } = DbError.make("TransactionAborted", { statement: "ALTER ROLE ada PASSWORD 'hunter2'" })
      assert(reason._tag === "TransactionAborted")
      assert.strictEqual(reason.statement, "ALTER ROLE ada PASSWORD '...'")
    })

    it("is what a statement gets that was sent behind a failed one", () => {
      const first = DbError.fromServer({ code: "40P01" })
      const error = DbError.skipped(first)
      assert.strictEqual(error.reason._tag, "TransactionAborted")
      assert.strictEqual(error.cause, first)
    })
  })
})

describe("redactSql", () => {
  it.each([
    ["SELECT 'a', b FROM \"it's\" WHERE c = 'd''e'", "SELECT '...', b FROM \"it's\" WHERE c = '...'"],
    ["SELECT 1 -- don't\nWHERE a = 'b'", "SELECT ? \nWHERE a = '...'"],
    ["SELECT 1 /* don't */ WHERE a = 'b'", "SELECT ?  WHERE a = '...'"],
    ["SELECT E'it\\'s', 1", "SELECT '...', ?"],
    ["SELECT $$it's$$, $tag$ 'x' $tag$, $1", "SELECT '...', '...', $1"],
    ["SELECT 1/0, 4111111111111111, -1.5e10, .5, 0xFF, 1_000", "SELECT ?/?, ?, -?, ?, ?, ?"],
    ['SELECT t1.a2, "4 b", x::numeric(10, 2), $1 LIMIT 5', 'SELECT t1.a2, "4 b", x::numeric(?, ?), $1 LIMIT ?'],
    ["SELECT 'never closed", "SELECT '...'"],
    ["SELECT a$1 FROM t WHERE b = $2", "SELECT a$1 FROM t WHERE b = $2"]
  ])("masks the literals of %s", (text, masked) => {
    assert.strictEqual(redactSql(text), masked)
  })

  it("bounds the length, also of hostile text", () => {
    assert.isBelow(redactSql("'".repeat(1_000_001)).length, 1100)
    assert.isBelow(redactSql("/*".repeat(1_000_000)).length, 1100)
  })
})

describe("what the server said", () => {
  it.each([
    ["23505", "UniqueViolation"],
    ["23503", "ForeignKeyViolation"],
    ["23001", "ForeignKeyViolation"],
    ["23502", "NotNullViolation"],
    ["23514", "CheckViolation"],
    ["44000", "CheckViolation"],
    ["23P01", "ExclusionViolation"],
    ["40001", "SerializationError"],
    ["40P01", "DeadlockError"],
    ["40003", "CommitUnknown"],
    ["55P03", "LockTimeoutError"],
    ["57014", "QueryCanceled"],
    ["25P02", "TransactionAborted"],
    ["25P03", "TransactionTimeout"],
    ["25P04", "TransactionTimeout"],
    ["25006", "ReadOnlyError"],
    ["28000", "AuthenticationError"],
    ["28P01", "AuthenticationError"],
    ["42501", "AuthorizationError"],
    ["3D000", "AuthorizationError"],
    ["42601", "SqlSyntaxError"],
    ["42P01", "SqlSyntaxError"],
    ["3F000", "SqlSyntaxError"],
    ["08006", "ConnectionError"],
    ["53300", "ConnectionError"],
    ["57P01", "ConnectionError"],
    ["57P02", "ConnectionError"],
    ["57P03", "ConnectionError"],
    ["57P05", "ConnectionError"],
    ["53100", "UnknownError"],
    ["22P02", "UnknownError"],
    ["25001", "UnknownError"],
    ["P0001", "UnknownError"],
    ["ZZ999", "UnknownError"]
  ] satisfies ReadonlyArray<[string, ReasonTag]>)("%s is a %s", (code, tag) => {
    const reason = fromState(code)
    assert.strictEqual(reason._tag, tag)
    assert.strictEqual(reason.sqlState, code)
    assert.include(reason.message, code)
    assert.isAbove(reason.hint.length, 10)
  })

  it("carries the fields of the answer", () => {
    const error = DbError.fromServer({
      code: "23505",
      severity: "ERROR",
      schema: "public",
      table: "users",
      column: "email",
      constraint: "users_email_key",
      dataType: "citext",
      routine: "_bt_check_unique",
      position: "7"
    })
    expect(error.reason).toMatchObject({
      _tag: "UniqueViolation",
      sqlState: "23505",
      condition: "unique_violation",
      severity: "ERROR",
      schema: "public",
      table: "users",
      column: "email",
      constraint: "users_email_key",
      dataType: "citext",
      routine: "_bt_check_unique",
      position: 7
    })
  })

  it("names the condition, the constraint and the table in the message", () => {
    const { message } = reasonOf({ code: "23505", constraint: "users_email_key", schema: "app", table: "users" })
    assert.include(message, "users_email_key")
    assert.include(message, "app.users")
    assert.include(message, "unique_violation")
  })

  it("names the class of a condition that is not known", () => {
    assert.strictEqual(fromState("22ZZZ").condition, "data_exception")
    assert.isUndefined(fromState("ZZ999").condition)
  })

  it("is told apart from a statement timeout by the text", () => {
    const message = "canceling statement due to statement timeout"
    assert.strictEqual(reasonOf({ code: "57014", message })._tag, "StatementTimeoutError")
    assert.strictEqual(reasonOf({ code: "57014", message }, { canceledByUs: true })._tag, "StatementTimeoutError")
    const request = "canceling statement due to user request"
    assert.strictEqual(reasonOf({ code: "57014", message: request }, { canceledByUs: false })._tag, "QueryCanceled")
  })

  it("is told apart from a statement timeout by our own cancel, where the text is translated", () => {
    const message = "storniere Anfrage wegen Zeitüberschreitung der Anfrage"
    assert.strictEqual(reasonOf({ code: "57014", message }, { canceledByUs: false })._tag, "StatementTimeoutError")
    assert.strictEqual(reasonOf({ code: "57014", message }, { canceledByUs: true })._tag, "QueryCanceled")
  })

  it("is a lost connection if it is not an answer of PostgreSQL's", () => {
    const reason = reasonOf({ message: "received invalid response: 48" })
    assert(reason._tag === "ConnectionError")
    assert.strictEqual(reason.phase, "read")
    assert.isFalse(reason.isRetryable)
  })

  it("is a connection error for whatever refuses the login", () => {
    const reason = fromState("XX000", { phase: "connect", where: "db:5432" })
    assert(reason._tag === "ConnectionError")
    assert.strictEqual(reason.address, "db:5432")
    assert.isTrue(reason.isRetryable)
    assert.isFalse(fromState("22023", { phase: "connect" }).isRetryable)
  })

  it("says how to give a user name, where there was none", () => {
    const message = "no PostgreSQL user name specified in startup packet"
    const error = DbError.fromServer({ code: "28000", severity: "FATAL", message }, { phase: "connect" })
    assert.strictEqual(error.reason._tag, "AuthenticationError")
    assert.match(error.message, /^No user name was given.* Set username, put it into url, or set PGUSER\.$/)
  })

  it.each([
    ["unsupported startup parameter: statement_timeout", "The pooler refuses a start-up parameter", false],
    ["query_wait_timeout", "query_wait_timeout", true],
    ["no more connections allowed (max_client_conn)", "The pooler lets in no more clients", true],
    ["pgbouncer cannot connect to server", "The pooler can't reach the server behind it", true],
    ["server login has been failing, try again later (server_login_retry)", "The pooler can't reach", true]
  ])("tells what a pooler says: %s", (message, text, retryable) => {
    const reason = reasonOf({ code: "08P01", severity: "FATAL", message }, { phase: "connect" })
    assert(reason._tag === "ConnectionError")
    assert.include(reason.message, text)
    assert.strictEqual(reason.isRetryable, retryable)
  })

  describe("can be done again", () => {
    it.each(["40001", "40P01", "55P03", "53300", "57P03"])("after %s", (code) => {
      assert.isTrue(fromState(code).isRetryable)
    })

    it.each(["23505", "40003", "57014", "57P01", "08006", "25P04", "42601", "28P01", "53100", "25006"])(
      "but not after %s",
      (code) => {
        assert.isFalse(fromState(code).isRetryable)
      }
    )

    it("after a lost connection, if the caller knows that nothing was done", () => {
      assert.isTrue(fromState("57P01", { retryable: true }).isRetryable)
      assert.isFalse(fromState("57P03", { phase: "connect", retryable: false }).isRetryable)
    })

    it("on another host, if this one stopped taking writes", () => {
      assert.isTrue(fromState("25006", { targetReadWrite: true }).isRetryable)
    })
  })

  describe("is shown in the server's words only if these can hold no value", () => {
    const shown = (fields: ServerError, context?: ErrorContext) => reasonOf(fields, context).message

    it("when it is about a place in the statement", () => {
      const fields = { code: "42703", message: 'column "emial" does not exist', position: "8" }
      assert.include(shown(fields), '"emial"')
      assert.include(shown(fields, { statement: "SELECT emial FROM users" }), '"emial"')
    })

    it("with the server's hint", () => {
      const hint = 'Perhaps you meant to reference the column "users.email".'
      const fields = { code: "42703", message: 'column "emial" does not exist', position: "8", hint }
      assert.strictEqual(reasonOf(fields).hint, hint)
      assert.notStrictEqual(reasonOf({ ...fields, position: undefined }).hint, hint)
    })

    it("when each of its words is PostgreSQL's or the statement's", () => {
      const fields = { code: "42501", message: "permission denied for table users" }
      assert.include(shown(fields, { statement: "SELECT * FROM users" }), "denied for table users")
      assert.notInclude(shown(fields, { statement: "SELECT * FROM view_of_it" }), "table users")
    })

    it("but not for a name that came as a parameter", () => {
      const fields = { code: "42P01", message: 'relation "hunter2" does not exist' }
      assert.notInclude(shown(fields, { statement: "SELECT $1::regclass" }), "hunter2")
    })

    it("but not for a name that came as a literal", () => {
      const fields = { code: "42P01", message: 'relation "hunter2" does not exist', position: "8" }
      assert.notInclude(shown(fields, { statement: "SELECT 'hunter2'::regclass" }), "hunter2")
      assert.notInclude(shown(fields, { statement: "SELECT E'hunter2'::regclass" }), "hunter2")
      assert.notInclude(shown(fields, { statement: "SELECT $$hunter2$$::regclass" }), "hunter2")
    })

    it("but not for a position in another text", () => {
      const fields = { code: "42601", message: 'syntax error at or near "hunter2"', position: "8" }
      const where = 'invalid type name "a hunter2"'
      const inner = reasonOf({ ...fields, where }, { statement: "SELECT to_regtype($1)" })
      assert.notInclude(inner.message, "hunter2")
      assert.isUndefined(inner.position)
      assert.isUndefined(reasonOf({ ...fields, internalQuery: "SELECT a hunter2" }).position)
    })

    it("but not for what RAISE says", () => {
      const fields = { code: "42P01", message: "hunter2" }
      assert.notInclude(
        shown(fields, { statement: "DO $$ BEGIN RAISE 'hunter2' USING ERRCODE = '42P01'; END $$" }),
        "hunter2"
      )
    })

    it("at login, where it names the role and the database that were asked for", () => {
      const fields = { code: "28P01", message: 'password authentication failed for user "ada"' }
      assert.include(shown(fields, { phase: "connect" }), '"ada"')
      assert.notInclude(shown(fields), '"ada"')
    })
  })

  describe("of a value that its type refuses", () => {
    const portal = "unnamed portal parameter $2 = '...'"
    it.each([
      [
        "22P02",
        'invalid input syntax for type integer: "hunter2"',
        portal,
        "Parameter $2 does not have the form of type integer"
      ],
      [
        "22P02",
        "invalid input syntax for type json",
        `JSON data, line 1: hunter2\n${portal}`,
        "Parameter $2 does not have the form of type json"
      ],
      [
        "22P02",
        'invalid input value for enum mood: "hunter2"',
        portal,
        "Parameter $2 does not have the form of its type"
      ],
      [
        "22P02",
        'invalid input syntax for type integer: "hunter2"',
        undefined,
        "A value does not have the form of type integer"
      ],
      ["22P02", 'invalid input syntax for type hunter2: "1"', undefined, "A value does not have the form of its type"],
      [
        "22003",
        'value "1hunter2" is out of range for type bigint',
        portal,
        "Parameter $2 is outside the range of type bigint"
      ],
      ["22003", "integer out of range", undefined, "A value is outside the range of type integer"],
      ["22003", "numeric field overflow", undefined, "A value is outside the range of type numeric"],
      [
        "22007",
        'invalid input syntax for type timestamp with time zone: "hunter2"',
        portal,
        "Parameter $2 does not have the form of type timestamp with time zone"
      ],
      [
        "22008",
        'date/time field value out of range: "hunter2"',
        portal,
        "Parameter $2 has a part of a date or time that is out of range"
      ],
      [
        "22P02",
        "hunter2",
        "unnamed portal with parameters: $1 = 'hunter2'",
        "A value does not have the form of its type"
      ],
      ["22P02", "m", 'SQL statement "SELECT $1"', "A value does not have the form of its type"]
    ])("%s names the parameter and the type, not the value: %s", (code, message, where, sentence) => {
      const error = DbError.fromServer({ code, severity: "ERROR", message, where }, { statement: "SELECT $1, $2" })
      assert.isTrue(error.message.startsWith(`${sentence} (`), error.message)
      assert.include(error.message, `SQLSTATE ${code})`)
      for (const rendering of renderings(error)) assert.notInclude(rendering, "hunter2")
    })
  })

  it.each([
    ["22012", "Division by zero (division_by_zero, SQLSTATE 22012)."],
    ["25001", "This command cannot run inside a transaction (active_sql_transaction, SQLSTATE 25001)."],
    ["2BP01", "Something else depends on it (dependent_objects_still_exist, SQLSTATE 2BP01)."],
    ["22001", "A value is longer than its column allows (string_data_right_truncation, SQLSTATE 22001)."]
  ])("says of %s what it means", (code, text) => {
    assert.include(DbError.fromServer({ code, severity: "ERROR" }).message, text)
  })

  it("has what the statement names behind what is wrong with it", () => {
    const message = 'relation "users" does not exist'
    const { reason } = DbError.fromServer(
      { code: "42P01", severity: "ERROR", message, position: "15" },
      { statement: "SELECT * FROM users" }
    )
    assert.strictEqual(
      reason.message,
      `The statement names a table or view that does not exist: ${message} (undefined_table, SQLSTATE 42P01)`
    )
  })

  describe("has the statement", () => {
    const failed = (statement: string, code = "23505") => DbError.fromServer({ code, severity: "ERROR" }, { statement })

    it("that has failed, without its literals and numbers, whatever the reason", () => {
      for (const code of states) {
        const error = failed("INSERT INTO cards VALUES ($1, 'hunter2', 4111) -- hunter2", code)
        assert.strictEqual(error.reason.statement, "INSERT INTO cards VALUES ($1, '...', ?)")
        for (const rendering of renderings(error)) assert.notInclude(rendering, "hunter2")
      }
    })

    it("but not at login", () => {
      const { reason } = DbError.fromServer({ code: "28P01" }, { statement: "x", phase: "connect" })
      assert.notProperty(reason, "statement")
    })

    it("shortened, if it is long", () => {
      assert.isBelow(failed(`SELECT ${"a, ".repeat(100_000)}`).reason.statement!.length, 1100)
    })
  })

  describe("of a setting that does not exist", () => {
    const message = 'unrecognized configuration parameter "tenant"'
    const of = (context: ErrorContext, name = "tenant") =>
      DbError.fromServer({ code: "42704", severity: "ERROR", message: message.replace("tenant", name) }, context)
        .message

    it("names it, if the program did, and what such a name needs", () => {
      const text =
        'There is no setting "tenant" (undefined_object, SQLSTATE 42704). One of your own has a dot in its name: "app.tenant".'
      assert.strictEqual(of({ statement: "SELECT set_config($1,$2,true)", names: ["tenant", "acme"] }), text)
      assert.strictEqual(of({ statement: "SET tenant = 'acme'" }), text)
    })

    it("does not name it, if it came as a value", () => {
      for (const statement of ["SELECT set_config($1,$2,true)", "SELECT current_setting('tenant')"]) {
        assert.include(of({ statement }), "There is no setting of that name")
        assert.notInclude(of({ statement }), "tenant")
      }
    })

    it("of one with a dot says that it has not been set", () => {
      assert.include(of({ statement: "SHOW app.tenant" }, "app.tenant"), 'no setting "app.tenant"')
      assert.include(of({ statement: "SHOW app.tenant" }, "app.tenant"), "Set it before it is read")
    })
  })

  describe("of a syntax error", () => {
    it("at a value says what to use for lists and names", () => {
      const hint = "A value stands where none may. Use sql.in(column, values) for a list, sql(name) for a name."
      for (const statement of ["SELECT * FROM t WHERE id IN $1", "SELECT * FROM $12"]) {
        const position = String(statement.indexOf("$") + 1)
        const fields = { code: "42601", routine: "scanner_yyerror", message: "m", position }
        assert.strictEqual(reasonOf(fields, { statement }).hint, hint)
        assert.notStrictEqual(reasonOf({ ...fields, position: "1" }, { statement }).hint, hint)
      }
    })

    const near = (statement: string | undefined, position: number, message = "Syntaxfehler", offset?: number) =>
      reasonOf(
        { code: "42601", routine: "scanner_yyerror", message, position: String(position) },
        { statement, offset }
      ).message

    it("is about a place in our text, whatever the server's language", () => {
      assert.include(near("SELECT 1 FORM t", 10), 'at or near "FORM", position 10')
      assert.include(near("SELECT (", 9), "at end of input")
    })

    it("counts characters, not UTF-16 units", () => {
      assert.include(near("SELECT '😀', x FORM t", 15), '"FORM"')
    })

    it("counts from the text, not from what was sent before it", () => {
      assert.include(near("SELECT 1 FORM t", 17, "Syntaxfehler", 7), '"FORM", position 10')
    })

    it("never shows a literal", () => {
      const message = `syntax error at or near "'hunter2'"`
      assert.notInclude(near("SELECT 1 'hunter2'", 10, message), "hunter2")
      assert.notInclude(near(undefined, 10, message), "hunter2")
      assert.notInclude(near("SELECT 1 4711", 10, 'syntax error at or near "4711"'), "4711")
    })

    it("is about the server's word, if that is one, where our text is not known", () => {
      assert.include(near(undefined, 1, 'syntax error at or near "selct"'), '"selct"')
    })
  })

  describe("stays reachable and unseen", () => {
    it("is error.serverError, as it came", () => {
      const fields = { code: "23505", message: "m", detail: "Key (email)=(a@b.c) already exists." }
      assert.strictEqual(DbError.fromServer(fields).serverError, fields)
    })

    it("has its code and its names, but not its text, in error.cause", () => {
      const cause = DbError.fromServer({
        code: "23505",
        severity: "ERROR",
        message: "m",
        detail: "d",
        table: "users"
      }).cause
      assert.instanceOf(cause, Error)
      assert.strictEqual(cause.message, "23505 unique_violation")
      expect((cause as Error & ServerError).code).toBe("23505")
      expect((cause as Error & ServerError).table).toBe("users")
      assert.notProperty(cause, "detail")
    })

    it("is not enumerable", () => {
      assert.sameMembers(Object.keys(DbError.fromServer({ code: "23505", severity: "ERROR" })), ["_tag", "reason"])
    })

    it("is in no rendering, whatever the SQLSTATE and the statement", () => {
      fc.assert(
        fc.property(
          secret,
          fc.constantFrom(...states),
          fc.constantFrom(undefined, "SELECT 1 FORM users", "INSERT INTO users (email) VALUES ($1)"),
          fc.constantFrom(
            'Key (email)=("S") exists',
            'invalid input syntax for type integer: "S"',
            'relation "S" does not exist',
            "S"
          ),
          fc.constantFrom(
            "S",
            "unnamed portal parameter $1 = 'S'",
            "JSON data, line 1: S\nunnamed portal parameter $1 = 'S'"
          ),
          (value, code, statement, template, where) => {
            const text = template.replace("S", value)
            const error = DbError.fromServer(
              {
                code,
                severity: "ERROR",
                message: text,
                detail: text,
                hint: text,
                where: where.replace(/\bS\b/g, value),
                internalQuery: `SELECT '${value}'`,
                table: "users"
              },
              { statement }
            )
            for (const rendering of renderings(error)) assert.notInclude(rendering, value)
            assert.include((error.serverError as ServerError).detail!, value)
          }
        ),
        { numRuns: 300 }
      )
    })

    it("is in no rendering of an error that was caused by it", () => {
      fc.assert(
        fc.property(secret, (value) => {
          const first = DbError.fromServer({ code: "23505", severity: "ERROR", message: value, detail: value })
          const thrown = Object.assign(new Error(value), { input: value })
          for (const error of [
            DbError.make("TransactionAborted", {
              firstError: first,
              statement: `SELECT '${value.replaceAll("'", "''")}'`
            }),
            DbError.make("UnknownError", { cause: thrown }),
            DbError.make("CommitUnknown", { cause: first })
          ]) {
            for (const rendering of renderings(error)) assert.notInclude(rendering, value)
          }
        }),
        { numRuns: 100 }
      )
    })
  })
})

describe("what the socket said", () => {
  const socketError = (code: string) => Object.assign(new Error(`connect ${code} 10.0.0.1:5432`), { code })

  it.each(["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ECONNRESET", "EPIPE", "EHOSTUNREACH", "ENOENT"])(
    "%s while connecting can be done again, and is explained",
    (code) => {
      const { reason } = DbError.fromSocket(socketError(code), "connect", "db:5432")
      assert(reason._tag === "ConnectionError")
      assert.strictEqual(reason.phase, "connect")
      assert.strictEqual(reason.code, code)
      assert.isTrue(reason.isRetryable)
      assert.include(reason.message, "db:5432")
      assert.isAbove(reason.hint.length, 10)
    }
  )

  it.each(["send", "read", "commit"] as const)("while it was in phase %s it may have been done", (phase) => {
    assert.isFalse(DbError.fromSocket(socketError("ECONNRESET"), phase).isRetryable)
    assert.isTrue(DbError.fromSocket(socketError("ECONNRESET"), phase, undefined, true).isRetryable)
  })

  it.each(["DEPTH_ZERO_SELF_SIGNED_CERT", "CERT_HAS_EXPIRED", "ERR_TLS_CERT_ALTNAME_INVALID", "EPROTO"])(
    "%s is about TLS, and the same again would not help",
    (code) => {
      const { reason } = DbError.fromSocket(socketError(code), "connect", "db:5432")
      assert.strictEqual(reason._tag, "ConnectionError")
      assert.include(reason.message, "TLS")
      assert.isFalse(reason.isRetryable)
    }
  )

  it.each([
    "SASL: SCRAM-SERVER-FIRST-MESSAGE: client password must be a string",
    "SASL: SCRAM-SERVER-FINAL-MESSAGE: server signature does not match",
    "Password must be a string"
  ])("%s is an AuthenticationError", (text) => {
    assert.strictEqual(DbError.fromSocket(new Error(text), "connect").reason._tag, "AuthenticationError")
  })

  it("is what pg says, if these are words of its own", () => {
    const { message } = DbError.fromSocket(new Error("Connection terminated unexpectedly"), "read").reason
    assert.include(message, "terminated unexpectedly")
  })

  it("is mapped as an answer if it is one", () => {
    const cause = Object.assign(new Error("x"), { code: "28P01", severity: "FATAL" })
    assert.strictEqual(DbError.fromSocket(cause, "connect").reason._tag, "AuthenticationError")
  })

  it("is itself if it is a DbError already", () => {
    const error = DbError.make("PoolClosed", {})
    assert.strictEqual(DbError.fromSocket(error, "read"), error)
  })

  it("is in no rendering where it could hold a secret", () => {
    fc.assert(
      fc.property(secret, fc.constantFrom(undefined, "ERR_INVALID_URL", "ENOTFOUND"), (value, code) => {
        const cause = Object.assign(new TypeError(`Invalid URL: postgres://ada:${value}@db/app`), {
          input: `postgres://ada:${value}@db/app`,
          ...(code === undefined ? {} : { code })
        })
        const error = DbError.fromSocket(cause, "connect", "db:5432")
        for (const rendering of renderings(error)) assert.notInclude(rendering, value)
        assert.strictEqual(error.serverError, cause)
      }),
      { numRuns: 50 }
    )
  })
})

describe("connectionIsLost", () => {
  it.each([
    { message: "no code" },
    { code: "XX000", severity: "FATAL" },
    { code: "XX000", severity: "PANIC" },
    { code: "08006", severity: "ERROR" },
    { code: "57P01", severity: "WARNING" },
    { code: "57P05", severity: "FATAL" },
    { code: "25P03", severity: "FATAL" },
    { code: "25P04", severity: "FATAL" },
    { code: "26000", severity: "ERROR" },
    { code: "40001", severity: "FATAL" },
    { code: "0A000", severity: "ERROR", message: "cached plan must not change result type" },
    { code: "0A000", severity: "ERROR", message: "übersetzt", routine: "RevalidateCachedQuery" }
  ] satisfies ReadonlyArray<ServerError>)("for %o", (fields) => {
    assert.isTrue(connectionIsLost(fields))
  })

  it.each(["0A000", "23505", "25P02", "40001", "40P01", "42601", "53200", "55P03", "57014", "XX000", "25006"])(
    "not for an ERROR with %s",
    (code) => {
      assert.isFalse(connectionIsLost({ code, severity: "ERROR", message: "any" }))
    }
  )

  it("for a refused write only if the engine wants a writable host", () => {
    assert.isTrue(connectionIsLost({ code: "25006", severity: "ERROR" }, { readWriteTarget: true }))
    assert.isFalse(connectionIsLost({ code: "25006", severity: "ERROR" }, { readWriteTarget: false }))
  })
})

describe("DbError.reason and DbError.isRetryable", () => {
  it("answer for a DbError", () => {
    const error = DbError.make("DeadlockError", {})
    assert.strictEqual(DbError.reason(error), error.reason)
    assert.isTrue(DbError.isRetryable(error))
  })

  it.each([undefined, null, "text", 1, {}, new Error("x"), new SqlError({ cause: { code: "40001" } })])(
    "answer for %s, which is not ours",
    (error) => {
      assert.isUndefined(DbError.reason(error))
      assert.isFalse(DbError.isRetryable(error))
      assert.isFalse(DbError.is(error))
    }
  )

  it.effect("can be handed over as they are", () =>
    Effect.gen(function* () {
      let tries = 0
      const exit = yield* Effect.suspend(() =>
        Effect.fail(DbError.make(++tries < 3 ? "DeadlockError" : "NoSession", {}))
      ).pipe(Effect.retry({ while: DbError.isRetryable, times: 5 }), Effect.exit)
      assert.isTrue(Exit.isFailure(exit))
      assert.strictEqual(tries, 3)
    })
  )
})

const unique: Effect.Effect<number, SqlError> = Effect.fail(
  DbError.fromServer({ code: "23505", constraint: "users_email_key" })
)

describe("DbError.catchReason", () => {
  it.effect("hands the reason and the error to its handler, data first", () =>
    Effect.gen(function* () {
      const caught = yield* DbError.catchReason(unique, "UniqueViolation", (reason, error) => {
        assert.strictEqual(error.reason, reason)
        return Effect.succeed(reason.constraint)
      })
      assert.strictEqual(caught, "users_email_key")
    })
  )

  it.effect("hands the reason and the error to its handler, data last", () =>
    Effect.gen(function* () {
      const caught = yield* unique.pipe(
        DbError.catchReason("UniqueViolation", (reason) => Effect.succeed(reason.constraint))
      )
      assert.strictEqual(caught, "users_email_key")
    })
  )

  it.effect("catches an error that a span has wrapped", () =>
    Effect.gen(function* () {
      const caught = yield* unique.pipe(
        Effect.withSpan("insert"),
        DbError.catchReason("UniqueViolation", (reason) => Effect.succeed(reason.constraint))
      )
      assert.strictEqual(caught, "users_email_key")
    })
  )

  it.effect("lets other failures pass with their whole cause", () =>
    Effect.gen(function* () {
      const handle = DbError.catchReason("DeadlockError", () => Effect.succeed("handled"))
      const both = unique.pipe(Effect.ensuring(Effect.die("finalizer")))
      assert.deepStrictEqual(yield* Effect.exit(handle(both)), yield* Effect.exit(both))
      assert.strictEqual(yield* Effect.flip(handle(Effect.fail("mine"))), "mine")
      assert.deepStrictEqual(yield* Effect.exit(handle(Effect.die("defect"))), Exit.die("defect"))
      const plain = new SqlError({ cause: { code: "40P01" } })
      assert.strictEqual(yield* Effect.flip(handle(Effect.fail(plain))), plain)
    })
  )

  it("infers the reason, and adds what the handler does to the types", () => {
    const first = DbError.catchReason(unique, "UniqueViolation", (reason, error) => {
      expectTypeOf(reason).toEqualTypeOf<UniqueViolation>()
      expectTypeOf(error).toEqualTypeOf<DbError>()
      return Effect.fail("taken" as const)
    })
    expectTypeOf(first).toEqualTypeOf<Effect.Effect<number, SqlError | "taken">>()
    const last = unique.pipe(DbError.catchReason("UniqueViolation", (reason) => Effect.succeed(reason.constraint)))
    expectTypeOf(last).toEqualTypeOf<Effect.Effect<number | string | undefined, SqlError>>()
    // @ts-expect-error: there is no such reason
    DbError.catchReason(unique, "UniqueViolatoin", () => Effect.void)
  })
})

describe("DbError.catchReasons", () => {
  const handle = DbError.catchReasons({
    UniqueViolation: (reason) => Effect.succeed(reason.constraint),
    AcquireTimeout: (reason) => Effect.succeed(reason.holders.length)
  })

  it.effect("calls the handler of the reason", () =>
    Effect.gen(function* () {
      assert.strictEqual(yield* handle(unique), "users_email_key")
      const timeout = DbError.make("AcquireTimeout", { waited: 1, holders: [] })
      assert.strictEqual(yield* handle(Effect.fail(timeout)), 0)
      assert.strictEqual(
        yield* DbError.catchReasons(unique, { UniqueViolation: () => Effect.succeed("first") }),
        "first"
      )
    })
  )

  it.effect("lets other failures pass", () =>
    Effect.gen(function* () {
      const error = DbError.make("NoSession", {})
      assert.strictEqual(yield* Effect.flip(handle(Effect.fail(error))), error)
      assert.strictEqual(yield* Effect.flip(handle(Effect.fail("mine"))), "mine")
    })
  )

  it("infers each reason, and adds what the handlers do to the types", () => {
    const handled = DbError.catchReasons(unique, {
      UniqueViolation: (reason, error) => {
        expectTypeOf(reason).toEqualTypeOf<UniqueViolation>()
        expectTypeOf(error).toEqualTypeOf<DbError>()
        return Effect.fail("taken" as const)
      },
      SessionBusy: (reason) => Effect.succeed(reason.block)
    })
    expectTypeOf(handled).toEqualTypeOf<Effect.Effect<number | string | undefined, SqlError | "taken">>()
    expectTypeOf(unique.pipe(handle)).toEqualTypeOf<Effect.Effect<number | string | undefined, SqlError>>()
    // @ts-expect-error: there is no such reason
    DbError.catchReasons(unique, { UniqueViolatoin: () => Effect.void })
  })
})
