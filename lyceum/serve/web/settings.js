// The panel of settings: what belongs to this chat (model, system prompt, parameters) and to this page (looks, language).

import { accountSection } from "./account.js";
import { h, sign } from "./html.js";
import { LANGUAGES, language, number, t } from "./words.js";

// name, least, most, step, what an empty field stands for; the first two have a slider
const NUMBERS = [
  ["temperature", 0, 2, 0.05, 0],
  ["top_p", 0, 1, 0.01, 1],
  ["max_tokens", 1, 1048576, 1, null],
  ["top_k", 0, 100000, 1, 0],
  ["min_p", 0, 1, 0.01, 0],
  ["repetition_penalty", 0.01, 10, 0.05, 1],
  ["presence_penalty", -2, 2, 0.1, 0],
  ["frequency_penalty", -2, 2, 0.1, 0],
  ["seed", 0, Number.MAX_SAFE_INTEGER, 1, null],
];
const SLIDERS = 2;

/** What this browser remembers; it may forbid that. */
export const memory = {
  get(name, otherwise = null) {
    try {
      return localStorage.getItem(name) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(name, value) {
    try {
      if (value === null || value === "") localStorage.removeItem(name);
      else localStorage.setItem(name, value);
    } catch {
      // then it is forgotten
    }
  },
};

/** Put the chosen looks on: "auto", "light" or "dark". */
export function dress(looks) {
  document.documentElement.dataset.looks = looks;
}

// kinds of what a model can have learned from -> their words
const LEARNED = {
  documents: "learned_documents", conversations: "learned_conversations", rankings: "learned_rankings",
  ratings: "learned_ratings", prompts: "learned_prompts", scores: "learned_scores",
};

/** Where a model comes from: those before it, the oldest first, and what each learned from; nothing if nobody knows. */
function lineage(steps) {
  if (!steps?.length) return null;
  const said = ({ kind, count, origins }) => {
    const people = origins?.human;
    return t(LEARNED[kind], { n: number(count) }) + (people ? ` (${t("by_people", { n: number(people) })})` : "");
  };
  return h("details", { class: "lineage" }, h("summary", {}, t("comes_from")),
    h("ol", {}, steps.map(({ model, stage, data }) => h("li", {}, h("b", {}, model), " ",
      h("span", {}, data.length ? data.map(said).join(" · ") : stage || t("made_elsewhere"))))));
}

export class Settings {
  /** models: of the server. changed(what, value): what, is "model", "second", "system" or "parameters". teaching(): who is taught. */
  constructor({ models, changed, looksChanged, languageChanged, dataChanged, teaching, failed, closed }) {
    Object.assign(this, { models, changed, looksChanged, languageChanged, dataChanged, teaching, failed });
    this.element = h("aside", { class: "settings", id: "settings", "aria-label": t("settings"), hidden: true });
    this.closed = closed;
    this.chat = { model: models[0]?.id ?? "", second: "", system: "", parameters: {} };
    this.lineage = h("div", {});
  }

  get isOpen() {
    return !this.element.hidden;
  }

  toggle(isOpen = !this.isOpen) {
    if (isOpen === this.isOpen) return;
    this.element.hidden = !isOpen;
    document.getElementById("app").classList.toggle("with-settings", isOpen);
    if (isOpen) this.teaching().refresh();
    if (isOpen) this.element.querySelector("button, select, textarea")?.focus();
    else this.closed();
  }

  /** Show the settings of a chat: {model, second, system, parameters}. */
  show(chat) {
    this.chat = chat;
    this.draw();
    if (this.isOpen) this.teaching().refresh();
  }

  draw() {
    const { chat, models } = this;
    const labelled = (label, control, more = null) => h("label", { class: "field" }, h("span", {}, label), control, more);
    const options = (all, chosen) => all.map(([value, name]) => {
      const option = h("option", { value }, name);
      option.selected = value === chosen;
      return option;
    });
    const tell = (what, value) => {
      chat[what] = value;
      if (what === "model") this.showLineage();
      this.changed(what, value);
    };
    this.showLineage();
    const names = models.map((model) => [model.id, model.id]);
    const select = (what, all, chosen) =>
      h("select", { onchange: (event) => tell(what, event.target.value), name: what }, options(all, chosen));

    const segmented = (name, label, all, chosen, choose) =>
      h("fieldset", { class: "segmented" }, h("legend", {}, label), h("div", {}, all.map(([value, text]) => {
        const input = h("input", { type: "radio", name, value, onchange: () => choose(value) });
        input.checked = value === chosen;
        return h("label", {}, input, h("span", {}, text));
      })));

    this.element.setAttribute("aria-label", t("settings"));
    this.element.replaceChildren(
      h("header", {}, h("h2", {}, t("settings")), sign("close", t("close"), () => this.toggle(false))),
      h("div", { class: "scroll" },
        h("section", {},
          h("h3", {}, t("for_chat")),
          labelled(t("model"), select("model", names, chat.model)),
          this.lineage,
          models.length > 1 && labelled(t("second_model"), select("second", [["", t("same_model")], ...names], chat.second)),
          labelled(t("system"), h("textarea", {
            rows: 4, name: "system", placeholder: t("system_placeholder"), value: chat.system, maxlength: 20000,
            oninput: (event) => tell("system", event.target.value),
          })),
          h("h4", {}, t("parameters")),
          NUMBERS.map((row, place) => this.number(row, place < SLIDERS, tell)),
          labelled(t("stop_strings"), h("textarea", {
            rows: 2, name: "stop", value: (chat.parameters.stop ?? []).join("\n"),
            oninput: (event) => this.set("stop", event.target.value.split("\n").filter(Boolean).slice(0, 4), tell),
          })),
          h("button", { type: "button", class: "plain", onclick: () => { tell("parameters", {}); this.draw(); } }, t("reset")),
        ),
        h("section", {},
          h("h3", {}, t("for_page")),
          segmented("looks", t("appearance"), [["auto", t("auto")], ["light", t("light")], ["dark", t("dark")]],
            document.documentElement.dataset.looks ?? "auto", this.looksChanged),
          segmented("language", t("language"), Object.entries(LANGUAGES), language(), this.languageChanged),
        ),
        this.teaching().section(),
        accountSection({ changed: this.dataChanged, failed: this.failed }),
      ),
    );
  }

  /** What the chosen model comes from; it stays open, or closed, as another is chosen. */
  showLineage() {
    const shown = lineage(this.models.find((one) => one.id === this.chat.model)?.learned_from);
    if (shown) shown.open = Boolean(this.lineage.querySelector("details")?.open);
    this.lineage.replaceChildren(...(shown ? [shown] : []));
    this.lineage.hidden = !shown;
  }

  number([name, least, most, step, standard], hasSlider, tell) {
    const value = this.chat.parameters[name];
    const field = h("input", {
      type: "number", name, min: least, max: most, step, value: value ?? "", placeholder: standard ?? "–", "aria-label": t(name), inputmode: "decimal",
    });
    const slider = hasSlider && h("input", {
      type: "range", min: least, max: most, step, value: value ?? standard, tabindex: -1, "aria-hidden": "true",
    });
    const set = (text) => {
      const number = text === "" ? null : Number(text);
      const fits = number === null || (Number.isFinite(number) && number >= least && number <= most && (step < 1 || Number.isInteger(number)));
      field.setAttribute("aria-invalid", String(!fits));
      if (fits) this.set(name, number, tell);
    };
    field.addEventListener("input", () => {
      if (slider) slider.value = field.value === "" ? standard : field.value;
      set(field.validity.badInput ? "not a number" : field.value);
    });
    slider?.addEventListener?.("input", () => {
      field.value = slider.value;
      set(slider.value);
    });
    return h("label", { class: hasSlider ? "field slider" : "field number" }, h("span", {}, t(name)), slider, field);
  }

  set(name, value, tell) {
    const parameters = { ...this.chat.parameters };
    if (value === null || (Array.isArray(value) && !value.length)) delete parameters[name];
    else parameters[name] = value;
    tell("parameters", parameters);
  }
}
