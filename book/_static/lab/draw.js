/* The pictures, on canvases. All colours come from lab.css, so dark mode is one place, and
   all heights, so a picture has its place before it is drawn. */

/* An empty canvas: a pen whose unit is a CSS pixel, and inks. */
function sheet(canvas) {
	const { clientWidth: width, clientHeight: height } = canvas;
	const ratio = window.devicePixelRatio;
	[canvas.width, canvas.height] = [width * ratio, height * ratio];
	const style = getComputedStyle(canvas);
	const ink = {};
	for (const name of ["a", "b", "zero", "one", "softZero", "softOne", "text", "grid"])
		ink[name] = style.getPropertyValue(`--lab-${name}`).trim();
	const pen = canvas.getContext("2d");
	pen.scale(ratio, ratio);
	pen.font = `12px ${style.fontFamily}`;
	return { pen, width, height, ink };
}

/* The plane's two classes, the line between them, and some of the training points. */
function drawMap(canvas, { map, points, labels }) {
	const { pen, width, ink } = sheet(canvas);
	const side = Math.sqrt(map.length);
	const picture = new OffscreenCanvas(side, side);
	const pixels = new ImageData(side, side);
	const paint = new Uint32Array(pixels.data.buffer);
	const [zero, one, line] = [ink.softZero, ink.softOne, ink.text].map(packed);
	for (let i = 0; i < map.length; i++) {
		const edge =
			map[i] * map[i + side] < 0 || (map[i] * map[i + 1] < 0 && (i + 1) % side > 0);
		paint[i] = edge ? line : map[i] > 0 ? one : zero;
	}
	picture.getContext("2d").putImageData(pixels, 0, 0);
	pen.drawImage(picture, 0, 0, width, width);

	for (let i = 0; i < labels.length; i += Math.ceil(labels.length / 250)) {
		const [x, y] = [points[2 * i], -points[2 * i + 1]].map(
			(at) => (at / 5.4 + 0.5) * width,
		);
		pen.fillStyle = labels[i] ? ink.one : ink.zero;
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

/* "#rrggbb" as the four bytes of a pixel. */
function packed(hex) {
	const [r, g, b] = [1, 3, 5].map((i) => Number.parseInt(hex.slice(i, i + 2), 16));
	return new Uint32Array(Uint8Array.of(r, g, b, 255).buffer)[0];
}

/* Axes with ticks; returns what turns data into places as well. */
function axes(canvas, { x, y, xTicks = [], yTicks, log, below }) {
	const { pen, width, height, ink } = sheet(canvas);
	const [left, right, top, bottom] = [38, width - 14, 8, height - 20];
	const place = (value, [low, high]) =>
		Math.min(1, Math.max(0, (value - low) / (high - low)));
	const scale = (value) => (log ? Math.log10(Math.max(value, 1e-30)) : value);
	const X = (value) => left + (right - left) * place(value, x);
	const Y = (value) => bottom - (bottom - top) * place(scale(value), y.map(scale));
	pen.fillStyle = ink.text;
	pen.strokeStyle = ink.grid;
	pen.textAlign = "right";
	for (const tick of yTicks) {
		pen.fillText(tick, left - 5, Y(tick) + 4);
		pen.strokeRect(left, Y(tick), right - left, 0);
	}
	pen.textAlign = "center";
	for (const tick of xTicks) pen.fillText(tick, X(tick), bottom + 15);
	pen.textAlign = "right";
	pen.fillText(below, left - 5, bottom + 15);
	pen.textAlign = "center";
	return { pen, ink, X, Y, bottom };
}

function drawLine({ pen, X, Y }, values, first, style, dash) {
	pen.strokeStyle = style;
	pen.lineWidth = 2;
	pen.setLineDash(dash);
	pen.beginPath();
	for (let i = 0; i < values.length; i++) pen.lineTo(X(i + first), Y(values[i]));
	pen.stroke();
}

/* The training loss of run A, a full line, and of run B, a broken one. */
function drawLosses(canvas, runs) {
	const all = runs.flatMap(({ losses }) => losses);
	const low = Math.max(-6, Math.floor(Math.log10(Math.min(0.1, ...all))));
	const high = Math.ceil(Math.log10(Math.max(1, ...all)));
	const { epochs } = runs[0].settings;
	const yTicks = Array.from({ length: high - low + 1 }, (_, i) =>
		Number(`1e${low + i}`),
	);
	const y = [yTicks[0], yTicks.at(-1)];
	const xTicks = [1, Math.round(epochs / 2), epochs];
	const frame = axes(canvas, {
		x: [1, epochs],
		y,
		xTicks,
		yTicks,
		log: true,
		below: "epoch",
	});
	drawLine(frame, runs[0].losses, 1, frame.ink.a, []);
	drawLine(frame, runs[1].losses, 1, frame.ink.b, [6, 4]);
}

/* The singular values of each layer's ΔW, sixteen at most, on a logarithmic axis. */
function drawSpectra(canvas, { spectra }, run) {
	const ticks = { yTicks: [0.01, 0.1, 1, 10], below: "layer" };
	const frame = axes(canvas, { x: [0, 44], y: [0.001, 100], log: true, ...ticks });
	const { pen, ink, X, Y, bottom } = frame;
	for (const [layer, first] of [1, 5, 23, 41].entries()) {
		pen.fillStyle = ink.text;
		pen.fillText(layer + 1, X(first + 1), bottom + 15); // under the first two bars
		pen.fillStyle = ink[run];
		for (const [i, value] of (spectra[layer] ?? []).entries())
			pen.fillRect(X(first + i), Y(value), 0.8 * (X(1) - X(0)), bottom - Y(value));
	}
}

/* All of a run's pictures, and the losses of both runs. */
function drawRun({ id, report }) {
	drawMap(find(`${id}-map`), report);
	drawSpectra(find(`${id}-spectra`), report, id);
	const reports = [panels.a.report, panels.b.report];
	if (reports.every(Boolean)) drawLosses(find("lab-losses"), reports);
}

/* The error of the planted bench, and the line that it cannot cross. */
function drawBench({ report: { errors, bound, settings } }) {
	const { steps } = settings;
	const ticks = { xTicks: [0, steps / 2, steps], yTicks: [0, 0.5, 1], below: "step" };
	const frame = axes(find("bench-errors"), { x: [0, steps], y: [0, 1.2], ...ticks });
	const { pen, ink, X, Y } = frame;
	drawLine(frame, errors, 0, ink.a, []);
	drawLine(frame, Array(steps + 1).fill(bound), 0, ink.b, [6, 4]);
	pen.fillStyle = ink.text;
	pen.textAlign = "right";
	pen.fillText(`Eckart–Young: ${bound.toFixed(3)}`, X(steps), Y(bound) - 6);
}
