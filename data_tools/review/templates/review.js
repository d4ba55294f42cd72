"use strict";

const $ = id => document.getElementById(id);
const token = $("app").dataset.token;
let current = null; // the sample that is shown, as the server sent it
let editing = false;
let busy = false;

const filters = () => ({ show: $("show").value, type: $("type") ? $("type").value : "" });

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Review-Token": token },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The command that serves this page has ended. Start it again; decisions are kept.");
  }
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
}

function tell(text, bad = false) {
  $("problem").textContent = text;
  $("problem").classList.toggle("bad", bad);
}

// One request at a time: a key that is pressed twice decides about one sample.
async function work(task) {
  if (busy) return;
  busy = true;
  $("sample").setAttribute("aria-busy", "true");
  tell("");
  try {
    await task();
  } catch (error) {
    tell(error.message, true);
  } finally {
    busy = false;
    $("sample").setAttribute("aria-busy", "false");
  }
}

function count(found) {
  $("count").textContent = `${found.done.toLocaleString("en")} of ${found.total.toLocaleString("en")}`;
  $("meter").value = found.done;
  if (found.matching !== undefined) {
    $("matching").textContent = `${found.matching.toLocaleString("en")} shown`;
  }
}

function render(found) {
  count(found);
  editing = false;
  current = found;
  // The server has escaped every text of the sample, and the page's policy allows no other script.
  $("sample").innerHTML = found.html;
  remember();
  window.scrollTo(0, 0);
}

function remember() {
  const { show, type } = filters();
  const state = new URLSearchParams({ at: current ? current.at : 0, show, type });
  history.replaceState(null, "", `#${state}`);
}

const query = (at, move) => `sample?${new URLSearchParams({ at, move, ...filters() })}`;

async function show(at, move) {
  const found = await ask(query(at, move));
  if (found.at !== null) return render(found);
  count(found);
  if (move < 0) return tell("This is the first one.");
  const open = found.total - found.done;
  if (move > 0 && found.matching && filters().show === "unreviewed") return show(0, 0);
  if (move > 0 && found.matching) {
    return tell(open ? `This is the last one; ${open} are not reviewed.` : "This is the last one; all are reviewed.");
  }
  current = null;
  editing = false;
  const text = document.createElement("p");
  text.className = "card done";
  text.textContent = open
    ? `Nothing more to show here. ${open} samples are not reviewed; change what is shown, or press k.`
    : "All samples are reviewed. Thank you.";
  $("sample").replaceChildren(text);
}

async function decide(decision, more = {}) {
  if (!current) return;
  const { at, id, digest } = current;
  const found = await ask("decide", { at, id, digest, decision, ...more });
  render(found); // an edit, with the claims of the new text
  if (decision !== "edit") await show(at, 1);
}

async function undo() {
  const found = await ask("undo", {});
  if (found.at === null) {
    count(found);
    return tell(found.undone ? "Taken back: a decision about a sample that is not here." : "There is nothing to take back.");
  }
  render(found);
}

function edit() {
  if (!current || editing) return;
  editing = true;
  const form = document.createElement("form");
  current.turns.forEach((turn, number) => {
    for (const part of ["question", "answer"]) {
      const label = document.createElement("label");
      label.textContent = `${part === "question" ? "Question" : "Answer"} ${number + 1}`;
      const area = document.createElement("textarea");
      area.value = turn[part];
      area.name = part;
      label.append(area);
      form.append(label);
    }
  });
  const row = document.createElement("p");
  const save = document.createElement("button");
  save.textContent = "Save";
  save.className = "good";
  const cancel = document.createElement("button");
  cancel.type = "button";
  cancel.id = "cancel";
  cancel.textContent = "Cancel";
  cancel.addEventListener("click", () => render(current));
  row.append(save, cancel);
  form.append(row);
  form.addEventListener("submit", event => {
    event.preventDefault();
    const values = name => [...form.querySelectorAll(`[name="${name}"]`)].map(area => area.value);
    const answers = values("answer");
    const turns = values("question").map((question, i) => ({ question, answer: answers[i] }));
    if (answers.some(answer => !answer.trim())) {
      tell("An answer is empty; reject the sample instead.", true);
      return;
    }
    work(() => decide("edit", { turns }));
  });
  $("sample").querySelector(".turns").replaceChildren(form);
  form.querySelector('[name="answer"]').focus();
}

const reject = () => { if (current) $("reasons").showModal(); };

const actions = {
  a: () => work(() => decide("accept")),
  r: reject,
  e: edit,
  u: () => work(undo),
  j: () => work(() => (current ? show(current.at, 1) : show(0, 0))),
  k: () => work(() => show(current ? current.at : $("meter").max, -1)),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", event => {
  if (editing) {
    if (event.key === "Escape") render(current);
    if (event.key === "Enter" && event.ctrlKey) $("sample").querySelector("form").requestSubmit();
    return;
  }
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, textarea")) return;
  if ($("reasons").open) {
    const button = $("reasons").querySelector(`[data-key="${CSS.escape(event.key)}"]`);
    if (button) button.click();
    return;
  }
  if ($("keys").open || !Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
});

$("reasons").addEventListener("click", event => {
  const button = event.target.closest("[data-reason]");
  if (!button) return;
  $("reasons").close();
  work(() => decide("reject", { reason: button.dataset.reason }));
});

for (const [id, key] of [["accept", "a"], ["reject", "r"], ["edit", "e"], ["undo", "u"], ["next", "j"], ["previous", "k"], ["help", "?"]]) {
  $(id).addEventListener("click", () => { if (!editing) actions[key](); });
}
$("close-keys").addEventListener("click", () => $("keys").close());
for (const id of ["show", "type"]) {
  if ($(id)) $(id).addEventListener("change", () => { $(id).blur(); work(() => show(0, 0)); });
}

// Highlight the boxes that a claim was checked against.
function highlight(event, on) {
  const claim = event.target.closest("[data-rests]");
  const scope = claim && claim.closest("[data-scope]");
  if (!scope) return;
  for (const label of claim.dataset.rests.split(" ").filter(Boolean)) {
    for (const box of scope.querySelectorAll(`[data-b="${CSS.escape(label)}"]`)) {
      box.classList.toggle("hot", on);
    }
  }
}

document.addEventListener("pointerover", event => highlight(event, true));
document.addEventListener("pointerout", event => highlight(event, false));

// A reload shows the sample that was shown; the first visit the first one that is not reviewed.
const before = new URLSearchParams(location.hash.slice(1));
for (const id of ["show", "type"]) {
  const value = before.get(id);
  if ($(id) && value !== null && [...$(id).options].some(option => option.value === value)) $(id).value = value;
}
work(async () => {
  if (before.has("at")) return show(Number(before.get("at")) || 0, 0);
  const open = await ask("sample?at=0&move=0&show=unreviewed&type=");
  if (open.at === null) return show(0, 0);
  return render({ ...open, matching: open.total });
});
