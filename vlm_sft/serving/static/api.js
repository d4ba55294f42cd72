/** Requests to the server of this page: OpenAI's API, answers streamed. */

let key = ""; // in memory only: a reload forgets it

export function setKey(value) {
  key = value;
}

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Return the JSON of an address of the API. */
export async function getJson(path) {
  return (await send(path, {})).json();
}

/** Yield the events of a streamed answer; the last one has the usage. */
export async function* streamAnswer(body, signal) {
  const options = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(options),
    signal,
  });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(503, event.error.message);
    yield event;
  }
  throw new ApiError(0, "The connection ended before the answer was complete.");
}

async function send(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  const message = found?.error?.message ?? `The server answered with status ${response.status}.`;
  const busy = response.status === 429 ? "The server is busy: " : "";
  throw new ApiError(response.status, busy + message);
}

/** Yield the data of server-sent events. */
async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield line.slice(6);
    }
  }
}
