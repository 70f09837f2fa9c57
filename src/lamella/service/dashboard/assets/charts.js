// Curves and heat maps by plotly, in the page's colours; what a chart shows is said in words, too.
import { byId } from "/assets/api.js";
import { sorts } from "/assets/marks.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const MOST_LINES = 60;
const DASHES = ["solid", "dash", "dot", "dashdot"];

function layout(title, y, more = {}) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
  return {
    title: { text: title, font: { size: 14 } }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--fg") }, margin: { l: 55, r: 15, t: 40, b: 45 }, height: 340,
    colorway: ["--accent", "--warn", "--good", "--bad", "--quiet"].map(colour),
    xaxis: { ...axis, title: { text: "step" }, ...more.xaxis }, yaxis: { ...axis, title: { text: y }, ...more.yaxis },
    legend: { orientation: "h", y: -0.35, yanchor: "top" }, ...more.rest,
  };
}
const OPTIONS = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
const figure = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString() : Number(value.toPrecision(4)).toString());

function inWords(title, lines, marks) {
  const parts = lines.map(({ name, y }) => {
    const values = y.filter((value) => typeof value === "number");
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    return `${name}: ${values.length} points, first ${figure(values[0])}, last ${figure(values.at(-1))}, from ${figure(low)} to ${figure(high)}`;
  });
  return `${title}. ${parts.join(". ")}.${marks.length ? ` ${marks.length} events, listed below.` : ""}`;
}

// The chart library is large: it comes when the first chart is drawn, and the rest of the page does not wait for it.
let library = null;
function plotly() {
  library ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = "/assets/plotly.js";
    script.onload = () => done(window.Plotly);
    script.onerror = () => failed(new Error("the chart library did not come"));
    document.head.append(script);
  });
  return library;
}

function show(place, words, traces, how) {
  const box = byId(place);
  box.hidden = !traces.length; // before drawing: a chart takes the width of its place
  if (!traces.length) return;
  box.setAttribute("role", "figure");
  box.setAttribute("aria-label", words);
  plotly().then((Plotly) => Plotly.react(box, traces, how, OPTIONS)).catch((error) => (byId("said").textContent = error.message));
}

// lines: [{name, x, y}]; marks: [{x, sort, words}], such as saves and faults, which stand along the bottom.
export function curves(place, title, unit, lines, { marks = [], xaxis = {} } = {}) {
  const drawn = lines.filter((line) => line.y.some((value) => typeof value === "number"));
  const traces = drawn.map((line, i) => ({ ...line, type: "scatter", mode: line.x.length > 60 ? "lines" : "lines+markers", connectgaps: true, line: { dash: DASHES[i % DASHES.length], width: 2 } }));
  const shapes = [];
  for (const { sort, label, symbol, colour: name } of drawn.length ? sorts : []) {
    const its = marks.filter((mark) => mark.sort === sort);
    if (!its.length) continue;
    traces.push({
      type: "scatter", mode: "markers", name: label, x: its.map((mark) => mark.x), y: its.map(() => 0.03), yaxis: "y2", text: its.map((mark) => mark.words),
      hovertemplate: "%{text}<extra></extra>", cliponaxis: false, marker: { symbol, size: 10, color: colour(name), line: { width: 1, color: colour("--bg") } },
    });
    if (its.length <= MOST_LINES) for (const mark of its) shapes.push({ type: "line", xref: "x", yref: "paper", layer: "below", x0: mark.x, x1: mark.x, y0: 0, y1: 1, line: { dash: sort === "fault" ? "solid" : "dot", width: 1, color: colour(name) } });
  }
  const rest = { shapes, yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true } };
  show(place, drawn.length ? inWords(title, drawn, marks) : "", traces, layout(title, unit, { xaxis, rest }));
}

// z: [layer][step]
export function heatMap(place, title, x, z, { range, xaxis = {} } = {}) {
  const trace = { type: "heatmap", x, y: z.map((_, layer) => layer), z, colorscale: "Viridis", zmin: range?.[0], zmax: range?.[1], hovertemplate: "%{x}, layer %{y}: %{z:.3f}<extra></extra>" };
  const newest = z.map((values, layer) => `${layer}: ${figure(values.at(-1) ?? NaN)}`).join(", ");
  const yaxis = { tickformat: "d", dtick: z.length > 12 ? undefined : 1 };
  show(place, `${title}. Newest by layer: ${newest}.`, z.length ? [trace] : [], layout(title, "MoE layer", { xaxis, yaxis }));
}
