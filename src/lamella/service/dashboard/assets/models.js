// The folders that jobs have made.
import { api, byId, el, moment, say } from "/assets/api.js";

try {
  const found = await api("/v1/models");
  byId("empty").hidden = found.length > 0;
  byId("models").replaceChildren(...found.map((model) => el("tr", {},
    el("td", {}, model.path), el("td", {}, el("a", { href: `/runs/${model.run}` }, model.name || model.run)), el("td", {}, model.kind),
    el("td", {}, moment(model.ended)), el("td", {}, model.exists ? "yes" : "no longer"))));
} catch (error) {
  say(error.message);
}
