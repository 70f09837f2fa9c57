// A key becomes a cookie, and the page that was asked for is opened.
import { api, byId } from "/assets/api.js";

byId("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await api("/login", { method: "POST", body: { key: event.target.elements.key.value } });
    const next = new URLSearchParams(location.search).get("next") ?? "/";
    location.href = next.startsWith("/") && !next.startsWith("//") ? next : "/";
  } catch (error) {
    byId("problem").textContent = error.message;
  }
});
