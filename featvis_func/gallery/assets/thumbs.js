"use strict";
// Thumbnails of a grid. Browsers load lazy images from far below the window. To keep the first view small, thumbnails
// are deferred until they are within 150 pixels of the window; the first scroll ends this and loads all of them.
((featvis) => {
  const { createElement, formatNumber, ownLayer } = featvis;
  let deferring = true;

  const viewport = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) load(entry.target);
  }, { rootMargin: "150px" });

  function defer(image) {
    if (!deferring) return;
    const [width, height] = [image.getAttribute("width"), image.getAttribute("height")];
    image.dataset.src = image.getAttribute("src");
    image.src = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ${width} ${height}'/>`;
    viewport.observe(image);
  }

  function load(image) {
    viewport.unobserve(image);
    if (image.dataset.src) image.src = image.dataset.src;
    delete image.dataset.src;
  }

  function loadAll() {
    deferring = false;
    document.querySelectorAll("img[data-src]").forEach(load);
  }

  const parseObserver = new MutationObserver((records) => {
    for (const node of records.flatMap((record) => [...record.addedNodes])) {
      if (node.tagName === "IMG" && node.closest("#grid")) defer(node);
    }
  });
  parseObserver.observe(document, { childList: true, subtree: true });
  document.addEventListener("DOMContentLoaded", () => parseObserver.disconnect());
  window.addEventListener("scroll", loadAll, { once: true });
  window.addEventListener("beforeprint", loadAll);

  // Create a thumbnail like the macro `thumb` of the templates does, with the value that the grid is sorted by.
  function thumb(filter) {
    const [n, score, , , status, convergedStep] = filter;
    const [width, height] = ownLayer().thumb;
    const name = featvis.nameOf(filter);
    const which = `${n}${name && ", " + name}`;
    const alt = `Filter ${which}, score ${formatNumber(score)}${status === "ok" ? "" : ", " + status}`;
    const src = `thumbs/${n}.webp`;
    const image = createElement("img", { src, width, height, loading: "lazy", decoding: "async", alt });
    defer(image);
    const step = convergedStep < 0 ? "none" : convergedStep;
    const column = featvis.sortColumn();
    const value = featvis.state.sort === "converged" ? `step ${step}` : formatNumber(score);
    const text = column ? featvis.columnText(column, featvis.indexOf(filter)) ?? "none" : status === "ok" ? value : status;
    const caption = createElement("i", {}, text);
    const label = createElement("span", { "aria-hidden": "true" }, createElement("b", {}, String(n)), " ", caption);
    const pinAttributes = { type: "button", class: "pin", "aria-pressed": "false", "aria-label": `Pin filter ${which}` };
    const itemAttributes = { "data-n": n, ...(["dead", "flat"].includes(status) ? { class: status } : {}) };
    const anchor = createElement("a", { href: `${n}.html`, ...(name ? { title: name } : {}) }, image, label);
    if (name) anchor.append(createElement("span", { class: "name", "aria-hidden": "true" }, name));
    return createElement("li", itemAttributes, anchor, createElement("button", pinAttributes, "★"));
  }

  Object.assign(featvis, { thumb });
})(window.featvis);
