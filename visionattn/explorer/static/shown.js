// The map that each view shows, and the marks over the picture.

/**
 * @typedef {object} Shown
 * @property {Grid | null} map
 * @property {string} low @property {string} high ends of the scale
 * @property {string} shows what the colours are
 * @property {string} readout the text below the picture
 */

/** @type {Record<View, () => Shown>} */
const SHOWN = {
  attention: shownAttention,
  heatmaps: () => {
    const heatmap = chosenHeatmap();
    const readout = heatmap ? `${heatmap.name}: ${heatmap.source}` : "";
    if (!heatmap || heatmap.map.low === heatmap.map.high || !isStretched(...heatmap.raw)) return { ...scaled(heatmap?.map, "heat"), readout };
    return { ...scaled(heatmap.map, `heat, stretched (the method's values are ${heatmap.raw.map(brief).join(" to ")})`), readout };
  },
  gates: () => {
    const gate = picture().gates[state.gate];
    if (gate.kind === "spatial") return { ...scaled(gate.map, "gate", 1), readout: `Gate over positions of ${gate.name}` };
    const channel = gate.channels?.[state.channel];
    const readout = `Channel ${channel} of ${gate.name}, ${ordinal(state.channel)}strongest of ${gate.weights?.shape[0]}`;
    return { ...scaled(gate.features?.[state.channel], "feature"), readout: gate.features ? readout : `${readout}; its feature map was not found` };
  },
  glimpses: () => {
    const { locations, classes, probabilities } = must(picture().glimpses);
    const [x, y] = locations[state.step];
    const best = probabilities[state.step].indexOf(Math.max(...probabilities[state.step]));
    const readout = `Glimpse ${state.step + 1} of ${locations.length} at ${x.toFixed(0)}, ${y.toFixed(0)}; prediction: ${className(classes[best])} ${percent(probabilities[state.step][best])}`;
    return { map: null, low: "", high: "", shows: "", readout };
  },
  detections: () => {
    const { boxes, labels, scores, maps, shows } = must(picture().detections);
    if (!boxes.length) return { map: null, low: "", high: "", shows: "", readout: "The detector found no boxes in this image" };
    const readout = `Box ${state.box + 1} of ${boxes.length}: ${className(labels[state.box])} ${percent(scores[state.box])}`;
    return { ...scaled(maps[state.box], "attention"), readout: shows ? `${readout}; ${shows}` : readout };
  },
};

/** @returns {Shown} */
function shownAttention() {
  const layer = picture().attention[state.layer];
  const cell = state.hover ?? state.cell;
  const asked = layers.ask(state.layer, state.heads, cell);
  const query = cell === null ? capital(layer.asks) : `Patch ${where(cell, layer.queryGrid)}`;
  const how = `layer ${state.layer + 1}, ${headsName(state.heads)}`;
  if (!asked) return { map: null, low: "", high: "", shows: "", readout: `${query}, ${how}: this layer has no such query` };
  const { low, high } = bounds(asked.values);
  const itself = state.heads === "rollout" ? cell : null; // the patch's own cell, which holds the largest other value
  const most = asked.values.findIndex((value, at) => value === high && at !== itself);
  const rest = asked.elsewhere > 0.0005 ? `; ${percent(asked.elsewhere)} ${itself === null ? "" : "on itself and "}off the grid` : "";
  const readout = `${query}, ${how}: most on ${where(most, asked.grid)}, ${percent(high)}${rest}`;
  return { map: asked, low: percent(low), high: percent(high), shows: `of its attention${isStretched(low, high) ? `, stretched (the whole scale is 0 to ${percent(high)})` : ""}`, readout };
}

/** @param {Scaled | undefined} map @param {string} shows @param {number} [end] the largest value that is possible */
function scaled(map, shows, end) {
  if (!map) return { map: null, low: "", high: "", shows: "" };
  const whole = end !== undefined && isStretched(map.low, map.high, end) ? `, stretched (the whole scale is 0 to ${end})` : "";
  return { map: numbers.map(map), low: brief(map.low), high: brief(map.high), shows: shows + whole };
}

