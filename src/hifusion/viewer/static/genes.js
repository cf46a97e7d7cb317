// Finding genes: the field that completes what is typed, and the table by skill.

import { short } from "./data.js";
import { element } from "./elements.js";

const MOST_FOUND = 12;
const AT_A_TIME = 100;

/** Places of genes whose name begins with the text, the shortest first, then of those that hold it. */
export function search(genes, text) {
  const wanted = text.trim().toUpperCase();
  const [begin, hold] = [[], []];
  genes.forEach((gene, n) => {
    const at = gene.toUpperCase().indexOf(wanted);
    if (at === 0) begin.push(n);
    else if (at > 0) hold.push(n);
  });
  begin.sort((a, b) => genes[a].length - genes[b].length);
  return [...begin, ...hold].slice(0, MOST_FOUND);
}

/** The combobox of genes: arrows, Enter and Escape as every combobox has them. */
export class GeneSearch {
  constructor(input, list, choose) {
    Object.assign(this, { input, list, choose, genes: [], found: [], active: -1 });
    input.addEventListener("input", () => this.open());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("blur", () => this.close());
    input.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the field keeps the focus
      const option = event.target.closest("li");
      if (option) this.take(this.found[[...list.children].indexOf(option)]);
    });
  }

  open() {
    this.found = search(this.genes, this.input.value);
    this.list.replaceChildren(
      ...this.found.map((gene, n) => element("li", { id: `found-${n}`, role: "option", "aria-selected": "false", textContent: this.genes[gene] })),
    );
    this.list.hidden = !this.found.length;
    this.input.setAttribute("aria-expanded", String(!this.list.hidden));
    this.activate(this.found.length ? 0 : -1);
  }

  activate(n) {
    this.active = n;
    [...this.list.children].forEach((option, place) => option.setAttribute("aria-selected", String(place === n)));
    if (n < 0) this.input.removeAttribute("aria-activedescendant");
    else this.input.setAttribute("aria-activedescendant", `found-${n}`);
    this.list.children[n]?.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      if (this.list.hidden) this.open();
      else this.activate((this.active + step + this.found.length) % this.found.length);
    } else if (event.key === "Enter" && this.active >= 0) {
      this.take(this.found[this.active]);
    } else if (event.key === "Escape") {
      this.close();
    }
  }

  take(gene) {
    this.choose(gene);
    this.input.blur();
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.activate(-1);
    this.show();
  }

  /** Write the gene that is shown into the field. */
  show(gene = this.gene) {
    this.gene = gene;
    this.input.value = this.genes[gene] ?? "";
  }
}

/** A table whose first column holds genes to choose, sorted by the column whose heading is pressed. */
export class GeneTable {
  constructor(table, choose) {
    Object.assign(this, { table, choose });
  }

  /** columns: {title, of: gene -> value, text: value -> string or element, down: first sorted downwards}; sorted: {column, down}. */
  set(genes, columns, sorted) {
    Object.assign(this, { genes, columns, sorted, shown: AT_A_TIME });
    this.order();
  }

  order() {
    const { of } = this.columns[this.sorted.column];
    const sign = this.sorted.down ? -1 : 1;
    const missing = (value) => value == null || Number.isNaN(value);
    this.genes.sort((a, b) => {
      const [one, other] = [of(a), of(b)];
      if (missing(one) || missing(other)) return missing(one) - missing(other); // what is not known stands last
      return sign * (typeof one === "string" ? one.localeCompare(other, "en", { numeric: true }) : one - other);
    });
    this.draw();
  }

  more() {
    this.shown += AT_A_TIME;
    this.draw();
  }

  get left() {
    return Math.max(0, this.genes.length - this.shown);
  }

  draw() {
    const heading = (column, n) => {
      const is = this.sorted.column === n;
      const button = element("button", { type: "button", textContent: column.title, className: "plain" });
      button.addEventListener("click", () => {
        this.sorted = { column: n, down: is ? !this.sorted.down : column.down ?? true };
        this.order();
      });
      return element("th", { scope: "col", "aria-sort": is ? (this.sorted.down ? "descending" : "ascending") : "none" }, button);
    };
    const row = (gene) => {
      const [name, ...rest] = this.columns;
      const button = element("button", { type: "button", textContent: name.of(gene), className: "plain gene", title: name.of(gene) });
      button.addEventListener("click", () => this.choose(gene));
      const cells = rest.map(({ of, text = short }) => element("td", {}, text(of(gene))));
      const made = element("tr", {}, element("th", { scope: "row" }, button), ...cells);
      made.dataset.gene = gene;
      return made;
    };
    this.table.replaceChildren(
      element("thead", {}, element("tr", {}, ...this.columns.map(heading))),
      element("tbody", {}, ...this.genes.slice(0, this.shown).map(row)),
    );
    this.mark(this.gene);
  }

  mark(gene) {
    this.gene = gene;
    for (const row of this.table.tBodies[0]?.rows ?? []) row.classList.toggle("chosen", Number(row.dataset.gene) === gene);
  }

  /** The gene so many rows below the one that is shown. */
  beside(step) {
    const at = this.genes.indexOf(this.gene);
    return this.genes[(at + step + this.genes.length) % this.genes.length];
  }
}
