// The controls of each view, beside the picture.

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
    const method = state.heads === "rollout" ? "rollout" : "raw"; // `raw` shows the class token's row of the last layer
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

/** Return the patch at the same position in another layer. @param {number} at layer @param {number | null} cell of the chosen layer */
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
    const lost = Object.keys(heatmap.compared).filter((metric) => heatmap.compared[metric].worse.length);
    const areas = ["deletion", "insertion"].map((metric) => {
      const area = heatmap.curves[/** @type {"deletion" | "insertion"} */ (metric)]?.area;
      return make("span", { class: lost.includes(metric) ? "number lost" : "number" }, area === undefined ? "" : brief(area));
    });
    const content = [make("span", { class: heatmap.control ? "name control" : "name" }, heatmap.name), ...(scored ? areas : [])];
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
    return /** @type {[number, (Node | string)[]]} */ ([at, [make("span", { class: "name whole" }, gate.name), make("small", {}, kind), gate.map ? small : ""]]);
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

/** Draw the strongest channels of a gate as bars, and all channels as a line. @param {Gate} gate */
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
    belief.replaceChildren(bars(classes.map((index, at) => [className(index), probabilities[state.step][at]]), "Most probable classes after this glimpse"));
  });
  return [
    make("div", { class: "row" }, play, back, on, make("span", { class: "grow" }, slider)),
    make("h2", {}, "Patches of this glimpse"), sees,
    make("h2", {}, "Probabilities after this glimpse"), belief,
  ];
}

function panelDetections() {
  const { labels, scores } = must(picture().detections);
  const rows = labels.map((label, at) => /** @type {[number, (Node | string)[]]} */ ([at, [make("span", { class: "name whole" }, className(label)), make("span", { class: "number" }, percent(scores[at]))]]));
  const list = choices("box", "Box", rows, state.box, takeBox);
  onChange.push(() => list.querySelectorAll("input").forEach((input, at) => (input.checked = at === state.box)));
  return [list];
}
