// The page: one query, held in the address; everything shown follows from it.

import { abort, call, isAborted, Refusal, tell } from "./api.js";
import { Chips } from "./chips.js";
import { Details, quoted } from "./details.js";
import { takePictures } from "./drop.js";
import { count, element, find } from "./element.js";
import { Filter } from "./filter.js";
import { Grid } from "./grid.js";
import { bring, brought } from "./pictures.js";
import * as Query from "./query.js";
import { fill } from "./start.js";
import { Studio } from "./studio.js";

const SETTLE = 150; // ms that a slider rests before the search

let info = null; // of /api/info
let query = Query.empty();
let asked = null; // signature of the query whose results are shown or under way
let good = ""; // the filter that last gave an answer
let settling = 0;
let shownWords = "";
let studio = null;
const known = new Map(); // key -> {row, caption}, of rows seen in this index

const chips = new Chips(find("chips"), known, {
  change: weigh,
  remove: (chip) => {
    commit({ chips: query.chips.filter((other) => other !== chip), k: Query.PAGE });
    (find("compose").hidden ? find("words") : find("idea")).focus();
  },
});
const grid = new Grid(find("grid"), { open, add });
const details = new Details(find("details"), {
  close,
  step: (by) => {
    const to = grid.hits[grid.at(query.open) + by];
    if (to) open(to);
  },
  from: (hit) => commit({ words: "", chips: [keyChip(hit, 1)], k: Query.PAGE, open: null }),
  add,
  vary: (hit) => make("vary", hit),
  edit: (hit) => make("edit", hit),
  mix: (hit) => make("interpolate", hit),
});
const filter = new Filter((where) => {
  if (where === query.where && !Query.isEmpty(query)) search();
  else commit({ where, k: Query.PAGE });
});

// ---- the query and the address ----

/** Change the query, remember it in the address, and show what follows. how: "push" for a step that "back" undoes. */
function commit(changes, how = "push") {
  query = { ...query, ...changes };
  const images = query.chips.filter(({ kind }) => kind === "image").map(({ value, weight }) => [value, weight]);
  const here = location.pathname + location.search;
  history[`${how}State`]({ images, opened: how === "push" && query.open !== null }, "", Query.toHash(query) || here);
  render();
}

/** Take the query from the address. */
function restore() {
  const before = query;
  query = Query.fromHash(location.hash);
  const images = (history.state?.images ?? []).filter(([name]) => brought.has(name));
  query.chips.unshift(...images.map(([name, weight]) => Query.chip("image", name, weight)));
  if ((query.index ?? null) !== (before.index ?? null)) known.clear();
  render();
}

const index = () => info.indexes.find(({ name }) => name === query.index) ?? info.indexes[0];

const signature = () =>
  JSON.stringify([Query.toHash({ ...query, open: null }), query.chips.map(({ value, weight }) => [value, weight])]);

function keyChip(hit, weight) {
  known.set(hit.key, { row: hit.row, caption: hit.caption });
  return Query.chip("key", hit.key, weight);
}

/** Add a result to the query, or take it away (weight -1). */
function add(hit, weight) {
  commit({ chips: [...query.chips, keyChip(hit, weight)], k: Query.PAGE });
}

/** The weights of chips changed. lasting: no slider is being dragged. */
function weigh(lasting) {
  chips.sync();
  clearTimeout(settling);
  settling = setTimeout(() => commit({ k: Query.PAGE }, "replace"), lasting ? 0 : SETTLE);
}

// ---- showing ----

function render() {
  const idle = Query.isEmpty(query);
  if (query.words !== shownWords) write(query.words); // else what is being written stays
  if (!same(chips.shown, query.chips)) chips.show(query.chips, index().name);
  else chips.sync();
  find("compose").hidden = idle;
  find("distinct").checked = query.distinct;
  for (const radio of document.getElementsByName("by")) radio.checked = radio.value === query.by;
  find("index").value = index().name;
  filter.show(query.where);
  studio?.prompt(query.words);
  document.title = idle ? info.name || "unclip" : `${title().slice(0, 120)} – ${info.name || "unclip"}`;
  if (find("filter").dataset.index !== index().name) {
    find("filter").dataset.index = index().name;
    filter.columns(index().columns);
    const name = info.indexes.length > 1 ? "" : `${index().name}, `; // else the choice beside it says so
    find("collection").textContent = `${name}${count(index().rows)} pictures`;
  }
  start(idle);
  if (idle) clear();
  else if (signature() !== asked) search();
  grid.mark(query.open);
  if (query.open === null) closed();
  else showDetails();
}

