/**
 * The sentences of errors: by SQLSTATE, by Node's codes, and by reason for whoever has nothing better to say.
 */
import type { ReasonTag } from "./reasons.js"

const conditions = new Map(
  `0A000 feature_not_supported 08000 connection_exception 08001 sqlclient_unable_to_establish_sqlconnection
08003 connection_does_not_exist 08004 sqlserver_rejected_establishment_of_sqlconnection 08006 connection_failure
08007 transaction_resolution_unknown 08P01 protocol_violation 0LP01 invalid_grant_operation
0P000 invalid_role_specification 21000 cardinality_violation 22000 data_exception 22001 string_data_right_truncation
22003 numeric_value_out_of_range 22004 null_value_not_allowed 22007 invalid_datetime_format 22008 datetime_field_overflow
22009 invalid_time_zone_displacement_value 2200H sequence_generator_limit_exceeded 22011 substring_error
22012 division_by_zero 22019 invalid_escape_character 22021 character_not_in_repertoire 22023 invalid_parameter_value
22025 invalid_escape_sequence 2201B invalid_regular_expression 2201W invalid_row_count_in_limit_clause
2201X invalid_row_count_in_result_offset_clause 22026 string_data_length_mismatch 2202E array_subscript_error
22030 duplicate_json_object_key_value 22032 invalid_json_text 22033 invalid_sql_json_subscript
22P01 floating_point_exception 22P02 invalid_text_representation 22P03 invalid_binary_representation
22P04 bad_copy_file_format 22P05 untranslatable_character 23000 integrity_constraint_violation 23001 restrict_violation
23502 not_null_violation 23503 foreign_key_violation 23505 unique_violation 23514 check_violation
23P01 exclusion_violation 24000 invalid_cursor_state 25000 invalid_transaction_state 25001 active_sql_transaction
25006 read_only_sql_transaction 25P01 no_active_sql_transaction 25P02 in_failed_sql_transaction
25P03 idle_in_transaction_session_timeout 25P04 transaction_timeout 26000 invalid_sql_statement_name
27000 triggered_data_change_violation 28000 invalid_authorization_specification 28P01 invalid_password
2BP01 dependent_objects_still_exist 2F003 prohibited_sql_statement_attempted 2F005 function_executed_no_return_statement
34000 invalid_cursor_name 38000 external_routine_exception 39000 external_routine_invocation_exception
3B001 invalid_savepoint_specification 3D000 invalid_catalog_name 3F000 invalid_schema_name 40000 transaction_rollback
40001 serialization_failure 40002 transaction_integrity_constraint_violation 40003 statement_completion_unknown
40P01 deadlock_detected 42000 syntax_error_or_access_rule_violation 42501 insufficient_privilege 42601 syntax_error
42602 invalid_name 42611 invalid_column_definition 42622 name_too_long 42701 duplicate_column 42702 ambiguous_column
42703 undefined_column 42704 undefined_object 42710 duplicate_object 42712 duplicate_alias 42723 duplicate_function
42725 ambiguous_function 42803 grouping_error 42804 datatype_mismatch 42809 wrong_object_type 42830 invalid_foreign_key
42846 cannot_coerce 42883 undefined_function 428C9 generated_always 42939 reserved_name 42P01 undefined_table
42P02 undefined_parameter 42P03 duplicate_cursor 42P04 duplicate_database 42P05 duplicate_prepared_statement
42P06 duplicate_schema 42P07 duplicate_table 42P08 ambiguous_parameter 42P09 ambiguous_alias
42P10 invalid_column_reference 42P16 invalid_table_definition 42P17 invalid_object_definition
42P18 indeterminate_datatype 42P19 invalid_recursion 42P20 windowing_error 42P21 collation_mismatch
42P22 indeterminate_collation 44000 with_check_option_violation 53000 insufficient_resources 53100 disk_full
53200 out_of_memory 53300 too_many_connections 53400 configuration_limit_exceeded 54000 program_limit_exceeded
54001 statement_too_complex 54011 too_many_columns 54023 too_many_arguments
55000 object_not_in_prerequisite_state 55006 object_in_use 55P02 cant_change_runtime_param 55P03 lock_not_available
55P04 unsafe_new_enum_value_usage 57000 operator_intervention 57014 query_canceled 57P01 admin_shutdown
57P02 crash_shutdown 57P03 cannot_connect_now 57P04 database_dropped 57P05 idle_session_timeout 58000 system_error
58030 io_error 58P01 undefined_file P0001 raise_exception P0002 no_data_found P0003 too_many_rows P0004 assert_failure
XX000 internal_error XX001 data_corrupted XX002 index_corrupted`
    .split(/\s+/)
    .reduce<Array<[string, string]>>((pairs, word, i, words) => {
      if (i % 2 === 1) pairs.push([words[i - 1]!, word])
      return pairs
    }, [])
)

