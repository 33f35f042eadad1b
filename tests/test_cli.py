"""The commands as a person runs them; what they write, what a kill and bad input leave behind."""
import fcntl
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import attack
import evaluate
import model as models
import ssiuu
from data import load_faithun, load_tofu
from evaluate import mismatched_tau, read_flags, run, settings_for

torch.set_num_threads(1)  # sums in another order are other bits
ROOT = Path(__file__).parent.parent
QUICK = {"ssiuu.py": {"lr": 5e-4}, "attack.py": {"attack_lrs": [1e-4], "attack_epochs": 1, "attack_draws": 1,
         "benign_rows": 8, "benign_lrs": [1e-4], "benign_points": 2}}


def prepare(folder, own=QUICK):
    """`folder` with few facts, 6 to forget, 8 to retain, 4 to test, and the tiny model, which sets `own`."""
    (folder / "few").mkdir(exist_ok=True)
    for name, part in (("forget", range(6)), ("retaining", range(6, 14)), ("test", range(14, 18))):
        (folder / f"few/{name}_set_split.txt").write_text("\n".join(map(str, part)))
    facts = json.loads((ROOT / "data/faithun.json").read_text())
    (folder / "facts.json").write_text(json.dumps(dict(list(facts.items())[:7])))
    if not (folder / "tiny").exists():
        shutil.copytree(ROOT / "data/tiny", folder / "tiny")
    (folder / "tiny/unlearn.json").write_text(own if isinstance(own, str) else json.dumps(own))
    return folder


DATA = ["--model", "tiny", "--forget", "facts.json", "--splits", "few"]


