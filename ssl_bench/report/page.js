"use strict";

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in node) node[key] = value; else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
};
const root = document.documentElement;
const tip = document.getElementById("tip");
const [thumb, text] = tip.children;
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 8, LINES = 24, FIRST = 10; // lines that can be told apart; those drawn until others are chosen

// -- what is chosen -----------------------------------------------------------------------------------------------------------
const picked = new Set(); // names whose boxes are ticked: these alone are drawn and compared
const lit = new Set(); // names clicked in a legend: the others are dimmed
const slots = new Map(); // name -> which colour and dash, kept for as long as it is drawn
const filter = document.getElementById("filter");
const wanted = () => filter.value.toLowerCase().split(/\s+/).filter(Boolean);
const words = new Map(); // name -> what the filter looks at, besides the texts of a row
const matches = (name, more = "") => {
  const said = `${name} ${words.get(name) ?? ""} ${more}`.toLowerCase();
  return wanted().every((word) => said.includes(word));
};
// -- pooling: the rows that have the same value of a key are drawn as one
const by = document.getElementById("by");
const sides = (key) => [key, `pretrained.${key}`, key.replace(/^pretrained\./, "")]; // a pretraining's key is an evaluation's, too
const poolOf = (board) => (by.value ? sides(by.value).map((key) => board.by.find((one) => one.key === key || one.also.includes(key))).find(Boolean) : undefined);
const groupsOf = (board) => poolOf(board)?.groups ?? board.groups;
const membersOf = (group) => group.members ?? [group.name];
const drawnAs = (name) => { // a run's row -> the rows that are drawn for it
  const found = data.boards.flatMap(groupsOf).filter((one) => membersOf(one).includes(name)).map((one) => one.name);
  return found.length ? found : [name];
};
const unpooled = () => new Set(data.boards.flatMap(groupsOf).filter((one) => picked.has(one.name)).flatMap(membersOf));
const poolings = () => { // the choices, which may change while runs go on
  const keys = [...new Set(data.boards.flatMap((board) => board.by.flatMap(({ key, also }) => [key, ...also])))].sort();
  const before = by.value;
  by.replaceChildren(make("option", { value: "" }, "nothing"), ...keys.map((key) => make("option", {}, key)));
  by.value = keys.includes(before) ? before : "";
  document.getElementById("grouping").hidden = !keys.length;
};
const pool = () => { // tables, and what is said of them
  for (const place of all(".board")) {
    const board = data.boards.find((one) => one.id === place.dataset.stage);
    const key = (board && poolOf(board)?.key) ?? "";
    if ((place.dataset.by ?? "") === key) continue;
    place.dataset.by = key;
    place.querySelector(".pool")?.remove();
    const rows = place.querySelector(".rows");
    rows.hidden = Boolean(key);
    if (!key) continue;
    const template = all("template", place).find((one) => one.dataset.by === key);
    const table = make("div", { className: "pool" }, template.content.cloneNode(true));
    rows.after(table);
    addTools(table);
  }
  const said = document.getElementById("pooled");
  said.hidden = !by.value;
  if (!by.value) return;
  const other = data.boards.map(poolOf).find((one) => one && !sides(by.value).includes(one.key));
  const whole = data.boards.filter((board) => board.groups.length && !poolOf(board)).map((board) => board.title);
  said.textContent = [
    `Each row is a value of ${by.value}: mean ± std over all runs that have it, whatever their seeds and other settings.`,
    other ? `Rows are named by ${other.key}, which gives the same groups.` : "",
    whole.length ? `Not grouped, because no two rows have the same value: ${whole.join(", ")}.` : "",
  ].filter(Boolean).join(" ");
};
by.addEventListener("change", () => { picked.clear(); lit.clear(); choose(); });
const chosen = (board) => groupsOf(board).filter((one) => (picked.size ? picked.has(one.name) : matches(one.name)));
// Few are easy to tell apart: more are drawn where they are asked for.
const drawn = (board) => chosen(board).slice(0, picked.size ? LINES : FIRST);

const paint = () => {
  const names = new Set(data.boards.flatMap((board) => drawn(board).map((one) => one.name)));
  for (const name of [...slots.keys()]) if (!names.has(name)) slots.delete(name);
  const taken = new Set(slots.values());
  for (const name of names) {
    if (slots.has(name)) continue;
    let slot = 0;
    while (taken.has(slot)) slot += 1;
    taken.add(slot);
    slots.set(name, slot);
  }
  for (const one of all("[data-swatch]")) {
    const slot = slots.get(one.dataset.swatch);
    one.className = slot === undefined ? "swatch none" : `swatch s${slot % COLOURS} d${Math.floor(slot / COLOURS) % 3}`;
  }
};

const tickedBy = (box) => (by.value && box.closest("#runs") ? drawnAs(box.value) : [box.value]);
const choose = () => { // all that follows from the filter and the boxes
  words.clear();
  for (const board of data.boards) for (const one of new Set([...board.groups, ...groupsOf(board)])) words.set(one.name, `${words.get(one.name) ?? ""} ${one.words}`);
  pool();
  for (const box of all("tbody input[type=checkbox]")) box.checked = tickedBy(box).every((name) => picked.has(name));
  let [seen, count] = [0, 0];
  for (const row of all("tr[data-name]")) {
    row.hidden = !matches(row.dataset.name, row.textContent);
    if (row.closest("#runs")) [seen, count] = [seen + !row.hidden, count + 1];
  }
  document.getElementById("found").textContent = [
    wanted().length ? `${seen} of ${count} runs` : "", picked.size ? `${picked.size} selected` : "",
  ].filter(Boolean).join(", ");
  document.getElementById("unpick").hidden = !picked.size;
  for (const table of all("#differences table")) compareColumns(table);
  paint();
  layOut();
};
const LEAST = 2, MOST = 12; // columns of a comparison
const compareColumns = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  const base = unpooled();
  const fit = heads.slice(1).filter((head) => (picked.size ? base.has(head.dataset.name) : matches(head.dataset.name)));
  const columns = new Set((fit.length < LEAST && !picked.size ? heads.slice(1) : fit).slice(0, MOST));
  heads.forEach((head, i) => {
    if (!i) return;
    for (const row of table.rows) row.cells[i].hidden = !columns.has(head);
  });
  for (const row of table.tBodies[0].rows) {
    const values = new Set([...row.cells].slice(1).filter((cell) => !cell.hidden).map((cell) => cell.textContent));
    row.hidden = columns.size > 1 && values.size < 2;
  }
};
filter.addEventListener("input", choose);
document.getElementById("picker").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("unpick").addEventListener("click", () => { picked.clear(); choose(); filter.focus(); });
document.addEventListener("change", ({ target }) => {
  if (!target.matches("tbody input[type=checkbox]")) return;
  for (const name of tickedBy(target)) if (target.checked) picked.add(name); else picked.delete(name);
  choose();
});

