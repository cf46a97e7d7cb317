// One view: the slide in OpenSeadragon, the spots over it, and over both the marks (lasso, hovered spot, scale bar).

import { SpotRaster } from "./spots.js";

// OpenSeadragon adds a style of its own unless it finds one marked like this; the page's policy forbids inline styles, so
// it finds an element that has the name of one and is none.
const marker = document.createElementNS("urn:hifusion", "style");
marker.setAttribute("data-openseadragon-mobile-css", "");
document.head.append(marker);

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const ZOOMS = { "+": 1.4, "=": 1.4, "-": 1 / 1.4 };
const STEP = 0.15; // of the width, for one key press
const ROUND_UM = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];

/** Source of tiles for OpenSeadragon: a section's own, or an empty plane around spots that have no slide. */
function tileSource(section) {
  const { slide } = section.facts;
  if (!slide) {
    const most = section.centres.reduce((most, value) => Math.max(most, value), 1);
    return { width: Math.ceil(most * 1.05), height: Math.ceil(most * 1.05), tileSize: 512, getTileUrl: () => "", tileExists: () => false };
  }
  const folder = section.folder;
  return {
    width: slide.width,
    height: slide.height,
    tileSize: slide.tile,
    tileOverlap: slide.overlap,
    minLevel: 0,
    maxLevel: slide.finest,
    getTileUrl: (level, x, y) => `${folder}/tiles/${level}/${x}_${y}.jpeg`,
  };
}

export class Panel {
  /** host: the element to fill; on: {taken, moved, hovered, lassoed, failed}, told about what happens here. */
  constructor(host, on) {
    this.host = host;
    this.on = on;
    this.look = { places: null, pixels: null, opacity: 1, size: 1, region: null, slide: true };
    this.viewer = new OpenSeadragon.Viewer({
      element: host,
      drawer: "canvas",
      prefixUrl: "",
      showNavigationControl: false,
      keyboardNavEnabled: false, // its letters turn and mirror the slide, which the spots would not follow
      animationTime: 0.3,
      blendTime: 0,
      maxZoomPixelRatio: 6,
      minZoomImageRatio: 0.4,
      visibilityRatio: 0.2,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
    });
    this.spotsCanvas = this.overlay("spots");
    this.marksCanvas = this.overlay("marks");
    this.raster = new SpotRaster(this.spotsCanvas);
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("viewport-change", () => this.on.moved(this));
    this.viewer.addHandler("canvas-click", (event) => this.hover(event.position));
    this.viewer.addHandler("tile-load-failed", ({ message }) => /abort/i.test(message) || this.on.failed());
    const surface = this.viewer.canvas;
    surface.addEventListener("pointermove", (event) => event.buttons || this.hover(this.place(event)));
    for (const kind of ["pointerdown", "wheel", "keydown"]) surface.addEventListener(kind, () => this.on.taken(this), { capture: true, passive: true });
    surface.addEventListener("keydown", (event) => this.key(event));
    surface.addEventListener("pointerleave", () => this.on.hovered(this, -1));
    for (const kind of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) {
      this.marksCanvas.addEventListener(kind, (event) => this.lasso(event));
    }
  }

  overlay(name) {
    const canvas = document.createElement("canvas");
    canvas.className = `overlay ${name}`;
    canvas.setAttribute("aria-hidden", "true");
    this.viewer.canvas.append(canvas);
    return canvas;
  }

  /** Show a section; resolves when it can be moved in. */
  open(section) {
    this.section = section;
    this.look.places = null; // those of another section
    this.marked = -1;
    this.path = null;
    this.source = tileSource(section);
    this.perPx = section.facts.slide?.per_px ?? 1;
    return new Promise((resolve) => {
      this.viewer.addOnceHandler("open", () => {
        const home = this.home();
        this.viewer.viewport.getHomeBounds = () => home;
        this.viewer.viewport.goHome(true);
        this.showSlide();
        resolve();
      });
      this.viewer.open(this.source);
    });
  }

