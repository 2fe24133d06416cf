// Looking inside: probabilities, attention and the logit lens of a short text.

import "./inside-words.js";
import * as api from "./api.js";
import { toast } from "./dialogs.js";
import { begin } from "./frame.js";
import { h, icon } from "./html.js";
import { fit } from "./thread.js";
import { chance, shadeOf, tokenText, TokenStrip } from "./tokens.js";
import { number, t } from "./words.js";

const MAP_PX = 360;
const HEAD_PX = 56;

const state = { model: "", text: null, asChat: false, layer: 0, head: 0, token: -1 };
let models = null;
let seen = null; // what the server said of the last text
let repaint = () => {}; // the maps, in the colours of now

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint());

function draw(main) {
  const model = () => models.find((one) => one.id === state.model);
  const most = h("span", { class: "hint" });
  const asChat = h("input", { type: "checkbox", name: "as-chat", checked: state.asChat, onchange: () => { state.asChat = asChat.checked; } });
  const chatLabel = h("label", { class: "consent" }, asChat, h("span", {}, t("in_as_chat")));
  const choose = h("select", { name: "model", "aria-label": t("model"), onchange: () => { state.model = choose.value; changed(); } }, models.map((one) => h("option", { value: one.id }, one.id)));
  choose.value = state.model;
  const changed = () => {
    most.textContent = t("in_most", { n: number(model().most_tokens) });
    chatLabel.hidden = !model().chats;
  };
  changed();
  const field = h("textarea", { name: "text", rows: 2, maxlength: 20000, spellcheck: "false", dir: "auto", value: state.text, "aria-label": t("in_text"),
    oninput: () => { state.text = field.value; fit(field); button.disabled = !field.value; },
    onkeydown: (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) { event.preventDefault(); look(); } } });
  const button = h("button", { type: "submit", class: "primary", disabled: !state.text }, icon("search"), t("in_look"));
  const found = h("div", { class: "found" });
  const look = async () => {
    if (!field.value || button.disabled) return;
    button.disabled = true;
    try {
      const told = await api.json("POST", "/api/inside", { model: state.model, text: field.value, as_chat: state.asChat && model().chats });
      seen = { ...told, attention: unpacked(told) };
      Object.assign(state, { layer: Math.min(state.layer, told.layers - 1), head: Math.min(state.head, told.heads - 1), token: told.tokens.length - 1 });
      show(found);
    } catch (error) {
      toast(error.message || t("offline"), { ms: 7000 });
    }
    button.disabled = !field.value;
  };
  main.append(h("form", { class: "asking", onsubmit: (event) => { event.preventDefault(); look(); } },
    h("h2", { class: "hidden" }, t("page_inside")), h("div", { class: "field" }, field), h("div", { class: "choose" }, choose, chatLabel, most, h("span", { class: "gap" }), button)), found);
  fit(field);
  if (seen) show(found);
  else found.append(h("p", { class: "welcome" }, t("in_hello")));
}

/** The bytes of all heads' rows as weights: at(layer, head, from, to), 0 to 1. */
function unpacked({ attention, tokens, heads }) {
  const bytes = Uint8Array.from(atob(attention), (one) => one.charCodeAt(0));
  const num = tokens.length;
  const each = (num * (num + 1)) / 2;
  return (layer, head, from, to) => (to > from ? 0 : bytes[(layer * heads + head) * each + (from * (from + 1)) / 2 + to] / 255);
}

