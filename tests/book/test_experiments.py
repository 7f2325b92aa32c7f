"""The recorded runs: how they are made, and that those in the repository are whole."""

import copy
import json
import re
import subprocess
from collections import Counter
from importlib.metadata import version

import pytest
import torch
import yaml
from torch import nn

from lora import core
from lora.study import runs, search
from tools import experiments
from tools.kit.register import ROOT

HEAD = "0" * 40
JOBS = [
    ("main", {"method": "none", "seed": 1}),
    ("main", {"method": "full", "lr": 2e-4, "seed": 1, "cuts": (1, 4)}),
    ("bases", {"method": "none", "seed": 1, "bases": [("NF4", 64), ("int4", 32)]}),
]


def rows_of(job):
    """What a run would give, without making it."""
    study, settings = job
    keys = settings.keys() & runs.DEFAULTS.keys()
    row = {"study": study} | runs.DEFAULTS | {k: settings[k] for k in keys}
    row |= {"versions": runs.versions(), "ranks": {"numpy": [1, 2]}}
    rows = [row]
    rows += [row | {"cut": k} for k in settings.get("cuts", ())]
    bases = settings.get("bases", ())
    return rows + [row | {"base": base, "block": block} for base, block in bases]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A file of its own, JOBS as the only studies, runs that cost nothing; the log."""
    monkeypatch.setattr(runs, "DATA", tmp_path / "runs.jsonl")
    monkeypatch.setattr(runs, "STAMP", tmp_path / "runs.json")
    monkeypatch.setattr(experiments, "commit", lambda: HEAD)
    grouped = [(study, [settings]) for study, settings in JOBS]
    monkeypatch.setattr(experiments, "studies", lambda: grouped)
    log = []

    def results(jobs):
        for job in jobs:
            log.append(job)
            yield rows_of(job)

    monkeypatch.setattr(experiments, "results", results)
    return log


def lines():
    return runs.DATA.read_text().splitlines(keepends=True)


def test_each_run_is_made_once(made):
    experiments.run()
    assert made == JOBS
    expected = [row for job in JOBS for row in rows_of(job)]
    assert [json.loads(line) for line in lines()] == expected
    assert set(experiments.made()) == {
        key for job in JOBS for key in experiments.keys(job)
    }
    before = runs.DATA.read_bytes(), runs.STAMP.read_bytes()
    experiments.run()
    assert made == JOBS, "nothing was made again"
    assert before == (runs.DATA.read_bytes(), runs.STAMP.read_bytes())


def test_a_study_by_its_name(made):
    experiments.run("bases")
    assert made == JOBS[2:]
    with pytest.raises(ValueError, match="no study matches 'base'; there are main, ba"):
        experiments.run("base")


def test_stopped_between_two_runs(made, monkeypatch):
    stop = iter([False, True])
    results = experiments.results

    def stopped(jobs):
        for rows in results(jobs):
            if next(stop):
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(experiments, "results", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiments.run()
    assert runs.rows("main").shape[0] == 1
    monkeypatch.setattr(experiments, "results", results)
    made.clear()
    experiments.run()
    assert made == JOBS[1:]


@pytest.mark.parametrize("kept", range(1, 7))
@pytest.mark.parametrize("half", [True, False])
def test_a_file_that_was_cut_is_mended(made, kept, half, capsys):
    """After any number of lines, in the middle of the next or not."""
    experiments.run()
    whole = lines()
    runs.DATA.write_text("".join(whole[:kept]) + whole[kept][:50] * half)
    made.clear()
    experiments.run()
    complete = (1, 4, 7)
    assert made == JOBS[sum(kept >= n for n in complete) :]
    assert sorted(lines()) == sorted(whole), "no row is missing, none is there twice"
    assert ("was cut" in capsys.readouterr().out) == half
    assert experiments.digest().items() <= experiments.stamped().items()


def test_other_faults_of_the_file_are_refused(made):
    experiments.run()
    whole = lines()
    runs.DATA.write_text("".join([whole[0], "{\n", *whole[1:]]))
    with pytest.raises(ValueError, match="line 2 of .* is no JSON"):
        experiments.run()
    runs.DATA.write_text("".join([*whole, whole[1]]))
    with pytest.raises(ValueError, match="line 8 of .* is there twice"):
        experiments.run()


def test_the_stamp_is_of_the_rows(made, capsys):
    experiments.run("main")
    stamp = json.loads(runs.STAMP.read_text())
    assert stamp == experiments.digest() | {"commits": [HEAD]} and stamp["rows"] == 4
    experiments.stamp("1" * 40)
    assert experiments.stamped()["commits"] == [HEAD, "1" * 40]
    runs.DATA.write_text("".join(lines()[:2]).replace("2]", "3]"))
    capsys.readouterr()
    experiments.run("main")
    assert experiments.stamped()["commits"] == [HEAD, "1" * 40]
    runs.DATA.write_text("".join(lines()).replace("2]", "3]"))
    experiments.run("main")
    assert "runs.json is of other rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match="40 hexadecimal digits, got 'main'"):
        experiments.stamp("main")


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a"]
    for name in ("lora/study/data/runs.jsonl", "lora/core.py", "tools/experiments.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    head = experiments.commit()
    assert re.fullmatch("[0-9a-f]{40}", head)
    (tmp_path / "lora/study/data/runs.jsonl").write_text("2\n")
    (tmp_path / "notes").write_text("2\n")
    assert experiments.commit() == head
    (tmp_path / "lora/core.py").write_text("2\n")
    with pytest.raises(SystemExit, match=r"Commit first(.|\n)*lora/core.py"):
        experiments.commit()


def test_compare(made, monkeypatch, capsys):
    assert experiments.compare("main") == 1, "nothing is recorded"
    experiments.run()
    assert experiments.compare("main") == 0
    assert "4 rows compared, 0 faults" in capsys.readouterr().out
    rows = experiments.made()
    for change in ({"ranks": {"numpy": [1, 3]}}, {"versions": "torch=1.0"}):
        wrong = copy.deepcopy(rows)
        wrong[experiments.keys(JOBS[0])[0]] |= change
        monkeypatch.setattr(experiments, "made", lambda wrong=wrong: wrong)
        assert experiments.compare("main") == 1
    monkeypatch.setattr(experiments, "made", lambda: rows)
    monkeypatch.setattr(experiments, "TOLERANCE", -1)
    assert experiments.compare("main") == 1


def test_runs_are_made_in_processes_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "one", copy.copy)  # a job that is its own result
    jobs = [(("main", {"seed": i}), [{"row": i}], 1.0) for i in range(2)]
    found = list(experiments.results(jobs))
    assert sorted(rows[0]["row"] for rows in found) == [0, 1]
    assert "2/2 main {'seed': " in capsys.readouterr().out


def test_a_full_run_keeps_the_spectrum_of_its_change(monkeypatch):
    """Its row as it is written, and the rows of its cuts, on layers of width 6."""

    def model():
        torch.manual_seed(0)
        return nn.ModuleDict({"encoder": nn.ModuleDict({"a": nn.Linear(6, 6)})})

    tuned = model()
    directions = torch.linalg.qr(torch.randn(6, 6))[0]
    values = torch.tensor([3.0, 2, 1, 0, 0, 0])
    with torch.no_grad():
        tuned["encoder"]["a"].weight += directions * values @ directions.T
    settings = runs.DEFAULTS | {"method": "full"}
    row = settings | {"ranks": {}}
    monkeypatch.setattr(experiments, "KS", (1, 2, 6))
    monkeypatch.setattr(runs, "run", lambda **s: (None, tuned, dict(row)))
    monkeypatch.setattr(search, "load_minilm", lambda: (None, model()))
    monkeypatch.setattr(runs, "data", lambda seed: ((), (), {}))

    def distance(cut, tokenizer, report):
        gap = cut["encoder"]["a"].weight - tuned["encoder"]["a"].weight
        return {"gap": gap.norm().item()}

    monkeypatch.setattr(runs, "ranks", distance)
    job = ("change", {"method": "full", "cuts": (1, 2, 6)})
    (_, rows, _) = experiments.one(job)
    assert rows[0]["energy"] == {"encoder.a": [round(9 / 14, 4), round(13 / 14, 4), 1]}
    assert rows[0]["rank_90"] == {"encoder.a": 2}
    assert [r["cut"] for r in rows[1:]] == [1, 2, 6]
    gaps = [r["ranks"]["gap"] for r in rows[1:]]
    assert gaps == pytest.approx([5**0.5, 1, 0], abs=1e-5)
    assert [experiments.key(row) for row in rows] == experiments.keys(job)
    assert job[1] == {"method": "full", "cuts": (1, 2, 6)}, "the job is as it was"


# Two adapters of rank 1 on a layer from 2 to 2, with scale 2, put together by hand.
SUMS = {
    "both": ("sum", ("numpy", "scipy"), 1.0),
    "half": ("sum", ("numpy", "scipy"), 0.5),
    "means": ("average", ("numpy", "scipy"), 0.5),
    "roots": ("linear", ("numpy", "scipy"), 1.0),
    "cut": ("rank 8", ("numpy", "scipy"), 1.0),
}
B, A = {"numpy": [1.0, 0], "scipy": [0.0, 1]}, {"numpy": [1.0, 0], "scipy": [3.0, 4]}
BY_HAND = {
    "both": [[2, 0], [6, 8]],
    "half": [[1, 0], [3, 4]],
    "means": [[2, 2], [2, 2]],  # 2 · (1/2, 1/2) times (4/2, 4/2)
    "roots": [[8, 8], [8, 8]],  # 2 · (1, 1) times (4, 4)
    "cut": [[2, 0], [6, 8]],
}


@pytest.mark.parametrize("start", [-1, 0])
def test_adapters_and_their_sums(monkeypatch, start):
    """Which runs are made, from which starts, and what each sum adds to the base."""

    def base():
        model = nn.ModuleDict({"encoder": nn.ModuleDict({"a": nn.Linear(2, 2)})})
        nn.init.zeros_(model["encoder"]["a"].weight)
        return model

    log = []

    def run(**settings):
        log.append((settings["libraries"], settings["start"]))
        model, (library,) = base(), settings["libraries"]
        (layer,) = core.inject_lora(model, rank=1, alpha=2.0)
        layer.A.data = torch.tensor([A.get(library, [0.0, 0])])
        layer.B.data = torch.tensor([B.get(library, [0.0, 0])]).T
        return None, model, runs.DEFAULTS | settings | {"ranks": {}}

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(search, "load_minilm", lambda: (None, base()))
    monkeypatch.setattr(runs, "data", lambda seed: ((), (), {}))
    monkeypatch.setattr(runs, "ranks", lambda m, *_: m["encoder"]["a"].weight.tolist())
    settings = {"method": "lora", "start": start, "seed": 1, "steps": 3, "each": SUMS}
    (job, rows, _) = experiments.one(("libraries", settings))
    starts = [1, 2, 3, 4, 5, 6, 7] if start < 0 else [0] * 7
    assert log == [([name], s) for name, s in zip(search.LIBRARIES, starts)]
    assert [experiments.key(row) for row in rows] == experiments.keys(job)
    found = {row["composed"]: row["ranks"] for row in rows[7:]}
    for name, matrix in BY_HAND.items():
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(matrix) * 1.0
        )
    assert all(row["libraries"] == ["numpy", "scipy"] for row in rows[7:])


def test_a_sum_that_is_cut_keeps_its_largest_directions(monkeypatch):
    def base():
        model = nn.ModuleDict({"encoder": nn.Linear(20, 20)})
        nn.init.zeros_(model["encoder"].weight)
        return None, model

    monkeypatch.setattr(search, "load_minilm", base)
    directions = torch.linalg.qr(torch.randn(20, 12))[0]
    values = torch.arange(12.0, 0, -1)
    parts = [
        {"encoder": (directions[:, half] * values[half], directions[:, half].T)}
        for half in (slice(0, 12, 2), slice(1, 12, 2))
    ]
    cut = experiments.together(parts, "rank 8", 1.0)["encoder"].weight.detach()
    expected = torch.cat([values[:8], torch.zeros(12)])
    torch.testing.assert_close(
        torch.linalg.svdvals(cut), expected, atol=1e-4, rtol=1e-4
    )


# --- What is planned, and what is in the repository ---


def planned():
    return [(s, settings) for s, runs in experiments.studies() for settings in runs]


def test_no_run_is_planned_twice():
    count = Counter(key for job in planned() for key in experiments.keys(job))
    assert count.most_common(1)[0][1] == 1


def test_the_weekly_job_makes_all_studies_again():
    workflow = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text())
    matrix = workflow["jobs"]["experiments"]["strategy"]["matrix"]["study"]
    assert matrix == list(dict.fromkeys(study for study, _ in planned()))


def test_a_seed_that_chooses_does_not_report():
    for study, settings in planned():
        chooses = study in ("rates", "alpha")
        assert (settings["seed"] in (0, 6)) == chooses


@pytest.fixture(scope="module")
def rows():
    return list(experiments.made().values())


def test_the_file_is_small_and_stamped():
    assert runs.DATA.stat().st_size < 2e6
    assert runs.DATA.read_bytes().endswith(b"\n")
    stamp = experiments.stamped()
    assert stamp == experiments.digest() | {"commits": stamp["commits"]}
    assert stamp["commits"]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in stamp["commits"])


def test_no_line_was_written_by_hand(rows):
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    assert text == runs.DATA.read_text()


def test_what_is_planned_is_recorded_and_nothing_else(rows):
    there = {experiments.key(row) for row in rows}
    missing = [job for job in planned() if not set(experiments.keys(job)) <= there]
    assert not missing, f"{len(missing)} runs to make, first {missing[0]}"
    strange = {row["study"] for row in rows} - {study for study, _ in planned()}
    assert not strange


def test_versions_are_the_pinned_ones(rows):
    requirements = (ROOT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", requirements, re.MULTILINE))
    for text in {row["versions"] for row in rows if "versions" in row}:
        found = dict(entry.split("=") for entry in text.split())
        assert {k: v.partition("+")[0] for k, v in found.items()} == {
            name: pins[name] for name in runs.PACKAGES
        }


def test_rows_hold_what_the_chapters_read(rows):
    for row in rows:
        assert {"study", "ranks", "method", "seed", "lr", "steps"} <= row.keys()
        found = [rank for ranks in row["ranks"].values() for rank in ranks]
        assert all(type(rank) is int and 1 <= rank <= 150 for rank in found)
        assert all(len(ranks) == 150 for ranks in row["ranks"].values())
        assert list(row["ranks"]) == list(search.LIBRARIES) and len(found) == 1050
        if "cut" in row or "composed" in row:
            continue
        assert "versions" in row
        assert {len(ranks) for ranks in row["chosen"].values()} == {50}
        steps = 0 if row["method"] == "none" else row["steps"]
        assert len(row["losses"]) == steps
        assert all(0 < loss < 10 for loss in row["losses"])
        if row["method"] == "full" and row["study"] != "rates":
            assert len(row["energy"]) == len(row["rank_90"]) == 36
            assert all(e == sorted(e) and e[-1] == 1 for e in row["energy"].values())


def test_summaries_come_from_the_ranks(rows):
    """`points` against a sum by hand, and a cut at full rank against the whole."""
    for row in rows:
        total, count = 0.0, 0
        for ranks in row["ranks"].values():
            for rank in ranks:
                total, count = total + 1 / rank, count + 1
        assert runs.points(row) == pytest.approx(100 * total / count)


def test_pins_are_what_is_installed():
    for name in (*runs.PACKAGES, "tqdm", "huggingface_hub"):
        pin = re.search(
            rf"^{name}==(\S+)", (ROOT / "requirements.txt").read_text(), re.M
        )
        assert pin[1] == version(name).partition("+")[0]
