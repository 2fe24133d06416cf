// The playground: a text and how it goes on, token by token with what else it might have been; insertions; edits.

import { EXAMPLES } from "./playground-words.js";
import { copyText } from "./answer.js";
import * as api from "./api.js";
import { consentBox, mayTrain } from "./consent.js";
import { toast } from "./dialogs.js";
import { begin } from "./frame.js";
import { h, icon } from "./html.js";
import { fit } from "./thread.js";
import { chance, shadeOf, split, TokenStrip, tokenText } from "./tokens.js";
import { language, number, t } from "./words.js";

const MODES = ["complete", "insert", "edit"];
const TEXTS = ["text", "after", "instruction"];
// name, least, most, step, standard
const NUMBERS = [
  ["temperature", 0, 2, 0.05, 1],
  ["max_tokens", 1, 1048576, 1, 64],
  ["top_p", 0, 1, 0.01, 1],
  ["top_k", 0, 100000, 1, 0],
  ["repetition_penalty", 0.01, 10, 0.05, 1],
  ["presence_penalty", -2, 2, 0.1, 0],
  ["frequency_penalty", -2, 2, 0.1, 0],
  ["seed", 0, Number.MAX_SAFE_INTEGER, 1, null],
];
const NUM_TOP = 5;

const state = { mode: "complete", model: "", text: "", after: "", instruction: "", parameters: {}, stop: [], isColoured: true };
let models = null;
let made = null; // what was written last: {prompt, text, tokens, finish, mode, model, checkpoint}
let stopper = null;

addEventListener("hashchange", () => location.reload());

/** Take what a link says; what is unknown or of a wrong kind is left out. */
function takeLink() {
  if (location.hash.length < 2) return;
  let given;
  try {
    const bytes = Uint8Array.from(atob(location.hash.slice(1).replaceAll("-", "+").replaceAll("_", "/")), (one) => one.charCodeAt(0));
    given = JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    return;
  }
  if (MODES.includes(given?.mode)) state.mode = given.mode;
  if (models.some((one) => one.id === given?.model)) state.model = given.model;
  for (const name of TEXTS) if (typeof given?.[name] === "string") state[name] = given[name];
  if (Array.isArray(given?.stop)) state.stop = given.stop.filter((one) => typeof one === "string" && one).slice(0, 4);
  for (const [name, least, most] of NUMBERS) {
    const value = given?.parameters?.[name];
    if (typeof value === "number" && value >= least && value <= most) state.parameters[name] = value;
  }
}

