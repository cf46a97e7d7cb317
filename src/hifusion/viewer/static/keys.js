// Keys of the page, and the list that tells them.

import { byId, element } from "./elements.js";

/** keys: [key, what it does, function]; others: rows of the list whose keys somebody else hears. */
export function bindKeys(keys, ...others) {
  const help = byId("help");
  const told = [...keys, ["?", "This list"], ...others];
  byId("help-list").replaceChildren(...told.map(([key, what]) => element("div", {}, element("dt", {}, element("kbd", { textContent: key })), element("dd", { textContent: what }))));
  const open = () => help.showModal();
  byId("keys").addEventListener("click", open);
  byId("help-close").addEventListener("click", () => help.close());
  const does = new Map([...keys.map(([key, , act]) => [key, act]), ["?", open]]);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input[type=text], select");
    if (typing || help.open || event.ctrlKey || event.metaKey || event.altKey || !does.has(event.key)) return;
    event.preventDefault();
    event.stopPropagation(); // OpenSeadragon has letters of its own
    does.get(event.key)();
  }, true);
}
