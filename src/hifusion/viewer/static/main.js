// The page: what is shown, and what each control does to it.

import { DIVERGING, SEQUENTIAL, pixelsOf, placesOf } from "./colours.js";
import { Section, percentiles, readSections, short } from "./data.js";
import { byId, element, fill } from "./elements.js";
import { GeneSearch, GeneTable } from "./genes.js";
import { bindKeys } from "./keys.js";
import { rank, spotsInBox, spotsInside } from "./region.js";
import { Scale } from "./scale.js";
import { saveForQuPath, savePicture, saveRanking, saveSpots } from "./takeaway.js";
import { MOST_VIEWS, Views, fail } from "./views.js";

const FIRST_GENES = ["ERBB2", "KRT19", "CD74", "TMSB10"]; // the paper's markers
const TRUST = ["red", "amber", "green"]; // the worst first
const state = { section: null, sections: [], gene: null, views: [], limits: new Map(), palette: SEQUENTIAL[0], region: null, path: null, ranking: null };
const scales = new Map(); // key of a scale -> its card
let showing = 0; // the newest wish: what was asked for earlier is dropped when it arrives
let changing = Promise.resolve();

/** One change of section or views after the other: each waits for files and frames. */
const inTurn = (change) => (...given) => (changing = changing.then(() => change(...given), () => change(...given)));

const views = new Views(byId("panels"), { chosen: chooseView, removed: removeView, lassoed: (path) => takeRegion(spotsInside(path, state.section.centres), path) });
const search = new GeneSearch(byId("gene"), byId("gene-list"), chooseGene);
const table = new GeneTable(byId("genes"), chooseGene);
const ranking = new GeneTable(byId("ranking"), chooseGene);

// ---- what is shown

const openSection = inTurn(async (number, name = state.section?.facts.genes[state.gene]) => {
  const section = await Section.open(number);
  const { genes } = section.facts;
  const wanted = [name, ...FIRST_GENES].map((one) => genes.indexOf(one)).find((n) => n >= 0);
  const options = section.views;
  const same = state.views.map((view) => options.find((one) => one.title === view.title)).filter(Boolean);
  Object.assign(state, { section, gene: wanted ?? best(section), views: same.length ? same : firstViews(options), region: null, path: null, ranking: null });
  state.limits.clear();
  search.genes = genes;
  byId("section").value = String(number);
  document.title = `${section.facts.name} – HiFusion viewer`;
  const { models, slide_note: note } = section.facts;
  byId("slide-note").textContent = note;
  byId("slide-note").hidden = !note;
  byId("skill-model-field").hidden = models.length < 2;
  fill(byId("skill-model"), models.map((label, n) => [String(n), label]), String(models.length - 1));
  byId("compare").disabled = options.length < 2;
  byId("geojson").disabled = !section.facts.maps.length;
  showGenes();
  showRegion();
  await views.open(section, state.views);
  await show();
  section.spotsRead.then(() => section === state.section && showLabels()).catch(fail);
  views.settled().then(() => section.warm()).catch(fail);
});

/** The gene that is predicted best, else the first. */
function best({ facts }) {
  const scores = facts.skill.at(-1)?.pcc_per_gene;
  return scores ? scores.reduce((most, score, n) => ((score ?? -2) > (scores[most] ?? -2) ? n : most), 0) : 0;
}

/** Measured beside the last model: networks stand last. */
function firstViews(options) {
  const predicted = options.findLast((view) => view.kind === "predicted");
  const measured = options.find((view) => view.kind === "measured");
  const first = [measured, predicted].filter(Boolean);
  return first.length ? first : options.slice(0, 1);
}

