"""Checkpoints: what is written is read, damage is noticed, and a resumed training is the same training."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_trainer import Batches, Do, Tiny, batch, press_ctrl_c

import nbrnn
from nbrnn.data import RandomWindows, SequentialWindows
from nbrnn.training.callbacks import Checkpointing, EarlyStopping
from nbrnn.training.checkpoint import CheckpointError, flatten, load_checkpoint, save_checkpoint, unflatten
from nbrnn.training.losses import MSE, CrossEntropy
from nbrnn.training.optimizers import SGD, Adam, AdamW
from nbrnn.training.schedules import Cosine, OnPlateau, WarmUp
from nbrnn.training.trainer import Trainer, TrainingError

ARRAYS = {
    "a": np.arange(6, dtype="float32").reshape(2, 3),
    "b.weight": np.array([1.5, -0.0, np.nan, np.inf]),
    "n": np.array(7),
    "none": np.zeros((3, 0), "int8"),
}
META = {"text": 'a\n"Ä" \udc80 $', "numbers": [1, -2.5, 2**127 + 1, None, True], "nested": {"x": {"y": []}}}


def same(left, right):
    """Equal, and the same bits."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def start(code, *arguments):
    """A process that runs in the background."""
    folders = os.path.dirname(os.path.dirname(nbrnn.__file__)), os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE)


# ------------------------------------------------------------------ the file


def test_what_is_written_is_read(tmp_path):
    save_checkpoint(tmp_path / "c", ARRAYS, META)
    arrays, meta = load_checkpoint(tmp_path / "c")
    assert same(arrays, ARRAYS)
    assert same(meta, META)
    arrays["a"][0] = 1  # they may be changed


dtypes = st.sampled_from(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">f4", ">i8"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.text(), hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, min_side=0)), max_size=4),
    st.dictionaries(st.text(), json_values, max_size=4),
)
def test_anything_comes_back(tmp_path_factory, arrays, meta):
    path = tmp_path_factory.mktemp("any") / "c"
    save_checkpoint(path, arrays, meta)
    arrays = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    read, read_meta = load_checkpoint(path)
    assert same(read, {name: read[name] for name in read})
    assert all(same(read[name], arrays[name]) for name in arrays)
    assert read.keys() == arrays.keys()
    assert same(read_meta, meta)


def test_metadata_may_hold_states_of_generators(tmp_path):
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        generator, again = np.random.Generator(kind(1)), np.random.Generator(kind(2))
        generator.random(3, np.float32)
        save_checkpoint(tmp_path / "c", {}, {"state": generator.bit_generator.state, "n": np.int64(3), "x": (1, 2)})
        meta = load_checkpoint(tmp_path / "c")[1]
        again.bit_generator.state = meta["state"]
        assert (again.random(5, np.float32) == generator.random(5, np.float32)).all()
        assert meta["n"] == 3
        assert meta["x"] == [1, 2]


def test_the_file_is_safetensors(tmp_path):
    # Read with the format's published description alone: length, JSON, raw little-endian data.
    save_checkpoint(tmp_path / "c", ARRAYS, META)
    data = (tmp_path / "c").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    strings = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in strings.values())
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        assert start == end
        end = stop
        kind = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I8": "<i1"}[entry["dtype"]]
        array = np.frombuffer(data[8 + length + start : 8 + length + stop], kind).reshape(entry["shape"])
        assert same(array, ARRAYS[name])
        assert start % array.itemsize == 0
    assert 8 + length + end == len(data)


