"use strict";

// Highlight the boxes and captions that a claim was checked against.
function highlight(event, on) {
  const claim = event.target.closest("[data-rests]");
  const scope = claim && claim.closest("[data-scope]");
  if (!scope) return;
  for (const label of claim.dataset.rests.split(" ").filter(Boolean)) {
    for (const box of scope.querySelectorAll(`[data-b="${label}"]`)) {
      box.classList.toggle("hot", on);
    }
  }
}

document.addEventListener("pointerover", event => highlight(event, true));
document.addEventListener("pointerout", event => highlight(event, false));