async function show() {
  const wish = ++showing;
  const { section, gene } = state;
  const columns = await Promise.all(state.views.map((view) => section.values(view, gene)));
  const groups = new Map();
  state.views.forEach((view, n) => {
    const scale = section.scaleOf(view, gene);
    if (!scale || !columns[n]) return;
    if (!groups.has(scale.key)) groups.set(scale.key, { ...scale, views: [], values: [] });
    groups.get(scale.key).views.push(n);
    groups.get(scale.key).values.push(columns[n]);
  });
  for (const group of groups.values()) {
    group.limits = state.limits.get(group.key) ?? (await firstLimits(group));
    group.palette = group.kind === "difference" ? DIVERGING : state.palette;
  }
  if (wish !== showing) return;
  state.groups = groups;
  views.all.slice(0, columns.length).forEach((is, n) => {
    const group = [...groups.values()].find((one) => one.views.includes(n));
    const values = columns[n] ?? new Float32Array(section.facts.spots).fill(NaN);
    is.values = columns[n];
    is.score.textContent = columns[n] ? scoreText(state.views[n], gene, columns[n]) : state.views[n].kind === "none" ? "" : "not in this view";
    is.panel.setPath(state.path);
    is.panel.set({ places: placesOf(values, group?.limits ?? [0, 1]), pixels: pixelsOf(group?.palette ?? state.palette), region: state.region, ...looks() });
  });
  showScales(groups);
  history.replaceState(null, "", `#${new URLSearchParams({ section: section.number, gene: section.facts.genes[gene] ?? "" })}`);
  search.show(gene);
  table.mark(gene);
  ranking.mark(gene);
}

/** Ends of the colours before the user moves them: of what was measured where it has the same scale. */
async function firstLimits(group) {
  const { section, gene } = state;
  const measured = section.facts.maps.find((map) => map.kind === "measured" && map.scale === group.key && map.row.has(gene));
  const values = measured ? await section.column(measured, measured.row.get(gene)) : Float32Array.from(group.values.flatMap((column) => [...column]));
  if (group.kind === "difference") {
    const [most] = percentiles(values.map(Math.abs), [99]);
    return most > 0 ? [-most, most] : [-1, 1];
  }
  const [low, high] = percentiles(values, [1, 99]);
  if (group.kind === "novelty") return [0, Math.max(high || 0, 1.5)];
  if (high > low) return [group.kind === "uncertainty" ? 0 : low, high];
  const middle = Number.isNaN(low) ? 0 : low;
  return [middle - 0.5, middle + 0.5];
}

/** The one figure of a view that says most. */
function scoreText(view, gene, values) {
  const known = values.filter((value) => !Number.isNaN(value));
  const mean = (of) => known.reduce((sum, value) => sum + of(value), 0) / known.length;
  if (view.kind === "predicted") {
    const skill = state.section.facts.skill[view.model];
    const pcc = skill.pcc_per_gene?.[gene];
    return pcc == null ? "" : `${skill.measured ? "" : "expected "}pcc_per_gene ${short(pcc)}`;
  }
  if (view.kind === "difference") return `mean absolute ${short(mean(Math.abs))}`;
  if (view.kind === "novelty") return `${short(100 * mean((value) => Number(value > 1)))} % of spots above 1`;
  return `mean ${short(mean((value) => value))}`;
}

function looks() {
  return { opacity: byId("opacity").value / 100, size: byId("size").value / 100, slide: byId("slide").checked };
}

function showScales(groups) {
  for (const key of scales.keys()) if (!groups.has(key)) scales.delete(key);
  for (const key of groups.keys()) {
    if (scales.has(key)) continue;
    const move = (limits) => {
      if (limits) state.limits.set(key, limits);
      else state.limits.delete(key);
      show().catch(fail);
    };
    scales.set(key, new Scale(move));
  }
  const cards = [...groups.keys()].map((key) => scales.get(key).root);
  const host = byId("scales");
  if (cards.length !== host.children.length || cards.some((card, n) => host.children[n] !== card)) host.replaceChildren(...cards);
  for (const [key, group] of groups) scales.get(key).show(group, group.values.length === 1 ? group.values[0] : group.values.flatMap((column) => [...column]), group.limits, group.palette);
}

function chooseGene(gene) {
  state.gene = gene;
  for (const key of state.limits.keys()) if (!key.startsWith("novelty")) state.limits.delete(key); // another gene has other values
  show().catch(fail);
}

const setViews = inTurn(async (chosen) => {
  state.views = chosen.slice(0, MOST_VIEWS);
  await views.open(state.section, state.views);
  await show();
});

function chooseView(n, option) {
  setViews(state.views.with(n, state.section.views[option])).catch(fail);
}

function removeView(n) {
  setViews(state.views.toSpliced(n, 1)).catch(fail);
}

