"""English words for object categories: plurals and numbers."""

from __future__ import annotations

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "foot": "feet", "tooth": "teeth", "goose": "geese"}
IRREGULAR |= {"mouse": "mice", "potato": "potatoes", "tomato": "tomatoes", "ox": "oxen"}
WITH_VES = frozenset({"knife", "wife", "life", "leaf", "loaf", "shelf", "scarf", "wolf", "calf", "half", "thief"})
UNCHANGED = frozenset({"sheep", "fish", "deer", "aircraft", "bison"})
PAIRS = frozenset({"skis", "scissors", "glasses", "sunglasses", "jeans", "trousers", "pants", "shorts", "headphones", "pliers"})
PIECES = frozenset({"broccoli", "bread", "furniture", "food", "luggage", "jewelry", "clothing", "fruit", "cheese"})
VOWELS = "aeiou"


def singular_phrase(category: str) -> str:
    """Return how one object of a category is named: "dog", "pair of skis", "piece of broccoli"."""
    last = category.split()[-1]
    if last in PAIRS:
        return f"pair of {category}"
    return f"piece of {category}" if last in PIECES else category


def plural_phrase(category: str) -> str:
    """Return how several objects of a category are named: "dogs", "people", "pairs of skis", "wine glasses"."""
    last = category.split()[-1]
    if last in PAIRS:
        return f"pairs of {category}"
    if last in PIECES:
        return f"pieces of {category}"
    return " ".join([*category.split()[:-1], _plural(last)])


def number_word(number: int) -> str:
    """Return "two" for 2, digits beyond twelve."""
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def _plural(word: str) -> str:
    if word in IRREGULAR or word in UNCHANGED:
        return IRREGULAR.get(word, word)
    if word in WITH_VES:
        return word.removesuffix("e").removesuffix("f") + "ves"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and len(word) > 1 and word[-2] not in VOWELS:
        return f"{word[:-1]}ies"
    return f"{word}s"
