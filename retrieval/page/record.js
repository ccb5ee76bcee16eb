// Metadata and provenance as lists of names and values, whatever their shape.

import { element } from "./element.js";

const DEEP = 4; // levels of nesting shown as such; below that as JSON

/** A <dl> of an object's fields; null if there are none. */
export function list(record, depth = 0) {
  const fields = Object.entries(record ?? {}).filter(([, value]) => (value ?? "") !== "");
  if (!fields.length) return null;
  const rows = fields.map(([name, value]) => [element("dt", {}, name), element("dd", {}, shown(value, depth + 1))]);
  return element("dl", { class: "record" }, rows);
}

function shown(value, depth) {
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) return value.join(", ");
  if (Array.isArray(value) || (typeof value === "object" && depth >= DEEP)) return JSON.stringify(value);
  if (typeof value === "object") return list(value, depth);
  const fraction = typeof value === "number" && !Number.isInteger(value);
  const text = String(fraction ? Number(value.toPrecision(6)) : value);
  if (/^sha256:[0-9a-f]{16,}$/.test(text)) return element("code", { title: text }, `${text.slice(0, 19)}…`);
  if (!/^https?:\/\/\S+$/.test(text)) return text;
  return element("a", { href: text, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}
