/* Eight numbers into NF4 and back: what lora.formats computes, as sliders move. The rows
   and the sixteen levels are in the page (front.py), which shows one example without this. */
for (const play of document.querySelectorAll(".nf4-play")) {
  const levels = JSON.parse(play.dataset.levels);
  const rows = [...play.querySelectorAll("tbody tr")];
  const inputs = rows.map((row) => row.querySelector("input"));
  const signed = (value) => value.toFixed(2).replace("-", "−");

  const nf4 = (values) => {
    const scale = Math.max(...values.map(Math.abs));
    const near = (x) => levels.reduce((best, level, i) =>
      Math.abs(level - x) < Math.abs(levels[best] - x) ? i : best, 0);
    const codes = values.map((value) => near(scale ? value / scale : 0));
    return { scale, codes, back: codes.map((code) => levels[code] * scale) };
  };

  const show = () => {
    const values = inputs.map((input) => Number(input.value));
    const { scale, codes, back } = nf4(values);
    rows.forEach((row, i) => {
      const cells = [values[i], codes[i], back[i], back[i] - values[i]];
      row.querySelectorAll("td.number").forEach((cell, j) => {
        cell.textContent = j === 1 ? codes[i].toString(2).padStart(4, "0") : signed(cells[j]);
      });
      row.classList.toggle("largest", Math.abs(values[i]) === scale);
      inputs[i].setAttribute("aria-valuetext", `${signed(values[i])}, comes back as ${signed(back[i])}`);
    });
    const size = (list) => Math.hypot(...list);
    const error = size(values.map((value, i) => value - back[i])) / (size(values) || 1);
    play.querySelector("output").textContent =
      `Scale ${signed(scale)}, the largest of the eight. What comes back is off by ${(100 * error).toFixed(1)}%.`;
  };
  for (const input of inputs) {
    input.hidden = false;
    input.addEventListener("input", show);
  }
  play.nf4 = nf4;  // for the tests
  show();
}
