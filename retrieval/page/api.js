// Talking to the server: JSON in and out, one request at a time for each purpose, errors in words, the token.

import { element, find, sentence } from "./element.js";

const TOKEN = "unclip.token";
const BUSY = "The server has as much to do as it can take.";
const running = new Map(); // purpose -> AbortController of the request that is under way
let asking = null; // the promise of a token, while its dialog is open

/** What the server refused, in words for people. status 0: it did not answer. */
export class Refusal extends Error {
  constructor(message, status = 0, details = {}) {
    super(message);
    Object.assign(this, { status, details });
  }
}

export const hasToken = () => Boolean(sessionStorage.getItem(TOKEN));

/** True of the error that a superseded or stopped request ends with; nobody need hear of it. */
export const isAborted = (error) => error?.name === "AbortError";

/** Stop what is under way for this purpose. */
export function abort(purpose) {
  running.get(purpose)?.abort();
  running.delete(purpose);
}

/** The answer's JSON. body: sent as JSON by POST. purpose: a new request for it aborts the one before. */
export async function call(path, { body, purpose } = {}) {
  if (purpose) abort(purpose);
  const controller = new AbortController();
  if (purpose) running.set(purpose, controller);
  try {
    const response = await send(path, body, controller.signal);
    return await response.json();
  } catch (error) {
    if (error instanceof SyntaxError) throw new Refusal("The server's answer cannot be read. Is it an unclip server?");
    throw error;
  } finally {
    if (purpose && running.get(purpose) === controller) running.delete(purpose);
  }
}

/** A picture's bytes; for servers with a token, which an <img> cannot send. */
export async function blob(path, signal) {
  return (await send(path, undefined, signal)).blob();
}

async function send(path, body, signal) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    const what = { method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal };
    const response = await fetch(new URL(path, document.baseURI), what).catch((error) => {
      throw isAborted(error) ? error : new Refusal("The server does not answer. Is it still running?");
    });
    if (response.ok) return response;
    if (response.status === 401) {
      if (sessionStorage.getItem(TOKEN) === token) await askToken(token !== null);
      continue;
    }
    throw await refusal(response);
  }
}

async function refusal(response) {
  const details = (await response.json().catch(() => null))?.error ?? {};
  if (response.status === 429) {
    const wait = Number(response.headers.get("Retry-After"));
    return new Refusal(`${BUSY} Try again ${wait > 0 ? `in ${wait} s` : "in a moment"}.`, 429, details);
  }
  const said = typeof details.message === "string" && details.message ? details.message : null;
  return new Refusal(sentence(said ?? `The server answered with error ${response.status}`), response.status, details);
}

/** Ask the person for the token; all requests that wait for it share the dialog. */
function askToken(refused) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = find("token");
    const form = dialog.querySelector("form");
    const value = find("token-value");
    find("token-note").textContent = refused
      ? "The server does not know that token. Is it written right?"
      : "Whoever runs it has one. It is kept until this tab is closed.";
    value.value = "";
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN, value.value.trim());
      dialog.onclose = null;
      dialog.close();
      resolve();
    };
    dialog.onclose = () => reject(new Refusal("This server asks for a token.", 401));
    dialog.showModal();
    value.focus();
  }).finally(() => {
    asking = null;
  });
  return asking;
}

/** Show an error in `place`, with a button to try again where that can help. */
export function tell(place, error, again) {
  const text = error instanceof Refusal ? error.message : `Something went wrong in this page: ${error.message}`;
  if (!(error instanceof Refusal)) console.error(error);
  const useful = again && (!error.status || error.status === 401 || error.status === 429 || error.status >= 500);
  const button = useful && element("button", { type: "button", onclick: () => again() }, "Try again");
  place.replaceChildren(element("p", {}, text), ...(button ? [button] : []));
  place.hidden = false;
}
