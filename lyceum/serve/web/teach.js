// Teaching while it talks: two keys, or two buttons, pressed while an answer is shown. The page tells the server when each
// piece was put on the screen and when a key was pressed; which segment a key means is worked out there.

import * as api from "./api.js";
import { confirm, toast } from "./dialogs.js";
import { h, icon, sign } from "./html.js";
import { memory } from "./settings.js";
import "./teach-words.js";
import { number, t } from "./words.js";

const OPEN_MS = 2500; // so long after its end an answer can still be pressed for
const FLASH_MS = 250;
const KEYS = { ArrowUp: 1, ArrowDown: -1 };
const LEAST = { candidates: 1, pace: 1 };
const MOST = { candidates: 16, pace: 30 };
const USUAL = { candidates: 4, pace: 6 };

export class Teacher {
  /** draft: the field where one writes. consent(): a box that asks for it. mayTrain(): what it says. failed(error). changed(id, presses). */
  constructor({ draft, consent, mayTrain, failed, changed, switched }) {
    Object.assign(this, { draft, consent, mayTrain, failed, changed, switched });
    this.isOn = memory.get("teach") === "on";
    this.watch = null; // the answer that is being watched
    this.traces = new Map(); // message -> the strip below its text
    this.lessons = null;
    this.button = h("button", { type: "button", class: "toggle", onclick: () => this.turn(!this.isOn) });
    this.bar = h("section", { class: "teach" });
    addEventListener("keydown", (event) => this.typed(event), true);
    this.translate();
  }

  get(name) {
    const value = Number(memory.get(name, USUAL[name]));
    return value >= LEAST[name] && value <= MOST[name] ? value : USUAL[name];
  }

  /** What an answer is asked for with; null where nobody teaches. */
  get wish() {
    return this.isOn ? { candidates: this.get("candidates"), pace: this.get("pace") } : null;
  }

  turn(isOn) {
    this.isOn = isOn;
    memory.set("teach", isOn ? "on" : null);
    this.translate();
    this.switched(isOn);
    this.draft.focus();
  }

  translate() {
    this.button.setAttribute("aria-pressed", String(this.isOn));
    this.button.title = t("teach_hint");
    this.button.replaceChildren(icon("up"), h("span", {}, t("teach")));
    const press = (value, name, label, key) =>
      h("button", { type: "button", class: `press ${name}`, onpointerdown: (event) => { event.preventDefault(); if (event.button === 0) this.press(value); },
        onclick: (event) => { if (event.detail === 0) this.press(value); } }, icon(value > 0 ? "up" : "down"), h("span", {}, label), h("kbd", { class: "only-wide" }, key));
    this.good = press(1, "good", t("teach_good"), "↑");
    this.bad = press(-1, "bad", t("teach_bad"), "↓");
    this.undo = sign("undo", t("teach_undo"), () => this.takeBack());
    this.said = h("p", { class: "said", role: "status" });
    this.bar.setAttribute("aria-label", t("teach_keys"));
    this.bar.replaceChildren(h("div", {}, this.good, this.bad, this.undo), this.said, this.consent());
    this.draw();
  }

  draw() {
    this.bar.hidden = !this.isOn;
    const isOpen = Boolean(this.watch);
    for (const button of [this.good, this.bad]) button.disabled = !isOpen;
    const presses = this.watch?.presses ?? [];
    this.undo.disabled = !presses.length;
    const parts = [presses.length ? t("teach_pressed", counts(presses.map(([, value]) => value))) : t(isOpen ? "teach_watching" : "teach_idle")];
    if (this.lessons && !presses.length) parts.push(t("teach_lessons", { n: number(this.lessons) }));
    this.said.textContent = parts.join(" · ");
  }

  // -- an answer ---------------------------------------------------------------------------------------------------------

  /** The strip below an answer's text: what was credited. */
  trace(id) {
    if (!this.traces.has(id)) this.traces.set(id, h("div", { class: "trace", role: "img", hidden: true }));
    return this.traces.get(id);
  }

  /** An answer that can be taught begins to be shown. */
  begin(message) {
    if (!this.isOn || !message.parameters?.taught) return;
    this.watch = { id: message.id, view: crypto.getRandomValues(new Uint32Array(2)).join("-"), since: performance.now(), shown: [], presses: [] };
    this.draw();
  }

  /** So many of its tokens are on the page; they are seen when the screen is next drawn. */
  seen(id, tokens) {
    const watch = this.watch;
    if (watch?.id !== id || tokens === undefined) return;
    requestAnimationFrame((now) => {
      if (tokens > (watch.shown.at(-1)?.[0] ?? 0)) watch.shown.push([tokens, Math.max(0, now - watch.since) / 1000]);
    });
  }

