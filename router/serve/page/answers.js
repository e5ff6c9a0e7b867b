// Asks some tasks at a time about the picture, and shows their answers.

import { json, sentence } from "./api.js";
import { bar, byId, count, element, milliseconds, percent, plural } from "./dom.js";

const SHOWN = 24; // answers shown before the user asks for more
const OPEN = 3; // up to so many answers are shown with all their labels
const URL_LENGTH = 6000; // characters of names in a URL; some proxies take at most 8,000

let rows = [];
let shown = 0;
let running = null;

export const isRunning = () => running !== null;

export const stop = () => running?.abort();

/** Asks tasks in as few requests as the server allows. Tasks of one request share the picture's forward. */
export async function ask(file, names, limit) {
  running = new AbortController();
  [rows, shown] = [[], 0];
  byId("found").replaceChildren();
  byId("found").classList.toggle("many", names.length > OPEN);
  byId("more").hidden = true;
  const began = performance.now();
  const parts = split(names, limit);
  const isOpen = names.length <= OPEN;
  try {
    for (const [number, part] of parts.entries()) {
      say(parts.length > 1 ? `${count(rows.length)} of ${count(names.length)} tasks answered …` : "Asking …");
      rows.push(...(await askOnce(file, part)));
      if (shown < SHOWN) show(SHOWN, isOpen);
      if (number === 0) bringIntoView();
    }
    say(summary(rows, performance.now() - began));
  } catch (error) {
    if (error.name !== "AbortError") {
      say(rows.length ? `${plural(rows.length, "answer")}, then it failed.` : "");
      throw error;
    }
    say(`Stopped after ${plural(rows.length, "answer")}.`);
  } finally {
    running = null;
    byId("more").hidden = shown >= rows.length;
  }
}

export function watch() {
  byId("more").addEventListener("click", () => {
    const next = shown;
    show(shown + SHOWN, false);
    byId("more").hidden = shown >= rows.length;
    byId("found").children[next]?.querySelector("summary")?.focus();
  });
}

async function askOnce(file, names) {
  const query = new URLSearchParams({ tasks: names.join(","), top: 5 });
  const headers = { "Content-Type": "application/octet-stream" };
  const found = await json(`v1/predict?${query}`, { method: "POST", body: file, headers, signal: running.signal });
  return found.results;
}

function split(names, limit) {
  const parts = [];
  let length = Infinity;
  for (const name of names) {
    if (length + name.length > URL_LENGTH || parts.at(-1).length >= limit) {
      parts.push([]);
      length = 0;
    }
    parts.at(-1).push(name);
    length += name.length + 3;
  }
  return parts;
}

const say = (text) => {
  byId("summary").textContent = text;
};

function summary(rows, elapsed) {
  const good = rows.filter((row) => row.error === null);
  const bad = rows.length - good.length;
  const line = `${plural(good.length, "answer")} in ${milliseconds(elapsed)}${bad ? `, ${count(bad)} failed` : ""}.`;
  const batches = new Map(good.filter((row) => row.batch).map(({ batch }) => [JSON.stringify(batch), batch]));
  if (!batches.size) return line;
  const all = [...batches.values()];
  const spent = milliseconds(all.reduce((sum, batch) => sum + batch.ms, 0));
  if (all.length > 1) return `${line} ${plural(all.length, "batch")}, ${spent} on the device.`;
  const others = all[0].rows - good.length;
  const shared = others > 0 ? ` ${plural(others, "row")} of it came from other requests.` : "";
  return `${line} ${batchLine(all[0])}.${shared}`;
}

function bringIntoView() {
  const answers = byId("answers");
  if (answers.getBoundingClientRect().top < innerHeight - 160) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  answers.scrollIntoView({ behavior, block: "start" });
}

const batchLine = (batch) =>
  `One batch of ${plural(batch.rows, "row")} and ${plural(batch.tasks, "task")}, ${milliseconds(batch.ms)} on the device`;

function show(until, isOpen) {
  const added = rows.slice(shown, until).map((row) => answer(row, isOpen));
  byId("found").append(...added);
  shown = Math.min(until, rows.length);
}

/** One task's answer: the likeliest label in a line; below it the next labels and the batch. */
function answer(row, isOpen) {
  const version = row.version === null ? null : element("span", "version", ` v${row.version}`);
  const name = element("span", "task", row.task.split("@")[0], version);
  if (row.error) return element("li", "failed", name, element("span", "reason", sentence(row.error)));
  if (row.features) {
    const text = `features, ${plural(row.features.length, "number")}`;
    return element("li", "", name, element("span", "label", text));
  }
  const [best, ...others] = row.known ? row.top : [row.top[0], ...row.top];
  const label = row.known ? element("span", "label", row.label) : element("span", "label unknown", "unknown");
  const line = element("summary", "", name, label, element("span", "share", row.known ? percent(best.probability) : ""), bar(row.known ? best.probability : 0));
  const rest = element("ol", "", ...others.map(({ label, probability }) =>
    element("li", "", element("span", "label", label), bar(probability), element("span", "share", percent(probability)))));
  const why = `Unknown: its likeliest label has less than ${percent(row.threshold)}, which is asked for.`;
  const unknown = row.known ? null : element("p", "note", why);
  const batch = row.batch && !isOpen ? element("p", "note", `${batchLine(row.batch)}.`) : null;
  const made = element("details", "", line, rest, unknown, batch);
  made.open = isOpen;
  return element("li", "", made);
}