// -- tables -------------------------------------------------------------------------------------------------------------------
// They are sorted by data-order, or by the text of a cell: numbers as numbers, the rest as words. Empty cells come last.
const order = (cell) => cell.dataset.order ?? cell.textContent.trim();
const compare = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
};
const sortings = new Map(); // caption of a table -> [head, direction], for when it is written anew
const captionOf = (table) => table.closest("[aria-labelledby]")?.getAttribute("aria-labelledby") ?? "";
const sortBy = (table, column, direction) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((one, i) => { one.ariaSort = i === column ? direction : "none"; });
  const rows = [...table.tBodies[0].rows];
  const value = new Map(rows.map((row) => [row, order(row.cells[column])]));
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort((a, b) => {
    const [x, y] = [value.get(a), value.get(b)];
    return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
  });
  table.tBodies[0].append(...rows);
};
document.addEventListener("click", ({ target }) => {
  const head = target.closest("table.sortable thead th");
  if (!head || !target.closest("button")) return;
  const { first } = head.dataset; // the best is on top
  const other = first === "ascending" ? "descending" : "ascending";
  const direction = head.ariaSort === first ? other : first;
  sortings.set(captionOf(head), [head.textContent, direction]);
  sortBy(head.closest("table"), head.cellIndex, direction);
});