def test_the_safetensors_library_reads_it(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    save_checkpoint(tmp_path / "c", ARRAYS, META)
    assert same(library.load_file(tmp_path / "c"), ARRAYS)


@pytest.mark.parametrize(
    ("arrays", "meta", "error", "message"),
    [
        ({"a": np.zeros(2, complex)}, {}, TypeError, "arrays: 'a' of complex128 cannot be written"),
        ({"a": np.array(["x"])}, {}, TypeError, "arrays: 'a'"),
        ({"a": np.array([{}])}, {}, TypeError, "arrays: 'a' of object cannot be written"),
        ({"__metadata__": np.zeros(2)}, {}, TypeError, "arrays: '__metadata__'"),
        ({}, {"a": [1, {"b": np.nan}]}, ValueError, r"meta.a\[1\].b: expected finite numbers, got nan"),
        ({}, {"a": {"b": Tiny}}, TypeError, "meta.a.b: type cannot be written as JSON"),
        ({}, {"a": {1: 2}}, TypeError, "meta.a: dict cannot be written as JSON"),
        ({}, {"a": {"$int": 2}}, TypeError, "meta.a: dict cannot be written as JSON"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(tmp_path, arrays, meta, error, message):
    save_checkpoint(tmp_path / "c", ARRAYS, META)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "c", arrays, meta)
    assert (tmp_path / "c").read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, function, error):
    save_checkpoint(tmp_path / "c", ARRAYS, META)
    before = (tmp_path / "c").read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path / "c", {}, {})
    assert (tmp_path / "c").read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from nbrnn.training.checkpoint import save_checkpoint\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    save_checkpoint(sys.argv[1], {'x': np.full(300_000, n)}, {'n': n})\n"
    )
    path = tmp_path / "c"
    for delay in (0.0, 0.013, 0.029):
        path.unlink(missing_ok=True)
        process = start(code, path)
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.communicate()
        arrays, meta = load_checkpoint(path)
        assert (arrays["x"] == meta["n"]).all()


def test_a_link_stays_a_link(tmp_path):
    save_checkpoint(tmp_path / "real", ARRAYS, {"n": 1})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_checkpoint(tmp_path / "link", ARRAYS, {"n": 2})
    assert (tmp_path / "link").is_symlink()
    assert load_checkpoint(tmp_path / "real")[1] == {"n": 2}


# ------------------------------------------------------------------ damage


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def head(version="1", meta="{}", **arrays):
    return {"__metadata__": {"format": "nbrnn", "version": version, "meta": meta}} | arrays


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ONE = head(x=entry())
DAMAGED = {
    "the file is empty": (b"",),
    "not a checkpoint .no safetensors header": (b"x" * 100,),
    "not a checkpoint of nbrnn, but of another program": ({"x": entry()}, bytes(8)),
    "truncated: the header needs 999 bytes": (ONE, bytes(8), 999),
    "truncated: the arrays need 8 bytes, 7 are there": (ONE, bytes(7)),
    "damaged: the arrays need 8 bytes, 9 are there": (ONE, bytes(9)),
    "format version '2', but this nbrnn reads version 1": (head("2"),),
    "damaged: the header is not valid JSON": (b'{"a": ',),
    "damaged: the header is not valid JSON .a name occurs twice": (b'{"a": 1, "a": 2}',),
    "damaged: the metadata is not valid JSON": (head(meta="{,}"),),
    "damaged: the metadata is not valid JSON .NaN is no JSON": (head(meta='{"a": NaN}'),),
    "damaged: the metadata is not valid JSON .unknown dtype 'object'": (
        head(meta='{"a": {"$array": [1], "dtype": "object"}}'),
    ),
    "damaged: the metadata is not valid JSON .maximum recursion": (head(meta='{"a": ' + "[" * 100_000),),
    "damaged: the metadata is no JSON object": (head(meta="[1]"),),
    "damaged: 'x' lacks its dtype, shape or offsets": (head(x={"dtype": "F32"}),),
    "'x': unknown dtype 'BF16'": (head(x=entry("BF16")), bytes(8)),
    r"'x': unknown dtype \['F32'\]": (head(x=entry(["F32"])), bytes(8)),
    r"damaged: 'x' has the shape \[-2\]": (head(x=entry(shape=(-2,))), bytes(8)),
    r"damaged: 'x' has the shape \[2.0\]": (head(x=entry(shape=(2.0,))), bytes(8)),
    r"damaged: 'x' has the shape \[True, 2\]": (head(x=entry(shape=(True, 2))), bytes(8)),
    r"damaged: 'x' has the shape \[0, 1": (head(x=entry(shape=(0, 10**14, 10**14), offsets=(0, 0))),),
    r"damaged: 'x' has the offsets \[0\]": (head(x=entry(offsets=(0,))), bytes(8)),
    r"damaged: 'x' has the offsets \[-8, 0\]": (head(x=entry(offsets=(-8, 0))), bytes(8)),
    r"damaged: 'x' needs 8 bytes for its shape, but has the offsets \[0, 16\]": (
        head(x=entry(offsets=(0, 16))),
        bytes(16),
    ),
    "truncated: the arrays need 1,000,008 bytes": (
        head(x=entry(), y=entry(offsets=(8, 1_000_008), shape=(250_000,))),
        bytes(8),
    ),
    "damaged: 'x' begins at byte 8, but the array before it ends at 0": (head(x=entry(offsets=(8, 16))), bytes(16)),
    "damaged: 'y' begins at byte 4, but the array before it ends at 8": (
        head(x=entry(), y=entry(offsets=(4, 12))),
        bytes(12),
    ),
    "damaged: 'y' begins at byte 0, but the array before it ends at 8": (head(x=entry(), y=entry()), bytes(8)),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damage_is_named_in_one_line(tmp_path, message):
    header, *rest = DAMAGED[message]
    path = tmp_path / "c"
    if header in (b"", b"x" * 100):
        path.write_bytes(header)
    else:
        write(path, header, *rest)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_of_other_formats_are_refused_and_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "pickle").write_bytes(pickle.dumps(Trap()))
    np.savez(tmp_path / "npz", x=np.array([Trap()], object))
    with zipfile.ZipFile(tmp_path / "torch", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap()))
    for name in ("pickle", "npz.npz", "torch"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing")


def test_every_truncation_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "c", ARRAYS, META)
    data = (tmp_path / "c").read_bytes()
    for length in range(len(data)):
        (tmp_path / "d").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "d")


