"use strict";
// Drawing. Everything is made of DOM nodes, and data becomes text nodes alone: no string is ever read as markup.

const SERIES = 7;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "5 5", "12 4", "3 2"];
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

const node = (make) => (name, attributes = {}, ...children) => {
  const made = make(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
};
const el = node((name) => document.createElement(name));
const svg = node((name) => document.createElementNS("http://www.w3.org/2000/svg", name));

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const percent = (x) => (isNumber(x) ? `${(100 * x).toFixed(1)}%` : "–");
const whole = (x) => x.toLocaleString("en-US");

function digits(x) {
  if (!isNumber(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)) return x.toExponential(2);
  return String(Number(x.toPrecision(4)));
}

// [r, g, b] of a share between 0 and 1, dark blue to yellow: cividis, which colour-blind readers see as others do.
function heatColour(share) {
  const at = clamp(share, 0, 1) * (CIVIDIS.length - 1), low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  return [0, 1, 2].map((i) => Math.round(channel(CIVIDIS[low], i) * (low + 1 - at) + channel(CIVIDIS[low + 1], i) * (at - low)));
}
const rgb = (colour) => `rgb(${colour.join(" ")})`;
const inkOn = ([r, g, b]) => (0.3 * r + 0.59 * g + 0.11 * b > 120 ? "#10131a" : "#ffffff");

// Calls draw(width) now and whenever the frame's width changes.
function responsive(frame, draw) {
  let width = 0;
  const check = () => frame.clientWidth && frame.clientWidth !== width && draw((width = frame.clientWidth));
  new ResizeObserver(() => requestAnimationFrame(check)).observe(frame); // drawing inside an observer would call it again
  check();
}

function niceTicks(low, high, count) {
  const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const m of high / low > 1000 ? [1] : [1, 2, 5]) ticks.push(Number(`${m}e${power}`));
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

// The ends of an axis that shows these values. It spans no less than a tenth of the largest, or on a log axis a factor of 1.5:
// cut closer, noise would look like a gain.
function axisEnds(values, log) {
  if (!values.length) return [log ? 0.1 : 0, 1];
  const low = Math.min(...values), high = Math.max(...values), size = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const factor = log ? Math.sqrt(Math.max(1, (1.5 * low) / high)) : 1, pad = log ? 0 : Math.max(0, size / 10 - (high - low)) / 2;
  return [low / factor - pad, high * factor + pad];
}

// Keeps the ticks whose labels do not run into those before; the last one always stays.
function thinned(ticks, place, gap) {
  const kept = [];
  for (const tick of [...ticks].reverse())
    if (!kept.length || place(kept[kept.length - 1]) - place(tick) >= gap) kept.push(tick);
  return kept.reverse();
}

/* Curves over x with a crosshair. It follows the pointer and the arrow keys; values stand in words below.
 *   x: rising numbers        series: [{name, values, low?, high?}], null where there is no value
 *   log: "x", "y" or "xy"    range: [low, high] of y        format: of y in words
 *   deeper: {x, label}: right of it is shaded               points: [{name, x, y, note}], with a level line each
 *   onpick(index): called when the reader moves the crosshair
 * Returns {show(index), highlight(name or null)}. */
function lineChart(host, chart) {
  const { x, series, points = [], log = "", format = digits, height = 200 } = chart;
  const colour = (i) => `var(--series-${(i % SERIES) + 1})`;
  const frame = el("div", { class: "frame" }), readout = el("p", { class: "readout" });
  let at = x.length - 1, highlighted = null, draw = () => {};

  const updateReadout = () => {
    const parts = series.map((s) => {
      const band = s.low && isNumber(s.low[at]) ? ` (${format(s.low[at])} – ${format(s.high[at])})` : "";
      return `${series.length > 1 ? s.name + ": " : ""}${format(s.values[at])}${band}`;
    });
    readout.textContent = `${chart.xLabel} ${whole(x[at])} · ${parts.join(" · ")}`;
  };
  const show = (index) => { at = clamp(index, 0, x.length - 1); updateReadout(); draw(); };
  const pick = (index) => { show(index); chart.onpick?.(at); };

  const keys = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -x.length, End: x.length }[event.key];
    if (move) { event.preventDefault(); event.stopPropagation(); pick(at + move); }
  };
  const picture = svg("svg", { tabindex: 0, role: "img", "aria-label": `${chart.title}; arrow keys read values`, onkeydown: keys });
  frame.append(picture);
  const legend = el("ul", { class: "legend" });
  [...series, ...points].forEach(({ name, note = "" }, i) => legend.append(el("li", {},
    svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, i < series.length
      ? svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, class: "curve", stroke: colour(i), "stroke-dasharray": DASHES[i % SERIES] })
      : svg("path", { d: "M13 0 L18 5 L13 10 L8 5 Z", fill: colour(i) })),
    name + note)));
  host.append(el("h3", {}, chart.title), frame, ...(series.length + points.length > 1 ? [legend] : []), readout);

  responsive(frame, (width) => { draw = () => paint(width); updateReadout(); draw(); });

  function paint(width) {
    const left = 46, right = width - 12, top = 8, bottom = height - 34;
    const transform = (axis) => (log.includes(axis) ? Math.log10 : (v) => v);
    const scale = (axis, low, high, from, to) => {
      const f = transform(axis), span = f(high) - f(low);
      return (v) => (span ? from + ((f(v) - f(low)) / span) * (to - from) : (from + to) / 2);
    };
    const usable = (v) => isNumber(v) && (!log.includes("y") || v > 0);
    const all = [...series.flatMap((s) => [...s.values, ...(s.low ?? []), ...(s.high ?? [])]), ...points.map((p) => p.y)].filter(usable);
    const [low, high] = chart.range ?? axisEnds(all, log.includes("y"));
    const X = scale("x", x[0], x[x.length - 1], left + 4, right - 4), Y = scale("y", low, high, bottom, top);
    const yTicks = log.includes("y") ? logTicks(low, high) : niceTicks(low, high, 5);
    const xTicks = log.includes("x") ? x.filter((v, i) => Number.isInteger(Math.log2(v)) || i === x.length - 1) : niceTicks(x[0], x[x.length - 1], 6);

    const parts = [];
    if (chart.deeper && chart.deeper.x < x[x.length - 1]) {
      const from = X(Math.max(chart.deeper.x, x[0]));
      parts.push(svg("rect", { class: "zone", x: from, y: top, width: X(x[x.length - 1]) - from, height: bottom - top }),
        svg("text", { x: X(x[x.length - 1]) - 4, y: bottom - 6, "text-anchor": "end" }, chart.deeper.label));
    }
    for (const tick of thinned([...yTicks].reverse(), (v) => Y(v), 16))
      parts.push(svg("line", { class: "grid", x1: left, x2: right, y1: Y(tick), y2: Y(tick) }),
        svg("text", { x: left - 6, y: Y(tick) + 4, "text-anchor": "end" }, digits(tick)));
    for (const tick of thinned(xTicks, (v) => X(v), 34))
      parts.push(svg("text", { x: X(tick), y: bottom + 16, "text-anchor": "middle" }, whole(tick)));
    parts.push(svg("text", { x: right, y: height - 3, "text-anchor": "end" }, chart.xLabel));

    const faded = (name) => (highlighted !== null && highlighted !== name ? " faded" : "");
    series.forEach((s, i) => {
      for (const run of runs(s.values, usable)) {
        if (s.low) {
          const edge = [...run.map((k) => `${X(x[k])},${Y(clamp(s.low[k], low, high))}`),
            ...[...run].reverse().map((k) => `${X(x[k])},${Y(clamp(s.high[k], low, high))}`)];
          parts.push(svg("polygon", { class: "band" + faded(s.name), points: edge.join(" "), fill: colour(i) }));
        }
        parts.push(run.length === 1
          ? svg("circle", { class: faded(s.name), cx: X(x[run[0]]), cy: Y(s.values[run[0]]), r: 3, fill: colour(i) })
          : svg("polyline", { class: "curve" + faded(s.name), points: run.map((k) => `${X(x[k])},${Y(s.values[k])}`).join(" "),
              stroke: colour(i), "stroke-dasharray": DASHES[i % SERIES] }));
      }
    });
    points.forEach((p, i) => {
      const own = colour(series.length + i), px = X(p.x), py = Y(p.y);
      parts.push(svg("line", { x1: left, x2: right, y1: py, y2: py, stroke: own, "stroke-dasharray": "2 4" }),
        svg("path", { d: `M${px} ${py - 6} l6 6 l-6 6 l-6 -6 Z`, fill: own }));
    });
    parts.push(svg("line", { class: "cross", x1: X(x[at]), x2: X(x[at]), y1: top, y2: bottom }));
    series.forEach((s, i) => usable(s.values[at]) && parts.push(
      svg("circle", { class: faded(s.name), cx: X(x[at]), cy: Y(s.values[at]), r: 4, fill: colour(i) })));
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.replaceChildren(...parts);
    picture.onpointermove = picture.onpointerdown = (event) => {
      if (event.type === "pointermove" && chart.onpick && !event.buttons) return; // hovering must not steer what it drives
      const px = ((event.clientX - picture.getBoundingClientRect().left) / picture.clientWidth) * width;
      pick(x.reduce((best, v, k) => (Math.abs(X(v) - px) < Math.abs(X(x[best]) - px) ? k : best), 0));
    };
  }
  return { show, highlight: (name) => { highlighted = name; draw(); } };
}

