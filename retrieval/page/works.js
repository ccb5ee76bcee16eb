// Pictures that were made: each with a download, ways to search from it and how it was made; and the strip of steps.

import { element } from "./element.js";
import { fromBase64, keep } from "./pictures.js";
import { list } from "./record.js";

export class Works {
  /** use(picture name, fresh): search from a picture (fresh), or add it to the query. */
  constructor(root, use) {
    Object.assign(this, { root, use, urls: [] });
  }

  /** answer: of /api/generate. title: what was made, in words. */
  show(answer, title) {
    for (const url of this.urls) URL.revokeObjectURL(url);
    this.urls = [];
    const works = answer.pictures.map((made, i) => this.#work(made, title, `${title}, picture ${i + 1}`));
    const parts = [element("div", { class: "works" }, works)];
    if (answer.strip?.length) parts.push(this.#strip(answer.strip));
    this.root.replaceChildren(...parts);
  }

  #work({ png, seed, provenance }, title, alt) {
    const bytes = fromBase64(png);
    const url = this.#address(bytes);
    const use = (fresh) => async () => this.use(await keep(bytes, `made, seed ${seed}`), fresh);
    const act = (label, help, fresh) => element("button", { type: "button", title: help, onclick: use(fresh) }, label);
    const download = `unclip-${slug(title)}-${seed}.png`;
    return element("figure", { class: "work" },
      element("span", { class: "mat" }, element("img", { src: url, alt })),
      element("figcaption", {},
        element("a", { class: "button", href: url, download, title: "A PNG that holds how it was made" }, "Download"),
        act("Search", "Search from this picture", true),
        act("Add", "Add it to the query", false),
        element("details", {}, element("summary", {}, "How it was made"), list(provenance))));
  }

  #strip(steps) {
    const frames = steps.map((png, i) => {
      const alt = `step ${i + 1} of ${steps.length}`;
      return element("li", {}, element("img", { src: this.#address(fromBase64(png)), alt }));
    });
    const said = "From noise to picture: what the model takes the first one for, step by step.";
    return element("figure", { class: "strip" },
      element("ol", {}, frames), element("figcaption", { class: "quiet" }, said));
  }

  #address(bytes) {
    const url = URL.createObjectURL(bytes);
    this.urls.push(url);
    return url;
  }
}

/** "A red fox!" -> "a-red-fox" */
function slug(text) {
  const plain = text.toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "-").slice(0, 40);
  return plain.replace(/^-|-$/g, "") || "picture";
}
