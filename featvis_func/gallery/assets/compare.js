"use strict";
// Comparison page: shows pinned filters side by side, using the data of their layers.
((featvis) => {
  const { byId, createElement, setStatus, layerUrl, formatNumber } = featvis;

  function fetchLayer(folder) {
    if (featvis.layer(folder) !== undefined) return Promise.resolve();
    return new Promise((resolve) => {
      const script = createElement("script", { src: `${layerUrl(folder)}data.js` });
      script.onload = script.onerror = resolve;
      document.head.append(script);
    });
  }

  function facts(layer, filter) {
    const [, score, bestStep, steps, status, convergedStep] = filter;
    const pairs = [["Score", formatNumber(score)], ["Best step", bestStep], ["Steps", steps],
      ["Converged at step", convergedStep], ["Status", status]];
    const rows = pairs.map(([key, value]) => {
      const text = value === -1 ? "none" : String(value);
      return createElement("div", {}, createElement("dt", {}, key), createElement("dd", {}, text));
    });
    return createElement("dl", { class: "facts" }, ...rows, ...featvis.columnFacts(layer, filter));
  }

  function filterCard(name, folder, layer, filter) {
    const n = filter[0];
    const [title, own] = [`${name}:${n}`, featvis.nameOf(filter)];
    const [width, height] = layer.size;
    const pinButton = createElement("button", {
      type: "button", class: "pin", "data-n": n, "data-folder": folder, "aria-pressed": "true",
      "aria-label": `Unpin ${title}${own && ", " + own}`,
    }, "★");
    const heading = createElement("h2", {}, createElement("a", { href: `${layerUrl(folder)}${n}.html` }, title));
    const image = { width, height, alt: `Feature visualisation of filter ${n}${own && ", " + own + ","} of ${name}` };
    const still = `${layerUrl(folder)}images/${n}.webp`;
    const moving = `${layerUrl(folder)}videos/${n}.${layer.video}`;
    const parts = [
      createElement("div", { class: "heading" }, heading, pinButton),
      ...(own ? [createElement("p", { class: "name" }, own)] : []),
      layer.video ? featvis.createVideo(title, moving, still, image) : createElement("img", { ...image, src: still }),
      facts(layer, filter),
    ];
    if (layer.map) {
      const [mapWidth, mapHeight] = layer.map;
      const attributes = { src: `${layerUrl(folder)}maps/${n}.webp`, class: "map", width: mapWidth, height: mapHeight };
      parts.push(createElement("img", { ...attributes, alt: `Activation map of filter ${n}` }));
    }
    return createElement("li", {}, ...parts);
  }

  async function show() {
    const names = Object.fromEntries(featvis.allLayers().map((layer) => [layer.folder, layer.name]));
    const pairs = featvis.pins().map((name) => name.split(":")).filter(([folder]) => names[folder]);
    await Promise.all([...new Set(pairs.map(([folder]) => folder))].map(fetchLayer));
    featvis.rememberPins();
    const items = [];
    for (const [folder, n] of pairs) {
      const layer = featvis.layer(folder);
      const filter = layer && layer.filters.find((f) => f[0] === Number(n));
      if (filter) items.push(filterCard(names[folder], folder, layer, filter));
    }
    const buttons = () => [...byId("compared").querySelectorAll("button")];
    const focused = buttons().indexOf(document.activeElement);
    byId("compared").replaceChildren(...items);
    if (focused >= 0) (buttons()[Math.min(focused, items.length - 1)] || byId("main")).focus();
    byId("unpin-here").hidden = !featvis.state.pins;
    const missing = featvis.pins().length - items.length;
    const note = missing ? `; ${missing} more ${missing === 1 ? "is" : "are"} not in this gallery` : "";
    if (items.length || missing) setStatus(`${items.length} pinned${note}`);
    else setStatus("Pin filters with their star button or the p key to compare them here side by side.");
    for (const anchor of byId("compared").querySelectorAll("a")) featvis.carryState(anchor);
  }

  function click(button) {
    if (button.classList.contains("play")) featvis.toggleVideo(button);
  }

  featvis.page = { show, click };
})(window.featvis);
