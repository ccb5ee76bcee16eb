// The studio: new pictures of words, of one result, between two, or of one result turned towards words.

import { abort, call, isAborted, tell } from "./api.js";
import { element } from "./element.js";
import { show } from "./pictures.js";
import { isSame } from "./query.js";
import { Works } from "./works.js";

const PURPOSE = "generate";
// what a mode is called, the results it needs, and the button of a result that brings them
const MODES = {
  generate: ["words", 0],
  vary: ["vary", 1, "Vary"],
  interpolate: ["between two", 2, "Interpolate"],
  edit: ["edit", 1, "Edit by words"],
};

export class Studio {
  /** generator: of /api/info. use(picture name, fresh): search from a picture that was made, or add it to the query. */
  constructor(root, generator, use) {
    const { generate, ...ofResults } = MODES; // words need a prior, which the server may not have
    const possible = generator.prompts === false ? ofResults : MODES;
    Object.assign(this, { root, possible, index: null, slots: [null, null], written: false });
    this.#build(generator);
    this.works = new Works(this.made, use);
    this.#choose(Object.keys(this.possible)[0]);
  }

  /** The words of the query are the prompt, until another is written. */
  prompt(words) {
    if (!this.written) this.words.value = words;
    this.#allow();
  }

  /** The result of this index that is one end of a walk and waits for the other; null if there is none. */
  end(index) {
    return this.mode === "interpolate" && this.index === index && !this.slots[1] ? this.slots[0] : null;
  }

  /** Take a result as what is varied, edited, or one end of a walk; begins at once where nothing more is needed.
   *  False if it is the first of two. */
  take(mode, index, hit) {
    const end = mode === "interpolate" && this.end(index);
    this.index = index;
    this.slots = end && !isSame(end, hit) ? [end, hit] : [hit, null];
    this.#choose(mode);
    if (mode === "interpolate" && !this.slots[1]) return false;
    this.root.hidden = false;
    this.root.scrollIntoView({ block: "start", behavior: "instant" });
    if (mode === "edit") this.towards.focus();
    else this.run();
    return true;
  }

  /** Make what the form asks for; what is under way is given up. */
  async run() {
    const body = this.#request();
    const title = this.#title();
    const many = `${body.count} ${body.count === 1 ? "picture" : "pictures"}`;
    const began = performance.now();
    this.#busy(true);
    this.alert.hidden = true;
    this.status.textContent = `Making ${many} …`;
    try {
      const answer = await call("api/generate", { body, purpose: PURPOSE });
      this.works.show(answer, title);
      this.#busy(false);
      this.status.textContent = `${many}, ${((answer.ms ?? performance.now() - began) / 1000).toFixed(1)} s.`;
    } catch (error) {
      if (isAborted(error)) return; // a newer request is under way, or stop() has tidied up
      this.#busy(false);
      this.status.textContent = "";
      tell(this.alert, error, () => this.run());
    }
  }

  stop() {
    abort(PURPOSE);
    this.#busy(false);
    this.status.textContent = "Stopped.";
  }

