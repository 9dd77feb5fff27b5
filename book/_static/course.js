// What the pages need beyond their theme: print, keyboards, and one element that it takes for given.

// Closed boxes are open on paper.
const forPaper = (on) =>
  document.querySelectorAll("details").forEach((box) => {
    if (on && !box.open) { box.open = true; box.dataset.closed = ""; }
    if (!on && "closed" in box.dataset) { box.open = false; delete box.dataset.closed; }
  });
window.addEventListener("beforeprint", () => forPaper(true));
window.addEventListener("afterprint", () => forPaper(false));

// Boxes that scroll can be reached, and scrolled, from a keyboard.
const BOXES = "pre, table, .math, dt.sig";
const reachable = () =>
  document.querySelectorAll(BOXES.split(", ").map((s) => `.bd-article ${s}`).join()).forEach((box) => {
    const scrolls = box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX === "auto";
    if (scrolls) box.setAttribute("tabindex", "0");
    else box.removeAttribute("tabindex");
  });

document.addEventListener("DOMContentLoaded", () => {
  // The theme hides the contents beside notes in the margin, also on pages that have no contents.
  if (!document.querySelector("div.bd-sidebar-secondary")) {
    const none = document.createElement("div");
    none.className = "bd-sidebar-secondary";
    none.hidden = true;
    document.body.append(none);
  }
  // Widths change with the window, an opened box and an equation that was set.
  new ResizeObserver(reachable).observe(document.querySelector("main"));
});
