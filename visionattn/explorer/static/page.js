// The state of the page (the user's choices), and the events that change this state.

/** @typedef {"attention" | "heatmaps" | "gates" | "glimpses" | "detections"} View */
/** @type {Record<View, string>} */
const TITLES = { attention: "Attention", heatmaps: "Heatmaps", gates: "Gates", glimpses: "Path", detections: "Boxes" };
const KEYS = {
  attention: "Click a patch of the picture, or choose one with the arrow keys, to see what the patch attends to. Escape returns to the whole image.",
  heatmaps: "Choose a method to see its heatmap. The curves show whether the model's answer depends on the hottest pixels.",
  gates: "Choose a gate. For a gate over channels, also choose one of the strongest feature maps.",
  glimpses: "When the picture has the focus, the left and right arrow keys go from glimpse to glimpse.",
  detections: "Click a box, or select the box by Tab and Enter, to see its map.",
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
let turns = 0;

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
async function turnTo(image) {
  stop();
  const turn = ++turns;
  const [opened, drawn] = await Promise.all([Numbers.of(image), decoded(facts.pictures[image])]);
  if (turn !== turns) return; // another image was chosen in the meantime
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

/** Return whether the chosen patch exists in this image too. @param {Picture} before */
function cellsMatch(before) {
  const grids = [before, picture()].map(({ attention }) => String(attention[state.layer]?.queryGrid));
  return grids[0] === grids[1];
}

/** Return the pixels of a picture. @param {Picture} entry */
async function decoded(entry) {
  const image = new Image();
  image.src = entry.source;
  await image.decode();
  const sheet = make("canvas", { width: entry.shown[0], height: entry.shown[1] });
  pen(sheet).drawImage(image, 0, 0, ...entry.shown);
  return pen(sheet).getImageData(0, 0, ...entry.shown);
}

/** @param {View} view */
function show(view) {
  stop();
  state.view = view;
  onChange = [];
  const parts = PANELS[view]();
  const isControl = (/** @type {Node | string} */ part) => part instanceof Element && part.classList.contains("row");
  byId("controls").replaceChildren(...parts.filter(isControl)); // above the picture on narrow screens
  panel.replaceChildren(...parts.filter((part) => !isControl(part)));
  byId("keys").textContent = KEYS[view];
  give(marks, { "aria-label": `${picture().name}: ${TITLES[view]}`, tabindex: view === "attention" || view === "glimpses" ? 0 : -1 });
  changed();
}

/** Redraw, at most once a frame. */
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
  give(canvas, { "aria-label": `${picture().name}. ${shown.readout}` });
  byId("low").textContent = shown.low;
  byId("high").textContent = shown.high;
  byId("shows").textContent = shown.shows;
  give(byId("legend"), { class: shown.map ? "" : "empty" });
  drawRamp(colours);
  byId("readout").textContent = shown.readout;
  marks.replaceChildren(...MARKS[state.view]());
  for (const update of onChange) update();
}

/** @param {Uint8Array} colours */
function drawRamp(colours) {
  const image = new ImageData(256, 1);
  for (let level = 0; level < 256; level++) image.data.set([...colours.slice(3 * level, 3 * level + 3), 255], 4 * level);
  pen(/** @type {HTMLCanvasElement} */ (byId("ramp"))).putImageData(image, 0, 0);
}

/** Return the patch below the pointer; null outside the model's input. @param {MouseEvent} event */
function cellAt(event) {
  const grid = state.view === "attention" && picture().attention[state.layer].queryGrid;
  if (!grid) return null;
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const [x, y] = [((event.clientX - left) / width) * canvas.width, ((event.clientY - top) / height) * canvas.height];
  const [row, column] = placer(picture(), grid)(x, y).map(Math.floor);
  return row >= 0 && column >= 0 && row < grid[0] && column < grid[1] ? row * grid[1] + column : null;
}

/** @param {string} key @returns {boolean} whether the key has an effect */
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

// Set-up --------------------------------------------------------------------------------------------------------------

function showAnswer() {
  const { answer } = picture();
  byId("answer").replaceChildren(...(answer.length ? [bars(answer.map(([index, share]) => [className(index), share]), "Most probable classes")] : []));
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
  const parts = ["Pictures have at most 512 pixels per side. Heatmaps and gates have 256 levels."];
  if (levels.length) {
    const off = percent(0.5 / (Math.min(...levels) - 1));
    parts.unshift(`The weights of each patch are rounded to ${Math.min(...levels)} levels, with an error of at most ${off} of the range of their row. The rows of the whole image have 256 levels.`);
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
    button.addEventListener("click", () => turnTo(at));
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
  if (picture().detections && !picture().glimpses) state.view = "detections";
  turnTo(0);
}

build();
