"use strict";
// A layer's filters: in the order that the URL says, without those that it hides, and those that a search finds.
((featvis) => {
  const { own } = featvis;
  const KEYS = { number: (f) => f[0], score: (f) => f[1], converged: (f) => (f[5] < 0 ? null : f[5]) };

  // Great scores come first unless the URL says otherwise; numbers and steps rise.
  function falling() {
    const { sort, order } = featvis.state;
    return order ? order === "falling" : sort === "score";
  }

  // Those without a value stand last.
  function sorted(filters) {
    const by = KEYS[featvis.state.sort] || KEYS.number;
    const sign = falling() ? -1 : 1;
    return [...filters].sort((a, b) => {
      const [x, y] = [by(a), by(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a[0] - b[0];
      return sign * (x - y) || a[0] - b[0];
    });
  }

  function listed() {
    const layer = own();
    if (!layer) return [];
    return sorted(featvis.state.dead === "hide" ? layer.filters.filter((f) => f[4] !== "dead") : layer.filters);
  }

  // Whether a number is among those that a text names ("3, 10-20 90-"): null for no text, undefined for no numbers.
  function wanted(text) {
    const words = (text || "").split(/[\s,]+/).filter(Boolean);
    const spans = words.map((word) => /^(\d+)(-?)(\d*)$/.exec(word));
    if (!words.length) return null;
    if (spans.some((span) => !span)) return undefined;
    return (n) => spans.some(([, low, to, high]) => Number(low) <= n && n <= Number(high || (to ? Infinity : low)));
  }

  // The filters that a text names; where it is one, its page is opened.
  function open(text) {
    const test = wanted(text);
    const found = test ? own().filters.filter((f) => test(f[0])) : [];
    if (found.length === 1) location.href = `${found[0][0]}.html${featvis.carried()}`;
    return found;
  }

  Object.assign(featvis, { falling, listed, wanted, open });
})(window.featvis);