def inside(monkeypatch, folder, script, *flags):
    """Runs a command in this process and `folder`, where runs/ appears: what it exits with, or 0."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        run(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as e:
        return e.code
    return 0


def records(folder, *kinds):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] in kinds or not kinds]


def same_weights(a, b):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("run"))
    rows = [{"sentence": f"The {a} is bigger than the {b} because the _ is big.", "option1": a, "option2": b,
             "answer": "1"} for a, b in (("house", "mouse"), ("ship", "shoe"), ("tree", "leaf"))]
    (folder / "winogrande_dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--tau", "0.5", "--steps", "60", "--utility", "."]
    out = subprocess.run([sys.executable, str(ROOT / "ssiuu.py"), *DATA, *flags], cwd=folder, text=True,
                         capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr
    return folder, out


# ------------------------------------------------------------------------------------------- what is written


def test_the_main_command_writes_the_papers_row(finished):
    folder, out = finished
    run = folder / "runs/ssiuu-tiny"
    result, log = json.loads((run / "result.json").read_text()), records(run)
    before, after = result["before"], result["after"]
    assert after["FS"]["percent"] <= 50 < before["FS"]["percent"] and after["reached"]
    assert list(result["attacks"]) == ["Harmful p = 0.1", "Harmful p = 0.3", "Benign"]
    assert after["RS"]["n"] == 4 and before["US"]["n"] == after["US"]["n"] == 3
    assert after["steps"] == len(records(run, "step")) < 60
    assert "| ssiuu | " in out.stdout and "step 1/60  L " in out.stdout
    assert "tiny/unlearn.json sets lr 0.0005" in out.stderr
    by_kind = {r["kind"]: r for r in log}
    assert [r["kind"] for r in log[:2]] == ["before", "step"]
    assert {"after", "harmful", "benign"} < by_kind.keys()
    assert by_kind["before"] == before and by_kind["after"] == after
    kept = json.loads((run / "settings.json").read_text())
    assert kept["settings"] == result["settings"] and kept["attack"] == result["attack settings"]
    assert kept["settings"]["lr"] == 5e-4 and kept["attack"]["benign_rows"] == 8
    assert kept["attack"]["forget"] == kept["settings"]["forget"]
    assert kept["made of"].keys() == {"processes", "model.safetensors", "config.json",
                                      "tokenizer or chat template", "settings", "facts", "tasks",
                                      "instructions"}
    assert not list(folder.rglob("*.tmp"))


def test_the_checkpoint_can_be_scored_and_attacked_alone(finished, monkeypatch, capsys):
    folder, run = finished[0], "runs/ssiuu-tiny"
    assert inside(monkeypatch, folder, "evaluate.py", *DATA, "--model", run) == 0
    scored = json.loads(capsys.readouterr().out)
    after = json.loads((folder / run / "result.json").read_text())["after"]
    assert scored["FS"] == after["FS"] and scored["RS"] == after["RS"]
    flags = ["--p", "0.3", "--attack-lrs", "1e-4", "--attack-draws", "1", "--attack-epochs", "1",
             "--benign", "", "--control", "tiny"]
    assert inside(monkeypatch, folder, "attack.py", *DATA, "--model", run, *flags) == 0
    summaries = [r for r in map(json.loads, capsys.readouterr().out.splitlines()) if r["kind"] == "summary"]
    assert [(r["model"], r["attack"]) for r in summaries] == [(x, "Harmful p = 0.3") for x in (run, "tiny")]
    wrong = round(after["FS"]["n"] * (1 - after["FS"]["percent"] / 100))
    assert summaries[0]["n"] == summaries[1]["n"] < wrong


def test_tofu_end_to_end(tmp_path, monkeypatch):
    """TOFU's file format, with facts that the tiny model knows; FS and RS are ROUGE-L, the data set tau."""
    pytest.importorskip("rouge_score")
    examples = load_faithun(ROOT / "data/faithun.json")
    prepare(tmp_path)
    for name, part in (("forget01", examples[:6]), ("retain99", examples[6:18])):
        lines = [json.dumps({"question": e.question, "answer": e.answers[0]}) for e in part]
        (tmp_path / f"{name}.json").write_text("\n".join(lines))  # upstream ends without a newline too
    (tmp_path / "real_authors.json").write_text((tmp_path / "retain99.json").read_text())
    flags = ["--forget", "forget01.json", "--retain", "retain99.json", "--method", "gd", "--lr", "1e-3",
             "--steps", "40", "--test-limit", "6", "--utility", "."]
    assert inside(monkeypatch, tmp_path, "ssiuu.py", "--model", "tiny", *flags) == 0
    result = json.loads((tmp_path / "runs/gd-tiny/result.json").read_text())
    tau = mismatched_tau(load_tofu(tmp_path / "forget01.json"))
    assert result["settings"]["tau"] == tau and result["after"]["FS"]["percent"] <= 100 * tau < 60
    assert result["before"]["FS"]["percent"] > 95 and result["after"]["RS"]["n"] == 6
    assert result["before"]["US"]["tasks"]["real_authors"]["n"] == 12
    assert result["attacks"]["Harmful p = 0.3"]["n"] == 4  # all 6 are the pool, 2 are retrained on


def test_default_paths_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = read_flags(ssiuu.Settings, "", [])
    a = settings_for(attack.Settings, {f.name: getattr(s, f.name) for f in fields(evaluate.Data)})
    assert Path(s.model).samefile(ROOT / "data/tiny")
    assert Path(a.benign).samefile(ROOT / "data/instructions.json")
    assert (s.lr, s.lam, a.benign_rows, s.forget) == (5e-5, 0.3, 200, a.forget)
    assert [len(C) for C in evaluate.splits_of(s)] == [len(C) for C in evaluate.splits_of(
        evaluate.Data(forget=str(ROOT / "data/faithun.json")))]


# ------------------------------------------------------------------------------------- kills, locks, folders


