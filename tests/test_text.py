"""Vocabularies, baselines, sampling and language models, judged by what can be counted another way."""

import json
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from nbrnn.text import language_model
from nbrnn.text.baselines import Trigram, Unigram
from nbrnn.text.corpus import language_reference, read_text, read_texts
from nbrnn.text.language_model import LanguageModel
from nbrnn.text.run import Run
from nbrnn.text.sampling import draw, probabilities
from nbrnn.text.vocabulary import UNKNOWN, Vocabulary, tokenize
from nbrnn.training.callbacks import Callback
from nbrnn.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nbrnn.training.optimizers import Adam

LEVELS = pytest.mark.parametrize("level", ["char", "word"])

# ------------------------------------------------------------------ vocabulary


@LEVELS
@given(st.text())
def test_a_text_survives_its_tokens(level, text):
    assert "".join(tokenize(text, level)) == text
    vocabulary = Vocabulary.from_text(text, level)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert (ids > 0).all()
    assert vocabulary.decode(ids) == text


def test_words_take_the_space_before_them_and_newlines_stand_alone():
    text = "def f(x):\n    return x  # it's 1,5\n\n"
    assert tokenize(text, "word") == [
        *["def", " f", "(", "x", ")", ":", "\n", "   ", " return", " x", " ", " #", " it", "'", "s", " 1", ",", "5"],
        *["\n", "\n"],
    ]


@LEVELS
def test_tokens_are_numbered_by_frequency_and_rare_ones_are_unknown(level):
    text = "b a b a b c"
    vocabulary = Vocabulary.from_text(text, level, min_frequency=2)
    counts = Counter(tokenize(text, level))
    known = list(vocabulary.tokens[1:])
    assert set(known) == {token for token, count in counts.items() if count >= 2}
    assert [counts[token] for token in known] == sorted((counts[token] for token in known), reverse=True)
    assert vocabulary.tokens[0] == UNKNOWN
    assert vocabulary.decode(vocabulary.encode(text)).endswith(UNKNOWN)
    assert len(vocabulary) == len(known) + 1


@LEVELS
def test_a_vocabulary_survives_json(level):
    vocabulary = Vocabulary.from_text('Grüße, "Welt"!\n' * 3, level)
    again = Vocabulary.from_config(json.loads(json.dumps(vocabulary.config())))
    assert again.tokens == vocabulary.tokens
    assert again.level == vocabulary.level


def test_wrong_vocabularies_are_refused():
    with pytest.raises(ValueError, match="tokens: expected each token once"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="expected single tokens of level 'char', got 'ab'"):
        Vocabulary(["ab"])
    with pytest.raises(ValueError, match="level"):
        Vocabulary(["a"], "byte")
    with pytest.raises(ValueError, match="ids: expected numbers from 0 to 1, got 0 to 2"):
        Vocabulary(["a"]).decode([0, 2])


# ------------------------------------------------------------------ corpus