def trained(tmp_path):
    """A saved training with everything in it."""
    t = Trainer(Tiny(dropout=0.2), CrossEntropy(), Adam(), schedule=WarmUp(3, OnPlateau()))
    t.fit(Batches(batch(n) for n in range(3)), epochs=2, callbacks=[Do(4, press_ctrl_c)])
    Checkpointing(tmp_path / "c").save(t)
    return tmp_path / "c"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole")).read_bytes()


bytes_ = st.integers(0, 255) | st.sampled_from(b'0123456789-{}[]",:truefalsn')


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 10**6), bytes_), min_size=1, max_size=3))
def test_no_damage_leads_to_another_error(tmp_path_factory, content, changes):
    damaged = bytearray(content)
    for place, byte in changes:
        damaged[place % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        Trainer.resume(Tiny(dropout=0.2), *load_checkpoint(path))


# ------------------------------------------------------------------ trees


@pytest.mark.parametrize("tree", [None, (), [], {}, (None, [None, {"h": ((),)}])])
def test_trees_without_arrays(tree):
    structure, leaves = flatten(tree)
    assert leaves == []
    assert same(unflatten(json.loads(json.dumps(structure)), {}), tree)


def test_trees_of_arrays():
    a, b, c = np.zeros(1), np.ones((2, 2)), np.array(3)
    tree = ({"h": [a, None]}, (b, c))
    structure, leaves = flatten(tree)
    again = unflatten(json.loads(json.dumps(structure)), {str(n): leaf for n, leaf in enumerate(leaves)})
    assert same(again, tree)
    with pytest.raises(TypeError, match="state: expected arrays"):
        flatten((a, 1.0))
    for nonsense in ("x", 1.5, {"tuple": 1}, {"set": []}, {"list": [], "tuple": []}):
        with pytest.raises((ValueError, KeyError)):
            unflatten(nonsense, {})


# ------------------------------------------------------------------ resuming


def without_time(records):
    return [{name: value for name, value in r.items() if "second" not in name} for r in records]


TOKENS = np.random.default_rng(9).integers(0, 5, 400)


class OneHot:
    """Windows of tokens as the one-hot inputs that `Tiny` wants; position and state are theirs."""

    def __init__(self, kind, seed):
        self.windows = kind(TOKENS, 5, 4, seed=seed)
        self.carries_state = self.windows.carries_state
        self.state_dict, self.load_state_dict = self.windows.state_dict, self.windows.load_state_dict

    def __len__(self):
        return len(self.windows)

    def __iter__(self):
        for x, target in self.windows:
            yield np.eye(5)[x], target


def tiny_training():
    schedule = WarmUp(7, OnPlateau(0.5, 0, threshold=0.5))  # the rate halves after the second epoch
    model = Tiny(5, 6, 5, dropout=0.3, seed=1)
    return Trainer(model, CrossEntropy(), Adam(0.02), clip_norm=0.5, clip_value=0.3, schedule=schedule)


@pytest.mark.parametrize("kind", [RandomWindows, SequentialWindows])
@pytest.mark.parametrize("step", [1, 7, 18, 19, 20, 40, 57])
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path, kind, step):
    whole = tiny_training()
    whole.fit(OneHot(kind, 5), epochs=3, validation=OneHot(SequentialWindows, 3))
    assert whole.steps == 57

    parted = tiny_training()
    saved = Checkpointing(tmp_path / "c", every_epochs=99, extra={"text": "Ä"})
    data, validation = OneHot(kind, 5), OneHot(SequentialWindows, 3)
    parted.fit(data, epochs=3, validation=validation, callbacks=[Do(step, press_ctrl_c), saved])
    assert parted.steps == step

    # Everything anew, with other parameters, other seeds and another state of the generators.
    arrays, meta = load_checkpoint(tmp_path / "c")
    assert meta["extra"] == {"text": "Ä"}
    model = Tiny(5, 6, 5, dropout=0.3, seed=77)
    resumed = Trainer.resume(model, arrays, meta)
    assert resumed.steps == step
    data, validation = OneHot(kind, 88), OneHot(SequentialWindows, 99)
    history = resumed.fit(data, epochs=3 - resumed.epoch, validation=validation)
    assert model.params.flat.tobytes() == whole.model.params.flat.tobytes()
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert without_time(history.records) == without_time(whole.history.records)


