// Attention maps, computed from rows of weights: of one head, of several heads together, or by rollout over layers.

/** @typedef {number | "mean" | "max" | "rollout"} Heads */
/** @typedef {Grid & {elsewhere: number}} Asked `elsewhere` is the fraction of attention on tokens without a position */

class Layers {
  /** @param {Layer[]} layers @param {Numbers} numbers */
  constructor(layers, numbers) {
    this.layers = layers;
    this.numbers = numbers;
    this.keys = layers.map((layer) => numbers.integers(layer.keys));
    this.queries = layers.map((layer) => layer.queries && numbers.integers(layer.queries));
    /** @type {(Float32Array[] | undefined)[]} */
    this.means = [];
  }

  /** Return whether layers 0 … last can be multiplied. @param {number} last */
  chain(last) {
    const some = this.layers.slice(0, last + 1);
    return some.every((layer, at) => layer.chains && this.keys[at].length === this.keys[0].length);
  }

  /** Find the queries of a patch: window, and index in the window. @param {number} at layer @param {number} cell */
  places(at, cell) {
    const queries = this.queries[at];
    if (!queries) return [];
    const each = (this.layers[at].queries?.shape ?? [1, 1])[1];
    /** @type {[number, number][]} */
    const found = [];
    queries.forEach((place, i) => {
      if (place === cell) found.push([Math.floor(i / each), i % each]);
    });
    return found;
  }

  /**
   * Return the attention of a patch, or the rows in `whole`, in a layer; null if the layer has no such query.
   * @param {number} at layer
   * @param {Heads} heads
   * @param {number | null} cell the patch; null for the rows in `whole`
   * @returns {Asked | null}
   */
  ask(at, heads, cell) {
    if (heads === "rollout") return this.rollout(at, cell);
    const layer = this.layers[at];
    const windows = layer.keys.shape[0];
    const queries = layer.queries ? layer.queries.shape[1] : 1;
    const some = typeof heads === "number" ? [heads] : [...Array(layer.heads).keys()];
    const places = cell === null ? null : this.places(at, cell);
    if (places && (!layer.rows || places.length === 0)) return null;
    const onto = new Onto(layer.grid);
    for (let window = 0; window < windows; window++) {
      const inside = places && places.filter(([where]) => where === window);
      if (inside && inside.length === 0) continue;
      const rows = some.map((head) => {
        const first = window * layer.heads + head;
        if (!inside || !layer.rows) return this.numbers.row(layer.whole, first);
        const rows = layer.rows;
        return average(inside.map(([, query]) => this.numbers.row(rows, first * queries + query)));
      });
      onto.put(heads === "max" ? largest(rows) : average(rows), this.keys[at], window);
    }
    return onto.done();
  }

  /**
   * Return the row of (A_last + I) / 2 … (A_0 + I) / 2, heads averaged (Abnar & Zuidema 2020). The weight of a patch on
   * itself is much larger than all other weights. So this weight is added to `elsewhere`, and the patch's own cell gets
   * the largest of the other weights.
   * @param {number} last @param {number | null} cell
   * @returns {Asked | null}
   */
  rollout(last, cell) {
    if (!this.chain(last)) return null;
    const keys = this.keys[last];
    const { classAt, grid } = this.layers[last];
    let row = new Float32Array(keys.length);
    if (cell !== null) row[keys.indexOf(cell)] = 1;
    else if (classAt !== null) row[classAt] = 1;
    else keys.forEach((place, i) => (row[i] = place < 0 ? 0 : 1 / (grid[0] * grid[1])));
    for (let at = last; at >= 0; at--) {
      const mean = this.mean(at);
      const next = row.map((value) => value / 2);
      for (let q = 0; q < row.length; q++) {
        if (row[q] === 0) continue;
        for (let k = 0; k < next.length; k++) next[k] += (row[q] / 2) * mean[q][k];
      }
      row = next;
    }
    const onto = new Onto(grid);
    onto.put(row, keys, 0);
    if (cell !== null) {
      onto.elsewhere += onto.values[cell];
      onto.values[cell] = 0;
      onto.values[cell] = bounds(onto.values).high;
    }
    return onto.done();
  }

  /** Return all rows of a layer, averaged over heads and scaled to sum to one. @param {number} at */
  mean(at) {
    return (this.means[at] ??= [...Array(this.keys[at].length).keys()].map((query) => {
      const { heads, rows } = this.layers[at];
      if (!rows) throw new Error("no rows");
      const queries = this.keys[at].length;
      const row = average([...Array(heads).keys()].map((head) => this.numbers.row(rows, head * queries + query)));
      const sum = row.reduce((total, value) => total + value, 0) || 1;
      return row.map((value) => value / sum);
    }));
  }
}

/** A grid that collects rows, window by window; a cell with several values holds their mean. */
class Onto {
  /** @param {[number, number]} grid */
  constructor(grid) {
    this.grid = grid;
    this.values = new Float32Array(grid[0] * grid[1]);
    this.times = new Uint16Array(this.values.length);
    this.elsewhere = 0;
  }

  /** @param {Float32Array} row @param {Int32Array} keys of all windows @param {number} window */
  put(row, keys, window) {
    for (let i = 0; i < row.length; i++) {
      const cell = keys[window * row.length + i];
      if (cell < 0) this.elsewhere += row[i];
      else {
        this.values[cell] += row[i];
        this.times[cell]++;
      }
    }
  }

  /** @returns {Asked} */
  done() {
    const values = this.values.map((value, cell) => (this.times[cell] > 1 ? value / this.times[cell] : value));
    return { grid: this.grid, values, elsewhere: this.elsewhere };
  }
}

/** @param {Float32Array[]} rows */
function average(rows) {
  if (rows.length === 1) return rows[0];
  return rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
}

/** @param {Float32Array[]} rows */
function largest(rows) {
  return rows[0].map((_, i) => Math.max(...rows.map((row) => row[i])));
}