/** PostgreSQL's own name of an SQLSTATE; a code that is not listed gets the name of its class. */
export const conditionName = (code: string): string | undefined =>
  conditions.get(code) ?? conditions.get(code.slice(0, 2) + "000")

/** What happened, where the SQLSTATE says more than its reason. */
export const sentencesByState: Record<string, string> = {
  "22001": "A value is longer than its column allows",
  "22012": "Division by zero",
  "25001": "This command cannot run inside a transaction",
  "25P03": "The transaction was idle for too long: the server ended it together with its connection",
  "2BP01": "Something else depends on it",
  "3D000": "The database does not exist",
  "3F000": "The statement names a schema that does not exist",
  "42601": "The statement has a syntax error",
  "42701": "A column of that name exists already",
  "42703": "The statement names a column that does not exist",
  "42704": "The statement names something that does not exist",
  "42710": "Something of that name exists already",
  "42883": "There is no function or operator of that name for these types",
  "42P01": "The statement names a table or view that does not exist",
  "42P06": "A schema of that name exists already",
  "42P07": "A table, view or index of that name exists already",
  "53300": "The server has no connection slot left",
  "57P01": "The server ended the connection: it is shutting down, or an administrator ended the backend",
  "57P02": "The server ended the connection: another backend crashed",
  "57P03": "The server accepts no connections now: it is starting, stopping or recovering",
  "57P04": "The server ended the connection: the database was dropped",
  "57P05": "The server ended the connection: it was idle for longer than idle_session_timeout"
}

/** What to do, where the SQLSTATE says more than its reason. */
export const hintsByState: Record<string, string> = {
  "0A000": "PostgreSQL does not do this here; error.serverError has its own words.",
  "08P01": "Client and server disagree about the protocol; see whether a proxy or pooler stands between them.",
  "22001": "Shorten it, or give the column a longer type.",
  "22003": "Check the value, or give the column or the cast a wider type.",
  "22007": "Pass a Date or an ISO 8601 string.",
  "22008": "Check the value; pass a Date or an ISO 8601 string.",
  "22012": "Guard the divisor with nullif(..., 0).",
  "22021": "The value has bytes that the database's encoding does not have.",
  "22P02": "Check what is passed, and the type that the statement gives it.",
  "22P05": "The value has characters that the encoding cannot express (\\u0000 in jsonb is one).",
  "25001": "Run it as an implicit statement, outside a session.",
  "25P01": "This command needs an open transaction.",
  "25P03": "Do slow work outside the transaction, or raise idleInTransactionTimeout.",
  "26000":
    "A pooler or a DISCARD dropped the prepared statement; set preparedStatements to false behind such a pooler.",
  "2BP01": "Drop what depends on it first, or use CASCADE.",
  "3B001": "The savepoint is gone; do not mix SAVEPOINT statements of your own with nested blocks.",
  "3D000": "Check the database name, and create the database if it is missing.",
  "42701": "Use ADD COLUMN IF NOT EXISTS, or another name.",
  "42710": "Drop it first, or use another name.",
  "42P01": "Check the name, the search_path and whether the migrations have run.",
  "42P06": "Use CREATE SCHEMA IF NOT EXISTS, or another name.",
  "42P07": "Use IF NOT EXISTS, or another name.",
  "42P18": "Cast the parameter, as in $1::text.",
  "53100": "Free disk space on the server.",
  "53200": "The server is out of memory; lower work_mem or the number of connections.",
  "53300": "Lower maxConnections, raise max_connections or the role's CONNECTION LIMIT, or use a pooler.",
  "53400": "Raise the server's limit that error.serverError names.",
  "54000": "The statement or row is over a limit of PostgreSQL; split it.",
  "54001": "Simplify the statement, or raise max_stack_depth.",
  "54023": "Pass fewer arguments, for example as one array.",
  "55006": "Something else uses the object; end those sessions first.",
  "57P03": "Wait until the server is ready.",
  P0001: "A function or trigger raised this; its own words are in error.serverError.",
  XX000: "An internal error of the server; its log says more.",
  XX001: "The server found damaged data; stop writing and check the disk and backups.",
  XX002: "An index is damaged; REINDEX it and check the disk."
}

