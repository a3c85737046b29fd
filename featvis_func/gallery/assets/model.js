"use strict";
// Model page: the list of layers, and the search for a layer ("name") or for one of its filters ("name:3").
((featvis) => {
  const { byId, setStatus, allLayers, layerUrl } = featvis;
  const contains = (name, text) => name.toLowerCase().includes(text.toLowerCase());

  function show() {
    const { q = "" } = featvis.state;
    if (document.activeElement !== byId("q")) byId("q").value = q;
    const text = q.replace(/:\d*$/, "");
    let count = 0;
    for (const item of document.querySelectorAll(".layers > li")) {
      item.hidden = !contains(item.dataset.layer, text);
      count += item.hidden ? 0 : 1;
    }
    if (!q) setStatus("");
    else if (!count) setStatus(`No layer name contains “${text.toLowerCase()}”`);
    else setStatus(`${count} layer${count === 1 ? "" : "s"}`);
  }

  function search(text) {
    const [, name, n] = /^(.*?)(?::(\d+))?$/.exec(text.trim());
    const exact = allLayers().filter((layer) => layer.name === name);
    const matches = exact.length ? exact : allLayers().filter((layer) => contains(layer.name, name));
    const [layer] = matches;
    if (!layer) setStatus(`No layer name contains “${name}”`);
    else if (matches.length > 1) setStatus(`${matches.length} layer names contain “${name}”`);
    else if (n === undefined) location.href = `${layerUrl(layer.folder)}index.html${featvis.carriedHash()}`;
    else if (layer.filters.includes(Number(n))) {
      location.href = `${layerUrl(layer.folder)}${Number(n)}.html${featvis.carriedHash()}`;
    } else setStatus(`${layer.name} has no filter ${n}`);
  }

  featvis.page = { show, search };
})(window.featvis);
