"use strict";

// The page has either readings in it, or asks the server that sent it for them.
//
// Nothing of a text is ever parsed as HTML: it is set as textContent, and plotly, which reads
// some HTML, is given numbers only.

const NEAREST = 10; // tokens nearest in z that are shown
const BESIDE = 5; // neighbours in the text, on each side
const BEYOND = "beyond what this model read";
const MANY = 3000; // tokens beyond which points are drawn with WebGL
const CHUNK = 300; // tokens of the text that are laid out together
const LONGEST_LINK = 6000; // characters of a text packed into a link

const $ = (id) => document.getElementById(id);

const state = {
  panels: [{ model: "", layer: 0, head: 0 }],
  view: "focus",
  by: "range",
  token: null, // index among the tokens of the first panel's reading
};
const limits = { max_characters: Infinity };
let models = []; // {name, kinds, heads} of what can be chosen
let readings = new Map(); // name -> Reading, all of `text`
let text = "";
let packed = ""; // `text` for the address; empty where it is too long for one
let live = false;

// ---------------------------------------------------------------- readings

class Reading {
  constructor(sent) {
    Object.assign(this, { name: sent.name, kinds: sent.kinds, heads: sent.heads });
    this.count = sent.tokens;
    this.total = sent.total;
    this.spans = new Int32Array(bytes(sent.spans).buffer);
    this.positions = new Float32Array(bytes(sent.positions).buffer);
    this.index = Float32Array.from({ length: this.count }, (_, i) => i);
    this.known = new Map();
  }

  /** Positions of a layer and head, or null where there are none. */
  z(layer, head) {
    const kind = this.kinds[layer];
    if (kind === "rope") return this.index;
    if (kind !== "repo") return null;
    const before = this.kinds.slice(0, layer).filter((kind) => kind === "repo").length;
    const start = (before * this.heads + head) * this.count;
    return this.positions.subarray(start, start + this.count);
  }

  measures(layer, head) {
    const key = `${layer} ${head}`;
    if (!this.known.has(key)) this.known.set(key, measure(this.z(layer, head)));
    return this.known.get(key);
  }

  start(token) {
    return this.spans[2 * token];
  }

  end(token) {
    return this.spans[2 * token + 1];
  }

