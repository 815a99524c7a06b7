/**
 * Whether the database answers, for readiness probes. A pool that can lend is asked; one that can't says nothing about
 * the database, which is then asked on a socket of its own, without logging in: no slot of the pool is needed.
 */
import * as Effect from "effect/Effect"
import { DbError } from "../DbError.js"
import type { EngineHealth } from "../DbEngine.js"
import type { EngineCore } from "./engine.js"
import { executeApart } from "./execute.js"
import { Backend, ProtocolViolation, readServerMessage } from "./protocol.js"
import { openSocket, secureSocket, sslRequest } from "./socket.js"
import type { Host } from "./wire.js"

/** What an engine remembers from one check to the next. */
interface Memory {
  status: EngineHealth["status"]
  since: Date
  lastError: EngineHealth["lastError"]
}

const memories = new WeakMap<EngineCore, Memory>()

const startup = (user: string, database: string | undefined): Buffer => {
  const pairs = ["user", user, ...(database === undefined ? [] : ["database", database]), "application_name", "health"]
  const body = Buffer.from(`${pairs.map((_) => `${_}\0`).join("")}\0`)
  const message = Buffer.alloc(8 + body.length)
  message.writeInt32BE(message.length, 0)
  message.writeInt32BE(196608, 4)
  body.copy(message, 8)
  return message
}

/** What a server answers to the first words of a connection, besides an error. */
const first = new Set<number>([Backend.Authentication, Backend.NegotiateProtocol])
/** To the wish for TLS: one letter, and it waits. */
const yesOrNo = /^[SN]$/

/**
 * As `pg_isready`: the first words of a connection, and what is answered to them. If a server says it, the server lives,
 * unless it says that it is not ready. Where TLS is wanted nothing is told in the clear but the wish for it.
 */
const ask = (engine: EngineCore, host: Host): Effect.Effect<void, DbError> =>
  Effect.async<void, DbError>((resume) => {
    const { database, direct, ssl, username } = engine.config.target
    const socket = openSocket(host, engine.config.options.stream)
    const done = (effect: Effect.Effect<void, DbError>): void => {
      socket.destroy()
      resume(effect)
    }
    const lost = (cause: unknown): void =>
      done(Effect.fail(DbError.fromSocket(cause, "connect", `${host.host}:${host.port}`)))
    socket.on("error", lost)
    socket.on("close", () => lost(new Error("the server closed the connection")))
    socket.once("connect", () => {
      if (!asksForTls) return socket.write(startup(username ?? "postgres", database))
      if (!direct) return socket.write(sslRequest)
      const options = { ...(ssl === true ? {} : ssl), rejectUnauthorized: false }
      const secure = secureSocket(socket, host.host, options, direct)
      secure.on("error", lost)
      return secure.once("secureConnect", () => done(Effect.void))
    })
    const chunks: Array<Buffer> = []
    const asksForTls = ssl !== undefined && ssl !== false
    socket.on("data", (chunk: Buffer) => {
      if (direct) return
      chunks.push(chunk)
      const answer = Buffer.concat(chunks)
      if (asksForTls ? yesOrNo.test(answer.toString("latin1")) : first.has(answer[0]!)) return done(Effect.void)
      if (answer[0] !== Backend.Error) return lost(new ProtocolViolation("an answer that no server gives"))
      // An ErrorResponse, which is an answer as well: too many clients, a wrong name, a role that may not log in.
      if (answer.length < 5) return
      const end = answer.readInt32BE(1) + 1
      if (end > 5 && answer.length < end) return
      try {
        const message = readServerMessage(answer, 5, end)
        done(
          message.code?.startsWith("57P") === true
            ? Effect.fail(DbError.fromServer(message, { phase: "connect" }))
            : Effect.void
        )
      } catch (cause) {
        lost(cause)
      }
    })
    return Effect.sync(() => void socket.destroy())
  })

const inTime = (engine: EngineCore, effect: Effect.Effect<unknown, DbError>): Effect.Effect<void, DbError> =>
  Effect.asVoid(
    // What is being cancelled on a connection that says nothing is not waited for.
    Effect.timeoutFail(Effect.disconnect(effect), {
      duration: engine.config.healthMillis,
      onTimeout: () =>
        DbError.make("ConnectionError", {
          phase: "connect",
          message: `The database did not answer within ${engine.config.healthMillis} ms.`,
          hint: "Check the server and the network; healthTimeout is the limit.",
          isRetryable: true,
          cause: engine.pool().connectError
        })
    })
  )

/** Without a wait: nobody who asks the pool is told "all are in use" instead of "it answers". */
const lends = (engine: EngineCore): boolean => {
  const { idle, max, pending, total } = engine.pool().stats
  return engine.closed || (!isSuspended(engine) && pending === 0 && (idle > 0 || total < max))
}

const isSuspended = (engine: EngineCore): boolean => engine.pool().suspended === true

const check = (engine: EngineCore): Effect.Effect<EngineHealth["asked"], readonly [EngineHealth["asked"], DbError]> => {
  const ofServer = inTime(engine, Effect.raceAll(engine.config.target.hosts.map((host) => ask(engine, host)))).pipe(
    Effect.as("server" as const),
    Effect.mapError((error) => ["server", error] as const)
  )
  if (!lends(engine)) return ofServer
  return Effect.catchAll(
    Effect.as(inTime(engine, executeApart(engine, "SELECT 1", [])), "pool" as const),
    // All connections may have been lent meanwhile.
    (error): ReturnType<typeof check> => (lends(engine) ? Effect.fail(["pool", error] as const) : ofServer)
  )
}

/** Never fails: what is wrong is in the record. @internal */
export const health = (engine: EngineCore): Effect.Effect<EngineHealth> =>
  Effect.suspend(() => {
    const began = performance.now()
    return Effect.map(Effect.either(check(engine)), (found): EngineHealth => {
      const now = new Date()
      const [asked, error] = found._tag === "Right" ? [found.right, undefined] : found.left
      const status = error === undefined ? "up" : "down"
      const before = memories.get(engine)
      const memory: Memory = {
        status,
        since: before?.status === status ? before.since : now,
        lastError: error === undefined ? before?.lastError : { error, at: now }
      }
      memories.set(engine, memory)
      return {
        ...memory,
        asked,
        tookMillis: Math.round(performance.now() - began),
        suspended: isSuspended(engine),
        host: engine.host,
        stats: engine.stats
      }
    })
  })
