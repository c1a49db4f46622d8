"""Sample prompt files in sd-scripts' three forms."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd3pipe.data.prompts import WrittenPrompt, load_prompts
from sd3pipe.errors import InputError, ParameterError


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def test_text_lines_carry_options_and_comments(tmp_path):
    text = (
        "# samples\n\na cat, sitting --n blurry, low quality --w 768 --h 1024 --d 7 --l 4.5 --s 28\r\n"
        "a dog -- with dashes\n"
    )
    first, second = load_prompts(written(tmp_path, "prompts.txt", text))
    assert first == WrittenPrompt(
        prompt="a cat, sitting",
        negative_prompt="blurry, low quality",
        width=768,
        height=1024,
        seed=7,
        scale=4.5,
        sample_steps=28,
    )
    assert first.settings() == {"width": 768, "height": 1024, "seed": 7, "scale": 4.5, "steps": 28}
    assert second == WrittenPrompt(prompt="a dog -- with dashes")
    assert second.settings() == {}


def test_toml_subsets_inherit_from_prompt(tmp_path):
    text = (
        '[prompt]\nwidth = 512\nseed = 1\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nseed = 2\n'
    )
    assert load_prompts(written(tmp_path, "p.toml", text)) == [
        WrittenPrompt(prompt="a", width=512, seed=1),
        WrittenPrompt(prompt="b", width=512, seed=2),
    ]


def test_json_is_a_list_of_tables(tmp_path):
    text = '[{"prompt": "a", "negative_prompt": "b", "sample_steps": 4, "scale": 1}]'
    (prompt,) = load_prompts(written(tmp_path, "p.json", text))
    assert prompt == WrittenPrompt(prompt="a", negative_prompt="b", sample_steps=4, scale=1)


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    plain = load_prompts(written(tmp_path, "a.txt", "a cat --w 512\na dog\n"))
    marked = load_prompts(written(tmp_path, "b.txt", b"\xef\xbb\xbfa cat --w 512\r\na dog\r\n"))
    assert plain == marked


def test_all_problems_are_told_at_once_with_their_place(tmp_path):
    path = written(tmp_path, "p.txt", "a --w big\nb --q 3\nc --s 0\nd --l -1\ne --d x\n")
    with pytest.raises(ParameterError) as caught:
        load_prompts(path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 5
    assert all(line.startswith(f"{path}: line {number}: ") for number, line in enumerate(lines, start=1))
    assert "--q 3" in lines[1]


def test_options_without_effect_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_prompts(written(tmp_path, "p.txt", "a cat --w 500 --ss euler\n"))
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "500 becomes 496" in messages
    assert "'euler' has no effect" in messages


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("p.txt", b"caf\xe9\n", InputError),
        ("p.txt", "# nothing\n", InputError),
        ("p.toml", "[prompt\n", ParameterError),
        ("p.toml", "[prompts]\n", ParameterError),
        ("p.toml", "[prompt]\nsubset = 3\n", ParameterError),
        ("p.toml", "[prompt]\nwidth = 512\n", ParameterError),
        ("p.json", '{"prompt": "a"}', ParameterError),
        ("p.json", "[", ParameterError),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, kind):
    path = written(tmp_path, name, content)
    with pytest.raises(kind) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        load_prompts(tmp_path / "none.txt")


@given(text=st.text(max_size=200), ending=st.sampled_from([".txt", ".toml", ".json"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_prompts_or_an_error_that_names_the_file(tmp_path, text, ending):
    path = written(tmp_path, "any" + ending, text.encode("utf-8", "surrogatepass"))
    try:
        prompts = load_prompts(path)
    except (InputError, ParameterError) as error:
        assert all(line.startswith(str(path)) for line in str(error).split("\n"))
    else:
        assert prompts == load_prompts(path)
        assert all(isinstance(prompt.prompt, str) for prompt in prompts)


@pytest.mark.parametrize(
    ("line", "piece"),
    [
        ("a cat --w=512 --h 512", "--w=512"),
        ("a cat --w512", "--w512"),
        ("a cat --ar 16:9", "--ar 16:9"),
        ("a cat --512", "--512"),
        ("a cat -w 512 --h 512", "-w 512"),
        ("a cat \u2013w 512", "\\u2013w 512"),
        ("a cat --n blurry \u2014h512", "\\u2014h512"),
        ("a cat --prompt dog", "--prompt dog"),
    ],
)
def test_piece_that_looks_like_an_option_and_is_none_is_named(tmp_path, line, piece):
    path = written(tmp_path, "p.txt", f"a dog --w 512\n{line}\n")
    with pytest.raises(ParameterError) as caught:
        load_prompts(path)
    (problem,) = str(caught.value).split("\n")
    assert problem.startswith(f"{path}: line 2: ")
    assert piece.encode().decode("unicode_escape") in problem
    assert "looks like an option and is none" in problem


@pytest.mark.parametrize(
    "text", ["a dog -- 3 cats", "a half-h 3 - d 5", "from 2 to -3", "a --- b", "pages 3\u20135", "x -wide"]
)
def test_dashes_of_a_text_stay_in_it(tmp_path, text):
    (prompt,) = load_prompts(written(tmp_path, "p.txt", f"{text} --w 512\n"))
    assert prompt == WrittenPrompt(prompt=text, width=512)


def test_line_of_options_alone_is_refused(tmp_path):
    with pytest.raises(ParameterError, match=r"line 2: .*no prompt: put them behind their prompt"):
        load_prompts(written(tmp_path, "p.txt", "a cat\n--w 512 --h 512\n"))
