// What the page fetches: facts as JSON, values as blocks of float32, each once. Addresses hold numbers, never names.

const MOST_KEPT = 200; // blocks of at most 1 MB, more only where one gene has more

async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${await answer.text()}`);
  return answer;
}

const json = async (address) => (await fetched(address)).json();
const floats = async (address) => new Float32Array(await (await fetched(address)).arrayBuffer());

export const readSections = () => json("data/sections.json");

/** One section: its facts, its spots, and the values of any view of it. */
export class Section {
  static async open(number) {
    const its = new Section();
    its.number = number;
    its.folder = `data/${number}`;
    [its.facts, its.centres] = await Promise.all([json(`${its.folder}/section.json`), floats(`${its.folder}/centres.bin`)]);
    its.spots = null; // names and columns come later: nothing of the first view needs them
    its.spotsRead = json(`${its.folder}/spots.json`).then((spots) => (its.spots = spots));
    its.blocks = new Map();
    for (const map of its.facts.maps) map.row = new Map(map.genes.map((gene, row) => [gene, row]));
    its.views = its.allViews();
    return its;
  }

  /** Ask for one of the finest tiles: a slide without levels is then decoded before somebody zooms in. */
  async warm() {
    const { slide } = this.facts;
    if (slide) await fetched(`${this.folder}/tiles/${slide.finest}/0_0.jpeg`);
  }

  /** Everything that can be looked at, in the order of the menus; what files do not hold is not there. */
  allViews() {
    const { maps, models } = this.facts;
    const has = (kind, model) => maps.some((map) => map.kind === kind && map.model === model);
    const views = has("measured", null) ? [{ kind: "measured", model: null, title: "Measured" }] : [];
    const titles = { predicted: "Predicted", difference: "Predicted − measured", uncertainty: "Uncertainty (± of 90 %)", novelty: "Novelty" };
    for (const kind of Object.keys(titles)) {
      models.forEach((label, model) => {
        const there = kind === "difference" ? this.mapsOf({ kind, model }) !== null : has(kind, model);
        if (there) views.push({ kind, model, title: `${titles[kind]} · ${label}` });
      });
    }
    return views.length ? views : [{ kind: "none", model: null, title: "Spots" }];
  }

  /** The maps behind a view for a gene: one, or [predicted, measured] of a difference; null where there are none. */
  mapsOf(view, gene = null) {
    const { maps } = this.facts;
    const fits = (map) => gene === null || map.row.has(gene) || map.kind === "novelty";
    if (view.kind !== "difference") {
      const map = maps.find((one) => one.kind === view.kind && one.model === view.model && fits(one));
      return map ? [map] : null;
    }
    const predicted = maps.find((one) => one.kind === "predicted" && one.model === view.model && fits(one));
    const measured = predicted && maps.find((one) => one.kind === "measured" && one.scale === predicted.scale && fits(one));
    return measured ? [predicted, measured] : null;
  }

  /** Which colour scale a view of a gene has, and what its numbers are; views with the same key share it. */
  scaleOf(view, gene) {
    const [map] = this.mapsOf(view, gene) ?? [];
    if (!map) return null;
    const key = { measured: map.scale, predicted: map.scale }[view.kind] ?? `${view.kind} ${map.scale}`;
    const unit = { difference: `difference, ${map.unit}`, uncertainty: `± ${map.unit}` }[view.kind] ?? map.unit;
    const meaning = {
      difference: "predicted minus measured: brown is too low, green too high",
      uncertainty: "half the width of the 90 % interval",
      novelty: "above 1: less like the training spots than 95 % of held-out ones",
    }[view.kind] ?? map.meaning;
    return { key, unit, meaning, kind: view.kind };
  }

  /** Values of a view of a gene at all spots; null where it has none. */
  async values(view, gene) {
    const maps = this.mapsOf(view, gene);
    if (!maps) return null;
    const columns = await Promise.all(maps.map((map) => this.column(map, map.kind === "novelty" ? 0 : map.row.get(gene))));
    return columns.length === 1 ? columns[0] : columns[0].map((value, n) => value - columns[1][n]);
  }

  async column(map, row) {
    const block = await this.block(map, Math.floor(row / map.rows_per_block));
    const start = (row % map.rows_per_block) * this.facts.spots;
    return block.subarray(start, start + this.facts.spots);
  }

  block(map, number) {
    const address = `${this.folder}/${this.facts.maps.indexOf(map)}/${number}.bin`;
    if (!this.blocks.has(address)) {
      this.blocks.set(address, floats(address));
      if (this.blocks.size > MOST_KEPT) this.blocks.delete(this.blocks.keys().next().value);
    }
    return this.blocks.get(address);
  }
}

/** Percentiles (0 to 100) of what is a number; of nothing they are NaN. */
export function percentiles(values, wanted) {
  const known = values.filter((value) => !Number.isNaN(value)).sort();
  return wanted.map((percent) => (known.length ? known[Math.round(((known.length - 1) * percent) / 100)] : NaN));
}

/** A number in few digits. */
export const short = (value) => (value == null || Number.isNaN(value) ? "–" : String(Number(value.toPrecision(3))).replace("-", "−"));
