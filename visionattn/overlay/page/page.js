// The page: what is chosen, and what that shows.

/** @typedef {"attention" | "heatmaps" | "gates" | "glimpses" | "detections"} View */
/**
 * @typedef {object} Shown
 * @property {Grid | null} map
 * @property {string} low @property {string} high ends of the scale
 * @property {string} shows what the colours are
 * @property {string} told the line below
 */

/** @type {Record<View, string>} */
const TITLES = { attention: "Attention", heatmaps: "Heatmaps", gates: "Gates", glimpses: "Path", detections: "Boxes" };
const KEYS = {
  attention: "On the picture: click a patch, or move by arrow keys, to see what it attends to; Escape asks for the whole image again.",
  heatmaps: "Choose a method to see its heatmap; its curves tell whether the model's answer follows it.",
  gates: "Choose a gate, and in a gate over channels one of its strongest feature maps.",
  glimpses: "Left and right arrow keys on the picture go from glimpse to glimpse.",
  detections: "Click a box, or reach it by Tab and press Enter, to see its map.",
};

const state = {
  image: 0,
  /** @type {View} */ view: "attention",
  layer: 0,
  /** @type {Heads} */ heads: "mean",
  /** @type {number | null} */ cell: null,
  /** @type {number | null} */ hover: null,
  heatmap: "",
  gate: 0,
  channel: 0,
  step: 0,
  box: 0,
};

const canvas = /** @type {HTMLCanvasElement} */ (byId("picture"));
const marks = /** @type {Element & {focus: () => void}} */ (byId("marks"));
const panel = byId("panel");
/** @type {Layers} */ let layers;
/** @type {Numbers} */ let numbers;
/** @type {ImageData} */ let base;
/** @type {(() => void)[]} */ let onChange = [];
/** @type {number | undefined} */ let playing;
let frame = 0;

/** @returns {Picture} */
function picture() {
  return facts.pictures[state.image];
}

/** @returns {View[]} */
function views() {
  const all = /** @type {View[]} */ (Object.keys(TITLES));
  return all.filter((view) => (Array.isArray(picture()[view]) ? /** @type {unknown[]} */ (picture()[view]).length > 0 : picture()[view]));
}

// Choosing ------------------------------------------------------------------------------------------------------------

/** @param {number} image */
async function open(image) {
  stop();
  const [opened, drawn] = await Promise.all([Numbers.of(image), decoded(facts.pictures[image])]);
  numbers = opened;
  base = drawn;
  const before = picture();
  state.image = image;
  layers = new Layers(picture().attention, numbers);
  const kept = picture().attention.length === before.attention.length && document.body.dataset.ready;
  if (!kept) Object.assign(state, { layer: Math.max(0, picture().attention.length - 1), heads: "mean", cell: null });
  if (state.cell !== null && !cellsMatch(before)) state.cell = null;
  state.hover = null;
  state.step = 0;
  state.box = 0;
  if (state.gate >= picture().gates.length) state.gate = Math.max(0, picture().gates.length - 1);
  if (!picture().heatmaps.some(({ name }) => name === state.heatmap)) state.heatmap = picture().heatmaps[0]?.name ?? "";
  byId("name").textContent = `${picture().name} \u00b7 ${picture().size.join(" \u00d7 ")}`;
  byId("box").style.setProperty("--ratio", String(picture().shown[0] / picture().shown[1]));
  give(marks, { viewBox: `0 0 ${picture().size.join(" ")}` });
  [canvas.width, canvas.height] = picture().shown;
  if (!views().includes(state.view)) state.view = views()[0];
  showAnswer();
  showViews();
  byId("film").querySelectorAll("button").forEach((button, at) => {
    give(button, { "aria-current": at === image ? "true" : false, tabindex: at === image ? 0 : -1 });
  });
  show(state.view);
  document.body.dataset.ready = String(image);
}

/** Whether the chosen patch means the same in this image. @param {Picture} before */
function cellsMatch(before) {
  const grids = [before, picture()].map(({ attention }) => String(attention[state.layer]?.queryGrid));
  return grids[0] === grids[1];
}

/** The pixels of a picture. @param {Picture} one */
async function decoded(one) {
  const image = new Image();
  image.src = one.source;
  await image.decode();
  const sheet = make("canvas", { width: one.shown[0], height: one.shown[1] });
  pen(sheet).drawImage(image, 0, 0, ...one.shown);
  return pen(sheet).getImageData(0, 0, ...one.shown);
}