function addView() {
  const options = state.section.views;
  const next = options.find((view) => !state.views.some((one) => one.title === view.title)) ?? options[0];
  if (next && state.views.length < MOST_VIEWS) setViews([...state.views, next]).catch(fail);
}

/** Every kind of view of the model that is looked at, or else of the last one. */
function compare() {
  const options = state.section.views;
  const model = state.views.find((view) => view.model !== null)?.model ?? state.section.facts.models.length - 1;
  setViews(options.filter((view) => view.model === null || view.model === model)).catch(fail);
}

// ---- genes by skill

function showGenes() {
  const { facts } = state.section;
  const skill = facts.skill[Number(byId("skill-model").value)];
  const columns = [{ title: "Gene", of: (gene) => facts.genes[gene], down: false }];
  if (skill?.pcc_per_gene) columns.push({ title: "pcc_per_gene", of: (gene) => skill.pcc_per_gene[gene] });
  if (skill?.trust) columns.push({ title: "Trust", of: (gene) => TRUST.indexOf(skill.trust[gene]), text: trustChip });
  if (skill?.of_ceiling) columns.push({ title: "Of ceiling", of: (gene) => skill.of_ceiling[gene] });
  const expected = "what the model's run expects, from sections where it could be checked";
  const notes = [
    skill?.pcc_per_gene && `pcc_per_gene: ${skill.measured ? "correlation of predicted and measured over the spots of this section" : expected}.`,
    (skill?.of_ceiling || skill?.trust) && `Of ceiling (part of what noise allows), trust: ${expected}.`,
  ];
  byId("skill-note").textContent = columns.length > 1 ? notes.filter(Boolean).join(" ") : "No skill is known: nothing predicted was measured here.";
  table.set([...facts.genes.keys()], columns, columns.length > 1 ? { column: 1, down: true } : { column: 0, down: false });
  byId("more").hidden = !table.left;
}

function trustChip(place) {
  if (place < 0) return "–";
  const word = TRUST[place];
  const dot = element("span", { className: "dot", "aria-hidden": "true" });
  dot.dataset.trust = word;
  return element("span", { className: "trust" }, dot, word);
}

// ---- a region against the rest

async function takeRegion(inside, path) {
  const taken = inside.reduce((sum, one) => sum + one, 0);
  toggleLasso(false);
  const useful = taken > 1 && taken < inside.length - 1;
  Object.assign(state, { region: useful ? inside : null, path: useful ? path : null, ranking: null });
  for (const panel of views.panels) {
    panel.setPath(state.path);
    panel.set({ region: state.region });
  }
  showRegion(useful || !path ? "" : `${taken} of ${inside.length} spots: a region needs at least two, and two outside.`);
  if (!useful) return;
  const { section, region } = state;
  const view = [...state.views, ...section.views].find((one) => ["measured", "predicted"].includes(one.kind));
  const map = view && section.mapsOf(view, state.gene)?.[0];
  if (!map) return;
  const note = (text) => (byId("region-note").textContent = `${taken} of ${inside.length} spots against the rest, ${view.title.toLowerCase()} (${map.unit}). ${text}`);
  const rows = await rank(section, map, region, (done, all) => note(`Reading genes: ${done} of ${all}.`), () => region !== state.region);
  if (!rows) return;
  state.ranking = { rows: new Map(rows.map((row) => [row.gene, row])), view, map, taken };
  note("Effect: difference of means in standard deviations. Neighbouring spots are alike, so it is no test.");
  const value = (name) => (gene) => state.ranking.rows.get(gene)[name];
  const columns = [
    { title: "Gene", of: (gene) => section.facts.genes[gene], down: false },
    { title: "Effect", of: value("effect") },
    { title: "Region", of: value("region") },
    { title: "Rest", of: value("rest") },
  ];
  ranking.set(rows.map((row) => row.gene), columns, { column: 1, down: true });
  ranking.mark(state.gene);
  byId("region-result").hidden = false;
}

function showRegion(note) {
  byId("clear").disabled = !state.region;
  byId("region-result").hidden = !state.ranking;
  byId("region-note").textContent = note || "Draw around spots, or take those in view, to see which genes stand out there.";
}

function clearRegion() {
  byId("by-label").value = "";
  takeRegion(new Uint8Array(state.section.facts.spots), null).catch(fail);
}