/**
 * Return whether the colours cover less than nine tenths of a scale that includes 0, so that small differences look large.
 * @param {number} low @param {number} high @param {number} [end] the largest value that is possible
 */
function isStretched(low, high, end = high) {
  return high - low < 0.9 * (Math.max(high, end) - Math.min(low, 0));
}

function chosenHeatmap() {
  return picture().heatmaps.find(({ name }) => name === state.heatmap);
}

/** @param {Heads} heads */
function headsName(heads) {
  if (typeof heads === "number") return `head ${heads + 1}`;
  return { mean: "mean of its heads", max: "largest of its heads", rollout: "rollout from layer 1" }[heads];
}

/** @param {number} cell @param {[number, number] | null} grid */
function where(cell, grid) {
  const columns = grid ? grid[1] : 1;
  return `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`;
}

/** @param {string} text */
function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

/** @param {number} place */
function ordinal(place) {
  return ["", "second ", "third "][place] ?? `${place + 1}th `;
}

/** @template T @param {T | null} value @returns {T} */
function must(value) {
  if (value === null) throw new Error("this image has no such data");
  return value;
}

/** @type {Record<View, () => Element[]>} */
const MARKS = {
  attention: () => {
    const grid = picture().attention[state.layer].queryGrid;
    const cells = [state.cell, state.hover].filter((cell) => cell !== null);
    if (!grid) return [];
    return [...new Set(cells)].flatMap((cell) => {
      const points = outline(cell, grid).map((point) => point.join(",")).join(" ");
      return [makeSvg("polygon", { class: "rim", points }), makeSvg("polygon", { class: "mark", points })];
    });
  },
  heatmaps: () => [],
  gates: () => [],
  glimpses: () => {
    const { locations, boxes } = must(picture().glimpses);
    const path = locations.slice(0, state.step + 1).map((point) => point.join(",")).join(" ");
    const radius = Math.max(...picture().size) / 110;
    const dots = locations.slice(0, state.step + 1).flatMap(([cx, cy], at) => {
      const dot = { cx, cy, r: at === state.step ? 1.5 * radius : radius };
      return [makeSvg("circle", { class: at === state.step ? "dot now" : "dot", ...dot })];
    });
    const seen = boxes[state.step].flatMap((box) => [rectangle(box, "rim"), rectangle(box, "mark")]);
    return [...seen, makeSvg("polyline", { class: "rim", points: path }), makeSvg("polyline", { class: "mark", points: path }), ...dots];
  },
  detections: () => {
    const { boxes, labels, scores } = must(picture().detections);
    return boxes.flatMap((box, at) => {
      const rim = rectangle(box, "rim");
      const mark = rectangle(box, at === state.box ? "mark box chosen" : "mark box");
      give(mark, { tabindex: 0, role: "button", "aria-pressed": String(at === state.box), "aria-label": `${className(labels[at])} ${percent(scores[at])}` });
      const take = () => takeBox(at);
      mark.addEventListener("click", take);
      mark.addEventListener("keydown", (event) => {
        if (!["Enter", " "].includes(/** @type {KeyboardEvent} */ (event).key)) return;
        event.preventDefault();
        take();
        requestAnimationFrame(() => /** @type {HTMLElement | undefined} */ (marks.querySelectorAll(".box")[at])?.focus());
      });
      return [rim, mark];
    });
  },
};

/** @param {[number, number, number, number]} box @param {string} kind */
function rectangle([left, top, right, bottom], kind) {
  return makeSvg("rect", { class: kind, x: left, y: top, width: right - left, height: bottom - top });
}

/** Return the corners of a cell in pixels of the source. @param {number} cell @param {[number, number]} grid */
function outline(cell, [rows, columns]) {
  const [row, column] = [Math.floor(cell / columns), cell % columns];
  const [a, b, left, c, d, top] = picture().matrix;
  const [width, height] = picture().input;
  return [[column, row], [column + 1, row], [column + 1, row + 1], [column, row + 1]].map(([x, y]) => {
    const u = (x / columns) * width - left, v = (y / rows) * height - top;
    const area = a * d - b * c;
    return [(d * u - b * v) / area, (a * v - c * u) / area];
  });
}