/** @param {View} view */
function show(view) {
  stop();
  state.view = view;
  onChange = [];
  panel.replaceChildren(...PANELS[view]());
  byId("keys").textContent = KEYS[view];
  give(marks, { "aria-label": `${picture().name}: ${TITLES[view]}`, tabindex: view === "attention" || view === "glimpses" ? 0 : -1 });
  changed();
}

/** Draw anew, once a frame. */
function changed() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(draw);
}

function draw() {
  const shown = SHOWN[state.view]();
  const colours = ramp(/** @type {HTMLSelectElement} */ (byId("colours")).value);
  const alpha = Number(/** @type {HTMLInputElement} */ (byId("opacity")).value) / 100;
  const smooth = /** @type {HTMLInputElement} */ (byId("smooth")).checked;
  const heat = shown.map && carry(picture(), { grid: shown.map.grid, values: stretch(shown.map.values) }, smooth);
  pen(canvas).putImageData(blend(base, heat, colours, alpha), 0, 0);
  give(canvas, { "aria-label": `${picture().name}. ${shown.told}` });
  byId("low").textContent = shown.low;
  byId("high").textContent = shown.high;
  byId("shows").textContent = shown.shows;
  give(byId("legend"), { class: shown.map ? "" : "empty" });
  drawRamp(colours);
  byId("readout").textContent = shown.told;
  marks.replaceChildren(...MARKS[state.view]());
  for (const update of onChange) update();
}

/** @param {Uint8Array} colours */
function drawRamp(colours) {
  const image = new ImageData(256, 1);
  for (let level = 0; level < 256; level++) image.data.set([...colours.slice(3 * level, 3 * level + 3), 255], 4 * level);
  pen(/** @type {HTMLCanvasElement} */ (byId("ramp"))).putImageData(image, 0, 0);
}

// What is shown -------------------------------------------------------------------------------------------------------

/** @type {Record<View, () => Shown>} */
const SHOWN = {
  attention: shownAttention,
  heatmaps: () => {
    const heatmap = chosenHeatmap();
    return { ...scaled(heatmap?.map, "heat"), told: heatmap ? `${heatmap.name}: ${heatmap.source}` : "" };
  },
  gates: () => {
    const gate = picture().gates[state.gate];
    if (gate.kind === "spatial") return { ...scaled(gate.map, "gate"), told: `Gate over positions of ${gate.name}` };
    const channel = gate.channels?.[state.channel];
    const told = `Channel ${channel} of ${gate.name}, ${ordinal(state.channel)} most open of ${gate.weights?.shape[0]}`;
    return { ...scaled(gate.features?.[state.channel], "feature"), told: gate.features ? told : `${told}; its feature map was not found` };
  },
  glimpses: () => {
    const { locations, classes, probabilities } = must(picture().glimpses);
    const [x, y] = locations[state.step];
    const best = probabilities[state.step].indexOf(Math.max(...probabilities[state.step]));
    const told = `Glimpse ${state.step + 1} of ${locations.length} at ${x.toFixed(0)}, ${y.toFixed(0)}; after it ${className(classes[best])} ${percent(probabilities[state.step][best])}`;
    return { map: null, low: "", high: "", shows: "", told };
  },
  detections: () => {
    const { boxes, labels, scores, maps } = must(picture().detections);
    if (!boxes.length) return { map: null, low: "", high: "", shows: "", told: "Nothing was found in this image" };
    return { ...scaled(maps[state.box], "attention"), told: `Box ${state.box + 1} of ${boxes.length}: ${className(labels[state.box])} ${percent(scores[state.box])}` };
  },
};

/** @returns {Shown} */
function shownAttention() {
  const layer = picture().attention[state.layer];
  const cell = state.hover ?? state.cell;
  const asked = layers.ask(state.layer, state.heads, cell);
  const who = cell === null ? capital(layer.asks) : `Patch ${where(cell, layer.queryGrid)}`;
  const how = `layer ${state.layer + 1}, ${headsName(state.heads)}`;
  if (!asked) return { map: null, low: "", high: "", shows: "", told: `${who}, ${how}: does not ask here` };
  const { low, high } = bounds(asked.values);
  const most = asked.values.indexOf(high);
  const rest = asked.elsewhere > 0.0005 ? `; ${percent(asked.elsewhere)} off the grid` : "";
  const told = `${who}, ${how}: most on ${where(most, asked.grid)}, ${percent(high)}${rest}`;
  return { map: asked, low: percent(low), high: percent(high), shows: "of its attention", told };
}

