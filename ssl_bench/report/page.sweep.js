"use strict";
// What was varied against a result: parallel coordinates, the importance of keys, responses. Helpers are in page.js.

const ORDINAL = 10; // values up to which each has a place of its own
const RANGES = 4; // of which the means are drawn where most values were tried once
const measured = new Map(); // board -> the metric that is looked at
const numeric = (values) => values.every((value) => value !== "" && Number.isFinite(Number(value)));
const mix = (one, other, share) => { // of two colours as `colour` gives them
  const [a, b] = [one, other].map((rgb) => rgb.match(/[\d.]+/g).slice(0, 3).map(Number));
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * share)).join(", ")})`;
};
const shortOf = (keys) => { // names of axes: the end of a key, as far as it is its own
  const ends = keys.map((key) => key.replace(/\.name$/, "").split(".").at(-1));
  return keys.map((key, i) => (ends.indexOf(ends[i]) === ends.lastIndexOf(ends[i]) ? ends[i] : key));
};
const niceTicks = (least, most, count = 4) => {
  const rough = (most - least) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((one) => one * power >= rough) * power;
  const found = [];
  for (let tick = Math.ceil(least / step) * step; tick <= most + step * 1e-9; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
};
// Where a value lies, 0 ... 1, and the labels of its axis.
const scaleOf = (words) => {
  const values = [...new Set(words)].sort(compare), numbers = numeric(values);
  if (!numbers || values.length <= ORDINAL) {
    const every = Math.ceil(values.length / 12);
    const at = new Map(values.map((value, i) => [value, (i + 0.5) / values.length]));
    return { at: (word) => at.get(word), gap: 1 / values.length, numbers, ticks: values.filter((_, i) => i % every === 0).map((value) => [at.get(value), value || "none"]) };
  }
  const all = values.map(Number), log = all[0] > 0 && all.at(-1) / all[0] >= 20;
  const by = log ? Math.log10 : (value) => value;
  const [least, most] = [by(all[0]), by(all.at(-1))];
  const at = (word) => 0.04 + 0.92 * (by(Number(word)) - least) / (most - least);
  const decades = Array.from({ length: Math.floor(most) - Math.ceil(least) + 1 }, (_, i) => 10 ** (Math.ceil(least) + i));
  const ticks = log && decades.length > 1 ? decades : log ? [all[0], all.at(-1)] : niceTicks(all[0], all.at(-1));
  const labels = log ? ticks.map(number) : labelsOf(ticks);
  return { at, gap: 0, numbers, ticks: ticks.map((tick, i) => [at(tick), labels[i]]) };
};
const clipped = (label, letters) => (label.length > letters ? `${label.slice(0, letters - 1)}…` : label);

const sweepOf = (board) => { // what of it is shown: a row for each group that has the metric and isn't filtered out
  const { keys, metrics } = board.sweep;
  const metric = metrics.find((one) => one.key === measured.get(board.id)) ?? metrics[0];
  const axes = metric.shares.map((share) => ({ ...share, ...keys[share.place], scale: scaleOf(keys[share.place].words) }));
  const names = shortOf(axes.map(({ key }) => key));
  axes.forEach((axis, i) => { axis.short = names[i]; });
  const known = metric.means.filter((mean) => mean !== null), base = unpooled();
  const [least, most] = [Math.min(...known), Math.max(...known)];
  const places = niceTicks(least, most), labels = labelsOf(places);
  const ticks = places.map((place, i) => [place, labels[i]]); // of the result
  const share = (mean) => (mean - least) / (most - least || 1);
  const good = (mean) => (metric.least ? 1 - share(mean) : share(mean));
  const rows = board.groups.flatMap(({ name }, place) => {
    const mean = metric.means[place];
    if (mean === null || !matches(name)) return [];
    return [{ name, place, mean, good: good(mean), far: picked.size > 0 && !base.has(name) }];
  }).sort((a, b) => (b.far - a.far) || a.good - b.good); // the best is drawn last
  return { board, metric, axes, rows, ticks, share, good };
};
const inkOf = ({ rows }, row) => (row === rows.at(-1) ? colour("--s1") : mix(colour("--rule"), colour("--accent"), row.good));

const PITCH = 104, TOP = 44, HEIGHT = 330;
const coordinatesOf = (sweep, room) => {
  const { axes, rows, metric } = sweep;
  const left = 64, right = 60, width = Math.max(room, left + right + PITCH * axes.length);
  const x = (i) => left + i * (width - left - right) / axes.length;
  const y = (share) => TOP + (1 - share) * (HEIGHT - TOP - 14);
  const halo = `paint-order="stroke" stroke="${colour("--paper")}" stroke-width="4"`;
  const parts = [], labels = [];
  [...axes, metric].forEach((axis, i) => {
    const ticks = i < axes.length ? axis.scale.ticks : sweep.ticks.map(([tick, label]) => [sweep.good(tick), label]);
    const name = i < axes.length ? axis.short : metric.label;
    parts.push(`<line x1="${x(i)}" x2="${x(i)}" y1="${y(1)}" y2="${y(0)}" stroke="${colour("--rule")}"/>`);
    const anchor = i === axes.length ? "end" : i ? "middle" : "start";
    const place = i === axes.length ? width - 4 : i ? x(i) : 4;
    labels.push(`<g><title>${escaped(axis.key)}</title>${svgText(place, 18, clipped(name, Math.floor(PITCH / 6.6)), `text-anchor="${anchor}" font-weight="600"`)}</g>`);
    for (const [share, label] of ticks) {
      const last = i === axes.length;
      labels.push(svgText(x(i) + (last ? 8 : -8), y(share) + 4, clipped(label, 14), `text-anchor="${last ? "start" : "end"}" ${halo}`));
    }
  });
  for (const row of rows) {
    const ends = axes.map(({ words, scale }) => y(scale.at(words[row.place]) + scale.gap * 0.7 * (row.good - 0.5)));
    const points = [...ends, y(row.good)].map((end, i) => [x(i).toFixed(1), end.toFixed(1)]);
    const path = points.map(([px, py], i) => {
      if (!i) return `M${px},${py}`;
      const half = ((Number(points[i - 1][0]) + Number(px)) / 2).toFixed(1);
      return `C${half},${points[i - 1][1]} ${half},${py} ${px},${py}`;
    }).join("");
    const best = row === rows.at(-1);
    parts.push(`<path class="row" data-place="${row.place}" d="${path}" fill="none" stroke="${inkOf(sweep, row)}" stroke-width="${best ? 3 : 1.6}" stroke-opacity="${row.far ? 0.12 : best ? 1 : 0.75}"/>`);
  }
  return svgFile(width, HEIGHT, [...parts, ...labels]);
};

const responseOf = (sweep, axis, width, titled = false) => {
  const { rows, metric, ticks, share } = sweep;
  const { scale, words, key } = axis;
  const head = titled ? 30 : 8, foot = 40, height = head + 190;
  const left = 16 + 6.6 * Math.max(...ticks.map(([, label]) => label.length));
  const x = (value) => left + value * (width - left - 10);
  const y = (mean) => head + (1 - share(mean)) * (height - foot - head - 8) + 4;
  const parts = titled ? [svgText(0, 14, clipped(`${metric.label} against ${key}`, Math.floor(width / 7)), 'font-weight="600"')] : [];
  for (const [tick, label] of ticks) {
    parts.push(`<line x1="${left}" x2="${width}" y1="${y(tick)}" y2="${y(tick)}" stroke="${colour("--grid")}"/>`, svgText(left - 6, y(tick) + 4, label, 'text-anchor="end"'));
  }
  const letters = Math.max(3, Math.floor((width - left) / scale.ticks.length / 6.8));
  for (const [at, label] of scale.ticks) parts.push(`<g><title>${escaped(label)}</title>${svgText(x(at), height - foot + 18, clipped(label, letters), 'text-anchor="middle"')}</g>`);
  parts.push(svgText(width, height - 4, axis.short, 'text-anchor="end"'));
  const near = rows.filter((row) => !row.far);
  for (const row of rows) {
    parts.push(`<circle class="row" data-place="${row.place}" cx="${x(scale.at(words[row.place])).toFixed(1)}" cy="${y(row.mean).toFixed(1)}" r="3.5" fill="${inkOf(sweep, row)}" fill-opacity="${row.far ? 0.12 : 0.75}"/>`);
  }
  const levels = new Map(); // place on the axis -> the results there
  const sorted = [...near].sort((a, b) => scale.at(words[a.place]) - scale.at(words[b.place]));
  const size = Math.ceil(sorted.length / RANGES);
  sorted.forEach((row, i) => {
    const level = scale.gap ? scale.at(words[row.place]) : Math.floor(i / size);
    levels.set(level, [...(levels.get(level) ?? []), row]);
  });
  const meanOf = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const means = [...levels.values()].map((of) => [x(meanOf(of.map((row) => scale.at(words[row.place])))).toFixed(1), y(meanOf(of.map((row) => row.mean))).toFixed(1)]);
  if (scale.numbers) parts.push(`<polyline points="${means.map((one) => one.join(",")).join(" ")}" fill="none" stroke="${colour("--ink")}" stroke-width="1.8"/>`);
  for (const [px, py] of means) parts.push(`<line x1="${Number(px) - 9}" x2="${Number(px) + 9}" y1="${py}" y2="${py}" stroke="${colour("--ink")}" stroke-width="2.4"/>`);
  return svgFile(width, height, parts);
};

const importanceOf = ({ axes, metric }) => {
  const percent = (share) => (share === null || share === undefined ? "" : `${(100 * share).toFixed(1)}`);
  const head = make("thead", {}, make("tr", {}, ...["setting", "importance (%)", "by chance (%)", ""].map((label, i) => make("th", { scope: "col", className: i === 1 || i === 2 ? "num" : "" }, label || "remark"))));
  const rows = axes.map(({ key, share, chance, note }) => {
    const bar = make("td", { className: share === null ? "num" : "num bar mark" }, percent(share));
    bar.style.setProperty("--v", share ?? 0);
    bar.style.setProperty("--c", Math.min(chance ?? 0, 1));
    return make("tr", {}, make("th", { scope: "row" }, make("code", {}, key)), bar, make("td", { className: "num" }, percent(chance)), make("td", { className: "quiet" }, note));
  });
  const scroll = make("div", { className: "scroll", tabIndex: 0, role: "group", ariaLabel: `Importance of settings for ${metric.label}` }, make("table", {}, head, make("tbody", {}, ...rows)));
  return make("div", {}, scroll);
};

const figureWith = (title, note, svg, label, file, more = "") => {
  const figure = make("figure", { className: `panel ${more}` }, make("figcaption", {}, title, ...(note ? [make("small", {}, note)] : [])));
  const place = make("div", { className: more ? "scroll" : "" });
  if (more) Object.assign(place, { tabIndex: 0, role: "group", ariaLabel: `${title}, a chart` });
  place.insertAdjacentHTML("beforeend", svg); // its texts are escaped
  const drawing = place.querySelector("svg");
  drawing.setAttribute("role", "img");
  drawing.ariaLabel = label;
  const tools = make("p", { className: "tools" });
  downloads(tools, title, file);
  figure.append(place, tools);
  return figure;
};

const drawSweep = (stage, board) => {
  const sweep = sweepOf(board), { metric, rows, axes } = sweep;
  const choices = make("select", {}, ...board.sweep.metrics.map(({ key, label }) => make("option", { value: key, selected: key === metric.key }, label)));
  choices.addEventListener("change", () => {
    measured.set(board.id, choices.value);
    drawSweep(stage, board);
    stage.querySelector("select").focus();
  });
  const title = make("h3", { id: `sweep-${board.id}` }, board.title);
  const controls = make("p", { className: "controls" }, make("label", {}, "Result ", choices));
  if (!rows.length) { stage.replaceChildren(title, controls, make("p", { className: "quiet" }, "No row matches the filter.")); return; }
  const best = rows.at(-1), width = Math.max(stage.clientWidth, 280);
  const values = axes.map(({ short, words }) => `${short} ${words[best.place] || "none"}`).join(", ");
  const said = `${rows.length} rows; of those shown the best, ${number(best.mean)}, has ${values}`;
  const panel = Math.min(width, 400);
  const importance = importanceOf(sweep);
  stage.replaceChildren(title, controls,
    figureWith("Parallel coordinates", `the thick line is the best: ${number(best.mean)} with ${values}`, coordinatesOf(sweep, Math.min(width, 1272)), `${metric.label} by settings: ${said}`, () => coordinatesOf(sweep, 1000), "across"),
    make("h4", {}, `Importance for ${metric.label}`), importance, make("p", { className: "quiet" }, metric.notes.join(" ")),
    make("h4", {}, "Responses"), make("p", { className: "quiet" }, "Each dot is a row of the leaderboard. Bars are means: at each value or, where most values were tried once, in four ranges with equally many rows."),
    make("div", { className: "panels" }, ...axes.map((axis) => figureWith(axis.key, "", responseOf(sweep, axis, panel), `${metric.label} against ${axis.key}`, () => responseOf(sweep, axis, 480, true)))));
  addTools(importance);
  stage.sweep = sweep;
};
// They are drawn when they come into sight.
const stagesInSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.inSight = isIntersecting;
    if (isIntersecting && target.dirty) { target.dirty = false; drawSweep(target, target.board); }
  }
}, { rootMargin: "400px" });
const drawSweeps = () => {
  const section = document.getElementById("sweep");
  if (!section) return;
  const place = document.getElementById("sweeps");
  const boards = data.boards.filter(({ sweep }) => sweep);
  section.hidden = !boards.length;
  const link = document.querySelector('nav a[href="#sweep"]');
  if (link) link.parentNode.hidden = !boards.length;
  for (const stage of [...place.children]) if (!boards.some(({ id }) => id === stage.dataset.stage)) { stagesInSight.unobserve(stage); stage.remove(); }
  for (const board of boards) {
    let stage = [...place.children].find((one) => one.dataset.stage === board.id);
    if (!stage) {
      stage = make("div", { "data-stage": board.id });
      stage.style.minHeight = "40rem"; // so that it is drawn in time, and what is below doesn't jump
      place.append(stage);
      stagesInSight.observe(stage);
    }
    Object.assign(stage, { board, dirty: true });
    if (stage.inSight) { stage.dirty = false; drawSweep(stage, board); }
  }
};
for (const kind of ["pointerover", "pointerout"]) {
  document.addEventListener(kind, (event) => {
    const row = event.target.closest?.("#sweeps .row");
    if (!row) return;
    const stage = row.closest("[data-stage]"), { sweep } = stage;
    const entering = kind === "pointerover";
    for (const same of all(`.row[data-place="${row.dataset.place}"]`, stage)) same.classList.toggle("own", entering);
    stage.classList.toggle("focus", entering);
    tip.hidden = !entering;
    if (!entering) return;
    const { name, mean } = sweep.rows.find(({ place }) => place === Number(row.dataset.place));
    thumb.className = "";
    thumb.removeAttribute("style");
    text.replaceChildren(make("b", {}, name), make("br"), `${sweep.metric.label} ${number(mean)}`);
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
  });
}
document.addEventListener("click", ({ target }) => { // as a tick of the row
  const row = target.closest?.("#sweeps .row");
  if (!row) return;
  const { name } = row.closest("[data-stage]").sweep.rows.find(({ place }) => place === Number(row.dataset.place));
  tip.hidden = true;
  const names = drawnAs(name), before = names.every((one) => picked.has(one));
  for (const one of names) if (before) picked.delete(one); else picked.add(one);
  choose();
});
