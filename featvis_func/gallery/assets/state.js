"use strict";
// What a page shows is in the part of its URL behind "#", and every link within the gallery carries it on:
// sort, order, dead, q (of grids), pins ("folder:number", joined by "*"), theme, f (the filter that one comes from).
// On the way back, pins and theme are those of the session, not those of then.
//
// All scripts share the object `featvis`. Each adds what others use of it; `data.js` and `site.js` add `layers` and
// `site`. The script of a kind of page sets `featvis.page`: `show` what the state says, and, where it has them, `start`
// once the document is there, `search` on Enter, `key` (whether it is spent) and `click` of a button.
((featvis) => {
  const root = document.documentElement;
  root.classList.add("script");
  const CARRIED = ["sort", "order", "dead", "pins", "theme"];

  function read() {
    const state = {};
    for (const pair of location.hash.slice(1).split("&")) {
      const at = pair.indexOf("=");
      if (at < 1) continue;
      try {
        state[decodeURIComponent(pair.slice(0, at))] = decodeURIComponent(pair.slice(at + 1));
      } catch { /* not of this page's making */ }
    }
    return state;
  }

  function write(state) {
    const said = Object.entries(state).filter(([, value]) => value);
    const words = said.map(([key, value]) => `${key}=${encodeURIComponent(value).replace(/%3A/g, ":")}`);
    return words.length ? "#" + words.join("&") : "";
  }

  featvis.state = read();

  function replace() {
    history.replaceState(null, "", location.pathname + location.search + write(featvis.state));
    remember();
  }

  function set(changes) {
    featvis.state = { ...featvis.state, ...changes };
    replace();
    featvis.show();
  }

  // The address was changed by hand, or by a link to this page.
  function reread() {
    featvis.state = read();
    remember();
  }

  // --- the way back leads to an address from before: what was pinned since stays pinned, and the theme chosen -------

  const MEMORY = document.currentScript.src;

  function remember() {
    const { pins = "", theme = "" } = featvis.state;
    try {
      sessionStorage.setItem(MEMORY, JSON.stringify({ pins, theme }));
    } catch { /* not allowed here: then the address is all there is */ }
  }

  function recall() {
    try {
      featvis.state = { ...featvis.state, ...JSON.parse(sessionStorage.getItem(MEMORY)) };
    } catch { /* likewise */ }
    replace();
  }

  if (performance.getEntriesByType("navigation").some((entry) => entry.type === "back_forward")) recall();
  else remember();

  // --- links --------------------------------------------------------------------------------------------------------

  function carried(extra = {}) {
    const kept = {};
    for (const key of CARRIED) if (featvis.state[key]) kept[key] = featvis.state[key];
    return write({ ...kept, ...extra });
  }

  function link(anchor) {
    const href = anchor.getAttribute("href");
    if (!href || anchor.hasAttribute("download") || anchor.classList.contains("skip")) return;
    const [path, hash = ""] = href.split("#");
    const own = /(?:^|&)f=(\d+)/.exec(hash);
    anchor.setAttribute("href", path + carried(own ? { f: own[1] } : {}));
  }

  // --- the theme, before anything is drawn --------------------------------------------------------------------------

  function theme() {
    const chosen = featvis.state.theme;
    if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
    else delete root.dataset.theme;
  }

  function dark() {
    if (root.dataset.theme) return root.dataset.theme === "dark";
    return matchMedia("(prefers-color-scheme: dark)").matches;
  }

  theme();
  Object.assign(featvis, { write, replace, set, reread, recall, carried, link, theme, dark });
})(window.featvis ||= {});
