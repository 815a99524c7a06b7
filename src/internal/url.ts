/**
 * A PostgreSQL URL. Read here, because `pg-connection-string` knows one host only, and because nothing of a password
 * may be taken for a host: what its file parameters and `sslmode` mean is asked there.
 */
import type { ConnectionOptions } from "node:tls"
import * as Pg from "pg"
import * as ConnectionString from "pg-connection-string"

/** What a url says; what it leaves empty is not there. */
export interface UrlParts {
  readonly hosts: ReadonlyArray<{ readonly host: string | undefined; readonly port: string | undefined }>
  readonly user: string | undefined
  readonly password: string | undefined
  readonly database: string | undefined
  readonly parameters: ReadonlyMap<string, string>
}

const tlsParameters = ["ssl", "sslmode", "sslcert", "sslkey", "sslrootcert", "uselibpqcompat"]

const known = new Set([
  ...["user", "password", "host", "port", "dbname", ...tlsParameters, "sslnegotiation"],
  ...["application_name", "fallback_application_name", "options", "client_encoding"],
  ...["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"],
  ...["connect_timeout", "target_session_attrs", "load_balance_hosts", "keepalives", "keepalives_idle"],
  "channel_binding"
])

/** A `%` that stands for itself is read as one. */
const decode = (text: string): string => decodeURIComponent(text.replace(/%(?![0-9a-f]{2})/gi, "%25"))