/** @param {Scaled | undefined} map @param {string} shows */
function scaled(map, shows) {
  if (!map) return { map: null, low: "", high: "", shows: "" };
  return { map: numbers.map(map), low: brief(map.low), high: brief(map.high), shows };
}

function chosenHeatmap() {
  return picture().heatmaps.find(({ name }) => name === state.heatmap);
}

/** @param {Heads} heads */
function headsName(heads) {
  if (typeof heads === "number") return `head ${heads + 1}`;
  return { mean: "mean of its heads", max: "largest of its heads", rollout: "rolled out from the first" }[heads];
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
  if (value === null) throw new Error("this image has none");
  return value;
}

// What lies over the picture ------------------------------------------------------------------------------------------

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

/** Corners of a cell in pixels of the source. @param {number} cell @param {[number, number]} grid */
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

/** The patch below the pointer, if the model saw one there. @param {MouseEvent} event */
function cellAt(event) {
  const grid = state.view === "attention" && picture().attention[state.layer].queryGrid;
  if (!grid) return null;
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const [x, y] = [((event.clientX - left) / width) * canvas.width, ((event.clientY - top) / height) * canvas.height];
  const [row, column] = placer(picture(), grid)(x, y).map(Math.floor);
  return row >= 0 && column >= 0 && row < grid[0] && column < grid[1] ? row * grid[1] + column : null;
}

/** @param {string} key @returns {boolean} whether it meant something */
function pressed(key) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const move = moves[/** @type {keyof typeof moves} */ (key)];
  if (state.view === "glimpses" && move) {
    stop();
    takeStep(state.step + move[0] + move[1]);
    return true;
  }
  const grid = state.view === "attention" && picture().attention[state.layer].queryGrid;
  if (!grid) return false;
  if (key === "Escape") takeCell(null);
  else if (move && state.cell === null) takeCell(Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2));
  else if (move && state.cell !== null) {
    const row = Math.floor(state.cell / grid[1]) + move[0], column = (state.cell % grid[1]) + move[1];
    takeCell(Math.min(Math.max(row, 0), grid[0] - 1) * grid[1] + Math.min(Math.max(column, 0), grid[1] - 1));
  } else return false;
  return true;
}

/** @param {number | null} cell */
function takeCell(cell) {
  state.cell = cell;
  state.hover = null;
  changed();
}

/** @param {number} step */
function takeStep(step) {
  state.step = Math.min(Math.max(step, 0), must(picture().glimpses).locations.length - 1);
  changed();
}

/** @param {number} box */
function takeBox(box) {
  state.box = box;
  changed();
}

function stop() {
  clearInterval(playing);
  playing = undefined;
}

// Panels --------------------------------------------------------------------------------------------------------------

/** @type {Record<View, () => (Node | string)[]>} */
const PANELS = {
  attention: panelAttention,
  heatmaps: panelHeatmaps,
  gates: panelGates,
  glimpses: panelGlimpses,
  detections: panelDetections,
};

