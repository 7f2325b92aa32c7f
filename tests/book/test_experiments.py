"""The recorded runs: how they are made, and that those in the repository are whole."""

import copy
import json
import re
import subprocess
from importlib.metadata import version

import pytest
import yaml

from lora.study import chat_runs, runs
from lora.study.docstrings import LIBRARIES
from tools import experiments
from tools.kit.register import ROOT, notebooks

HEAD = "0" * 40
JOBS = [
    ("main", {"method": "none", "seed": 1}),
    ("main", {"method": "full", "lr": 2e-4, "seed": 1, "cuts": (1, 4)}),
    ("bases", {"method": "none", "seed": 1, "base": "NF4"}),
]


def rows_of(job):
    """What a run would give, without making it."""
    study, settings = job
    keys = settings.keys() & runs.DEFAULTS.keys()
    row = {"study": study} | runs.DEFAULTS | {k: settings[k] for k in keys}
    row |= {"versions": runs.versions(), "ranks": {"numpy": [1, 2]}}
    return [row, *(row | {"cut": k} for k in settings.get("cuts", ()))]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A file of its own, JOBS as the only studies, runs that cost nothing; the log."""
    monkeypatch.setattr(runs, "DATA", tmp_path / "runs.jsonl")
    monkeypatch.setattr(experiments, "RECORDS", (runs,))
    monkeypatch.setattr(experiments, "commit", lambda: HEAD)
    planned = {"main": [JOBS[0][1], JOBS[1][1]], "bases": [JOBS[2][1]]}
    monkeypatch.setattr(runs, "studies", lambda: planned)
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
    assert set(experiments.made(runs)) == {
        key for job in JOBS for key in experiments.keys(job)
    }
    before = [file.read_bytes() for file in sorted(runs.DATA.parent.glob("runs.*"))]
    experiments.run()
    assert made == JOBS, "nothing was made again"
    after = [file.read_bytes() for file in sorted(runs.DATA.parent.glob("runs.*"))]
    assert before == after and len(after) == 2


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
    assert runs.recorded("main").shape[0] == 1
    monkeypatch.setattr(experiments, "results", results)
    made.clear()
    experiments.run()
    assert made == JOBS[1:]


@pytest.mark.parametrize("kept", range(1, 5))
@pytest.mark.parametrize("half", [True, False])
def test_a_file_that_was_cut_is_mended(made, kept, half, capsys):
    """After any number of lines, in the middle of the next or not."""
    experiments.run()
    whole = lines()
    runs.DATA.write_text("".join(whole[:kept]) + whole[kept][:50] * half)
    made.clear()
    experiments.run()
    complete = (1, 4, 5)
    assert made == JOBS[sum(kept >= n for n in complete) :]
    assert sorted(lines()) == sorted(whole), "no row is missing, none is there twice"
    assert ("was cut" in capsys.readouterr().out) == half
    assert experiments.digest(runs).items() <= experiments.stamped(runs).items()


def test_other_faults_of_the_file_are_refused(made):
    experiments.run()
    whole = lines()
    runs.DATA.write_text("".join([whole[0], "{\n", *whole[1:]]))
    with pytest.raises(json.JSONDecodeError):
        experiments.run()
    runs.DATA.write_text("".join([*whole, whole[1]]))
    with pytest.raises(ValueError, match="line 6 of .* is there twice"):
        experiments.run()


def test_the_stamp_is_of_the_rows(made, capsys):
    experiments.run("main")
    stamp = experiments.stamped(runs)
    assert (
        stamp == experiments.digest(runs) | {"commits": [HEAD]} and stamp["rows"] == 4
    )
    experiments.stamp("1" * 40)
    assert experiments.stamped(runs) == stamp, "the rows had their stamp"
    runs.DATA.write_text("".join(lines()).replace("1", "2", 1))
    experiments.stamp("1" * 40)
    assert experiments.stamped(runs)["commits"] == [HEAD, "1" * 40]
    runs.DATA.write_text("".join(lines()[:2]).replace("2]", "3]"))
    capsys.readouterr()
    experiments.run("main")
    assert experiments.stamped(runs)["commits"] == [HEAD, "1" * 40]
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
    rows = experiments.made(runs)
    for change in ({"ranks": {"numpy": [1, 3]}}, {"versions": "torch=1.0"}):
        wrong = copy.deepcopy(rows)
        wrong[experiments.keys(JOBS[0])[0]] |= change
        monkeypatch.setattr(experiments, "made", lambda _, wrong=wrong: wrong)
        assert experiments.compare("main") == 1
    monkeypatch.setattr(experiments, "made", lambda _: rows)
    monkeypatch.setattr(runs, "TOLERANCE", -1)
    assert experiments.compare("main") == 1


def test_runs_are_made_in_processes_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "one", copy.copy)  # a job that is its own result
    jobs = [(("main", {"seed": i}), [{"row": i}], 1.0) for i in range(2)]
    found = list(experiments.results(jobs))
    assert sorted(rows[0]["row"] for rows in found) == [0, 1]
    assert "2/2 main {'seed': " in capsys.readouterr().out


# --- What is planned, and what is in the repository ---


def planned():
    return experiments.selected()


def test_the_weekly_job_makes_all_recorded_studies_again():
    workflow = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text())
    matrix = workflow["jobs"]["experiments"]["strategy"]["matrix"]["study"]
    missing = {study for study, _ in experiments.missing(planned())}
    studies = list(dict.fromkeys(study for study, _ in planned()))
    assert matrix == [study for study in studies if study not in missing]


@pytest.fixture(scope="module")
def rows():
    return list(experiments.made(runs).values())


@pytest.fixture(scope="module")
def chat_rows():
    return list(experiments.made(chat_runs).values())


@pytest.mark.parametrize("record", experiments.RECORDS)
def test_a_file_is_small_stamped_and_written_by_no_hand(record):
    assert record.DATA.stat().st_size < 4e6
    stamp = experiments.stamped(record)
    assert stamp == experiments.digest(record) | {"commits": stamp["commits"]}
    assert stamp["commits"]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in stamp["commits"])
    rows = experiments.made(record).values()
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    assert text == record.DATA.read_text()


def test_what_chapters_read_is_recorded_whole(rows, chat_rows):
    """Of MiniLM all that is planned; of the chat model, whose runs are dear, this."""
    cells = [cell for book in notebooks().values() for cell in book.cells]
    code = "".join(cell.source for cell in cells if cell.cell_type == "code")
    read = {study for study in chat_runs.studies() if f'"{study}"' in code}
    assert "chat main" in read
    jobs = [job for job in planned() if job[0] in {*runs.studies()} | read]
    missing = experiments.missing(jobs)
    assert not missing, f"{len(missing)} runs to make, first {missing[0]}"
    strange = {r["study"] for r in rows + chat_rows} - {study for study, _ in planned()}
    assert not strange


def test_versions_are_the_pinned_ones(rows, chat_rows):
    requirements = (ROOT / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", requirements, re.MULTILINE))
    for text in {row["versions"] for row in rows + chat_rows if "versions" in row}:
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
        assert list(row["ranks"]) == list(LIBRARIES) and len(found) == 1050
        if row.keys() & {"cut", "merged", "composed"}:
            continue
        assert "versions" in row
        assert {len(ranks) for ranks in row["chosen"].values()} == {50}
        steps = 0 if row["method"] == "none" else row["steps"]
        assert len(row["losses"]) == steps
        by_heart = row.get("pairs") == 50  # then a loss is rounded to zero
        assert all(by_heart or loss > 0 for loss in row["losses"])
        assert all(0 <= loss < 10 for loss in row["losses"])
        if row["method"] == "full" and row["study"] != "rates":
            assert len(row["energy"]) == len(row["rank_90"]) == 36
            assert all(e == sorted(e) and e[-1] == 1 for e in row["energy"].values())


def test_pins_are_what_is_installed():
    for name in (*runs.PACKAGES, "tqdm", "huggingface_hub"):
        pin = re.search(
            rf"^{name}==(\S+)", (ROOT / "requirements.txt").read_text(), re.M
        )
        assert pin[1] == version(name).partition("+")[0]
