// What the pages of all packages are built of. Text is set as text only: nothing that is read or asked becomes HTML.

export const byId = (id) => document.getElementById(id);

/** An element with a class, and text or further elements in it. */
export function element(tag, className, ...inside) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...inside.filter((part) => part !== null && part !== undefined));
  return made;
}

/** A bar that is filled to a share. It repeats a number beside it, so readers of screens are not told of it. */
export function bar(share, className = "") {
  const filled = element("span", "filled");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const made = element("span", `bar ${className}`, filled);
  made.setAttribute("aria-hidden", "true");
  return made;
}
