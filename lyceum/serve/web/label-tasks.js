// The form of each kind of task: {element, focus(), submit(), skip()}. What was begun stays in this browser until it is sent.

import { AnswerText } from "./answer.js";
import { h } from "./html.js";
import { chips, languageName } from "./label-parts.js";
import { rankList } from "./label-rank.js";
import { memory } from "./settings.js";
import { t } from "./words.js";

const DRAFT = "label-draft";

/** A message: a user's as text, an assistant's as it is rendered. */
export function said(message, kind = "") {
  const name = t(message.role === "user" ? "user_said" : "assistant_said");
  if (message.role === "user") return h("div", { class: `said user ${kind}` }, h("span", { class: "hint" }, name), h("div", { class: "bubble", dir: "auto" }, message.content));
  const text = new AnswerText();
  text.whole(message.blocks);
  return h("div", { class: `said ${kind}` }, h("span", { class: "hint" }, name), text.element);
}

/** The form of a task. submit(result), skip() are called when the person says so; say(text) is read aloud. */
export function taskForm(task, about, { submit, skip, say }) {
  const kept = draftOf(task.id);
  const made = { prompt: promptForm, answer: textForm, user: textForm, rank: rankForm, label: labelForm }[task.kind](task, about, kept, say);
  const send = async () => {
    if (done.disabled) return; // it is on its way
    const { result, missing } = made.read();
    if (missing) {
      missing[1]?.focus();
      note.replaceChildren(t("missing", { what: missing[0] }));
      return;
    }
    done.disabled = true;
    await submit(result);
    done.disabled = false;
  };
  const note = h("span", { class: "note bad", role: "alert" });
  const done = h("button", { type: "submit", class: "primary" }, t("done"), h("kbd", {}, "Ctrl ↵"));
  const hint = task.kind === "prompt" ? t(`variant_${task.variant}`) : t(`hint_${task.kind}`);
  const element = h("form", { class: `of-${task.kind}`, onsubmit: (event) => { event.preventDefault(); send(); }, oninput: () => {
    note.replaceChildren();
    memory.set(DRAFT, JSON.stringify({ id: task.id, values: made.draft?.() ?? {} }));
  } },
  h("header", {}, h("h1", { tabindex: -1 }, t(`kind_${task.kind}`)), h("span", { class: "hint" }, languageName(task.language), " · ", t(`use_${task.use}`))),
  h("p", { class: "hint" }, hint),
  thread(task), made.element,
  h("footer", { class: "under" }, h("button", { type: "button", class: "plain", onclick: skip }, t("skip"), h("kbd", {}, "S")), note, h("span", { class: "gap" }), done));
  return { element, focus: () => made.focus(), submit: send, skip };
}

function draftOf(id) {
  try {
    const kept = JSON.parse(memory.get(DRAFT, "{}"));
    return kept.id === id ? kept.values : {};
  } catch {
    return {};
  }
}

function thread(task) {
  const above = task.thread.map((message, place) => said(message, task.kind === "label" && place === task.thread.length - 1 ? "asked" : ""));
  if (task.kind === "prompt") above.push(...task.shown.map((message) => said(message)));
  if (task.system) above.unshift(h("div", { class: "said" }, h("span", { class: "hint" }, t("system")), h("p", { class: "bubble" }, task.system)));
  return above.length ? h("div", { class: "above", tabindex: 0, role: "region", "aria-label": t("conversation") }, above) : null;
}

/** A field for a text that grows with it. */
function area(label, name, kept, rows = 3) {
  const field = h("textarea", { rows, name, value: kept[name] ?? "", dir: "auto", maxlength: 100000 });
  return { field, name: label, element: h("label", { class: "field" }, h("span", {}, label), field) };
}

function values(fields) {
  return Object.fromEntries(fields.map(({ field }) => [field.name, field.value]));
}

/** The first field in which nothing stands, as what is missing. */
function firstEmpty(fields) {
  const found = fields.find(({ field }) => !field.value.trim());
  return found && [found.name, found.field];
}

function textForm(task, about, kept) {
  const text = area(t(task.kind === "answer" ? "answer_text" : "user_text"), "text", kept, 7);
  return {
    element: text.element,
    focus: () => text.field.focus(),
    draft: () => values([text]),
    read: () => ({ result: { text: text.field.value }, missing: firstEmpty([text]) }),
  };
}

