// Elements. `fragment` is the only place of the page where text becomes elements, and takes what the server has made
// harmless (lyceum/serve/render.py); everything else is built by `h`, whose texts are texts.

const policy = window.trustedTypes
  ? window.trustedTypes.createPolicy("lyceum", { createHTML: (html) => html })
  : { createHTML: (html) => html };

/** What the server rendered, as elements; code blocks get their bar. */
export function fragment(html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  return template.content;
}

/** An element: `h("button", { class: "x", onclick: f, "aria-label": "y" }, "text", child)`. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
const PATHS = {
  plus: "M12 5v14M5 12h14",
  search: "M11 4a7 7 0 1 0 0 14a7 7 0 1 0 0-14M20 20l-4-4",
  menu: "M4 7h16M4 12h16M4 17h10",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5a2.5 2.5 0 1 0 0 5a2.5 2.5 0 1 0 0-5M8 13.500a2.500 2.500 0 1 0 0 5a2.500 2.500 0 1 0 0-5",
  send: "M12 19V5M6 11l6-6l6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12.500l4.500 4.500L19 7",
  undo: "M9 6L4 11l5 5M4 11h10a5.500 5.500 0 0 1 0 11h-3",
  again: "M20 11a8 8 0 1 0-2.500 6.500M20 4v6h-6",
  pencil: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  up: "M7 11v9H4v-9zM7 11l4-7c1.500 0 2.500 1 2.500 2.500L13 10h5.500c1.300 0 2.200 1.200 1.900 2.400l-1.500 6A2 2 0 0 1 17 20H7",
  down: "M17 13V4h3v9zM17 13l-4 7c-1.500 0-2.500-1-2.500-2.500L11 14H5.500c-1.300 0-2.200-1.200-1.900-2.400l1.500-6A2 2 0 0 1 7 4h10",
  left: "M14 6l-6 6l6 6",
  right: "M10 6l6 6l-6 6",
  bottom: "M6 10l6 6l6-6",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  pin: "M9 4h6l-1 6l3 3v2H7v-2l3-3zM12 15v5",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  export: "M12 4v11M8 11l4 4l4-4M5 20h14",
  import: "M12 15V4M8 8l4-4l4 4M5 20h14",
  tool: "M14.500 5.500a4.500 4.500 0 0 0-5.800 5.800L4 16v4h4l4.700-4.700a4.500 4.500 0 0 0 5.800-5.800L15.500 12.500L11.500 8.500z",
  close: "M6 6l12 12M18 6L6 18",
  onward: "M5 12h13M13 6l6 6l-6 6",
  two: "M4 5h7v14H4zM13 5h7v14h-7z",
  keys: "M3 7h18v10H3zM7 11h.01M11 11h.01M15 11h.01M8 14h8",
};

/** A drawn sign; it says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", name === "more" ? "icon dots" : name === "stop" ? "icon solid" : "icon");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with a sign and a name that is shown as its tip. */
export function sign(name, label, onclick, attributes = {}) {
  return h("button", { type: "button", class: "sign", title: label, "aria-label": label, onclick, ...attributes }, icon(name));
}

/** Let the person keep something as a file. */
export function saveAs(blob, name) {
  const address = URL.createObjectURL(blob);
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
