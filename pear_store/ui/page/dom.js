// Makes elements, formats numbers, and asks the server. Text is set as text only: nothing from a store becomes HTML.

export const byId = (id) => document.getElementById(id);

/** An element with a class, and text or further elements in it. */
export function element(tag, className, ...inside) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...inside.filter((part) => part !== null && part !== undefined));
  return made;
}

/** A bar that is filled to a share. It repeats a number beside it, so screen readers skip it. */
export function bar(share, className = "") {
  const filled = element("span", "filled");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const made = element("span", `bar ${className}`, filled);
  made.setAttribute("aria-hidden", "true");
  return made;
}

const whole = new Intl.NumberFormat("en");
export const count = (number) => (number === null ? "?" : whole.format(number));
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
export const percent = (share) => `${Math.round(share * 100)} %`;

export function bytes(number) {
  if (number === null) return "?";
  for (const unit of ["B", "kB", "MB"]) {
    if (number < 999.5) return `${number < 10 && unit !== "B" ? number.toFixed(1) : Math.round(number)} ${unit}`;
    number /= 1000;
  }
  return `${number.toFixed(1)} GB`;
}

export const date = (time_ns) => new Date(time_ns / 1e6).toISOString().slice(0, 16).replace("T", " ");

/** The server's answer. If the server refuses, an error with its message. */
export async function ask(path, values = {}) {
  let answer;
  try {
    answer = await fetch(`v1/${path}?${new URLSearchParams(values)}`);
  } catch {
    throw new Error("The command 'pear-store ui' has ended: start it again.");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.detail ?? `The server answered with ${answer.status}.`);
  return found;
}