function uses(about, chosen, hasNone = false) {
  const field = h("select", {}, hasNone ? h("option", { value: "" }, "–") : null, about.uses.map((name) => h("option", { value: name }, t(`use_${name}`))));
  field.value = chosen;
  return { field, element: h("label", { class: "field use" }, h("span", {}, t("use")), field) };
}

function promptForm(task, about, kept) {
  const use = uses(about, task.use);
  if (task.variant !== "few_shot") {
    const text = area(t("prompt_text"), "text", kept, 5);
    return {
      element: h("div", { class: "fields" }, text.element, use.element),
      focus: () => text.field.focus(),
      draft: () => values([text]),
      read: () => ({ result: { text: text.field.value, use: use.field.value }, missing: firstEmpty([text]) }),
    };
  }
  const instruction = area(t("instruction"), "instruction", kept);
  const last = area(t("new_case"), "input", kept, 2);
  const pairs = [];
  const list = h("div", { class: "examples" });
  const more = () => {
    const n = pairs.length + 1;
    pairs.push([area(t("example_in", { n }), `in${n}`, kept, 2), area(t("example_out", { n }), `out${n}`, kept, 2)]);
    list.append(...pairs.at(-1).map((one) => one.element));
  };
  do more(); while (pairs.length < 2 || `in${pairs.length + 1}` in kept);
  const all = () => [instruction, ...pairs.flat(), last];
  const add = h("button", { type: "button", class: "plain small", onclick: () => { more(); pairs.at(-1)[0].field.focus(); } }, t("one_more"));
  return {
    element: h("div", { class: "fields" }, instruction.element, list, add, last.element, use.element),
    focus: () => instruction.field.focus(),
    draft: () => values(all()),
    read: () => {
      const [told, given] = [instruction.field.value, last.field.value];
      const examples = pairs.map((pair) => pair.map(({ field }) => field.value));
      return { result: { instruction: told, examples, input: given, use: use.field.value }, missing: firstEmpty(all()) };
    },
  };
}

function rankForm(task, about, kept, say) {
  const list = rankList(task.shown, about.flags, say);
  const none = h("input", { type: "checkbox" });
  return {
    element: h("div", { class: "fields" }, list.element, h("label", { class: "consent none" }, none, t("none_good"))),
    focus: () => list.focus(),
    read: () => ({ result: { ...list.read(), none_acceptable: none.checked } }),
  };
}

/** A question with few answers: [value, text] each. read() is null while nothing is chosen. */
function choice(name, label, options) {
  const fields = options.map(([value, text]) => [value, h("input", { type: "radio", name }), text]);
  return {
    name: label,
    element: h("fieldset", { class: "segmented" }, h("legend", {}, label), h("div", {}, fields.map(([, field, text]) => h("label", {}, field, h("span", {}, text))))),
    first: fields[0][1],
    read: () => fields.find(([, field]) => field.checked)?.[0] ?? null,
  };
}

function labelForm(task, about) {
  const both = [[true, t("yes")], [false, t("no")]];
  const spam = choice("spam", t("is_spam"), both);
  const wrong = choice("wrong", t("is_wrong_language", { language: languageName(task.language) }), both);
  const quality = choice("quality", `${t("quality")}: ${t("score_ends")}`, [1, 2, 3, 4, 5, 6, 7].map((n) => [n, String(n)]));
  const flags = new Set();
  const use = task.is_prompt ? uses(about, "", true) : null;
  return {
    element: h("div", { class: "fields" }, spam.element, wrong.element, quality.element,
      h("fieldset", {}, h("legend", {}, t("flags")), chips(about.flags, "flag", flags)), use?.element),
    focus: () => spam.first.focus(),
    read: () => {
      const missing = [spam, wrong].find((one) => one.read() === null);
      const result = { spam: spam.read(), wrong_language: wrong.read(), flags: [...flags] };
      if (quality.read()) result.quality = quality.read();
      if (use?.field.value) result.use = use.field.value;
      return { result, missing: missing && [missing.name, missing.first] };
    },
  };
}
