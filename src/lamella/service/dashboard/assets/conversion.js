// What a conversion made and what has checked it; the figures of a verification or an evaluation.
import { api, byId, bytes, el, moment, say } from "/assets/api.js";

const number = (value) => (typeof value !== "number" ? "not a number" : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2) : Number(value.toPrecision(5)).toString());
const row = (head, ...cells) => el("tr", {}, el("th", { scope: "row" }, head), ...cells.map((cell) => (cell instanceof Node ? cell : el("td", {}, cell ?? ""))));
const head = (...names) => el("thead", {}, el("tr", {}, ...names.map((name) => (name ? el("th", { scope: "col" }, name) : el("td", {})))));
const verdict = (passed) => el("td", { className: passed ? "succeeded" : "failed" }, passed ? "pass" : "FAIL");

// How a check ended, in one line.
export function inOneLine(check) {
  const { kind, state, summary } = check;
  if (kind === "verify" && "passed" in summary) {
    const { worst } = summary;
    const nearest = worst ? `; ${worst.dtype}, ${worst.what}: ${worst.name} ${number(worst.figure)} of ${number(worst.bound)} allowed` : "";
    return summary.passed ? `verified: ${summary.checks} checks pass${nearest}` : `NOT the dense model: ${summary.failed} of ${summary.checks} checks fail${nearest}`;
  }
  if (kind === "evaluate" && summary.model) {
    const beside = summary.dense ? `, dense ${number(summary.dense.perplexity)}` : "";
    return `perplexity ${number(summary.model.perplexity)}${beside}`;
  }
  return `${kind} ${state}`;
}

export const className = (check) => (check.summary.passed === true ? "succeeded" : check.summary.passed === false || check.state === "failed" ? "failed" : "");

// The figures of `lamella verify`.
function checks(result) {
  const place = el("div", {});
  place.append(el("p", { className: result.passed ? "succeeded" : "failed" }, `${result.moe} ${result.passed ? "matches" : "does NOT match"} ${result.dense} on ${result.data}, ${Object.entries(result.tokens).map(([dtype, count]) => `${count} tokens in ${dtype}`).join(", ")}.`));
  const rows = result.checks.map((check) => el("tr", {}, el("td", {}, check.dtype), el("td", {}, check.what), el("td", {}, check.name), el("td", { className: "figure" }, number(check.figure)),
    el("td", { className: "figure" }, check.bound === null ? "" : `${check.at_least ? "≥" : "≤"} ${number(check.bound)}`), check.bound === null ? el("td", {}, "") : verdict(check.passed), el("td", { className: "wrap" }, check.reason)));
  place.append(el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Checks of the logits" }, el("table", {}, head("type", "compared", "measure", "figure", "bound", "verdict", "because"), el("tbody", {}, ...rows))));
  return place;
}

// The figures of `lamella evaluate`.
function perplexities(result) {
  const named = [["model", result.folder], ["dense", result.options?.dense ?? result.dense_name]].filter(([key]) => typeof result[key] === "object" && result[key]);
  const rows = named.map(([key, name]) => row(key === "model" ? name : "dense", number(result[key].nats_per_token), number(result[key].perplexity), number(result[key].bits_per_byte), result[key].tokens.toLocaleString(), `${result[key].wall_s.toFixed(1)} s`));
  const place = el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Perplexity" }, el("table", {}, head("model", "nats per token", "perplexity", "bits per byte", "tokens", "time"), el("tbody", {}, ...rows)));
  return place;
}

// Show the result of a job that measures; false while there is none.
export function showResult(result) {
  const known = Array.isArray(result.checks) ? checks(result) : result.model?.perplexity ? perplexities(result) : Object.keys(result).length ? el("pre", { tabIndex: 0 }, JSON.stringify(result, null, 2)) : null;
  byId("figures").hidden = known === null;
  if (known) byId("result").replaceChildren(known);
}

function layers(found) {
  const parts = [...new Set(found.layers.flatMap((layer) => Object.keys(layer.parameters)))];
  const guard = new Map((found.notes.guard ?? []).map((said) => [said.layer, said]));
  const rows = found.layers.map((layer) => row(String(layer.layer), ...parts.map((part) => el("td", { className: "figure" }, layer.parameters[part]?.toLocaleString() ?? "")), bytes(layer.bytes),
    ...(guard.size ? [guard.has(layer.layer) ? `${number(guard.get(layer.layer).before)} → ${number(guard.get(layer.layer).after)}, ${guard.get(layer.layer).kept ? "converted" : `stays dense: ${guard.get(layer.layer).reason}`}` : ""] : [])));
  return el("table", {}, head("layer", ...parts.map((part) => `${part}, parameters`), "size", ...(guard.size ? ["loss before → after"] : [])), el("tbody", {}, ...rows));
}

// The conversion of a run; `again` is called when a check was submitted.
export async function showConversion(base, run) {
  const { found, checks: measured, path } = await api(`${base}/conversion`);
  if (found.recipe) {
    const { source, recipe, notes } = found;
    const facts = {
      Method: recipe.method, "Made of": `${source.model ?? "?"}${source.architecture ? ` (${source.architecture})` : ""}`, Licence: source.licence,
      "Source files": Object.entries(source.files ?? {}).map(([name, size]) => `${name}, ${bytes(size)}`).join("; "),
      "Made": `${found.parameters.toLocaleString()} parameters in ${found.tensors.toLocaleString()} tensors, ${bytes(found.bytes)}, each with its hash in lamella.json`,
      Recipe: Object.entries(recipe).filter(([key, value]) => key !== "method" && value !== null).map(([key, value]) => `${key}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", "),
      "To know": (notes.remarks ?? []).join("; "), Routing: notes.gates?.summary, Healing: notes.heal ? JSON.stringify(notes.heal) : "",
    };
    byId("made").replaceChildren(...Object.entries(facts).filter(([, v]) => v).flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, String(v))]));
    byId("layers").replaceChildren(layers(found));
  }
  byId("conversion").hidden = false;
  byId("perlayer").hidden = !found.layers?.length;
  byId("checked").replaceChildren(...measured.map((check) => el("li", { className: className(check) }, el("a", { href: `/runs/${check.run}` }, `${check.kind} ${check.run}`), ` ${inOneLine(check)}${check.ended ? `, ${moment(check.ended)}` : ""}`)));
  byId("unchecked").hidden = measured.length > 0;
  const newest = measured.find((check) => check.kind === "verify" && "passed" in check.summary);
  if (newest) showResult(await api(`/v1/jobs/${newest.run}/result`));
  const slices = found.recipe?.method === "slice" || found.recipe?.method === "attention";
  byId("verify").hidden = run.state !== "succeeded" || !slices;
  byId("evaluate").hidden = run.state !== "succeeded";
  const dense = run.spec.job.recipe?.model ?? null;
  byId("verify").onclick = () => submit({ kind: "verify", moe: path, ...(dense ? { dense } : {}) }, `verify ${run.name}`);
  byId("evaluate").onclick = () => submit({ kind: "evaluate", folder: path, dense: dense ?? "embedded" }, `evaluate ${run.name}`);
}

async function submit(job, name) {
  try {
    location.href = `/runs/${(await api("/v1/jobs", { method: "POST", body: { job, name: name.slice(0, 200) } })).id}`;
  } catch (error) {
    say(error.message);
  }
}
