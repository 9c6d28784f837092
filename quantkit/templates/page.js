"use strict";
(() => {
const S = JSON.parse(document.getElementById("study").textContent);
const D = S.designs, $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const esc = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
  .replace(/\$/g, "&#36;");  // plotly's texts are HTML, and between dollars mathematics
const config = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
const still = {...config, displayModeBar: false};
const families = {integer: "circle", minifloat: "diamond", mixed: "square"};
const state = {x: S.x, y: S.y, chosen: S.knee, sort: null, down: false};

function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "polygon", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c != null));
  return node;
}
const fill = (node, ...children) => { node.replaceChildren(...children.filter((c) => c != null)); };

function number(value, digits = 4) {
  if (value == null) return "–";
  return value.toLocaleString("en-US", Number.isInteger(value) ? {} : {maximumSignificantDigits: digits});
}
const signed = (value) => value == null ? "unbounded" : (value < 0 ? "−" : "+") + number(Math.abs(value));
const label = (column) => S.columns[column].label;
const value = (design, column) => design.values[column] ?? null;
const broken = (text) => text.replaceAll("+", "+\u200b");  // where a long pipeline may go on in the next line
const spoken = (d) => `weights ${d.weights} · inputs ${d.acts} · ${d.steps} · per ${d.granularity}`;

// The designs that no other one beats in both columns, by ascending cost; of equal ones the first. Of returns, only
// designs that played all episodes compare.
function front(x, y) {
  const up = S.columns[y].higher ? 1 : -1;
  const known = D.map((d, i) => i).filter((i) => value(D[i], x) != null && value(D[i], y) != null
    && !(D[i].partial && ["mean", "iqm"].includes(y)));
  known.sort((a, b) => value(D[a], x) - value(D[b], x) || up * (value(D[b], y) - value(D[a], y)) || a - b);
  let best = -Infinity;
  return known.filter((i) => up * value(D[i], y) > best && ((best = up * value(D[i], y)), true));
}

function layout(extra) {
  const axis = {gridcolor: css("grid"), zeroline: false, linecolor: css("line"), tickcolor: css("line"), automargin: true};
  const base = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 13, color: css("ink")},
    margin: {l: 8, r: 12, t: 10, b: 8}, hoverlabel: {align: "left", bgcolor: css("card"), font: {color: css("ink")}},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: css("soft"), activecolor: css("accent")},
    dragmode: false, showlegend: false,
  };
  return {...base, ...extra, xaxis: {...axis, ...extra.xaxis}, yaxis: {...axis, ...extra.yaxis}};
}

function errors(members) {
  if (state.y === "mean") return {type: "data", array: members.map((i) => D[i].interval), visible: true};
  if (state.y !== "iqm") return undefined;
  const ends = members.map((i) => D[i].iqm);
  return {
    type: "data", symmetric: false, visible: true,
    array: members.map((i, k) => (ends[k] ? ends[k][1] - value(D[i], "iqm") : 0)),
    arrayminus: members.map((i, k) => (ends[k] ? value(D[i], "iqm") - ends[k][0] : 0)),
  };
}