def killed(folder, name, kind, n):
    """Resumes a run, ends it with SIGKILL at a random moment after its log has n records of this kind, and
    leaves a cut one."""
    log = folder / f"runs/{name}/log.jsonl"
    process = subprocess.Popen([sys.executable, str(ROOT / "ssiuu.py"), "--resume", f"runs/{name}"],
                               cwd=folder, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (log.is_file() and log.read_text().count(f'"kind": "{kind}"') >= n):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))  # in a step, in a cell, or while one is written
    process.kill()
    assert process.wait() == -9
    with open(log, "a") as file:
        file.write('{"kind": "st')


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Killed among the steps, and again among the attack's cells."""
    own = {**QUICK, "attack.py": {**QUICK["attack.py"], "attack_lrs": [1e-4, 1e-3], "attack_draws": 2}}
    prepare(tmp_path, own)
    flags = ["--tau", "0", "--steps", "10", "--save-every", "3", "--name", "whole"]
    assert inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, *flags) == 0
    whole, part = tmp_path / "runs/whole", tmp_path / "runs/part"
    part.mkdir()
    shutil.copy(whole / "settings.json", part)
    killed(tmp_path, "part", "step", 4)
    assert 4 <= len((part / "log.jsonl").read_text().splitlines()) - 2 < 10
    assert not (part / "model.safetensors").exists()
    killed(tmp_path, "part", "harmful", 2)
    cells = (part / "log.jsonl").read_text().count("harmful")
    stamp = (part / "model.safetensors").stat().st_mtime_ns
    assert cells < 8 and not (part / "result.json").exists()
    assert inside(monkeypatch, tmp_path, "ssiuu.py", "--resume", "runs/part") == 0
    assert (part / "model.safetensors").stat().st_mtime_ns == stamp and same_weights(whole, part)
    assert records(part, "harmful", "benign") == records(whole, "harmful", "benign")
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (whole, part))
    assert a["attacks"] == b["attacks"] and a["after"] == b["after"]
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in records(f, "step")]
             for f in (whole, part)]
    assert strip[0] == strip[1] and not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def unreached(tmp_path_factory):
    """A run whose last state is kept, since it did not reach the threshold."""
    folder = prepare(tmp_path_factory.mktemp("unreached"))
    flags = ["--tau", "0", "--steps", "2", "--no-attack"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert inside(monkeypatch, folder, "ssiuu.py", *DATA, *flags) == 0
    return folder


@pytest.fixture
def stopped(unreached, tmp_path):
    """... as a kill after its last step leaves it."""
    shutil.copytree(unreached, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "runs/ssiuu-tiny"
    (run / "result.json").unlink()
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(run, "before", "step")))
    return tmp_path


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/ssiuu-tiny/result.json").unlink()
    return tmp_path


def test_a_kill_between_the_threshold_and_the_weights_ends_the_same(copied, finished, monkeypatch):
    run = copied / "runs/ssiuu-tiny"
    assert not (run / "state.safetensors").exists()  # large, and nothing is left to do
    begun = records(run, "before", "step")
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in begun))
    (run / "model.safetensors").unlink()
    assert inside(monkeypatch, copied, "ssiuu.py", "--resume", "runs/ssiuu-tiny", "--no-attack") == 0
    old, new = ([r | {"seconds": 0} for r in found] for found in (begun, records(run, "before", "step")))
    assert old == new and same_weights(run, finished[0] / "runs/ssiuu-tiny")


def test_a_kill_after_the_last_step_takes_no_further_one(stopped, unreached, monkeypatch):
    run = stopped / "runs/ssiuu-tiny"
    begun = records(run)
    (run / "model.safetensors").unlink()
    assert inside(monkeypatch, stopped, "ssiuu.py", "--resume", "runs/ssiuu-tiny") == 0
    assert records(run, "before", "step") == begun and same_weights(run, unreached / "runs/ssiuu-tiny")


