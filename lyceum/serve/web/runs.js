// The runs page: the runs of a folder, one of them with its curves as they grow, and another beside it.

import * as api from "./api.js";
import { Chart, figure } from "./chart.js";
import { begin } from "./frame.js";
import { h } from "./html.js";
import "./runs-words.js";
import { language, number, t } from "./words.js";

const EVERY_MS = 3000;
const LIST_EVERY = 5; // looks at one run for each look at the list
const MOST_ROWS = 6000; // of one file that are kept; of more, every second
const PLAIN = new Set(["step", "tokens", "tokens_per_s", "seconds", "time"]);
const CURVES = {
  loss: "curve_loss", "loss/text": "curve_loss_text", "valid/bpb_docs": "curve_bpb_docs", "valid/bpb_code": "curve_bpb_code",
  "loss/reply": "curve_loss_text", "valid/accuracy": "curve_accuracy_valid", "loss/ranking": "curve_ranking", accuracy: "curve_pairs",
  "loss/preference": "curve_preference", "rewards/margins": "curve_margins", "rewards/accuracies": "curve_pairs", "logps/chosen": "curve_chosen",
  "objective/scores": "curve_scores", "objective/kl": "curve_kl", "tokens/end_rate": "curve_end_rate", "tokens/response_length": "curve_length",
  "tamer/presses": "curve_presses",
};
const STATES = {
  running: "state_running", finished: "state_finished", stopped: "state_stopped", failed: "state_failed", damaged: "state_damaged", waiting: "state_waiting",
};
const part = encodeURIComponent;

/** A file of a section, read from where it was left off. */
class Growing {
  constructor(run, section, file) {
    this.path = `/api/runs/${part(run)}/sections/${part(section)}/${file}`;
    this.rows = [];
    this.next = 0;
  }

  /** Read what has come; whether anything has. */
  async read() {
    let isNew = false;
    for (;;) {
      const { rows, end, anew, last } = await api.json("GET", `${this.path}?start=${this.next}`);
      if (anew) this.rows = [];
      this.next = end;
      this.rows.push(...rows);
      isNew ||= anew || rows.length > 0;
      while (this.rows.length > MOST_ROWS) this.rows = this.rows.filter((_, place) => place % 2 === 0 || place === this.rows.length - 1);
      if (last) return isNew;
    }
  }

  points(metric) {
    return this.rows.filter((row) => Number.isFinite(row[metric]) && Number.isFinite(row.step)).map((row) => [row.step, row[metric]]);
  }

  get metrics() {
    const found = new Set();
    for (const row of this.rows) for (const [name, value] of Object.entries(row)) if (Number.isFinite(value) && name !== "step") found.add(name);
    return [...found];
  }
}

class Page {
  constructor(main) {
    this.list = h("nav", { class: "runs", "aria-label": t("page_runs") });
    this.one = h("section", { class: "run" });
    this.files = new Map();
    this.looks = 0;
    main.replaceChildren(h("div", { class: "shelf" }, this.list, this.one));
    this.onHash = () => this.choose();
    addEventListener("hashchange", this.onHash);
  }

  end() {
    removeEventListener("hashchange", this.onHash);
    clearTimeout(this.clock);
    this.isOver = true;
  }

  async start() {
    await this.look(true);
    await this.choose();
    this.tick();
  }

  tick() {
    this.clock = setTimeout(async () => {
      try {
        if (!document.hidden) {
          this.looks += 1;
          if (this.looks % LIST_EVERY === 0) await this.look(false);
          if (this.run && !this.isOver) await this.refresh();
        }
      } catch {
        // the server may be away, and come back
      }
      if (!this.isOver) this.tick();
    }, EVERY_MS);
  }

  /** What the address says: run, section, other. */
  get wanted() {
    return location.hash.slice(1).split("/").map(decodeURIComponent);
  }

  go(run, section, other) {
    location.hash = [run, section, other].map((one) => part(one ?? "")).join("/").replace(/\/+$/, "");
  }

  // -- the list ----------------------------------------------------------------------------------------------------------

  async look(isFirst) {
    this.found = await api.json("GET", "/api/runs");
    this.drawList();
    if (isFirst && !location.hash && this.found.runs.length) history.replaceState(null, "", `#${part(this.found.runs[0].name)}`);
  }

  drawList() {
    const { folder, runs } = this.found;
    const [chosen] = this.wanted;
    const rows = runs.map((run) => h("li", {}, h("a", { href: `#${part(run.name)}`, "aria-current": run.name === chosen ? "true" : null },
      h("span", { class: "name" }, run.name), badge(run.state),
      h("span", { class: "now" }, nowOf(run)), h("span", { class: "when" }, when(run.when)))));
    this.list.replaceChildren(h("h2", {}, t("runs_of", { folder })), rows.length ? h("ul", {}, rows) : h("p", { class: "hint" }, t("runs_none")));
  }

  // -- one run -----------------------------------------------------------------------------------------------------------

