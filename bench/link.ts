/**
 * A slow link to the server: a TCP relay in a thread of its own that holds every answer back, so that a round trip
 * takes that much longer. Requests pass at once; the two directions add up to the delay.
 */
import * as Net from "node:net"
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads"

interface Target {
  readonly host: string
  readonly port: number
  readonly millis: number
}

const relay = ({ host, millis, port }: Target): void => {
  const server = Net.createServer({ noDelay: true }, (client) => {
    const upstream = Net.connect({ host, port, noDelay: true })
    const close = () => {
      client.destroy()
      upstream.destroy()
    }
    client.on("data", (chunk) => upstream.write(chunk))
    upstream.on("data", (chunk) => {
      setTimeout(() => client.write(chunk), millis)
    })
    for (const socket of [client, upstream]) socket.on("error", close).on("close", close)
  })
  server.listen(0, "127.0.0.1", () => parentPort!.postMessage((server.address() as Net.AddressInfo).port))
}

if (!isMainThread) relay(workerData as Target)

/** A URL of the same database behind the link. */
export const slowLink = async (
  url: string,
  millis: number
): Promise<{ readonly url: string; readonly close: () => Promise<unknown> }> => {
  const slow = new URL(url)
  const target: Target = { host: slow.hostname, port: Number(slow.port || 5432), millis }
  const worker = new Worker(new URL(import.meta.url), { workerData: target })
  const port = await new Promise<number>((resolve, reject) => worker.once("message", resolve).once("error", reject))
  slow.hostname = "127.0.0.1"
  slow.port = String(port)
  return { url: slow.href, close: () => worker.terminate() }
}
