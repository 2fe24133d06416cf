// The page: puts its parts together, knows which chat is open, and listens to the keys.

import * as api from "./api.js";
import { copyText } from "./answer.js";
import { showKeys, toast } from "./dialogs.js";
import { wake } from "./frame.js";
import { h, icon, sign } from "./html.js";
import { dress, memory, Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Teacher } from "./teach.js";
import { fit, Thread } from "./thread.js";
import { number, speak, t } from "./words.js";

const NARROW = matchMedia("(max-width: 760px)");
const SAVE_MS = 500;

class Page {
  constructor(start) {
    this.start = start;
    this.sidebar = new Sidebar({
      chosen: (id, message) => this.go(id, message),
      fresh: () => this.go(null),
      renamed: (conversation) => this.renamed(conversation),
      gone: (id) => { if (id === this.open) this.go(null); },
      hide: () => this.showSidebar(false),
    });
    this.settings = new Settings({
      models: start.models,
      changed: (what, value) => this.changed(what, value),
      looksChanged: (looks) => { memory.set("looks", looks); dress(looks); },
      languageChanged: (language) => { memory.set("language", language); speak(language); this.translate(); },
      dataChanged: (isEmpty) => this.dataChanged(isEmpty),
      failed: (error) => this.failed(error),
      teaching: () => this.teacher,
      closed: () => this.draft.focus(),
    });
    this.thread = new Thread({
      busy: () => this.busy(), failed: (error) => this.failed(error), about: () => this.about(), consent: start.consent,
    });
    this.open = null;
    this.chat = this.freshChat();
    this.build();
    this.keys();
    addEventListener("hashchange", () => this.go(location.hash.slice(1) || null));
    NARROW.addEventListener("change", () => this.showSidebar(!NARROW.matches && memory.get("sidebar", "shown") === "shown", false));
  }

  freshChat() {
    const model = memory.get("model");
    return { model: this.start.models.some((one) => one.id === model) ? model : this.start.models[0].id, second: "", system: "", parameters: {} };
  }

  build() {
    this.app = document.getElementById("app");
    this.title = h("h1", {});
    this.menuButton = sign("menu", t("menu"), () => this.showSidebar(this.app.classList.contains("without-sidebar")), { "aria-controls": "sidebar" });
    this.newButton = sign("plus", t("new_chat"), () => this.go(null), { class: "sign only-narrow" });
    this.helpButton = sign("keys", t("help"), () => showKeys(), { class: "sign only-wide" });
    this.settingsButton = sign("settings", t("settings"), () => this.settings.toggle(), { "aria-controls": "settings" });
    this.draft = h("textarea", {
      rows: 1, maxlength: 200000, enterkeyhint: "send", dir: "auto",
      oninput: () => { fit(this.draft); memory.set(this.draftName, this.draft.value); this.busy(); },
      onkeydown: (event) => this.typed(event),
    });
    this.two = h("button", { type: "button", class: "toggle", "aria-pressed": "false", onclick: () => {
      const isOn = this.two.getAttribute("aria-pressed") !== "true";
      this.two.setAttribute("aria-pressed", String(isOn));
      if (isOn) this.teacher.turn(false);
      this.draft.focus();
    } });
    this.teacher = new Teacher({
      draft: this.draft, consent: () => this.thread.consent(), mayTrain: () => this.thread.mayTrain, failed: (error) => this.failed(error),
      changed: (id, presses) => { if (this.thread.messages.has(id)) this.thread.put({ id, presses }); },
      switched: (isOn) => { if (isOn) this.two.setAttribute("aria-pressed", "false"); },
    });
    this.thread.teacher = this.teacher;
    this.meter = h("span", { class: "meter", role: "img", hidden: true }, ring());
    this.speed = h("span", { class: "speed" });
    this.sendButton = h("button", { type: "submit", class: "send" });
    this.form = h("form", { class: "composer", onsubmit: (event) => { event.preventDefault(); this.sendOrStop(); } },
      this.draft,
      h("div", { class: "row" }, this.two, this.teacher.button, h("span", { class: "gap" }), this.speed, this.meter, this.sendButton));
    this.hello = h("section", { class: "hello" });
    this.main = h("main", {},
      h("header", { class: "top" }, this.menuButton, this.newButton, this.title, this.helpButton, this.settingsButton),
      this.hello, this.thread.element,
      h("div", { class: "foot" }, this.thread.toBottom, this.teacher.bar, this.form));
    this.shade = h("div", { class: "shade", onclick: () => { this.showSidebar(false); this.settings.toggle(false); } });
    this.app.replaceChildren(this.sidebar.element, this.main, this.settings.element, this.shade);
    this.showSidebar(!NARROW.matches && memory.get("sidebar", "shown") === "shown", false);
    this.translate();
  }

