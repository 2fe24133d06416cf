// The dashboard of the labelling page, and what whoever runs the service sets: rules, guidelines, imports.

import { json } from "./api.js";
import { toast } from "./dialogs.js";
import { h, icon } from "./html.js";
import { LANGUAGES, language, number, t } from "./words.js";

const RULES = [["answers", 2, 9, 1], ["written", 0, 9, 1], ["turns", 1, 10, 1], ["reviews", 1, 99, 1], ["rankings", 1, 99, 1], ["minutes", 1, 10080, 1], ["gold_share", 0, 0.9, 0.05], ["trees", 1, 100000, 1], ["temperature", 0.05, 2, 0.05]];
const AS = ["rankings", "conversations", "gold_rankings", "gold_labels"];
const ROWS = 500; // in one request

const percent = (share) => `${number(100 * share)} %`;

/** A share with its interval, as numbers and drawn from 0 to 1; the mark in the middle is a coin. */
function range(share) {
  if (!share) return h("span", { class: "hint" }, "–");
  const [mean, low, high] = share;
  const bar = h("span", { class: "range" }, h("i", {}), h("b", {}));
  bar.firstChild.style.left = `${100 * low}%`;
  bar.firstChild.style.width = `${100 * Math.max(high - low, 0.01)}%`;
  bar.lastChild.style.left = `${100 * mean}%`;
  return h("span", { class: "shared", title: `${percent(low)} – ${percent(high)}` }, bar, percent(mean));
}

/** Numbers of everybody, the least agreeing first. */
export async function showBoard(place) {
  const found = await json("GET", "/api/label/board");
  const kinds = Object.keys(found.people[0]?.done ?? {});
  const heads = [t("person"), ...kinds.map((kind) => t(`kind_${kind}`)), t("skipped"), t("seconds"), t("with_others"), t("with_gold"), t("as_shown"), t("ties")];
  const rows = found.people.map((one) => h("tr", { class: one.verdict === "careless" ? "bad" : null },
    h("th", { scope: "row" }, one.name, one.verdict ? h("span", { class: "verdict-of" }, t(`verdict_${one.verdict}`)) : null),
    kinds.map((kind) => h("td", {}, one.done[kind] ? number(one.done[kind]) : "–")),
    h("td", {}, number(one.skipped)), h("td", {}, one.seconds === null ? "–" : `${number(one.seconds)} s`),
    h("td", {}, range(one.others)), h("td", {}, range(one.gold), one.gold_labels[1] ? ` ${number(one.gold_labels[0], 1)}/${number(one.gold_labels[1])}` : null),
    h("td", {}, range(one.as_shown)), h("td", {}, one.ties === undefined ? "–" : percent(one.ties))));
  const table = h("div", { class: "table", tabindex: 0 }, h("table", {}, h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, rows)));
  const told = found.between && t("pairs_alike", { share: percent(found.between[0]), low: percent(found.between[1]), high: percent(found.between[2]) });
  const alphas = Object.entries(found.alpha).filter(([, value]) => value !== null);
  const total = Object.values(found.uses).reduce((sum, one) => sum + one, 0);
  place.replaceChildren(h("section", { class: "numbers" },
    h("h1", {}, t("people")),
    rows.length ? table : h("p", { class: "hint" }, t("nobody")),
    rows.length ? h("p", { class: "hint" }, t("as_shown_hint")) : null,
    told ? h("p", {}, told) : null,
    alphas.length ? h("p", {}, `${t("alpha_hint")}: `, alphas.map(([name, value]) => `${name} ${number(value, 2)}`).join(" · ")) : null,
    h("ul", { class: "states" }, Object.entries(found.states).map(([name, num]) => h("li", {}, h("b", {}, number(num)), ` ${t(`tree_${name}`)}`)), found.gold ? h("li", {}, h("b", {}, number(found.gold)), ` ${t("known_questions")}`) : null),
    h("h2", {}, t("mix")),
    h("ul", { class: "mix" }, Object.entries(found.mix).map(([name, share]) => {
      const bar = h("span", { class: "range" }, h("i", {}), h("b", {}));
      bar.firstChild.style.width = `${total ? (100 * (found.uses[name] ?? 0)) / total : 0}%`;
      bar.lastChild.style.left = `${share}%`;
      return h("li", {}, h("span", {}, t(`use_${name}`)), bar, h("span", { class: "hint" }, `${number(found.uses[name] ?? 0)}`));
    }))));
}

