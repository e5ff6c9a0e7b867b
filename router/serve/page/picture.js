// The picture to classify: dropped, pasted, chosen, or taken by a camera.

import { byId, bytes } from "./dom.js";

let file = null;
let url = null;

export const chosen = () => file;

/** Takes pictures in all these ways. Calls `changed` for each, and `refused` for anything else. */
export function watch(changed, refused) {
  const take = (found) => {
    if (!found) return;
    show(found);
    changed(found);
  };
  for (const id of ["file", "camera"]) {
    byId(id).addEventListener("change", (event) => {
      take(event.target.files[0]);
      event.target.value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", (event) => {
    const found = pictureOf(event.clipboardData);
    if (!found) return;
    event.preventDefault();
    take(found);
  });
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      document.body.classList.add("dragging");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    const found = pictureOf(event.dataTransfer);
    if (found) take(found);
    else refused("That is no file: drop a picture from a folder.");
  });
}

const pictureOf = (data) => [...(data?.files ?? [])][0] ?? null;

function show(found) {
  file = found;
  if (url) URL.revokeObjectURL(url);
  url = URL.createObjectURL(found);
  const shown = byId("shown");
  const name = found.name || "a pasted picture";
  shown.onload = () => describe(name, found, `${shown.naturalWidth} × ${shown.naturalHeight}`);
  shown.onerror = () => {
    shown.hidden = true; // this browser cannot show the format; the server may still read it
    document.body.classList.remove("has-picture");
  };
  shown.hidden = false;
  shown.alt = name;
  shown.src = url;
  document.body.classList.add("has-picture");
  describe(name, found, null);
  byId("choose").textContent = "Choose another";
}

function describe(name, found, size) {
  byId("about").textContent = [name, size, bytes(found.size)].filter(Boolean).join(" · ");
}
