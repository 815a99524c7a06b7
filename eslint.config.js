import js from "@eslint/js"
import tseslint from "typescript-eslint"

export default tseslint.config(
  { ignores: ["dist/", "coverage/", "node_modules/", ".data/", ".tmp/"] },
  js.configs.recommended,
  ...tseslint.configs.recommended,
  {
    languageOptions: {
      parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname }
    },
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      "@typescript-eslint/await-thenable": "error",
      "@typescript-eslint/consistent-type-exports": "error",
      "@typescript-eslint/consistent-type-imports": ["error", { fixStyle: "separate-type-imports" }],
      "@typescript-eslint/no-misused-promises": ["error", { checksVoidReturn: false }],
      "@typescript-eslint/no-unused-vars": [
        "error",
        { argsIgnorePattern: "^_", varsIgnorePattern: "^_", caughtErrorsIgnorePattern: "^_" }
      ],
      "@typescript-eslint/no-this-alias": "off",
      "@typescript-eslint/only-throw-error": "off",
      "@typescript-eslint/switch-exhaustiveness-check": ["error", { considerDefaultExhaustiveForUnions: true }],
      "@typescript-eslint/array-type": ["error", { default: "generic" }],
      // services and errors carry a type and a value of one name; `declare module` and phantom types need these
      "@typescript-eslint/no-empty-object-type": "off",
      "@typescript-eslint/no-namespace": "off",
      "@typescript-eslint/no-unsafe-declaration-merging": "off",
      "no-redeclare": "off",
      eqeqeq: ["error", "always", { null: "ignore" }],
      "no-console": "error",
      "object-shorthand": "error",
      "prefer-const": "error",
      // generators that yield nothing are fine where a signature asks for one
      "require-yield": "off"
    }
  },
  {
    files: ["src/**"],
    rules: {
      "no-restricted-syntax": [
        "error",
        {
          selector: "FunctionExpression[generator=true] > BlockStatement > TryStatement",
          message: "no try/catch in generators: use Effect.catch*, Effect.exit or Effect.acquireUseRelease"
        }
      ]
    }
  },
  {
    // combinators infer through `any`; what is public stays exact
    files: ["src/**", "test/**", "bench/**", "chaos/**"],
    rules: { "@typescript-eslint/no-explicit-any": "off" }
  },
  {
    files: [".ci/**", "scripts/**", "examples/**", "bench/**", "chaos/**", "test/**"],
    rules: { "no-console": "off" }
  },
  {
    files: ["**/*.js", "**/*.cjs", "**/*.mjs"],
    extends: [tseslint.configs.disableTypeChecked],
    languageOptions: {
      parserOptions: { projectService: false },
      globals: { process: "readonly", console: "readonly", URL: "readonly", module: "writable", setTimeout: "readonly" }
    },
    rules: { "@typescript-eslint/no-require-imports": "off" }
  }
)