/** Of a value that its type refuses. */
const valueSentences: Record<string, (value: string, type: string) => string> = {
  "22003": (value, type) => `${value} is outside the range of ${type}`,
  "22007": (value, type) => `${value} does not have the form of ${type}`,
  "22008": (value) => `${value} has a part of a date or time that is out of range`,
  "22P02": (value, type) => `${value} does not have the form of ${type}`
}

/** Types that may be named: in that place of what RAISE says, anything may stand. */
const namedTypes = new Set(
  (
    "bigint,bit,boolean,box,bytea,cidr,circle,date,double precision,inet,integer,interval,json,jsonb,jsonpath,line,lseg," +
    "macaddr,macaddr8,money,numeric,oid,path,point,polygon,pg_lsn,real,smallint,tid,time,time with time zone,timestamp," +
    "timestamp with time zone,tsquery,tsvector,uuid,xid,xid8"
  ).split(",")
)

const typeIn = /for type ([a-z0-9_ ]+)(?=:|$)|^([a-z ]+) (?:out of range|field overflow)$/

/** The server says it in the context of the error, on a line of its own, with the value behind it. */
const parameterIn = /^(?:unnamed portal|portal "[^"\n]*") parameter (\$\d{1,5})(?: = |$)/m

/** Which parameter, and which type, has been refused: never the value, which the server's own words quote. */
export const valueSentence = (code: string, message = "", where = ""): string | undefined => {
  const [, parameter] = parameterIn.exec(where) ?? []
  const [, first, second] = typeIn.exec(message) ?? []
  const type = first ?? second
  return valueSentences[code]?.(
    parameter === undefined ? "A value" : `Parameter ${parameter}`,
    type !== undefined && namedTypes.has(type) ? `type ${type}` : "its type"
  )
}

/** Of a setting that does not exist, and what to do. */
export const settingSentence = (name: string, shown: boolean): [sentence: string, hint: string] => [
  `There is no setting ${shown ? `"${name}"` : "of that name"}`,
  name.includes(".")
    ? "Set it before it is read, or read it with current_setting(name, true), which gives NULL."
    : `One of your own has a dot in its name: "app.${shown ? name : "name"}".`
]

export const miscountedHint = "Count $1, $2, ... in its text and the values that it is given; each needs the other."

/** What stands at `$1` in a place where PostgreSQL takes no parameter. */
export const misplacedHint =
  "A value stands where none may. Use sql.in(column, values) for a list, sql(name) for a name."

/**
 * Of a start-up packet, with 28000, and what PgBouncer says, all of it with 08P01; whether the same again can do no harm, as
 * nothing has reached a server.
 */
export const startupSentences: ReadonlyArray<
  readonly [says: RegExp, sentence: string, hint: string, harmless: boolean]
