"use strict";
// Filter page: links to the previous and next filter in the URL's sort order and to related members of a family, the
// user's own columns, snapshot slider, copy buttons.
((featvis) => {
  const { byId, pageData, createElement, follow, listedFilters, ownLayer, nameOf } = featvis;

  // --- what depends on the other filters, or on the user's own file, is in scripts, so that the page need not change --

  // A link with a thumbnail to a filter of the same layer, captioned with its number, a value and its name.
  function relatedItem(filter, value) {
    const [n, name] = [filter[0], nameOf(filter)];
    const [width, height] = ownLayer().thumb;
    const alt = `Filter ${n}${name && ", " + name}${value && ", cosine " + value}`;
    const image = createElement("img", { src: `thumbs/${n}.webp`, width, height, loading: "lazy", decoding: "async", alt });
    const label = createElement("span", { "aria-hidden": "true" }, createElement("b", {}, String(n)), " ",
      createElement("i", {}, value));
    const anchor = createElement("a", { href: `${n}.html`, ...(name ? { title: name } : {}) }, image, label);
    if (name) anchor.append(createElement("span", { class: "name", "aria-hidden": "true" }, name));
    return createElement("li", { "data-n": n }, anchor);
  }

  function fill(id, items) {
    const section = byId(id);
    if (!section || !items.length) return;
    section.querySelector("ul").replaceChildren(...items);
    section.hidden = false;
  }

  function showRelated() {
    const layer = ownLayer();
    if (!layer) return;
    const [number, copies] = [Number(pageData().number), layer.copies || 1];
    const member = Math.floor(number / copies);
    const others = layer.filters.filter((f) => Math.floor(f[0] / copies) === member && f[0] !== number);
    fill("facets", others.map((f) => relatedItem(f, "")));
    const nearest = (featvis.neighbours || {})[member] || [];
    const known = new Map(nearest.length ? layer.filters.map((f) => [f[0], f]) : []);
    const found = nearest.filter(([n]) => known.has(n));
    fill("near", found.map(([n, cosine]) => relatedItem(known.get(n), cosine.toFixed(3))));
    const own = layer.filters.find((f) => f[0] === number);
    if (own) byId("facts").append(...featvis.columnFacts(layer, own));
  }

  function show() {
    const filters = listedFilters();
    const index = filters.findIndex((f) => f[0] === Number(pageData().number));
    if (index < 0) return; // hidden by dead=hide in the URL: keep the links of the HTML page
    for (const [id, other] of [["before", filters[index - 1]], ["after", filters[index + 1]]]) {
      const anchor = byId(id);
      anchor.hidden = !other;
      if (!other) {
        anchor.removeAttribute("href");
        continue;
      }
      anchor.setAttribute("href", `${other[0]}.html`);
      if (nameOf(other)) anchor.title = nameOf(other);
      else anchor.removeAttribute("title");
      anchor.textContent = id === "before" ? `← ${other[0]}` : `${other[0]} →`;
    }
  }

  // --- snapshot slider: one image holds all snapshots in rows, and a frame shows one of them -------------------------

  function startSnapshots(figure) {
    const [columns, rows] = [Number(figure.dataset.columns), Number(figure.dataset.rows)];
    const range = figure.querySelector("input");
    const frame = figure.querySelector(".frame");
    const sheet = frame.querySelector("img");
    const [width, height] = [sheet.getAttribute("width") / columns, sheet.getAttribute("height") / rows];
    frame.style.aspectRatio = `${width} / ${height}`;
    sheet.style.width = `${columns * 100}%`;
    const steps = range.dataset.steps.split(" ");
    const showFrame = () => {
      const i = Number(range.value);
      sheet.style.left = `${-(i % columns) * 100}%`;
      sheet.style.top = `${-Math.floor(i / columns) * 100}%`;
      figure.querySelector("output").textContent = steps[i];
      range.setAttribute("aria-valuetext", `after step ${steps[i]}`);
    };
    range.addEventListener("input", showFrame);
    showFrame();
  }

  // --- swipes and arrow keys lead to the previous or next filter -----------------------------------------------------

  function startSwipe(views) {
    let touch = null;
    views.addEventListener("touchstart", (event) => {
      const zoomed = window.visualViewport && visualViewport.scale > 1.01; // then a swipe scrolls the page
      const isSwipe = event.touches.length === 1 && event.target.tagName !== "INPUT" && !zoomed;
      touch = isSwipe ? event.touches[0] : null;
    }, { passive: true });
    views.addEventListener("touchend", (event) => {
      if (!touch) return;
      const end = event.changedTouches[0];
      const [x, y] = [end.clientX - touch.clientX, end.clientY - touch.clientY];
      if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) follow(byId(x > 0 ? "before" : "after"));
    }, { passive: true });
  }

  function key(event) {
    if (event.key === "p") featvis.pin(`${pageData().folder}:${pageData().number}`);
    else if (event.key === "ArrowLeft") follow(byId("before"));
    else if (event.key === "ArrowRight") follow(byId("after"));
    else return false;
    return true;
  }

  function search(text) {
    const { length } = featvis.openIfSingle(text);
    if (length > 1) location.href = `index.html${featvis.carriedHash({ q: text })}`;
    if (length) return;
    byId("q").setCustomValidity(`This layer has no filter ${text}`);
    byId("q").reportValidity();
  }

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  function click(button) {
    if (button.classList.contains("copy")) copy(button);
    else if (button.classList.contains("play")) featvis.toggleVideo(button);
  }

  function start() {
    document.querySelectorAll(".film").forEach(startSnapshots);
    document.querySelectorAll(".video").forEach(featvis.startVideo);
    showRelated();
    startSwipe(document.querySelector(".views"));
  }

  featvis.page = { show, start, search, key, click };
})(window.featvis);
