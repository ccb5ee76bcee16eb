// The query: words, chips and settings; as the address of the page and as what the server is sent.
//
// A chip is {id, kind, value, weight}: kind "text" (value: words), "key" (a sample's key) or "image" (the name under
// which pictures.js keeps the picture). Chips of pictures have no place in the address; they live in the tab only.
// The open result is {row, key}: a compaction of the index gives rows new numbers, a sample keeps its key.

export const PAGE = 40; // results asked for at a time
export const MOST = 1000;
export const DISTINCT = 0.95; // cosine from which two results are near-duplicates
export const WEIGHT = 2; // the end of a slider
const HEAVIEST = 100; // that the server takes
const TERM = /^(?:(\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?(?:"([^"]*)"|([^]+))$/; // weight, "quoted" or plain

let made = 0;

export const chip = (kind, value, weight = 1) => ({ id: ++made, kind, value, weight });

export const empty = () => ({
  words: "", chips: [], index: null, by: "image", where: "", distinct: false, k: PAGE, open: null,
});

export const isEmpty = (query) => !query.words && !query.chips.length;

/** Whether two results, or places of some, are the same sample. */
export const isSame = (one, other) => (one.key && other.key ? one.key === other.key : one.row === other.row);

/** "king - man + 0.5*woman" -> [["king", 1], ["man", -1], ["woman", 0.5]]: as parse_algebra() of retrieval/query.py
 *  reads it (tests/test_page.py compares the two), but for key: and its like. Signs stand between spaces; what is
 *  "in quotes" is taken as it is; an empty term is left out. */
export function terms(typed) {
  const text = typed.trim();
  const hidden = text.replace(/"[^"]*"/g, (quoted) => "\0".repeat(quoted.length));
  const signs = [...hidden.matchAll(/(?:^|\s+)([+\-−])\s+/g)];
  const starts = signs.map((match) => ({ at: match.index, from: match.index + match[0].length, sign: match[1] }));
  if (starts[0]?.at !== 0) starts.unshift({ at: 0, from: 0, sign: "+" });
  return starts.map(({ from, sign }, i) => {
    const [, weight = 1, quoted, plain = ""] = TERM.exec(text.slice(from, starts[i + 1]?.at).trim()) ?? [];
    return [(quoted ?? plain).trim(), Number(weight) * (sign === "+" ? 1 : -1)];
  }).filter(([idea]) => idea);
}

/** What is typed -> {words, chips}: words that are added with the weight 1 come first, the rest are chips. */
export function parse(typed) {
  const ideas = terms(typed);
  const words = ideas[0]?.[1] === 1 ? ideas.shift()[0] : "";
  return { words, chips: ideas.map(([idea, weight]) => chip("text", idea, weight)) };
}

/** Words as one types them: in quotes if they would be read as something else without. */
export function typed(words) {
  const again = parse(words);
  return again.words === words && !again.chips.length ? words : `"${words}"`;
}

/** The body of /api/search. pictures: name -> {base64}. */
export function request(query, pictures) {
  const terms = query.chips.map(({ kind, value, weight }) => ({
    kind, weight, value: kind === "image" ? pictures.get(value).base64 : value,
  }));
  if (query.words) terms.unshift({ kind: "text", value: query.words, weight: 1 });
  return {
    index: query.index, terms, k: query.k, modality: query.by,
    where: query.where || null, distinct: query.distinct ? DISTINCT : null,
  };
}

/** The part of the address after "#": what differs from the empty query. */
export function toHash(query) {
  const hash = new URLSearchParams();
  if (query.words) hash.append("q", query.words);
  for (const { kind, value, weight } of query.chips) if (kind !== "image") hash.append(kind, `${weight}~${value}`);
  if (query.index) hash.append("index", query.index);
  if (query.by !== "image") hash.append("by", query.by);
  if (query.where) hash.append("where", query.where);
  if (query.distinct) hash.append("distinct", "1");
  if (query.k !== PAGE) hash.append("k", query.k);
  if (query.open) hash.append("row", query.open.key ? `${query.open.row}~${query.open.key}` : query.open.row);
  return hash.size ? `#${hash}` : "";
}

/** The query that an address holds; what makes no sense in it is left out. */
export function fromHash(text) {
  const hash = new URLSearchParams(text.replace(/^#/, ""));
  const whole = (name) => (/^\d{1,15}$/.test(hash.get(name) ?? "") ? Number(hash.get(name)) : null);
  const query = empty();
  query.words = hash.get("q") ?? "";
  for (const [kind, value] of hash) {
    const [, weight, rest] = (kind === "text" || kind === "key") && /^(-?\d+(?:\.\d+)?)~([^]+)$/.exec(value) || [];
    if (rest) query.chips.push(chip(kind, rest, Math.max(-HEAVIEST, Math.min(HEAVIEST, Number(weight))) || 1));
  }
  query.index = hash.get("index");
  if (hash.get("by") === "text") query.by = "text";
  query.where = hash.get("where") ?? "";
  query.distinct = hash.has("distinct");
  query.k = Math.max(1, Math.min(MOST, whole("k") ?? PAGE));
  const [, row, key] = /^(\d{1,15})(?:~([^]+))?$/.exec(hash.get("row") ?? "") ?? [];
  if (row) query.open = { row: Number(row), key: key ?? null };
  return query;
}
