"use strict";
// The sections of the page, each drawn from its part of the data; a part that is null leaves its section hidden.

const data = JSON.parse(document.getElementById("data").textContent);

function section(id, part, draw) {
  if (!part) return;
  const host = document.getElementById(id);
  host.hidden = false;
  host.querySelector(".lead").textContent = part.lead;
  draw(host, part);
}

// -- accuracy by difficulty and loops

function drawDepth(host, grid) {
  const kinds = { token: ["accuracy", "low", "high"], problem: ["exact", "exact_low", "exact_high"] };
  const name = (row) => `${grid.difficulties[row]} ${grid.unit}`;
  const columns = host.querySelector(".columns"), above = el("div"), below = el("div");
  const toggle = el("div", { class: "controls", role: "group", "aria-label": "what counts as right" });
  host.insertBefore(toggle, columns);
  host.insertBefore(above, columns); // over the whole width, so that every column is seen
  columns.append(below);
  const buttons = Object.keys(kinds).map((kind) => el("button", { type: "button", onclick: () => draw(kind) }, `right per ${kind}`));
  toggle.append(...buttons);

  function draw(kind) {
    const [mean, low, high] = kinds[kind].map((key) => grid[key]);
    const floor = kind === "token" ? grid.chance : 0;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", Object.keys(kinds)[i] === kind));
    above.replaceChildren();
    below.replaceChildren();
    const chart = lineChart(below, {
      title: "The same, as curves with 95% intervals", xLabel: "loops", log: "x", x: grid.loops, range: [0, 1], format: percent, height: 260,
      series: grid.difficulties.map((_, row) => ({ name: name(row), values: mean[row], low: low[row], high: high[row] })),
      deeper: { x: grid.trained_loops, label: "deeper than trained" },
      onpick: (column) => choose(null, column),
    });
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const body = el("tbody");
    grid.difficulties.forEach((difficulty, row) => {
      const beyond = difficulty > grid.trained_difficulty ? "harder than trained" : "trained";
      body.append(el("tr", {}, el("th", { scope: "row", title: beyond }, name(row), beyond === "trained" ? " ●" : ""),
        ...grid.loops.map((_, column) => {
          const colour = heatColour((mean[row][column] - floor) / (1 - floor));
          return el("td", { style: `background: ${rgb(colour)}; color: ${inkOn(colour)}`,
            onpointerenter: () => choose(row, column), onclick: () => choose(row, column) }, mean[row][column].toFixed(3).replace(/^0/, ""));
        })));
    });
    const table = el("table", { class: "heat", tabindex: 0, "aria-label": "accuracy by difficulty and loops; arrow keys read cells", onkeydown: keys },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, `${grid.unit} \\ loops`), ...grid.loops.map((n) => el("th", { scope: "col" }, n)))), body);
    const scroller = el("div", { class: "scroll" }, table), hint = el("p", { class: "hint" });
    above.append(el("h3", {}, `Share right per ${kind} (● difficulty seen in training)`), scroller, hint, readout);
    responsive(scroller, () => { hint.textContent = outOfView(scroller, grid.loops.at(-1)); });
    let at = [0, 0];

    function choose(row, column) {
      at = [row ?? at[0], column];
      for (const marked of table.querySelectorAll(".chosen")) marked.classList.remove("chosen");
      body.rows[at[0]].classList.add("chosen");
      body.rows[at[0]].cells[at[1] + 1].classList.add("chosen");
      const of = (values) => values[at[0]][at[1]];
      readout.textContent = `${name(at[0])}, ${grid.loops[at[1]]} loops: ${percent(of(mean))} (95%: ${percent(of(low))} – ${percent(of(high))}); ` +
        `${percent(of(grid.exact))} of problems right throughout; ${digits(of(grid.loops_used))} loops used by a position`;
      if (row !== null) { chart.show(column); chart.highlight(name(row)); } else chart.highlight(null);
    }
    function keys(event) {
      const [down, across] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
      if (down === undefined) return;
      event.preventDefault();
      choose(clamp(at[0] + down, 0, grid.difficulties.length - 1), clamp(at[1] + across, 0, grid.loops.length - 1));
    }
    table.addEventListener("pointerleave", () => chart.highlight(null));
  }
  draw("token");
}