  /** It has ended: its last words can be pressed for a little longer. */
  ended(id) {
    const watch = this.watch;
    if (watch?.id !== id) return;
    setTimeout(() => {
      if (this.watch === watch) this.watch = null;
      this.draw();
      if (watch.presses.length) this.changed(watch.id, watch.presses.map(([, value]) => value));
    }, OPEN_MS);
  }

  typed(event) {
    const value = KEYS[event.key];
    if (!value || !this.watch || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || event.isComposing) return;
    const at = document.activeElement;
    const isFree = at === this.draft ? !this.draft.value : !at?.matches("input, select, textarea, .menu *, dialog *");
    if (!isFree) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat) this.press(value);
  }

  press(value) {
    const watch = this.watch;
    if (!watch?.shown.length) return; // nothing to mean yet
    watch.presses.push([Math.max(0, performance.now() - watch.since) / 1000, value]);
    const button = value > 0 ? this.good : this.bad;
    button.classList.add("flash");
    setTimeout(() => button.classList.remove("flash"), FLASH_MS);
    navigator.vibrate?.(10);
    this.draw();
    this.tell(watch);
  }

  takeBack() {
    if (!this.watch?.presses.pop()) return;
    this.draw();
    this.tell(this.watch);
  }

  /** Report all that was shown and pressed; what comes meanwhile goes with the next report. */
  async tell(watch) {
    watch.isBehind = true;
    if (watch.isTelling) return;
    watch.isTelling = true;
    try {
      while (watch.isBehind) {
        watch.isBehind = false;
        const said = await api.pressed(watch.id, {
          view: watch.view, consent: this.mayTrain(),
          shown_tokens: watch.shown.map(([tokens]) => tokens), shown_s: watch.shown.map(([, s]) => s),
          press_s: watch.presses.map(([s]) => s), press_values: watch.presses.map(([, value]) => value),
        });
        this.lessons = said.lessons;
        this.drawTrace(watch, said.segments);
        this.draw();
      }
    } catch (error) {
      this.failed(error);
    } finally {
      watch.isTelling = false;
    }
  }

  drawTrace(watch, segments) {
    const strip = this.trace(watch.id);
    strip.hidden = !watch.presses.length;
    strip.setAttribute("aria-label", t("teach_trace", counts(watch.presses.map(([, value]) => value))));
    strip.replaceChildren(...segments.map(({ text, label, weight }) => {
      const strength = Math.min(1, weight) * Math.abs(label);
      const what = t(label > 0 ? "teach_good" : "teach_bad");
      const title = strength ? t("teach_segment", { text: text.trim(), percent: number(100 * strength), what }) : text.trim();
      const cell = h("span", { class: strength ? (label > 0 ? "good" : "bad") : "", title });
      cell.style.flexGrow = String(Math.max(1, text.length));
      if (strength) cell.style.opacity = String(0.25 + 0.75 * strength);
      return cell;
    }));
  }

  // -- the settings ------------------------------------------------------------------------------------------------------

  /** A section of the settings: how it is told, how much was taught, and a way to forget it. */
  section() {
    const field = (name) => {
      const input = h("input", { type: "number", name, min: LEAST[name], max: MOST[name], step: 1, value: this.get(name), inputmode: "numeric",
        oninput: () => { input.setAttribute("aria-invalid", String(!input.validity.valid)); if (input.validity.valid && input.value) memory.set(name, input.value); } });
      return h("label", { class: "field number" }, h("span", {}, t(name)), input);
    };
    this.list = h("div", { class: "taught" });
    return h("section", {}, h("h3", {}, t("teaching")), field("candidates"), field("pace"), this.list);
  }

  /** Ask how much was taught, and show it. */
  async refresh() {
    try {
      const { taught } = await api.taught();
      const rows = Object.entries(taught).map(([model, { answers, presses }]) =>
        h("p", {}, h("span", {}, t("taught_so_far", { model, answers: number(answers), presses: number(presses) })),
          h("button", { type: "button", class: "plain small danger", onclick: () => this.forget(model) }, t("forget"))));
      this.list.replaceChildren(...(rows.length ? rows : [h("p", { class: "hint" }, t("taught_nothing"))]));
    } catch (error) {
      this.failed(error);
    }
  }

  async forget(model) {
    if (!(await confirm(t("forget_sure", { model }), t("forget_means"), t("forget")))) return;
    try {
      await api.forgetTaught(model);
    } catch (error) {
      return this.failed(error);
    }
    this.watch = null;
    this.lessons = null;
    this.draw();
    toast(t("forgotten"));
    await this.refresh();
  }
}

function counts(values) {
  const good = values.filter((value) => value > 0).length;
  return { good: number(good), bad: number(values.length - good) };
}

/** The keys pressed on an answer, as its facts say it; nothing where there are none. */
export function pressedFacts(values) {
  return values?.length ? t("teach_pressed", counts(values)) : null;
}
