// The query: words, chips and settings; as the address of the page and as what the server is sent.
//
// A chip is {id, kind, value, weight}: kind "text" (value: words), "key" (a sample's key) or "image" (the name under
// which pictures.js keeps the picture). Chips of pictures have no place in the address; they live in the tab only.

export const PAGE = 40; // results asked for at a time
export const MOST = 1000;
export const DISTINCT = 0.95; // cosine from which two results are near-duplicates
export const WEIGHT = 2; // the largest

let made = 0;

export const chip = (kind, value, weight = 1) => ({ id: ++made, kind, value, weight });

export const empty = () => ({
  words: "", chips: [], index: null, by: "image", where: "", distinct: false, k: PAGE, open: null,
});

export const isEmpty = (query) => !query.words && !query.chips.length;

/** "king - man + woman" -> its words and chips. Only signs with a space on both sides count; "in quotes" none does. */
export function parse(typed) {
  const text = typed.trim();
  if (/^".*"$/.test(text)) return { words: text.slice(1, -1).trim(), chips: [] };
  const [words, ...rest] = ` ${text} `.split(/(\s[+\-−–](?=\s))/);
  const chips = [];
  for (let i = 0; i < rest.length; i += 2) {
    const idea = rest[i + 1].trim();
    if (idea) chips.push(chip("text", idea, rest[i].trim() === "+" ? 1 : -1));
  }
  return { words: words.trim(), chips };
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
  if (query.open !== null) hash.append("row", query.open);
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
    if (rest) query.chips.push(chip(kind, rest, Math.max(-WEIGHT, Math.min(WEIGHT, Number(weight))) || 1));
  }
  query.index = hash.get("index");
  if (hash.get("by") === "text") query.by = "text";
  query.where = hash.get("where") ?? "";
  query.distinct = hash.has("distinct");
  query.k = Math.max(1, Math.min(MOST, whole("k") ?? PAGE));
  query.open = whole("row");
  return query;
}
