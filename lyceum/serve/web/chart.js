// A small plot of one metric over the steps, for one run or several: lines, ticks, and the values under the pointer.

import { h } from "./html.js";
import { language, t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 360;
const HEIGHT = 170;
const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;
const NUM_TICKS = 4;

/** A number with as many figures as are read. */
export function figure(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  const size = Math.abs(value);
  const form = size !== 0 && (size < 1e-3 || size >= 1e7) ? { notation: "scientific", maximumSignificantDigits: 3 } : { maximumSignificantDigits: size >= 1000 ? 7 : 4 };
  return value.toLocaleString(language() === "zh" ? "zh-CN" : "en-US", form);
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round numbers from least to most, a few of them. */
function ticks(least, most, count = NUM_TICKS) {
  if (!(most > least)) return [least];
  const raw = (most - least) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((one) => one >= raw);
  const found = [];
  for (let at = Math.ceil(least / step); at * step <= most + step * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
  return found;
}

/** Points as one path, at most two for each pixel: the least and the most there. */
function path(points, x, y) {
  const parts = [];
  let column = null;
  let low = null;
  let high = null;
  const flush = () => {
    if (low === null) return;
    for (const [step, value] of low[0] <= high[0] ? [low, high] : [high, low]) parts.push(`${x(step).toFixed(1)},${y(value).toFixed(1)}`);
  };
  for (const point of points) {
    const pixel = Math.round(x(point[0]));
    if (pixel !== column) {
      flush();
      column = pixel;
      low = high = point;
    }
    if (point[1] < low[1]) low = point;
    if (point[1] > high[1]) high = point;
  }
  flush();
  return parts.length ? `M${parts.join("L")}` : "";
}

export class Chart {
  constructor(title) {
    this.title = title;
    this.value = h("span", { class: "value" });
    this.svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
    this.svg.addEventListener("pointermove", (event) => this.pointed(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", (event) => this.typed(event));
    this.element = h("figure", { class: "chart" }, h("figcaption", {}, h("span", {}, title), this.value), this.svg);
  }

  /** lines: [{name, points: [[step, value]]}], the first the run itself. */
  show(lines) {
    this.lines = lines.filter((line) => line.points.length);
    const all = this.lines.flatMap((line) => line.points);
    if (!all.length) return;
    const bounds = (place) => all.reduce(([least, most], point) => [Math.min(least, point[place]), Math.max(most, point[place])], [Infinity, -Infinity]);
    const [first, last] = bounds(0);
    let [low, high] = bounds(1);
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
    const margin = (high - low) * 0.04;
    [low, high] = [low - margin, high + margin];
    this.x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
    this.y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    this.steps = [...new Set(this.lines.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
    const across = ticks(low, high).map((value) => [
      draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(value), y2: this.y(value) }),
      draw("text", { class: "tick", x: LEFT - 6, y: this.y(value) + 3, "text-anchor": "end" }, figure(value)),
    ]);
    const along = ticks(first, last).map((step) => {
      const isLast = this.x(step) > WIDTH - 3 * RIGHT; // a label in the middle would be cut
      return draw("text", { class: "tick", x: isLast ? WIDTH - 2 : this.x(step), y: HEIGHT - 6, "text-anchor": isLast ? "end" : "middle" }, figure(step));
    });
    const drawn = this.lines.map((line, place) => line.points.length > 1
      ? draw("path", { class: `line line-${place}`, d: path(line.points, this.x, this.y) })
      : draw("circle", { class: `dot line-${place}`, cx: this.x(line.points[0][0]), cy: this.y(line.points[0][1]), r: 2.5 }));
    this.marker = draw("g", { class: "marker" });
    this.svg.replaceChildren(...across.flat(), ...along, ...drawn.reverse(), this.marker);
    const newest = this.lines.map((line) => figure(line.points.at(-1)[1])).join(" / ");
    this.svg.setAttribute("aria-label", t("chart_says", { title: this.title, count: all.length, last: newest }));
    this.point(this.at ?? null);
  }

  pointed(event) {
    const box = this.svg.getBoundingClientRect();
    const pixel = ((event.clientX - box.left) / box.width) * WIDTH;
    const near = (step) => Math.abs(this.x(step) - pixel);
    this.point(this.steps.reduce((best, step) => (near(step) < near(best) ? step : best), this.steps[0]));
  }

  typed(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.steps) return;
    event.preventDefault();
    const place = this.at === null || this.at === undefined ? this.steps.length - (move < 0 ? 0 : 1) : this.steps.indexOf(this.at);
    this.point(this.steps[Math.min(this.steps.length - 1, Math.max(0, place + move))]);
  }

  /** Show what the lines say at a step; null: their ends. */
  point(step) {
    this.at = step;
    if (!this.lines?.length) return;
    const valueAt = (points) => (step === null ? points.at(-1) : points.findLast((one) => one[0] <= step));
    const found = this.lines.map((line) => valueAt(line.points));
    this.value.replaceChildren(...[
      step === null ? null : h("span", { class: "at" }, t("chart_at", { step: figure(step) })),
      ...found.map((one, place) => h("b", { class: `line-${place}` }, figure(one?.[1]))),
    ].filter(Boolean));
    this.marker.replaceChildren(...(step === null ? [] : [
      draw("line", { x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM }),
      ...found.flatMap((one, place) => (one ? [draw("circle", { class: `line-${place}`, cx: this.x(one[0]), cy: this.y(one[1]), r: 3 })] : [])),
    ]));
  }
}