  async choose() {
    const [name, section, other] = this.wanted;
    const turn = (this.turn = (this.turn ?? 0) + 1);
    this.drawList();
    if (!name) return this.one.replaceChildren(h("p", { class: "hint" }, t("runs_choose")));
    try {
      const run = await api.json("GET", `/api/runs/${part(name)}`);
      const beside = other ? await api.json("GET", `/api/runs/${part(name)}/beside/${part(other)}`) : null;
      if (turn !== this.turn) return;
      const trained = run.sections.filter((one) => Object.keys(one.final).length);
      const running = run.sections.find((one) => one.state === "running");
      this.run = run;
      this.other = other || null;
      this.beside = beside;
      this.section = run.sections.find((one) => one.name === section)?.name ?? (running ?? trained.at(-1) ?? run.sections[0])?.name;
      this.files = new Map();
      this.charts = new Map();
      this.more = null;
      this.draw();
      await this.refresh(true);
    } catch (error) {
      if (turn !== this.turn) return;
      this.run = null;
      this.one.replaceChildren(h("p", { class: "hint" }, error.message));
    }
  }

  file(run, kind) {
    const key = `${run}/${kind}`;
    if (!this.files.has(key)) this.files.set(key, new Growing(run, this.section, kind));
    return this.files.get(key);
  }

  async refresh(isFirst = false) {
    const turn = this.turn;
    if (!this.section) return;
    if (!isFirst) {
      const run = await api.json("GET", `/api/runs/${part(this.run.name)}`);
      if (turn !== this.turn) return;
      this.run = run;
      this.drawHead();
      this.drawReport();
    }
    const metrics = [this.run.name, ...(this.other ? [this.other] : [])].map((name) => this.file(name, "metrics"));
    const news = await Promise.all(metrics.map((file) => file.read()));
    if (turn !== this.turn) return;
    if (isFirst || news.some(Boolean)) this.drawCurves();
    const isNew = await this.file(this.run.name, "samples").read();
    if (turn === this.turn && (isFirst || isNew)) this.drawSamples();
  }

  draw() {
    this.head = h("header", {});
    this.sections = h("div", { class: "table" });
    this.curves = h("div", { class: "curves" });
    this.samples = h("div", {});
    this.report = h("div", {});
    const others = this.found.runs.filter((one) => one.name !== this.run.name);
    const select = h("select", { name: "other", onchange: () => this.go(this.run.name, this.section, select.value) },
      [["", t("compare_none")], ...others.map((one) => [one.name, one.name])].map(([value, name]) => {
        const option = h("option", { value }, name);
        option.selected = value === (this.other ?? "");
        return option;
      }));
    const legend = this.other ? h("p", { class: "legend" }, [this.run.name, this.other].map((name, place) => h("span", { class: `line-${place}` }, name))) : null;
    this.one.replaceChildren(...[
      this.head, this.sections,
      h("div", { class: "title" }, h("h2", {}, `${t("curves")}: ${this.section ?? ""}`), legend, h("label", { class: "field" }, h("span", {}, t("compare_with")), select)),
      this.curves, this.differences(), this.samples, this.report,
    ].filter(Boolean));
    this.drawHead();
    this.drawReport();
  }

  drawHead() {
    const { name, state, headline, damage, sections } = this.run;
    this.head.replaceChildren(...[
      h("h1", {}, name, " ", badge(state)), headline ? h("p", {}, headline) : null,
      damage.length ? h("p", { class: "bad" }, t("run_damage", { files: damage.join(", ") })) : null,
    ].filter(Boolean));
    this.sections.replaceChildren(table(
      [t("section"), t("state"), t("step"), t("loss"), t("speed"), t("time"), t("result")],
      sections.map((one) => [
        h("a", { href: `#${[this.run.name, one.name, this.other ?? ""].map(part).join("/").replace(/\/+$/, "")}`, "aria-current": one.name === this.section ? "true" : null }, one.name),
        badge(one.state), figure(one.final.step), figure(one.final.loss), figure(one.final.tokens_per_s && Math.round(one.final.tokens_per_s)),
        spent(one.wall_s), String(one.report.line ?? ""),
      ]), [2, 3, 4, 5]));
  }

  drawCurves() {
    const files = [this.run.name, ...(this.other ? [this.other] : [])].map((name) => [name, this.file(name, "metrics")]);
    const all = [...new Set(files.flatMap(([, file]) => file.metrics))];
    if (!all.length) return this.curves.replaceChildren(h("p", { class: "hint" }, t("curves_none")));
    const told = this.run.sections.find((one) => one.name === this.section)?.curves ?? [];
    let first = told.filter((metric) => all.includes(metric));
    if (!first.length) first = all.filter((metric) => metric.startsWith("loss")).slice(0, 3);
    if (!first.length) first = all.filter((metric) => !PLAIN.has(metric)).slice(0, 3);
    const rest = all.filter((metric) => !first.includes(metric)).sort();
    const chart = (metric) => {
      if (!this.charts.has(metric)) this.charts.set(metric, new Chart(CURVES[metric] ? t(CURVES[metric]) : metric));
      const found = this.charts.get(metric);
      found.show(files.map(([name, file]) => ({ name, points: file.points(metric) })));
      return found.element;
    };
    if (!this.more) {
      this.grid = h("div", { class: "charts" });
      this.restGrid = h("div", { class: "charts" });
      this.more = h("details", { ontoggle: () => this.drawCurves() }, h("summary", {}), this.restGrid);
      this.curves.replaceChildren(this.grid, this.more);
    }
    fill(this.grid, first.map(chart));
    this.more.hidden = !rest.length;
    this.more.firstChild.textContent = t("curves_all", { n: number(rest.length) });
    if (this.more.open) fill(this.restGrid, rest.map(chart));
  }

