/* The pictures, on canvases. All colours come from lab.css, so dark mode is one place. */

/* An empty canvas as wide as its frame: a pen whose unit is a CSS pixel, and the width. */
function sheet(canvas, height = canvas.clientWidth) {
  const [width, ratio] = [canvas.clientWidth, window.devicePixelRatio];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `12px ${getComputedStyle(canvas).fontFamily}`;
  return { pen, width, height };
}

function colour(canvas, name) {
  return getComputedStyle(canvas).getPropertyValue(`--lab-${name}`).trim();
}

/* The plane's two classes, the line between them, and some of the training points. */
function drawMap(canvas, { map, points, labels }) {
  const { pen, width } = sheet(canvas);
  const [side, fine] = [Math.sqrt(map.length), 200];
  const values = finer(map, side, fine);
  const pixels = new ImageData(fine, fine);
  const paint = ["zero-soft", "one-soft", "text"].map((name) => rgb(colour(canvas, name)));
  for (let i = 0; i < values.length; i++) {
    const edge = [1, fine].some((step) => values[i] * values[i + step] < 0) && i % fine < fine - 1;
    pixels.data.set(paint[edge ? 2 : Number(values[i] > 0)], 4 * i);
  }
  const picture = new OffscreenCanvas(fine, fine);
  picture.getContext("2d").putImageData(pixels, 0, 0);
  pen.drawImage(picture, 0, 0, width, width);

  for (let i = 0; i < labels.length; i += Math.ceil(labels.length / 250)) {
    const [x, y] = [points[2 * i], -points[2 * i + 1]].map((at) => (at / 5.4 + 0.5) * width);
    pen.fillStyle = colour(canvas, labels[i] ? "one" : "zero");
    pen.beginPath();
    if (labels[i]) {
      pen.moveTo(x, y - 3);
      pen.lineTo(x + 3, y + 2);
      pen.lineTo(x - 3, y + 2);
    } else {
      pen.arc(x, y, 2, 0, 2 * Math.PI);
    }
    pen.fill();
  }
}

/* Values on a finer grid, with straight lines between the coarse ones. */
function finer(values, side, fine) {
  const result = new Float32Array(fine * fine);
  for (let i = 0; i < result.length; i++) {
    const [x, y] = [i % fine, Math.floor(i / fine)].map((n) => (n * (side - 1)) / (fine - 1));
    const [left, top] = [x, y].map((n) => Math.min(Math.floor(n), side - 2));
    const [u, v, at] = [x - left, y - top, top * side + left];
    const upper = (1 - u) * values[at] + u * values[at + 1];
    const lower = (1 - u) * values[at + side] + u * values[at + side + 1];
    result[i] = (1 - v) * upper + v * lower;
  }
  return result;
}

function rgb(hex) {
  return [1, 3, 5].map((i) => Number.parseInt(hex.slice(i, i + 2), 16)).concat(255);
}

/* Axes with ticks; returns the pen and what turns data into places. */
function axes(canvas, height, { x, y, xTicks = [], yTicks, log, title, below }) {
  const { pen, width } = sheet(canvas, height);
  const [left, right, top, bottom] = [38, width - 6, 24, height - 34];
  const inner = (share) => Math.min(1, Math.max(0, share));
  const X = (value) => left + (right - left) * inner((value - x[0]) / (x[1] - x[0]));
  const scaled = (value) => (log ? Math.log10(Math.max(value, 1e-30)) : value);
  const Y = (value) =>
    bottom - (bottom - top) * inner((scaled(value) - scaled(y[0])) / (scaled(y[1]) - scaled(y[0])));
  pen.fillStyle = colour(canvas, "text");
  pen.strokeStyle = colour(canvas, "grid");
  pen.fillText(title, 0, 12);
  pen.textAlign = "right";
  for (const tick of yTicks) {
    pen.fillText(tick, left - 5, Y(tick) + 4);
    pen.strokeRect(left, Y(tick), right - left, 0);
  }
  pen.textAlign = "center";
  for (const tick of xTicks) pen.fillText(tick, X(tick), bottom + 15);
  pen.fillText(below, (left + right) / 2, height - 4);
  return { pen, X, Y, bottom };
}

