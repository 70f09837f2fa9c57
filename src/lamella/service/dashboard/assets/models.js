// The folders that jobs have made, and what has checked them.
import { api, byId, bytes, el, moment, say } from "/assets/api.js";
import { className, inOneLine } from "/assets/conversion.js";

try {
  const found = await api("/v1/models");
  byId("empty").hidden = found.length > 0;
  byId("models").replaceChildren(...found.map((model) => {
    const checks = ["verify", "evaluate"].map((kind) => model.checks.find((check) => check.kind === kind)).filter(Boolean);
    const said = checks.map((check) => el("div", { className: className(check) }, el("a", { href: `/runs/${check.run}` }, inOneLine(check))));
    return el("tr", {},
      el("td", { className: "wrap" }, model.path), el("td", {}, el("a", { href: `/runs/${model.run}` }, model.name || model.run)), el("td", {}, model.kind),
      el("td", {}, model.exists ? bytes(model.bytes) || (model.kind === "train" ? "in its checkpoints" : "yes") : "no longer there"), el("td", { className: "wrap" }, ...(said.length ? said : ["not checked"])), el("td", {}, moment(model.ended)));
  }));
} catch (error) {
  say(error.message);
}
