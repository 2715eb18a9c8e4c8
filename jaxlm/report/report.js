/* The values under a pointer, or under a cursor that the arrow keys move; the charts are whole without it. */
"use strict";

function show(value) {
  return Math.abs(value) >= 1000 ? value.toLocaleString("en-US", { maximumFractionDigits: 0 }) : String(value);
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}

for (const drawing of document.querySelectorAll(".drawing")) {
  const svg = drawing.querySelector("svg");
  const { x, lines } = JSON.parse(drawing.querySelector("script").textContent);
  const [low, high, start, end, log] = x;
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  if (!steps.length) continue;
  const forth = (step) => start + (end - start) *
    (log ? Math.log(step / low) / Math.log(high / low) : (step - low) / (high - low));
  const back = (place) => {
    const share = (place - start) / (end - start);
    return log ? low * Math.pow(high / low, share) : low + share * (high - low);
  };
  const tip = document.createElement("div");
  tip.className = "tip";
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("class", "cursor");
  let at = steps.length - 1;

  function move(index) {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[at], place = forth(step);
    cursor.setAttribute("d", `M${place} 8V184`);
    tip.replaceChildren(`step ${step.toLocaleString("en-US")}`);
    for (const line of lines) {
      const i = nearest(line.x, step);
      if (!line.x.length || Math.abs(forth(line.x[i]) - place) > 6) continue;
      const row = document.createElement("div"), key = document.createElement("span");
      key.className = `key c${line.colour}`;
      row.append(key, `${line.label} ${show(line.y[i])}`);
      tip.append(row);
    }
    svg.append(cursor);
    drawing.append(tip);
    const middle = place / 360 * drawing.clientWidth;
    tip.style.left = `${Math.min(Math.max(middle - tip.offsetWidth / 2, 0), drawing.clientWidth - tip.offsetWidth)}px`;
    tip.style.top = `${-tip.offsetHeight}px`;
  }

  function leave() { tip.remove(); cursor.remove(); }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    move(nearest(steps, back((event.clientX - box.left) / box.width * 360)));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    move(cursor.isConnected ? at + way : at);
  });
}
