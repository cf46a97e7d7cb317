// The views side by side: their frames, what each shows, that they move together, and what lies under the pointer.

import { short } from "./data.js";
import { byId, element, fill } from "./elements.js";
import { Panel } from "./panel.js";

export const MOST_VIEWS = 6;
const MOST_DETAILS = 8;

export class Views {
  /** on: {chosen, removed, lassoed}: another view was chosen, one was removed, a region was drawn. */
  constructor(host, on) {
    Object.assign(this, { host, on, all: [], lasso: false });
    this.details = element("div", { className: "details", hidden: true, role: "status" });
    document.body.append(this.details);
  }

  get panels() {
    return this.all.map((one) => one.panel);
  }

  /** Show these views of a section, in frames that are kept where there are enough. */
  async open(section, views) {
    const seen = section === this.section ? this.panels[0].viewer.viewport.getBounds(true) : null;
    this.section = section;
    this.host.dataset.count = String(views.length);
    while (this.all.length > views.length) this.remove(this.all.at(-1));
    while (this.all.length < views.length) this.add();
    const options = section.views;
    await Promise.all(
      views.map((view, n) => {
        const is = this.all[n];
        is.view = view;
        fill(is.select, options.map((one, place) => [String(place), one.title]), String(options.indexOf(view)));
        is.name.textContent = `View ${n + 1}: `;
        is.root.setAttribute("aria-label", `View ${n + 1}: ${view.title}`);
        is.remove.setAttribute("aria-label", `Remove view ${n + 1}`);
        is.remove.hidden = views.length < 2;
        return is.panel.section === section ? null : is.panel.open(section);
      }),
    );
    await laidOut(); // frames have another size now, and OpenSeadragon has seen it
    const [first] = this.panels;
    const home = first.home();
    first.viewer.viewport.fitBounds(seen && !holds(seen, home) ? seen : home, true); // what was whole stays whole
    this.leader = first;
    this.follow(first);
  }

  add() {
    const select = element("select");
    const name = element("span", { className: "visually-hidden" });
    const score = element("span", { className: "score" });
    const remove = element("button", { type: "button", className: "plain", textContent: "✕" });
    const stage = element("div", { className: "stage" });
    const root = element("section", { className: "view" }, element("header", {}, element("label", {}, name, select), remove, score), stage);
    this.host.append(root);
    const panel = new Panel(stage, {
      taken: (panel) => (this.leader = panel),
      moved: (from) => this.follow(from),
      hovered: (from, spot, at) => this.hover(from, spot, at),
      lassoed: (from, path) => this.on.lassoed(path),
      failed: () => fail("a part of the slide cannot be read"),
    });
    panel.viewer.canvas.setAttribute("aria-label", "Slide with spots: arrows move, plus and minus zoom, 0 shows all");
    panel.viewer.canvas.setAttribute("role", "application");
    panel.setLasso(this.lasso);
    const is = { root, select, name, score, remove, panel, values: null };
    select.addEventListener("change", () => this.on.chosen(this.all.indexOf(is), Number(select.value)));
    remove.addEventListener("click", () => this.on.removed(this.all.indexOf(is)));
    this.all.push(is);
  }

  remove(is) {
    is.panel.close();
    is.root.remove();
    this.all.splice(this.all.indexOf(is), 1);
  }

  /** The others go where one went, if it is the one that the user moves: their own moves are answers, and no wish. */
  follow(from) {
    if (from !== this.leader) return;
    for (const panel of this.panels) if (panel !== from && panel.section === from.section) panel.follow(from);
  }

  setLasso(on) {
    this.lasso = on;
    for (const panel of this.panels) panel.setLasso(on);
  }

  /** Mark a spot in all views and tell what is known of it beside the pointer. */
  hover(from, spot, at) {
    for (const panel of this.panels) panel.mark(spot);
    this.details.hidden = spot < 0;
    if (spot < 0) return;
    const { spots } = this.section;
    const known = Object.entries(spots?.columns ?? {}).map(([name, values]) => [name, values[spot]]);
    const shown = this.all.map(({ view, values }) => [view.title, values ? short(values[spot]) : "–"]);
    const row = ([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value ?? "–" }));
    this.details.replaceChildren(
      element("strong", { textContent: spots?.names[spot] ?? `spot ${spot + 1}` }),
      element("dl", {}, ...[...shown, ...known].slice(0, MOST_DETAILS).map(row)),
    );
    const box = from.host.getBoundingClientRect();
    const [width, height] = [this.details.offsetWidth, this.details.offsetHeight];
    const [x, y] = [box.left + at.x + 16, box.top + at.y + 16];
    this.details.style.left = `${x + width > innerWidth ? Math.max(4, x - width - 32) : x}px`;
    this.details.style.top = `${y + height > innerHeight ? Math.max(4, y - height - 32) : y}px`;
  }

  /** Tell of the spot so many after the one that is marked: what a pointer does, by keys. */
  step(by) {
    const [first] = this.panels;
    const { spots } = this.section.facts;
    const spot = (Math.max(first.marked, by < 0 ? 0 : -1) + by + spots) % spots;
    this.leader = first;
    this.hover(first, spot, first.reveal(spot));
  }

  /** Resolves when slide and spots of every view are drawn as sharp as they get here. */
  settled() {
    const ready = (panel) =>
      new Promise((resolve) => {
        const item = panel.viewer.world.getItemAt(0);
        if (!item || !panel.section.facts.slide || item.getFullyLoaded()) resolve();
        else item.addOnceHandler("fully-loaded-change", resolve);
      });
    return Promise.all(this.panels.map(ready));
  }
}

/** Whether one rectangle lies in another. */
const holds = (outer, inner) =>
  outer.x <= inner.x && outer.y <= inner.y && outer.x + outer.width >= inner.x + inner.width && outer.y + outer.height >= inner.y + inner.height;

/** Resolves when two frames were drawn. */
const laidOut = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));

/** What goes wrong is said on the page, not only in the console. */
export function fail(error) {
  const note = byId("failure");
  note.textContent = `Something went wrong: ${error.message ?? error}. Reload the page; if it stays, is \`hifusion view\` still running?`;
  note.hidden = false;
}