> = [
  [
    /^no PostgreSQL user name specified/,
    "No user name was given",
    "Set username, put it into url, or set PGUSER.",
    false
  ],
  [
    /^unsupported startup parameter/,
    "The pooler refuses a start-up parameter of the connection",
    "statementTimeout, lockTimeout and the like are start-up parameters: give them to sessions and transactions " +
      "instead of the engine, or set ignore_startup_parameters in the pooler, which then drops them.",
    false
  ],
  [
    /^query_wait_timeout/,
    "The pooler had no server connection free within its query_wait_timeout",
    "The statement was not run. Hold transactions for shorter, or raise the pooler's default_pool_size.",
    true
  ],
  [
    /^no more connections allowed/,
    "The pooler lets in no more clients",
    "Lower maxConnections, or raise the pooler's max_client_conn.",
    true
  ],
  [
    /cannot connect to server|server login has been failing/,
    "The pooler can't reach the server behind it",
    "The statement was not run. See whether that server is up, and the pooler's log.",
    true
  ]
]

/** What happened to a socket, and what to do. */
export const socketSentences: Record<string, readonly [what: string, hint: string]> = {
  ECONNREFUSED: ["nothing accepts connections there", "Start PostgreSQL, or check host, port and listen_addresses."],
  ENOTFOUND: ["the host's name does not resolve", "Check the host's name."],
  EAI_AGAIN: ["the name server did not answer", "Check the network and the DNS settings."],
  ETIMEDOUT: ["there was no answer in time", "Check firewalls and routes, or raise connectTimeout."],
  EHOSTUNREACH: ["there is no route to the host", "Check the network."],
  ENETUNREACH: ["there is no route to the network", "Check the network."],
  EADDRNOTAVAIL: ["no local port is free, or the address is not of this machine", "Open fewer connections at once."],
  ECONNRESET: ["the other side reset the connection", "See the server's log; a proxy or pooler may have cut it."],
  ECONNABORTED: ["the connection was cut off", "See the server's log; a proxy or pooler may have cut it."],
  EPIPE: ["the other side had already closed the connection", "See the server's log; a proxy may have closed it."],
  ENOENT: ["there is no such socket file", "Start PostgreSQL, or check the directory given as host and the port."],
  EACCES: ["the socket may not be opened", "Check the permissions of the socket file."],
  EMFILE: ["this process has too many open files", "Raise the limit of open files, or close what is leaked."],
  ERR_WORKER_EXIT: [
    "the thread that holds the connections of runSync has ended",
    "Look for what ends it: its memory, or a module that the process preloads. The next call starts another."
  ]
}

/** Why TLS failed. */
export const tlsSentences: Record<string, string> = {
  DEPTH_ZERO_SELF_SIGNED_CERT: "its certificate is self-signed",
  SELF_SIGNED_CERT_IN_CHAIN: "its certificate chain has a self-signed one that is not trusted",
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: "the issuer of its certificate is not trusted",
  UNABLE_TO_GET_ISSUER_CERT: "the issuer of its certificate is not known",
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: "the issuer of its certificate is not known",
  CERT_HAS_EXPIRED: "its certificate has expired",
  CERT_NOT_YET_VALID: "its certificate is not valid yet",
  CERT_REVOKED: "its certificate was revoked",
  ERR_TLS_CERT_ALTNAME_INVALID: "its certificate is for another host"
}

/**
 * What a reason says by default.
 */
