/* The laboratory's dials. A dial is a control in lab.md, named run.setting; its value is
   the state of the page, and goes into the address. A worker for each run computes; what
   the workers report is drawn. */

/* The worker's program is the source of these, as they stand in the other files. A page
   opened from disk may not start a worker from a file, but from its own text it may. */
const ENGINE = [
	...[
		Matrix,
		timesTransposed,
		fourByTwo,
		times,
		singularValues,
		reflect,
		eigenvaluesAbove,
		Random,
	],
	...[Parameter, Linear, Tanh, Network, crossEntropy],
	...[moonsNetwork, moonsFromScratch, AdamW],
	...[LoRALinear, injectLora, mergeLora, removeLora, startAdapters],
	...[twoMoons, MoonsRun, mapPoints, finer, PlantedRun, waves, serve],
];

const BASE = unpack(MOONS_BASE);
const panels = {};
const find = (id) => document.getElementById(id);
const grouped = (number) => number.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const stillness = window.matchMedia("(prefers-reduced-motion: reduce)");
const dials = () => [...document.querySelectorAll("#lab [name], #bench [name]")];

/* A run's own dials under their short names, and for A and B those of the task. */
function settingsOf(run) {
	const settings = {};
	for (const { name, value } of dials()) {
		const [owner, setting] = name.split(".");
		if (owner === run || (owner === "task" && run !== "bench"))
			settings[setting] = Number.isNaN(Number(value)) ? value : Number(value);
	}
	return settings;
}

/* A run on the page: its worker, and the worker's last report. */
class Panel {
	constructor(id) {
		Object.assign(this, { id, training: false, busy: false, waiting: null });
		const program = `${ENGINE.join("\n\n")}\n\nserve();`;
		const address = URL.createObjectURL(
			new Blob([program], { type: "text/javascript" }),
		);
		this.worker = new Worker(address);
		this.worker.onmessage = ({ data }) => this.hear(data);
		this.worker.onerror = ({ message }) =>
			say(this.id, `The computation failed: ${message}`);
	}

	order(order, more) {
		this.training = order === "train";
		this.send({ order, settings: settingsOf(this.id), numbers: BASE, ...more });
	}

	/* What is ordered while the worker computes an answer waits; the last order counts. */
	send(message) {
		if (this.busy) {
			this.waiting = message;
		} else {
			this.busy = message.order !== "train"; // while it trains, the worker listens
			this.worker.postMessage(message);
		}
	}

	hear(report) {
		this.report = report;
		if (report.finished) this.training = false;
		if (!report.finished && !report.training) this.busy = false; // it is an answer
		if (this.waiting && !this.busy) {
			this.send(this.waiting);
			this.waiting = null;
		}
		if (!(report.training && stillness.matches)) this.draw();
		(this.id === "bench" ? tellBench : tellRun)(this);
		showButtons();
	}

	/* At most once a frame. */
	draw() {
		this.frame ??= requestAnimationFrame(() => {
			this.frame = null;
			(this.id === "bench" ? drawBench : drawRun)(this);
		});
	}
}

/* The numbers of base.js in float64. */
function unpack(text) {
	const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
	return Float64Array.from(new Float32Array(bytes.buffer));
}

const write = (id, text) => Object.assign(find(id), { textContent: text });

/* What is put into a live region is spoken, so only ends of runs are. */
function say(id, text) {
	write(id === "bench" ? "bench-status" : "lab-status", text);
}

const describe = (id, text) => find(id).setAttribute("aria-label", text);

function titleOf({ id, report: { settings, undone, dial } }) {
	const { method, rank, start } = settings;
	const adapted = method === "LoRA" || method === "B alone";
	const turned = (dial ?? 1) === 1 ? "" : `, c = ${dial}`;
	const name = adapted ? `${method}, rank ${rank}, ${start}${turned}` : method;
	return `${id.toUpperCase()}: ${undone ? "the base" : name}`;
}

