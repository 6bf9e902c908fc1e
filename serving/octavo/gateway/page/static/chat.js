// The way to the server: its state, and one streamed answer at a time. Knows no elements of the page.

// An answer that is no success; `status` is 0 where the stream broke off.
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

// {state, reason, stage, fraction}; never throws.
export async function serverState() {
  try {
    const answer = await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    const body = await answer.json();
    const progress = body.progress ?? {};
    return { state: body.status ?? "down", reason: body.reason ?? "", stage: progress.stage ?? "", fraction: progress.fraction };
  } catch {
    return { state: "unreachable", reason: "", stage: "", fraction: undefined };
  }
}

// {name, contextLength, needsKey}; throws where the server is out of reach.
export async function servedModel(key) {
  const answer = await fetch("/v1/models", { headers: headers(key), signal: AbortSignal.timeout(5000) });
  if (answer.status === 401) return { name: "", contextLength: null, needsKey: true };
  if (!answer.ok) throw await errorOf(answer);
  const [model] = (await answer.json()).data;
  return { name: model.id, contextLength: model.max_model_len ?? null, needsKey: false };
}

// Yields {text} and {numTokens} and {finishReason} as they come. Throws ServerError, or AbortError once `signal` aborts.
export async function* answer(body, { key, signal }) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body,
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.code ?? 0);
    yield* parts(chunk);
  }
  throw new ServerError("", 0);
}

function* parts(chunk) {
  const [choice] = chunk.choices;
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (chunk.usage) yield { numTokens: chunk.usage.completion_tokens };
  if (choice?.finish_reason) yield { finishReason: choice.finish_reason };
}

// The data of every server-sent event, however the bytes are cut into pieces.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split(/\r?\n\r?\n/);
      held = whole.pop();
      for (const event of whole) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

async function errorOf(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    const body = await response.json();
    message = body.error?.message || body.error_msg || message;
  } catch {
    // not ours: a proxy's page, say; the status has to do
  }
  return new ServerError(message, response.status);
}
