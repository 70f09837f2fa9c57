// What training has written: curves, experts, events on both, and the plan beside what came.
import { api, byId, bytes, duration, el, moment } from "/assets/api.js";
import { curves, heatMap } from "/assets/charts.js";
import { byStep, markOf, placed } from "/assets/marks.js";

const MOST_ROWS = 500;

// Lines with an empty one in each long pause between two.
function apart(lines) {
  const gaps = lines.slice(1).map((line, i) => line.time - lines[i].time);
  const usual = gaps.toSorted((a, b) => a - b)[gaps.length >> 1] ?? 0;
  return lines.flatMap((line, i) => (i && gaps[i - 1] > 5 * usual ? [{ time: lines[i - 1].time + usual }, { time: line.time - usual }, line] : [line]));
}

export function training(base) {
  const lines = [];
  const marks = [];
  let offset = 0, stage = null, planned = null, actualOf = null, drawn = 0;

  const isTime = () => byId("axis").value === "time";

  async function read() {
    const first = offset === 0;
    const query = new URLSearchParams({ offset, ...(first ? { points: 2000 } : {}), ...(stage ? { stage } : {}) });
    const page = await api(`${base}/metrics?${query}`);
    if (page.stages.length > 1 && byId("stagelabel").hidden) {
      byId("stagelabel").hidden = false;
      byId("stage").replaceChildren(...page.stages.map((name) => el("option", { selected: name === page.stage }, name)));
    }
    stage = page.stage || stage;
    offset = page.offset;
    lines.push(...page.data);
    if ((page.data.length || drawn !== marks.length) && lines.length) draw();
  }

  function draw() {
    drawn = marks.length;
    byId("curves").hidden = false;
    const shown = isTime() ? lines : byStep(lines);
    const x = (line) => (isTime() ? new Date(line.time * 1000) : line.step);
    const xaxis = isTime() ? { type: "date", title: { text: "time" } } : { type: "linear", title: { text: "step" } };
    const its = placed(marks.filter((mark) => mark.stage === null || mark.stage === stage), lines)
      .map((mark) => ({ ...mark, x: isTime() ? new Date(mark.time * 1000) : mark.step, words: `step ${mark.step}: ${mark.words}` }));
    const column = (name, value = (line) => line[name]) => ({ name: name.replaceAll("_", " "), x: shown.map(x), y: shown.map((line) => value(line) ?? null) });
    const matrix = (name) => {
      const with_ = shown.filter((line) => Array.isArray(line[name]) && line[name].length);
      const columns = isTime() ? apart(with_) : with_; // where nothing ran, nothing is drawn
      return [columns.map(x), with_.length ? with_[0][name].map((_, layer) => columns.map((line) => line[name]?.[layer] ?? null)) : []];
    };
    const sources = [...new Set(shown.flatMap((line) => Object.keys(line.heldout_losses ?? {})))];
    const short = sources.map((source) => source.split("/").pop()); // paths are long; their ends will do where they differ
    const called = new Set(short).size === sources.length ? short : sources;
    curves("loss", "Loss", "nats per token", [column("loss"), column("heldout_loss")], { marks: its, xaxis });
    curves("heldout", "Held-out loss of each source", "nats per token", sources.map((source, i) => ({ ...column(source, (line) => line.heldout_losses?.[source]), name: called[i] })), { marks: its, xaxis });
    curves("rate", "Learning rate", "", ["lr", "router_lr", "rest_lr", "lora_lr"].map((name) => column(name)), { xaxis });
    curves("speed", "Speed", "tokens per second", [column("tokens_per_s")], { marks: its, xaxis });
    curves("mfu", "Model FLOPs utilisation", "share of the peak", [column("mfu")], { marks: its, xaxis });
    heatMap("twins", "Share of rows that the twins compute", ...matrix("twin_share"), { range: [0, 1], xaxis });
    heatMap("load", "Expert load: the busiest over the mean, minus 1", ...matrix("max_vio"), { xaxis });
    heatMap("entropy", "How even the load is: 1 is even", ...matrix("router_entropy"), { range: [0, 1], xaxis });
    table(its);
    actual();
  }

  function table(its) {
    byId("marked").hidden = its.length === 0;
    byId("marks").replaceChildren(...its.slice(-MOST_ROWS).map((mark) => el("tr", {},
      el("td", {}, String(mark.step)), el("td", {}, moment(mark.time)), el("td", { className: `mark ${mark.sort}` }, mark.words.replace(/^step \d+: /, "")))));
  }

  function actual() {
    const values = planned && (planned[stage] ?? Object.values(planned)[0]);
    if (!values || !actualOf) return;
    const { run, used } = actualOf;
    const newest = byStep(lines).at(-1) ?? {};
    const several = Object.keys(planned).length > 1;
    const sum = (name) => Object.values(planned).reduce((all, plan) => (typeof plan.time?.[name] === "number" && all !== null ? all + plan.time[name] : null), 0);
    const hours = (n) => `${n.toFixed(2)} h`;
    const rows = [
      ["Steps", values.batch?.steps, newest.step, (n) => n.toLocaleString()],
      ["Tokens", values.batch?.tokens, newest.tokens, (n) => n.toLocaleString()],
      ["Memory of a rank", values.memory_per_rank?.peak_bytes, newest.peak_gib ? newest.peak_gib * 1024 ** 3 : null, bytes],
      ["Tokens per second", values.time?.tokens_per_s, newest.tokens_per_s, (n) => Math.round(n).toLocaleString()],
      ["MFU", values.time?.assumed_mfu, newest.mfu, (n) => `${(100 * n).toFixed(1)} %`],
      [several ? "Time, all stages" : "Time", sum("seconds"), used, duration],
      ["GPU hours", run.gpus ? sum("gpu_hours") : null, run.gpus ? (used * run.gpus) / 3600 : null, hours],
    ].filter(([, a, b]) => typeof a === "number" || typeof b === "number");
    const cell = (value, how) => el("td", {}, typeof value === "number" ? how(value) : "not known");
    byId("plan").replaceChildren(el("thead", {}, el("tr", {}, ...["", "planned", "actual"].map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, ...rows.map(([name, a, b, how]) => el("tr", {}, el("th", { scope: "row" }, name), cell(a, how), cell(b, how)))));
    byId("planned").hidden = rows.length === 0;
  }

  async function plan(run) {
    const answer = await api("/v1/plans", { method: "POST", body: { submission: run.spec } }).catch(() => null);
    planned = answer && Object.keys(answer.training).length ? answer.training : null;
    actual();
  }

  byId("axis").addEventListener("change", () => lines.length && draw());
  byId("stage").addEventListener("change", (event) => {
    [stage, offset, lines.length] = [event.target.value, 0, 0];
    read();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => lines.length && draw());
  return {
    read, plan,
    heard(event) {
      const mark = markOf(event);
      if (mark && !marks.some((known) => known.id === mark.id)) marks.push(mark);
    },
    // what the run has used so far
    compare(run, used) {
      actualOf = { run, used };
      actual();
    },
  };
}
