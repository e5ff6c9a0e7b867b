// The list of tasks. The server searches it and gives pages, so thousands are as quick as ten. Chosen tasks are kept by name.

import { json } from "./api.js";
import { bar, byId, bytes, count, element, percent, plural } from "./dom.js";

const ROWS = 10;
const NAMES = 1000; // asked for in one request, when all are chosen
const FEW = 16; // if there are at most so many tasks, all are chosen at the start

export const names = new Set();
let starts = [""]; // the name before each page, up to the page that is shown
let page = null;
let asked = 0;
let changed = () => {};
let failed = () => {};

export async function watch(whenChanged, whenFailed) {
  [changed, failed] = [whenChanged, whenFailed];
  let timer;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => turn([""]), 120);
  });
  byId("before").addEventListener("click", () => turn(starts.slice(0, -1)));
  byId("after").addEventListener("click", () => turn([...starts, page.next]));
  byId("none").addEventListener("click", () => {
    names.clear();
    mark();
  });
  byId("all").addEventListener("click", chooseAll);
  byId("range").textContent = "reading the list …"; // slow at first: the server looks at every task
  await turn([""]);
  if (page && page.total <= FEW) {
    for (const task of page.tasks) names.add(task.name);
    if (page.next) await chooseAll();
    mark();
  }
}

const url = (limit, after) => `v1/tasks?${new URLSearchParams({ limit, after, search: byId("search").value.trim() })}`;

/** Shows another page. Of several requests the last one counts. */
async function turn(to) {
  const number = ++asked;
  try {
    const found = await json(url(ROWS, to.at(-1)));
    if (number !== asked) return;
    [page, starts] = [found, to];
    show();
  } catch (error) {
    if (number !== asked) return;
    byId("range").textContent = "";
    failed(error);
  }
}

/** Chooses all tasks that the search finds, on all pages. */
async function chooseAll() {
  const button = byId("all");
  button.disabled = true;
  try {
    for (let after = ""; after !== null; ) {
      const found = await json(url(NAMES, after));
      for (const task of found.tasks) names.add(task.name);
      after = found.next;
    }
    mark();
  } catch (error) {
    failed(error);
  }
  button.disabled = false;
}

function show() {
  const first = (starts.length - 1) * ROWS;
  const searched = byId("search").value.trim() !== "";
  byId("range").textContent = page.matching
    ? `${count(first + 1)}–${count(first + page.tasks.length)} of ${count(page.matching)}`
    : searched ? "none has this in its name" : "there is none for this backbone";
  byId("rows").replaceChildren(...page.tasks.map(row));
  byId("before").disabled = starts.length === 1;
  byId("after").disabled = page.next === null;
  const all = byId("all");
  all.textContent = searched ? `Choose all ${count(page.matching)} found` : `Choose all ${count(page.matching)}`;
  all.hidden = page.matching === 0;
  mark();
}

function row(task) {
  const box = element("input");
  box.type = "checkbox";
  box.value = task.name;
  box.addEventListener("change", () => {
    if (box.checked) names.add(task.name);
    else names.delete(task.name);
    mark();
  });
  const name = element("span", "name", task.name);
  const facts = [
    task.version === null ? null : `v${task.version}`,
    ...task.tags,
    task.classes ? plural(task.classes, "label") : "features",
    task.size_bytes === null ? null : bytes(task.size_bytes),
  ];
  const about = element("span", "about", facts.filter((fact) => fact !== null).join(" · "));
  const head = element("th", "", element("label", "", box, element("span", "what", name, about)));
  head.scope = "row";
  return element("tr", "", head, accuracy(task), shared(task));
}

function accuracy(task) {
  const [metric, share] = Object.entries(task.metrics)[0] ?? [null, null];
  if (metric === null) return element("td", "", element("span", "about", "–"));
  const kind = metric.startsWith("test") ? "test" : metric.startsWith("val") ? "validation" : metric;
  return element("td", "", percent(share), element("span", "about", kind));
}

function shared(task) {
  if (!task.size_bytes || task.shared_bytes === null) return element("td", "", element("span", "about", "–"));
  const share = task.shared_bytes / task.size_bytes;
  return element("td", "", `${Math.round(share * 100)} %`, bar(share, "small"));
}

/** Updates boxes and counts to the chosen tasks. */
function mark() {
  for (const box of byId("rows").querySelectorAll("input")) box.checked = names.has(box.value);
  byId("chosen").textContent = names.size ? `${count(names.size)} chosen` : "none chosen";
  byId("none").hidden = names.size === 0;
  changed();
}
