"""The recorded runs of Part II: one row a run, in `lora/study/data/runs.jsonl`.

run [STUDY]     `make experiments`: make the runs that are not there yet
compare STUDY   make a study's runs again and compare with what is recorded
stamp COMMIT    say which commit made rows that came from another clone

A study is a list of settings of `lora.runs.run`. Stopped at any moment, `run` goes
on with the run that it was at. Beside the rows stands `runs.json`: their SHA-256 and
the commits whose code made them. STUDY is a regular expression for the whole name.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from lora import bases, core, formats
from lora.study import runs, search
from tools.kit.register import ROOT

EXTRAS = ("cuts", "bases", "each")  # settings that add rows to a run's own
KS = (1, 2, 4, 8, 16, 32, 64, 384)
# Between processors, training in float32 goes other ways: what may lie between the mean
# reciprocal ranks of two runs of the same settings, in points.
TOLERANCE = 1.0
FULL, LORA = {"method": "full", "lr": 2e-4}, {"method": "lora", "lr": 2e-3}
# How the adapters of the seven libraries are put together: name -> (method, what goes
# in, the weight of each). "sum" adds the updates B A; "average" multiplies the mean B
# by the mean A; "linear" is PEFT's, the roots of the weights on both factors;
# "rank 8" cuts each layer's sum to its eight largest directions.
SEVEN = {
    f"{method}, {weight:.2f}": (method, search.LIBRARIES, weight)
    for method in ("sum", "rank 8", "linear")
    for weight in (1 / 7, 0.35, 1.0)
}
SEVEN["average"] = ("average", search.LIBRARIES, 1 / 7)
PAIRS = {
    f"{a} + {b}": ("sum", (a, b), 1.0)
    for i, a in enumerate(search.LIBRARIES)
    for b in search.LIBRARIES[i + 1 :]
}
FACTORS = {name: of for name, of in SEVEN.items() if of[0] != "rank 8"}


def search_run(settings):
    """The rows of one run of Chapters 4 to 6, a list.

    Of full fine-tuning the row also says how the change of each layer spreads over its
    directions, and each of the `cuts` has a row of its own: the base with the change's
    best approximation of that rank. `bases` are made in one go: most of a run without
    training is its start.
    """
    settings = dict(settings)
    if composed := settings.pop("each", None):
        return adapters_and_sums(settings, composed)
    cuts, bases = settings.pop("cuts", ()), settings.pop("bases", ())
    tokenizer, model, row = runs.run(**settings)
    found = [row]
    for base, block in bases:
        found.append(runs.run(**settings | {"base": base, "block": block})[2])
    if row["method"] == "full":
        parts = decomposed(model)
        row |= spectrum({name: S for name, (_, S, _) in parts.items()})
        tests = runs.data(row["seed"])[2]
        for k in cuts:
            ranks = runs.ranks(truncated(parts, k), tokenizer, tests)
            kept = {name: row[name] for name in runs.DEFAULTS}
            found.append(kept | {"cut": k, "ranks": ranks})
    return found


def adapters_and_sums(settings, composed):
    """The rows of an adapter for each library, then one for each of the `composed`.

    The adapters start from A's of their own, unless "start" says that they share one.
    """
    found, factors = [], {}
    for settings_of in each(settings):
        tokenizer, model, row = runs.run(**settings_of)
        found.append(row)
        wrappers = bases.find(model, core.LoRALinear)
        factors[row["libraries"][0]] = {
            name: (w.scale * w.B.detach(), w.A.detach()) for name, w in wrappers.items()
        }
    tests = runs.data(settings["seed"])[2]
    for name, (method, libraries, weight) in composed.items():
        parts = [factors[library] for library in libraries]
        ranks = runs.ranks(together(parts, method, weight), tokenizer, tests)
        settings_of = {k: row[k] for k in runs.DEFAULTS}
        settings_of |= {"libraries": list(libraries), "start": settings["start"]}
        found.append(settings_of | {"composed": name, "ranks": ranks})
    return found


def each(settings):
    """The settings of the adapters of the seven libraries, "start" -1 for own ones."""
    own = settings["start"] < 0
    return [
        settings | {"libraries": [library], "start": i if own else settings["start"]}
        for i, library in enumerate(search.LIBRARIES, 1)
    ]


def together(parts, method, weight):
    """The base with the sum of updates, each name -> (B, A), as `method` says."""
    _, model = search.load_minilm()
    root = abs(weight) ** 0.5
    for name, layer in runs.layers(model).items():
        Bs, As = zip(*(part[name] for part in parts))
        update = weight * sum(B @ A for B, A in zip(Bs, As))
        if method == "average":
            update = (weight * sum(Bs)) @ (weight * sum(As))
        elif method == "linear":
            update = (root * sum(Bs)) @ (root * sum(As))
        elif method == "rank 8":
            U, S, V = torch.linalg.svd(update, full_matrices=False)
            update = (U[:, :8] * S[:8]) @ V[:8]
        layer.weight.data += update
    return model


def decomposed(model):
    """Name -> the singular value decomposition of a linear layer's change."""
    base = runs.layers(search.load_minilm()[1])
    return {
        name: torch.linalg.svd(
            layer.weight.detach() - base[name].weight.detach(), full_matrices=False
        )
        for name, layer in runs.layers(model).items()
    }


