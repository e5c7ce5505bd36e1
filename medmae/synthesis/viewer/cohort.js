"use strict";
// Sorting, filters and means of the cohort's table. Without it the table is all there, as it was written.
const $ = id => document.getElementById(id);
const body = $("rows").tBodies[0], rows = [...body.rows];
const heads = [...$("rows").tHead.rows[0].cells];
const valueOf = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;

function sort(column) {
  const head = heads[column], up = head.getAttribute("aria-sort") !== "ascending";
  const numeric = head.dataset.kind === "number";
  heads.forEach(other => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last, either way
    return (up ? 1 : -1) * (numeric ? x - y : x.localeCompare(y, undefined, {numeric: true}));
  };
  rows.sort(order);
  body.append(...rows);
}

function filter() {
  const wanted = $("find").value.trim().toLowerCase();
  for (const row of rows) {
    const fits = !["target", "inputs"].some(key => $(key).value && row.dataset[key] !== $(key).value);
    row.hidden = !(fits && (!wanted || row.textContent.toLowerCase().includes(wanted)));
  }
  const left = rows.filter(row => !row.hidden);
  $("count").textContent = `${left.length} of ${rows.length} rows`;
  const line = document.createElement("tr");
  heads.forEach((head, column) => {
    const cell = line.appendChild(document.createElement(column ? "td" : "th"));
    if (!column) cell.textContent = "mean \u00b1 sd of these rows";
    if (head.dataset.kind !== "number") return;
    cell.className = "number";
    const values = left.map(row => valueOf(row, column)).filter(v => v !== "").map(Number);
    if (!values.length) return;
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const sd = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
    const digits = Number(head.dataset.digits);
    cell.textContent = `${mean.toFixed(digits)} \u00b1 ${sd.toFixed(digits)}`;
  });
  $("means").replaceChildren(line);
}

heads.forEach((head, column) => {
  if (!head.hasAttribute("aria-sort")) return;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  button.addEventListener("click", () => sort(column));
  head.replaceChildren(button);
});
for (const key of ["target", "inputs"]) {
  for (const value of [...new Set(rows.map(row => row.dataset[key]))]) {
    $(key).add(new Option(value.toUpperCase().replaceAll("+", " + "), value));
  }
  $(key).addEventListener("input", filter);
}
$("find").addEventListener("input", filter);
document.querySelector(".needs-script").hidden = false;
filter();