function drawFront() {
  const {x, y} = state, best = front(x, y), on = new Set(best), traces = [];
  for (const [family, symbol] of Object.entries(families)) {
    const color = css(family);
    let named = false;
    for (const chosen of [true, false]) {
      const members = D.map((d, i) => i).filter(
        (i) => D[i].family === family && on.has(i) === chosen && value(D[i], x) != null && value(D[i], y) != null);
      if (!members.length) continue;
      const bars = errors(members);
      traces.push({
        type: "scatter", mode: "markers", name: family === "mixed" ? "integer × minifloat" : family,
        legendgroup: family, showlegend: !named, meta: {members},
        x: members.map((i) => value(D[i], x)), y: members.map((i) => value(D[i], y)),
        error_y: bars && {...bars, color, thickness: chosen ? 1.3 : 0.7, width: chosen ? 3 : 0},
        opacity: chosen ? 1 : 0.42,
        marker: {symbol, color, size: chosen ? 11 : 7, line: {color: css("card"), width: 1}},
        hovertext: members.map((i) => hover(i)), hoverinfo: "text",
      });
      named = true;
    }
  }
  traces.push({
    type: "scatter", mode: "lines", name: "front", hoverinfo: "skip",
    x: best.map((i) => value(D[i], x)), y: best.map((i) => value(D[i], y)),
    line: {shape: "hv", color: css("soft"), width: 1.4},
  });
  const d = D[state.chosen], px = value(d, x), py = value(d, y);
  if (px != null && py != null) traces.push({
    type: "scatter", mode: "markers", name: "selected", showlegend: false, hoverinfo: "skip", x: [px], y: [py],
    marker: {symbol: "circle-open", size: 21, color: css("ink"), line: {width: 2}},
  });
  const shapes = [], annotations = [], line = (at, dash, yanchor, text) => {
    shapes.push({type: "line", xref: "paper", x0: 0, x1: 1, y0: at, y1: at, layer: "below", line: {color: css("ref"), width: 1.3, dash}});
    annotations.push({xref: "paper", x: 1.005, y: at, xanchor: "left", yanchor, align: "left", text, showarrow: false, font: {size: 11.5, color: css("soft")}});
  };
  const reference = S.reference[y];
  if (reference != null) {
    line(reference, "solid", "bottom", `float<br>${number(reference)}`);
    line(reference - S.margin, "dash", "top", `margin<br>−${number(S.margin, 3)}`);
  }
  const xs = D.map((d) => value(d, x)).filter((v) => v != null), low = Math.min(...xs), high = Math.max(...xs);
  const range = reference == null ? null : shownRange(best, y, reference), hidden = range
    ? D.filter((d) => value(d, y) != null && value(d, y) < range[0]).length : 0;
  $("below").textContent = hidden ? `${hidden} design${hidden > 1 ? "s" : ""} below the shown range` : "";
  const logarithmic = low > 0 && high / low > 2.5;
  const xaxis = {title: {text: esc(label(x))}, type: logarithmic ? "log" : "linear"};
  if (logarithmic) Object.assign(xaxis, logTicks(low, high));
  Plotly.react($("front"), traces, layout({
    xaxis, yaxis: {title: {text: esc(label(y))}, ...(range ? {range, autorange: false} : {autorange: true})},
    height: $("front").clientHeight, shapes, annotations, margin: {l: 8, r: reference == null ? 12 : 62, t: 10, b: 8}, showlegend: true, dragmode: "zoom", hovermode: "closest",
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"},
  }), config);
}

// From the lowest point of the front, at most six margins under float, to the best; all of it where the front is lower.
function shownRange(best, y, reference) {
  if (!best.length) return null;
  const margin = Math.max(S.margin, 1e-9), ys = D.map((d) => value(d, y)).filter((v) => v != null);
  const ends = best.map((i) => value(D[i], y)), bars = y === "mean" ? Math.max(...best.map((i) => D[i].interval)) : 0;
  const top = Math.max(...ys, reference) + Math.min(bars, 1.5 * margin), floor = reference - 6 * margin;
  const whole = $("all").checked || Math.max(...ends) < floor;
  const least = Math.min(reference - 1.5 * margin, whole ? Math.min(...ys) : Math.max(Math.min(...ends), floor));
  const pad = 0.06 * (top - least) + (whole ? 0 : 0.2 * margin);
  return [least - pad, top + pad];
}

function logTicks(low, high) {
  const tickvals = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of high / low > 60 ? [1, 3] : [1, 1.5, 2, 3, 5, 7]) tickvals.push(m * 10 ** p);
  return {tickmode: "array", tickvals, ticktext: tickvals.map((v) => number(v, 3))};
}

function hover(i) {
  const d = D[i], lines = [`<b>W ${esc(d.weights)} · A ${esc(d.acts)}</b>`, `${esc(d.steps)}, per ${esc(d.granularity)}`];
  for (const column of new Set([state.y, state.x, "mean"]))
    if (value(d, column) != null) lines.push(`${esc(label(column))}: ${number(value(d, column))}`);
  if (d.verdict) lines.push(esc(d.verdict.verdict) + (d.n < S.episodes ? ` (${d.n} episodes)` : ""));
  return lines.join("<br>");
}

function select(index) {
  state.chosen = index;
  history.replaceState(null, "", "#" + D[index].id);
  drawDesign(); drawFront(); drawTable();
}

function copied(text) {
  const pre = make("pre", {tabindex: 0}, text);
  return make("div", {class: "command"}, pre, make("button", {type: "button", onclick: (e) => copy(e.target, text)}, "copy"));
}
function copy(button, text) {
  const done = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "copy"; }, 1500); };
  const selected = () => {
    getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
    done(document.execCommand("copy") ? "copied" : "selected");
  };
  navigator.clipboard ? navigator.clipboard.writeText(text).then(() => done("copied"), selected) : selected();
}