def test_a_resumed_run_keeps_its_settings(copied, monkeypatch):
    run = copied / "runs/ssiuu-tiny"
    files = {f: f.read_bytes() for f in run.iterdir()}
    for change, words in ((["--lam", "9"], ["lam", "found 9", "expected 0.001"]),
                          (["--seed", "1"], ["seed"])):
        code = inside(monkeypatch, copied, "ssiuu.py", "--resume", "runs/ssiuu-tiny", *change)
        assert isinstance(code, str) and "\n" not in code and all(word in code for word in words), code
    prepare(copied, {**QUICK, "attack.py": {**QUICK["attack.py"], "benign_rows": 9}})
    code = inside(monkeypatch, copied, "ssiuu.py", "--resume", "runs/ssiuu-tiny")
    assert "benign_rows: found 9, expected 8" in code
    prepare(copied)
    (copied / "few/forget_set_split.txt").write_text("1\n2\n3\n4\n5\n20")
    code = inside(monkeypatch, copied, "ssiuu.py", "--resume", "runs/ssiuu-tiny")
    assert "made of facts" in code
    assert {f: f.read_bytes() for f in run.iterdir()} == files


def test_a_log_that_was_deleted_beside_its_state_is_missed(stopped, monkeypatch):
    (stopped / "runs/ssiuu-tiny/log.jsonl").unlink()
    code = inside(monkeypatch, stopped, "ssiuu.py", "--resume", "runs/ssiuu-tiny")
    assert "log.jsonl: found steps []" in code and "\n" not in code
    assert not (stopped / "runs/ssiuu-tiny/result.json").exists()


def test_what_a_refused_resume_meets_stays(copied, monkeypatch):
    """Nothing recorded is no reason to remove a folder that this process did not make."""
    run = copied / "runs/ssiuu-tiny"
    (run / "log.jsonl").unlink()
    assert "lam" in inside(monkeypatch, copied, "ssiuu.py", "--resume", "runs/ssiuu-tiny", "--lam", "9")
    assert (run / "model.safetensors").is_file() and (run / "settings.json").is_file()


def test_two_processes_never_share_a_folder(copied, monkeypatch):
    with open(copied / "runs/ssiuu-tiny/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = inside(monkeypatch, copied, "ssiuu.py", "--resume", "runs/ssiuu-tiny")
        assert "another process" in code and "\n" not in code
    assert (copied / "runs/ssiuu-tiny/model.safetensors").is_file()
    code = inside(monkeypatch, copied, "ssiuu.py", *DATA, "--name", "ssiuu-tiny")
    assert "expected a new name, or --resume" in code


def test_a_failed_start_gives_its_folder_back(tmp_path, monkeypatch):
    prepare(tmp_path)
    for name in ("../x", "/tmp/x", ".", "..", "a/b"):
        code = inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, "--name", name)
        assert isinstance(code, str) and f"--name: found {name!r}" in code and "\n" not in code, code
    code = inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, "--forget", "nowhere.json", "--name", "a")
    assert "nowhere" in code
    assert not list(tmp_path.glob("runs/*")) and not (tmp_path.parent / "x").exists()
    for left in ((), ("lock",), ("lock", "settings.json.tmp")):  # by a run killed before it wrote anything
        (tmp_path / "runs/a").mkdir()
        [(tmp_path / "runs/a" / name).touch() for name in left]
        code = inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, "--forget", "nowhere.json", "--name", "a")
        assert "nowhere" in code and not (tmp_path / "runs/a").exists()
    (tmp_path / "runs/a").touch()  # no folder
    assert "expected a new name" in inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, "--name", "a")


def test_a_folder_that_was_given_back_while_another_came_is_not_worked_in(tmp_path, monkeypatch):
    """Process B has opened the lock; A, which held it, fails and removes the folder; B gets the dead lock."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", lambda *args: (shutil.rmtree(folder), folder.mkdir()))
    with pytest.raises(ValueError, match="another process"):
        with ssiuu.held(folder, new=True):
            pytest.fail("it was worked in")


def test_states_of_unlike_steps_are_named(stopped, monkeypatch):
    monkeypatch.setattr(ssiuu, "from_all", lambda value: [value, 4] if value == 2 else [value])
    code = inside(monkeypatch, stopped, "ssiuu.py", "--resume", "runs/ssiuu-tiny")
    refused(code, "found states of steps {2, 4}")


def test_a_loss_that_is_not_finite_is_said(tmp_path, monkeypatch):
    flags = ["--lam", "1e39", "--steps", "9", "--tau", "0"]
    code = inside(monkeypatch, prepare(tmp_path), "ssiuu.py", *DATA, *flags)
    assert "expected finite numbers" in code and "\n" not in code and not list(tmp_path.rglob("result.json"))


# ------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def offline(monkeypatch):
    def fails(*args, **options):
        raise OSError("offline")
    monkeypatch.setattr(models, "snapshot_download", fails)


def refused(code, *words):
    """One line, which says what is wrong rather than where the program broke."""
    assert isinstance(code, str) and code and "\n" not in code and "see --traceback" not in code, code
    assert all(word in code for word in words), code


def edited(path, change):
    """Rewrites a JSON or safetensors file after change(value)."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        path.write_text(json.dumps(change(value) or value))
    else:
        with safe_open(path, "pt") as file:
            value, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        save_file(change(value) or value, path, metadata)


