"use strict";
window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const SHOWN = { home: "at home", even: "even split over copies", residents: "LP, no guests", lp: "balanced", refreshed: "balanced, replicas refreshed", bound: "lower bound T*" };

/* Numbers come as thousandths in 16 bits: base64 of little-endian words. The largest says that there is none: a
   layer had no tokens, or a rank takes no part. Such numbers are null, and left out of all means. */
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return Array.from(new Uint16Array(bytes.buffer), (word) => (word === 65535 ? null : word / 1000));
}

const L = data.layers.length, W = data.starts.length, R = data.num_ranks;
const series = {};
for (const [name, text] of Object.entries(data.imbalance)) series[name] = unpack(text);
const loads = { home: unpack(data.rank_loads.home), lp: unpack(data.rank_loads.lp) };
const guests = data.guests;
const state = { layer: -1, from: 0, to: W - 1, dark: matchMedia("(prefers-color-scheme: dark)").matches };
let charts = {};

const at = (name, window, layer) => series[name][window * L + layer];
const load = (name, window, layer, rank) => loads[name][(window * L + layer) * R + rank];
const windows = () => Array.from({ length: state.to - state.from + 1 }, (_, i) => state.from + i);
const busy = (list) => list.filter((value) => value !== null);
const sum = (list) => busy(list).reduce((a, b) => a + b, 0);
const mean = (list) => (busy(list).length ? sum(list) / busy(list).length : null);
const worst = (list) => (busy(list).length ? Math.max(...busy(list)) : null);
const median = (list) => {
  const sorted = busy(list).sort((a, b) => a - b), middle = sorted.length >> 1;
  if (!sorted.length) return null;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};
const format = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const batchOf = (window) => data.starts[window];
const batchesOf = (window) => {
  const last = (window + 1 < W ? data.starts[window + 1] : data.num_batches) - 1;
  return last > data.starts[window] ? `batches ${data.starts[window]} to ${last}` : `batch ${last}`;
};
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colours = () => ({ home: css("--home"), even: state.dark ? "#7fd1ff" : "#4a9ec9", residents: state.dark ? "#f0c05a" : "#a87900", lp: css("--lp"), refreshed: state.dark ? "#7ddc9a" : "#1c7c3c", bound: css("--text") });

/* The layer that is shown where one must be: the chosen one, or the most unbalanced at home. */
function shownLayer() {
  if (state.layer >= 0) return state.layer;
  const means = data.layers.map((_, layer) => mean(windows().map((w) => at("home", w, layer))));
  return means.indexOf(worst(means));
}

function chart(id, option) {
  if (!charts[id]) {
    charts[id] = echarts.init(element(id), null, { renderer: "canvas" });
    if (id === "lines") charts[id].on("datazoom", zoomed);
    if (id.startsWith("layers-")) charts[id].on("click", (event) => choose(event.data[1]));
  }
  charts[id].setOption({ animation: false, aria: { enabled: true }, textStyle: { color: css("--text"), fontFamily: "inherit" }, ...option }, true);
}

const axis = (more) => ({ axisLabel: { color: css("--soft") }, nameTextStyle: { color: css("--soft") }, axisLine: { lineStyle: { color: css("--line") } }, splitLine: { lineStyle: { color: css("--line") } }, ...more });
const tooltip = (more) => ({ confine: true, backgroundColor: css("--card"), borderColor: css("--line"), textStyle: { color: css("--text") }, ...more });