def test_a_checkpoint_between_steps_resumes_after_a_crash(tmp_path):
    whole = tiny_training()
    whole.fit(OneHot(SequentialWindows, 5), epochs=2)

    def crash(trainer):
        raise RuntimeError("power failure")

    parted = tiny_training()
    saved = Checkpointing(tmp_path / "c", every_steps=4)
    with pytest.raises(RuntimeError, match="power failure"):
        parted.fit(OneHot(SequentialWindows, 5), epochs=2, callbacks=[saved, Do(11, crash)])
    resumed = Trainer.resume(Tiny(5, 6, 5, dropout=0.3, seed=7), *load_checkpoint(tmp_path / "c"))
    assert resumed.steps == 8
    resumed.fit(OneHot(SequentialWindows, 6), epochs=2)
    assert resumed.model.params.flat.tobytes() == whole.model.params.flat.tobytes()


def network(seed):
    return nbrnn.Sequential(
        nbrnn.LSTM(5, 8, num_layers=2, dropout=0.25, seed=seed),
        nbrnn.Dropout(0.25, seed=seed + 1),
        nbrnn.Linear(8, 5, seed=seed + 2),
    )


@pytest.mark.parametrize("kind", [RandomWindows, SequentialWindows])
def test_a_resumed_training_of_real_layers_is_the_same_bit_for_bit(tmp_path, kind):
    def training():
        return Trainer(network(1), CrossEntropy(), AdamW(0.01), clip_norm=1.0, schedule=Cosine(40, 0.001))

    whole, parted = training(), training()
    whole.fit(kind(TOKENS, 5, 4, seed=5), epochs=2)
    saved = Checkpointing(tmp_path / "c", every_epochs=99)
    parted.fit(kind(TOKENS, 5, 4, seed=5), epochs=2, callbacks=[Do(23, press_ctrl_c), saved])
    resumed = Trainer.resume(network(50), *load_checkpoint(tmp_path / "c"))
    resumed.fit(kind(TOKENS, 5, 4, seed=60), epochs=1)
    assert resumed.steps == whole.steps == 38
    assert resumed.model.params.flat.tobytes() == whole.model.params.flat.tobytes()


