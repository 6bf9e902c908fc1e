// The page itself: elements, settings, the conversation. What comes from the model goes through render.js only.
import { ServerError, answer, servedModel, serverState } from "./chat.js";
import { element, render } from "./render.js";
import { kept, keepInTab, keep, openSettings, requestBody, wrongField } from "./settings.js";
import { currentLanguage, duration, setLanguage, translate, words } from "./words.js";

const $ = (id) => document.getElementById(id);
const POLL_LOADING = 1000;
const POLL_READY = 10000;

const messages = []; // {role, content} of the conversation so far
let running = null; // the AbortController of the answer that is being written
let server = { state: "unknown", reason: "", stage: "", fraction: undefined };
let model = null; // what servedModel gave

// ---- the server's state

async function watch() {
  const before = server.state;
  server = await serverState();
  showState();
  if (server.state === "ready" && (before !== "ready" || model === null)) await learnModel();
  setTimeout(watch, server.state === "ready" ? POLL_READY : POLL_LOADING);
}

async function learnModel() {
  try {
    model = await servedModel($("key").value);
  } catch {
    model = null;
  }
  showModel();
}

function showState() {
  const now = words();
  $("state").dataset.state = server.state;
  $("state-text").textContent = now.states[server.state] ?? server.state;
  const ready = server.state === "ready";
  $("loading").hidden = ready || server.state === "unknown";
  $("loading-text").textContent = loadingText(now);
  const bar = $("loading-bar");
  bar.hidden = server.state !== "loading";
  if (Number.isFinite(server.fraction)) bar.value = server.fraction;
  else bar.removeAttribute("value");
  $("send").disabled = !ready;
}

function loadingText(now) {
  if (server.state !== "loading") return [now[server.state] ?? "", server.reason].filter(Boolean).join(": ");
  const stage = now.stages[server.stage] ?? server.stage;
  const percent = Number.isFinite(server.fraction) ? ` ${Math.round(server.fraction * 100)}%` : "";
  return stage ? `${now.loading}: ${stage}${percent}` : now.loading;
}

function showModel() {
  $("model").textContent = model?.name ?? "";
  const needsKey = Boolean(model?.needsKey);
  $("key-field").hidden = !needsKey && !$("key").value;
  $("docs").href = $("key").value || needsKey ? "/static/api.html" : "/docs";
  if (needsKey) openSettings(true);
}

// ---- the conversation

function addTurn(role) {
  const now = words();
  const turn = document.createElement("li");
  turn.className = `turn ${role}`;
  const who = element("p", role === "user" ? now.you : now.assistant);
  who.className = "who";
  const content = document.createElement("div");
  content.className = "content";
  const meta = document.createElement("p");
  meta.className = "meta";
  turn.append(who, content, meta);
  $("turns").append(turn);
  $("welcome").hidden = true;
  $("clear").hidden = false;
  return { turn, content, meta };
}

async function send(text) {
  if (running || server.state !== "ready" || !text.trim()) return;
  if (wrongField()) {
    announce(words().badField);
    return;
  }
  addTurn("user").content.textContent = text;
  messages.push({ role: "user", content: text });
  $("prompt").value = "";
  fitPrompt();
  running = new AbortController();
  showRunning();
  try {
    await receive(addTurn("assistant"), running);
  } finally {
    running = null;
    showRunning();
    $("prompt").focus();
  }
}

async function receive(shown, control) {
  const record = { text: "", numTokens: 0, start: performance.now(), first: null, last: null, reason: null };
  shown.turn.setAttribute("aria-busy", "true");
  const draw = painter(shown, record);
  try {
    for await (const part of answer(requestBody(messages, model?.name), { key: $("key").value, signal: control.signal })) {
      take(part, record);
      draw();
    }
    announce(words().finished);
  } catch (error) {
    fail(error, record, shown);
  }
  draw.now();
  shown.turn.removeAttribute("aria-busy");
  if (record.text) messages.push({ role: "assistant", content: record.text });
  else giveBack(messages.pop());
}

