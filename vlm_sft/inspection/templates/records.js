"use strict";
const records = [...document.querySelectorAll("article.record")];
const tools = document.querySelector(".tools");
const box = tools.querySelector("input"), summary = tools.querySelector("output");
const texts = new Map();
// The lower-case text of a record, computed once: a page can have hundreds of records.
function textOf(record) {
  if (!texts.has(record)) texts.set(record, record.textContent.toLowerCase());
  return texts.get(record);
}
// The value of the pressed button of a group, "" if none is pressed.
function pressedValue(kind) {
  const pressed = tools.querySelector(`button[data-kind=${kind}][aria-pressed=true]`);
  return pressed === null ? "" : pressed.dataset.value;
}
// Show the records that match the search text and the pressed buttons.
function update() {
  const query = box.value.toLowerCase(), source = pressedValue("source"), outcome = pressedValue("outcome");
  let shown = 0;
  for (const record of records) {
    const matches = (source === "" || record.dataset.source === source)
      && (outcome === "" || record.dataset.outcome === outcome)
      && (query === "" || textOf(record).includes(query));
    record.hidden = !matches;
    shown += matches;
  }
  summary.textContent = `${shown} of ${records.length} records`;
}
box.addEventListener("input", update);
for (const button of tools.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    const before = button.getAttribute("aria-pressed") === "true";
    for (const other of tools.querySelectorAll(`button[data-kind=${button.dataset.kind}]`)) {
      other.setAttribute("aria-pressed", "false");
    }
    button.setAttribute("aria-pressed", String(!before));
    update();
  });
}
tools.hidden = false;
update();
