// What is taken away: the ranking and the spots of a region as tables, what is seen as a picture, values for QuPath.

import { csv, fileName, save } from "./elements.js";
import { picture } from "./picture.js";

/** The genes of a region, the highest effect first. */
export function saveRanking({ section: { facts }, ranking: { rows, view, map, taken } }) {
  const sorted = [...rows.values()].sort((a, b) => (Number.isNaN(a.effect) ? 1 : Number.isNaN(b.effect) ? -1 : b.effect - a.effect));
  const lines = sorted.map((row) => [facts.genes[row.gene], row.region, row.rest, row.difference, row.effect, taken, facts.spots - taken, view.title, map.unit]);
  const head = ["gene", "mean_region", "mean_rest", "difference", "effect_sd", "spots_region", "spots_rest", "values", "unit"];
  save(`${fileName(facts.name, "region", "genes")}.csv`, "text/csv", csv([head, ...lines]));
}

/** The spots of a region, with what the views show of them. */
export async function saveSpots({ section, gene, region }, views) {
  const { names, columns } = await section.spotsRead;
  const { facts, centres } = section;
  const shown = views.all.filter((is) => is.values);
  const head = ["spot", "x_px", "y_px", ...Object.keys(columns), ...shown.map((is) => `${facts.genes[gene] ?? ""} ${is.view.title}`)];
  const lines = names.flatMap((name, n) => (region[n] ? [[name, centres[2 * n], centres[2 * n + 1], ...Object.values(columns).map((values) => values[n]), ...shown.map((is) => is.values[n])]] : []));
  save(`${fileName(facts.name, "region", "spots")}.csv`, "text/csv", csv([head, ...lines]));
}

export async function savePicture(state, views) {
  const { facts } = state.section;
  const gene = facts.genes[state.gene] ?? "";
  const group = (n) => [...state.groups.values()].find((one) => one.views.includes(n)) ?? null;
  const panels = views.all.map((is, n) => ({ panel: is.panel, title: state.views[n].title, score: is.score.textContent, scale: group(n) }));
  save(`${fileName(facts.name, gene)}.png`, "image/png", await picture(panels, `${facts.name}, ${gene}`));
}

/** The values of the first view that has some, as tiles. */
export async function saveForQuPath({ section, views, gene }) {
  const { facts } = section;
  const file = (map) => ["measured", "predicted"].includes(map.kind);
  const wanted = views.flatMap((view) => section.mapsOf(view, gene) ?? []).find(file) ?? facts.maps.find(file);
  const answer = await fetch(`${section.folder}/${facts.maps.indexOf(wanted)}.geojson?gene=${gene}`);
  if (!answer.ok) throw new Error(await answer.text());
  save(`${fileName(facts.name, wanted.kind === "measured" ? "measured" : facts.models[wanted.model])}.geojson`, "application/geo+json", await answer.blob());
}
