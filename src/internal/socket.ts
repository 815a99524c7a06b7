/**
 * A socket to the server for something else than a session: a CancelRequest, the question whether it lives. Opened and
 * secured as `pg` does for sessions, so that it gets where they get.
 */
import * as Net from "node:net"
import type { Duplex } from "node:stream"
import * as Tls from "node:tls"
import type { ConnectionOptions } from "node:tls"
import type { Host } from "./wire.js"

/** Connecting; `stream` is the option of that name: what it throws is an error of the socket. @internal */
export const openSocket = ({ host, port }: Host, stream: (() => Duplex) | undefined): Net.Socket => {
  let socket: Net.Socket
  try {
    socket = stream === undefined ? new Net.Socket() : (stream() as Net.Socket)
  } catch (cause) {
    return new Net.Socket().destroy(cause as Error)
  }
  socket.setNoDelay(true)
  if (host.startsWith("/")) socket.connect(`${host}/.s.PGSQL.${port}`)
  else socket.connect(port, host)
  return socket
}

/** The wish for TLS, which is all that is said in the clear. @internal */
export const sslRequest = Buffer.from([0, 0, 0, 8, 4, 210, 22, 47])

/** TLS on a socket whose server has agreed to it, or is taken to (`direct`). @internal */
export const secureSocket = (
  socket: Net.Socket,
  host: string,
  ssl: true | ConnectionOptions,
  direct: boolean
): Tls.TLSSocket =>
  Tls.connect({
    ...(ssl === true ? {} : ssl),
    socket,
    ...(direct ? { ALPNProtocols: ["postgresql"] } : {}),
    ...(Net.isIP(host) === 0 ? { servername: host } : {}),
    host
  })
