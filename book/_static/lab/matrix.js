/* Matrices in float64, stored row by row, and the numbers that the laboratory draws. */

class Matrix {
	constructor(rows, cols, data = new Float64Array(rows * cols)) {
		[this.rows, this.cols, this.data] = [rows, cols, data];
	}

	get T() {
		const { rows, cols, data } = this;
		const turned = new Matrix(cols, rows);
		for (let i = 0; i < rows; i++)
			for (let j = 0; j < cols; j++) turned.data[j * rows + i] = data[i * cols + j];
		return turned;
	}

	map(use) {
		return new Matrix(this.rows, this.cols, this.data.map(use));
	}

	scaled(factor) {
		return this.map((x) => factor * x);
	}

	/* Adds another matrix of the same shape, in place. */
	add(other) {
		for (let i = 0; i < this.data.length; i++) this.data[i] += other.data[i];
		return this;
	}

	/* The rows with the given numbers, as a matrix of their own. */
	pick(numbers) {
		const { cols, data } = this;
		const from = (i) => cols * numbers[Math.floor(i / cols)] + (i % cols);
		return new Matrix(numbers.length, cols).map((_, i) => data[from(i)]);
	}
}

/* X Yᵀ. Entry (i, j) is the inner product of row i of X and row j of Y: both are read in
   the order in which they are stored. Nearly all the time of a run is spent here. */
function timesTransposed(X, Y) {
	const Z = new Matrix(X.rows, Y.rows);
	for (let i = 0; i < X.rows; i += 4)
		for (let j = 0; j < Y.rows; j += 2)
			if (i + 4 <= X.rows && j + 2 <= Y.rows)
				fourByTwo(X.data, Y.data, Z.data, i, j, X.cols, Y.rows);
			else
				for (let k = i; k < Math.min(i + 4, X.rows); k++)
					for (let l = j; l < Math.min(j + 2, Y.rows); l++) {
						let sum = 0;
						for (let n = 0; n < X.cols; n++)
							sum += X.data[k * X.cols + n] * Y.data[l * X.cols + n];
						Z.data[k * Y.rows + l] = sum;
					}
	return Z;
}

/* Eight entries of Z = X Yᵀ at once: each number read from X and Y is used more than
   once, and the eight sums stay in the processor's registers. */
function fourByTwo(x, y, z, i, j, cols, width) {
	let [a0, a1, b0, b1, c0, c1, d0, d1] = [0, 0, 0, 0, 0, 0, 0, 0];
	const [a, b, c, d] = [i * cols, (i + 1) * cols, (i + 2) * cols, (i + 3) * cols];
	const [p, q] = [j * cols, (j + 1) * cols];
	for (let n = 0; n < cols; n++) {
		const y0 = y[p + n];
		const y1 = y[q + n];
		const xa = x[a + n];
		const xb = x[b + n];
		const xc = x[c + n];
		const xd = x[d + n];
		a0 += xa * y0;
		a1 += xa * y1;
		b0 += xb * y0;
		b1 += xb * y1;
		c0 += xc * y0;
		c1 += xc * y1;
		d0 += xd * y0;
		d1 += xd * y1;
	}
	const at = i * width + j;
	z[at] = a0;
	z[at + 1] = a1;
	z[at + width] = b0;
	z[at + width + 1] = b1;
	z[at + 2 * width] = c0;
	z[at + 2 * width + 1] = c1;
	z[at + 3 * width] = d0;
	z[at + 3 * width + 1] = d1;
}

/* X Y */
function times(X, Y) {
	return timesTransposed(X, Y.T);
}

/* The `count` largest singular values, in falling order.
   Reflections from the left and the right make the matrix bidiagonal without changing
   them (Golub & Kahan 1965). The bidiagonal's numbers, in a row, are the off-diagonal of
   a symmetric matrix with eigenvalues ±σ, and how many of these exceed a given number
   can be counted: so each σ is found by halving an interval. */
function singularValues(matrix, count = Infinity) {
	const wide = matrix.cols > matrix.rows;
	const M = wide ? matrix.T : matrix.scaled(1);
	const { rows, cols, data } = M;
	const chain = [];
	for (let k = 0; k < cols; k++) {
		chain.push(reflect(data, k * cols + k, cols, rows - k, 1, cols - k));
		if (k + 1 < cols)
			chain.push(reflect(data, k * cols + k + 1, 1, cols - k - 1, cols, rows - k));
	}
	const largest = 2 * Math.max(...chain.map(Math.abs));
	const squares = chain.map((x) => x * x);
	const found = [];
	for (let k = 0; k < Math.min(count, cols); k++) {
		let [low, high] = [0, found[k - 1] ?? largest];
		for (let halvings = 0; halvings < 60 && high > low; halvings++) {
			const middle = (low + high) / 2;
			if (eigenvaluesAbove(middle, squares) > k) low = middle;
			else high = middle;
		}
		found.push((low + high) / 2);
	}
	return found;
}

/* Householder's reflection. The `length` numbers from `start` on, `step` apart, become
   (s, 0, ..., 0); the `lines` - 1 lines beside it, `side` apart, are reflected with it.
   Returns s. */
function reflect(data, start, step, length, side, lines) {
	let square = 0;
	for (let i = 0; i < length; i++) square += data[start + i * step] ** 2;
	const size = Math.sqrt(square);
	if (size === 0) return 0;
	const s = data[start] > 0 ? -size : size;
	const v = new Float64Array(length);
	for (let i = 0; i < length; i++) v[i] = data[start + i * step];
	v[0] -= s;
	const half = square - s * data[start]; // half of v's squared length
	for (let line = 0; line < lines; line++) {
		const from = start + line * side;
		let dot = 0;
		for (let i = 0; i < length; i++) dot += v[i] * data[from + i * step];
		for (let i = 0; i < length; i++) data[from + i * step] -= (dot / half) * v[i];
	}
	return s;
}

/* Sylvester's law of inertia: as many eigenvalues of the symmetric matrix with zeros on
   the diagonal and these squares beside it exceed x as the elimination has pivots > 0. */
function eigenvaluesAbove(x, squares) {
	let [pivot, above] = [-x, 0];
	for (const square of squares) {
		pivot = -x - square / (pivot || -1e-300);
		if (pivot > 0) above++;
	}
	return above;
}

/* Numbers at random that a seed repeats (Ettinger's mulberry32); each stream has its own. */
class Random {
	constructor(seed, stream) {
		this.state = Math.imul(8 * seed + stream + 1, 0x9e3779b9);
	}

	uniform() {
		this.state = (this.state + 0x6d2b79f5) | 0;
		let t = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state);
		t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
		return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
	}

	/* Box and Muller's formula. */
	gaussian() {
		return (
			Math.sqrt(-2 * Math.log(1 - this.uniform())) *
			Math.cos(2 * Math.PI * this.uniform())
		);
	}

	/* The numbers 0 to n - 1 in random order (Fisher and Yates). */
	order(n) {
		const numbers = Array.from({ length: n }, (_, i) => i);
		for (let i = n - 1; i > 0; i--) {
			const j = Math.floor(this.uniform() * (i + 1));
			[numbers[i], numbers[j]] = [numbers[j], numbers[i]];
		}
		return numbers;
	}
}
