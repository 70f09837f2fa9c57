// The form of a submission, made from the keys of recipes; what is typed is planned, so mistakes are told at once.
import { api, byId, el, say } from "/assets/api.js";

const form = byId("job");
const FIRST = {
  train: ["model", "out", "data", "steps", "seq_len", "samples_per_step", "lr"],
  convert: ["model", "out", "layers", "dtype"],
  evaluate: ["folder", "data", "dense", "tokens"],
  export: ["source", "to", "out"],
};
let keys = [];

// As YAML reads a scalar; lists and sections as JSON.
function parsed(text) {
  if (/^[[{"]/.test(text)) return JSON.parse(text);
  if (["true", "false", "null"].includes(text)) return JSON.parse(text);
  return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
}

async function keysOf(kind) {
  if (kind === "train") return (await api("/v1/schemas/train")).keys;
  if (kind === "convert") {
    const method = byId("method").value;
    const [common, own] = await Promise.all([api("/v1/schemas/convert"), api(`/v1/schemas/convert?method=${method}`)]);
    return [...common.keys.filter((key) => key.name !== "method"), ...own.keys];
  }
  const schema = await api("/v1/schemas/submission");
  const name = kind === "evaluate" ? "EvaluateJob" : "ExportJob";
  const found = schema.$defs[name];
  return Object.entries(found.properties).filter(([key]) => key !== "kind").map(([key, value]) => ({
    name: key, type: value.enum?.join(" | ") ?? value.type ?? "", default: value.default === undefined || value.default === null ? "" : String(value.default),
    text: value.description ?? "", choices: value.enum,
  }));
}

function field(key) {
  const choices = key.choices ?? (/^("[^"]*" \| )*"[^"]*"$/.test(key.type) ? key.type.split(" | ").map((word) => JSON.parse(word)) : null);
  const about = `about-${key.name}`;
  const input = choices
    ? el("select", { name: `key:${key.name}`, "aria-describedby": about }, el("option", { value: "" }, key.default ? `default: ${key.default}` : "choose"), ...choices.map((word) => el("option", {}, String(word))))
    : el("input", { name: `key:${key.name}`, placeholder: key.default, "aria-describedby": about });
  return el("div", { className: "key" }, el("label", {}, key.name, input), el("small", { id: about }, `${key.type}. ${key.text}`));
}

async function fill() {
  const kind = form.elements.kind.value;
  byId("methodlabel").hidden = kind !== "convert";
  byId("rankslabel").hidden = kind !== "train";
  keys = (await keysOf(kind)).filter((key) => !key.name.includes("[]"));
  const first = FIRST[kind];
  byId("fields").replaceChildren(...keys.filter((key) => first.includes(key.name)).map(field));
  const rest = keys.filter((key) => !first.includes(key.name));
  byId("more").replaceChildren(...rest.map(field));
  byId("rest").hidden = rest.length === 0;
  check();
}

function submission() {
  const kind = form.elements.kind.value;
  const values = {};
  for (const input of form.elements) {
    if (!input.name?.startsWith("key:") || input.value.trim() === "") continue;
    const path = input.name.slice(4).split(".");
    let place = values;
    for (const part of path.slice(0, -1)) place = typeof place[part] === "object" && place[part] ? place[part] : (place[part] = {});
    place[path.at(-1)] = parsed(input.value.trim());
  }
  let job = { kind, ...values };
  if (kind === "train") job = { kind, recipe: values, ...(form.elements.ranks.value ? { ranks: parsed(form.elements.ranks.value) } : {}) };
  if (kind === "convert") job = { kind, recipe: { method: byId("method").value, ...values } };
  return { job, name: form.elements.name.value, executor: form.elements.executor.value };
}

let turn = 0, waiting = null;
async function check() {
  const mine = ++turn;
  try {
    const plan = await api("/v1/plans", { method: "POST", body: { submission: submission() } });
    if (mine !== turn) return;
    byId("problem").textContent = "";
    byId("submit").disabled = false;
    byId("plan").textContent = [`${plan.command}`, `GPUs ${plan.gpus}, cores ${plan.cores}, writes ${plan.out ?? "figures"}`, plan.problem ? `not planned: ${plan.problem}` : plan.text].join("\n\n");
  } catch (error) {
    if (mine !== turn) return;
    byId("problem").textContent = error.message;
    byId("submit").disabled = true;
  }
}

form.addEventListener("input", (event) => {
  if (event.target === form.elements.kind || event.target === byId("method")) return;
  clearTimeout(waiting);
  waiting = setTimeout(check, 300);
});
form.elements.kind.addEventListener("change", fill);
byId("method").addEventListener("change", fill);
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("submit").disabled = true;
  try {
    const made = await api("/v1/jobs", { method: "POST", body: submission() });
    location.href = `/runs/${made.id}`;
  } catch (error) {
    byId("problem").textContent = error.message;
    byId("submit").disabled = false;
  }
});
fill().catch((error) => say(error.message));
