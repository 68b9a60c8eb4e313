"use strict";
// Asks only while it is shown: experts are counted as long as somebody looks.
const PERIOD = 2000, KEPT = 150;  // milliseconds between looks, looks that the curve shows
const FADE = 0.9;                 // of an expert's heat from look to look
const dashboard = byId("dashboard"), look = byId("look"), heat = byId("heat");
const history_ = [];              // {at, speed}
let timer = 0, asking = false, seen = null, warmth = [], pointed = null;

const percent = share => (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %";
const whole = count => Math.round(count).toLocaleString("en");
const time = seconds => seconds === null ? "–" : seconds < 1 ? (1000 * seconds).toFixed(seconds < 0.1 ? 1 : 0) + " ms" : seconds.toFixed(1) + " s";

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function row(label, value, share) {
  const made = element("div", undefined, "row"), head = element("div", undefined, "label");
  head.append(element("span", label), element("span", value));
  made.append(head);
  if (share !== undefined) {
    const track = element("div", undefined, "track"), fill = element("div", undefined, "fill");
    fill.style.width = 100 * Math.min(1, Math.max(0, share)) + "%";
    track.append(fill); made.append(track);
  }
  return made;
}

function show(open) {
  dashboard.hidden = !open;
  log.hidden = open;
  log.style.display = open ? "none" : "";
  look.setAttribute("aria-expanded", String(open));
  look.textContent = open ? "Chat" : "Dashboard";
  clearTimeout(timer);
  if (open) { scroll.scrollTop = 0; say("Dashboard."); refresh(); } else { follow(true); say("Chat."); }
}

async function refresh() {
  clearTimeout(timer);
  if (dashboard.hidden || asking) return;
  if (!document.hidden) {
    asking = true;
    try {
      const [state, experts] = await Promise.all(["v1/ktk", "v1/ktk/experts"].map(async path => {
        const answer = await fetch(path, {headers: headers()});
        if (answer.status === 401) { show(false); lock("This server asks for a key."); throw new Error("the server asks for a key"); }
        if (!answer.ok) throw new Error("the server answers with " + answer.status);
        return answer.json();
      }));
      draw(state, experts);
      byId("stale").hidden = true;
    } catch (error) {
      byId("stale").textContent = "Not up to date: " + error.message;
      byId("stale").hidden = false;
    }
    asking = false;
  }
  if (!dashboard.hidden) timer = setTimeout(refresh, PERIOD);
}

function draw(state, experts) {
  drawTiles(state);
  history_.push({at: Date.now(), speed: state.tokens_per_second});
  if (history_.length > KEPT) history_.shift();
  drawSpeeds();
  drawMemory(state);
  drawPages(state);
  drawRuns(state);
  drawResidency(state.expert_memory);
  warm(experts);
  drawHeat(experts);
}

function drawTiles(state) {
  const tiles = [
    ["tokens/s", state.tokens_per_second.toFixed(1)],
    ["running, of " + state.most_running, whole(state.requests_running)],
    ["waiting", whole(state.requests_waiting)],
    ["to the first token, mean", time(state.mean_time_to_first_token)],
    ["each token, mean", time(state.mean_time_per_output_token)],
    ["tokens made", whole(state.generated_tokens)],
    ["tokens read", whole(state.prompt_tokens)],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value]) => {
    const tile = element("div");
    tile.append(element("dt", name), element("dd", value));
    return tile;
  }));
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function drawSpeeds() {
  const peak = Math.max(1, ...history_.map(one => one.speed)), last = history_[history_.length - 1];
  const first = Math.min(history_[0].at, last.at - 60000), span = last.at - first;
  const points = history_.map(one => [600 * (one.at - first) / span, 148 - 142 * one.speed / peak]);
  const line = points.map(point => point.map(n => n.toFixed(1)).join(",")).join(" ");
  byId("speeds").replaceChildren(
    ...[148, 77, 6].map(y => shape("line", {x1: 0, x2: 600, y1: y, y2: y})),
    shape("polygon", {points: `${points[0][0].toFixed(1)},148 ${line} 600,148`}),
    shape("polyline", {points: line}),
  );
  byId("speeds").setAttribute("aria-label", `Now ${last.speed.toFixed(1)} tokens a second, at most ${peak.toFixed(1)}`);
  byId("from").textContent = "– " + (span < 120000 ? Math.round(span / 1000) + " s" : Math.round(span / 60000) + " min");
  byId("peak").textContent = "top line " + peak.toFixed(1) + " tokens/s";
}

function drawMemory(state) {
  const total = state.memory_total_bytes || 1;
  byId("memories").replaceChildren(
    row("Experts, " + state.weight_format, bytes(state.expert_bytes), state.expert_bytes / total),
    row("Other weights", bytes(state.other_bytes), state.other_bytes / total),
    row("KV cache, when full", bytes(state.kv_cache_bytes), state.kv_cache_bytes / total),
    row("This process, without files", bytes(state.process_bytes), state.process_bytes / total),
    row("Free on this machine", bytes(state.memory_available_bytes) + " of " + bytes(total), state.memory_available_bytes / total),
  );
}

