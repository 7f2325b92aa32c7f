"""The recorded runs: one row a run, in `lora/study/data/runs.jsonl` and `chat.jsonl`.

run [STUDY]     `make experiments`: make the runs that are not there yet
compare STUDY   make a study's runs again and compare with what is recorded
stamp COMMIT    say which commit made rows that came from another clone

What the studies are, the modules in RECORDS say, one for each of the two models.
Stopped at any moment, `run` goes on with the run that it was at. Beside the rows stands
`runs.json` or `chat.json`: their SHA-256 and the commits whose code made them. STUDY is
a regular expression for the whole name.
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

from lora.study import chat_runs, runs
from tools.kit.register import ROOT

RECORDS = runs, chat_runs


def home(study):
    """The module whose study it is."""
    return next(record for record in RECORDS if study in record.studies())


def one(job):
    """(job, its rows, seconds of processor time), in a process of its own."""
    torch.set_num_threads(1)
    study, settings = job
    start = time.process_time()
    rows = [{"study": study} | row for row in home(study).make_rows(settings)]
    return job, rows, time.process_time() - start


def key(record, row):
    """What tells one row from another: its study, its settings, what it was made of."""
    settings = record.DEFAULTS | row
    return json.dumps([row["study"], *(settings.get(k) for k in record.KEYS)])


def keys(job):
    """The keys of all rows that a job makes."""
    study, settings = job
    record = home(study)
    return [key(record, {"study": study} | row) for row in record.planned(settings)]


def made(record):
    """Key -> row, of all that is recorded. A last line that was cut is left out."""
    text = record.DATA.read_text() if record.DATA.exists() else ""
    *lines, last = text.split("\n")
    rows = {}
    for i, line in enumerate(lines, 1):
        row = json.loads(line)
        if key(record, row) in rows:
            raise ValueError(f"line {i} of {record.DATA} is there twice")
        rows[key(record, row)] = row
    if last:
        print("the last line was cut: its run is made again", flush=True)
    return rows


def store(record, rows, commit):
    """Replace the file in one go, so that no interruption cuts it, then stamp it."""
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
    new = record.DATA.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(record.DATA)
    sign(record, commit)


def stamped(record):
    """What a file's stamp says: {"sha256": ..., "rows": ..., "commits": [...]}."""
    file = record.DATA.with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {}


def digest(record):
    """What the stamp must say of the rows that are there."""
    data = record.DATA.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "rows": data.count(b"\n")}


def unsigned():
    """The records whose stamp is of other rows than are there."""
    there = [record for record in RECORDS if record.DATA.exists()]
    return [r for r in there if not digest(r).items() <= stamped(r).items()]


def sign(record, commit):
    """Write down the checksum, and that `commit`, 40 hex digits, made some rows."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(f"a commit has 40 hexadecimal digits, got {commit!r}")
    commits = dict.fromkeys([*stamped(record).get("commits", []), commit])
    text = json.dumps(digest(record) | {"commits": list(commits)}, indent=2)
    record.DATA.with_suffix(".json").write_text(text + "\n")


def stamp(commit):
    """Sign the rows that are unsigned."""
    for record in unsigned():
        sign(record, commit)


def commit():
    """The commit whose code runs; refuses changes that no commit holds."""
    code = ["lora", "tools/experiments.py", ":!lora/study/data"]
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
    """The rows of each job as soon as they are made, with a line that says so.

    Processes are kept: to read the libraries takes as long as a short run, and a pool
    that makes new ones after some jobs may wait for ever (python/cpython#115634).
    """
    workers = int(os.environ.get("WORKERS", "2"))
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        for n, future in enumerate(as_completed(futures), 1):
            (study, settings), rows, seconds = future.result()
            settings = {k: v for k, v in settings.items() if k != "sums"}
            print(f"{n}/{len(jobs)} {study} {settings} {seconds:.0f} s", flush=True)
            yield rows


def selected(only=".*"):
    """The jobs of the studies whose name matches; ValueError if there is none."""
    studies = {name: jobs for r in RECORDS for name, jobs in r.studies().items()}
    names = [study for study in studies if re.fullmatch(only, study)]
    if not names:
        raise ValueError(f"no study matches {only!r}; there are {', '.join(studies)}")
    return [(study, settings) for study in names for settings in studies[study]]


def missing(jobs):
    """Those of the jobs of which a row is not recorded."""
    there = {key for record in RECORDS for key in made(record)}
    return [job for job in jobs if not set(keys(job)) <= there]


def run(only=".*"):
    """Make the runs of which a row is missing, and record each as soon as it is made.

    A run that is there in part is made again as a whole.
    """
    head, jobs = commit(), missing(selected(only))
    print(f"{len(jobs)} runs to make", flush=True)
    for new in results(jobs):
        record = home(new[0]["study"])
        rows = made(record)
        for row in new:
            rows.pop(key(record, row), None)
        store(record, [*rows.values(), *new], head)
    for record in unsigned():
        print(f"{record.DATA.stem}.json is of other rows: see `stamp COMMIT`")
    return 0


def compare(only=".*"):
    """Make runs again: 1 if a mean is farther than it may be from the recorded one."""
    wrong, compared = 0, 0
    for row in (row for new in results(selected(only)) for row in new):
        record = home(row["study"])
        old = made(record).get(key(record, row))
        if old is None:
            print(f"not recorded: {key(record, row)}")
            wrong += 1
            continue
        if "versions" in row and (other := runs.other_versions(old)):
            print(f"recorded with other versions: {other}")
            wrong += 1
        then, now = record.points(old), record.points(row)
        compared += 1
        if not abs(then - now) <= record.TOLERANCE:
            print(f"{then:.2f} recorded, {now:.2f} now: {key(record, row)}")
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
