"use strict";
// What is pinned: its names are in the URL, its thumbnails in a bar.
((featvis) => {
  const { at, here, make, place } = featvis;

  function pins() {
    const known = new Set();
    for (const word of (featvis.state.pins || "").split("*")) {
      const [, folder, n] = /^(.+):(\d+)$/.exec(word) || [];
      // A name of a folder here is percent-quoted: it has no slash, and is not a way up.
      if (folder && !/[\\/:*?"<>|]/.test(folder) && !/^\.+$/.test(folder)) known.add(`${folder}:${Number(n)}`);
    }
    return [...known];
  }

  function pin(name) {
    const now = pins();
    featvis.set({ pins: (now.includes(name) ? now.filter((other) => other !== name) : [...now, name]).join("*") });
  }

  // The name of what a star pins.
  function starred(button) {
    return `${button.dataset.folder || here().folder}:${button.dataset.n || button.closest("li").dataset.n}`;
  }

  // --- a gallery that was made anew may lack a filter that is pinned: its name stands in the bar --------------------

  const missed = new Set();

  // Whether a pinned filter is not in the gallery, as far as this page can tell.
  function gone(name) {
    if (missed.has(name)) return true;
    const [folder, n] = name.split(":");
    const layer = featvis.layer(folder);
    if (layer) return !layer.filters.some((f) => f[0] === Number(n));
    return featvis.site !== undefined &&
      !featvis.every().some((other) => other.folder === folder && other.filters.includes(Number(n)));
  }

  function pinned(name) {
    const [folder, n] = name.split(":");
    const title = `${featvis.named(folder)}:${n}`;
    const text = make("span", { title: `${title} is not in this gallery` }, title);
    if (gone(name)) return make("li", {}, text);
    const image = make("img", { src: `${place(folder)}thumbs/${n}.webp`, alt: title });
    const anchor = make("a", { href: `${place(folder)}${n}.html`, title }, image);
    image.addEventListener("error", () => {
      missed.add(name);
      anchor.replaceWith(text);
    });
    return make("li", {}, anchor);
  }

  function showPins() {
    const now = pins();
    const items = here().page === "compare" ? [] : now; // there they stand anyway
    at("pins").hidden = items.length === 0;
    at("compare").textContent = `Compare ${now.length}`;
    at("pin-list").replaceChildren(...items.map(pinned));
    for (const button of document.querySelectorAll("button.pin")) {
      button.setAttribute("aria-pressed", String(now.includes(starred(button))));
    }
  }

  Object.assign(featvis, { pins, pin, starred, showPins });
})(window.featvis);