function drawDesign() {
  const d = D[state.chosen], v = d.verdict;
  fill($("recipe"), make("b", {}, `weights ${d.weights}, inputs ${d.acts}`),
    make("small", {}, `${broken(d.steps)} · per ${d.granularity} · design ${d.id}${d.origin ? " · found by " + d.origin : ""}`));
  fill($("verdict"), v && make("span", {class: "chip " + v.verdict}, v.verdict),
    v ? ` ${signed(v.diff_mean)} to float, ${number(100 * (v.level ?? 0.95))} % bounds ${signed(v.low)} and ${signed(v.high)}` : "");
  const rows = Object.keys(S.columns).filter((c) => value(d, c) != null).map((c) => {
    let text = number(value(d, c), 5);
    if (c === "mean" && d.stderr != null) text += ` ± ${number(d.stderr, 3)} (${number(d.n)} ${S.metric === "return" ? "episodes" : "inputs"})`;
    if (c === "iqm" && d.iqm) text += ` [${number(d.iqm[0])}, ${number(d.iqm[1])}]`;
    const have = S.device && S.device[c];
    if (have) text += ` (${number(100 * value(d, c) / have, 2)} % of ${number(have)})`;
    return make("tr", {}, make("th", {scope: "row"}, label(c)), make("td", {"data-column": c}, text));
  });
  fill($("numbers").tBodies[0], ...rows);
  fill($("commands"),
    d.command && make("p", {class: "label"}, "quantize it again"), d.command && copied(d.command),
    d.pick && make("p", {class: "label"}, "checkpoint, ONNX, estimate and card"), d.pick && copied(d.pick));
  drawNetwork(d); drawReturns(d); drawHardware(d); drawRobustness(d);
}

function shade(format) {
  if (format.bits == null) return css("grid");
  const strength = Math.round(14 + 56 * Math.min(format.bits, 8) / 8);
  return `color-mix(in srgb, ${css(format.float ? "minifloat" : "integer")} ${strength}%, ${css("card")})`;
}

function drawNetwork(d) {
  const size = (n) => 16 + 52 * Math.log2(1 + (n || 16)) / Math.log2(1 + Math.max(...S.layers.map((l) => Math.max(l.inputs || 16, l.outputs || 16))));
  const middle = 54, parts = S.layers.map((layer, k) => {
    const [weight, act, granularity] = d.layers[k], left = 76, right = 172, a = size(layer.inputs) / 2, b = size(layer.outputs) / 2;
    const shape = layer.inputs ? `${layer.inputs} → ${layer.outputs}` + (layer.kernel ? `, ${layer.kernel.join("×")}` : "") : "";
    const text = (x, y, cls, words, anchor = "middle") => make("text", {x, y, class: cls, "text-anchor": anchor}, words);
    const name = layer.name.length > 18 ? "…" + layer.name.slice(-17) : layer.name;
    return make("svg", {width: 180, height: 144, viewBox: "0 0 180 144", role: "img",
      "aria-label": `${layer.name}: weights ${weight.name} per ${granularity}, inputs ${act.name}${shape && ", " + shape}`},
      make("title", {}, `${layer.name}: weights ${weight.name} per ${granularity}, inputs ${act.name}`),
      make("path", {class: "arrow", d: `M4 ${middle}H${left - 3}m-6 -4l6 4l-6 4`}),
      text(38, middle - 8, "fmt", act.name),
      make("polygon", {class: "block", fill: "currentColor", style: `color:${shade(weight)}`,
        points: `${left},${middle - a} ${right},${middle - b} ${right},${middle + b} ${left},${middle + a}`}),
      text(124, middle + 5, "fmt", weight.name), text(124, 112, "", name),
      text(124, 127, "dim", shape), text(124, 141, "dim", weight.bits == null ? "" : `per ${granularity}`));
  });
  fill($("network"), ...(parts.length ? parts : [make("p", {class: "note"}, "The layers are not recorded in this study; give --checkpoint to draw them.")]));
}