def test_the_language_reference_is_a_long_text_about_python():
    text = language_reference()
    assert len(text) > 300_000
    assert "assert_stmt" in text
    assert "yield" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"abc\0def", "binary"),
        (b"caf\xe9 au lait", "expected UTF-8 text, got byte 0xe9 at 3"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_text(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(tmp_path)


def test_files_are_read_as_utf8_and_joined(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes("\N{BOM}Grüße\r\n".encode())
    two.write_bytes(b"Welt\n")
    assert read_texts([one, two]) == "Grüße\n\nWelt\n"


# ------------------------------------------------------------------ baselines


def witten_bell(tokens, size, context, token):
    """The interpolation in its recursive words, counted anew at every call."""
    if context is None:
        return 1 / size
    order = len(context)
    runs = [tuple(tokens[i : i + order + 1]) for i in range(len(tokens) - order)]
    followers = [run[-1] for run in runs if run[:-1] == context]
    shorter = witten_bell(tokens, size, context[1:] if order else None, token)
    if not followers:
        return shorter
    different = len(set(followers))
    return (followers.count(token) + different * shorter) / (len(followers) + different)


@given(st.lists(st.integers(0, 4), min_size=3, max_size=30), st.integers(0, 4), st.integers(0, 4))
def test_trigram_probabilities_sum_to_one_and_are_those_of_the_definition(tokens, first, second):
    trigram = Trigram(np.array(tokens), 5)
    third = np.arange(5)
    result = trigram.probability(np.full(5, first), np.full(5, second), third)
    assert np.isclose(result.sum(), 1.0, rtol=1e-12)
    assert np.allclose(result, [witten_bell(tokens, 5, (first, second), token) for token in third], rtol=1e-12)


def test_trigrams_know_what_always_follows():
    tokens = np.tile([1, 2, 3, 4], 500)
    assert Trigram(tokens, 5).perplexity(tokens) < 1.01
    assert np.isclose(Unigram(tokens, 5).perplexity(tokens), 4.0, rtol=1e-2)


def test_perplexities_are_those_of_the_probabilities():
    generator = np.random.default_rng(0)
    train, test = generator.integers(0, 6, 300), generator.integers(0, 6, 50)
    trigram = Trigram(train, 6)
    logs = [np.log(witten_bell(train.tolist(), 6, (a, b), c)) for a, b, c in zip(test, test[1:], test[2:])]
    assert np.isclose(trigram.perplexity(test), np.exp(-np.mean(logs)), rtol=1e-12)
    chances = (np.bincount(train, minlength=6) + 1) / 306
    assert np.isclose(Unigram(train, 6).perplexity(test), np.exp(-np.log(chances[test]).mean()), rtol=1e-12)


def test_baselines_refuse_too_little_text():
    with pytest.raises(ValueError, match="at least 3 tokens"):
        Trigram(np.array([1, 2]), 3)
    with pytest.raises(ValueError, match="longer text"):
        Trigram(np.array([1, 2, 1]), 3).perplexity(np.array([1, 2]))


# ------------------------------------------------------------------ sampling

scores = st.lists(st.floats(-20, 20), min_size=1, max_size=12).map(np.array)


@given(scores, st.floats(0.1, 10))
def test_temperature_divides_the_scores(logits, temperature):
    assert np.allclose(probabilities(logits, temperature), softmax(logits / temperature), rtol=1e-12)


@given(scores, st.integers(1, 15))
def test_top_k_keeps_the_largest_and_their_proportions(logits, top_k):
    result = probabilities(logits, top_k=top_k)
    kept = np.flatnonzero(result)
    assert kept.size == min(top_k, logits.size)
    assert np.isclose(result.sum(), 1.0)
    assert sorted(logits[kept]) == sorted(logits)[-kept.size :]
    assert np.allclose(result[kept], softmax(logits[kept]), rtol=1e-9)


@given(scores, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_it(logits, top_p):
    full = softmax(logits)
    result = probabilities(logits, top_p=top_p)
    kept = np.flatnonzero(result)
    assert full[kept].sum() >= top_p - 1e-9
    assert full[kept].sum() - full[kept].min() < top_p + 1e-9
    assert np.isclose(sorted(full[kept])[0], sorted(full)[-kept.size])
    assert np.allclose(result[kept], softmax(logits[kept]), rtol=1e-9)


def test_excluded_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    generator = np.random.default_rng(0)
    assert {draw(probabilities(logits), generator) for _ in range(100)} == {1, 3}
    for number, index in [(0.0, 1), (1.0 - 2.0**-53, 3)]:  # the ends of what a generator returns
        assert draw(probabilities(logits), SimpleNamespace(random=lambda number=number: number)) == index


def test_draws_have_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -1.0, 0.5])
    generator = np.random.default_rng(0)
    for options in [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 2.0, "top_p": 0.5}]:
        expected = probabilities(logits, **options)
        drawn = np.bincount([draw(expected, generator) for _ in range(20_000)], minlength=5)
        # Five standard deviations of a binomial count.
        assert (abs(drawn - 20_000 * expected) <= 5 * np.sqrt(20_000 * expected * (1 - expected))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": np.nan}, "temperature"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_wrong_sampling_options(options, words):
    with pytest.raises(ValueError, match=words):
        probabilities(np.zeros(3), **options)


def test_nan_scores_are_not_sampled():
    with pytest.raises(ValueError, match="logits: expected numbers, got NaN"):
        probabilities(np.array([0.0, np.nan]))


# ------------------------------------------------------------------ language models

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 20


def small(**options):
    return LanguageModel(Vocabulary.from_text(TEXT), hidden_size=8, seed=1, **options)


CONFIGURATIONS = pytest.mark.parametrize(
    "options",
    [
        {"cell": "lstm"},
        {"cell": "gru", "num_layers": 2, "dropout": 0.3},
        {"cell": "rnn", "embedding_size": 5, "dropout": 0.3, "dtype": "float64"},
    ],
    ids=lambda options: options["cell"],
)


def test_a_model_without_knowledge_has_the_perplexity_of_its_vocabulary():
    model = small()
    model.network.params.flat[:] = 0.0
    size = len(model.vocabulary)
    assert np.isclose(model.perplexity(TEXT), size, rtol=1e-12)
    assert np.isclose(model.bits_per_character(TEXT), np.log2(size), rtol=1e-12)


@CONFIGURATIONS
def test_the_score_is_the_sum_over_the_whole_text_at_once(options):
    model, text = small(**options), TEXT * 3
    assert len(text) > 2 * language_model._CHUNK
    ids = model.vocabulary.encode(text)
    logits, _ = model.network(ids[:-1, None])
    logs = log_softmax(logits[:, 0].astype(np.float64), axis=1)[np.arange(ids.size - 1), ids[1:]]
    score = model.score(text)
    assert np.isclose(score.nats, -logs.sum(), rtol=1e-12)
    assert (score.tokens, score.characters, score.unknown) == (len(text) - 1, len(text) - 1, 0)
    assert model.score("Ω the Ω Ω").unknown == 2
    assert np.isclose(score.perplexity, np.exp(-logs.mean()), rtol=1e-12)


def test_bits_per_character_of_words_are_bits_per_word_times_words_per_character():
    text = "one two three\n" * 10
    model = LanguageModel(Vocabulary.from_text(text, "word"), hidden_size=4)
    model.network.params.flat[:] = 0.0
    words = len(tokenize(text, "word")) - 1
    expected = np.log2(len(model.vocabulary)) * words / (len(text) - len("one"))
    assert np.isclose(model.bits_per_character(text), expected, rtol=1e-12)


@CONFIGURATIONS
def test_generation_carries_the_state(options):
    model = small(**options)
    ids = model.vocabulary.encode("the qu")
    for _ in range(10):
        logits, _ = model.network(ids[:, None])
        ids = np.append(ids, 1 + logits[-1, 0, 1:].argmax()).astype(np.int32)
    assert "the qu" + model.generate("the qu", 10, greedy=True) == model.vocabulary.decode(ids)


def test_the_most_likely_token_alone_is_greedy():
    model = small()
    greedy = model.generate("the", 50, greedy=True)
    assert model.generate("the", 50, top_k=1, seed=0) == greedy
    assert model.generate("the", 50, top_p=1e-9, seed=0) == greedy
    assert model.generate("the", 50, temperature=1e-6, seed=0) == greedy
    assert model.generate("the", 50, temperature=100.0, seed=0) != greedy


def test_a_seed_fixes_the_text_and_calls_change_nothing():
    model = small()
    first = model.generate("the", 50, seed=3)
    assert model.generate("the", 50, seed=4) != first
    assert model.generate("the", 50, seed=3) == first


def test_the_first_token_has_the_distribution_of_the_scores():
    model = small()
    logits, _ = model.network(model.vocabulary.encode("the")[:, None])
    expected = softmax(logits[-1, 0, 1:].astype(np.float64) / 0.5)
    generator = np.random.default_rng(0)
    tokens = "".join(model.generate("the", 1, temperature=0.5, seed=generator) for _ in range(2000))
    drawn = np.bincount(model.vocabulary.encode(tokens), minlength=len(model.vocabulary))[1:]
    assert (abs(drawn - 2000 * expected) <= 5 * np.sqrt(2000 * expected * (1 - expected))).all()


def test_the_unknown_token_is_read_but_never_written():
    model = small()
    model.network.params["1.bias"][0] = 100.0
    assert np.isfinite(model.perplexity("Ω the Ω"))
    assert UNKNOWN not in model.generate("Ω", 50, seed=0)
    assert UNKNOWN not in model.generate("Ω", 50, greedy=True)


def test_without_a_prompt_the_text_begins_on_a_new_line():
    model = small()
    model.network.params.flat[:] *= 20.0  # so that the prompt matters
    assert model.generate("", 20, seed=0) == model.generate("\n", 20, seed=0) != model.generate(" ", 20, seed=0)


@pytest.mark.parametrize("windows", ["sequential", "random"])
def test_training_learns_the_text(windows):
    model = LanguageModel(Vocabulary.from_text(TEXT), hidden_size=32, seed=0)
    before = model.perplexity(TEXT)
    history = model.fit(
        TEXT, epochs=60, num_steps=16, batch_size=4, optimizer=Adam(0.02), windows=windows, validation=TEXT, seed=0
    )
    assert len(history.records) == 60
    assert before > 20
    assert model.perplexity(TEXT) < 1.1
    assert history.records[-1]["validation_loss"] < np.log(1.15)
    assert model.generate("the quick brown", 20, greedy=True) == " fox jumps over the "


def test_two_trainings_with_the_same_seeds_are_bit_identical():
    models = [small(num_layers=2, dropout=0.2) for _ in range(2)]
    for model in models:
        model.fit(TEXT, epochs=2, num_steps=16, batch_size=4, seed=5)
    assert (models[0].network.params.flat == models[1].network.params.flat).all()


@CONFIGURATIONS
def test_a_model_survives_its_file(tmp_path, options):
    model = small(**options)
    model.save(tmp_path / "model")
    again = LanguageModel.load(tmp_path / "model")
    assert again.config() == model.config()
    assert (again.network.params.flat == model.network.params.flat).all()
    assert again.perplexity(TEXT) == model.perplexity(TEXT)


def test_files_that_are_no_models_are_refused(tmp_path):
    small().save(tmp_path / "model")
    whole = (tmp_path / "model").read_bytes()
    save_checkpoint(tmp_path / "other", {"x": np.zeros(3)}, {"extra": {}})
    files = {"empty": b"", "text": b"once upon a time" * 10, "half": whole[: len(whole) // 2], "short": whole[:-1]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "other"]:
        with pytest.raises(CheckpointError, match=name):
            LanguageModel.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        LanguageModel.load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: LanguageModel(model.vocabulary, cell="elman"), "cell: expected one of lstm, gru, rnn"),
        (lambda model: LanguageModel(Vocabulary([])), "vocabulary: expected at least one token"),
        (lambda model: model.fit(TEXT, windows="sliding"), "windows: expected one of random, sequential"),
        (lambda model: model.fit("abc"), "needs 1,121 tokens, got 3"),
        (lambda model: model.fit(np.full(2000, 99)), "x: expected"),
        (lambda model: model.score("a"), "text: expected at least 2 chars, got 1"),
        (lambda model: model.generate("a", -1), "length: expected at least 0"),
        (lambda model: model.generate("a", 1, temperature=0.0), "temperature"),
    ],
)
def test_wrong_arguments_of_a_model(call, words):
    with pytest.raises(ValueError, match=words):
        call(small())


# ------------------------------------------------------------------ interrupted trainings

SETTINGS = {
    "cell": "lstm",
    "hidden": 8,
    "layers": 2,
    "embedding": 4,
    "dropout": 0.2,
    "dtype": "float32",
    "level": "char",
    "validation": 0.1,
    "steps": 8,
    "batch": 4,
    "epochs": 3,
    "optimizer": "adam",
    "lr": None,
    "schedule": "cosine",
    "clip": 1.0,
    "seed": 0,
}


class CtrlC(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, loss):
        if trainer.steps == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", [1, 25, 30, 70, 75])
def test_an_interrupted_training_goes_on_with_the_same_bits(tmp_path, step):
    path, out = tmp_path / "text", str(tmp_path / "model")
    path.write_text(TEXT)
    through = Run.new(SETTINGS, [str(path)])
    records = through.fit(str(tmp_path / "through")).records
    assert [record["step"] for record in records] == [25, 50, 75]
    cosine = [0.006 * (1 + np.cos(np.pi * (record["step"] - 1) / 75)) / 2 for record in records]
    assert np.allclose([record["lr"] for record in records], cosine, rtol=1e-12)

    history = Run.new(SETTINGS, [str(path)]).fit(out, [CtrlC(step)])
    assert history.interrupted
    resumed = Run.resume(out)
    assert resumed.trainer.steps == step
    assert not resumed.fit(out).interrupted
    assert (resumed.model.network.params.flat == through.model.network.params.flat).all()
    arrays, meta = load_checkpoint(out)
    expected, expected_meta = load_checkpoint(tmp_path / "through")
    assert arrays.keys() == expected.keys()
    assert all((arrays[name] == expected[name]).all() for name in arrays)
    for record, wanted in zip(meta["history"], expected_meta["history"]):
        assert {**record, "seconds": 0, "items_per_second": 0} == {**wanted, "seconds": 0, "items_per_second": 0}
    assert LanguageModel.load(out).perplexity(TEXT) == through.model.perplexity(TEXT)


def test_a_training_is_resumed_on_its_own_text_only(tmp_path):
    path, out = tmp_path / "text", str(tmp_path / "model")
    path.write_text(TEXT)
    Run.new(SETTINGS, [str(path)]).fit(out, [CtrlC(30)])
    path.write_text(TEXT.upper())
    with pytest.raises(CheckpointError, match="trained on another text"):
        Run.resume(out)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(TEXT)
    assert Run.resume(out, [str(elsewhere)]).trainer.steps == 30


def test_a_model_without_its_training_cannot_be_resumed(tmp_path):
    small().save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        Run.resume(str(tmp_path / "model"))
