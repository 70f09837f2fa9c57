// Calls of the service, and how times, sizes and tables are shown.
export async function api(path, { method = "GET", body } = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.status === 401 && location.pathname !== "/login") {
    location.href = "/login?next=" + encodeURIComponent(location.pathname + location.search);
    return new Promise(() => {}); // the page is about to change
  }
  const text = await answer.text();
  const values = text ? JSON.parse(text) : null;
  if (!answer.ok) throw Object.assign(new Error(values?.detail ?? `the service answered ${answer.status}`), { errors: values?.errors ?? [] });
  return values;
}

// Events of a server-sent stream; after a lost connection it goes on behind the last id. Returns how to end it.
export function follow(path, heard) {
  const control = new AbortController();
  let last = null;
  (async () => {
    for (let over = false; !over && !control.signal.aborted; ) {
      try {
        const headers = last === null ? {} : { "Last-Event-ID": last };
        const answer = await fetch(path, { headers, signal: control.signal });
        if (!answer.ok) return;
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let text = ""; ; ) {
          const { value, done } = await reader.read();
          if (done) break;
          const parts = (text + value).split(/\r?\n\r?\n/);
          text = parts.pop();
          for (const part of parts) {
            const fields = Object.fromEntries(part.split(/\r?\n/).map((line) => line.split(/: (.*)/s)).filter(([name]) => name));
            if (fields.data === undefined) continue;
            last = fields.id ?? last;
            over = fields.event === "end" || over;
            heard(JSON.parse(fields.data), fields.event);
          }
        }
      } catch {
        if (control.signal.aborted) return;
      }
      await new Promise((wake) => setTimeout(wake, 2000));
    }
  })();
  addEventListener("pagehide", () => control.abort());
  return () => control.abort();
}

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// One call for many that come close together.
export function debounced(call, ms) {
  let waiting = null;
  return () => {
    waiting ??= setTimeout(() => {
      waiting = null;
      call();
    }, ms);
  };
}

export const byId = (id) => document.getElementById(id);
export function say(text) {
  byId("said").textContent = text;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function bytes(count) {
  if (count === null || count === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, count)) / 10));
  return `${(count / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" }); // made once: it is slow to make
export const moment = (seconds) => (seconds ? clock.format(seconds * 1000) : "");

// Seconds that a run's attempts have taken; of those at work until now.
export const used = (run) => (run.used_s ?? 0) + (run.working_since ? Math.max(0, Date.now() / 1000 - run.working_since) : 0);

// What a run has used: GPU hours, or core hours where it has no GPU.
export function cost(run) {
  if (!run.started) return "";
  const hours = used(run) / 3600;
  return run.gpus ? `${(run.gpus * hours).toFixed(2)} GPU h` : `${(run.cores * hours).toFixed(2)} core h`;
}

export const progressOf = (run) =>
  run.state === "succeeded" ? 100 : (run.progress?.progressPercentage ?? (run.ended ? 0 : null));
