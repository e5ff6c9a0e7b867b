// Elements and numbers. Text is only set as text, so nothing from a server or a user becomes HTML.

export const byId = (id) => document.getElementById(id);

/** An element with a class that contains text or other elements. */
export function element(tag, className, ...inside) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...inside.filter((part) => part !== null));
  return made;
}

/** A bar that is filled to a share. Screen readers skip it, because a number beside it says the same. */
export function bar(share, className = "") {
  const filled = element("span", "filled");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const made = element("span", `bar ${className}`, filled);
  made.setAttribute("aria-hidden", "true");
  return made;
}

const whole = new Intl.NumberFormat("en");

export const count = (number) => whole.format(number);

export const plural = (number, word) => `${count(number)}\u00a0${word}${number === 1 ? "" : word.endsWith("ch") ? "es" : "s"}`;

export function percent(share) {
  const value = share * 100;
  if (share > 0 && value < 0.1) return "<\u00a00.1\u00a0%";
  if (share < 1 && value > 99.9) return ">\u00a099.9\u00a0%";
  return `${value.toFixed(value === 100 || value === 0 ? 0 : 1)}\u00a0%`;
}

export function bytes(number) {
  for (const unit of ["B", "kB", "MB"]) {
    if (number < 1000) return `${number < 10 && unit !== "B" ? number.toFixed(1) : Math.round(number)}\u00a0${unit}`;
    number /= 1000;
  }
  return `${number.toFixed(1)}\u00a0GB`;
}

export function milliseconds(number) {
  if (number >= 10000) return `${(number / 1000).toFixed(0)}\u00a0s`;
  if (number >= 1000) return `${(number / 1000).toFixed(1)}\u00a0s`;
  return `${number < 10 ? number.toFixed(1) : Math.round(number)}\u00a0ms`;
}
