// The form of a submission, made from the keys of recipes; what is typed is planned, so mistakes are told at once.
import { api, byId, el, say } from "/assets/api.js";
import { parsed } from "/assets/values.js";

const form = byId("job");
const FIRST = {
  train: ["model", "out", "data", "steps", "seq_len", "samples_per_step", "lr"],
  convert: ["model", "out", "layers", "dtype"],
  verify: ["moe", "dense", "data"],
  evaluate: ["folder", "data", "dense", "tokens"],
  export: ["source", "to", "out"],
};
const JOBS = { verify: "VerifyJob", evaluate: "EvaluateJob", export: "ExportJob" };
const schema = api("/v1/schemas/submission");

// The fields of a section of the API as keys of a recipe are told.
function fieldsOf(section) {
  return Object.entries(section.properties).filter(([name]) => name !== "kind").map(([name, value]) => {
    const kinds = [value, ...(value.anyOf ?? [])];
    return {
      name, type: kinds.map((kind) => kind.enum?.join(" | ") ?? kind.type).filter(Boolean).join(" | "),
      default: value.default === undefined || value.default === null ? "" : String(value.default),
      text: value.description ?? "", choices: kinds.find((kind) => kind.enum)?.enum ?? (value.type === "boolean" ? [true, false] : undefined),
    };
  });
}

async function keysOf(kind) {
  if (kind === "train") return (await api("/v1/schemas/train")).keys;
  if (kind === "convert") {
    const [common, own] = await Promise.all([api("/v1/schemas/convert"), api(`/v1/schemas/convert?method=${byId("method").value}`)]);
    return [...common.keys.filter((key) => key.name !== "method"), ...own.keys];
  }
  return fieldsOf((await schema).$defs[JOBS[kind]]);
}

function field(key, prefix = "key:") {
  const choices = key.choices ?? (/^("[^"]*" \| )*"[^"]*"$/.test(key.type) ? key.type.split(" | ").map((word) => JSON.parse(word)) : key.type === "bool" ? ["true", "false"] : null);
  const id = prefix + key.name;
  const input = choices
    ? el("select", { name: id, "aria-describedby": `about-${id}` }, el("option", { value: "" }, key.default ? `default: ${key.default}` : "choose"), ...choices.map((word) => el("option", {}, String(word))))
    : el("input", { name: id, placeholder: key.default, "aria-describedby": `wrong-${id} about-${id}` });
  return el("div", { className: "key" }, el("label", {}, key.name, input), el("small", { id: `wrong-${id}`, className: "wrong" }), el("small", { id: `about-${id}` }, `${key.type}. ${key.text}`));
}

async function fill() {
  const kind = form.elements.kind.value;
  byId("methodlabel").hidden = kind !== "convert";
  byId("rankslabel").hidden = kind !== "train";
  const keys = (await keysOf(kind)).filter((key) => !key.name.includes("[]"));
  if (kind !== form.elements.kind.value) return; // another one was chosen meanwhile
  const first = FIRST[kind];
  byId("fields").replaceChildren(...first.flatMap((name) => keys.filter((key) => key.name === name)).map((key) => field(key)));
  const rest = keys.filter((key) => !first.includes(key.name));
  byId("more").replaceChildren(...rest.map((key) => field(key)));
  byId("rest").hidden = rest.length === 0;
  check();
}

async function place() {
  const local = form.elements.executor.value === "local";
  byId("coreslabel").hidden = !local;
  if (!local && !byId("cluster").childElementCount) byId("cluster").replaceChildren(...fieldsOf((await schema).$defs.Cluster).map((key) => field(key, "cluster:")));
  byId("clusterbox").hidden = local;
}

// {name: value} of the inputs that begin so, sections nested.
function typed(prefix) {
  const values = {};
  for (const input of form.elements) {
    if (!input.name?.startsWith(prefix) || input.value.trim() === "") continue;
    const path = input.name.slice(prefix.length).split(".");
    let within = values;
    for (const part of path.slice(0, -1)) within = typeof within[part] === "object" && within[part] ? within[part] : (within[part] = {});
    try {
      within[path.at(-1)] = parsed(input.value.trim());
    } catch (error) {
      throw Object.assign(new Error(`${path.join(".")}: ${error.message}`), { errors: [{ key: path.join("."), problem: error.message }] });
    }
  }
  return values;
}

function submission() {
  const { kind: { value: kind }, name, executor, ranks, cores, priority } = form.elements;
  const number = (input) => (input.value.trim() ? parsed(input.value.trim()) : undefined);
  const values = typed("key:");
  const job = kind === "train" ? { kind, recipe: values, ranks: number(ranks) } : kind === "convert" ? { kind, recipe: { method: byId("method").value, ...values } } : { kind, ...values };
  const local = executor.value === "local";
  return { job, name: name.value, executor: executor.value, priority: number(priority), cores: local ? number(cores) : undefined, cluster: local ? undefined : typed("cluster:") };
}

// Mark the inputs that an answer found wrong; what belongs to none stands above the button.
function tell(errors, message) {
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  for (const place of form.querySelectorAll(".wrong")) place.textContent = "";
  for (const { key, problem } of errors) {
    const name = key.replace(/^job\.(\w+\.)?(recipe\.)?/, "");
    const input = form.elements[`key:${name}`] ?? form.elements[`cluster:${name.replace(/^cluster\./, "")}`] ?? form.elements[name];
    if (!input) continue;
    input.setAttribute("aria-invalid", "true");
    const place = byId(`wrong-${input.name}`);
    if (place) place.textContent = problem;
    if (byId("rest").contains(input)) byId("rest").open = true;
  }
  byId("problem").textContent = message;
}

let turn = 0, waiting = null;
async function check() {
  const mine = ++turn;
  try {
    const { problem, errors, plan } = await api("/v1/checks", { method: "POST", body: submission() });
    if (mine !== turn) return;
    tell(errors, problem);
    byId("submit").disabled = plan === null;
    if (plan === null) return void (byId("plan").textContent = "The plan appears here once nothing is wrong.");
    byId("plan").textContent = [`${plan.command}`, `GPUs ${plan.gpus}, cores ${plan.cores}, writes ${plan.out ?? "figures"}`, plan.problem ? `not planned: ${plan.problem}` : plan.text].join("\n\n");
    byId("files").replaceChildren(...Object.entries(plan.files).flatMap(([name, content]) => [el("h3", {}, name), el("pre", { tabIndex: 0 }, content)]));
  } catch (error) {
    if (mine !== turn) return;
    tell(error.errors ?? [], error.message);
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
form.elements.executor.addEventListener("change", () => place().then(check).catch((error) => say(error.message)));
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("submit").disabled = true;
  try {
    const made = await api("/v1/jobs", { method: "POST", body: submission() });
    location.href = `/runs/${made.id}`;
  } catch (error) {
    tell(error.errors ?? [], error.message);
    byId("submit").disabled = false;
  }
});
fill().catch((error) => say(error.message));
