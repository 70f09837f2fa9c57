// One run: curves, experts, plan, checkpoints, events, log; and what can be done with it.
import { api, byId, debounced, bytes, cost, duration, el, follow, moment, progressOf, say } from "/assets/api.js";
import { curves, heatMap } from "/assets/charts.js";

const id = byId("run").dataset.run;
const base = `/v1/jobs/${id}`;
const OVER = ["succeeded", "failed", "cancelled"];
const lines = [];
const marks = [];
let run = null, offset = 0, stage = null, planned = null, endLog = null;

const ACTIONS = [
  ["pause", "Pause", () => !OVER.includes(run.state) && run.desired !== "paused" && run.desired !== "cancelled"],
  ["resume", "Resume", () => !OVER.includes(run.state) && run.desired === "paused"],
  ["cancel", "Cancel", () => !OVER.includes(run.state) && run.desired !== "cancelled"],
  ["retry", "Retry", () => ["failed", "cancelled"].includes(run.state)],
];

async function act(verb) {
  try {
    await api(`${base}/${verb}`, { method: "POST" });
    say(`${verb}: asked for`);
    await show();
  } catch (error) {
    say(error.message);
  }
}

function buttons() {
  const made = ACTIONS.filter(([, , can]) => can()).map(([verb, label]) => {
    const button = el("button", { type: "button", className: verb === "cancel" ? "danger" : "" }, label);
    button.addEventListener("click", () => act(verb));
    return button;
  });
  if (run.state === "succeeded" && ["train", "convert"].includes(run.kind)) {
    const button = el("button", { type: "button" }, "Export");
    button.addEventListener("click", exportIt);
    made.push(button);
  }
  if (byId("buttons").textContent !== made.map((button) => button.textContent).join("")) byId("buttons").replaceChildren(...made);
}

async function exportIt() {
  try {
    const job = { kind: "export", source: run.out, to: "auto", out: `${run.out}-export` };
    const made = await api("/v1/jobs", { method: "POST", body: { job, name: `export of ${run.name || id}` } });
    location.href = `/runs/${made.id}`;
  } catch (error) {
    say(error.message);
  }
}

function facts() {
  const values = {
    Kind: run.kind, User: run.user, Where: run.executor, Folder: run.out, Attempt: run.attempt, Submitted: moment(run.created),
    Started: moment(run.started), Ended: moment(run.ended), "Time left": run.ended ? "" : duration(run.progress?.estimatedRemainingSeconds),
    "Cost so far": cost(run), "Forked from": run.parent,
  };
  byId("facts").replaceChildren(...Object.entries(values).filter(([, v]) => v !== null && v !== undefined && v !== "").flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, String(v))]));
}

async function show() {
  run = await api(base);
  byId("name").textContent = run.name || run.id;
  document.title = `${run.name || run.id} · lamella`;
  const step = run.progress?.steps ? `, step ${run.progress.step} of ${run.progress.steps}` : "";
  byId("state").textContent = run.state + step + (run.failure ? `: ${run.failure}` : "") + (run.reason ? `: ${run.reason}` : "");
  byId("state").className = run.state;
  const percent = progressOf(run);
  byId("bar").replaceChildren(...(percent === null ? [] : [el("progress", { max: 100, value: percent, "aria-label": "Progress" })]));
  byId("spec").textContent = JSON.stringify(run.spec, null, 2);
  buttons();
  facts();
}

async function metrics() {
  if (run.kind !== "train") return;
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
  if (page.data.length && window.Plotly) draw();
}

const column = (name) => ({ x: lines.map((line) => line.step), y: lines.map((line) => line[name] ?? null) });
const matrix = (name) => {
  const with_ = lines.filter((line) => Array.isArray(line[name]) && line[name].length);
  return [with_.map((line) => line.step), with_.length ? with_[0][name].map((_, layer) => with_.map((line) => line[name][layer])) : []];
};

function draw() {
  byId("curves").hidden = false;
  const heldout = new Set(lines.flatMap((line) => Object.keys(line).filter((name) => name.startsWith("heldout_loss") && typeof line[name] === "number")));
  const perSource = lines.flatMap((line) => Object.entries(line)).filter(([name, value]) => name.startsWith("heldout") && value && typeof value === "object" && !Array.isArray(value));
  const sources = new Map();
  for (const [name, value] of perSource) for (const source of Object.keys(value)) sources.set(`${name}: ${source}`, [name, source]);
  curves("loss", "Loss", "nats per token", [
    { name: "loss", ...column("loss") },
    ...[...heldout].map((name) => ({ name: name.replaceAll("_", " "), ...column(name) })),
    ...[...sources].map(([label, [name, source]]) => ({ name: label, x: lines.map((l) => l.step), y: lines.map((l) => l[name]?.[source] ?? null) })),
  ], marks);
  curves("rate", "Learning rate", "", ["lr", "router_lr", "rest_lr", "lora_lr"].map((name) => ({ name, ...column(name) })));
  curves("speed", "Speed", "tokens per second", [{ name: "tokens/s", ...column("tokens_per_s") }], marks);
  curves("mfu", "Model FLOPs utilisation", "share of the peak", [{ name: "MFU", ...column("mfu") }]);
  heatMap("twins", "Share of rows that the twins compute", ...matrix("twin_share"), [0, 1]);
  heatMap("load", "Busiest expert over the mean, minus 1", ...matrix("max_vio"));
  actual();
}

