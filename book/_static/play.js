/* Things to play with. The page (book/_ext/play.py) holds of each one example, made by the
   package, which stands without this script; this moves it. What a toy computes hangs on
   its element, for the tests. */
const signed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
const plus = (value) => (value < 0 ? "" : "+") + signed(value);
const alive = (play) => {
  for (const part of play.querySelectorAll("[hidden]")) part.hidden = false;
};

/* Eight numbers into NF4 and back: what lora.formats computes. */
for (const play of document.querySelectorAll(".nf4-play")) {
  const levels = JSON.parse(play.dataset.levels);
  const rows = [...play.querySelectorAll("tbody tr")];
  const inputs = rows.map((row) => row.querySelector("input"));

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
  alive(play);
  for (const input of inputs) input.addEventListener("input", show);
  play.nf4 = nf4;
  show();
}

/* An update merged into a weight: added in float32, then rounded to the weight's format. */
for (const play of document.querySelectorAll(".merge-play")) {
  const formats = { float32: [24, -126], bfloat16: [8, -126], float16: [11, -14] };
  const weight = Number(play.dataset.weight);
  const input = play.querySelector("input");

  /* To so many significant bits, a tie to the even neighbour: adding 1.5 · 2^52 units
     leaves no room for a fraction of one. Below the lowest exponent bits are fewer. */
  const rounded = (x, format) => {
    const [bits, lowest] = formats[format];
    const exponent = Math.max(Math.floor(Math.log2(Math.abs(x))), lowest);
    const shift = 1.5 * 2 ** (52 + exponent + 1 - bits);
    return x + shift - shift;
  };
  const merge = (W, update, format) =>
    rounded(rounded(W + rounded(update, "float32"), "float32"), format);

  const show = () => {
    const update = Number((10 ** input.value).toPrecision(2));
    const text = update < 1e-4 ? `${update.toExponential(1).replace("e-", " · 10^−")}` : String(update);
    const [becomes, kept] = [...play.querySelectorAll("tbody tr")]
      .map((row) => [...row.querySelectorAll(".number")]);
    const said = Object.keys(formats).map((format, i) => {
      const merged = merge(weight, update, format);
      const share = `${Math.round((100 * (merged - weight)) / update)}%`;
      becomes[i].textContent = merged.toFixed(7);
      kept[i].textContent = share;
      kept[i].classList.toggle("lost", merged === weight);
      return `${format} keeps ${share}`;
    });
    play.querySelector("b").textContent = text;
    play.querySelector("th span").textContent = text;
    input.setAttribute("aria-valuetext", `${update}: ${said.join(", ")}`);
  };
  alive(play);
  input.addEventListener("input", show);
  play.merge = merge;
  show();
}

/* Seeds one by one: the mean of the first n differences and its 95% interval. */
for (const play of document.querySelectorAll(".seeds-play")) {
  const { runs, t, top, bottom, high } = JSON.parse(play.dataset.numbers);
  const choice = play.querySelector("select");
  const seeds = [...play.querySelectorAll("svg g")];
  let order = seeds.map((_, i) => i);
  let n = 1;

  /* lora.study.evidence.interval; t holds Student's quantiles for 1, 2, … degrees. */
  const interval = (values) => {
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const squares = values.reduce((sum, x) => sum + (x - mean) ** 2, 0);
    const half = t[values.length - 2] * Math.sqrt(squares / (values.length - 1) / values.length);
    return [mean, mean - half, mean + half];
  };

  const y = (points) => (high * (top - Math.min(top, Math.max(bottom, points)))) / (top - bottom);
  const set = (mark, values) => {
    for (const [name, value] of Object.entries(values)) mark.setAttribute(name, value);
  };
  const show = () => {
    const values = order.map((i) => runs[choice.value][i]);
    seeds.forEach((seed, i) => {
      seed.style.display = i < n ? "" : "none";
      set(seed.querySelector("circle"), { cy: y(values[i]) });
      if (!i) return;
      const [mean, low, upper] = interval(values.slice(0, i + 1));
      const kind = low > 0 || upper < 0 ? "apart" : "";
      set(seed.querySelector("line"), { y1: y(low), y2: y(upper), class: kind });
      set(seed.querySelector("rect"), { y: y(mean) });
    });
    let said = `${plus(values[0])} points. One value has no interval.`;
    if (n > 1) {
      const [mean, low, upper] = interval(values.slice(0, n));
      const verdict = low > 0 ? "Ahead of full fine-tuning?"
        : upper < 0 ? "Behind full fine-tuning?" : "No difference is shown.";
      said = `${plus(mean)} [${plus(low)}, ${plus(upper)}] points. ${verdict}`;
    }
    play.querySelector("output").textContent =
      `${n} seed${n > 1 ? "s" : ""}, ${choice.value} minus full: ${said}`;
    for (const button of play.querySelectorAll("button"))
      button.disabled = n === order.length && button.dataset.add > 0;
  };
  const shuffle = () => {
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
  };
  alive(play);
  choice.addEventListener("input", show);
  for (const button of play.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const more = Number(button.dataset.add);
      if (!more) shuffle();
      n = more ? Math.min(order.length, n + more) : 1;
      show();
    });
  addEventListener("beforeprint", () => {
    n = order.length;
    show();
  });
  play.interval = interval;
  show();
}

/* What a search finds with a part of an adapter's update. */
for (const play of document.querySelectorAll(".dial-play")) {
  const { stops, among, questions } = JSON.parse(play.dataset.numbers);
  const [choice, input, list] = ["select", "input", "ol"].map((tag) => play.querySelector(tag));
  const still = play.querySelector(".table-frame");

  const show = () => {
    const { answer, functions, cosines, places } = questions[choice.selectedIndex];
    const scores = cosines[input.value];
    const order = functions.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
    const right = functions.findIndex(([name]) => name === answer);
    const shown = order.slice(0, 6);
    const place = places[input.value];
    if (!shown.includes(right)) shown.push(right);
    list.replaceChildren(...shown.map((i, at) => {
      const [name, text] = functions[i];
      const line = document.createElement("li");
      line.value = i === right ? place : at + 1;
      line.classList.toggle("right", i === right);
      const [bold, small] = ["b", "span"].map((tag) => document.createElement(tag));
      bold.textContent = name.split(".").at(-1);
      small.textContent = ` ${text}`;
      line.append(`${line.value}. `, bold, i === right ? " ✓" : "", small);
      return line;
    }));
    const stop = stops[input.value];
    play.querySelector("label b").textContent = stop;
    input.setAttribute("aria-valuetext", `${stop}: ${answer} at place ${place}`);
    play.querySelector("output").textContent =
      `Dial ${stop}: ${answer} is at place ${place} of ${among.toLocaleString("en")}.`;
  };
  alive(play);
  still.hidden = true;
  for (const control of [choice, input]) control.addEventListener("input", show);
  show();
}