function drawReturns(d) {
  if (S.metric !== "return") {
    const [lost, gained] = d.changed;
    $("returns").hidden = $("paired").hidden = true;
    $("paired-note").textContent = `Of ${number(S.episodes)} labelled inputs, ${number(lost)} that float answers rightly are answered wrongly, and ${number(gained)} the other way round.`;
    return;
  }
  const box = (name, returns, color) => ({
    type: "box", name, x: returns, orientation: "h", boxpoints: "all", jitter: 0.5, pointpos: 0, fillcolor: "rgba(0,0,0,0)",
    line: {color, width: 1.3}, marker: {color, size: 5, opacity: 0.65}, hoverinfo: "x",
  });
  Plotly.react($("returns"), [box("selected", d.returns, css(d.family)), box("float", S.reference.returns, css("ref"))],
    layout({xaxis: {title: {text: "return of an episode"}}, yaxis: {showgrid: false}}), still);
  const n = Math.min(d.returns.length, S.reference.returns.length), gaps = [];
  if (d.paired) for (let i = 0; i < n; i++) gaps.push(d.returns[i] - S.reference.returns[i]);
  $("paired-note").textContent = d.paired ? "Selected − float on the same seed:" : "Not the seeds of float: nothing to pair.";
  $("paired").hidden = !d.paired;
  if (d.paired) Plotly.react($("paired"), [{
    type: "bar", x: gaps.map((_, i) => S.seed + i), y: gaps, marker: {color: gaps.map((g) => css(g < 0 ? "bad" : "good"))},
    hovertemplate: "seed %{x}: %{y:.4g}<extra></extra>",
  }], layout({
    xaxis: {title: {text: "seed"}, tickformat: "d", tick0: S.seed, dtick: Math.ceil(n / 10)}, yaxis: {zeroline: true, zerolinecolor: css("soft")},
    shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: -S.margin, y1: -S.margin, line: {color: css("ref"), dash: "dash", width: 1.2}}],
  }), still);
}

const resources = {luts: "LUTs", ffs: "flip-flops", dsps: "DSPs", bram18: "BRAM18"};
function drawHardware(d) {
  const drawn = d.cost && S.device;
  $("hardware").hidden = !drawn;
  $("layers").hidden = !d.cost;
  $("hardware-note").textContent = d.cost_error ? `Not priced: ${d.cost_error}` : !d.cost ? "Not priced: the study names no part." :
    `${d.fits ? "Fits" : "Does not fit"} ${S.settings.device}; ${number(value(d, "latency_us"))} µs at ${number(d.clock_mhz)} MHz; ` +
    `estimate, 90 % of LUT counts within ${number(100 * d.residual, 2)} %.`;
  if (!d.cost) return;
  const names = Object.keys(resources), n = Math.max(d.cost.length - 1, 1);
  const tone = (k) => mix(css("accent"), css("card"), 0.95 - 0.65 * k / n);
  if (drawn) Plotly.react($("hardware"), d.cost.map((layer, k) => ({
    type: "bar", orientation: "h", name: esc(layer.name), y: names.map((r) => resources[r]),
    x: names.map((r) => 100 * layer[r] / S.device[r]),
    marker: {color: tone(k), line: {color: css("card"), width: 1}},
    hovertext: names.map((r) => `${esc(layer.name)}: ${number(layer[r])} ${resources[r]}`), hoverinfo: "text",
  })), layout({
    barmode: "stack", xaxis: {title: {text: "% of the part, by layer"}, rangemode: "tozero"}, yaxis: {autorange: "reversed", showgrid: false},
  }), still);
  const keys = [...names, "folds", "cycles"], heads = [...Object.values(resources), "PE × SIMD", "cycles"];
  fill($("layers").tHead, make("tr", {}, make("th", {scope: "col"}, "layer"),
    ...heads.map((h) => make("th", {scope: "col", class: "n"}, h)),
    ...["weights in", "conversion"].map((h) => make("th", {scope: "col"}, h))));
  const swatch = (k) => drawn && make("span", {class: "swatch", style: `background:${tone(k)}`});
  const line = (name, cells, words, k) => make("tr", {}, make("th", {scope: "row"}, k == null ? null : swatch(k), name),
    ...cells.map((c) => make("td", {class: "n"}, c == null ? "" : typeof c === "string" ? c : number(c))), ...words.map((w) => make("td", {}, w || "")));
  const sum = (key) => d.cost.reduce((total, layer) => total + layer[key], 0);
  const cell = (layer, key) => (key === "folds" ? `${layer.pe} × ${layer.simd}` : layer[key]);
  fill($("layers").tBodies[0],
    ...d.cost.map((layer, k) => line(layer.name, keys.map((key) => cell(layer, key)), [layer.memory, layer.converter], k)),
    line("together", keys.map((key) => (key === "folds" ? null : sum(key))), ["", ""]));
}
function mix(a, b, share) {
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)), [p, q] = [parts(a), parts(b)];
  return `rgb(${p.map((v, i) => Math.round(v * share + q[i] * (1 - share))).join(",")})`;
}

