// The page: the store in numbers, its backbones, its growth, and one task in a dialog.

import { ask, bar, byId, bytes, count, date, element, percent, plural } from "./dom.js";
import * as map from "./map.js";
import * as tasks from "./tasks.js";

function failed(error) {
  byId("problem").hidden = error === null;
  byId("problem").textContent = error === null ? "" : error.message;
}

function figures(store) {
  const saved = store.logical_bytes ? 1 - store.unique_bytes / store.logical_bytes : 0;
  const shown = [
    ["Tasks", count(store.tasks)],
    ["Versions", count(store.versions)],
    ["Stored", bytes(store.unique_bytes)],
    ["Without sharing", bytes(store.logical_bytes)],
    ["Saved", store.logical_bytes === null ? "?" : percent(saved)],
  ];
  byId("figures").replaceChildren(
    ...shown.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value))),
  );
  byId("where").textContent = store.where;
  document.title = `${store.where} · Pear store`;
}

function backbones(store) {
  const most = Math.max(1, ...store.backbones.map((one) => one.logical_bytes));
  byId("backbones").replaceChildren(
    ...store.backbones.slice(0, 20).map((one) => {
      const drawn = bar(one.logical_bytes ? one.unique_bytes / one.logical_bytes : 0);
      drawn.style.width = `${Math.max(1, (100 * one.logical_bytes) / most)}%`;
      const saved = one.logical_bytes ? `, ${percent(1 - one.unique_bytes / one.logical_bytes)} saved` : "";
      return element(
        "li", "",
        element("div", "line", element("span", "name", one.model ?? "?"),
          element("span", "note", `${plural(one.tasks, "task")}: ${bytes(one.unique_bytes)} stored of ${bytes(one.logical_bytes)}${saved}`)),
        drawn,
      );
    }),
  );
  const choices = store.backbones.map((one) => {
    const option = element("option", "", `${one.model ?? "?"} (${count(one.tasks)})`);
    option.value = one.digest ?? "";
    return option;
  });
  const all = element("option", "", "All backbones");
  all.value = "";
  byId("backbone").replaceChildren(all, ...choices);
}

const SVG = "http://www.w3.org/2000/svg";

function growth(stages) {
  byId("growth").replaceChildren();
  if (!stages.length) {
    byId("growth-note").textContent = "No version was added yet.";
    return;
  }
  const last = stages.at(-1);
  byId("growth-note").replaceChildren(
    `${plural(last.versions, "version")} that are here, by age, from ${date(stages[0].time_ns)} to ${date(last.time_ns)} (UTC): `,
    element("span", "swatch unique"), `${bytes(last.unique_bytes)} stored, `,
    element("span", "swatch logical"), `${bytes(last.logical_bytes)} without sharing.`,
  );
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 1000 200");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", "Bytes over versions: without sharing, and stored");
  for (const [key, className] of [["logical_bytes", "logical"], ["unique_bytes", "unique"]]) {
    const points = stages.map((stage) => `${(1000 * stage.versions) / last.versions},${200 - (200 * stage[key]) / Math.max(1, last.logical_bytes)}`);
    const area = document.createElementNS(SVG, "polygon");
    area.setAttribute("class", className);
    area.setAttribute("points", `0,200 ${points.join(" ")} 1000,200`);
    drawing.append(area);
  }
  byId("growth").append(drawing);
}

function list(values) {
  const shown = Object.entries(values).map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]);
  return element("dl", "", ...shown.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

async function open(name) {
  try {
    const task = await ask(`tasks/${encodeURIComponent(name)}`);
    const newest = task.versions[0];
    const parts = [
      list({
        backbone: newest.backbone ?? "?",
        labels: task.classes ? `${count(task.classes)}: ${task.labels.slice(0, 30).join(", ")}${task.classes > 30 ? ", …" : ""}` : "none: it gives features",
        adapters: `${count(task.adapters)} at ${plural(task.positions, "position")}`,
        ...task.metrics,
      }),
    ];
    const versions = task.versions.slice(0, 50).map((one) => element("li", "", `${name}@${one.version}`,
      ...(one.tags ?? []).map((tag) => element("span", "tag", tag)),
      element("span", "about", `${date(one.time_ns)} · ${bytes(one.bytes)}, ${bytes(one.new_bytes)} of them new`)));
    parts.push(element("h3", "", plural(task.versions.length, "version")), element("ul", "", ...versions));
    if (task.sharing) {
      parts.push(element("h3", "", "Shared"));
      const others = task.sharing.neighbours.map((one) => `${one.task} ${bytes(one.shared_bytes)}`).join(", ");
      parts.push(element("p", "note", task.sharing.count
        ? `${bytes(task.sharing.shared_bytes)} of ${bytes(task.sharing.size_bytes)} with ${plural(task.sharing.count, "other task")}: ${others}${task.sharing.count > 12 ? ", …" : ""}`
        : "Nothing with other tasks."));
    }
    for (const [title, values] of [["Trained on", task.origin.data], ["Given", task.origin.given], ["Options", task.origin.options], ["Preprocessing", task.preprocess]])
      if (Object.keys(values).length) parts.push(element("h3", "", title), list(values));
    byId("details-title").textContent = name;
    byId("details-body").replaceChildren(...parts);
    byId("details").showModal();
    byId("details").scrollTop = 0;
    failed(null);
  } catch (error) {
    failed(error);
  }
}

async function showMap() {
  const chosen = byId("backbone");
  const name = chosen.value ? chosen.selectedOptions[0].textContent.replace(/ \([\d,]+\)$/, "") : null;
  await map.show(chosen.value, name ?? chosen.options[1]?.textContent.replace(/ \([\d,]+\)$/, "") ?? "");
}

byId("close").addEventListener("click", () => byId("details").close());
byId("backbone").addEventListener("change", () => showMap().catch(failed));
map.watch();
await tasks.watch(open, failed);
try {
  const store = await ask("store");
  figures(store);
  backbones(store);
  growth(store.growth);
  await showMap();
  if (store.problem) failed(new Error(store.problem));
} catch (error) {
  byId("where").textContent = "";
  failed(error);
}
