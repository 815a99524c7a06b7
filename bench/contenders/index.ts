/**
 * Who is compared, by name.
 */
import type { Connect } from "../contender.js"
import { drizzle } from "./drizzle.js"
import { effectDb, effectDbBatch, fibersAlone, fibersAndWire, sqlPg } from "./effect.js"
import { kysely } from "./kysely.js"
import { pg, pgNamed } from "./pg.js"
import { pgbench } from "./pgbench.js"
import { postgres } from "./postgres.js"

export const ours = "effect-db"

export const contenders: ReadonlyMap<string, Connect> = new Map([
  [ours, effectDb],
  ["effect-db, batch", effectDbBatch],
  ["20 fibers alone", fibersAlone],
  ["20 fibers, the wire", fibersAndWire],
  ["pg", pg],
  ["pg, named", pgNamed],
  ["@effect/sql-pg", sqlPg],
  ["postgres", postgres],
  ["Kysely", kysely],
  ["Drizzle", drizzle],
  ["pgbench, in C", pgbench]
])
