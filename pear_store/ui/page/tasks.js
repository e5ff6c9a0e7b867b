// The list of tasks. The server searches, sorts and cuts it, so thousands of tasks are as quick as ten.

import { ask, bar, byId, bytes, count, date, element, percent, plural } from "./dom.js";

const ROWS = 25;
const COLUMNS = [
  ["name", "Name", ""],
  ["backbone", "Backbone", "wide"],
  ["classes", "Classes", "number wide"],
  ["accuracy", "Accuracy", "number"],
  ["new", "New", "number wide"],
  ["bytes", "Bytes", "number"],
  [null, "Shared", "number wide"],
  ["added", "Added (UTC)", "number wide"],
];
let first = 0;
let [sort, reverse] = ["name", false];
let asked = 0;
let failed = () => {};
let opened = () => {};

export async function watch(whenOpened, whenFailed) {
  [opened, failed] = [whenOpened, whenFailed];
  let timer;
  byId("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => turn(0), 120);
  });
  byId("backbone").addEventListener("change", () => turn(0));
  byId("before").addEventListener("click", () => turn(Math.max(0, first - ROWS)));
  byId("after").addEventListener("click", () => turn(first + ROWS));
  headings();
  await turn(0);
}

function headings() {
  byId("headings").replaceChildren(
    ...COLUMNS.map(([key, text, className]) => {
      const head = element("th", className);
      head.scope = "col";
      if (key === null) {
        head.append(text);
        return head;
      }
      const button = element("button", "", text);
      button.type = "button";
      button.addEventListener("click", () => {
        reverse = key === sort ? !reverse : !["name", "backbone"].includes(key); // numbers: the largest first
        sort = key;
        headings();
        byId("headings").children[COLUMNS.findIndex((column) => column[0] === key)].firstChild.focus();
        turn(0);
      });
      if (key === sort) head.setAttribute("aria-sort", reverse ? "descending" : "ascending");
      head.append(button);
      return head;
    }),
  );
}

/** Shows another part of the list. Answers to earlier requests are ignored. */
async function turn(to) {
  const number = ++asked;
  const wanted = { first: to, count: ROWS, sort, reverse, search: byId("search").value, backbone: byId("backbone").value };
  try {
    const found = await ask("tasks", wanted);
    if (number !== asked) return;
    first = to;
    byId("range").textContent = found.matching
      ? `${count(first + 1)}–${count(first + found.tasks.length)} of ${count(found.matching)}`
      : found.total ? "no task has this in its name" : "the store is empty";
    byId("rows").replaceChildren(...found.tasks.map(row));
    byId("before").disabled = first === 0;
    byId("after").disabled = first + ROWS >= found.matching;
    failed(null);
  } catch (error) {
    if (number === asked) failed(error);
  }
}

function row(task) {
  const name = element("button", "quiet", task.task);
  name.type = "button";
  name.addEventListener("click", () => opened(task.task));
  const older = Object.entries(task.older_tags ?? {}).map(([tag, number]) => `${tag}@${number}`);
  const tags = [...(task.tags ?? []), ...older].map((tag) => element("span", "tag", tag));
  const about = [`v${task.version}`, task.classes ? plural(task.classes, "label") : null, task.backbone, date(task.time_ns)];
  const head = element("th", "", name, ...tags, element("span", "about narrow", about.filter(Boolean).join(" · ")),
    element("span", "about wide-about", `version ${task.version}`));
  if (task.error) head.append(element("span", "about wrong", task.error));
  head.scope = "row";
  const share = task.bytes && task.shared_bytes !== null ? task.shared_bytes / task.bytes : null;
  return element(
    "tr",
    "",
    head,
    element("td", "wide", task.backbone ?? "?"),
    element("td", "number wide", task.classes === null ? "?" : task.classes ? count(task.classes) : "–"),
    element("td", "number", task.val_top1 === null ? "–" : `${(100 * task.val_top1).toFixed(1)} %`),
    element("td", "number wide", bytes(task.new_bytes)),
    element("td", "number", bytes(task.bytes), element("span", "about narrow", task.new_bytes === null ? "" : `${bytes(task.new_bytes)} new`)),
    element("td", "number wide", share === null ? "–" : percent(share), share === null ? null : bar(share, "plain")),
    element("td", "number wide", date(task.time_ns)),
  );
}
