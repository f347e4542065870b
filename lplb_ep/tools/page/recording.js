/* The page of a recording, at home and balanced: loads by rank, hottest experts, guests. */
const SHOWN = { home: "at home", even: "even split over copies", residents: "LP, no guests", lp: "balanced", refreshed: "balanced, replicas refreshed", bound: "lower bound T*" };
const R = data.num_ranks, guests = data.guests;

/* Numbers come as thousandths in 16 bits: base64 of little-endian words. The largest says that there is none: a
   layer had no tokens, or a rank takes no part. Such numbers are null, and left out of all means. */
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return Array.from(new Uint16Array(bytes.buffer), (word) => (word === 65535 ? null : word / 1000));
}

const series = {};
for (const [name, text] of Object.entries(data.imbalance)) series[name] = unpack(text);
const loads = { home: unpack(data.rank_loads.home), lp: unpack(data.rank_loads.lp) };
const at = (name, window, layer) => series[name][window * L + layer];
const load = (name, window, layer, rank) => loads[name][(window * L + layer) * R + rank];

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

function drawMoves(drawn, looks) {
  /* Moments at which replicas moved. */
  const moved = new Map();
  for (const [w, layer, copies] of data.moves) if (state.layer < 0 || layer === state.layer) moved.set(w, (moved.get(w) || 0) + copies);
  if (moved.size) drawn[drawn.length - 1].markLine = { symbol: "none", animation: false, lineStyle: { color: looks.refreshed, type: "solid", opacity: 0.45 }, label: { show: moved.size < 24, formatter: (mark) => `${moved.get(mark.data.xAxis)} moved`, color: css("--soft"), fontSize: 10 }, data: [...moved.keys()].map((w) => ({ xAxis: w })) };
}

const columns = [];
for (const name of Object.keys(SHOWN).filter((name) => name in series)) {
  columns.push([`${SHOWN[name]}, mean`, (layer) => mean(windows().map((w) => at(name, w, layer))), format]);
  if (name !== "bound") columns.push(["worst", (layer) => worst(windows().map((w) => at(name, w, layer))), format]);
}

function tiles() {
  const of = (name) => windows().flatMap((w) => data.layers.map((_, layer) => at(name, w, layer)));
  const home = of("home"), lp = of("lp"), bound = of("bound");
  const saved = 1 - sum(lp) / sum(home);
  return [
    ["home", format(median(home)), `at home: median<br>worst ${format(worst(home))}`],
    ["lp", format(median(lp)), `balanced: median<br>worst ${format(worst(lp))}`],
    ["", format(median(bound)), `lower bound T*: median<br>no plan on these copies is below`],
    ["lp", `${(100 * saved).toFixed(1)} %`, "fewer rows on the fullest ranks"],
    ...(guests ? [["", (mean(windows().flatMap((w) => data.layers.map((_, layer) => guests[w * L + layer]))) ?? 0).toFixed(1), "copies moved a batch and layer"]] : []),
    ["", `${L} × ${data.num_experts}`, `layers × experts<br>${R} ranks, ${data.num_batches} batches`],
  ];
}

function drawCards() {
  drawLayers();
  drawTime();
  drawExperts();
  drawGuests();
}

view = {
  shown: SHOWN,
  lines: Object.keys(SHOWN).filter((name) => name in series),
  at,
  nameOf: (layer) => `layer ${data.layers[layer]}`,
  decorate: drawMoves,
  drawCards,
  tiles,
  columns,
  start: () => element("top").addEventListener("change", drawExperts),
};
