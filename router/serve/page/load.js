// Shows how busy the server is. It reads the metrics for Prometheus every two seconds.

import { call } from "./api.js";
import { byId, count, element } from "./dom.js";

const EVERY_MS = 2000;
const POINTS = 60;
const WIDTH = 160;
const HEIGHT = 36;
const SVG = "http://www.w3.org/2000/svg";

const FIGURES = [
  { name: "Requests a second", of: (d) => d.requests / d.seconds, text: (value) => short(value) },
  { name: "Rows a batch", of: (d) => ratio(d.rows, d.batches), text: (value) => short(value) },
  { name: "Tasks a batch", of: (d) => ratio(d.tasks, d.batches), text: (value) => short(value) },
  { name: "Tasks found in slots", of: (d) => ratio(d.hits, d.hits + d.misses), text: (value) => `${Math.round(value * 100)} %`, most: 1 },
  { name: "Images that wait", of: (d) => d.queue, text: (value) => count(value) },
];

const ratio = (part, whole) => (whole > 0 ? part / whole : null);
const short = (value) => (value >= 100 || value === 0 ? count(Math.round(value)) : value.toFixed(1));

/** Draws the load as long as it is visible. */
export async function watch(heard) {
  const drawn = FIGURES.map(figure);
  byId("figures").replaceChildren(...drawn.map(({ box }) => box));
  let before = null;
  for (;;) {
    if (document.visibilityState === "visible") {
      try {
        const now = read(await (await call("metrics", { quiet: true })).text());
        if (before) drawn.forEach((one) => one.add(difference(before, now)));
        before = now;
        heard(true);
      } catch (error) {
        before = null;
        if (/no such path/i.test(error.message)) {
          byId("load-note").textContent = "this server counts nothing";
          return;
        }
        heard(false, error.message);
      }
    } else before = null;
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

function difference(before, now) {
  const found = { ...now };
  for (const name of ["seconds", "requests", "rows", "tasks", "batches", "hits", "misses"]) {
    found[name] = Math.max(0, now[name] - before[name]); // a restarted server counts from 0
  }
  return found;
}

/** Sums of the metrics in the text. Only predictions count as requests, because this page makes others, too. */
export function read(text) {
  const found = { seconds: performance.now() / 1000, requests: 0 };
  const names = {
    pear_batch_rows_sum: "rows", pear_batch_rows_count: "batches", pear_batch_tasks_sum: "tasks",
    pear_slot_hits_total: "hits", pear_slot_misses_total: "misses", pear_queue_images: "queue",
  };
  for (const name of Object.values(names)) found[name] = 0;
  for (const line of text.split("\n")) {
    const end = line.lastIndexOf(" ");
    const [name, labels] = line.slice(0, end).split(/\{(.*)\}$/);
    if (name in names) found[names[name]] = Number(line.slice(end));
    else if (name === "pear_requests_total" && /path="[^"]*\/(predict|infer)"/.test(labels)) found.requests += Number(line.slice(end));
  }
  return found;
}

/** A number with a line of its earlier values. */
function figure({ name, of, text, most }) {
  const values = [];
  const number = element("dd", "", "–");
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const [area, line] = ["area", "curve"].map((className) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", className);
    svg.append(path);
    return path;
  });
  const picture = element("dd", "", svg);
  const box = element("div", "", element("dt", "", name), number, picture);
  const add = (difference) => {
    values.push(of(difference));
    if (values.length > POINTS) values.shift();
    const last = values.at(-1);
    number.textContent = last === null ? "–" : text(last);
    const top = most ?? Math.max(1, ...values.filter((value) => value !== null));
    const runs = runsOf(values).map((run) => run.map(([place, value]) => [
      (WIDTH * (POINTS - values.length + place)) / (POINTS - 1), HEIGHT - 1.5 - (HEIGHT - 4) * (value / top),
    ]));
    line.setAttribute("d", runs.map(stroke).join(""));
    area.setAttribute("d", runs.filter((run) => run.length > 1).map((run) =>
      `${stroke(run)}L${run.at(-1)[0].toFixed(1)} ${HEIGHT}L${run[0][0].toFixed(1)} ${HEIGHT}Z`).join(""));
  };
  return { box, add };
}

const stroke = (run) => `M${run.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}${run.length === 1 ? "h0.1" : ""}`;

/** Runs of values without a gap, each value with its place. */
function runsOf(values) {
  const runs = [];
  values.forEach((value, place) => {
    if (value === null) return;
    if (place > 0 && values[place - 1] !== null) runs.at(-1).push([place, value]);
    else runs.push([[place, value]]);
  });
  return runs;
}
