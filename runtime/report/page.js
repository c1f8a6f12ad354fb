"use strict";
// Filters, sorting, keyboard control and decisions of the gallery. Without scripts the cards stay, most uncertain first.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const gallery = document.querySelector("main");
  const control = (id) => document.getElementById(id);
  const cards = facts.map((fact) => ({ ...fact, lower: fact.id.toLowerCase(), element: control(`card-${fact.index}`) }));
  const filters = ["by-id", "by-class", "least", "most", "only-missing", "by-decision", "sort", "view"].map(control);
  const orders = {
    uncertainty: (a, b) => b.uncertainty - a.uncertainty || a.index - b.index,
    id: (a, b) => (a.id < b.id ? -1 : a.id > b.id ? 1 : a.index - b.index),
    confidence: (a, b) => a.confidence - b.confidence || a.index - b.index,
  };
  let sorted = "uncertainty";

  // Decisions by image id, kept in this browser under the key of the run. A page without a key takes none.
  const run = gallery.dataset.run;
  const slot = `multisa-decisions:${run}`;
  const decisions = { a: "accept", r: "reject", l: "later" };
  let decided = new Map();

  function load() {
    try {
      const kept = Object.entries(JSON.parse(localStorage.getItem(slot) ?? "{}"));
      decided = new Map(kept.filter(([, decision]) => Object.values(decisions).includes(decision)));
    } catch {
      control("unkept").hidden = false; // no storage, or damaged: what was decided on this page stays
    }
  }

  function decide(card, decision) {
    load(); // another tab may have decided since
    if (decided.get(card.id) === decision) decided.delete(card.id);
    else decided.set(card.id, decision);
    try {
      localStorage.setItem(slot, JSON.stringify(Object.fromEntries(decided)));
      control("unkept").hidden = true;
    } catch {
      control("unkept").hidden = false;
    }
    const after = neighbour("ArrowRight") ?? neighbour("ArrowLeft");
    showDecisions();
    if (card.element.hidden && after) after.focus();
  }

  function showDecisions() {
    for (const card of cards) {
      card.element.dataset.decision = decided.get(card.id) ?? "undecided";
      for (const button of card.element.querySelectorAll(".decide button"))
        button.setAttribute("aria-pressed", button.value === card.element.dataset.decision);
    }
    const count = (decision) => [...decided.values()].filter((one) => one === decision).length;
    control("decided").value = `${count("accept")} accepted, ${count("reject")} rejected, ${count("later")} later`;
    apply();
  }

  function exportDecisions() {
    load();
    const value = { format: "multisa decisions 1", run, decisions: Object.fromEntries(decided) };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1), "\n"], { type: "application/json" }));
    link.download = "decisions.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  function addDecisions() {
    for (const card of cards) {
      const group = document.createElement("p");
      group.className = "decide";
      for (const [key, decision] of Object.entries(decisions)) {
        const button = Object.assign(document.createElement("button"), { type: "button", value: decision, tabIndex: -1 });
        button.textContent = decision;
        button.title = `${decision} (${key})`;
        button.addEventListener("click", () => decide(card, decision));
        group.append(button);
      }
      card.element.append(group);
    }
    for (const element of document.querySelectorAll(".decisions")) element.hidden = false;
    control("export").addEventListener("click", exportDecisions);
    addEventListener("storage", (event) => { if (event.key === slot) { load(); showDecisions(); } });
    load();
    showDecisions();
  }

  const number = (id, otherwise) => (control(id).value === "" ? otherwise : control(id).valueAsNumber);
  const visible = () => [...gallery.children].filter((element) => !element.hidden);

  function apply() {
    const part = control("by-id").value.toLowerCase();
    const name = control("by-class").value;
    // Uncertainty is shown with two decimals; a typed limit includes what rounds to it.
    const least = number("least", 0) - 0.005;
    const most = number("most", 1) + 0.005;
    const missing = control("only-missing").checked;
    const decision = control("by-decision").value;
    let shown = 0;
    for (const card of cards) {
      const fits =
        card.lower.includes(part) &&
        (name === "" || card.classes.includes(name) || card.missing.includes(name)) &&
        card.uncertainty >= least && card.uncertainty <= most &&
        (!missing || card.missing.length > 0) &&
        (decision === "" || card.element.dataset.decision === decision);
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
    const typing = event.target.closest("input, select, .tools button, summary");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    if (event.key.startsWith("Arrow")) {
      const next = neighbour(event.key);
      if (!next) return;
      next.focus();
      next.scrollIntoView({ block: "nearest" });
    } else if (run && event.key in decisions) {
      const focused = document.activeElement.closest("article");
      const card = cards.find(({ element }) => element === focused);
      if (card && !event.repeat) decide(card, decisions[event.key]);
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
  if (run) addDecisions();
  apply();
})();
