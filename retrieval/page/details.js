// One result at large: picture, captions, score, metadata, provenance, and what one can do with it. A panel beside the
// results where there is room, else a dialog over them.

import { call, isAborted, tell } from "./api.js";
import { element } from "./element.js";
import { show } from "./pictures.js";
import { isSame } from "./query.js";
import { list } from "./record.js";
import { long } from "./score.js";

const WIDE = window.matchMedia("(min-width: 60rem)");

export class Details {
  /** on: {close(), step(by), from(hit), add(hit, weight), vary(hit), edit(hit), mix(hit)}; the last three are used
   *  with a generator only. */
  constructor(root, on) {
    Object.assign(this, { root, on, index: null, hit: null }); // hit: of what is shown, null: nothing is
    root.addEventListener("cancel", (event) => {
      event.preventDefault();
      this.on.close();
    });
    root.addEventListener("keydown", (event) => this.#key(event));
    root.addEventListener("click", ({ target }) => target === root && root.matches(":modal") && this.on.close());
    WIDE.addEventListener("change", () => this.root.open && this.#open());
  }

  /** hit: {row, and what is known of it}; the rest is asked of the server. generator: whether pictures can be made.
   *  end: the hit that waits for the other end of a walk. */
  async show(index, hit, generator, end = null) {
    const same = this.shows(hit) && this.index === index && this.root.open;
    if (same && (this.hit.score ?? null) === (hit.score ?? null)) return;
    Object.assign(this, { index, hit });
    this.#draw(hit, generator, end);
    if (!this.root.open) this.#open();
    if (!same) this.root.scrollTop = 0;
    const place = this.root.querySelector(".rest");
    try {
      const key = hit.key ? `?${new URLSearchParams({ key: hit.key })}` : "";
      const details = await call(`api/details/${encodeURIComponent(index)}/${hit.row}${key}`, { purpose: "details" });
      if (!hit.key) {
        Object.assign(hit, { key: details.key, caption: details.caption });
        this.root.querySelector("h2").textContent = hit.caption || hit.key;
      }
      this.#fill(place, hit, details);
    } catch (error) {
      if (isAborted(error)) return;
      tell(place, error, () => {
        this.hit = null;
        this.show(index, hit, generator, end);
      });
    }
  }

  /** Whether it is this result {row, key} that is shown. */
  shows(place) {
    return this.hit !== null && isSame(this.hit, place);
  }

  /** A word about what was just done. */
  say(text) {
    this.root.querySelector(".said").textContent = text;
  }

  hide() {
    this.hit = null;
    if (this.root.open) this.root.close();
  }

  #open() {
    if (this.root.open) this.root.close();
    if (WIDE.matches) this.root.show();
    else this.root.showModal();
  }

  #draw(hit, generator, end) {
    const focused = this.root.contains(document.activeElement) && document.activeElement.dataset.act;
    const act = (name, label, run, title) =>
      element("button", { type: "button", data: { act: name }, onclick: run, title }, label);
    const mix = end && !isSame(end, hit) ? `Interpolate with ${quoted(end)}` : "Interpolate";
    const img = element("img", { alt: hit.caption || "", decoding: "async" });
    show(img, this.index, hit, null);
    const parts = [
      element("div", { class: "bar" },
        act("previous", "‹", () => this.on.step(-1), "Previous result"),
        act("next", "›", () => this.on.step(1), "Next result"),
        element("span", { class: "quiet" }, hit.rank ? `result ${hit.rank}` : `row ${hit.row}`),
        act("close", "×", () => this.on.close(), "Close (Escape)")),
      element("div", { class: "mat large" }, img),
      element("h2", { id: "details-title", tabIndex: -1 }, hit.caption || hit.key || ""),
      element("p", { class: "quiet" }, long(hit)),
      element("div", { class: "actions", role: "group", "aria-label": "Use this result" },
        act("from", "Search from this", () => this.on.from(hit)),
        act("plus", [sign("+"), " add"], () => this.on.add(hit, 1), "Add it to the query"),
        act("minus", [sign("−"), " take away"], () => this.on.add(hit, -1), "Take it away from the query")),
      generator && element("div", { class: "actions", role: "group", "aria-label": "Make pictures of this result" },
        act("vary", "Vary", () => this.on.vary(hit), "Generate other pictures of the same meaning"),
        act("edit", "Edit by words", () => this.on.edit(hit), "Generate it changed towards words"),
        act("mix", mix, () => this.on.mix(hit), "Generate what lies between this and a second result")),
      element("p", { class: "said", role: "status" }),
      element("div", { class: "rest", "aria-busy": "true" }),
    ];
    this.root.replaceChildren(...parts.filter(Boolean));
    for (const button of this.root.querySelectorAll(".bar button")) button.ariaLabel = button.title;
    if (focused) this.root.querySelector(`[data-act="${focused}"]`)?.focus();
  }

  #fill(place, hit, details) {
    const others = (details.captions ?? []).filter((caption) => caption !== hit.caption);
    const part = (title, content) => (content ? [element("h3", {}, title), content] : []);
    const said = element("ul", { class: "captions" }, others.map((text) => element("li", {}, text)));
    // the key and the row stand first, and are not what the metadata says they are
    const meta = { key: null, row: null, ...details.meta, key: details.key, row: details.row };
    place.ariaBusy = "false";
    place.replaceChildren(
      ...part("Also said of it", others.length && said),
      ...part("Metadata", list(meta)),
      ...part("Provenance", list(details.provenance)));
  }

  #key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !event.altKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      this.on.step(by);
    } else if (event.key === "Escape" && !this.root.matches(":modal")) {
      event.preventDefault();
      this.on.close();
    }
  }
}

/** A hit by the beginning of its caption. */
export function quoted({ caption, key, row }) {
  const text = caption || key || `row ${row}`;
  return `“${text.length > 28 ? `${text.slice(0, 27)}…` : text}”`;
}

function sign(text) {
  return element("span", { class: `sign ${text === "+" ? "plus" : "minus"}`, "aria-hidden": "true" }, text);
}
