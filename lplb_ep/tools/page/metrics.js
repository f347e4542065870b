/* The page of a run's metrics: what batches came to, window by window. Values of several windows or layers are
   quotients of sums, as in the statistics of the run. */
const SHOWN = { home: "at home", lp: "as planned", bound: "lower bound T*" };
const OVER = { home: "mean", lp: "mean", bound: "bound_mean" };
const sums = data.sums;
const everything = Array.from({ length: W }, (_, w) => w);
const everyLayer = data.layers.map((_, layer) => layer);

/* Null where no batch of a layer is in a window. */
const cell = (name, window, layer) => sums[name][window * L + layer];
const total = (name, chosen, layers) => sum(chosen.flatMap((w) => layers.map((layer) => cell(name, w, layer))));
const ratio = (above, below, chosen, layers) => {
  const under = total(below, chosen, layers);
  return under ? total(above, chosen, layers) / under : null;
};
const at = (name, window, layer) => ratio(name, OVER[name], [window], [layer]);
const worstOf = (name) => (layer) => worst(windows().map((w) => at(name, w, layer)));
const shownLayers = () => (state.layer < 0 ? everyLayer : [state.layer]);
const shownNames = () => (state.layer < 0 ? "all layers" : data.layers[state.layer]);
const ended = (status, chosen, layers) => sum(chosen.flatMap((w) => layers.map((layer) => data.ended[status][w * L + layer])));
const whole = (value) => Math.round(value).toLocaleString("en");
const one = (value) => (value === null ? "–" : value.toFixed(1));
const mega = (value) => (value === null ? "–" : (value / 1e6).toFixed(value < 1e5 ? 3 : 1));

/* What tells the layers' names apart. */
function shortNames(names) {
  if (names.length < 2) return names;
  const ends = (list) => {
    let n = 0;
    while (list.every((name) => n < name.length && name[n] === list[0][n])) n++;
    return n;
  };
  const digit = (text) => /\d/.test(text);
  let before = ends(names), behind = ends(names.map((name) => [...name].reverse().join("")));
  while (before && digit(names[0][before - 1])) before--;
  while (behind && digit(names[0][names[0].length - behind])) behind--;
  const short = names.map((name) => name.slice(before, name.length - behind));
  return short.every(Boolean) ? short : names;
}

function drawOverTime() {
  const chosen = windows(), cells = {};
  for (const name of ["home", "lp"]) {
    cells[name] = [];
    chosen.forEach((w, column) => everyLayer.forEach((layer) => {
      const value = at(name, w, layer);
      if (value !== null) cells[name].push([column, layer, value]);
    }));
  }
  const limits = [1, Math.max(1.05, ...cells.home.map((c) => c[2]), ...cells.lp.map((c) => c[2]))];
  const batches = { values: chosen.map(batchOf), name: "batch" }, rows = { values: shortNames(data.layers), name: "layer" };
  for (const name of ["home", "lp"]) {
    heat(`over-${name}`, SHOWN[name], cells[name], batches, rows, limits, ([column, layer, value]) => `${batchesOf(chosen[column])}<br>${escaped(data.layers[layer])}, ${SHOWN[name]}: <b>${format(value)}</b>`, shades().slice(2));
  }
}

const bars = (name, values, color, more) => ({ name, type: "bar", data: values, color, barCategoryGap: "10%", ...more });
const moments = (more) => axis({ type: "category", data: data.starts, name: "batch", nameLocation: "middle", nameGap: 24, ...more });
const said = (items, say) => [`<b>${batchesOf(items[0].dataIndex)}</b>`, ...items.map((i) => `${i.marker}${escaped(i.seriesName)}: <b>${say(i)}</b>`)].join("<br>");

function drawRows() {
  const layers = shownLayers();
  element("of-rows").textContent = state.layer < 0 ? "mean of all layers" : shownNames();
  chart("rows", {
    grid: { left: 76, right: 20, top: 34, bottom: 46 },
    tooltip: tooltip({ trigger: "axis", formatter: (items) => said(items, (i) => (i.value === null ? "–" : whole(i.value))) }),
    xAxis: moments(),
    yAxis: axis({ type: "value", name: "rows a batch", min: 0 }),
    series: [bars("rows a batch", everything.map((w) => ratio("rows", "counted", [w], layers)), css("--lp"))],
  });
}