function write(words) {
  shownWords = words;
  find("words").value = Query.typed(words);
}

const same = (a, b) => a.length === b.length && a.every((chip, i) => chip === b[i]);

function title() {
  const parts = query.chips.map(({ kind, value, weight }) => {
    const name = kind === "text" ? value : kind === "key" ? known.get(value)?.caption ?? value : "picture";
    return `${weight < 0 ? "−" : "+"} ${name}`;
  });
  return [query.words, ...parts].filter(Boolean).join(" ").replace(/^\+ /, "");
}

function start(idle) {
  const root = find("start");
  root.hidden = !idle;
  if (!idle || root.dataset.index === index().name) return;
  root.dataset.index = index().name;
  fill(root, index(), info.generator, (words) => commit({ ...Query.empty(), index: query.index, words }));
}

function clear() {
  abort("search");
  asked = null;
  busy(false);
  grid.show([], index().name);
  find("status").textContent = "";
  find("error").hidden = true;
  find("more").hidden = true;
}

function busy(busy) {
  find("results").ariaBusy = String(busy);
  find("trail").classList.toggle("busy", busy);
}

// ---- searching ----

let last = null; // the query that the shown results answer

async function search() {
  asked = signature();
  const mine = query;
  const here = index();
  busy(true);
  find("error").hidden = true;
  filter.tell("");
  try {
    const answer = await call("api/search", { body: Query.request(mine, brought), purpose: "search" });
    const hits = answer.hits.map((hit, i) => ({ ...hit, rank: i + 1 }));
    for (const { key, row, caption } of hits) known.set(key, { row, caption });
    const more = last !== null && onlyMore(last, mine) && !find("more").hidden;
    const waiting = document.activeElement === find("more");
    const stay = grid.show(hits, here.name, more);
    last = mine;
    good = mine.where;
    report(hits, answer.ms, mine, here);
    find("more").hidden = hits.length < mine.k || mine.k >= Math.min(Query.MOST, here.rows);
    if (waiting && more) grid.focus(Math.min(stay, hits.length - 1));
    grid.mark(query.open);
    if (query.open !== null) showDetails();
    busy(false);
    nameChips(here);
  } catch (error) {
    if (isAborted(error)) return;
    busy(false);
    asked = null;
    last = null;
    grid.show([], here.name);
    find("status").textContent = "";
    find("more").hidden = true;
    if (blames(error, mine.where)) filter.tell(error.message);
    else tell(find("error"), error, () => search());
  }
}

/** Whether an error is about the filter: the server says so, or the filter is new. */
function blames(error, where) {
  if (!(error instanceof Refusal) || !where || ![400, 422].includes(error.status)) return false;
  return error.details.param === "where" || error.message.startsWith("The filter") || where !== good;
}

function onlyMore(before, after) {
  const parts = ({ chips }) => chips.map(({ value, weight }) => [value, weight]);
  const less = (one) => JSON.stringify({ ...one, k: 0, open: null, chips: parts(one) });
  return after.k > before.k && less(before) === less(after);
}

function report(hits, ms, mine, here) {
  if (!hits.length) {
    find("status").textContent = mine.where ? "No row passes the filter." : "Nothing found.";
    return;
  }
  const sure = hits[0].probability !== null && hits[0].probability !== undefined;
  find("status").textContent = [
    `${count(hits.length)} of ${count(here.rows)}${mine.where ? ", filtered" : ""}, best first`,
    sure ? "in percent: how likely words and picture match" : "scores are cosines",
    ms === undefined ? null : `${Math.max(1, Math.round(ms))} ms`,
  ].filter(Boolean).join("  ·  ");
}

/** Chips of keys that came with the address have no picture yet: a search from the key alone finds its row. */
async function nameChips(here) {
  const nameless = query.chips.filter(({ kind, value }) => kind === "key" && !known.has(value));
  for (const { value } of nameless) {
    const body = Query.request({ ...Query.empty(), index: query.index, chips: [Query.chip("key", value)], k: 1 });
    const hit = await call("api/search", { body }).then(({ hits }) => hits[0]).catch(() => null);
    if (hit?.key === value) known.set(value, { row: hit.row, caption: hit.caption });
  }
  const late = find("chips").querySelector("[data-kind=key] .face:not(:has(img))");
  if (late && here.name === index().name) chips.show(query.chips, here.name);
}

// ---- details ----

function open(hit) {
  if (query.open && Query.isSame(query.open, hit)) return;
  commit({ open: { row: hit.row, key: hit.key } }, query.open === null ? "push" : "replace");
  grid.reveal(hit);
}

