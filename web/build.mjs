// Makes what medmae/synthesis/viewer vendors: niivue and what it needs as one script, and the licences of all of it.
// The versions and their hashes are those of package-lock.json, so the result is the same bytes everywhere.
//
//   node build.mjs [FOLDER]        default: ../medmae/synthesis/viewer

import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "../medmae/synthesis/viewer");
// Two thirds of niivue's own bundle are codecs of Zarr stores, which the pages have none of.
const ABSENT = /^(@zarrita\/.*|zarrita|numcodecs)(\/.*)?$/;
// A picture that only the shading of meshes uses, which the pages have none of: 1 x 1 pixel instead.
const MATCAP = /(var Shiny_default = )"data:image\/jpeg;base64,[^"]+"/;
const PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==";

const trimmed = {
  name: "trimmed",
  setup(builder) {
    builder.onResolve({ filter: ABSENT }, ({ path }) => ({ path, namespace: "absent" }));
    builder.onLoad({ filter: /./, namespace: "absent" }, () => ({ contents: "module.exports = {}", loader: "js" }));
    builder.onLoad({ filter: /@niivue\/niivue\/build\/niivue\/index\.js$/ }, ({ path }) => {
      const source = readFileSync(path, "utf8");
      if (!MATCAP.test(source)) throw new Error("niivue has its mesh picture elsewhere now: change MATCAP");
      return { contents: source.replace(MATCAP, `$1"${PIXEL}"`), loader: "js" };
    });
  },
};

const result = await build({
  stdin: { contents: 'export { Niivue, NVImage, SLICE_TYPE, SHOW_RENDER, DRAG_MODE } from "@niivue/niivue";', resolveDir: here },
  absWorkingDir: here,
  bundle: true,
  minify: true,
  format: "iife",
  globalName: "niivue",
  target: "es2022",
  charset: "ascii",
  legalComments: "none",
  metafile: true,
  write: false,
  plugins: [trimmed],
});
const code = result.outputFiles[0].contents;

const packages = new Set();
for (const [file, { bytesInOutput }] of Object.entries(Object.values(result.metafile.outputs)[0].inputs)) {
  const found = /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(file);
  if (found && bytesInOutput) packages.add(found[1]);
}
const licence = (name) => {
  const folder = join(here, "node_modules", name);
  const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
  return readFileSync(file ? join(folder, file) : join(here, "licences", `${name.replace("/", "-")}.txt`), "utf8").trim();
};
const parts = [...packages].sort().map((name) => {
  const { version, license } = JSON.parse(readFileSync(join(here, "node_modules", name, "package.json"), "utf8"));
  return { name, version, license, text: licence(name) };
});
const sha256 = createHash("sha256").update(code).digest("hex");
const main = parts.find(({ name }) => name === "@niivue/niivue");
const rule = "=".repeat(80);
const notice = [
  `niivue.min.js is ${main.name} ${main.version} with the packages below, bundled and minified by web/build.mjs of`,
  "medmae (`make viewer`). Left out: codecs of Zarr stores, and the picture that shades meshes.",
  "",
  `sha256 ${sha256}`,
  "",
  ...parts.map(({ name, version, license }) => `  ${name} ${version} (${license})`),
  "  Roboto Regular, as a texture within niivue (Apache-2.0, Copyright Google; the text of the licence is medmae's LICENSE)",
  "",
  ...parts.flatMap(({ name, version, text }) => [rule, `${name} ${version}`, rule, "", text.replace(/\r/g, ""), ""]),
].join("\n");

writeFileSync(join(out, "niivue.min.js"), code);
writeFileSync(join(out, "niivue.NOTICE.txt"), notice);
console.log(`niivue.min.js: ${code.length} bytes, sha256 ${sha256}`);
