// One conversation on the page: the branch that is shown, its answers as they grow, and what people say about them.

import { AnswerText, copyText } from "./answer.js";
import * as api from "./api.js";
import { card, resultsIn } from "./cards.js";
import { consentBox, mayTrain } from "./consent.js";
import { toast } from "./dialogs.js";
import { h, icon, sign } from "./html.js";
import { pressedFacts } from "./teach.js";
import { number, t } from "./words.js";

const NEAR_PX = 80; // so near to the end, the page follows what is written
const RETRY_MS = 1000;
const REASONS = {
  1: ["reason_correct", "reason_clear", "reason_complete"],
  "-1": ["reason_wrong", "reason_unhelpful", "reason_ignored", "reason_style", "reason_unsafe"],
};

export class Thread {
  /** busy(): an answer begins or ends. failed(error). about(): the settings that a new answer is made with. */
  constructor({ busy, failed, about, consent }) {
    Object.assign(this, { busy, failed, about });
    this.consentDefault = consent;
    this.column = h("div", { class: "column" });
    this.live = h("div", { class: "hidden", "aria-live": "polite" });
    this.element = h("div", { class: "thread", tabindex: -1, onscroll: () => this.scrolled() }, this.column, this.live);
    this.toBottom = sign("bottom", t("to_bottom"), () => this.bottom(true), { class: "sign to-bottom", hidden: true });
    // messages out of sight have a guessed height until they are seen
    new ResizeObserver(() => { if (this.isFollowing) this.bottom(); }).observe(this.column);
    this.teacher = null; // who watches answers and takes keys
    this.clear();
  }

  clear() {
    for (const stream of this.streams?.values() ?? []) stream.abort();
    this.streams = new Map(); // message -> what ends the reading of its answer
    this.conversation = null;
    this.messages = new Map();
    this.nodes = new Map();
    this.leaf = null;
    this.isFollowing = true;
    this.column.replaceChildren();
    this.toBottom.hidden = true;
  }

  /** Show a conversation as the server gives it. */
  show({ conversation, messages }) {
    this.clear();
    this.conversation = conversation;
    this.leaf = conversation.leaf;
    for (const message of messages) this.messages.set(message.id, message);
    this.draw();
    for (const message of messages) if (message.state === "streaming") this.follow(message);
    this.bottom();
  }

  /** From the first message to the leaf. */
  get path() {
    const found = [];
    for (let at = this.messages.get(this.leaf); at; at = this.messages.get(at.parent)) found.unshift(at);
    return found;
  }

  get isBusy() {
    return this.path.some((one) => this.partners(one).some((partner) => partner.state === "streaming"));
  }

  siblings(message) {
    return [...this.messages.values()].filter((one) => one.parent === message.parent && one.role === message.role);
  }

  /** The two answers of a pair that is not judged yet, left first; else the message alone. */
  partners(message) {
    const pair = message.parameters?.pair;
    if (!pair || message.judged) return [message];
    const both = this.siblings(message).filter((one) => one.parameters?.pair === pair);
    return both.length === 2 ? both.sort((a) => (a.parameters.side === "left" ? -1 : 1)) : [message];
  }

  get waitsForChoice() {
    return this.path.length > 0 && this.partners(this.path.at(-1)).length === 2;
  }

  // -- what is shown -----------------------------------------------------------------------------------------------------

