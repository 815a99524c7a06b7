/**
 * Certificates of an authority of our own, made with `openssl`.
 */
import { execFileSync } from "node:child_process"
import { readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"

/** `openssl` is there. */
export const hasOpenssl = ((): boolean => {
  try {
    execFileSync("openssl", ["version"], { stdio: "ignore" })
    return true
  } catch {
    return false
  }
})()

export interface Certificate {
  readonly keyFile: string
  readonly certFile: string
  readonly key: string
  readonly cert: string
}

const openssl = (...args: ReadonlyArray<string>): void => {
  execFileSync("openssl", args, { stdio: ["ignore", "ignore", "pipe"] })
}

const read = (keyFile: string, certFile: string): Certificate => ({
  keyFile,
  certFile,
  key: readFileSync(keyFile, "utf8"),
  cert: readFileSync(certFile, "utf8")
})

const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"] as const

/** An authority: its own certificate, and how it signs those of others. */
export const makeAuthority = (folder: string, name: string) => {
  const [keyFile, certFile] = [join(folder, `${name}.key`), join(folder, `${name}.crt`)]
  openssl("req", "-x509", ...newKey, "-days", "2", "-subj", `/CN=${name}`, "-keyout", keyFile, "-out", certFile)
  return {
    ...read(keyFile, certFile),
    /** For who is called so: in the name of its subject, and in its alternative names. */
    sign: (subject: string, alternatives?: string): Certificate => {
      const file = (extension: string) => join(folder, `${name}-${subject.replace(/\W/g, "_")}.${extension}`)
      openssl("req", ...newKey, "-subj", `/CN=${subject}`, "-keyout", file("key"), "-out", file("csr"))
      writeFileSync(file("ext"), alternatives === undefined ? "" : `subjectAltName = ${alternatives}\n`)
      const by = ["-CA", certFile, "-CAkey", keyFile, "-CAcreateserial", "-days", "2"]
      openssl("x509", "-req", "-in", file("csr"), ...by, "-extfile", file("ext"), "-out", file("crt"))
      return read(file("key"), file("crt"))
    }
  }
}
