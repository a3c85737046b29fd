"use strict";
// The state of a page is in its URL after "#", and every link within the gallery carries it on: sort, order, dead,
// q (search text of grids), pins ("folder:number", joined by "*"), theme, and f (the filter that a link to a grid comes
// from). Going back in the history keeps the current pins and theme instead of those in the older URL.
//
// All scripts share the object `featvis`, to which each adds the functions that others use; `data.js` and `site.js` add
// `layers` and `site`. The script of each kind of page sets `featvis.page`, an object with `show` (display the state)
// and optionally `start` (called once the document is loaded), `search` (called on Enter in the search field), `key`
// (returns whether it handled a key) and `click` (called for a clicked button).
((featvis) => {
  const root = document.documentElement;
  root.classList.add("script");
  const CARRIED = ["sort", "order", "dead", "pins", "theme"];

  function parseHash() {
    const state = {};
    for (const pair of location.hash.slice(1).split("&")) {
      const separator = pair.indexOf("=");
      if (separator < 1) continue;
      try {
        state[decodeURIComponent(pair.slice(0, separator))] = decodeURIComponent(pair.slice(separator + 1));
      } catch { /* malformed percent-encoding: ignore */ }
    }
    return state;
  }

  function toHash(state) {
    const entries = Object.entries(state).filter(([, value]) => value);
    const pairs = entries.map(([key, value]) => `${key}=${encodeURIComponent(value).replace(/%3A/g, ":")}`);
    return pairs.length ? "#" + pairs.join("&") : "";
  }

  featvis.state = parseHash();

  function replaceAddress() {
    history.replaceState(null, "", location.pathname + location.search + toHash(featvis.state));
    saveSession();
  }

  function setState(changes) {
    featvis.state = { ...featvis.state, ...changes };
    replaceAddress();
    featvis.show();
  }

  // Called when the URL was edited by hand or changed by a link to this page.
  function reloadState() {
    featvis.state = parseHash();
    saveSession();
  }

  // --- history: a page reached by going back keeps the pins and the theme of the session -----------------------------

  const STORAGE_KEY = document.currentScript.src;

  function saveSession() {
    const { pins = "", theme = "" } = featvis.state;
    try {
      sessionStorage.setItem(STORAGE_KEY, JSON.stringify({ pins, theme }));
    } catch { /* storage is not allowed: the URL alone holds the state */ }
  }

  function restoreSession() {
    try {
      featvis.state = { ...featvis.state, ...JSON.parse(sessionStorage.getItem(STORAGE_KEY)) };
    } catch { /* storage is not allowed, as above */ }
    replaceAddress();
  }

  // --- names of pinned members, for pages that do not load the data of their layer -----------------------------------

  let pinNames = {};
  try {
    pinNames = JSON.parse(sessionStorage.getItem(`${STORAGE_KEY} names`)) || {};
  } catch { /* storage is not allowed, as above */ }

  const rememberedName = (pin) => (Object.hasOwn(pinNames, pin) ? pinNames[pin] : "");

  function rememberNames(names) {
    pinNames = names;
    try {
      sessionStorage.setItem(`${STORAGE_KEY} names`, JSON.stringify(names));
    } catch { /* storage is not allowed, as above */ }
  }

  if (performance.getEntriesByType("navigation").some((entry) => entry.type === "back_forward")) restoreSession();
  else saveSession();

  // --- links --------------------------------------------------------------------------------------------------------

  function carriedHash(extra = {}) {
    const kept = {};
    for (const key of CARRIED) if (featvis.state[key]) kept[key] = featvis.state[key];
    return toHash({ ...kept, ...extra });
  }

  function carryState(anchor) {
    const href = anchor.getAttribute("href");
    if (!href || anchor.hasAttribute("download") || anchor.classList.contains("skip")) return;
    const [path, hash = ""] = href.split("#");
    const origin = /(?:^|&)f=(\d+)/.exec(hash);
    anchor.setAttribute("href", path + carriedHash(origin ? { f: origin[1] } : {}));
  }

  // --- theme, applied before the first paint -------------------------------------------------------------------------

  function applyTheme() {
    const chosen = featvis.state.theme;
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
    else delete root.dataset.theme;
  }

  function isDark() {
    if (root.dataset.theme) return root.dataset.theme === "dark";
    return matchMedia("(prefers-color-scheme: dark)").matches;
  }

  applyTheme();
  Object.assign(featvis, {
    toHash, replaceAddress, setState, reloadState, restoreSession, carriedHash, carryState, applyTheme, isDark,
    rememberedName, rememberNames,
  });
})(window.featvis ||= {});
