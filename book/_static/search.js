/* A search hit opens its section, scrolled to the word, which is marked. Sphinx's own
   marking cannot do that: it takes the lack of `Search` for a sign that this is not the
   search page, and the theme loads `Search` on every page. This script comes first, so
   that Sphinx finds nothing left to mark. */
{
  const wanted = (words) => new RegExp(
    `(?<![\\p{L}\\p{N}_])(?:${words.map((w) => w.replace(/[^\p{L}\p{N}_]/gu, "\\$&")).join("|")})[\\p{L}\\p{N}_]*`, "giu");
  const article = document.querySelector(".bd-article");
  const results = document.getElementById("search-results");

  // On a page: mark the words of `?highlight=`, and go to the first one.
  const url = new URL(location);
  const words = (url.searchParams.get("highlight") ?? "").split(/\s+/).filter(Boolean);
  url.searchParams.delete("highlight");
  localStorage.removeItem("sphinx_highlight_terms");
  if (words.length && article && !results) {
    history.replaceState({}, "", url);
    const pattern = wanted(words);
    const skip = ".math, mjx-container, script, style, .headerlink, button";
    const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
    const found = [];
    while (texts.nextNode())
      if (!texts.currentNode.parentElement.closest(skip)
          && texts.currentNode.data.match(pattern)) found.push(texts.currentNode);
    for (const text of found) {
      const parts = [];
      let end = 0;
      for (const match of text.data.matchAll(pattern)) {
        const mark = document.createElement("mark");
        mark.textContent = match[0];
        parts.push(text.data.slice(end, match.index), mark);
        end = match.index + match[0].length;
      }
      text.replaceWith(...parts, text.data.slice(end));
    }
    const section = url.hash && document.getElementById(decodeURIComponent(url.hash.slice(1)));
    const first = (section || article).querySelector("mark") ?? article.querySelector("mark");
    for (let fold = first; fold; fold = fold.parentElement) if (fold.matches("details")) fold.open = true;
    const go = () => first?.scrollIntoView({ block: "center", behavior: "instant" });
    // Formulas and pictures move the text; a reader's own scrolling ends it.
    const moved = new AbortController();
    for (const event of ["wheel", "touchstart", "keydown", "pointerdown"])
      addEventListener(event, () => moved.abort(), { signal: moved.signal });
    const again = () => moved.signal.aborted || go();
    go();
    addEventListener("load", () => {
      requestAnimationFrame(again);
      window.MathJax?.startup?.promise?.then(again);
    });
    addEventListener("keydown", (event) => {
      if (event.key === "Escape")
        for (const mark of article.querySelectorAll("mark")) mark.replaceWith(...mark.childNodes);
    });
  }

  // On the search page: the sections of a page in which the words are, with the text.
  const sections = (html, keywords, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const tag of page.querySelectorAll(".headerlink, script, style")) tag.remove();
    const all = page.querySelector(".bd-article").textContent.toLowerCase();
    // The words as they were typed, where they are in the page; else their stems.
    const typed = splitQuery(new URLSearchParams(location.search).get("q").toLowerCase());
    const words = typed.every((w) => all.includes(w)) ? typed : [...keywords];
    const pattern = wanted(words);
    const hits = [];
    for (const section of page.querySelectorAll(".bd-article section[id]")) {
      const own = section.cloneNode(true);
      for (const inner of own.querySelectorAll("section")) inner.remove();
      // All words are worth more than one; the title more than the text, that more than a fold.
      const found = (node) => [...(node?.textContent ?? "").matchAll(pattern)].map((m) => m[0].toLowerCase());
      const all = found(own);
      const different = words.filter((word) => all.some((match) => match.startsWith(word)));
      const title = found(own.querySelector("h1, h2, h3")).length;
      for (const fold of own.querySelectorAll("details")) if (found(own).length > found(fold).length) fold.remove();
      const text = own.textContent.replace(/\s+/g, " ");
      const score = 100 * different.length + 10 * title + Math.min(found(own).length, 9);
      if (all.length) hits.push({ section, text, score });
    }
    hits.sort((a, b) => b.score - a.score);
    const list = document.createElement("ul");
    queueMicrotask(() => {  // Sphinx puts the list into the result now
      const link = list.parentElement.querySelector("a");
      const address = new URL(link.href);
      address.searchParams.set("highlight", words.join(" "));
      address.hash = anchor || (hits.length ? hits[0].section.id : "");
      link.href = address;
      for (const { section, text } of anchor ? [] : hits.slice(0, 3)) {
        const item = list.appendChild(document.createElement("li"));
        const to = item.appendChild(document.createElement("a"));
        address.hash = section.id;
        to.href = address;
        to.textContent = section.querySelector("h1, h2, h3").textContent;
        const start = Math.max(text.search(pattern) - 80, 0);
        const context = item.appendChild(document.createElement("p"));
        context.className = "context";
        context.textContent = `${start ? "…" : ""}${text.slice(start, start + 200).trim()}…`;
        _highlightText(context, words[0], "highlighted");
      }
    });
    return list;
  };
  if (results) addEventListener("DOMContentLoaded", () => Search.makeSearchSummary = sections);
}
