// The arena: a prompt for two hidden models, side by side; a vote; their names; and the table of all votes.

import "./arena-words.js";
import { AnswerText } from "./answer.js";
import * as api from "./api.js";
import { consentBox, mayTrain } from "./consent.js";
import { toast } from "./dialogs.js";
import { begin } from "./frame.js";
import { h, icon, sign } from "./html.js";
import { fit } from "./thread.js";
import { number, t } from "./words.js";

const RETRY_MS = 1000;
const VERDICTS = ["left", "tie", "neither", "right"];
const LABELS = { left: "left_better", right: "right_better", tie: "tie", neither: "neither" };
const SIDES = ["left", "right"];

const state = { view: "battle", conversation: location.hash.slice(1), leaf: null, turns: [], draft: "", kind: "", ofKind: "", style: false };
let about = null;
let page = null;

// -- a battle ----------------------------------------------------------------------------------------------------------

class Battle {
  constructor(start) {
    this.start = start;
    this.stops = new AbortController();
    this.turns = h("div", { class: "turns" });
    this.live = h("div", { class: "hidden", "aria-live": "polite" });
    this.field = h("textarea", {
      rows: 1, maxlength: 1000000, value: state.draft, enterkeyhint: "send",
      oninput: () => { state.draft = this.field.value; this.showBusy(); },
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
        event.preventDefault();
        this.ask();
      },
    });
    this.send = h("button", { type: "submit", class: "send" });
    this.fresh = h("button", { type: "button", class: "plain small fresh", onclick: () => this.anew() }, icon("plus"), t("arena_new"));
    this.composer = h("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); this.isBusy ? this.stop() : this.ask(); } },
      this.field, h("div", { class: "row" }, this.fresh, h("span", { class: "gap" }), this.send));
    this.element = h("div", { class: "battle" }, this.turns, this.live, this.composer);
    this.keys = (event) => {
      const at = "1234".indexOf(event.key);
      const isTyping = event.target.closest?.("input, textarea, select, dialog");
      if (at < 0 || event.key.length !== 1 || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.vote(VERDICTS[at]);
    };
    addEventListener("keydown", this.keys);
  }

  end() {
    this.stops.abort();
    removeEventListener("keydown", this.keys);
  }

  async begin() {
    if (about.models < 2) {
      this.element.replaceChildren(h("section", { class: "lonely" }, h("h2", {}, t("arena_needs_two")), h("p", {}, t("arena_how")),
        h("pre", { tabindex: 0 }, "lyceum serve runs/demo --model sft=runs/demo/sft")));
      return;
    }
    if (state.conversation && !state.turns.length) {
      try {
        Object.assign(state, await api.json("GET", `/api/arena/conversations/${encodeURIComponent(state.conversation)}`));
      } catch (error) {
        if (error.status !== 404) throw error;
        this.forget();
      }
    }
    this.draw();
    this.field.focus();
  }

  forget() {
    Object.assign(state, { conversation: "", leaf: null, turns: [], kind: "" });
    history.replaceState(null, "", location.pathname);
  }

  anew() {
    this.stops.abort();
    this.stops = new AbortController();
    this.forget();
    this.draw();
    this.field.focus();
  }

  get last() {
    return state.turns.at(-1);
  }

  get isBusy() {
    return Boolean(this.last) && SIDES.some((side) => this.last[side].state === "streaming");
  }

  get waits() {
    return Boolean(this.last?.battle);
  }

  showBusy() {
    this.composer.hidden = this.waits && !this.isBusy;
    this.field.disabled = this.waits;
    this.field.placeholder = t(this.waits ? "arena_vote_first" : this.last ? "arena_on" : "ask_placeholder");
    this.field.setAttribute("aria-label", this.field.placeholder);
    this.fresh.hidden = !this.last;
    const name = this.isBusy ? "arena_stop" : "arena_ask";
    this.send.title = t(name);
    this.send.setAttribute("aria-label", t(name));
    this.send.disabled = !this.isBusy && !this.field.value.trim();
    this.send.replaceChildren(icon(this.isBusy ? "stop" : "send"));
    if (!this.composer.hidden) fit(this.field); // it may have been hidden, and then had no height
  }

