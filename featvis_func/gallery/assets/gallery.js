"use strict";
// All state is in the part of the URL behind "#", and every link within the gallery carries it on:
// sort, order, dead, q (of grids), pins ("folder:number", joined by "*"), theme, f (the filter that one comes from).
// On the way back, pins and theme are those of the session, not those of then.
(() => {
  const root = document.documentElement;
  root.classList.add("script");
  const CARRIED = ["sort", "order", "dead", "pins", "theme"];
  const PAGE = 500;
  const site = () => window.featvisSite || { layers: [] };
  const data = () => window.featvisLayers || {};

  // --- state in the URL ---------------------------------------------------------------------------------------------

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

  let state = read();

  function replace() {
    history.replaceState(null, "", location.pathname + location.search + write(state));
    remember();
  }

  function set(changes) {
    state = { ...state, ...changes };
    replace();
    show();
  }

  // The way back leads to an address from before: what was pinned since stays pinned, and the theme chosen.
  const MEMORY = document.currentScript.src;

  function remember() {
    try {
      sessionStorage.setItem(MEMORY, JSON.stringify({ pins: state.pins || "", theme: state.theme || "" }));
    } catch { /* not allowed here: then the address is all there is */ }
  }

  function recall() {
    try {
      state = { ...state, ...JSON.parse(sessionStorage.getItem(MEMORY)) };
    } catch { /* likewise */ }
    replace();
  }

  if (performance.getEntriesByType("navigation").some((entry) => entry.type === "back_forward")) recall();
  else remember();

  function carried(extra) {
    const kept = {};
    for (const key of CARRIED) if (state[key]) kept[key] = state[key];
    return write({ ...kept, ...extra });
  }

  function link(anchor) {
    const href = anchor.getAttribute("href");
    if (!href || anchor.hasAttribute("download") || anchor.classList.contains("skip")) return;
    const [path, hash = ""] = href.split("#");
    const own = /(?:^|&)f=(\d+)/.exec(hash);
    anchor.setAttribute("href", path + carried(own ? { f: own[1] } : {}));
  }

  function theme() {
    if (state.theme === "dark" || state.theme === "light") root.dataset.theme = state.theme;
    else delete root.dataset.theme;
  }
  theme();

  // --- small things -------------------------------------------------------------------------------------------------

  const at = (id) => document.getElementById(id);
  const here = () => document.body.dataset;
  const quoted = (folder) => folder.split("/").map(encodeURIComponent).join("/");
  const place = (folder) => `${here().root}layers/${quoted(folder)}/`;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  // A name that was too long is cut off, and may end within a letter.
  const named = (folder) => {
    try {
      return decodeURIComponent(folder);
    } catch {
      return folder;
    }
  };

  // To four digits, as the pages are written.
  function number(value) {
    if (value === null) return "none";
    const [digits, power] = value.toExponential(3).split("e");
    if (value && (power < -4 || power > 6)) return `${Number(digits)}e${power[0]}${power.slice(1).padStart(2, "0")}`;
    return String(Number(value.toPrecision(4)));
  }

  function say(text) {
    const said = at("said");
    if (said && said.textContent !== text) said.textContent = text;
  }

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  // --- the first view loads little ----------------------------------------------------------------------------------

  // Browsers load lazy images from far below the window. Until the first scroll, those of a grid wait until they are near.
  const near = new IntersectionObserver((entries) => entries.forEach((entry) => entry.isIntersecting && load(entry.target)), { rootMargin: "150px" });
  let waiting = true;

  function wait(image) {
    if (!waiting) return;
    image.dataset.src = image.getAttribute("src");
    image.src = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ${image.getAttribute("width")} ${image.getAttribute("height")}'/>`;
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
    for (const record of records) for (const node of record.addedNodes) if (node.tagName === "IMG" && node.closest("#grid")) wait(node);
  });
  parsing.observe(document, { childList: true, subtree: true });
  window.addEventListener("scroll", loadAll, { once: true });
  window.addEventListener("beforeprint", loadAll);

  // --- pins ---------------------------------------------------------------------------------------------------------

  function pins() {
    const known = new Set();
    for (const word of (state.pins || "").split("*")) {
      const [, folder, n] = /^(.+):(\d+)$/.exec(word) || [];
      // A name of a folder here is percent-quoted: it has no slash, and is not a way up.
      if (folder && !/[\\/:*?"<>|]/.test(folder) && !/^\.+$/.test(folder)) known.add(`${folder}:${Number(n)}`);
    }
    return [...known];
  }

  function pin(name) {
    const now = pins();
    set({ pins: (now.includes(name) ? now.filter((other) => other !== name) : [...now, name]).join("*") });
  }

  function showPins() {
    const now = pins();
    const items = here().page === "compare" ? [] : now; // there they stand anyway
    at("pins").hidden = items.length === 0;
    at("compare").textContent = `Compare ${now.length}`;
    at("pin-list").replaceChildren(...items.map((name) => {
      const [folder, n] = name.split(":");
      const title = `${named(folder)}:${n}`;
      const image = make("img", { src: `${place(folder)}thumbs/${n}.webp`, alt: title });
      const anchor = make("a", { href: `${place(folder)}${n}.html`, title }, image);
      return make("li", {}, anchor);
    }));
    for (const button of document.querySelectorAll("button.pin")) {
      const n = button.dataset.n || button.closest("li").dataset.n;
      const folder = button.dataset.folder || here().folder;
      button.setAttribute("aria-pressed", String(now.includes(`${folder}:${n}`)));
    }
  }

  // --- a layer's filters --------------------------------------------------------------------------------------------

  const own = () => data()[here().folder];

  function sorted(filters) {
    const by = { number: (f) => f[0], score: (f) => f[1], converged: (f) => (f[5] < 0 ? null : f[5]) }[state.sort] || ((f) => f[0]);
    const sign = falling() ? -1 : 1;
    return [...filters].sort((a, b) => {
      const [x, y] = [by(a), by(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a[0] - b[0];
      return sign * (x - y) || a[0] - b[0];
    });
  }

  // Great scores come first unless the URL says otherwise; numbers and steps rise.
  const falling = () => (state.order ? state.order === "falling" : state.sort === "score");

  function wanted(text) {
    const words = (text || "").split(/[\s,]+/).filter(Boolean);
    const spans = words.map((word) => /^(\d+)(-?)(\d*)$/.exec(word));
    if (!words.length) return null;
    if (spans.some((span) => !span)) return undefined;
    return (n) => spans.some(([, low, to, high]) => Number(low) <= n && n <= Number(high || (to ? Infinity : low)));
  }

  function listed() {
    const layer = own();
    if (!layer) return [];
    const alive = state.dead === "hide" ? layer.filters.filter((f) => f[4] !== "dead") : layer.filters;
    return sorted(alive);
  }

  function thumb(f) {
    const layer = own();
    const [n, score, , , status] = f;
    const image = make("img", {
      src: `thumbs/${n}.webp`, width: layer.thumb[0], height: layer.thumb[1], loading: "lazy", decoding: "async",
      alt: `Filter ${n}, score ${number(score)}${status === "ok" ? "" : ", " + status}`,
    });
    const under = state.sort === "converged" ? `step ${f[5] < 0 ? "none" : f[5]}` : number(score);
    wait(image);
    const words = make("span", { "aria-hidden": "true" }, make("b", {}, String(n)), " ", make("i", {}, status === "ok" ? under : status));
    const button = make("button", { type: "button", class: "pin", "aria-pressed": "false", "aria-label": `Pin filter ${n}` }, "★");
    return make("li", { "data-n": n, ...(status === "dead" ? { class: "dead" } : {}) }, make("a", { href: `${n}.html` }, image, words), button);
  }

  let shown = null;
  const file = (page) => (page === 1 ? "index.html" : `page-${page}.html`);

  function showGrid() {
    const layer = own();
    if (!layer) return;
    at("sort").value = ["score", "converged"].includes(state.sort) ? state.sort : "number";
    at("order").textContent = falling() ? "↓" : "↑";
    at("order").setAttribute("aria-label", `Order: ${falling() ? "falling" : "rising"}`);
    at("dead").checked = state.dead !== "hide";
    if (document.activeElement !== at("q")) at("q").value = state.q || "";
    const test = wanted(state.q);
    const all = listed();
    const found = test ? all.filter((f) => test(f[0])) : test === undefined ? [] : all;
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    let page = Number(here().number);
    if (state.f !== undefined) {
      const index = found.findIndex((f) => f[0] === Number(state.f));
      const target = Math.floor(index / PAGE) + 1;
      if (index >= 0 && target !== page) {
        location.replace(file(target) + write(state));
        return;
      }
    }
    if (page > pages) page = state.q ? 1 : pages; // what is sought is found on any page
    const slice = found.slice((page - 1) * PAGE, page * PAGE);
    const key = JSON.stringify([slice.map((f) => f[0]), state.sort === "converged"]);
    const before = shown ?? JSON.stringify([[...at("grid").children].map((li) => Number(li.dataset.n)), false]);
    if (key !== before) at("grid").replaceChildren(...slice.map(thumb));
    shown = key;
    at("pager").replaceChildren(...(pages < 2 ? [] : Array.from({ length: pages }, (_, i) =>
      i + 1 === page ? make("b", { "aria-current": "page" }, String(i + 1)) : make("a", { href: file(i + 1) }, String(i + 1)))));
    for (const anchor of at("pager").querySelectorAll("a")) anchor.dataset.keep = "q";
    const hidden = layer.filters.length - all.length;
    say(test === undefined ? `“${state.q}” is no number; write 3, or 10-20` : test && !found.length ?
      `No filter ${state.q} here` : test ? `${found.length} found` : hidden ? `${hidden} dead hidden` : "");
    roving();
    if (state.f !== undefined) {
      const chosen = at("grid").querySelector(`[data-n="${Number(state.f)}"] a`);
      delete state.f;
      replace();
      if (chosen) {
        focus(chosen);
        chosen.scrollIntoView({ block: "center" });
      }
    }
  }

  // One thumbnail is reached by Tab, the others by the arrows.
  function roving() {
    const anchors = [...at("grid").querySelectorAll("a")];
    const chosen = anchors.find((a) => a === document.activeElement) || anchors.find((a) => a.tabIndex === 0 && a.hasAttribute("tabindex")) || anchors[0];
    for (const anchor of anchors) {
      anchor.tabIndex = anchor === chosen ? 0 : -1;
      anchor.parentElement.querySelector(".pin").tabIndex = -1;
    }
    if (chosen) chosen.parentElement.querySelector(".pin").tabIndex = 0;
  }

  function focus(anchor) {
    anchor.focus();
    roving();
  }

  function move(key) {
    const anchors = [...at("grid").querySelectorAll("a")];
    if (!anchors.length) return false;
    const now = anchors.findIndex((a) => a.parentElement.contains(document.activeElement));
    if (now < 0) {
      focus(anchors[0]);
      return true;
    }
    const top = anchors[0].getBoundingClientRect().top;
    const columns = anchors.findIndex((a) => a.getBoundingClientRect().top > top + 4);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    if (columns < 0 && (key === "ArrowUp" || key === "ArrowDown")) return false;
    const next = anchors[now + step];
    if (!next) return key === "ArrowLeft" || key === "ArrowRight";
    focus(next);
    return true;
  }

  // --- one filter ---------------------------------------------------------------------------------------------------

  function showFilter() {
    const filters = listed();
    const index = filters.findIndex((f) => f[0] === Number(here().number));
    if (index < 0) return; // hidden by the URL's own words: the neighbours by number stay
    for (const [id, other] of [["before", filters[index - 1]], ["after", filters[index + 1]]]) {
      const anchor = at(id);
      anchor.hidden = !other;
      if (!other) {
        anchor.removeAttribute("href");
        continue;
      }
      anchor.setAttribute("href", `${other[0]}.html`);
      anchor.textContent = id === "before" ? `← ${other[0]}` : `${other[0]} →`;
    }
  }

  function showFilm(figure) {
    const [columns, rows] = [Number(figure.dataset.columns), Number(figure.dataset.rows)];
    const range = figure.querySelector("input");
    const frame = figure.querySelector(".frame");
    const sheet = frame.querySelector("img");
    const [w, h] = [sheet.getAttribute("width") / columns, sheet.getAttribute("height") / rows];
    frame.style.aspectRatio = `${w} / ${h}`;
    sheet.style.width = `${columns * 100}%`;
    const steps = range.dataset.steps.split(" ");
    const show = () => {
      const i = Number(range.value);
      sheet.style.left = `${-(i % columns) * 100}%`;
      sheet.style.top = `${-Math.floor(i / columns) * 100}%`;
      figure.querySelector("output").textContent = steps[i];
      range.setAttribute("aria-valuetext", `after step ${steps[i]}`);
    };
    range.addEventListener("input", show);
    show();
  }

  function swipe() {
    let begun = null;
    const views = document.querySelector(".views");
    views.addEventListener("touchstart", (event) => {
      const zoomed = window.visualViewport && visualViewport.scale > 1.01; // then it moves what is seen
      begun = event.touches.length === 1 && event.target.tagName !== "INPUT" && !zoomed ? event.touches[0] : null;
    }, { passive: true });
    views.addEventListener("touchend", (event) => {
      if (!begun) return;
      const [x, y] = [event.changedTouches[0].clientX - begun.clientX, event.changedTouches[0].clientY - begun.clientY];
      if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) go(at(x > 0 ? "before" : "after"));
    }, { passive: true });
  }

  function go(anchor) {
    if (anchor && !anchor.hidden && anchor.getAttribute("href")) anchor.click();
  }

  // --- the model, and what is pinned --------------------------------------------------------------------------------

  function showModel() {
    if (document.activeElement !== at("q")) at("q").value = state.q || "";
    const words = (state.q || "").replace(/:\d*$/, "").toLowerCase();
    let count = 0;
    const items = [...document.querySelectorAll(".layers > li")];
    for (const item of items) {
      item.hidden = !item.dataset.layer.toLowerCase().includes(words);
      count += item.hidden ? 0 : 1;
    }
    say(!state.q ? "" : count ? `${count} layer${count === 1 ? "" : "s"}` : `No layer's name has “${words}” in it`);
  }

  function fetchLayer(folder) {
    if (data()[folder] !== undefined) return Promise.resolve();
    return new Promise((done) => {
      const script = make("script", { src: `${place(folder)}data.js` });
      script.onload = script.onerror = done;
      document.head.append(script);
    });
  }

  async function showCompared() {
    const known = Object.fromEntries(site().layers.map((layer) => [layer.folder, layer]));
    const names = pins().filter((name) => known[name.split(":")[0]]);
    await Promise.all([...new Set(names.map((name) => name.split(":")[0]))].map(fetchLayer));
    const items = [];
    for (const name of names) {
      const [folder, n] = name.split(":");
      const layer = data()[folder];
      const found = layer && layer.filters.find((f) => f[0] === Number(n));
      if (!found) continue;
      const [, score, best, steps, status, settled] = found;
      const title = `${known[folder].name}:${n}`;
      const star = make("button", { type: "button", class: "pin", "data-n": n, "data-folder": folder, "aria-pressed": "true", "aria-label": `Unpin ${title}` }, "★");
      const parts = [make("div", { class: "heading" }, make("h2", {}, make("a", { href: `${place(folder)}${n}.html` }, title)), star),
        make("img", { src: `${place(folder)}images/${n}.webp`, width: layer.size[0], height: layer.size[1], alt: `What filter ${n} of ${known[folder].name} looks for` })];
      const facts = [["Score", number(score)], ["Best step", best], ["Steps", steps], ["Converged at step", settled], ["Status", status]];
      parts.push(make("dl", { class: "facts" }, ...facts.map(([key, value]) =>
        make("div", {}, make("dt", {}, key), make("dd", {}, value === -1 ? "none" : String(value))))));
      if (layer.maps) parts.push(make("img", { src: `${place(folder)}maps/${n}.webp`, class: "map", width: layer.size[0], height: layer.size[1], alt: `Where filter ${n} is active` }));
      items.push(make("li", {}, ...parts));
    }
    const buttons = () => [...at("compared").querySelectorAll("button")];
    const focused = buttons().indexOf(document.activeElement);
    at("compared").replaceChildren(...items);
    if (focused >= 0) (buttons()[Math.min(focused, items.length - 1)] || at("main")).focus();
    at("unpin-here").hidden = !state.pins;
    const lost = pins().length - items.length;
    if (items.length || lost) say(`${items.length} pinned${lost ? `; ${lost} more that this gallery has not` : ""}`);
    else say("Pin filters by their star, or by the key p; they stand here side by side.");
    for (const anchor of at("compared").querySelectorAll("a")) link(anchor);
  }

  // --- what happens -------------------------------------------------------------------------------------------------

  function show() {
    theme();
    at("theme").textContent = dark() ? "Light" : "Dark";
    const does = { layer: showGrid, filter: showFilter, model: showModel, compare: showCompared }[here().page];
    does();
    showPins();
    for (const anchor of document.querySelectorAll("a[href]")) link(anchor);
    for (const anchor of document.querySelectorAll("a[data-keep]")) {
      if (state.q) anchor.setAttribute("href", anchor.getAttribute("href").split("#")[0] + carried({ q: state.q }));
    }
  }

  function search(text) {
    const page = here().page;
    if (page === "model") {
      const [, name, n] = /^(.*?)(?::(\d+))?$/.exec(text.trim());
      const fits = site().layers.filter((l) => l.name === name);
      const near = fits.length ? fits : site().layers.filter((l) => l.name.toLowerCase().includes(name.toLowerCase()));
      if (near.length !== 1) {
        say(near.length ? `${near.length} layers have “${name}” in their name` : `No layer's name has “${name}” in it`);
        return;
      }
      if (n === undefined) location.href = `${place(near[0].folder)}index.html${carried({})}`;
      else if (near[0].filters.includes(Number(n))) location.href = `${place(near[0].folder)}${Number(n)}.html${carried({})}`;
      else say(`${near[0].name} has no filter ${n}`);
      return;
    }
    const test = wanted(text);
    const found = test ? own().filters.filter((f) => test(f[0])) : [];
    if (found.length === 1) location.href = `${found[0][0]}.html${carried({})}`;
    else if (page === "layer" && found.length) move("ArrowDown");
    else if (page === "filter") at("q").setCustomValidity(`This layer has no filter ${text}`), at("q").reportValidity();
  }

  function up() {
    const anchors = document.querySelectorAll("header nav a");
    go(anchors[anchors.length - 1]);
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input:not([type=checkbox]), select");
    if (event.key === "Escape") {
      if (!field) up();
      else field.blur();
      if (field && field.id === "q") {
        field.value = "";
        if (here().page !== "filter") set({ q: "" });
      }
      return;
    }
    if (field && (field.id === "q" || event.key !== "/")) return;
    if (event.key === "/" && at("q")) {
      at("q").focus();
      at("q").select();
    } else if (event.key === "c" && pins().length) go(at("compare"));
    else if (event.key === "p" && here().page === "filter") pin(`${here().folder}:${here().number}`);
    else if (event.key === "p" && here().page === "layer") {
      const item = document.activeElement.closest("#grid li");
      if (!item) return;
      pin(`${here().folder}:${item.dataset.n}`);
    } else if (here().page === "filter" && event.key === "ArrowLeft") go(at("before"));
    else if (here().page === "filter" && event.key === "ArrowRight") go(at("after"));
    else if (here().page === "layer" && event.shiftKey && event.key === "ArrowLeft") go(at("layer-before"));
    else if (here().page === "layer" && event.shiftKey && event.key === "ArrowRight") go(at("layer-after"));
    else if (here().page === "layer" && event.key.startsWith("Arrow") && !event.shiftKey) {
      if (!move(event.key)) return;
    } else return;
    event.preventDefault();
  }

  function clicks(event) {
    const button = event.target.closest("button");
    const skip = event.target.closest("a.skip");
    if (skip) {
      event.preventDefault();
      at("main").focus();
    }
    if (!button) return;
    if (button.classList.contains("pin")) pin(`${button.dataset.folder || here().folder}:${button.dataset.n || button.closest("li").dataset.n}`);
    else if (button.id === "theme") set({ theme: dark() ? "light" : "dark" });
    else if (button.id === "unpin" || button.id === "unpin-here") set({ pins: "" });
    else if (button.id === "order") set({ order: falling() ? "rising" : "falling" });
    else if (button.classList.contains("copy")) copy(button);
  }

  async function copy(button) {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.parentElement.querySelector("code"));
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  document.addEventListener("DOMContentLoaded", () => {
    parsing.disconnect();
    document.addEventListener("keydown", keys);
    document.addEventListener("click", clicks);
    window.addEventListener("hashchange", () => { state = read(); remember(); show(); });
    window.addEventListener("pageshow", (event) => { if (event.persisted) { recall(); show(); } });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    if (at("search")) {
      at("search").addEventListener("submit", (event) => { event.preventDefault(); search(at("q").value); });
      at("q").addEventListener("input", () => {
        at("q").setCustomValidity("");
        if (here().page !== "filter") set({ q: at("q").value });
      });
    }
    if (at("sort")) {
      at("sort").addEventListener("change", () => set({ sort: at("sort").value === "number" ? "" : at("sort").value, order: "" }));
      at("dead").addEventListener("change", () => set({ dead: at("dead").checked ? "" : "hide" }));
      at("grid").addEventListener("focusin", roving);
    }
    document.querySelectorAll(".film").forEach(showFilm);
    if (here().page === "filter") swipe();
    show();
  });
})();
