/* A figure of several columns, one a rank, becomes a picture with a slider.
   The figure itself stays on paper, and wherever this script does not run. Its columns
   are of equal width; its alternative text names them: "... ranks 0, 1, 2 and 128. ..." */
for (const image of document.querySelectorAll(".tag_rank-slider .cell_output img")) {
  const ranks = image.alt.match(/ranks ([\d, and]+)\./)[1].match(/\d+/g);
  const viewer = document.createElement("figure");
  viewer.className = "rank-slider";
  viewer.innerHTML = `
    <div class="window"><img alt="" src="${image.src}"></div>
    <label>rank k = <output></output>
      <input type="range" min="0" max="${ranks.length - 1}" value="2"></label>`;
  const [picture, output, input] = ["img", "output", "input"].map((tag) => viewer.querySelector(tag));
  picture.style.width = `${100 * ranks.length}%`;
  const show = () => {
    output.textContent = ranks[input.value];
    input.setAttribute("aria-valuetext", `rank ${ranks[input.value]}`);
    picture.style.transform = `translateX(${-100 * input.value / ranks.length}%)`;
  };
  input.addEventListener("input", show);
  show();
  image.classList.add("rank-slider-still");
  image.before(viewer);
}
