// The further parts of a query: one chip each, with its sign, its weight and a way to remove it.

import { element } from "./element.js";
import { brought, show } from "./pictures.js";
import { WEIGHT } from "./query.js";

export class Chips {
  /** root: the list. known: key -> {row, caption} of rows seen. on: {change(lasting), remove(chip)}. */
  constructor(root, known, on) {
    Object.assign(this, { root, known, on, shown: [] });
  }

  show(chips, index) {
    this.root.hidden = !chips.length;
    this.shown = chips;
    this.root.replaceChildren(...chips.map((chip) => this.#item(chip, index)));
  }

  /** The weights and signs that chips have now, without making them anew: a slider that is held stays held. */
  sync() {
    for (const [i, item] of [...this.root.children].entries()) paint(item, this.shown[i]);
  }

  #item(chip, index) {
    const item = element("li", { class: "chip", data: { kind: chip.kind } });
    const name = this.#name(chip);
    item.append(
      element("button", {
        type: "button", class: "sign",
        onclick: () => {
          chip.weight = -chip.weight;
          this.on.change(true);
        },
      }),
      this.#face(chip, index, name),
      element("label", { class: "unseen", for: `weight-${chip.id}` }, `Weight of ${name}`),
      element("input", {
        type: "range", id: `weight-${chip.id}`, min: 0.1, max: Math.max(WEIGHT, Math.abs(chip.weight)), step: 0.1,
        oninput: ({ target }) => {
          chip.weight = Math.sign(chip.weight) * Number(target.value);
          this.on.change(false);
        },
        onchange: () => this.on.change(true),
      }),
      element("output", { for: `weight-${chip.id}` }),
      element("button", {
        type: "button", class: "remove", ariaLabel: `Remove ${name}`, title: "Remove",
        onclick: () => this.on.remove(chip),
      }, "×"),
    );
    paint(item, chip, name);
    return item;
  }

  #name(chip) {
    if (chip.kind === "image") return brought.get(chip.value)?.label ?? "picture";
    return chip.kind === "key" ? this.known.get(chip.value)?.caption || chip.value : chip.value;
  }

  #face(chip, index, name) {
    const label = element("span", { class: "label", title: name }, name);
    if (chip.kind === "text") return label;
    const img = element("img", { alt: "", width: 40, height: 40 });
    const face = element("span", { class: "face" }, img, label);
    const row = this.known.get(chip.value)?.row;
    if (chip.kind === "image") img.src = brought.get(chip.value).url;
    else if (row !== undefined && index) show(img, index, { row, key: chip.value }, 256);
    else img.remove();
    return face;
  }
}

function paint(item, chip) {
  const [sign, , , slider, output] = item.children;
  const added = chip.weight > 0;
  item.classList.toggle("minus", !added);
  sign.textContent = added ? "+" : "−";
  sign.ariaLabel = added ? "Added; take it away instead" : "Taken away; add it instead";
  sign.title = added ? "Take it away instead" : "Add it instead";
  slider.value = Math.abs(chip.weight);
  output.textContent = `×${Math.abs(chip.weight).toFixed(2).replace(/0$/, "")}`;
}
