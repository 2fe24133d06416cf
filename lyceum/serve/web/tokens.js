// Tokens in a row: each coloured by its probability, one at a time reached by keys or pointer, with a detail below it.

import { h } from "./html.js";
import { t } from "./words.js";

const BYTES = /^bytes:(\\x[0-9a-f]{2})+$/;
const SPECIAL = /^<\|.+\|>$/;

/** A probability in words. */
export const chance = (value) => (value > 0 && value < 0.01 ? "<1%" : `${Math.round(100 * value)}%`);

/** The colour of a probability, from the improbable to the sure; the text on it stays readable. */
export const shadeOf = (value) => `color-mix(in oklab, var(--likely) ${Math.round(100 * Math.min(1, value))}%, var(--unlikely))`;

/** What a token says: null for a part of a character, "" for one that only marks. */
export function tokenText({ name, text }) {
  if (text !== undefined) return text;
  return BYTES.test(name) ? null : SPECIAL.test(name) ? "" : name;
}

/**
 * Tokens with the text that each stands for, as the page can show it: {name, logprob, top, text, shown}. A character whose bytes are
 * spread over several tokens is shown at the last of them. said: all of the text; offset: characters before each, as the API counts.
 */
export function split(said, tokens) {
  const characters = Array.from(said);
  return tokens.map((token, place) => {
    const text = tokenText({ name: token.name });
    const end = tokens[place + 1]?.offset ?? token.offset + 1;
    return { ...token, text, shown: text ?? characters.slice(token.offset, end).join("") };
  });
}

export class TokenStrip {
  /** detail(place): what is shown below about a token, as a list of elements. chosen(place): it was reached. */
  constructor({ label, detail, isColoured = true, chosen = () => {} }) {
    Object.assign(this, { detailOf: detail, isColoured, chosen });
    this.tokens = [];
    this.at = -1;
    this.element = h("div", {
      class: "strip", role: "listbox", "aria-label": label, "aria-orientation": "horizontal", dir: "auto",
      onkeydown: (event) => this.key(event),
      onpointerover: (event) => { const place = this.placeOf(event.target); if (place >= 0 && event.pointerType === "mouse" && !this.isHeld) this.reach(place); },
      onclick: (event) => { const place = this.placeOf(event.target); if (place >= 0) { this.isHeld = true; this.reach(place, true); } },
    });
    this.detail = h("div", { class: "detail", "aria-live": "polite" });
  }

  show(tokens) {
    this.tokens = [];
    this.element.replaceChildren();
    this.grow(tokens);
  }

  grow(tokens) {
    for (const token of tokens) {
      const place = this.tokens.length;
      this.tokens.push(token);
      const text = token.shown ?? token.text ?? "";
      const mark = text === "" ? (token.text === "" ? "∎" : "·") : null;
      const probability = token.logprob === null || token.logprob === undefined ? null : Math.exp(token.logprob);
      const element = h("span", {
        role: "option", class: mark ? "token marked" : "token", tabindex: place === 0 ? 0 : -1, "aria-selected": "false", "data-place": place,
        "aria-label": `${text.trim() || mark || t("token_space")}${probability === null ? "" : `, ${chance(probability)}`}`,
      }, mark ?? withLineEnds(text));
      if (this.isColoured && probability !== null) element.style.backgroundColor = shadeOf(probability);
      this.element.append(element);
    }
  }

  placeOf(target) {
    const found = target.closest?.(".token");
    return found && this.element.contains(found) ? Number(found.dataset.place) : -1;
  }

  /** Choose a token. */
  reach(place, isFocused = false) {
    const all = this.element.children;
    if (this.at >= 0 && all[this.at]) {
      all[this.at].setAttribute("aria-selected", "false");
      all[this.at].tabIndex = -1;
    } else if (all[0]) all[0].tabIndex = -1;
    this.at = place;
    all[place].setAttribute("aria-selected", "true");
    all[place].tabIndex = 0;
    if (isFocused) all[place].focus();
    this.detail.replaceChildren(...this.detailOf(place).filter(Boolean));
    this.chosen(place);
  }

  key(event) {
    const last = this.tokens.length - 1;
    const from = this.placeOf(event.target);
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last, Enter: from, " ": from }[event.key];
    if (to === undefined || to < 0 || to > last || from < 0) return;
    event.preventDefault();
    this.isHeld = true;
    this.reach(to, true);
  }
}

/** Line ends are seen, and end the line. */
function withLineEnds(text) {
  return text.includes("\n") ? text.replaceAll("\n", "⏎\n") : text;
}