  draw() {
    this.texts = new Map();
    const hello = h("section", { class: "rules" }, h("h2", {}, t("arena_title")), h("p", {}, t("arena_rules")));
    this.turns.replaceChildren(...(state.turns.length ? state.turns.map((turn) => this.turn(turn)) : [hello]));
    this.element.classList.toggle("empty", !state.turns.length);
    this.showBusy();
    for (const turn of state.turns) for (const side of SIDES) if (turn[side].state === "streaming") this.follow(turn, side);
    this.turns.lastChild?.scrollIntoView({ block: "end" });
  }

  turn(turn) {
    turn.element = h("section", { class: "duel" });
    this.fill(turn);
    return turn.element;
  }

  fill(turn) {
    const isOpen = Boolean(turn.battle);
    const sides = SIDES.map((side) => {
      const answer = turn[side];
      const text = this.texts.get(answer.id) ?? new AnswerText();
      this.texts.set(answer.id, text);
      const isStreaming = answer.state === "streaming";
      if (!isStreaming) text.whole(answer.blocks);
      text.element.classList.toggle("growing", isStreaming);
      const isChosen = turn.verdict === side;
      const note = answer.state === "failed" ? "failed" : answer.state === "stopped" ? "stopped" : answer.finish_reason === "length" ? "cut" : null;
      return h("article", { class: isChosen ? "side chosen" : "side", "aria-label": t(`answer_${side}`) },
        h("header", {}, h("span", {}, isOpen ? t(LABELS[side]) : answer.model), isChosen && h("span", { class: "mark" }, icon("check"), t("arena_chosen"))),
        text.element, !isStreaming && note && h("p", { class: "note" }, t(note)));
    });
    turn.element.replaceChildren(...[
      h("div", { class: "bubble", dir: "auto" }, turn.said.content),
      h("div", { class: "sides" }, sides),
      isOpen ? this.ballot(turn) : h("p", { class: "reveal" }, t(`arena_voted_${turn.verdict}`), " ", t("arena_was", { left: turn.left.model, right: turn.right.model })),
    ]);
  }

  ballot(turn) {
    const isDone = SIDES.every((side) => turn[side].state !== "streaming");
    const buttons = VERDICTS.map((verdict, place) => h("button", {
      type: "button", class: SIDES.includes(verdict) ? "primary" : "plain", disabled: !isDone, onclick: () => this.vote(verdict), "aria-keyshortcuts": String(place + 1),
    }, t(LABELS[verdict]), h("kbd", { "aria-hidden": "true" }, String(place + 1))));
    const kinds = h("select", { name: "kind", onchange: () => { state.kind = kinds.value; } },
      h("option", { value: "" }, t("arena_no_kind")), about.kinds.map((kind) => h("option", { value: kind }, t(`kind_${kind}`))));
    kinds.value = state.kind;
    return h("div", { class: "verdict", role: "group", "aria-label": t("which") },
      h("p", {}, t("which")), h("div", {}, buttons),
      h("div", { class: "more" }, h("label", { class: "field inline" }, h("span", {}, t("arena_kind")), kinds), consentBox(this.start.consent)));
  }

  async attempt(work) {
    try {
      return await work();
    } catch (error) {
      toast(error.message || t("offline"), { ms: 7000 });
      return null;
    }
  }

  async ask() {
    const content = this.field.value.trim();
    if (!content || this.waits || this.isAsking) return;
    this.isAsking = true;
    const told = await this.attempt(() => api.json("POST", "/api/arena/turns", { conversation: state.conversation || null, parent: state.leaf, content }));
    this.isAsking = false;
    if (!told) return;
    Object.assign(state, { conversation: told.conversation, leaf: told.leaf, turns: told.turns, draft: "", kind: "" });
    history.replaceState(null, "", `#${told.conversation}`);
    this.field.value = "";
    this.draw();
    this.send.focus();
  }

  async stop() {
    await this.attempt(() => Promise.all(SIDES.map((side) => this.last[side]).filter((one) => one.state === "streaming").map((one) => api.stop(one.id))));
  }

