/** The conversation: asks one model, or two side by side, and shows their answers as they come. */

import { ApiError, getJson, setKey, streamAnswer } from "./api.js";
import { numImages, preview, setImages, showProblem, takeImages } from "./images.js";

const find = (id) => document.getElementById(id);
const chat = find("chat");
const question = find("question");

let settings = {}; // limits of the server
let models = []; // names
let turns = []; // {text, images, replies: Map(model -> {text, failed}), element}
let running = null; // AbortController of the answers that are being generated

/* ---- Start: models, and the key if the server wants one ---- */

async function start() {
  settings = await getJson("/page/settings.json");
  const limit = find("max-tokens");
  limit.max = settings.max_tokens;
  limit.value = Math.min(limit.value, settings.max_tokens);
  if (settings.needs_key) await askForKey("");
  await loadModels();
}

async function loadModels() {
  try {
    models = (await getJson("/v1/models")).data.map((model) => model.id);
  } catch (error) {
    if (error.status !== 401) throw error;
    await askForKey("This key is not accepted.");
    return loadModels();
  }
  find("models").replaceChildren(...models.map((name) => {
    const label = document.createElement("span");
    label.textContent = label.title = name;
    return label;
  }));
  const names = models.length > 1 ? ["", ...models] : models;
  find("model").replaceChildren(...names.map((name) => new Option(name || "Side by side", name)));
  find("model-choice").hidden = models.length < 2;
  showWidth();
}

function askForKey(reason) {
  const dialog = find("key-dialog");
  find("key-problem").textContent = reason;
  find("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener("close", () => {
      setKey(find("key").value);
      find("key").value = "";
      question.focus();
      resolve();
    }, { once: true });
  });
}

/* ---- Asking ---- */

function chosenModels() {
  const name = find("model").value;
  return name ? [name] : models;
}

async function ask(event) {
  event?.preventDefault();
  if (running) return;
  showProblem("");
  const text = question.value.trim();
  if (!text && !numImages()) return question.focus();
  const before = turns.reduce((count, turn) => count + turn.images.length, 0);
  if (before + numImages() > settings.max_images) {
    return showProblem(
      `This server accepts ${settings.max_images} images in a conversation. Remove some, or start a new chat.`,
    );
  }
  const invalid = document.querySelector("#settings :invalid");
  if (invalid) {
    showSettings(true);
    return invalid.reportValidity();
  }
  const turn = { text, images: takeImages(), replies: new Map() };
  question.value = "";
  turn.element = showTurn(turn);
  turns.push(turn);
  find("empty").hidden = true;
  await answer(turn);
}

async function answer(turn) {
  running = new AbortController();
  showRunning(true);
  const names = chosenModels();
  turn.replies = new Map();
  turn.element.querySelector(".replies").replaceChildren();
  const calls = names.map((name) => answerBy(name, turn, running.signal));
  chat.scrollTop = chat.scrollHeight;
  await Promise.all(calls);
  running = null;
  showRunning(false);
  if (isAtEnd()) chat.scrollTop = chat.scrollHeight;
  const whole = [...turn.replies].map(([name, reply]) => `${names.length > 1 ? name : "Answer"}: ${reply.text}`);
  find("status").textContent = whole.join("\n");
}

