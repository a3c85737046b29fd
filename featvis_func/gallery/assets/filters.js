"use strict";
// The filters of a layer: sorted and filtered as the URL says, and matched by a search text.
((featvis) => {
  const { ownLayer } = featvis;
  const KEYS = { number: (f) => f[0], score: (f) => f[1], converged: (f) => (f[5] < 0 ? null : f[5]) };
  // Sort keys of the user's columns are their names behind this prefix.
  const COLUMN = "column:";

  const sortColumn = () => {
    const { sort = "" } = featvis.state;
    return sort.startsWith(COLUMN) && featvis.columnsOf(ownLayer()).find((c) => COLUMN + c.name === sort);
  };

  // The text of a filter in the column that the grid is sorted by.
  const indices = new Map();

  function indexOf(filter) {
    if (!indices.size) ownLayer().filters.forEach((f, i) => indices.set(f, i));
    return indices.get(filter);
  }

  const collator = new Intl.Collator("en", { numeric: true });
  const compare = (x, y) => (typeof x === "string" ? collator.compare(x, y) : x - y);

  // Unless the URL has an order, scores are sorted descending, and numbers and steps ascending.
  function isDescending() {
    const { sort, order } = featvis.state;
    return order ? order === "falling" : sort === "score";
  }

  // Filters without a value come last in either order.
  function sortFilters(filters) {
    const column = sortColumn();
    const valueOf = column ? (f) => column.values[indexOf(f)] : KEYS[featvis.state.sort] || KEYS.number;
    const sign = isDescending() ? -1 : 1;
    return [...filters].sort((a, b) => {
      const [x, y] = [valueOf(a), valueOf(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a[0] - b[0];
      return sign * compare(x, y) || a[0] - b[0];
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

  const hasNames = () => ownLayer().filters.some(featvis.nameOf);
  const fold = (text) => text.normalize("NFKC").toLowerCase();

  // Parse a search into a test for a filter: numbers and ranges; or, if the filters have names, words that the name
  // contains, or a part of it in quotes. Returns null for an empty text and undefined for an invalid one.
  function parseSearch(text) {
    const test = parseNumbers(text);
    if (test === null) return null;
    const byNumber = test && ((f) => test(f[0]));
    if (!hasNames() || (byNumber && ownLayer().filters.some(byNumber))) return byNumber;
    const quoted = /^\s*"([^]+)"\s*$/.exec(text);
    const words = quoted ? [fold(quoted[1])] : fold(text).split(/\s+/).filter(Boolean);
    return (f) => {
      const name = fold(featvis.nameOf(f));
      return words.every((word) => name.includes(word));
    };
  }

  // Return the filters that match a text; if there is exactly one, open its page.
  function openIfSingle(text) {
    const test = parseSearch(text);
    const matches = test ? ownLayer().filters.filter(test) : [];
    if (matches.length === 1) location.href = `${matches[0][0]}.html${featvis.carriedHash()}`;
    return matches;
  }

  Object.assign(featvis, { COLUMN, sortColumn, indexOf, isDescending, listedFilters, parseSearch, openIfSingle });
})(window.featvis);
