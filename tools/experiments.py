"""`make experiments`: the recorded runs of Part II, one row a run, resumable.

A study is a list of settings of `lora.recorded.run` (Chapters 5 and 6 have functions of
their own). A run whose row is in the file already is not made again.
"""

import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

from lora import libraries, recorded, search

KS = (1, 2, 4, 8, 16, 32, 64, 384)
FULL, LORA = {"method": "full", "lr": 2e-4}, {"method": "lora"}


def search_run(settings):
    """One row of Chapter 4; of full fine-tuning also its change, layer by layer."""
    cuts = settings.pop("cuts", ())
    tokenizer, model, row = recorded.run(**settings)
    yield row
    if settings["method"] != "full":
        return
    _, base = search.load_minilm()
    changes = {
        name: layer.weight.detach() - recorded.layers(base)[name].weight.detach()
        for name, layer in recorded.layers(model).items()
    }
    parts = {
        name: torch.linalg.svd(W, full_matrices=False) for name, W in changes.items()
    }
    energy = {
        n: (S.square().cumsum(0) / S.square().sum()) for n, (_, S, _) in parts.items()
    }
    row["energy"] = {
        n: [round(e[k - 1].item(), 4) for k in KS] for n, e in energy.items()
    }
    row["rank_90"] = {n: 1 + int((e < 0.9).sum()) for n, e in energy.items()}
    tests = recorded.data(row["seed"])[2]
    for k in cuts:
        _, cut = search.load_minilm()
        for name, layer in recorded.layers(cut).items():
            U, S, V = parts[name]
            layer.weight.data += (U[:, :k] * S[:k]) @ V[:k]
        kept = {key: value for key, value in row.items() if key in recorded.DEFAULTS}
        yield kept | {"cut": k, "ranks": recorded.ranks(cut, tokenizer, tests)}


def library_run(settings):
    """The rows of Chapter 5 for one seed."""
    return libraries.runs(**settings)


MAKERS = {"libraries": library_run, "half as long": library_run}


def over(seeds, *runs, **settings):
    return [run | settings | {"seed": seed} for seed in seeds for run in runs]


def studies():
    """[(name, list of settings)], in the order in which they are worth having.

    Seed 0 serves to choose rates, by the pairs set aside for that; others report.
    """
    rates = {"full": (5e-5, 1e-4, 2e-4, 4e-4), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}
    attention, last = r".*attention\..*\.(query|key|value|dense)", r".*\.[45]\..*"
    mlp = r".*\.\d\.(intermediate|output)\.dense"
    few, more = range(1, 4), range(4, 6)
    main = [{"method": "none"}, LORA, FULL | {"cuts": KS}]
    changes = [
        FULL | {"cuts": (8, 384)} | setting
        for setting in (
            {"lr": FULL["lr"] / 2},
            {"lr": FULL["lr"] * 2},
            {"steps": 96},
            {"decay": 0.0},
            {"shuffled": True, "cuts": ()},
        )
    ]
    ranks = [LORA | {"rank": r} for r in (1, 2, 4, 16, 32, 64)]
    layers = [
        LORA | {"rank": r, "targets": t}
        for t, r in ((attention, 18), (mlp, 14), (last, 24))
    ]
    alphas = [
        LORA | {"rank": r, "scale": scale, "lr": lr}
        for r in (1, 64)
        for scale in (8 / r, (8 / r) ** 0.5)
        for lr in (LORA["lr"] / 4, LORA["lr"], LORA["lr"] * 4)
    ]
    return [
        ("rates", [{"method": m, "lr": r, "seed": 0} for m in rates for r in rates[m]]),
        ("main", over(few, *main)),
        ("longer", over(few, LORA | {"steps": 96})),
        ("ranks", over(few, *ranks)),
        ("change", over(few, *changes)),
        ("layers", over(few, *layers)),
        ("alpha", over([0], *alphas)),
        ("main", over(more, *main)),
        ("longer", over(more, LORA | {"steps": 96})),
        ("change", over(more, *changes)),
        ("libraries", over(few, {"steps": libraries.STEPS})),
        ("half as long", over(few, {"steps": libraries.STEPS // 2, "sums": False})),
        ("libraries", over([4], {"steps": libraries.STEPS})),
    ]


def one(job):
    torch.set_num_threads(1)
    study, settings = job
    start = time.process_time()
    make = MAKERS.get(study, search_run)(dict(settings))
    found = [{"study": study, **row} for row in make]
    return job, found, time.process_time() - start


def key(row):
    """What tells one run from another: its study and its settings."""
    return json.dumps(
        [row["study"]] + [row.get(k) for k in [*recorded.DEFAULTS, "cut"]]
    )


def main(only=""):
    done = (
        {key(json.loads(line)) for line in recorded.DATA.open()}
        if recorded.DATA.exists()
        else set()
    )
    jobs = [
        (study, settings)
        for study, runs in studies()
        for settings in runs
        if re.search(only, study)
        and key({"study": study} | recorded.DEFAULTS | settings) not in done
    ]
    print(f"{len(jobs)} runs to make", flush=True)
    workers = int(os.environ.get("WORKERS", "2"))
    with ProcessPoolExecutor(
        workers, get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for n, future in enumerate(
            as_completed(pool.submit(one, job) for job in jobs), 1
        ):
            (study, settings), found, seconds = future.result()
            with recorded.DATA.open("a") as file:
                file.writelines(
                    json.dumps(row, separators=(",", ":")) + "\n" for row in found
                )
            print(f"{n}/{len(jobs)} {study} {settings} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
