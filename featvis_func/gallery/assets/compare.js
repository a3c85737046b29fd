"use strict";
// The page on which pinned filters stand side by side. What it tells of them is in the data of their layers.
((featvis) => {
  const { at, make, say, place, number } = featvis;

  function fetchLayer(folder) {
    if (featvis.layer(folder) !== undefined) return Promise.resolve();
    return new Promise((done) => {
      const script = make("script", { src: `${place(folder)}data.js` });
      script.onload = script.onerror = done;
      document.head.append(script);
    });
  }

  function facts(filter) {
    const [, score, best, steps, status, settled] = filter;
    const pairs = [["Score", number(score)], ["Best step", best], ["Steps", steps],
      ["Converged at step", settled], ["Status", status]];
    const rows = pairs.map(([key, value]) =>
      make("div", {}, make("dt", {}, key), make("dd", {}, value === -1 ? "none" : String(value))));
    return make("dl", { class: "facts" }, ...rows);
  }

  function card(name, folder, layer, filter) {
    const n = filter[0];
    const title = `${name}:${n}`;
    const [width, height] = layer.size;
    const star = make("button", {
      type: "button", class: "pin", "data-n": n, "data-folder": folder, "aria-pressed": "true",
      "aria-label": `Unpin ${title}`,
    }, "★");
    const heading = make("h2", {}, make("a", { href: `${place(folder)}${n}.html` }, title));
    const alt = `What filter ${n} of ${name} looks for`;
    const parts = [
      make("div", { class: "heading" }, heading, star),
      make("img", { src: `${place(folder)}images/${n}.webp`, width, height, alt }),
      facts(filter),
    ];
    if (layer.maps) {
      const where = { src: `${place(folder)}maps/${n}.webp`, class: "map", width, height };
      parts.push(make("img", { ...where, alt: `Where filter ${n} is active` }));
    }
    return make("li", {}, ...parts);
  }

  async function show() {
    const names = Object.fromEntries(featvis.every().map((layer) => [layer.folder, layer.name]));
    const pairs = featvis.pins().map((name) => name.split(":")).filter(([folder]) => names[folder]);
    await Promise.all([...new Set(pairs.map(([folder]) => folder))].map(fetchLayer));
    const items = [];
    for (const [folder, n] of pairs) {
      const layer = featvis.layer(folder);
      const filter = layer && layer.filters.find((f) => f[0] === Number(n));
      if (filter) items.push(card(names[folder], folder, layer, filter));
    }
    const buttons = () => [...at("compared").querySelectorAll("button")];
    const focused = buttons().indexOf(document.activeElement);
    at("compared").replaceChildren(...items);
    if (focused >= 0) (buttons()[Math.min(focused, items.length - 1)] || at("main")).focus();
    at("unpin-here").hidden = !featvis.state.pins;
    const lost = featvis.pins().length - items.length;
    if (items.length || lost) say(`${items.length} pinned${lost ? `; ${lost} more that this gallery has not` : ""}`);
    else say("Pin filters by their star, or by the key p; they stand here side by side.");
    for (const anchor of at("compared").querySelectorAll("a")) featvis.link(anchor);
  }

  featvis.page = { show };
})(window.featvis);