function panelAttention() {
  const all = picture().attention;
  const slider = make("input", { type: "range", min: 1, max: all.length, value: state.layer + 1, "aria-label": "Layer" });
  const name = make("output", {});
  const select = make("select", { "aria-label": "Heads" });
  const whole = make("button", { type: "button", class: "whole" }, capital(all[0].asks));
  const grid = make("div", { id: "heads", role: "group", "aria-label": "All layers and heads" });
  const below = make("div", {});
  const chains = all.map((_, at) => layers.chain(at));
  const most = Math.max(...all.map(({ heads }) => heads));
  /** @type {Heads[]} */
  const columns = ["mean", ...(chains.some(Boolean) ? /** @type {Heads[]} */ (["rollout"]) : []), ...Array(most).keys()];
  grid.style.setProperty("--columns", String(columns.length));
  grid.append(make("span", {}), ...columns.map((heads) => make("span", { class: "head" }, typeof heads === "number" ? String(heads + 1) : heads)));
  /** @type {[number, Heads, HTMLButtonElement, HTMLCanvasElement][]} */
  const cells = [];
  all.forEach((layer, at) => {
    grid.append(make("span", { class: "layer" }, String(at + 1)));
    columns.forEach((heads) => {
      const missing = typeof heads === "number" ? heads >= layer.heads : heads === "rollout" && !chains[at];
      const small = make("canvas", { "aria-hidden": "true" });
      const label = `Layer ${at + 1}, ${headsName(heads)}`;
      const button = make("button", { type: "button", "aria-label": label, title: label, disabled: missing }, small);
      button.addEventListener("click", () => takeHeads(at, heads));
      if (!missing) cells.push([at, heads, button, small]);
      grid.append(button);
    });
  });
  rove(grid, () => columns.length);
  slider.addEventListener("input", () => takeHeads(Number(slider.value) - 1, state.heads));
  select.addEventListener("change", () => takeHeads(state.layer, select.value.match(/^\d+$/) ? Number(select.value) : /** @type {Heads} */ (select.value)));
  whole.addEventListener("click", () => takeCell(null));
  onChange.push(() => {
    const layer = all[state.layer];
    const colours = ramp(/** @type {HTMLSelectElement} */ (byId("colours")).value);
    const cell = state.hover ?? state.cell;
    slider.value = String(state.layer + 1);
    name.textContent = `${state.layer + 1} of ${all.length} \u00b7 ${layer.name}`;
    /** @type {Heads[]} */
    const names = ["mean", "max", ...(chains[state.layer] ? /** @type {Heads[]} */ (["rollout"]) : []), ...Array(layer.heads).keys()];
    select.replaceChildren(...names.map((heads) => make("option", { value: heads, selected: heads === state.heads }, headsName(heads))));
    give(whole, { "aria-pressed": String(cell === null) });
    whole.textContent = capital(layer.asks);
    for (const [at, heads, button, small] of cells) {
      drawCells(small, layers.ask(at, heads, cellIn(at, cell)), colours);
      const chosen = at === state.layer && heads === state.heads;
      give(button, { "aria-pressed": String(chosen) });
      if (chosen) stopAt(grid, button);
    }
    const method = state.heads === "rollout" ? "rollout" : "raw"; // of the last layer, asked by the class token
    const heatmap = picture().heatmaps.find(({ name }) => name === method);
    if (below.dataset.of === method) return;
    below.dataset.of = method;
    below.replaceChildren(...(heatmap ? [verdict(heatmap, picture().heatmaps)] : []));
  });
  return [
    make("div", { class: "row" }, make("label", { class: "grow" }, "Layer ", slider), name),
    make("div", { class: "row" }, make("span", { class: "grow" }, select), whole),
    grid,
    below,
  ];
}

/** The patch of another layer at the same place. @param {number} at layer @param {number | null} cell of the chosen layer */
function cellIn(at, cell) {
  const [mine, theirs] = [picture().attention[state.layer].queryGrid, picture().attention[at].queryGrid];
  if (cell === null || !mine || !theirs) return cell;
  const row = Math.floor(((Math.floor(cell / mine[1]) + 0.5) / mine[0]) * theirs[0]);
  return row * theirs[1] + Math.floor((((cell % mine[1]) + 0.5) / mine[1]) * theirs[1]);
}

/** @param {number} layer @param {Heads} heads */
function takeHeads(layer, heads) {
  state.cell = cellIn(layer, state.cell);
  state.layer = layer;
  const has = typeof heads === "number" ? heads < picture().attention[layer].heads : heads !== "rollout" || layers.chain(layer);
  state.heads = has ? heads : "mean";
  changed();
}

