/**
 * CancelRequest: a connection of its own that says which backend to interrupt, and is closed by the server once
 * the signal has been sent. Over TLS when the session is, so that the secret is not sent in the clear.
 */
import * as Net from "node:net"
import * as Tls from "node:tls"
import type { ConnectionOptions } from "node:tls"
import { deadline } from "./deadline.js"

/** @internal */
export interface CancelTarget {
  readonly host: string
  readonly port: number
  readonly ssl: boolean | ConnectionOptions | undefined
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

const sslRequest = (): Buffer => {
  const message = Buffer.allocUnsafe(8)
  message.writeInt32BE(8, 0)
  message.writeInt32BE(80877103, 4)
  return message
}

/** Calls back once: when the server has closed the connection, or with what went wrong. @internal */
export const sendCancel = (target: CancelTarget, timeoutMillis: number, done: (error?: Error) => void): void => {
  let finished = false
  const socket = target.host.startsWith("/")
    ? Net.connect(`${target.host}/.s.PGSQL.${target.port}`)
    : Net.connect(target.port, target.host)
  const finish = (error?: Error): void => {
    if (finished) return
    finished = true
    stop()
    socket.destroy()
    done(error)
  }
  const stop = deadline(timeoutMillis, () => finish(new Error("the cancel request was not taken in time")))
  socket.setNoDelay(true)
  socket.on("error", finish)
  socket.on("close", () => finish())
  const send = (stream: Net.Socket): void => {
    stream.resume()
    stream.write(request(target.pid, target.secret))
  }
  socket.once("connect", () => {
    if (target.ssl === undefined || target.ssl === false) return send(socket)
    socket.write(sslRequest())
    socket.once("data", (answer: Buffer) => {
      if (answer[0] !== 0x53) return finish(new Error("the server does not offer TLS for the cancel request"))
      const secure = Tls.connect({
        ...(typeof target.ssl === "object" ? target.ssl : {}),
        socket,
        ...(Net.isIP(target.host) === 0 ? { servername: target.host } : {}),
        host: target.host
      })
      secure.on("error", finish)
      secure.once("secureConnect", () => send(secure))
    })
  })
}
