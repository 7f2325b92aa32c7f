/* Where you are in a long page: the section, and the minutes that are left. */
{
  const article = document.querySelector(".bd-article");
  const header = document.querySelector(".bd-header-article");
  const title = article?.querySelector("h1");
  const headings = [...(article?.querySelectorAll("section > h2") ?? [])];
  // What is folded is not read; 200 words a minute.
  const words = (...nodes) => nodes.reduce((n, { textContent }) => n + textContent.split(/\s+/).length, 0);
  const minutes = article ? (words(article) - words(...article.querySelectorAll("details"))) / 200 : 0;
  if (header && headings.length && minutes > 5) {
    header.insertAdjacentHTML(
      "beforeend", '<div class="place"><p><span></span><span></span></p><div></div></div>');
    const [section, left] = header.querySelectorAll(".place span");
    const [text, bar] = header.querySelector(".place").children;
    let waiting = 0;
    const update = () => {
      waiting = 0;
      const { top, height } = article.getBoundingClientRect();
      const { bottom } = header.getBoundingClientRect();
      const part = Math.min(Math.max((bottom - top) / (height - innerHeight), 0), 1);
      // The claims page hides some; the line would cover the page's own title.
      const passed = headings.filter((h) => h.offsetParent && h.getBoundingClientRect().top < innerHeight / 3).at(-1);
      const begun = !(title?.getBoundingClientRect().bottom > bottom);
      section.textContent = passed?.textContent.replace(/#$/, "") ?? "";
      left.textContent = `${Math.ceil((1 - part) * minutes)} min left`;
      text.hidden = !begun || !passed || part === 1;
      bar.style.transform = `scaleX(${part})`;
    };
    const soon = () => waiting ||= requestAnimationFrame(update);
    addEventListener("scroll", soon, { passive: true });
    addEventListener("resize", soon);
    update();
  }
}
