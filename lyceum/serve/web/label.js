// The labelling page: who labels, which tasks, one task after another; beside them the guidelines; and the dashboard.

import "./label-words.js";

import { AnswerText } from "./answer.js";
import { Refused, json } from "./api.js";
import { dialog, toast } from "./dialogs.js";
import { begin } from "./frame.js";
import { h, icon } from "./html.js";
import { showBoard, showSetup } from "./label-board.js";
import { chips, languageName } from "./label-parts.js";
import { taskForm } from "./label-tasks.js";
import { memory } from "./settings.js";
import { language, number, t } from "./words.js";

const LOOK_MS = 2500; // while models write
const REST_MS = 15_000;
const TABS = ["work", "board", "setup"];

class Page {
  constructor(main) {
    this.main = main;
    this.name = memory.get("label-name", "");
    this.consent = memory.get("label-consent") === "yes";
    this.kinds = new Set((memory.get("label-kinds") ?? "").split(" ").filter(Boolean));
    this.language = memory.get("label-language", "");
    this.tab = "work";
    this.guide = h("aside", { class: "guide", "aria-label": t("guidelines"), hidden: true });
    this.place = h("div", { class: "task" });
    this.said = h("p", { class: "hidden", "aria-live": "polite" });
  }

  async open() {
    this.about = await json("GET", `/api/label?name=${encodeURIComponent(this.name)}`);
    if (!this.kinds.size) this.kinds = new Set(this.about.kinds);
    this.draw();
    if ((this.name || !this.about.asks_name) && this.consent) await this.next();
    else this.ask();
  }

  draw() {
    const { done, states, admin } = this.about;
    const all = Object.values(states).reduce((sum, one) => sum + one, 0) - (states.halted ?? 0) - (states.low_grade ?? 0);
    const tabs = admin && h("div", { class: "tabs", role: "tablist" }, TABS.map((name) => h("button", {
      type: "button", role: "tab", "aria-selected": String(name === this.tab), onclick: () => this.show(name),
    }, t(name))));
    this.count = h("span", { class: "hint" }, this.counted(done));
    const open = h("button", { type: "button", class: "plain small", "aria-expanded": String(!this.guide.hidden), onclick: () => this.guidelines() }, t("guidelines"), h("kbd", {}, "G"));
    this.opener = open;
    this.main.replaceChildren(h("div", { class: "label" },
      h("div", { class: "over" }, tabs, h("span", { class: "gap" }), this.count,
        all ? h("span", { class: "hint only-wide" }, t("trees", { n: number(states.finished ?? 0), all: number(all) })) : null,
        h("button", { type: "button", class: "plain small", onclick: () => this.ask() }, this.name || t("choose_tasks")), open),
      h("div", { class: "beside" }, this.place, this.guide), this.said));
  }

  counted(done) {
    return t("tasks_done", { n: number(Object.values(done).reduce((sum, one) => sum + one, 0)) });
  }

  async show(tab) {
    this.tab = tab;
    clearTimeout(this.clock);
    this.draw();
    this.main.querySelector("[aria-selected=true]").focus();
    this.place.replaceChildren();
    if (tab === "work") return this.attempt(() => this.next());
    return this.attempt(() => (tab === "board" ? showBoard(this.place) : showSetup(this.place, this.about)));
  }

  async attempt(work) {
    try {
      return await work();
    } catch (error) {
      toast(error.message || t("offline"), { ms: 7000 });
      if (!(error instanceof Refused)) console.error(error);
      return null;
    }
  }

  /** Ask who labels, and what they would like to do. */
  ask() {
    clearTimeout(this.clock);
    if (this.tab !== "work") {
      this.tab = "work";
      this.draw();
    }
    const name = h("input", { type: "text", value: this.name, maxlength: 60, required: true, autocomplete: "nickname" });
    const may = h("input", { type: "checkbox", checked: this.consent, required: true });
    const languages = h("select", {}, h("option", { value: "" }, t("any_language")), this.about.languages.map((code) => h("option", { value: code, lang: code }, languageName(code))));
    languages.value = this.language;
    const form = h("form", { class: "start", onsubmit: (event) => {
      event.preventDefault();
      if (!this.kinds.size) return toast(t("missing", { what: t("which_tasks") }));
      this.name = name.value.trim();
      this.consent = true;
      this.language = languages.value;
      memory.set("label-name", this.name);
      memory.set("label-consent", "yes");
      memory.set("label-kinds", [...this.kinds].join(" "));
      memory.set("label-language", this.language);
      return this.attempt(() => this.open());
    } },
    this.about.asks_name ? h("label", { class: "field" }, h("span", {}, t("who")), name, h("span", { class: "hint" }, t("who_hint"))) : null,
    h("fieldset", {}, h("legend", {}, t("which_tasks")), chips(this.about.kinds, "kind", this.kinds)),
    h("label", { class: "field" }, h("span", {}, t("which_language")), languages),
    h("label", { class: "consent" }, may, t("may_learn")),
    h("footer", {}, h("button", { type: "submit", class: "primary" }, t("begin"))));
    this.place.replaceChildren(form);
    (this.about.asks_name ? name : may).focus();
  }

