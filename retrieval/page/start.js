// What one sees before the first query: what the page can do, and some of what the index holds, as queries to try.

import { call } from "./api.js";
import { count, element } from "./element.js";
import { thumbnail } from "./pictures.js";

const SAMPLES = 12;

const WAYS = [
  ["Words", "Say what you want to see: a word, a sentence, a mood."],
  ["A picture", "Drop one anywhere, paste it, or choose a file. What looks or means alike comes first."],
  ["Sums", "Add ideas and take others away: king −\u00a0man +\u00a0woman. Each part has a weight of its own."],
];
const MAKE = ["New pictures", "Generate from words, vary a result, or walk from one result to another."];
const REMAKE = ["New pictures", "Vary a result, or walk from one result to another."];

/** Fill `root` for an index. ask(words): search for them. */
export async function fill(root, index, generator, ask) {
  const make = generator && (generator.prompts === false ? REMAKE : MAKE);
  root.replaceChildren(
    element("h2", {}, `Search ${count(index.rows)} pictures by what they show`),
    element("dl", { class: "ways" }, [...WAYS, make].filter(Boolean).map(([name, text]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, text)))),
  );
  const rows = new Set();
  const all = index.numbers ?? index.rows; // those of deleted rows too: of them, nothing will be shown
  while (rows.size < Math.min(SAMPLES, all)) rows.add(Math.floor(Math.random() * all));
  const asked = [...rows].map((row) => call(`api/details/${encodeURIComponent(index.name)}/${row}`));
  const found = (await Promise.allSettled(asked)).map(({ value }) => value).filter((sample) => sample?.caption);
  if (!found.length || root.dataset.index !== index.name) return;
  root.append(
    element("h3", {}, "Some of what is here, to begin with"),
    element("ul", { class: "grid" }, found.map(({ row, key, caption }) => {
      const act = { type: "button", class: "tile", title: "Search for these words", onclick: () => ask(caption) };
      return element("li", {}, element("button", act,
        element("span", { class: "mat" }, thumbnail(index.name, { row, key })),
        element("span", { class: "caption" }, caption)));
    })),
  );
}