function panelHeatmaps() {
  const all = picture().heatmaps;
  const scored = all.some(({ curves }) => curves.deletion);
  const below = make("div", {});
  const rows = all.map((heatmap) => {
    const lost = Object.keys(heatmap.unbeaten);
    const mark = heatmap.control || !scored ? "" : lost.length ? "\u2717" : "\u2713";
    const told = lost.length ? "does not beat the controls" : "beats the controls";
    const figures = ["deletion", "insertion"].map((figure) => {
      const area = heatmap.curves[/** @type {"deletion" | "insertion"} */ (figure)]?.area;
      return make("span", { class: lost.includes(figure) ? "number lost" : "number" }, area === undefined ? "" : area.toFixed(2));
    });
    const sign = make("span", { class: lost.length ? "sign lost" : "sign", ...(mark ? { title: told, role: "img", "aria-label": told } : {}) }, mark);
    const content = [sign, make("span", { class: heatmap.control ? "name control" : "name" }, heatmap.name), ...(scored ? figures : [])];
    return /** @type {[string, (Node | string)[]]} */ ([heatmap.name, content]);
  });
  const list = choices("heatmap", "Method", rows, state.heatmap, (name) => {
    state.heatmap = name;
    changed();
  });
  const head = make("p", { class: "heading", "aria-hidden": "true" }, make("span", { class: "name" }, ""), make("span", { class: "number" }, "del. \u2193"), make("span", { class: "number" }, "ins. \u2191"));
  const failed = Object.entries(picture().failed).map(([name, why]) => make("p", { class: "note" }, `${name} is not shown: ${why}`));
  onChange.push(() => {
    const heatmap = chosenHeatmap();
    below.replaceChildren(...(heatmap ? [verdict(heatmap, all)] : []));
  });
  return [...(scored ? [head] : []), list, below, ...failed];
}

function panelGates() {
  const below = make("div", {});
  const rows = picture().gates.map((gate, at) => {
    const small = make("canvas", { "aria-hidden": "true", class: "thumb" });
    if (gate.map) drawCells(small, numbers.map(gate.map), ramp("inferno"));
    const kind = gate.kind === "spatial" ? "over positions" : `over ${gate.weights?.shape[0]} channels`;
    return /** @type {[number, (Node | string)[]]} */ ([at, [make("span", { class: "name" }, gate.name), make("small", {}, kind), gate.map ? small : ""]]);
  });
  const list = choices("gate", "Gate", rows, state.gate, (at) => {
    state.gate = at;
    state.channel = 0;
    fill();
    changed();
  });
  const fill = () => below.replaceChildren(...panelChannels(picture().gates[state.gate]));
  fill();
  return [list, below];
}

/** The strongest channels of a gate as bars, and all of them as a line. @param {Gate} gate */
function panelChannels(gate) {
  if (gate.kind !== "channel" || !gate.weights || !gate.channels) return [];
  const weights = numbers.floats(gate.weights);
  const { low, high } = bounds(weights);
  const rows = gate.channels.map((channel, at) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", String(weights[channel] / Math.max(high, 1)));
    const small = make("canvas", { "aria-hidden": "true", class: "thumb" });
    if (gate.features) drawCells(small, numbers.map(gate.features[at]), ramp("inferno"));
    return /** @type {[number, (Node | string)[]]} */ ([at, [make("span", { class: "name" }, `channel ${channel}`), bar, make("span", { class: "number" }, weights[channel].toFixed(3)), gate.features ? small : ""]]);
  });
  const sorted = [...weights].sort((a, b) => b - a);
  const top = Math.max(high, 1);
  const svg = makeSvg("svg", { class: "ranked", viewBox: "0 0 300 48", preserveAspectRatio: "none", role: "img", "aria-label": `Weights of all ${weights.length} channels, from ${brief(high)} to ${brief(low)}` });
  const points = sorted.map((weight, i) => `${((300 * i) / Math.max(1, sorted.length - 1)).toFixed(1)},${(48 * (1 - weight / top)).toFixed(1)}`);
  svg.append(makeSvg("polygon", { points: `0,48 ${points.join(" ")} 300,48` }));
  return [
    make("h2", {}, "Strongest channels"),
    choices("channel", "Channel", rows, state.channel, (at) => {
      state.channel = at;
      changed();
    }),
    svg,
    make("p", { class: "note" }, `All ${weights.length} weights, ranked: ${brief(high)} to ${brief(low)}`),
  ];
}

