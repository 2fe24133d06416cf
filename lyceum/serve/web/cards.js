// Calls of tools as cards: what a tool was given and what came of it. All of it is shown as text.

import { copyText } from "./answer.js";
import { h, icon, sign } from "./html.js";
import { t } from "./words.js";

/** Which messages of a branch are the results of which calls: {of(message, call), has(message)}. */
export function resultsIn(path) {
  const open = new Map(); // a call's id -> its message and itself; ids may come again in a later turn
  const found = new Map();
  const results = new Set();
  for (const message of path) {
    for (const call of message.tool_calls ?? []) open.set(call.id, `${message.id} ${call.id}`);
    const asked = message.role === "tool" ? open.get(message.tool_call_id) : undefined;
    if (asked === undefined || found.has(asked)) continue;
    found.set(asked, message);
    results.add(message.id);
  }
  return { of: (message, call) => found.get(`${message.id} ${call.id}`), has: (message) => results.has(message.id) };
}

/** A call with its result, either of which may be missing. */
export function card(call, result) {
  const part = (label, text) => {
    const copy = sign("copy", t("copy"), () => copyText(text, copy));
    return [h("div", { class: "bar" }, h("span", {}, label), copy), h("pre", { tabindex: 0, dir: "auto" }, text)];
  };
  return h("details", { class: "call" },
    h("summary", {}, icon("tool"), h("span", { class: "name" }, call?.name ?? t("tool_result")),
      call && h("span", { class: "hint" }, result ? shortened(result.content) : t("tool_no_result"))),
    call && part(t("tool_input"), indented(call.arguments)),
    result && part(t("tool_output"), result.content));
}

/** JSON as people read it; other text as it is. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function shortened(text) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > 80 ? `${line.slice(0, 80)}…` : line;
}