function showDetails() {
  const known = details.shows(query.open) ? { ...details.hit, rank: null, score: null, probability: null } : query.open;
  const hit = grid.hits[grid.at(query.open)] ?? { ...known };
  details.show(index().name, hit, Boolean(studio), studio?.end(index().name));
}

function close() {
  if (history.state?.opened) history.back();
  else commit({ open: null }, "replace");
}

/** The details have gone: back to the tile that they were of. */
function closed() {
  if (details.hit === null) return;
  const at = grid.at(details.hit);
  const inside = details.root.contains(document.activeElement) || document.activeElement === document.body;
  details.hide();
  if (inside && at >= 0) grid.focus(at);
}

// ---- the studio ----

function make(mode, hit) {
  const over = details.root.matches(":modal");
  if (over) {
    details.hide(); // back to where one was, without a step in the history: what follows scrolls to the studio
    commit({ open: null }, "replace");
  }
  const begun = studio.take(mode, index().name, hit);
  if (begun) toggleStudio(true);
  const next = `${quoted(hit)} is one end. Open the other and choose “Interpolate” again.`;
  if (!begun && over) find("status").textContent = next;
  else if (!begun) details.say(next);
}

function toggleStudio(open) {
  find("studio").hidden = !open;
  find("studio-toggle").ariaExpanded = String(open);
}

// ---- pictures that people bring ----

async function picture(file, fresh) {
  find("error").hidden = true;
  try {
    use(await bring(file, info.limits?.upload_bytes ?? Infinity), fresh);
  } catch (error) {
    tell(find("error"), error);
  }
}

/** Search from a picture (fresh), or add it to the query. */
function use(name, fresh) {
  const added = Query.chip("image", name);
  if (fresh) commit({ words: "", chips: [added], k: Query.PAGE, open: null });
  else commit({ chips: [...query.chips, added], k: Query.PAGE });
}

// ---- the forms ----

function listen() {
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const { words, chips: parts } = Query.parse(find("words").value);
    write(words);
    const next = { words, chips: [...query.chips, ...parts], k: Query.PAGE, open: null };
    if (!words && !next.chips.length) find("words").focus();
    else if (words === query.words && !parts.length && query.open === null) search();
    else commit(next);
  });
  const idea = (weight) => {
    const ideas = Query.terms(find("idea").value);
    if (!ideas.length) return find("idea").focus();
    find("idea").value = "";
    const parts = ideas.map(([words, own]) => Query.chip("text", words, weight * own));
    commit({ chips: [...query.chips, ...parts], k: Query.PAGE });
  };
  find("compose").addEventListener("submit", (event) => {
    event.preventDefault();
    idea(1);
  });
  find("idea-minus").addEventListener("click", () => idea(-1));
  find("distinct").addEventListener("change", ({ target }) => commit({ distinct: target.checked, k: Query.PAGE }));
  for (const radio of document.getElementsByName("by")) {
    radio.addEventListener("change", () => commit({ by: radio.value, k: Query.PAGE }));
  }
  find("index").addEventListener("change", ({ target }) => {
    known.clear();
    const chips = query.chips.filter(({ kind }) => kind !== "key");
    commit({ index: target.value, chips, where: "", k: Query.PAGE, open: null });
  });
  find("more").addEventListener("click", () => commit({ k: Math.min(Query.MOST, query.k + Query.PAGE) }, "replace"));
  find("studio-toggle").addEventListener("click", () => toggleStudio(find("studio").hidden));
  find("home").addEventListener("click", (event) => {
    event.preventDefault();
    commit({ ...Query.empty(), index: query.index });
    find("words").focus();
  });
  document.addEventListener("keydown", (event) => {
    const { target } = event;
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !target.matches("input, textarea, select")) {
      event.preventDefault();
      find("words").focus();
      find("words").select();
    } else if (event.key === "Escape" && query.open !== null && find("grid").contains(target)) close();
  });
  window.addEventListener("popstate", restore);
}

async function begin() {
  find("error").hidden = true;
  try {
    info = await call("api/info");
  } catch (error) {
    return tell(find("error"), error, begin);
  }
  find("index").replaceChildren(...info.indexes.map(({ name }) => element("option", { value: name }, name)));
  find("index-choice").hidden = info.indexes.length < 2;
  if (info.generator) {
    studio = new Studio(find("studio"), info.generator, use);
    find("studio-toggle").hidden = false;
  }
  listen();
  takePictures(picture, () => !Query.isEmpty(query));
  restore();
  document.documentElement.dataset.ready = "true";
}

begin();