function drawRobustness(d) {
  $("robustness-card").hidden = !S.designs.some((one) => one.robustness);
  const r = d.robustness;
  $("robustness").hidden = !r;
  $("robustness-note").textContent = r
    ? `${r.episodes} episodes each, seeds ${r.seed}..${r.seed + r.episodes - 1}; float on the same seeds and noise. Worst tenth: mean of the lowest tenth of returns. Chatter: how much actions move from step to step.`
    : "Not measured for this design: " + d.pick + " --robustness";
  if (!r) return;
  const heads = ["return", "worst tenth", "chatter", "float", "worst tenth", "chatter", "difference", "95 % bounds"];
  fill($("robustness").tHead, make("tr", {}, make("th", {scope: "col"}, "condition"),
    ...heads.map((h) => make("th", {scope: "col", class: "n"}, h))));
  fill($("robustness").tBodies[0], ...r.rows.map((row) => {
    const other = row.reference || {}, apart = row.difference || {};
    const cells = [number(row.mean), number(row.worst_decile), number(row.chatter, 3), number(other.mean),
      number(other.worst_decile), number(other.chatter, 3), apart.mean == null ? "–" : signed(apart.mean),
      apart.low == null ? "–" : `${signed(apart.low)}, ${signed(apart.high)}`];
    return make("tr", {}, make("th", {scope: "row"}, row.condition), ...cells.map((c) => make("td", {class: "n"}, c)));
  }));
}

// What all designs have in common is told once, above the table.
const common = ["granularity", "steps"].filter((key) => D.length > 1 && D.every((d) => d[key] === D[0][key]));
const titles = {weights: "weights", acts: "inputs", granularity: "scales", steps: "method"};
const varied = Object.keys(titles).filter((key) => !common.includes(key));
$("alike").textContent = common.length ? `All designs: ${common.map((key) => (key === "granularity" ? "weight scales per " : "") + broken(D[0][key])).join("; ")}.` : "";
const shown = ["mean", ...["luts", "weight_kib", "latency_us", "dsps", "agreement", "action_error"].filter((c) => S.columns[c])];
function drawTable() {
  const {x, y} = state, every = $("every").checked, columns = [...new Set([y, x, ...shown])];
  const order = every ? D.map((_, i) => i) : front(x, y);
  if (state.sort) order.sort((a, b) => {
    const [p, q] = [value(D[a], state.sort), value(D[b], state.sort)];
    return p == null ? 1 : q == null ? -1 : (state.down ? q - p : p - q) || a - b;
  });
  const sorter = (c) => make("th", {scope: "col", class: "n", "aria-sort": state.sort === c ? (state.down ? "descending" : "ascending") : "none"},
    make("button", {type: "button", class: "sort", onclick: () => {
      state.down = state.sort === c && !state.down; state.sort = c; drawTable();
      $("table").querySelector(`[data-sort="${CSS.escape(c)}"]`).focus();
    }, "data-sort": c}, label(c) + (state.sort === c ? (state.down ? " ↓" : " ↑") : "")));
  fill($("table").tHead, make("tr", {}, ...varied.map((key) => make("th", {scope: "col"}, titles[key])),
    make("th", {scope: "col"}, "against float"), ...columns.map(sorter)));
  const active = document.activeElement && document.activeElement.dataset.design;
  fill($("table").tBodies[0], ...order.map((i) => {
    const d = D[i], on = i === state.chosen;
    const row = make("tr", {class: on ? "on" : null, onclick: () => select(i)},
      make("td", {}, make("button", {type: "button", class: "plain", "aria-pressed": String(on), "data-design": d.id,
        "aria-label": "select " + spoken(d)}, d.weights)),
      ...varied.slice(1).map((key) => make("td", key === "steps" ? {class: "long"} : {}, key === "steps" ? broken(d[key]) : d[key])),
      make("td", {}, d.verdict ? make("span", {class: d.verdict.verdict}, d.verdict.verdict) : "–",
        d.n < S.episodes ? ` (${d.n} episodes)` : null),
      ...columns.map((c) => make("td", {class: "n", "data-column": c}, number(value(d, c)))));
    return row;
  }));
  if (active) $("table").querySelector(`[data-design="${CSS.escape(active)}"]`)?.focus();
}

