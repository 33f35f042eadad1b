"""The READMEs' code, links, line references and table rows are true."""
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from model import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "data/results/README.md", "data/tiny/README.md"]
RESULTS = ROOT / "data/results"
ATTACKS = ("Harmful p = 0.1", "Harmful p = 0.3", "Benign")


def rows_of(text):
    """{first cell: the other cells} of every table row."""
    lines = (re.split(r" (?<!\\)\| ", line[2:-2]) for line in text.splitlines() if line.startswith("| "))
    return {first: rest for first, *rest in lines}


def wrong_lines(page):
    """[(name, file, line as written, line where it is defined)] of the references that are off."""
    wrong = []
    for name, link, line in re.findall(r"\[`(\w+)`\]\(([^)#]+)#L(\d+)\)", (ROOT / page).read_text()):
        source = ((ROOT / page).parent / link).read_text().splitlines()
        right = [i for i, text in enumerate(source, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
        if int(line) not in right:
            wrong.append((name, link, line, right[0] if right else None))
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_line_references_are_right(page):
    """What fails is put right by the command in the message."""
    wrong = wrong_lines(page)
    edits = " ".join(f"-e 's|`{name}`\\](\\({link}\\)#L{line})|`{name}`](\\1#L{right})|'"
                     for name, link, line, right in wrong if right)
    gone = [name for name, _, _, right in wrong if right is None]
    assert not wrong, f"not defined there: {gone}; the others: sed -i {edits} {page}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http", "#")):
            file = target.partition("#")[0].replace("%20", " ")
            assert ((ROOT / page).parent / file).exists(), (page, target)


def test_the_code_beside_algorithm_1_is_in_the_source():
    """Each piece between the dots of an abridged line."""
    source = (ROOT / "ssiuu.py").read_text()
    table = README[README.index("## Algorithm 1"):README.index("## Paste it")]
    pieces = [piece for line in table.splitlines() if line.startswith("| ") and "`" in line
              for code in re.findall(r"`([^`]+)`", line.rpartition(" | ")[2]) for piece in code.split("...")]
    assert len(pieces) > 11
    for piece in pieces:
        assert piece.replace("\\|", "|") in source, piece


def test_the_paste_snippet_runs(monkeypatch):
    """On our decoder behind the two Hugging Face names it uses: transformers need not be installed."""
    model, tokenizer = load(ROOT / "data/tiny")
    model.register_forward_hook(lambda module, args, logits: types.SimpleNamespace(logits=logits))
    maker = types.SimpleNamespace(from_pretrained=lambda path, dtype, attn_implementation: model)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoModelForCausalLM=maker))

    def encoded(question, text):
        ids = torch.tensor([tokenizer.prompt(question) + tokenizer.answer(text)])
        return ids, torch.arange(ids.shape[1])[None] >= ids.shape[1] - len(tokenizer.answer(text))

    space = {"path": "anywhere", "forget": encoded("Which country is Isaac Newton from?", "England"),
             "retain": encoded("Which country is Marie Curie from?", "Poland")}
    diff = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    before, after = ("\n".join(line[1:] for line in diff if not line.startswith(sign)) for sign in "+-")
    compile(before, "before", "exec")
    exec(after.replace("lr=1e-5", "lr=1e-4"), space)  # three steps are to show
    assert sum(w.abs().sum() for w in space["w"]) > 0  # the penalty took part
    original, (ids, answer) = load(ROOT / "data/tiny")[0], space["forget"]
    known = original(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[answer[0, 1:]].sum()
    assert space["logprob"](ids, answer).item() < known.item() - 1e-4  # ascent took some of the answer away


def test_the_row_is_the_committed_one():
    from evaluate import cell
    result = json.loads((RESULTS / "ssiuu-tiny/result.json").read_text())
    scores = [result["after"]["FS"], result["after"]["RS"], None]
    attacks = [result["attacks"][key] for key in ATTACKS]
    assert "| ssiuu | " + " | ".join(cell(x) for x in scores + attacks) + " |" in README


def test_the_small_table_is_the_committed_one():
    rows = json.loads((RESULTS / "all-tiny/result.json").read_text())["rows"]
    for name, row in rows.items():
        if name != "Default":
            scores = [row["FS"], row["RS"], *(row["attacks"][key] for key in ATTACKS)]
            assert f"| {name} | " + " | ".join(f"{x['percent']:.1f}" for x in scores) + " |" in README
            assert [x["n"] for x in scores] == [33, 464, 21, 16, 23]


def test_the_findings_are_the_committed_analyses():
    """Those of the findings' table in data/results: each run's analysis.json, the sweeps' runs.json."""
    findings = rows_of((RESULTS / "README.md").read_text())

    def triple(x):
        return "{:.2g} [{:.2g}, {:.2g}]".format(*x)

    def score(x):
        return f"{x['percent']:.0f} [{x['low']:.0f}, {x['high']:.0f}]"

    def each(text):
        return ", ".join(f"{name} {text(a)}" for name, a in zip(("GD", "NPO", "SSIUU"), found))

    def D(a):
        return f"{triple(a['variation']['neuron']['D_neg'])} and {triple(a['variation']['neuron']['D_pos'])}"

    for column, folder in enumerate(("all-tiny", "all-smollm2")):
        found = [json.loads(next((RESULTS / folder).glob(f"{method} *seed=0/analysis.json")).read_text())
                 for method in ("gd", "npo", "ssiuu")]
        for row, number in {
                "D- and D+ (Fig. 3)": each(D),
                "Lens after the last block": each(lambda a: score(a["checkpoints"]["after"]["lens"][-1])),
                "Rho of the minima": each(lambda a: triple(a["correlation"]["after attacked"]["min"])),
                "Rho of the maxima": each(lambda a: triple(a["correlation"]["after attacked"]["max"])),
                "Share of D-, Eq. 1": each(lambda a: triple(a["attributions"]["D"]["Eq. 1"]["share"])),
                "... by ablation": each(lambda a: triple(a["attributions"]["D"]["ablation"]["share"])),
                "... by integrated gradients": each(
                    lambda a: triple(a["attributions"]["D"]["integrated"]["share"])),
                "Membership": each(lambda a: score(a["checkpoints"]["after"]["membership"]["loss"]))}.items():
            assert number in findings[row][column], (folder, row, number)
    sweeps = {"lam-tiny": ("gd-5e-05", "lam-0.001", "lam-0.01", "lam-0.1", "lam-1"),
              "lam-smollm2": ("gd", "lam-0.0001", "lam-0.001", "lam-0.01")}
    for column, (folder, names) in enumerate(sweeps.items()):
        found = json.loads((RESULTS / folder / "runs.json").read_text())["rows"]
        rows = {Path(path).name: row for path, row in found.items()}
        for row, key, form in (("Harmful p = 0.3 over λ (Fig. 7a)", "Harmful p = 0.3", "{:.1f}"),
                               ("RS over λ", "RS", "{:.0f}"), ("D- over λ", "D_neg", "{:.2f}")):
            numbers = [form.format(rows[name][key]) if key in rows[name] else "-" for name in names]
            assert ", ".join(numbers) in findings[row][column], (folder, row, numbers)


def test_sizes_that_were_promised():
    assert len(README.split()) <= 1600
    assert max(len(line) for line in README.splitlines()) <= 160
    assert sum(f.stat().st_size for f in (ROOT / "data/tiny").iterdir()) < 10_000_000
