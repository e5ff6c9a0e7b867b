// Connects the parts of the page.

import * as answers from "./answers.js";
import { forgetToken, hasToken, json } from "./api.js";
import { byId, count } from "./dom.js";
import * as load from "./load.js";
import * as picture from "./picture.js";
import * as tasks from "./tasks.js";

const MOST_TASKS = 128; // of one request; more would delay the first answers
let server = null;
let asking = Promise.resolve();

function fail(error) {
  const line = byId("problem");
  line.textContent = error?.message ?? "";
  line.hidden = !error;
}

function label() {
  const button = byId("ask");
  const chosen = tasks.names.size;
  if (answers.isRunning()) button.textContent = "Stop";
  else if (!picture.chosen()) button.textContent = "Choose a picture first";
  else if (!chosen) button.textContent = "Choose a task first";
  else button.textContent = chosen === 1 ? `Ask ${[...tasks.names][0]}` : `Ask ${count(chosen)} tasks`;
  button.classList.toggle("waits", !answers.isRunning() && !(picture.chosen() && chosen && server));
}

async function run() {
  const file = picture.chosen();
  if (!file || !tasks.names.size || !server || answers.isRunning()) return;
  fail(null);
  if (file.size > server.limits.body_bytes) {
    fail(new Error(`The picture is too large: the limit is ${count(server.limits.body_bytes)} bytes.`));
    return;
  }
  asking = answers.ask(file, [...tasks.names].sort(), Math.min(server.limits.tasks, MOST_TASKS)).catch(fail);
  document.body.classList.add("asked");
  label();
  await asking;
  label();
}

function press() {
  if (answers.isRunning()) answers.stop();
  else if (!picture.chosen()) byId("file").click();
  else if (!tasks.names.size) byId("search").focus();
  else run();
}

function show(isThere, why) {
  const words = [server?.backbone.model, server?.device, isThere ? "ready" : why].filter(Boolean);
  byId("server").textContent = words.join(" · ");
  byId("server").classList.toggle("away", !isThere);
}

byId("ask").addEventListener("click", press);
byId("forget").addEventListener("click", () => {
  forgetToken();
  location.reload();
});
answers.watch();
picture.watch(async () => {
  answers.stop();
  label();
  await asking;
  await run();
}, (why) => fail(new Error(why)));
label();
try {
  server = await json("v1/server");
  byId("forget").hidden = !hasToken();
  show(true);
  await tasks.watch(label, fail);
} catch (error) {
  show(false, "not there");
  fail(error);
}
label();
load.watch(show);