function tellRun(panel) {
	const { id, report } = panel;
	const { settings, losses, target, source, trains, spectra, dial, undone, same } =
		report;
	write(`${id}-title`, titleOf(panel));
	write(`${id}-epoch`, `${losses.length} of ${settings.epochs}`);
	write(`${id}-target`, percent(target));
	write(`${id}-source`, percent(source));
	write(`${id}-trains`, grouped(trains));
	describe(`${id}-map`, `Map of the classes. ${titleOf(panel)}`);
	const layers = spectra.map((values) =>
		values.slice(0, 4).map((value) => value.toPrecision(2)),
	);
	describe(
		`${id}-spectra`,
		`Largest singular values of ΔW, by layer: ${layers.join("; ")}`,
	);
	const turn = find(`${id}-turn`);
	turn.disabled = dial === null || panel.training;
	if (document.activeElement !== turn) turn.value = dial ?? 1;
	turn.setAttribute(
		"aria-valuetext",
		`${turn.value}: ${percent(target)} on the target`,
	);
	showValue(turn);

	const runs = [panels.a, panels.b];
	const of = `${grouped(same ?? 0)} of ${grouped(BASE.length)} numbers equal the stored ones`;
	if (same !== undefined) say(id, `${titleOf(panel)}. ${of}, bit for bit.`);
	const over = !runs.some(({ training, busy }) => training || busy);
	if (over && (report.finished || report.stopped))
		say(id, `${report.stopped ? "Stopped" : "Done"}. ${runs.map(resultOf).join(" ")}`);
}

function resultOf(panel) {
	const { target, source, seconds, losses, settings, undone } = panel.report;
	const result = `target ${percent(target)}, source ${percent(source)}`;
	if (undone) return `${titleOf(panel)}: ${result}.`;
	const whole = losses.length === settings.epochs;
	const when = whole ? "" : ` after ${losses.length} of ${settings.epochs} epochs`;
	return `${titleOf(panel)}${when}: ${result}, ${seconds.toFixed(1)} s.`;
}

function tellBench({ id, report: { errors, bound, settings, finished, stopped } }) {
	const result = `error ${errors.at(-1).toFixed(3)}, bound ${bound.toFixed(3)}`;
	const text = `Rank ${settings.rank} against planted rank ${settings.planted}: ${result}.`;
	describe("bench-errors", text);
	if (finished) say(id, `Done. ${text}`);
	if (stopped) say(id, `Stopped after ${errors.length - 1} steps. ${text}`);
}

/* How a dial stands at the beginning. */
function initial(dial) {
	return (
		dial.defaultValue ??
		[...dial.options].find((option) => option.defaultSelected).value
	);
}

function showValue(dial) {
	if (dial.type === "range")
		dial.previousElementSibling.textContent = dial.value + (dial.dataset.unit ?? "");
}

/* A dial that has no effect with the chosen method cannot be turned. */
function showDials() {
	for (const dial of dials()) {
		const [run, setting] = dial.name.split(".");
		const method = document.querySelector(`[name="${run}.method"]`)?.value;
		const unused = ["full", "from scratch"].includes(method);
		dial.disabled = unused && !["method", "lr"].includes(setting) && run !== "task";
		showValue(dial);
	}
}

function showButtons() {
	const training = panels.a.training || panels.b.training;
	write("lab-train", training ? "Stop" : "Train both");
	for (const id of ["a", "b"]) {
		find(`${id}-undo`).disabled = panels[id].training;
		if (panels[id].training) find(`${id}-turn`).disabled = true;
	}
	write("bench-train", panels.bench.training ? "Stop" : "Train");
}