// What a reader has to know of a table wider than its place; nothing of one that fits.
function outOfView(scroller, last) {
  const share = scroller.clientWidth / scroller.scrollWidth;
  return share > 0.99 ? "" : `Only ${percent(share)} of the table is in view: scroll it to the right, up to ${last} loops.`;
}

// Text has no difficulties: bits per byte, by loops alone.
function drawBits(host, bits) {
  const box = el("div");
  host.querySelector("h2").textContent = "Bits per byte by loops";
  host.querySelector(".columns").append(box);
  lineChart(box, { title: "Bits per byte of held-out text (lower is better; the axis does not start at 0)", xLabel: "loops", log: "x", x: bits.loops, height: 260,
    series: [{ name: "bits per byte", values: bits.values }], deeper: { x: bits.trained_loops, label: "deeper than trained" } });
}

// -- one problem, loop by loop

function drawExample(host, example) {
  const loops = example.predictions.length, positions = example.tokens.length;
  const word = (id) => example.words[id] ?? "";
  const running = (loop, t) => example.used[t] > loop;
  const scored = example.targets.map((target) => target !== null);
  const isRight = (loop, t) => example.predictions[loop][t] === example.targets[t];
  const answer = (loop, t) => (!scored[t] ? "unscored" : isRight(loop, t) ? "right" : "wrong");
  const share = (loop, holds) => scored.filter((s, t) => s && holds(loop, t)).length / Math.max(1, scored.filter(Boolean).length);
  let loop = 0, position = Math.max(0, scored.lastIndexOf(true)), timer = null;

  const slider = el("input", { type: "range", min: 1, max: loops, value: 1, "aria-label": "loop", oninput: () => go(slider.value - 1) });
  const shown = el("output"), play = el("button", { type: "button", onclick: () => (timer ? stop() : start()) });
  const step = (by, sign, label) => el("button", { type: "button", "aria-label": label, onclick: () => { stop(); go(loop + by); } }, sign);
  const cells = el("ol", { class: "cells" }), readout = el("p", { class: "readout", "aria-live": "polite" });
  const swatch = (colour, text) => el("li", {}, el("span", { class: "swatch", style: `background: ${colour}` }), text);

  for (let t = 0; t < positions; t++)
    cells.append(el("li", { onclick: () => { position = t; go(loop); } },
      el("span", { class: "in" }, word(example.tokens[t])), el("span", { class: "out" }), el("i")));
  const stage = el("div", { tabindex: 0, role: "group", onkeydown: keys,
    "aria-label": "positions of the problem; left and right change the loop, up and down the position, space plays" }, cells);
  host.append(el("div", { class: "controls" }, play, step(-1, "‹", "one loop back"), slider, step(1, "›", "one loop on"), shown),
    stage, readout, el("ul", { class: "legend" }, swatch("var(--right)", "right"), swatch("var(--wrong)", "wrong (struck through)"),
      swatch("var(--faint)", "not scored"), ...(example.halting ? [el("li", {}, "pale and dashed, in the map pale or blank: has halted")] : []),
      el("li", {}, "small, above: input; bold, below: prediction; bar: its probability")));

  const views = el("div", { class: "controls", role: "group", "aria-label": "what the map shows" }), map = el("div");
  const charts = el("div", { class: "columns" }), chartsLeft = el("div"), chartsRight = el("div");
  charts.append(chartsLeft, chartsRight);
  host.append(views, map, charts);

  const answerColours = { right: [[86, 180, 233], [170, 215, 244]], wrong: [[230, 159, 0], [242, 207, 128]], unscored: [[150, 155, 165], [200, 203, 209]] };
  const largest = Math.max(1e-9, ...example.change.flat());
  const VIEWS = {
    answers: (l, t) => answerColours[answer(l, t)][running(l, t) ? 0 : 1],
    probability: (l, t) => heatColour(example.probability[l][t] / 100),
    "state change": (l, t) => (running(l, t) ? heatColour(Math.sqrt(example.change[l][t] / largest)) : null),
    ...(example.gate ? { "halting gate": (l, t) => (running(l, t) ? heatColour(example.gate[l][t] / 100) : null) } : {}),
  };
  let view = "answers";
  const overview = pixelMap(map, {
    rows: loops, columns: positions, label: "every loop by every position", describe: words, x: ["position 1", `position ${positions}`],
    colour: (l, t) => VIEWS[view](l, t), onpick: (l, t) => { stop(); position = t; go(l); },
  });
  const look = (chosen) => {
    view = chosen;
    for (const button of views.children) button.setAttribute("aria-pressed", button.textContent === chosen);
    overview.paint();
  };
  views.append(...Object.keys(VIEWS).map((key) => el("button", { type: "button", onclick: () => look(key) }, key)));
  look(view);

  const each = [...Array(loops).keys()], x = each.map((l) => l + 1), onpick = (l) => { stop(); go(l); };
  const meanChange = each.map((l) => {
    const moved = example.change[l].filter((v, t) => running(l, t));
    return moved.length ? moved.reduce((a, b) => a + b, 0) / moved.length : null;
  });
  const linked = [
    lineChart(chartsLeft, { title: "Positions right, and still running", xLabel: "loop", x, range: [0, 1], format: percent, height: 180, onpick, series: [
      { name: "right", values: each.map((l) => share(l, isRight)) },
      { name: "running", values: each.map((l) => example.used.filter((used) => used > l).length / positions) }] }),
    lineChart(chartsRight, { title: "Relative state change |Δh| / |h|, mean of running positions", xLabel: "loop", x, log: "y", height: 180, onpick,
      series: [{ name: "state change", values: meanChange }] }),
  ];

  function words(l, t) {
    const status = running(l, t) ? `state change ${digits(example.change[l][t])}` : `halted after loop ${example.used[t]}`;
    const target = scored[t] ? `, target ${word(example.targets[t])} (${answer(l, t)})` : ", not scored";
    const gate = example.gate && running(l, t) ? `; gate ${example.gate[l][t]}%` : "";
    return `Loop ${l + 1}, position ${t + 1}: input ${word(example.tokens[t])}; predicts ${word(example.predictions[l][t])} ` +
      `with ${example.probability[l][t]}%${target}; ${status}${gate}`;
  }
  function go(to) {
    loop = clamp(to, 0, loops - 1);
    [...cells.children].forEach((cell, t) => {
      cell.className = [answer(loop, t), running(loop, t) ? "" : "halted", t === position ? "chosen" : ""].join(" ");
      cell.children[1].textContent = scored[t] ? word(example.predictions[loop][t]) : "·";
      cell.children[2].style.width = `${example.probability[loop][t]}%`;
      cell.title = words(loop, t);
    });
    slider.value = loop + 1;
    slider.setAttribute("aria-valuetext", `loop ${loop + 1} of ${loops}`);
    shown.textContent = `loop ${loop + 1} of ${loops}, ${percent(share(loop, isRight))} right`;
    readout.textContent = words(loop, position);
    overview.mark(loop);
    for (const chart of linked) chart.show(loop);
  }
  function stop() { clearInterval(timer); timer = null; play.textContent = "▶ Play"; }
  function start() {
    if (loop === loops - 1) go(0);
    play.textContent = "⏸ Pause";
    timer = setInterval(() => { go(loop + 1); if (loop === loops - 1) stop(); }, Math.max(90, Math.min(600, 9000 / loops)));
  }
  function keys(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -loops, End: loops }[event.key], other = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (move) { stop(); go(loop + move); }
    else if (other) { position = clamp(position + other, 0, positions - 1); go(loop); }
    else if (event.key === " ") timer ? stop() : start();
    else return;
    event.preventDefault();
  }
  stop();
  go(0);
}

