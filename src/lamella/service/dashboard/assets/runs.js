// The list of runs: a page at a time, kept current by the stream of events.
import { api, byId, debounced, cost, duration, el, follow, moment, progressOf, say } from "/assets/api.js";

const STATES = ["validating", "queued", "starting", "running", "pausing", "paused", "preempted", "cancelling", "succeeded", "failed", "cancelled", "lost"];
const PAGE = 50;
const form = byId("filter");
const chosen = new Set();
let shown = PAGE;

for (const state of STATES) form.elements.state.append(el("option", {}, state));

function row(run) {
  const percent = progressOf(run);
  const box = el("input", { type: "checkbox", checked: chosen.has(run.id), "aria-label": `Select ${run.name || run.id}` });
  box.addEventListener("change", () => {
    box.checked ? chosen.add(run.id) : chosen.delete(run.id);
    byId("compare").disabled = chosen.size < 2;
  });
  const bar = percent === null ? "" : el("progress", { max: 100, value: percent, title: `${percent} %`, "aria-label": `${percent} % of ${run.name || run.id}` });
  const loss = run.progress?.metrics?.loss ?? run.progress?.metrics?.find?.((m) => m.name === "loss")?.value;
  return el("tr", {},
    el("td", {}, box),
    el("td", {}, el("a", { href: `/runs/${run.id}` }, run.name || run.id)),
    el("td", {}, run.kind),
    el("td", { className: run.state, title: run.reason }, run.state + (run.failure ? ` (${run.failure})` : "")),
    el("td", {}, bar),
    el("td", {}, typeof loss === "number" ? loss.toFixed(3) : ""),
    el("td", {}, run.ended ? "" : duration(run.progress?.estimatedRemainingSeconds)),
    el("td", {}, cost(run)),
    el("td", {}, run.user),
    el("td", {}, moment(run.created)));
}

async function load() {
  const query = new URLSearchParams({ limit: Math.min(500, shown) });
  for (const name of ["search", "state", "kind"]) if (form.elements[name].value) query.set(name, form.elements[name].value);
  try {
    const [page, service] = await Promise.all([api(`/v1/jobs?${query}`), api("/v1/service")]);
    const focused = document.activeElement?.closest("tr")?.querySelector("a")?.href;
    byId("runs").replaceChildren(...page.data.map(row));
    if (focused) [...byId("runs").querySelectorAll("a")].find((link) => link.href === focused)?.focus();
    byId("more").hidden = page.after === null || shown >= 500;
    byId("empty").hidden = page.data.length > 0;
    byId("counts").textContent = Object.entries(service.runs).filter(([, n]) => n).map(([state, n]) => `${n} ${state}`).join(", ");
    say("");
  } catch (error) {
    say(error.message);
  }
}

const soon = debounced(load, 500);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", () => {
  shown = PAGE;
  soon();
});
byId("more").addEventListener("click", () => {
  shown += PAGE;
  load();
});
byId("compare").addEventListener("click", () => (location.href = `/compare?runs=${[...chosen].join(",")}`));
load();
follow("/v1/events/stream", soon);
setInterval(() => document.hidden || load(), 10000);
