// Colour maps that are read alike with any kind of colour vision, as tables of 256 colours and one for "no value".

// 17 even steps of matplotlib's maps; colours between them are mixed.
const STEPS = {
  viridis: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
  cividis: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
  magma: "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 fcfdbf",
  BrBG: "543005 774508 995d13 b97b29 cfa256 e2c787 f1dfb3 f6edd7 f4f5f5 d7eeeb b4e2db 87d0c5 58b0a7 2d8f87 0c7169 01554b 003c30",
};

export const SEQUENTIAL = ["viridis", "cividis", "magma"];
export const DIVERGING = "BrBG"; // of a difference: brown too low, green too high
export const NO_VALUE = 256; // its place in a table
const GREY = 150;

/** [red, green, blue] of 257 places of a map. */
function table(name) {
  const steps = STEPS[name].split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const mixed = (place) => {
    const along = (place / 255) * (steps.length - 1);
    const first = Math.min(Math.floor(along), steps.length - 2);
    return steps[first].map((value, i) => Math.round(value + (steps[first + 1][i] - value) * (along - first)));
  };
  return [...Array.from({ length: 256 }, (_, place) => mixed(place)), [GREY, GREY, GREY]];
}

const TABLES = Object.fromEntries(Object.keys(STEPS).map((name) => [name, table(name)]));

/** Colours as pixels of an ImageData seen as Uint32 (little-endian), without opacity. */
export const pixelsOf = (name) => Uint32Array.from(TABLES[name], ([red, green, blue]) => red | (green << 8) | (blue << 16));

/** Colour of a place from 0 to 1, for CSS and canvas. */
export const colourAt = (name, place) => `rgb(${TABLES[name][Math.round(255 * Math.min(Math.max(place, 0), 1))].join(" ")})`;

/** Place of each value between the limits, 0 to 255; NO_VALUE where there is none. */
export function placesOf(values, [low, high]) {
  const places = new Uint16Array(values.length);
  const by = high > low ? 255 / (high - low) : 0;
  for (let n = 0; n < values.length; n++) {
    const along = (values[n] - low) * by;
    places[n] = Number.isNaN(values[n]) ? NO_VALUE : along < 0 ? 0 : along > 255 ? 255 : along;
  }
  return places;
}
