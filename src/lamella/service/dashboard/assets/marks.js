// Which events stand on the charts of a run: where, of which sort, and in what words.
const SORTS = {
  save: { label: "saves", symbol: "triangle-up", colour: "--good" },
  start: { label: "starts and resumes", symbol: "circle", colour: "--accent" },
  asked: { label: "asked for", symbol: "square", colour: "--quiet" },
  warning: { label: "warnings", symbol: "diamond", colour: "--warn" },
  fault: { label: "faults", symbol: "x", colour: "--bad" },
};
export const sorts = Object.entries(SORTS).map(([sort, how]) => ({ sort, ...how }));

const lostRanks = (data) => (Array.isArray(data.silent) && data.silent.length ? `rank ${data.silent.join(", ")} lost` : typeof data.rank === "number" ? `rank ${data.rank}` : "");
const ranks = (data) => (data.world_size === 1 ? "1 rank" : `${data.world_size} ranks`);
const because = (...parts) => parts.filter((part) => part !== null && part !== undefined && part !== "").join(": ");

// event name -> (data, event) -> [sort, words]; what is not here stands in the list of events alone.
const SAY = {
  save: (data) => ["save", `saved in ${Number(data.seconds ?? 0).toFixed(1)} s`],
  // the trainer's word has a step; the service's own only a state
  running: (data) => (data.step === undefined ? null : ["start", data.step ? `resumed after step ${data.step}, ${ranks(data)}` : `started, ${ranks(data)}`]),
  restart: (data) => ["start", `tried again after ${data.after_s} s`],
  retry: (data) => ["start", data.failure ? because("retry", data.failure, data.reason) : "retry"],
  found: () => ["start", "heard of again"],
  pause: (data) => ["asked", because("pause", data.user)],
  resume: (data) => ["asked", because("resume", data.user)],
  cancel: (data) => ["asked", because("cancel", data.user)],
  paused: () => ["asked", "paused"],
  preempted: (data) => ["warning", because("preempted", data.reason)],
  straggler: (data) => ["warning", `rank ${data.rank} is slow: ${data.factor} times the others' time`],
  alarm: (data) => ["warning", because(data.what, data.experts ?? (data.moe_layers ? `MoE layers ${data.moe_layers.join(", ")}` : ""))],
  skip: (data) => ["warning", `skipped, the gradient is not finite (${data.in_a_row} in a row)`],
  no_labels: () => ["warning", "nothing to predict"],
  fallback: () => ["warning", "a damaged checkpoint was passed over"],
  fault: (data) => [data.failure === "preempted" ? "warning" : "fault", because(data.failure ?? "fault", lostRanks(data), data.reason)],
  lost: (data) => ["fault", because("lost", data.reason)],
  failed: (data) => ["fault", because("failed", data.failure, data.reason)],
};

// {id, time, step or null, sort, words} of an event, or null where it has no place on a chart.
export function markOf(event) {
  const data = event.data ?? {};
  const said = SAY[event.event]?.(data, event);
  if (!said) return null;
  return { id: event.id, time: event.time, stage: data.stage ?? null, step: typeof data.step === "number" ? data.step : null, sort: said[0], words: said[1] };
}

// Marks with the step at which each stands: its own, or that of the last line written before it.
export function placed(marks, lines) {
  const times = lines.map((line) => line.time);
  return marks.map((mark) => {
    if (mark.step !== null) return mark;
    let [low, high] = [0, times.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times[middle] <= mark.time) low = middle + 1;
      else high = middle;
    }
    return { ...mark, step: low ? lines[low - 1].step : 0 };
  });
}

// A resumed run computes steps again; by step the later line stands.
export const byStep = (lines) => [...new Map(lines.map((line) => [line.step, line])).values()].sort((a, b) => a.step - b.step);
