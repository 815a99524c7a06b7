/**
 * The parts of a statement's text that are no code: literals, quoted names, comments.
 */

const parts =
  /--[^\n\r]*|\/\*|"[^"]*(?:"|$)|\b[eE]'(?:[^'\\]|\\[\s\S]|'')*(?:'|$)|'[^']*(?:''[^']*)*(?:'|$)|(?<![\p{L}\p{N}_$])\$([\p{L}_][\p{L}\p{N}_]*)?\$[\s\S]*?(?:\$\1\$|$)/gu

const edges = /\/\*|\*\//g

/** Where a comment ends that is open there: comments nest. */
const commentEnd = (text: string, from: number): number => {
  let depth = 1
  edges.lastIndex = from
  for (let edge = edges.exec(text); edge !== null; edge = edges.exec(text)) {
    depth += edge[0] === "/*" ? 1 : -1
    if (depth === 0) return edges.lastIndex
  }
  return text.length
}

/** A text without its literals and comments, and on request without the names in quotes. */
export const withoutLiterals = (text: string, literal = "'...'", comment = "", name?: string): string => {
  let code = ""
  let at = 0
  parts.lastIndex = 0
  for (let part = parts.exec(text); part !== null; part = parts.exec(text)) {
    const [found] = part
    code += text.slice(at, part.index)
    if (found === "/*") parts.lastIndex = commentEnd(text, parts.lastIndex)
    code += found.startsWith('"') ? (name ?? found) : /^(?:--|\/\*)/.test(found) ? comment : literal
    at = parts.lastIndex
  }
  return code + text.slice(at)
}
