// The charts. Each takes the page's state and returns plotly data and layout, or a sentence when there is nothing.

const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star"];
// Okabe and Ito's colours without yellow and black; lighter ones on dark pages. Symbols tell methods apart as well.
const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#B65C96", "#C98600", "#3A9BD6"];
const DARK = ["#56A8EA", "#FF8F52", "#2CCB9A", "#E7A0CB", "#F3B73B", "#9AD7FA"];

const darkPage = () => window.matchMedia("(prefers-color-scheme: dark)").matches;
const narrow = () => window.innerWidth < 640;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function lookOf(method) {
  if (method === "dense") return { color: css("--text"), symbol: "circle-open" };
  const place = METHODS.indexOf(method) - 1;
  const colors = darkPage() ? DARK : LIGHT;
  return { color: colors[place % colors.length], symbol: SYMBOLS[place % SYMBOLS.length] };
}

// The dense model's marker: methods that lie on it stay visible.
const ring = (size) => ({ color: css("--text"), symbol: "circle-open", size, line: { color: css("--text"), width: 2 } });

function baseLayout(height, more = {}) {
  const axis = {
    gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, fixedrange: true,
    tickfont: { size: 12 },
  };
  const titled = (own) => (own && own.title ? { ...own, title: { standoff: 10, font: { size: 13 }, ...own.title } } : own);
  return {
    height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
    margin: { l: narrow() ? 46 : 60, r: narrow() ? 10 : 20, t: 14, b: 48 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--text") },
    hoverlabel: {
      bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text"), size: 13, family: getComputedStyle(document.body).fontFamily }, align: "left",
      namelength: -1,
    },
    ...more,
    xaxis: { ...axis, ...titled(more.xaxis) },
    yaxis: { ...axis, ...titled(more.yaxis) },
  };
}

const denseLine = (x, y, text) => ({
  x, y, mode: "lines", line: { color: css("--text"), width: 1.5, dash: "dash" }, hoverinfo: "text",
  text: x.map(() => text), name: "dense",
});
const denseLabel = (y, more = {}) => ({
  x: 1, xref: "paper", xanchor: "right", y, yanchor: "bottom", text: "dense", showarrow: false,
  font: { size: 12, color: css("--soft") }, ...more,
});

function describe(row) {
  return [
    `<b>${wrapped(row.method, 34)}</b>`,
    qualityText(row),
    `cache ${bytesText(row.cache_bytes)} (${times(over(row.cache_bytes, row.dense_cache_bytes))} dense)`,
    `first token ${secondsText(row.ttft_s)}, decode ${fixed(row.decode_tokens_per_s, 1)} tokens/s`,
    `density ${fixed(row.density, 3)}`,
  ].join("<br>");
}

function qualityAxis(rows) {
  if (rows.some((row) => row.perplexity !== null)) return { title: { text: "perplexity (lower is better)" } };
  return { title: { text: "score" }, range: [-0.05, 1.08], dtick: 0.25 };
}

// A name in one line of the page's width.
function fitting(text, less = 0) {
  const most = Math.floor((Math.min(window.innerWidth, 1140) - 40) / 7.2) - less;
  return safe(text.length > most ? `${text.slice(0, most - 1)}…` : text);
}

// Quality over a figure; the dense model is a dashed line and a marker of its own.
function tradeoff(state, figure, axis) {
  const all = chosen(state.task, state.length).filter((row) => quality(row) !== null && row[figure] !== null);
  if (!all.length) return "There are no figures for this task and length.";
  const rows = all.filter((row) => state.shown.has(row.method));
  const scale = axis.scale(all);
  const most = Math.max(...all.map((row) => row[figure])) / scale.unit;
  const dense = all[0];
  const level = denseQuality(dense);
  const data = rows.map((row) => {
    const look = lookOf(row.method);
    return {
      x: [row[figure] / scale.unit], y: [quality(row)], mode: "markers", name: row.method, hoverinfo: "text",
      text: [describe(row)],
      marker: row.method === "dense"
        ? ring(20)
        : { color: look.color, symbol: look.symbol, size: 13, line: { color: css("--page"), width: 1.5 } },
    };
  });
  const layout = baseLayout(narrow() ? 300 : 360, {
    xaxis: { title: { text: scale.title }, range: [0, most * 1.08], nticks: narrow() ? 5 : 8 },
    yaxis: qualityAxis(all),
  });
  if (level !== null) {
    data.unshift(denseLine([0, most * 1.08], [level, level], `<b>dense</b><br>${qualityText(dense)}`));
    layout.annotations = [denseLabel(level, { x: 0.02, xanchor: "left" })];
  }
  return { data, layout };
}

const bytesScale = (rows) => {
  const power = powerOf(Math.max(...rows.map((row) => row.cache_bytes)));
  return { unit: 1024 ** power, title: `cache, ${UNITS[power]}` };
};
const bytesChart = (state) => tradeoff(state, "cache_bytes", { scale: bytesScale });
const speedChart = (state) =>
  tradeoff(state, "decode_tokens_per_s", { scale: () => ({ unit: 1, title: "decode speed, tokens per second" }) });

function lengthChart(state) {
  if (LENGTHS.length < 2) return qualityBars(state);
  const byLength = LENGTHS.map((length) => chosen(state.task, length));
  // The dense model comes last, to lie above the methods that equal it.
  const order = [...METHODS.slice(1), METHODS[0]].filter((method) => state.shown.has(method));
  const data = order.map((method) => {
    const rows = byLength.map((some) => some.find((row) => row.method === method)).filter((row) => row && quality(row) !== null);
    const look = lookOf(method);
    const dense = method === "dense";
    return {
      x: rows.map((row) => row.length), y: rows.map(quality), mode: "lines+markers", name: method, hoverinfo: "text",
      text: rows.map((row) => `${describe(row)}<br>${count(row.length)} tokens`),
      line: { color: look.color, width: 2, dash: dense ? "dash" : "solid" },
      marker: dense ? ring(14) : { color: look.color, symbol: look.symbol, size: 10, line: { color: css("--page"), width: 1 } },
    };
  });
  return {
    data,
    layout: baseLayout(narrow() ? 300 : 360, {
      xaxis: {
        title: { text: "prompt length, tokens" }, type: "log", tickvals: LENGTHS, ticktext: LENGTHS.map(count),
        range: [Math.log10(LENGTHS[0] / 1.1), Math.log10(LENGTHS[LENGTHS.length - 1] * 1.1)],
      },
      yaxis: qualityAxis(byLength.flat()),
    }),
  };
}

// One measured length: bars, with each method's name above its bar, so that long names fit on a phone.
function qualityBars(state) {
  const rows = chosen(state.task, state.length).filter((row) => quality(row) !== null && state.shown.has(row.method));
  if (!rows.length) return "There are no figures for this task and length.";
  const perplexity = rows.some((row) => row.perplexity !== null);
  const most = perplexity ? Math.max(...rows.map(quality)) * 1.05 : 1.05;
  const level = denseQuality(rows[0]);
  const at = rows.map((_, place) => -place);
  const layout = baseLayout(rows.length * 42 + 62, {
    margin: { l: 8, r: narrow() ? 10 : 20, t: 10, b: 48 },
    xaxis: { title: { text: perplexity ? "perplexity (lower is better)" : "score" }, range: [0, most] },
    yaxis: { visible: false, range: [-rows.length + 0.45, 0.75] },
  });
  layout.annotations = rows.map((row, place) => ({
    x: 0, xref: "paper", xanchor: "left", y: 0.24 - place, yanchor: "bottom", showarrow: false, font: { size: 12 },
    text: `${fitting(row.method, 6)}  <b>${quality(row).toFixed(2)}</b>`, bgcolor: css("--page"), borderpad: 0,
  }));
  return {
    data: [
      {
        type: "bar", orientation: "h", x: rows.map(quality), y: at, width: 0.42, hoverinfo: "text",
        marker: { color: rows.map((row) => lookOf(row.method).color) }, hovertext: rows.map(describe),
      },
      denseLine([level, level], [-rows.length + 0.45, 0.5], "dense"),
    ],
    layout,
  };
}

// One strip per method: depth from left to right, one line per length.
function depthChart(state) {
  const bins = 10;
  const strips = METHODS.filter((method) => state.shown.has(method)).map((method) => ({
    method,
    rows: LENGTHS.map((length) => chosen(state.task, length).find((row) => row.method === method)).filter((row) => row && row.depths.length),
  })).filter((strip) => strip.rows.length);
  const depths = strips.flatMap((strip) => strip.rows.flatMap((row) => row.depths)).filter((each) => each.depth !== null && each.score !== null);
  if (!depths.length) {
    const others = unique(ROWS.filter((row) => row.depths.some((each) => each.depth !== null)).map((row) => row.task));
    return `This task asks for nothing at one depth.${others.length ? ` Tasks that do: ${others.join(", ")}.` : ""}`;
  }
  const line = 22, name = 24, foot = 52, left = narrow() ? 56 : 70;
  const tall = strips.length * (LENGTHS.length * line + name);
  const layout = baseLayout(tall + foot, {
    margin: { l: left, r: narrow() ? 10 : 20, t: 0, b: foot }, plot_bgcolor: css("--panel"),
    xaxis: { title: { text: "depth of the needle in the context" }, range: [0, 1], tickformat: ".0%", nticks: 6, showgrid: false, anchor: "free", position: 0 },
  });
  layout.annotations = [];
  const data = strips.map((strip, place) => {
    const cells = LENGTHS.map((length) => binned(strip.rows.find((row) => row.length === length), bins));
    const top = 1 - (place * (LENGTHS.length * line + name) + name) / tall;
    const key = place ? `yaxis${place + 1}` : "yaxis";
    layout[key] = {
      ...layout.yaxis, domain: [Math.max(0, top - (LENGTHS.length * line) / tall), top], type: "category", showgrid: false,
      tickfont: { size: 11 }, autorange: "reversed", fixedrange: true, visible: true, automargin: false,
    };
    layout.annotations.push({
      x: 0, xref: "paper", xanchor: "left", y: top, yref: "paper", yanchor: "bottom", showarrow: false,
      xshift: 2 - left, text: fitting(strip.method), font: { size: 12, weight: strip.method === "dense" ? 700 : 400 },
    });
    return {
      type: "heatmap", yaxis: place ? `y${place + 1}` : "y", x: cells[0].map((_, bin) => (bin + 0.5) / bins),
      y: LENGTHS.map(count), z: cells.map((row) => row.map((cell) => cell.score)), zmin: 0, zmax: 1, xgap: 2, ygap: 2,
      colorscale: "Viridis", showscale: false, hoverongaps: false, hoverinfo: "text",
      text: cells.map((row, at) => row.map((cell, bin) => depthText(strip.method, LENGTHS[at], bin / bins, bins, cell))),
    };
  });
  return { data, layout };
}

function binned(row, bins) {
  const cells = Array.from({ length: bins }, () => ({ scores: [] }));
  for (const each of row ? row.depths : []) {
    if (each.depth !== null && each.score !== null) {
      cells[Math.min(bins - 1, Math.floor(each.depth * bins))].scores.push(each.score);
    }
  }
  return cells.map((cell) => ({ score: mean(cell.scores), seeds: cell.scores.length }));
}

const depthText = (method, length, from, bins, cell) =>
  `<b>${wrapped(method, 34)}</b><br>${count(length)} tokens, depth ${Math.round(from * 100)} to ` +
  `${Math.round((from + 1 / bins) * 100)} %<br>score ${fixed(cell.score, 2)} (${cell.seeds} example${cell.seeds === 1 ? "" : "s"})`;

// The row whose kept tokens are drawn: those of one task, never of a mean.
function keptRow(state) {
  const task = state.task === MEAN ? SCORED[0] : state.task;
  return ROWS.find((row) => row.method === state.method && row.task === task && row.length === state.length && row.lengths_kept);
}

const columns = (table) => table[0].map((_, at) => mean(table.map((row) => row[at])));

// Shares [layers][bins] of one head, or the mean over heads; all ones where everything stays.
function shares(row, head) {
  if (row.kept === null) return row.lengths_kept.map(() => Array(64).fill(1));
  return row.kept.map((heads) => (head === "mean" ? columns(heads) : heads[Math.min(Number(head), heads.length - 1)]));
}

function keptChart(state) {
  const row = keptRow(state);
  if (!row) return "This method has no figures here.";
  const table = shares(row, state.head);
  const bins = table[0].length;
  const tokens = table[0].map((_, bin) => Math.round(((bin + 0.5) * row.tokens_seen) / bins));
  const layers = table.length;
  const across = columns(table);
  const look = lookOf(row.method);
  const layout = baseLayout(Math.min(620, Math.max(340, layers * 9 + 190)), {
    xaxis: { title: { text: "position in the text, tokens" }, range: [0, row.tokens_seen], nticks: narrow() ? 5 : 9, showgrid: false, anchor: "y" },
    yaxis: { title: { text: "layer" }, domain: [0, 0.72], autorange: "reversed", showgrid: false, nticks: 8 },
    yaxis2: {
      title: { text: "kept", font: { size: 13 } }, domain: [0.8, 1], range: [0, 1.15], dtick: 0.5, gridcolor: css("--grid"), zeroline: false,
      fixedrange: true, tickfont: { size: 12 }, automargin: true, tickformat: ".0%",
    },
    margin: { l: narrow() ? 46 : 60, r: narrow() ? 10 : 20, t: 22, b: 48 },
  });
  layout.shapes = row.needles.map((at) => ({
    type: "line", x0: at * row.tokens_seen, x1: at * row.tokens_seen, yref: "paper", y0: 0, y1: 1,
    line: { color: darkPage() ? "#ffffff" : "#d1005d", width: 1.5, dash: "dot" },
  }));
  layout.annotations = row.needles.slice(0, 1).map((at) => ({
    x: at * row.tokens_seen, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 12, color: css("--soft") },
    text: row.needles.length > 1 ? "answers" : "answer", xanchor: at > 0.9 ? "right" : at < 0.1 ? "left" : "center",
  }));
  const where = (bin) => `tokens ${count((bin * row.tokens_seen) / bins)} to ${count(((bin + 1) * row.tokens_seen) / bins)}`;
  return {
    data: [
      {
        type: "heatmap", x: tokens, y: table.map((_, layer) => layer), z: table, zmin: 0, zmax: 1, colorscale: "Viridis",
        showscale: false, hoverinfo: "text",
        text: table.map((line, layer) => line.map((share, bin) => `layer ${layer}, ${where(bin)}<br>${(share * 100).toFixed(1)} % kept`)),
      },
      { ...denseLine([0, row.tokens_seen], [1, 1], "dense keeps everything"), yaxis: "y2" },
      {
        x: tokens, y: across, yaxis: "y2", mode: "lines", line: { color: look.color, width: 2, shape: "hvh" }, hoverinfo: "text",
        text: across.map((share, bin) => `all layers, ${where(bin)}<br>${(share * 100).toFixed(1)} % kept`),
      },
    ],
    layout,
  };
}

