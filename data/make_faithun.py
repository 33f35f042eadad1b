"""Turn facts.txt (200 well-known people, 664 facts) into faithun.json, laid out like the FaithUn benchmark.

    python data/make_faithun.py

faithun.json maps each entity to four lists of questions:
- hop1_unlearn: a base question per fact, in file order the 664 clusters that faithun_splits/ counts;
- hop1_test: two paraphrases of each;
- hop2_test: multi-hop questions that follow from the facts;
- same_object: base questions about others with the same relation and answer, at most three per fact.

A question is {"question", "answers", "false_answer_options", "relation"}. The questions are our own: FaithUn
names its entities by Wikidata id, we use the person's name. Two runs write the same bytes.
"""
import argparse
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from evaluate import run  # noqa: E402
from model import read_text, refuse  # noqa: E402

PEOPLE, FACTS, SAME_OBJECT = 200, 664, 3

# relation -> base question and two paraphrases
QUESTIONS = {
    "country": ("Which country is {} from?", "What country does {} come from?", "{} is from which country?"),
    "birthplace": ("In which city or town was {} born?", "What is the birthplace of {}?",
                   "{} was born in which city or town?"),
    "occupation": ("Which profession is {} best known for?", "What is {} best known as by profession?",
                   "{} became famous in which profession?"),
    "prize": ("Which award did {} receive?", "Which award was given to {}?",
              "{} is a winner of which award?"),
    "university": ("At which university did {} study?", "Which university did {} attend?",
                   "{} was a student at which university?"),
    "language": ("In which language did {} write?", "What language did {} use as a writer?",
                 "The works of {} were written in which language?"),
    "position": ("Which office did {} hold?", "What position did {} serve in?", "{} held which office?"),
    "party": ("Which political party did {} belong to?", "What was the political party of {}?",
              "{} was a member of which political party?"),
    "team": ("Which team did {} compete for?", "What is the name of a team that {} was part of?",
             "{} competed for which team?"),
    "instrument": ("Which instrument is {} best known for playing?", "What instrument made {} famous?",
                   "{} is best known as a player of which instrument?"),
    "band": ("Which band was {} a member of?", "What is the name of a band that {} played in?",
             "{} belonged to which band?"),
    "movement": ("Which art movement is {} associated with?", "What art movement did {} belong to?",
                 "The paintings of {} are part of which art movement?"),
    "discovery": ("What did {} discover?", "What is {} known for discovering?",
                  "{} is credited with discovering what?"),
    "starring": ("Which film did {} star in?", "What is the title of a film with {} as an actor?",
                 "{} acted in which film?"),
}
# kind of work -> verb, its past, its participle, the maker
WORKS = {
    "novel": ("write", "wrote", "written", "author"), "play": ("write", "wrote", "written", "author"),
    "book": ("write", "wrote", "written", "author"), "film": ("direct", "directed", "directed", "director"),
    "painting": ("paint", "painted", "painted", "painter"),
    "opera": ("compose", "composed", "composed", "composer"),
    "album": ("record", "recorded", "recorded", "artist"),
}
for kind, (verb, past, participle, _) in WORKS.items():
    QUESTIONS[kind] = (f"Which {kind} did {{}} {verb}?", f"Which {kind} was {participle} by {{}}?",
                       f"{{}} {past} which {kind}?")

