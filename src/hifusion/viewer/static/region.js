// A region of spots: who lies in it, and which genes stand out there against the rest.

/** Who lies in a polygon of [x, y], by the number of its edges to the right; centres (N, 2) flat. */
export function spotsInside(path, centres) {
  const inside = new Uint8Array(centres.length / 2);
  for (let n = 0; n < inside.length; n++) {
    const [x, y] = [centres[2 * n], centres[2 * n + 1]];
    let odd = 0;
    for (let i = 0, j = path.length - 1; i < path.length; j = i++) {
      const [[ax, ay], [bx, by]] = [path[i], path[j]];
      if (ay > y !== by > y && x < ax + ((y - ay) / (by - ay)) * (bx - ax)) odd ^= 1;
    }
    inside[n] = odd;
  }
  return inside;
}

/** Who lies in a box (left, top, right, bottom). */
export const spotsInBox = ([left, top, right, bottom], centres) =>
  Uint8Array.from({ length: centres.length / 2 }, (_, n) => {
    const [x, y] = [centres[2 * n], centres[2 * n + 1]];
    return x >= left && x <= right && y >= top && y <= bottom ? 1 : 0;
  });

/** Mean and variance (n - 1) of the values in and out of a region, what is no number left out. */
function moments(values, inside) {
  const counts = [0, 0];
  const means = [0, 0];
  const squares = [0, 0];
  for (let n = 0; n < values.length; n++) {
    const value = values[n];
    if (Number.isNaN(value)) continue;
    const side = inside[n] ? 0 : 1;
    const deviation = value - means[side];
    means[side] += deviation / ++counts[side];
    squares[side] += deviation * (value - means[side]);
  }
  return { counts, means, variances: squares.map((square, side) => square / (counts[side] - 1)) };
}

/** How one gene differs: difference of means, and the same in standard deviations (root of the mean of both variances). */
export function contrast(values, inside) {
  const { counts, means, variances } = moments(values, inside);
  const difference = means[0] - means[1];
  const spread = Math.sqrt((variances[0] + variances[1]) / 2);
  const known = counts[0] > 1 && counts[1] > 1;
  return { region: known ? means[0] : NaN, rest: known ? means[1] : NaN, difference: known ? difference : NaN, effect: known && spread > 0 ? difference / spread : NaN };
}

/** All genes of a map ranked by effect, read block by block; told how far it is, and stops when `stopped()`. */
export async function rank(section, map, inside, progress, stopped) {
  const rows = [];
  const { spots } = section.facts;
  for (let first = 0; first < map.rows; first += map.rows_per_block) {
    if (stopped()) return null;
    const block = await section.block(map, first / map.rows_per_block);
    for (let row = 0; row * spots < block.length; row++) {
      rows.push({ gene: map.genes[first + row], ...contrast(block.subarray(row * spots, (row + 1) * spots), inside) });
    }
    progress(rows.length, map.rows);
  }
  return rows;
}
