// What stands above the page: notes that pass, menus, questions, the sheet of keys.

import { h, icon, sign } from "./html.js";
import { t } from "./words.js";

/** A note at the foot of the page, perhaps with one thing to do. */
export function toast(text, { label = null, act = null, ms = 4000 } = {}) {
  let place = document.querySelector(".toasts");
  if (!place) document.body.append((place = h("div", { class: "toasts", role: "status" })));
  if (place.lastChild?.firstChild.textContent === text && !act) place.lastChild.remove();
  const note = h("div", { class: "toast" }, h("span", {}, text));
  const end = () => note.remove();
  if (label) note.append(h("button", { type: "button", onclick: () => { end(); act(); } }, label));
  place.append(note);
  setTimeout(end, ms);
  while (place.children.length > 3) place.firstChild.remove();
}

/** A menu at a button: [sign, text, what it does, class]. */
export function menu(button, entries) {
  document.querySelector(".menu")?.remove();
  const close = (isBack) => {
    list.remove();
    button.setAttribute("aria-expanded", "false");
    removeEventListener("pointerdown", outside, true);
    removeEventListener("resize", close);
    if (isBack === true) button.focus();
  };
  const outside = (event) => {
    if (!list.contains(event.target)) close();
  };
  const list = h("div", { class: "menu", role: "menu", onkeydown: (event) => {
    const all = [...list.children];
    const at = all.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) all[(at + step + all.length) % all.length].focus();
    else if (event.key === "Home") all[0].focus();
    else if (event.key === "End") all.at(-1).focus();
    else if (event.key === "Escape" || event.key === "Tab") close(true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  } }, entries.map(([name, text, act, kind]) =>
    h("button", { type: "button", role: "menuitem", class: kind, tabindex: -1, onclick: () => { close(true); act(); } }, icon(name), text)));
  document.body.append(list);
  const box = button.getBoundingClientRect();
  const top = box.bottom + 4 + list.offsetHeight > innerHeight ? box.top - list.offsetHeight - 4 : box.bottom + 4;
  list.style.top = `${Math.max(8, top)}px`;
  list.style.left = `${Math.max(8, Math.min(box.left, innerWidth - list.offsetWidth - 8))}px`;
  button.setAttribute("aria-expanded", "true");
  addEventListener("pointerdown", outside, true);
  addEventListener("resize", close);
  list.firstChild.focus();
}

/** A dialog with a title; the caller closes it. */
export function dialog(title, content, { isForced = false, kind = "" } = {}) {
  const before = document.activeElement;
  const name = `dialog-${Date.now()}`;
  const element = h("dialog", { class: `dialog ${kind}`, "aria-labelledby": name },
    h("header", {}, h("h2", { id: name }, title), isForced ? null : sign("close", t("close"), () => element.close())),
    content);
  element.addEventListener("close", () => {
    element.remove();
    before?.focus?.();
  });
  element.addEventListener("pointerdown", (event) => {
    if (event.target === element && !isForced) element.close();
  });
  if (isForced) element.addEventListener("cancel", (event) => event.preventDefault());
  document.body.append(element);
  element.showModal();
  return element;
}

/** Ask for one line of text; null where the person thought better of it. */
export function ask(title, label, value) {
  return new Promise((resolve) => {
    const field = h("input", { type: "text", value, maxlength: 300, autocomplete: "off" });
    let found = null;
    const form = h("form", { method: "dialog", onsubmit: () => { found = field.value; } },
      h("label", { class: "field" }, h("span", {}, label), field),
      h("footer", {}, h("button", { type: "button", class: "plain", onclick: () => element.close() }, t("cancel")),
        h("button", { type: "submit", class: "primary" }, t("save"))));
    const element = dialog(title, form);
    element.addEventListener("close", () => resolve(found));
    field.select();
  });
}

/** Ask whether something is really to be done that cannot be undone. */
export function confirm(title, text, label) {
  return new Promise((resolve) => {
    let isSure = false;
    const form = h("form", { method: "dialog", onsubmit: () => { isSure = true; } },
      h("p", {}, text),
      h("footer", {}, h("button", { type: "button", class: "plain", onclick: () => element.close() }, t("cancel")),
        h("button", { type: "submit", class: "primary danger" }, label)));
    const element = dialog(title, form);
    element.addEventListener("close", () => resolve(isSure));
  });
}

let asking = null;

/** Ask for a key, once however many ask. */
export function askKey() {
  asking ??= new Promise((resolve) => {
    const field = h("input", { type: "password", autocomplete: "current-password", required: true });
    const form = h("form", { onsubmit: (event) => {
      event.preventDefault();
      resolve(field.value.trim());
      asking = null;
      element.close();
    } },
    h("label", { class: "field" }, h("span", {}, t("key")), field), h("p", { class: "hint" }, t("key_hint")),
    h("footer", {}, h("button", { type: "submit", class: "primary" }, t("use_key"))));
    const element = dialog(t("key_needed"), form, { isForced: true });
  });
  return asking;
}

const isMac = /Mac|iPhone|iPad/.test(navigator.platform);
const CTRL = isMac ? "⌘" : "Ctrl";
const SHIFT = isMac ? "⇧" : "Shift";

/** The sheet of keys. */
export function showKeys() {
  if (document.querySelector(".keys")) return;
  const rows = [
    [[CTRL, SHIFT, "O"], "short_new"],
    [[CTRL, "K"], "short_search"],
    [[CTRL, SHIFT, "S"], "short_sidebar"],
    [[CTRL, ","], "short_settings"],
    [["Enter"], "short_send"],
    [[SHIFT, "Enter"], "short_line"],
    [["↑"], "short_edit"],
    [[CTRL, SHIFT, "C"], "short_copy"],
    [[CTRL, SHIFT, "Y"], "short_again"],
    [["Esc"], "short_stop"],
    [[CTRL, "/"], "short_help"],
  ];
  dialog(t("help"), h("dl", {}, rows.map(([keys, text]) =>
    h("div", {}, h("dt", {}, t(text)), h("dd", {}, keys.map((key) => h("kbd", {}, key)))))), { kind: "keys" });
}