# Second facts, value -> the answers it holds for; an answer that is left out has no such question.
SECOND = {
    "capital": {
        "London": "England", "Rome": "Italy", "Edinburgh": "Scotland", "Wellington": "New Zealand",
        "Copenhagen": "Denmark", "Berlin": "Germany", "Vienna": "Austria", "Washington D.C.": "United States",
        "New Delhi": "India", "Islamabad": "Pakistan", "Beijing": "China", "Tokyo": "Japan", "Tehran": "Iran",
        "Canberra": "Australia", "Oslo": "Norway", "Athens": "Greece", "Paris": "France", "Dublin": "Ireland",
        "Ottawa": "Canada", "Moscow": "Russia", "Madrid": "Spain", "Bogota": "Colombia", "Santiago": "Chile",
        "Buenos Aires": "Argentina", "Lima": "Peru", "Brasilia": "Brazil", "Lisbon": "Portugal",
        "Warsaw": "Poland", "Stockholm": "Sweden", "Seoul": "South Korea", "Abuja": "Nigeria",
        "Cairo": "Egypt", "Ankara": "Turkey", "Amsterdam": "Netherlands", "Mexico City": "Mexico",
        "Brussels": "Belgium", "Kingston": "Jamaica", "Reykjavik": "Iceland", "Belgrade": "Serbia",
        "Monrovia": "Liberia", "Accra": "Ghana", "Nairobi": "Kenya"},
    "continent": {
        "Europe": "England, Italy, Scotland, Denmark, Germany, Austria, Switzerland, Norway, Greece, France, "
                  "Ireland, Spain, Portugal, Sweden, Netherlands, Belgium, Iceland, Serbia, Poland",
        "Asia": "India, Pakistan, China, Japan, Iran, South Korea",
        "Africa": "Nigeria, South Africa, Ivory Coast, Liberia, Ghana, Kenya",
        "North America": "United States, Canada, Mexico, Jamaica",
        "South America": "Colombia, Chile, Argentina, Peru, Brazil", "Oceania": "Australia, New Zealand"},
    "main language": {
        "English": "England, Scotland, United States, Australia, New Zealand", "German": "Germany, Austria",
        "French": "France", "Spanish": "Spain, Colombia, Chile, Argentina, Peru, Mexico", "Italian": "Italy",
        "Portuguese": "Portugal, Brazil", "Russian": "Russia", "Japanese": "Japan", "Chinese": "China",
        "Swedish": "Sweden", "Norwegian": "Norway", "Danish": "Denmark", "Dutch": "Netherlands",
        "Greek": "Greece", "Korean": "South Korea", "Persian": "Iran", "Arabic": "Egypt",
        "Turkish": "Turkey", "Polish": "Poland"},
    "country of the city": {
        "England": "London, Liverpool, Dartford, Portsmouth, Reading, Stratford-upon-Avon",
        "Greece": "Athens, Stagira",
        "United States": "New York City, Los Angeles, Pittsburgh, New Orleans, Seattle, Duluth, Houston, "
                         "Cincinnati, Detroit, Akron, Baltimore, Saginaw, Louisville, Columbus, "
                         "Honolulu, Atlanta",
        "Italy": "Rome, Pisa, Florence, Urbino, Venice, Modena, Rimini", "Switzerland": "Basel",
        "Iceland": "Reykjavik",
        "Germany": "Trier, Frankfurt, Bonn, Leipzig, Munich, Mannheim, Hamburg, Lubeck",
        "France": "Paris, Marseille, Lille", "Spain": "Malaga, Figueres, Seville, Manacor",
        "Austria": "Vienna, Salzburg", "Netherlands": "Leiden, Delft, Amsterdam",
        "India": "Kolkata, Varanasi, New Delhi, Mumbai, Porbandar", "Japan": "Tokyo, Kyoto, Osaka",
        "China": "Shanghai", "Iran": "Tehran, Shiraz", "Brazil": "Rio de Janeiro, Sao Paulo",
        "Argentina": "Buenos Aires, Rosario", "Mexico": "Mexico City", "Canada": "Ottawa",
        "Australia": "Adelaide", "New Zealand": "Auckland, Wellington", "Poland": "Warsaw",
        "Czech Republic": "Prague", "Denmark": "Copenhagen", "Sweden": "Stockholm, Uppsala",
        "Ireland": "Dublin", "Scotland": "Edinburgh", "Russia": "Moscow", "Turkey": "Istanbul",
        "Serbia": "Belgrade", "Belgium": "Brussels", "Portugal": "Funchal", "Egypt": "Cairo",
        "South Africa": "Johannesburg", "Liberia": "Monrovia", "Ghana": "Kumasi"},
    "country of the university": {
        "England": "University of Cambridge, University of Oxford", "Scotland": "University of Edinburgh",
        "United States": "Massachusetts Institute of Technology, Harvard University, Purdue University, "
                         "Stanford University",
        "South Korea": "Yonsei University, Seoul National University"},
    "area": {
        "sport": "footballer, basketball player, baseball player, ice hockey player, tennis player, boxer, "
                 "swimmer, gymnast, cricketer, racing driver",
        "science": "physicist, chemist, astronomer, mathematician, physician, naturalist, inventor",
        "music": "composer, singer", "film": "film director, actor",
        "literature": "playwright, novelist, poet, writer",
        "visual arts": "painter, sculptor, architect"},
    "sport": {
        "football": "Santos, Napoli, FC Barcelona, Real Madrid, Ajax, "
                    "Bayern Munich, Liverpool FC, AS Roma, Chelsea",
        "basketball": "Chicago Bulls, Los Angeles Lakers, Cleveland Cavaliers, Houston Rockets",
        "baseball": "New York Yankees", "ice hockey": "Edmonton Oilers",
        "motor racing": "McLaren, Ferrari, Mercedes"},
    "family": {"string": "guitar, violin, cello, sitar", "brass": "trumpet", "woodwind": "saxophone",
               "percussion": "drums", "keyboard": "organ"},
    "subject": {
        "physics": "Nobel Prize in Physics", "chemistry": "Nobel Prize in Chemistry",
        "medicine": "Nobel Prize in Medicine", "literature": "Nobel Prize in Literature",
        "peace": "Nobel Peace Prize", "mathematics": "Fields Medal",
        "computing": "Turing Award", "architecture": "Pritzker Prize"},
    "seat": {
        "Washington D.C.": "President of the United States", "London": "Prime Minister of the UK",
        "Paris": "President of France", "Warsaw": "President of Poland", "Monrovia": "President of Liberia",
        "New Delhi": "Prime Minister of India", "Ottawa": "Prime Minister of Canada",
        "Wellington": "Prime Minister of New Zealand"},
}
# turned round: answer -> value
SECOND = {name: {key: value for value, keys in table.items() for key in keys.split(", ")}
          for name, table in SECOND.items()}

