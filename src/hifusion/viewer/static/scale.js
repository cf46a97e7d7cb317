// A colour scale: a histogram of the values over the colour bar, and two handles that are dragged or moved by keys.

import { colourAt } from "./colours.js";
import { short } from "./data.js";
import { element } from "./elements.js";

const BINS = 48;
const STEP = 1 / 100; // of the range, for one key press

export class Scale {
  /** on: told [low, high] whenever a handle moves. */
  constructor(on) {
    this.on = on;
    this.title = element("h3");
    this.meaning = element("p", { className: "meaning" });
    this.bars = element("canvas", { className: "bars" });
    this.bars.setAttribute("aria-hidden", "true");
    this.handles = ["lowest colour", "highest colour"].map((what, end) => this.handle(what, end));
    this.texts = [element("span"), element("span")];
    this.reset = element("button", { type: "button", textContent: "Reset", className: "plain" });
    this.reset.addEventListener("click", () => this.on(null));
    this.track = element("div", { className: "track" }, this.bars, ...this.handles);
    this.root = element("div", { className: "scale" }, this.title, this.track, element("div", { className: "ends" }, this.texts[0], this.reset, this.texts[1]), this.meaning);
  }

  handle(what, end) {
    const handle = element("div", { className: "handle", tabIndex: 0, role: "slider", "aria-orientation": "horizontal" });
    handle.dataset.what = what;
    handle.addEventListener("pointerdown", (event) => handle.setPointerCapture(event.pointerId));
    handle.addEventListener("pointermove", (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const box = this.track.getBoundingClientRect();
      this.move(end, this.range[0] + ((event.clientX - box.left) / box.width) * (this.range[1] - this.range[0]));
    });
    handle.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
      if (!steps) return;
      event.preventDefault();
      event.stopPropagation(); // arrows move the slide elsewhere
      this.move(end, this.limits[end] + steps * STEP * (this.range[1] - this.range[0]));
    });
    return handle;
  }

  move(end, value) {
    const limits = [...this.limits];
    const least = STEP * (this.range[1] - this.range[0]);
    limits[end] = end ? Math.max(value, limits[0] + least) : Math.min(value, limits[1] - least);
    limits[end] = Math.min(Math.max(limits[end], this.range[0]), this.range[1]);
    this.on(limits);
  }

  /** values: all that the views of this scale show; limits: ends of the colours; palette: name of the map. */
  show({ unit, meaning }, values, limits, palette) {
    this.limits = limits;
    this.palette = palette;
    let [low, high] = limits;
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    this.range = [low, high];
    this.title.textContent = unit;
    this.meaning.textContent = meaning;
    this.counts = new Array(BINS).fill(0);
    for (const value of values) {
      if (!Number.isNaN(value)) this.counts[Math.min(BINS - 1, Math.floor((BINS * (value - low)) / (high - low || 1)))]++;
    }
    limits.forEach((limit, end) => {
      const handle = this.handles[end];
      handle.style.left = `${(100 * (limit - low)) / (high - low || 1)}%`;
      handle.setAttribute("aria-label", `${unit}: ${handle.dataset.what}`);
      handle.setAttribute("aria-valuemin", low.toPrecision(4));
      handle.setAttribute("aria-valuemax", high.toPrecision(4));
      handle.setAttribute("aria-valuenow", limit.toPrecision(4));
      this.texts[end].textContent = short(limit);
    });
    this.paint();
  }

  paint() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = this.track.clientWidth || 280;
    const height = this.track.clientHeight || 64;
    Object.assign(this.bars, { width: width * ratio, height: height * ratio });
    const context = this.bars.getContext("2d");
    context.scale(ratio, ratio);
    const [low, high] = this.limits;
    const most = Math.max(...this.counts, 1);
    const value = (x) => this.range[0] + (x / width) * (this.range[1] - this.range[0]);
    const colour = (x) => colourAt(this.palette, (value(x) - low) / (high - low || 1));
    const floor = height - 14;
    for (let x = 0; x < width; x++) {
      context.fillStyle = colour(x);
      const count = this.counts[Math.min(BINS - 1, Math.floor((BINS * x) / width))];
      const tall = count ? Math.max(1, Math.sqrt(count / most) * (floor - 4)) : 0; // roots: a few spots are seen too
      context.fillRect(x, floor - tall, 1, tall);
      context.fillRect(x, floor + 3, 1, 11);
    }
  }
}
