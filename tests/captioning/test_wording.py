"""What becomes of a model's words."""

import pytest

from sd3pipe.captioning.wording import finished, steps
from sd3pipe.errors import ParameterError
from sd3pipe.rules.captioning import WordingRules


@pytest.mark.parametrize(
    "rules, text, caption",
    [
        ({}, "  a cat\n on a mat ", "a cat on a mat"),
        ({}, "long_hair, ^_^, 1girl, o_o, looking_at_viewer", "long hair, ^_^, 1girl, o o, looking at viewer"),
        ({"keep_underscores": True}, "long_hair", "long_hair"),
        ({"drop": ("a photo of",)}, "A photo of a cat", "a cat"),
        ({"drop": ("solo",)}, "1girl, solo, hat", "1girl, hat"),
        ({"drop": ("cat",)}, "a catalogue", "a catalogue"),
        ({"replace": ("cat=tabby",)}, "a cat, black cat", "a tabby, black tabby"),
        ({"replace": ("cat=",)}, "dog, cat, hat", "dog, hat"),
        ({"replace": (r"cat=\1",)}, "cat", r"\1"),
        ({"trigger": "ohwx"}, "a man in a hat", "ohwx, a man in a hat"),
        ({"trigger": "ohwx"}, "", "ohwx"),
        ({"trigger": "ohwx"}, "an ohwx man", "an ohwx man"),
        ({"trigger": "ohwx man", "class_word": "man"}, "A man in a hat", "A ohwx man in a hat"),
        ({"trigger": "ohwx", "class_word": "man"}, "a woman", "ohwx, a woman"),
        ({"prefix": "drawing of", "suffix": "by hand"}, "a cat", "drawing of a cat by hand"),
        ({"trigger": "ohwx", "prefix": "photo,"}, "a cat", "photo, ohwx, a cat"),
    ],
)
def test_rules(rules, text, caption):
    assert finished(text, WordingRules(**rules)) == caption


def test_a_trigger_that_the_dataset_file_adds_is_not_added_twice():
    assert finished("a man", WordingRules(trigger="ohwx"), told="ohwx man,") == "a man"
    assert finished("a man", WordingRules(trigger="ohwx"), told="ohwxx") == "ohwx, a man"


def test_rules_do_nothing_to_their_own_result():
    rules = WordingRules(drop=("solo",), replace=("red=crimson",), trigger="ohwx", class_word="man")
    once = finished("solo, a man, red hat", rules)
    assert finished(once, rules) == once


def test_length_is_cut_at_a_sentence_then_at_a_tag_then_at_a_word():
    def count(texts):
        return [len(text.split()) for text in texts]  # a word is a token here

    def cut(text):
        return finished(text, WordingRules(most_t5_tokens=8, suffix="end"), count_tokens=count)

    assert cut("One two three. Four five six. Seven eight nine.") == "One two three. Four five six. end"
    assert cut("a b, c d, e f, g h, i j") == "a b, c d, e f end"
    assert cut("a b c d e f g h i j") == "a b c d e f g end"
    assert cut("short") == "short end"


def test_steps_name_the_rules_that_changed_something():
    rules = WordingRules(drop=("solo",), trigger="ohwx", suffix="")
    assert list(steps("solo, long_hair", rules)) == [
        ("captioner", "solo, long_hair"),
        ("underscores", "solo, long hair"),
        ("drop solo", "long hair"),
        ("trigger", "ohwx, long hair"),
    ]


@pytest.mark.parametrize("rules", [{"replace": ("cat",)}, {"replace": ("=dog",)}, {"class_word": "man"}])
def test_rules_that_mean_nothing_are_refused(rules):
    with pytest.raises(ParameterError):
        WordingRules(**rules)