function drawEnded() {
  const layers = shownLayers(), others = Object.keys(data.ended).filter((status) => status !== "OPTIMAL" && ended(status, everything, layers));
  element("of-ended").textContent = shownNames();
  element("all-planned").hidden = others.length > 0;
  element("ended").hidden = !others.length;
  if (!others.length) return;
  const soft = { REUSED: css("--line"), STAYED: css("--soft"), STALE: css("--home"), TIMED_OUT: "#b3261e" };
  chart("ended", {
    grid: { left: 76, right: 20, top: 46, bottom: 46 },
    legend: { top: 0, textStyle: { color: css("--text") }, inactiveColor: css("--soft") },
    tooltip: tooltip({ trigger: "axis", formatter: (items) => `${said(items, (i) => whole(i.value))}<br>of ${whole(total("batches", [items[0].dataIndex], layers))} batches` }),
    xAxis: moments(),
    yAxis: axis({ type: "value", name: "batches", min: 0, minInterval: 1 }),
    series: others.map((status) => bars(status, everything.map((w) => ended(status, [w], layers)), soft[status] || "#8e5bb5", { stack: "all" })),
  });
  charts.ended.resize();
}

function drawPushed() {
  const layers = shownLayers(), none = !total("guests", everything, everyLayer);
  element("pushed-card").hidden = none;
  if (none) return;
  element("of-pushed").textContent = state.layer < 0 ? "mean of all layers" : shownNames();
  const of = (name) => everything.map((w) => ratio(name, "batches", [w], layers));
  chart("pushed", {
    grid: { left: 56, right: 64, top: 46, bottom: 46 },
    legend: { top: 0, textStyle: { color: css("--text") }, inactiveColor: css("--soft") },
    tooltip: tooltip({ trigger: "axis", formatter: (items) => said(items, (i) => (i.value === null ? "–" : i.seriesIndex ? `${mega(1e6 * i.value)} MB` : one(i.value))) }),
    xAxis: moments(),
    yAxis: [axis({ type: "value", name: "copies", min: 0 }), axis({ type: "value", name: "MB", min: 0, splitLine: { show: false } })],
    series: [
      bars("copies a batch", of("guests"), css("--lp")),
      { name: "their weights", type: "line", yAxisIndex: 1, data: of("guest_bytes").map((bytes) => (bytes === null ? null : bytes / 1e6)), color: css("--home"), showSymbol: W < 80, connectNulls: true },
    ],
  });
}

/* A window without batches of a layer is no gap. */
function decorate(drawn) {
  for (const line of drawn) line.connectNulls = true;
}

function tiles() {
  const chosen = windows(), of = (name) => everyLayer.map((layer) => ratio(name, OVER[name], chosen, [layer]));
  const batches = total("batches", chosen, everyLayer), home = total("sent_home", chosen, everyLayer), worstLayer = (name) => `median layer<br>worst layer ${format(worst(of(name)))}`;
  const saved = 1 - total("lp", chosen, everyLayer) / total("home", chosen, everyLayer);
  const guests = ratio("guests", "batches", chosen, everyLayer), bytes = ratio("guest_bytes", "batches", chosen, everyLayer);
  return [
    ["home", format(median(of("home"))), `at home: ${worstLayer("home")}`],
    ["lp", format(median(of("lp"))), `as planned: ${worstLayer("lp")}`],
    ["", format(median(of("bound"))), "lower bound T*: median layer<br>no plan on these copies is below"],
    ["lp", Number.isFinite(saved) ? `${(100 * saved).toFixed(1)} %` : "–", "fewer rows on the fullest ranks"],
    [home ? "home" : "", whole(home), `batches sent home<br>of ${whole(batches)} in all layers`],
    ...(guests ? [["", one(guests), `copies moved a batch and layer<br>${mega(bytes)} MB`]] : []),
  ];
}

const chosenRatio = (above, below) => (layer) => ratio(above, below, windows(), [layer]);
const columns = [
  ["batches", (layer) => total("batches", windows(), [layer]), whole],
  ["rows a batch", chosenRatio("rows", "counted"), (value) => (value === null ? "–" : whole(value))],
  ["at home", chosenRatio("home", "mean"), format],
  ["worst window", worstOf("home"), format],
  ["as planned", chosenRatio("lp", "mean"), format],
  ["worst window", worstOf("lp"), format],
  ["lower bound T*", chosenRatio("bound", "bound_mean"), format],
  ...Object.keys(data.ended).filter((status) => status !== "OPTIMAL").map((status) => [status, (layer) => ended(status, windows(), [layer]), whole]),
  ["sent home", (layer) => total("sent_home", windows(), [layer]), whole],
  ["guests a batch", chosenRatio("guests", "batches"), one],
  ["MB a batch", chosenRatio("guest_bytes", "batches"), mega],
];

view = {
  shown: SHOWN,
  lines: Object.keys(SHOWN),
  at,
  nameOf: (layer) => data.layers[layer],
  decorate,
  drawCards() {
    drawOverTime();
    drawRows();
    drawEnded();
    drawPushed();
  },
  tiles,
  columns,
  start() {},
};