def line_of_log(of, **change):
    def rewrite(run):
        lines = [json.dumps(r | change if r["kind"] == of else r) for r in records(run)]
        (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    return rewrite


def scaled(name, by):
    return lambda tensors: tensors | {name: tensors[name] * by}


MEDDLED = {
    "a state of NaN": (lambda run: edited(run / "state.safetensors", scaled("adam 0 exp_avg", float("nan"))),
                       "adam 0 exp_avg"),
    "a state cut short": (lambda run: (run / "state.safetensors").write_bytes(b"x"), "state.safetensors"),
    "a state that is a folder": (lambda run: ((run / "state.safetensors").unlink(),
                                              (run / "state.safetensors").mkdir()), "state.safetensors"),
    "a state's variance": (lambda run: edited(run / "state.safetensors", scaled("adam 0 exp_avg_sq", -1.0)),
                           "adam 0 exp_avg_sq"),
    "a state's step": (lambda run: edited(run / "state.safetensors", lambda x: {
        name: y * 2 if name == "t" or name.endswith(" step") else y for name, y in x.items()}),
        "found steps [1, 2], expected 1 to 4"),
    "a state's step 0": (lambda run: edited(run / "state.safetensors", scaled("t", 0)), "t is 0"),
    "a state's step in Adam": (lambda run: edited(run / "state.safetensors", scaled("adam 0 step", 9)),
                               "adam 0 step"),
    "finished weights": (lambda run: edited(run / "model.safetensors", scaled("model.norm.weight", 2.0)),
                         "hash of model.safetensors"),
    "a finished run's template": (lambda run: (run / "chat_template.jinja").write_text(
        "{{ messages[0].content }} Answer:"), "runs/ssiuu-tiny: the hash of tokenizer or chat template"),
    "a finished run's config": (lambda run: edited(run / "config.json", lambda c: c | {"rope_theta": 500.0}),
                                "runs/ssiuu-tiny: the hash of config.json"),
    "a template": (lambda run: (run.parent.parent / "tiny/chat_template.jinja").write_text(
        "{{ messages[0].content }} Answer:"), "made of tokenizer"),
    "rope": (lambda run: edited(run.parent.parent / "tiny/config.json", lambda c: c | {"rope_theta": 500.0}),
             "made of config"),
    "a score without n": (line_of_log("before", FS={"percent": 90.0}), "FS is"),
    "FS in words": (line_of_log("step", FS="low"), "FS is 'low'"),
    "no step number": (line_of_log("step", t=None), "t is None"),
    "a step twice": (line_of_log("step", t=1), "found steps [1, 1]"),
    "before without percent": (line_of_log("before", FS={}), "FS is {}"),
    "reached 3": (line_of_log("after", reached=3), "reached is 3"),
    "a cell's curve": (line_of_log("harmful", FS=[]), "FS is []"),
    "a cell above 100 %": (line_of_log("harmful", FS=[1.0, 1e9]), "FS is [1.0"),
    "a cell that failed without a reason": (line_of_log("harmful", failed=None), "failed is None"),
    "a score above 100 %": (line_of_log("before", FS={"percent": 1e3, "low": 1, "high": 2, "n": 3}), "FS is"),
    "a cell without its curve": (line_of_log("harmful", FS=None), "log.jsonl line 5: FS is None"),
    "an unknown kind": (line_of_log("after", kind="thereafter"), "kind is 'thereafter'"),
    "settings null": (lambda run: edited(run / "settings.json", lambda x: x | {"attack": None}),
                      "attack is None"),
    "settings' key": (lambda run: edited(run / "settings.json", lambda x: x | {"made of": {}}), "made of"),
    "settings of a run begun": (lambda run: edited(run / "settings.json", lambda x: x | {
        "settings": x["settings"] | {"lr": 0.5}}), "made of settings"),
    "a hash left empty": (lambda run: edited(run / "settings.json", lambda x: x | {
        "made of": dict.fromkeys(x["made of"], "")}), "made of"),
    "settings' part": (lambda run: edited(run / "settings.json", lambda x: x | {"more": {"lr": 1}}), "more"),
}


@pytest.mark.parametrize("what", MEDDLED)
def test_a_resume_notices_what_was_meddled_with(request, monkeypatch, what):
    change, word = MEDDLED[what]
    # a state, and the steps before it, are read where the run is not finished
    folder = request.getfixturevalue("stopped" if "state" in what or "step" in what else "copied")
    change(folder / "runs/ssiuu-tiny")
    refused(inside(monkeypatch, folder, "ssiuu.py", "--resume", "runs/ssiuu-tiny"), word)


def test_what_is_wrong_is_said_before_the_work_and_leaves_nothing(tmp_path, monkeypatch, offline):
    prepare(tmp_path)
    code = inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, "--tau", "1", "--name", "t")
    refused(code, "before unlearning")
    assert not list(tmp_path.glob("runs/*"))
    for flag in ("--resume", "--model", "--forget"):
        refused(inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, flag, ""), f"{flag}: found ''")
    monkeypatch.setattr(attack, "load", lambda *args, **more: pytest.fail("a model was loaded first"))
    refused(inside(monkeypatch, tmp_path, "attack.py", *DATA, "--control", "nowhere"), "nowhere", "directory")
    for own, word in (({"ssiu.py": {"lr": 1}}, "'ssiu.py'"), ({"lr": 1e-3}, "'lr'")):
        prepare(tmp_path, own)
        code = inside(monkeypatch, tmp_path, "ssiuu.py", *DATA)
        refused(code, "unlearn.json", word, "evaluate.py")
    prepare(tmp_path, {"ssiuu.py": {"no_attack": 1}})  # what a flag overrides is checked all the same
    refused(inside(monkeypatch, tmp_path, "ssiuu.py", *DATA, "--no-attack"), "unlearn.json", "no_attack is 1")


