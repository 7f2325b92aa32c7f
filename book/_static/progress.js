/* Where you are in a long page: the section, and the minutes that are left of it. */
{
  const article = document.querySelector(".bd-article");
  const header = document.querySelector(".bd-header-article");
  const headings = [...(article?.querySelectorAll("section > h2") ?? [])];
  // What is folded is not read; 200 words a minute.
  const words = (node) => node.textContent.split(/\s+/).length;
  const folded = [...(article?.querySelectorAll("details.hide") ?? [])];
  const minutes = article ? (words(article) - folded.reduce((sum, f) => sum + words(f), 0)) / 200 : 0;
  if (header && headings.length && minutes > 5) {
    const place = document.createElement("p");
    place.className = "place";
    place.innerHTML = "<span></span><small></small>";
    header.firstElementChild.firstElementChild.after(place);
    const bar = document.createElement("div");
    bar.className = "place-bar";
    header.append(bar);
    const update = () => {
      const box = article.getBoundingClientRect();
      const part = Math.min(Math.max(-box.top / (box.height - innerHeight), 0), 1);
      const passed = headings.filter((h) => h.getBoundingClientRect().top < innerHeight / 3);
      const title = passed.at(-1) ?? article.querySelector("h1");
      place.firstChild.textContent = title.firstChild.nodeType === 1
        ? title.textContent.replace(/#$/, "") : title.firstChild.textContent;
      place.lastChild.textContent = part < 1 ? `${Math.ceil((1 - part) * minutes)} min left` : "";
      bar.style.transform = `scaleX(${part})`;
      waiting = false;
    };
    let waiting = false;
    addEventListener("scroll", () => {
      if (!waiting) waiting = requestAnimationFrame(update);
    }, { passive: true });
    addEventListener("resize", update);
    update();
  }
}
