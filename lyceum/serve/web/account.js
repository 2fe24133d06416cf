// What is one's own: taken along as a file, brought in from one, deleted.

import * as api from "./api.js";
import { confirm, toast } from "./dialogs.js";
import { h, icon, saveAs } from "./html.js";
import { number, t } from "./words.js";

const MOST_BYTES = 4 << 20; // of one request; the server takes 8 MiB
const MOST_ROWS = 500;

/** The section of the settings. changed(isEmpty): conversations have come, or all have gone. failed(error). */
export function accountSection({ changed, failed }) {
  const attempt = (button, work) => async () => {
    button().disabled = true;
    try {
      await work();
    } catch (error) {
      failed(error);
    } finally {
      button().disabled = false;
    }
  };
  const take = h("button", { type: "button", class: "plain", onclick: attempt(() => take, takeAlong) }, icon("export"), t("export_all"));
  const file = h("input", { type: "file", accept: ".json,application/json", hidden: true, onchange: attempt(() => bring, async () => {
    const [chosen] = file.files;
    file.value = "";
    if (chosen) await bringIn(chosen, changed);
  }) });
  const bring = h("button", { type: "button", class: "plain", onclick: () => file.click() }, icon("import"), t("import_all"));
  const away = h("button", { type: "button", class: "plain danger", onclick: attempt(() => away, async () => {
    if (!(await confirm(t("delete_all"), t("delete_all_sure"), t("delete_all")))) return;
    const { deleted } = await api.deleteAccount();
    changed(true);
    toast(t("deleted_all", { n: number(deleted) }));
  }) }, icon("trash"), t("delete_all"));
  return h("section", {}, h("h3", {}, t("your_data")), take, bring, file, h("p", { class: "hint" }, t("import_hint")), away);
}

async function takeAlong() {
  saveAs(await api.downloadAccount(), `lyceum-${new Date().toISOString().slice(0, 10)}.json`);
}

/** Send what a file holds, in requests that the server takes; what it refuses is counted and left out. */
async function bringIn(file, changed) {
  let data;
  try {
    data = JSON.parse(await file.text());
  } catch {
    return toast(t("import_not_json"), { ms: 7000 });
  }
  const all = Array.isArray(data) ? data : data?.conversations ?? (data?.messages || data?.mapping ? [data] : []);
  const conversations = Array.isArray(all) ? all : [];
  let came = 0;
  let refused = 0;
  const send = async (rows) => {
    try {
      came += (await api.bring({ conversations: rows })).conversations;
    } catch (error) {
      if (!(error instanceof api.Refused) || ![400, 413].includes(error.status)) throw error;
      if (rows.length === 1) refused += 1;
      else for (const row of rows) await send([row]);
    }
  };
  try {
    for (const rows of parts(conversations)) await send(rows);
    for (const rows of parts(Array.isArray(data?.judgements) && data.conversations ? data.judgements : [])) await api.bring({ judgements: rows });
  } finally {
    if (came) changed(false);
  }
  toast([t("imported", { n: number(came) }), refused ? t("import_refused", { n: number(refused) }) : ""].join(" ").trim(), { ms: 7000 });
}

/** Rows in groups, each small enough for a request. */
function* parts(rows) {
  const encoder = new TextEncoder();
  let group = [];
  let size = 0;
  for (const row of rows) {
    const bytes = encoder.encode(JSON.stringify(row)).length;
    if (group.length && (size + bytes > MOST_BYTES || group.length === MOST_ROWS)) {
      yield group;
      group = [];
      size = 0;
    }
    group.push(row);
    size += bytes;
  }
  if (group.length) yield group;
}
