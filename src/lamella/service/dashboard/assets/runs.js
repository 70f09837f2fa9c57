// The list of runs: a page at a time in any order, kept current by the stream of events.
import { api, byId, debounced, cost, duration, el, follow, moment, progressOf, say } from "/assets/api.js";

const STATES = ["validating", "queued", "starting", "running", "pausing", "paused", "preempted", "cancelling", "succeeded", "failed", "cancelled", "lost"];
const PAGE = 50;
const NAMES = ["search", "state", "kind"];
const form = byId("filter");
const chosen = new Set();
const asked = new URLSearchParams(location.search);
let sort = "submitted", ascending = false;
let before = []; // for each page before this one, behind which run it begins
let from = null; // this page begins behind this run
let turn = 0;

for (const state of STATES) form.elements.state.append(el("option", {}, state));
for (const name of NAMES) if (asked.get(name)) form.elements[name].value = asked.get(name);
if ([...document.querySelectorAll("th button")].some((button) => button.value === asked.get("sort"))) [sort, ascending] = [asked.get("sort"), asked.get("ascending") === "true"];

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

function heads() {
  for (const button of document.querySelectorAll("th button")) {
    const mine = button.value === sort;
    button.closest("th").setAttribute("aria-sort", mine ? (ascending ? "ascending" : "descending") : "none");
    button.dataset.order = mine ? (ascending ? "↑" : "↓") : "";
  }
}

async function load() {
  const mine = ++turn;
  const query = new URLSearchParams({ limit: PAGE, sort, ascending, count: true });
  for (const name of NAMES) if (form.elements[name].value) query.set(name, form.elements[name].value);
  if (from) query.set("after", from);
  try {
    const [page, service] = await Promise.all([api(`/v1/jobs?${query}`), api("/v1/service")]);
    if (mine !== turn) return; // something else was asked for meanwhile
    const focused = document.activeElement?.closest("tbody tr")?.querySelector("a")?.href;
    byId("runs").replaceChildren(...page.data.map(row));
    if (focused) [...byId("runs").querySelectorAll("a")].find((link) => link.href === focused)?.focus();
    const first = before.length * PAGE;
    byId("place").textContent = page.data.length ? `${(first + 1).toLocaleString()} to ${(first + page.data.length).toLocaleString()} of ${page.total.toLocaleString()}` : "";
    byId("earlier").disabled = before.length === 0;
    byId("later").disabled = page.after === null;
    byId("later").value = page.after ?? "";
    byId("pages").hidden = page.total <= PAGE;
    const filtered = NAMES.some((name) => form.elements[name].value);
    byId("empty").hidden = page.data.length > 0 || filtered;
    byId("none").hidden = page.data.length > 0 || !filtered;
    byId("counts").textContent = Object.entries(service.runs).filter(([, n]) => n).map(([state, n]) => `${n.toLocaleString()} ${state}`).join(", ");
    document.body.dataset.shown = String(mine); // all is there, and answers
    say("");
  } catch (error) {
    say(error.message);
  }
}

// What is asked for stands in the address, so that it can be kept and sent to others.
function anew() {
  [before, from] = [[], null];
  const query = new URLSearchParams(NAMES.map((name) => [name, form.elements[name].value]).filter(([, value]) => value));
  if (sort !== "submitted" || ascending) query.set("sort", sort), query.set("ascending", ascending);
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
  heads();
  load();
}

const soon = debounced(load, 500);
const filtered = debounced(anew, 80);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", filtered);
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    [sort, ascending] = [button.value, button.value === sort ? !ascending : !["submitted", "updated"].includes(button.value)];
    anew();
  });
}
byId("later").addEventListener("click", () => {
  before.push(from);
  from = byId("later").value;
  load();
});
byId("earlier").addEventListener("click", () => {
  from = before.pop() ?? null;
  load();
});
byId("compare").addEventListener("click", () => (location.href = `/compare?runs=${[...chosen].join(",")}`));
heads();
load();
follow("/v1/events/stream", soon);
setInterval(() => document.hidden || load(), 10000);