/** A token's name as people see it. */
function shown(name) {
  const text = tokenText({ name });
  if (text === null) return "·";
  return (text === "" ? name : text).replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

const quoted = (name) => `“${shown(name)}”`;

function show(found) {
  const part = (title, hint, ...content) => h("section", { class: "part" }, h("h3", {}, title), h("p", { class: "hint" }, hint), ...content);
  found.replaceChildren(
    part(t("in_tokens"), t("in_tokens_hint"), ...probabilities()),
    part(t("in_attention"), t("in_attention_hint"), attention()),
    part(t("in_lens"), t("in_lens_hint"), ...lens()),
  );
}

// -- probabilities -----------------------------------------------------------------------------------------------------

function probabilities() {
  const { tokens, lens: rows, next_logprobs: follows } = seen;
  const last = follows.at(-1);
  const strip = new TokenStrip({ label: t("in_tokens"), detail: (place) => {
    const said = place ? t("in_was", { token: quoted(tokens[place]), p: chance(Math.exp(last[place - 1])) }) : `${quoted(tokens[0])}: ${t("in_first")}`;
    const list = (title, top) => h("div", {}, h("p", { class: "hint" }, title), bars(top));
    return [h("p", {}, said), h("div", { class: "before-after" }, place ? list(t("in_would"), rows.at(-1)[place - 1]) : null, list(t("in_then"), rows.at(-1)[place]))];
  } });
  strip.show(tokens.map((name, place) => ({ name, logprob: place ? last[place - 1] : null, text: tokenText({ name }) === "" ? name : tokenText({ name }) })));
  return [strip.element, strip.detail];
}

function bars(top) {
  return h("ul", { class: "bars" }, top.map(([name, value]) => {
    const inner = h("span", {});
    inner.style.width = `${100 * value}%`;
    inner.style.background = shadeOf(value);
    return h("li", { class: "bar-row" }, h("code", {}, shown(name)), h("span", { class: "bar-of", "aria-hidden": "true" }, inner), h("span", { class: "chance" }, chance(value)));
  }));
}

// -- attention ---------------------------------------------------------------------------------------------------------

function attention() {
  const { layers, heads, tokens } = seen;
  let ink = colour("--accent");
  const map = h("canvas", { class: "map", role: "img" });
  const said = h("p", { class: "said", "aria-live": "polite" });
  const row = h("div", { class: "strip looks", role: "listbox", "aria-label": t("in_reader"), dir: "auto" });
  const grid = h("div", { class: "heads", role: "radiogroup", "aria-label": t("in_attention") });
  grid.style.gridTemplateColumns = `auto repeat(${heads}, ${HEAD_PX}px)`;

  const choose = (layer, head, isFocused = false) => {
    for (const one of grid.querySelectorAll("button")) {
      const isChosen = Number(one.dataset.layer) === layer && Number(one.dataset.head) === head;
      one.setAttribute("aria-checked", String(isChosen));
      one.tabIndex = isChosen ? 0 : -1;
      if (isChosen && isFocused) one.focus();
    }
    Object.assign(state, { layer, head });
    map.setAttribute("aria-label", t("in_map", { layer: layer + 1, head: head + 1 }));
    title.textContent = t("in_head", { layer: layer + 1, head: head + 1 });
    paint(map, layer, head, ink, MAP_PX);
    reach(state.token);
  };
  const say = (from, to) => { said.textContent = t("in_looks", { from: quoted(tokens[from]), to: quoted(tokens[to]), p: chance(seen.attention(state.layer, state.head, from, to)) }); };
  const reach = (from, isFocused = false) => {
    state.token = from;
    [...row.children].forEach((one, to) => {
      const weight = seen.attention(state.layer, state.head, from, to);
      one.style.backgroundColor = to <= from ? `color-mix(in oklab, var(--accent) ${Math.round(75 * weight)}%, transparent)` : "";
      one.classList.toggle("future", to > from);
      one.setAttribute("aria-selected", String(to === from));
      one.tabIndex = to === from ? 0 : -1;
      one.title = to <= from ? chance(weight) : "";
      if (to === from && isFocused) one.focus();
    });
    let most = 0;
    for (let to = 1; to <= from; to += 1) if (seen.attention(state.layer, state.head, from, to) > seen.attention(state.layer, state.head, from, most)) most = to;
    say(from, most);
  };
  const placeOf = (event) => {
    const one = event.target.closest?.(".token");
    return one ? Number(one.dataset.place) : -1;
  };
  row.append(...tokens.map((name, place) => {
    const text = tokenText({ name });
    return h("span", { class: text ? "token" : "token marked", role: "option", "data-place": place }, text === null ? "·" : text === "" ? name : text.replaceAll("\n", "⏎\n"));
  }));
  row.addEventListener("pointerover", (event) => { const place = placeOf(event); if (place >= 0 && event.pointerType === "mouse") reach(place); });
  row.addEventListener("click", (event) => { const place = placeOf(event); if (place >= 0) reach(place, true); });
  row.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined || to < 0 || to >= tokens.length) return;
    event.preventDefault();
    reach(to, true);
  });
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    const to = Math.floor((tokens.length * (event.clientX - box.left)) / box.width);
    const from = Math.floor((tokens.length * (event.clientY - box.top)) / box.height);
    if (from < 0 || from >= tokens.length || to < 0) return;
    if (from !== state.token) reach(from);
    say(from, Math.min(to, from));
  });
  grid.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const [layer, head] = [state.layer + down, state.head + right];
    if (!(down || right) || layer < 0 || layer >= layers || head < 0 || head >= heads) return;
    event.preventDefault();
    choose(layer, head, true);
  });
  for (let layer = 0; layer < layers; layer += 1) {
    grid.append(h("span", { class: "layer-name", "aria-hidden": "true" }, String(layer + 1)));
    for (let head = 0; head < heads; head += 1) {
      const small = h("canvas", { "aria-hidden": "true" });
      grid.append(h("button", { type: "button", role: "radio", "data-layer": layer, "data-head": head, "aria-label": t("in_head", { layer: layer + 1, head: head + 1 }), onclick: () => choose(layer, head, true) }, small));
    }
  }
  const title = h("h4", {});
  const element = h("div", { class: "looking" }, h("div", { class: "scroll" }, grid), h("div", { class: "one-head" }, title, row, said, map));
  repaint = () => {
    ink = colour("--accent");
    for (const one of grid.querySelectorAll("button")) paint(one.firstChild, Number(one.dataset.layer), Number(one.dataset.head), ink, HEAD_PX);
    paint(map, state.layer, state.head, ink, MAP_PX);
  };
  repaint();
  choose(state.layer, state.head);
  return element;
}

