// One run: what can be done with it, what it has used, checkpoints, events, log; training and conversion have scripts
// of their own.
import { api, byId, debounced, bytes, cost, duration, el, follow, moment, progressOf, say, used } from "/assets/api.js";
import { showConversion, showResult } from "/assets/conversion.js";
import { training } from "/assets/training.js";

const id = byId("run").dataset.run;
const base = `/v1/jobs/${id}`;
const OVER = ["succeeded", "failed", "cancelled"];
const MOST_EVENTS = 1000;
const TARGETS = ["auto", "glm4-moe", "mixtral", "qwen3-moe", "qwen2-moe", "ernie", "gguf", "dense"];
const curves = training(base);
let run = null, endLog = null;

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
    const target = el("select", { "aria-label": "Export to" }, ...TARGETS.map((name) => el("option", {}, name)));
    button.addEventListener("click", () => exportTo(target.value));
    made.push(button, target);
  }
  if (byId("buttons").textContent !== made.map((button) => button.textContent).join("")) byId("buttons").replaceChildren(...made);
}

async function exportTo(to) {
  try {
    const job = { kind: "export", source: run.out, to, out: `${run.out}-${to === "auto" ? "export" : to}` };
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
  if (run.kind === "train") curves.compare(run, used(run));
}

const verifying = new Map(); // what was asked of a checkpoint, by stage and step: it outlives a new drawing of the list

async function verify(kept, key) {
  verifying.set(key, "reading");
  const drawn = () => checkpoints().catch((error) => say(error.message));
  await drawn();
  try {
    const all = await api(`${base}/checkpoints?verify=${kept.step}`);
    const its = all.find((one) => one.step === kept.step && one.stage === kept.stage);
    verifying.set(key, its.verified ? "yes, every byte" : `no: ${its.problems.join("; ")}`);
  } catch (error) {
    verifying.delete(key);
    say(error.message);
  }
  await drawn();
}

async function checkpoints() {
  if (run.kind !== "train") return;
  const found = await api(`${base}/checkpoints`);
  byId("kept").hidden = found.length === 0;
  byId("checkpoints").replaceChildren(...found.map((kept) => {
    const key = `${kept.stage}/${kept.step}`;
    const verified = el("td", {}, verifying.get(key) ?? (kept.verified === null ? "" : `no: ${kept.problems.join("; ")}`));
    if (kept.verified === null && !verifying.has(key)) {
      const button = el("button", { type: "button", "aria-label": `Verify step ${kept.step}` }, "Verify");
      button.addEventListener("click", () => verify(kept, key));
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
  while (byId("events").childElementCount > MOST_EVENTS) byId("events").firstElementChild.remove();
  curves.heard(event);
  if (event.event === "save") keptSoon();
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
  if (run.kind === "convert" && run.state === "succeeded") await showConversion(base, run);
  if (["verify", "evaluate"].includes(run.kind) && run.ended) showResult(await api(`${base}/result`));
}

async function all() {
  try {
    await show();
    await Promise.all([run.kind === "train" ? curves.read() : null, result()]);
  } catch (error) {
    say(error.message);
  }
}
const soon = debounced(all, 700);
const keptSoon = debounced(() => checkpoints().catch((error) => say(error.message)), 1500);

byId("source").addEventListener("change", (event) => logs(event.target.value));
follow(`${base}/events/stream`, heard);
await all();
await Promise.all([logs(null), checkpoints(), run?.kind === "train" ? curves.plan(run) : null]).catch((error) => say(error.message));
setInterval(() => document.hidden || OVER.includes(run?.state) || all(), 3000);