// -- expert load

function drawExperts(host, experts) {
  if (experts.share[0].length === 1) return;
  const most = Math.max(...experts.share.flat());
  const box = el("div");
  host.append(box);
  pixelMap(box, {
    rows: experts.share.length, columns: experts.share[0].length, label: "share of token choices, each loop by each expert",
    colour: (l, e) => heatColour(experts.share[l][e] / most), x: ["expert 1", `expert ${experts.share[0].length}`],
    describe: (l, e) => `Loop ${l + 1}, expert ${e + 1}: ${percent(experts.share[l][e])} of token choices`,
  });
  host.append(el("p", { class: "readout" }, `Dark: none; bright: ${percent(most)}. Even would be ${percent(1 / experts.share[0].length)} each.`));
}

// -- baselines

function drawBaselines(host, compared) {
  const { contenders, difficulties, unit, seeds } = compared, box = el("div");
  const format = compared.measure === "accuracy" ? percent : digits, [looped, ...others] = contenders;
  const draw = (row) => {
    [...buttons.children].forEach((button, i) => button.setAttribute("aria-pressed", i === row));
    box.replaceChildren();
    lineChart(box, {
      title: `Mean ${compared.measure} over seeds, ${difficulties[row]} ${unit}`, xLabel: "loops", log: "x", height: 260, format,
      x: looped.loops, range: compared.measure === "accuracy" ? [0, 1] : null,
      series: [{ name: "looped", values: looped.mean[row], ...(seeds.length > 1 ? { low: looped.low[row], high: looped.high[row] } : {}) }],
      points: others.map((other) => ({ name: other.kind, x: other.loops[0], y: other.mean[row][0], note: ` ${format(other.mean[row][0])}` })),
      deeper: { x: compared.trained_loops, label: "deeper than trained" },
    });
  };
  const buttons = el("div", { class: "controls", role: "group", "aria-label": "difficulty" },
    ...difficulties.map((d, row) => el("button", { type: "button", onclick: () => draw(row) }, `${d} ${unit}`)));
  const power = (flops) => flops.toExponential(1);
  const head = ["model", "parameters", "FLOPs to train", "FLOPs a token", "learning rate", ...difficulties.map((d) => `${d} ${unit}`)];
  const table = el("table", { class: "plain" },
    el("caption", {}, `${compared.measure}, mean over seeds ${seeds.join(", ")} (worst); FLOPs a token at ${difficulties.at(-1)} ${unit}`),
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...compared.entries.map((entry) => el("tr", {}, ...[entry.name, whole(entry.parameters), power(entry.training_flops),
      power(entry.flops_per_token.at(-1)), entry.lr ?? "", ...entry.mean.map((mean, i) => `${format(mean)} (${format(entry.worst[i])})`),
    ].map((text) => el("td", {}, text))))));
  const kinds = Object.keys(looped.by_token ?? {});
  const byToken = el("table", { class: "plain" }, el("caption", {}, "bits per byte by kind of token"),
    el("thead", {}, el("tr", {}, ...["model", ...kinds].map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...contenders.map((one) => el("tr", {}, ...[one.kind, ...kinds.map((kind) => digits(one.by_token[kind]))]
      .map((text) => el("td", {}, text))))));
  const lines = [...(compared.worth ?? []), ...compared.verdicts];
  host.append(buttons, box, el("div", { class: "scroll" }, table), ...(kinds.length ? [el("div", { class: "scroll" }, byToken)] : []),
    el("ul", { class: "words" }, ...lines.map((text) => el("li", {}, text))));
  draw(difficulties.length - 1);
}