def spectrum(values):
    """What a row keeps of the singular values of each layer: see `KS`."""
    energy = {n: S.square().cumsum(0) / S.square().sum() for n, S in values.items()}
    return {
        "energy": {
            n: [round(e[k - 1].item(), 4) for k in KS] for n, e in energy.items()
        },
        "rank_90": {n: 1 + int((e < 0.9).sum()) for n, e in energy.items()},
    }


def truncated(parts, k):
    """The base, with k directions of each linear layer's change added."""
    _, model = search.load_minilm()
    for name, layer in runs.layers(model).items():
        U, S, V = parts[name]
        layer.weight.data += (U[:, :k] * S[:k]) @ V[:k]
    return model


def over(seeds, *runs, **settings):
    return [run | settings | {"seed": seed} for seed in seeds for run in runs]


def studies():
    """[(name, list of settings)], in the order in which they are worth having.

    Seeds 0 and 6 serve to choose, by the pairs set aside for that; others report.
    """
    rates = {"full": (5e-5, 1e-4, 2e-4, 4e-4), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}
    grid = [{"method": m, "lr": r} for m in rates for r in rates[m]]
    attention, last = r".*attention\..*\.(query|key|value|dense)", r".*\.[45]\..*"
    mlp = r".*\.\d\.(intermediate|output)\.dense"
    main = [{"method": "none"}, LORA, FULL | {"cuts": KS}]
    changes = [
        FULL | {"cuts": (8, 384)} | setting
        for setting in (
            {"lr": FULL["lr"] / 2},
            {"lr": FULL["lr"] * 2},
            {"steps": 96},
            {"shuffled": True, "cuts": ()},
        )
    ]
    ranks = [LORA | {"rank": r} for r in (1, 2, 4, 16, 64)]
    layers = [
        LORA | {"rank": r, "targets": t}
        for t, r in ((attention, 18), (mlp, 14), (last, 24))
    ]
    kinds = [k for k in formats.LEVELS if k not in ("FP4", "affine int4")]
    zero_shot = [(k, 64) for k in kinds]
    zero_shot += [(k, 32) for k in ("NF4", "affine int4", "int4")]
    zero_shot = {"method": "none", "bases": zero_shot}
    best, worst = LORA | {"base": "NF4"}, LORA | {"base": "NF2"}
    between = [LORA | {"base": k} for k in ("int3", "NF3", "int4", "int8")]
    long = [run | {"steps": 96} for run in (best, worst)]
    # Divided by r, by its root, or not at all: each rule is scale 1 at rank 8.
    alpha = [
        {"method": "lora", "rank": r, "scale": round(scale, 4), "lr": lr}
        for r in (1, 64)
        for scale in (8 / r, (8 / r) ** 0.5, 1.0)
        for lr in rates["lora"]
    ]
    decays = [FULL | {"cuts": (8, 384), "decay": decay} for decay in (0.0, 1.0)]
    adapters = LORA | {"steps": 32, "start": -1, "each": SEVEN | PAIRS}
    shared = adapters | {"start": 0, "each": FACTORS}
    everything = LORA | {"libraries": list(search.LIBRARIES)}
    on_all = [everything | {"steps": n} for n in (32, 224)]
    return [
        ("rates", over([0, 6], *grid)),
        ("main", over([1, 2, 3], *main)),
        ("libraries", over([1, 2, 3], adapters, *on_all)),
        ("libraries", over([1, 2], adapters, steps=16)),
        ("libraries", over([1, 2], shared)),
        ("change", over([1, 2, 3, 4, 5], *changes)),
        ("decay", over([1, 2, 3, 4, 5], *decays)),
        ("main", over([4, 5], *main)),
        ("ranks", over([1, 2, 3, 4, 5], *ranks)),
        ("longer", over([1, 2, 3, 4, 5], LORA | {"steps": 96})),
        ("alpha", over([0, 6], *alpha)),
        ("bases", over([1, 2, 3], zero_shot, best, worst)),
        ("bases", over([1, 2, 3], *long)),
        ("bases", over([1, 2, 3], *between)),
        ("layers", over([1, 2, 3, 4, 5], *layers)),
    ]


def one(job):
    """(job, its rows, seconds of processor time), in a process of its own."""
    torch.set_num_threads(1)
    study, settings = job
    start = time.process_time()
    found = [{"study": study} | row for row in search_run(settings)]
    return job, found, time.process_time() - start


def key(row):
    """What tells one row from another: its study, its settings, where it is cut."""
    settings = runs.DEFAULTS | row
    names = [*runs.DEFAULTS, "cut", "composed"]
    return json.dumps([row["study"], *(settings.get(k) for k in names)])


