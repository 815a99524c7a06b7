/**
 * The core promises, kept over every way to run them: options that change the wire, a pool of one, an ambient
 * connection that sessions run on, a link on which every answer takes a millisecond. `pooler.test.ts` keeps them
 * through a pooler.
 */
import { DbConnection } from "effect-db"
import { Effect } from "effect"
import { Socket } from "node:net"
import { contract, type Test } from "./support/contract.js"
import { testDatabase } from "./support/database.js"
import { programsOn, proxiedOn } from "./support/programs.js"

const database = testDatabase()

contract(database, programsOn(database), [
  { name: "default options", options: {}, connections: 10, around: (_) => _ },
  { name: "pipelining: false", options: { pipelining: false }, connections: 10, around: (_) => _ },
  { name: "preparedStatements: false", options: { preparedStatements: false }, connections: 10, around: (_) => _ },
  { name: "a stream of the user's", options: { stream: () => new Socket() }, connections: 10, around: (_) => _ },
  { name: "resetOnRelease: always", options: { resetOnRelease: "always" }, connections: 10, around: (_) => _ },
  { name: "a pool of one", options: { maxConnections: 1 }, connections: 1, around: (_) => _ },
  {
    name: "an ambient connection",
    options: {},
    connections: 10,
    around: (effect) => DbConnection.withConnection(effect)
  },
  {
    name: "an ambient connection that is lazy, in a pool of one",
    options: { maxConnections: 1 },
    connections: 1,
    around: (effect) => DbConnection.withConnection(effect, { lazy: true })
  }
])

const proxied = proxiedOn(database)
const slowly: Test = (name, program, options) =>
  proxied(
    name,
    (via) =>
      Effect.suspend(() => {
        via.delay(1)
        return program()
      }),
    options
  )

contract(database, slowly, [
  { name: "a link of 1 ms", options: {}, connections: 10, around: (_) => _ },
  {
    name: "a link of 1 ms, pipelining: false, a pool of one",
    options: { pipelining: false, maxConnections: 1 },
    connections: 1,
    around: (_) => _
  }
])