function drawPages(state) {
  const all = state.kv_cache_pages, used = all - state.kv_cache_pages_free;
  const found = state.prefix_tokens, asked = state.prefix_looked_up;
  byId("pages").replaceChildren(
    row("Pages in use", all ? whole(used) + " of " + whole(all) : "none", all ? used / all : 0),
    row("Prompt tokens found there", asked ? percent(found / asked) + " of " + whole(asked) : "none yet", asked ? found / asked : 0),
    row("Context of a sequence", whole(state.context) + " tokens"),
    row("Largest batch so far", whole(state.largest_batch)),
  );
}

function drawRuns(state) {
  byId("runs").replaceChildren(
    element("li", state.architecture + ", " + state.physical_cores + " cores"),
    element("li", "Experts: " + state.backend + ", " + state.kernel),
    ...state.fast_paths.map(path => element(
      "li", (path.taken ? "✓ " : "✗ ") + [path.name, path.detail, path.reason].filter(Boolean).join(": "), path.taken ? "yes" : "no",
    )),
  );
}

function drawResidency(report) {
  byId("residency").hidden = !report;
  if (!report) return;
  const counted = report.counters;
  byId("resident").replaceChildren(
    row("Experts in memory, " + report.policy, whole(report.resident) + " of " + whole(report.num_experts), report.resident / report.num_experts),
    row("Uses that found theirs", counted.uses ? percent(counted.hit_rate) + " of " + whole(counted.uses) : "none yet", counted.hit_rate),
    row("Read from the disk", bytes(counted.read_bytes)),
    row("Read ahead, and used", whole(counted.prefetches) + ", " + whole(counted.prefetch_hits)),
  );
}

// What was used since the last look, on top of what has cooled down.
function warm(experts) {
  const before = seen && seen.passes <= experts.passes && seen.counts.length === experts.counts.length ? seen : null;
  if (!before || before.passes !== experts.passes) {
    warmth = experts.counts.map((counts, layer) => counts.map((count, expert) =>
      FADE * ((warmth[layer] || [])[expert] || 0) + count - (before ? before.counts[layer][expert] : 0)));
  }
  seen = experts;
}

function drawHeat(experts) {
  const layers = warmth.length, width = layers ? warmth[0].length : 0;
  heat.hidden = !layers;
  if (!layers) { byId("heatnote").textContent = experts.reason || "no layer with experts"; return; }
  if (heat.width !== width || heat.height !== layers) { heat.width = width; heat.height = layers; }
  heat.style.height = Math.min(420, Math.max(60, 9 * layers)) + "px";
  const [red, green, blue] = accent(), context = heat.getContext("2d"), image = context.createImageData(width, layers);
  warmth.forEach((values, layer) => {
    const most = Math.max(...values);
    values.forEach((value, expert) => {
      image.data.set([red, green, blue, most > 0 ? 255 * Math.sqrt(value / most) : 0], 4 * (layer * width + expert));
    });
  });
  context.putImageData(image, 0, 0);
  const used = experts.counts.flat().filter(Boolean).length;
  const text = `${layers} layers (down) of ${width} experts (across), ${whole(used)} of ${whole(layers * width)} used in ${whole(experts.passes)} passes; strongest: the layer's most used.`;
  heat.setAttribute("aria-label", text);
  byId("heatnote").textContent = pointed ? told(experts, ...pointed) : text;
}

function told(experts, layer, expert) {
  const counts = experts.counts[layer], all = counts.reduce((sum, count) => sum + count, 0);
  return `Layer ${experts.layers[layer]}, expert ${expert}: ${whole(counts[expert])} uses` + (all ? `, ${percent(counts[expert] / all)} of the layer's` : "");
}

// The accent colour of the scheme as numbers: a canvas knows no variables.
function accent() {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  return [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
}

function point(layer, expert) {
  pointed = seen && warmth.length ? [Math.min(warmth.length - 1, Math.max(0, layer)), Math.min(warmth[0].length - 1, Math.max(0, expert))] : null;
  if (pointed) byId("heatnote").textContent = told(seen, ...pointed);
}

heat.addEventListener("pointermove", event => {
  const box = heat.getBoundingClientRect();
  point(Math.floor((event.clientY - box.top) / box.height * heat.height), Math.floor((event.clientX - box.left) / box.width * heat.width));
});
heat.addEventListener("pointerleave", () => { pointed = null; });
heat.addEventListener("blur", () => { pointed = null; });
heat.addEventListener("keydown", event => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  const [layer, expert] = pointed || [0, 0];
  point(layer + (pointed ? step[0] : 0), expert + (pointed ? step[1] : 0));
});
look.addEventListener("click", () => show(dashboard.hidden));
byId("new").addEventListener("click", () => show(false));
byId("ask").addEventListener("submit", () => { if (running) show(false); });
document.addEventListener("keydown", event => { if (event.key === "Escape" && !dashboard.hidden) { show(false); look.focus(); } });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
