"use strict";
window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);

const L = data.layers.length, W = data.starts.length;
const state = { layer: -1, from: 0, to: W - 1, dark: matchMedia("(prefers-color-scheme: dark)").matches };
let charts = {};

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
  const said = last > data.starts[window] ? `batches ${data.starts[window]} to ${last}` : `batch ${last}`;
  const until = data.times ? data.times[window] : null;
  return until ? `${said}, until ${new Date(1000 * until).toISOString().slice(0, 19).replace("T", " ")} UTC` : said;
};
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
/* What a kind of page has of its own, in a file beside this one. */
let view;

const colours = () => ({ home: css("--home"), even: state.dark ? "#7fd1ff" : "#4a9ec9", residents: state.dark ? "#f0c05a" : "#a87900", lp: css("--lp"), refreshed: state.dark ? "#7ddc9a" : "#1c7c3c", bound: css("--text") });

/* The layer that is shown where one must be: the chosen one, or the most unbalanced at home. */
function shownLayer() {
  if (state.layer >= 0) return state.layer;
  const means = data.layers.map((_, layer) => mean(windows().map((w) => view.at("home", w, layer))));
  return means.indexOf(worst(means));
}

function chart(id, option) {
  if (!charts[id]) {
    charts[id] = echarts.init(element(id), null, { renderer: "canvas" });
    if (id === "lines") charts[id].on("datazoom", zoomed);
    if (element(id).dataset.rows === "layers") charts[id].on("click", (event) => choose(event.data[1]));
  }
  charts[id].setOption({ animation: false, aria: { enabled: true }, textStyle: { color: css("--text"), fontFamily: "inherit" }, ...option }, true);
}

const axis = (more) => ({ axisLabel: { color: css("--soft") }, nameTextStyle: { color: css("--soft") }, axisLine: { lineStyle: { color: css("--line") } }, splitLine: { lineStyle: { color: css("--line") } }, ...more });
const tooltip = (more) => ({ confine: true, backgroundColor: css("--card"), borderColor: css("--line"), textStyle: { color: css("--text") }, ...more });

