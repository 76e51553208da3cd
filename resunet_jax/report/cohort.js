"use strict";
// A click on a header sorts by it, a second one the other way round; what is not defined stays last.
(() => {
  const table = document.getElementById("scans"), body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const names = new Intl.Collator(undefined, { numeric: true });

  function sort(column, sign) {
    const value = (row) => {
      const cell = row.cells[column];
      return column ? ("value" in cell.dataset ? Number(cell.dataset.value) : null) : cell.textContent;
    };
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (column ? x - y : names.compare(x, y));
    };
    body.append(...[...body.rows].sort(compare));
  }

  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const first = column ? "descending" : "ascending", second = column ? "ascending" : "descending";
      const order = header.getAttribute("aria-sort") === first ? second : first;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      sort(column, order === "ascending" ? 1 : -1);
    });
  });
})();