// A message without an answer goes back into its field, to be sent again.
function giveBack(message) {
  if (!message || $("prompt").value) return;
  $("prompt").value = message.content;
  fitPrompt();
}

function take(part, record) {
  if (part.text !== undefined) {
    record.text += part.text;
    record.last = performance.now();
    record.first ??= record.last;
  }
  if (part.numTokens !== undefined) record.numTokens = part.numTokens;
  if (part.finishReason !== undefined) record.reason = part.finishReason;
}

function fail(error, record, shown) {
  if (error.name === "AbortError") {
    record.reason = "stopped";
    announce(words().stopped);
    return;
  }
  const known = error instanceof ServerError;
  const message = element("p", (known && error.message) || words().broken);
  message.className = "error";
  message.setAttribute("role", "alert");
  shown.turn.append(message);
  if (known && error.status === 401) {
    model = { name: "", contextLength: null, needsKey: true };
    showModel();
    $("key").focus();
  }
}

// Draws at most once a frame, however fast tokens come, and keeps the end in sight for who is there.
function painter(shown, record) {
  let waiting = false;
  const paint = () => {
    waiting = false;
    const view = document.scrollingElement;
    const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
    render(shown.content, record.text);
    shown.meta.textContent = figures(record);
    if (atEnd) view.scrollTop = view.scrollHeight;
  };
  const draw = () => {
    if (!waiting) requestAnimationFrame(paint);
    waiting = true;
  };
  draw.now = paint;
  return draw;
}

function figures(record) {
  const now = words();
  const parts = [];
  if (record.numTokens) parts.push(now.tokens(record.numTokens));
  // over all of the answer, the wait included: tokens come in bursts, and the gaps between them would flatter
  const seconds = (record.last - record.start) / 1000;
  if (record.numTokens && record.last !== null) parts.push(now.speed((record.numTokens / seconds).toFixed(1)));
  if (record.first !== null) parts.push(now.ttft(duration(record.first - record.start)));
  if (record.reason === "stopped") parts.push(now.stopped);
  if (record.reason === "length") parts.push(now.cut);
  return parts.join(" · ");
}

function showRunning() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function announce(text) {
  $("announcement").textContent = text;
}

function clear() {
  running?.abort();
  messages.length = 0;
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  $("clear").hidden = true;
  $("prompt").focus();
}

// ---- elements

function fitPrompt() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 220)}px`;
}

function showWords() {
  const now = words();
  translate(document);
  $("language").textContent = now.other;
  $("language").lang = currentLanguage() === "en" ? "zh-CN" : "en";
  $("language").setAttribute("aria-label", now.otherLabel);
  $("theme").setAttribute("aria-label", now.theme);
  $("theme").title = now.theme;
  $("samples").replaceChildren(...now.samples.map(sample));
  showState();
}

function sample(text) {
  const item = document.createElement("li");
  const button = element("button", text);
  button.type = "button";
  button.addEventListener("click", () => send(text));
  item.append(button);
  return item;
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  keep("octavo.theme", root.dataset.theme);
}

function switchLanguage() {
  setLanguage(currentLanguage() === "en" ? "zh" : "en");
  keep("octavo.language", currentLanguage());
  showWords();
}

function onKey(event) {
  if (event.key === "Escape" && running) running.abort();
  if (event.target !== $("prompt") || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
}

function onClick(event) {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  navigator.clipboard?.writeText(button.previousElementSibling.textContent).then(() => {
    button.textContent = words().copied;
  });
}

function begin() {
  $("key").value = kept("octavo.key");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("prompt").value);
  });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", clear);
  $("prompt").addEventListener("input", fitPrompt);
  $("theme").addEventListener("click", switchTheme);
  $("language").addEventListener("click", switchLanguage);
  $("settings-button").addEventListener("click", () => openSettings($("settings").hidden));
  $("settings-form").addEventListener("submit", (event) => event.preventDefault());
  $("key").addEventListener("change", () => {
    keepInTab("octavo.key", $("key").value);
    learnModel();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", onClick);
  showWords();
  showModel();
  watch();
  $("prompt").focus();
}

begin();
