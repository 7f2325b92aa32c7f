// On paper nothing can be opened: print solutions and hints unfolded. Paper is white.
let folded = [];
let theme = "light";
addEventListener("beforeprint", () => {
  theme = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  folded = [
    ...document.querySelectorAll(".solution details:not([open])"),
    ...document.querySelectorAll("details:not(.hide, [open])"),
  ];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = theme;
  for (const details of folded) details.open = false;
});

// The theme makes what scrolls focusable when the window changes; so when a fold opens.
document.addEventListener("toggle", () => dispatchEvent(new Event("resize")), true);

// What the theme's HTML lacks for screen readers: the side bar is a landmark, and a
// list has list items.
document.getElementById("pst-primary-sidebar")?.setAttribute("role", "navigation");
document.getElementById("pst-primary-sidebar")?.setAttribute("aria-label", "Book");
for (const entry of document.querySelectorAll('[role="doc-biblioentry"]'))
  entry.setAttribute("role", "listitem");
