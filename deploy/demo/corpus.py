"""The demo model's world: tasks that make questions with right answers, and the training text.

Every task draws a question from a random generator and names it with a key. A key's hash decides
whether it is held out: held-out questions never enter the training text, and they are what the
accuracy figures and expected.json are made of. No file and no network is read.
"""

import random
import zlib
from dataclasses import dataclass

from facts import (ALPHABET, ANIMALS, CAPITALS, CITIES, COLOURS, DAYS, EMOJI, FIXED, LANGUAGES, MONTHS,
                   NAMES, SYSTEM_MESSAGES, THINGS, TRANSLATIONS, WORDS)

HELD_OUT_ONE_IN = 10


@dataclass
class Example:
    """One question with its right answer; `turns` are earlier (question, answer) pairs.

    Without a key it is always training text."""
    task: str
    key: str | None
    question: str
    answer: str
    turns: tuple = ()

    @property
    def held_out(self):
        return self.key is not None and zlib.crc32(f"{self.task}:{self.key}".encode()) % HELD_OUT_ONE_IN == 0


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def casual(rng, question):
    """Questions as people type them: now and then no capital at the start, no mark at the end."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if question[-1] in "?." and rng.random() < 0.15:
        question = question[:-1]
    return question


# --- arithmetic -------------------------------------------------------------------------------

def add(rng):
    a, b = rng.randrange(100), rng.randrange(100)
    form = rng.choice(["What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b} = ?", "Add {a} and {b}.",
                       "What is {a} plus {b}?", "How much is {a} + {b}?"])
    return Example("add", f"{min(a, b)} {max(a, b)}", casual(rng, form.format(a=a, b=b)), f"{a} + {b} = {a + b}")


def subtract(rng):
    a, b = sorted((rng.randrange(100), rng.randrange(100)), reverse=True)
    form = rng.choice(["What is {a} - {b}?", "What is {a}-{b}?", "{a} - {b} = ?", "Take {b} from {a}.",
                       "What is {a} minus {b}?"])
    return Example("subtract", f"{a} {b}", casual(rng, form.format(a=a, b=b)), f"{a} - {b} = {a - b}")


def multiply(rng):
    a, b = rng.randrange(13), rng.randrange(13)
    form = rng.choice(["What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b} = ?"])
    question = form.format(a=a, b=b)
    return Example("multiply", question, casual(rng, question), f"{a} * {b} = {a * b}")


def compare(rng):
    a, b = rng.sample(range(1, 1000), 2)
    if rng.random() < 0.5:
        question, answer = f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."
    else:
        question, answer = f"Which is smaller, {a} or {b}?", f"{min(a, b)} is smaller than {max(a, b)}."
    return Example("compare", f"{min(a, b)} {max(a, b)}", casual(rng, question), answer)


# --- lists and letters ------------------------------------------------------------------------

def sort_words(rng):
    words = rng.sample(WORDS, rng.randint(2, 6))
    form = rng.choice(["Sort: {w}", "Sort these words: {w}", "Put in order: {w}"])
    question = form.format(w=rng.choice([" ", ", "]).join(words))
    return Example("sort words", " ".join(words), question, ", ".join(sorted(words)))


def sort_numbers(rng):
    numbers = rng.sample(range(100), rng.randint(2, 6))
    form = rng.choice(["Sort: {n}", "Sort these numbers: {n}", "Put in order: {n}"])
    question = form.format(n=rng.choice([" ", ", "]).join(map(str, numbers)))
    return Example("sort numbers", " ".join(map(str, numbers)), question, ", ".join(map(str, sorted(numbers))))


def invented_word(rng):
    """A word nobody has seen, so that spelling it cannot be remembered."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "", "n", "r", "s"])
                   for _ in range(rng.randint(2, 4)))


def any_word(rng):
    """A word and its key: real words have to be learned one by one, invented ones test the rule."""
    if rng.random() < 0.4:
        return rng.choice(WORDS), None
    word = invented_word(rng)
    return word, word


