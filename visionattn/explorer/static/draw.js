// Drawing of heatmaps over pictures, in the same way as visionattn/drawing/overlay.py.

/** @type {Record<string, Uint8Array>} */
const ramps = {};

/** Return 256 colours as RGB bytes. @param {string} name */
function ramp(name) {
  return (ramps[name] ??= bytesOf(facts.colours[name]));
}

/** @param {HTMLCanvasElement} canvas */
function pen(canvas) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("this browser cannot draw on a canvas");
  return context;
}

/** @param {ArrayLike<number>} values */
function bounds(values) {
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < values.length; i++) {
    if (values[i] < low) low = values[i];
    if (values[i] > high) high = values[i];
  }
  return { low, high };
}

/** Scale values to [0, 1]; equal values become 0. @param {Float32Array} values */
function stretch(values) {
  const { low, high } = bounds(values);
  const span = high - low <= 1e-6 * Math.abs(high) ? Infinity : high - low;
  return values.map((value) => (value - low) / span);
}

/**
 * Return the heat of every pixel of the shown picture; NaN outside the model's input.
 * @param {Picture} picture @param {Grid} map @param {boolean} smooth
 */
function carry(picture, map, smooth) {
  const [width, height] = picture.shown;
  const [rows, columns] = map.grid;
  const heat = new Float32Array(width * height);
  const place = placer(picture, map.grid);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const [row, column] = place(x + 0.5, y + 0.5);
      if (row < 0 || column < 0 || row > rows || column > columns) heat[i] = NaN;
      else if (!smooth) heat[i] = map.values[Math.min(rows - 1, Math.floor(row)) * columns + Math.min(columns - 1, Math.floor(column))];
      else heat[i] = between(map, row - 0.5, column - 0.5);
    }
  }
  return heat;
}

/** Return the function from pixels of the shown picture to cells. @param {Picture} picture @param {[number, number]} grid */
function placer(picture, [rows, columns]) {
  const [a, b, left, c, d, top] = picture.matrix;
  const scale = picture.size[0] / picture.shown[0], scaleY = picture.size[1] / picture.shown[1];
  const toColumn = columns / picture.input[0], toRow = rows / picture.input[1];
  return (/** @type {number} */ x, /** @type {number} */ y) => {
    const sx = x * scale, sy = y * scaleY;
    return [(c * sx + d * sy + top) * toRow, (a * sx + b * sy + left) * toColumn];
  };
}

/** Interpolate bilinearly between the centres of cells; repeat the border cells outside the outermost centres. @param {Grid} map @param {number} row @param {number} column */
function between({ grid: [rows, columns], values }, row, column) {
  const y = Math.min(Math.max(row, 0), rows - 1), x = Math.min(Math.max(column, 0), columns - 1);
  const up = Math.floor(y), left = Math.floor(x);
  const down = Math.min(up + 1, rows - 1), right = Math.min(left + 1, columns - 1);
  const dy = y - up, dx = x - left;
  const upper = values[up * columns + left] * (1 - dx) + values[up * columns + right] * dx;
  const lower = values[down * columns + left] * (1 - dx) + values[down * columns + right] * dx;
  return upper * (1 - dy) + lower * dy;
}

const MUTED = 0.45, SHADE = 0.35;

/**
 * Blend heat over a picture; the opacity grows with the heat.
 * @param {ImageData} base @param {Float32Array | null} heat in [0, 1] @param {Uint8Array} colours @param {number} alpha
 */
function blend(base, heat, colours, alpha) {
  const out = new ImageData(base.width, base.height);
  for (let i = 0, at = 0; at < base.data.length; i++, at += 4) {
    const [r, g, b] = [base.data[at], base.data[at + 1], base.data[at + 2]];
    out.data[at + 3] = 255;
    if (!heat) {
      out.data[at] = r; out.data[at + 1] = g; out.data[at + 2] = b;
      continue;
    }
    const grey = 0.299 * r + 0.587 * g + 0.114 * b;
    if (Number.isNaN(heat[i])) {
      out.data[at] = out.data[at + 1] = out.data[at + 2] = SHADE * grey;
      continue;
    }
    const level = Math.round(255 * heat[i]);
    const opacity = alpha * Math.sqrt(level / 255);
    const mute = (1 - MUTED) * grey;
    out.data[at] = (1 - opacity) * (MUTED * r + mute) + opacity * colours[3 * level];
    out.data[at + 1] = (1 - opacity) * (MUTED * g + mute) + opacity * colours[3 * level + 1];
    out.data[at + 2] = (1 - opacity) * (MUTED * b + mute) + opacity * colours[3 * level + 2];
  }
  return out;
}

/** Draw a map without a picture, one pixel per cell. @param {HTMLCanvasElement} canvas @param {Grid | null} map @param {Uint8Array} colours */
function drawCells(canvas, map, colours) {
  const [rows, columns] = map ? map.grid : [1, 1];
  canvas.width = columns;
  canvas.height = rows;
  if (!map) return;
  const image = new ImageData(columns, rows);
  stretch(map.values).forEach((value, i) => {
    const level = Math.round(255 * value);
    image.data.set([colours[3 * level], colours[3 * level + 1], colours[3 * level + 2], 255], 4 * i);
  });
  pen(canvas).putImageData(image, 0, 0);
}
