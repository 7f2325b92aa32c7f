/* The search finds sections while one types, and a hit opens its section, scrolled to
   the word, which is marked. Sphinx's own search finds pages; front.py drops it. */
{
  const wanted = (words) => new RegExp(
    `(?<![\\p{L}\\p{N}_])(?:${words.map((w) => w.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")).join("|")})[\\p{L}\\p{N}_]*`, "giu");
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
    // To the word that is rarest there: "70b", not the first "memory".
    const marks = [section || article, article].map((part) => [...part.querySelectorAll("mark")])
      .find((some) => some.length) ?? [];
    const word = (mark) => words.find((w) => mark.textContent.toLowerCase().startsWith(w.toLowerCase()));
    const often = (mark) => marks.filter((other) => word(other) === word(mark)).length;
    const first = marks.reduce((best, mark) => best && often(best) <= often(mark) ? best : mark, null);
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

  // Sections that fit what is typed: book/_ext/search.py wrote the texts, which are
  // loaded when somebody searches. A title weighs most, then names in code.
  const own = document.currentScript.src;
  const root = new URL(document.documentElement.dataset.content_root, location);
  const split = (text) => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const stem = (word) => word.length > 3 ? word.replace(/(ies|ing|ed|es|s|e|y)$/, "") : word;
  const stems = (text) => split(text).map(stem);
  let index;
  const load = () => index ??= new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = new URL("sections.js", own);
    script.onload = () => {
      const { synonyms, stop, sections } = window.bookSections;
      const known = new Map();  // stem -> in how many sections it is
      for (const section of sections) {
        section.fields = [section.title, section.names, section.page].map(stems);
        section.counts = new Map();
        for (const word of [...section.fields.flat(), ...stems(section.text)])
          section.counts.set(word, (section.counts.get(word) ?? 0) + 1);
        for (const word of section.counts.keys()) known.set(word, (known.get(word) ?? 0) + 1);
      }
      resolve({ synonyms, stop, sections, known });
    };
    document.head.append(script);
  });

  const find = async (query) => {
    const { synonyms, stop, sections, known } = await load();
    query = query.replace(/\p{L}+['’]t\b/giu, "");  // won't, doesn't: "won" is another word
    const typed = split(query);
    const terms = typed.filter((word) => !stop.includes(word));
    if (!terms.length) return [];
    const whole = query.toLowerCase().split(/\s+/).filter((word) => word && !stop.includes(word));
    const names = whole.filter((word) => word.includes("_"));
    const all = [...known.keys()];
    const variants = terms.map((term) => [term, ...synonyms[stem(term)] ?? []].map((word, i) => {
      const start = stem(word);
      const long = start.length > 2;
      return { words: all.filter((w) => w === start || (long && w.startsWith(start))), weight: i ? 0.6 : 1 };
    }));
    const score = (section) => {
      const parts = variants.map((forms) => Math.max(...forms.map(({ words, weight }) => {
        const here = words.filter((word) => section.counts.has(word));
        if (!here.length) return 0;
        const rare = Math.log(1 + sections.length / Math.max(...words.map((w) => known.get(w))));
        const [title, names, page] = section.fields.map((f) => here.some((word) => f.includes(word)));
        const count = here.reduce((n, word) => n + section.counts.get(word), 0);
        return weight * rare * (6 * title + 4 * names + page + 4 * count / (count + 4));
      })));
      const share = parts.filter(Boolean).length / parts.length;
      const title = section.fields[0].filter((word) => !stop.includes(word));
      const said = title.filter((word) => variants.flat().some(({ words }) => words.includes(word)));
      const named = names.filter((name) => section.names.toLowerCase().includes(name)).length;
      return (1 + 2 * named + said.length / title.length) * share ** 2 * parts.reduce((a, b) => a + b);
    };
    const hits = sections.map((section) => ({ section, score: score(section) }))
      .filter((hit) => hit.score).sort((a, b) => b.score - a.score);
    // Questions and recipe say again what a chapter shows: one of them among the first three.
    const again = hits.filter(({ section }) => /\/(questions|recipe)/.test(section.url)).slice(1);
    const first = hits.filter((hit) => !again.includes(hit)).slice(0, 3);
    return [...first, ...hits.filter((hit) => !first.includes(hit))].slice(0, 12)
      .map((hit) => ({ ...hit, words: whole }));
  };
  window.findSections = find;  // for the tests

  const show = (list, hits, asked) => {
    list.replaceChildren(...hits.map(({ section, words }) => {
      const item = document.createElement("li");
      const link = item.appendChild(document.createElement("a"));
      const address = new URL(section.url, root);
      address.searchParams.set("highlight", words.join(" "));
      link.href = address;
      link.textContent = section.title;
      if (section.page !== section.title)
        link.appendChild(document.createElement("span")).textContent = section.page;
      const text = item.appendChild(document.createElement("p"));
      const start = Math.max(section.text.search(wanted(words)) - 60, 0);
      text.textContent = `${start ? "…" : ""}${section.text.slice(start, start + 170).trim()}…`;
      return item;
    }));
    if (asked && !hits.length) {
      const none = list.appendChild(document.createElement("li"));
      const link = none.appendChild(document.createElement("a"));
      link.href = new URL("book/questions.html", root);
      link.textContent = "Nothing found. Perhaps among the questions?";
    }
  };

  for (const form of document.querySelectorAll("form.bd-search, .bd-article form")) {
    const input = form.querySelector("[name=q]");
    if (!input) continue;
    const here = results && !form.closest("dialog");
    const list = document.createElement("ol");
    list.className = "found";
    list.setAttribute("aria-live", "polite");
    if (here) results.replaceChildren(list);
    else form.after(list);
    input.addEventListener("focus", load);
    input.addEventListener("input", async () => show(list, await find(input.value), input.value.trim()));
    if (here) input.value = new URLSearchParams(location.search).get("q") ?? "";
    if (here && input.value) find(input.value).then((hits) => show(list, hits, input.value));
  }
}
