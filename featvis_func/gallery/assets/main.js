"use strict";
// Behaviour shared by all pages: display, keyboard shortcuts, clicks and the search form.
((featvis) => {
  const { byId, pageData, follow, page, setState } = featvis;
  // On a filter's page a search opens another page; on the others it filters the contents, and the URL keeps it.
  const keepsSearch = () => pageData().page !== "filter";

  function show() {
    featvis.applyTheme();
    byId("theme").textContent = featvis.isDark() ? "Light" : "Dark";
    page.show();
    featvis.showPins();
    for (const anchor of document.querySelectorAll("a[href]")) featvis.carryState(anchor);
    const { q } = featvis.state;
    if (!q) return;
    for (const anchor of document.querySelectorAll("a[data-keep]")) {
      anchor.setAttribute("href", anchor.getAttribute("href").split("#")[0] + featvis.carriedHash({ q }));
    }
  }

  function goUp() {
    const anchors = document.querySelectorAll("header nav a");
    follow(anchors[anchors.length - 1]);
  }

  function handleEscape(field) {
    if (!field) goUp();
    else field.blur();
    if (!field || field.id !== "q") return;
    field.value = "";
    if (keepsSearch()) setState({ q: "" });
  }

  function handleKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input:not([type=checkbox]), select");
    if (event.key === "Escape") {
      handleEscape(field);
      return;
    }
    if (field && (field.id === "q" || event.key !== "/")) return;
    if (event.key === "/" && byId("q")) {
      byId("q").focus();
      byId("q").select();
    } else if (event.key === "c" && featvis.pins().length) follow(byId("compare"));
    else if (!page.key || !page.key(event)) return;
    event.preventDefault();
  }

  function handleClick(event) {
    const button = event.target.closest("button");
    if (event.target.closest("a.skip")) {
      event.preventDefault();
      byId("main").focus();
    }
    if (!button) return;
    if (button.classList.contains("pin")) featvis.pin(featvis.pinName(button));
    else if (button.id === "theme") setState({ theme: featvis.isDark() ? "light" : "dark" });
    else if (button.id === "unpin" || button.id === "unpin-here") setState({ pins: "" });
    else if (page.click) page.click(button);
  }

  function startSearch(form, field) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      page.search(field.value);
    });
    field.addEventListener("input", () => {
      field.setCustomValidity("");
      if (keepsSearch()) setState({ q: field.value });
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.addEventListener("keydown", handleKey);
    document.addEventListener("click", handleClick);
    window.addEventListener("hashchange", () => {
      featvis.reloadState();
      show();
    });
    window.addEventListener("pageshow", (event) => {
      if (!event.persisted) return;
      featvis.restoreSession();
      show();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    if (byId("search")) startSearch(byId("search"), byId("q"));
    if (page.start) page.start();
    show();
  });

  featvis.show = show;
})(window.featvis);
