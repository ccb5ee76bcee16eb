// Pictures: those of the index, shown when they come into view, and those that people bring.

import { Refusal, blob, hasToken } from "./api.js";
import { element } from "./element.js";

const SIDE = 1024; // pixels; larger pictures are scaled down before they are sent: a CLIP sees 224 or so
const BYTES = 2_000_000;
const AGAIN = 1500; // ms after which a picture that did not come is asked for once more
const READABLE = ["image/jpeg", "image/png", "image/webp"];

/** Pictures that are part of queries: name -> {base64, url, label}. */
export const brought = new Map();

/** Show a result's picture in an <img>: small when it comes into view, or as it is stored (side null). */
export function show(img, index, { row, key }, side = window.devicePixelRatio > 1.3 ? 512 : 256) {
  const how = new URLSearchParams({ ...(side ? { side } : {}), ...(key ? { key } : {}) });
  const path = `api/picture/${encodeURIComponent(index)}/${row}?${how}`;
  img.onerror = () => {
    if (img.dataset.again) img.parentElement?.classList.add("gone");
    else setTimeout(() => again(img, path), AGAIN);
  };
  load(img, path);
}

/** An <img> of a result's picture in small, fetched when it comes near. */
export function thumbnail(index, hit) {
  const how = { alt: "", loading: "lazy", decoding: "async", width: 256, height: 256, draggable: false };
  const img = element("img", how);
  show(img, index, hit);
  return img;
}

function load(img, path) {
  if (!hasToken()) {
    img.src = path;
    return;
  }
  img.dataset.path = path;
  inView.observe(img);
}

/** Once more: the server may have had too much to do. */
function again(img, path) {
  img.dataset.again = "true";
  img.removeAttribute("src");
  load(img, path);
}

const inView = new IntersectionObserver(async (entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    inView.unobserve(target);
    blob(target.dataset.path).then((bytes) => {
      const url = URL.createObjectURL(bytes);
      target.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
      target.src = url;
    }).catch(() => target.onerror?.());
  }
}, { rootMargin: "400px" });

/** Keep a picture file for a query; returns its name in `brought`. */
export async function bring(file, most) {
  let bytes = file;
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Refusal(`${file.name || "What was given"} is not a picture that this browser can read.`, 400);
  });
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale < 1 || file.size > Math.min(BYTES, most * 0.7) || !READABLE.includes(file.type)) {
    bytes = await scaled(bitmap, scale, file.type === "image/jpeg" ? "image/jpeg" : "image/png");
    if (bytes.size > BYTES) bytes = await scaled(bitmap, scale, "image/jpeg");
  }
  bitmap.close();
  return keep(bytes, file.name || "picture");
}

/** Keep bytes (a Blob) for a query, under a name that no picture had before: the tab's history outlives a reload. */
export async function keep(bytes, label) {
  const name = crypto.getRandomValues(new Uint32Array(4)).join("-"); // randomUUID() is for https only
  brought.set(name, { base64: await toBase64(bytes), url: URL.createObjectURL(bytes), label });
  return name;
}

/** base64 -> Blob */
export function fromBase64(text, type = "image/png") {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type });
}

function toBase64(bytes) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refusal("The picture cannot be read.", 400));
    reader.readAsDataURL(bytes);
  });
}

function scaled(bitmap, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
}