async function plan() {
  if (run.kind !== "train" || planned) return;
  planned = await api("/v1/plans", { method: "POST", body: { submission: run.spec } }).catch(() => null);
  actual();
}

function actual() {
  const stages = Object.values(planned?.training ?? {});
  const values = stages[0];
  if (!values) return;
  const newest = lines.at(-1) ?? {};
  const rows = [
    ["Memory of a rank", values.memory_per_rank?.peak_bytes, newest.peak_gib === undefined ? null : newest.peak_gib * 1024 ** 3, bytes],
    ["Tokens per second", values.time?.tokens_per_s, newest.tokens_per_s, (n) => Math.round(n).toLocaleString()],
    ["Time", values.time?.seconds, run.started ? (run.ended ?? Date.now() / 1000) - run.started : null, duration],
  ].filter(([, a, b]) => typeof a === "number" || typeof b === "number");
  const cell = (value, how) => el("td", {}, typeof value === "number" ? how(value) : "not known");
  byId("plan").replaceChildren(el("thead", {}, el("tr", {}, ...["", "planned", "actual"].map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, ...rows.map(([name, a, b, how]) => el("tr", {}, el("th", { scope: "row" }, name), cell(a, how), cell(b, how)))));
  byId("planned").hidden = rows.length === 0;
}

async function checkpoints() {
  if (run.kind !== "train") return;
  const found = await api(`${base}/checkpoints`);
  byId("kept").hidden = found.length === 0;
  byId("checkpoints").replaceChildren(...found.map((kept) => {
    const verified = el("td", {}, kept.verified === null ? "" : kept.verified ? "yes" : `no: ${kept.problems.join("; ")}`);
    if (kept.verified === null) {
      const button = el("button", { type: "button", "aria-label": `Verify step ${kept.step}` }, "Verify");
      button.addEventListener("click", async () => {
        button.disabled = true;
        const all = await api(`${base}/checkpoints?verify=${kept.step}`);
        const its = all.find((one) => one.step === kept.step && one.stage === kept.stage);
        verified.replaceChildren(its.verified ? "yes, every byte" : `no: ${its.problems.join("; ")}`);
      });
      verified.append(button);
    }
    const fork = el("button", { type: "button", "aria-label": `Fork from step ${kept.step}` }, "Fork");
    fork.addEventListener("click", () => forkFrom(kept.step));
    return el("tr", {}, el("td", {}, String(kept.step)), el("td", {}, bytes(kept.bytes)), el("td", {}, moment(kept.time)), verified, el("td", {}, fork));
  }));
}

async function forkFrom(step) {
  const out = prompt("Folder of the new run:", `${run.out}-from-${step}`);
  if (!out) return;
  try {
    const made = await api(`${base}/fork`, { method: "POST", body: { out, step } });
    location.href = `/runs/${made.id}`;
  } catch (error) {
    say(error.message);
  }
}

function heard(event) {
  const text = Object.entries(event.data ?? {}).filter(([, v]) => v !== null && v !== "").map(([k, v]) => `${k} ${typeof v === "object" ? JSON.stringify(v) : v}`).join(", ");
  byId("events").append(el("li", {}, `${moment(event.time)}  ${event.event}${event.state ? ` ${event.state}` : ""}${text ? `: ${text}` : ""}`));
  const bad = ["fault", "restart", "failure"].some((word) => event.event.includes(word)) || event.state === "failed";
  if (typeof event.data?.step === "number" && (bad || event.event === "save")) marks.push({ x: event.data.step, text: event.event, bad });
  soon();
}

async function logs(source) {
  endLog?.();
  const place = byId("log");
  place.textContent = "";
  const now = await api(`${base}/logs?${new URLSearchParams({ ...(source ? { source } : {}) })}`);
  byId("source").replaceChildren(...now.sources.map((name) => el("option", { selected: name === now.source }, name)));
  place.textContent = now.text;
  place.scrollTop = place.scrollHeight;
  endLog = follow(`${base}/logs/stream?${new URLSearchParams({ source: now.source, offset: now.offset })}`, (part) => {
    if (!part.text) return;
    const atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
    place.append(part.text);
    if (place.textContent.length > 400_000) place.textContent = place.textContent.slice(-200_000);
    if (atEnd) place.scrollTop = place.scrollHeight;
  });
}

async function result() {
  if (run.kind !== "evaluate" || !run.ended) return;
  const values = await api(`${base}/result`);
  byId("figures").hidden = Object.keys(values).length === 0;
  byId("result").textContent = JSON.stringify(values, null, 2);
}

async function all() {
  try {
    await show();
    await Promise.all([metrics(), checkpoints(), result()]);
  } catch (error) {
    say(error.message);
  }
}
const soon = debounced(all, 700);

byId("source").addEventListener("change", (event) => logs(event.target.value));
byId("stage").addEventListener("change", (event) => {
  [stage, offset, lines.length] = [event.target.value, 0, 0];
  metrics();
});
await all();
await Promise.all([plan(), logs(null)]).catch((error) => say(error.message));
follow(`${base}/events/stream`, heard);
setInterval(() => document.hidden || OVER.includes(run?.state) || all(), 3000);
