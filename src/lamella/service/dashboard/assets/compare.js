// Losses of several runs in one picture, and the keys in which their recipes differ.
import { api, byId, cost, el, say } from "/assets/api.js";
import { curves } from "/assets/charts.js";
import { byStep } from "/assets/marks.js";

const form = byId("choose");
form.elements.runs.value = new URLSearchParams(location.search).get("runs") ?? "";

function flat(values, prefix = "") {
  return Object.entries(values ?? {}).flatMap(([name, value]) =>
    value && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${name}.`) : [[prefix + name, JSON.stringify(value)]]);
}

async function show() {
  const ids = form.elements.runs.value.split(",").map((word) => word.trim()).filter(Boolean);
  if (!ids.length) return;
  const runs = await Promise.all(ids.map((id) => api(`/v1/jobs/${encodeURIComponent(id)}`)));
  const pages = await Promise.all(runs.map((run) => api(`/v1/jobs/${run.id}/metrics?points=2000`)));
  const written = pages.map((page) => byStep(page.data));
  const lines = (name) => written.map((data, i) => ({ name: runs[i].name || runs[i].id, x: data.map((line) => line.step), y: data.map((line) => line[name] ?? null) }));
  curves("loss", "Loss", "nats per token", lines("loss"));
  curves("heldout", "Held-out loss", "nats per token", lines("heldout_loss"));
  const last = (data, name) => data.findLast((line) => typeof line[name] === "number")?.[name];
  const figures = (run, data) => [["state", run.state], ["step", last(data, "step")], ["loss", last(data, "loss")?.toFixed(4)], ["held-out loss", last(data, "heldout_loss")?.toFixed(4)], ["tokens per second", last(data, "tokens_per_s")?.toFixed(0)], ["cost so far", cost(run)]];
  const recipes = runs.map((run, i) => new Map([...figures(run, written[i]), ...flat(run.spec.job.recipe ?? run.spec.job)]));
  const always = new Set(figures(runs[0], written[0]).map(([name]) => name));
  const names = [...new Set(recipes.flatMap((recipe) => [...recipe.keys()]))].filter((name) => always.has(name) || new Set(recipes.map((recipe) => recipe.get(name))).size > 1);
  const head = el("tr", {}, el("th", { scope: "col" }, "key"), ...runs.map((run) => el("th", { scope: "col" }, el("a", { href: `/runs/${run.id}` }, run.name || run.id))));
  byId("keys").replaceChildren(el("thead", {}, head), el("tbody", {}, ...names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), ...recipes.map((recipe) => el("td", {}, String(recipe.get(name) ?? "")))))));
  say(names.length === always.size ? "The recipes are the same." : "");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  history.replaceState(null, "", `/compare?runs=${encodeURIComponent(form.elements.runs.value)}`);
  show().catch((error) => say(error.message));
});
show().catch((error) => say(error.message));
