// One answer's text on the page, whole or while it grows: finished blocks are put there once and stay; the last one is put
// anew when the server sends it, and what has come since is written behind it as plain text.

import { fragment, h, icon, sign } from "./html.js";
import { t } from "./words.js";

const COPIED_MS = 1500;

export class AnswerText {
  constructor() {
    this.element = h("div", { class: "prose" });
    this.open = h("div", { class: "open" });
    this.numBlocks = 0;
    this.tail = null;
  }

  /** Show a whole answer. */
  whole(blocks) {
    this.element.replaceChildren(...blocks.map(dressed));
    this.numBlocks = blocks.length;
    this.tail = null;
  }

  /** What the server says of a growing one: {from, blocks, open, tail}. Returns the text of the blocks that are new. */
  grow({ from, blocks = [], open, tail }) {
    if (from !== undefined && from < this.numBlocks) {
      while (this.element.children.length > from) this.element.lastChild.remove();
      this.numBlocks = from;
    }
    if (!this.open.isConnected) this.element.append(this.open);
    let said = "";
    for (const html of blocks) {
      const block = dressed(html);
      said += ` ${block.textContent}`;
      this.open.before(block);
      this.numBlocks += 1;
    }
    if (open !== undefined) {
      this.open.replaceChildren(fragment(open));
      this.tail = null;
    }
    if (tail) {
      this.tail ??= place(this.open).appendChild(document.createTextNode(""));
      this.tail.data += tail;
    }
    return said.trim();
  }

  /** It has ended. */
  close() {
    this.open.remove();
  }
}

/** A block with what belongs to it: code has a bar with its language and a button that copies it, tables may scroll. */
function dressed(html) {
  const block = h("div", { class: "block" }, fragment(html));
  for (const code of block.querySelectorAll("pre")) {
    const frame = h("div", { class: "code" });
    code.replaceWith(frame);
    const copy = sign("copy", t("copy_code"), () => copyText(code.textContent, copy));
    frame.append(h("div", { class: "bar" }, h("span", {}, code.dataset.language ?? ""), copy), code);
    code.tabIndex = 0;
  }
  for (const table of block.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabindex: 0 });
    table.replaceWith(frame);
    frame.append(table);
  }
  return block;
}

/** Where text goes on: the last element of the last one, and so on, but not inside a formula. */
function place(element) {
  let at = element;
  while (at.lastElementChild && !at.lastElementChild.closest("math, hr, br") && !at.lastChild.data?.trim()) at = at.lastElementChild;
  return at;
}

/** Put a text on the clipboard, and say so on the button. */
export async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { value: text, class: "hidden" }); // an address without TLS has no clipboard
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  if (!button) return;
  const before = [...button.childNodes];
  const title = button.title;
  button.replaceChildren(icon("check"));
  button.title = t("copied");
  setTimeout(() => {
    button.replaceChildren(...before);
    button.title = title;
  }, COPIED_MS);
}
