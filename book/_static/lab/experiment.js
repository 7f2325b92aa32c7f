/* What the two instruments compute. This part runs in a web worker. */

/* Two interleaved half circles, turned counter-clockwise about the origin: the points of
   `lora.moons.two_moons`, from another generator of random numbers. */
function twoMoons(n, noise, degrees, random) {
	const [c, s] = [
		Math.cos((degrees * Math.PI) / 180),
		Math.sin((degrees * Math.PI) / 180),
	];
	const [X, labels] = [new Matrix(n, 2), []];
	const half = Math.floor(n / 2);
	for (let i = 0; i < n; i++) {
		const label = i < half ? 0 : 1;
		const along =
			(Math.PI * (i - label * half)) / Math.max(1, (label ? n - half : half) - 1);
		const x =
			(label ? 1 - Math.cos(along) : Math.cos(along)) + noise * random.gaussian();
		const y =
			(label ? 0.5 - Math.sin(along) : Math.sin(along)) + noise * random.gaussian();
		X.data.set([c * x - s * y, s * x + c * y], 2 * i);
		labels.push(label);
	}
	return { X, labels };
}

/* The experiment of Chapter 3 with one method. `numbers` are the pretrained network's. */
class MoonsRun {
	constructor(settings, numbers) {
		const { angle, points, noise, seed, method, rank, alpha, rule, lr, start, size } =
			settings;
		Object.assign(this, { settings, numbers, losses: [], dial: 1, seconds: 0 });
		this.training = twoMoons(points, noise, angle, new Random(seed, 1));
		this.target = twoMoons(1000, noise, angle, new Random(seed, 2));
		this.source = twoMoons(1000, 0.15, 0, new Random(seed, 3));
		this.order = new Random(seed, 4);
		this.adapted = method === "LoRA" || method === "B alone";
		this.network =
			method === "from scratch"
				? moonsFromScratch(new Random(seed, 5))
				: moonsNetwork(numbers);
		if (this.adapted) {
			this.network = injectLora(this.network, rank, alpha, rule);
			startAdapters(this.network, start, size, new Random(seed, 6));
		}
		for (const { A } of this.network.layers)
			if (A && method === "B alone") A.trains = false;
		this.before = this.linear.map((layer) => layer.weight.scaled(1));
		this.optimizer = new AdamW(this.network.trainable, lr);
	}

	get linear() {
		return this.network.layers.filter((layer) => !(layer instanceof Tanh));
	}

	get done() {
		return this.losses.length >= this.settings.epochs;
	}

	/* One step of AdamW on the batch with these rows; returns its loss. */
	step(rows) {
		const labels = rows.map((row) => this.training.labels[row]);
		const loss = this.network.backward(this.training.X.pick(rows), labels);
		this.optimizer.step();
		return loss;
	}

	/* An epoch: all points once, in random order, in batches of 64. */
	advance() {
		const order = this.order.order(this.training.labels.length);
		let sum = 0;
		for (let i = 0; i < order.length; i += 64) {
			const rows = order.slice(i, i + 64);
			sum += this.step(rows) * rows.length;
		}
		this.losses.push(sum / order.length);
	}

	/* An adapter's own ΔW; without adapters, what training has changed. */
	get updates() {
		return this.linear.map(
			(layer, i) => layer.update ?? this.before[i].scaled(-1).add(layer.weight),
		);
	}

	turn(dial) {
		for (const layer of this.linear) layer.dial = dial;
		this.dial = dial;
	}

	/* The base again. How many of its numbers are the stored ones, bit for bit? */
	undo() {
		this.network = this.adapted ? removeLora(this.network) : moonsNetwork(this.numbers);
		this.undone = true;
		const now = this.network.parameters.flatMap((parameter) => [
			...parameter.value.data,
		]);
		return now.filter((number, i) => Object.is(number, this.numbers[i])).length;
	}

	/* Whether there is an update to dial: none before training, none from two zeros. */
	get adapts() {
		return this.linear.some(({ A, B }) =>
			[A, B].every((matrix) => matrix?.value.data.some(Boolean)),
		);
	}

	/* All that is drawn. `map` holds logit 1 minus logit 0 on a square of the plane,
	   computed at side × side points. */
	look(side) {
		const { settings, losses, undone, seconds, dial } = this;
		const merged = mergeLora(this.network);
		const logits = merged.forward(mapPoints(side)).data;
		return {
			settings,
			losses,
			undone,
			seconds,
			dial: this.adapts ? dial : null,
			trains: this.optimizer.moved.reduce((n, { m }) => n + m.length, 0),
			target: merged.accuracy(this.target),
			source: merged.accuracy(this.source),
			spectra: this.undone
				? []
				: this.updates.map((update) => singularValues(update, 16)),
			map: finer(
				logits.map((logit, i) => logits[i + 1] - logit),
				side,
			),
			points: this.training.X.data,
			labels: this.training.labels,
		};
	}
}

/* Where the map is computed: points from -2.7 to 2.7, the upper row first. */
function mapPoints(side) {
	const at = (i) => (5.4 * i) / (side - 1) - 2.7;
	const points = new Matrix(side * side, 2);
	for (let i = 0; i < side * side; i++)
		points.data.set([at(i % side), -at(Math.floor(i / side))], 2 * i);
	return points;
}

/* The map's side × side values, every second number given, become some 315 × 315: more
   between any two, on a straight line. */