PAIR = ["--before", "tiny", "--after", "tiny"]


@pytest.mark.parametrize("script, flags, words", [
    ("ssiuu.py", ["--forget", "nowhere.json"], ["nowhere.json"]),
    ("ssiuu.py", ["--model", "nowhere"], ["nowhere", "directory"]),
    ("ssiuu.py", ["--method", "magic"], ["--method", "magic", "ssiuu"]),
    ("ssiuu.py", ["--method", "all"], ["--method", "all", "ssiuu"]),
    ("ssiuu.py", ["--backbone", "rmu"], ["--backbone", "rmu", "gd"]),
    ("ssiuu.py", ["--method", "gd", "--backbone", "npo"], ["--backbone", "gd"]),
    ("ssiuu.py", ["--lr", "1_0e-5"], ["--lr", "1_0e-5"]),
    ("ssiuu.py", ["--lr", "-1"], ["--lr", "-1"]),
    ("ssiuu.py", ["--lr", "nan"], ["--lr", "nan"]),
    ("ssiuu.py", ["--lam", "nan"], ["--lam", "nan"]),
    ("ssiuu.py", ["--tau", "NaN"], ["--tau", "nan"]),
    ("ssiuu.py", ["--beta", "inf"], ["--beta", "inf"]),
    ("ssiuu.py", ["--steps", "1.5"], ["--steps", "1.5"]),
    ("ssiuu.py", ["--device", "cuda:9"], ["--device"]),
    ("ssiuu.py", ["--device", "cpu:x"], ["--device", "cpu:x"]),
    ("ssiuu.py", ["--resume", "nowhere"], ["nowhere"]),
    ("ssiuu.py", ["--resume", "nowhere", "--name", "x"], ["--name", "x"]),
    ("ssiuu.py", ["--tau", "1", "--test-limit", "4"], ["before unlearning"]),
    ("ssiuu.py", ["--splits", "."], ["forget_set_split.txt"]),
    ("ssiuu.py", ["--unknown", "1"], ["--unknown"]),
    ("ssiuu.py", ["--p", "0.1"], ["--p"]),
    ("ssiuu.py", ["--utility", "."], ["mmlu", "winogrande_dev.jsonl"]),
    ("ssiuu.py", ["--save-every", "0"], ["--save-every"]),
    ("ssiuu.py", ["--seed", "2147483648"], ["--seed"]),
    ("ssiuu.py", ["--retain", "nowhere.json"], ["--splits", "--retain"]),
    ("evaluate.py", ["--forget", "nowhere.json"], ["nowhere.json"]),
    ("evaluate.py", ["--after", "tiny"], ["--before, --after"]),
    ("evaluate.py", ["--attacked", "tiny"], ["--before, --after"]),
    ("evaluate.py", ["--before", "tiny", "--after", "nowhere"], ["nowhere"]),
    ("evaluate.py", [*PAIR, "--out", "file"], ["file"]),
    ("evaluate.py", ["--before", "tiny", "--after", str(ROOT / "tests/golden/llama"), "--out", "."],
     ["tests/golden/llama"]),
    ("evaluate.py", ["--out", "somewhere"], ["--out", "--before"]),
    ("evaluate.py", [*PAIR, "--utility", "."], ["--utility", "--before"]),
    ("evaluate.py", [*PAIR, "--test-limit", "3"], ["--test-limit", "--before"]),
    ("attack.py", ["--p", "0"], ["--p"]),
    ("attack.py", ["--p", "0.1", "1.5"], ["--p", "1.5"]),
    ("attack.py", ["--attack-epochs", "0"], ["--attack-epochs"]),
    ("attack.py", ["--benign", "nowhere.json"], ["nowhere.json"]),
    ("attack.py", ["--control", ""], ["--control"]),
    ("attack.py", ["--save", "file"], ["--save", "file"]),
    ("attack.py", ["--save", ""], ["--save", "a name"]),
])
def test_bad_flags_end_in_one_line_and_a_status(tmp_path, monkeypatch, offline, script, flags, words):
    (prepare(tmp_path) / "file").write_text("{}")
    code = inside(monkeypatch, tmp_path, script, *DATA, *flags)
    refused(code, *words)
    assert " or null" not in code  # which no flag can say
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("analysis.json"))
    assert not list(tmp_path.glob("runs/*/settings.json")) or "--tau" in flags