function toggleLasso(on = !views.lasso) {
  views.setLasso(on);
  byId("lasso").setAttribute("aria-pressed", String(on));
}

function takeInView() {
  takeRegion(spotsInBox(views.panels[0].inView(), state.section.centres), []).catch(fail);
}

function showLabels() {
  const { label } = state.section.spots.columns;
  const names = [...new Set(label?.filter((one) => one !== null))].sort();
  fill(byId("by-label"), [["", "By label…"], ...names.map((name) => [name, name])]);
  byId("by-label").hidden = !names.length;
}

function takeLabel(name) {
  if (!name) return;
  takeRegion(Uint8Array.from(state.section.spots.columns.label, (one) => Number(one === name)), []).catch(fail);
}

// ---- the rest of the page

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = dark ? "Light" : "Dark";
}

function toggleTheme() {
  setTheme(document.documentElement.dataset.theme !== "dark");
}

function step(by) {
  const gene = table.beside(by);
  if (gene !== undefined) chooseGene(gene);
}

function nextSection(by) {
  const { length } = state.sections;
  if (length > 1) openSection((state.section.number + by + length) % length).catch(fail);
}

function bind() {
  const click = (id, does) => byId(id).addEventListener("click", () => Promise.resolve(does()).catch(fail));
  click("compare", compare);
  click("add", addView);
  click("png", () => savePicture(state, views));
  click("geojson", () => saveForQuPath(state));
  click("theme", toggleTheme);
  click("lasso", () => toggleLasso());
  click("in-view", takeInView);
  click("clear", clearRegion);
  click("ranking-csv", () => saveRanking(state));
  click("spots-csv", () => saveSpots(state, views));
  click("more", () => {
    table.more();
    byId("more").hidden = !table.left;
  });
  byId("section").addEventListener("change", (event) => openSection(Number(event.target.value)).catch(fail));
  byId("by-label").addEventListener("change", (event) => takeLabel(event.target.value));
  byId("skill-model").addEventListener("change", showGenes);
  byId("palette").addEventListener("change", (event) => {
    state.palette = event.target.value;
    show().catch(fail);
  });
  for (const id of ["opacity", "size", "slide"]) byId(id).addEventListener("input", () => views.panels.forEach((panel) => panel.set(looks())));
  window.addEventListener("resize", () => state.groups && showScales(state.groups));
  bindKeys(
    [
      ["/", "Find a gene", () => byId("gene").focus()],
      ["j", "Next gene of the table", () => step(1)],
      ["k", "Gene before it", () => step(-1)],
      ["c", "Compare: every kind of view side by side", compare],
      ["a", "Add a view", addView],
      ["n", "What is known of the next spot", () => views.step(1)],
      ["p", "What is known of the spot before it", () => views.step(-1)],
      ["l", "Lasso on or off", () => toggleLasso()],
      ["v", "Take the spots in view as region", takeInView],
      ["Escape", "Forget the region", () => (views.lasso ? toggleLasso(false) : clearRegion())],
      ["]", "Next section", () => nextSection(1)],
      ["[", "Section before it", () => nextSection(-1)],
      ["e", "Save as PNG", () => savePicture(state, views).catch(fail)],
      ["t", "Light or dark", toggleTheme],
    ],
    ["Arrows", "Move the slide, once it was clicked or reached with Tab; + and − zoom, 0 shows all spots"],
  );
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  fill(byId("palette"), SEQUENTIAL.map((name) => [name, name]));
}

async function start() {
  bind();
  const { sections } = await readSections();
  state.sections = sections;
  fill(byId("section"), sections.map((section, n) => [String(n), `${section.name} · patient ${section.patient} · ${section.spots.toLocaleString("en")} spots`]));
  const asked = new URLSearchParams(location.hash.slice(1)); // as the page itself writes it, so that an address can be kept
  await openSection(Number(asked.get("section")) in sections ? Number(asked.get("section")) : 0, asked.get("gene"));
  await views.settled();
  performance.mark("first-view"); // slide and spots are there as sharp as this zoom shows them
  document.body.dataset.ready = "true";
}

window.addEventListener("unhandledrejection", (event) => fail(event.reason));
start().catch(fail);
