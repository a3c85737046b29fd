"use strict";
// The model's page: its layers, and the search for one, or for a filter of one ("name:3").
((featvis) => {
  const { at, say, every, place } = featvis;
  const has = (name, words) => name.toLowerCase().includes(words.toLowerCase());

  function show() {
    const { q = "" } = featvis.state;
    if (document.activeElement !== at("q")) at("q").value = q;
    const words = q.replace(/:\d*$/, "");
    let count = 0;
    for (const item of document.querySelectorAll(".layers > li")) {
      item.hidden = !has(item.dataset.layer, words);
      count += item.hidden ? 0 : 1;
    }
    if (!q) say("");
    else if (!count) say(`No layer's name has “${words.toLowerCase()}” in it`);
    else say(`${count} layer${count === 1 ? "" : "s"}`);
  }

  function search(text) {
    const [, name, n] = /^(.*?)(?::(\d+))?$/.exec(text.trim());
    const fits = every().filter((layer) => layer.name === name);
    const near = fits.length ? fits : every().filter((layer) => has(layer.name, name));
    const [layer] = near;
    if (!layer) say(`No layer's name has “${name}” in it`);
    else if (near.length > 1) say(`${near.length} layers have “${name}” in their name`);
    else if (n === undefined) location.href = `${place(layer.folder)}index.html${featvis.carried()}`;
    else if (layer.filters.includes(Number(n))) {
      location.href = `${place(layer.folder)}${Number(n)}.html${featvis.carried()}`;
    } else say(`${layer.name} has no filter ${n}`);
  }

  featvis.page = { show, search };
})(window.featvis);