def keys(job):
    """The keys of all rows that a job makes."""
    study, settings = job
    row = {"study": study} | {k: v for k, v in settings.items() if k not in EXTRAS}
    if "each" in settings:
        adapters = [key({"study": study} | one) for one in each(row)]
        composed = [
            key(row | {"composed": name, "libraries": list(libraries)})
            for name, (_, libraries, _) in settings["each"].items()
        ]
        return adapters + composed
    more = [{"base": base, "block": n} for base, n in settings.get("bases", ())]
    more += [{"cut": k} for k in settings.get("cuts", ())]
    return [key(row | change) for change in [{}, *more]]


def made():
    """Key -> row, of all that is recorded. A last line that was cut is left out."""
    text = runs.DATA.read_text() if runs.DATA.exists() else ""
    *lines, last = text.split("\n")
    rows = {}
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"line {i} of {runs.DATA} is no JSON") from None
        if key(row) in rows:
            raise ValueError(f"line {i} of {runs.DATA} is there twice")
        rows[key(row)] = row
    if last:
        print("the last line was cut: its run is made again", flush=True)
    return rows


def store(rows, commit):
    """Replace the file in one go, so that no interruption cuts it, then stamp it."""
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
    new = runs.DATA.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(runs.DATA)
    stamp(commit)


def stamped():
    """What the file's stamp says: {"sha256": ..., "rows": ..., "commits": [...]}."""
    return json.loads(runs.STAMP.read_text()) if runs.STAMP.exists() else {}


def digest():
    """What the stamp must say of the rows that are there."""
    data = runs.DATA.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "rows": data.count(b"\n")}


def stamp(commit):
    """Write down the checksum, and that `commit`, 40 hex digits, made some rows."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(f"a commit has 40 hexadecimal digits, got {commit!r}")
    commits = dict.fromkeys([*stamped().get("commits", []), commit])
    text = json.dumps(digest() | {"commits": list(commits)}, indent=2)
    runs.STAMP.write_text(text + "\n")


def commit():
    """The commit whose code runs; refuses changes that no commit holds."""
    code = ["lora", "tools/experiments.py", ":!lora/data"]
    status, head = (
        subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        for command in (["status", "--porcelain", "--", *code], ["rev-parse", "HEAD"])
    )
    if status:
        raise SystemExit(f"Commit first, the rows name the commit:\n{status}")
    return head


def results(jobs):
    """The rows of each job as soon as they are made, with a line that says so."""
    workers = int(os.environ.get("WORKERS", "2"))
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        for n, future in enumerate(as_completed(futures), 1):
            (study, settings), rows, seconds = future.result()
            settings = {k: v for k, v in settings.items() if k != "each"}
            print(f"{n}/{len(jobs)} {study} {settings} {seconds:.0f} s", flush=True)
            yield rows


def selected(only=".*"):
    """The jobs of the studies whose name matches; ValueError if there is none."""
    jobs = [
        (study, settings)
        for study, runs in studies()
        for settings in runs
        if re.fullmatch(only, study)
    ]
    if not jobs:
        names = ", ".join(dict.fromkeys(study for study, _ in studies()))
        raise ValueError(f"no study matches {only!r}; there are {names}")
    return jobs


def run(only=".*"):
    """Make the runs of which a row is missing, and record each as soon as it is made.

    A run that is there in part is made again as a whole.
    """
    head, rows = commit(), made()
    jobs = [job for job in selected(only) if not set(keys(job)) <= rows.keys()]
    print(f"{len(jobs)} runs to make", flush=True)
    for new in results(jobs):
        rows = made()
        for row in new:
            rows.pop(key(row), None)
        store([*rows.values(), *new], head)
    if runs.DATA.exists() and not digest().items() <= stamped().items():
        print(f"{runs.STAMP.name} is of other rows: see `stamp COMMIT`")
    return 0


def compare(only=".*"):
    """Make runs again: 1 if a mean is more than TOLERANCE from the recorded one."""
    rows, wrong, compared = made(), 0, 0
    for row in (row for new in results(selected(only)) for row in new):
        old = rows.get(key(row))
        if old is None:
            print(f"not recorded: {key(row)}")
            wrong += 1
            continue
        if "versions" in row and (other := runs.other_versions(old)):
            print(f"recorded with other versions: {other}")
            wrong += 1
        then, now = runs.points(old), runs.points(row)
        compared += 1
        if not abs(then - now) <= TOLERANCE:
            print(f"{then:.2f} recorded, {now:.2f} now: {key(row)}")
            wrong += 1
    print(f"{compared} rows compared, {wrong} faults")
    return int(wrong > 0 or compared == 0)


def main(command="run", *arguments):
    commands = {"run": run, "compare": compare, "stamp": stamp}
    if command not in commands:
        raise SystemExit(__doc__)
    return commands[command](*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
