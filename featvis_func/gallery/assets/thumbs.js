"use strict";
// A grid's thumbnails. The first view loads little: browsers load lazy images from far below the window, and so, until
// the first scroll, those of a grid wait until they are near.
((featvis) => {
  const { make, number, own } = featvis;
  let waiting = true;

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) load(entry.target);
  }, { rootMargin: "150px" });

  function wait(image) {
    if (!waiting) return;
    const [width, height] = [image.getAttribute("width"), image.getAttribute("height")];
    image.dataset.src = image.getAttribute("src");
    image.src = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ${width} ${height}'/>`;
    near.observe(image);
  }

  function load(image) {
    near.unobserve(image);
    if (image.dataset.src) image.src = image.dataset.src;
    delete image.dataset.src;
  }

  function loadAll() {
    waiting = false;
    document.querySelectorAll("img[data-src]").forEach(load);
  }

  const parsing = new MutationObserver((records) => {
    for (const node of records.flatMap((record) => [...record.addedNodes])) {
      if (node.tagName === "IMG" && node.closest("#grid")) wait(node);
    }
  });
  parsing.observe(document, { childList: true, subtree: true });
  document.addEventListener("DOMContentLoaded", () => parsing.disconnect());
  window.addEventListener("scroll", loadAll, { once: true });
  window.addEventListener("beforeprint", loadAll);

  // A filter as the pages are written, with what it is sorted by.
  function thumb(filter) {
    const [n, score, , , status, settled] = filter;
    const [width, height] = own().thumb;
    const alt = `Filter ${n}, score ${number(score)}${status === "ok" ? "" : ", " + status}`;
    const image = make("img", { src: `thumbs/${n}.webp`, width, height, loading: "lazy", decoding: "async", alt });
    wait(image);
    const value = featvis.state.sort === "converged" ? `step ${settled < 0 ? "none" : settled}` : number(score);
    const under = make("i", {}, status === "ok" ? value : status);
    const words = make("span", { "aria-hidden": "true" }, make("b", {}, String(n)), " ", under);
    const star = { type: "button", class: "pin", "aria-pressed": "false", "aria-label": `Pin filter ${n}` };
    const item = { "data-n": n, ...(status === "dead" ? { class: "dead" } : {}) };
    return make("li", item, make("a", { href: `${n}.html` }, image, words), make("button", star, "★"));
  }

  Object.assign(featvis, { thumb });
})(window.featvis);
