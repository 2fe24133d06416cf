// Small parts that the labelling page's forms share.

import { h } from "./html.js";
import { LANGUAGES, language, t } from "./words.js";

/** A person's name of a language, in the language of the page. */
export function languageName(code) {
  return LANGUAGES[code] ?? new Intl.DisplayNames([language()], { type: "language" }).of(code) ?? code;
}

/** A group of toggles; `chosen` is a set that follows them. */
export function chips(names, prefix, chosen, changed = () => {}) {
  return h("div", { class: "chips" }, names.map((name) => h("button", {
    type: "button", class: "chip", "aria-pressed": String(chosen.has(name)), onclick: (event) => {
      if (!chosen.delete(name)) chosen.add(name);
      event.currentTarget.setAttribute("aria-pressed", String(chosen.has(name)));
      changed();
    },
  }, t(`${prefix}_${name}`))));
}