function drawLines() {
  const names = Object.keys(SHOWN).filter((name) => name in series);
  const everything = Array.from({ length: W }, (_, w) => w);
  const looks = colours(), drawn = [];
  for (const name of names) {
    const line = (label, values, more) => drawn.push({ name: label, type: "line", data: values, showSymbol: W < 80, symbolSize: 4, color: looks[name], ...more });
    const style = { width: name === "lp" ? 2.5 : 1.5, type: name === "bound" ? "dotted" : "solid" };
    if (state.layer >= 0) {
      line(SHOWN[name], everything.map((w) => at(name, w, state.layer)), { lineStyle: style });
      continue;
    }
    const of = (w) => data.layers.map((_, layer) => at(name, w, layer));
    line(`${SHOWN[name]}, median layer`, everything.map((w) => median(of(w))), { lineStyle: style });
    if (name === "home" || name === "lp") {
      line(`${SHOWN[name]}, worst layer`, everything.map((w) => worst(of(w))), { lineStyle: { width: 1, type: "dashed" } });
    }
  }
  /* Moments at which replicas moved. */
  const moved = new Map();
  for (const [w, layer, copies] of data.moves) if (state.layer < 0 || layer === state.layer) moved.set(w, (moved.get(w) || 0) + copies);
  if (moved.size) drawn[drawn.length - 1].markLine = { symbol: "none", animation: false, lineStyle: { color: looks.refreshed, type: "solid", opacity: 0.45 }, label: { show: moved.size < 24, formatter: (mark) => `${moved.get(mark.data.xAxis)} moved`, color: css("--soft"), fontSize: 10 }, data: [...moved.keys()].map((w) => ({ xAxis: w })) };
  element("which").textContent = state.layer < 0 ? "all layers" : `layer ${data.layers[state.layer]}`;
  chart("lines", {
    grid: { left: 56, right: 20, top: 56, bottom: 78 },
    legend: { type: "scroll", top: 0, textStyle: { color: css("--text") }, inactiveColor: css("--soft") },
    tooltip: tooltip({ trigger: "axis", formatter: (items) => [`<b>${batchesOf(items[0].dataIndex)}</b>`, ...items.map((i) => `${i.marker}${escaped(i.seriesName)}: <b>${format(i.value)}</b>`)].join("<br>") }),
    xAxis: axis({ type: "category", data: data.starts, name: "batch", nameLocation: "middle", nameGap: 24 }),
    yAxis: axis({ type: "value", name: "max / mean", scale: true, min: (extent) => Math.min(1, extent.min) }),
    dataZoom: [{ type: "slider", height: 20, bottom: 8, startValue: state.from, endValue: state.to, textStyle: { color: css("--soft") } }, { type: "inside", startValue: state.from, endValue: state.to, zoomOnMouseWheel: "ctrl" }],
    series: drawn,
  });
}

function heat(id, title, cells, horizontal, vertical, limits, say) {
  chart(id, {
    title: { text: `${title} (rows: ${vertical.name}s)`, left: 8, top: 0, textStyle: { fontSize: 13, color: css("--text") } },
    grid: { left: 52, right: 16, top: 30, bottom: 78 },
    tooltip: tooltip({ formatter: (item) => say(item.data) }),
    xAxis: axis({ type: "category", data: horizontal.values, name: horizontal.name, nameLocation: "middle", nameGap: 24, splitArea: { show: false } }),
    yAxis: axis({ type: "category", data: vertical.values, inverse: true }),
    visualMap: { min: limits[0], max: limits[1], calculable: true, precision: 2, orient: "horizontal", left: "center", bottom: 4, itemHeight: 160, itemWidth: 12, textStyle: { color: css("--soft") }, inRange: { color: state.dark ? ["#2f7fc1", "#20303e", "#262a30", "#5a3420", "#ff8a3d"] : ["#2b7bba", "#bcd9ee", "#f6f6f4", "#f5c7a4", "#c24f00"] } },
    series: [{ type: "heatmap", data: cells, progressive: 0, itemStyle: { borderWidth: 0 }, emphasis: { itemStyle: { borderColor: css("--text"), borderWidth: 1 } } }],
  });
}

/* One scale for both sides, even about the mean. */
function limitsOf(cells) {
  const far = cells.reduce((most, cell) => Math.max(most, Math.abs(cell[2] - 1)), 0.05);
  const most = Math.min(1, Math.ceil(far * 20) / 20);
  return [1 - most, 1 + most];
}

function drawLayers() {
  const chosen = windows(), cells = {};
  for (const name of ["home", "lp"]) {
    cells[name] = [];
    for (let layer = 0; layer < L; layer++) {
      for (let rank = 0; rank < R; rank++) {
        const value = mean(chosen.map((w) => load(name, w, layer, rank)));
        if (value !== null) cells[name].push([rank, layer, value]);
      }
    }
  }
  const limits = limitsOf([...cells.home, ...cells.lp]);
  const ranks = { values: Array.from({ length: R }, (_, rank) => rank), name: "rank" };
  const rows = { values: data.layers, name: "layer" };
  for (const name of ["home", "lp"]) {
    heat(`layers-${name}`, SHOWN[name], cells[name], ranks, rows, limits, ([rank, layer, value]) => `layer ${data.layers[layer]}, rank ${rank}<br>${SHOWN[name]}: <b>${format(value)}</b> of the mean`);
  }
}