  /** Read an answer under way until it has ended, again where the line breaks. */
  async follow(turn, side) {
    const { signal } = this.stops;
    const text = this.texts.get(turn[side].id);
    let isTold = false;
    while (!signal.aborted) {
      try {
        for await (const news of api.follow(turn[side].id, text.numBlocks, signal)) {
          if (signal.aborted) return;
          if (!news.message) {
            text.grow(news);
            continue;
          }
          text.close();
          const { state: ended, blocks, finish_reason } = news.message;
          Object.assign(turn[side], { state: ended, blocks, finish_reason });
          this.fill(turn);
          this.showBusy();
          if (!this.isBusy) {
            this.live.textContent = t("which");
            if (!document.activeElement || document.activeElement === document.body || !document.activeElement.isConnected || this.composer.contains(document.activeElement)) {
              turn.element.querySelector(".verdict button")?.focus({ preventScroll: true });
            }
            turn.element.querySelector(".verdict")?.scrollIntoView({ block: "nearest" });
          }
          return;
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 404) return void toast(error.message);
        if (!isTold) toast(t("offline"));
        isTold = true;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  async vote(verdict) {
    const turn = this.last;
    if (!turn?.battle || this.isBusy || this.isVoting) return;
    this.isVoting = true;
    const given = { verdict, kind: state.kind || null, consent: mayTrain(this.start.consent) };
    const told = await this.attempt(() => api.json("POST", `/api/arena/battles/${encodeURIComponent(turn.battle)}/vote`, given));
    this.isVoting = false;
    if (!told) return;
    turn.battle = null;
    turn.verdict = verdict;
    turn.left.model = told.left;
    turn.right.model = told.right;
    state.leaf = told.leaf;
    this.fill(turn);
    this.showBusy();
    this.live.textContent = t("arena_was", told);
    this.field.focus({ preventScroll: true });
    turn.element.querySelector(".reveal").scrollIntoView({ block: "nearest" });
  }
}

// -- the table -----------------------------------------------------------------------------------------------------------

class Ratings {
  constructor() {
    this.element = h("div", { class: "ratings" });
  }

  end() {}

  async begin() {
    const query = `kind=${encodeURIComponent(state.ofKind)}&style=${state.style}`;
    let table;
    try {
      table = await api.json("GET", `/api/arena/table?${query}`);
    } catch (error) {
      if (error.status !== 404 || !state.ofKind) throw error;
      state.ofKind = ""; // its last vote was deleted
      return this.begin();
    }
    this.draw(table);
  }

  draw(table) {
    const kinds = h("select", { name: "of-kind", "aria-label": t("arena_kind"), onchange: () => { state.ofKind = kinds.value; this.begin(); } },
      h("option", { value: "" }, t("ratings_all", { n: number(table.num_all) })),
      Object.entries(table.kinds).map(([kind, n]) => h("option", { value: kind }, t("ratings_of", { kind: t(`kind_${kind}`), n: number(n) }))));
    kinds.value = state.ofKind;
    const style = h("input", { type: "checkbox", name: "style", checked: state.style, onchange: () => { state.style = style.checked; this.begin(); } });
    const bar = h("div", { class: "choose" }, h("label", { class: "field inline" }, h("span", {}, t("arena_kind")), kinds),
      h("label", { class: "consent", title: t("ratings_style_hint") }, style, h("span", {}, t("ratings_style"))),
      sign("again", t("try_again"), () => this.begin()));
    if (!table.num_votes) return this.element.replaceChildren(bar, h("p", { class: "none" }, t("ratings_none")));
    const ends = table.standings.flatMap((one) => [one.low, one.high, one.points]).filter((value) => value !== null);
    const [least, most] = [Math.min(...ends) - 10, Math.max(...ends) + 10];
    const at = (value) => `${(100 * (value - least)) / (most - least)}%`;
    const rows = table.standings.flatMap((one, place) => {
      const isApart = place > 0 && one.group !== table.standings[place - 1].group;
      const track = h("span", { class: "track", "aria-hidden": "true" });
      const hasInterval = one.low !== null || one.high !== null;
      if (hasInterval) {
        const range = h("span", { class: "range" });
        range.style.left = one.low === null ? "0" : at(one.low);
        range.style.right = one.high === null ? "0" : `calc(100% - ${at(one.high)})`;
        track.append(range);
      }
      const dot = h("span", { class: "dot" });
      dot.style.left = at(one.points);
      track.append(dot);
      const row = h("tr", {}, h("td", { class: "right" }, String(one.place)), h("th", { scope: "row" }, one.model),
        h("td", { class: "right" }, number(Math.round(one.points)), one.is_exact ? "" : "*"),
        h("td", { class: "interval" }, h("span", {}, between(one)), track),
        h("td", { class: "right" }, number(one.num_votes)), h("td", { class: "right" }, `${number(100 * one.score)}%`));
      return isApart ? [h("tr", { class: "apart" }, h("td", { colspan: 6 }, t("ratings_apart"))), row] : [row];
    });
    const head = [["place", "right"], ["model", ""], ["rating", "right"], ["interval", "interval"], ["votes", "right"], ["score", "right"]];
    const parts = [bar, h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": t("arena_ratings") }, h("table", {},
      h("thead", {}, h("tr", {}, head.map(([name, kind]) => h("th", { scope: "col", class: kind }, t(`ratings_${name}`))))),
      h("tbody", {}, rows)))];
    if (!table.standings.every((one) => one.is_exact)) parts.push(h("p", { class: "hint" }, t("ratings_penalty")));
    const counts = Object.fromEntries(Object.entries(table.verdicts).map(([name, n]) => [name, number(n)]));
    parts.push(h("p", { class: "hint" }, t("ratings_note", { ...counts, n: number(table.num_votes) })));
    if (table.effects.length) {
      parts.push(h("h3", {}, t("ratings_effects")), h("ul", { class: "effects" }, table.effects.map((one) =>
        h("li", {}, h("b", {}, t(`style_${one.name}`)), " ", t("ratings_points", { n: signed(one.points) }), " ",
          one.low !== null && h("span", { class: "hint" }, `${signed(one.low)} … ${signed(one.high)}`)))));
    }
    this.element.replaceChildren(...parts);
  }
}

function between({ low, high, is_open: open }) {
  if (low === null && high === null) return open.length === 2 || !open.length ? t("ratings_unknown") : "";
  if (low === null) return t("ratings_open_low", { high: number(Math.round(high)) });
  if (high === null) return t("ratings_open_high", { low: number(Math.round(low)) });
  return `${number(Math.round(low))} … ${number(Math.round(high))}`;
}

const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "±") + number(Math.abs(Math.round(value)));

