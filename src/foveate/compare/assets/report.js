// The page: text, tables, choices, and drawing all charts whenever a choice, the width or the colour scheme changes.

const state = {
  task: SCORED.length > 1 ? MEAN : TASKS[0],
  length: LENGTHS[LENGTHS.length - 1],
  shown: new Set(METHODS),
  method: METHODS.find((method) => ROWS.some((row) => row.method === method && row.kept)) || METHODS[METHODS.length - 1],
  head: "mean",
};

const byId = (id) => document.getElementById(id);
function make(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null && text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const SHAPES = {
  circle: "M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10", square: "M1.5 1.5h9v9h-9z", diamond: "M6 0l6 6l-6 6l-6-6z",
  "triangle-up": "M6 .5l5.8 10.5H.2z", "triangle-down": "M6 11.5L.2 1h11.6z",
  cross: "M4 .5h4v3.5h3.5v4H8v3.5H4V8H.5V4H4z", x: "M3 .2L6 3.2L9 .2L11.8 3L8.8 6L11.8 9L9 11.8L6 8.8L3 11.8L.2 9L3.2 6L.2 3z",
  star: "M6 0l1.6 4h4.2L8.4 6.7L9.7 11L6 8.4L2.3 11L3.6 6.7L.2 4h4.2z", "circle-open": "M6 0a6 6 0 1 0 0 12a6 6 0 1 0 0-12M6 2.5a3.5 3.5 0 1 1 0 7a3.5 3.5 0 1 1 0-7",
};
function mark(method) {
  const look = lookOf(method);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.setAttribute("class", "mark");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[look.symbol]);
  path.setAttribute("fill", look.color);
  svg.append(path);
  return svg;
}
// A method's name that may break after the signs that join its parts.
function breakable(text) {
  const span = make("span");
  text.split(/(?<=[+:,/])/).forEach((piece, place) => span.append(...(place ? [make("wbr")] : []), piece));
  return span;
}
function named(method) {
  const cell = make("th", null, { scope: "row" });
  const inner = make("span");
  inner.append(mark(method), breakable(method));
  cell.append(inner);
  return cell;
}

function fillTable(table, heads, lines) {
  const head = make("thead");
  const top = make("tr");
  heads.forEach((text, place) => {
    const below = place && lines.length ? lines[0].cells[place - 1] : "";
    const cell = make("th", null, { scope: "col", ...(typeof below === "string" ? {} : { class: "text" }) });
    cell.append(breakable(text));
    top.append(cell);
  });
  head.append(top);
  const body = make("tbody");
  for (const { row, cells, mark: className } of lines) {
    const line = make("tr", null, className ? { class: className } : {});
    line.append(named(row.method));
    cells.forEach((cell) => line.append(typeof cell === "string" ? make("td", cell) : make("td", cell.text, { class: cell.text.length > 24 ? "text long" : "text" })));
    body.append(line);
  }
  table.replaceChildren(head, body);
}

const VERDICTS = {
  below: (told) => `dense faster below ${count(told.tokens)}${told.extrapolated ? " *" : ""}`,
  above: (told) => `dense faster above ${count(told.tokens)}${told.extrapolated ? " *" : ""}`,
  always: () => "always faster", never: () => "never faster", same: () => "as fast as dense", mixed: () => "now faster, now slower",
  unknown: () => "–",
};
function aboutBreakEven() {
  const told = DATA.break_even.filter((each) => each.measured);
  if (!told.length) return "Break-even lengths need two measured lengths or more.";
  const [from, to] = told[0].measured;
  return `Break-even: prompt and ${told[0].generated} generated tokens, measured from ${count(from)} to ${count(to)} tokens` +
    (told.some((each) => each.extrapolated) ? "; * extrapolated beyond that." : ".");
}
function glance() {
  byId("how-break-even").textContent = aboutBreakEven();
  const perplexities = TASKS.filter(isPerplexity);
  const heads = ["method", ...SCORED, ...perplexities.map((task) => (task.startsWith("perplexity") ? task : `${task} (perplexity)`)),
    "first token speed\u2011up", "decode speed\u2011up", "cache", ...(HOSTED ? ["on host"] : []), "of dense", "density",
    ...(SEARCHED ? ["recall"] : []), "break\u2011even"];
  const lines = METHODS.map((method) => {
    const own = ROWS.filter((row) => row.method === method && row.length === state.length);
    const of = (task) => own.find((row) => row.task === task);
    const told = DATA.break_even.find((each) => each.method === method);
    return {
      row: { method },
      mark: method === "dense" ? "dense" : "",
      cells: [
        ...SCORED.map((task) => (of(task) && of(task).error ? "refused" : fixed(of(task) && of(task).score, 2))),
        ...perplexities.map((task) => (of(task) && of(task).error ? "refused" : fixed(of(task) && of(task).perplexity, 2))),
        times(median(own.map((row) => over(row.dense_ttft_s, row.ttft_s)))),
        times(median(own.map((row) => over(row.decode_tokens_per_s, row.dense_decode_tokens_per_s)))),
        bytesText(mean(own.map((row) => row.cache_bytes))),
        ...(HOSTED ? [bytesText(mean(own.map((row) => row.host_bytes)))] : []),
        fixed(median(own.map((row) => over(row.cache_bytes, row.dense_cache_bytes))), 2),
        fixed(mean(own.map((row) => row.density)), 3),
        ...(SEARCHED ? [fixed(mean(own.map((row) => row.recall)), 3)] : []),
        { text: method === "dense" ? "" : told ? VERDICTS[told.verdict](told) : "–" },
      ],
    };
  });
  fillTable(byId("glance"), heads, lines);
}

