"""The comparisons of Part II once more, from the recorded rows and the names alone.

`make reanalysis` prints for each: the mean difference in points, its 95% interval over
names (each counted once, however many seeds drew it) and over seeds. Nothing of the
chapters' code is used, nor `lora.study.evidence`: whoever doubts starts here.
"""

import json
from collections import Counter
from itertools import combinations
from math import sqrt
from statistics import fmean, stdev

from scipy.stats import t as student

from lora.study.docstrings import LIBRARIES, docstring_pairs, split
from lora.study.runs import DATA, DEFAULTS

TRAINED, UNSEEN = LIBRARIES[:5], LIBRARIES[5:]
FULL, LORA = {"method": "full", "lr": 2e-4}, {"method": "lora", "lr": 2e-3}
NONE = {"method": "none"}
PLACES = {"attention": "attention", "MLP": "(intermediate", "last two blocks": "[45]"}


def rows_of(study, **settings):
    """The rows of a study with these settings, read anew; `cut` is None if not said."""
    wanted = {"cut": None, "composed": None, "merged": None} | settings
    rows = [DEFAULTS | json.loads(line) for line in DATA.read_text().splitlines()]
    return [
        row
        for row in rows
        if row["study"] == study and all(row.get(k) == v for k, v in wanted.items())
    ]


def scores(rows, libraries):
    """(seed, library and name) -> 100 / rank, of all queries of these rows."""
    found = {}
    for row in rows:
        for library in libraries:
            names = [
                name for name, _ in split(docstring_pairs(library), row["seed"])[2]
            ]
            for name, rank in zip(names, row["ranks"][library]):
                found[row["seed"], (library, name)] = 100 / rank
    return found


def around(mean, error, degrees):
    half = student.ppf(0.975, degrees) * error
    return mean - half, mean + half


def compare(rows, others, libraries=TRAINED):
    """(mean, over names, over seeds) of what rows score above others, paired."""
    return pooled([(rows, others, libraries)])


def pooled(sides):
    """The same of several comparisons in one, each (rows, others, libraries)."""
    gaps = []
    for rows, others, libraries in sides:
        one, other = scores(rows, libraries), scores(others, libraries)
        gaps += [(*key, one[key] - other[key]) for key in one.keys() & other.keys()]
    mean, by_name, by_seed = fmean(gap for *_, gap in gaps), Counter(), {}
    for seed, name, gap in gaps:
        by_name[name] += gap - mean
        by_seed.setdefault(seed, []).append(gap)
    g = len(by_name)
    error = sqrt(g / (g - 1) * sum(r * r for r in by_name.values())) / len(gaps)
    seeds = [fmean(values) for values in by_seed.values()]
    over_seeds = around(mean, stdev(seeds) / sqrt(len(seeds)), len(seeds) - 1)
    return mean, around(mean, error, g - 1), over_seeds


def comparisons():
    """(chapter, what, its mean and two intervals) one after the other."""
    main = {m: rows_of("main", **s) for m, s in (("full", FULL), ("lora", LORA))}
    main["none"] = rows_of("main", **NONE)
    longer = {"lora": rows_of("longer"), "full": rows_of("change", **FULL, steps=96)}
    for m in ("lora", "full"):
        yield 4, f"{m} above the base", compare(main[m], main["none"])
        yield 4, f"{m}, libraries left out", compare(main[m], main["none"], UNSEEN)
    yield 4, "full above LoRA", compare(main["full"], main["lora"])
    yield 4, "full above LoRA, 96 steps", compare(longer["full"], longer["lora"])
    yield 4, "LoRA of 96 steps above full of 48", compare(longer["lora"], main["full"])
    for rank in (1, 2, 4, 16, 64):
        yield (
            4,
            f"full above rank {rank}",
            compare(main["full"], rows_of("ranks", rank=rank)),
        )
        yield (
            4,
            f"rank {rank} above the cut to it",
            compare(rows_of("ranks", rank=rank), rows_of("main", **FULL, cut=rank)),
        )
    for choice, part in PLACES.items():
        placed = [row for row in rows_of("layers") if part in row["targets"]]
        yield 4, f"{choice} alone, above all layers", compare(placed, main["lora"])
    yield from of_many_adapters()
    yield from of_few_bits()


def of_many_adapters():
    base = rows_of("main", **NONE)
    alone = {
        library: [
            row
            for row in rows_of("libraries", steps=32, libraries=[library])
            if row["start"] > 0
        ]
        for library in LIBRARIES
    }
    for library, rows in alone.items():
        yield 5, f"{library}, its own adapter", compare(rows, base, [library])
    sides = [
        (alone[mine], alone[other], [mine])
        for mine in LIBRARIES
        for other in LIBRARIES
        if other != mine
    ]
    yield 5, "at home, above the six others", pooled(sides)
    ahead, costs = [], []
    for pair in combinations(LIBRARIES, 2):
        both = rows_of("libraries", steps=32, start=-1, composed=" + ".join(pair))
        for mine, other in (pair, pair[::-1]):
            ahead.append(compare(both, alone[other], [mine])[1][0] > 0)
            costs.append((both, alone[mine], [mine]))
    yield (
        5,
        f"a sum above one's own ({sum(ahead)} of 42 beat the other's)",
        pooled(costs),
    )


def of_few_bits():
    dense = rows_of("bases", **NONE, base="float32")
    lora = rows_of("main", **LORA)
    for kind in ("NF4", "NF3", "NF2", "int8", "int4", "int3"):
        rounded = rows_of("bases", **NONE, base=kind, block=64, double=False)
        trained = rows_of("bases", **LORA, base=kind, steps=48, double=False)
        yield 6, f"{kind}, rounded, above float32", compare(rounded, dense)
        yield 6, f"LoRA on {kind}, above LoRA on float32", compare(trained, lora)


def main():
    for chapter, what, (mean, *intervals) in comparisons():
        shown = " ".join(f"[{low:+6.2f}, {high:+6.2f}]" for low, high in intervals)
        print(f"{chapter}  {what:52}{mean:+6.2f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