  /** The token that stands for the character at `offset`, or the next; null past the last. */
  at(offset) {
    if (offset >= this.end(this.count - 1)) return null;
    let low = 0;
    let high = this.count - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.end(middle) > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** Whether its tokens are those of another reading. */
  splitsLike(other) {
    return this.count === other.count && this.spans.every((x, i) => x === other.spans[i]);
  }

  /** A token in one line, with white space made visible. */
  label(token) {
    const start = this.start(token);
    const piece = text.slice(start, this.end(token));
    const shown = visible(piece).replaceAll("\n", "");
    const cut = shown.length > 40 ? `${shown.slice(0, 40)}…` : shown;
    let first = token;
    while (first > 0 && this.start(first - 1) === start && this.end(first - 1) > start) first--;
    return first < token ? `${cut} (part ${token - first + 1})` : cut;
  }
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** White space and what cannot be seen, as signs. Line breaks stay, after theirs. */
function visible(piece) {
  const signs = { " ": "·", "\n": "↵\n", "\t": "⇥", "\r": "␍" };
  return piece.replace(/[\p{C}\p{Z}]/gu, (c) => {
    const code = c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return signs[c] ?? `[U+${code}]`;
  });
}

function measure(z) {
  if (z === null) return null;
  const sorted = z.filter(Number.isFinite).sort();
  const n = sorted.length;
  if (n === 0) return null;
  const quantile = (q) => {
    const at = q * (n - 1);
    const low = sorted[Math.floor(at)];
    return low + (at % 1) * (sorted[Math.ceil(at)] - low);
  };
  const reach = 1.5 * (quantile(0.75) - quantile(0.25));
  const lowFence = quantile(0.25) - reach;
  const highFence = quantile(0.75) + reach;
  const inside = sorted.filter((x) => x >= lowFence && x <= highFence);
  return {
    low: sorted[0],
    high: sorted[n - 1],
    range: sorted[n - 1] - sorted[0],
    lowWhisker: inside[0],
    highWhisker: inside[inside.length - 1],
    below: sorted.filter((x) => x < lowFence).length,
    above: sorted.filter((x) => x > highFence).length,
    correlation: correlation(z, sorted[0] < sorted[n - 1]),
  };
}

/** Pearson's, of z and the index; null where z does not vary. */
function correlation(z, varies) {
  if (!varies) return null;
  const n = z.length;
  const meanZ = z.reduce((sum, x) => sum + x, 0) / n;
  const meanI = (n - 1) / 2;
  let both = 0;
  let squareZ = 0;
  let squareI = 0;
  for (let i = 0; i < n; i++) {
    both += (z[i] - meanZ) * (i - meanI);
    squareZ += (z[i] - meanZ) ** 2;
    squareI += (i - meanI) ** 2;
  }
  return both / Math.sqrt(squareZ * squareI);
}

/** The tokens whose z is nearest to that of `token`, nearest first. */
function nearest(z, token) {
  const distance = (i) => Math.abs(z[i] - z[token]);
  const found = [];
  for (let i = 0; i < z.length; i++) {
    const last = found.length === NEAREST ? distance(found[NEAREST - 1]) : Infinity;
    if (i === token || !(distance(i) < last)) continue;
    found.length = Math.min(found.length, NEAREST - 1);
    let place = found.length;
    while (place > 0 && distance(found[place - 1]) > distance(i)) place--;
    found.splice(place, 0, i);
  }
  return found;
}

function beside(count, token) {
  const found = [];
  for (let i = Math.max(0, token - BESIDE); i <= Math.min(count - 1, token + BESIDE); i++) {
    if (i !== token) found.push(i);
  }
  return found;
}

const number = (x) => {
  if (x === null || !Number.isFinite(x)) return "none";
  const shown = Number.isInteger(x) || Math.abs(x) >= 1000 ? x.toFixed(0) : x.toPrecision(4);
  return shown.replaceAll("-", "−");
};
const counted = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const KINDS = { rope: "RoPE", nope: "NoPE", repo: "RePo", cope: "CoPE" };

// ---------------------------------------------------------------- panels

/** One model's controls, points, map and nearest tokens. */
class Panel {
  constructor(place) {
    this.place = place;
    this.root = $("panel").content.firstElementChild.cloneNode(true);
    const find = (name) => this.root.querySelector(`.${name}`);
    for (const name of ["model", "layer", "head", "plot", "empty", "note"]) this[name] = find(name);
    for (const name of ["map", "scale", "nearest"]) this[name] = find(name);
    this.cells = [];
    this.mapped = null;
    this.model.addEventListener("change", () => this.choose({ model: this.model.value }));
    this.layer.addEventListener("change", () => this.choose({ layer: +this.layer.value }));
    this.head.addEventListener("change", () => this.choose({ head: +this.head.value }));
    this.plot.addEventListener("keydown", moveByKey);
    this.map.addEventListener("keydown", (event) => this.moveInMap(event));
    $("panels").append(this.root);
  }

  get chosen() {
    return state.panels[this.place];
  }

  get reading() {
    return readings.get(this.chosen.model);
  }

  get about() {
    return models.find((model) => model.name === this.chosen.model);
  }

  choose(change) {
    Object.assign(this.chosen, change);
    fit();
    update();
    if (live && text && !this.reading) readMissing();
  }

  draw() {
    this.drawChoice();
    this.drawMap();
    this.drawPoints();
    this.drawNearest();
  }

  drawChoice() {
    const { kinds, heads } = this.about;
    options(this.model, models.map(({ name }) => [name, name]), this.chosen.model);
    const layers = kinds.map((kind, layer) => [layer, `${layer} · ${KINDS[kind]}`]);
    options(this.layer, layers, this.chosen.layer);
    const numbers = Array.from({ length: heads }, (_, head) => [head, `${head}`]);
    options(this.head, numbers, this.chosen.head);
    const which = state.panels.length > 1 ? `${this.place ? "Right" : "Left"}: ` : "";
    this.root.setAttribute("aria-label", `${which}${this.chosen.model}`);
    this.map.setAttribute("aria-label", `Layers and heads of ${this.chosen.model}`);
    this.plot.setAttribute(
      "aria-label",
      `Positions against tokens, layer ${this.chosen.layer}, head ${this.chosen.head}; ` +
        "arrow keys move the selected token",
    );
  }

  // ------------------------------------------------------------ points

  drawPoints() {
    const reading = this.reading;
    const { layer, head } = this.chosen;
    const z = reading ? reading.z(layer, head) : null;
    const measures = reading ? reading.measures(layer, head) : null;
    this.plot.hidden = measures === null;
    this.empty.hidden = measures !== null;
    this.note.textContent = "";
    if (measures === null) {
      this.empty.textContent = this.whyEmpty(reading);
      return;
    }
    this.note.textContent = this.describe(measures);
    const traces = this.traces(reading, z);
    const drawn = Plotly.react(this.plot, traces, this.layout(reading, measures), CONFIG);
    if (!this.listening) this.listen(drawn);
  }

  whyEmpty(reading) {
    if (!reading) return live && text ? "This model has not read the text yet." : "No reading.";
    if (reading.kinds[this.chosen.layer] === "repo") return "No position here is a finite number.";
    const why = { nope: "it knows no order but the causal mask's", cope: "CoPE counts keys" };
    return `There are no positions in this layer: ${why[reading.kinds[this.chosen.layer]]}.`;
  }

  describe(m) {
    const outside = m.above + m.below;
    if (state.view === "focus" && outside > 0) {
      return (
        `${counted(outside, "point")} outside the whiskers, ${number(m.lowWhisker)} to ` +
        `${number(m.highWhisker)}: ${m.above} above, ${m.below} below.`
      );
    }
    const all = state.view === "focus" ? "No point is outside the whiskers; " : "";
    return (
      `${all}z from ${number(m.low)} to ${number(m.high)}, range ${number(m.range)}, ` +
      `correlation with the index ${number(m.correlation)}.`
    );
  }

  /** All tokens, then the neighbours, the nearest and the selected one. */
  traces(reading, z) {
    const type = reading.count > MANY && WEBGL ? "scattergl" : "scatter";
    const points = (tokens, marker) => ({
      type,
      mode: "markers",
      hoverinfo: "none",
      x: tokens,
      y: tokens.map((i) => z[i]),
      marker,
    });
    const size = reading.count > MANY ? 4 : reading.count > 300 ? 5 : 7;
    const dots = { size, color: color("point"), opacity: 0.75 };
    const all = { ...points([], dots), x: reading.index, y: z };
    const token = tokenIn(reading);
    const some = token === null ? [] : [token];
    const besides = token === null ? [] : beside(reading.count, token);
    const near = this.nearestTokens();
    const edge = { color: color("surface"), width: 1 };
    return [
      all,
      points(besides, { size: 8, symbol: "square", color: color("beside"), line: edge }),
      points(near, { size: 10, symbol: "diamond", color: color(this.nearName), line: edge }),
      points(some, { size: 13, color: color("ink"), line: { color: color("surface"), width: 2 } }),
    ];
  }

  get nearName() {
    return this.place ? "near-other" : "near";
  }

  nearestTokens() {
    const reading = this.reading;
    const z = reading ? reading.z(this.chosen.layer, this.chosen.head) : null;
    const token = reading ? tokenIn(reading) : null;
    return z === null || token === null ? [] : nearest(z, token);
  }

  layout(reading, m) {
    const [low, high] = state.view === "focus" ? [m.lowWhisker, m.highWhisker] : [m.low, m.high];
    const margin = high > low ? 0.06 * (high - low) : 0.5;
    const sides = Math.max(1, 0.015 * reading.count);
    const axis = {
      gridcolor: color("line"),
      linecolor: color("line"),
      zeroline: false,
      ticks: "",
      title: { standoff: 8 },
    };
    const kind = reading.kinds[this.chosen.layer];
    return {
      autosize: true,
      margin: { l: 58, r: 12, t: 10, b: 42 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: color("muted") },
      showlegend: false,
      hovermode: "closest",
      hoverdistance: 12,
      dragmode: TOUCH ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("muted"), activecolor: color("ink") },
      xaxis: { ...axis, title: { text: "token" }, range: [-sides, reading.count - 1 + sides] },
      yaxis: {
        ...axis,
        title: { text: kind === "rope" ? "position = index" : "position z" },
        range: [low - margin, high + margin],
      },
      shapes: this.lines(reading),
      // What someone has zoomed into stays until something else is chosen.
      uirevision: JSON.stringify([this.chosen, state.view, text.length]),
    };
  }

  /** A cross through the selected token. */
  lines(reading) {
    const token = tokenIn(reading);
    if (token === null) return [];
    const z = reading.z(this.chosen.layer, this.chosen.head)[token];
    const line = { color: color("muted"), width: 1, dash: "dot" };
    const shape = { type: "line", layer: "below", line };
    return [
      { ...shape, xref: "x", yref: "paper", x0: token, x1: token, y0: 0, y1: 1 },
      { ...shape, xref: "paper", yref: "y", x0: 0, x1: 1, y0: z, y1: z },
    ];
  }

  listen(drawn) {
    this.listening = true;
    drawn.then(() => {
      const token = (event) => event.points[0].x;
      this.plot.on("plotly_click", (event) => select(token(event), this.reading));
      this.plot.on("plotly_hover", (event) => this.showTip(token(event), event.event));
      this.plot.on("plotly_unhover", hideTip);
      this.plot.on("plotly_relayout", () => this.zoomOther());
    });
  }

  showTip(token, { clientX, clientY }) {
    const reading = this.reading;
    const z = reading.z(this.chosen.layer, this.chosen.head);
    showTip(`${reading.label(token)}\ntoken ${token}\nz ${number(z[token])}`, clientX, clientY);
  }

  /** Panels of the same tokens look at the same ones. */
  zoomOther() {
    const other = panels.find((panel) => panel !== this);
    if (!other || this.plot.hidden || other.plot.hidden) return;
    if (!other.reading.splitsLike(this.reading)) return;
    const range = this.plot.layout.xaxis.range;
    const theirs = other.plot.layout.xaxis.range;
    if (range.every((x, i) => x === theirs[i])) return;
    Plotly.relayout(other.plot, { "xaxis.range": [...range] });
  }

  // ------------------------------------------------------------ map

  drawMap() {
    const { kinds, heads } = this.about;
    if (this.mapped !== this.about) this.buildMap(kinds, heads);
    const all = this.cells.map((row, layer) => row.map((_, head) => this.value(layer, head)));
    const learned = all.filter((_, layer) => kinds[layer] === "repo").flat();
    const most = Math.max(0, ...learned.filter((x) => x !== null));
    const scale = state.by === "range" ? most || 1 : 1;
    this.cells.forEach((row, layer) =>
      row.forEach((cell, head) => this.drawCell(cell, layer, head, all[layer][head], scale)),
    );
    this.drawScale(most, learned.length > 0);
  }

  value(layer, head) {
    const measures = this.reading ? this.reading.measures(layer, head) : null;
    return measures ? measures[state.by] : null;
  }

  buildMap(kinds, heads) {
    this.mapped = this.about;
    this.map.style.setProperty("--heads", heads);
    this.map.setAttribute("aria-rowcount", kinds.length);
    this.map.setAttribute("aria-colcount", heads);
    this.cells = kinds.map((_, layer) =>
      Array.from({ length: heads }, (_, head) => this.makeCell(layer, head)),
    );
    this.map.replaceChildren(
      ...kinds.map((kind, layer) => {
        const name = element("span", { className: `kind ${kind}`, role: "rowheader" });
        name.textContent = `${layer} ${KINDS[kind]}`;
        const row = element("div", { className: "row", role: "row" });
        row.append(name, ...this.cells[layer]);
        return row;
      }),
    );
  }

  makeCell(layer, head) {
    const cell = element("button", { type: "button", role: "gridcell" });
    cell.addEventListener("click", () => this.choose({ layer, head }));
    cell.addEventListener("pointerenter", (event) => {
      showTip(cell.getAttribute("aria-label").replaceAll(", ", "\n"), event.clientX, event.clientY);
    });
    cell.addEventListener("pointerleave", hideTip);
    return cell;
  }

  drawCell(cell, layer, head, value, scale) {
    const { kinds } = this.about;
    const chosen = layer === this.chosen.layer && head === this.chosen.head;
    const fixed = kinds[layer] === "rope";
    const none = kinds[layer] === "nope" || kinds[layer] === "cope";
    const sign = value < 0 ? "negative" : "";
    cell.className = fixed ? "fixed" : none ? "none" : value === null ? "unknown" : sign;
    cell.tabIndex = chosen ? 0 : -1;
    cell.setAttribute("aria-selected", chosen);
    const amount = fixed || value === null ? 0 : Math.abs(value) / scale;
    cell.style.setProperty("--amount", `${(100 * amount).toFixed(1)}%`);
    const said = none ? "no positions in this layer" : `${state.by} ${number(value)}`;
    cell.setAttribute("aria-label", `layer ${layer} ${KINDS[kinds[layer]]}, head ${head}, ${said}`);
  }

  drawScale(most, learned) {
    const [low, high] = state.by === "range" ? ["0", number(most)] : ["−1", "1"];
    this.scale.hidden = !this.reading || !learned;
    this.scale.className = `scale ${state.by}`;
    const ends = [low, high].map((end) => element("span", { textContent: end }));
    ends.splice(1, 0, element("i", {}));
    this.scale.replaceChildren(...ends);
  }

  moveInMap(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const { kinds, heads } = this.about;
    let { layer, head } = this.chosen;
    if (steps[event.key]) {
      layer += steps[event.key][0];
      head += steps[event.key][1];
    } else if (event.key === "Home") head = 0;
    else if (event.key === "End") head = heads - 1;
    else return;
    event.preventDefault();
    layer = clamp(layer, kinds.length);
    head = clamp(head, heads);
    this.choose({ layer, head });
    this.cells[layer][head].focus();
  }

  // ------------------------------------------------------------ nearest

  drawNearest() {
    const reading = this.reading;
    const tokens = this.nearestTokens();
    if (tokens.length === 0) {
      const beyond = reading && state.token !== null && tokenIn(reading) === null;
      this.nearest.textContent = beyond ? `The selected token is ${BEYOND}.` : "";
      return;
    }
    const z = reading.z(this.chosen.layer, this.chosen.head);
    const list = element("ol", {});
    list.append(...tokens.map((token) => nearButton(reading, z, token)));
    const title = element("h2", { textContent: "Nearest in z" });
    this.nearest.replaceChildren(title, list);
  }
}

function nearButton(reading, z, token) {
  const button = element("button", { type: "button" });
  const cells = [reading.label(token), `${token}`, number(z[token])];
  button.append(...cells.map((textContent) => element("span", { textContent })));
  button.addEventListener("click", () => select(token, reading));
  const item = element("li", {});
  item.append(button);
  return item;
}

// Where a finger that moves over the points is to scroll the page.
const TOUCH = matchMedia("(pointer: coarse), (max-width: 720px)").matches;
const WEBGL = document.createElement("canvas").getContext("webgl") !== null;
const CONFIG = {
  responsive: true,
  displaylogo: false,
  displayModeBar: TOUCH ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

const panels = [];

// ---------------------------------------------------------------- elements

function element(name, { role, ...properties }) {
  const made = Object.assign(document.createElement(name), properties);
  if (role) made.setAttribute("role", role);
  return made;
}

function options(select, pairs, chosen) {
  const key = JSON.stringify(pairs);
  if (select.dataset.key !== key) {
    select.dataset.key = key;
    select.replaceChildren(...pairs.map(([value, name]) => new Option(name, value)));
  }
  select.value = chosen;
}

function showTip(words, x, y) {
  const tip = $("tip");
  tip.textContent = words;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${Math.max(4, y + 14 + height > innerHeight ? y - height - 10 : y + 14)}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

function say(words, kind = "") {
  $("status").textContent = words;
  $("status").className = kind;
}

/** A colour of the style sheet, as it is in the theme of the moment. */
function color(name) {
  $("tip").style.borderColor = `var(--${name})`;
  return getComputedStyle($("tip")).borderTopColor;
}

const clamp = (x, n) => Math.max(0, Math.min(n - 1, x));

// ---------------------------------------------------------------- text

let shown = []; // the element of each token of the first panel's reading
let shownReading = null;
let marked = [];

function drawText() {
  const reading = panels[0].reading;
  if (reading !== shownReading) buildText(reading);
  for (const token of marked) token.className = token.dataset.kind ?? "";
  marked = [];
  if (!reading) return;
  const mark = (token, name) => {
    if (token === null) return;
    shown[token].classList.add(name);
    marked.push(shown[token]);
  };
  const token = state.token;
  if (token === null) return;
  beside(reading.count, token).forEach((i) => mark(i, "beside"));
  panels.forEach((panel) =>
    panel.nearestTokens().forEach((i) => mark(moved(i, panel.reading, reading), panel.nearName)),
  );
  mark(token, "selected");
  // A new text has its heights only once a frame of it has been drawn.
  requestAnimationFrame(() => requestAnimationFrame(() => reveal(shown[state.token])));
}

/** Lays out the text in parts, so that the browser need not know of those out of sight. */
function buildText(reading) {
  shownReading = reading;
  shown = [];
  marked = [];
  const parts = [];
  let part = null;
  for (let token = 0; reading && token < reading.count; token++) {
    const before = token ? reading.end(token - 1) : 0;
    const full = part && part.childElementCount >= CHUNK;
    if (!part || (full && (text[before - 1] === "\n" || part.childElementCount >= 4 * CHUNK))) {
      part = element("div", {});
      parts.push(part);
    }
    if (reading.start(token) > before) part.append(text.slice(before, reading.start(token)));
    part.append(tokenElement(reading, token));
  }
  $("tokens").replaceChildren(...parts);
  const rest = reading ? reading.total - reading.count : 0;
  $("cut").textContent = rest
    ? `The first ${counted(reading.count, "token")} of ${reading.total.toLocaleString("en")}.`
    : "";
}

function tokenElement(reading, token) {
  const made = document.createElement("span");
  const start = reading.start(token);
  const piece = text.slice(start, reading.end(token));
  const again = token > 0 && reading.start(token - 1) === start && piece !== "";
  if (again) {
    made.textContent = "+";
    made.dataset.kind = "part";
  } else if (/^[\p{C}\p{Z}]*$/u.test(piece)) {
    made.textContent = visible(piece) || "∅";
    made.dataset.kind = "space";
  } else {
    // Signs for what cannot be seen, but spaces within words stay spaces.
    made.textContent = piece.replace(/[\p{Cc}\p{Cf}]/gu, (c) => (c === "\n" ? c : visible(c)));
  }
  made.className = made.dataset.kind ?? "";
  made.dataset.token = token;
  shown.push(made);
  return made;
}

/** Scrolls the text, and only the text, until a token is in sight. */
function reveal(token) {
  if (!token) return; // let go of in the meantime
  const box = $("tokens");
  const [inner, outer] = [token.getBoundingClientRect(), box.getBoundingClientRect()];
  const tall = innerHeight - outer.top > 120; // else what shows of it is not worth the while
  const bottom = tall ? Math.min(outer.bottom, innerHeight) : outer.bottom;
  if (inner.top < outer.top + 8) box.scrollTop += inner.top - outer.top - 60;
  else if (inner.bottom > bottom - 8) box.scrollTop += inner.bottom - bottom + 60;
}

// ---------------------------------------------------------------- selection

/** A token of one reading, in another of the same text; null where that ends before it. */
function moved(token, from, to) {
  return from === to || from.splitsLike(to) ? token : to.at(from.start(token));
}

/** The selected token, in a reading. */
function tokenIn(reading) {
  if (state.token === null || !panels[0].reading) return null;
  return moved(state.token, panels[0].reading, reading);
}

function select(token, reading) {
  const first = panels[0].reading;
  if (!first) return;
  const chosen = token === null ? null : moved(token, reading, first);
  if (token !== null && chosen === null) {
    $("chosen").textContent = `Token ${token} is beyond what ${first.name} read.`;
    return;
  }
  state.token = chosen;
  update();
}

function moveByKey(event) {
  const reading = panels[0].reading;
  if (!reading || event.ctrlKey || event.metaKey || event.altKey) return;
  const here = state.token;
  const last = reading.count - 1;
  const targets = {
    ArrowLeft: () => (here === null ? last : here - 1),
    ArrowRight: () => (here === null ? 0 : here + 1),
    ArrowUp: () => inLine(here ?? 0, -1),
    ArrowDown: () => inLine(here ?? 0, 1),
    Home: () => 0,
    End: () => last,
    Escape: () => null,
  };
  if (!targets[event.key]) return;
  event.preventDefault();
  const target = targets[event.key]();
  select(target === null ? null : clamp(target, reading.count), reading);
}

/** The token above or below, as the text is laid out. */
function inLine(token, step) {
  const { left, top } = shown[token].getBoundingClientRect();
  const distance = (i) => Math.abs(shown[i].getBoundingClientRect().left - left);
  let line = null;
  let best = token;
  for (let i = token + step; i >= 0 && i < shown.length && Math.abs(i - token) < 2000; i += step) {
    const box = shown[i].getBoundingClientRect();
    if (Math.abs(box.top - top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 4) break;
    if (best === token || distance(i) < distance(best)) best = i;
  }
  return best;
}

function drawSelection() {
  const reading = panels[0].reading;
  $("previous").disabled = !reading || state.token === 0;
  $("next").disabled = !reading || state.token === reading.count - 1;
  if (!reading || state.token === null) {
    $("chosen").textContent = reading
      ? `${counted(reading.count, "token")}. Click a point or a token to see what stands near it.`
      : "";
    return;
  }
  const name = element("b", { textContent: reading.label(state.token) });
  const rest = panels.filter((panel) => panel.reading).map(selectionIn);
  $("chosen").replaceChildren(name, ` token ${state.token}, ${rest.join("; ")}`);
}

function selectionIn(panel) {
  const { model, layer, head } = panel.chosen;
  const z = panel.reading.z(layer, head);
  const whose = panels.length > 1 ? `${model} ` : "";
  if (z === null) return `${whose}has no positions in layer ${layer}`;
  const token = tokenIn(panel.reading);
  if (token === null) return `${whose}none: ${BEYOND}`;
  return `${whose}z ${number(z[token])} in layer ${layer}, head ${head}`;
}

// ---------------------------------------------------------------- everything

/** Makes the state one that can be shown. */
function fit() {
  for (const panel of state.panels) {
    const model = models.find(({ name }) => name === panel.model) ?? models[0];
    panel.model = model.name;
    const first = Math.max(0, model.kinds.indexOf("repo"));
    panel.layer = Number.isInteger(panel.layer) ? clamp(panel.layer, model.kinds.length) : first;
    panel.head = Number.isInteger(panel.head) ? clamp(panel.head, model.heads) : 0;
  }
  const reading = readings.get(state.panels[0].model);
  if (reading && state.token !== null) state.token = clamp(state.token, reading.count);
}

function update() {
  const shownPanels = state.panels.length;
  while (panels.length < shownPanels) panels.push(new Panel(panels.length));
  while (panels.length > shownPanels) {
    const panel = panels.pop();
    Plotly.purge(panel.plot);
    panel.root.remove();
  }
  document.body.classList.toggle("two", shownPanels > 1);
  $("compare").checked = shownPanels > 1;
  for (const name of ["view", "by"]) {
    document.querySelector(`[name=${name}][value=${state[name]}]`).checked = true;
  }
  panels.forEach((panel) => panel.draw());
  drawText();
  drawSelection();
  $("link").hidden = true;
  history.replaceState(null, "", `#${fragment()}`);
}

function compare(two) {
  if (!two) state.panels.length = 1;
  else {
    const left = state.panels[0];
    const other = models.find(({ name }) => name !== left.model) ?? models[0];
    state.panels[1] = { ...left, model: other.name };
    if (!other.kinds[left.layer]) state.panels[1].layer = null;
  }
  fit();
  update();
  if (live && text) readMissing();
}

// ---------------------------------------------------------------- links

function fragment() {
  const values = new URLSearchParams();
  state.panels.forEach(({ model, layer, head }, i) => {
    values.set(`model${i || ""}`, model);
    values.set(`layer${i || ""}`, layer);
    values.set(`head${i || ""}`, head);
  });
  values.set("view", state.view);
  values.set("by", state.by);
  if (state.token !== null) values.set("token", state.token);
  if (packed) values.set("text", packed);
  return values.toString();
}

/** Takes the state out of the address; says what it names that is not here. */
function restore(values) {
  const whole = (name) => (/^\d{1,9}$/.test(values.get(name) ?? "") ? +values.get(name) : null);
  const known = (name, choices, usual) =>
    choices.includes(values.get(name)) ? values.get(name) : usual;
  const panel = (i) => ({
    model: values.get(`model${i}`),
    layer: whole(`layer${i}`),
    head: whole(`head${i}`),
  });
  state.panels = values.has("model1") ? [panel(""), panel("1")] : [panel("")];
  state.view = known("view", ["focus", "global"], "focus");
  state.by = known("by", ["range", "correlation"], "range");
  state.token = whole("token");
  const missing = state.panels
    .map(({ model }) => model)
    .find((model) => model !== null && !models.some(({ name }) => name === model));
  if (missing) say(`The link names the model ${missing}, which is not here.`, "error");
  fit();
}

async function share() {
  const link = location.href;
  const whole = !live || !text || packed;
  const words = `Link copied${whole ? "" : ", without the text, which is too long for a link"}.`;
  try {
    await navigator.clipboard.writeText(link);
    say(words);
  } catch {
    say(words.replace("Link copied", "Copy the link below"));
    $("link").value = link;
    $("link").hidden = false;
    $("link").select();
  }
}

/** A text for an address: "d" and deflated bytes, or "u" and the bytes as they are. */
async function pack(words) {
  let stream = new Blob([words]).stream();
  const deflates = "CompressionStream" in window;
  if (deflates) stream = stream.pipeThrough(new CompressionStream("deflate-raw"));
  const packed = new Uint8Array(await new Response(stream).arrayBuffer());
  let binary = "";
  for (const byte of packed) binary += String.fromCharCode(byte);
  const base64 = btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=*$/, "");
  return (deflates ? "d" : "u") + base64;
}

/** The text of a link, up to the limit: a few bytes may stand for very many. */
async function unpack(packed) {
  const base64 = packed.slice(1).replaceAll("-", "+").replaceAll("_", "/");
  let stream = new Blob([bytes(base64)]).stream();
  if (packed[0] === "d") stream = stream.pipeThrough(new DecompressionStream("deflate-raw"));
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let words = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return words;
    words += value;
    if (words.length > 2 * limits.max_characters) throw new Error("its text is too long");
  }
}

// ---------------------------------------------------------------- live

let abort = null; // of the request under way
let asked = { text: "", token: null }; // what to show once it is read: `text`, or one to come

async function readText(words, token = null) {
  asked = { text: words, token };
  await readMissing();
}

/** Has the chosen models read what is asked for, those that have not. */
async function readMissing() {
  abort?.abort();
  const mine = (abort = new AbortController());
  $("stop").hidden = false;
  const { text: words, token } = asked;
  const isMissing = ({ model }) => words !== text || !readings.has(model);
  try {
    const link = await pack(words);
    let panel;
    while ((panel = state.panels.find(isMissing))) {
      const { model } = panel; // which may change while it reads
      const reading = new Reading(await request(model, words, mine.signal));
      if (words !== text) {
        text = words;
        packed = link.length <= LONGEST_LINK ? link : "";
        readings = new Map();
        state.token = token;
      }
      readings.set(model, reading);
      $("view").hidden = false;
      fit();
      update();
    }
    say("");
  } catch (error) {
    if (abort === mine) {
      asked = { text, token: null };
      say(error.name === "AbortError" ? "Stopped." : error.message, "error");
    }
  } finally {
    if (abort === mine) {
      abort = null;
      $("stop").hidden = true;
    }
  }
}

async function request(model, words, signal) {
  say(`Asking ${model} …`);
  const body = JSON.stringify({ text: words, model });
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("api/read", { method: "POST", headers, body, signal }).catch(
    (error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer.");
    },
  );
  if (!response.ok) throw new Error(sentence((await response.json()).error));
  const waiting = clock(model);
  let last = {};
  try {
    // To the end of the body: one that is left open counts as broken off.
    for await (last of events(response.body)) waiting.see(last);
  } finally {
    waiting.end();
  }
  if (last.state === "failed") throw new Error(sentence(last.error));
  if (last.state !== "done") throw new Error("The server ended before the text was read.");
  return last.reading;
}

/** Says how a request is getting on, and for how long. */
function clock(model) {
  const begun = performance.now();
  let event = { state: "queued", place: 0 };
  const tell = () => {
    const queued = (place) => `In the queue: ${counted(place, "text")} before this one …`;
    say(event.state === "queued" ? queued(event.place) : `${model} is reading …`);
    $("status").append(seconds);
  };
  const seconds = element("span", {});
  seconds.setAttribute("aria-hidden", "true"); // not read aloud every second
  const timer = setInterval(() => {
    seconds.textContent = ` ${Math.floor((performance.now() - begun) / 1000)} s`;
  }, 1000);
  return {
    see: (seen) => {
      event = seen;
      if (seen.state === "queued" || seen.state === "running") tell();
    },
    end: () => clearInterval(timer),
  };
}

/** The lines of JSON in a body, as they come. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const [first, ...others] = value.split("\n");
    parts.push(first);
    for (const line of others) {
      yield JSON.parse(parts.join(""));
      parts = [line];
    }
  }
}

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}.`;

function submit(event) {
  event?.preventDefault();
  const words = $("text").value;
  if (words === "") say("There is no text yet: type or paste one.", "error");
  else readText(words);
}

function showLength() {
  const length = [...$("text").value].length;
  const most = limits.max_characters;
  const [have, may] = [length, most].map((n) => n.toLocaleString("en"));
  $("length").textContent = `${have} of ${may} characters`;
  $("length").classList.toggle("error", length > most);
}

// ---------------------------------------------------------------- start

async function start(data) {
  listenToControls();
  live = data.live === true;
  const values = new URLSearchParams(location.hash.slice(1));
  if (live) await startLive(values);
  else startWith(data, values);
}

function startWith(data, values) {
  text = data.text;
  models = data.readings;
  readings = new Map(data.readings.map((sent) => [sent.name, new Reading(sent)]));
  const [first] = readings.values();
  const beginning = text.trim().split("\n")[0].slice(0, 60);
  $("about").textContent = `${counted(first.total, "token")} · ${beginning}`;
  $("view").hidden = false;
  restore(values);
  update();
}

async function startLive(values) {
  try {
    const offered = await (await fetch("api/models")).json();
    models = offered.models;
    limits.max_characters = offered.max_characters;
  } catch {
    say("The server does not answer; start it again and reload.", "error");
    return;
  }
  $("ask").hidden = false;
  $("about").textContent = models.map(({ name }) => name).join(", ");
  restore(values);
  if (!values.get("text")) {
    showLength();
    say("Nothing is read yet. Give a text to see where each layer and head puts its tokens.");
    return;
  }
  try {
    $("text").value = await unpack(values.get("text"));
  } catch {
    say("The text in this link cannot be read.", "error");
    return;
  }
  showLength();
  await readText($("text").value, state.token);
}

function listenToControls() {
  $("theme").addEventListener("change", () => {
    document.documentElement.dataset.theme = $("theme").value;
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  $("share").addEventListener("click", share);
  $("compare").addEventListener("change", () => compare($("compare").checked));
  for (const name of ["view", "by"]) {
    for (const radio of document.querySelectorAll(`[name=${name}]`)) {
      radio.addEventListener("change", () => {
        state[name] = radio.value;
        update();
      });
    }
  }
  const reading = () => panels[0].reading;
  const step = (by) => () => select(clamp((state.token ?? -1) + by, reading().count), reading());
  $("previous").addEventListener("click", step(-1));
  $("next").addEventListener("click", step(1));
  $("tokens").addEventListener("keydown", moveByKey);
  $("tokens").addEventListener("click", (event) => {
    const { token } = event.target.dataset;
    if (token !== undefined) select(+token, reading());
  });
  $("ask").addEventListener("submit", submit);
  $("stop").addEventListener("click", () => abort?.abort());
  $("text").addEventListener("input", showLength);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
  });
  addEventListener("hashchange", () => {
    if (models.length === 0) return;
    const values = new URLSearchParams(location.hash.slice(1));
    if (live && values.has("text") && values.get("text") !== packed) {
      location.reload();
      return;
    }
    restore(values);
    if (readings.size) update();
    if (live && text) readMissing();
  });
}

function redraw() {
  if (readings.size) update();
}

start(JSON.parse($("data").textContent));