// Indices of each stretch of values without a gap.
function runs(values, usable) {
  const runs = [];
  values.forEach((v, i) => {
    if (!usable(v)) return;
    if (i && usable(values[i - 1])) runs[runs.length - 1].push(i);
    else runs.push([i]);
  });
  return runs;
}

/* A picture of one pixel per cell, stretched to the page: rows are loops, columns whatever they are.
 *   rows, columns: sizes     colour(row, column): [r, g, b] or null     describe(row, column): words for the pointer
 *   x: [label, label] at both ends          onpick(row, column)
 * Returns {paint(), mark(row)}. */
function pixelMap(host, { rows, columns, colour, describe, label, x, onpick }) {
  const canvas = el("canvas", { role: "img", "aria-label": label, width: columns, height: rows });
  canvas.style.height = `${clamp(rows * 8, 48, 288)}px`;
  const frame = el("div", { class: "row", hidden: "" }), readout = el("p", { class: "readout" });
  const pixels = el("div", { class: "pixels" }, canvas, frame);
  const y = el("div", { class: "y" }, el("span", {}, "loop 1"), ...(rows > 1 ? [el("span", {}, `loop ${rows}`)] : []));
  host.append(el("div", { class: "map" }, y, pixels, el("div", { class: "x" }, ...x.map((word) => el("span", {}, word)))), readout);

  const cell = (event) => {
    const box = canvas.getBoundingClientRect(), share = (v, size, n) => clamp(Math.floor((v / size) * n), 0, n - 1);
    return [share(event.clientY - box.top, box.height, rows), share(event.clientX - box.left, box.width, columns)];
  };
  canvas.addEventListener("pointermove", (event) => (readout.textContent = describe(...cell(event))));
  canvas.addEventListener("pointerleave", () => (readout.textContent = ""));
  if (onpick) canvas.addEventListener("click", (event) => onpick(...cell(event)));

  const paint = () => {
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        const pixel = colour(row, column);
        if (pixel) image.data.set([...pixel, 255], 4 * (row * columns + column));
      }
    context.putImageData(image, 0, 0);
  };
  const mark = (row) => {
    frame.hidden = false;
    frame.style.top = `calc(${(100 * row) / rows}% - 2px)`;
    frame.style.height = `calc(${100 / rows}% + 4px)`;
  };
  paint();
  return { paint, mark };
}