/** Rules, guidelines, imports. */
export async function showSetup(place, about) {
  const [{ rules }, guide] = await Promise.all([json("GET", "/api/label/board"), json("GET", `/api/label/guidelines?language=${language()}`)]);
  const fields = RULES.map(([name, min, max, step]) => h("input", { type: "number", name, min, max, step, value: rules[name], required: true }));
  const saved = async (work) => {
    try {
      await work();
      toast(t("kept"));
    } catch (error) {
      toast(error.message, { ms: 7000 });
    }
  };
  const ruleForm = h("form", { onsubmit: (event) => {
    event.preventDefault();
    saved(() => json("POST", "/api/label/rules", Object.fromEntries(fields.map((field) => [field.name, Number(field.value)]))));
  } }, h("h2", {}, t("rules")), fields.map((field) => h("label", { class: "field number" }, h("span", {}, t(`rule_${field.name}`)), field)),
  h("footer", {}, h("button", { type: "submit", class: "primary" }, t("save"))));
  const text = h("textarea", { rows: 14, value: guide.text, maxlength: 50000, "aria-label": t("guidelines") });
  const guideForm = h("form", { class: "field", onsubmit: (event) => {
    event.preventDefault();
    saved(async () => {
      const now = await json("POST", "/api/label/guidelines", { language: language(), text: text.value });
      text.value = now.text;
    });
  } }, h("h2", {}, `${t("guidelines")} · ${LANGUAGES[language()]}`), text, h("footer", {}, h("button", { type: "submit", class: "primary" }, t("save"))));
  const kind = h("select", {}, AS.map((name) => h("option", { value: name }, t(`as_${name}`))));
  const use = h("select", {}, about.uses.map((name) => h("option", { value: name }, t(`use_${name}`))));
  use.value = "other";
  const spoken = h("select", {}, about.languages.map((code) => h("option", { value: code }, LANGUAGES[code] ?? code)));
  const file = h("input", { type: "file", accept: ".jsonl,.json", hidden: true, onchange: async () => {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      const rows = parsed(await chosen.text());
      let came = 0;
      for (let at = 0; at < rows.length; at += ROWS) {
        came += (await json("POST", "/api/label/import", { rows: rows.slice(at, at + ROWS), as: kind.value, use: use.value, language: spoken.value })).trees;
      }
      toast(t("brought", { n: number(came) }), { ms: 7000 });
    } catch (error) {
      toast(error.message, { ms: 9000 });
    }
  } });
  const fileForm = h("section", {}, h("h2", {}, t("import_as")), h("label", { class: "field" }, h("span", {}, t("import_as")), kind), h("label", { class: "field" }, h("span", {}, t("use")), use),
    h("label", { class: "field" }, h("span", {}, t("language")), spoken), h("footer", {}, h("button", { type: "button", class: "plain", onclick: () => file.click() }, icon("import"), t("choose_file")), file));
  place.replaceChildren(h("div", { class: "setup" }, h("h1", { class: "hidden" }, t("setup")), ruleForm, fileForm, guideForm));
}

/** The rows of a file of JSON lines, or of one JSON array. */
function parsed(text) {
  if (text.trimStart().startsWith("[")) return JSON.parse(text);
  return text.split("\n").flatMap((line, at) => {
    if (!line.trim()) return [];
    try {
      return [JSON.parse(line)];
    } catch {
      throw new Error(t("bad_line", { n: number(at + 1) }));
    }
  });
}
