"use strict";
// Pinned filters: their names are in the URL, their thumbnails in a bar at the bottom of the page.
((featvis) => {
  const { byId, pageData, createElement, layerUrl } = featvis;

  function pins() {
    const names = new Set();
    for (const entry of (featvis.state.pins || "").split("*")) {
      const [, folder, n] = /^(.+):(\d+)$/.exec(entry) || [];
      // Folder names in a gallery are percent-encoded. Skip anything else, above all slashes and parent folders.
      if (folder && !/[\\/:*?"<>|]/.test(folder) && !/^\.+$/.test(folder)) names.add(`${folder}:${Number(n)}`);
    }
    return [...names];
  }

  function pin(name) {
    const current = pins();
    const changed = current.includes(name) ? current.filter((other) => other !== name) : [...current, name];
    featvis.setState({ pins: changed.join("*") });
  }

  // The name, "folder:number", of the filter that a star button pins.
  function pinName(button) {
    return `${button.dataset.folder || pageData().folder}:${button.dataset.n || button.closest("li").dataset.n}`;
  }

  // --- a rebuilt gallery may lack a pinned filter: the bar then shows its name, not its thumbnail --------------------

  const failedImages = new Set();

  // Return whether the data on this page shows that a pinned filter is not in the gallery.
  function isMissing(name) {
    if (failedImages.has(name)) return true;
    const [folder, n] = name.split(":");
    const layer = featvis.layer(folder);
    if (layer) return !layer.filters.some((f) => f[0] === Number(n));
    return featvis.site !== undefined &&
      !featvis.allLayers().some((other) => other.folder === folder && other.filters.includes(Number(n)));
  }

  // Names of members are in the data of their layer, which only some pages load; the session remembers them.
  function rememberPins() {
    const known = {};
    for (const name of pins()) {
      const [folder, n] = name.split(":");
      const filter = featvis.layer(folder)?.filters.find((f) => f[0] === Number(n));
      const own = filter ? featvis.nameOf(filter) : featvis.rememberedName(name);
      if (own) known[name] = own;
    }
    featvis.rememberNames(known);
  }

  function pinItem(name) {
    const [folder, n] = name.split(":");
    const own = featvis.rememberedName(name);
    const title = `${featvis.layerName(folder)}:${n}${own && ", " + own}`;
    const text = createElement("span", { title: `${title} is not in this gallery` }, title);
    if (isMissing(name)) return createElement("li", {}, text);
    const image = createElement("img", { src: `${layerUrl(folder)}thumbs/${n}.webp`, alt: title });
    const anchor = createElement("a", { href: `${layerUrl(folder)}${n}.html`, title }, image);
    image.addEventListener("error", () => {
      failedImages.add(name);
      anchor.replaceWith(text);
    });
    return createElement("li", {}, anchor);
  }

  function showPins() {
    const current = pins();
    rememberPins();
    const items = pageData().page === "compare" ? [] : current; // which shows the filters themselves
    byId("pins").hidden = items.length === 0;
    byId("compare").textContent = `Compare ${current.length}`;
    byId("pin-list").replaceChildren(...items.map(pinItem));
    for (const button of document.querySelectorAll("button.pin")) {
      button.setAttribute("aria-pressed", String(current.includes(pinName(button))));
    }
  }

  Object.assign(featvis, { pins, pin, pinName, rememberPins, showPins });
})(window.featvis);