function panelGlimpses() {
  const { locations, patches, classes, probabilities } = must(picture().glimpses);
  const play = make("button", { type: "button" }, "Play");
  const [back, on] = ["\u2039", "\u203a"].map((sign, at) => make("button", { type: "button", "aria-label": at ? "Next glimpse" : "Previous glimpse" }, sign));
  const slider = make("input", { type: "range", min: 1, max: locations.length, value: state.step + 1, "aria-label": "Glimpse" });
  const sees = make("div", { class: "patches" });
  const belief = make("div", {});
  play.addEventListener("click", () => {
    if (playing !== undefined) stop();
    else {
      if (state.step === locations.length - 1) state.step = -1;
      takeStep(state.step + 1);
      playing = setInterval(() => (state.step < locations.length - 1 ? takeStep(state.step + 1) : (stop(), changed())), 700);
    }
    changed();
  });
  back.addEventListener("click", () => (stop(), takeStep(state.step - 1)));
  on.addEventListener("click", () => (stop(), takeStep(state.step + 1)));
  slider.addEventListener("input", () => (stop(), takeStep(Number(slider.value) - 1)));
  onChange.push(() => {
    play.textContent = playing === undefined ? "Play" : "Pause";
    slider.value = String(state.step + 1);
    give(back, { disabled: state.step === 0 });
    give(on, { disabled: state.step === locations.length - 1 });
    sees.replaceChildren(...patches[state.step].map((source, scale) => make("img", { src: source, alt: `What glimpse ${state.step + 1} saw, scale ${scale + 1}` })));
    belief.replaceChildren(bars(classes.map((index, at) => [className(index), probabilities[state.step][at]]), "Belief after this glimpse"));
  });
  return [
    make("div", { class: "row" }, play, back, on, make("span", { class: "grow" }, slider)),
    make("h2", {}, "What it saw"), sees,
    make("h2", {}, "What it believed then"), belief,
  ];
}

function panelDetections() {
  const { labels, scores } = must(picture().detections);
  const rows = labels.map((label, at) => /** @type {[number, (Node | string)[]]} */ ([at, [make("span", { class: "name" }, className(label)), make("span", { class: "number" }, percent(scores[at]))]]));
  const list = choices("box", "Box", rows, state.box, takeBox);
  onChange.push(() => list.querySelectorAll("input").forEach((input, at) => (input.checked = at === state.box)));
  return [list];
}

// Around it -----------------------------------------------------------------------------------------------------------

function showAnswer() {
  const { answer } = picture();
  byId("answer").replaceChildren(...(answer.length ? [bars(answer.map(([index, share]) => [className(index), share]), "Likeliest classes")] : []));
}

function showViews() {
  const set = byId("views");
  set.querySelectorAll("label").forEach((label) => label.remove());
  for (const view of views()) {
    const input = make("input", { type: "radio", name: "view", value: view, checked: view === state.view });
    input.addEventListener("change", () => show(view));
    set.append(make("label", {}, input, make("span", {}, TITLES[view])));
  }
  give(set, { hidden: views().length < 2 });
}

function precision() {
  const levels = facts.pictures.flatMap(({ attention }) => attention.map(({ rows }) => rows?.[0].levels ?? 256));
  const parts = ["Pictures have at most 640 pixels a side; heatmaps and gates 256 levels."];
  if (levels.length) {
    const off = percent(0.5 / (Math.min(...levels) - 1));
    parts.unshift(`Each patch's weights are rounded to ${Math.min(...levels)} levels, off by at most ${off} of what its row spans; the whole image's rows have 256.`);
  }
  return parts.join(" ");
}

function build() {
  document.title = `${facts.model || "Images"} \u00b7 visionattn explore`;
  byId("model").textContent = facts.model || "Images";
  byId("precision").textContent = precision();
  byId("colours").append(...Object.keys(facts.colours).map((name) => make("option", {}, name)));
  for (const id of ["opacity", "colours", "smooth"]) byId(id).addEventListener("input", changed);
  const film = byId("film");
  facts.pictures.forEach((one, at) => {
    const button = make("button", { type: "button", title: one.name }, make("img", { src: one.source, alt: one.name, decoding: "async" }));
    button.addEventListener("click", () => open(at));
    film.append(button);
  });
  rove(film, () => 1);
  give(film, { hidden: facts.pictures.length < 2 });
  marks.addEventListener("pointermove", (event) => {
    const cell = /** @type {PointerEvent} */ (event).pointerType === "mouse" ? cellAt(/** @type {PointerEvent} */ (event)) : null;
    if (cell === state.hover) return;
    state.hover = cell;
    changed();
  });
  marks.addEventListener("pointerleave", () => {
    if (state.hover === null) return;
    state.hover = null;
    changed();
  });
  marks.addEventListener("click", (event) => {
    const cell = cellAt(/** @type {MouseEvent} */ (event));
    if (state.view === "attention") takeCell(cell === state.cell ? null : cell);
  });
  marks.addEventListener("keydown", (event) => {
    if (pressed(/** @type {KeyboardEvent} */ (event).key)) event.preventDefault();
  });
  open(0);
}

build();