// What a column is, where its heading is pointed at or focused.
const explain = ({ target, type }) => {
  const button = target.closest?.("[aria-describedby^=about-]");
  if (!button) return;
  tip.hidden = !/over|in$/.test(type);
  if (tip.hidden) return;
  explain.of = button;
  tip.ariaLive = "off"; // a screen reader says it as the button's description
  thumb.className = "";
  thumb.removeAttribute("style");
  text.textContent = document.getElementById(button.getAttribute("aria-describedby")).textContent;
  const box = button.getBoundingClientRect(), { width } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${box.bottom + 6}px`;
};
for (const event of ["pointerover", "pointerout", "focusin", "focusout"]) document.addEventListener(event, explain);
document.addEventListener("keydown", ({ key }) => { if (key === "Escape") tip.hidden = true; });

const save = (name, type, content) => {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  make("a", { href: url, download: name.replace(/[^\w.-]+/g, "_") }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
};
// As it is seen: filtered and sorted. A spreadsheet must not take a name for a formula.
const csvOf = (table) => {
  const rows = [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells].filter((cell) => !cell.hidden));
  const texts = rows.map((row) => row.map((cell) => (cell.matches(".place") ? cell.title : cell.textContent.trim())));
  const spread = texts[0].map((_, i) => texts.slice(1).some((row) => / ± /.test(row[i])) && rows[0][i].classList.contains("num"));
  const numeric = rows[0].map((cell) => cell.classList.contains("num"));
  const quoted = (value) => {
    const safe = /^[=+@\t\r]|^-(?![\d.])/.test(value) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return texts.map((row, number) => row.flatMap((value, i) => {
    if (!number) return spread[i] ? [`${value} mean`, `${value} std`] : [value];
    const parts = (numeric[i] ? value.replace(/(\d),(?=\d{3})/g, "$1") : value).split(" ± ");
    return spread[i] ? [parts[0], parts[1] ?? ""] : [parts.join(" ± ")];
  }).map(quoted).join(",")).join("\r\n") + "\r\n";
};
const addTools = (within) => {
  for (const table of all("table", within)) {
    const scroll = table.closest(".scroll") ?? table;
    const name = document.getElementById(captionOf(table))?.textContent
      ?? scroll.getAttribute("aria-label") ?? table.closest("figure")?.querySelector("figcaption")?.textContent ?? "table";
    const button = make("button", { type: "button", className: "tool", ariaLabel: `Download ${name} as CSV` }, "CSV");
    button.addEventListener("click", () => save(`${name}.csv`, "text/csv", csvOf(table)));
    scroll.after(make("p", { className: "tools" }, button));
    const [head, direction] = sortings.get(captionOf(table)) ?? [];
    const column = [...table.tHead.rows[0].cells].findIndex((one) => one.textContent === head);
    if (column >= 0) sortBy(table, column, direction);
  }
};

// -- curves -------------------------------------------------------------------------------------------------------------------
const controls = document.getElementById("axes");
const setting = (name) => { const one = controls.elements[name]; return one.type === "checkbox" ? one.checked : one.value; };
const AXES = ["epoch", "step", "images", "hours"];
// The axis at an epoch, linear between the rows of the group's table of epoch, step, images, hours.
const axisOf = ({ axes }, axis) => {
  const column = AXES.indexOf(axis);
  if (!column) return (epoch) => epoch;
  const known = axes.filter((row) => row[column] !== null);
  return (epoch) => {
    if (!known.length || epoch < known[0][0] || epoch > known.at(-1)[0] + 1e-9) return null;
    const next = Math.max(known.findIndex((row) => row[0] >= epoch), 0);
    const [a, b] = [known[Math.max(next - 1, 0)], known[next]];
    return b[0] === a[0] ? b[column] : a[column] + (b[column] - a[column]) * (epoch - a[0]) / (b[0] - a[0]);
  };
};
// An exponential mean that begins with the first value, as TensorBoard's.
const smoothed = (values, weight) => {
  let [last, norm] = [0, 0];
  return values.map((value) => {
    if (value === null) return null;
    last = last * weight + (1 - weight) * value;
    norm = norm * weight + (1 - weight);
    return last / norm;
  });
};
// A method's own loss has a panel of its own, where nothing is drawn that pools it with others.
const belongs = (group, { key, only }) => group.curves.values[key] && (!only || membersOf(group).every((name) => only.includes(name)));
const linesOf = (board, panel) => {
  const [axis, logx, logy, weight] = [setting("x"), setting("logx"), setting("logy"), Number(setting("smooth"))];
  const found = [];
  for (const group of drawn(board)) {
    const { name, curves } = group;
    if (!belongs(group, panel)) continue;
    const [grid, means, stds] = curves.values[panel.key];
    const at = axisOf(curves, axis);
    const rows = [];
    smoothed(means, weight).forEach((y, i) => {
      const x = at(curves.grids[grid][i]);
      if (x === null || y === null || (logx && x <= 0) || (logy && y <= 0)) return;
      const std = stds?.[i] ?? 0;
      // a band stays among possible values
      const [low, high] = [y >= 0 ? Math.max(y - std, 0) : y - std, panel.label.includes("%") ? Math.min(y + std, 100) : y + std];
      rows.push([x, y, logy && low <= 0 ? y : low, high]);
    });
    if (rows.length) found.push({ name, slot: slots.get(name), band: Boolean(stds), rows });
  }
  return found;
};
const plainly = (value, most, least = 0) => value.toLocaleString("en", { maximumFractionDigits: most, minimumFractionDigits: least });
const number = (value) => {
  const size = Math.abs(value);
  if (size && size < 1e-3) return value.toExponential(2).replace(/\.?0*e/, "e");
  if (size >= 1e4) return plainly(Math.round(value), 0);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
};
const stepOf = (ticks) => Math.min(...ticks.slice(1).map((tick, i) => Math.abs(tick - ticks[i])), Infinity);
// Labels of an axis have as many digits as tell neighbours apart.
const labelsOf = (ticks) => {
  const known = ticks.filter((tick) => tick !== null), most = Math.max(0, ...known.map(Math.abs));
  const [scale, unit] = [[1e9, "B"], [1e6, "M"]].find(([size]) => most >= size)
    ?? (most && most < 1e-3 ? [10 ** Math.floor(Math.log10(most)), `e${Math.floor(Math.log10(most))}`] : [1, ""]);
  const step = (known.length > 1 ? stepOf(known) : most) / scale;
  let digits = 0;
  while (digits < 9 && Math.abs(Math.round(step * 10 ** digits) / (step * 10 ** digits) - 1) > 1e-3) digits += 1;
  return ticks.map((tick) => (tick === null ? "" : tick ? plainly(tick / scale, digits, digits) + unit : "0"));
};
// Of a value between ticks: two digits more than the ticks need, so that a column of values lines up.
const between = (value, ticks) => {
  const step = stepOf(ticks);
  if (!Number.isFinite(step) || (value && Math.abs(value) < 1e-3)) return number(value);
  const digits = Math.min(Math.max(0, 2 - Math.floor(Math.log10(step) + 1e-9)), 9);
  return plainly(value, digits, digits);
};
const FLAT = 1e-3; // a share of its values by which a curve at least moves from the bottom to the top of a chart
const spanOf = (least, most) => {
  const room = (Math.max(Math.abs(least), Math.abs(most)) * FLAT - (most - least)) / 2;
  return room > 0 ? [least - room, most + room] : uPlot.rangeNum(least, most, 0.1, true);
};
// Logarithmic axes: powers of ten, with 2 and 5 where these are few; within less than one, as on a linear axis.
const logSpanOf = (least, most) => {
  const room = Math.exp(Math.max(Math.log(most / least) * 0.05, FLAT / 2));
  return [least / room, most * room];
};
const logTicks = (least, most) => {
  if (most / least < 10) return niceTicks(least, most, 5);
  const [first, last] = [Math.floor(Math.log10(least)), Math.floor(Math.log10(most))];
  const every = Math.max(1, Math.ceil((last - first) / 8)), within = most / least < 200 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = first; power <= last; power += every) for (const one of within) found.push(Number(`${one}e${power}`));
  return found.filter((tick) => tick >= least && tick <= most);
};
const logLabels = (ticks) => (ticks.at(-1) / ticks[0] < 10 ? labelsOf(ticks) : ticks.map((tick) => labelsOf([tick])[0]));
const probe = make("span", { hidden: true });
document.body.append(probe);
const colour = (variable) => { // as a canvas and a file need it
  probe.style.color = `var(${variable})`;
  return getComputedStyle(probe).color;
};
const colourOf = (slot) => colour(`--s${slot % COLOURS}`);
const DASHES = [[], [7, 3], [2, 2]];
const dashOf = (slot) => DASHES[Math.floor(slot / COLOURS) % DASHES.length];
const faded = (rgb, share) => rgb.replace(/^rgba?\((\d+), (\d+), (\d+).*$/, `rgba($1, $2, $3, ${share})`);

const FEW = 12; // points of a line up to which each has a mark
const shown = new Map(); // figure -> what is drawn there
const nearest = (rows, x) => rows.reduce((best, row) => (Math.abs(row[0] - x) < Math.abs(best[0] - x) ? row : best));
const say = (figure, chart, event) => { // the values under the cursor
  const { plot, lines, panel } = chart;
  if (plot.cursor.left < 0) return;
  const x = plot.posToVal(plot.cursor.left, "x");
  const near = lines.map((line) => [line, nearest(line.rows, x)]).sort(([, a], [, b]) => b[1] - a[1]);
  const table = make("table", {}, ...near.slice(0, 12).map(([line, row]) => make("tr", {},
    make("td", {}, make("span", { className: `swatch s${line.slot % COLOURS} d${Math.floor(line.slot / COLOURS) % 3}` }), line.name),
    make("td", { className: "num" }, setting("logy") ? number(row[1]) : between(row[1], plot.axes[1]._splits)))));
  thumb.className = "";
  thumb.removeAttribute("style");
  tip.ariaLive = "polite";
  text.replaceChildren(make("b", {}, `${panel.title}, ${setting("x")} ${number(x)}`), table);
  tip.hidden = false;
  const box = plot.over.getBoundingClientRect();
  const [left, top] = event ? [event.clientX, event.clientY] : [box.left + plot.cursor.left, box.top + 20];
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${left + 16 + width < innerWidth ? left + 16 : Math.max(left - width - 16, 4)}px`;
  tip.style.top = `${Math.max(Math.min(top + 14, innerHeight - height - 8), 4)}px`;
};

