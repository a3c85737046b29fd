"use strict";
// Helper functions of several scripts.
((featvis) => {
  const byId = (id) => document.getElementById(id);
  // Data attributes of the page: its kind, the path to the gallery's root, its layer's folder, its number.
  const pageData = () => document.body.dataset;

  function createElement(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function setStatus(text) {
    const status = byId("said");
    if (status && status.textContent !== text) status.textContent = text;
  }

  function follow(anchor) {
    if (anchor && !anchor.hidden && anchor.getAttribute("href")) anchor.click();
  }

  // --- layers whose data this page has loaded ------------------------------------------------------------------------

  // A filter is an array: number, score, best step, steps, status, and the step of convergence or -1.
  const layer = (folder) => (featvis.layers || {})[folder];
  const ownLayer = () => layer(pageData().folder);
  // All layers of the gallery: names, folders and filter numbers.
  const allLayers = () => (featvis.site ? featvis.site.layers : []);

  const quotePath = (folder) => folder.split("/").map(encodeURIComponent).join("/");
  const layerUrl = (folder) => `${pageData().root}layers/${quotePath(folder)}/`;

  // The name of a layer from its folder. A long folder name is cut off, possibly within an encoded character.
  function layerName(folder) {
    try {
      return decodeURIComponent(folder);
    } catch {
      return folder;
    }
  }

  // Format a number with four significant digits, like `format_number` in manifest.py.
  function formatNumber(value) {
    if (value === null) return "none";
    const [digits, power] = value.toExponential(3).split("e");
    if (value && (power < -4 || power > 6)) return `${Number(digits)}e${power[0]}${power.slice(1).padStart(2, "0")}`;
    return String(Number(value.toPrecision(4)));
  }

  Object.assign(featvis, {
    byId, pageData, createElement, setStatus, follow, layer, ownLayer, allLayers, layerUrl, layerName, formatNumber,
  });
})(window.featvis);