// -- training and settings

function drawTraining(host, training) {
  for (const { title, values, log, range } of training.curves) {
    const box = el("div");
    host.querySelector(".columns").append(box);
    lineChart(box, { title, xLabel: "step", x: training.steps, log: log ? "y" : "", range, series: [{ name: title, values }],
      format: range ? percent : digits });
  }
}

function drawSettings(host) {
  const table = (rows) => el("div", { class: "scroll" }, el("table", { class: "plain words" },
    el("thead", {}, el("tr", {}, ...["setting", "value", "default"].map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows.map(([key, value, usual]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, value), el("td", {}, usual))))));
  const fold = (title, content, open) => el("details", open ? { open: "" } : {}, el("summary", {}, title), content);
  const changed = data.settings.filter(([, value, usual]) => value !== usual);
  host.append(el("h3", {}, "Made by"), el("pre", {}, data.commands.join("\n")),
    el("p", { class: "readout" }, Object.entries(data.versions).map(([name, version]) => `${name} ${version}`).join(" · ")),
    fold(`Settings that differ from the defaults (${changed.length})`, table(changed), true),
    fold(`All settings (${data.settings.length})`, table(data.settings), false));
  addEventListener("beforeprint", () => host.querySelectorAll("details").forEach((d) => (d.open = true)));
}

document.getElementById("title").textContent = data.title;
document.getElementById("subtitle").textContent = data.subtitle;
document.getElementById("facts").append(...data.facts.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, value))));
section("depth", data.grid, drawDepth);
section("depth", data.bits, drawBits);
section("example", data.example, drawExample);
section("experts", data.experts, drawExperts);
section("baselines", data.baselines, drawBaselines);
section("training", data.training, drawTraining);
drawSettings(document.getElementById("settings"));