const draw = (figure) => {
  const { board, panel } = figure;
  shown.get(figure)?.plot?.destroy();
  const lines = linesOf(board, panel);
  const place = figure.querySelector(".plot");
  place.replaceChildren();
  const chart = { board, panel, lines, place };
  shown.set(figure, chart);
  figure.dirty = false;
  const longest = Math.max(0, ...lines.map((line) => line.rows.length));
  const last = lines.map((line) => `${line.name} ${number(line.rows.at(-1)[1])}`).join("; ");
  place.ariaLabel = `${panel.title} against ${setting("x")}: ${last || "no values"}`;
  figure.querySelector(".tools").hidden = longest < 2;
  if (longest < 2) { // one point is a number, not a chart
    place.removeAttribute("tabindex");
    place.append(lines.length ? make("table", { className: "numbers" }, ...lines.map(({ name, rows: [[, y]] }) => make("tr", {},
      make("th", { scope: "row" }, make("span", { className: "swatch", "data-swatch": name }), name), make("td", { className: "num" }, number(y)))))
      : make("p", { className: "quiet" }, "No values with these axes."));
    paint();
    return;
  }
  place.tabIndex = 0;
  const tables = [], series = [{}], bands = [];
  for (const { name, slot, band, rows } of lines) {
    const stroke = colourOf(slot);
    const columns = [0, 1, ...(band ? [3, 2] : [])].map((column) => rows.map((row) => row[column]));
    tables.push(columns);
    series.push({ label: name, stroke, dash: dashOf(slot), width: 1.8, spanGaps: true, points: { show: rows.length <= FEW, size: 7, fill: stroke } });
    if (!band) continue;
    bands.push({ series: [series.length, series.length + 1], fill: faded(stroke, 0.18) });
    for (let i = 0; i < 2; i += 1) series.push({ label: name, stroke, width: 0, spanGaps: true, points: { show: false } });
  }
  const axis = { stroke: colour("--quiet"), font: "12px system-ui, sans-serif", grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false } };
  const [logx, logy] = [setting("logx"), setting("logy")];
  const values = (log) => (_, ticks) => (log ? logLabels(ticks) : labelsOf(ticks));
  const splits = (_, __, least, most) => logTicks(least, most);
  chart.plot = new uPlot({
    width: place.clientWidth || 380, height: 230, series, bands,
    scales: {
      x: { time: false, ...(logx && { distr: 3, range: (_, least, most) => (least === null ? [1, 10] : [least, most]) }) },
      y: logy ? { distr: 3, range: (_, least, most) => (least === null ? [1, 10] : logSpanOf(least, most)) }
        : { range: (_, least, most) => (least === null ? [0, 1] : spanOf(least, most)) },
    },
    axes: [
      { ...axis, values: values(logx), size: 34, ...(logx && { splits }) },
      { ...axis, values: values(logy), size: (self, texts) => 14 + 6.6 * Math.max(3, ...(texts ?? []).map((one) => one.length)), ...(logy && { splits }) },
    ],
    legend: { show: false },
    cursor: { y: false, points: { show: false }, sync: { key: `curves-${board.id}` }, drag: { x: true, y: false } },
    hooks: { setCursor: [(plot) => { if (place.matches(":hover, :focus") && chart.plot) say(figure, chart, plot.cursor.event); }] },
  }, uPlot.join(tables), place);
  light();
};
const light = () => {
  const names = new Set([...lit, ...(light.pointed ? [light.pointed] : [])]);
  for (const { plot } of shown.values()) {
    if (!plot) continue;
    const alphas = plot.series.map((one, i) => (i && names.size && !names.has(one.label) ? 0.1 : 1));
    if (plot.series.every((one, i) => (one.alpha ?? 1) === alphas[i])) continue;
    plot.series.forEach((one, i) => { one.alpha = alphas[i]; });
    plot.redraw(false);
  }
};
// Charts are drawn when they come into sight.
const inSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    target.inSight = isIntersecting;
    if (isIntersecting && target.dirty) draw(target);
  }
}, { rootMargin: "200px" });
const stale = () => {
  for (const figure of all("figure.curve")) {
    figure.dirty = true;
    if (figure.inSight) draw(figure);
  }
};
new ResizeObserver(() => {
  for (const { plot, place } of shown.values()) {
    if (plot && place.clientWidth && plot.width !== place.clientWidth) plot.setSize({ width: place.clientWidth, height: 230 });
  }
}).observe(document.getElementById("main"));

