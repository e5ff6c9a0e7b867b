// Shows which tasks share how much: a map of tasks by tasks, and a list of what saves most.

import { ask, bar, byId, bytes, element, percent, plural } from "./dom.js";

let tasks = [];
let shared = new Float64Array(0);

export async function show(backbone, name) {
  const found = await ask("map", { backbone });
  tasks = found.tasks;
  const side = tasks.length;
  shared = new Float64Array(side * side);
  for (const group of found.groups)
    for (const a of group.tasks) for (const b of group.tasks) if (a !== b) shared[a * side + b] += group.size_bytes;
  const left = found.left_out ? ` The ${plural(side, "task")} that share most are drawn, ${plural(found.left_out, "task")} are not.` : "";
  byId("map-note").textContent = side
    ? `${plural(side, "task")} of ${name}, from left to right and from top to bottom. The stronger a cell, the larger the shared part of the smaller task.${left}`
    : "There is nothing to draw.";
  byId("map-frame").hidden = side === 0;
  byId("map-cell").textContent = "";
  draw();
  const saving = found.groups.filter((group) => group.size_bytes * (group.of_tasks - 1) > 0).slice(0, 8);
  const most = saving.length ? saving[0].size_bytes * (saving[0].of_tasks - 1) : 1;
  byId("groups").replaceChildren(
    ...saving.map((group) => {
      const saved = group.size_bytes * (group.of_tasks - 1);
      const named = group.tasks.slice(0, 4).map((place) => tasks[place].task).join(", ");
      const more = group.of_tasks > 4 ? ", …" : "";
      return element(
        "li", "",
        element("div", "line", element("span", "name", `${plural(group.tensors, "tensor")} of ${plural(group.of_tasks, "task")}`), element("span", "", `saves ${bytes(saved)}`)),
        element("p", "note", `${bytes(group.size_bytes)}: ${named}${more}`),
        bar(saved / most, "plain"),
      );
    }),
  );
  if (!saving.length) byId("groups").append(element("li", "note", "No two tasks share a tensor."));
}

const share = (a, b) => shared[a * tasks.length + b] / Math.max(1, Math.min(tasks[a].size_bytes, tasks[b].size_bytes));

/** Draws one square for each pair. Called again when the colour scheme changes. */
export function draw() {
  const canvas = byId("map");
  const side = tasks.length;
  if (!side) return;
  const scale = Math.max(1, Math.floor(960 / side));
  canvas.width = canvas.height = side * scale;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  pen.fillStyle = style.getPropertyValue("--raised");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  const gap = scale >= 12 ? 1 : 0;
  for (let a = 0; a < side; a++)
    for (let b = 0; b < side; b++) {
      const part = a === b ? 1 : share(a, b);
      if (!part) continue;
      pen.fillStyle = style.getPropertyValue(a === b ? "--edge" : "--accent");
      pen.globalAlpha = a === b ? 0.35 : 0.15 + 0.85 * Math.min(1, part);
      pen.fillRect(b * scale + gap, a * scale + gap, scale - gap, scale - gap);
    }
}

function tell(event) {
  const box = byId("map").getBoundingClientRect();
  const side = tasks.length;
  const at = (part, length) => Math.min(side - 1, Math.max(0, Math.floor((part / length) * side)));
  const [b, a] = [at(event.clientX - box.left, box.width), at(event.clientY - box.top, box.height)];
  const amount = shared[a * side + b];
  byId("map-cell").textContent =
    a === b ? `${tasks[a].task}: ${bytes(tasks[a].size_bytes)}`
    : amount ? `${tasks[a].task} and ${tasks[b].task} share ${bytes(amount)}: ${percent(share(a, b))} of the smaller one`
    : `${tasks[a].task} and ${tasks[b].task} share nothing`;
}

export function watch() {
  byId("map").addEventListener("pointermove", tell);
  byId("map").addEventListener("pointerdown", tell);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