def test_early_stopping_after_a_resume_is_the_same(tmp_path):
    def fit(t, **arguments):
        return t.fit([batch()], epochs=6, callbacks=[EarlyStopping(3), Checkpointing(tmp_path / "c")], **arguments)

    t = Trainer(Tiny(), CrossEntropy(), SGD(0.0))
    t.fit([batch()], epochs=2, callbacks=[Checkpointing(tmp_path / "c")])
    resumed = Trainer.resume(Tiny(seed=1), *load_checkpoint(tmp_path / "c"))
    fit(resumed)
    assert resumed.epoch == 4


def test_the_best_epoch_is_kept(tmp_path):
    class Scripted(Trainer):
        def evaluate(self, batches):
            return batches[self.epoch]

    t = Scripted(Tiny(), CrossEntropy(), SGD(0.1))
    saved = Checkpointing(tmp_path / "last", best_path=tmp_path / "best")
    t.fit([batch()], epochs=4, validation=[3.0, 1.0, 2.0, 1.5], callbacks=[saved])
    assert load_checkpoint(tmp_path / "last")[1]["epoch"] == 4
    assert load_checkpoint(tmp_path / "best")[1]["epoch"] == 2


def test_a_training_that_fails_leaves_the_last_good_checkpoint(tmp_path):
    good, bad = batch(), (batch()[0] * np.nan, batch()[1])
    t = Trainer(Tiny(), CrossEntropy(), SGD(0.1))
    with pytest.raises(TrainingError):
        t.fit([good, good, bad], callbacks=[Checkpointing(tmp_path / "c", every_steps=1)])
    arrays, meta = load_checkpoint(tmp_path / "c")
    assert meta["steps"] == 2
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_parameters_that_overflow_are_not_saved_over_good_ones(tmp_path):
    def steep(y, target):
        return 1.0, np.full_like(y, 1e10)

    t = Trainer(Tiny(), steep, SGD(1e-20))
    with pytest.raises(TrainingError, match=r"step 3: the parameter [WUV] holds -?(inf|nan)"):
        t.fit([batch()] * 5, callbacks=[Checkpointing(tmp_path / "c", every_steps=1), Do(2, overflow)])
    assert load_checkpoint(tmp_path / "c")[1]["steps"] == 2


def overflow(trainer):
    trainer.optimizer.lr = 1e300


# ------------------------------------------------------------------ checkpoints of something else


def test_a_checkpoint_of_another_training_is_refused_and_changes_nothing(tmp_path):
    arrays, meta = load_checkpoint(trained(tmp_path))
    mine = {"model": Tiny(dropout=0.2), "loss": CrossEntropy(), "optimizer": Adam(), "schedule": WarmUp(3, OnPlateau())}
    for change, message in [
        ({"model": Tiny(hidden=5, dropout=0.2)}, r"checkpoint: model: the checkpoint has .*'sizes': \[3, 4, 5\]"),
        ({"loss": MSE()}, "checkpoint: loss: the checkpoint has .*CrossEntropy.*, this trainer .*MSE"),
        ({"optimizer": Adam(0.1)}, "checkpoint: optimizer: the checkpoint has"),
        ({"optimizer": AdamW()}, "checkpoint: optimizer: the checkpoint has"),
        ({"schedule": None}, "checkpoint: schedule: the checkpoint has .*, this trainer None"),
        ({"clip_norm": 1.0}, "checkpoint: clip_norm: the checkpoint has None, this trainer 1.0"),
    ]:
        t = Trainer(**mine | change)
        before = t.state_dict()
        with pytest.raises(CheckpointError, match=message):
            t.load_state_dict(arrays, meta)
        assert same(t.state_dict(), before)
    # The last thing to be read is wrong: everything before it is put back.
    t = Trainer(**mine | {"model": Tiny(dropout=0.2, seed=5)})
    t.step(*batch(5))
    before = t.state_dict()
    with pytest.raises(CheckpointError, match="checkpoint: 'data' is missing"):
        t.load_state_dict(arrays, {name: value for name, value in meta.items() if name != "data"})
    assert same(t.state_dict(), before)
    t.load_state_dict(arrays, meta)
    assert same(t.state_dict()[0], arrays)


