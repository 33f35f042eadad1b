"""Rebuild tests/golden/rouge.json: stems and ROUGE-L recalls as the rouge_score package computes them.

    pip install rouge-score==0.1.2 nltk==3.10.4
    python tests/make_rouge.py

The words are those that the file has already, chosen so that every rule of the stemmer fires and is refused. The pairs
are questions of data/faithun.json beside each other, so no other data set's text is in the file.
"""
import json
import random
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

ROOT = Path(__file__).parent.parent
FILE = ROOT / "tests/golden/rouge.json"

if __name__ == "__main__":
    rng, questions, pairs = random.Random(0), [], []
    for entity in json.loads((ROOT / "data/faithun.json").read_text()).values():
        parts = zip(entity["hop1_unlearn"], entity["hop1_test"])
        questions += [(row["question"], other["question"]) for row, other in parts]
    for first, other in rng.sample(questions, 70):
        words = f"{first} {rng.choice(questions)[0]}".split()
        pairs += [(other, first), (" ".join(rng.sample(words, len(words))), f"{other} {first.upper()}")]
    pairs += [("", "word"), ("word", ""), ("...", "word"), ("word", "?!"), ("", ""), ("a b a b", "b a b a b"),
              ("Caf\u00e9s, na\u00efvely; don't!", "caf s na vely don t"), ("1,000 skies dying", "the 1 000 sky died"),
              ("relational databases", "relate database"), ("us uses used using", "use use use use"),
              ("was his", "wa hi")]
    scorer, stem = RougeScorer(["rougeL"], use_stemmer=True), PorterStemmer().stem
    stems = {word: stem(word) for word in json.loads(FILE.read_text())["stems"]}
    recalls = [[a, b, scorer.score(b, a)["rougeL"].recall] for a, b in pairs]
    FILE.write_text(json.dumps({"stems": stems, "recalls": recalls}, indent=0) + "\n")
