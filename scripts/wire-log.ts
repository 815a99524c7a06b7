/**
 * Tells what a proxy has recorded in lines for people: which statements travelled together on which connection, where a
 * transaction began and ended, and what the server answered.
 */
import type { Logged } from "../test/support/proxyLink.js"

/** What the client sent up to a Sync, and what came back for it. */
interface Group {
  readonly statements: Array<string>
  readonly answers: Array<string>
}

class Conversation {
  private current: Group = { statements: [], answers: [] }
  private readonly waiting: Array<Group> = []
  private inTransaction = false

  constructor(private readonly name: string) {}

  hear({ dir, name, text, type }: Logged): string | undefined {
    return dir === "frontend" ? this.asked(type, name, text) : this.answered(type, name, text)
  }

  private asked(type: string, name: string, text: string): string | undefined {
    switch (type) {
      case "startup":
        return `${this.name}   connects`
      case "cancel":
        return `${this.name}   cancels what backend ${name} is doing`
      case "Q":
      case "E":
        this.current.statements.push(short(text))
        if (type === "E") return undefined
    }
    if (type === "Q" || type === "S") {
      this.waiting.push(this.current)
      this.current = { statements: [], answers: [] }
    }
    return undefined
  }

  private answered(type: string, name: string, text: string): string | undefined {
    const group = this.waiting[0] ?? this.current
    if (type === "C" || type === "I") group.answers.push(text)
    if (type === "E") group.answers.push(`${name} ${text}`)
    if (type !== "Z") return undefined
    const before = this.inTransaction
    this.inTransaction = text !== "I"
    this.waiting.shift()
    if (group.statements.length === 0) return undefined
    const sign = before ? (this.inTransaction ? "│" : "└") : this.inTransaction ? "┌" : "─"
    return `${this.name} ${sign} ${told(group.statements, " + ")} → ${told(group.answers, ", ")}`
  }
}

/** Joined, and what is said several times in a row said once. */
export const told = (texts: ReadonlyArray<string>, between: string): string => {
  const runs: Array<{ readonly text: string; times: number }> = []
  for (const text of texts) {
    const last = runs.at(-1)
    if (last?.text === text) last.times++
    else runs.push({ text, times: 1 })
  }
  return runs.map(({ text, times }) => (times === 1 ? text : `${text} (${times} times)`)).join(between)
}

const longest = 100

/** On one line, and not too long a one. */
const short = (sql: string): string => {
  const text = sql.replace(/\s+/g, " ").trim()
  return text.length > longest ? `${text.slice(0, longest - 3)}...` : text
}

export class WireLog {
  private read = 0
  private readonly conversations = new Map<number, Conversation>()

  constructor(private readonly log: ReadonlyArray<Logged>) {}

  /** How many connections there have been. */
  get connections(): number {
    return this.conversations.size
  }

  /** What has happened since the last time. */
  *lines(): Generator<string> {
    for (; this.read < this.log.length; this.read++) {
      const message = this.log[this.read]!
      let conversation = this.conversations.get(message.conn)
      if (conversation === undefined) {
        conversation = new Conversation(`#${this.conversations.size + 1}`)
        this.conversations.set(message.conn, conversation)
      }
      const line = conversation.hear(message)
      if (line !== undefined) yield line
    }
  }
}
