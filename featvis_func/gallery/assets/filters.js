"use strict";
// The filters of a layer: sorted and filtered as the URL says, and matched by a search text.
((featvis) => {
  const { ownLayer } = featvis;
  const KEYS = { number: (f) => f[0], score: (f) => f[1], converged: (f) => (f[5] < 0 ? null : f[5]) };

  // Unless the URL has an order, scores are sorted descending, and numbers and steps ascending.
  function isDescending() {
    const { sort, order } = featvis.state;
    return order ? order === "falling" : sort === "score";
  }

  // Filters without a value come last in either order.
  function sortFilters(filters) {
    const valueOf = KEYS[featvis.state.sort] || KEYS.number;
    const sign = isDescending() ? -1 : 1;
    return [...filters].sort((a, b) => {
      const [x, y] = [valueOf(a), valueOf(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a[0] - b[0];
      return sign * (x - y) || a[0] - b[0];
    });
  }

  // Dead and flat filters show their initial image; dead=hide in the URL hides both.
  const showsInitialImage = (f) => f[4] === "dead" || f[4] === "flat";

  function listedFilters() {
    const layer = ownLayer();
    if (!layer) return [];
    const hides = featvis.state.dead === "hide";
    return sortFilters(hides ? layer.filters.filter((f) => !showsInitialImage(f)) : layer.filters);
  }

  // Parse numbers and ranges such as "3, 10-20 90-" into a test for a number. Returns null for an empty text and
  // undefined for an invalid one.
  function parseNumbers(text) {
    const terms = (text || "").split(/[\s,]+/).filter(Boolean);
    const ranges = terms.map((term) => /^(\d+)(-?)(\d*)$/.exec(term));
    if (!terms.length) return null;
    if (ranges.some((range) => !range)) return undefined;
    return (n) => ranges.some(([, low, to, high]) => Number(low) <= n && n <= Number(high || (to ? Infinity : low)));
  }

  // Return the filters that match a text; if there is exactly one, open its page.
  function openIfSingle(text) {
    const test = parseNumbers(text);
    const matches = test ? ownLayer().filters.filter((f) => test(f[0])) : [];
    if (matches.length === 1) location.href = `${matches[0][0]}.html${featvis.carriedHash()}`;
    return matches;
  }

  Object.assign(featvis, { isDescending, listedFilters, parseNumbers, openIfSingle });
})(window.featvis);