/** The address of this page with all of its settings, behind the #, which no server is sent. */
function link() {
  const { mode, model, text, after, instruction, parameters, stop } = state;
  const bytes = new TextEncoder().encode(JSON.stringify({ mode, model, text, after, instruction, parameters, stop }));
  let packed = "";
  for (const byte of bytes) packed += String.fromCharCode(byte);
  return `${location.origin}${location.pathname}#${btoa(packed).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

class Page {
  constructor(main, start) {
    Object.assign(this, { main, start });
    this.isBusy = false;
  }

  get model() {
    return models.find((one) => one.id === state.model);
  }

  draw() {
    const at = language() === "zh" ? 1 : 0;
    const modes = h("fieldset", { class: "segmented modes" }, h("legend", { class: "hidden" }, t("play_mode")), h("div", {}, MODES.map((mode) => {
      const input = h("input", { type: "radio", name: "mode", value: mode, checked: state.mode === mode, onchange: () => { state.mode = mode; this.leave(); this.draw(); this.main.querySelector(`input[value=${mode}]`).focus(); } });
      return h("label", {}, input, h("span", {}, t(`play_${mode}`)));
    })));
    const examples = h("select", { name: "example", "aria-label": t("play_examples"), onchange: () => {
      const example = EXAMPLES[examples.value];
      Object.assign(state, { mode: "complete", text: example.text[at], stop: example.stop, parameters: { ...state.parameters, temperature: 0 } });
      this.leave();
      this.draw();
      this.main.querySelector("[name=text]").focus();
    } }, h("option", { value: "", disabled: true }, t("play_choose")), Object.entries(EXAMPLES).map(([name, { title }]) => h("option", { value: name }, title[at])));
    examples.value = "";
    this.run = h("button", { type: "submit", class: "primary" });
    this.refusal = h("p", { class: "note bad", role: "status" });
    this.output = h("section", { class: "output", "aria-label": t("play_output") });
    const share = h("button", { type: "button", class: "plain", title: t("play_share_hint"), onclick: async () => { await copyText(link()); toast(t("play_shared")); } }, icon("export"), t("play_share"));
    const fields = state.mode === "complete" ? [this.text("text", "play_prompt", 9)]
      : state.mode === "insert" ? [this.text("text", "play_before", 5), this.text("after", "play_after", 4)]
      : [this.text("instruction", "play_instruction", 1, t("play_instruction_hint")), this.text("text", "play_input", 7)];
    const form = h("form", { class: "writing", onsubmit: (event) => { event.preventDefault(); this.isBusy ? stopper.abort() : this.go(); },
      onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !this.isBusy) { event.preventDefault(); this.go(); } } },
    h("div", { class: "choose" }, modes, examples),
    fields, this.refusal, h("div", { class: "row" }, this.run, h("kbd", { class: "only-wide" }, "Ctrl Enter"), h("span", { class: "gap" }), share), this.output);
    this.main.replaceChildren(h("div", { class: "bench" }, form, this.settings()));
    for (const field of form.querySelectorAll("textarea")) fit(field);
    this.show();
  }

  text(name, label, rows, placeholder = "") {
    const field = h("textarea", { name, rows, placeholder, value: state[name], maxlength: 1000000, spellcheck: "false", dir: "auto",
      oninput: () => { state[name] = field.value; fit(field); this.show(false); } });
    return h("label", { class: "field" }, h("span", {}, t(label)), field);
  }

  settings() {
    const labelled = (label, control) => h("label", { class: "field" }, h("span", {}, label), control);
    const model = h("select", { name: "model", onchange: () => { state.model = model.value; this.show(false); } }, models.map((one) => h("option", { value: one.id }, one.id)));
    model.value = state.model;
    const colours = h("input", { type: "checkbox", name: "colours", checked: state.isColoured, onchange: () => { state.isColoured = colours.checked; this.show(); } });
    const stop = h("textarea", { name: "stop", rows: 2, value: state.stop.map(escaped).join("\n"), oninput: () => { state.stop = stop.value.split("\n").filter(Boolean).slice(0, 4).map(unescaped); } });
    const numbers = NUMBERS.map(([name, least, most, step, standard]) => {
      const field = h("input", { type: "number", name, min: least, max: most, step: step < 1 ? "any" : step, placeholder: standard ?? "–", value: state.parameters[name] ?? "", inputmode: "decimal", oninput: () => {
        const value = field.valueAsNumber;
        const isEmpty = field.value === "" && !field.validity.badInput;
        const fits = isEmpty || (value >= least && value <= most && (step < 1 || Number.isInteger(value)));
        field.setAttribute("aria-invalid", String(!fits));
        if (isEmpty) delete state.parameters[name];
        else if (fits) state.parameters[name] = value;
      } });
      return h("label", { class: "field number" }, h("span", {}, t(name === "max_tokens" ? "play_longest" : name)), field);
    });
    return h("aside", { class: "dials", "aria-label": t("parameters") }, labelled(t("model"), model), numbers, labelled(t("stop_strings"), stop),
      h("label", { class: "consent" }, colours, h("span", {}, t("play_colours"))));
  }

  /** What cannot be done now, in words; nothing if it can. */
  get reason() {
    if (state.mode === "insert" && !this.model.inserts) return t("play_no_insert", { model: state.model });
    if (state.mode === "edit" && !this.model.chats) return t("play_no_edit", { model: state.model });
    return "";
  }

  show(isAll = true) {
    const isEmpty = state.mode === "edit" ? !state.instruction.trim() : state.mode === "insert" ? !state.text && !state.after : !state.text;
    this.refusal.textContent = this.reason;
    this.refusal.hidden = !this.reason;
    this.run.disabled = !this.isBusy && (isEmpty || Boolean(this.reason));
    this.run.replaceChildren(icon(this.isBusy ? "stop" : made ? "again" : "onward"), t(this.isBusy ? "stop" : made ? "play_again" : "play_run"));
    if (isAll) this.showOutput();
  }

  showOutput() {
    this.strip = null;
    if (!made) return this.output.replaceChildren(h("p", { class: "hint" }, t("play_nothing_yet")));
    const parts = [];
    if (made.tokens) {
      this.strip = new TokenStrip({ label: t("play_output"), detail: (place) => this.alternatives(place), isColoured: state.isColoured });
      this.strip.show(made.tokens);
      parts.push(this.strip.element, this.strip.detail);
    } else parts.push(h("div", { class: "plain-output", dir: "auto" }, made.text));
    this.foot = h("div", { class: "row foot-of-output" });
    parts.push(this.foot);
    this.output.replaceChildren(...parts);
    this.showFoot();
  }

  showFoot() {
    const copy = h("button", { type: "button", class: "plain small", onclick: () => copyText(made.text, copy) }, icon("copy"), t("copy"));
    const take = made.mode === "complete" && h("button", { type: "button", class: "plain small", onclick: () => this.take() }, icon("onward"), t("play_take"));
    const mend = made.mode !== "insert" && h("button", { type: "button", class: "plain small", onclick: () => this.correct() }, icon("pencil"), t("play_correct"));
    const logprobs = (made.tokens ?? []).map((one) => one.logprob);
    const mean = logprobs.length ? Math.exp(logprobs.reduce((sum, one) => sum + one, 0) / logprobs.length) : 0;
    const facts = [logprobs.length ? t("play_facts", { n: number(logprobs.length), p: chance(mean) }) : "", made.finish === "length" ? t("play_length") : ""].filter(Boolean);
    this.foot.replaceChildren(...[h("span", { class: "facts" }, facts.join(" · ")), h("span", { class: "gap" }), !this.isBusy && copy, !this.isBusy && take, !this.isBusy && mend].filter(Boolean));
  }

  // -- writing -------------------------------------------------------------------------------------------------------------

  /** What is being written is wanted no longer. */
  leave() {
    stopper?.abort();
    made = null;
    this.isBusy = false;
  }

  /** Write; kept: tokens of the last text that stay, the model goes on behind them. */
  async go(kept = []) {
    if (this.run.disabled || this.isBusy) return;
    this.isBusy = true;
    stopper = new AbortController();
    const { signal } = stopper;
    const { mode, model } = state;
    const prompt = mode === "edit" ? [state.instruction, state.text].filter(Boolean).join("\n\n") : state.text;
    const mine = { mode, model, prompt, instruction: state.instruction, input: state.text, text: kept.map(tokenText).join(""), tokens: mode === "edit" ? null : kept, finish: "", checkpoint: "", parameters: { ...state.parameters }, written: null };
    made = mine;
    this.show();
    try {
      if (mode === "edit") await this.edit(mine, signal);
      else await this.write(mine, signal);
    } catch (error) {
      if (!signal.aborted) toast(error.message || t("offline"), { ms: 7000 });
    }
    if (signal.aborted && (made !== mine || !this.output.isConnected)) return; // the page is about something else by now
    this.isBusy = false;
    if (!mine.text && !mine.tokens?.length) made = null;
    this.show();
  }

  async write(mine, signal) {
    const { max_tokens: longest = 64, ...parameters } = state.parameters;
    const asked = { model: mine.model, prompt: mine.prompt + mine.text, max_tokens: longest, logprobs: NUM_TOP, stream: true, ...parameters };
    if (state.mode === "insert" && state.after) asked.suffix = state.after;
    if (state.stop.length) asked.stop = state.stop;
    const before = mine.text;
    let said = "";
    const tokens = [];
    try {
      for await (const { choices, system_fingerprint: checkpoint } of api.events("POST", "/v1/completions", asked, signal)) {
        const [choice] = choices;
        if (!choice) continue;
        said += choice.text;
        mine.checkpoint = checkpoint ?? "";
        mine.finish = choice.finish_reason ?? "";
        mine.text = before + said;
        const { tokens: names = [], token_logprobs: logprobs, top_logprobs: tops, text_offset: offsets } = choice.logprobs ?? {};
        names.forEach((name, place) => tokens.push({ name, logprob: logprobs[place], top: tops[place], offset: offsets[place] }));
        if (made !== mine) continue;
        this.strip.grow(split(said, tokens).slice(this.strip.tokens.length - mine.tokens.length));
        this.showFoot();
      }
    } finally {
      if (made === mine) mine.tokens = this.strip.tokens;
    }
  }

  async edit(mine, signal) {
    const { temperature, top_p } = state.parameters;
    const asked = { model: mine.model, instruction: state.instruction, input: state.text, temperature, top_p };
    const answer = await (await api.send("POST", "/v1/edits", asked, { signal })).json();
    mine.text = answer.choices[0].text;
  }

  /** What else a token might have been, as buttons that put it there. */
  alternatives(place) {
    const tokens = this.strip.tokens;
    const token = tokens[place];
    const rows = Object.entries(token.top).sort(([, a], [, b]) => b - a);
    const rest = 1 - rows.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0);
    const can = !this.isBusy && made.mode === "complete" && tokens.slice(0, place).every((one) => one.text !== null);
    return [h("p", { class: "hint" }, t("play_alternatives")), h("ul", { class: "bars" }, rows.map(([name, logprob]) => {
      const isChosen = name === token.name;
      const text = tokenText({ name });
      const parts = [h("code", {}, shown(name)), bar(Math.exp(logprob)), h("span", { class: "chance" }, chance(Math.exp(logprob)))];
      const goes = can && !isChosen && text !== null && text !== "";
      return h("li", {}, goes
        ? h("button", { type: "button", class: "bar-row", title: t("play_instead", { token: shown(name) }), onclick: () => this.go([...tokens.slice(0, place), { ...token, name, text, shown: text, logprob }]) }, parts)
        : h("span", { class: isChosen ? "bar-row chosen" : "bar-row" }, parts));
    }), rest > 0.0005 && h("li", {}, h("span", { class: "bar-row rest" }, h("span", {}, t("play_other")), bar(rest), h("span", { class: "chance" }, chance(rest)))))];
  }

  /** The text that was written becomes part of what is gone on with. */
  take() {
    state.text += made.text;
    made = null;
    this.draw();
    const field = this.main.querySelector("[name=text]");
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  correct() {
    const field = h("textarea", { value: made.text, "aria-label": t("correction"), dir: "auto", oninput: () => fit(field) });
    const back = () => { this.showOutput(); this.foot.querySelector("button:last-child")?.focus(); };
    const save = async (event) => {
      event.preventDefault();
      event.stopPropagation();
      if (!field.value.trim()) return;
      const { model, prompt, input, instruction, mode, text, checkpoint, written } = made;
      const { seed, temperature, top_p, top_k, max_tokens } = made.parameters;
      const given = { model, prompt: mode === "edit" ? input : prompt, completion: written ?? text, correction: field.value, checkpoint,
        parameters: { seed, temperature, top_p, top_k, max_tokens }, consent: mayTrain(this.start.consent) };
      if (mode === "edit") given.instruction = instruction;
      try {
        await api.json("POST", "/api/playground/corrections", given);
      } catch (error) {
        return void toast(error.message || t("offline"), { ms: 7000 });
      }
      made = { ...made, written: written ?? text, text: field.value, tokens: null };
      toast(t("thanks"));
      back();
    };
    const button = h("button", { type: "button", class: "primary", onclick: save }, t("save"));
    this.output.replaceChildren(h("div", { class: "editing wide", onkeydown: (event) => { event.stopPropagation(); if (event.key === "Escape") back(); } }, field, h("p", { class: "hint" }, t("play_correct_hint")), consentBox(this.start.consent),
      h("footer", {}, h("button", { type: "button", class: "plain", onclick: back }, t("cancel")), button)));
    fit(field);
    field.focus();
  }
}

function bar(value) {
  const inner = h("span", {});
  inner.style.width = `${100 * value}%`;
  inner.style.background = shadeOf(value);
  return h("span", { class: "bar-of", "aria-hidden": "true" }, inner);
}

/** A token's name as people see it: spaces and line ends are shown. */
function shown(name) {
  const text = tokenText({ name });
  if (text === null) return t("play_part");
  return text === "" ? t("play_end") : text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n");
const unescaped = (text) => text.replace(/\\(n|\\)/g, (_, one) => (one === "n" ? "\n" : "\\"));

await begin("playground", async (main, start) => {
  if (!models) {
    ({ models } = await api.json("GET", "/api/playground"));
    state.model = models[0].id;
    takeLink();
  }
  stopper?.abort();
  main.classList.add("playground");
  new Page(main, start).draw();
});