function drawLine(pen, X, Y, values, first, style, dash) {
  pen.strokeStyle = style;
  pen.lineWidth = 2;
  pen.setLineDash(dash);
  pen.beginPath();
  for (let i = 0; i < values.length; i++) pen.lineTo(X(i + first), Y(values[i]));
  pen.stroke();
  pen.setLineDash([]);
}

/* The training loss of run A, a full line, and of run B, a broken one. */
function drawLosses(canvas, runs) {
  const all = runs.flatMap(({ losses }) => losses);
  const [least, most] = [Math.min(0.1, ...all), Math.max(1, ...all)].map(Math.log10);
  const [low, high] = [Math.max(-6, Math.floor(least)), Math.ceil(most)];
  const { epochs } = runs[0].settings;
  const { pen, X, Y } = axes(canvas, 190, {
    x: [1, epochs],
    y: [10 ** low, 10 ** high],
    xTicks: [1, Math.round(epochs / 2), epochs],
    yTicks: Array.from({ length: high - low + 1 }, (_, i) => Number(`1e${low + i}`)),
    log: true,
    title: "Training loss (A: full line, B: broken)",
    below: "epoch",
  });
  for (const [i, { losses }] of runs.entries())
    drawLine(pen, X, Y, losses, 1, colour(canvas, ["zero", "one"][i]), [[], [6, 4]][i]);
}

/* The singular values of each layer's ΔW, sixteen at most, on a logarithmic axis. */
function drawSpectra(canvas, { spectra }) {
  const slots = spectra.length ? spectra.map((values) => values.length) : [2, 16, 16, 2];
  const gap = 2;
  const sum = slots.reduce((a, b) => a + b + gap, 0);
  const { pen, X, Y, bottom } = axes(canvas, 170, {
    x: [0, sum],
    y: [0.001, 100],
    yTicks: [0.01, 0.1, 1, 10],
    log: true,
    title: "Singular values of ΔW",
    below: "layer",
  });
  let from = gap / 2;
  for (const [layer, slot] of slots.entries()) {
    pen.fillStyle = colour(canvas, "text");
    pen.fillText(layer + 1, X(from + slot / 2), bottom + 15);
    pen.fillStyle = colour(canvas, "zero");
    const width = X(1) - X(0);
    for (const [i, value] of (spectra[layer] ?? []).entries())
      pen.fillRect(X(from + i) + width * 0.1, Y(value), width * 0.8, bottom - Y(value));
    from += slot + gap;
  }
}

/* All of a run's pictures, and the losses of both runs. */
function drawRun({ id, report }) {
  drawMap(find(`${id}-map`), report);
  drawSpectra(find(`${id}-spectra`), report);
  const reports = [panels.a.report, panels.b.report];
  if (reports.every(Boolean)) drawLosses(find("lab-losses"), reports);
}

/* The error of the planted bench, and the line that it cannot cross. */
function drawBench({ report: { errors, bound, settings } }) {
  const { steps } = settings;
  const canvas = find("bench-errors");
  const { pen, X, Y } = axes(canvas, 220, {
    x: [0, steps],
    y: [0, 1.2],
    xTicks: [0, steps / 2, steps],
    yTicks: [0, 0.25, 0.5, 0.75, 1],
    title: "Relative squared error (broken: bound)",
    below: "step",
  });
  const line = Array(steps + 1).fill(bound);
  drawLine(pen, X, Y, line, 0, colour(canvas, "one"), [6, 4]);
  drawLine(pen, X, Y, errors, 0, colour(canvas, "zero"), []);
  pen.fillStyle = colour(canvas, "text");
  pen.textAlign = "right";
  pen.fillText(`Eckart–Young: ${bound.toFixed(3)}`, X(steps), Y(bound) - 6);
}