def spell(rng):
    word, key = any_word(rng)
    form = rng.choice(["Spell: {w}", "Spell the word {w}.", "How do you spell {w}?", "Spell '{w}'."])
    return Example("spell", key, casual(rng, form.format(w=word)), "-".join(word))


def letters(rng):
    word, key = any_word(rng)
    form = rng.choice(["How many letters are in '{w}'?", "How many letters are in the word {w}?",
                       "Count the letters of {w}."])
    return Example("letters", key, casual(rng, form.format(w=word)), f"{'-'.join(word)}: {len(word)} letters")


def count(rng):
    step = rng.choice([1, 1, 1, 1, 2, 5, 10])
    start = 0 if step == 10 else rng.randint(0, 60)
    terms = rng.randint(4, 11 if step == 10 else 70)
    numbers = [start + step * i for i in range(terms)]
    if step == 1 and rng.random() < 0.25:
        question, numbers = f"Count down from {numbers[-1]} to {numbers[0]}.", numbers[::-1]
    elif step == 1:
        question = f"Count from {numbers[0]} to {numbers[-1]}."
    else:
        question = f"Count by {step} from {numbers[0]} to {numbers[-1]}."
    return Example("count", question, casual(rng, question), ", ".join(map(str, numbers)))


def repeat(rng):
    if rng.random() < 0.5:
        words = " ".join(rng.choice(WORDS + COLOURS + list(EMOJI.values())) for _ in range(rng.randint(2, 10)))
        return Example("repeat", words, f"Repeat after me: {words}", words)
    words = " ".join(rng.choice([rng.choice(COLOURS), invented_word(rng)]) for _ in range(rng.randint(1, 3)))
    times = rng.randint(2, 8)
    return Example("repeat", words, f"Say '{words}' {times} times.", " ".join([words] * times))


def show(rng):
    animal, number = rng.choice(list(EMOJI)), rng.randint(1, 12)
    form = rng.choice(["Show me {n} {a}.", "Draw {n} {a}.", "Give me {n} {a}!"])
    plural = animal if number == 1 else ("mice" if animal == "mouse" else "foxes" if animal == "fox"
                                         else "fish" if animal == "fish" else animal + "s")
    return Example("show", f"{animal} {number}", casual(rng, form.format(n=number, a=plural)), EMOJI[animal] * number)


# --- knowledge --------------------------------------------------------------------------------

def capital(rng):
    country, pick = rng.choice(list(CAPITALS)), rng.random()
    city = CAPITALS[country]
    if pick < 0.1:
        country = invented_word(rng).capitalize()
        question = rng.choice(["What is the capital of {c}?", "Tell me the capital of {c}."]).format(c=country)
        return Example("capital", country, casual(rng, question), f"I do not know a country called {country}.")
    if pick < 0.4:
        named = city if rng.random() < 0.5 else rng.choice([other for other in CAPITALS.values() if other != city])
        answer = f"Yes, {city} is" if named == city else f"No, {city} is"
        question = rng.choice(["Is {n} the capital of {c}?", "Is the capital of {c} {n}?", "Is it true that {n} is the "
                               "capital of {c}?", "{n} is the capital of {c}, right?"]).format(n=named, c=country)
        return Example("capital", question, casual(rng, question), f"{answer} the capital of {country}.")
    forms = [("What is the capital of {c}?", "The capital of {c} is {k}."),
             ("Which city is the capital of {c}?", "The capital of {c} is {k}."),
             ("Tell me the capital of {c}.", "The capital of {c} is {k}."),
             ("Name the capital of {c}.", "The capital of {c} is {k}."),
             ("{k} is the capital of which country?", "{k} is the capital of {c}."),
             ("Which country has the capital {k}?", "{k} is the capital of {c}."),
             ("Of which country is {k} the capital?", "{k} is the capital of {c}."),
             ("Which country is {k} the capital of?", "{k} is the capital of {c}.")]
    question, answer = (text.format(c=country, k=city) for text in rng.choice(forms))
    return Example("capital", question, casual(rng, question), answer)