const KINDS = { results: "", health: "Health of the features", technical: "Learning rate, gradients, speed, memory and the like" };
const figureOf = (board, panel) => {
  const figure = make("figure", { className: "panel curve" },
    make("figcaption", {}, panel.title, ...(panel.note ? [make("small", {}, panel.note)] : [])),
    make("div", { className: "plot", role: "img", tabIndex: 0 }),
    make("p", { className: "tools" }));
  Object.assign(figure, { board, panel, dirty: true });
  const place = figure.querySelector(".plot");
  place.addEventListener("pointerleave", () => { tip.hidden = true; });
  place.addEventListener("blur", () => { tip.hidden = true; });
  place.addEventListener("keydown", (event) => {
    const { plot } = shown.get(figure) ?? {};
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (!plot || !step) return;
    event.preventDefault();
    const xs = plot.data[0];
    const now = plot.cursor.left >= 0 ? plot.valToIdx(plot.posToVal(plot.cursor.left, "x")) : step > 0 ? -1 : xs.length;
    const next = Math.min(Math.max(now + step, 0), xs.length - 1);
    plot.setCursor({ left: plot.valToPos(xs[next], "x"), top: 20 });
    say(figure, shown.get(figure));
  });
  downloads(figure.querySelector(".tools"), panel.title, () => picture(shown.get(figure)));
  return figure;
};
const downloads = (place, name, svg) => {
  for (const [kind, label] of [["svg", "SVG"], ["png", "PNG"]]) {
    const button = make("button", { type: "button", className: "tool", ariaLabel: `Download ${name} as ${label}` }, label);
    button.addEventListener("click", () => (kind === "svg" ? save(`${name}.svg`, "image/svg+xml", svg()) : raster(svg(), (blob) => save(`${name}.png`, "", blob))));
    place.append(button);
  }
};
const raster = (svg, done) => {
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = make("canvas", { width: 2 * image.width, height: 2 * image.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(done);
  });
  image.src = `data:image/svg+xml,${encodeURIComponent(svg)}`;
};
const layOut = () => { // the figures of each stage, made anew only if there are others
  const stages = document.getElementById("stages");
  if (!stages) return;
  for (const board of data.boards) {
    let stage = all(".stage", stages).find((one) => one.board.id === board.id);
    const plan = JSON.stringify(board.panels);
    if (!stage || stage.plan !== plan) {
      const fresh = make("div", { className: "stage" }, make("h3", {}, board.title), make("ul", { className: "legend", ariaLabel: "Lines of the charts" }), make("p", { className: "quiet rest" }));
      for (const [kind, title] of Object.entries(KINDS)) {
        const figures = board.panels.filter((panel) => panel.kind === kind).map((panel) => figureOf(board, panel));
        if (!figures.length) continue;
        const panels = make("div", { className: "panels" }, ...figures);
        if (kind === "technical") fresh.append(make("details", {}, make("summary", {}, title), panels));
        else fresh.append(...(title ? [make("h4", {}, title)] : []), panels);
        for (const figure of figures) inSight.observe(figure);
      }
      fresh.plan = plan;
      if (stage) {
        for (const figure of all("figure.curve", stage)) { shown.get(figure)?.plot?.destroy(); shown.delete(figure); inSight.unobserve(figure); }
        stage.replaceWith(fresh);
      } else stages.append(fresh);
      stage = fresh;
    }
    stage.board = board;
    for (const figure of all("figure.curve", stage)) {
      figure.board = board;
      // a panel of a method's own loss shows nothing if none of its groups is drawn
      figure.hidden = !drawn(board).some((group) => belongs(group, figure.panel));
    }
    const groups = drawn(board).filter(({ curves }) => Object.keys(curves.values).length);
    stage.hidden = !board.panels.length;
    const legend = stage.querySelector(".legend");
    const focused = legend.contains(document.activeElement) ? document.activeElement.dataset.series : null;
    legend.replaceChildren(...groups.map(({ name, n }) => {
      const button = make("button", { type: "button", ariaPressed: lit.has(name) }, make("span", { className: "swatch", "data-swatch": name, ariaHidden: true }), name,
        ...(n > 1 ? [make("span", { className: "quiet" }, ` n = ${n}`)] : []));
      button.dataset.series = name;
      return make("li", {}, button);
    }));
    if (focused !== null) all("button", legend).find((one) => one.dataset.series === focused)?.focus();
    const rest = chosen(board).length - drawn(board).length;
    stage.querySelector(".rest").textContent = rest > 0 ? `${rest} more rows are not drawn: tick those you want to see, or filter.` : "";
  }
  paint();
  stale();
  for (const place of all(".dots")) dots(place);
  drawSweeps();
};
for (const [event, name] of [["pointerover", true], ["focusin", true], ["pointerout", false], ["focusout", false]]) {
  document.addEventListener(event, ({ target }) => {
    const button = target.closest?.(".legend button[data-series]");
    if (!button) return;
    light.pointed = name ? button.dataset.series : null;
    light();
  });
}
document.addEventListener("click", ({ target }) => {
  const button = target.closest(".legend button[data-series]");
  if (!button) return;
  const { series } = button.dataset;
  if (!lit.delete(series)) lit.add(series);
  for (const same of all(".legend button[data-series]")) same.ariaPressed = lit.has(same.dataset.series);
  light();
});
controls?.addEventListener("input", stale);
controls?.addEventListener("submit", (event) => event.preventDefault());

// -- charts as files ----------------------------------------------------------------------------------------------------------
const escaped = (value) => String(value).replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
const svgText = (x, y, value, more = "") => `<text x="${x}" y="${y}" ${more}>${escaped(value)}</text>`;
const svgFile = (width, height, parts) => `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" `
  + `font-family="system-ui, Helvetica, Arial, sans-serif" font-size="12" fill="${colour("--ink")}"><rect width="100%" height="100%" fill="${colour("--paper")}"/>${parts.join("")}</svg>`;