  differences() {
    if (!this.beside) return null;
    const { runs, settings, final } = this.beside;
    const rows = Object.entries(settings).map(([name, values]) => [name, ...values.map(shown)]);
    const ends = final[this.section];
    return h("section", {}, h("h2", {}, t("settings_differ")),
      rows.length ? table(["", ...runs], rows) : h("p", { class: "hint" }, t("settings_same")),
      ends && h("h2", {}, t("at_its_end", { section: this.section })),
      ends && table(["", ...runs], Object.entries(ends).map(([name, values]) => [name, ...values.map(figure)]), [1, 2]),
      h("p", { class: "hint" }, t("runs_of_one_seed")));
  }

  drawSamples() {
    const { rows } = this.file(this.run.name, "samples");
    if (!rows.length) return;
    const steps = [...new Set(rows.map((row) => row.step))].sort((a, b) => a - b);
    const step = steps.includes(this.step) ? this.step : steps.at(-1);
    const select = h("select", { name: "step", onchange: () => { this.step = Number(select.value); this.drawSamples(); } }, steps.map((one) => {
      const option = h("option", { value: one }, figure(one));
      option.selected = one === step;
      return option;
    }));
    this.samples.replaceChildren(
      h("div", { class: "title" }, h("h2", {}, t("samples")), h("label", { class: "field" }, h("span", {}, t("samples_at")), select)),
      table([t("prompt"), t("reply")], rows.filter((row) => row.step === step).map((row) => [String(row.prompt ?? ""), String(row.reply ?? "")]), [], "say"));
  }

  drawReport() {
    const wasOpen = [...this.report.querySelectorAll("details")].map((one) => one.open);
    const one = this.run.sections.find((section) => section.name === this.section);
    const report = Object.entries(one?.report ?? {}).filter(([name]) => name !== "line");
    const settings = Object.entries(this.run.settings).filter(([name]) => !name.includes(".") || name.startsWith("model.") || name.startsWith(`${this.section}.`));
    const parts = [[t("report"), report], [t("run_settings"), settings]].filter(([, rows]) => rows.length).map(([title, rows]) =>
      h("details", {}, h("summary", {}, title), table(["", ""], rows.map(([name, value]) => [name, nested(value)]))));
    parts.forEach((element, place) => { element.open = Boolean(wasOpen[place]); });
    this.report.replaceChildren(...parts);
  }
}

// -- pieces ------------------------------------------------------------------------------------------------------------

/** Put these elements there, and touch nothing that stands already. */
function fill(place, elements) {
  if (elements.length === place.children.length && elements.every((one, at) => place.children[at] === one)) return;
  place.replaceChildren(...elements);
}

function badge(state) {
  return h("span", { class: `badge ${state}` }, t(STATES[state]));
}

function table(head, rows, right = [], kind = "") {
  const side = (place) => (right.includes(place) ? "right" : null);
  return h("div", { class: "wide" }, h("table", { class: kind },
    head.some(Boolean) && h("thead", {}, h("tr", {}, head.map((name, place) => h("th", { class: side(place), scope: "col" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, place) => h("td", { class: side(place) }, cell)))))));
}

function shown(value) {
  return typeof value === "number" ? figure(value) : value === null || value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
}

/** A value of a report: rows of the same shape as a table, other things as their JSON. */
function nested(value) {
  const isRows = Array.isArray(value) && value.length && value.every((row) => row && typeof row === "object" && !Array.isArray(row));
  if (!isRows) return value && typeof value === "object" ? h("code", {}, JSON.stringify(value)) : shown(value);
  const names = [...new Set(value.flatMap((row) => Object.keys(row)))];
  return table(names, value.map((row) => names.map((name) => shown(row[name]))));
}

function nowOf({ now, finished, sections, state }) {
  if (!now || state === "finished") return t("run_sections", { finished: number(finished), all: number(sections) });
  const parts = [now.step === null ? now.section : t("run_now", { section: now.section, step: figure(now.step) })];
  if (now.loss !== null) parts.push(t("run_loss", { loss: figure(now.loss) }));
  return parts.join(" · ");
}

function when(seconds) {
  return new Date(seconds * 1000).toLocaleString(language() === "zh" ? "zh-CN" : "en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** Seconds as h:mm:ss or m:ss. */
function spent(seconds) {
  const whole = Math.round(seconds);
  const two = (value) => String(value).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

let page = null;

begin("runs", async (main) => {
  page?.end();
  page = new Page(main);
  await page.start();
});
