// Discs written straight into pixels: what it costs grows with the pixels covered, not with calls to the canvas, so that
// 100,000 spots move smoothly without a graphics processor.

const SMALL_PX = 10; // below this radius a disc is placed to a quarter of a pixel, else to a whole one
const LEAST_PX = 1.2; // radius at which a spot is still seen
const FAINT = 0.4; // opacity of spots outside the region

/** How much of each pixel a disc covers, 0 to 255, centred at (middle + dx, middle + dy). */
function stamp(radius, dx, dy) {
  const middle = Math.ceil(radius) + 1;
  const side = 2 * middle + 1;
  const cover = new Uint8Array(side * side);
  const first = new Int32Array(side).fill(side);
  const last = new Int32Array(side);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const inside = Math.min(Math.max(radius + 0.5 - Math.hypot(x - middle - dx, y - middle - dy), 0), 1);
      cover[y * side + x] = Math.round(255 * inside);
      if (cover[y * side + x]) {
        first[y] = Math.min(first[y], x);
        last[y] = x + 1;
      }
    }
  }
  return { cover, side, middle, first, last };
}

/** Stamps of a radius for the 4 x 4 places within a pixel, or the one place of large discs. */
function stampsOf(radius) {
  if (radius >= SMALL_PX) return { per: 1, all: [stamp(radius, 0, 0)] };
  const all = [];
  for (let y = 0; y < 4; y++) for (let x = 0; x < 4; x++) all.push(stamp(radius, (x + 0.5) / 4 - 0.5, (y + 0.5) / 4 - 0.5));
  return { per: 4, all };
}

export class SpotRaster {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.radius = 0;
  }

  /** Draw all spots: screen = centre * scale + offset, all in pixels of the canvas.
   *
   * centres: (N, 2) flat; places: of each spot in `pixels`; region: Uint8Array of who is in it, or null.
   */
  draw(centres, places, pixels, { scale, offset, radius, region }) {
    const { width, height } = this.canvas;
    if (!this.image || this.image.width !== width || this.image.height !== height) {
      this.image = this.context.createImageData(width, height);
      this.buffer = new Uint32Array(this.image.data.buffer);
    }
    this.buffer.fill(0);
    const seen = Math.max(Math.round(radius * 8) / 8, LEAST_PX);
    if (seen !== this.radius) {
      this.radius = seen;
      this.stamps = stampsOf(seen);
    }
    const { per, all } = this.stamps;
    const reach = all[0].middle;
    for (let n = 0; n < places.length; n++) {
      const x = centres[2 * n] * scale + offset[0];
      const y = centres[2 * n + 1] * scale + offset[1];
      if (x < -reach || y < -reach || x > width + reach || y > height + reach) continue;
      const left = Math.floor(x);
      const top = Math.floor(y);
      const which = per === 1 ? 0 : Math.floor((y - top) * 4) * 4 + Math.floor((x - left) * 4);
      this.put(all[which], left, top, pixels[places[n]], region && !region[n]);
    }
    this.context.putImageData(this.image, 0, 0);
  }

  put({ cover, side, middle, first, last }, x, y, colour, faint) {
    const { width, height } = this.canvas;
    const left = x - middle;
    const from = Math.max(0, middle - y);
    const to = Math.min(side, height + middle - y);
    for (let row = from; row < to; row++) {
      const line = (y - middle + row) * width + left;
      const end = Math.min(last[row], width - left);
      for (let column = Math.max(first[row], -left); column < end; column++) {
        const covered = faint ? cover[row * side + column] * FAINT : cover[row * side + column];
        const at = line + column;
        if (covered > this.buffer[at] >>> 24) this.buffer[at] = colour | (covered << 24);
      }
    }
  }
}