def animal_fact(rng):
    animal = rng.choice(list(ANIMALS))
    name, home, friend, sound, baby, legs = ANIMALS[animal]
    one = with_article(animal)
    says, has = f"{one.capitalize()} says {sound}.", f"{one.capitalize()} has {legs} legs."
    young = f"A baby {animal} is called {with_article(baby)}."
    forms = [(f"What does {one} say?", says), (f"What sound does {one} make?", says),
             (f"Which sound does {one} make?", says), (f"What is a baby {animal} called?", young),
             (f"What do you call a young {animal}?", young), (f"What is the young of {one} called?", young),
             (f"How many legs does {one} have?", has), (f"How many legs has {one}?", has)]
    question, answer = rng.choice(forms)
    return Example("animal", question, casual(rng, question), answer)


def translate(rng):
    word, language = rng.choice(list(TRANSLATIONS)), rng.randrange(len(LANGUAGES))
    form = rng.choice(["How do you say '{w}' in {l}?", "Say '{w}' in {l}.", "Translate '{w}' to {l}.",
                       "What is '{w}' in {l}?"])
    question = form.format(w=word, l=LANGUAGES[language])
    return Example("translate", question, casual(rng, question), TRANSLATIONS[word][language])


def next_of(rng):
    series = rng.choice([DAYS, MONTHS, ALPHABET])
    i, after = rng.randrange(len(series)), rng.random() < 0.5
    kind = {id(DAYS): "day", id(MONTHS): "month", id(ALPHABET): "letter"}[id(series)]
    other = series[(i + (1 if after else -1)) % len(series)]
    word = "after" if after else "before"
    question = rng.choice(["Which {k} comes {w} {x}?", "What {k} comes {w} {x}?", "What comes {w} {x}?",
                           "Name the {k} {w} {x}."]).format(k=kind, w=word, x=series[i])
    answer = f"{other} comes {word} {series[i]}."
    return Example("next", question, casual(rng, question), answer)


# --- longer answers ---------------------------------------------------------------------------

def story_text(animal, thing):
    name, home, friend, sound, baby, legs = ANIMALS[animal]
    where, deed, lesson = THINGS[thing]
    return (f"Once upon a time there was {with_article(animal)} called {name} who lived {home}. One morning {name} "
            f"found {with_article(thing)} {where}. \"{sound.capitalize()}!\" said {name}. "
            f"\"Whose {thing} is this?\" Nobody knew, so {name} went to ask a friend, the {friend}. \"Keep it,\" said the {friend}, \"but use it well.\" That evening "
            f"{name} {deed}. Everyone was glad, and the {friend} smiled. From that day on, the {animal} "
            f"and the {friend} knew that {lesson}. The end.")


def story(rng):
    animal, thing = rng.choice(list(ANIMALS)), rng.choice(list(THINGS))
    form = rng.choice(["Tell me a story about {a} and {t}.", "Tell a story about {a} and {t}.",
                       "Write a story about {a} who finds {t}.", "I want a story with {a} and {t}."])
    question = form.format(a=with_article(animal), t=with_article(thing))
    return Example("story", f"{animal} {thing}", casual(rng, question), story_text(animal, thing))


def as_json(rng):
    name, age, city = rng.choice(NAMES), rng.randint(5, 99), rng.choice(CITIES)
    form = rng.choice(["Write JSON: {n}, {a}, {c}", "Write as JSON: {n} is {a} years old and lives in {c}.",
                       "JSON for {n}, aged {a}, from {c}"])
    return Example("json", f"{name} {age} {city}", form.format(n=name, a=age, c=city),
                   f'{{"name": "{name}", "age": {age}, "city": "{city}"}}')


