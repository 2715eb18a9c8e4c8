/* Draws the chart of every figure from the JSON in it. The legend has the values at the cursor, else the last ones. */
"use strict";

const compact = readable({ notation: "compact", maximumSignificantDigits: 4 });
const exact = readable({ maximumSignificantDigits: 7 });
const DASHES = [[], [7, 3], [2, 3]], BORDERS = ["solid", "dashed", "dotted"]; /* beyond eight lines */
const css = ({ colour }) => `var(--c${colour % 8})`;
const dash = ({ colour }) => Math.floor(colour / 8) % 3;
const size = ({ clientWidth: width }) => ({ width, height: Math.round(Math.min(0.62 * width, 470)) });

function readable(options) { /* 20K, 1,234.5, 5e-7 */
  const { format } = new Intl.NumberFormat("en", options);
  return (value) => (value && Math.abs(value) < 1e-3 ? (+value.toPrecision(5)).toExponential() : format(value));
}

function computed(colour) { /* as a canvas takes it */
  document.body.style.outlineColor = colour;
  return getComputedStyle(document.body).outlineColor;
}

const courses = JSON.parse(document.getElementById("courses").textContent); /* {axis: [[step, value], ...]} a run */
const axisChoice = document.querySelector("select");

function along(axis, run, step) { /* where a run was at a step, between the two points beside it */
  const points = courses[run][axis];
  if (!points) return step;
  const before = points.findLastIndex(([x]) => x <= step), i = Math.max(0, Math.min(before, points.length - 2));
  const [[x0, y0], [x1, y1]] = points.slice(i);
  return x1 === x0 ? y0 : y0 + (step - x0) / (x1 - x0) * (y1 - y0);
}

function draw(holder, { lines: bySteps, marks: marksBySteps, title, unit }, logSteps) {
  const axis = axisChoice?.value ?? "step";
  const lines = bySteps.map((line) => ({ ...line, x: line.x.map((step) => along(axis, line.run, step)) }));
  const marks = marksBySteps.map((mark) => ({ ...mark, steps: mark.steps.map((step) => along(axis, mark.run, step)) }));
  const data = uPlot.join(lines.map((line) => [line.x, line.y]));
  const values = lines.flatMap((line) => line.y).filter((y) => y !== null).sort((a, b) => a - b);
  const logValues = values[0] > 0 && values.at(-1) > 20 * values[values.length >> 1]; /* few would flatten others */
  const series = lines.map(({ label, colour, x, y, kind }) => {
    const few = kind === "plain" && x.length <= 40;
    const alone = (i) => y[i] !== null && y[i - 1] == null && y[i + 1] == null; /* not seen in a line */
    const dots = x.filter((step, i) => few || alone(i)).map((step) => data[0].indexOf(step));
    const last = y.findLast((value) => value !== null);
    return {
      label, class: `kind-${kind}`,
      stroke: () => computed(css({ colour })), dash: DASHES[dash({ colour })],
      width: kind === "faint" ? 1 : 2, alpha: kind === "faint" ? 0.4 : 1,
      points: { show: true, size: 5, filter: () => dots },
      value: (plot, value) => exact((plot.cursor.idx === null ? last : value) ?? NaN).replace("NaN", "\u2013"),
    };
  });
  const style = {
    stroke: () => computed("var(--faint)"),
    grid: { stroke: () => computed("var(--rule)"), width: 1 },
    values: (plot, ticks) => ticks.map((tick) => (tick === null ? "" : compact(tick))),
    labelFont: "12px system-ui", labelSize: 20, ticks: { size: 4 },
  };
  const markAxes = marks.map((mark) => ({
    scale: "x", side: 0, size: 0, gap: 0, ticks: { show: false }, /* all in one row, in the padding */
    stroke: () => computed(css(mark)),
    grid: { show: mark.kind === "resumed", stroke: () => computed(css(mark)), width: 1, dash: [3, 3] },
    splits: (plot, i, low, high) => mark.steps.filter((step) => step >= low && step <= high),
    values: (plot, splits) => splits.map(() => mark.symbol),
  }));
  const lowest = data[0].find((x) => x > 0); /* a logarithmic axis has no 0 */
  const range = (plot, low, high) => [logSteps ? Math.max(low, lowest) : low, high];
  return new uPlot({
    ...size(holder),
    scales: { x: { time: false, distr: logSteps ? 3 : 1, range }, y: { distr: logValues ? 3 : 1 } },
    axes: [{ ...style, size: 30, label: axis }, { ...style, size: 56, label: unit || title }, ...markAxes],
    series: [{ label: axis, value: (plot, step) => exact(step ?? data[0].at(-1)) }, ...series],
    legend: { markers: { stroke: (plot, i) => css(lines[i - 1]), dash: (plot, i) => BORDERS[dash(lines[i - 1])] } },
    padding: [16, null, null, null],
    cursor: { hover: { prox: 8 }, y: false },
    hooks: { setSeries: [(plot, i, { show }) => lines[i]?.kind === "smoothed" && plot.setSeries(i + 1, { show })] },
  }, data, holder);
}

for (const figure of document.querySelectorAll("figure")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const holder = figure.querySelector(".plot"), logSteps = figure.querySelector("input");
  let plot = draw(holder, chart, false);
  const redraw = () => { plot.setSize(size(holder)); plot.redraw(); };
  addEventListener("resize", redraw);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", redraw);
  const anew = () => { plot.destroy(); plot = draw(holder, chart, logSteps?.checked); };
  logSteps?.addEventListener("change", anew);
  axisChoice?.addEventListener("change", anew);
  holder.addEventListener("keydown", ({ key }) => {
    const steps = plot.data[0], way = { ArrowLeft: -1, ArrowRight: 1 }[key];
    const at = Math.min(Math.max((plot.cursor.idx ?? steps.length - 1 - way) + way, 0), steps.length - 1);
    if (way) plot.setCursor({ left: plot.valToPos(steps[at], "x"), top: 0 });
  });
}