@pytest.mark.parametrize("own, words", [
    ('{"ssiuu.py": {"method": "ga"}}', ["method", "'ga'", "a number"]),
    ('{"ssiuu.py": {"lr": "1e-4"}}', ["lr", "a number"]),
    ('{"ssiuu.py": {"magic": 1}}', ["unknown key 'magic'"]),
    ('{"ssiuu.py": {"steps": 1.5}}', ["steps", "1.5"]),
    ('{"ssiuu.py": {"lr": true}}', ["lr"]),
    ('{"ssiuu.py": {"lr": [0.1]}}', ["lr"]),
    ('{"ssiuu.py": {"lr": NaN}}', ["unlearn.json", "JSON"]),
    ('{"ssiuu.py": {"name": 5}}', ["name"]),
    ('{"ssiuu.py": [1]}', ["ssiuu.py", "an object"]),
    ('{"attack.py": {"attack_epochs": 0}}', ["attack.py", "attack_epochs"]),
    ('{"attack.py": {"attack_lrs": []}}', ["attack.py", "attack_lrs"]),
    ('[1]', ["unlearn.json", "an object"]),
    ('null', ["unlearn.json", "an object"]),
])
def test_a_models_own_settings_are_checked(tmp_path, monkeypatch, own, words):
    refused(inside(monkeypatch, prepare(tmp_path, own), "ssiuu.py", *DATA), "unlearn.json", *words)
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.glob("runs/*"))