function drawTime() {
  const layer = shownLayer(), chosen = windows(), cells = {};
  for (const name of ["home", "lp"]) {
    cells[name] = [];
    chosen.forEach((w, column) => {
      if (at(name, w, layer) === null) return;
      for (let rank = 0; rank < R; rank++) {
        const value = load(name, w, layer, rank);
        if (value !== null) cells[name].push([column, rank, value]);
      }
    });
  }
  const limits = limitsOf([...cells.home, ...cells.lp]);
  const batches = { values: chosen.map(batchOf), name: "batch" };
  const ranks = { values: Array.from({ length: R }, (_, rank) => rank), name: "rank" };
  const suffix = state.layer < 0 ? ", the most unbalanced" : "";
  element("of-layer").textContent = `layer ${data.layers[layer]}${suffix}`;
  for (const name of ["home", "lp"]) {
    heat(`time-${name}`, SHOWN[name], cells[name], batches, ranks, limits, ([column, rank, value]) => `${batchesOf(chosen[column])}, rank ${rank}<br>${SHOWN[name]}: <b>${format(value)}</b> of the mean`);
  }
}

function drawExperts() {
  const layer = shownLayer(), most = Math.max(1, Number(element("top").value) || 16);
  const shown = data.experts[layer].slice(0, most);
  element("of-experts").textContent = `layer ${data.layers[layer]}`;
  chart("experts", {
    grid: { left: 56, right: 20, top: 34, bottom: 46 },
    tooltip: tooltip({ formatter: (item) => { const [expert, value, copies, rank] = shown[item.dataIndex]; return `expert ${expert}, home on rank ${rank}<br>load: <b>${value.toFixed(2)}</b> of the mean expert<br>copies: ${copies}`; } }),
    xAxis: axis({ type: "category", data: shown.map((row) => row[0]), name: "expert", nameLocation: "middle", nameGap: 26 }),
    yAxis: axis({ type: "value", name: "load / mean" }),
    series: [{ type: "bar", data: shown.map((row) => row[1]), color: css("--home"), markLine: { symbol: "none", silent: true, data: [{ yAxis: 1 }], lineStyle: { color: css("--soft") }, label: { show: false } } }],
  });
}

function drawGuests() {
  element("guests-card").hidden = !guests;
  if (!guests) return;
  const everything = Array.from({ length: W }, (_, w) => w), of = (w, layer) => guests[w * L + layer];
  const values = everything.map((w) => (state.layer >= 0 ? of(w, state.layer) : mean(data.layers.map((_, layer) => of(w, layer)))));
  element("of-guests").textContent = state.layer < 0 ? "mean of all layers" : `layer ${data.layers[state.layer]}`;
  chart("guests", {
    grid: { left: 56, right: 20, top: 34, bottom: 46 },
    tooltip: tooltip({ trigger: "axis", formatter: (items) => `${batchesOf(items[0].dataIndex)}<br>copies moved: <b>${(items[0].value ?? 0).toFixed(1)}</b>` }),
    xAxis: axis({ type: "category", data: data.starts, name: "batch", nameLocation: "middle", nameGap: 24 }),
    yAxis: axis({ type: "value", name: "copies", min: 0 }),
    series: [{ type: "bar", data: values, color: css("--lp") }],
  });
}

const COLUMNS = [["layer", (layer) => data.layers[layer], String]];
for (const name of Object.keys(SHOWN)) {
  if (!(name in data.imbalance)) continue;
  COLUMNS.push([`${SHOWN[name]}, mean`, (layer) => mean(windows().map((w) => at(name, w, layer))), format]);
  if (name !== "bound") COLUMNS.push(["worst", (layer) => worst(windows().map((w) => at(name, w, layer))), format]);
}
let sorting = [0, 1];

function drawTable() {
  const rows = data.layers.map((_, layer) => [layer, ...COLUMNS.map(([, value]) => value(layer))]);
  rows.sort((one, two) => sorting[1] * (one[sorting[0] + 1] - two[sorting[0] + 1]));
  const head = `<thead><tr>${COLUMNS.map(([name], i) => `<th data-column="${i}">${name}</th>`).join("")}</tr></thead>`;
  const body = rows.map(([layer, ...cells]) => `<tr data-layer="${layer}"${layer === state.layer ? ' class="chosen"' : ""}>${cells.map((cell, i) => `<td>${COLUMNS[i][2](cell)}</td>`).join("")}</tr>`);
  element("table").innerHTML = `${head}<tbody>${body.join("")}</tbody>`;
}

