// Answers put in order: by drag and by keys, with ties, scores and flags on the same screen. The list is the order, best first.

import { AnswerText } from "./answer.js";
import { h, icon, sign } from "./html.js";
import { chips } from "./label-parts.js";
import { t } from "./words.js";

const SCORES = [1, 2, 3, 4, 5, 6, 7];
const KEYS = [["↑ ↓", "key_walk"], ["Alt ↑ ↓", "key_move"], ["=", "key_tie"], ["1–7", "key_score"], ["F", "key_flags"]];

/** The list. read(): ranks, scores and flags in the order in which the answers were given. */
export function rankList(answers, flagNames, say) {
  const list = h("ol", { class: "ranks" });
  const cards = answers.map((answer, at) => new Card(answer, at, flagNames));
  let order = [...cards];

  const draw = () => {
    let place = 1;
    order.forEach((card, at) => {
      if (at === 0) card.isTied = false;
      if (!card.isTied) place = at + 1;
      card.place = place;
      card.show(order.length, at);
    });
    if (order.some((card, at) => list.children[at] !== card.element)) list.replaceChildren(...order.map((card) => card.element));
  };
  const put = (card, to) => {
    const from = order.indexOf(card);
    if (to < 0 || to >= order.length || to === from) return;
    const next = order[from + 1];
    if (next && !card.isTied) next.isTied = false; // a tie whose head is gone begins with the next
    order.splice(from, 1);
    order.splice(to, 0, card);
    card.isTied = order[to + 1]?.isTied ?? false; // within a tie it joins it
    draw();
    card.element.focus();
    say(card.element.getAttribute("aria-label"));
  };
  for (const card of cards) {
    card.tie.addEventListener("click", () => {
      card.isTied = !card.isTied;
      draw();
      say(card.isTied ? `${card.element.getAttribute("aria-label")}: ${t("tied")}` : card.element.getAttribute("aria-label"));
    });
    card.up.addEventListener("click", () => put(card, order.indexOf(card) - 1));
    card.down.addEventListener("click", () => put(card, order.indexOf(card) + 1));
    card.handle.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      card.handle.setPointerCapture(event.pointerId);
      card.element.classList.add("dragged");
      const move = ({ clientY }) => {
        const at = order.indexOf(card);
        const above = order[at - 1]?.element.getBoundingClientRect();
        const below = order[at + 1]?.element.getBoundingClientRect();
        const own = card.element.offsetHeight;
        if (above && clientY < above.top + Math.min(above.height, own) / 2) put(card, at - 1);
        else if (below && clientY > below.bottom - Math.min(below.height, own) / 2) put(card, at + 1);
        if (!card.handle.hasPointerCapture(event.pointerId)) card.handle.setPointerCapture(event.pointerId);
      };
      const end = () => {
        card.element.classList.remove("dragged");
        card.handle.removeEventListener("pointermove", move);
      };
      card.handle.addEventListener("pointermove", move);
      card.handle.addEventListener("pointerup", end, { once: true });
      card.handle.addEventListener("pointercancel", end, { once: true });
    });
    card.element.addEventListener("keydown", (event) => {
      if (event.target !== card.element || event.ctrlKey || event.metaKey) return;
      const at = order.indexOf(card);
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (step && event.altKey) put(card, at + step);
      else if (step) order[at + step]?.element.focus();
      else if (event.key === "=") card.tie.click();
      else if (SCORES.includes(Number(event.key))) card.rate(Number(event.key));
      else if (event.key === "f") card.openFlags();
      else if (event.key === "Enter") card.more.click();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
  }
  draw();
  const keys = h("p", { class: "hint keys-line only-wide" }, KEYS.map(([key, name]) => h("span", {}, h("kbd", {}, key), " ", t(name))));
  return {
    element: h("div", {}, keys, list),
    focus: () => order[0].element.focus(),
    read: () => ({ ranks: cards.map((card) => card.place), scores: cards.map((card) => card.score), flags: cards.map((card) => [...card.flags]) }),
  };
}

class Card {
  constructor(answer, at, flagNames) {
    this.name = String.fromCharCode(65 + at);
    this.isTied = false;
    this.score = null;
    this.flags = new Set();
    const text = new AnswerText();
    text.whole(answer.blocks);
    this.text = h("div", { class: "cut" }, text.element);
    this.tie = h("button", { type: "button", class: "tie", "aria-pressed": "false" }, "=", h("span", {}, t("tied")));
    this.handle = h("span", { class: "handle", title: t("drag", { name: this.name }) }, icon("menu"));
    this.up = sign("left", t("move_up"), null, { class: "sign turned" });
    this.down = sign("right", t("move_down"), null, { class: "sign turned" });
    this.badge = h("span", { class: "badge" });
    this.scores = SCORES.map((n) => h("button", { type: "button", "aria-pressed": "false", title: t("score_ends"), onclick: () => this.rate(n) }, String(n)));
    this.flagCount = h("span", {});
    this.flagList = h("details", { class: "flags" }, h("summary", {}, t("flags"), " ", this.flagCount),
      chips(flagNames, "flag", this.flags, () => { this.flagCount.textContent = this.flags.size || ""; }));
    this.more = h("button", { type: "button", class: "plain small", hidden: true, onclick: () => {
      this.text.classList.add("whole");
      this.more.hidden = true;
    } }, t("all_text"));
    this.element = h("li", { tabindex: 0 }, this.tie,
      h("div", { class: "head" }, this.handle, this.badge, h("strong", {}, t("answer_n", { name: this.name })), h("span", { class: "gap" }), this.up, this.down),
      this.text, this.more,
      h("div", { class: "foot-line" }, h("div", { class: "scores", role: "group", "aria-label": t("score") }, h("span", { class: "hint" }, t("score")), this.scores), this.flagList));
    new ResizeObserver(() => { this.more.hidden = this.text.classList.contains("whole") || this.text.scrollHeight <= this.text.clientHeight + 4; }).observe(this.text);
  }

  show(all, at) {
    this.badge.textContent = String(this.place);
    this.element.setAttribute("aria-label", t("place", { name: this.name, n: this.place, all }));
    this.element.classList.toggle("tied", this.isTied);
    this.tie.hidden = at === 0;
    this.tie.setAttribute("aria-pressed", String(this.isTied));
    this.up.disabled = at === 0;
    this.down.disabled = at === all - 1;
  }

  rate(n) {
    this.score = this.score === n ? null : n;
    this.scores.forEach((button, at) => button.setAttribute("aria-pressed", String(at + 1 === this.score)));
  }

  openFlags() {
    this.flagList.open = true;
    this.flagList.querySelector(".chip").focus();
  }
}