function finer(values, side) {
	const steps = Math.round(320 / side);
	const width = steps * (side - 1) + 1;
	const fine = new Float32Array(width * width);
	for (let i = 0; i < fine.length; i++) {
		const [x, y] = [(i % width) / steps, Math.floor(i / width) / steps];
		const [left, top] = [x, y].map((z) => Math.min(Math.floor(z), side - 2));
		const [u, v, at] = [x - left, y - top, 2 * (side * top + left)];
		const below = at + 2 * side;
		const upper = (1 - u) * values[at] + u * values[at + 2];
		const lower = (1 - u) * values[below] + u * values[below + 2];
		fine[i] = (1 - v) * upper + v * lower;
	}
	return fine;
}

/* Chapter 1's test that LoRA must fail: a layer W learns the answers of W + D, where D
   has rank k and equal singular values. The inputs' i-th principal direction has standard
   deviation i^-fall; with fall = 0 they are independent of each other. */
class PlantedRun {
	constructor(settings) {
		const { planted, rank, fall, seed } = settings;
		const random = new Random(seed, 7);
		const [d, gaussian] = [64, () => random.gaussian()];
		Object.assign(this, { settings, errors: [], seconds: 0 });
		this.D = times(waves(planted, d, random).T, waves(planted, d, random)).scaled(8);
		this.spread = Float64Array.from({ length: d }, (_, i) => (i + 1) ** -fall);
		this.X = this.seen(new Matrix(256, d).map(gaussian));
		const base = new Linear(
			new Matrix(d, d).map(gaussian).scaled(1 / 8),
			new Matrix(1, d),
		);
		this.answers = timesTransposed(this.X, this.D.scaled(1).add(base.weight));
		this.network = injectLora(new Network([base]), rank, rank, "α/r");
		startAdapters(this.network, "A random", "1/r", random);
		this.optimizer = new AdamW(this.network.trainable, 0.08, 0);
		const squares = singularValues(this.seen(this.D)).map((s) => s * s);
		const sum = (list) => list.reduce((a, b) => a + b, 0);
		this.bound = Math.max(0, sum(squares.slice(rank)) / sum(squares));
		this.measure();
	}

	/* M Σ^½: its columns as large as the inputs make them. */
	seen(M) {
		return M.map((x, i) => x * this.spread[i % M.cols]);
	}

	get done() {
		return this.errors.length > this.settings.steps;
	}

	/* A step on the squared error, the rate falling to zero along half a cosine. */
	advance() {
		const { steps } = this.settings;
		this.optimizer.lr =
			0.04 * (1 + Math.cos((Math.PI * (this.errors.length - 1)) / steps));
		const wrong = this.network.forward(this.X).add(this.answers.scaled(-1));
		this.network.layers[0].backward(wrong.scaled(2 / this.X.rows));
		this.optimizer.step();
		this.measure();
	}

	/* E‖(D - ΔW) x‖² / E‖D x‖², exactly: over all inputs, not those of the training. */
	measure() {
		const square = (M) => this.seen(M).data.reduce((sum, x) => sum + x * x, 0);
		const left = this.network.layers[0].update.scaled(-1).add(this.D);
		this.errors.push(square(left) / square(this.D));
	}

	look() {
		const { settings, errors, bound } = this;
		return { settings, errors, bound };
	}
}

/* k rows of length one at right angles to each other: cosines of random frequencies. */
function waves(k, d, random) {
	const order = random.order(d - 1);
	const phase = (i) => (Math.PI * (1 + order[Math.floor(i / d)]) * ((i % d) + 0.5)) / d;
	return new Matrix(k, d).map((_, i) => Math.sqrt(2 / d) * Math.cos(phase(i)));
}

/* The worker's side: obeys the page's orders, and answers with what there is to see. */
function serve() {
	let [run, asked, latest] = [null, null, 0];
	/* While something moves, a coarse map is enough. */
	const show = (more, side = 80) => self.postMessage({ ...run.look(side), ...more });

	/* A new run, unless the one at hand has these settings and is not at its end. */
	const begin = ({ settings, numbers }) => {
		if (asked === JSON.stringify(settings) && !run.done && !run.undone) return;
		asked = JSON.stringify(settings);
		run = settings.planted ? new PlantedRun(settings) : new MoonsRun(settings, numbers);
	};

	const orders = {
		prepare(order) {
			asked = null;
			begin(order);
		},

		/* Looks take at most a sixth of the time; after each, the page is heard. */
		async train(order, number) {
			begin(order);
			run.turn?.(1);
			const began = performance.now() - 1000 * run.seconds;
			let [shown, cost] = [performance.now(), 20];
			while (!run.done) {
				run.advance();
				run.seconds = (performance.now() - began) / 1000;
				if (performance.now() - shown > 5 * cost) {
					const before = performance.now();
					show({ training: true }, 40);
					shown = performance.now();
					cost = Math.max(20, shown - before);
					await new Promise((resolve) => setTimeout(resolve));
					if (number !== latest) return;
				}
			}
			show({ finished: true });
		},

		stop: () => ({ stopped: true }),
		turn: ({ dial }) => run.turn(dial),
		undo: () => ({ same: run.undo() }),
	};

	self.onmessage = ({ data }) => {
		const news = orders[data.order](data, ++latest);
		if (data.order !== "train") show(news, data.order === "turn" ? 40 : 80);
	};
}