  translate() {
    const label = (button, text) => { button.title = text; button.setAttribute("aria-label", text); };
    label(this.menuButton, t("menu"));
    label(this.newButton, t("new_chat"));
    label(this.helpButton, t("help"));
    label(this.settingsButton, t("settings"));
    label(this.thread.toBottom, t("to_bottom"));
    this.two.replaceChildren(icon("two"), h("span", {}, t("two_answers")));
    this.two.title = t("two_hint");
    this.teacher.translate();
    this.draft.setAttribute("aria-label", t("ask_placeholder"));
    const { studied, cannot, ask } = this.start.about;
    this.hello.replaceChildren(...[
      h("h2", {}, t("hello")),
      studied ? h("p", {}, t("studied", { what: studied }), cannot ? ` ${cannot}` : "") : null,
      h("div", { class: "questions" }, (ask ?? []).slice(0, 3).map((question) =>
        h("button", { type: "button", onclick: () => this.say(question) }, h("span", {}, question), icon("onward")))),
    ].filter(Boolean));
    this.sidebar.translate();
    this.settings.show(this.chat);
    for (const node of this.thread.nodes.values()) node.mark = null;
    this.thread.draw();
    this.named();
  }

  // -- which chat is open ------------------------------------------------------------------------------------------------

  get draftName() {
    return `draft-${this.open ?? "new"}`;
  }

  async go(id, message = null) {
    if (NARROW.matches) this.showSidebar(false);
    if (id === this.open && !message) {
      if (!id) this.draft.focus();
      return;
    }
    const turn = (this.turn = (this.turn ?? 0) + 1);
    let found = null;
    if (id) {
      try {
        found = await api.open(id);
      } catch (error) {
        if (error.status !== 404) this.failed(error);
        if (turn === this.turn && error.status === 404) history.replaceState(null, "", location.pathname);
        return;
      }
      if (turn !== this.turn) return;
    }
    this.open = id;
    if (location.hash.slice(1) !== (id ?? "")) history.pushState(null, "", id ? `#${id}` : location.pathname);
    if (found) this.thread.show(found);
    else this.thread.clear();
    const kept = found?.conversation.parameters ?? {};
    this.chat = this.freshChat();
    if (found) {
      const { model, second, ...parameters } = kept;
      if (this.start.models.some((one) => one.id === model)) this.chat.model = model;
      if (this.start.models.some((one) => one.id === second)) this.chat.second = second;
      Object.assign(this.chat, { parameters, system: found.conversation.system });
    }
    this.settings.show(this.chat);
    this.sidebar.choose(id);
    this.draft.value = memory.get(this.draftName, "");
    fit(this.draft);
    this.named();
    this.busy();
    if (message) this.thread.reach(message);
    if (!NARROW.matches) this.draft.focus();
  }

  /** Conversations have come from a file, or all have gone. */
  dataChanged(isEmpty) {
    if (isEmpty) this.go(null);
    this.sidebar.load().catch((error) => this.failed(error));
  }

  renamed(conversation) {
    if (conversation.id !== this.open) return;
    this.thread.conversation.title = conversation.title;
    this.named();
  }

  named() {
    const title = this.thread.conversation?.title ?? "";
    this.title.textContent = title;
    document.title = title ? `${title} – Lyceum` : "Lyceum";
    this.draft.placeholder = t("ask_model", { model: this.chat.model });
  }

  changed(what, value) {
    this.chat[what] = value;
    if (what === "model") {
      memory.set("model", value);
      this.named();
    }
    if (!this.open) return;
    clearTimeout(this.clock);
    this.unsaved = { id: this.open, system: this.chat.system, parameters: this.kept() };
    this.clock = setTimeout(() => this.saveSettings(), SAVE_MS);
  }

  kept() {
    const { model, second, parameters } = this.chat;
    return { ...parameters, model, ...(second ? { second } : {}) };
  }

  async saveSettings() {
    clearTimeout(this.clock);
    if (!this.unsaved) return;
    const { id, ...given } = this.unsaved;
    this.unsaved = null;
    try {
      await api.change(id, given);
    } catch (error) {
      this.failed(error);
    }
  }

  about() {
    return { ...this.chat, two: this.two.getAttribute("aria-pressed") === "true" };
  }

  // -- asking ------------------------------------------------------------------------------------------------------------

  typed(event) {
    if (event.isComposing || event.keyCode === 229) return; // Enter belongs to the input method
    if (event.key === "Enter" && !event.shiftKey && !(NARROW.matches && "ontouchstart" in window)) {
      event.preventDefault();
      if (!this.thread.isBusy) this.sendOrStop();
    } else if (event.key === "ArrowUp" && !this.draft.value) {
      const last = this.thread.path.filter((one) => one.role === "user").at(-1);
      if (!last || this.thread.isBusy) return;
      event.preventDefault();
      this.thread.edit(last);
    }
  }

  sendOrStop() {
    if (this.thread.isBusy) return this.thread.stop();
    return this.say(this.draft.value);
  }

  async say(text) {
    const content = text.trim();
    if (!content || this.isAsking) return;
    if (this.thread.waitsForChoice) return toast(t("judge_first"));
    this.isAsking = true;
    try {
      await this.saveSettings();
      if (!this.open) await this.begin(content);
      if (!(await this.thread.say(content))) return;
      memory.set(this.draftName, null);
      this.draft.value = "";
      fit(this.draft);
      this.busy();
      this.sidebar.load();
    } catch (error) {
      this.failed(error);
    } finally {
      this.isAsking = false;
    }
  }

