// Filters: an expression over the metadata's columns, which are offered by name and type.

import { element, find } from "./element.js";

const PLAIN = /^[\p{L}_][\p{L}\p{N}_]*(\.[\p{L}_][\p{L}\p{N}_]*)*$/u; // a name that needs no backticks
const WORD = /^(and|or|not|in|is|null|none|true|false)(\.|$)/i; // of the language: as a column it needs them
const DULL = ["image_path", "caption", "key", "id"]; // differ in every row: no good examples
// what is written for a column of a kind, and how far from its end one goes on writing
const BEGINNINGS = {
  number: (name) => [`${name} >= `, 0],
  text: (name) => [`${name} == ''`, 1],
  date: (name) => [`${name} >= ''`, 1],
  list: (name) => [`'' in ${name}`, name.length + 5],
};

const isPlain = (name) => PLAIN.test(name) && !WORD.test(name);

export class Filter {
  /** apply(where): search with this expression; "" for none. */
  constructor(apply) {
    this.field = find("where");
    this.error = find("where-error");
    this.shown = "";
    find("filter").addEventListener("submit", (event) => {
      event.preventDefault();
      apply(this.field.value.trim());
    });
    find("where-clear").addEventListener("click", () => {
      this.field.value = "";
      apply("");
      this.field.focus();
    });
    this.field.addEventListener("input", () => this.tell(""));
    find("filter-toggle").addEventListener("click", () => {
      this.open(find("filter").hidden);
      if (!find("filter").hidden) this.field.focus();
    });
  }

  open(open) {
    find("filter").hidden = !open;
    find("filter-toggle").ariaExpanded = String(open);
  }

  /** Show the expression that is in force. */
  show(where) {
    if (where !== this.shown) this.field.value = this.shown = where; // else what is being written stays
    find("filter-toggle").classList.toggle("on", Boolean(where));
    if (where) this.open(true);
    if (!where) this.tell("");
  }

  /** What is wrong with the expression; "" if nothing. */
  tell(message) {
    this.error.textContent = message;
    this.error.hidden = !message;
    this.field.ariaInvalid = message ? "true" : null;
    if (message) this.open(true);
  }

  /** columns: {name: type} */
  columns(columns) {
    const names = Object.entries(columns ?? {});
    find("columns").replaceChildren(...names.map(([name, type]) => element("button", {
      type: "button", title: `Put ${name} into the expression`, onclick: () => this.#put(name, String(type)),
    }, name, element("small", {}, String(type)))));
    const usable = names.filter(([name]) => isPlain(name) && !DULL.includes(name));
    const first = (kind) => usable.find(([, type]) => type === kind)?.[0];
    const [text, number] = [first("text"), first("number")];
    const parts = [text && `${text} == '…'`, number && `${number} >= 64`].filter(Boolean);
    const example = parts.length ? [", as in ", element("code", {}, parts.join(" and "))] : [];
    find("where-example").replaceChildren(...example);
  }

  #put(column, type) {
    const field = this.field;
    const before = field.value.slice(0, field.selectionStart ?? field.value.length).trimEnd();
    const after = field.value.slice(field.selectionEnd ?? field.value.length).trimStart();
    const joint = !before || /(^|\s|\()(and|or|not|in)$|[(=<>,]$/.test(before) ? (before && " ") : " and ";
    const name = isPlain(column) ? column : `\`${column}\``;
    const [put, back] = Object.hasOwn(BEGINNINGS, type) ? BEGINNINGS[type](name) : [name, 0];
    field.value = `${before}${joint}${put}${after && ` ${after}`}`;
    const end = before.length + joint.length + put.length - back;
    field.focus();
    field.setSelectionRange(end, end);
    this.tell("");
  }
}
