// The study's page: quality against bytes of state, and a table. Layout and colours come from report_charts.js.

const STUDY = JSON.parse(document.getElementById("data").textContent);
const SETTINGS = STUDY.settings;
const TEXT = SETTINGS.task === "language";
const FINISHED = STUDY.best.filter((row) => row.status === "finished");
const KINDS = [
  { name: "constant state", symbol: "circle", color: 0, has: (row) => row.ratio === null && row.constant_state },
  { name: "state grows with the length", symbol: "square", color: 1, has: (row) => row.ratio === null && !row.constant_state },
  { name: "hybrid with full attention", symbol: "diamond", color: 2, has: (row) => row.ratio !== null },
];

const grouped = (value) => value.toLocaleString("en-US");
const score = (row) => (TEXT ? row.perplexity : row.accuracy);
const shown = (value) => (TEXT ? value.toFixed(3) : `${(100 * value).toFixed(1)} %`);
const better = (a, b) => (TEXT ? score(a) < score(b) : score(a) > score(b));
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

function unbeaten(row) {
  return !FINISHED.some((other) => better(other, row) && other.state_bytes <= row.state_bytes
    || (score(other) === score(row) && other.state_bytes < row.state_bytes));
}

function hover(row) {
  const accuracies = Object.entries(row.accuracies).map(([name, value]) => `${escaped(name)}: ${(100 * value).toFixed(1)} %`);
  return [
    `<b>${escaped(row.entry)}</b>`, `${TEXT ? "perplexity" : "accuracy"} ${shown(score(row))}`,
    `${grouped(row.state_bytes)} bytes of state, ${grouped(row.parameters)} parameters`,
    `rate ${row.rate.toPrecision(3)}, ${row.steps} steps, ${row.seconds.toFixed(0)} s`, ...(TEXT ? [] : accuracies),
  ].join("<br>");
}

function draw() {
  const colors = darkPage() ? DARK : LIGHT;
  const traces = KINDS.map((kind) => {
    const rows = FINISHED.filter(kind.has);
    return {
      x: rows.map((row) => row.state_bytes), y: rows.map(score), name: kind.name, mode: "markers+text",
      marker: { color: colors[kind.color], symbol: kind.symbol, size: 10 },
      text: rows.map((row) => (unbeaten(row) ? escaped(row.entry) : "")), textposition: "top center", textfont: { size: 12 },
      hovertext: rows.map(hover), hoverinfo: "text", cliponaxis: false,
    };
  }).filter((trace) => trace.x.length);
  const layout = baseLayout(narrow() ? 420 : 520, {
    showlegend: true, legend: { orientation: "h", y: 1.04, yanchor: "bottom", x: 0 }, hovermode: "closest",
    xaxis: { type: "log", title: { text: "bytes of state" }, tickformat: "~s", dtick: 1 },
    yaxis: { title: { text: TEXT ? "perplexity" : "accuracy" }, tickformat: TEXT ? "" : ".0%" },
  });
  layout.margin = { ...layout.margin, t: 40 };
  Plotly.react("chart", traces, layout, { displayModeBar: false, responsive: true });
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function fillTable() {
  const head = document.createElement("thead");
  const names = ["stack", TEXT ? "perplexity" : "accuracy", "state bytes", "parameters", "rate", "steps", "seconds"];
  const titles = document.createElement("tr");
  names.forEach((name) => titles.append(element("th", name, { scope: "col" })));
  head.append(titles);
  const body = document.createElement("tbody");
  for (const row of STUDY.best) {
    const line = document.createElement("tr");
    line.append(element("th", row.entry, { scope: "row", class: "text" }));
    if (row.status === "finished") {
      const cells = [shown(score(row)), grouped(row.state_bytes), grouped(row.parameters), row.rate.toPrecision(3), row.steps, row.seconds.toFixed(0)];
      cells.forEach((text) => line.append(element("td", text)));
    } else {
      const why = row.status === "failed" ? `failed: ${row.error}` : `diverged by step ${row.diverged_at} at every rate tried`;
      line.append(element("td", why, { colspan: names.length - 1, class: "text long" }));
    }
    body.append(line);
  }
  document.getElementById("table").append(head, body);
}

function say() {
  const at = (id, text) => { document.getElementById(id).textContent = text; };
  at("title", TEXT ? "Small language models" : "Associative recall");
  const work = TEXT ? `text in examples of ${SETTINGS.length} bytes` : `${SETTINGS.pairs} pairs at length ${SETTINGS.length}, ${SETTINGS.vocab} tokens`;
  at("lede", `${work}; ${SETTINGS.layers} layers of ${SETTINGS.dim} channels, up to ${SETTINGS.steps} steps of ${SETTINGS.batch} examples; ${STUDY.environment.device}, ${STUDY.environment.date.slice(0, 10)}.`);
  at("h-bytes", `${TEXT ? "Perplexity" : "Accuracy"} against bytes of state`);
  const none = STUDY.missing.filter((each) => !each.why.startsWith("not needed"));
  at("missing", none.length ? `Not trained yet: ${none.map((each) => `${each.entry} at ${each.rate.toPrecision(3)}`).join(", ")}.` : "");
}

say();
fillTable();
draw();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
