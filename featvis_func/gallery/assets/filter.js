"use strict";
// A filter's page: its neighbours in the order that the URL says, the film of its run, what can be copied.
((featvis) => {
  const { at, here, go, listed } = featvis;

  function show() {
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

  // --- the images over the run lie in rows on one sheet, which moves behind a frame ---------------------------------

  function startFilm(figure) {
    const [columns, rows] = [Number(figure.dataset.columns), Number(figure.dataset.rows)];
    const range = figure.querySelector("input");
    const frame = figure.querySelector(".frame");
    const sheet = frame.querySelector("img");
    const [width, height] = [sheet.getAttribute("width") / columns, sheet.getAttribute("height") / rows];
    frame.style.aspectRatio = `${width} / ${height}`;
    sheet.style.width = `${columns * 100}%`;
    const steps = range.dataset.steps.split(" ");
    const turn = () => {
      const i = Number(range.value);
      sheet.style.left = `${-(i % columns) * 100}%`;
      sheet.style.top = `${-Math.floor(i / columns) * 100}%`;
      figure.querySelector("output").textContent = steps[i];
      range.setAttribute("aria-valuetext", `after step ${steps[i]}`);
    };
    range.addEventListener("input", turn);
    turn();
  }

  // --- fingers and keys lead to the neighbours ----------------------------------------------------------------------

  function swipe(views) {
    let begun = null;
    views.addEventListener("touchstart", (event) => {
      const zoomed = window.visualViewport && visualViewport.scale > 1.01; // then it moves what is seen
      const moves = event.touches.length === 1 && event.target.tagName !== "INPUT" && !zoomed;
      begun = moves ? event.touches[0] : null;
    }, { passive: true });
    views.addEventListener("touchend", (event) => {
      if (!begun) return;
      const end = event.changedTouches[0];
      const [x, y] = [end.clientX - begun.clientX, end.clientY - begun.clientY];
      if (Math.abs(x) > 50 && Math.abs(x) > 2 * Math.abs(y)) go(at(x > 0 ? "before" : "after"));
    }, { passive: true });
  }

  function key(event) {
    if (event.key === "p") featvis.pin(`${here().folder}:${here().number}`);
    else if (event.key === "ArrowLeft") go(at("before"));
    else if (event.key === "ArrowRight") go(at("after"));
    else return false;
    return true;
  }

  function search(text) {
    if (featvis.open(text).length === 1) return;
    at("q").setCustomValidity(`This layer has no filter ${text}`);
    at("q").reportValidity();
  }

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  function click(button) {
    if (button.classList.contains("copy")) copy(button);
  }

  function start() {
    document.querySelectorAll(".film").forEach(startFilm);
    swipe(document.querySelector(".views"));
  }

  featvis.page = { show, start, search, key, click };
})(window.featvis);
