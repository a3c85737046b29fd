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

  // A filter is an array: number, score, best step, steps, status, the step of convergence or -1, and, if it is a
  // member of a family that has a name, this name.
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

  const nameOf = (filter) => filter[6] || "";

  // The columns of the user's own file, and the value of one for a filter as text; null if it has none.
  const columnsOf = (layer) => layer.columns || [];

  function columnText(column, index) {
    const value = column.values[index];
    if (value === null) return null;
    return column.numeric ? formatNumber(value) : value;
  }

  // Descriptions of a filter: the values of the user's columns.
  function columnFacts(layer, filter) {
    const index = layer.filters.indexOf(filter);
    const facts = [];
    for (const column of columnsOf(layer)) {
      const text = columnText(column, index);
      if (text === null) continue;
      const attribute = { class: text.length > 24 ? "column long" : "column" };
      facts.push(createElement("div", attribute, createElement("dt", {}, column.name), createElement("dd", {}, text)));
    }
    return facts;
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
    nameOf, columnsOf, columnText, columnFacts,
  });
})(window.featvis);
