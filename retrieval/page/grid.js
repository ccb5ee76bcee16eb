// The results: a grid of pictures. Tab enters and leaves it, arrow keys move in it, Enter opens one, + and - add it to
// the query or take it away.

import { element } from "./element.js";
import { thumbnail } from "./pictures.js";
import { isSame } from "./query.js";
import { long, short } from "./score.js";

export class Grid {
  /** root: a <ul>. on: {open(hit), add(hit, weight)}. */
  constructor(root, on) {
    Object.assign(this, { root, on, hits: [], tiles: [] });
    root.addEventListener("keydown", (event) => this.#key(event));
    root.addEventListener("focusin", ({ target }) => this.#rove(this.tiles.indexOf(target)));
  }

  /** Show these hits. more: they begin with those that are there, which stay as they are. */
  show(hits, index, more = false) {
    const stay = more ? this.#common(hits) : 0;
    for (const tile of this.tiles.slice(stay)) tile.parentElement.remove();
    this.tiles.length = stay;
    this.hits = hits;
    for (const hit of hits.slice(stay)) this.tiles.push(this.#tile(hit, index));
    this.root.append(...this.tiles.slice(stay).map((tile) => element("li", {}, tile)));
    if (!stay && this.tiles.length) this.#rove(0);
    return stay;
  }

  /** Mark the tile whose details are shown. */
  mark(place) {
    const at = this.at(place);
    for (const [i, tile] of this.tiles.entries()) tile.ariaCurrent = i === at ? "true" : null;
  }

  /** Scroll as little as shows this result's tile. */
  reveal(place) {
    this.tiles[this.at(place)]?.scrollIntoView({ block: "nearest" });
  }

  /** Where a result {row, key} is; -1 if it is not among these, or null. */
  at(place) {
    return place ? this.hits.findIndex((hit) => isSame(hit, place)) : -1;
  }

  focus(i) {
    this.tiles[i]?.focus();
  }

  #common(hits) {
    const differs = this.tiles.findIndex((_, i) => !hits[i] || !isSame(this.hits[i], hits[i]));
    return differs < 0 ? this.tiles.length : differs;
  }

  #tile(hit, index) {
    const img = thumbnail(index, hit);
    return element("button", {
      type: "button", class: "tile", tabIndex: -1, data: { row: hit.row },
      onclick: () => this.on.open(hit),
    },
    element("span", { class: "mat" }, img),
    element("span", { class: "caption" }, hit.caption || hit.key),
    element("span", { class: "score", title: long(hit) }, short(hit)));
  }

  #rove(i) {
    if (i < 0) return;
    for (const tile of this.tiles) tile.tabIndex = -1;
    this.tiles[i].tabIndex = 0;
  }

  #columns() {
    const top = this.tiles[0]?.offsetTop;
    const wraps = this.tiles.findIndex((tile) => tile.offsetTop !== top);
    return wraps < 0 ? this.tiles.length : wraps;
  }

  #key(event) {
    const i = this.tiles.indexOf(document.activeElement);
    if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const last = this.tiles.length - 1;
    const down = i + this.#columns();
    const to = {
      ArrowLeft: i - 1, ArrowRight: i + 1, ArrowUp: i - this.#columns(),
      ArrowDown: down > last && i < last ? last : down, Home: 0, End: last,
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      if (to >= 0 && to <= last) this.tiles[to].focus();
    } else if (event.key === "+" || event.key === "-") {
      event.preventDefault();
      this.on.add(this.hits[i], event.key === "+" ? 1 : -1);
    }
  }
}
