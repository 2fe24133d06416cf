// What every page but the chat has around it: the way to the others, looks and language; and the frame's start.

import * as api from "./api.js";
import { askKey } from "./dialogs.js";
import { h, sign } from "./html.js";
import { dress, memory } from "./settings.js";
import { language, speak, t } from "./words.js";

// address and the key of its name in words.js; a page adds its row here
const PAGES = [
  ["./", "page_chat"], ["arena", "page_arena"], ["label", "page_label"], ["playground", "page_playground"], ["inside", "page_inside"],
  ["runs", "page_runs"],
];
const LOOKS = ["auto", "light", "dark"];

/** Links to the pages; `here` is the address of this one. */
export function pageLinks(here) {
  return PAGES.map(([address, name]) => h("a", { href: address, "aria-current": address === here ? "page" : null }, t(name)));
}

/** Put on what this browser remembers of looks and language, and say how a key is asked for. */
export function wake() {
  dress(memory.get("looks", "auto"));
  speak(memory.get("language", navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"));
  api.onKeyNeeded(askKey);
}

/**
 * Start a page. here: its address, as in PAGES. build(main, start): fills the element `main`; called again when the
 * language changes. start: what the server says of itself (models, consent). An error is shown in the page's place.
 */
export async function begin(here, build) {
  wake();
  const app = document.getElementById("app");
  const name = PAGES.find(([address]) => address === here)[1];
  const main = h("main", {});
  app.classList.add("framed");
  let start = null;
  const draw = async () => {
    document.title = `${t(name)} · Lyceum`;
    const looks = memory.get("looks", "auto");
    const nextLooks = LOOKS[(LOOKS.indexOf(looks) + 1) % LOOKS.length];
    const next = language() === "zh" ? ["en", "English"] : ["zh", "中文"];
    app.replaceChildren(
      h("header", { class: "frame" }, h("a", { class: "wordmark", href: "./" }, "Lyceum"),
        h("nav", { "aria-label": t("pages") }, pageLinks(here)),
        h("button", { type: "button", class: "plain small", lang: next[0], onclick: () => { memory.set("language", next[0]); speak(next[0]); draw(); } }, next[1]),
        sign("settings", `${t("appearance")}: ${t(looks)}`, () => { memory.set("looks", nextLooks); dress(nextLooks); draw(); }, { name: "looks" })),
      main);
    app.querySelector("nav [aria-current]").scrollIntoView({ block: "nearest", inline: "center" }); // a phone may not have room for all
    main.replaceChildren();
    try {
      start ??= await api.start();
      await build(main, start);
      window.dispatchEvent(new Event("lyceum-ready"));
    } catch (error) {
      const retry = h("button", { type: "button", class: "primary", onclick: () => location.reload() }, t("try_again"));
      main.replaceChildren(h("section", { class: "broken" }, h("p", {}, error.message || t("offline")), retry));
    }
  };
  await draw();
}