function allRows() {
  const heads = ["method", "task", "length", "seeds", "score", "perplexity", "first token", "decode, tokens/s", "peak memory", "cache",
    ...(HOSTED ? ["on host"] : []), "of dense", "density", "in prefill", "in decode", ...(SEARCHED ? ["recall"] : [])];
  let before = "";
  const lines = ROWS.map((row) => {
    const group = `${row.task} ${row.length}`;
    const classes = [row.method === "dense" ? "dense" : "", group !== before ? "first" : ""].filter(Boolean).join(" ");
    before = group;
    const figures = row.error
      ? ["refused", ...Array(heads.length - 5).fill("–")]
      : [fixed(row.score, 2), fixed(row.perplexity, 2), secondsText(row.ttft_s), fixed(row.decode_tokens_per_s, 1), bytesText(row.peak_bytes),
        bytesText(row.cache_bytes), ...(HOSTED ? [bytesText(row.host_bytes)] : []),
        fixed(over(row.cache_bytes, row.dense_cache_bytes), 2), fixed(row.density, 3), fixed(row.prefill_density, 3),
        fixed(row.decode_density, 3), ...(SEARCHED ? [fixed(row.recall, 3)] : [])];
    return { row, mark: classes, cells: [{ text: row.task }, count(row.length), String(row.seeds.length), ...figures] };
  });
  fillTable(byId("rows"), heads, lines);
}

function words() {
  const { model, environment: where, settings } = DATA;
  const others = METHODS.length - 1;
  byId("title").textContent = `${model.name}: ${others} method${others === 1 ? "" : "s"} against dense attention`;
  const size = model.parameters >= 1e9 ? `${(model.parameters / 1e9).toFixed(1)} B` : `${(model.parameters / 1e6).toFixed(0)} M`;
  byId("lede").textContent =
    `${size} parameters in ${model.dtype}, ${model.layers} layers with ${model.kv_heads} KV heads, on ${where.device} ` +
    `(${where.threads} thread${where.threads === 1 ? "" : "s"}), ${where.date.slice(0, 10)}. ` +
    (settings.query_aware ? "Methods see the question when they compress the prompt (query-aware)."
      : "Methods compress the context before they see the question (query-agnostic).");
  const told = unique(ROWS.filter((row) => row.error).map((row) => `${row.method} refused: ${row.error}`));
  byId("refusals").replaceChildren(...told.map((text) => make("p", text, { class: "refused" })));
  const facts = {
    Device: `${where.device} (${where.device_type}), ${where.threads} thread${where.threads === 1 ? "" : "s"}`, Platform: where.platform,
    Versions: Object.entries(where.versions).map(([name, version]) => `${name} ${version}`).join(", "),
    ...(where.command ? { Command: where.command } : {}),
    Date: where.date, "Load average": where.loadavg ? where.loadavg.join(", ") : "–", "Peak memory": where.peak_bytes_kind,
    Model: `${model.name} (${model.type}), ${count(model.parameters)} parameters, ${model.dtype}, head width ${model.head_dim}, weights ${model.fingerprint}`,
    Settings: `seeds ${settings.seeds.join(", ")}; ${settings.query_aware ? "query-aware" : "query-agnostic"}; perplexity ${settings.stride} token${settings.stride === 1 ? "" : "s"} per step; ` +
      `${settings.cells_computed} cells computed, ${settings.cells_reused} reused`,
    "Results schema": String(DATA.schema_version),
  };
  byId("environment").replaceChildren(...Object.entries(facts).flatMap(([name, text]) => [make("dt", name), make("dd", text)]));
}

