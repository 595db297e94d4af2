"""Who is speaking? A classifier of series of different lengths, and four ways to make one row of a whole sequence.

    python examples/vowels.py                   about ten seconds
    python examples/vowels.py --seeds 5         five networks of each kind instead of three

The data are Japanese Vowels (M. Kudo, J. Toyama and M. Shimbo, Multidimensional Curve Classification Using
Passing-Through Regions, 1999): nine men say /ae/, in 12 cepstrum coefficients and 7 to 29 frames. They are read where
an installed aeon or sktime has the files; nothing is downloaded. Otherwise, and with --generated, series of that shape
are made up: a vowel glides into another, sooner or later, faster or slower, with an error and a noise.

A GRU reads the frames. Its last output, or the mean, the maximum or a learnt average of all (attention), goes through
a linear layer, and there is one target for each sequence.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

import nbrnn

SPEAKERS, CHANNELS, HIDDEN = 9, 12, 32
POOLING = {
    "last output": nbrnn.LastStep,
    "mean": nbrnn.MeanPooling,
    "maximum": nbrnn.MaxPooling,
    "attention": lambda: nbrnn.AttentionPooling(HIDDEN, seed=3),
}


def installed():
    """The folder of the original data in a package that is here, or None."""
    packages = [importlib.util.find_spec(name) for name in ("aeon", "sktime")]
    folders = [
        Path(found.origin).parent / "datasets/data/JapaneseVowels" for found in packages if found and found.origin
    ]
    return next((folder for folder in folders if (folder / "JapaneseVowels_TRAIN.ts").exists()), None)


def read(path):
    """Series (length, 12) and labels from a .ts file: channels between colons, the label behind the last."""
    series, labels = [], []
    for line in path.read_text().split("@data")[1].split():
        *channels, label = line.split(":")
        frames = np.array([channel.split(",") for channel in channels], "float32").T
        series.append(frames[: np.flatnonzero(frames.any(axis=1))[-1] + 1])  # some copies are padded with zeros
        labels.append(label)
    return series, np.unique(labels, return_inverse=True)[1]


def generate(each, rng, vowels):
    """`each` series of every speaker, from the two vowels of each: vowels (SPEAKERS, 2, 12)."""
    series, labels = [], np.repeat(np.arange(SPEAKERS), each)
    for first, second in vowels[labels]:
        t = np.linspace(0, 1, rng.integers(7, 30))[:, None]
        glide = 1 / (1 + np.exp(-(t - rng.uniform(0.2, 0.8)) / rng.uniform(0.05, 0.2)))
        error = 0.3 * rng.standard_normal(CHANNELS)
        noise = lfilter([0.2], [1, -0.8], rng.standard_normal((len(t), CHANNELS)), axis=0)
        series.append((first + (second - first) * glide + error + noise).astype("float32"))
    return series, labels


def nearest_centroid(train, labels, test):
    """The speaker whose series have the mean that is closest to that of a series."""
    means = np.array([one.mean(axis=0) for one in train])
    centroids = np.array([means[labels == speaker].mean(axis=0) for speaker in range(SPEAKERS)])
    return [np.linalg.norm(centroids - one.mean(axis=0), axis=1).argmin() for one in test]


def learn(pooling, train, labels, test, epochs, seed):
    """What a network trained on one set says about the other."""
    linear = nbrnn.Linear(HIDDEN, SPEAKERS, seed=seed + 100)
    model = nbrnn.Sequential(nbrnn.GRU(CHANNELS, HIDDEN, seed=seed), pooling(), linear)
    trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.Adam(0.005), clip_norm=1.0)
    trainer.fit(nbrnn.data.RaggedBatches(train, labels, 16, seed=seed), epochs)
    y, _ = model(nbrnn.Ragged.from_list(test))
    return y.argmax(axis=1)


def main():
    parser = argparse.ArgumentParser(description="four ways to make one row of a whole sequence")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind (default: 3)")
    parser.add_argument("--epochs", type=int, default=20, help="times that each series is read (default: 20)")
    parser.add_argument("--generated", action="store_true", help="do not look for the original data")
    options = parser.parse_args()
    folder = None if options.generated else installed()
    if folder:
        (train, labels), (test, truth) = (read(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    else:
        rng = np.random.default_rng(0)
        vowels = 0.5 * rng.standard_normal((SPEAKERS, 2, CHANNELS)) + rng.standard_normal((2, CHANNELS))
        (train, labels), (test, truth) = (generate(each, rng, vowels) for each in (30, 40))
    frames = np.concatenate(train)
    train, test = ([(one - frames.mean(axis=0)) / frames.std(axis=0) for one in part] for part in (train, test))
    L = [len(one) for one in train + test]
    print(f"{'Japanese Vowels' if folder else 'generated series'}: {len(train)} to learn from, {len(test)} others;")
    print(f"{SPEAKERS} speakers, {CHANNELS} channels, {min(L)} to {max(L)} frames\n")

    print(f"{'test accuracy, per cent':26}{'mean':>8}{'worst':>8}{'best':>8}   of {options.seeds} networks")
    centroid = 100 * np.mean(nearest_centroid(train, labels, test) == truth)
    print(f"{'nearest centroid of means':26}{centroid:8.1f}")
    for name, pooling in POOLING.items():
        found = [learn(pooling, train, labels, test, options.epochs, seed) for seed in range(options.seeds)]
        right = [100 * np.mean(guess == truth) for guess in found]
        print(f"{'GRU, ' + name:26}{np.mean(right):8.1f}{min(right):8.1f}{max(right):8.1f}", flush=True)


if __name__ == "__main__":
    main()
