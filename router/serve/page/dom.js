// Makes elements and formats numbers.

export { bar, byId, element } from "./elements.js";

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