export const reasonDefaults: {
  readonly [Tag in ReasonTag]: { readonly message: string; readonly hint: string; readonly isRetryable?: true }
} = {
  ConnectionError: {
    message: "The connection was refused or lost",
    hint: "Check that the server runs and can be reached; see its log."
  },
  AuthenticationError: {
    message: "The server refused the credentials",
    hint: "Check the user, the password and pg_hba.conf."
  },
  AuthorizationError: {
    message: "The role may not do this",
    hint: "GRANT the role what it needs, or use another role."
  },
  SqlSyntaxError: {
    message: "The server could not make sense of the statement",
    hint: "Check the statement, the names in it and the types of its parameters."
  },
  UniqueViolation: {
    message: "A row with the same key exists already",
    hint: "Catch UniqueViolation, or use INSERT ... ON CONFLICT."
  },
  ForeignKeyViolation: {
    message: "The rows no longer refer to each other as they must",
    hint: "Insert what is referred to first, and delete it last."
  },
  NotNullViolation: {
    message: "A value is missing where null is not allowed",
    hint: "Give the column a value or a default."
  },
  CheckViolation: {
    message: "A row does not satisfy a check",
    hint: "Check the values against the constraint's definition."
  },
  ExclusionViolation: {
    message: "The row conflicts with an existing one",
    hint: "Catch ExclusionViolation, or look for the conflicting row first."
  },
  SerializationError: {
    message: "The transaction conflicts with a concurrent one",
    hint: "Do the whole transaction again; the option `retry: true` does.",
    isRetryable: true
  },
  DeadlockError: {
    message: "Two transactions waited for each other's locks, and the server ended this one",
    hint: "Do the whole transaction again (`retry: true`), and take locks in one order everywhere.",
    isRetryable: true
  },
  LockTimeoutError: {
    message: "A lock was not free in time",
    hint: "Try again later, hold locks for shorter, or raise lockTimeout.",
    isRetryable: true
  },
  StatementTimeoutError: {
    message: "The statement was over its time limit, and the server cancelled it",
    hint: "Make the statement cheaper (EXPLAIN ANALYZE), or raise statementTimeout.",
    isRetryable: true
  },
  ReadOnlyError: {
    message: "The transaction or the server is read only",
    hint: 'Write in a session without readOnly, on the primary (targetSessionAttrs: "read-write").'
  },
  QueryCanceled: {
    message: "The statement was cancelled",
    hint: "Its fiber was interrupted, or an administrator cancelled it."
  },
  TransactionTimeout: {
    message: "The transaction took too long: the server ended it together with its connection",
    hint: "Do slow work outside the transaction, or raise transactionTimeout."
  },
  AcquireTimeout: {
    message: "No connection became free in time",
    hint: "Hold connections for shorter, or raise maxConnections.",
    isRetryable: true
  },
  PoolClosed: {
    message: "The engine is closed",
    hint: "Run this within the scope of the engine's layer."
  },
  SessionClosed: {
    message: "The session has ended",
    hint: "Join or await what outlived it first, or run it with DbSession.detach."
  },
  SessionBusy: {
    message: "Another block of the session did not end in time",
    hint: "Do not wait inside a block for a fiber that needs the session; DbSession.isolated gives it its own."
  },
  ConnectionReleased: {
    message: "The connection was given back",
    hint: "Acquire a connection of its own for work that outlives this one."
  },
  TransactionClosed: {
    message: "The transaction has ended",
    hint: "Run this inside the block, or open a new one."
  },
  NoSession: {
    message: "There is no ambient session",
    hint: "Wrap the effect in DbSession.autocommit, or provide DbSession.layer."
  },
  PropagationError: {
    message: "The transaction does not fit the one around it",
    hint: "Check the propagation and the options of the block."
  },
  TransactionAborted: {
    message: "Nothing was committed: the transaction had failed before",
    hint: "Let the first error fail the block, or run what may fail in a nested block of its own."
  },
  CommitUnknown: {
    message: "The connection was lost before the server told whether it has committed",
    hint: "Look in the database before doing it again; the option `verifyOutcome` does."
  },
  InvalidInput: {
    message: "The input cannot be sent",
    hint: "Check the input; nothing was sent, and the connection is unharmed."
  },
  NoResultFound: {
    message: "The query found no row",
    hint: "Use DbQuery.oneOrNone or DbQuery.first if that is fine."
  },
  MultipleResultsFound: {
    message: "The query found several rows where one was wanted",
    hint: "Make the condition unique, or use DbQuery.first."
  },
  ReplicaBehind: {
    message: "The standby has not come to the commit in time",
    hint: "Read from the primary, or wait longer.",
    isRetryable: true
  },
  UnknownError: {
    message: "The database reported an error",
    hint: "error.serverError has its own words; they may quote values."
  }
}