  async next() {
    clearTimeout(this.clock);
    const asked = { name: this.name, kinds: [...this.kinds], language: this.language };
    const { task, is_drawing: isDrawing, done } = await json("POST", "/api/label/next", asked);
    if (this.tab !== "work") return;
    this.count.textContent = this.counted(done);
    if (!task) return this.rest(isDrawing);
    this.task = taskForm(task, this.about, {
      submit: (result) => this.attempt(() => this.submit(task, result)),
      skip: () => this.skip(task),
      say: (text) => { this.said.textContent = text; },
    });
    this.place.replaceChildren(this.task.element);
    this.main.scrollTo(0, 0);
    this.task.focus();
  }

  rest(isDrawing) {
    const again = h("button", { type: "button", class: "plain", onclick: () => this.attempt(() => this.next()) }, t("look_again"));
    if (!this.place.querySelector(".rest")) {
      this.place.replaceChildren(h("section", { class: "rest" }, h("p", {}), again));
      again.focus();
    }
    this.place.querySelector(".rest p").textContent = t(isDrawing ? "drawing" : "no_task");
    this.clock = setTimeout(() => this.attempt(() => this.next()), isDrawing ? LOOK_MS : REST_MS);
  }

  async submit(task, result) {
    const { done } = await json("POST", `/api/label/tasks/${task.id}`, { name: this.name, consent: this.consent, ...result });
    this.about.done = done;
    this.said.textContent = t("noted");
    await this.next();
  }

  skip(task) {
    let reason = this.about.reasons[0];
    const words = h("input", { type: "text", maxlength: 1000, autocomplete: "off" });
    const form = h("form", { onsubmit: (event) => {
      event.preventDefault();
      this.attempt(async () => {
        await json("POST", `/api/label/tasks/${task.id}/skip`, { name: this.name, reason, words: words.value.trim() });
        element.close();
        await this.next();
      });
    } },
    h("div", { class: "reasons", role: "radiogroup", "aria-label": t("skip_title") }, this.about.reasons.map((name) => h("label", {},
      h("input", { type: "radio", name: "reason", checked: name === reason, onchange: () => { reason = name; } }), t(`reason_${name}`)))),
    h("label", { class: "field" }, h("span", {}, t("skip_words")), words),
    h("footer", {}, h("button", { type: "button", class: "plain", onclick: () => element.close() }, t("cancel")),
      h("button", { type: "submit", class: "primary" }, t("skip_it"))));
    const element = dialog(t("skip_title"), form);
    form.querySelector("input").focus();
  }

  async guidelines() {
    if (!this.guide.hidden) {
      this.guide.hidden = true;
      this.opener.setAttribute("aria-expanded", "false");
      return this.opener.focus();
    }
    const { blocks } = await json("GET", `/api/label/guidelines?language=${language()}`);
    const text = new AnswerText();
    text.whole(blocks);
    const close = h("button", { type: "button", class: "sign", title: t("close"), "aria-label": t("close"), onclick: () => this.guidelines() }, icon("close"));
    this.guide.replaceChildren(close, text.element);
    this.guide.hidden = false;
    this.opener.setAttribute("aria-expanded", "true");
    close.focus();
  }

  key(event) {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (this.tab === "work" && !event.repeat && this.task?.element.isConnected) this.task.submit();
      return;
    }
    if (event.key === "Escape" && !this.guide.hidden) return void this.guidelines();
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=radio], [type=checkbox]), textarea, select")) return;
    if (event.key === "g") this.attempt(() => this.guidelines());
    else if (event.key === "s" && this.tab === "work" && this.task?.element.isConnected) this.task.skip();
    else return;
    event.preventDefault();
  }
}

let page = null;
addEventListener("keydown", (event) => page?.key(event));

begin("label", async (main) => {
  clearTimeout(page?.clock);
  page = new Page(main);
  await page.open();
});
