// Whether judgements may train the model: a box whose last state this browser remembers.

import { h } from "./html.js";
import { memory } from "./settings.js";
import { t } from "./words.js";

/** What the box says now; isDefault: where it was never touched. */
export const mayTrain = (isDefault) => memory.get("consent", isDefault ? "yes" : "no") === "yes";

/** The box. */
export function consentBox(isDefault) {
  const box = h("input", { type: "checkbox", checked: mayTrain(isDefault), onchange: () => memory.set("consent", box.checked ? "yes" : "no") });
  return h("label", { class: "consent" }, box, h("span", {}, t("consent")));
}