/* Sets all dials as an address wishes, and says which of its wishes cannot be met. */
function setAll(query) {
	const wishes = new URLSearchParams(query);
	const refused = [];
	for (const dial of dials()) {
		const wish = wishes.get(dial.name);
		dial.value = wish ?? initial(dial);
		if (wish === null || dial.value === wish) continue; // a control takes nothing else
		const accepted =
			dial.textContent.trim().replace(/\s*\n\s*/g, ", ") ||
			`${dial.min} to ${dial.max}`;
		refused.push(`${dial.name} = ${wish} (accepted: ${accepted})`);
		dial.value = initial(dial);
	}
	say(
		"a",
		refused.length ? `The address asks for what cannot be: ${refused.join("; ")}.` : "",
	);
	for (const dial of dials()) {
		const more = dial.closest("details");
		if (more && dial.value !== initial(dial)) more.open = true;
	}
	showDials();
	prepare(Object.values(panels));
}

/* The address holds what differs from the beginning. Opened from disk, a page may not
   change more than what stands after the #, in some browsers. */
function writeAddress() {
	const turned = dials().filter((dial) => dial.value !== initial(dial));
	const query = new URLSearchParams(turned.map(({ name, value }) => [name, value]));
	const address = new URL(window.location.href);
	address[address.protocol === "file:" ? "hash" : "search"] = query;
	window.history.replaceState(null, "", address);
}

function prepare(runs) {
	for (const panel of runs) panel.order("prepare");
	showButtons();
}

function turned({ target }) {
	if (!target.name) return;
	const [run] = target.name.split(".");
	say(run, ""); // what was said was of a run that is no more
	showDials();
	writeAddress();
	prepare(run === "task" ? [panels.a, panels.b] : [panels[run]]);
}

function trainOrStop(runs) {
	const stop = runs.some(({ training }) => training);
	say(runs[0].id, "");
	for (const run of runs) if (!stop || run.training) run.order(stop ? "stop" : "train");
	showButtons();
}

/* Run B has what run A has, but begins with full fine-tuning. */
function makeRunB() {
	for (const part of ["dials", "results"]) {
		const copy = find(`a-${part}`)
			.outerHTML.replaceAll('"a', '"b')
			.replaceAll("Run A", "Run B");
		find(`a-${part}`).insertAdjacentHTML("afterend", copy);
	}
	for (const option of document.querySelectorAll(
		'[name="b.method"] *, [name="b.lr"] *',
	))
		option.defaultSelected = ["full", "0.001"].includes(option.value);
}

/* Inside a chapter the laboratory stands alone, its dials set as a question sets them. */
function questionOf(hash) {
	if (window.parent === window) return "";
	document.documentElement.classList.add("lab-framed");
	return hash && document.querySelector(`${hash} a[href*="lab.html?"]`)?.search;
}

function build() {
	makeRunB();
	for (const id of ["lab", "bench"]) {
		find(id).hidden = false;
		find(id).addEventListener("input", turned);
	}
	document.documentElement.classList.add("lab-lives");
	for (const id of ["a", "b", "bench"]) panels[id] = new Panel(id);
	for (const id of ["a", "b"]) {
		find(`${id}-undo`).addEventListener("click", () => panels[id].order("undo"));
		find(`${id}-turn`).addEventListener("input", ({ target }) => {
			showValue(target);
			say(id, "");
			panels[id].order("turn", { dial: Number(target.value) });
		});
	}
	find("lab-train").addEventListener("click", () => {
		trainOrStop([panels.a, panels.b]);
		const behavior = stillness.matches ? "instant" : "smooth";
		if (panels.a.training)
			find("lab-pictures").scrollIntoView({ block: "nearest", behavior });
	});
	find("bench-train").addEventListener("click", () => trainOrStop([panels.bench]));

	const redraw = () => {
		for (const panel of Object.values(panels)) if (panel.report) panel.draw();
	};
	new ResizeObserver(redraw).observe(find("lab-losses"));
	new MutationObserver(redraw).observe(document.documentElement, { attributes: true });
	const { search, hash } = window.location;
	setAll(hash.includes("=") ? hash.slice(1) : questionOf(hash) || search);
}

build();
