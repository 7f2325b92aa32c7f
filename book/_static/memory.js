/* What a training run of LoRA keeps in memory, as the dials move. The formula is that of
   lora/memory.py, line by line; its numbers, the form and one example are in the page
   (book/_ext/memory.py), which shows the example without this script. */
for (const play of document.querySelectorAll(".memory-play")) {
  const { shapes, mlp, bits: nf4 } = JSON.parse(play.dataset.numbers);
  const form = play.querySelector("form");
  const field = (name) => form.elements[name];
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const gb = (bytes) => (bytes / 1e9).toFixed(bytes < 1e9 ? 2 : 1);

  const matrices = ({ width: d, kv, mlp: m, kind }, part) => part === "attention"
    ? [[d, d], [d, kv], [d, kv], [d, d]]
    : [...Array(mlp[kind][0] - 1).fill([d, m]), [m, d]];
  const numbers = (s) => sum(s.on.flatMap((part) =>
    matrices(s, part).map(([a, b]) => s.rank * (a + b))));

  const block = (s) => {
    const cast = s.cast && s.itemsize < 4;
    const [, always, own] = mlp[s.kind];
    const norm = s.kind === "SwiGLU" ? 4 : s.itemsize;
    let kept = s.itemsize * (2 * s.width + 2 * s.kv + always * s.mlp) + 2 * norm * s.width;
    for (const part of s.on) {
      const all = matrices(s, part);
      kept += cast
        ? 4 * sum(all.map(([a]) => a + s.rank))
        : s.itemsize * (s.width + (part === "MLP" ? own * s.mlp : 0) + s.rank * all.length);
    }
    const copies = cast || s.itemsize === 4 ? 0 : s.itemsize * numbers(s);
    return s.tokens * kept + copies;
  };

  const memory = (s) => {
    const linear = s.blocks * sum(["attention", "MLP"].flatMap((part) =>
      matrices(s, part).map(([a, b]) => a * b)));
    const adapters = s.blocks * numbers(s);
    const inputs = s.blocks * s.tokens * s.width * s.itemsize;
    return {
      base: (linear * s.bits) / 8 + s.tables * s.vocabulary * s.width * s.itemsize,
      weights: 4 * adapters,
      gradients: 4 * adapters,
      "AdamW m and v": 8 * adapters,
      activations: s.checkpoint ? inputs + block(s) : s.blocks * block(s),
      logits: 8 * s.tokens * s.vocabulary,
    };
  };

  const settings = () => {
    const named = shapes[field("model").value];
    const own = (name) => Math.max(1, Math.round(Number(field(name).value)) || 1);
    const sizes = ["blocks", "width", "kv", "mlp", "vocabulary"];
    const shape = named ?? Object.fromEntries(sizes.map((name) => [name, own(name)]));
    const bits = Number(field("bits").value);
    return {
      kind: field("kind").value, tables: Number(field("tables").value), ...shape, bits,
      rank: own("rank"), batch: own("batch"), tokens: own("row") * own("batch"), itemsize: bits === 32 ? 4 : 2,
      on: { all: ["attention", "MLP"] }[field("on").value] ?? [field("on").value],
      checkpoint: field("checkpoint").checked, cast: field("cast").checked,
    };
  };

  // What to change first: each change tried by itself, the largest saving before the others.
  const changes = (s) => [
    [!s.checkpoint && "turn checkpointing on", { checkpoint: true }],
    [s.cast && s.itemsize < 4 && "use adapters that keep no copies", { cast: false }],
    [s.bits > 5 && "store the base in four bits", { bits: nf4, itemsize: 2 }],
    [s.batch > 1 ? "halve the batch and accumulate" : "halve the length", { tokens: s.tokens / 2 }],
    [s.rank > 1 && "halve the rank", { rank: s.rank / 2 }],
  ].filter(([text]) => text).map(([text, change]) => {
    const saved = sum(Object.values(memory(s))) - sum(Object.values(memory({ ...s, ...change })));
    return [saved, text];
  }).sort(([a], [b]) => b - a);

  const show = () => {
    const s = settings(), items = memory(s), total = sum(Object.values(items));
    const largest = Math.max(total, 24e9) * 1.18;
    for (const [name, bytes] of Object.entries(items)) {
      play.querySelector(`[data-part="${name}"]`).style.width = `${(100 * bytes) / largest}%`;
      play.querySelector(`[data-size="${name}"]`).textContent = gb(bytes);
    }
    play.querySelector('[data-size="sum"]').textContent = gb(total);
    for (const line of play.querySelectorAll("[data-gpu]")) {
      const at = (100 * 1e9 * line.dataset.gpu) / largest;
      line.style.left = `${at}%`;
      line.hidden = at > 100;
    }
    const card = [8, 16, 24, 48, 80].find((size) => 0.9e9 * size >= total);
    const fits = card
      ? `With a tenth of it left free, a card of ${card} GB holds this.`
      : "No single card of up to 80 GB holds this with a tenth of it left free.";
    const [first, second] = changes(s).map(([saved, text]) => `${text} (saves ${gb(saved)} GB)`);
    play.querySelector("output").textContent =
      `${gb(total)} GB. ${fits} To need less, first ${first}, then ${second}.`;
    play.querySelector(".memory-own").hidden = field("model").value in shapes;
  };

  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  play.memory = memory; // for the tests
  show();
}
