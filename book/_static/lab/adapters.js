/* LoRA (Hu et al. 2021, section 4.1): y = W x + b + s B A x, with W and b frozen.

   A is (r, d_in), B (d_out, r). The scale s is α/r, or α/√r (Kalajdzievski 2023). The
   dial c multiplies it: 0 is the base, 1 the adapted layer. */

class LoRALinear {
	constructor(base, rank, alpha, rule = "α/r") {
		this.base = base;
		this.scale = rule === "α/r" ? alpha / rank : alpha / Math.sqrt(rank);
		this.dial = 1;
		const { rows, cols } = base.weight;
		this.A = new Parameter(new Matrix(rank, cols));
		this.B = new Parameter(new Matrix(rows, rank));
		for (const parameter of base.parameters) parameter.trains = false;
	}

	get parameters() {
		return [...this.base.parameters, this.A, this.B];
	}

	/* H = s X Aᵀ has r numbers a point: the scale is applied where it costs least. */
	forward(X) {
		this.X = X;
		this.H = timesTransposed(X, this.A.value).scaled(this.scale * this.dial);
		return this.base.forward(X).add(timesTransposed(this.H, this.B.value));
	}

	/* ∇B = Gᵀ H and ∇A = (s G B)ᵀ X: each contains the other matrix. */
	backward(G) {
		const GB = times(G, this.B.value).scaled(this.scale * this.dial);
		if (this.B.trains) this.B.gradient = times(G.T, this.H);
		if (this.A.trains) this.A.gradient = times(GB.T, this.X);
		return this.base.backward(G).add(times(GB, this.A.value));
	}

	/* ΔW = c s B A */
	get update() {
		return times(this.B.value, this.A.value).scaled(this.scale * this.dial);
	}

	get weight() {
		return this.update.add(this.base.weight);
	}
}

/* Wraps each linear layer. The network's own layers are kept inside, as they are. */
function injectLora(network, rank, alpha, rule) {
	const wrap = (layer) => new LoRALinear(layer, rank, alpha, rule);
	return network.with((layer) => (layer instanceof Linear ? wrap(layer) : layer));
}

/* A layer for each wrapper, with W + ΔW in one matrix: it computes the same. */
function mergeLora(network) {
	const merge = (layer) => new Linear(layer.weight, layer.base.b.value);
	return network.with((layer) => (layer instanceof LoRALinear ? merge(layer) : layer));
}

/* The network without its adapters: the very layers that were wrapped. */
function removeLora(network) {
	return network.with((layer) => layer.base ?? layer);
}

/* The four starts of Chapter 2, in two sizes: Gaussian numbers with standard deviation
   1/r, or Kaiming's, uniform between ±1/√d_in. A random B is as large as a random A. */
function startAdapters(network, start, size, random) {
	for (const layer of network.layers.filter((layer) => layer instanceof LoRALinear)) {
		const { rows: rank, cols: d_in } = layer.A.value;
		const gaussian = () => random.gaussian() / rank;
		const kaiming = () => (2 * random.uniform() - 1) / Math.sqrt(d_in);
		const draw = size === "1/r" ? gaussian : kaiming;
		for (const name of ["A", "B"]) {
			const drawn = start === "both random" || start === `${name} random`;
			layer[name].value = layer[name].value.map(drawn ? draw : () => 0);
		}
	}
}
