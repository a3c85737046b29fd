"use strict";
// Small things that several scripts use.
((featvis) => {
  const at = (id) => document.getElementById(id);
  // What the page says of itself: its kind, the way to the gallery's root, its layer's folder, its number.
  const here = () => document.body.dataset;

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function say(text) {
    const said = at("said");
    if (said && said.textContent !== text) said.textContent = text;
  }

  function go(anchor) {
    if (anchor && !anchor.hidden && anchor.getAttribute("href")) anchor.click();
  }

  // --- layers, as far as this page has been told of them ------------------------------------------------------------

  // A filter is a list: its number, score, best step, steps, status, and the step at which it converged, or -1.
  const layer = (folder) => (featvis.layers || {})[folder];
  const own = () => layer(here().folder);
  // All layers: their names, folders and filters' numbers.
  const every = () => (featvis.site ? featvis.site.layers : []);

  const quoted = (folder) => folder.split("/").map(encodeURIComponent).join("/");
  const place = (folder) => `${here().root}layers/${quoted(folder)}/`;

  // A folder's name that was too long is cut off, and may end within a letter.
  function named(folder) {
    try {
      return decodeURIComponent(folder);
    } catch {
      return folder;
    }
  }

  // To four digits, as the pages are written.
  function number(value) {
    if (value === null) return "none";
    const [digits, power] = value.toExponential(3).split("e");
    if (value && (power < -4 || power > 6)) return `${Number(digits)}e${power[0]}${power.slice(1).padStart(2, "0")}`;
    return String(Number(value.toPrecision(4)));
  }

  Object.assign(featvis, { at, here, make, say, go, layer, own, every, place, named, number });
})(window.featvis);