  draw() {
    const path = this.path;
    this.results = resultsIn(path);
    const wanted = path.filter((message) => !this.results.has(message)).map((message) => {
      const partners = this.partners(message);
      return partners.length === 2 ? this.pair(partners) : this.node(message);
    });
    let at = this.column.firstChild;
    for (const node of wanted) { // only what is elsewhere is moved, so that focus and selection stay
      if (node === at) at = at.nextSibling;
      else this.column.insertBefore(node, at);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
    this.busy();
  }

  node(message) {
    const siblings = this.siblings(message);
    const place = siblings.indexOf(message);
    const isLast = message.id === this.leaf;
    const calls = (message.tool_calls ?? []).map((call) => this.results.of(message, call)?.id ?? null);
    const mark = JSON.stringify([message.version ?? 0, message.state, place, siblings.length, message.thumb, isLast, calls, message.presses?.length]);
    const known = this.nodes.get(message.id);
    if (known?.mark === mark) return known.element;
    const node = known ?? { element: h("article", { class: `turn ${message.role}`, "data-id": message.id }) };
    node.mark = mark;
    this.nodes.set(message.id, node);
    if (message.role === "user") this.fillUser(node, message, siblings, place);
    else if (message.role === "tool") node.element.replaceChildren(card(null, message)); // of no call on this branch
    else this.fillAnswer(node, message, siblings, place, isLast);
    return node.element;
  }

  arrows(siblings, place) {
    if (siblings.length < 2) return null;
    const go = (to) => () => this.choose(siblings[to]);
    return h("span", { class: "arrows", role: "group", "aria-label": t("version_of", { n: place + 1, all: siblings.length }) },
      sign("left", t("previous"), go(place - 1), { disabled: place === 0 }),
      h("span", { class: "count" }, `${place + 1}/${siblings.length}`),
      sign("right", t("next"), go(place + 1), { disabled: place === siblings.length - 1 }));
  }

  fillUser(node, message, siblings, place) {
    node.element.setAttribute("aria-label", t("you"));
    const copy = sign("copy", t("copy"), () => copyText(message.content, copy));
    node.element.replaceChildren(
      h("div", { class: "bubble", dir: "auto" }, message.content),
      h("div", { class: "actions" }, this.arrows(siblings, place), copy, sign("pencil", t("edit"), () => this.edit(message))));
  }

  fillAnswer(node, message, siblings, place, isLast) {
    node.element.setAttribute("aria-label", message.model || t("model"));
    if (!node.text) node.text = new AnswerText();
    const isStreaming = message.state === "streaming";
    if (!isStreaming) node.text.whole(message.blocks);
    const parts = [h("header", {}, h("span", { class: "by" }, message.model))];
    node.text.element.classList.toggle("growing", isStreaming);
    parts.push(node.text.element);
    if (this.teacher && message.parameters?.taught) parts.push(this.teacher.trace(message.id));
    for (const call of message.tool_calls ?? []) parts.push(card(call, this.results.of(message, call)));
    const note = noteOf(message);
    if (note) parts.push(h("p", { class: message.state === "failed" ? "note bad" : "note" }, note));
    if (!isStreaming) parts.push(this.actions(message, siblings, place, isLast));
    node.element.replaceChildren(...parts);
  }

  actions(message, siblings, place, isLast) {
    const copy = sign("copy", t("copy"), () => copyText(message.content, copy));
    const thumb = (value, name, label) =>
      sign(name, label, () => this.thumb(message, message.thumb === value ? 0 : value), {
        "aria-pressed": String(message.thumb === value), class: message.thumb === value ? "sign chosen" : "sign",
      });
    const isCut = isLast && (message.finish_reason === "length" || message.state !== "done");
    return h("div", { class: "actions" },
      this.arrows(siblings, place), copy,
      thumb(1, "up", t("good")), thumb(-1, "down", t("bad")),
      sign("pencil", t("correct"), () => this.correct(message)),
      sign("again", t("again"), () => this.again(message)),
      isCut && message.content && h("button", { type: "button", class: "plain small", onclick: () => this.goOn(message) }, icon("onward"), t("continue")),
      h("span", { class: "facts" }, factsOf(message)));
  }

  pair(partners) {
    const key = `pair-${partners[0].parameters.pair}`;
    const isDone = partners.every((one) => one.state !== "streaming");
    const mark = JSON.stringify(partners.map((one) => [one.state, one.version]));
    let node = this.nodes.get(key);
    if (!node) {
      node = { element: h("section", { class: "turn pair" }), texts: new Map() };
      this.nodes.set(key, node);
    }
    if (node.mark === mark) return node.element;
    node.mark = mark;
    const columns = partners.map((message, place) => {
      if (!node.texts.has(message.id)) node.texts.set(message.id, new AnswerText());
      const text = node.texts.get(message.id);
      this.nodes.set(message.id, { text, element: node.element });
      if (message.state !== "streaming") text.whole(message.blocks);
      text.element.classList.toggle("growing", message.state === "streaming");
      const label = t(place ? "answer_right" : "answer_left");
      const note = noteOf(message);
      return h("article", { class: "side", "aria-label": label, "data-id": message.id },
        h("header", {}, t(place ? "right_better" : "left_better")), text.element, note && h("p", { class: "note" }, note));
    });
    const judge = (verdict) => () => this.compare(partners, verdict);
    const button = (verdict, label, kind = "plain") => h("button", { type: "button", class: kind, disabled: !isDone, onclick: judge(verdict) }, label);
    node.element.replaceChildren(
      h("div", { class: "sides" }, columns),
      h("div", { class: "verdict", role: "group", "aria-label": t("which") },
        h("p", {}, t("which")),
        h("div", {}, button("left", t("left_better"), "primary"), button("tie", t("tie")), button("neither", t("neither")),
          button("right", t("right_better"), "primary")),
        this.consent()));
    return node.element;
  }

  // -- answers as they grow ----------------------------------------------------------------------------------------------

  /** Read an answer under way until it has ended, again where the line breaks. */
  async follow(message) {
    if (this.streams.has(message.id)) return;
    const stop = new AbortController();
    this.streams.set(message.id, stop);
    const conversation = this.conversation;
    message.numTokens = message.completion_tokens ?? 0;
    let isTold = false;
    this.teacher?.begin(message);
    while (!stop.signal.aborted) {
      try {
        const text = this.nodes.get(message.id).text;
        for await (const news of api.follow(message.id, text.numBlocks, stop.signal)) {
          if (this.conversation !== conversation) return;
          if (news.message) return this.finished(news.message);
          const said = text.grow(news);
          if (said) this.announce(said);
          if (news.tokens !== undefined) message.numTokens = news.tokens;
          this.teacher?.seen(message.id, news.tokens);
          message.seconds = news.seconds;
          this.busy();
          if (this.isFollowing) this.bottom();
        }
      } catch (error) {
        if (stop.signal.aborted) return;
        if (error.status === 404) return this.failed(error);
        if (!isTold) toast(t("offline"));
        isTold = true;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  finished(message) {
    const before = this.messages.get(message.id);
    this.streams.delete(message.id);
    this.nodes.get(message.id)?.text?.close();
    this.teacher?.ended(message.id);
    this.put({ ...message, version: (before?.version ?? 0) + 1 });
    this.announce(t("answer_done"));
    if (this.isFollowing) this.bottom();
  }

  announce(text) {
    this.live.textContent = text;
  }

  put(message) {
    this.messages.set(message.id, { ...this.messages.get(message.id), ...message });
    this.draw();
  }

  /** New messages below each other or beside each other; the last is shown. */
  add(messages) {
    for (const message of messages) this.messages.set(message.id, message);
    this.leaf = messages.at(-1).id;
    this.isFollowing = true;
    this.draw();
    this.bottom();
    for (const message of messages) if (message.state === "streaming") this.follow(message);
  }

  // -- what people do ----------------------------------------------------------------------------------------------------

  async attempt(work) {
    try {
      return await work();
    } catch (error) {
      this.failed(error);
      return null;
    }
  }

  /** Which models answer, and how. */
  wanted() {
    const { model, second, parameters, two } = this.about();
    const teach = two ? null : this.teacher?.wish;
    return { models: two ? [model, second || model] : [model], parameters, ...(teach ? { teach } : {}) };
  }

  async say(content, parent = this.leaf) {
    if (this.isBusy) return false;
    const said = await this.attempt(() => api.say(this.conversation.id, { parent, content, ...this.wanted() }));
    if (said) this.add(said.messages);
    return Boolean(said);
  }

  async again(message) {
    if (this.isBusy) return;
    const said = await this.attempt(() => api.again(message.id, this.wanted()));
    if (said) this.add(said.messages);
  }

  async goOn(message) {
    const said = await this.attempt(() => api.goOn(message.id));
    if (!said) return;
    this.put(said.message);
    this.follow(this.messages.get(message.id));
  }

  async stop() {
    const running = this.path.flatMap((one) => this.partners(one)).filter((one) => one.state === "streaming");
    await this.attempt(() => Promise.all(running.map((one) => api.stop(one.id))));
  }

  async choose(message) {
    const said = await this.attempt(() => api.change(this.conversation.id, { leaf: message.id }));
    if (!said) return;
    this.leaf = said.leaf;
    this.isFollowing = false;
    this.draw();
  }

  /** Ask something else instead of a message: a new branch. */
  edit(message) {
    const node = this.nodes.get(message.id).element;
    const send = async () => {
      const text = field.value.trim();
      if (!text || this.isBusy) return;
      if (await this.say(text, message.parent)) this.redraw(message);
    };
    const field = h("textarea", {
      value: message.content, "aria-label": t("edit_message"), oninput: () => fit(field),
      onkeydown: (event) => {
        if (event.key === "Escape") this.redraw(message);
        else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) send();
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    });
    node.replaceChildren(h("form", { class: "editing", onsubmit: (event) => { event.preventDefault(); send(); } }, field,
      h("footer", {}, h("button", { type: "button", class: "plain", onclick: () => this.redraw(message) }, t("cancel")),
        h("button", { type: "submit", class: "primary" }, t("save_ask")))));
    fit(field);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  redraw(message) {
    const node = this.nodes.get(message.id);
    if (node) node.mark = null;
    this.draw();
  }

  /** Write an answer as it should have been; what follows it stays. */
  correct(message) {
    const node = this.nodes.get(message.id).element;
    const field = h("textarea", {
      value: message.content, "aria-label": t("correction"), oninput: () => fit(field),
      onkeydown: (event) => {
        if (event.key !== "Escape") return;
        event.stopPropagation();
        this.redraw(message);
      },
    });
    const save = async (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      const given = { content: field.value, consent: this.mayTrain };
      const said = await this.attempt(() => api.correct(message.id, given));
      if (!said) return;
      this.put({ ...said.message, version: (message.version ?? 0) + 1 });
      toast(t("thanks"));
    };
    node.replaceChildren(h("form", { class: "editing wide", onsubmit: save }, field,
      h("p", { class: "hint" }, t("correct_hint")), this.consent(),
      h("footer", {}, h("button", { type: "button", class: "plain", onclick: () => this.redraw(message) }, t("cancel")),
        h("button", { type: "submit", class: "primary" }, t("save")))));
    fit(field);
    field.focus();
  }

  async thumb(message, value) {
    const give = (reason) => api.thumb(message.id, { value, reason, consent: this.mayTrain });
    if (!(await this.attempt(() => give("")))) return;
    this.put({ id: message.id, thumb: value });
    if (value) this.why(message, value, give);
  }

  /** Why: chips and a line of words, below the answer that was judged. */
  why(message, value, give) {
    const node = this.nodes.get(message.id).element;
    node.querySelector(".why")?.remove();
    const chosen = new Set();
    const field = h("input", { type: "text", maxlength: 1000, placeholder: t(value > 0 ? "why_good" : "why_bad"), "aria-label": t(value > 0 ? "why_good" : "why_bad") });
    const chips = REASONS[value].map((name) => {
      const chip = h("button", { type: "button", class: "chip", "aria-pressed": "false", onclick: () => {
        chosen.has(name) ? chosen.delete(name) : chosen.add(name);
        chip.setAttribute("aria-pressed", String(chosen.has(name)));
      } }, t(name));
      return chip;
    });
    const box = h("form", { class: "why", onsubmit: async (event) => {
      event.preventDefault();
      const words = [...[...chosen].map((name) => name.slice("reason_".length)), field.value.trim()].filter(Boolean);
      if (await this.attempt(() => give(words.join("; ")))) {
        box.remove();
        toast(t("thanks"));
      }
    } },
    h("div", { class: "chips" }, chips), field,
    h("footer", {}, this.consent(), h("button", { type: "button", class: "plain", onclick: () => box.remove() }, t("close")),
      h("button", { type: "submit", class: "primary" }, t("save"))));
    node.append(box);
    if (this.isFollowing) this.bottom();
    box.scrollIntoView({ block: "nearest" });
    chips[0].focus();
  }

  get mayTrain() {
    return mayTrain(this.consentDefault);
  }

  consent() {
    return consentBox(this.consentDefault);
  }

  async compare(partners, verdict) {
    const given = { left: partners[0].id, right: partners[1].id, verdict, consent: this.mayTrain };
    const said = await this.attempt(() => api.compare(given));
    if (!said) return;
    for (const one of partners) {
      this.nodes.delete(one.id);
      this.messages.set(one.id, { ...this.messages.get(one.id), judged: true });
    }
    this.leaf = said.leaf;
    toast(t("thanks"));
    this.draw();
  }

  // -- scrolling ---------------------------------------------------------------------------------------------------------

  scrolled() {
    const left = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight;
    this.isFollowing = left < NEAR_PX;
    this.toBottom.hidden = this.isFollowing;
  }

  bottom(isSmooth = false) {
    this.element.scrollTo({ top: this.element.scrollHeight, behavior: isSmooth ? "smooth" : "instant" });
  }

  /** Bring a message into view. */
  reach(id) {
    const element = this.nodes.get(id)?.element;
    if (!element) return;
    this.isFollowing = false;
    element.scrollIntoView({ block: "center" });
    element.classList.add("found");
    setTimeout(() => element.classList.remove("found"), 2000);
  }
}

/** A field as high as its text. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function noteOf(message) {
  if (message.state === "stopped") return t("stopped");
  if (message.state === "failed") return message.finish_reason === "interrupted" ? t("interrupted") : t("failed");
  if (message.state === "done" && message.finish_reason === "length") return t("cut");
  return null;
}

function factsOf(message) {
  const found = [];
  if (message.corrected) found.push(t("corrected"));
  const pressed = pressedFacts(message.presses);
  if (pressed) found.push(pressed);
  if (message.completion_tokens) found.push(t("tokens", { n: number(message.completion_tokens) }));
  if (message.tokens_per_second) found.push(t("per_second", { n: number(message.tokens_per_second, 1) }));
  return found.join(" · ");
}