def changed(mapping, path, value):
    """A copy in which something deep inside is another."""
    name, *rest = path
    copy = dict(mapping) if isinstance(mapping, dict) else list(mapping)
    if not rest and value is KeyError:
        del copy[name]
    else:
        copy[name] = changed(copy[name], rest, value) if rest else value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["steps"], KeyError),
        (["steps"], -1),
        (["epoch"], "1"),
        (["config"], KeyError),
        (["config"], None),
        (["config", "loss"], {"name": "eval"}),
        (["config", "optimizer", "name"], "exec"),
        (["config", "clip_norm"], "much"),
        (["optimizer", "steps"], 0),
        (["optimizer", "lr"], None),
        (["schedule", "waited"], -1),
        (["generators"], []),
        (["generators", 0, "bit_generator"], "MT19937"),
        (["generators", 0, "state", "state"], "1"),
        (["state"], {"tuple": [5]}),
        (["state"], "h"),
        (["progress"], {}),
        (["progress", "items"], -1),
        (["progress", "loss_sum"], "0"),
        (["history"], 3),
        (["history"], [3]),
        (["history"], [{}]),
        (["history", 0, "loss"], "low"),
        (["history", 0, "validation_loss"], []),
        (["optimizer", "lr"], 10**400),
        (["data"], KeyError),
    ],
    ids=str,
)
def test_incomplete_metadata_is_refused(tmp_path, path, value):
    arrays, meta = load_checkpoint(trained(tmp_path))
    with pytest.raises(CheckpointError, match="checkpoint: ") as caught:
        Trainer.resume(Tiny(dropout=0.2), arrays, changed(meta, path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.W", None),
        ("model.W", np.zeros((2, 2))),
        ("model.W", np.full((4, 3), np.nan)),
        ("model.X", np.zeros(2)),
        ("optimizer.exp_avg", None),
        ("optimizer.exp_avg", np.zeros(5)),
        ("optimizer.exp_avg", np.zeros(48, "float32")),
        ("state.0", None),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, name, value):
    arrays, meta = load_checkpoint(trained(tmp_path))
    arrays = {**arrays, name: value}
    if value is None:
        del arrays[name]
    with pytest.raises(CheckpointError, match="checkpoint: "):
        Trainer.resume(Tiny(dropout=0.2), arrays, meta)


def test_a_position_needs_batches_that_can_take_it(tmp_path):
    t = tiny_training()
    t.fit(OneHot(RandomWindows, 5), callbacks=[Do(3, press_ctrl_c)])
    with pytest.raises(TypeError, match="batches: expected ones with load_state_dict"):
        t.fit([batch()])


def test_ctrl_c_from_outside_saves_and_ends(tmp_path):
    code = (
        "import sys, time, numpy as np\n"
        "from test_trainer import Tiny, batch, trainer, Callback, Checkpointing\n"
        "class Slow(Callback):\n"
        "    def on_step(self, trainer, loss):\n"
        "        print('step', flush=True)\n"
        "        time.sleep(0.02)\n"
        "history = trainer().fit([batch()], epochs=10**6, callbacks=[Slow(), Checkpointing(sys.argv[1], 10**6)])\n"
        "assert history.interrupted\n"
    )
    process = start(code, tmp_path / "c")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert load_checkpoint(tmp_path / "c")[1]["steps"] >= 1