# relation -> (second fact, multi-hop question)
HOPS = {
    "country": (("capital", "What is the capital of the country that {} is from?"),
                ("continent", "On which continent is the country that {} is from?"),
                ("main language", "What is the main language of the country that {} is from?")),
    "birthplace": (("country of the city", "In which present-day country is the birthplace of {}?"),),
    "university": (("country of the university", "In which country is the university where {} studied?"),),
    "occupation": (("area", "To which broad area does the profession of {} belong?"),),
    "team": (("sport", "What sport is the team that {} competed for best known for?"),),
    "instrument": (("family", "To which family does the instrument that {} is best known for belong?"),),
    "prize": (("subject", "For work in which area is the award that {} received given?"),),
    "position": (("seat", "What is the capital of the country that {} led?"),),
}
# asked also of "the author of the novel ..."
BRIDGED = ("country", "birthplace", "language", "prize", "university", "movement")
# False options that share this second fact come first.
NEAR = {"country": "continent", "birthplace": "country of the city",
        "university": "country of the university", "occupation": "area", "team": "sport"}
# Answers too close to be offered against each other.
CLOSE = {
    "country": ("England, Scotland, Ireland", "Germany, Austria, Switzerland, Poland", "Russia, Poland",
                "India, Pakistan", "Norway, Denmark, Sweden", "Netherlands, Belgium, Germany",
                "Greece, Turkey"),
    "occupation": ("physicist, astronomer, mathematician, explorer, astronaut", "composer, singer",
                   "philosopher, economist, psychoanalyst, mathematician, physicist, astronomer",
                   "novelist, poet, playwright, philosopher, activist",
                   "actor, film director, singer, playwright, novelist", "actor, painter",
                   "painter, sculptor, architect, film director", "architect, inventor",
                   "explorer, mountaineer"),
    "instrument": ("organ, drums, guitar", "violin, cello", "guitar, sitar"),
    "movement": ("Impressionism, Post-Impressionism, Expressionism", "Cubism, Surrealism, Expressionism"),
}

class Fact(NamedTuple):
    name: str
    relation: str
    answer: str
    also: tuple[str, ...]  # other answers that are true, or arguable

def need(condition: bool, message: str) -> None:
    if not condition:
        refuse(f"facts.txt: {message}")

def read_facts(path: Path) -> list[Fact]:
    facts = []
    for line in read_text(path).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, *fields = line.split(" | ")
        need(name not in {fact.name for fact in facts}, f"{name} has two lines")
        need(len(fields) in (3, 4), f"{name} has {len(fields)} facts, not three or four")
        for field in fields:
            match = re.fullmatch(r"(\w+): ([^{},|]+?)(?: \{([^{}]+)\})?", field)
            need(match is not None, f"{name}: cannot read '{field}'")
            relation, answer, also = match.groups()
            need(relation in QUESTIONS, f"{name}: unknown relation '{relation}'")
            need((name, relation) not in {fact[:2] for fact in facts},
                 f"{name}: two facts of relation '{relation}'")
            facts.append(Fact(name, relation, answer, tuple(also.split(", ")) if also else ()))
    people = len({fact.name for fact in facts})
    need(people == PEOPLE and len(facts) == FACTS,
         f"{people} people and {len(facts)} facts, not {PEOPLE} and {FACTS}")
    return facts