/** `undefined`: it is none, or it can't be told what is what. */
export const parseUrl = (url: string): UrlParts | undefined => {
  // `@` and `,` may stand in a password as they are: the last `@` ends it. `/` and `?` may not.
  const match = /^postgres(?:ql)?:\/\/([^/?]*)([^?#]*)(?:\?([^#]*))?/.exec(url.trim())
  if (match === null) return undefined
  const [, authority = "", path = "", query = ""] = match
  const at = authority.lastIndexOf("@")
  const parameters = new Map([...new URLSearchParams(query)].filter(([, value]) => value !== ""))
  const foreign = [...parameters].filter(([name]) => !known.has(name)).flat()
  // A password that was cut in two: its second half would be shown as something else.
  if (at === -1 && [path, ...foreign].some((_) => _.includes("@"))) return undefined
  try {
    const [, user = "", password = ""] = /^([^:]*):?([^]*)$/.exec(authority.slice(0, Math.max(at, 0)))!
    const hosts = hostsOf(authority.slice(at + 1), parameters)
    if (hosts === undefined) return undefined
    return {
      hosts,
      user: parameters.get("user") ?? (decode(user) || undefined),
      password: parameters.get("password") ?? (decode(password) || undefined),
      database: parameters.get("dbname") ?? (decode(path.slice(1)) || undefined),
      parameters
    }
  } catch {
    // What is encoded is no UTF-8.
    return undefined
  }
}

/** As for libpq, one port is that of all hosts, and several are as many as the hosts. */
const hostsOf = (authority: string, parameters: UrlParts["parameters"]): UrlParts["hosts"] | undefined => {
  const places = authority === "" ? [] : authority.split(",")
  const parts = places.flatMap((place) => [...place.matchAll(/^(?:\[([^\]]+)\]|([^:[\]]*))(?::(.*))?$/g)])
  if (parts.length < places.length) return undefined
  const hosts = parameters.get("host")?.split(",") ?? parts.map(([, v6, host = ""]) => decode(v6 ?? host))
  const ports = parameters.get("port")?.split(",") ?? parts.map(([, , , port = ""]) => port)
  if (ports.length > 1 && ports.length !== hosts.length) return undefined
  return Array.from({ length: Math.max(hosts.length, ports.length) }, (_, i) => ({
    host: hosts[i] || undefined,
    port: ports[ports.length === 1 ? 0 : i] || undefined
  }))
}

/** As for libpq, an empty one is none. */
export const env = (name: string): string | undefined => process.env[name] || undefined

/** Those of libpq's variables that say what a parameter of the url does. */
const variables = Object.entries({
  application_name: "PGAPPNAME",
  connect_timeout: "PGCONNECT_TIMEOUT",
  options: "PGOPTIONS",
  target_session_attrs: "PGTARGETSESSIONATTRS",
  load_balance_hosts: "PGLOADBALANCEHOSTS",
  channel_binding: "PGCHANNELBINDING",
  sslnegotiation: "PGSSLNEGOTIATION"
})

const files = Object.entries({ sslrootcert: "PGSSLROOTCERT", sslcert: "PGSSLCERT", sslkey: "PGSSLKEY" })

const found = (names: ReadonlyArray<readonly [string, string]>): ReadonlyArray<readonly [string, string]> =>
  names.flatMap(([name, variable]) => {
    const value = env(variable)
    return value === undefined ? [] : [[name, value] as const]
  })

/** The parameters of the url, before those of the environment. */
export const withEnvironment = (parameters: UrlParts["parameters"]): UrlParts["parameters"] =>
  new Map([...found(variables), ...parameters])

/** As `pg` reads it, which takes any other word for none; `undefined`: nothing. */
const modeOfEnvironment = (): string | undefined => {
  const mode = env("PGSSLMODE")
  switch (mode) {
    case undefined:
    case "allow":
      return undefined
    case "disable":
    case "no-verify":
      return mode
    case "prefer":
    case "require":
    case "verify-ca":
    case "verify-full":
      return "verify-full"
    default:
      throw new Error("PGSSLMODE")
  }
}

/**
 * What the url says of TLS, as `pg` takes it, or else the environment. Its files are those of a url that names none, but
 * for one with `ssl`, which libpq does not know. Throws where a file can't be read.
 */
export const sslOf = (parameters: UrlParts["parameters"]): boolean | ConnectionOptions | undefined => {
  const given = new Map([...parameters].filter(([name]) => tlsParameters.includes(name)))
  const silent = [...given.keys()].every((name) => name === "uselibpqcompat")
  const mode = silent ? modeOfEnvironment() : given.get("sslmode")
  if (mode !== undefined) given.set("sslmode", mode)
  if (!given.has("ssl") && mode !== "disable") {
    for (const [name, file] of found(files)) if (!given.has(name)) given.set(name, file)
  }
  // Node's own authorities.
  if (given.get("sslrootcert") === "system") {
    given.delete("sslrootcert")
    given.set("sslmode", "verify-full")
  }
  const ssl: unknown = ConnectionString.parse(`postgres://?${new URLSearchParams([...given])}`).ssl
  switch (ssl) {
    case "false":
      return false
    case "no-verify":
      return { rejectUnauthorized: false }
    default:
      if (typeof ssl === "string") throw new Error("ssl")
      return (ssl as boolean | ConnectionOptions | undefined) ?? Pg.defaults.ssl
  }
}

/** Names of parameters that mean nothing here. */
export const ignoredOf = (parameters: UrlParts["parameters"]): ReadonlyArray<string> =>
  [...parameters]
    .filter(([name, value]) => !known.has(name) || (name === "client_encoding" && !/^(?:utf-?8|auto)$/i.test(value)))
    .map(([name]) => name)

/** They ask for more safety than there would be, or for another server. */
const notRead = [
  ...["PGREQUIRESSL", "PGREQUIREAUTH", "PGREQUIREPEER", "PGSSLCERTMODE", "PGSSLCRL", "PGSSLCRLDIR"],
  ...["PGSSLMINPROTOCOLVERSION", "PGSSLMAXPROTOCOLVERSION", "PGSERVICE", "PGHOSTADDR"]
]

/** Names of variables that libpq would take notice of. */
export const ignoredVariables = (): ReadonlyArray<string> => [
  ...notRead.filter((name) => env(name) !== undefined),
  ...(env("PGGSSENCMODE") === "require" ? ["PGGSSENCMODE"] : [])
]
