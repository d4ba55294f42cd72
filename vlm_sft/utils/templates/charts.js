"use strict";
// Show the values of a chart's curves at the step that is nearest to the pointer.
const SVG = "http://www.w3.org/2000/svg";
// The position in a rising list whose value is nearest.
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] < value) low = middle; else high = middle;
  }
  return value - list[low] <= list[high] - value ? low : high;
}
for (const chart of document.querySelectorAll("svg.chart")) {
  const figure = chart.parentElement, scale = JSON.parse(chart.dataset.scale);
  const series = JSON.parse(chart.dataset.series);
  const line = document.createElementNS(SVG, "line"), tip = document.createElement("div");
  line.setAttribute("class", "at");
  line.setAttribute("y2", chart.viewBox.baseVal.height - 24);
  tip.className = "tip";
  const hide = () => { line.remove(); tip.remove(); };
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * chart.viewBox.baseVal.width - scale.left)
      / (scale.right - scale.left);
    const wanted = scale.from + Math.min(1, Math.max(0, share)) * (scale.to - scale.from);
    // Curves can have different steps: take the one nearest to the pointer of them all.
    const steps = series.map(curve => curve.x[nearest(curve.x, wanted)]);
    const step = steps.reduce((best, x) => Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best);
    tip.replaceChildren(`step ${Math.round(step).toLocaleString("en")}`);
    for (const curve of series) {
      const place = nearest(curve.x, step), row = document.createElement("div");
      const other = curve.x[place] === step ? "" : ` (step ${Math.round(curve.x[place]).toLocaleString("en")})`;
      row.className = `c${curve.color}`;
      row.textContent = `${curve.name}: ${curve.y[place]}${other}`;
      tip.append(row);
    }
    const part = (step - scale.from) / (scale.to - scale.from);
    const x = scale.left + part * (scale.right - scale.left);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    chart.append(line);
    figure.append(tip);
    const left = x / chart.viewBox.baseVal.width * box.width;
    tip.style.top = `${box.top - figure.getBoundingClientRect().top + 8}px`;
    tip.style.left = part < .5 ? `${left + 10}px` : "";
    tip.style.right = part < .5 ? "" : `${box.width - left + 10}px`;
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("pointercancel", hide);
}
