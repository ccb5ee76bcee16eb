// Making elements. Whatever comes from the index or the server is hostile text: it goes in as text nodes and
// properties, never as markup. (The page's policy forbids the other way too: trusted-types 'none'.)

/** element("p", {class: "quiet", onclick: f, ariaLabel: "x"}, "text", child, null) */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "for") made.htmlFor = value;
    else if (name === "role") made.setAttribute("role", value);
    else if (name.startsWith("aria-")) made.setAttribute(name, value);
    else if (name === "data") Object.assign(made.dataset, value);
    else made[name] = value;
  }
  made.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return made;
}

export const find = (id) => document.getElementById(id);

/** "12,345" */
export const count = (number) => Number(number).toLocaleString("en");

/** The first letter large, a full stop at the end: the server's messages as sentences. */
export function sentence(text) {
  const words = String(text).trim();
  const whole = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?:;]$/.test(whole) ? whole : `${whole}.`;
}