def apart(a: str, b: str) -> bool:
    """Neither string contains the other."""
    return a.lower() not in b.lower() and b.lower() not in a.lower()

def false_options(answer: str, banned: set[str], pool: list[str], near: dict[str, str],
                  rng: random.Random) -> list[str]:
    """Two of `pool`, those that share the answer's `near` value first."""
    order = rng.sample(pool, len(pool))
    # stable, so random within each half
    order.sort(key=lambda x: answer not in near or near.get(x) != near[answer])
    allowed = [x for x in order if x not in banned and apart(x, answer)]
    chosen: list[str] = []
    for x in allowed:
        if len(chosen) < 2 and all(apart(x, y) for y in chosen):
            chosen.append(x)
    return chosen

def row(question: str, answer: str, options: list[str], relation: str) -> dict:
    distinct = {x.lower() for x in (answer, *options)}
    need(len(distinct) == 3, f"'{question}' has not three distinct options: {answer}, {options}")
    need(answer.lower() not in question.lower(), f"'{question}' contains its answer '{answer}'")
    return {"question": question, "answers": [answer], "false_answer_options": options, "relation": relation}

def untrue(fact: Fact) -> set[str]:
    """What may not be offered as false for this fact: the truth, what is arguable, what is too close."""
    close = (group.split(", ") for group in CLOSE.get(fact.relation, ()))
    return {fact.answer, *fact.also}.union(*(group for group in close if fact.answer in group))

def second_hops(fact: Fact, rng: random.Random) -> list[dict]:
    rows = []
    for name, question in HOPS.get(fact.relation, ()):
        table = SECOND[name]
        if fact.answer in table:
            banned = {table[x] for x in untrue(fact) if x in table}
            options = false_options(table[fact.answer], banned, sorted(set(table.values())), {}, rng)
            rows.append(row(question.format(fact.name), table[fact.answer], options,
                            f"{fact.relation} > {name}"))
    return rows

def bridges(facts: list[Fact], base: dict[Fact, dict]) -> list[dict]:
    """Questions that name the person by a work: 'Which country is the author of the novel Ulysses from?'"""
    rows = []
    for work in (fact for fact in facts if fact.relation in WORKS):
        who = f"the {WORKS[work.relation][3]} of the {work.relation} {work.answer}"
        for fact in (fact for fact in facts if fact.relation in BRIDGED):
            question = QUESTIONS[fact.relation][0].format(who)
            options = base[fact]["false_answer_options"]
            rows.append(row(question, fact.answer, options, f"{work.relation} > {fact.relation}"))
    return rows

def build(facts: list[Fact], rng: random.Random) -> dict[str, dict[str, list[dict]]]:
    pools = {relation: sorted({fact.answer for fact in facts if fact.relation == relation})
             for relation in QUESTIONS}
    base = {}
    for fact in facts:
        near = SECOND[NEAR[fact.relation]] if fact.relation in NEAR else {}
        options = false_options(fact.answer, untrue(fact), pools[fact.relation], near, rng)
        base[fact] = row(QUESTIONS[fact.relation][0].format(fact.name), fact.answer, options, fact.relation)
    need(len({x["question"] for x in base.values()}) == len(base), "a base question appears twice")

    data = {}
    for name in dict.fromkeys(fact.name for fact in facts):
        own = [fact for fact in facts if fact.name == name]
        paraphrases, hops, same = [], [], []
        for fact in own:
            paraphrases += [{**base[fact], "question": text.format(name)}
                            for text in QUESTIONS[fact.relation][1:]]
            hops += second_hops(fact, rng)
            others = [x for x in facts if x[1:3] == fact[1:3] and x.name != name]
            same += [base[x] for x in rng.sample(others, min(SAME_OBJECT, len(others)))]
        data[name] = {"hop1_unlearn": [base[fact] for fact in own], "hop1_test": paraphrases,
                      "hop2_test": hops + bridges(own, base), "same_object": same}
    return data

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.parse_args()
    data = build(read_facts(HERE / "facts.txt"), random.Random(0))
    # one question a line: small, and a changed fact shows as a changed line
    text = json.dumps(data, indent=1, ensure_ascii=False)
    text = re.sub(r"\n {4,}|\n {3}(?=\})", " ", text)
    temporary = HERE / "faithun.json.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, HERE / "faithun.json")

if __name__ == "__main__":
    run(main)
