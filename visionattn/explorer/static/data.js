// The data of the page: facts as JSON, and the packed arrays of each image.

/** @typedef {{at: number, kind: "u1" | "i1" | "u2" | "i4" | "f4", shape: number[]}} Ref position, type and shape of an array in an image's pack */
/** @typedef {{levels: number, length: number, top: Ref, base: Ref, codes: Ref}} Rows see encoding.py */
/** @typedef {{low: number, high: number, codes: Ref}} Scaled a map in 256 levels */
/**
 * @typedef {object} Layer
 * @property {string} name
 * @property {number} heads
 * @property {[number, number]} grid rows and columns of the keys
 * @property {[number, number] | null} queryGrid
 * @property {string} asks label of the rows in `whole`: "class token", or "all patches, on average"
 * @property {boolean} chains whether rollout can multiply this layer with other layers
 * @property {number | null} classAt index of the class token among the keys
 * @property {Ref | null} queries cell of each query, window by window
 * @property {Ref} keys
 * @property {Rows[]} whole one row per window and head: first the weights of tokens on the grid, then of the other tokens
 * @property {Rows[] | null} rows one row per window, head and query
 */
/**
 * @typedef {object} Gate
 * @property {string} name
 * @property {"spatial" | "channel"} kind
 * @property {Scaled} [map]
 * @property {Ref} [weights]
 * @property {number[]} [channels] the strongest channels, in descending order
 * @property {Scaled[] | null} [features] feature maps of the strongest channels
 */
/** @typedef {{scores: number[], area: number}} Curve */
/**
 * @typedef {object} Heatmap
 * @property {string} name
 * @property {string} source
 * @property {boolean} control
 * @property {Scaled} map
 * @property {[number, number]} raw smallest and largest value of the method, before the map was scaled to [0, 1]
 * @property {{deletion?: Curve, insertion?: Curve}} curves
 * @property {Record<string, {better: string[], same: string[], worse: string[]}>} compared
 */
/**
 * @typedef {object} Glimpses
 * @property {[number, number][]} locations
 * @property {[number, number, number, number][][]} boxes
 * @property {string[][]} patches
 * @property {number[]} classes
 * @property {number[][]} probabilities
 */
/**
 * @typedef {object} Detections
 * @property {[number, number, number, number][]} boxes
 * @property {(string | number)[]} labels
 * @property {number[]} scores
 * @property {Scaled[]} maps
 * @property {string} shows what the maps show; "" if not known
 */
/**
 * @typedef {object} Picture
 * @property {string} name
 * @property {[number, number]} size width and height of the source
 * @property {[number, number]} shown width and height of the picture on the page
 * @property {string} source
 * @property {number[]} matrix affine map from pixels of the source to pixels of the model's input
 * @property {[number, number]} input width and height of the model's input
 * @property {[number, number][]} answer the most probable classes, each as [class, probability]
 * @property {Layer[]} attention
 * @property {Gate[]} gates
 * @property {Heatmap[]} heatmaps
 * @property {Record<string, string>} failed
 * @property {Glimpses | null} glimpses
 * @property {Detections | null} detections
 */
/** @typedef {{grid: [number, number], values: Float32Array}} Grid */

/** @type {{model: string, classes: Record<string, string>, colours: Record<string, string>, pictures: Picture[]}} */
const facts = JSON.parse(byId("facts").textContent || "");

/** @param {string} id */
function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element ${id}`);
  return found;
}

/** @param {string} text base64 */
function bytesOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** The unpacked arrays of one image. */
class Numbers {
  /** @param {ArrayBuffer} buffer */
  constructor(buffer) {
    this.buffer = buffer;
    /** @type {Map<Rows, Uint8Array>} */
    this.unpacked = new Map();
  }

  /** @param {number} image */
  static async of(image) {
    const packed = new Blob([bytesOf(byId(`numbers-${image}`).textContent || "")]);
    const stream = packed.stream().pipeThrough(new DecompressionStream("deflate"));
    return new Numbers(await new Response(stream).arrayBuffer());
  }

  /** @param {Ref} ref @returns {Uint8Array} */
  bytes(ref) {
    return new Uint8Array(this.buffer, ref.at);
  }

  /** @param {Ref} ref */
  integers(ref) {
    return new Int32Array(this.buffer.slice(ref.at, ref.at + 4 * count(ref)));
  }

  /** @param {Ref} ref */
  floats(ref) {
    return new Float32Array(this.buffer.slice(ref.at, ref.at + 4 * count(ref)));
  }

  /** @param {Scaled} map @returns {Grid} */
  map(map) {
    const codes = this.bytes(map.codes);
    const values = new Float32Array(count(map.codes));
    for (let i = 0; i < values.length; i++) values[i] = map.low + (codes[i] / 255) * (map.high - map.low);
    return { grid: [map.codes.shape[0], map.codes.shape[1]], values };
  }

  /** Decode one row: the values of all parts, one part after the other. @param {Rows[]} parts @param {number} row */
  row(parts, row) {
    const values = new Float32Array(parts.reduce((sum, { length }) => sum + length, 0));
    let at = 0;
    for (const part of parts) {
      const { levels, length } = part;
      const top = new DataView(this.buffer).getUint16(part.top.at + 2 * row, true);
      const high = top === 65535 ? 0 : 2 ** (-top / 2048);
      const low = (high * this.bytes(part.base)[row]) / 256;
      const step = (high - low) / (levels - 1);
      const codes = this.codes(part);
      for (let i = 0; i < length; i++) {
        values[at++] = low + codes[row * length + i] * step;
      }
    }
    return values;
  }

  /** Unpack all codes into one byte each. @param {Rows} rows @returns {Uint8Array} */
  codes(rows) {
    const packed = this.bytes(rows.codes);
    const each = together(rows.levels);
    if (each === 1) return packed;
    let codes = this.unpacked.get(rows);
    if (!codes) {
      codes = new Uint8Array(count(rows.codes) * each);
      for (let i = 0; i < codes.length; i += each) {
        for (let at = i, rest = packed[i / each]; at < i + each; at++) {
          codes[at] = rest % rows.levels;
          rest = Math.floor(rest / rows.levels);
        }
      }
      this.unpacked.set(rows, codes);
    }
    return codes;
  }
}

/** @param {Ref} ref */
function count(ref) {
  return ref.shape.reduce((product, side) => product * side, 1);
}

/** Return how many codes are packed into a byte. @param {number} levels */
function together(levels) {
  let each = 1;
  while (levels ** (each + 1) <= 256) each++;
  return each;
}

/** @param {number | string} index */
function className(index) {
  return typeof index === "string" ? index : facts.classes[index] ?? `class ${index}`;
}
