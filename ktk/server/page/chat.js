"use strict";
const byId = id => document.getElementById(id);
const log = byId("log"), prompt = byId("prompt"), scroll = byId("scroll"), empty = byId("empty");
let messages = [];      // {role, content}, as the API takes them
let running = null;     // the AbortController of the answer that is being made
let key = "";           // kept in this page's memory only

function headers() {
  const own = {"Content-Type": "application/json"};
  if (key) own.Authorization = "Bearer " + key;
  return own;
}

function bytes(count) {
  return count >= 1e9 ? (count / 1e9).toFixed(1) + " GB" : Math.round(count / 1e6) + " MB";
}

async function showFacts() {
  const answer = await fetch("v1/ktk", {headers: headers()});
  if (answer.status === 401) { lock(key ? "That key is wrong." : "This server asks for a key."); return false; }
  const facts = await answer.json();
  byId("model").textContent = facts.model;
  document.title = facts.model + " · ktk";
  byId("kernel").textContent = facts.kernel;
  byId("experts").textContent = facts.num_experts_per_tok + " of " + facts.num_experts + " experts in " + facts.num_moe_layers + " layers";
  byId("memory").textContent = "experts " + bytes(facts.expert_bytes) + ", " + facts.bits_per_weight.toFixed(1) + " bits";
  showPaths(facts.fast_paths);
  return true;
}

function showPaths(paths) {
  const box = byId("paths"), taken = paths.filter(path => path.taken).length;
  box.hidden = false;
  box.querySelector("summary").textContent = taken + " of " + paths.length + " fast paths taken";
  box.querySelector("ul").replaceChildren(...paths.map(path => {
    const row = document.createElement("li");
    row.textContent = path.name + ": " + [path.taken ? "yes" : "no", path.detail, path.reason].filter(Boolean).join(", ");
    return row;
  }));
}

function lock(reason) {
  byId("unlock").hidden = false; byId("ask").hidden = true; byId("ask").style.display = "none";
  byId("key").value = ""; byId("key").focus(); say(reason);
}

byId("unlock").addEventListener("submit", async event => {
  event.preventDefault();
  key = byId("key").value;
  if (await showFacts()) {
    byId("unlock").hidden = true; byId("ask").style.display = ""; byId("ask").hidden = false; prompt.focus(); say("Unlocked.");
  }
});

function say(text) { byId("status").textContent = text; }

// Markdown's code alone, made of elements and text nodes: nothing a model writes becomes HTML.
function render(parent, text) {
  parent.replaceChildren();
  const fence = /^ {0,3}(```+|~~~+)[^\n`]*$/;
  let plain = [], code = null, mark = "";
  const flushPlain = () => {
    const joined = plain.join("\n").replace(/^\n+|\n+$/g, "");
    plain = [];
    if (!joined) return;
    for (const part of joined.split(/\n{2,}/)) {
      const p = document.createElement("p");
      inline(p, part);
      parent.append(p);
    }
  };
  const flushCode = () => {
    const pre = document.createElement("pre"), inner = document.createElement("code");
    pre.tabIndex = 0;
    inner.textContent = code.join("\n");
    pre.append(inner); parent.append(pre);
    code = null;
  };
  for (const line of text.split("\n")) {
    const hit = line.match(fence);
    if (code === null && hit) { flushPlain(); code = []; mark = hit[1]; }
    else if (code !== null && hit && line.trim().startsWith(mark) && !line.trim().slice(mark.length).replace(/[`~]/g, "")) flushCode();
    else (code === null ? plain : code).push(line);
  }
  if (code !== null) flushCode();
  flushPlain();
}

function inline(parent, text) {
  text.split(/(`[^`\n]+`)/).forEach((part, i) => {
    if (i % 2) {
      const code = document.createElement("code");
      code.textContent = part.slice(1, -1);
      parent.append(code);
    } else parent.append(part);
  });
}

function bubble(role, text) {
  empty.remove();
  const box = document.createElement("article");
  box.className = role;
  box.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const body = document.createElement("div");
  render(body, text);
  box.append(body); log.append(box);
  return {box, body};
}

function note(box, text, isError) {
  let line = box.querySelector(".note");
  if (!line) { line = document.createElement("div"); line.className = "note"; box.append(line); }
  line.classList.toggle("error", Boolean(isError));
  line.textContent = text;
}

function follow(always) {
  const gap = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
  if (always || gap < 90) scroll.scrollTop = scroll.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  byId("send").disabled = !prompt.value.trim();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function ask(text) {
  const asked = {role: "user", content: text};
  messages.push(asked);
  bubble("user", text);
  const {box, body} = bubble("assistant", "");
  body.classList.add("waiting");
  follow(true);
  const controller = new AbortController();
  setRunning(controller);
  say("The model answers.");
  let answer = "", thoughts = "", first = 0, tokens = 0, seconds = 0, usage = null, reason = "", timer = 0;
  const speed = () => (tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) + " tokens/s" : "");
  const draw = () => {
    timer = 0;
    render(body, answer || thoughts); // seen until the answer begins
    note(box, speed());
    byId("speed").textContent = speed();
    follow();
  };
  const drawLast = () => { if (timer) { clearTimeout(timer); draw(); } };
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal: controller.signal,
      body: JSON.stringify({messages, stream: true, stream_options: {include_usage: true}}),
    });
    if (response.status === 401) { lock("That key is wrong."); throw new Error("the API key is missing or wrong"); }
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      const {content, reasoning_content: thought} = choice.delta;
      if (content || thought) {
        const now = performance.now();
        first = first || now;
        tokens += 1; seconds = (now - first) / 1000;
        answer += content || "";
        thoughts += thought || "";
        timer = timer || setTimeout(draw, 40); // all of the text at each token would keep the page busy
      }
    }
    drawLast();
    if (usage) tokens = usage.completion_tokens;
    const count = tokens + (tokens === 1 ? " token" : " tokens");
    note(box, [count, speed(), reason === "length" ? "cut off at the limit" : ""].filter(Boolean).join(" · "));
    say("Answer: " + answer);
  } catch (error) {
    drawLast();
    if (error.name === "AbortError") { note(box, ["stopped", speed()].filter(Boolean).join(" · ")); say("Stopped."); }
    else { note(box, error.message, true); say("Error: " + error.message); }
  } finally {
    body.classList.remove("waiting");
    // A new chat may have begun meanwhile: then this answer belongs to no conversation any more.
    if (messages.includes(asked)) {
      if (answer) messages.push({role: "assistant", content: answer});
      else messages = messages.filter(message => message !== asked);
    }
    if (running === controller) setRunning(null);
    follow();
  }
}

function stop() { if (running) running.abort(); }

function resize() {
  prompt.style.height = "auto";
  prompt.style.height = prompt.scrollHeight + 2 + "px";
  byId("send").disabled = !prompt.value.trim();
}

byId("ask").addEventListener("submit", event => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running) return;
  prompt.value = "";
  resize();
  prompt.focus();
  ask(text);
});
prompt.addEventListener("input", resize);
prompt.addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
document.addEventListener("keydown", event => { if (event.key === "Escape" && running) { stop(); prompt.focus(); } });
byId("stop").addEventListener("click", () => { stop(); prompt.focus(); });
byId("new").addEventListener("click", () => {
  stop();
  messages = [];
  log.replaceChildren(empty);
  byId("speed").textContent = "";
  say("New chat.");
  prompt.focus();
});
showFacts().catch(error => say("Error: " + error.message));