function drawTiles() {
  const of = (name) => windows().flatMap((w) => data.layers.map((_, layer) => at(name, w, layer)));
  const home = of("home"), lp = of("lp"), bound = of("bound");
  const saved = 1 - sum(lp) / sum(home);
  const tile = (kind, value, text) => `<div class="tile ${kind}"><b>${value}</b>${text}</div>`;
  element("tiles").innerHTML = [
    tile("home", format(median(home)), `at home: median<br>worst ${format(worst(home))}`),
    tile("lp", format(median(lp)), `balanced: median<br>worst ${format(worst(lp))}`),
    tile("", format(median(bound)), `lower bound T*: median<br>no plan on these copies is below`),
    tile("lp", `${(100 * saved).toFixed(1)} %`, "fewer rows on the fullest ranks"),
    ...(guests ? [tile("", (mean(windows().flatMap((w) => data.layers.map((_, layer) => guests[w * L + layer]))) ?? 0).toFixed(1), "copies moved a batch and layer")] : []),
    tile("", `${L} × ${data.num_experts}`, `layers × experts<br>${R} ranks, ${data.num_batches} batches`),
  ].join("");
}

function drawFilters() {
  element("layer").value = state.layer;
  element("from").value = batchOf(state.from);
  element("to").value = (state.to + 1 < W ? data.starts[state.to + 1] : data.num_batches) - 1;
  element("theme").textContent = state.dark ? "Light" : "Dark";
}

function draw(lines = true) {
  document.documentElement.dataset.theme = state.dark ? "dark" : "light";
  drawFilters();
  drawTiles();
  if (lines) drawLines();
  drawLayers();
  drawTime();
  drawExperts();
  drawGuests();
  drawTable();
  document.body.dataset.charts = Object.keys(charts).length;
}

function choose(layer) {
  state.layer = layer === state.layer ? -1 : layer;
  draw();
}

let pending = 0;
function zoomed() {
  const zoom = charts.lines.getOption().dataZoom[0];
  [state.from, state.to] = [zoom.startValue, zoom.endValue];
  clearTimeout(pending);
  pending = setTimeout(() => draw(false), 60);
}

/* The window that has a batch. */
function windowOf(batch) {
  let window = data.starts.findLastIndex((start) => start <= batch);
  return Math.min(Math.max(window, 0), W - 1);
}

function start() {
  document.title = `lplb_ep: ${data.title}`;
  element("title").textContent = data.title;
  element("about").textContent = data.about;
  element("notes").innerHTML = data.notes.map((note) => `<p>${escaped(note)}</p>`).join("");
  element("layer").innerHTML = `<option value="-1">all</option>${data.layers.map((n, i) => `<option value="${i}">${n}</option>`).join("")}`;
  for (const id of ["from", "to"]) element(id).max = data.num_batches - 1;
  element("layer").addEventListener("change", (e) => { state.layer = Number(e.target.value); draw(); });
  for (const id of ["from", "to"]) {
    element(id).addEventListener("change", (e) => {
      state[id] = windowOf(Number(e.target.value));
      if (state.from > state.to) [state.from, state.to] = [state.to, state.from];
      draw();
    });
  }
  element("top").addEventListener("change", drawExperts);
  element("all").addEventListener("click", () => { Object.assign(state, { layer: -1, from: 0, to: W - 1 }); draw(); });
  element("theme").addEventListener("click", () => { state.dark = !state.dark; draw(); });
  element("table").addEventListener("click", (e) => {
    const head = e.target.closest("th"), row = e.target.closest("tr[data-layer]");
    if (head) { const column = Number(head.dataset.column); sorting = [column, column === sorting[0] ? -sorting[1] : -1]; drawTable(); }
    if (row) choose(Number(row.dataset.layer));
  });
  element("csv").addEventListener("click", () => {
    const names = Object.keys(series), lines = [["batch", "layer", ...names].join(",")];
    for (const w of windows()) for (let layer = 0; layer < L; layer++) lines.push([batchOf(w), data.layers[layer], ...names.map((n) => at(n, w, layer))].join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
    link.download = "lplb_ep.csv";
    link.click();
  });
  addEventListener("resize", () => Object.values(charts).forEach((one) => one.resize()));
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("theme")) state.dark = wanted.get("theme") === "dark";
  if (wanted.has("layer")) state.layer = data.layers.indexOf(Number(wanted.get("layer")));
  draw();
  document.body.dataset.ready = "1";
}

start();
