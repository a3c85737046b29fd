"use strict";
// Layer page: a grid of its filters as the URL says, the pager, and keyboard navigation.
((featvis) => {
  const { byId, pageData, createElement, setStatus, ownLayer, isDescending, listedFilters, parseSearch } = featvis;
  const PAGE = 500;
  const file = (page) => (page === 1 ? "index.html" : `page-${page}.html`);

  function showTools() {
    const { sort, dead, q = "" } = featvis.state;
    byId("sort").value = ["score", "converged"].includes(sort) || featvis.sortColumn() ? sort : "number";
    byId("order").textContent = isDescending() ? "↓" : "↑";
    byId("order").setAttribute("aria-label", `Order: ${isDescending() ? "descending" : "ascending"}`);
    byId("dead").checked = dead !== "hide";
    if (document.activeElement !== byId("q")) byId("q").value = q;
  }

  function showPager(page, pages) {
    const pageLink = (i) => {
      if (i === page) return createElement("b", { "aria-current": "page" }, String(i));
      return createElement("a", { href: file(i), "data-keep": "q" }, String(i));
    };
    byId("pager").replaceChildren(...(pages < 2 ? [] : Array.from({ length: pages }, (_, i) => pageLink(i + 1))));
  }

  function statusText(test, count, hidden) {
    const { q } = featvis.state;
    if (test === undefined) return `“${q}” is not a filter number or range; try 3 or 10-20`;
    if (test) return count ? `${count} found` : `No filter matches ${q}`;
    return hidden ? `${hidden} flat or dead filter${hidden === 1 ? "" : "s"} hidden` : "";
  }

  // Contents of the grid as JSON: filter numbers, and the value that is displayed instead of the score, if one is.
  let renderedKey = null;

  function show() {
    const layer = ownLayer();
    if (!layer) return;
    const { state } = featvis;
    showTools();
    const test = parseSearch(state.q);
    const visible = listedFilters();
    const matches = test ? visible.filter(test) : test === undefined ? [] : visible;
    const pages = Math.max(1, Math.ceil(matches.length / PAGE));
    let page = Number(pageData().number);
    if (state.f !== undefined) {
      const index = matches.findIndex((f) => f[0] === Number(state.f));
      const target = Math.floor(index / PAGE) + 1;
      if (index >= 0 && target !== page) {
        location.replace(file(target) + featvis.toHash(state));
        return;
      }
    }
    if (page > pages) page = state.q ? 1 : pages; // fewer pages than in the HTML: a search starts on the first page
    const slice = matches.slice((page - 1) * PAGE, page * PAGE);
    const shown = state.sort === "converged" || featvis.sortColumn() ? state.sort : "";
    const key = JSON.stringify([slice.map((f) => f[0]), shown]);
    const numbersInHtml = () => [...byId("grid").children].map((li) => Number(li.dataset.n));
    const currentKey = renderedKey ?? JSON.stringify([numbersInHtml(), ""]);
    if (key !== currentKey) byId("grid").replaceChildren(...slice.map(featvis.thumb));
    renderedKey = key;
    showPager(page, pages);
    setStatus(statusText(test, matches.length, layer.filters.length - visible.length));
    updateTabStops();
    if (state.f !== undefined) focusFilter(Number(state.f));
  }

  // Focus the filter whose page the visitor comes from, and remove it from the URL.
  function focusFilter(n) {
    const chosen = byId("grid").querySelector(`[data-n="${n}"] a`);
    delete featvis.state.f;
    featvis.replaceAddress();
    if (!chosen) return;
    focusLink(chosen);
    chosen.scrollIntoView({ block: "center" });
  }

  // --- keyboard: Tab reaches one thumbnail (roving tabindex), the arrow keys reach the others ------------------------

  const gridLinks = () => [...byId("grid").querySelectorAll("a")];

  function updateTabStops() {
    const anchors = gridLinks();
    const chosen = anchors.find((a) => a === document.activeElement) ||
      anchors.find((a) => a.tabIndex === 0 && a.hasAttribute("tabindex")) || anchors[0];
    for (const anchor of anchors) {
      anchor.tabIndex = anchor === chosen ? 0 : -1;
      anchor.parentElement.querySelector(".pin").tabIndex = -1;
    }
    if (chosen) chosen.parentElement.querySelector(".pin").tabIndex = 0;
  }

  function focusLink(anchor) {
    anchor.focus();
    updateTabStops();
  }

  // Move the focus and return whether the key was handled. Above the first and below the last row, the up and down keys
  // scroll the page instead.
  function move(key) {
    const anchors = gridLinks();
    if (!anchors.length) return false;
    const current = anchors.findIndex((a) => a.parentElement.contains(document.activeElement));
    if (current < 0) {
      focusLink(anchors[0]);
      return true;
    }
    const top = anchors[0].getBoundingClientRect().top;
    const columns = anchors.findIndex((a) => a.getBoundingClientRect().top > top + 4);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    if (columns < 0 && (key === "ArrowUp" || key === "ArrowDown")) return false;
    const next = anchors[current + step];
    if (!next) return key === "ArrowLeft" || key === "ArrowRight";
    focusLink(next);
    return true;
  }

  // --- event handlers ------------------------------------------------------------------------------------------------

  function key(event) {
    if (event.key === "p") {
      const item = document.activeElement.closest("#grid li");
      if (item) featvis.pin(`${pageData().folder}:${item.dataset.n}`);
      return Boolean(item);
    }
    if (event.shiftKey && event.key === "ArrowLeft") featvis.follow(byId("layer-before"));
    else if (event.shiftKey && event.key === "ArrowRight") featvis.follow(byId("layer-after"));
    else return !event.shiftKey && event.key.startsWith("Arrow") && move(event.key);
    return true;
  }

  function click(button) {
    if (button.id === "order") featvis.setState({ order: isDescending() ? "rising" : "falling" });
  }

  function start() {
    const [sort, dead] = [byId("sort"), byId("dead")];
    const columns = ownLayer() ? featvis.columnsOf(ownLayer()) : [];
    for (const { name } of columns) sort.append(createElement("option", { value: featvis.COLUMN + name }, name));
    sort.addEventListener("change", () => {
      featvis.setState({ sort: sort.value === "number" ? "" : sort.value, order: "" });
    });
    dead.addEventListener("change", () => featvis.setState({ dead: dead.checked ? "" : "hide" }));
    byId("grid").addEventListener("focusin", updateTabStops);
  }

  function search(text) {
    if (featvis.openIfSingle(text).length > 1) move("ArrowDown");
  }

  featvis.page = { show, start, search, key, click };
})(window.featvis);
