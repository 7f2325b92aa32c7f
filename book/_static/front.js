// The landing page's picture: a slider turns the rank. It moves once by itself.
const dial = document.getElementById("rank-dial");
if (dial) {
  const [input, b, a, count] = ["input", ".b", ".a", ".count"].map((s) => dial.querySelector(s));
  const ranks = input.dataset.ranks.split(" ").map(Number);
  const side = Number(input.dataset.side);
  const middle = { x: +b.getAttribute("x") + b.getAttribute("width") / 2, y: side / 2 + 1 };
  const show = () => {
    const rank = ranks[input.value];
    const [trained, frozen] = [2 * side * rank, side * side];
    const share = `${(100 * trained / frozen).toFixed(1)}%`;
    b.setAttribute("width", rank);
    b.setAttribute("x", middle.x - rank / 2);
    a.setAttribute("height", rank);
    a.setAttribute("y", middle.y - rank / 2);
    const [r, n, s] = count.querySelectorAll("b");
    [r.textContent, n.textContent, s.textContent] = [rank, trained.toLocaleString("en"), share];
    input.setAttribute("aria-valuetext", `rank ${rank}: ${n.textContent} numbers, ${share} of W`);
  };
  input.closest("label").hidden = false;
  input.addEventListener("input", show);
  show();
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    const way = [3, 2, 1, 0, 1, 2, 3];
    const timer = setInterval(() => {
      if (document.activeElement === input || !way.length) return clearInterval(timer);
      input.value = way.shift();
      show();
    }, 450);
    input.addEventListener("pointerdown", () => clearInterval(timer));
  }
}

// The claims page: links choose what the table shows, and stand in the address.
const filters = document.querySelector("nav.filters");
if (filters) {
  const rows = [...document.querySelectorAll("table.claims tbody tr")];
  const links = [...filters.querySelectorAll("a")];
  const known = (name, value) => links.some((a) => a.dataset[name] === value);
  const chosen = () => {
    const query = new URLSearchParams(location.search);
    const [verdict, part] = ["verdict", "part"].map((name) =>
      known(name, query.get(name)) ? query.get(name) : "all");
    return { verdict, part };
  };
  const show = () => {
    const now = chosen();
    for (const row of rows)
      row.hidden = !(
        (now.verdict === "all" || row.classList.contains(now.verdict)) &&
        (now.part === "all" || row.classList.contains(`part-${now.part}`))
      );
    for (const table of document.querySelectorAll("table.claims"))
      table.closest("section").hidden = !table.querySelector("tbody tr:not([hidden])");
    for (const link of links) {
      const [[name, value]] = Object.entries(link.dataset);
      const query = new URLSearchParams(location.search);
      query.set(name, value);
      link.href = `?${query}`;
      if (now[name] === value) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    const shown = rows.filter((row) => !row.hidden).length;
    filters.querySelector("[role=status]").textContent = `${shown} of ${rows.length} claims`;
  };
  filters.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.pushState(null, "", link.href);
    show();
  });
  addEventListener("popstate", show);
  filters.hidden = false;
  show();
  // A link to one claim shows it, whatever the filter.
  const target = location.hash && document.querySelector(`tr${location.hash}`);
  if (target?.hidden) {
    history.replaceState(null, "", location.pathname + location.hash);
    show();
    target.scrollIntoView();
  }
}
