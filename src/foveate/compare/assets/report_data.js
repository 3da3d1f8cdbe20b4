"use strict";
// What the page draws: rows by method, task and length, and how numbers are written.

const DATA = JSON.parse(document.getElementById("data").textContent);
const ROWS = DATA.rows;
const MEAN = "(mean of score tasks)";

const unique = (values) => [...new Set(values)];
const METHODS = unique(ROWS.map((row) => row.method));
const TASKS = unique(ROWS.map((row) => row.task));
const LENGTHS = unique(ROWS.map((row) => row.length)).sort((a, b) => a - b);

const isPerplexity = (task) => ROWS.some((row) => row.task === task && row.perplexity !== null);
const SCORED = TASKS.filter((task) => !isPerplexity(task));

const known = (values) => values.filter((value) => value !== null && value !== undefined);
const mean = (values) => {
  const some = known(values);
  return some.length ? some.reduce((sum, value) => sum + value, 0) / some.length : null;
};
const median = (values) => {
  const some = known(values).sort((a, b) => a - b);
  if (!some.length) return null;
  const middle = Math.floor(some.length / 2);
  return some.length % 2 ? some[middle] : (some[middle - 1] + some[middle]) / 2;
};
const over = (a, b) => (a === null || a === undefined || !b ? null : a / b);

// Figures that only methods with a host tier or an index have; without any, and in older results, they have no column.
const had = (name) => ROWS.some((row) => row[name] !== null && row[name] !== undefined);
const HOSTED = had("host_bytes");
const SEARCHED = had("recall");

// The rows of a choice of task and length, one per method; for the mean over tasks, one made of several.
function chosen(task, length) {
  return METHODS.map((method) => {
    const own = ROWS.filter((row) => row.method === method && row.length === length);
    if (task !== MEAN) return own.find((row) => row.task === task);
    const some = own.filter((row) => SCORED.includes(row.task));
    return some.length ? averaged(some) : undefined;
  }).filter((row) => row !== undefined);
}

const AVERAGED = [
  "score", "ttft_s", "decode_tokens_per_s", "peak_bytes", "cache_bytes", "host_bytes", "density", "prefill_density",
  "decode_density", "recall",
];

function averaged(some) {
  const whole = some.every((row) => row.error === null);
  const row = { ...some[0], task: MEAN, error: whole ? null : some.find((each) => each.error !== null).error };
  for (const name of AVERAGED) {
    row[name] = whole ? mean(some.map((each) => each[name])) : null;
    if (`dense_${name}` in row) row[`dense_${name}`] = mean(some.map((each) => each[`dense_${name}`]));
  }
  row.depths = some.flatMap((each) => each.depths);
  return row;
}

const quality = (row) => (row.perplexity !== null ? row.perplexity : row.score);
const denseQuality = (row) => (row.dense_perplexity !== null ? row.dense_perplexity : row.dense_score);

const count = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
const fixed = (value, digits, unit = "") =>
  value === null || value === undefined ? "–" : value.toFixed(digits) + unit;
const times = (value) => fixed(value, 2, "×");
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const powerOf = (bytes) => Math.min(UNITS.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(1, bytes)) / 10)));
const bytesText = (bytes) => {
  if (bytes === null || bytes === undefined) return "–";
  const power = powerOf(bytes);
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${UNITS[power]}`;
};
const secondsText = (value) => {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 2 : 0)} ms` : `${value.toFixed(2)} s`;
};
const qualityText = (row) =>
  row.perplexity !== null ? `perplexity ${row.perplexity.toFixed(2)}` : `score ${fixed(row.score, 2)}`;

// Text that plotly reads as markup.
const safe = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
// A method's name in short lines, broken after the signs that join its parts.
function wrapped(text, width) {
  const lines = [""];
  for (const piece of text.split(/(?<=[+:,])/)) {
    if (lines[lines.length - 1].length + piece.length > width && lines[lines.length - 1]) lines.push("");
    lines[lines.length - 1] += piece;
  }
  return lines.map(safe).join("<br>");
}