function drawLines() {
  const everything = Array.from({ length: W }, (_, w) => w);
  const looks = colours(), drawn = [];
  for (const name of view.lines) {
    const line = (label, values, more) => drawn.push({ name: label, type: "line", data: values, showSymbol: W < 80, symbolSize: 4, color: looks[name], ...more });
    const style = { width: name === "lp" ? 2.5 : 1.5, type: name === "bound" ? "dotted" : "solid" };
    if (state.layer >= 0) {
      line(view.shown[name], everything.map((w) => view.at(name, w, state.layer)), { lineStyle: style });
      continue;
    }
    const of = (w) => data.layers.map((_, layer) => view.at(name, w, layer));
    line(`${view.shown[name]}, median layer`, everything.map((w) => median(of(w))), { lineStyle: style });
    if (name === "home" || name === "lp") {
      line(`${view.shown[name]}, worst layer`, everything.map((w) => worst(of(w))), { lineStyle: { width: 1, type: "dashed" } });
    }
  }
  view.decorate(drawn, looks);
  element("which").textContent = state.layer < 0 ? "all layers" : view.nameOf(state.layer);
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

/* Colours about a middle that is good. The half from there on is for values whose least is good. */
const shades = () => (state.dark ? ["#2f7fc1", "#20303e", "#262a30", "#5a3420", "#ff8a3d"] : ["#2b7bba", "#bcd9ee", "#f6f6f4", "#f5c7a4", "#c24f00"]);

function heat(id, title, cells, horizontal, vertical, limits, say, color = shades()) {
  const interval = Math.ceil((15 * vertical.values.length) / (element(id).clientHeight - 108)) - 1;
  chart(id, {
    title: { text: `${title} (rows: ${vertical.name}s)`, left: 8, top: 0, textStyle: { fontSize: 13, color: css("--text") } },
    grid: { left: 52, right: 16, top: 30, bottom: 78 },
    tooltip: tooltip({ formatter: (item) => say(item.data) }),
    xAxis: axis({ type: "category", data: horizontal.values, name: horizontal.name, nameLocation: "middle", nameGap: 24, splitArea: { show: false } }),
    yAxis: axis({ type: "category", data: vertical.values, inverse: true, axisLabel: { color: css("--soft"), interval, formatter: endOf } }),
    visualMap: { min: limits[0], max: limits[1], calculable: true, precision: 2, orient: "horizontal", left: "center", bottom: 4, itemHeight: 160, itemWidth: 12, textStyle: { color: css("--soft") }, inRange: { color } },
    series: [{ type: "heatmap", data: cells, progressive: 0, itemStyle: { borderWidth: 0 }, emphasis: { itemStyle: { borderColor: css("--text"), borderWidth: 1 } } }],
  });
}

/* Of a long name, what tells it from others. */
const endOf = (name) => (name.length > 16 ? `…${name.slice(-15)}` : name);

let sorting = [0, 1];

function drawTable() {
  const columns = [["layer", (layer) => layer, (layer) => `<span>${escaped(data.layers[layer])}</span>`], ...view.columns];
  const rows = data.layers.map((_, layer) => [layer, ...columns.map(([, value]) => value(layer))]);
  rows.sort((one, two) => sorting[1] * (one[sorting[0] + 1] - two[sorting[0] + 1]));
  const head = `<thead><tr>${columns.map(([name], i) => `<th data-column="${i}">${name}</th>`).join("")}</tr></thead>`;
  const body = rows.map(([layer, ...cells]) => `<tr data-layer="${layer}"${layer === state.layer ? ' class="chosen"' : ""}>${cells.map((cell, i) => `<td>${columns[i][2](cell)}</td>`).join("")}</tr>`);
  element("table").innerHTML = `${head}<tbody>${body.join("")}</tbody>`;
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
  element("tiles").innerHTML = view.tiles().map(([kind, value, text]) => `<div class="tile ${kind}"><b>${value}</b>${text}</div>`).join("");
  if (lines) drawLines();
  view.drawCards();
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
  element("layer").innerHTML = `<option value="-1">all</option>${data.layers.map((n, i) => `<option value="${i}">${escaped(n)}</option>`).join("")}`;
  for (const card of document.querySelectorAll("[data-kind]")) if (card.dataset.kind !== data.kind) card.remove();
  for (const id of ["from", "to"]) [element(id).min, element(id).max] = [data.starts[0], data.num_batches - 1];
  element("layer").addEventListener("change", (e) => { state.layer = Number(e.target.value); draw(); });
  for (const id of ["from", "to"]) {
    element(id).addEventListener("change", (e) => {
      state[id] = windowOf(Number(e.target.value));
      if (state.from > state.to) [state.from, state.to] = [state.to, state.from];
      draw();
    });
  }
  view.start();
  element("all").addEventListener("click", () => { Object.assign(state, { layer: -1, from: 0, to: W - 1 }); draw(); });
  element("theme").addEventListener("click", () => { state.dark = !state.dark; draw(); });
  element("table").addEventListener("click", (e) => {
    const head = e.target.closest("th"), row = e.target.closest("tr[data-layer]");
    if (head) { const column = Number(head.dataset.column); sorting = [column, column === sorting[0] ? -sorting[1] : -1]; drawTable(); }
    if (row) choose(Number(row.dataset.layer));
  });
  element("csv").addEventListener("click", () => {
    const quoted = (text) => (/[",\n]/.test(text) ? `"${String(text).replace(/"/g, '""')}"` : text);
    const lines = [["batch", "layer", ...view.lines].join(",")];
    for (const w of windows()) for (let layer = 0; layer < L; layer++) lines.push([batchOf(w), quoted(data.layers[layer]), ...view.lines.map((n) => view.at(n, w, layer))].join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
    link.download = "lplb_ep.csv";
    link.click();
  });
  addEventListener("resize", () => Object.values(charts).forEach((one) => one.resize()));
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("theme")) state.dark = wanted.get("theme") === "dark";
  if (wanted.has("layer")) state.layer = data.layers.map(String).indexOf(wanted.get("layer"));
  draw();
  document.body.dataset.ready = "1";
}
