/**
 * `pgbench -M prepared`, a client in C: what is left of the time is the server's. Only where it is installed.
 */
import { execFile } from "node:child_process"
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { promisify } from "node:util"
import { connections, text } from "../contender.js"
import type { Connect, Work } from "../contender.js"

const exec = promisify(execFile)

/** `$1` becomes the variable of that place. */
const fill = (text: string, ...names: ReadonlyArray<string>): string =>
  text.replace(/\$(\d)/g, (_, n: string) => `:${names[Number(n) - 1]}`) + ";\n"

const scripts = {
  insert: `\\set id random(1, 1000)\nBEGIN;\n${fill(text.insert, "id", "id")}COMMIT;\n`,
  five: `\\set id random(1, 1000)\nBEGIN;\n${fill(text.insert, "id", "id").repeat(5)}COMMIT;\n`,
  twenty: `\\set id random(1, 1000)\n\\startpipeline\nBEGIN;\n${fill(text.insert, "id", "id").repeat(20)}\\endpipeline\nCOMMIT;\n`,
  select: `\\set id random(1, 1000)\n${fill(text.select, "id")}`,
  tpcb:
    "\\set account random(1, 10000)\n\\set teller random(1, 100)\n\\set branch random(1, 10)\n\\set delta random(-50, 50)\n" +
    "BEGIN;\n" +
    fill(text.accounts, "delta", "account") +
    fill(text.balance, "account") +
    fill(text.tellers, "delta", "teller") +
    fill(text.branches, "delta", "branch") +
    fill(text.history, "teller", "branch", "account", "delta") +
    "COMMIT;\n"
}

export const pgbench: Connect = async (url) => {
  const found = await exec("pgbench", ["--version"]).then(
    () => true,
    () => false
  )
  if (!found) return undefined
  const folder = await mkdtemp(join(tmpdir(), "effect-db-bench-"))
  for (const [name, script] of Object.entries(scripts)) await writeFile(join(folder, name), script)
  const { hostname, password, pathname, port, username } = new URL(url)
  const work =
    (name: keyof typeof scripts, clients: number): Work =>
    async (n) => {
      const { stdout } = await exec(
        "pgbench",
        ["-n", "-M", "prepared", "-c", `${clients}`, "-t", `${Math.ceil(n / clients)}`, "-f", join(folder, name)],
        {
          env: {
            ...process.env,
            PGHOST: hostname,
            PGPORT: port || "5432",
            PGUSER: decodeURIComponent(username),
            PGPASSWORD: decodeURIComponent(password),
            PGDATABASE: decodeURIComponent(pathname.slice(1))
          }
        }
      )
      const perSecond = /tps = ([\d.]+)/.exec(stdout)?.[1]
      if (perSecond === undefined) throw new Error(`pgbench said: ${stdout}`)
      return 1e6 / Number(perSecond)
    }
  return {
    work: {
      insert: work("insert", 1),
      five: work("five", 1),
      twenty: work("twenty", 1),
      select: work("select", 1),
      // As many as the others have connections; more would be more backends.
      fibersInsert: work("insert", connections),
      fibersSelect: work("select", connections),
      tpcb: work("tpcb", 1)
    },
    close: () => rm(folder, { recursive: true, force: true })
  }
}