  #request() {
    const { mode } = this;
    const from = this.#needed().map(({ row, key }) => ({ index: this.index, row, key: key ?? null }));
    return {
      mode,
      prompt: mode === "generate" ? this.words.value.trim() : null,
      text: mode === "edit" ? this.towards.value.trim() : null,
      from: from.length ? from : null,
      count: mode === "edit" ? 1 : Math.max(Number(this.count.value), mode === "interpolate" ? 2 : 1),
      seed: Math.max(0, Math.floor(Number(this.seed.value) || 0)),
      steps: Number(this.steps.value),
      guidance: Number(this.guidance.value),
      strip: this.strip.checked,
    };
  }

  #title() {
    const of = this.slots[0]?.caption || "a result";
    return {
      generate: this.words.value.trim(), vary: of, edit: this.towards.value.trim(), interpolate: `from ${of}`,
    }[this.mode];
  }

  /** The slots that the mode needs. */
  #needed() {
    return this.slots.slice(0, MODES[this.mode][1]);
  }

  #busy(busy) {
    this.root.ariaBusy = String(busy);
    this.track.classList.toggle("busy", busy);
    this.halt.hidden = !busy;
    this.go.textContent = busy ? "Again" : "Generate";
  }

  /** Generating is possible once everything it needs is there. */
  #allow() {
    const text = { generate: this.words, edit: this.towards }[this.mode];
    this.go.disabled = !this.#needed().every(Boolean) || text?.value.trim() === "";
  }

  #choose(mode) {
    this.mode = mode;
    for (const radio of this.modes.querySelectorAll("input")) radio.checked = radio.value === mode;
    const text = { generate: [this.words, "Prompt"], edit: [this.towards, "Towards"] }[mode];
    const parts = this.#needed().map((hit, i) => this.#slot(hit, i));
    if (text) {
      const [field, label] = text;
      parts.push(element("div", { class: "prompt" }, element("label", { for: field.id }, label), field));
    }
    this.sources.replaceChildren(...parts);
    this.count.parentElement.hidden = mode === "edit";
    this.#allow();
  }

  #slot(hit, i) {
    if (!hit) {
      const [, , button] = MODES[this.mode];
      const text = `${i ? "the other end: " : ""}open a result, then “${button}”`;
      return element("p", { class: "slot vacant quiet" }, text);
    }
    const img = element("img", { alt: "", width: 96, height: 96 });
    show(img, this.index, hit, 256);
    return element("figure", { class: "slot" },
      element("span", { class: "mat" }, img),
      element("figcaption", {}, hit.caption || hit.key || `row ${hit.row}`));
  }

  #build(generator) {
    const most = generator.max_count ?? 4;
    const form = this.#form([
      this.#range("guidance", generator.guidance ?? 2, 0, 8, 0.1),
      this.#range("steps", generator.steps ?? 16, 2, 64, 1),
      this.#range("count", Math.min(4, most), 1, most, 1, "pictures"),
      this.#seed(),
      this.#switch(),
    ]);
    this.status = element("p", { class: "status", role: "status", "aria-live": "polite" });
    this.track = element("div", { class: "track", "aria-hidden": "true" });
    this.alert = element("div", { class: "notice", role: "alert", hidden: true });
    const size = generator.size ? `${generator.size} × ${generator.size} pixels` : "pictures";
    const first = `The generator draws ${size}. The same words, settings and seed give the same picture.`;
    this.made = element("div", { class: "made" }, element("p", { class: "quiet" }, first));
    this.root.replaceChildren(
      element("h2", { id: "studio-title", class: "unseen" }, "Make pictures"), form,
      element("div", { class: "output" }, this.status, this.track, this.alert, this.made));
  }

  #form(settings) {
    const writing = (properties) => element("input", { maxLength: 2000, oninput: () => this.#allow(), ...properties });
    this.words = writing({ id: "studio-words", placeholder: "what to make" });
    this.words.addEventListener("input", () => (this.written = true));
    this.towards = writing({ id: "studio-towards", placeholder: "what it should become" });
    this.sources = element("div", { class: "sources" });
    this.modes = element("fieldset", { class: "segments" }, element("legend", { class: "unseen" }, "Make pictures of"),
      Object.entries(this.possible).map(([value, [label]]) => element("label", {},
        element("input", { type: "radio", name: "mode", value, onchange: () => this.#choose(value) }),
        element("span", {}, label))));
    this.go = element("button", { class: "strong" }, "Generate");
    this.halt = element("button", { type: "button", hidden: true, onclick: () => this.stop() }, "Stop");
    const submit = (event) => {
      event.preventDefault();
      this.run();
    };
    return element("form", { class: "bench", autocomplete: "off", onsubmit: submit },
      this.modes, this.sources, element("div", { class: "settings" }, settings),
      element("div", { class: "field" }, this.go, this.halt));
  }

  /** A slider, kept as this[name]. */
  #range(name, value, min, max, step, label = name) {
    const id = `studio-${name}`;
    const output = element("output", { for: id }, String(value));
    const slider = element("input", { type: "range", id, min, max, step, value });
    slider.addEventListener("input", () => (output.textContent = slider.value));
    this[name] = slider;
    return element("div", { class: "setting" }, element("label", { for: id }, label), slider, output);
  }

  #seed() {
    const how = { type: "number", min: 0, step: 1, value: 0, inputMode: "numeric" };
    this.seed = element("input", { id: "studio-seed", ...how });
    const another = () => (this.seed.value = Math.floor(Math.random() * 1e6));
    return element("div", { class: "setting" }, element("label", { for: "studio-seed" }, "seed"), this.seed,
      element("button", { type: "button", title: "Another seed", ariaLabel: "new seed", onclick: another }, "new"));
  }

  #switch() {
    this.strip = element("input", { type: "checkbox", id: "studio-strip", role: "switch" });
    return element("label", { class: "switch" }, this.strip, element("span", {}, "show the steps"));
  }
}
