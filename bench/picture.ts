/**
 * The results as a picture: a panel of bars for each workload, all of them relative to effect-db and to one scale. It
 * brings its own ground, so that it can be read wherever it is put.
 */
import { median, ratio } from "./measure.js"
import type { Sample } from "./measure.js"
import { ours } from "./contenders/index.js"
import { micros } from "./report.js"
import type { Report, Result } from "./report.js"

const columns = 2
const margin = 24
const gap = 32
const names = 104
const bars = 208
const values = 40
const panel = names + bars + values
const bar = 12
const pitch = 18
const head = 44
const width = margin * 2 + panel * columns + gap * (columns - 1)

const style = `
  .ground { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif }
  .title { font-size: 13px; font-weight: 600 } .note { fill: #59636e; font-size: 11px } .own { fill: #0969da } .other { fill: #afb8c1 }
  .one { stroke: #0969da; stroke-dasharray: 2 3 } text.own { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; stroke: #3d444d } text { fill: #f0f6fc } .note { fill: #9198a1 } .own { fill: #4493f8 }
    .other { fill: #656c76 } .one { stroke: #4493f8 }
  }`

const escape = (text: string): string => text.replace(/[&<>]/g, (c) => `&#${c.charCodeAt(0)};`)

const write = (x: number, y: number, text: string, rest = ""): string =>
  `<text x="${x.toFixed(1)}" y="${y}"${rest}>${escape(text)}</text>`

const duration = (value: number): string => {
  if (value < 10_000) return `${micros(value)} µs`
  return value < 1_000_000 ? `${micros(value / 1000)} ms` : `${(value / 1_000_000).toFixed(2)} s`
}

const draw = (
  { samples, workload }: Result,
  own: Sample,
  x: number,
  y: number,
  unit: number
): ReadonlyArray<string> => {
  const left = x + names
  const lines = [
    write(x, y + 12, workload.title, ' class="title"'),
    write(x, y + 28, `${ours}: ${duration(median(own.micros))}`, ' class="note"')
  ]
  for (const [i, sample] of samples.entries()) {
    const top = y + head - 6 + i * pitch
    const times = ratio(sample, own)
    const length = Math.max(1, times * unit)
    const mark = sample === own ? ' class="own"' : ""
    lines.push(
      write(left - 8, top + 10, sample.name, ` text-anchor="end"${mark}`),
      `<rect x="${left}" y="${top}" width="${length.toFixed(1)}" height="${bar}" rx="2" class="${sample === own ? "own" : "other"}"/>`,
      write(x + panel, top + 10, times.toFixed(2), ` text-anchor="end"${mark}`)
    )
  }
  const one = (left + unit).toFixed(1)
  const top = y + head - 10
  lines.push(`<line x1="${one}" y1="${top}" x2="${one}" y2="${top + samples.length * pitch + 2}" class="one"/>`)
  return lines
}

/** Time relative to effect-db, which is 1: shorter is faster. The same figures make the same picture. */
export const toSvg = ({ environment, results }: Report): string => {
  const panels = results.flatMap((result) => {
    const own = result.samples.find((_) => _.name === ours)
    return own === undefined ? [] : [{ result, own }]
  })
  const longest = Math.max(1, ...panels.flatMap(({ own, result }) => result.samples.map((_) => ratio(_, own))))
  const lines: Array<string> = []
  let y = margin
  for (let at = 0; at < panels.length; at += columns) {
    const row = panels.slice(at, at + columns)
    for (const [column, { own, result }] of row.entries()) {
      lines.push(...draw(result, own, margin + column * (panel + gap), y, bars / longest))
    }
    y += head + Math.max(...row.map((_) => _.result.samples.length)) * pitch + margin
  }
  const conditions = Object.entries(environment).map(([name, value]) => `${name} ${value}`)
  lines.push(
    write(
      margin,
      y + 4,
      `Time relative to ${ours}; shorter is faster. Medians of interleaved rounds.`,
      ' class="note"'
    ),
    write(margin, y + 20, conditions.join(", "), ' class="note"')
  )
  const height = y + 20 + margin
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img">`,
    `<title>Time of each contender relative to ${ours}, by workload</title>`,
    `<style>${style}\n</style>`,
    `<rect x="0.5" y="0.5" width="${width - 1}" height="${height - 1}" rx="8" class="ground"/>`,
    ...lines,
    "</svg>\n"
  ].join("\n")
}