/** A head's weights as a picture: rows look, columns are looked at. */
function paint(canvas, layer, head, ink, size) {
  const num = seen.tokens.length;
  const scale = Math.max(1, Math.floor((size * devicePixelRatio) / num));
  canvas.width = canvas.height = num * scale;
  const context = canvas.getContext("2d");
  context.fillStyle = ink;
  for (let from = 0; from < num; from += 1) {
    for (let to = 0; to <= from; to += 1) {
      context.globalAlpha = 0.03 + 0.97 * seen.attention(layer, head, from, to);
      context.fillRect(to * scale, from * scale, scale, scale);
    }
  }
}

/** A colour of the page as a canvas knows it. */
function colour(name) {
  const probe = h("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

// -- the logit lens ----------------------------------------------------------------------------------------------------

function lens() {
  const { tokens, lens: rows } = seen;
  const detail = h("div", { class: "detail", "aria-live": "polite" });
  const name = (layer) => (layer === rows.length - 1 ? t("in_output") : layer === 0 ? t("in_embedding") : t("in_layer", { n: layer }));
  const cells = new Map();
  let at = null;
  const reach = (layer, place, isFocused = false) => {
    const cell = cells.get(`${layer} ${place}`);
    if (!cell) return;
    if (at) at.tabIndex = -1;
    at?.setAttribute("aria-selected", "false");
    at = cell;
    at.tabIndex = 0;
    at.setAttribute("aria-selected", "true");
    if (isFocused) at.focus();
    detail.replaceChildren(h("p", {}, t("in_cell", { layer: name(layer), token: quoted(tokens[place]) })), bars(rows[layer][place]));
  };
  const cell = (layer, place) => {
    const [said, value] = rows[layer][place][0];
    const element = h("td", { role: "gridcell", tabindex: -1, "aria-selected": "false",
      onclick: () => reach(layer, place, true), onpointerenter: (event) => { if (event.pointerType === "mouse") reach(layer, place); },
      onkeydown: (event) => {
        const [up, right] = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
        if (!(up || right)) return;
        event.preventDefault();
        reach(layer + up, place + right, true);
      } }, shown(said));
    element.style.backgroundColor = shadeOf(value);
    cells.set(`${layer} ${place}`, element);
    return element;
  };
  const body = rows.map((_, below) => {
    const layer = rows.length - 1 - below;
    return h("tr", { role: "row" }, h("th", { scope: "row", role: "rowheader" }, name(layer)), tokens.map((_, place) => cell(layer, place)));
  });
  const table = h("table", { role: "grid", "aria-label": t("in_lens") }, h("tbody", {}, body),
    h("tfoot", {}, h("tr", { role: "row" }, h("th", { scope: "row", role: "rowheader" }, t("in_text")), tokens.map((one) => h("th", { scope: "col", role: "columnheader" }, shown(one))))));
  reach(rows.length - 1, tokens.length - 1);
  const scroll = h("div", { class: "scroll lens" }, table);
  requestAnimationFrame(() => { scroll.scrollLeft = scroll.scrollWidth; });
  return [scroll, detail];
}

await begin("inside", async (main) => {
  models ??= (await api.json("GET", "/api/inside")).models;
  main.classList.add("inside");
  if (!models.length) return void main.append(h("p", { class: "none" }, t("in_none")));
  state.model ||= models[0].id;
  state.text ??= t("in_example");
  draw(main);
});