  /** The spots with a margin, in units of the viewport. */
  home() {
    const { centres, facts } = this.section;
    let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let n = 0; n < centres.length; n += 2) {
      left = Math.min(left, centres[n]);
      right = Math.max(right, centres[n]);
      top = Math.min(top, centres[n + 1]);
      bottom = Math.max(bottom, centres[n + 1]);
    }
    const margin = Math.max(0.04 * Math.max(right - left, bottom - top), 2 * facts.spot_diameter_px);
    const by = this.perPx / this.source.width;
    return new OpenSeadragon.Rect((left - margin) * by, (top - margin) * by, (right - left + 2 * margin) * by, (bottom - top + 2 * margin) * by);
  }

  /** How full-resolution pixels lie on the screen: CSS pixels = pixels * scale + offset. */
  where() {
    const zero = this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const one = this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(1, 0), true);
    return { scale: ((one.x - zero.x) / this.source.width) * this.perPx, offset: [zero.x, zero.y] };
  }

  set(look) {
    Object.assign(this.look, look);
    this.spotsCanvas.style.opacity = this.look.opacity;
    this.showSlide();
    this.draw();
  }

  showSlide() {
    this.viewer.world.getItemAt(0)?.setOpacity(this.look.slide ? 1 : 0);
  }

  /** How large the canvases are and how spots lie on them; null as long as there is nothing to draw. */
  geometry() {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.round(this.host.clientWidth * ratio);
    const height = Math.round(this.host.clientHeight * ratio);
    if (!width || !height || !this.section || !this.viewer.world?.getItemCount()) return null;
    for (const canvas of [this.spotsCanvas, this.marksCanvas]) {
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    }
    const { scale, offset } = this.where();
    return { ratio, scale, offset, radius: (this.section.facts.spot_diameter_px / 2) * this.look.size * scale };
  }

  draw() {
    const geometry = this.geometry();
    if (!geometry || !this.look.places) return;
    const { ratio, scale, offset, radius } = geometry;
    this.raster.draw(this.section.centres, this.look.places, this.look.pixels, {
      scale: scale * ratio,
      offset: offset.map((value) => value * ratio),
      radius: radius * ratio,
      region: this.look.region,
    });
    this.drawMarks();
  }

  drawMarks() {
    const geometry = this.geometry();
    if (!geometry) return;
    const { ratio, scale, offset, radius } = geometry;
    const context = this.marksCanvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.host.clientWidth, this.host.clientHeight);
    const halo = (draw) => {
      for (const [width, colour] of [[4, "#fff"], [1.8, "#111"]]) {
        Object.assign(context, { lineWidth: width, strokeStyle: colour, lineJoin: "round" });
        draw();
        context.stroke();
      }
    };
    if (this.marked >= 0) {
      const [x, y] = [0, 1].map((axis) => this.section.centres[2 * this.marked + axis] * scale + offset[axis]);
      halo(() => {
        context.beginPath();
        context.arc(x, y, Math.max(radius, 2) + 2, 0, 2 * Math.PI);
      });
    }
    if (this.path?.length > 1) {
      halo(() => {
        context.beginPath();
        this.path.forEach(([x, y], n) => context[n ? "lineTo" : "moveTo"](x * scale + offset[0], y * scale + offset[1]));
        if (!this.drawing) context.closePath();
      });
    }
    this.drawScaleBar(context, scale, halo);
  }

  drawScaleBar(context, scale, halo) {
    const pxPerUm = scale / this.section.facts.mpp;
    const um = ROUND_UM.findLast((length) => length * pxPerUm <= 0.3 * this.host.clientWidth) ?? ROUND_UM[0];
    const [left, bottom] = [12, this.host.clientHeight - 12];
    halo(() => {
      context.beginPath();
      context.moveTo(left, bottom);
      context.lineTo(left + um * pxPerUm, bottom);
    });
    context.font = "600 12px system-ui, sans-serif";
    const text = um < 1000 ? `${um} µm` : `${um / 1000} mm`;
    Object.assign(context, { lineWidth: 3, strokeStyle: "#fff", fillStyle: "#111" });
    context.strokeText(text, left, bottom - 7);
    context.fillText(text, left, bottom - 7);
  }

  place(event) {
    const box = this.host.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  key(event) {
    const { viewport } = this.viewer;
    const [move, zoom] = [MOVES[event.key], ZOOMS[event.key]];
    if (event.ctrlKey || event.metaKey || event.altKey || !(move || zoom || event.key === "0")) return;
    event.preventDefault(); // else the page scrolls
    if (move) viewport.panBy(new OpenSeadragon.Point(...move).times(STEP * viewport.getBounds().width));
    else if (zoom) viewport.zoomBy(zoom);
    else viewport.goHome();
    viewport.applyConstraints();
  }

  /** Tell which spot lies under a place of the screen. */
  hover({ x, y }) {
    if (!this.section || this.drawing) return;
    const { scale, offset } = this.where();
    const { centres, facts } = this.section;
    const [px, py] = [(x - offset[0]) / scale, (y - offset[1]) / scale];
    let least = Math.max((facts.spot_diameter_px / 2) * this.look.size, 4 / scale) ** 2;
    let nearest = -1;
    for (let n = 0; n < centres.length / 2; n++) {
      const distance = (centres[2 * n] - px) ** 2 + (centres[2 * n + 1] - py) ** 2;
      if (distance < least) [least, nearest] = [distance, n];
    }
    this.on.hovered(this, nearest, { x, y });
  }

  /** Where a spot lies on the screen, after it was brought into view. */
  reveal(spot) {
    const [px, py] = [0, 1].map((axis) => this.section.centres[2 * spot + axis]);
    const [left, top, right, bottom] = this.inView();
    if (px < left || px > right || py < top || py > bottom) {
      const by = this.perPx / this.source.width;
      this.viewer.viewport.panTo(new OpenSeadragon.Point(px * by, py * by), true);
    }
    const { scale, offset } = this.where();
    return { x: px * scale + offset[0], y: py * scale + offset[1] };
  }

  mark(spot) {
    if (spot === this.marked) return;
    this.marked = spot;
    this.drawMarks();
  }

  /** Whether dragging draws a region instead of moving the slide. */
  setLasso(on) {
    this.viewer.setMouseNavEnabled(!on);
    this.marksCanvas.classList.toggle("drawing", on);
  }

  lasso(event) {
    const { x, y } = this.place(event);
    const { scale, offset } = this.where();
    if (event.type === "pointerdown") {
      this.drawing = true;
      this.path = [];
      this.marksCanvas.setPointerCapture(event.pointerId);
    }
    if (!this.drawing) return;
    this.path.push([(x - offset[0]) / scale, (y - offset[1]) / scale]);
    if (event.type === "pointerup" || event.type === "pointercancel") {
      this.drawing = false;
      this.on.lassoed(this, event.type === "pointerup" ? this.path : []);
    }
    this.drawMarks();
  }

  setPath(path) {
    this.path = path;
    this.drawMarks();
  }

  /** Go where another panel is, at once. */
  follow(other) {
    const [from, to] = [other.viewer.viewport, this.viewer.viewport];
    to.zoomTo(from.getZoom(true), null, true);
    to.panTo(from.getCenter(true), true);
  }

  /** (left, top, right, bottom) of what is in view, full-resolution pixels. */
  inView() {
    const { scale, offset } = this.where();
    const at = (value, axis) => (value - offset[axis]) / scale;
    return [at(0, 0), at(0, 1), at(this.host.clientWidth, 0), at(this.host.clientHeight, 1)];
  }

  close() {
    this.viewer.destroy();
  }
}