// uPlot draws on a canvas: this says the same in SVG, at its places, with a title and a legend.
const picture = ({ plot, lines, panel }) => {
  const [left, top, width, height] = ["left", "top", "width", "height"].map((side) => plot.bbox[side] / devicePixelRatio);
  const head = 26, parts = [svgText(left, 18, panel.title, 'font-weight="600"')];
  const at = ([x, , ], y) => `${(left + plot.valToPos(x, "x")).toFixed(1)},${(head + top + plot.valToPos(y, "y")).toFixed(1)}`;
  const [ticksX, ticksY] = plot.axes.map((axis) => axis._splits.map((split, i) => [split, axis._values[i]]).filter(([, label]) => label));
  for (const [split, label] of ticksY) {
    const y = head + top + plot.valToPos(split, "y");
    parts.push(`<line x1="${left}" x2="${left + width}" y1="${y}" y2="${y}" stroke="${colour("--grid")}"/>`, svgText(left - 6, y + 4, label, 'text-anchor="end"'));
  }
  for (const [split, label] of ticksX) parts.push(svgText(left + plot.valToPos(split, "x"), head + top + height + 16, label, 'text-anchor="middle"'));
  parts.push(svgText(left + width, head + top + height + 32, setting("x"), 'text-anchor="end"'));
  parts.push(`<clipPath id="frame"><rect x="${left}" y="${head + top}" width="${width}" height="${height}"/></clipPath><g clip-path="url(#frame)">`);
  for (const { slot, band, rows } of lines) {
    const ink = colourOf(slot);
    const edge = [...rows.map((row) => at(row, row[3])), ...rows.toReversed().map((row) => at(row, row[2]))];
    if (band) parts.push(`<polygon points="${edge.join(" ")}" fill="${ink}" fill-opacity="0.18"/>`);
    parts.push(`<polyline points="${rows.map((row) => at(row, row[1])).join(" ")}" fill="none" stroke="${ink}" stroke-width="1.8" stroke-dasharray="${dashOf(slot).join(" ")}"/>`);
    if (rows.length <= FEW) for (const row of rows) parts.push(`<circle r="3.5" fill="${ink}" ${at(row, row[1]).replace(/(.*),(.*)/, 'cx="$1" cy="$2"')}/>`);
  }
  parts.push("</g>");
  lines.forEach(({ name, slot }, i) => {
    const y = head + top + height + 52 + 18 * i;
    parts.push(`<line x1="${left}" x2="${left + 22}" y1="${y - 4}" y2="${y - 4}" stroke="${colourOf(slot)}" stroke-width="2.5" stroke-dasharray="${dashOf(slot).join(" ")}"/>`, svgText(left + 28, y, name));
  });
  return svgFile(plot.width, head + top + height + 50 + 18 * lines.length, parts);
};
// Results of a stage: a dot for each of the n, and their mean in a bar of ± std.
const dotsOf = (board, width) => {
  const rows = drawn(board).filter(({ values }) => values.length);
  if (rows.length < 2 || !board.metric) return null;
  const every = rows.flatMap(({ values }) => values);
  const [least, most] = [Math.min(...every), Math.max(...every)];
  const pad = (most - least || Math.abs(most) || 1) * 0.06;
  const at = (value) => (8 + (width - 130) * (value - least + pad) / (most - least + 2 * pad)).toFixed(1);
  const letters = Math.floor((width - 20) / 7.2);
  const parts = [];
  rows.forEach(({ name, values, shown: label }, i) => {
    const y = 38 * i, ink = colourOf(slots.get(name));
    const mean = values.reduce((sum, value) => sum + value) / values.length;
    const std = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(values.length - 1, 1));
    const short = name.length > letters ? `${name.slice(0, letters / 3)}…${name.slice(-letters * 2 / 3)}` : name; // names differ at their ends
    parts.push(`<g><title>${escaped(`${name}: ${label}, n = ${values.length}`)}</title>`, svgText(8, y + 13, short),
      `<line x1="8" x2="${width - 122}" y1="${y + 25}" y2="${y + 25}" stroke="${colour("--grid")}"/>`);
    if (values.length > 1) parts.push(`<line x1="${at(Math.max(mean - std, least - pad))}" x2="${at(Math.min(mean + std, most + pad))}" y1="${y + 25}" y2="${y + 25}" stroke="${ink}" stroke-opacity="0.35" stroke-width="7"/>`,
      `<line x1="${at(mean)}" x2="${at(mean)}" y1="${y + 18}" y2="${y + 32}" stroke="${ink}" stroke-width="2.4"/>`);
    for (const value of values) parts.push(`<circle cx="${at(value)}" cy="${y + 25}" r="4" fill="${ink}"/>`);
    parts.push(svgText(width - 112, y + 29, label), "</g>");
  });
  return svgFile(width, 38 * rows.length + 6, parts);
};
const dots = (place) => {
  const board = data.boards.find((one) => one.id === place.dataset.stage);
  const svg = board && dotsOf(board, Math.min(place.clientWidth, 900));
  if (!svg) { place.replaceChildren(); return; }
  const names = drawn(board).filter(({ values }) => values.length).map(({ name, shown: label }) => `${name}: ${label}`);
  const figure = make("figure", { className: "wide" }, make("figcaption", {}, board.metric, make("small", {}, "each dot is one of the n, the bar is mean ± std")));
  figure.insertAdjacentHTML("beforeend", svg); // its texts are escaped
  const drawing = figure.querySelector("svg");
  drawing.setAttribute("role", "img");
  drawing.ariaLabel = `${board.metric} of each sample. ${names.join("; ")}`;
  const tools = make("p", { className: "tools" });
  downloads(tools, `${board.title} ${board.metric}`, () => dotsOf(board, 760));
  figure.append(tools);
  place.replaceChildren(figure);
};

// Reliability: accuracy in each bin of confidence, the gap to the diagonal, and how many images it has.
const reliabilityOf = ({ name, error, bins: [counts, confidences, rights] }, width, titled = false) => {
  const left = 40, head = titled ? 44 : 8, side = width - left - 12, low = 46, height = head + side + low + 44;
  const total = counts.reduce((sum, value) => sum + value), most = Math.max(...counts), step = side / counts.length;
  const x = (value) => left + side * value, y = (value) => head + side * (1 - value);
  const parts = titled ? [svgText(0, 14, name, 'font-weight="600"'), svgText(0, 32, `calibration error ${error} %`)] : [];
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(`<line x1="${left}" x2="${x(1)}" y1="${y(tick)}" y2="${y(tick)}" stroke="${colour("--grid")}"/>`, svgText(left - 6, y(tick) + 4, 100 * tick, 'text-anchor="end"'),
      svgText(x(tick), head + side + low + 20, 100 * tick, 'text-anchor="middle"'));
  }
  counts.forEach((count, i) => {
    if (!count) return;
    const [right, sure] = [rights[i] / count, confidences[i] / count];
    const [top, bottom] = [Math.max(right, sure), Math.min(right, sure)];
    const place = `x="${(x(0) + i * step + 1).toFixed(1)}" width="${(step - 2).toFixed(1)}"`;
    const share = 100 * count / total;
    parts.push(`<g><title>confidence ${(100 * sure).toFixed(1)} %: right ${(100 * right).toFixed(1)} %, ${share.toFixed(1)} % of the images</title>`,
      `<rect ${place} y="${y(right)}" height="${side * right}" fill="${colour("--accent")}" fill-opacity="0.75"/>`,
      `<rect ${place} y="${y(top)}" height="${side * (top - bottom)}" fill="${colour("--wrong")}" fill-opacity="0.28"/>`,
      `<rect ${place} y="${head + side + low - 36 * count / most}" height="${36 * count / most}" fill="${colour("--s2")}"/></g>`);
  });
  parts.push(`<line x1="${x(0)}" y1="${y(0)}" x2="${x(1)}" y2="${y(1)}" stroke="${colour("--ink")}" stroke-dasharray="5 4"/>`,
    svgText(x(1), height - 4, "confidence (%)", 'text-anchor="end"'), svgText(left + 4, head + 12, "accuracy (%)"));
  return svgFile(width, height, parts);
};
const reliability = () => {
  for (const figure of all(".reliability")) {
    const said = { name: figure.dataset.name, error: figure.dataset.error, bins: JSON.parse(figure.dataset.bins) };
    const place = figure.querySelector(".plot"), tools = figure.querySelector(".tools");
    place.innerHTML = reliabilityOf(said, Math.min(place.clientWidth || 340, 380)); // its texts are escaped
    const drawing = place.querySelector("svg");
    drawing.setAttribute("role", "img");
    const [counts, confidences, rights] = said.bins;
    const words = counts.flatMap((count, i) => (count ? [`${(100 * confidences[i] / count).toFixed(0)}: ${(100 * rights[i] / count).toFixed(0)}`] : []));
    drawing.ariaLabel = `Reliability of ${said.name}, calibration error ${said.error} %. Confidence and share that is right, in percent: ${words.join(", ")}`;
    if (!tools.children.length) downloads(tools, `Calibration of ${said.name}`, () => reliabilityOf(said, 380, true));
  }
};

