"use strict";
// A layer's page: its filters as the URL says, in pages, and the ways to move among them.
((featvis) => {
  const { at, here, make, say, own, falling, listed, wanted } = featvis;
  const PAGE = 500;
  const file = (page) => (page === 1 ? "index.html" : `page-${page}.html`);

  function showTools() {
    const { sort, dead, q = "" } = featvis.state;
    at("sort").value = ["score", "converged"].includes(sort) ? sort : "number";
    at("order").textContent = falling() ? "↓" : "↑";
    at("order").setAttribute("aria-label", `Order: ${falling() ? "falling" : "rising"}`);
    at("dead").checked = dead !== "hide";
    if (document.activeElement !== at("q")) at("q").value = q;
  }

  function showPager(page, pages) {
    const place = (i) => {
      if (i === page) return make("b", { "aria-current": "page" }, String(i));
      return make("a", { href: file(i), "data-keep": "q" }, String(i));
    };
    at("pager").replaceChildren(...(pages < 2 ? [] : Array.from({ length: pages }, (_, i) => place(i + 1))));
  }

  function told(test, found, hidden) {
    const { q } = featvis.state;
    if (test === undefined) return `“${q}” is no number; write 3, or 10-20`;
    if (test) return found ? `${found} found` : `No filter ${q} here`;
    return hidden ? `${hidden} dead hidden` : "";
  }

  let shown = null; // what is in the grid: its numbers, and whether it tells of steps

  function show() {
    const layer = own();
    if (!layer) return;
    const { state } = featvis;
    showTools();
    const test = wanted(state.q);
    const all = listed();
    const found = test ? all.filter((f) => test(f[0])) : test === undefined ? [] : all;
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    let page = Number(here().number);
    if (state.f !== undefined) {
      const index = found.findIndex((f) => f[0] === Number(state.f));
      const target = Math.floor(index / PAGE) + 1;
      if (index >= 0 && target !== page) {
        location.replace(file(target) + featvis.write(state));
        return;
      }
    }
    if (page > pages) page = state.q ? 1 : pages; // what is sought is found on any page
    const slice = found.slice((page - 1) * PAGE, page * PAGE);
    const key = JSON.stringify([slice.map((f) => f[0]), state.sort === "converged"]);
    const before = shown ?? JSON.stringify([[...at("grid").children].map((li) => Number(li.dataset.n)), false]);
    if (key !== before) at("grid").replaceChildren(...slice.map(featvis.thumb));
    shown = key;
    showPager(page, pages);
    say(told(test, found.length, layer.filters.length - all.length));
    roving();
    if (state.f !== undefined) arrive(Number(state.f));
  }

  // One comes from a filter's page.
  function arrive(n) {
    const chosen = at("grid").querySelector(`[data-n="${n}"] a`);
    delete featvis.state.f;
    featvis.replace();
    if (!chosen) return;
    focus(chosen);
    chosen.scrollIntoView({ block: "center" });
  }

  // --- one thumbnail is reached by Tab, the others by the arrows ----------------------------------------------------

  const anchorsHere = () => [...at("grid").querySelectorAll("a")];

  function roving() {
    const anchors = anchorsHere();
    const chosen = anchors.find((a) => a === document.activeElement) ||
      anchors.find((a) => a.tabIndex === 0 && a.hasAttribute("tabindex")) || anchors[0];
    for (const anchor of anchors) {
      anchor.tabIndex = anchor === chosen ? 0 : -1;
      anchor.parentElement.querySelector(".pin").tabIndex = -1;
    }
    if (chosen) chosen.parentElement.querySelector(".pin").tabIndex = 0;
  }

  function focus(anchor) {
    anchor.focus();
    roving();
  }

  // Whether the key is spent: at an end of the grid, up and down scroll on.
  function move(key) {
    const anchors = anchorsHere();
    if (!anchors.length) return false;
    const now = anchors.findIndex((a) => a.parentElement.contains(document.activeElement));
    if (now < 0) {
      focus(anchors[0]);
      return true;
    }
    const top = anchors[0].getBoundingClientRect().top;
    const columns = anchors.findIndex((a) => a.getBoundingClientRect().top > top + 4);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    if (columns < 0 && (key === "ArrowUp" || key === "ArrowDown")) return false;
    const next = anchors[now + step];
    if (!next) return key === "ArrowLeft" || key === "ArrowRight";
    focus(next);
    return true;
  }

  // --- what happens here --------------------------------------------------------------------------------------------

  function key(event) {
    if (event.key === "p") {
      const item = document.activeElement.closest("#grid li");
      if (item) featvis.pin(`${here().folder}:${item.dataset.n}`);
      return Boolean(item);
    }
    if (event.shiftKey && event.key === "ArrowLeft") featvis.go(at("layer-before"));
    else if (event.shiftKey && event.key === "ArrowRight") featvis.go(at("layer-after"));
    else return !event.shiftKey && event.key.startsWith("Arrow") && move(event.key);
    return true;
  }

  function click(button) {
    if (button.id === "order") featvis.set({ order: falling() ? "rising" : "falling" });
  }

  function start() {
    const [sort, dead] = [at("sort"), at("dead")];
    sort.addEventListener("change", () => featvis.set({ sort: sort.value === "number" ? "" : sort.value, order: "" }));
    dead.addEventListener("change", () => featvis.set({ dead: dead.checked ? "" : "hide" }));
    at("grid").addEventListener("focusin", roving);
  }

  function search(text) {
    if (featvis.open(text).length > 1) move("ArrowDown");
  }

  featvis.page = { show, start, search, key, click };
})(window.featvis);
