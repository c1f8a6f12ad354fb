"use strict";
// Filters, sorting and keyboard control of the gallery. Without scripts the cards stay, most uncertain first.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const gallery = document.querySelector("main");
  const control = (id) => document.getElementById(id);
  const cards = facts.map((fact) => ({ ...fact, lower: fact.id.toLowerCase(), element: control(`card-${fact.index}`) }));
  const filters = ["by-id", "by-class", "least", "most", "only-missing", "sort", "view"].map(control);
  const orders = {
    uncertainty: (a, b) => b.uncertainty - a.uncertainty || a.index - b.index,
    id: (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : a.index - b.index),
    confidence: (a, b) => a.confidence - b.confidence || a.index - b.index,
  };
  let sorted = "uncertainty";

  const number = (id, otherwise) => (control(id).value === "" ? otherwise : control(id).valueAsNumber);
  const visible = () => [...gallery.children].filter((element) => !element.hidden);

  function apply() {
    const part = control("by-id").value.toLowerCase();
    const name = control("by-class").value;
    // Uncertainty is shown with two decimals; a typed limit includes what rounds to it.
    const least = number("least", 0) - 0.005;
    const most = number("most", 1) + 0.005;
    const missing = control("only-missing").checked;
    let shown = 0;
    for (const card of cards) {
      const fits =
        card.lower.includes(part) &&
        (name === "" || card.classes.includes(name) || card.missing.includes(name)) &&
        card.uncertainty >= least && card.uncertainty <= most &&
        (!missing || card.missing.length > 0);
      card.element.hidden = !fits;
      shown += fits;
    }
    if (control("sort").value !== sorted) {
      sorted = control("sort").value;
      gallery.append(...[...cards].sort(orders[sorted]).map((card) => card.element));
    }
    document.body.className = control("view").value;
    control("shown").value = `${shown} of ${cards.length} shown`;
    document.querySelector(".none").hidden = shown > 0;
  }

  function neighbour(key) {
    const elements = visible();
    const at = elements.indexOf(document.activeElement.closest("article"));
    if (at < 0) return elements[0];
    const here = elements[at];
    if (key === "ArrowRight") return elements[at + 1];
    if (key === "ArrowLeft") return elements[at - 1];
    // The horizontally nearest card of the next row.
    const rows = elements.filter((element) =>
      key === "ArrowDown" ? element.offsetTop > here.offsetTop : element.offsetTop < here.offsetTop);
    const tops = rows.map((element) => element.offsetTop);
    const top = key === "ArrowDown" ? Math.min(...tops) : Math.max(...tops);
    const aside = (element) => Math.abs(element.offsetLeft - here.offsetLeft);
    return rows.filter((element) => element.offsetTop === top).sort((a, b) => aside(a) - aside(b))[0];
  }

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, button, summary");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    if (event.key.startsWith("Arrow")) {
      const next = neighbour(event.key);
      if (!next) return;
      next.focus();
      next.scrollIntoView({ block: "nearest" });
    } else if (event.key === "o") {
      control("view").value = control("view").value === "masks" ? "photos" : "masks";
      apply();
      document.activeElement.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" && event.target.matches("article")) {
      event.target.querySelector(".overlay").click();
    } else if (event.key === "/") {
      control("by-id").focus();
    } else {
      return;
    }
    event.preventDefault();
  }

  for (const filter of filters) filter.addEventListener("input", apply);
  control("reset").addEventListener("click", () => {
    for (const filter of filters) {
      if (filter.type === "checkbox") filter.checked = filter.defaultChecked;
      else if (filter.options) filter.selectedIndex = 0;
      else filter.value = filter.defaultValue;
    }
    apply();
  });
  document.addEventListener("keydown", press);
  document.querySelector(".tools").hidden = false;
  apply();
})();
