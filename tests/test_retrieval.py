"""Tasks of retrieval: what is asked for is there, once, where it should be; answers are counted right; and a model that can answer, to damage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import recall
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from compress import plots, report
from compress.checkpoint import Checkpoint
from compress.cli import app
from compress.data import Sample, Samples, Tokenizer
from compress.errors import InputError
from compress.evaluate import retrieval, scoring
from compress.evaluate.retrieval import BOS, KEYS, SEP, TASKS, VALUES, Wish, associative_recall
from compress.layout import Layout
from compress.model import Model

ROOT = Path(__file__).resolve().parent.parent


# Associative recall ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 128), st.integers(1, 150), st.integers(1, 3), st.integers(0, 5))
def test_recall_asks_for_what_it_told(pairs: int, queries: int, sequences: int, seed: int) -> None:
    drawn = associative_recall(pairs, queries, sequences, seed)
    assert drawn.sequences.dtype == torch.int64 and drawn.scored.dtype == torch.bool
    assert drawn.sequences.shape == drawn.scored.shape == (sequences, 2 + 2 * (pairs + queries))
    for row, scored in zip(drawn.sequences.tolist(), drawn.scored.tolist(), strict=True):
        assert row[0] == BOS and row[drawn.start] == SEP and not {BOS, SEP} & {*row[1 : drawn.start], *row[drawn.start + 1 :]}
        told = list(zip(row[1 : drawn.start : 2], row[2 : drawn.start : 2], strict=True))
        asked = list(zip(row[drawn.start + 1 :: 2], row[drawn.start + 2 :: 2], strict=True))
        assert len(dict(told)) == len(told) == pairs and len(asked) == queries
        assert {key for key, _ in told} <= {*KEYS} and {value for _, value in told} <= {*VALUES}
        assert all(dict(told)[key] == value for key, value in asked)
        times = [[key for key, _ in asked].count(key) for key, _ in told]
        assert max(times) - min(times) <= 1
        assert [place for place, counts in enumerate(scored) if counts] == [drawn.start + 2 + 2 * index for index in range(queries)]


def test_recall_depends_on_its_seed_alone() -> None:
    one, same, other = (associative_recall(16, seed=seed).sequences for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == len(one)


def test_recall_of_more_pairs_than_keys_is_refused() -> None:
    with pytest.raises(InputError, match=r"pairs: must be from 1 to 128, got 129; there are no more keys\nqueries: must be at least 1, got 0"):
        associative_recall(129, queries=0)
    with pytest.raises(InputError, match="sequences: must be at least 1"):
        associative_recall(1, sequences=0)


def test_accuracy_and_loss_are_of_answers_alone() -> None:
    drawn = associative_recall(4, queries=3, sequences=2)
    logits = torch.randn(*drawn.sequences.shape, recall.VOCABULARY)
    right = losses = 0.0
    for row, ids, scored in zip(logits, drawn.sequences.tolist(), drawn.scored.tolist(), strict=True):
        for place in range(1, len(ids)):
            if scored[place]:
                right += int(row[place - 1].argmax()) == ids[place]
                losses -= float(row[place - 1].double().log_softmax(-1)[ids[place]])
    assert recall.accuracy(logits, drawn.sequences, drawn.scored) == right / 6
    assert recall.cross_entropy(logits, drawn.sequences, drawn.scored) == pytest.approx(losses / 6)
    certain = torch.nn.functional.one_hot(drawn.sequences.roll(-1, 1), recall.VOCABULARY) * 100.0
    assert recall.accuracy(certain, drawn.sequences, drawn.scored) == 1


# The model that can do it ---------------------------------------------------------------------------------------------------


def answers(model: Any, pairs: int, seeds: int = 3) -> tuple[float, float]:
    """Accuracy and loss over 16 sequences of each seed, 32 queries each: a standard error of at most 1.3 points with 3."""
    drawn = [associative_recall(pairs, seed=seed) for seed in range(seeds)]
    rows, scored = (torch.cat([getattr(each, part) for each in drawn]) for part in ("sequences", "scored"))
    with torch.no_grad():
        logits = model(input_ids=rows).logits
    return recall.accuracy(logits, rows, scored), recall.cross_entropy(logits, rows, scored)


@pytest.mark.parametrize("pairs", [16, 64, 96])
def test_the_model_answers_every_query(pairs: int) -> None:
    right, loss = answers(recall.trained(), pairs)
    assert right >= 0.99 and loss <= 0.01


def test_the_formula_alone_answers_most() -> None:
    assert answers(recall.constructed(), 64, seeds=1)[0] >= 0.9


@pytest.mark.parametrize(("part", "most"), [("k_proj", 0.1), ("v_proj", 0.6)])
def test_damage_to_keys_or_values_shows(part: str, most: float) -> None:
    """Of 128 channels of keys, or of values, 8 random directions are left. Guessing is right once in 128, among the values told once in 64; which of
    128 values is meant, 8 directions still tell in part."""
    assert recall.CHANCE == 1 / 128
    model = recall.trained()
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        weight = getattr(layer.self_attn, part).weight
        basis, _ = torch.linalg.qr(torch.randn(len(weight), 8, generator=generator))
        weight.data = basis @ (basis.T @ weight.data)
    assert answers(model, 64, seeds=1)[0] <= most


@torch.no_grad()
def test_block_by_block_it_answers_as_well_and_only_what_was_told(retriever: Path) -> None:
    drawn = associative_recall(64)
    samples = Samples("recall", tuple(map(Sample, drawn.sequences, drawn.scored)))
    model = Model(Layout(Checkpoint(retriever)))
    scores = scoring.compare(model, model, samples)
    logits = recall.trained()(input_ids=drawn.sequences).logits
    assert len(scores.loss) == 16 * 32 and float(scores.right.double().mean()) == recall.accuracy(logits, drawn.sequences, drawn.scored)
    assert float(scores.loss.double().mean()) == pytest.approx(recall.cross_entropy(logits, drawn.sequences, drawn.scored), rel=1e-2, abs=1e-6)
    moved = drawn.sequences.clone()
    moved[drawn.scored] = VALUES.start + (moved[drawn.scored] - VALUES.start + 1) % len(VALUES)
    assert recall.accuracy(recall.trained()(input_ids=moved).logits, moved, drawn.scored) <= 0.1


def test_its_tokenizer_has_a_word_for_every_token(retriever: Path) -> None:
    plain = Tokenizer(retriever).plain
    row = associative_recall(4, queries=2, sequences=1).sequences[0]
    text = plain.decode(row)
    assert re.fullmatch(r"<bos> (k\d+ v\d+ ){4}<sep>( k\d+ v\d+){2}", text)
    assert plain(text)["input_ids"] == row.tolist() and plain("nothing")["input_ids"] == [recall.UNKNOWN]


def test_the_command_line_takes_it(retriever: Path, tmp_path: Path) -> None:
    plain = Tokenizer(retriever).plain
    (tmp_path / "told.txt").write_text("\n".join(plain.decode(row) for row in associative_recall(16).sequences))
    recipe = f"passes:\n  - rtn: {{bits: 8, group_size: 32}}\nevaluate: {{data: {tmp_path}/told.txt, context: 98, windows: 4}}\n"
    (tmp_path / "w8.yaml").write_text(recipe)
    done = CliRunner().invoke(app, ["run", str(tmp_path / "w8.yaml"), str(retriever), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    from compress import load

    assert answers(load(tmp_path / "out"), 64, seeds=1)[0] >= 0.99


@pytest.mark.slow
def test_its_weights_can_be_made_again(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "scripts" / "train_recall.py"), "--out", str(tmp_path / "weights.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(re.findall(r"^trained, stored in bfloat16, \d+ pairs: 1\.0000 right", done.stdout, re.M)) == 3
    assert (tmp_path / "weights.safetensors").stat().st_size == recall.WEIGHTS.stat().st_size


# Prompts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [160, 201, 512, 1777])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_is_as_long_as_asked_and_tells_once_what_it_asks_for(task: str, length: int, depth: float, tokenizer: Tokenizer) -> None:
    made = retrieval.prompt(task, tokenizer.plain, length, depth)
    assert made.ids.dtype == torch.int64 and len(made.ids) == length
    assert tokenizer.plain(made.text)["input_ids"] == made.ids.tolist()
    assert answered(made.text) == made.answer
    if task == "lines":
        lines = re.findall(r"^line (\S+): REGISTER_CONTENT is <(\d+)>$", made.text, re.M)
        assert len(lines) == len(dict(lines)) == made.units
        (asked,) = re.findall(r"of line (\S+)\?", made.text)
        assert [name for name, _ in lines].index(asked) == made.before == round(depth * (made.units - 1))
    else:
        before, after = re.split(r"The pass key is \d+\. Remember it\. \d+ is the pass key\.", made.text)
        filler = re.compile("|".join(map(re.escape, retrieval.FILLER)))
        assert len(filler.findall(before)) == made.before == round(depth * made.units)
        assert len(filler.findall(after)) == made.units - made.before
    # Not a line or a sentence more would fit.
    assert length - len(tokenizer.plain(re.sub(r"(for (?:one line|it))\.[ \-.a-z]*\n", r"\1.\n", made.text))["input_ids"]) < 40


def test_prompts_depend_on_their_cell_case_and_seed_alone(tokenizer: Tokenizer) -> None:
    few, many = (retrieval.prompts(Wish("lines", lengths, (0.0, 0.5), 2), tokenizer.plain, tiny.Silent()) for lengths in ((256,), (192, 256)))
    assert [each.text for each in few[256, 0.5]] == [each.text for each in many[256, 0.5]]
    texts = {retrieval.prompt("lines", tokenizer.plain, *cell).text for cell in ((256, 0.5, 0), (256, 0.5, 1), (256, 0.0, 0), (256, 0.5, 0, 1))}
    assert len(texts) == 4
    # A change of these, by Python or by us, makes figures incomparable with earlier ones.
    assert [retrieval.prompt(task, tokenizer.plain, 192, 0.5).answer for task in ("passkey", "lines")] == [21158, 92550]


def test_words_that_are_several_tokens_leave_a_prompt_shorter_and_never_longer() -> None:
    class Characters:
        """Two tokens for every character, so that no odd length can be met."""

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [index for character in text for index in (ord(character), 0)]}

    made = retrieval.prompt("passkey", Characters(), 2001, 0.5)
    assert 2001 - 2 * 24 < len(made.ids) < 2001


@pytest.mark.parametrize("task", TASKS)
def test_lengths_that_no_prompt_has_are_refused(task: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=rf"lengths: 20 tokens are too short for {task}, which takes at least \d+ here; choose longer ones"):
        retrieval.prompt(task, tokenizer.plain, 20, 0.5)

    def whole(text: str) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    with pytest.raises(InputError, match="tokenizer: makes 1 tokens of 4 lines or sentences as of 2"):
        retrieval.prompt(task, whole, 20, 0.5)


def test_more_lines_than_there_are_names_are_refused() -> None:
    def lines(text: str) -> dict[str, list[int]]:
        return {"input_ids": [0] * text.count("\n")}

    adjectives, nouns = retrieval.ADJECTIVES.split(), retrieval.NOUNS.split()
    names = len(adjectives) * len(nouns)
    with pytest.raises(InputError, match=f"too long for lines, which has names for {names} lines; choose shorter ones"):
        retrieval.prompt("lines", lines, 10 * names, 0.5)
    assert len({*adjectives}) * len({*nouns}) == names


@pytest.mark.parametrize(("least", "per"), [(10, 1.0), (10, 7.0), (3, 1.7)])
@pytest.mark.parametrize("length", [10, 11, 50, 999, 12345])
@pytest.mark.parametrize("most", [float("inf"), 70])
def test_the_search_for_units_finds_what_counting_finds(least: int, per: float, length: int, most: float) -> None:
    calls = []

    def tokens(units: int) -> int:
        calls.append(units)
        return least + int(per * (units - retrieval.LEAST))

    counted = retrieval.LEAST
    while counted < most and tokens(counted + 1) <= length:
        counted += 1
    calls.clear()
    assert retrieval._most_units(tokens, least, length, most) == counted
    assert len(calls) <= 6 and max(calls) <= max(most, 4)


# Answers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "last", "first"),
    [
        (" <24169>\n", 24169, 24169),
        ("", None, None),
        ("I do not know.", None, None),
        ("line 3 says 42.", 42, 3),
        ("42, not 43", 43, 42),
        ("0042", 42, 42),
        ("24,169", 169, 24),
        ("7.50", 50, 7),
        ("-12", 12, 12),
        ("٣ or ²", None, None),
        ("99999999999999999999", 99999999999999999999, 99999999999999999999),
    ],
)
def test_which_integer_counts(said: str, last: int | None, first: int | None) -> None:
    assert retrieval.last_integer(said) == last and retrieval.first_integer(said) == first


def answered(text: str) -> int:
    """What a prompt asks for, by reading it."""
    if "REGISTER_CONTENT" not in text:
        (one, other) = re.findall(r"The pass key is (\d+)\. Remember it\. (\d+) is", text)[0]
        assert one == other and len(one) == 5 and text.endswith("What is the pass key? The pass key is")
        return int(one)
    (asked,) = re.findall(r"The REGISTER_CONTENT of line (\S+) is$", text)
    (number,) = re.findall(rf"^line {asked}: REGISTER_CONTENT is <(\d+)>$", text, re.M)
    return int(number)


class Reader:
    """Stands for a model of transformers: says what `speaks` makes of a prompt, a token at a time, until it is told to stop."""

    device = torch.device("cpu")

    def __init__(self, plain: Any, speaks: Callable[[str], str]) -> None:
        self._plain, self._speaks, self.said = plain, speaks, 0

    def generate(self, ids: Tensor, *, attention_mask: Tensor, max_new_tokens: int, stopping_criteria: list[Any], **options: Any) -> Tensor:
        assert ids.shape == attention_mask.shape and bool(attention_mask.all())
        assert options == {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        saying = self._plain(self._speaks(self._plain.decode(ids[0])), add_special_tokens=False)["input_ids"]
        self.said = 0
        for token in saying[:max_new_tokens]:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            self.said += 1
            if any(bool(stop(ids, None)) for stop in stopping_criteria):
                break
        return ids


def asked(tokenizer: Tokenizer, speaks: Callable[[str], str], wanted: Wish) -> dict[str, Any]:
    made = retrieval.prompts(wanted, tokenizer.plain, tiny.Silent())
    return retrieval.measure(Reader(tokenizer.plain, speaks), tokenizer.plain, wanted, made, tiny.Silent())


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_reads_is_always_right_and_one_that_goes_on_too(task: str, tokenizer: Tokenizer) -> None:
    def goes_on(text: str) -> str:
        return f" <{answered(text)}>\nline other-name: REGISTER_CONTENT is <111>\n"

    result = asked(tokenizer, goes_on, Wish(task, (160, 256), (0.0, 1.0), 2))
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(160, 0.0), (160, 1.0), (256, 0.0), (256, 1.0)]
    assert all((cell["correct"], cell["cases"], cell["accuracy"]) == (2, 2, 1.0) for cell in result["cells"])
    assert all(each["tokens"] == cell["length"] for cell in result["cells"] for each in cell["answers"])


def test_right_answers_are_counted_where_they_are(tokenizer: Tokenizer) -> None:
    turn = iter(range(1000))

    def forgets(text: str) -> str:
        """What is in the first half; of what is in the second, only the first of three."""
        number = answered(text)
        late = text.index(f"<{number}>") > len(text) / 2
        return f" <{number + (next(turn) % 3 > 0 if late else 0)}>."

    result = asked(tokenizer, forgets, Wish("lines", (400,), (0.0, 0.9), 3))
    assert [(cell["depth"], cell["correct"], cell["cases"]) for cell in result["cells"]] == [(0.0, 3, 3), (0.9, 1, 3)]
    assert result["cells"][1]["accuracy"] == 1 / 3
    wrong = result["cells"][1]["answers"][1]
    assert not wrong["correct"] and str(wrong["expected"] + 1) in wrong["said"]


def test_no_more_is_said_than_allowed_or_needed(tokenizer: Tokenizer) -> None:
    prompt = retrieval.prompt("lines", tokenizer.plain, 160, 0.0)
    for speaks, most in ((lambda _: " word" * 500, 100), (lambda _: " 12>\n" + " word" * 500, 8)):
        reader = Reader(tokenizer.plain, speaks)
        retrieval.answer(reader, tokenizer.plain, TASKS["lines"], prompt.ids)
        assert reader.said <= most
    assert TASKS["lines"].new_tokens == 100


def test_penalties_that_come_with_a_model_do_not_count(checkpoint: Callable[..., Path], tokenizer: Tokenizer) -> None:
    model, ids = tiny.plain(checkpoint("llama")), torch.randint(4, 4096, (32,))
    plainly = retrieval.answer(model, tokenizer.plain, TASKS["passkey"], ids)
    model.generation_config.update(repetition_penalty=1e6, no_repeat_ngram_size=1, do_sample=True, num_beams=2)
    assert retrieval.answer(model, tokenizer.plain, TASKS["passkey"], ids) == plainly


# The command and the plot ---------------------------------------------------------------------------------------------------


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = ["retrieval", "demo:dense", "--task", "passkey", "--lengths", "160,128", "--depths", "1,0", "--cases", "2", "--json", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(128, 0.0), (128, 1.0), (160, 0.0), (160, 1.0)]
    assert result["model"] == "demo:dense" and result["new_tokens"] == 16 and all(len(cell["answers"]) == 2 for cell in result["cells"])
    assert "128 tokens" in done.stdout and "of 8 in all" in done.stdout and [*tmp_path.iterdir()] == [out]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "found.json: exists already; choose another --json" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--task", "haystack"], "--task: must be one of lines, passkey, recall, got 'haystack'"),
        (["--lengths", "many"], "--lengths: must be numbers parted by commas, got 'many'; give tokens, such as 512,1024"),
        (["--lengths", ""], "--lengths: must be numbers parted by commas, got ''"),
        (["--lengths", "0"], "--lengths: must be positive, got 0"),
        (["--lengths", "1949"], "--lengths: 1949 and 100 new tokens are more than the 2048 that the model takes; choose at most 1948 tokens"),
        (["--lengths", "20"], "lengths: 20 tokens are too short for lines"),
        (["--depths", "0.5;1"], "--depths: must be numbers parted by commas, got '0.5;1'; give shares, such as 0,0.5,1"),
        (["--depths", "1.5,-1"], "--depths: must be from 0 (the beginning) to 1 (the end), got 1.5"),
        (["--depths", "nan"], "--depths: must be from 0 (the beginning) to 1 (the end), got nan"),
        (["--cases", "0"], "--cases: must be at least 1, got 0"),
        (["--json", "nowhere/found.json"], "nowhere/found.json: lies in no folder that exists"),
    ],
)
def test_bad_input_is_told_before_weights_load(words: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress import runtime

    monkeypatch.setattr(runtime, "load", lambda *_: pytest.fail("weights were loaded"))
    done = CliRunner().invoke(app, ["retrieval", "demo:dense", *words])
    assert done.exit_code == 2 and told in done.stderr


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["retrieval", "demo:dense", "--task", "x", "--lengths", "y", "--depths", "2", "--cases", "0"])
    assert done.exit_code == 2 and done.stderr.count("error: --") == 4
    done = CliRunner().invoke(app, ["retrieval", str(tmp_path / "none")])
    assert done.exit_code == 2 and "none" in done.stderr


def test_a_heat_map_has_a_cell_for_every_share() -> None:
    shares = [plots.Share(f"{depth:g}", f"{length:,}", right, 10) for length, right in ((512, 10), (32768, 3)) for depth in (0.0, 0.5, 1.0)]
    svg = str(plots.heat_map(shares, ("tokens", "depth"), "retrieval <by> place"))
    cells = re.findall(r'<rect class="heat" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="\d+" rx="2" fill-opacity="([\d.]+)"/>', svg)
    assert len(cells) == len({(x, y) for x, y, _, _ in cells}) == 6
    opacity = [float(each[3]) for each in cells]
    assert min(opacity[:3]) == max(opacity[:3]) > min(opacity[3:]) == max(opacity[3:]) > 0
    assert all(float(x) + float(width) <= plots.WIDTH for x, _, width, _ in cells)
    assert "<title>tokens 32,768, depth 0.5: 3 of 10</title>" in svg and svg.count(">30%</text>") == svg.count(">100%</text>") == 3
    assert 'aria-label="retrieval &lt;by&gt; place"' in svg and "retrieval <by>" not in svg
    assert ".heat {" in (Path(report.__file__).parent / "style.css.j2").read_text()


def test_names_and_figures_of_many_columns_do_not_touch() -> None:
    shares = [plots.Share("0", f"{1024 * length}", 1, 2) for length in range(1, 41)]
    svg = str(plots.heat_map(shares, ("tokens", "depth"), ""))
    named = [float(x) for x in re.findall(r'class="tick" x="([\d.]+)" y="\d+" text-anchor="middle"', svg)]
    assert 2 <= len(named) < 40 and min(b - a for a, b in pairwise(named)) >= plots.LETTER * 5
    assert svg.count('class="heat"') == 40 and "cell-text" not in svg
