// Requests to the server. Paths are relative, so the page also works if its app is mounted below a path.

import { byId } from "./dom.js";

const KEY = "pear-token";
let opened = null;

/** An error, as one line for the user. */
export class Failure extends Error {}

/** Asks the server. If it needs a token, the user is asked for one. */
export async function call(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, credentials: "omit", redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server cannot be reached.");
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({}));
    if (response.status !== 401) throw new Failure(sentence(problem, response.status));
    if (options.quiet) throw new Failure("A token is needed.");
    await askForToken(token ? problem.detail : "");
  }
}

export const json = async (path, options) => (await call(path, options)).json();

/** A problem (RFC 9457) as a line. */
export function sentence(problem, status) {
  const text = String(problem.detail || problem.title || `The server answered with ${status}.`);
  const near = Array.isArray(problem.near) && problem.near.length ? ` Did you mean ${problem.near.join(", ")}?` : "";
  const line = text.charAt(0).toUpperCase() + text.slice(1);
  return (/[.!?]$/.test(line) ? line : `${line}.`) + near;
}

export const hasToken = () => sessionStorage.getItem(KEY) !== null;

export function forgetToken() {
  sessionStorage.removeItem(KEY);
}

/** Opens the dialog once, even if several calls wait for it. */
function askForToken(why) {
  opened ??= new Promise((resolve) => {
    const door = byId("door");
    const field = byId("token");
    byId("door-note").textContent = why ? `${sentence({ detail: why })} Try another one.` : "It is kept until this tab is closed.";
    field.value = "";
    byId("door-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      field.value = "";
      opened = null;
      door.close();
      resolve();
    };
    door.oncancel = (event) => event.preventDefault();
    door.showModal();
  });
  return opened;
}
