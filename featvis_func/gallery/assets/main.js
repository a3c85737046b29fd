"use strict";
// What happens on all pages: what is shown, and what keys, clicks and searches do.
((featvis) => {
  const { at, here, go, page, set } = featvis;
  // A filter's page opens what is sought; on the others the search is a part of what they show.
  const keepsSearch = () => here().page !== "filter";

  function show() {
    featvis.theme();
    at("theme").textContent = featvis.dark() ? "Light" : "Dark";
    page.show();
    featvis.showPins();
    for (const anchor of document.querySelectorAll("a[href]")) featvis.link(anchor);
    const { q } = featvis.state;
    if (!q) return;
    for (const anchor of document.querySelectorAll("a[data-keep]")) {
      anchor.setAttribute("href", anchor.getAttribute("href").split("#")[0] + featvis.carried({ q }));
    }
  }

  function up() {
    const anchors = document.querySelectorAll("header nav a");
    go(anchors[anchors.length - 1]);
  }

  function escape(field) {
    if (!field) up();
    else field.blur();
    if (!field || field.id !== "q") return;
    field.value = "";
    if (keepsSearch()) set({ q: "" });
  }

  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const field = event.target.closest("input:not([type=checkbox]), select");
    if (event.key === "Escape") {
      escape(field);
      return;
    }
    if (field && (field.id === "q" || event.key !== "/")) return;
    if (event.key === "/" && at("q")) {
      at("q").focus();
      at("q").select();
    } else if (event.key === "c" && featvis.pins().length) go(at("compare"));
    else if (!page.key || !page.key(event)) return;
    event.preventDefault();
  }

  function clicks(event) {
    const button = event.target.closest("button");
    if (event.target.closest("a.skip")) {
      event.preventDefault();
      at("main").focus();
    }
    if (!button) return;
    if (button.classList.contains("pin")) featvis.pin(featvis.starred(button));
    else if (button.id === "theme") set({ theme: featvis.dark() ? "light" : "dark" });
    else if (button.id === "unpin" || button.id === "unpin-here") set({ pins: "" });
    else if (page.click) page.click(button);
  }

  function startSearch(form, field) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      page.search(field.value);
    });
    field.addEventListener("input", () => {
      field.setCustomValidity("");
      if (keepsSearch()) set({ q: field.value });
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.addEventListener("keydown", keys);
    document.addEventListener("click", clicks);
    window.addEventListener("hashchange", () => {
      featvis.reread();
      show();
    });
    window.addEventListener("pageshow", (event) => {
      if (!event.persisted) return;
      featvis.recall();
      show();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    if (at("search")) startSearch(at("search"), at("q"));
    if (page.start) page.start();
    show();
  });

  featvis.show = show;
})(window.featvis);
