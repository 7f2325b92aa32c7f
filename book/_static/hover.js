/* Terms, papers and links to other chapters show their text on hover and focus. The
   texts are loaded when they are first needed; book/_ext/hover.py writes them. */
{
  const root = new URL(document.documentElement.dataset.content_root, location);
  const own = document.currentScript.src;
  let texts, timer, link;

  const note = document.createElement("div");
  note.id = "hover-note";
  note.role = "tooltip";
  note.hidden = true;
  document.body.append(note);

  const load = () => texts ??= new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = new URL("hover-texts.js", own);
    script.onload = () => resolve(window.hoverTexts);
    document.head.append(script);
  });

  const hide = () => {
    clearTimeout(timer);
    note.hidden = true;
    link?.removeAttribute("aria-describedby");
    link = null;
  };

  const show = async (target) => {
    const known = await load();
    const text = known[target.href.replace(root, "")];
    const here = target.href.split("#")[0] === location.href.split("#")[0];
    if (!text || here || !target.matches(":hover, :focus")) return;
    hide();
    link = target;
    link.setAttribute("aria-describedby", note.id);
    note.innerHTML = text;
    note.hidden = false;
    await window.MathJax?.typesetPromise?.([note]);
    const [line, size] = [target.getClientRects()[0], note.getBoundingClientRect()];
    const left = Math.min(line.left, document.documentElement.clientWidth - size.width - 8);
    const below = line.bottom + size.height + 8 < innerHeight;
    note.style.left = `${scrollX + Math.max(left, 8)}px`;
    note.style.top = `${scrollY + (below ? line.bottom + 4 : line.top - size.height - 4)}px`;
  };

  const article = document.querySelector(".bd-article");
  const over = (event) => {
    const target = event.target.closest("a[href]:not(.headerlink)");
    if (!target || event.pointerType === "touch") return;
    clearTimeout(timer);
    if (target !== link) timer = setTimeout(show, event.type === "focusin" ? 0 : 200, target);
  };
  // The pointer may move onto the note, to read or to copy from it.
  const away = () => {
    clearTimeout(timer);
    timer = setTimeout(() => note.matches(":hover") || link?.matches(":focus") || hide(), 300);
  };
  article?.addEventListener("pointerover", over);
  article?.addEventListener("focusin", over);
  article?.addEventListener("pointerout", (event) => event.target.closest("a") && away());
  article?.addEventListener("focusout", away);
  note.addEventListener("pointerleave", away);
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
}