def recall(rng):
    """A conversation: something said at the start is asked for later, with other turns between."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    openings = [(f"My name is {name}.", f"Nice to meet you, {name}."), (f"I am {name}.", f"Nice to meet you, {name}."),
                (f"I am {name} from {city}.", f"Nice to meet you, {name} from {city}."),
                (f"My name is {name} and I live in {city}.", f"Nice to meet you, {name} from {city}.")]
    pick = rng.randrange(4)
    turns = [openings[pick]]
    for _ in range(rng.randint(0, 3)):
        between = training_example(rng, rng.choice(SHORT_TASKS))
        turns.append((between.question, between.answer))
    if pick >= 2 and rng.random() < 0.5:
        question, answer = rng.choice(["Where do I live?", "Which city am I from?"]), f"You live in {city}."
    else:
        question, answer = rng.choice(["What is my name?", "Who am I?"]), f"Your name is {name}."
    return Example("recall", f"{name} {city}", casual(rng, question), answer, tuple(turns))


def fixed(rng):
    """Small talk and recitals. All of it is in the training text, none of it counts as held out."""
    questions, answer = rng.choice(FIXED)
    return Example("fixed", None, casual(rng, rng.choice(questions)), answer)


# Each task with its share of the training text.
TASKS = {
    "add": (add, 14), "subtract": (subtract, 10), "multiply": (multiply, 3), "compare": (compare, 3),
    "sort words": (sort_words, 10), "sort numbers": (sort_numbers, 8), "spell": (spell, 6),
    "letters": (letters, 6), "count": (count, 3), "repeat": (repeat, 5), "show": (show, 4),
    "capital": (capital, 9), "animal": (animal_fact, 4), "translate": (translate, 4), "next": (next_of, 3),
    "story": (story, 4), "json": (as_json, 3), "recall": (recall, 4), "fixed": (fixed, 3),
}
SHORT_TASKS = ["add", "subtract", "multiply", "compare", "sort words", "spell", "capital", "animal", "next", "show"]


def training_example(rng, task):
    while True:
        example = TASKS[task][0](rng)
        if not example.held_out:
            return example


def held_out_examples(task, number, seed=1):
    """Up to `number` different held-out questions of one task, always the same ones."""
    rng, found = random.Random(f"{task}/{seed}"), {}
    for _ in range(200 * number):
        example = TASKS[task][0](rng)
        if example.held_out:
            found.setdefault(example.key, example)
        if len(found) == number:
            break
    return list(found.values())


def messages(example):
    """The chat messages that ask the example's question."""
    result = []
    for question, answer in example.turns:
        result += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return result + [{"role": "user", "content": example.question}]


# --- the training text ------------------------------------------------------------------------

def plain_document(rng):
    """Text outside any conversation, for completions without a chat template."""
    kind = rng.randrange(3)
    if kind == 0:
        return training_example(rng, "story").answer
    if kind == 1:
        countries = rng.sample(list(CAPITALS), rng.randint(2, 6))
        return " ".join(f"The capital of {c} is {CAPITALS[c]}." for c in countries)
    start = rng.randint(0, 50)
    return ", ".join(map(str, range(start, start + rng.randint(5, 40))))


def training_document(rng):
    """One document of the training text: a conversation in the chat format, or plain text."""
    if rng.random() < 0.06:
        return "<|begin|>" + plain_document(rng) + "<|end|>"
    parts = ["<|begin|>"]
    if rng.random() < 0.1:
        parts.append(f"<|system|>{rng.choice(SYSTEM_MESSAGES)}<|end|>")
    names, weights = list(TASKS), [weight for _, weight in TASKS.values()]
    for _ in range(rng.choice([1, 1, 1, 1, 2, 2, 3, 5])):
        example = training_example(rng, rng.choices(names, weights)[0])
        for question, answer in example.turns + ((example.question, example.answer),):
            parts.append(f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>")
    return "".join(parts)