function drawSensitivity() {
  const found = S.sensitivity[$("metric").value];
  if (!found) return;
  const cells = found.values.flat().filter((v) => v != null), low = Math.min(...cells), high = Math.max(...cells);
  const told = found.formats.length <= 14, logarithmic = low > 0 && high / low > 30;  // colors by the logarithm
  const shown = logarithmic ? found.values.map((line) => line.map((v) => (v == null ? null : Math.log10(v)))) : found.values;
  const pairs = found.formats.map((name) => name.split(" × ").map(esc));
  const ticks = logarithmic ? logTicks(low, high) : null, inside = ticks ? ticks.tickvals.map((v) => v >= low && v <= high) : [];
  $("sensitivity").style.height = 146 + 30 * found.layers.length + "px";
  Plotly.react($("sensitivity"), [{
    type: "heatmap", x: [0, 1].map((k) => pairs.map((pair) => pair[k])), y: found.layers.map(esc), z: shown, xgap: 1, ygap: 2,
    customdata: found.values.map((line) => line.map((v, k) => [v, esc(found.formats[k])])),
    colorscale: [[0, mix(css("warn"), css("card"), 0.12)], [0.5, mix(css("warn"), css("card"), 0.5)], [1, css("bad")]],
    colorbar: {
      thickness: 10, outlinewidth: 0, x: 1.01, tickfont: {size: 11, color: css("soft")}, nticks: 4,
      ...(ticks && {tickmode: "array", tickvals: ticks.tickvals.filter((_, k) => inside[k]).map(Math.log10), ticktext: ticks.ticktext.filter((_, k) => inside[k])}),
    },
    hovertemplate: "%{y}, %{customdata[1]}: %{customdata[0]:.4g}<extra></extra>", text: told ? found.values.map((line) => line.map((v) => (v == null ? "" : number(v, 2)))) : undefined,
    texttemplate: told ? "%{text}" : "",
  }], layout({
    margin: {l: 8, r: 12, t: 10, b: 76}, yaxis: {autorange: "reversed", type: "category", showgrid: false},
    xaxis: {type: "multicategory", showgrid: false, showdividers: true, dividercolor: css("line"), title: {text: "inputs, for each format of the weights"}, tickfont: {size: told ? 12 : 10}},
  }), still);
}

function options(select, names, chosen, words) {
  fill(select, ...names.map((n) => make("option", {value: n, selected: n === chosen}, words(n))));
}
options($("x"), Object.keys(S.columns).filter((c) => S.columns[c].cost), state.x, label);
options($("y"), Object.keys(S.columns).filter((c) => !S.columns[c].cost), state.y, label);
$("x").addEventListener("change", () => { state.x = $("x").value; drawFront(); drawTable(); });
$("y").addEventListener("change", () => { state.y = $("y").value; drawFront(); drawTable(); });
// Another hardware target has its own costs of the same designs, and its own design to take.
$("on").hidden = S.targets.length < 2;
options($("target"), S.targets.map((_, i) => String(i)), "0", (i) => S.targets[i].name);
$("target").addEventListener("change", () => {
  const target = S.targets[$("target").value];
  D.forEach((d, i) => Object.assign(d, target.costs[i]));
  S.device = target.device; S.settings.device = target.part;
  select(target.knee);
});
$("all").addEventListener("change", drawFront);
$("every").addEventListener("change", drawTable);
const metrics = Object.keys(S.sensitivity);
$("sensitivity-card").hidden = !metrics.length;
options($("metric"), metrics, metrics[0], (m) => m);
$("metric").addEventListener("change", drawSensitivity);
for (const button of document.querySelectorAll("[data-copy]"))
  button.addEventListener("click", () => copy(button, button.parentElement.querySelector("pre").textContent));
for (const box of document.querySelectorAll(".scroll")) box.tabIndex = 0;

const asked = D.findIndex((d) => "#" + d.id === location.hash);
if (asked >= 0) state.chosen = asked;
const redraw = () => { drawDesign(); drawFront(); drawTable(); drawSensitivity(); };
redraw();
$("front").on("plotly_click", (event) => {
  const {data, pointNumber} = event.points[0];
  if (data.meta) select(data.meta.members[pointNumber]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("hashchange", () => {
  const index = D.findIndex((d) => "#" + d.id === location.hash);
  if (index >= 0 && index !== state.chosen) select(index);
});
})();
