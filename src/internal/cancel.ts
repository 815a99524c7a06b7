/**
 * CancelRequest: a connection of its own that says which backend to interrupt, and is closed by the server once
 * the signal has been sent. Over TLS when the session is, so that the secret is not sent in the clear.
 */
import type * as Net from "node:net"
import type { Duplex } from "node:stream"
import type { ConnectionOptions } from "node:tls"
import { deadline } from "./deadline.js"
import { openSocket, secureSocket, sslRequest } from "./socket.js"
import type { Host } from "./wire.js"

/** @internal */
export interface CancelTarget extends Host {
  readonly ssl: boolean | ConnectionOptions | undefined
  readonly direct?: boolean | undefined
  readonly stream?: (() => Duplex) | undefined
  readonly pid: number
  readonly secret: number
}

const request = (pid: number, secret: number): Buffer => {
  const message = Buffer.allocUnsafe(16)
  message.writeInt32BE(16, 0)
  message.writeInt32BE(80877102, 4)
  message.writeInt32BE(pid, 8)
  message.writeInt32BE(secret, 12)
  return message
}

/** Calls back once: when the server has closed the connection, or with what went wrong. @internal */
export const sendCancel = (target: CancelTarget, timeoutMillis: number, done: (error?: Error) => void): void => {
  let finished = false
  const socket = openSocket(target, target.stream)
  const finish = (error?: Error): void => {
    if (finished) return
    finished = true
    stop()
    socket.destroy()
    done(error)
  }
  const stop = deadline(timeoutMillis, () => finish(new Error("the cancel request was not taken in time")))
  socket.on("error", finish)
  socket.on("close", () => finish())
  const send = (stream: Net.Socket): void => {
    stream.resume()
    stream.write(request(target.pid, target.secret))
  }
  socket.once("connect", () => {
    const { direct = false, host, ssl } = target
    if (ssl === undefined || ssl === false) return send(socket)
    const secure = (): void => {
      const stream = secureSocket(socket, host, ssl, direct)
      stream.on("error", finish)
      stream.once("secureConnect", () => send(stream))
    }
    if (direct) return secure()
    socket.write(sslRequest)
    socket.once("data", (answer: Buffer) => {
      if (answer[0] === 0x53) secure()
      else finish(new Error("the server does not offer TLS for the cancel request"))
    })
  })
}
