// Curves and heat maps by plotly, in the page's colours.
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function layout(title, y, more = {}) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line") };
  return {
    title: { text: title, font: { size: 14 } }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--fg") }, margin: { l: 55, r: 15, t: 40, b: 45 }, height: 320,
    xaxis: { ...axis, title: { text: "step" } }, yaxis: { ...axis, title: { text: y } },
    legend: { orientation: "h", y: -0.25 }, ...more,
  };
}
const OPTIONS = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

// lines: [{name, x, y}]; marks: [{x, text}], such as saves and faults.
export function curves(place, title, unit, lines, marks = []) {
  const drawn = lines.filter((line) => line.y.some((value) => value !== null && value !== undefined));
  document.getElementById(place).hidden = !drawn.length; // before drawing: a chart takes the width of its place
  if (!drawn.length) return;
  const traces = drawn.map((line) => ({ ...line, type: "scatter", mode: line.x.length > 60 ? "lines" : "lines+markers", connectgaps: true }));
  const shapes = marks.map((mark) => ({ type: "line", xref: "x", yref: "paper", x0: mark.x, x1: mark.x, y0: 0, y1: 1, line: { dash: "dot", width: 1, color: mark.bad ? colour("--bad") : colour("--quiet") } }));
  const annotations = marks.filter((mark) => mark.bad).map((mark) => ({ x: mark.x, y: 1, yref: "paper", text: mark.text, showarrow: false, font: { size: 10, color: colour("--bad") } }));
  window.Plotly.react(place, traces, layout(title, unit, { shapes, annotations }), OPTIONS);
}

// z: [layer][step]
export function heatMap(place, title, x, z, range) {
  document.getElementById(place).hidden = !z.length;
  if (!z.length) return;
  const trace = { type: "heatmap", x, y: z.map((_, layer) => layer), z, colorscale: "Viridis", zmin: range?.[0], zmax: range?.[1], hovertemplate: "step %{x}, layer %{y}: %{z:.3f}<extra></extra>" };
  window.Plotly.react(place, [trace], layout(title, "layer", { yaxis: { title: { text: "layer" }, tickformat: "d", dtick: z.length > 12 ? undefined : 1 } }), OPTIONS);
}
