// What is seen, as one PNG: each view with its title, slide, spots and marks, and its colour bar with the unit.

import { colourAt } from "./colours.js";
import { short } from "./data.js";

const [GAP, HEAD, FOOT] = [12, 64, 44]; // CSS pixels around, above and below a view

/** panels: [{panel, title, score, scale: {unit, limits, palette} or null}], side by side; gives a Blob. */
export function picture(panels, heading) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const sizes = panels.map(({ panel }) => [panel.host.clientWidth, panel.host.clientHeight]);
  const canvas = document.createElement("canvas");
  const width = sizes.reduce((sum, [wide]) => sum + wide + GAP, GAP);
  const height = Math.max(...sizes.map(([, high]) => high)) + HEAD + FOOT;
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  const text = (words, x, y, font, align = "left", most = undefined) => {
    Object.assign(context, { font: `${font} system-ui, sans-serif`, fillStyle: "#111", textAlign: align });
    context.fillText(words, x, y, most);
  };
  text(heading, GAP, 18, "600 14px");
  let left = GAP;
  panels.forEach(({ panel, title, score, scale }, n) => {
    const [wide, high] = sizes[n];
    text(title, left, 38, "13px", "left", wide);
    text(score, left, 55, "12px", "left", wide);
    context.save();
    context.beginPath();
    context.rect(left, HEAD, wide, high);
    context.clip();
    for (const [layer, opacity] of [[panel.viewer.drawer.canvas, 1], [panel.spotsCanvas, panel.look.opacity], [panel.marksCanvas, 1]]) {
      context.globalAlpha = opacity;
      if (layer.width && layer.height) context.drawImage(layer, left, HEAD, wide, high);
    }
    context.restore();
    if (scale) {
      const bar = Math.min(wide, 260);
      for (let x = 0; x < bar; x++) {
        context.fillStyle = colourAt(scale.palette, x / bar);
        context.fillRect(left + x, HEAD + high + 8, 1, 10);
      }
      text(short(scale.limits[0]), left, HEAD + high + 34, "12px");
      text(scale.unit, left + bar / 2, HEAD + high + 34, "12px", "center");
      text(short(scale.limits[1]), left + bar, HEAD + high + 34, "12px", "right");
    }
    left += wide + GAP;
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
