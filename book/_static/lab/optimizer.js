/* AdamW (Loshchilov & Hutter 2019) with PyTorch's defaults.

   m ← β₁ m + (1 - β₁) g        the mean of the last gradients
   v ← β₂ v + (1 - β₂) g²       and of their squares
   p ← p - lr λ p               weight decay, apart from the gradient
   p ← p - lr m̂ / (√v̂ + ε)      where m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ) after t steps */

class AdamW {
	constructor(parameters, lr, decay = 0.01) {
		[this.lr, this.decay, this.steps] = [lr, decay, 0];
		this.moved = parameters.map((parameter) => ({
			parameter,
			m: new Float64Array(parameter.value.data.length),
			v: new Float64Array(parameter.value.data.length),
		}));
	}

	step() {
		const [beta1, beta2, epsilon] = [0.9, 0.999, 1e-8];
		this.steps++;
		const shrink = 1 - this.lr * this.decay;
		const length = this.lr / (1 - beta1 ** this.steps);
		const root = Math.sqrt(1 - beta2 ** this.steps);
		for (const { parameter, m, v } of this.moved) {
			const p = parameter.value.data;
			const g = parameter.gradient.data;
			for (let i = 0; i < p.length; i++) {
				m[i] = beta1 * m[i] + (1 - beta1) * g[i];
				v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
				p[i] = p[i] * shrink - (length * m[i]) / (Math.sqrt(v[i]) / root + epsilon);
			}
		}
	}
}