await begin("arena", async (main, start) => {
  about ??= await api.json("GET", "/api/arena");
  page?.end();
  page = state.view === "battle" ? new Battle(start) : new Ratings();
  const tab = (view, name) => h("button", {
    type: "button", role: "tab", id: `tab-${view}`, "aria-selected": String(state.view === view), "aria-controls": "panel", tabindex: state.view === view ? 0 : -1,
    onclick: () => turnTo(view),
    onkeydown: (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      turnTo(view === "battle" ? "ratings" : "battle", true);
    },
  }, t(name));
  const turnTo = async (view, isFocused = false) => {
    state.view = view;
    page.end();
    page = view === "battle" ? new Battle(start) : new Ratings();
    for (const one of tabs.children) {
      const isChosen = one.id === `tab-${view}`;
      one.setAttribute("aria-selected", String(isChosen));
      one.tabIndex = isChosen ? 0 : -1;
      if (isChosen && isFocused) one.focus();
    }
    panel.setAttribute("aria-labelledby", `tab-${view}`);
    panel.replaceChildren(page.element);
    await page.begin();
  };
  const tabs = h("div", { class: "tabs", role: "tablist", "aria-label": t("arena_views") }, tab("battle", "arena_battle"), tab("ratings", "arena_ratings"));
  const panel = h("div", { id: "panel", class: "panel", role: "tabpanel", "aria-labelledby": `tab-${state.view}` }, page.element);
  main.classList.add("arena");
  main.append(tabs, panel);
  await page.begin();
});
