// The list of chats: by day, with search, and a menu on each.

import * as api from "./api.js";
import { ask, menu, toast } from "./dialogs.js";
import { pageLinks } from "./frame.js";
import { h, icon, saveAs, sign } from "./html.js";
import { t } from "./words.js";

const UNDO_MS = 6000;
const SEARCH_MS = 180;

export class Sidebar {
  /** chosen(id), fresh(), renamed(conversation), gone(id), hide() */
  constructor({ chosen, fresh, renamed, gone, hide }) {
    Object.assign(this, { chosen, fresh, renamed, gone });
    this.conversations = [];
    this.current = null;
    this.going = new Map(); // id -> what deletes it for good
    this.query = "";
    this.turn = 0;
    this.field = h("input", {
      type: "search", autocomplete: "off", spellcheck: "false", maxlength: 200,
      oninput: () => {
        clearTimeout(this.clock);
        this.clock = setTimeout(() => this.load(), SEARCH_MS);
      },
    });
    this.list = h("nav", {});
    this.pages = h("footer", {});
    this.new = h("button", { type: "button", class: "new", onclick: () => fresh() });
    this.close = sign("close", t("close"), hide, { class: "sign only-narrow" });
    this.element = h("aside", { class: "sidebar", id: "sidebar" },
      h("header", {}, h("span", { class: "wordmark" }, "Lyceum"), this.close),
      this.new,
      h("div", { class: "find" }, icon("search"), this.field),
      this.list,
      this.pages,
    );
    addEventListener("pagehide", () => this.settle());
    this.translate();
  }

  translate() {
    this.element.setAttribute("aria-label", t("menu"));
    this.list.setAttribute("aria-label", t("menu"));
    this.field.placeholder = t("search");
    this.field.setAttribute("aria-label", t("search"));
    this.close.title = t("close");
    this.close.setAttribute("aria-label", t("close"));
    this.new.replaceChildren(icon("plus"), t("new_chat"));
    this.pages.replaceChildren(...pageLinks("./").slice(1));
    this.draw();
  }

  /** Read the list anew. */
  async load() {
    const turn = ++this.turn;
    const query = this.field.value.trim();
    const { conversations, next } = await api.list(query, null);
    if (turn !== this.turn) return; // a later one is under way
    Object.assign(this, { conversations, next, query });
    this.draw();
  }

  async more() {
    const { conversations, next } = await api.list(this.query, this.next);
    const known = new Set(this.conversations.map((one) => one.id));
    this.conversations.push(...conversations.filter((one) => !known.has(one.id)));
    this.next = next;
    this.draw();
  }

  /** A conversation has changed, or is new. */
  put(conversation) {
    const others = this.conversations.filter((one) => one.id !== conversation.id);
    const place = this.conversations.findIndex((one) => one.id === conversation.id);
    const isSame = place >= 0 && this.conversations[place].updated === conversation.updated;
    others.splice(isSame ? place : 0, 0, { ...(this.conversations[place] ?? {}), ...conversation });
    this.conversations = others;
    this.draw();
  }

  choose(id) {
    this.current = id;
    this.draw();
  }

  draw() {
    const shown = this.conversations.filter((one) => !this.going.has(one.id));
    const groups = new Map();
    for (const one of shown) {
      const name = this.query ? "" : one.pinned ? t("pinned") : day(one.updated);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(one);
    }
    const order = [t("pinned"), t("today"), t("yesterday"), t("this_week"), t("earlier"), ""];
    const parts = order.filter((name) => groups.has(name)).map((name) =>
      h("section", {}, name && h("h2", {}, name), h("ul", {}, groups.get(name).map((one) => this.row(one)))));
    if (!parts.length) parts.push(h("p", { class: "none" }, this.query ? t("nothing_found") : t("no_chats")));
    if (this.next) parts.push(h("button", { type: "button", class: "plain", onclick: () => this.more() }, t("older")));
    this.list.replaceChildren(...parts);
  }

  row(one) {
    const title = one.title || t("untitled");
    const link = h("a", {
      href: `#${one.id}`, title, "aria-current": one.id === this.current ? "page" : null,
      onclick: (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        this.chosen(one.id, one.message);
      },
    }, h("span", { class: "name" }, title), one.excerpt && h("span", { class: "excerpt" }, one.excerpt));
    return h("li", {}, link, sign("more", t("options", { title }), (event) => this.options(event.currentTarget, one)));
  }

  options(button, one) {
    menu(button, [
      ["pencil", t("rename"), () => this.rename(one)],
      ["pin", one.pinned ? t("unpin") : t("pin"), async () => {
        await api.change(one.id, { pinned: !one.pinned });
        await this.load();
      }],
      ["export", t("export_json"), () => this.save(one, "json")],
      ["export", t("export_markdown"), () => this.save(one, "markdown")],
      ["trash", t("delete"), () => this.delete(one), "danger"],
    ]);
  }

  async rename(one) {
    const title = await ask(t("rename"), t("title"), one.title);
    if (title === null) return;
    const changed = await api.change(one.id, { title: title.trim() });
    this.put({ ...one, title: changed.title });
    this.renamed(changed);
  }

  async save(one, format) {
    const blob = await api.download(one.id, format);
    const name = (one.title || "chat").replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "chat";
    saveAs(blob, `${name}.${format === "json" ? "json" : "md"}`);
  }

  /** It disappears at once and is deleted when there is no way back any more. */
  delete(one) {
    const forGood = () => {
      clearTimeout(clock);
      this.going.delete(one.id);
      this.conversations = this.conversations.filter((other) => other.id !== one.id);
      return api.remove(one.id);
    };
    const clock = setTimeout(forGood, UNDO_MS);
    this.going.set(one.id, forGood);
    const wasOpen = this.current === one.id;
    this.draw();
    this.gone(one.id);
    toast(t("deleted", { title: one.title || t("untitled") }), {
      label: t("undo"), ms: UNDO_MS - 200,
      act: () => {
        clearTimeout(clock);
        this.going.delete(one.id);
        this.draw();
        if (wasOpen) this.chosen(one.id);
      },
    });
  }

  settle() {
    for (const forGood of [...this.going.values()]) forGood();
  }
}

function day(seconds) {
  const midnight = new Date();
  midnight.setHours(0, 0, 0, 0);
  const days = (midnight.getTime() - seconds * 1000) / 86400000;
  return days <= 0 ? t("today") : days <= 1 ? t("yesterday") : days <= 7 ? t("this_week") : t("earlier");
}