function headsChart(state) {
  const row = keptRow(state);
  if (!row) return "This method has no figures here.";
  const layers = row.lengths_kept.map((_, layer) => layer);
  const heads = Math.max(...row.lengths_kept.map((line) => line.length));
  const look = lookOf(row.method);
  const seen = row.tokens_seen;
  const points = { x: [], y: [], text: [] };
  row.lengths_kept.forEach((line, layer) => line.forEach((held, head) => {
    // Heads stand side by side within their layer, so that equal numbers do not hide each other.
    points.x.push(layer + (heads > 1 ? (head / (heads - 1) - 0.5) * 0.5 : 0));
    points.y.push(held);
    points.text.push(`layer ${layer}, KV head ${head}<br>${count(held)} of ${count(seen)} tokens`);
  }));
  const layout = baseLayout(narrow() ? 300 : 340, {
    xaxis: { title: { text: "layer" }, range: [-0.7, layers.length - 0.3], nticks: narrow() ? 8 : 16, showgrid: false },
    yaxis: { title: { text: "tokens held" }, range: [0, seen * 1.12] },
  });
  layout.annotations = [denseLabel(seen)];
  return {
    data: [
      denseLine([-0.7, layers.length - 0.3], [seen, seen], `dense holds all ${count(seen)} tokens`),
      {
        x: layers, y: row.lengths_kept.map(mean), mode: "lines", line: { color: look.color, width: 2, shape: "hvh" },
        hoverinfo: "skip",
      },
      {
        ...points, mode: "markers", hoverinfo: "text",
        marker: { color: look.color, symbol: look.symbol, size: narrow() ? 6 : 8, opacity: 0.8, line: { color: css("--page"), width: 0.5 } },
      },
    ],
    layout,
  };
}