// -- light and dark -----------------------------------------------------------------------------------------------------------
const repaint = () => { stale(); for (const place of all(".dots")) dots(place); drawSweeps(); reliability(); };
document.getElementById("theme").addEventListener("click", () => {
  const { style } = root;
  const dark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  style.colorScheme = dark ? "light" : "dark";
  repaint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

// -- maps ---------------------------------------------------------------------------------------------------------------------
const WHOLE = [-2, -2, 104]; // left, top and side of what a map shows
const zoomable = (map) => {
  let [left, top, side] = WHOLE;
  const show = (x, y, size) => {
    side = Math.min(Math.max(size, WHOLE[2] / 40), WHOLE[2]);
    [left, top] = [x, y].map((one) => Math.min(Math.max(one, WHOLE[0]), WHOLE[0] + WHOLE[2] - side));
    map.setAttribute("viewBox", [left, top, side, side].map((one) => one.toFixed(3)).join(" "));
    map.style.setProperty("--r", `${0.9 * Math.sqrt(side / WHOLE[2])}px`); // points grow, but less than their distances
  };
  const zoom = (factor, share = [0.5, 0.5]) => { // around a point of the window, which stays
    const size = Math.min(Math.max(side * factor, WHOLE[2] / 40), WHOLE[2]);
    show(left + (side - size) * share[0], top + (side - size) * share[1], size);
  };
  const shareOf = ({ clientX, clientY }) => {
    const box = map.getBoundingClientRect();
    return [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
  };
  map.addEventListener("dblclick", (event) => { event.preventDefault(); zoom(event.shiftKey ? 2 : 0.5, shareOf(event)); });
  map.addEventListener("wheel", (event) => { // without Ctrl, the page scrolls
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(1.0015 ** event.deltaY, shareOf(event));
  }, { passive: false });
  map.addEventListener("pointermove", (event) => {
    if (!(event.buttons & 1) || side === WHOLE[2]) return;
    map.classList.add("moving");
    const { width } = map.getBoundingClientRect();
    show(left - event.movementX * side / width, top - event.movementY * side / width, side);
  });
  for (const end of ["pointerup", "pointerleave"]) map.addEventListener(end, () => map.classList.remove("moving"));
  const tools = map.parentNode.querySelector(".zoom"), name = map.ariaLabel;
  for (const [label, words, act] of [["+", "Zoom into", () => zoom(0.5)], ["−", "Zoom out of", () => zoom(2)], ["all", "Show all of", () => show(...WHOLE)]]) {
    const button = make("button", { type: "button", className: "tool", ariaLabel: `${words} the ${name}` }, label);
    button.addEventListener("click", act);
    tools.append(button);
  }
  pictures(map, tools, name);
  downloads(tools, name, () => mapOf(map));
};
// All images in place of points: parts of the sheet that tips show, in a frame of the class's colour.
const urlOf = (map) => {
  const place = make("span", { className: `sheet${map.dataset.sheet}`, hidden: true });
  document.body.append(place);
  const url = getComputedStyle(place).backgroundImage.slice(5, -2);
  place.remove();
  return url;
};
const sheetOf = (map, id) => { // every part that is drawn refers to it
  const { columns, thumb: size } = map.dataset, count = all("circle", map).length;
  return `<defs><image id="${id}" href="${urlOf(map)}" width="${columns * size}" height="${Math.ceil(count / columns) * size}"/></defs>`;
};
const picturesOf = (map, id) => { // circle -> its picture
  const { columns, thumb } = map.dataset, size = Number(thumb), framed = map.querySelectorAll("g").length > 1;
  const side = Math.min(8, Math.max(2.2, 65 / Math.sqrt(all("circle", map).length)));
  return (circle) => {
    const place = Number(circle.dataset.place), [left, top] = [(place % columns) * size, Math.floor(place / columns) * size];
    const [x, y] = ["cx", "cy"].map((key) => (circle.getAttribute(key) - side / 2).toFixed(2));
    const frame = framed ? `<rect x="${left + 1.5}" y="${top + 1.5}" width="${size - 3}" height="${size - 3}" fill="none"/>` : "";
    return `<svg class="picture" x="${x}" y="${y}" width="${side.toFixed(2)}" height="${side.toFixed(2)}" viewBox="${left} ${top} ${size} ${size}"><use href="#${id}"/>${frame}</svg>`;
  };
};
const pictures = (map, tools, name) => {
  const id = `pictures-${all(".map").indexOf(map)}`;
  const button = make("button", { type: "button", className: "tool", ariaLabel: `Show pictures on the ${name}` }, "pictures");
  const turn = () => {
    if (!map.querySelector(".picture")) {
      const pictureOf = picturesOf(map, id);
      for (const circle of all("circle", map)) circle.insertAdjacentHTML("beforebegin", pictureOf(circle));
      map.insertAdjacentHTML("afterbegin", sheetOf(map, id));
    }
    button.ariaPressed = map.classList.toggle("pictures");
  };
  button.ariaPressed = false;
  button.addEventListener("click", turn);
  tools.append(button);
  if (map.querySelectorAll("g").length === 1) new IntersectionObserver(([{ isIntersecting }], watch) => { // without classes, points say nothing
    if (isIntersecting) { watch.disconnect(); turn(); }
  }).observe(map);
};
const mapOf = (map) => { // as it is seen, in colours that any program knows
  const context = make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const plain = (css) => {
    context.fillStyle = css;
    context.fillRect(0, 0, 1, 1);
    return `rgb(${[...context.getImageData(0, 0, 1, 1).data].slice(0, 3).join(", ")})`;
  };
  const radius = getComputedStyle(map.querySelector("circle")).r.replace("px", ""), shows = map.classList.contains("pictures");
  const pictureOf = picturesOf(map, "sheet");
  const part = (one) => (shows ? pictureOf(one) : `<circle cx="${one.getAttribute("cx")}" cy="${one.getAttribute("cy")}" r="${radius}"/>`);
  const parts = all("g", map).map((group) => {
    const css = plain(getComputedStyle(group).fill);
    return `<g ${shows ? `stroke="${css}" stroke-width="3"` : `fill="${css}" fill-opacity="0.8"`}>${all("circle", group).map(part).join("")}</g>`;
  });
  if (shows) parts.unshift(sheetOf(map, "sheet"));
  const key = all("li", map.parentNode).map((one, i) => svgText(8 + 110 * (i % 7), 784 + 18 * Math.floor(i / 7), one.textContent, `fill="${plain(getComputedStyle(one.querySelector(".dot")).backgroundColor)}"`));
  return svgFile(760, 770 + 18 * Math.ceil(key.length / 7), [`<svg x="0" y="0" width="760" height="760" viewBox="${map.getAttribute("viewBox")}">${parts.join("")}</svg>`, ...key]);
};
// On maps, a point that is pointed at shows its picture, and the others of its class stand out.
for (const map of document.querySelectorAll(".map")) {
  const { sheet, columns, thumb: size } = map.dataset;
  const clear = () => {
    tip.hidden = true;
    map.classList.remove("focus");
    for (const one of map.querySelectorAll(".own")) one.classList.remove("own");
  };
  const points = all("circle", map).sort((a, b) => a.getAttribute("cx") - b.getAttribute("cx"));
  const show = (point, left, top) => {
    clear();
    const place = Number(point.dataset.place);
    thumb.className = `thumb sheet${sheet}`;
    thumb.style.cssText = `width:${size}px; height:${size}px; zoom:2; background-position:-${(place % columns) * size}px -${Math.floor(place / columns) * size}px`;
    text.textContent = point.dataset.name;
    tip.ariaLive = "polite";
    tip.hidden = false;
    tip.style.left = `${Math.min(left + 14, innerWidth - 130)}px`;
    tip.style.top = `${Math.min(top + 14, innerHeight - 140)}px`;
    for (const one of [point, point.parentNode]) one.classList.add("own");
    map.classList.add("focus");
  };
  map.addEventListener("pointerover", ({ target, clientX, clientY }) => {
    const point = target.tagName === "circle" ? target : target.closest(".picture")?.nextElementSibling;
    if (point) show(point, clientX, clientY);
    else clear();
  });
  for (const event of ["pointerleave", "blur"]) map.addEventListener(event, clear);
  map.addEventListener("keydown", (event) => { // from left to right
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = points.findIndex((one) => one.classList.contains("own"));
    const next = points[Math.min(Math.max(now + step, 0), points.length - 1)], { right, bottom } = next.getBoundingClientRect();
    show(next, right, bottom);
  });
  zoomable(map);
}

addTools(document);
poolings();
choose();
reliability();

// -- live: stage=board answers what has changed since a version ---------------------------------------------------------------
const POLL = 2000; // milliseconds
const renew = (name, html) => { // a section as it is now, with its focus and its scrolling
  const place = document.getElementById(name);
  const able = () => all("button, input, [tabindex]", place);
  const focused = able().indexOf(document.activeElement);
  const scrolled = all(".scroll", place).map((one) => [one.scrollLeft, one.scrollTop]);
  const open = all("details[open]", place).map(({ id }) => id);
  const typed = document.createRange().createContextualFragment(html);
  place.replaceChildren(typed);
  for (const one of all("details", place)) one.open = open.includes(one.id);
  addTools(place);
  all(".scroll", place).forEach((one, i) => { [one.scrollLeft, one.scrollTop] = scrolled[i] ?? [0, 0]; });
  if (explain.of && !explain.of.isConnected) { tip.hidden = true; explain.of = null; } // what it was about is gone
  if (focused >= 0) able()[focused]?.focus({ preventScroll: true });
};
const merge = (news) => {
  const every = ({ boards }) => boards.flatMap((board) => [board, ...board.by].flatMap(({ key, groups }) => groups.map((one) => [[board.id, key, one.name].join("\n"), one])));
  const before = new Map(every(data).map(([name, one]) => [name, one.curves]));
  for (const [name, one] of every(news)) one.curves ??= before.get(name);
  Object.assign(data, { boards: news.boards, version: news.version });
  poolings();
  for (const [name, html] of Object.entries(news.sections)) renew(name, html);
  choose();
};
const follow = async () => {
  const pulse = document.getElementById("pulse");
  try {
    const query = new URLSearchParams(location.search);
    query.set("since", data.version);
    const answer = await fetch(`news?${query}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const news = await answer.json();
    if (news.version !== data.version) merge(news);
    if (pulse.dataset.lost) { pulse.textContent = "Live: updates while runs go on."; delete pulse.dataset.lost; }
  } catch (error) {
    pulse.dataset.lost = error; // the board was stopped, perhaps; it may come back
    pulse.textContent = "The board doesn't answer any more: this is its last state.";
  }
  setTimeout(follow, document.hidden ? 10 * POLL : POLL);
};
if ("live" in root.dataset) setTimeout(follow, POLL);
