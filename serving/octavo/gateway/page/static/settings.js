// The settings beside the conversation: their fields, the request that they make, and what is kept in the browser.
const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens"];

export function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
}

// The first field with a value that is not allowed, shown and focused; null if all are good.
export function wrongField() {
  const wrong = [...$("settings-form").elements].find((one) => one.willValidate && !one.checkValidity());
  if (!wrong) return null;
  openSettings(true);
  wrong.focus();
  return wrong;
}

// The request as JSON text. A seed may be beyond what a number of this language holds, so it is put in as text.
export function requestBody(messages, model) {
  const system = $("system").value.trim();
  const body = {
    model: model || "default",
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const name of NUMBERS) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  const seed = $("seed").value.trim();
  const text = JSON.stringify(body);
  return seed === "" ? text : `${text.slice(0, -1)},"seed":${BigInt(seed)}}`;
}

// Storage may be shut off: then nothing is kept, and nothing else changes.
export function kept(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}

export function keepInTab(name, value) {
  write(() => sessionStorage.setItem(name, value));
}

export function keep(name, value) {
  write(() => localStorage.setItem(name, value));
}

function write(action) {
  try {
    action();
  } catch {
    // see above
  }
}
