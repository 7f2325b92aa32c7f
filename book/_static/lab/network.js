/* The network of Chapter 3: linear layers with tanh between them, and its loss.

   A layer keeps what its backward pass needs. A batch is a matrix X with a point in each
   row; G is the gradient of the loss with respect to a layer's output, shaped like it. */

/* A matrix that training may move; backward() leaves its gradient. */
class Parameter {
	constructor(value) {
		[this.value, this.gradient, this.trains] = [value, null, true];
	}
}

/* y = W x + b, so Y = X Wᵀ + b, with W of shape (d_out, d_in) and b (1, d_out). */
class Linear {
	constructor(W, b) {
		[this.W, this.b] = [new Parameter(W), new Parameter(b)];
	}

	get parameters() {
		return [this.W, this.b];
	}

	get weight() {
		return this.W.value;
	}

	forward(X) {
		this.X = X;
		const Y = timesTransposed(X, this.W.value);
		const b = this.b.value.data;
		for (let i = 0; i < Y.data.length; i++) Y.data[i] += b[i % b.length];
		return Y;
	}

	/* ∇W = Gᵀ X, ∇b = the sum of G's rows; what reaches the input is G W. */
	backward(G) {
		if (this.W.trains) this.W.gradient = times(G.T, this.X);
		if (this.b.trains) {
			const sum = new Matrix(1, G.cols);
			for (let i = 0; i < G.data.length; i++) sum.data[i % G.cols] += G.data[i];
			this.b.gradient = sum;
		}
		return times(G, this.W.value);
	}
}

/* y = tanh x, and y' = 1 - y². */
class Tanh {
	parameters = [];

	forward(X) {
		this.Y = new Matrix(X.rows, X.cols);
		for (let i = 0; i < X.data.length; i++) this.Y.data[i] = Math.tanh(X.data[i]);
		return this.Y;
	}

	backward(G) {
		const Y = this.Y.data;
		const back = new Matrix(G.rows, G.cols);
		for (let i = 0; i < Y.length; i++) back.data[i] = G.data[i] * (1 - Y[i] * Y[i]);
		return back;
	}
}

class Network {
	constructor(layers) {
		this.layers = layers;
	}

	/* A network in which another layer may stand in each one's place. */
	with(exchange) {
		return new Network(this.layers.map(exchange));
	}

	get parameters() {
		return this.layers.flatMap((layer) => layer.parameters);
	}

	get trainable() {
		return this.parameters.filter((parameter) => parameter.trains);
	}

	forward(X) {
		return this.layers.reduce((x, layer) => layer.forward(x), X);
	}

	/* Leaves a gradient in each parameter that trains, and returns the loss. */
	backward(X, labels) {
		const { loss, gradient } = crossEntropy(this.forward(X), labels);
		this.layers.reduceRight((G, layer) => layer.backward(G), gradient);
		return loss;
	}

	/* Share of the points in X that are put into their class, of two. */
	accuracy({ X, labels }) {
		const logits = this.forward(X).data;
		const right = labels.filter(
			(label, i) => label === Number(logits[2 * i + 1] > logits[2 * i]),
		);
		return right.length / labels.length;
	}
}

/* Mean over the rows of -log softmax(row)[label]; its gradient is (softmax - one-hot) / n. */
function crossEntropy(logits, labels) {
	const { rows, cols, data } = logits;
	const gradient = new Matrix(rows, cols);
	let loss = 0;
	for (let i = 0; i < rows; i++) {
		const row = data.subarray(i * cols, (i + 1) * cols);
		const top = Math.max(...row); // exp of a large number would overflow
		const sum = row.reduce((s, x) => s + Math.exp(x - top), 0);
		loss += (top + Math.log(sum) - row[labels[i]]) / rows;
		for (let j = 0; j < cols; j++)
			gradient.data[i * cols + j] =
				(Math.exp(row[j] - top) / sum - (j === labels[i] ? 1 : 0)) / rows;
	}
	return { loss, gradient };
}

/* 2 -> 128 -> 128 -> 128 -> 2. `numbers` are W and b of each layer, one after the other,
   as PyTorch lists the parameters of `lora.moons.moons_mlp`. */
function moonsNetwork(numbers) {
	const layers = [];
	let rest = numbers;
	for (let i = 0; i < 4; i++) {
		const [d_in, d_out] = [2, 128, 128, 128, 2].slice(i);
		const [W, b] = [
			rest.slice(0, d_out * d_in),
			rest.slice(d_out * d_in, d_out * (d_in + 1)),
		];
		layers.push(
			new Linear(new Matrix(d_out, d_in, W), new Matrix(1, d_out, b)),
			new Tanh(),
		);
		rest = rest.subarray(d_out * (d_in + 1));
	}
	return new Network(layers.slice(0, -1)); // no tanh after the last layer
}

/* PyTorch's default start: W and b uniform between ±1/√d_in. */
function moonsFromScratch(random) {
	const network = moonsNetwork(new Float64Array(33666));
	for (const layer of network.layers)
		for (const parameter of layer.parameters)
			parameter.value = parameter.value.map(
				() => (2 * random.uniform() - 1) / Math.sqrt(layer.weight.cols),
			);
	return network;
}
