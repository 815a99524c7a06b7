/**
 * A socket whose bytes arrive in one buffer of its own. By default Node makes a new one of 64 kB for each read and cuts
 * it down, which costs more than what is done with the few bytes of most answers.
 */
import { Socket } from "node:net"
import type { SocketConstructorOpts } from "node:net"

/** Given the buffer, and how much of its beginning has arrived. It is only valid during the call. @internal */
export type OnBytes = (buffer: Buffer, length: number) => void

/** As much as Node reads at once. */
const size = 65536

/** @internal */
export class DirectSocket extends Socket {
  /** Who reads; nothing: whoever uses it as any other stream, such as `pg`'s client, and gets copies to keep. */
  reader: OnBytes | undefined = undefined

  constructor() {
    const buffer = Buffer.allocUnsafeSlow(size)
    super({
      onread: {
        buffer,
        callback: (length: number): boolean => {
          if (this.reader === undefined) return this.push(Buffer.from(buffer.subarray(0, length)))
          this.reader(buffer, length)
          return true
        }
      }
    } as SocketConstructorOpts)
  }
}
