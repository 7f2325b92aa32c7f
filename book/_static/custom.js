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

// In a margin fine print is open, and raised to what it is about: the paragraph before
// it, or the end of a figure. Unless it would cover something there.
addEventListener("load", () => {
  if (!matchMedia("screen and (min-width: 1600px)").matches) return;
  const there = [...document.querySelectorAll("figure:not(details *) > figcaption")];
  const top = (element) => element.getBoundingClientRect().top;
  for (const note of document.querySelectorAll("details.note:not(details *, :has(table))")) {
    const before = note.previousElementSibling;
    note.open = true;
    const up = before?.matches("p, blockquote") ? top(note) - top(before) : note.offsetHeight;
    note.open = [-up, 0].some((margin) => {
      note.style.marginTop = margin ? `${margin}px` : "";
      const own = note.getBoundingClientRect();
      return there.every((other) => {
        const box = other.getBoundingClientRect();
        return box.bottom < own.top || own.bottom < box.top;
      });
    });
    there.push(note);
  }
});

// What the theme's HTML lacks for screen readers: the side bar is a landmark, and a
// list has list items.
document.getElementById("pst-primary-sidebar")?.setAttribute("role", "navigation");
document.getElementById("pst-primary-sidebar")?.setAttribute("aria-label", "Book");
for (const entry of document.querySelectorAll('[role="doc-biblioentry"]'))
  entry.setAttribute("role", "listitem");

// A paragraph that is a link to a question of the laboratory opens it in its place.
for (const link of document.querySelectorAll('.bd-article p > a:only-child[href*="lab.html#"]')) {
  const line = link.parentElement;
  if (line.textContent.trim() !== link.textContent) continue;
  const frame = Object.assign(document.createElement("iframe"), { className: "lab-here", title: link.textContent });
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Open it here", ariaExpanded: "false" });
  line.classList.add("lab-try");
  line.append(" ", button);
  button.addEventListener("click", () => {
    const open = frame.isConnected;
    if (open) frame.remove();
    else {
      frame.src = link.href;
      line.after(frame);
    }
    button.textContent = open ? "Open it here" : "Close it";
    button.ariaExpanded = String(!open);
  });
}

// On a phone the contents are a dialog, which stays open over the section one chose.
for (const contents of document.querySelectorAll("dialog[id$=sidebar-modal]"))
  contents.addEventListener("click", (event) => event.target.closest("a") && contents.close());
