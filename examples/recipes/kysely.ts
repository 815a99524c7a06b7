/**
 * Kysely in promise code: its queries run in the ambient session of a `DbRuntime`, outside of one as statements of
 * their own. To be copied.
 */
import { Chunk, Effect, Stream } from "effect"
import { DbEngine } from "effect-db"
import type { DbRuntime } from "effect-db"
import { Kysely, PostgresAdapter, PostgresIntrospector, PostgresQueryCompiler } from "kysely"
import type { CompiledQuery, DatabaseConnection, Driver, QueryResult } from "kysely"

type Run = DbRuntime.DbRuntime<DbEngine, unknown>["run"]

interface Raw<Row> {
  readonly command: string
  readonly rowCount: number | null
  readonly rows: Array<Row>
}

const counted = new Set(["INSERT", "UPDATE", "DELETE", "MERGE"])

class AmbientConnection implements DatabaseConnection {
  constructor(private readonly run: Run) {}

  async executeQuery<Row>({ parameters, sql: text }: CompiledQuery): Promise<QueryResult<Row>> {
    const raw = await this.run(Effect.flatMap(DbEngine, ({ sql }) => sql.unsafe(text, parameters).raw))
    const { command, rowCount, rows } = raw as Raw<Row>
    return counted.has(command) ? { rows, numAffectedRows: BigInt(rowCount ?? 0) } : { rows }
  }

  async *streamQuery<Row>(query: CompiledQuery, chunkSize: number): AsyncIterableIterator<QueryResult<Row>> {
    const rows = Stream.unwrap(
      Effect.map(DbEngine, ({ sql }) => sql.unsafe<object>(query.sql, query.parameters).stream)
    ).pipe(Stream.rechunk(chunkSize), Stream.chunks)
    // The runtime of an effect has the session that it runs in.
    const runtime = await this.run(Effect.runtime<DbEngine>())
    for await (const chunk of Stream.toAsyncIterableRuntime(rows, runtime)) {
      yield { rows: Chunk.toArray(chunk) as Array<Row> }
    }
  }
}

const refuse = (): Promise<never> =>
  Promise.reject(new Error("Use the runtime's transaction() or session(): Kysely's queries run inside of it."))

class AmbientDriver implements Driver {
  private readonly connection: DatabaseConnection

  constructor(run: Run) {
    this.connection = new AmbientConnection(run)
  }

  readonly init = () => Promise.resolve()
  readonly destroy = () => Promise.resolve()
  readonly acquireConnection = () => Promise.resolve(this.connection)
  readonly releaseConnection = () => Promise.resolve()
  // A transaction belongs to the code that awaits it, not to the connection that statements happen to share.
  readonly beginTransaction = refuse
  readonly commitTransaction = refuse
  readonly rollbackTransaction = refuse
}

export const kyselyOn = <Tables>({ run }: { readonly run: Run }): Kysely<Tables> =>
  new Kysely<Tables>({
    dialect: {
      createAdapter: () => new PostgresAdapter(),
      createDriver: () => new AmbientDriver(run),
      createIntrospector: (db) => new PostgresIntrospector(db),
      createQueryCompiler: () => new PostgresQueryCompiler()
    }
  })
