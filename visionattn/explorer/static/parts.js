// Building blocks of the page. Names of files and classes are inserted only as text, never as HTML.

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {Record<string, string | number | boolean>} attributes @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[T]}
 */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  give(element, attributes);
  element.append(...children);
  return element;
}

/** @param {string} tag @param {Record<string, string | number | boolean>} attributes */
function makeSvg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  give(element, attributes);
  return element;
}

/** @param {Element} element @param {Record<string, string | number | boolean>} attributes */
function give(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** @param {number} share in [0, 1] */
function percent(share) {
  const value = 100 * share;
  return `${value.toFixed(value >= 99.95 || value === 0 ? 0 : value >= 10 ? 1 : value >= 0.1 ? 2 : 3)} %`;
}

/** @param {number} value */
function brief(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(2);
}

/**
 * Draw one bar per class, in the given order.
 * @param {[string, number][]} shares @param {string} title
 */
function bars(shares, title) {
  const list = make("ul", { class: "bars", "aria-label": title });
  for (const [name, share] of shares) {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", String(share));
    list.append(make("li", {}, make("span", { class: "name whole" }, name), bar, make("span", { class: "number" }, percent(share))));
  }
  return list;
}

/**
 * Make radio buttons for exclusive choices.
 * @template T
 * @param {string} group @param {string} title @param {[T, (Node | string)[]][]} choices @param {T} taken
 * @param {(choice: T) => void} take
 */
function choices(group, title, choices, taken, take) {
  const set = make("fieldset", { class: "choices" }, make("legend", { class: "unseen" }, title));
  for (const [choice, content] of choices) {
    const input = make("input", { type: "radio", name: group, checked: choice === taken });
    input.addEventListener("change", () => take(choice));
    set.append(make("label", {}, input, ...content));
  }
  return set;
}

/**
 * Make a group of buttons a single tab stop; arrow keys move between the buttons.
 * @param {HTMLElement} container @param {() => number} columns
 */
function rove(container, columns) {
  container.addEventListener("keydown", (event) => {
    const buttons = [...container.querySelectorAll("button")];
    const at = buttons.indexOf(/** @type {HTMLButtonElement} */ (document.activeElement));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    const step = steps[/** @type {keyof typeof steps} */ (event.key)];
    const next = step && at >= 0 ? buttons[at + step] : undefined;
    if (step) event.preventDefault();
    if (!next) return;
    next.focus();
    next.click();
  });
}

/** @param {HTMLElement} container @param {HTMLButtonElement} chosen */
function stopAt(container, chosen) {
  container.querySelectorAll("button").forEach((button) => give(button, { tabindex: button === chosen ? 0 : -1 }));
}

const DASHES = ["none", "6 3", "2 3", "8 3 2 3"];

/**
 * Draw the curve of a heatmap beside the curves of the controls.
 * @param {Heatmap} shown @param {Heatmap[]} controls @param {"deletion" | "insertion"} metric
 */
function curve(shown, controls, metric) {
  const mine = shown.curves[metric];
  if (!mine) return "";
  const [width, height] = [150, 90];
  const top = Math.max(...[shown, ...controls].flatMap((heatmap) => heatmap.curves[metric]?.scores ?? []), 1e-6);
  const line = (/** @type {number[]} */ scores) =>
    scores.map((score, i) => `${((i / (scores.length - 1)) * width).toFixed(1)},${((1 - score / top) * height).toFixed(1)}`).join(" ");
  const better = metric === "deletion" ? "lower is better" : "higher is better";
  const areas = controls.map((control) => `${control.name} ${brief(control.curves[metric]?.area ?? 0)}`).join(", ");
  const svg = makeSvg("svg", {
    viewBox: `-2 -14 ${width + 4} ${height + 16}`, role: "img",
    "aria-label": `${metric}: area ${brief(mine.area)}, ${better}; ${areas}`,
  });
  svg.append(makeSvg("path", { class: "axes", d: `M0 0V${height}H${width}` }), label(percent(top), 0, -4));
  controls.forEach((control, at) => {
    svg.append(makeSvg("polyline", { class: "control", "stroke-dasharray": dash(at), points: line(control.curves[metric]?.scores ?? []) }));
  });
  svg.append(makeSvg("polyline", { class: `line ${metric}`, points: line(mine.scores) }));
  const caption = make("figcaption", {}, make("b", {}, metric), ` ${brief(mine.area)} `, make("small", {}, better));
  return make("figure", { class: "curve" }, svg, caption);
}

/** Return the dashes of a control's curves. @param {number} at */
function dash(at) {
  return DASHES[at % DASHES.length];
}

/** Name the curves: a short line and a name for each. @param {Heatmap} shown @param {Heatmap[]} controls */
function curveNames(shown, controls) {
  const names = [shown, ...controls].map((heatmap, at) => {
    const svg = makeSvg("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" });
    svg.append(makeSvg("path", { d: "M1 4H25", class: at ? "control" : "line", "stroke-dasharray": at ? dash(at - 1) : "none" }));
    return make("span", {}, svg, heatmap.name);
  });
  return make("p", { class: "curve names" }, ...names);
}

/** @param {string} text @param {number} x @param {number} y */
function label(text, x, y) {
  const element = makeSvg("text", { x, y });
  element.textContent = text;
  return element;
}

/** Return whether a control has the grid of a heatmap, or no grid. @param {Heatmap} control @param {Heatmap} shown */
function belongs(control, shown) {
  const grid = shown.map.codes.shape.join("×");
  return !/\d×\d/.test(control.name) || control.name.endsWith(` ${grid}`);
}

/**
 * Show how the heatmap compares with its controls on this image. One image decides nothing, so this is no verdict.
 * @param {Heatmap} shown @param {Heatmap[]} all
 */
function verdict(shown, all) {
  const block = make("section", { class: "verdict", "aria-label": `Comparison of ${shown.name} with the controls` });
  if (!shown.curves.deletion) return block;
  const controls = all.filter((heatmap) => heatmap.control && heatmap !== shown && belongs(heatmap, shown));
  const pair = make("div", { class: "curves" }, curve(shown, controls, "deletion"), curve(shown, controls, "insertion"));
  const lines = Object.entries(shown.compared).map(([metric, { better, same, worse }]) => {
    const parts = [["better than", better], ["about as good as", same], ["worse than", worse]].filter(([, names]) => names.length);
    return `${metric}: ${parts.map(([relation, names]) => `${relation} ${/** @type {string[]} */ (names).join(", ")}`).join("; ")}`;
  });
  const worse = Object.values(shown.compared).some((found) => found.worse.length);
  const text = shown.control
    ? "A control: this heatmap does not depend on the model."
    : `On this image, ${shown.name} is, in ${lines.join(". In ")}. Differences below 0.1 are not counted: random maps of one image differ by as much. ` +
      "One image cannot show whether the method can be trusted; visionattn score measures many images.";
  block.append(
    make("h2", {}, `Does the prediction depend on the pixels that ${shown.name} marks?`),
    make("p", { class: worse ? "warning" : "fine" }, text),
    pair,
    curveNames(shown, controls),
    make("p", { class: "note" }, "Probability of the answer while the hottest pixels are removed, or restored in a blurred image. The grey curves are controls, which do not depend on the model."),
  );
  return block;
}
