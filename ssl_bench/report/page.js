"use strict";

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement.style;
  const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
});

// Tables are sorted by data-order, or by the text of a cell: numbers as numbers, the rest as words. Empty cells come last.
const order = (cell) => cell.dataset.order ?? cell.textContent.trim();
const compare = (a, b) => {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = head.classList.contains("num") ? "descending" : "ascending"; // the best is on top
    const other = first === "ascending" ? "descending" : "ascending";
    const now = head.ariaSort === first ? other : first;
    heads.forEach((one) => { one.ariaSort = one === head ? now : "none"; });
    const rows = [...table.tBodies[0].rows];
    const value = new Map(rows.map((row) => [row, order(row.cells[column])]));
    const sign = now === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [value.get(a), value.get(b)];
      return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
    });
    table.tBodies[0].append(...rows);
  }));
}

// In charts all lines are dimmed but the one that is pointed at in a legend, and those that were clicked there.
const kept = new Set();
const light = (wanted) => {
  for (const line of document.querySelectorAll(".series")) {
    line.classList.toggle("dim", wanted.size > 0 && !wanted.has(line.dataset.series));
  }
};
for (const button of document.querySelectorAll(".legend button")) {
  const { series } = button.dataset;
  for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => light(new Set([...kept, series])));
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => light(kept));
  button.addEventListener("click", () => {
    if (!kept.delete(series)) kept.add(series);
    for (const same of document.querySelectorAll(`.legend button[data-series="${series}"]`)) same.ariaPressed = kept.has(series);
    light(kept);
  });
}

// On maps, a point that is pointed at shows its picture, and the others of its class stand out.
const tip = document.getElementById("tip");
const [thumb, text] = tip.children;
for (const map of document.querySelectorAll(".map")) {
  const { sheet, columns, thumb: size } = map.dataset;
  const clear = () => {
    tip.hidden = true;
    map.classList.remove("focus");
    for (const one of map.querySelectorAll(".own")) one.classList.remove("own");
  };
  map.addEventListener("pointerover", (event) => {
    clear();
    const point = event.target;
    if (point.tagName !== "circle") return;
    const place = Number(point.dataset.place);
    thumb.className = `thumb sheet${sheet}`;
    thumb.style.cssText = `width:${size}px; height:${size}px; zoom:2; background-position:-${(place % columns) * size}px -${Math.floor(place / columns) * size}px`;
    text.textContent = point.dataset.name;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 130)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - 140)}px`;
    for (const one of [point, point.parentNode]) one.classList.add("own");
    map.classList.add("focus");
  });
  map.addEventListener("pointerleave", clear);
}