KEPT = {f.name: f.default for f in fields(ssiuu.Settings)} | {
    "model": "tiny", "splits": "few", "forget": DATA[3]}


@pytest.mark.parametrize("kept", [
    {}, [], None, {"settings": 3}, {"settings": {}}, {"settings": {**KEPT, "lr": "x"}},
    {"settings": {**KEPT, "steps": None}}, {"settings": {**KEPT, "more": 1}},
    {"settings": {**KEPT, "no_attack": 1}}, {"settings": {**KEPT, "model": "a\0b"}}])
def test_settings_that_are_none_are_refused(tmp_path, monkeypatch, offline, kept):
    (prepare(tmp_path) / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/settings.json").write_text(json.dumps(kept))
    refused(inside(monkeypatch, tmp_path, "ssiuu.py", "--resume", "runs/x"))


FLAGS = [f.name for f in fields(ssiuu.Settings) if f.name not in ("traceback", "resume")]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2), max_leaves=3)
PLACES = [("unlearn.json",), ("unlearn.json", "ssiuu.py"), ("unlearn.json", "attack.py"),
          *(("unlearn.json", "ssiuu.py", key) for key in FLAGS),
          *(("unlearn.json", "attack.py", f.name) for f in fields(attack.Settings)),
          ("settings.json",), ("settings.json", "settings"), ("settings.json", "attack"),
          ("settings.json", "made of"), *(("settings.json", "settings", key) for key in FLAGS)]
TEXT = (st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
        | JSON.map(str).filter(lambda x: "\0" not in x))


@pytest.fixture(scope="module")
def loaded():
    return models.load(ROOT / "data/tiny")


@pytest.mark.parametrize("what", ["file", "flag"])
def test_any_value_is_taken_or_refused_in_one_line(what, tmp_path, monkeypatch, offline, loaded):
    """A run that gets as far as its first score has taken what it was given."""
    def far(*args):
        raise ValueError("far enough")

    monkeypatch.setattr(ssiuu, "load", lambda *args, **options: loaded)
    monkeypatch.setattr(ssiuu, "scores_of", far)
    prepare(tmp_path)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(PLACES if what == "file" else FLAGS), JSON if what == "file" else TEXT)
    def any_value(place, value):
        run, flags, own, kept = tmp_path / "runs/x", [*DATA, "--name", "x"], dict(QUICK), {"settings": KEPT}
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        if what == "flag":
            flags += [f"--{place.replace('_', '-')}={value}"]
        else:
            root = {"unlearn.json": own, "settings.json": kept}
            at = root
            for key in place[:-1]:
                at[key] = dict(at.get(key, {}))
                at = at[key]
            at[place[-1]] = value
            own, kept = root["unlearn.json"], root["settings.json"]
            if place[0] == "settings.json":
                run.mkdir(parents=True)
                (run / "settings.json").write_text(json.dumps(kept))
                flags = ["--resume", "runs/x"]
        prepare(tmp_path, json.dumps(own))
        refused(inside(monkeypatch, tmp_path, "ssiuu.py", *flags))

    any_value()


@pytest.mark.parametrize("script", ["ssiuu.py", "evaluate.py", "attack.py"])
def test_help_names_every_flag(tmp_path, monkeypatch, capsys, script):
    assert inside(monkeypatch, tmp_path, script, "--help") == 0
    out, kind = capsys.readouterr().out, importlib.import_module(script.removesuffix(".py")).Settings
    assert all(f"--{f.name.replace('_', '-')}" in out for f in fields(kind)) and "None" not in out
