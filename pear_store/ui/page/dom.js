// Makes elements, formats numbers, and asks the server.

export { bar, byId, element } from "./elements.js";

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