/** Ask one model; failures are shown in its reply. */
async function answerBy(name, turn, signal) {
  const reply = { text: "", failed: false };
  const request = requestFor(name, turn);
  turn.replies.set(name, reply);
  const shown = showReply(turn, name);
  const begun = performance.now();
  let first = null;
  let usage = null;
  let reason = "";
  try {
    if (JSON.stringify(request).length > settings.max_body) {
      const most = Math.floor(settings.max_body / 2 ** 20);
      throw new ApiError(413, `The images are larger than this server accepts (${most} MB in a request).`);
    }
    for await (const event of streamAnswer(request, signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      first ??= performance.now();
      reply.text += choice.delta.content;
      write(shown.text, reply.text);
    }
  } catch (error) {
    if (error.name === "AbortError") {
      reason = "stopped";
    } else {
      reply.failed = true;
      shown.failure.textContent = error.message.replace(/^messages\[\d+\]: image_url: /, "An attached file ");
      shown.failure.scrollIntoView({ block: "nearest" });
      if (error.status === 401) askForKey("This key is not accepted.");
    }
  }
  shown.text.setAttribute("aria-busy", "false");
  shown.copy.hidden = !reply.text;
  turn.element.classList.toggle("left-out", [...turn.replies.values()].every((found) => found.failed));
  if (!reply.failed) shown.facts.textContent = facts(usage, reason, begun, first);
}

/** Return the request for a model: every model continues its own answers. */
function requestFor(name, turn) {
  const messages = [];
  const system = find("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const reply = earlier.replies.get(name);
    if (!reply?.text || reply.failed) continue; // was not answered, so it is not part of the chat
    messages.push(message(earlier), { role: "assistant", content: reply.text });
  }
  messages.push(message(turn));
  const seed = find("seed").value;
  const stop = find("stop-text").value;
  return {
    model: name,
    messages,
    temperature: Number(find("temperature").value),
    top_p: Number(find("top-p").value),
    max_tokens: Number(find("max-tokens").value),
    ...(seed ? { seed: Number(seed) } : {}),
    ...(stop ? { stop: [stop] } : {}),
  };
}

function message(turn) {
  const images = turn.images.map((image) => ({ type: "image_url", image_url: { url: image.uri } }));
  const text = turn.text ? [{ type: "text", text: turn.text }] : [];
  return { role: "user", content: [...images, ...text] };
}

function facts(usage, reason, begun, first) {
  const seconds = (performance.now() - begun) / 1000;
  const found = [];
  if (usage) {
    const tokens = usage.completion_tokens;
    found.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`, `${seconds.toFixed(1)} s`);
    found.push(`${(tokens / seconds).toFixed(1)} tokens/s`);
    found.push(`prompt ${usage.prompt_tokens} tokens`);
  } else {
    found.push(`${seconds.toFixed(1)} s`);
  }
  if (first) found.push(`first text after ${((first - begun) / 1000).toFixed(1)} s`);
  if (reason === "length") found.push("cut at max tokens");
  if (reason === "stopped") found.push("stopped");
  return found.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
}

/* ---- Showing ---- */

function showTurn(turn) {
  const element = find("turn").content.cloneNode(true).firstElementChild;
  element.querySelector(".images").append(...turn.images.map(preview));
  element.querySelector(".question .text").textContent = turn.text;
  element.querySelector(".again").addEventListener("click", () => running || answer(turn));
  element.querySelector(".edit").addEventListener("click", () => running || edit(turn));
  find("turns").append(element);
  return element;
}

function showReply(turn, name) {
  const element = find("reply").content.cloneNode(true).firstElementChild;
  element.setAttribute("aria-label", `Answer of ${name}`);
  element.querySelector("h3").textContent = name;
  const part = (kind) => element.querySelector(`.${kind}`);
  const shown = { text: part("text"), failure: part("failure"), facts: part("facts"), copy: part("copy") };
  shown.copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(turn.replies.get(name).text);
    find("status").textContent = "Copied.";
  });
  turn.element.querySelector(".replies").append(element);
  return shown;
}

/** Return whether the reader is at the end of the conversation, and not further up. */
function isAtEnd() {
  return chat.scrollHeight - chat.scrollTop - chat.clientHeight < 120;
}

function write(element, text) {
  const follow = isAtEnd();
  element.textContent = text;
  if (follow) chat.scrollTop = chat.scrollHeight;
}

function edit(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.element.remove();
  question.value = turn.text;
  setImages(turn.images);
  find("empty").hidden = turns.length > 0;
  question.focus();
}

function showRunning(isRunning) {
  const hadFocus = [find("send"), find("stop")].includes(document.activeElement);
  find("stop").hidden = !isRunning;
  find("send").hidden = isRunning;
  for (const button of document.querySelectorAll(".actions button")) button.disabled = isRunning;
  if (isRunning) find("status").textContent = "Answering";
  if (hadFocus) find(isRunning ? "stop" : "question").focus();
}

function showWidth() {
  document.body.classList.toggle("two", chosenModels().length > 1);
}

function showSettings(isOpen) {
  find("settings").hidden = !isOpen;
  find("settings-toggle").setAttribute("aria-expanded", String(isOpen));
}

function newChat() {
  running?.abort();
  turns = [];
  find("turns").replaceChildren();
  setImages([]);
  showProblem("");
  find("empty").hidden = false;
  question.focus();
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme() {
  find("theme").setAttribute("aria-pressed", String(isDark()));
}

find("composer").addEventListener("submit", ask);
find("stop").addEventListener("click", () => running?.abort());
find("new-chat").addEventListener("click", newChat);
find("model").addEventListener("change", showWidth);
find("settings-toggle").addEventListener("click", () => showSettings(find("settings").hidden));
find("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
showTheme();
question.focus();
start().catch((error) => showProblem(error.message));