const CHARTS = { bytes: bytesChart, speed: speedChart, length: lengthChart, depth: depthChart, kept: keptChart, heads: headsChart };
const HOW = {
  bytes: () => (isPerplexity(state.task) ? "Further left is smaller, further down is better." : "Further left is smaller, further up is better. The dashed line is the dense model."),
  speed: () => (isPerplexity(state.task) ? "Further right is faster, further down is better." : "Further right is faster, further up is better. The dashed line is the dense model."),
  length: () => (LENGTHS.length > 1 ? "The dashed line is the dense model." : `One length was measured, ${count(LENGTHS[0])} tokens. The dashed line is the dense model.`),
  depth: () => "Each line is one prompt length; a gap means no example at that depth. The dense model comes first.",
  kept: () => {
    const row = keptRow(state);
    if (!row) return "";
    const about = `${row.task}, ${count(row.length)} tokens, seed ${row.seeds[0]}: the share of tokens still stored after the answer.`;
    return row.kept === null ? `${about} ${row.method} drops nothing here; it reads ${fixed(row.density === null ? null : row.density * 100, 1)} % of what the dense model reads.` : about;
  },
  heads: () => "Each marker is one KV head of the method chosen above, the line is the layer's mean, the dashed line the dense model.",
};

function draw() {
  for (const [name, chart] of Object.entries(CHARTS)) {
    const place = byId(`chart-${name}`);
    const made = chart(state);
    byId(`how-${name}`).textContent = HOW[name]();
    if (typeof made === "string") {
      Plotly.purge(place);
      place.replaceChildren(make("p", made, { class: "note" }));
    } else {
      if (place.firstElementChild && place.firstElementChild.classList.contains("note")) place.replaceChildren();
      // Given, not found out by plotly: it would keep the width of its first drawing.
      made.layout.width = place.clientWidth;
      Plotly.react(place, made.data, made.layout, { displayModeBar: false, responsive: false });
    }
  }
}

function chips() {
  byId("chips").replaceChildren(...METHODS.map((method) => {
    const chip = make("button", null, { type: "button", "aria-pressed": String(state.shown.has(method)) });
    chip.append(mark(method), breakable(method));
    chip.addEventListener("click", () => {
      if (state.shown.has(method)) state.shown.delete(method);
      else state.shown.add(method);
      chip.setAttribute("aria-pressed", String(state.shown.has(method)));
      draw();
    });
    return chip;
  }));
}

function choice(id, options, key, after) {
  const select = byId(id);
  select.replaceChildren(...options.map(([value, text]) => make("option", text, { value })));
  select.value = String(state[key]);
  select.addEventListener("change", () => {
    state[key] = key === "length" ? Number(select.value) : select.value;
    if (after) after();
    draw();
  });
}

function headChoices() {
  const row = keptRow(state);
  const heads = row ? Math.max(...row.lengths_kept.map((line) => line.length)) : 0;
  if (state.head !== "mean" && Number(state.head) >= heads) state.head = "mean";
  const options = [["mean", "mean of all"], ...Array.from({ length: heads }, (_, head) => [String(head), String(head)])];
  byId("head").replaceChildren(...options.map(([value, text]) => make("option", text, { value })));
  byId("head").value = state.head;
}

function everything() {
  words();
  glance();
  allRows();
  chips();
  draw();
}

const taskOptions = TASKS.map((task) => [task, task]);
if (SCORED.length > 1) taskOptions.unshift([MEAN, `mean of the ${SCORED.length} score tasks`]);
choice("task", taskOptions, "task", headChoices);
choice("length", LENGTHS.map((length) => [String(length), `${count(length)} tokens`]), "length", () => { glance(); headChoices(); });
choice("method", METHODS.map((method) => [method, method]), "method", headChoices);
choice("head", [["mean", "mean of all"]], "head");
headChoices();
everything();

window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", everything);
let width = window.innerWidth;
let waiting = 0;
window.addEventListener("resize", () => {
  // A phone's address bar changes the height while scrolling; only the width matters.
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 120);
});
