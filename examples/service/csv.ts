/** CSV, a line at a time: fields may be quoted, and no field goes over the end of a line. */
import { Chunk, Data, Effect, Stream } from "effect"

export class BadLine extends Data.TaggedError("BadLine")<{ readonly line: number; readonly message: string }> {}

const maxLine = 10_000

/** The fields of one line; nothing when its quotes make no sense. */
export const fields = (line: string): ReadonlyArray<string> | undefined => {
  if (!line.includes('"')) return line.split(",")
  const found: Array<string> = []
  const field = /(?:"((?:[^"]|"")*)"|([^",]*))(,|$)/y
  for (;;) {
    const match = field.exec(line)
    if (match === null) return undefined
    found.push(match[1] === undefined ? match[2]! : match[1].replaceAll('""', '"'))
    if (match[3] === "") return found
  }
}

export const row = (values: ReadonlyArray<string | null>): string =>
  `${values.map((value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value)).join(",")}\n`

/** Reads the lines of a text as they come, each by `parse`, which is told its number; holds no more than one of them. */
export const lines = <E, A>(
  bytes: Stream.Stream<Uint8Array, E>,
  parse: (text: string, line: number) => A | BadLine | undefined
): Stream.Stream<A, E | BadLine> =>
  Stream.suspend(() => {
    const decoder = new TextDecoder("utf-8", { fatal: true })
    let rest = ""
    let line = 0
    const read = (bytes: Uint8Array | undefined): Effect.Effect<Chunk.Chunk<A>, BadLine> =>
      Effect.suspend(() => {
        try {
          rest += decoder.decode(bytes, { stream: bytes !== undefined })
        } catch {
          return new BadLine({ line: line + 1, message: "is not UTF-8" })
        }
        const texts = rest.split("\n")
        rest = bytes === undefined ? "" : texts.pop()!
        const parsed: Array<A> = []
        for (const text of texts) {
          line++
          const one = parse(text.endsWith("\r") ? text.slice(0, -1) : text, line)
          if (one instanceof BadLine) return one
          if (one !== undefined) parsed.push(one)
        }
        return rest.length > maxLine
          ? new BadLine({ line: line + 1, message: `is longer than ${maxLine} characters` })
          : Effect.succeed(Chunk.unsafeFromArray(parsed))
      })
    return bytes.pipe(
      Stream.mapEffect(read),
      Stream.concat(Stream.fromEffect(Effect.suspend(() => read(undefined)))),
      Stream.flattenChunks
    )
  })