  async begin(content) {
    const draftName = this.draftName;
    const title = content.split("\n")[0].slice(0, 80);
    const conversation = await api.create({ title, system: this.chat.system, parameters: this.kept() });
    memory.set(draftName, null);
    this.open = conversation.id;
    history.pushState(null, "", `#${conversation.id}`);
    this.thread.show({ conversation, messages: [] });
    this.sidebar.put(conversation);
    this.sidebar.choose(conversation.id);
    this.named();
  }

  /** What depends on whether an answer is under way. */
  busy() {
    if (!this.sendButton) return;
    const isBusy = this.thread.isBusy;
    const isEmpty = !this.thread.path.length;
    this.app.classList.toggle("empty", isEmpty);
    this.app.classList.toggle("busy", isBusy);
    const name = isBusy ? "stop" : "send";
    if (this.sendButton.dataset.does !== name || this.sendButton.title !== t(name)) {
      this.sendButton.dataset.does = name;
      this.sendButton.title = t(name);
      this.sendButton.setAttribute("aria-label", t(name));
      this.sendButton.replaceChildren(icon(name));
    }
    this.sendButton.disabled = !isBusy && !this.draft.value.trim();
    this.measure(isBusy);
  }

  measure(isBusy) {
    const last = this.thread.path.findLast((one) => one.role === "assistant");
    const all = this.start.models.find((one) => one.id === (last?.model || this.chat.model))?.context_length;
    const written = last?.state === "streaming" ? last.numTokens ?? 0 : last?.completion_tokens ?? 0;
    const used = last ? (last.prompt_tokens ?? 0) + written : 0;
    this.meter.hidden = !used || !all;
    if (used && all) {
      const share = Math.min(1, used / all);
      this.meter.querySelector(".arc").setAttribute("stroke-dasharray", `${share * 50.27} 50.27`);
      this.meter.classList.toggle("full", share > 0.85);
      const said = t("context", { used: number(used), all: number(all) }) + (last.dropped ? ` ${t("dropped")}` : "");
      this.meter.title = said;
      this.meter.setAttribute("aria-label", said);
    }
    const speed = isBusy && last?.seconds ? written / last.seconds : 0;
    this.speed.textContent = speed ? t("per_second", { n: number(speed, 1) }) : "";
  }

  failed(error) {
    toast(error.message || t("offline"), { ms: 7000 });
    if (!(error instanceof api.Refused)) console.error(error);
  }

  // -- panels and keys ---------------------------------------------------------------------------------------------------

  showSidebar(isShown, isKept = true) {
    this.app.classList.toggle("without-sidebar", !isShown);
    this.menuButton.setAttribute("aria-expanded", String(isShown));
    this.sidebar.element.inert = !isShown;
    if (isKept && !NARROW.matches) memory.set("sidebar", isShown ? "shown" : "hidden");
    if (isKept && NARROW.matches) (isShown ? this.sidebar.close : this.menuButton).focus();
  }

  keys() {
    addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") return this.escape();
      if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
      const name = (event.shiftKey ? "shift+" : "") + event.key.toLowerCase();
      const last = this.thread.path.findLast((one) => one.role === "assistant");
      const does = {
        "shift+o": () => this.go(null),
        k: () => { this.showSidebar(true); this.sidebar.field.focus(); this.sidebar.field.select(); },
        "shift+s": () => this.showSidebar(this.app.classList.contains("without-sidebar")),
        ",": () => this.settings.toggle(),
        "/": () => showKeys(),
        "shift+c": () => { if (last) copyText(last.content).then(() => toast(t("copied"))); },
        "shift+y": () => { if (last) this.thread.again(last); },
      }[name];
      if (!does) return;
      event.preventDefault();
      does();
    });
  }

  escape() {
    if (document.querySelector("dialog[open], .menu")) return;
    if (this.settings.isOpen) this.settings.toggle(false);
    else if (NARROW.matches && !this.app.classList.contains("without-sidebar")) this.showSidebar(false);
    else if (this.thread.isBusy) this.thread.stop();
  }
}

function ring() {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  for (const name of ["track", "arc"]) {
    const circle = document.createElementNS(space, "circle");
    circle.setAttribute("class", name);
    for (const [key, value] of [["cx", 10], ["cy", 10], ["r", 8]]) circle.setAttribute(key, value);
    svg.append(circle);
  }
  return svg;
}

wake();

async function begin() {
  try {
    const page = new Page(await api.start());
    window.dispatchEvent(new Event("lyceum-ready"));
    await Promise.all([page.sidebar.load(), page.go(location.hash.slice(1) || null)]);
    page.draft.value = memory.get(page.draftName, "");
    fit(page.draft);
    page.busy();
    if (!NARROW.matches) page.draft.focus();
  } catch (error) {
    const retry = h("button", { type: "button", class: "primary", onclick: () => location.reload() }, t("try_again"));
    document.getElementById("app").replaceChildren(h("section", { class: "broken" }, h("p", {}, error.message || t("offline")), retry));
  }
}
begin();
